//! What the agent does when the host asks.

use oci_spec::runtime::{LinuxResources, Process};
use rvm_protocol::{
    AgentError, AgentErrorKind, ClockReading, ExecProcess, NetworkConfig, ProcessId, REHEARSAL_ID, Reply,
    Request, StartContainer, ToAgent,
};

use super::{Agent, Managed, State, rehearsal};
use crate::container::{self, Container, processes};
use crate::error::{Context, Result, container_not_running, other};
use crate::process::Place;
use crate::resolver::Resolver;
use crate::stream::Stream;
use crate::sys::clock;
use crate::sys::process::{send_signal_to, set_terminal_size};
use crate::sys::waking;

impl Agent {
    /// Does what a message asks for, and answers, unless the answer follows later.
    pub(super) fn handle(&mut self, ToAgent { request, body }: ToAgent) {
        let result = match body {
            Request::Start(start) => match self.start(request, &start) {
                Ok(()) => return,
                Err(error) => Err(error),
            },
            Request::Exec(exec) => match self.exec(request, &exec) {
                Ok(()) => return,
                Err(error) => Err(error),
            },
            Request::Signal { process, signal, all } => self.signal(process, signal, all),
            Request::Resize { process, rows, columns } => self.resize(process, rows, columns),
            Request::List => self.list(),
            Request::Sync => {
                container::sync();
                Ok(Reply::Done)
            }
            Request::Update { resources } => self.update(&resources),
            Request::Network(config) => self.configure_network(&config).map(|()| Reply::Done),
            Request::Rehearse(start) => self.rehearse(&start).map(|()| Reply::Done),
            Request::Awaken { entropy, clock } => awaken(&entropy, clock),
            Request::SetClock(clock) => set_clock(clock),
        };
        self.reply(request, result);
    }

    fn start(&mut self, request: u64, start: &StartContainer) -> Result<()> {
        if std::mem::replace(&mut self.started, true) {
            return Err(started_already());
        }
        if start.network.interfaces.is_empty() {
            // Of the rehearsal.
            self.resolver = None;
        }
        self.configure_network(&start.network)?;
        let container = Container::prepare(start, &self.settings)?;
        let process = container.process()?.clone();
        self.watch_memory(&container.cgroup.memory_events());
        self.container = Some(container);
        let (streams, seccomp) = (&start.streams, start.seccomp.as_ref());
        self.launch(request, ProcessId::INIT, Place::New, &process, streams, seccomp)
    }

    fn rehearse(&mut self, start: &StartContainer) -> Result<()> {
        if self.started {
            return Err(started_already());
        }
        rehearsal::rehearse(start, &self.settings)?;
        // Most containers have a network. Where there can be no name server, the start of one with a network tells why.
        self.resolver = Resolver::new(&self.poller).ok();
        if let Some(resolver) = &self.resolver {
            // In force for nobody: what the kernel's code is patched for stays so.
            let _ = resolver.lead(&self.settings.cgroups.join(REHEARSAL_ID));
        }
        Ok(())
    }

    fn configure_network(&mut self, config: &NetworkConfig) -> Result<()> {
        self.network.configure(config)?;
        if config.interfaces.is_empty() {
            return Ok(());
        }
        let resolver = match self.resolver.take() {
            Some(resolver) => resolver,
            None => Resolver::new(&self.poller)?,
        };
        self.resolver.insert(resolver).lead_all(&self.settings.cgroups)
    }

    fn exec(&mut self, request: u64, exec: &ExecProcess) -> Result<()> {
        let process: Process = serde_json::from_str(&exec.spec).context(|| "the process's description")?;
        if !self.is_running(ProcessId::INIT) {
            return Err(container_not_running());
        }
        let (streams, seccomp) = (&exec.streams, exec.seccomp.as_ref());
        self.launch(request, exec.process, Place::Existing, &process, streams, seccomp)
    }

    fn signal(&mut self, id: ProcessId, signal: i32, all: bool) -> Result<Reply> {
        if all {
            self.running_container()?.cgroup.signal_all(signal);
        } else {
            send_signal_to(&self.alive(id)?.child.descriptor, signal)
                .context(|| format!("sending signal {signal}"))?;
        }
        Ok(Reply::Done)
    }

    fn resize(&mut self, id: ProcessId, rows: u16, columns: u16) -> Result<Reply> {
        let process = self.alive_mut(id)?;
        // Kept as well for a terminal that is still to come.
        process.new_size = Some((rows, columns));
        let launching = matches!(process.state, State::Launching { .. });
        let stream = process.streams.first().copied();
        let stream = stream.and_then(|id| self.streams.get(&id));
        match stream.and_then(Stream::terminal) {
            Some(master) => {
                set_terminal_size(master, rows, columns).context(|| "setting the terminal's size")?;
            }
            None if launching => {}
            None => return Err(other("the process has no terminal")),
        }
        Ok(Reply::Done)
    }

    fn list(&self) -> Result<Reply> {
        Ok(Reply::Processes(processes::list(self.running_container()?)))
    }

    fn update(&mut self, resources: &str) -> Result<Reply> {
        let resources: LinuxResources = serde_json::from_str(resources).context(|| "the new limits")?;
        self.running_container()?;
        self.container.as_mut().ok_or_else(container_not_running)?.update(&resources)?;
        Ok(Reply::Done)
    }

    fn running_container(&self) -> Result<&Container> {
        self.container
            .as_ref()
            .filter(|_| self.alive(ProcessId::INIT).is_ok())
            .ok_or_else(container_not_running)
    }

    fn is_running(&self, id: ProcessId) -> bool {
        self.alive(id).is_ok_and(|process| matches!(process.state, State::Running))
    }

    fn alive(&self, id: ProcessId) -> Result<&Managed> {
        let process = self.processes.get(&id);
        process.filter(|process| !matches!(process.state, State::Ended(_))).ok_or_else(no_such_process)
    }

    fn alive_mut(&mut self, id: ProcessId) -> Result<&mut Managed> {
        let process = self.processes.get_mut(&id);
        process.filter(|process| !matches!(process.state, State::Ended(_))).ok_or_else(no_such_process)
    }
}

/// Makes this guest differ from those that go on from the same state.
fn awaken(entropy: &[[u8; 32]; 2], reading: ClockReading) -> Result<Reply> {
    waking::add_entropy(entropy.as_flattened()).context(|| "seeding the random generator")?;
    set_clock(reading)
}

fn set_clock(reading: ClockReading) -> Result<Reply> {
    clock::set(reading).context(|| "setting the clock")?;
    Ok(Reply::Done)
}

fn started_already() -> AgentError {
    other("the container has been started already")
}

fn no_such_process() -> AgentError {
    AgentError { kind: AgentErrorKind::NoSuchProcess, message: "no such process".into() }
}
