//! From the kernel to the first message: what PID 1 does before it serves the host.
//!
//! Every step is a handful of system calls; nothing here waits, sleeps or looks twice. What must not fail
//! ends the guest with one line on the console, which the monitor shows to the user.

use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::panic;
use std::path::Path;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{self, RebootMode};
use nix::sys::resource::{self, Resource};
use nix::sys::signal::{self, SigHandler, Signal};
use nix::sys::stat::{self, Mode};
use nix::unistd;
use rvm_protocol::MOST_OPEN_FILES;

use crate::agent::Agent;
use crate::container::{Settings, cgroup};
use crate::error::{Context, Result, other};
use crate::host::VsockHost;
use crate::process::launch::IS_CHILD;
use crate::{network, process};

/// How many open files the agent may have, and processes of the container at most, unless they ask for more: what
/// systemd gives to services, and so to those of an engine. The kernel's own is that of a much smaller machine.
/// What a process starts with is another matter: see [`rlimits`](crate::process::rlimits).
const OPEN_FILES: u64 = 524_288;

/// Serves the host until it closes the control connection, then ends the guest.
pub fn run() -> libc::c_int {
    panic::set_hook(Box::new(|information| {
        report(&format!("rvm-agent: {information}"));
        if IS_CHILD.load(Ordering::Relaxed) {
            // SAFETY: ends this process at once; nothing of it is to be dropped.
            unsafe { libc::_exit(101) };
        }
        end_guest();
    }));
    if let Err(error) = serve() {
        report(&format!("rvm-agent: {error}"));
    }
    end_guest();
    1
}

fn serve() -> Result<()> {
    let settings = Settings::guest();
    set_up_guest(&settings)?;
    let mut agent = Agent::new(Box::new(VsockHost), settings)?;
    agent.run().map_err(|error| other(error.to_string()))
}

fn set_up_guest(settings: &Settings) -> Result<()> {
    // What the kernel started this with may be anything.
    stat::umask(Mode::from_bits_truncate(0o022));
    for directory in ["/dev", "/proc", "/sys", "/base"].map(Path::new) {
        make_directory(directory)?;
    }
    make_directory(&settings.pristine)?;
    make_directory(&settings.root)?;
    move_off_initial_root()?;
    mount_on("devtmpfs", "/dev", None)?;
    open_standard_streams()?;
    mount_on("proc", "/proc", None)?;
    mount_on("sysfs", "/sys", None)?;
    // A container that may write to its cgroup must not lift its own limits (cgroup-v2.rst, "Delegation").
    mount_on("cgroup2", "/sys/fs/cgroup", Some("nsdelegate"))?;
    cgroup::enable_controllers(Path::new("/sys/fs/cgroup"));
    protect_agent()?;
    promise_memory()?;
    compact_on_demand();
    network::bring_loopback_up()
}

/// A program in a container may reserve as much memory as a host would promise it, and is limited by what it uses. By its
/// own judgement the kernel promises no more at once than the machine has, which is little above the container's limit.
fn promise_memory() -> Result<()> {
    fs::write("/proc/sys/vm/overcommit_memory", "1").context(|| "promising memory as a larger machine would")
}

/// The kernel would wake up twice a second to see whether its free memory is in pieces, in each of many idle guests of a
/// host. It puts memory together when huge pages are asked for in any case. A kernel that never does it has no such setting.
fn compact_on_demand() {
    let _ = fs::write("/proc/sys/vm/compaction_proactiveness", "0");
}

/// The initial root cannot be exchanged by `pivot_root`, nor can a root that lies directly on it. So the
/// same files are mounted a second time, on top.
fn move_off_initial_root() -> Result<()> {
    let what = || "mounting the guest's root";
    let none = None::<&str>;
    mount(Some("/"), "/base", none, MsFlags::MS_BIND, none).context(what)?;
    // Whoever gets hold of the agent's program through /proc must not change it: init is always running.
    mount(none, "/", none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY, none)
        .context(what)?;
    unistd::chdir("/base").context(what)?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none).context(what)?;
    unistd::chroot(".").context(what)?;
    unistd::chdir("/").context(what)
}

fn make_directory(path: &Path) -> Result<()> {
    match unistd::mkdir(path, Mode::from_bits_truncate(0o755)) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(errno) => Err(errno).context(|| format!("making the directory {}", path.display())),
    }
}

fn mount_on(kind: &str, place: &str, options: Option<&str>) -> Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    match mount(Some(kind), place, Some(kind), flags, options) {
        // Kernels may mount some of these by themselves.
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(errno) => Err(errno).context(|| format!("mounting {kind} on {place}")),
    }
}

/// Gives every standard stream a file, so that no other descriptor gets one of their numbers.
fn open_standard_streams() -> Result<()> {
    loop {
        let file = process::open_null()?;
        if file.as_raw_fd() > libc::STDERR_FILENO {
            return Ok(());
        }
        // Stays open for the life of the agent.
        std::mem::forget(file);
    }
}

fn protect_agent() -> Result<()> {
    fs::write("/proc/self/oom_score_adj", "-1000").context(|| "protecting the agent from the OOM killer")?;
    // SAFETY: ignoring a signal runs no code of this process.
    unsafe { signal::signal(Signal::SIGPIPE, SigHandler::SigIgn) }.context(|| "ignoring SIGPIPE")?;
    // Limits that the host has granted shall not meet a lower ceiling here.
    fs::write("/proc/sys/fs/nr_open", MOST_OPEN_FILES.to_string())
        .context(|| "raising the ceiling of open files")?;
    resource::setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES)
        .and_then(|()| {
            let unlimited = libc::RLIM_INFINITY;
            resource::setrlimit(Resource::RLIMIT_NPROC, unlimited, unlimited)
        })
        .context(|| "setting the limits of the agent")
}

/// Writes a line to the kernel's console.
fn report(line: &str) {
    if let Ok(mut console) = fs::OpenOptions::new().write(true).open("/dev/console") {
        let _ = writeln!(console, "{line}");
    }
}

/// Resets the machine, which its monitor takes for its end.
fn end_guest() {
    if unistd::getpid().as_raw() == 1 {
        unistd::sync();
        let _ = reboot::reboot(RebootMode::RB_AUTOBOOT);
    }
}
