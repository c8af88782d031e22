//! What the monitor process becomes before it builds the machine: leader of a session, in namespaces of the
//! container, with the container's standard streams set aside.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{close, sethostname, setsid};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::MonitorError;
use crate::console;
use crate::stdio::is_null;

/// How many descriptors a monitor has room for from its beginning. A start takes some 80, each process of the container six.
const DESCRIPTORS: i32 = 512;

/// The container's standard streams as `create` got them from the engine.
#[derive(Debug)]
pub struct Stdio {
    /// Standard input, or the terminal; none if it is `/dev/null`.
    pub stdin: Option<OwnedFd>,
    /// Standard output, or the terminal.
    pub stdout: Option<OwnedFd>,
    /// Standard error, or the terminal.
    pub stderr: Option<OwnedFd>,
}

impl Stdio {
    /// Takes this process's standard streams and puts `/dev/null` in their place, so that they close when the
    /// container closes them.
    pub fn take() -> io::Result<Stdio> {
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        let stdio = Stdio {
            stdin: (!is_null(io::stdin())).then(|| io::stdin().as_fd().try_clone_to_owned()).transpose()?,
            stdout: Some(io::stdout().as_fd().try_clone_to_owned()?),
            stderr: Some(io::stderr().as_fd().try_clone_to_owned()?),
        };
        nix::unistd::dup2_stdin(&null)?;
        nix::unistd::dup2_stdout(&null)?;
        nix::unistd::dup2_stderr(&null)?;
        Ok(stdio)
    }
}

/// Becomes independent of the command that started this process.
pub fn detach(terminal: bool) -> io::Result<()> {
    // The command's parent may have asked for its death with its own; this process outlives both.
    prctl::set_pdeathsig(None)?;
    setsid()?;
    if terminal {
        console::control_terminal(io::stdin())?;
    }
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    make_room_for_descriptors();
    // A core of this process would be the guest's whole memory.
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    Ok(())
}

/// While threads share a table of descriptors, the kernel waits for all processors' readers each time that it grows
/// (`expand_fdtable`), some 10 ms in the midst of a start. Now there is one thread.
fn make_room_for_descriptors() {
    // It is closed at once; the table stays as large. Where so many are not allowed, it grows later.
    let _ = fcntl(io::stdin(), FcntlArg::F_DUPFD_CLOEXEC(DESCRIPTORS - 1)).and_then(close);
}

/// Enters the container's namespaces on this host: those that the spec has a path for, otherwise new ones. What processes
/// share is the guest's own; here it keeps the monitor apart from the host. User namespaces and those of processes are the
/// guest's alone: the monitor opens devices as the host's root, and is what the host knows the container by.
pub fn enter_namespaces(spec: &Spec) -> Result<(), MonitorError> {
    let list = spec.linux().iter().flat_map(|linux| linux.namespaces().iter().flatten());
    let mut names = false;
    for namespace in list {
        let (kind, name) = match namespace.typ() {
            LinuxNamespaceType::Network => (CloneFlags::CLONE_NEWNET, "network"),
            LinuxNamespaceType::Ipc => (CloneFlags::CLONE_NEWIPC, "IPC"),
            LinuxNamespaceType::Cgroup => (CloneFlags::CLONE_NEWCGROUP, "cgroup"),
            LinuxNamespaceType::Uts => {
                names = true;
                (CloneFlags::CLONE_NEWUTS, "UTS")
            }
            _ => continue,
        };
        enter(kind, name, namespace.path().as_deref())?;
    }
    // A container that joins this one's namespace finds the name there.
    if let Some(name) = spec.hostname().as_ref().filter(|_| names) {
        sethostname(name).map_err(MonitorError::system("cannot set the name of the UTS namespace"))?;
    }
    enter(CloneFlags::CLONE_NEWNS, "mount", None)
}

fn enter(kind: CloneFlags, name: &str, path: Option<&Path>) -> Result<(), MonitorError> {
    let Some(path) = path else {
        return unshare(kind).map_err(MonitorError::system(&format!("cannot make a {name} namespace")));
    };
    let what = format!("cannot join the {name} namespace {}", path.display());
    let namespace = File::open(path).map_err(MonitorError::system(&what))?;
    setns(namespace, kind).map_err(MonitorError::system(&what))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use serde_json::json;

    use super::*;

    fn inode(kind: &str) -> u64 {
        std::fs::metadata(format!("/proc/thread-self/ns/{kind}")).unwrap().ino()
    }

    /// Enters the namespaces on a thread, and looks there.
    fn within<T: Send + 'static>(
        namespaces: serde_json::Value,
        look: impl FnOnce(Result<(), MonitorError>) -> T + Send + 'static,
    ) -> T {
        let spec =
            json!({ "ociVersion": "1.2.0", "hostname": "kitchen", "linux": { "namespaces": namespaces } });
        let spec: Spec = serde_json::from_value(spec).unwrap();
        std::thread::spawn(move || look(enter_namespaces(&spec))).join().unwrap()
    }

    #[test]
    fn the_monitor_shares_nothing_with_the_host_that_it_need_not() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let kinds = ["net", "ipc", "uts", "cgroup", "mnt"];
        let before = kinds.map(inode);
        let all = json!([
            { "type": "network" }, { "type": "ipc" }, { "type": "uts" }, { "type": "cgroup" }, { "type": "mount" },
        ]);
        let (after, name) = within(all, move |entered| {
            entered.unwrap();
            (kinds.map(inode), nix::unistd::gethostname().unwrap())
        });
        assert!(before.iter().zip(&after).all(|(before, after)| before != after), "{before:?} {after:?}");
        assert_eq!(name, "kitchen");
        assert_ne!(nix::unistd::gethostname().unwrap(), "kitchen");
    }

    #[test]
    fn a_namespace_with_a_path_is_joined_and_must_be_of_its_kind() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let there = format!("/proc/{}/ns/cgroup", std::process::id());
        let own = inode("cgroup");
        let joined = within(json!([{ "type": "cgroup", "path": &there }]), move |entered| {
            entered.unwrap();
            inode("cgroup")
        });
        assert_eq!(joined, own);
        let refused =
            within(json!([{ "type": "uts", "path": &there }]), |entered| entered.unwrap_err().to_string());
        assert!(refused.starts_with(&format!("cannot join the UTS namespace {there}: ")), "{refused}");
    }
}
