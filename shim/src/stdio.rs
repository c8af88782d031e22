//! Copying between a process's standard streams on the host and the connections of the guest's.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const BUFFER: usize = 64 << 10;
const STACK: usize = 128 << 10;

/// Whether a descriptor is `/dev/null`: nothing has to be copied from it, and a program can see that it is.
pub fn is_null(descriptor: impl AsFd) -> bool {
    const NULL: u64 = libc::makedev(1, 3);
    nix::sys::stat::fstat(descriptor.as_fd())
        .is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFCHR && stat.st_rdev == NULL)
}

/// Copies from a host descriptor to the guest until either end closes. The end of the input is passed on.
pub fn pump_in(from: OwnedFd, to: &UnixStream) {
    let _ = copy(&mut File::from(from), &mut &*to);
    let _ = to.shutdown(Shutdown::Write);
}

/// Copies from the guest to a host descriptor until either end closes. When the host's reader is gone, the
/// guest's writer is told, so that it gets the signal or error that a closed pipe gives.
pub fn pump_out(from: &UnixStream, to: OwnedFd) {
    let _ = copy(&mut &*from, &mut File::from(to));
    let _ = from.shutdown(Shutdown::Read);
}

/// Copies between two descriptors of the host until either end closes.
pub fn pump(from: OwnedFd, to: OwnedFd) {
    let _ = copy(&mut File::from(from), &mut File::from(to));
}

/// Starts a thread that copies from the host to the guest. It may sit in a read for ever, so nothing waits for it.
pub fn spawn_in(from: OwnedFd, to: UnixStream) -> io::Result<()> {
    thread::Builder::new().name("stdin".into()).stack_size(STACK).spawn(move || pump_in(from, &to)).map(drop)
}

/// Starts a thread that copies from the guest to the host, and calls `done` at its end.
pub fn spawn_out(
    name: &str,
    from: UnixStream,
    to: OwnedFd,
    done: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.into()).stack_size(STACK).spawn(move || {
        pump_out(&from, to);
        done();
    })
}

fn copy(from: &mut impl ReadFd, to: &mut impl WriteFd) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => write_all(to, &buffer[..length])?,
            Err(error) => wait_after(error, from.as_fd(), PollFlags::POLLIN)?,
        }
    }
}

fn write_all(to: &mut impl WriteFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(length) => bytes = &bytes[length..],
            Err(error) => wait_after(error, to.as_fd(), PollFlags::POLLOUT)?,
        }
    }
    Ok(())
}

/// Engines may hand over descriptors that another process has set non-blocking.
fn wait_after(error: io::Error, fd: impl AsFd, flags: PollFlags) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock => {
            let _ = poll(&mut [PollFd::new(fd.as_fd(), flags)], PollTimeout::NONE);
            Ok(())
        }
        _ => Err(error),
    }
}

trait ReadFd: Read + AsFd {}
impl<T: Read + AsFd> ReadFd for T {}
trait WriteFd: Write + AsFd {}
impl<T: Write + AsFd> WriteFd for T {}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn null_is_told_from_other_devices_and_files() {
        let open = |path: &str| File::open(path).unwrap();
        assert!(is_null(open("/dev/null")));
        assert!(!is_null(open("/dev/zero")) && !is_null(open("/")));
    }

    #[test]
    fn the_end_of_the_input_reaches_the_guest() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        spawn_in(reader.into(), host.try_clone().unwrap()).unwrap();
        writer.write_all(b"text").unwrap();
        drop(writer);
        let mut text = String::new();
        guest.read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
        guest.write_all(b"the other direction stays open").unwrap();
    }

    #[test]
    fn everything_is_written_before_the_pump_ends() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let (done, ended) = mpsc::channel();
        spawn_out("out", host, writer.into(), move || done.send(()).unwrap()).unwrap();
        let sent: Vec<u8> = (0..1_000_000u32).map(|number| number as u8).collect();
        let expected = sent.clone();
        thread::spawn(move || guest.write_all(&sent).unwrap());
        let mut received = Vec::new();
        reader.read_to_end(&mut received).unwrap();
        assert!(received == expected);
        ended.recv().unwrap();
    }

    #[test]
    fn the_guest_learns_that_the_reader_is_gone() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let pump = spawn_out("out", host, writer.into(), || ()).unwrap();
        let _ = guest.write(b"nobody reads this");
        pump.join().unwrap();
        assert_eq!(guest.write(b"nor this").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
