//! `exec`: a further process in a running container.

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use oci_spec::runtime::Process;

use super::process::ProcessArguments;
use super::stub::{self, Stub};
use super::{Context, refuse_descriptors};
use crate::bundle::inherit_limits;
use crate::console::{Console, RawMode, window_size};
use crate::container::create::{send_pidfd, write_pid_file};
use crate::container::{Container, ContainerError, Status};
use crate::control::{Connection, Exec, WindowSize};
use crate::error::Error;
use crate::stdio::is_null;

/// How often a container that is paused is looked at.
const PAUSE_POLL: Duration = Duration::from_millis(50);

#[derive(Debug, Args)]
pub(super) struct ExecArguments {
    /// A unix socket to which the host's end of the terminal is sent
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// A unix socket to which a descriptor of the stub is sent
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// Return once the process runs
    #[arg(short, long)]
    detach: bool,
    /// Where to write the process id of the stub that stands for the process
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Accepted for compatibility; only 0 is possible
    #[arg(long, value_name = "N", default_value_t = 0, hide = true)]
    preserve_fds: u32,
    /// Accepted for compatibility, without effect: the guest has one cgroup for a container
    #[arg(long, value_name = "PATH", hide = true)]
    cgroup: Vec<String>,
    /// In a container that is paused, wait until it goes on
    #[arg(long)]
    ignore_paused: bool,
    /// The container's ID
    #[arg(value_name = "ID")]
    id: String,
    #[command(flatten)]
    process: ProcessArguments,
}

pub(super) fn exec(context: &Context, arguments: ExecArguments) -> Result<ExitCode, Error> {
    refuse_descriptors(arguments.preserve_fds)?;
    let container = Container::open(&context.root, &arguments.id)?;
    while arguments.ignore_paused && container.status() == Status::Paused {
        std::thread::sleep(PAUSE_POLL);
    }
    match container.status() {
        Status::Running => {}
        status => return Err(ContainerError::NoExec(status).into()),
    }
    let tty = arguments.process.tty;
    let mut warnings = Vec::new();
    let process = arguments.process.into_process(&container, &mut warnings)?;
    warnings.iter().for_each(|warning| context.log.warning(warning));
    let execution = Execution {
        terminal: tty || process.terminal().unwrap_or(false),
        container,
        console_socket: arguments.console_socket,
        pidfd_socket: arguments.pidfd_socket,
        pid_file: arguments.pid_file,
    };
    if arguments.detach { execution.detached(&process) } else { execution.foreground(&process) }
}

struct Execution {
    container: Container,
    terminal: bool,
    console_socket: Option<PathBuf>,
    pidfd_socket: Option<PathBuf>,
    pid_file: Option<PathBuf>,
}

impl Execution {
    fn detached(&self, process: &Process) -> Result<ExitCode, Error> {
        let console = match (&self.console_socket, self.terminal) {
            (None, true) => {
                return Err(Error::Usage("the process has a terminal: give a --console-socket".into()));
            }
            (Some(_), false) => return Err(Error::Usage("--console-socket needs a terminal".into())),
            (Some(_), true) => {
                Some(Console::open(asked_size(process)).map_err(Error::system("cannot make a terminal"))?)
            }
            (None, false) => None,
        };
        let connection = self.connect()?;
        let exec = self.request(process)?;
        let title = format!("rvm: {} exec", self.container.id());
        let slave = console.as_ref().map(|console| console.slave.as_fd());
        let cgroup = self.container.record.cgroup.as_ref();
        let mut child = stub::detach(&title, slave, cgroup, &connection, exec, || {
            match (&console, &self.console_socket) {
                (Some(console), Some(socket)) => console.send_master(socket),
                _ => Ok(()),
            }
        })?;
        self.tell_pid(child.id()).inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        Ok(ExitCode::SUCCESS)
    }

    fn foreground(&self, process: &Process) -> Result<ExitCode, Error> {
        if self.console_socket.is_some() {
            return Err(Error::Usage("--console-socket needs --detach".into()));
        }
        let connection = self.connect()?;
        let exec = self.request(process)?;
        let stdin = io::stdin();
        let mut stub = Stub::start(connection, exec)?;
        let raw = self.terminal.then(|| RawMode::enter(stdin.as_fd()).ok()).flatten();
        self.tell_pid(std::process::id())?;
        let status = stub.attend();
        drop(raw);
        Ok(ExitCode::from(u8::try_from(status.shell_code()).unwrap_or(u8::MAX)))
    }

    fn connect(&self) -> Result<Connection, Error> {
        Ok(self.container.connect()?)
    }

    fn request(&self, process: &Process) -> Result<Exec, Error> {
        let mut inheriting = process.clone();
        inherit_limits(&mut inheriting);
        let json = serde_json::to_string(&inheriting)
            .map_err(|error| Error::system("cannot encode the process")(io::Error::from(error)))?;
        let size = || window_size(io::stdin()).unwrap_or_else(|_| asked_size(process));
        let null_stdin = !self.terminal && is_null(io::stdin());
        Ok(Exec { process: json, terminal: self.terminal.then(size), null_stdin })
    }

    fn tell_pid(&self, stub: u32) -> Result<(), Error> {
        let stub = stub.cast_signed();
        if let Some(socket) = &self.pidfd_socket {
            send_pidfd(socket, stub)
                .map_err(Error::system(format!("cannot send a pidfd to {}", socket.display())))?;
        }
        if let Some(path) = &self.pid_file {
            write_pid_file(path, stub)
                .map_err(Error::system(format!("cannot write the pid file {}", path.display())))?;
        }
        Ok(())
    }
}

fn asked_size(process: &Process) -> WindowSize {
    process.console_size().map(|size| WindowSize::from(&size)).unwrap_or_default()
}
