//! Pseudo-terminals on the host: made for a container's process, handed to the engine, sized, set raw.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::pty::{OpenptyResult, openpty};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::control::WindowSize;
use crate::error::Error;

/// Both ends of a new pseudo-terminal whose host end does nothing to the bytes: the guest's own terminal does.
#[derive(Debug)]
pub struct Console {
    /// The engine's end.
    pub master: OwnedFd,
    /// The end that stands for the container's process.
    pub slave: OwnedFd,
}

impl Console {
    /// Makes one of the given size.
    pub fn open(size: WindowSize) -> io::Result<Console> {
        let OpenptyResult { master, slave } = openpty(None, None)?;
        for end in [&master, &slave] {
            fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        }
        let mut settings = tcgetattr(&slave)?;
        cfmakeraw(&mut settings);
        tcsetattr(&slave, SetArg::TCSANOW, &settings)?;
        set_window_size(&slave, size)?;
        Ok(Console { master, slave })
    }

    /// Sends the master to the engine's socket. Engines accept only after the command has returned, so no
    /// answer is waited for.
    pub fn send_master(&self, socket: &Path) -> Result<(), Error> {
        let failed = || format!("cannot send the terminal to the console socket {}", socket.display());
        let name = nix::unistd::ttyname(&self.slave).map_err(Error::system(failed()))?;
        send_descriptor(socket, name.as_os_str().as_encoded_bytes(), self.master.as_fd())
            .map_err(Error::system(failed()))
    }
}

/// Sends a descriptor with its name to an engine's socket.
pub fn send_descriptor(socket: &Path, name: &[u8], descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let stream = connect(socket)?;
    let fds = [descriptor.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(name)], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Connects to a socket whose path may be longer than an address holds, by way of its folder.
fn connect(socket: &Path) -> io::Result<UnixStream> {
    let name = socket.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let parent = match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let folder = File::open(parent)?;
    UnixStream::connect(Path::new(&format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name))
}

mod request {
    //! The requests of ioctl_tty(2).
    #![allow(missing_docs)]

    nix::ioctl_read_bad!(get_window_size, libc::TIOCGWINSZ, libc::winsize);
    nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);
    nix::ioctl_write_int_bad!(control_terminal, libc::TIOCSCTTY);
}

/// The size of a terminal.
pub fn window_size(terminal: impl AsFd) -> io::Result<WindowSize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the descriptor is open for the call, and `size` is what the request writes.
    unsafe { request::get_window_size(terminal.as_fd().as_raw_fd(), &raw mut size) }?;
    Ok(WindowSize { rows: size.ws_row, columns: size.ws_col })
}

/// Sets the size of a terminal.
pub fn set_window_size(terminal: impl AsFd, size: WindowSize) -> io::Result<()> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the descriptor is open for the call, and `size` is what the request reads.
    unsafe { request::set_window_size(terminal.as_fd().as_raw_fd(), &raw const size) }?;
    Ok(())
}

/// Makes a terminal the controlling one of this process, which must lead a session without one.
pub fn control_terminal(terminal: impl AsFd) -> io::Result<()> {
    // SAFETY: the descriptor is open for the call; the argument 0 means not to steal another session's.
    unsafe { request::control_terminal(terminal.as_fd().as_raw_fd(), 0) }?;
    Ok(())
}

/// A terminal that was set raw, and becomes as it was when this is dropped.
#[derive(Debug)]
pub struct RawMode<'fd> {
    terminal: BorrowedFd<'fd>,
    before: Termios,
}

impl<'fd> RawMode<'fd> {
    /// Sets a terminal raw.
    pub fn enter(terminal: BorrowedFd<'fd>) -> io::Result<RawMode<'fd>> {
        let before = tcgetattr(terminal)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(terminal, SetArg::TCSANOW, &raw)?;
        Ok(RawMode { terminal, before })
    }
}

impl Drop for RawMode<'_> {
    fn drop(&mut self) {
        let _ = tcsetattr(self.terminal, SetArg::TCSANOW, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn bytes_pass_unchanged() {
        let console = Console::open(WindowSize::default()).unwrap();
        let (mut master, mut slave) = (File::from(console.master), File::from(console.slave));
        let bytes = b"line\nfeed\rreturn\x03\x04\xff";
        slave.write_all(bytes).unwrap();
        let mut received = vec![0; bytes.len()];
        master.read_exact(&mut received).unwrap();
        assert_eq!(received, bytes);
    }

    #[test]
    fn the_size_is_seen_at_both_ends() {
        let console = Console::open(WindowSize { rows: 24, columns: 80 }).unwrap();
        set_window_size(&console.master, WindowSize { rows: 50, columns: 132 }).unwrap();
        assert_eq!(window_size(&console.slave).unwrap(), WindowSize { rows: 50, columns: 132 });
    }

    #[test]
    fn the_master_reaches_a_socket_that_accepts_later() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("long".repeat(40));
        std::fs::create_dir(&folder).unwrap();
        let socket = folder.join("console.sock");
        let handle = File::open(&folder).unwrap();
        let listener =
            UnixListener::bind(format!("/proc/self/fd/{}/console.sock", handle.as_raw_fd())).unwrap();
        let console = Console::open(WindowSize::default()).unwrap();
        console.send_master(&socket).unwrap();

        let (stream, _) = listener.accept().unwrap();
        let mut buffer = [0; 64];
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut buffers = [io::IoSliceMut::new(&mut buffer)];
        let received = nix::sys::socket::recvmsg::<()>(
            stream.as_raw_fd(),
            &mut buffers,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )
        .unwrap();
        assert_eq!(received.cmsgs().unwrap().count(), 1);
    }

    #[test]
    fn a_socket_that_is_absent_is_an_error_of_the_runtime() {
        let console = Console::open(WindowSize::default()).unwrap();
        let error = console.send_master(Path::new("/absent/console.sock")).unwrap_err().to_string();
        assert!(error.contains("/absent/console.sock: nothing is there"), "{error}");
    }
}
