//! One run of the small host's machine: QEMU, its console, and the three streams of the command.
//!
//! Everything goes through inherited file descriptors, so a run leaves no file behind, however it ends.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use rvm_tests::support::kvm::Accelerator;

/// Lines of the console that an error repeats.
const TAIL: usize = 25;

/// What QEMU needs to know.
pub struct Machine<'a> {
    /// What executes its instructions.
    pub accelerator: Accelerator,
    /// The kernel (bzImage).
    pub kernel: &'a Path,
    /// Its initramfs.
    pub initramfs: File,
    /// Memory in MiB.
    pub memory_mib: u32,
}

/// The streams of the command, by the number of their port in the guest. Port 0 is reserved for a console.
const PORTS: [&str; 3] = ["out", "err", "status"];

impl Machine<'_> {
    /// Boots, forwards the command's output, and returns the exit status that the guest reports.
    pub fn run(self, timeout: Duration, show_console: bool) -> Result<u8> {
        let (console, console_end) = inheritable_pair()?;
        let (out, out_end) = inheritable_pair()?;
        let (err, err_end) = inheritable_pair()?;
        let (status, status_end) = inheritable_pair()?;
        inherit(&self.initramfs)?;
        let ends = [&out_end, &err_end, &status_end].map(AsRawFd::as_raw_fd);

        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(self.arguments(console_end.as_raw_fd(), ends))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let mut qemu =
            Running(command.stderr(Stdio::piped()).spawn().context("cannot start qemu-system-x86_64")?);
        // A stream ends when nobody holds its other end.
        drop((console_end, out_end, err_end, status_end));

        let complaints = qemu.0.stderr.take().context("QEMU has no standard error")?;
        let complaints = forward(complaints, Vec::new());
        let console = forward(console, Console { shown: show_console, text: Vec::new() });
        let out = forward(out, io::stdout());
        let err = forward(err, io::stderr());
        let status = forward(status, Vec::new());
        let in_time = qemu.wait(timeout)?;
        join(out)?;
        join(err)?;
        let status = join(status)?;
        let logs = [join(complaints)?, join(console)?.text];
        match parse_status(&status) {
            Some(status) if in_time => Ok(status),
            _ if in_time => bail!(trouble("the small host died before the command ended", &logs)),
            _ => bail!(trouble(&format!("the command took more than {} s", timeout.as_secs()), &logs)),
        }
    }

    fn arguments(&self, console: i32, ports: [i32; 3]) -> Vec<String> {
        let words = format!(
            "-machine q35 -m {} \
             -nodefaults -no-user-config -display none -no-reboot -device virtio-serial-pci \
             -chardev socket,id=console,fd={console} -serial chardev:console",
            self.memory_mib
        );
        let mut arguments = self.accelerator.arguments(512);
        arguments.extend(words.split_whitespace().map(String::from));
        let mut option = |name: &str, value: String| arguments.extend([format!("-{name}"), value]);
        option("kernel", self.kernel.display().to_string());
        option("initrd", format!("/proc/self/fd/{}", self.initramfs.as_raw_fd()));
        option("append", "console=ttyS0 quiet panic=-1 mitigations=off nowatchdog".into());
        for (index, (name, descriptor)) in PORTS.iter().zip(ports).enumerate() {
            option("chardev", format!("socket,id={name},fd={descriptor}"));
            option("device", format!("virtserialport,chardev={name},nr={}", index + 1));
        }
        arguments
    }
}

/// A QEMU that does not outlive its caller.
struct Running(Child);

impl Running {
    /// Waits for the end; kills and says `false` when that does not come in time.
    fn wait(&mut self, timeout: Duration) -> Result<bool> {
        let deadline = Instant::now() + timeout;
        while self.0.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.0.kill()?;
                self.0.wait()?;
                return Ok(false);
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(true)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // An error here means that it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Keeps what the kernel prints, and shows it when asked to.
struct Console {
    shown: bool,
    text: Vec<u8>,
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.shown {
            io::stderr().write_all(bytes)?;
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connected pair whose second end a child process inherits.
fn inheritable_pair() -> Result<(UnixStream, UnixStream)> {
    let (own, other) = UnixStream::pair().context("cannot make a pair of sockets")?;
    inherit(&other)?;
    Ok((own, other))
}

fn inherit(descriptor: impl AsFd) -> Result<()> {
    fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty())).context("cannot pass a file descriptor to QEMU")?;
    Ok(())
}

/// Copies a stream until it ends, piece by piece as it comes.
fn forward<R: Read + Send + 'static, W: Write + Send + 'static>(
    mut from: R,
    mut to: W,
) -> JoinHandle<io::Result<W>> {
    thread::spawn(move || {
        let mut buffer = [0; 16 * 1024];
        loop {
            match from.read(&mut buffer)? {
                0 => return Ok(to),
                count => to.write_all(&buffer[..count])?,
            }
            to.flush()?;
        }
    })
}

fn join<W>(thread: JoinHandle<io::Result<W>>) -> Result<W> {
    match thread.join() {
        Ok(result) => result.context("cannot forward the small host's output"),
        Err(_) => bail!("the thread that forwards the small host's output panicked"),
    }
}

/// `what`, and the last lines of each of `logs`.
fn trouble(what: &str, logs: &[Vec<u8>]) -> String {
    let mut message = what.to_owned();
    for log in logs {
        let text = String::from_utf8_lossy(log).into_owned();
        // QEMU warns of every feature that the software processor lacks of a real one of that name.
        let lines: Vec<_> =
            text.lines().filter(|line| !line.contains("doesn't support requested feature")).collect();
        for line in &lines[lines.len().saturating_sub(TAIL)..] {
            message.push_str("\n  ");
            message.push_str(line);
        }
    }
    message
}

fn parse_status(bytes: &[u8]) -> Option<u8> {
    str::from_utf8(bytes).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_one_number() {
        assert_eq!(parse_status(b"127\n"), Some(127));
        assert_eq!(parse_status(b""), None);
        assert_eq!(parse_status(b"256\n"), None);
    }

    #[test]
    fn the_software_processor_is_a_single_amd_one() {
        let initramfs = tempfile::tempfile().unwrap();
        let accelerator = Accelerator::Software;
        let machine = Machine { accelerator, kernel: Path::new("/x"), initramfs, memory_mib: 512 };
        let line = machine.arguments(7, [8, 9, 10]).join(" ");
        for part in [
            "-cpu EPYC",
            "-smp 1",
            "thread=single",
            "-m 512",
            "fd=7",
            "id=status,fd=10",
            "chardev=status,nr=3",
        ] {
            assert!(line.contains(part), "{part} not in {line}");
        }
    }

    #[test]
    fn a_hanging_machine_is_ended() {
        let mut hanging = Running(Command::new("sleep").arg("600").spawn().unwrap());
        assert!(!hanging.wait(Duration::from_millis(1)).unwrap());
        let mut ending = Running(Command::new("true").spawn().unwrap());
        assert!(ending.wait(Duration::from_secs(60)).unwrap());
    }

    #[test]
    fn trouble_repeats_the_end_of_the_logs_without_noise() {
        let log = b"TCG doesn't support requested feature: x\nBUG: first\nPanic\n".to_vec();
        assert_eq!(trouble("died", &[log]), "died\n  BUG: first\n  Panic");
    }
}
