//! The container's first process as the monitor sees it: its streams, and when all that it wrote has arrived.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};
use rvm_protocol::ExitStatus;

use super::setup::Stdio;
use super::streams::{Stream, StreamRole};
use crate::stdio::{spawn_in, spawn_out};

/// The container's first process.
#[derive(Debug)]
pub struct Init {
    stdio: Stdio,
    terminal: bool,
    /// Output streams that are being copied.
    open_outputs: u64,
    drained: Arc<EventFd>,
    status: Option<ExitStatus>,
}

impl Init {
    /// A process that is yet to be started.
    pub fn new(stdio: Stdio, terminal: bool) -> io::Result<Init> {
        let drained = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Init { stdio, terminal, open_outputs: 0, drained: Arc::new(drained), status: None })
    }

    /// Whether its standard input is `/dev/null`.
    pub fn has_null_stdin(&self) -> bool {
        !self.terminal && self.stdio.stdin.is_none()
    }

    /// The terminal, if it has one.
    pub fn terminal(&self) -> Option<BorrowedFd<'_>> {
        self.stdio.stdin.as_ref().filter(|_| self.terminal).map(AsFd::as_fd)
    }

    /// Copies a stream of the process from now on. Of pipes no descriptor stays behind, so that the engine sees
    /// them close when the container closes them.
    pub fn connect(&mut self, stream: Stream) -> io::Result<()> {
        let connection = stream.connection;
        let host = match stream.role {
            StreamRole::Terminal => self.terminal().map(|fd| fd.try_clone_to_owned()).transpose()?,
            StreamRole::Stdin => self.stdio.stdin.take(),
            StreamRole::Stdout => self.stdio.stdout.take(),
            StreamRole::Stderr => self.stdio.stderr.take(),
        };
        let Some(host) = host else { return Ok(()) };
        match stream.role {
            StreamRole::Stdin => return spawn_in(host, connection),
            StreamRole::Terminal => spawn_in(host.try_clone()?, connection.try_clone()?)?,
            StreamRole::Stdout | StreamRole::Stderr => {}
        }
        self.copy_output(connection, host)
    }

    fn copy_output(&mut self, connection: std::os::unix::net::UnixStream, host: OwnedFd) -> io::Result<()> {
        let drained = self.drained.clone();
        // Its counter would have to be full for the write to fail.
        spawn_out("output", connection, host, move || {
            let _ = drained.write(1);
        })?;
        self.open_outputs += 1;
        Ok(())
    }

    /// Readable when outputs have been copied to their end.
    pub fn drained(&self) -> BorrowedFd<'_> {
        self.drained.as_fd()
    }

    /// Counts the outputs that have been copied to their end.
    pub fn count_drained(&mut self) {
        self.open_outputs -= self.drained.read().unwrap_or(0).min(self.open_outputs);
    }

    /// The process has ended.
    pub fn set_status(&mut self, status: ExitStatus) {
        self.status.get_or_insert(status);
    }

    /// How the process ended.
    pub fn status(&self) -> Option<ExitStatus> {
        self.status
    }

    /// Whether the process has ended and all that it wrote has arrived.
    pub fn is_over(&self) -> bool {
        self.status.is_some() && self.open_outputs == 0
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use rvm_protocol::ProcessId;

    use super::*;

    fn connect(init: &mut Init, role: StreamRole) -> UnixStream {
        let (connection, guest) = UnixStream::pair().unwrap();
        init.connect(Stream { process: ProcessId::INIT, role, connection }).unwrap();
        guest
    }

    #[test]
    fn it_is_over_when_it_has_ended_and_all_output_has_arrived() {
        let (stdin, _input) = io::pipe().unwrap();
        let (mut output, stdout) = io::pipe().unwrap();
        let (_errors, stderr) = io::pipe().unwrap();
        let stdio =
            Stdio { stdin: Some(stdin.into()), stdout: Some(stdout.into()), stderr: Some(stderr.into()) };
        let mut init = Init::new(stdio, false).unwrap();
        let mut stdout = connect(&mut init, StreamRole::Stdout);
        let stderr = connect(&mut init, StreamRole::Stderr);

        init.set_status(ExitStatus::Code(3));
        assert!(!init.is_over());
        stdout.write_all(b"late").unwrap();
        drop((stdout, stderr));
        while !init.is_over() {
            poll(&mut [PollFd::new(init.drained(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
            init.count_drained();
        }
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        assert_eq!(text, "late", "and the pipe was closed, or this would not have returned");
        assert_eq!(init.status(), Some(ExitStatus::Code(3)));
    }

    #[test]
    fn a_stream_that_never_came_is_not_waited_for() {
        let mut init = Init::new(Stdio { stdin: None, stdout: None, stderr: None }, false).unwrap();
        init.set_status(ExitStatus::Signal(9));
        assert!(init.is_over());
    }
}
