//! The monitor's main loop: it waits for signals, commands, the agent, streams and the machine's end, and hands
//! each to the part that deals with it. It never blocks anywhere else, so that no guest can make it hang.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rvm_protocol::{ExitStatus, ProcessId};
use rvm_vmm::event_loop::EventLoop;
use rvm_vmm::machine::Machine;
use rvm_vmm::virtio::vsock::VsockListener;

use super::agent::{Agent, AgentFailure};
use super::boot::{self, Booting};
use super::clients::{ClientId, Clients};
use super::commands::Pending;
use super::execution::Execution;
use super::handshake::Setup;
use super::init::Init;
use super::network::Plugged;
use super::oom::OomReports;
use super::resolver::Resolver;
use super::streams::Streams;
use crate::cause::Cause;
use crate::container::{Folder, Step, folder};
use crate::control::Answer;
use crate::logging::Log;
use crate::signals::Signals;
use crate::template::{Kept, Template};
use crate::timeline::Phase;

/// How long a guest may take until its agent answers. Far above what the slowest host needs: it only ends what
/// would hang for ever.
const BOOT_PATIENCE: Duration = Duration::from_secs(180);
/// How long the guest may take to end a killed container before the machine is ended under it. The container's exit
/// status is the same, and what it wrote to files is on the host already.
pub(super) const KILL_PATIENCE: Duration = Duration::from_secs(2);
/// How long the guest may take to write everything back before it is halted all the same.
pub(super) const SYNC_PATIENCE: Duration = Duration::from_secs(10);
/// How long what was sent may take to be copied once the machine has ended or the container was killed.
pub(super) const DRAIN_PATIENCE: Duration = Duration::from_secs(2);
/// How long a started process's streams may be missing: the agent connects them before it starts the process.
pub(super) const STREAMS_PATIENCE: Duration = Duration::from_secs(5);
/// How long after the agent's end the machine may take to end too, so that its last messages are known.
const LAST_WORDS_PATIENCE: Duration = Duration::from_secs(2);

/// How it all ended.
#[derive(Debug)]
pub enum Outcome {
    /// The container's process ended so.
    Ended(ExitStatus),
    /// The guest could not start the container's process; the code is what a shell would report.
    NotStarted(i32),
    /// The machine failed, for this reason.
    Failed(String),
}

/// Something to be done at a time, unless it is put off or becomes needless.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Deadline {
    /// The agent has not answered.
    Boot,
    /// The guest is up, and has not answered the start.
    Start,
    /// The guest has not ended a killed container.
    Kill,
    /// The guest has not written everything back.
    Sync,
    /// The container has ended for good, and streams are still being copied.
    Drain,
    /// The agent's connection has ended, and the machine has not.
    LastWords,
    /// A process runs, and not all its streams have come.
    Streams(ProcessId),
}

/// A container's monitor at work.
pub struct Service {
    pub(super) setup: Box<Setup>,
    pub(super) folder: Folder,
    pub(super) machine: Machine,
    pub(super) events: EventLoop,
    pub(super) agent: Agent,
    pub(super) streams: Streams,
    pub(super) clients: Clients,
    pub(super) init: Init,
    pub(super) step: Step,
    /// The command that has asked for the start and waits for it; once asked, it is not asked again.
    pub(super) starter: Option<ClientId>,
    pub(super) start_asked: bool,
    /// How long the guest may take to answer it.
    pub(super) start_patience: Option<Duration>,
    pub(super) plugged: Plugged,
    pub(super) pending: HashMap<u64, Pending>,
    pub(super) executions: HashMap<ProcessId, Execution>,
    pub(super) next_process: u32,
    pub(super) deadlines: HashMap<Deadline, Instant>,
    pub(super) outcome: Option<Outcome>,
    /// What the machine goes on from, until it is known to.
    pub(super) template: Option<Template>,
    /// Where that is kept which it shares with others that boot, until that is known to work.
    pub(super) shared: Option<Kept>,
    signals: Signals,
    control_listener: VsockListener,
    stream_listener: VsockListener,
    lookup_listener: VsockListener,
    /// Asks Docker's name server for the guest.
    resolver: Option<Resolver>,
    machine_ended: bool,
    /// Where commands read the step.
    step_file: File,
    pub(super) log: Log,
    pub(super) oom_reports: OomReports,
    /// Whether it was said that the guest was out of memory.
    out_of_memory: bool,
    /// The conversation with the command that this container ends with, if it does.
    tie: Option<OwnedFd>,
}

/// What poll found ready.
enum Source {
    Signal,
    CommandListener,
    Command(ClientId),
    ControlListener,
    Agent,
    StreamListener,
    StreamHeader,
    LookupListener,
    Machine,
    Drained,
    OomReport,
    Tie,
}

impl Service {
    /// The service of a machine that boots.
    pub fn new(
        setup: Box<Setup>,
        folder: Folder,
        step_file: File,
        listener: OwnedFd,
        signals: Signals,
        init: Init,
        booting: Booting,
    ) -> Service {
        Service {
            setup,
            folder,
            events: booting.events,
            agent: Agent::new(booting.machine.clock(), booting.template.is_some()),
            template: booting.template,
            shared: booting.shared,
            machine: booting.machine,
            streams: Streams::default(),
            clients: Clients::new(listener),
            init,
            step: Step::Created,
            starter: None,
            start_asked: false,
            start_patience: None,
            plugged: Plugged::default(),
            pending: HashMap::new(),
            executions: HashMap::new(),
            next_process: ProcessId::INIT.0 + 1,
            deadlines: HashMap::from([(Deadline::Boot, Instant::now() + BOOT_PATIENCE)]),
            outcome: None,
            signals,
            control_listener: booting.control,
            stream_listener: booting.streams,
            lookup_listener: booting.lookups,
            resolver: None,
            machine_ended: false,
            step_file,
            tie: None,
            log: Log::default(),
            oom_reports: OomReports::default(),
            out_of_memory: false,
        }
    }

    /// Writes what happens to a log.
    pub fn log_to(&mut self, log: Log) {
        self.log = log;
    }

    /// Writes the error that has ended the container to the log.
    pub fn log_failure(&self, words: &str) {
        self.log.error_to_log(words);
    }

    /// Answers the guest's resolver; without one, its connections are closed.
    pub fn look_names_up_with(&mut self, resolver: Option<Resolver>) {
        self.resolver = resolver;
    }

    /// Ends a container whose start the guest does not answer in this time.
    pub fn expect_start_within(&mut self, patience: Option<Duration>) {
        self.start_patience = patience;
    }

    /// Ends the container when the other end of a conversation closes.
    pub fn tie_to(&mut self, conversation: Option<OwnedFd>) {
        self.tie = conversation;
    }

    /// Works until the container has ended. The caller ends the process and does not drop this: that would wait for
    /// threads which a guest that has failed may hold for ever.
    pub fn run(&mut self) -> Outcome {
        let outcome = loop {
            if let Some(outcome) = self.outcome.take() {
                break outcome;
            }
            for source in self.wait() {
                self.handle(source);
            }
            self.check_deadlines();
            if self.init.is_over() {
                self.outcome = self.outcome.take().or(self.init.status().map(Outcome::Ended));
            }
        };
        self.conclude(&outcome);
        outcome
    }

    fn wait(&mut self) -> Vec<Source> {
        let next = self.deadlines.values().min();
        let timeout = next.map_or(PollTimeout::NONE, |deadline| {
            // Rounded up, so that the deadline has passed when poll returns.
            let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let mut sources = Vec::new();
        let mut fds = Vec::new();
        self.list_sources(|source, fd| {
            sources.push(source);
            fds.push(fd);
        });
        if poll(&mut fds, timeout).is_err() {
            return Vec::new();
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        sources.into_iter().zip(ready).filter_map(|(source, ready)| ready.then_some(source)).collect()
    }

    fn list_sources<'fd>(&'fd self, mut add: impl FnMut(Source, PollFd<'fd>)) {
        let input = |fd| PollFd::new(fd, PollFlags::POLLIN);
        add(Source::Signal, input(self.signals.as_fd()));
        add(Source::CommandListener, input(self.clients.listener()));
        for (id, fd) in self.clients.connections() {
            add(Source::Command(id), input(fd));
        }
        add(Source::ControlListener, input(self.control_listener.as_fd()));
        if let Some((fd, flags)) = self.agent.interest() {
            add(Source::Agent, PollFd::new(fd, flags));
        }
        add(Source::StreamListener, input(self.stream_listener.as_fd()));
        for fd in self.streams.undecided() {
            add(Source::StreamHeader, input(fd));
        }
        add(Source::LookupListener, input(self.lookup_listener.as_fd()));
        if !self.machine_ended {
            add(Source::Machine, input(self.machine.exit_event()));
        }
        add(Source::Drained, input(self.init.drained()));
        if let Some(report) = self.oom_reports.on_its_way() {
            add(Source::OomReport, input(report));
        }
        if let Some(tie) = &self.tie {
            add(Source::Tie, input(tie.as_fd()));
        }
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Signal => {
                while let Some(signal) = self.signals.take() {
                    self.on_signal(signal);
                }
            }
            // A connection that its client has given up already is no failure.
            Source::CommandListener => drop(self.clients.accept()),
            Source::Command(id) => match self.clients.receive(id) {
                Some(packet) => self.on_command(id, packet),
                None => self.on_client_gone(id),
            },
            Source::ControlListener => self.accept_agent(),
            Source::Agent => self.receive_from_agent(),
            Source::StreamListener | Source::StreamHeader => self.accept_streams(),
            Source::LookupListener => self.accept_lookups(),
            Source::Machine => self.on_machine_end(),
            Source::Drained => self.init.count_drained(),
            Source::OomReport => self.oom_reports.arrived(),
            // Nothing more is said on it: it can only have closed.
            Source::Tie => self.end_by_kill(),
        }
    }

    /// The first connection is the agent's: it connects before any process of the container exists. Later ones
    /// are closed.
    fn accept_agent(&mut self) {
        while let Some(connection) = self.control_listener.accept() {
            if !self.agent.is_connected() && self.deadlines.contains_key(&Deadline::Boot) {
                let _ = self.agent.connect(connection);
            }
        }
    }

    /// Takes the streams that have arrived. What the agent says of a process comes after the process's streams,
    /// so this is called before it is acted upon.
    pub(super) fn accept_streams(&mut self) {
        while let Some(connection) = self.stream_listener.accept() {
            if self.streams.is_full() {
                self.receive_streams();
            }
            // One that breaks at once is none.
            let _ = self.streams.add(connection);
        }
        self.receive_streams();
    }

    fn accept_lookups(&mut self) {
        while let Some(connection) = self.lookup_listener.accept() {
            let Some(resolver) = &self.resolver else { continue };
            if let Err(error) = resolver.serve(connection) {
                self.log.debug(format!("{}: names cannot be looked up: {error}", self.setup.id));
            }
        }
    }

    fn receive_from_agent(&mut self) {
        let result = self.agent.flush().and_then(|()| self.agent.receive());
        match result {
            Ok(messages) => messages.into_iter().for_each(|message| self.on_message(message)),
            Err(failure) => self.on_agent_failure(&failure),
        }
    }

    /// A machine whose agent is gone ends soon, and its last messages tell more than the lost connection.
    pub(super) fn on_agent_failure(&mut self, failure: &AgentFailure) {
        self.agent.disconnect();
        match failure {
            AgentFailure::Closed => {
                self.deadlines.remove(&Deadline::Boot);
                self.deadlines.entry(Deadline::LastWords).or_insert(Instant::now() + LAST_WORDS_PATIENCE);
            }
            _ => self.fail(failure.to_string()),
        }
    }

    fn on_machine_end(&mut self) {
        self.machine_ended = true;
        if self.init.status().is_some() {
            self.deadlines.entry(Deadline::Drain).or_insert(Instant::now() + DRAIN_PATIENCE);
        } else {
            // The container's end may have been sent just before.
            self.receive_from_agent();
            if self.init.status().is_none() {
                self.fail(boot::post_mortem(&self.machine));
            }
        }
    }

    fn check_deadlines(&mut self) {
        let now = Instant::now();
        let passed: Vec<_> =
            self.deadlines.iter().filter(|(_, at)| **at <= now).map(|(deadline, _)| *deadline).collect();
        for deadline in passed {
            self.deadlines.remove(&deadline);
            match deadline {
                Deadline::Boot | Deadline::LastWords => self.fail(boot::post_mortem(&self.machine)),
                Deadline::Start => self.fail(boot::unanswered_start(&self.machine, self.start_patience)),
                Deadline::Kill => self.end_by_kill(),
                Deadline::Sync => self.pause_after_sync(),
                Deadline::Drain => self.outcome = self.init.status().map(Outcome::Ended),
                Deadline::Streams(process) => self.give_up(process),
            }
        }
    }

    /// The log says it once: a guest could fill it.
    pub(super) fn on_out_of_memory(&mut self) {
        self.oom_reports.report();
        if !std::mem::replace(&mut self.out_of_memory, true) {
            self.log.warning_now(
                "the guest's kernel killed a process of the container, which was over its memory limit",
            );
        }
    }

    /// The machine cannot go on.
    pub(super) fn fail(&mut self, words: String) {
        let words = match (self.template.take(), self.shared.take()) {
            (Some(template), _) => {
                template.discard();
                format!(
                    "the guest that was to go on from a template did not come up; the template was dropped, so that \
                     the next start boots its machine: {words}"
                )
            }
            (None, Some(shared)) => {
                shared.discard();
                format!(
                    "the guest did not come up with what is kept for machines that boot, which was dropped, so that the \
                     next start does without: {words}"
                )
            }
            (None, None) => words,
        };
        self.outcome.get_or_insert(Outcome::Failed(words));
    }

    /// The container ends as by SIGKILL, whatever the guest does.
    pub(super) fn end_by_kill(&mut self) {
        self.outcome.get_or_insert(Outcome::Ended(ExitStatus::Signal(libc::SIGKILL as u8)));
    }

    /// Writes how far the container has come for commands to read.
    pub(super) fn set_step(&mut self, step: Step) -> Result<(), String> {
        self.step_file
            .write_all_at(&[step.to_byte()], 0)
            .map_err(|error| format!("cannot write the container's state: {}", Cause::from(error)))?;
        self.step = step;
        Ok(())
    }

    /// Tells those who wait how it ended, and leaves what the commands read after this process's end.
    fn conclude(&mut self, outcome: &Outcome) {
        self.oom_reports.settle();
        self.setup.timeline.mark(Phase::Exit);
        self.log.debug(format!("{}: it is over: {outcome:?}", self.setup.id));
        let _ = self.folder.write_json(folder::TIMELINE, &self.setup.timeline);
        let words = match outcome {
            Outcome::Failed(words) => words.as_str(),
            _ => "container not running",
        };
        if matches!(outcome, Outcome::Failed(_)) {
            let _ = self.folder.write(folder::FAILURE, words.as_bytes());
        }
        for pending in std::mem::take(&mut self.pending).into_values() {
            match pending {
                // The container has ended: that is what a signal is for.
                Pending::Signal(client) => self.clients.answer(client, &Answer::Done, &[]),
                Pending::Simple(client)
                | Pending::List(client)
                | Pending::PauseSync(client)
                | Pending::Network(client) => {
                    self.clients.refuse(client, words);
                }
                Pending::Start | Pending::Exec(_) | Pending::Nobody => {}
            }
        }
        if let Some(client) = self.starter.take() {
            self.clients.refuse(client, words);
        }
        for execution in std::mem::take(&mut self.executions).into_values() {
            if !execution.announced {
                self.clients.refuse(execution.client, words);
            }
        }
    }
}
