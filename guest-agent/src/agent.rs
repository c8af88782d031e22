//! The agent's loop and its state: the container, its processes, their streams.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rvm_protocol::{CONTROL_PORT, ExitStatus, FromAgent, ProcessId, Reply, VERSION};

use crate::container::{Container, Settings};
use crate::control::{Control, ControlError};
use crate::error::{Context, Result};
use crate::event::{Poller, Target};
use crate::host::Host;
use crate::network::Network;
use crate::process::channel::AgentEnd;
use crate::resolver::Resolver;
use crate::stream::{GRACE, Stream, StreamId};
use crate::sys::process::{Child, find_ended, reap};

mod launches;
mod rehearsal;
mod requests;

/// The agent.
pub struct Agent {
    host: Box<dyn Host>,
    settings: Settings,
    poller: Poller,
    signals: SignalFd,
    control: Control,
    started: bool,
    container: Option<Container>,
    memory: Option<MemoryEvents>,
    network: Network,
    /// There is one as soon as there is a network.
    resolver: Option<Resolver>,
    processes: BTreeMap<ProcessId, Managed>,
    streams: HashMap<StreamId, Stream>,
    next_stream: u32,
    /// Until when the end of the first process waits for the output of the others.
    last_wait: Option<Instant>,
}

/// A process that the host started.
struct Managed {
    child: Child,
    state: State,
    streams: Vec<StreamId>,
    /// Size that its terminal is to get when there is one.
    new_size: Option<(u16, u16)>,
}

enum State {
    /// On its way to its program; the request waits for an answer.
    Launching { request: u64, channel: AgentEnd },
    /// It runs.
    Running,
    /// It has ended; the host is told when it has got what the process wrote.
    Ended(ExitStatus),
}

/// The counters of the container's memory cgroup.
struct MemoryEvents {
    file: File,
    kills: u64,
}

impl Agent {
    /// Connects to the host and tells it that the guest is up.
    pub fn new(host: Box<dyn Host>, settings: Settings) -> Result<Self> {
        let poller = Poller::new().context(|| "making the event loop")?;
        let control = connect(host.as_ref(), &poller)?;
        let signals = watch_children(&poller).context(|| "waiting for children")?;
        Ok(Self {
            host,
            settings,
            poller,
            signals,
            control,
            started: false,
            container: None,
            memory: None,
            network: Network::default(),
            resolver: None,
            processes: BTreeMap::new(),
            streams: HashMap::new(),
            next_stream: 0,
            last_wait: None,
        })
    }

    /// Serves until the control connection ends.
    pub fn run(&mut self) -> std::result::Result<(), ControlError> {
        loop {
            match self.serve() {
                // A guest whose state was captured finds, where it goes on, that its connection is gone.
                Err(error) if !self.started && self.control.was_reset(&error) => {
                    self.control = connect(self.host.as_ref(), &self.poller).map_err(|_| error)?;
                }
                Err(error) => return Err(error),
                Ok(never) => match never {},
            }
        }
    }

    fn serve(&mut self) -> std::result::Result<Infallible, ControlError> {
        loop {
            for (target, ready) in self.poller.wait(self.time_left())? {
                match target {
                    Target::Control => {
                        for message in self.control.receive(ready)? {
                            self.handle(message);
                        }
                    }
                    Target::Signals => self.reap(),
                    Target::Memory => self.report_memory(),
                    Target::Setup(id) => self.follow_launch(id),
                    Target::Local(id) => self.with_stream(id, |stream| stream.on_local(ready)),
                    Target::Connection(id) => self.with_stream(id, |stream| stream.on_connection(ready)),
                    Target::Resolver
                    | Target::ResolverDatagrams
                    | Target::ResolverListener
                    | Target::ResolverClient(_) => {
                        if let Some(resolver) = &mut self.resolver {
                            resolver.on_event(target, ready, self.host.as_ref(), &self.poller);
                        }
                    }
                }
            }
            self.settle();
            self.control.flush(&self.poller)?;
        }
    }

    fn reply(&mut self, request: u64, result: Result<Reply>) {
        self.control.send(&FromAgent::Reply { request, result });
    }

    /// Lets a stream act, and sees to what it waits for next.
    fn with_stream(&mut self, id: StreamId, act: impl FnOnce(&mut Stream)) {
        // An event of a stream that went away meanwhile is of no interest.
        let Some(stream) = self.streams.get_mut(&id) else { return };
        act(stream);
        // A stream that cannot be waited for any more (for want of memory) is given up.
        if stream.arm(&self.poller).is_err() || stream.is_finished() {
            self.remove_stream(id);
        }
    }

    fn remove_stream(&mut self, id: StreamId) {
        if let Some(mut stream) = self.streams.remove(&id) {
            stream.release(&self.poller);
        }
    }

    /// How long until something is due that no event tells of.
    fn time_left(&self) -> Option<Duration> {
        let streams = self.streams.values().filter_map(Stream::deadline);
        let next = streams.chain(self.last_wait).min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// Reports the processes that have ended and whose output the host has got.
    fn settle(&mut self) {
        let now = Instant::now();
        let is_due = |stream: &Stream| stream.deadline().is_some_and(|deadline| deadline <= now);
        let due: Vec<StreamId> =
            self.streams.iter().filter(|(_, stream)| is_due(stream)).map(|(id, _)| *id).collect();
        for id in due {
            self.with_stream(id, Stream::expire);
        }
        for (process, status) in self.settled() {
            if process != ProcessId::INIT {
                self.report_end(process, status);
            } else if self.processes.len() == 1 {
                self.finish(status);
            } else if now >= *self.last_wait.get_or_insert(now + GRACE) {
                // Others have ended with it, and their clients do not read: that must not keep the container.
                for (process, status) in self.ended() {
                    if process != ProcessId::INIT {
                        self.report_end(process, status);
                    }
                }
                self.finish(status);
            }
        }
    }

    /// Those that have ended. The first process comes last: its end is the container's, and nothing can follow
    /// that.
    fn ended(&self) -> Vec<(ProcessId, ExitStatus)> {
        let status = |(id, process): (&ProcessId, &Managed)| match process.state {
            State::Ended(status) => Some((*id, status)),
            _ => None,
        };
        self.processes.iter().rev().filter_map(status).collect()
    }

    fn settled(&self) -> Vec<(ProcessId, ExitStatus)> {
        let mut ended = self.ended();
        ended.retain(|(id, _)| self.processes.get(id).is_some_and(|process| self.has_settled(process)));
        ended
    }

    fn report_end(&mut self, process: ProcessId, status: ExitStatus) {
        self.processes.remove(&process);
        // A kill for want of memory is told before the end that it caused.
        self.report_memory();
        self.control.send(&FromAgent::Exited { process, status });
    }

    fn finish(&mut self, status: ExitStatus) {
        self.last_wait = None;
        if let Some(container) = &self.container {
            container.finish();
        }
        self.report_end(ProcessId::INIT, status);
    }

    fn has_settled(&self, process: &Managed) -> bool {
        process.streams.iter().all(|id| self.streams.get(id).is_none_or(Stream::is_settled))
    }

    /// Takes the ends of children: of processes that the host started, and of orphans, whose parent the
    /// agent is as PID 1.
    fn reap(&mut self) {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        while let Some(pid) = find_ended() {
            let found =
                self.processes.iter().find(|(_, process)| process.child.pid == pid).map(|(id, _)| *id);
            if let Some(id) = found {
                // The news of its launch come first, for the host hears of a process in that order; and while the
                // process is not reaped, they can be told from its state.
                self.follow_launch(id);
            }
            // One that has ended can be reaped; whatever else the kernel says must not be asked for ever.
            let Some(status) = reap(pid) else { return };
            if let Some(id) = found {
                self.end_process(id, status);
            }
        }
    }

    fn end_process(&mut self, id: ProcessId, status: ExitStatus) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        process.state = State::Ended(status);
        for stream in process.streams.clone() {
            self.with_stream(stream, Stream::process_ended);
        }
    }

    fn watch_memory(&mut self, path: &Path) {
        // A kernel without the memory controller never kills for its sake.
        let Ok(file) = File::open(path) else { return };
        if self.poller.add(&file, Target::Memory, EpollFlags::EPOLLPRI).is_ok() {
            self.memory = Some(MemoryEvents { file, kills: 0 });
        }
    }

    fn report_memory(&mut self) {
        let Some(memory) = &mut self.memory else { return };
        let kills = memory.read_kills();
        if kills > memory.kills {
            memory.kills = kills;
            self.control.send(&FromAgent::OutOfMemory);
        }
    }
}

impl MemoryEvents {
    /// The number of processes that were killed so far. Reading is also what arms the next event.
    fn read_kills(&mut self) -> u64 {
        let mut text = String::new();
        let read = self.file.rewind().and_then(|()| self.file.read_to_string(&mut text));
        read.ok().and_then(|_| parse_kills(&text)).unwrap_or(self.kills)
    }
}

fn parse_kills(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

/// Connects to the host, and tells it that the guest is up.
fn connect(host: &dyn Host, poller: &Poller) -> Result<Control> {
    let connection = host
        .connect(CONTROL_PORT)
        .context(|| "connecting to the host (has the machine a vsock device, and the kernel its driver?)")?;
    let mut control = Control::new(connection, poller).context(|| "waiting for the host")?;
    let kernel = nix::sys::utsname::uname().context(|| "asking for the kernel's release")?;
    let kernel = kernel.release().to_string_lossy().into_owned();
    control.send(&FromAgent::Ready { version: VERSION, kernel });
    Ok(control)
}

fn watch_children(poller: &Poller) -> nix::Result<SignalFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    signals.thread_block()?;
    let descriptor = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    poller.add(&descriptor, Target::Signals, EpollFlags::EPOLLIN)?;
    Ok(descriptor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_counted_apart_from_other_events() {
        let text = "low 0\nhigh 5\nmax 9\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(parse_kills(text), Some(2));
        assert_eq!(parse_kills("low 0\n"), None);
    }
}
