//! `run`: a container's whole life in one command.
//!
//! In the foreground this process stands in for the container's: it passes signals, the terminal and the window
//! size on, and ends with the container's exit code.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::thread::{self, JoinHandle};

use clap::Args;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Context;
use super::lifecycle::{CreateArguments, create_from};
use crate::bundle::Bundle;
use crate::console::{self, RawMode};
use crate::container::create::{Created, TerminalUse};
use crate::container::{Container, ProcessHandle, ProcessIdentity, delete, folder, start};
use crate::error::Error;
use crate::signals::Signals;
use crate::stdio;
use crate::timeline::Timeline;

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
    #[arg(long)]
    pub timeline: bool,
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
        let started = session
            .map_err(Error::system("cannot copy to and from the terminal"))
            .and_then(|session| Ok(start::start(&container, &self.context.log).map(|()| session)?));
        let session = started.inspect_err(|_| {
            discard(self.context, &container);
            monitor.kill();
        })?;
        drop(lock);

        if let Some(handle) = container.record.monitor.and_then(ProcessIdentity::open) {
            forward(&handle, &mut signals, session.as_ref());
        }
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

    fn finish(&self, container: &Container, status: std::process::ExitStatus) -> Result<ExitCode, Error> {
        use std::os::unix::process::ExitStatusExt;
        let failure = container.last_words();
        let timeline: Option<Timeline> = container.folder().read_json(folder::TIMELINE).ok().flatten();
        if !self.arguments.keep {
            let deleted = delete::delete(&self.context.root, container.id(), true, &self.context.log);
            if let Err(error) = deleted {
                // The exit code is what the caller waits for.
                self.context.log.warning(format!("the container has ended, but cannot be deleted: {error}"));
            }
        }
        if let Some(timeline) = timeline.filter(|_| self.arguments.timeline) {
            eprint!("{}", timeline.to_table());
        }
        if let Some(words) = failure {
            self.context.log.error(&words);
        }
        let code = status.code().or_else(|| Some(128 + status.signal()?)).unwrap_or(255);
        Ok(ExitCode::from(u8::try_from(code).unwrap_or(255)))
    }
}

/// Passes signals on until the monitor has ended.
fn forward(monitor: &ProcessHandle, signals: &mut Signals, session: Option<&Session>) {
    loop {
        let mut fds = [
            PollFd::new(monitor.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        let polled = poll(&mut fds, PollTimeout::NONE);
        let ended = fds[0].any().unwrap_or(true);
        if polled.is_ok() && ended {
            return;
        }
        while let Some(signal) = signals.take() {
            match session {
                Some(session) if signal == libc::SIGWINCH => session.resize(),
                // It may have ended meanwhile: then poll says so next.
                _ => drop(monitor.signal(signal)),
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
