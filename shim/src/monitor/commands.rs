//! What the monitor does for `rvm` commands and on signals.

use std::os::fd::OwnedFd;
use std::time::Instant;

use rvm_protocol::{Disk, ExecProcess, ExitStatus, ProcessId, Request, StartContainer};

use super::boot;
use super::clients::ClientId;
use super::execution::Execution;
use super::service::{Deadline, KILL_PATIENCE, Outcome, SYNC_PATIENCE, Service};
use super::streams::{Stream, StreamRole};
use crate::console;
use crate::container::{StateReport, Status, Step};
use crate::control::{Answer, Command, Exec, Packet, WindowSize};
use crate::network::Wiring;
use crate::signals;
use crate::timeline::Phase;

/// Exit code of a container that was not started for a reason which has nothing to do with its program.
pub(super) const NOT_STARTED: i32 = 128;

/// Who waits for the agent's reply to a request.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pending {
    /// The start of the container.
    Start,
    /// The start of a further process.
    Exec(ProcessId),
    /// A command that wants to know that a signal has arrived.
    Signal(ClientId),
    /// A command that wants to know that it is done.
    Simple(ClientId),
    /// A command that wants the list of processes.
    List(ClientId),
    /// A command that wants the machine halted once everything is written back.
    PauseSync(ClientId),
    /// The command that follows the network.
    Network(ClientId),
    /// Nobody.
    Nobody,
}

impl Service {
    pub(super) fn on_command(&mut self, client: ClientId, packet: Packet<Command>) {
        self.log.debug(format!("{}: asked to {}", self.setup.id, packet.message.name()));
        let done = match packet.message {
            Command::Start { wiring, connected_at } => {
                self.setup.timeline.mark_told(Phase::NetworkReady, connected_at);
                self.on_start(client, wiring, packet.descriptors)
            }
            Command::Network(wiring) => self.on_network(client, wiring, packet.descriptors),
            Command::Signal { signal, all } => self.on_signal_command(client, signal, all),
            Command::Exec(exec) => self.on_exec(client, &exec),
            Command::SignalExec { signal } => self.on_exec_signal(client, signal),
            Command::ResizeExec(size) => self.on_exec_resize(client, size),
            Command::Processes => self.forward(Request::List, Pending::List(client)),
            Command::Pause => self.on_pause(client),
            Command::Resume => self.on_resume(client),
            Command::Update { resources } => self.on_update(client, resources),
        };
        if let Err(why) = done {
            self.clients.refuse(client, why);
        }
    }

    /// The process that a connection has started ends with the connection.
    pub(super) fn on_client_gone(&mut self, client: ClientId) {
        if let Some(process) = self.clients.remove(client) {
            self.kill_process(process);
        }
    }

    pub(super) fn on_signal(&mut self, signal: i32) {
        if signal == libc::SIGWINCH {
            let Some(size) = self.init.terminal().and_then(|terminal| console::window_size(terminal).ok())
            else {
                return;
            };
            if self.start_asked {
                let WindowSize { rows, columns } = size;
                self.request(Request::Resize { process: ProcessId::INIT, rows, columns }, Pending::Nobody);
            }
        } else {
            self.signal_init(signal, false, Pending::Nobody);
        }
    }

    /// Signals the container's process. Until it is known to run, the signal does to the container what it would do
    /// to a process that has no handler.
    fn signal_init(&mut self, signal: i32, all: bool, pending: Pending) {
        let fatal = self.step == Step::Created && signals::is_fatal(signal);
        if fatal {
            // Signal numbers end at 64.
            let signal = u8::try_from(signal).unwrap_or(libc::SIGKILL as u8);
            self.outcome.get_or_insert(Outcome::Ended(ExitStatus::Signal(signal)));
        }
        if fatal || !self.start_asked {
            if let Pending::Signal(client) = pending {
                self.clients.answer(client, &Answer::Done, &[]);
            }
            return;
        }
        if signal == libc::SIGKILL {
            self.prepare_for_kill();
        }
        self.request(Request::Signal { process: ProcessId::INIT, signal, all }, pending);
    }

    /// A kill takes effect even if the guest does not co-operate, or nobody reads the container's output.
    fn prepare_for_kill(&mut self) {
        if self.step == Step::Paused {
            self.end_by_kill();
        } else if let Some(status) = self.init.status() {
            self.outcome.get_or_insert(Outcome::Ended(status));
        } else {
            self.deadlines.entry(Deadline::Kill).or_insert(Instant::now() + KILL_PATIENCE);
        }
    }

    fn on_signal_command(&mut self, client: ClientId, signal: i32, all: bool) -> Result<(), String> {
        if self.step == Step::Paused && signal != libc::SIGKILL {
            // The process gets it when the machine goes on, as a frozen process would; the reply has to wait for that.
            self.signal_init(signal, all, Pending::Nobody);
            self.clients.answer(client, &Answer::Done, &[]);
        } else {
            self.signal_init(signal, all, Pending::Signal(client));
        }
        Ok(())
    }

    fn on_start(
        &mut self,
        client: ClientId,
        wiring: Wiring,
        mut descriptors: Vec<OwnedFd>,
    ) -> Result<(), String> {
        if self.start_asked {
            return Err("cannot start an already running container".into());
        }
        let more = descriptors.split_off(wiring.devices.len().min(descriptors.len()));
        let taps = descriptors;
        if let Some(place) = more.into_iter().next() {
            self.oom_reports.enable(place.into());
        }
        let network = self.plug_network(wiring, taps)?;
        self.setup.timeline.mark(Phase::StartAsked);
        // The engine may have set the size since.
        let size = self
            .init
            .terminal()
            .map(|terminal| console::window_size(terminal).ok().or(self.setup.terminal).unwrap_or_default());
        let streams = self
            .streams
            .expect(ProcessId::INIT, size, self.init.has_null_stdin())
            .map_err(|error| format!("cannot draw a random number: {error}"))?;
        self.start_asked = true;
        self.starter = Some(client);
        if !self.deadlines.contains_key(&Deadline::Boot) {
            self.expect_start();
        }
        let start = StartContainer {
            id: self.setup.id.clone(),
            spec: std::mem::take(&mut self.setup.guest_spec),
            streams,
            network,
            seccomp: self.setup.seccomp.clone(),
            hook_state: created_state(&self.setup.hook_state),
            memory_limit: self.setup.shape.memory_limit,
            host_mounts: std::mem::take(&mut self.setup.host_mounts),
            disks: self.disks(),
        };
        self.request(Request::Start(Box::new(start)), Pending::Start);
        Ok(())
    }

    /// From now on the guest has the start to answer. That it is up it may say more than once, to no avail.
    pub(super) fn expect_start(&mut self) {
        let deadline = self.start_patience.and_then(|patience| Instant::now().checked_add(patience));
        if let Some(deadline) = deadline {
            self.deadlines.entry(Deadline::Start).or_insert(deadline);
        }
    }

    fn disks(&self) -> Vec<Disk> {
        let disks = &self.setup.disks;
        boot::disk_slots(disks.len())
            .zip(disks)
            .map(|(slot, disk)| Disk { slot, major: disk.major, minor: disk.minor })
            .collect()
    }

    fn on_exec(&mut self, client: ClientId, exec: &Exec) -> Result<(), String> {
        if self.clients.process(client).is_some() {
            return Err("this connection has started a process already".into());
        }
        self.require_running()?;
        let process = ProcessId(self.next_process);
        self.next_process += 1;
        let streams = self
            .streams
            .expect(process, exec.terminal, exec.null_stdin)
            .map_err(|error| format!("cannot draw a random number: {error}"))?;
        self.executions.insert(process, Execution::new(client, &streams));
        self.clients.set_process(client, process);
        let request =
            ExecProcess { process, spec: exec.process.clone(), streams, seccomp: self.setup.seccomp.clone() };
        self.request(Request::Exec(Box::new(request)), Pending::Exec(process));
        Ok(())
    }

    fn on_exec_signal(&mut self, client: ClientId, signal: i32) -> Result<(), String> {
        let process = self.clients.process(client).ok_or("this connection has started no process")?;
        self.request(Request::Signal { process, signal, all: false }, Pending::Nobody);
        Ok(())
    }

    fn on_exec_resize(&mut self, client: ClientId, size: WindowSize) -> Result<(), String> {
        let process = self.clients.process(client).ok_or("this connection has started no process")?;
        let WindowSize { rows, columns } = size;
        self.request(Request::Resize { process, rows, columns }, Pending::Nobody);
        Ok(())
    }

    fn on_pause(&mut self, client: ClientId) -> Result<(), String> {
        self.require_running()?;
        // What is copied or committed while the container is paused has to be on the host by then.
        self.deadlines.insert(Deadline::Sync, Instant::now() + SYNC_PATIENCE);
        self.request(Request::Sync, Pending::PauseSync(client));
        Ok(())
    }

    /// Halts the machine for all who asked.
    pub(super) fn pause_after_sync(&mut self) {
        self.deadlines.remove(&Deadline::Sync);
        let waiting: Vec<_> = self
            .pending
            .iter()
            .filter_map(|(request, pending)| match pending {
                Pending::PauseSync(client) => Some((*request, *client)),
                _ => None,
            })
            .collect();
        let result = if self.step == Step::Paused { Ok(()) } else { self.halt() };
        for (request, client) in waiting {
            // The reply may come once the machine goes on; nobody waits for it then.
            self.pending.insert(request, Pending::Nobody);
            match &result {
                Ok(()) => self.clients.answer(client, &Answer::Done, &[]),
                Err(error) => self.clients.refuse(client, format!("cannot pause the container: {error}")),
            }
        }
    }

    fn halt(&mut self) -> Result<(), String> {
        self.machine.pause().map_err(|error| error.to_string())?;
        self.set_step(Step::Paused).inspect_err(|_| {
            // Nobody could see that it is halted, and nobody would let it go on.
            if let Err(error) = self.machine.resume() {
                self.fail(format!("cannot resume the container: {error}"));
            }
        })
    }

    fn on_resume(&mut self, client: ClientId) -> Result<(), String> {
        if self.step != Step::Paused {
            return Err("container not paused".into());
        }
        self.set_step(Step::Running)?;
        if let Err(error) = self.machine.resume() {
            self.set_step(Step::Paused)?;
            return Err(format!("cannot resume the container: {error}"));
        }
        self.request(Request::SetClock(self.agent.time()), Pending::Nobody);
        self.clients.answer(client, &Answer::Done, &[]);
        Ok(())
    }

    pub(super) fn forward(&mut self, request: Request, pending: Pending) -> Result<(), String> {
        self.require_running()?;
        self.request(request, pending);
        Ok(())
    }

    fn require_running(&self) -> Result<(), String> {
        match self.step {
            Step::Running if self.init.status().is_none() => Ok(()),
            Step::Paused => Err("container is paused".into()),
            _ => Err("container not running".into()),
        }
    }

    pub(super) fn kill_process(&mut self, process: ProcessId) {
        let signal = Request::Signal { process, signal: libc::SIGKILL, all: false };
        match self.executions.get(&process) {
            None => self.streams.forget(process),
            Some(execution) if execution.status.is_some() => {
                self.executions.remove(&process);
                self.streams.forget(process);
            }
            Some(_) => self.request(signal, Pending::Nobody),
        }
    }

    pub(super) fn request(&mut self, request: Request, pending: Pending) {
        match self.agent.request(request) {
            Ok(number) => drop(self.pending.insert(number, pending)),
            Err(error) => return self.not_sent(pending, &error.to_string()),
        }
        if let Err(failure) = self.agent.flush() {
            self.on_agent_failure(&failure);
        }
    }

    /// Only who asked for it is told that a request cannot be sent: the container goes on.
    fn not_sent(&mut self, pending: Pending, why: &str) {
        match pending {
            Pending::Signal(client) | Pending::Simple(client) | Pending::List(client) => {
                self.clients.refuse(client, why);
            }
            Pending::Network(client) => {
                self.undo_change();
                self.clients.refuse(client, why);
            }
            Pending::Exec(process) => {
                self.streams.forget(process);
                if let Some(execution) = self.executions.remove(&process) {
                    self.clients.refuse(execution.client, why);
                }
            }
            Pending::Start => {
                if let Some(client) = self.starter.take() {
                    self.clients.refuse(client, why);
                }
                self.outcome.get_or_insert(Outcome::NotStarted(NOT_STARTED));
            }
            Pending::PauseSync(client) => {
                self.deadlines.remove(&Deadline::Sync);
                self.clients.refuse(client, why);
            }
            Pending::Nobody => {}
        }
    }

    pub(super) fn receive_streams(&mut self) {
        for stream in self.streams.receive() {
            if stream.process == ProcessId::INIT {
                let result = self.init.connect(stream);
                if let Err(error) = result {
                    self.fail(format!("cannot copy the container's streams: {error}"));
                }
            } else if let Some(execution) = self.executions.get_mut(&stream.process) {
                let process = stream.process;
                execution.streams.push(stream);
                self.announce(process);
            }
        }
    }
}

/// The state for the hooks that run in the container, of which all but the status was known at `create`.
fn created_state(creating: &str) -> String {
    let report = serde_json::from_str::<StateReport>(creating);
    report.map_or_else(
        |_| creating.to_owned(),
        |report| StateReport { status: Status::Created, ..report }.to_json(),
    )
}

/// The order in which a process's streams are handed over.
pub(super) fn in_order(streams: &mut [Stream]) {
    streams.sort_by_key(|stream: &Stream| -> StreamRole { stream.role });
}
