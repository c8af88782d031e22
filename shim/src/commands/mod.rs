//! The command line: what runc has, as engines call it, and what is rvm's own.

mod check;
mod compare;
mod exec;
mod inspect;
mod lifecycle;
mod local;
mod process;
mod run;
mod stats;
mod stub;
mod template;
mod update;
mod usage;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::LazyLock;

use clap::{Args, Parser, Subcommand};

use crate::error::{EXEC_FAILURE, Error, FAILURE};
use crate::logging::{Log, LogFormat};
use crate::monitor;
use crate::network::follow;
use crate::spec::OCI_VERSION;
use crate::template::builder;
use crate::timeline::Timeline;

/// What follows the program's name, in the form that engines parse.
static VERSION: LazyLock<String> = LazyLock::new(|| {
    let (version, commit) = (env!("CARGO_PKG_VERSION"), env!("RVM_COMMIT"));
    format!("version {version}\ncommit: {commit}\nspec: {OCI_VERSION}")
});

const EXAMPLES: &str = "\
Examples:
  rvm check                                is this host fit for microVMs, and if not, what helps?
  rvm do -- uname -a                       run a command in a microVM over this host's files; writes are thrown away
  rvm do --rootfs ./debian -- sh           the same over another directory
  rvm spec && rvm run demo                 write a config.json, and run the bundle in this directory
  rvm list; rvm exec demo sh; rvm delete --force demo
  rvm compare --report compared.html       how much slower is a microVM than a container, here?

With an engine:
  dockerd --add-runtime rvm=/usr/local/bin/rvm     then: docker run --runtime=rvm ...
  podman --runtime /usr/local/bin/rvm run ...";

/// An OCI runtime that boots every container in a microVM of its own.
#[derive(Debug, Parser)]
#[command(name = "rvm", version = VERSION.as_str(), after_help = EXAMPLES)]
struct Arguments {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Globals {
    /// Where the state of containers is kept
    #[arg(long, value_name = "DIR", default_value = "/run/rvm")]
    root: PathBuf,
    /// Write warnings and errors to this file instead of standard error; errors go to both
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// How lines of the log look
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// Log details too
    #[arg(long)]
    debug: bool,
    /// Have systemd make the cgroup ("slice:prefix:name" in the spec's cgroupsPath)
    #[arg(long)]
    systemd_cgroup: bool,
    /// A guest kernel of your own (ELF vmlinux or bzImage)
    #[arg(long, value_name = "FILE", env = "RVM_KERNEL")]
    kernel: Option<PathBuf>,
    /// Accepted for compatibility, without effect
    #[arg(long, value_name = "VALUE", hide = true)]
    rootless: Option<String>,
    /// Accepted for compatibility, without effect
    #[arg(long, value_name = "PATH", hide = true)]
    criu: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
#[command(defer = true)]
enum Command {
    /// Create a container: boot its microVM, and wait for `start`
    Create(lifecycle::CreateArguments),
    /// Start the process of a created container
    Start(lifecycle::IdArgument),
    /// Create, start and delete a container, and wait for it in between
    Run(run::RunArguments),
    /// Show the state of a container as JSON
    State(lifecycle::IdArgument),
    /// Send a signal to a container's process
    Kill(lifecycle::KillArguments),
    /// Delete a container that has stopped, or with --force any
    Delete(lifecycle::DeleteArguments),
    /// Run a further process in a container
    Exec(Box<exec::ExecArguments>),
    /// List containers
    List(inspect::ListArguments),
    /// List the processes of a container
    Ps(inspect::PsArguments),
    /// Show what containers cost this host in memory
    Stats(stats::StatsArguments),
    /// Halt a container
    Pause(lifecycle::IdArgument),
    /// Let a halted container go on
    Resume(lifecycle::IdArgument),
    /// Change a container's limits
    Update(update::UpdateArguments),
    /// Show what this runtime supports, as JSON
    Features,
    /// Write a config.json to start from
    Spec(inspect::SpecArguments),
    /// Check whether this host can run microVMs
    Check(check::CheckArguments),
    /// Compare runtimes on this machine: start, exec, memory, isolation
    Compare(compare::CompareArguments),
    /// Make, list or remove templates: captured machines from which containers begin
    #[command(subcommand)]
    Template(template::TemplateCommand),
    /// Run a command in a microVM over a directory, and throw its writes away
    Do(local::DoArguments),
}

/// What all commands share.
#[derive(Debug)]
struct Context {
    root: PathBuf,
    log: Log,
    systemd_cgroup: bool,
    kernel: Option<PathBuf>,
    timeline: Timeline,
}

/// The whole program.
pub fn main() -> ExitCode {
    let timeline = Timeline::begin();
    match std::env::args_os().nth(1) {
        Some(first) if first == monitor::handshake::SUBCOMMAND => return stay(monitor::run()),
        Some(first) if first == stub::SUBCOMMAND => return stay(stub::run()),
        Some(first) if first == follow::SUBCOMMAND => return stay(follow::run()),
        Some(first) if first == builder::SUBCOMMAND => return stay(builder::run()),
        _ => {}
    }
    let words: Vec<OsString> = std::env::args_os().collect();
    match Arguments::try_parse_from(&words) {
        Ok(arguments) => execute(arguments, timeline),
        Err(error) => usage::refuse(&error, &words),
    }
}

/// For the processes that stay: they return only when a user has called them.
fn stay<E: std::fmt::Display>(result: Result<(), E>) -> ExitCode {
    if let Err(error) = result {
        eprintln!("error: {error}");
    }
    ExitCode::from(FAILURE)
}

fn execute(arguments: Arguments, timeline: Timeline) -> ExitCode {
    let Globals { root, log, log_format, debug, systemd_cgroup, kernel, rootless: _, criu: _ } =
        arguments.globals;
    let failure = if matches!(arguments.command, Command::Exec(_)) { EXEC_FAILURE } else { FAILURE };
    let log = match Log::open(log.as_deref(), log_format, debug) {
        Ok(log) => log,
        Err(error) => return stay(Err(error)),
    };
    let context = Context { root, log, systemd_cgroup, kernel, timeline };
    match dispatch(&context, arguments.command) {
        Ok(code) => {
            context.log.flush();
            code
        }
        Err(error) => {
            context.log.error(&error.to_string());
            ExitCode::from(failure)
        }
    }
}

fn dispatch(context: &Context, command: Command) -> Result<ExitCode, Error> {
    match command {
        Command::Create(arguments) => lifecycle::create(context, arguments),
        Command::Start(arguments) => lifecycle::start(context, &arguments),
        Command::Run(arguments) => return run::run(context, arguments),
        Command::State(arguments) => inspect::state(context, &arguments),
        Command::Kill(arguments) => lifecycle::kill(context, &arguments),
        Command::Delete(arguments) => lifecycle::delete(context, &arguments),
        Command::Exec(arguments) => return exec::exec(context, *arguments),
        Command::List(arguments) => inspect::list(context, &arguments),
        Command::Ps(arguments) => inspect::ps(context, &arguments),
        Command::Stats(arguments) => stats::stats(context, &arguments),
        Command::Pause(arguments) => lifecycle::pause(context, &arguments),
        Command::Resume(arguments) => lifecycle::resume(context, &arguments),
        Command::Update(arguments) => update::update(context, &arguments),
        Command::Features => inspect::features(),
        Command::Spec(arguments) => inspect::spec(&arguments),
        Command::Template(command) => template::run(context, command),
        Command::Check(arguments) => return check::check(context, &arguments),
        Command::Compare(arguments) => compare::compare(context, arguments),
        Command::Do(arguments) => return local::run(context, arguments),
    }
    .map(|()| ExitCode::SUCCESS)
}

/// Prints to standard output. A reader that has gone is no failure of the command.
fn print(text: &str) {
    use std::io::Write;
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn pretty(value: &(impl serde::Serialize + ?Sized)) -> Result<String, Error> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::system("cannot encode JSON")(std::io::Error::from(error)))?;
    Ok(text + "\n")
}

/// Refuses descriptors that would have to be passed on to the guest, where they mean nothing.
fn refuse_descriptors(count: u32) -> Result<(), Error> {
    match count {
        0 => Ok(()),
        _ => Err(Error::Usage(
            "--preserve-fds: file descriptors of the host cannot be passed into a virtual machine".into(),
        )),
    }
}

/// A command with its arguments, as the user typed them.
fn strings(words: Vec<OsString>) -> Result<Vec<String>, Error> {
    words
        .into_iter()
        .map(|word| word.into_string().map_err(|word| Error::Usage(format!("{word:?} is not valid UTF-8"))))
        .collect()
}

#[cfg(test)]
mod tests;
