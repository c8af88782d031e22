//! Limits and devices: what a container may use of its host, under rvm as under runc.

use anyhow::{Result, ensure};

use crate::Story;
use crate::beside_runc::{same, told};
use crate::command::{Outcome, docker, docker_run, run, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("a_kill_for_want_of_memory_is_told", a_kill_for_want_of_memory_is_told),
    ("podman_hears_of_a_kill_too", podman_hears_of_a_kill_too),
    ("a_container_goes_on_after_a_kill", a_container_goes_on_after_a_kill),
    ("the_host_bounds_it_too", the_host_bounds_it_too),
    ("limits_that_the_host_has_not_are_refused", limits_that_the_host_has_not_are_refused),
    ("a_block_device_is_a_disk", a_block_device_is_a_disk),
    ("a_read_only_block_device_cannot_be_written", a_read_only_block_device_cannot_be_written),
    ("a_file_system_of_ones_own", a_file_system_of_ones_own),
    ("other_devices_of_the_host_stay_there", other_devices_of_the_host_stay_there),
];

/// Touches so much memory at once: dd fills its buffer.
const TOO_MUCH: &str = "dd if=/dev/zero of=/dev/null count=1 bs=100M 2>/dev/null";

fn a_kill_for_want_of_memory_is_told() -> Result<()> {
    same(|runtime| {
        let mut told = String::new();
        let itself = format!("exec {TOO_MUCH}");
        let child = format!("{TOO_MUCH}; echo child: $?; exit 3");
        for script in [&itself, &child, "exit 4"] {
            let since = shell("date +%s.%N")?.text();
            let id = runtime.start(&["-m", "64m", "--memory-swap", "64m", "busybox", "sh", "-c", script])?;
            docker(&["wait", &id])?.expect_code(0)?;
            let state = "{{.State.OOMKilled}} {{.State.ExitCode}} {{.State.Status}}";
            told += &docker(&["inspect", "-f", state, &id])?.text();
            told += &docker(&["logs", &id])?.text();
            let until = shell("date +%s.%N")?.text();
            let window =
                ["--since", &since, "--until", &until, "--filter", "event=oom", "--format", "{{.Action}}"];
            told += &docker(&[&["events"], &window[..]].concat())?.text();
            docker(&["rm", &id])?.expect_code(0)?;
            told.push('\n');
        }
        Ok(told)
    })
}

fn podman_hears_of_a_kill_too() -> Result<()> {
    let killed = |runtime: &str| -> Result<String> {
        let name = "e2e-killed";
        let words = ["run", "--name", name, "--runtime", runtime, "--network", "none", "-m", "64m"];
        let script = format!("exec {TOO_MUCH}");
        let ended = run("podman", &[&words[..], &["busybox", "sh", "-c", &script]].concat())?;
        let seen =
            run("podman", &["inspect", "-f", "{{.State.OOMKilled}} {{.State.ExitCode}}", name])?.text();
        run("podman", &["rm", name])?.expect_code(0)?;
        Ok(format!("{} {seen}", ended.code))
    };
    let seen = killed("crun").and_then(|theirs| Ok((theirs, killed("/usr/local/bin/rvm")?)));
    // podman tries the host's limits out, with any runtime, and does not always take that back.
    let _ = std::fs::remove_dir("/sys/fs/cgroup/podman_probe");
    let (theirs, ours) = seen?;
    ensure!(theirs == ours, "with crun podman says {theirs}, with rvm {ours}");
    Ok(())
}

fn a_container_goes_on_after_a_kill() -> Result<()> {
    same(|runtime| {
        let id = runtime.start(&["-m", "64m", "--memory-swap", "64m", "busybox", "sleep", "1000"])?;
        let mut told = String::new();
        for _ in 0..3 {
            told += &self::told(&docker(&["exec", &id, "sh", "-c", TOO_MUCH])?);
        }
        told += &self::told(&docker(&["exec", &id, "echo", "alive"])?);
        docker(&["update", "-m", "300m", "--memory-swap", "300m", &id])?;
        told += &docker(&["inspect", "-f", "{{.State.OOMKilled}} {{.State.Running}}", &id])?.text();
        docker(&["pause", &id])?.expect_code(0)?;
        docker(&["unpause", &id])?.expect_code(0)?;
        let used = docker(&["stats", "--no-stream", "--format", "{{.MemUsage}} {{.PIDs}}", &id])?.text();
        ensure!(!used.starts_with("0B"), "docker stats counts {used}");
        docker(&["rm", "-f", &id])?.expect_code(0)?;
        Ok(told)
    })
}

fn the_host_bounds_it_too() -> Result<()> {
    let disk = LoopDevice::make()?;
    let bytes = format!("{}:1mb", disk.path);
    let calls = format!("{}:77", disk.path);
    let io = ["--device-read-bps", &bytes, "--device-write-bps", &bytes, "--device-read-iops", &calls];
    let io = [&io[..], &["--device-write-iops", &calls]].concat();
    let others = ["--cpus", "0.5", "--cpuset-cpus", "0", "-m", "64m"];
    same(|runtime| {
        let id = runtime.start(&[&io[..], &others[..], &["busybox", "sleep", "1000"]].concat())?;
        let controls = format!("cd /sys/fs/cgroup/docker/{id} && cat cpu.max cpuset.cpus io.max");
        let seen = shell(&controls)?.expect_code(0)?.text();
        let memory = shell(&format!("cat /sys/fs/cgroup/docker/{id}/memory.max"))?.text();
        // The machine's own memory comes on top of the workload's.
        let most: u64 = if runtime.runtime == "rvm" { 256 << 20 } else { 64 << 20 };
        ensure!((64 << 20..=most).contains(&memory.parse::<u64>()?), "memory.max is {memory}");
        docker(&["rm", "-f", &id])?.expect_code(0)?;
        Ok(seen)
    })
}

fn limits_that_the_host_has_not_are_refused() -> Result<()> {
    same(|runtime| {
        let weight = runtime.run(&["--blkio-weight", "300", "busybox", "true"])?;
        let nonsense = runtime.run(&["--cpuset-cpus", "77", "busybox", "true"])?;
        Ok(format!("{} {}", weight.code, nonsense.code))
    })?;
    let real_time = docker_run(&["--cpu-rt-runtime", "1000", "busybox", "true"])?;
    real_time.expect_code(125).map(drop)
}

fn a_block_device_is_a_disk() -> Result<()> {
    same(|runtime| {
        let disk = LoopDevice::make()?;
        let script = "ls -l /dev/xvdc | cut -c 1-10; test -b /dev/xvdc && echo block; \
                      dd if=/dev/xvdc bs=1 count=5 skip=512 2>/dev/null; echo; \
                      blockdev --getsize64 /dev/xvdc; blockdev --getro /dev/xvdc; \
                      printf written | dd of=/dev/xvdc bs=1 seek=1M conv=notrunc,fsync 2>/dev/null; echo $?";
        let device = format!("{}:/dev/xvdc", disk.path);
        let seen = told(&runtime.run(&["--device", &device, "busybox", "sh", "-c", script])?);
        let found = shell(&format!("dd if={} bs=1 count=7 skip=1M 2>/dev/null", disk.file))?.text();
        // Without the option it is not there, and a node that root makes of its numbers leads nowhere.
        let absent = runtime.run(&["busybox", "ls", "/dev/xvdc"])?.code;
        Ok(format!("{seen}\non the host: {found}\nwithout it: {absent}"))
    })
}

fn a_read_only_block_device_cannot_be_written() -> Result<()> {
    same(|runtime| {
        let disk = LoopDevice::make()?;
        let script = "dd if=/dev/xvdc bs=1 count=5 skip=512 2>/dev/null; echo; echo x >/dev/xvdc";
        let device = format!("{}:/dev/xvdc:r", disk.path);
        let seen = told(&runtime.run(&["--device", &device, "busybox", "sh", "-c", script])?);
        let found = shell(&format!("head -c 1 {} | od -An -c", disk.file))?.text();
        Ok(format!("{seen}\n{found}"))
    })
}

/// The guest's kernel mounts it, not the host's: what is on the disk is parsed behind the wall.
fn a_file_system_of_ones_own() -> Result<()> {
    let disk = LoopDevice::make()?;
    shell(&format!("busybox mke2fs {}", disk.path))?.expect_code(0)?;
    let script =
        "mkdir -p /mnt && mount -t ext2 /dev/xvdc /mnt && echo kept >/mnt/file && umount /mnt; echo $?";
    let options = ["--cap-add", "SYS_ADMIN", "--device", &format!("{}:/dev/xvdc", disk.path)];
    docker_run(&[&options[..], &["busybox", "sh", "-c", script]].concat())?.expect_text("0")?;
    let line =
        "mkdir -p /run/e2e && mount -o ro {} /run/e2e && cat /run/e2e/file; umount /run/e2e; rmdir /run/e2e";
    shell(&line.replace("{}", &disk.path))?.expect_text("kept")
}

fn other_devices_of_the_host_stay_there() -> Result<()> {
    let disk = LoopDevice::make()?;
    let refused: Outcome = docker_run(&["--device=/dev/kvm", "busybox", "true"])?;
    refused.expect_code(125)?.expect_failure(&["/dev/kvm", "only block devices"])?;
    // Privileged is privileged in the guest: of the host's disks there is none.
    let look = ["--privileged", "busybox", "sh", "-c", "grep -c -e vda -e loop0 /proc/partitions"];
    docker_run(&look)?.expect_code(1)?;
    drop(disk);
    Ok(())
}

/// A disk of the host's to give away: 16 MiB in a file.
struct LoopDevice {
    path: String,
    file: String,
    _folder: tempfile::TempDir,
}

impl LoopDevice {
    fn make() -> Result<LoopDevice> {
        let folder = tempfile::tempdir_in("/var/tmp")?;
        let file = folder.path().join("disk.img").display().to_string();
        shell(&format!("truncate -s 16M {file} && printf hello | dd of={file} bs=1 seek=512 conv=notrunc"))?
            .expect_code(0)?;
        let path = shell(&format!("losetup --find --show {file}"))?.expect_code(0)?.text();
        Ok(LoopDevice { path, file, _folder: folder })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = shell(&format!("losetup --detach {}", self.path));
    }
}
