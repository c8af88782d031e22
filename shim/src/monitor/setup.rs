//! What the monitor process becomes before it builds the machine: leader of a session, in namespaces of the
//! container, with the container's standard streams set aside.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::setsid;

use super::MonitorError;
use crate::console;
use crate::stdio::is_null;

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
    // A core of this process would be the guest's whole memory.
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    Ok(())
}

/// Enters the container's mount and network namespaces. The others are the guest's alone.
pub fn enter_namespaces(network: Option<&Path>) -> Result<(), MonitorError> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |error: nix::errno::Errno| MonitorError::System { what, source: error.into() }
    };
    match network {
        None => {
            unshare(CloneFlags::CLONE_NEWNET).map_err(failed("cannot make a network namespace"))?;
        }
        Some(path) => {
            let what = format!("cannot join the network namespace {}", path.display());
            let namespace = File::open(path)
                .map_err(|error| MonitorError::System { what: what.clone(), source: error.into() })?;
            setns(namespace, CloneFlags::CLONE_NEWNET).map_err(failed(&what))?;
        }
    }
    unshare(CloneFlags::CLONE_NEWNS).map_err(failed("cannot make a mount namespace"))
}
