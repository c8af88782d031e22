//! Processes on their way to their programs: from the request to the answer.

use std::os::fd::OwnedFd;

use nix::fcntl::{self, FcntlArg, OFlag};
use nix::sys::epoll::EpollFlags;
use nix::unistd;
use rvm_protocol::{ProcessId, Reply, STREAM_PORT, SeccompProgram, StandardStreams, StreamToken};

use super::{Agent, Managed, State};
use crate::error::{Context, Result, container_not_running, other};
use crate::event::Target;
use crate::process::channel::Message;
use crate::process::launch::{ChildStreams, Launch, Launched, Place};
use crate::process::{launch, open_null, terminal};
use crate::stream::{Direction, Stream, StreamId};
use crate::sys::process::{has_executed, send_signal_to, set_terminal_size};

impl Agent {
    /// Takes the messages of a child that is on its way to its program.
    pub(super) fn follow_launch(&mut self, id: ProcessId) {
        loop {
            let Some(Managed { state: State::Launching { request, channel }, child, .. }) =
                self.processes.get(&id)
            else {
                return;
            };
            let (request, pid) = (*request, child.pid);
            match channel.receive() {
                None => return,
                Some(Message::Terminal(master)) => {
                    if let Err(error) = self.connect_terminal(id, master) {
                        self.abandon(id);
                        self.reply(request, Err(error));
                    }
                }
                Some(Message::Failed(error)) => {
                    self.abandon(id);
                    self.reply(request, Err(error));
                }
                // A set-up that could not even report, for a filter forbids that, has not come to its program.
                Some(Message::Closed) if !has_executed(pid) => {
                    self.abandon(id);
                    let error = other("the process ended before it came to its program");
                    self.reply(request, Err(error));
                }
                Some(Message::Closed) => {
                    self.poller.remove(&channel.0);
                    if let Some(process) = self.processes.get_mut(&id) {
                        process.state = State::Running;
                    }
                    self.reply(request, Ok(Reply::Started { guest_pid: pid.as_raw() }));
                }
            }
        }
    }

    /// Forgets a process that never came to its program.
    pub(super) fn abandon(&mut self, id: ProcessId) {
        if let Some(process) = self.processes.remove(&id) {
            // It may have ended by itself.
            let _ = send_signal_to(&process.child.descriptor, libc::SIGKILL);
            if let State::Launching { channel, .. } = &process.state {
                self.poller.remove(&channel.0);
            }
            for stream in process.streams {
                self.remove_stream(stream);
            }
        }
    }

    fn connect_terminal(&mut self, id: ProcessId, master: OwnedFd) -> Result<()> {
        terminal::check_master(&master)?;
        set_non_blocking(&master)?;
        let Some(process) = self.processes.get(&id) else { return Ok(()) };
        if let Some((rows, columns)) = process.new_size {
            set_terminal_size(&master, rows, columns).context(|| "setting the terminal's size")?;
        }
        if let Some(&stream) = process.streams.first() {
            self.with_stream(stream, |stream| stream.set_terminal(master));
        }
        Ok(())
    }

    /// Launches a process of the container. The answer to `request` follows when it has come to its program.
    pub(super) fn launch(
        &mut self,
        request: u64,
        id: ProcessId,
        place: Place,
        process: &oci_spec::runtime::Process,
        streams: &StandardStreams,
        seccomp: Option<&SeccompProgram>,
    ) -> Result<()> {
        if self.processes.contains_key(&id) {
            return Err(other(format!("there is a process {} already", id.0)));
        }
        let mut opened = Vec::new();
        let launched = self.open_streams(streams, &mut opened).and_then(|streams| {
            let container = self.container.as_ref().ok_or_else(container_not_running)?;
            launch(Launch { container, place, process, seccomp, streams })
        });
        let Launched { child, channel } = match launched {
            Ok(launched) => launched,
            Err(error) => {
                for stream in opened {
                    self.remove_stream(stream);
                }
                return Err(error);
            }
        };
        let init = (place == Place::New).then(|| child.try_clone()).transpose();
        let watched = self.poller.add(&channel.0, Target::Setup(id), EpollFlags::EPOLLIN);
        let state = State::Launching { request, channel };
        self.processes.insert(id, Managed { child, state, streams: opened, new_size: None });
        let prepared = init.context(|| "keeping hold of the process").and_then(|init| {
            if let (Some(init), Some(container)) = (init, &mut self.container) {
                container.init = Some(init);
            }
            watched.context(|| "waiting for the process to start")
        });
        if let Err(error) = prepared {
            self.abandon(id);
            return Err(error);
        }
        Ok(())
    }

    /// Connects the streams of a process and makes the child's ends of them.
    fn open_streams(
        &mut self,
        streams: &StandardStreams,
        opened: &mut Vec<StreamId>,
    ) -> Result<ChildStreams> {
        match *streams {
            StandardStreams::Terminal { token, rows, columns } => {
                self.connect_stream(Direction::Terminal, None, token, opened)?;
                Ok(ChildStreams::Terminal { rows, columns })
            }
            StandardStreams::Pipes { stdin, stdout, stderr } => Ok(ChildStreams::Files {
                stdin: self.open_pipe(Direction::Input, stdin, opened)?,
                stdout: self.open_pipe(Direction::Output, stdout, opened)?,
                stderr: self.open_pipe(Direction::Output, stderr, opened)?,
            }),
        }
    }

    /// Makes a pipe and returns the child's end.
    fn open_pipe(
        &mut self,
        direction: Direction,
        token: Option<StreamToken>,
        opened: &mut Vec<StreamId>,
    ) -> Result<OwnedFd> {
        let Some(token) = token else {
            return open_null();
        };
        let (reader, writer) = unistd::pipe2(OFlag::O_CLOEXEC).context(|| "making a pipe")?;
        let (own, childs) = match direction {
            Direction::Input => (writer, reader),
            _ => (reader, writer),
        };
        // The two ends are two open files: the child's stays a blocking one.
        set_non_blocking(&own)?;
        self.connect_stream(direction, Some(own), token, opened)?;
        Ok(childs)
    }

    fn connect_stream(
        &mut self,
        direction: Direction,
        local: Option<OwnedFd>,
        token: StreamToken,
        opened: &mut Vec<StreamId>,
    ) -> Result<()> {
        let connection = self.host.connect(STREAM_PORT).context(|| "connecting a stream to the host")?;
        let id = StreamId(self.next_stream);
        self.next_stream = self.next_stream.wrapping_add(1);
        let mut stream = Stream::new(id, direction, connection, local, token);
        stream.arm(&self.poller).context(|| "waiting for a stream")?;
        self.streams.insert(id, stream);
        opened.push(id);
        Ok(())
    }
}

fn set_non_blocking(descriptor: &OwnedFd) -> Result<()> {
    fcntl::fcntl(descriptor, FcntlArg::F_GETFL)
        .and_then(|flags| {
            let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
            fcntl::fcntl(descriptor, FcntlArg::F_SETFL(flags))
        })
        .map(drop)
        .context(|| "making a stream non-blocking")
}
