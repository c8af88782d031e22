//! Pseudo-terminals of the container's own devpts.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::stat::{self, SFlag};
use nix::unistd;

use crate::container::tree::Tree;
use crate::error::{Context, Result, other};
use crate::sys::{mount, process};

/// A new pseudo-terminal.
pub struct Terminal {
    /// The end that the agent reads and writes.
    pub master: OwnedFd,
    /// The end that the process sees.
    pub slave: OwnedFd,
}

impl Terminal {
    /// Opens a terminal in the container's root.
    pub fn open(root: &Tree) -> Result<Self> {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY;
        let master = root
            .open_with(Path::new("/dev/pts/ptmx"), flags)
            .or_else(|_| root.open_with(Path::new("/dev/ptmx"), flags))
            .context(|| "opening a terminal (the container needs a devpts mount at /dev/pts)")?;
        unlock(&master)?;
        let slave = process::open_terminal_peer(&master).context(|| "opening the terminal's other end")?;
        Ok(Self { master, slave })
    }

    /// Opens a terminal and puts it at `/dev/console`, as the container's first process has it.
    pub fn open_with_console(root: &Tree) -> Result<Self> {
        let terminal = Self::open(root)?;
        let number = process::terminal_number(&terminal.master).context(|| "numbering the terminal")?;
        let what = || "putting the terminal at /dev/console";
        let place = root.make_file(Path::new("/dev/console")).context(what)?;
        let slave = root.find(&PathBuf::from(format!("/dev/pts/{number}"))).context(what)?;
        let mount = mount::clone_mount(slave, false).context(what)?;
        mount::attach(mount, place).context(what)?;
        Ok(terminal)
    }

    /// Makes the terminal the controlling one, and the three standard streams, of the calling process, which
    /// leads a session.
    pub fn take(slave: OwnedFd) -> Result<()> {
        process::set_controlling_terminal(&slave).context(|| "taking the terminal as controlling one")?;
        let what = || "making the terminal the standard streams";
        unistd::dup2_stdin(&slave).context(what)?;
        unistd::dup2_stdout(&slave).context(what)?;
        unistd::dup2_stderr(&slave).context(what)
    }
}

fn unlock(master: &OwnedFd) -> Result<()> {
    process::unlock_terminal(master).context(|| "unlocking the terminal")
}

/// Whether what a child handed over is the master of a terminal. It was opened by a path that processes of
/// the container can write to, and the agent must not read from, say, a file system of their making.
pub fn check_master(descriptor: &OwnedFd) -> Result<()> {
    // Number 2 of the major number 5 is /dev/ptmx and every file like it.
    let is_ptmx = stat::fstat(descriptor).is_ok_and(|found| {
        found.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFCHR.bits() && found.st_rdev == libc::makedev(5, 2)
    });
    if is_ptmx { Ok(()) } else { Err(other("the container's /dev/pts/ptmx is no terminal device")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_terminals_master_passes_for_one() {
        let root = Tree::open(Path::new("/")).unwrap();
        let terminal = Terminal::open(&root).unwrap();
        assert!(check_master(&terminal.master).is_ok());
        assert!(check_master(&terminal.slave).is_err());
        assert!(check_master(&std::fs::File::open("/dev/null").unwrap().into()).is_err());
    }
}
