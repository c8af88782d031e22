//! The QEMU command line of the test host.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::kvm::Accelerator;

/// All that decides how the test host's machine is started.
pub struct Machine<'a> {
    /// What executes its instructions.
    pub accelerator: Accelerator,
    /// The system's disk, kernel and initramfs; the disk forgets all writes at the end.
    pub system: &'a Path,
    /// The disk with the engines' state.
    pub store: Store<'a>,
    /// Directory of the archives of container images, the 9p share `images`.
    pub archives: &'a Path,
    /// Where the sockets, the console's log and the pid file of this boot go.
    pub run: &'a Path,
    /// Directory of the build machine that can be mounted, read-only, as the 9p share `cache`.
    pub share: &'a Path,
    /// The port of 127.0.0.1 that leads to the test host's ssh.
    pub ssh_port: u16,
    /// Memory in MiB.
    pub memory_mib: u32,
}

/// A disk with the engines' state.
#[derive(Clone, Copy)]
pub struct Store<'a> {
    /// The image file.
    pub file: &'a Path,
    /// Whether writes change the file; otherwise they last as long as the boot.
    pub persistent: bool,
}

impl Machine<'_> {
    /// The control socket (QMP).
    pub fn control_socket(run: &Path) -> PathBuf {
        run.join("qmp.sock")
    }

    /// The file with QEMU's process id, which it removes when it ends in good order.
    pub fn pid_file(run: &Path) -> PathBuf {
        run.join("pid")
    }

    /// Everything the test host's kernel and init have printed.
    pub fn console_log(run: &Path) -> PathBuf {
        run.join("console.log")
    }

    /// The command that starts the machine in the background and returns once its devices exist.
    pub fn command(&self) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(self.arguments());
        // Discarded writes go to an unlinked file in TMPDIR. They may be large; /tmp may be memory.
        command.env("TMPDIR", self.system.parent().unwrap_or(self.system));
        command
    }

    fn command_line(&self) -> String {
        match self.accelerator {
            Accelerator::Kvm => COMMAND_LINE.to_owned(),
            // To it a repeated string instruction is a loop: single stores clear a page in half the time. And what it
            // translates holds for one address only: a program that begins elsewhere each time is translated each time,
            // which was half of what the engine's client took, and a quarter of a `docker run`.
            Accelerator::Software => format!("{COMMAND_LINE} clearcpuid=rep_good norandmaps"),
        }
    }

    fn arguments(&self) -> Vec<String> {
        let file = |name: &str| self.system.join(name).display().to_string();
        let mut arguments = self.accelerator.arguments(1024);
        let mut option = |name: &str, value: String| arguments.extend([format!("-{name}"), value]);
        option("name", "rvm-test-host".into());
        option("machine", "q35".into());
        option("m", self.memory_mib.to_string());
        option("kernel", file("vmlinuz"));
        option("initrd", file("initramfs"));
        option("append", self.command_line());
        option("drive", drive(&self.system.join("root.img"), false));
        option("drive", drive(self.store.file, self.store.persistent));
        option("netdev", format!("user,id=net,hostfwd=tcp:127.0.0.1:{}-:22", self.ssh_port));
        option("device", "virtio-net-pci,netdev=net,romfile=".into());
        option("device", "virtio-rng-pci".into());
        option("virtfs", share("cache", self.share));
        option("virtfs", share("images", self.archives));
        option("serial", format!("file:{}", Self::console_log(self.run).display()));
        option("qmp", format!("unix:{},server=on,wait=off", escape(&Self::control_socket(self.run))));
        option("pidfile", Self::pid_file(self.run).display().to_string());
        option("display", "none".into());
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot", "-daemonize"] {
            arguments.push(flag.into());
        }
        arguments
    }
}

/// Docker 20.10 insists on a loader of profiles where the kernel has AppArmor; the others do without.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off nowatchdog apparmor=0";

/// A virtio disk. An image that is lost can be made again, so nothing ever waits for the build machine's disk.
fn drive(file: &Path, persistent: bool) -> String {
    let snapshot = if persistent { "off" } else { "on" };
    format!("if=virtio,format=raw,cache=unsafe,snapshot={snapshot},file={}", escape(file))
}

fn share(tag: &str, directory: &Path) -> String {
    let directory = escape(directory);
    format!("local,mount_tag={tag},security_model=none,readonly=on,multidevs=remap,path={directory}")
}

/// In QEMU's option lists a comma in a value is written twice.
fn escape(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(persistent: bool) -> Vec<String> {
        Machine {
            accelerator: Accelerator::Software,
            system: Path::new("/cache/a,b"),
            store: Store { file: Path::new("/cache/store.img"), persistent },
            archives: Path::new("/cache/images"),
            run: Path::new("/run/host"),
            share: Path::new("/cache"),
            ssh_port: 2222,
            memory_mib: 4096,
        }
        .arguments()
    }

    fn disks(words: Vec<String>) -> Vec<String> {
        words.into_iter().filter(|word| word.starts_with("if=virtio")).collect()
    }

    #[test]
    fn the_software_processor_is_single() {
        let line = machine(false).join(" ");
        assert!(line.contains("thread=single") && line.contains("-smp 1"), "{line}");
    }

    #[test]
    fn the_way_in_is_reachable_from_this_machine_only() {
        assert!(machine(false).iter().any(|word| word.contains("hostfwd=tcp:127.0.0.1:2222-:22")));
    }

    #[test]
    fn only_a_persistent_store_is_written_to() {
        let kept = disks(machine(true));
        assert!(
            kept[0].contains("snapshot=on") && kept[0].ends_with("file=/cache/a,,b/root.img"),
            "{kept:?}"
        );
        assert!(kept[1].contains("snapshot=off") && kept[1].ends_with("file=/cache/store.img"), "{kept:?}");
        assert!(disks(machine(false))[1].contains("snapshot=on"));
    }
}
