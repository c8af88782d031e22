//! `run`: a container's whole life in one command.
//!
//! In the foreground this process stands in for the container's: it passes signals, the terminal and the window
//! size on, and ends with the container's exit code.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use clap::Args;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Context;
use super::inspect::Format;
use super::lifecycle::{CreateArguments, create_from};
use crate::bundle::Bundle;
use crate::console::{self, RawMode};
use crate::container::create::{Created, TerminalUse};
use crate::container::launch::MonitorProcess;
use crate::container::{Container, Lock, ProcessHandle, ProcessIdentity, delete, folder, start};
use crate::error::Error;
use crate::signals::{self, Signals};
use crate::stdio;
use crate::timeline::{Phase, Timeline};

/// How long the monitor of a container that was not started may take to end by a signal.
const END_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub(super) struct RunArguments {
    #[command(flatten)]
    pub create: CreateArguments,
    /// Return once the container's process runs
    #[arg(short, long)]
    pub detach: bool,
    /// Do not delete the container when it has ended
    #[arg(long)]
    pub keep: bool,
    /// Accepted for compatibility, without effect
    #[arg(long, hide = true)]
    pub no_subreaper: bool,
    /// Show afterwards when each phase of the start was reached
    #[arg(long, value_name = "FORMAT", value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    pub timeline: Option<Format>,
}

pub(super) fn run(context: &Context, arguments: RunArguments) -> Result<ExitCode, Error> {
    let bundle = Bundle::load(&arguments.create.bundle)?;
    if arguments.detach {
        return detached(context, &arguments, bundle);
    }
    if arguments.create.console_socket.is_some() {
        return Err(Error::Usage("--console-socket needs --detach".into()));
    }
    let run = Foreground { context, arguments: &arguments, lower: None };
    run.run(bundle)
}

fn detached(context: &Context, arguments: &RunArguments, bundle: Bundle) -> Result<ExitCode, Error> {
    let socket = arguments.create.console_socket.clone();
    let terminal = socket.map_or(TerminalUse::Nowhere, TerminalUse::Socket);
    let created = create_from(context, &arguments.create, bundle, terminal, None)?;
    start::start(&created.container, &context.log).inspect_err(|_| discard(context, &created.container))?;
    Ok(ExitCode::SUCCESS)
}

/// Takes back a container whose monitor is this process's child.
fn take_back(context: &Context, container: &Container, monitor: &mut MonitorProcess) {
    discard(context, container);
    monitor.kill();
}

/// Takes back a container that is locked by this command. The error that led here is the one to be told.
fn discard(context: &Context, container: &Container) {
    let _ = delete::kill(container);
    let _ = delete::remove(container, &context.log);
}

/// A run in the foreground.
pub(super) struct Foreground<'a> {
    /// What all commands share.
    pub context: &'a Context,
    /// What is to be run, and how.
    pub arguments: &'a RunArguments,
    /// The directory over which the rootfs is a throw-away layer.
    pub lower: Option<std::path::PathBuf>,
}

impl Foreground<'_> {
    /// Runs the container and returns its exit code.
    pub fn run(self, bundle: Bundle) -> Result<ExitCode, Error> {
        // Before there is anything that a signal could be for, so that none is lost.
        let mut signals = Signals::block().map_err(Error::system("cannot wait for signals"))?;
        let size = console::window_size(io::stdin()).unwrap_or_default();
        let terminal = TerminalUse::Caller(size);
        let Created { container, lock, mut monitor, master } =
            create_from(self.context, &self.arguments.create, bundle, terminal, self.lower.clone())?;
        let stdin = io::stdin();
        let raw = master.as_ref().and_then(|_| RawMode::enter(stdin.as_fd()).ok());
        let session = master.map(Session::begin).transpose();
        let session = session
            .map_err(Error::system("cannot copy to and from the terminal"))
            .inspect_err(|_| take_back(self.context, &container, &mut monitor))?;

        self.start(&container, &mut monitor, lock, &mut signals, session.as_ref())?;
        let status =
            monitor.wait().map_err(Error::system("cannot wait for the container")).inspect_err(|_| {
                let _ = delete::delete(&self.context.root, container.id(), true, &self.context.log);
            })?;
        if let Some(session) = session {
            session.finish();
        }
        drop(raw);
        self.finish(&container, status)
    }

    /// Starts the container, and passes signals on until it has ended: from before the start, which takes as long as the
    /// guest and the container's hooks take. One that is not started is taken back, unless a signal has ended it.
    fn start(
        &self,
        container: &Container,
        monitor: &mut MonitorProcess,
        lock: Lock,
        signals: &mut Signals,
        session: Option<&Session>,
    ) -> Result<(), Error> {
        let handle = container.record.monitor.and_then(ProcessIdentity::open);
        let passed_on = PassedOn::default();
        thread::scope(|scope| {
            let forwarding = handle.as_ref().map_or(Ok(()), |monitor| {
                let mut forwarding = Forwarding { monitor, signals, session, passed_on: &passed_on };
                // What has arrived since `create` began is older than the start.
                forwarding.pass_on();
                let thread = thread::Builder::new().name("signals".into());
                let thread = thread.spawn_scoped(scope, || forwarding.run());
                thread.map(drop).map_err(Error::system("cannot start a thread for signals"))
            });
            let started = forwarding.and_then(|()| Ok(start::start(container, &self.context.log)?));
            // The thread ends with the monitor, so that one which is of no use may not live on.
            let result = match started {
                Err(_) if passed_on.has_ended(handle.as_ref(), monitor) => Ok(()),
                started => started.inspect_err(|_| take_back(self.context, container, monitor)),
            };
            drop(lock);
            result
        })
    }

    fn finish(&self, container: &Container, status: std::process::ExitStatus) -> Result<ExitCode, Error> {
        use std::os::unix::process::ExitStatusExt;
        let failure = container.last_words();
        let mut timeline: Option<Timeline> = container.folder().read_json(folder::TIMELINE).ok().flatten();
        if !self.arguments.keep {
            let deleted = delete::delete(&self.context.root, container.id(), true, &self.context.log);
            if let Err(error) = deleted {
                // The exit code is what the caller waits for.
                self.context.log.warning(format!("the container has ended, but cannot be deleted: {error}"));
            } else if let Some(timeline) = &mut timeline {
                timeline.mark(Phase::Deleted);
            }
        }
        match (timeline, self.arguments.timeline) {
            (Some(timeline), Some(Format::Table)) => eprint!("{}", timeline.to_table()),
            (Some(timeline), Some(Format::Json)) => {
                // In one piece: standard error has no buffer.
                let line = timeline.to_json().to_string();
                eprintln!("{line}");
            }
            (_, _) => (),
        }
        if let Some(words) = failure {
            self.context.log.error(&words);
        }
        let code = status.code().or_else(|| Some(128 + status.signal()?)).unwrap_or(255);
        Ok(ExitCode::from(u8::try_from(code).unwrap_or(255)))
    }
}

/// The signals that were passed on and by which a process without handlers ends, one bit each.
#[derive(Debug, Default)]
struct PassedOn(AtomicU64);

impl PassedOn {
    /// Notes a signal that is about to be passed on.
    fn note(&self, signal: i32) {
        if signals::is_fatal(signal) {
            self.0.fetch_or(bit(signal), Ordering::SeqCst);
        }
    }

    /// Whether one of them has ended a container that was not started.
    fn has_ended(&self, handle: Option<&ProcessHandle>, monitor: &mut MonitorProcess) -> bool {
        use std::os::unix::process::ExitStatusExt;
        if self.0.load(Ordering::SeqCst) == 0 || !handle.is_some_and(|handle| handle.wait(END_PATIENCE)) {
            return false;
        }
        let signal = monitor.wait().ok().and_then(|status| status.signal());
        signal.is_some_and(|signal| self.0.load(Ordering::SeqCst) & bit(signal) != 0)
    }
}

/// Signals are numbered from 1 to 64.
fn bit(signal: i32) -> u64 {
    u32::try_from(signal - 1).ok().and_then(|shift| 1_u64.checked_shl(shift)).unwrap_or(0)
}

/// Passes signals on.
struct Forwarding<'a> {
    monitor: &'a ProcessHandle,
    signals: &'a mut Signals,
    session: Option<&'a Session>,
    passed_on: &'a PassedOn,
}

impl Forwarding<'_> {
    /// Passes signals on until the monitor has ended.
    fn run(mut self) {
        loop {
            let mut fds = [
                PollFd::new(self.monitor.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ];
            let polled = poll(&mut fds, PollTimeout::NONE);
            let ended = fds[0].any().unwrap_or(true);
            if polled.is_ok() && ended {
                return;
            }
            self.pass_on();
        }
    }

    /// Passes those on that have arrived.
    fn pass_on(&mut self) {
        while let Some(signal) = self.signals.take() {
            match self.session {
                Some(session) if signal == libc::SIGWINCH => session.resize(),
                _ => {
                    self.passed_on.note(signal);
                    // It may have ended meanwhile: then poll says so next.
                    drop(self.monitor.signal(signal));
                }
            }
        }
    }
}

/// The caller's terminal, connected with the container's.
struct Session {
    master: OwnedFd,
    output: JoinHandle<()>,
}

impl Session {
    fn begin(master: OwnedFd) -> io::Result<Session> {
        let (input, output) = (master.try_clone()?, master.try_clone()?);
        let stdin = io::stdin().as_fd().try_clone_to_owned()?;
        let stdout = io::stdout().as_fd().try_clone_to_owned()?;
        // This one may sit in a read for ever; it ends with the process.
        thread::Builder::new().name("stdin".into()).spawn(move || stdio::pump(stdin, input))?;
        let output =
            thread::Builder::new().name("stdout".into()).spawn(move || stdio::pump(output, stdout))?;
        Ok(Session { master, output })
    }

    fn resize(&self) {
        if io::stdin().is_terminal()
            && let Ok(size) = console::window_size(io::stdin())
        {
            let _ = console::set_window_size(&self.master, size);
        }
    }

    /// Waits until all that the container wrote has been copied: its end of the terminal is closed.
    fn finish(self) {
        let _ = self.output.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_that_end_a_process_are_noted() {
        let passed_on = PassedOn::default();
        passed_on.note(libc::SIGWINCH);
        assert_eq!(passed_on.0.load(Ordering::SeqCst), 0);
        passed_on.note(1);
        passed_on.note(64);
        assert_eq!(passed_on.0.load(Ordering::SeqCst), 1 | 1 << 63);
        assert_eq!((bit(0), bit(65), bit(i32::MAX)), (0, 0, 0));
    }
}
