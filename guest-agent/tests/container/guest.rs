//! The agent under test: the real one, as PID 1 of namespaces of its own instead of a virtual machine.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{self, CloneFlags};
use nix::sys::resource::{self, Resource};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use nix::sys::wait;
use nix::unistd::{self, ForkResult};
use rvm_agent::agent::Agent;
use rvm_agent::container::{RootSource, Settings, cgroup};
use rvm_agent::host::Host;
use rvm_agent::network::bring_loopback_up;

/// The host at the other end of Unix sockets, each named by its port.
struct UnixHost(PathBuf);

impl Host for UnixHost {
    fn connect(&self, port: u32) -> nix::Result<OwnedFd> {
        let failed = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        let stream = UnixStream::connect(self.0.join(port.to_string())).map_err(failed)?;
        stream.set_nonblocking(true).map_err(failed)?;
        Ok(stream.into())
    }
}

/// Serves the host of `directory` until it closes the control connection.
pub fn serve(directory: &Path) {
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC;
    sched::unshare(flags).expect("namespaces for the agent");
    // SAFETY: this program has a single thread when it serves as the agent.
    match unsafe { unistd::fork() }.expect("a fork for the agent") {
        ForkResult::Parent { child } => {
            let status = wait::waitpid(child, None).expect("the agent's end");
            let _ = fs::remove_dir(Path::new(CGROUPS).join(cgroup_name(directory)));
            assert!(matches!(status, wait::WaitStatus::Exited(_, 0)), "the agent ended with {status:?}");
        }
        ForkResult::Child => be_agent(directory),
    }
}

const CGROUPS: &str = "/sys/fs/cgroup";

fn cgroup_name(directory: &Path) -> String {
    let name = directory.file_name().expect("a named directory").to_string_lossy();
    format!("rvm-agent-test{name}")
}

fn be_agent(directory: &Path) {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).expect("proc");
    if statfs(CGROUPS).expect("a file system of cgroups").filesystem_type() != CGROUP2_SUPER_MAGIC {
        // The machine has cgroups of version 1: this shows version 2, beside them and without controllers.
        mount(Some("cgroup2"), CGROUPS, Some("cgroup2"), MsFlags::empty(), none).expect("cgroup2");
    }
    bring_loopback_up().expect("a loopback interface");
    let cgroups = Path::new(CGROUPS).join(cgroup_name(directory));
    cgroup::enable_controllers(Path::new(CGROUPS));
    fs::create_dir(&cgroups).expect("a cgroup");
    cgroup::enable_controllers(&cgroups);
    let settings = Settings {
        source: RootSource::Directory(directory.join("rootfs")),
        pristine: directory.join("pristine"),
        root: directory.join("root"),
        cgroups: cgroups.clone(),
    };
    // As in a guest, where the agent may open as many files as it is allowed to.
    let (_, hard) = resource::getrlimit(Resource::RLIMIT_NOFILE).expect("a limit of open files");
    resource::setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("the limit of open files");
    let mut agent = Agent::new(Box::new(UnixHost(directory.into())), settings).expect("an agent");
    // The host's closing of the connection is the agent's end.
    let end = agent.run().expect_err("the agent serves for ever");
    fs::write(directory.join("end"), end.to_string()).expect("a note of the end");
    let _ = fs::write(cgroups.join("cgroup.kill"), "1");
    // The kills are not instantaneous, and a cgroup with a dying process cannot be removed.
    while wait::waitpid(None, None).is_ok() {}
    for entry in fs::read_dir(&cgroups).into_iter().flatten().flatten() {
        let _ = fs::remove_dir(entry.path());
    }
}
