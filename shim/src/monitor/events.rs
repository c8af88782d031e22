//! What the monitor does with what the agent says.

use std::os::fd::AsFd;
use std::time::Instant;

use rvm_protocol::{AgentError, AgentErrorKind, ExitStatus, FromAgent, ProcessId, Reply};

use super::clients::ClientId;
use super::commands::{NOT_STARTED, Pending, in_order};
use super::execution::Progress;
use super::service::{DRAIN_PATIENCE, Deadline, Outcome, STREAMS_PATIENCE, Service};
use crate::container::{Step, folder};
use crate::control::{Answer, RefusalKind};
use crate::timeline::Phase;

impl Service {
    pub(super) fn on_message(&mut self, message: FromAgent) {
        match message {
            FromAgent::Ready { kernel, .. } => {
                self.log.debug(format!("{}: the agent is up on Linux {kernel}", self.setup.id));
                self.deadlines.remove(&Deadline::Boot);
                (self.template, self.shared) = (None, None);
                self.setup.timeline.mark(Phase::AgentUp);
                if self.starter.is_some() {
                    self.expect_start();
                }
            }
            FromAgent::Reply { request, result } => {
                self.accept_streams();
                // A reply to nothing that was asked is the guest's nonsense.
                if let Some(pending) = self.pending.remove(&request) {
                    self.on_reply(request, pending, result);
                }
            }
            FromAgent::Exited { process, status } => {
                self.accept_streams();
                self.on_exit(process, status);
            }
            FromAgent::OutOfMemory => self.on_out_of_memory(),
        }
    }

    fn on_reply(&mut self, request: u64, pending: Pending, result: Result<Reply, AgentError>) {
        match (pending, result) {
            (Pending::Start, result) => self.on_started(result),
            (Pending::Exec(process), result) => self.on_exec_started(process, result),
            (Pending::Network(client), result) => self.on_network_reply(client, result.err()),
            (Pending::PauseSync(client), _) => {
                // Put back for a moment: all who wait for the pause are answered together.
                self.pending.insert(request, Pending::PauseSync(client));
                self.pause_after_sync();
                self.pending.remove(&request);
            }
            (Pending::Signal(client) | Pending::Simple(client), Ok(_)) => {
                self.clients.answer(client, &Answer::Done, &[]);
            }
            (Pending::List(client), Ok(reply)) => self.on_list(client, reply),
            (Pending::Signal(client) | Pending::Simple(client) | Pending::List(client), Err(error)) => {
                self.clients.refuse(client, error);
            }
            (Pending::Nobody, _) => {}
        }
    }

    fn on_list(&self, client: ClientId, reply: Reply) {
        match reply {
            Reply::Processes(processes) => self.clients.answer(client, &Answer::Processes(processes), &[]),
            _ => self.clients.refuse(client, "the guest's agent answered something else than was asked"),
        }
    }

    fn on_started(&mut self, result: Result<Reply, AgentError>) {
        self.deadlines.remove(&Deadline::Start);
        let starter = self.starter.take();
        let result = result.and_then(|_| {
            let failed = |message| AgentError { kind: AgentErrorKind::Other, message };
            self.set_step(Step::Running).map_err(failed)
        });
        match result {
            Ok(()) => {
                self.setup.timeline.mark(Phase::ContainerExec);
                self.log.debug(format!("{}: the container's process runs", self.setup.id));
                let _ = self.folder.write_json(folder::TIMELINE, &self.setup.timeline);
                if let Some(client) = starter {
                    self.clients.answer(client, &Answer::Done, &[]);
                }
            }
            Err(error) => {
                let code = RefusalKind::from(error.kind).shell_code().map_or(NOT_STARTED, i32::from);
                if let Some(client) = starter {
                    self.clients.refuse(client, error);
                }
                self.outcome.get_or_insert(Outcome::NotStarted(code));
            }
        }
    }

    fn on_exec_started(&mut self, process: ProcessId, result: Result<Reply, AgentError>) {
        let Some(execution) = self.executions.get_mut(&process) else { return };
        let client = execution.client;
        match result {
            Ok(_) => {
                execution.started = true;
                if self.clients.process(client).is_some() {
                    let patience = Instant::now() + STREAMS_PATIENCE;
                    self.deadlines.insert(Deadline::Streams(process), patience);
                    self.announce(process);
                } else {
                    self.kill_process(process);
                }
            }
            Err(error) => {
                self.executions.remove(&process);
                self.streams.forget(process);
                self.clients.refuse(client, error);
            }
        }
    }

    /// Tells the client of a further process that it runs, once that is so and all its streams are there; and
    /// then, if it has ended meanwhile, of its end.
    pub(super) fn announce(&mut self, process: ProcessId) {
        let Some(execution) = self.executions.get_mut(&process) else { return };
        match execution.progress() {
            Progress::Wait => return,
            Progress::GiveUp => return self.give_up(process),
            Progress::Announce => {}
        }
        self.deadlines.remove(&Deadline::Streams(process));
        execution.announced = true;
        let mut streams = std::mem::take(&mut execution.streams);
        in_order(&mut streams);
        let descriptors: Vec<_> = streams.iter().map(|stream| stream.connection.as_fd()).collect();
        let (client, status) = (execution.client, execution.status);
        self.clients.answer(client, &Answer::Started, &descriptors);
        if let Some(status) = status {
            self.on_exit(process, status);
        }
    }

    /// Refuses the client of a process whose streams do not come, and ends the process.
    pub(super) fn give_up(&mut self, process: ProcessId) {
        let Some(execution) = self.executions.get_mut(&process).filter(|execution| !execution.announced)
        else {
            return;
        };
        // It is not announced any more, and is removed when it ends.
        execution.announced = true;
        let client = execution.client;
        self.deadlines.remove(&Deadline::Streams(process));
        self.streams.forget(process);
        self.clients.refuse(client, "the guest's agent did not connect the standard streams of the process");
        self.kill_process(process);
    }

    fn on_exit(&mut self, process: ProcessId, status: ExitStatus) {
        if process == ProcessId::INIT {
            if self.start_asked {
                self.log.debug(format!("{}: the container's process has ended: {status:?}", self.setup.id));
                self.init.set_status(status);
                if self.deadlines.remove(&Deadline::Kill).is_some() {
                    // Whoever kills a container does not wait for the reader of its output.
                    self.deadlines.entry(Deadline::Drain).or_insert(Instant::now() + DRAIN_PATIENCE);
                }
            }
            return;
        }
        let Some(execution) = self.executions.get_mut(&process) else { return };
        execution.status = Some(status);
        if execution.announced {
            let client = execution.client;
            self.executions.remove(&process);
            self.clients.answer(client, &Answer::Exited(status), &[]);
        } else if self.clients.process(execution.client).is_none() {
            self.executions.remove(&process);
        } else {
            self.announce(process);
        }
    }
}
