//! Launching a process: the fork, and the steps of the child up to `execve`.
//!
//! The order of the child's steps is runc's, where it matters to anyone: limits while there is the privilege
//! to raise them; a filter before the capability to install it goes, unless `no_new_privs` makes that
//! capability needless, then as late as possible; the program looked up as the user, by the container's
//! `PATH`.

use std::convert::Infallible;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sched::{self, CloneFlags};
use nix::sys::prctl;
use nix::sys::signal::{self, SigHandler, SigSet, Signal};
use nix::sys::stat::SFlag;
use nix::unistd::{self, Gid, Pid, Uid};
use oci_spec::runtime::Process;
use rvm_protocol::SeccompProgram;

use super::capabilities::CapabilitySets;
use super::channel::{self, AgentEnd, ChildEnd};
use super::environment::{Environment, c_strings};
use super::terminal::Terminal;
use super::{credentials, lookup, rlimits, scheduling, seccomp};
use crate::container::cgroup::Cgroup;
use crate::container::tree::{self, Tree};
use crate::container::{Container, hooks, namespaces, rootfs};
use crate::error::{Context, Result, container_not_running, other};
use crate::sys::process::{
    Child, close_all_but, close_on_exec_from, fork_into, open_process, set_terminal_size,
};

/// Set in a child, for the panic hook: a child must not take the guest down.
pub static IS_CHILD: AtomicBool = AtomicBool::new(false);

/// Exit code of a child that never came to its program. The agent reports the reason, not this.
const SETUP_FAILED: i32 = 70;

/// Where a process is to live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It is the container's first process, and makes the container around itself.
    New,
    /// It joins the running container.
    Existing,
}

/// The child's ends of its standard streams.
pub enum ChildStreams {
    /// Pipes, or `/dev/null`.
    Files {
        /// Standard input.
        stdin: OwnedFd,
        /// Standard output.
        stdout: OwnedFd,
        /// Standard error.
        stderr: OwnedFd,
    },
    /// A terminal, which the child is to open.
    Terminal {
        /// Height in characters, or zero.
        rows: u16,
        /// Width in characters, or zero.
        columns: u16,
    },
}

/// A process to be launched.
pub struct Launch<'a> {
    /// Its container.
    pub container: &'a Container,
    /// Its place in it.
    pub place: Place,
    /// Its description.
    pub process: &'a Process,
    /// Its filter.
    pub seccomp: Option<&'a SeccompProgram>,
    /// Its streams.
    pub streams: ChildStreams,
}

/// A child that is on its way to its program.
pub struct Launched {
    /// The child.
    pub child: Child,
    /// Where it tells how it fares.
    pub channel: AgentEnd,
}

/// Forks a child that sets itself up and executes the program.
pub fn launch(plan: Launch<'_>) -> Result<Launched> {
    give_pipes_to_user(&plan)?;
    let (agent_end, child_end) = channel::pair()?;
    match fork(&plan)? {
        None => {
            drop(agent_end);
            be_child(plan, &child_end)
        }
        Some(child) => {
            drop(child_end);
            // A child that is never told to go on ends when the channel is dropped.
            prepare_from_outside(&plan, &child)?;
            agent_end.go()?;
            Ok(Launched { child, channel: agent_end })
        }
    }
}

/// A user namespace does not know the agent's root, so that nobody in it may change the owner of its pipes, nor open
/// them again as `/dev/stdout`. Without one, the child does it.
fn give_pipes_to_user(plan: &Launch<'_>) -> Result<()> {
    let (Some((users, groups)), ChildStreams::Files { stdin, stdout, stderr }) =
        (plan.container.id_maps(), &plan.streams)
    else {
        return Ok(());
    };
    let user = namespaces::outside(users, plan.process.user().uid()).map(Uid::from_raw);
    let group = namespaces::outside(groups, plan.process.user().gid()).map(Gid::from_raw);
    for stream in [stdin, stdout, stderr] {
        let what = || "giving a stream to the process's user";
        if tree::kind(stream).context(what)? == SFlag::S_IFIFO {
            unistd::fchown(stream, user, group).context(what)?;
        }
    }
    Ok(())
}

fn fork(plan: &Launch<'_>) -> Result<Option<Child>> {
    let what = || "forking the process";
    match plan.place {
        Place::New => {
            let cgroup = plan.container.cgroup.open()?;
            let namespaces = namespaces::for_fork(plan.container.id_maps().is_some());
            // SAFETY: the agent has a single thread.
            let fork = || unsafe { fork_into(cgroup.as_fd(), namespaces) }.context(what);
            match plan.container.clocks() {
                Some(linux) => namespaces::with_clocks(linux, fork),
                None => fork(),
            }
        }
        Place::Existing => fork_into_namespaces(plan.container),
    }
}

/// A pid namespace is joined by children only: the agent joins for its children, forks, and returns. That
/// spares the second fork of a child that joins by itself. A time namespace it joins itself, for that moment: from within
/// a user namespace it could not be joined.
fn fork_into_namespaces(container: &Container) -> Result<Option<Child>> {
    let init = container.init.as_ref().ok_or_else(container_not_running)?;
    let own = open_process(unistd::getpid()).context(|| "opening the agent's namespaces")?;
    let mut namespaces = CloneFlags::CLONE_NEWPID;
    namespaces.set(namespaces::TIME, container.clocks().is_some());
    sched::setns(&init.descriptor, namespaces).map_err(|_| container_not_running())?;
    let forked = fork_beside(&container.cgroup, init.pid);
    if !matches!(forked, Ok(None)) {
        sched::setns(&own, namespaces).context(|| "returning to the agent's namespaces")?;
    }
    forked
}

/// Forks into the container's cgroup. Where the container has delegated it to cgroups below (as systemd
/// does), it takes no processes any more: then into that of the container's first process.
fn fork_beside(cgroup: &Cgroup, init: Pid) -> Result<Option<Child>> {
    let fork = |cgroup: OwnedFd| {
        // SAFETY: the agent has a single thread.
        unsafe { fork_into(cgroup.as_fd(), CloneFlags::empty()) }
    };
    match fork(cgroup.open()?) {
        Err(Errno::EBUSY | Errno::EOPNOTSUPP) => fork(Cgroup::open_of(init)?),
        forked => forked,
    }
    .context(|| "forking the process")
}

/// What only a process outside of the child's namespaces can do.
fn prepare_from_outside(plan: &Launch<'_>, child: &Child) -> Result<()> {
    // Without a value of its own a process would inherit the agent's immunity.
    let adjustment = plan.process.oom_score_adj().unwrap_or(0);
    fs::write(format!("/proc/{}/oom_score_adj", child.pid), adjustment.to_string())
        .context(|| format!("setting oom_score_adj to {adjustment}"))?;
    rlimits::apply_default(child.pid, plan.process.rlimits().as_deref().unwrap_or_default())?;
    scheduling::apply(child.pid, plan.process, plan.place == Place::Existing)?;
    if let Some((users, groups)) = plan.container.id_maps() {
        if plan.place == Place::New {
            namespaces::write_id_maps(child.pid, users, groups)?;
        }
        // Inside its user namespace it has not the privilege to raise them.
        rlimits::apply(child.pid, plan.process.rlimits().as_deref().unwrap_or_default())?;
    }
    Ok(())
}

fn be_child(plan: Launch<'_>, channel: &ChildEnd) -> ! {
    IS_CHILD.store(true, Ordering::Relaxed);
    let Err(error) = set_up_and_execute(plan, channel);
    channel.send_error(&error);
    // SAFETY: ends the process at once. Nothing of the agent's state, of which this is a copy, is dropped.
    unsafe { libc::_exit(SETUP_FAILED) }
}

fn set_up_and_execute(plan: Launch<'_>, channel: &ChildEnd) -> Result<Infallible> {
    close_agents_descriptors(&plan, channel)?;
    restore_signals()?;
    // Until execve, the process is the agent's image within reach of the container's processes: none of them
    // may look into it, nor open its program through /proc.
    prctl::set_dumpable(false).context(|| "hiding the process")?;
    channel.wait()?;
    unistd::setsid().context(|| "making a session")?;

    let Launch { container, place, process, seccomp: filter, streams } = plan;
    let wants_terminal = matches!(streams, ChildStreams::Terminal { .. });
    let terminal = enter(container, place, wants_terminal)?;
    take_streams(streams, terminal, channel)?;
    close_on_exec_from(3).context(|| "marking descriptors to be closed")?;

    if container.id_maps().is_none() {
        let own = Pid::from_raw(0);
        rlimits::apply(own, process.rlimits().as_deref().unwrap_or_default())?;
    }
    // Before the filter, which may forbid the calls that this takes.
    let directory = change_directory(process)?;
    let no_new_privileges = process.no_new_privileges().unwrap_or(false);
    if no_new_privileges {
        prctl::set_no_new_privs().context(|| "setting no_new_privs")?;
    } else {
        install(filter)?;
    }
    set_personality(container)?;
    assume_identity(process, directory)?;

    let mut environment = Environment::of(process.env().as_deref().unwrap_or_default());
    environment.set_home(process.user().uid());
    let arguments = process.args().as_deref().unwrap_or_default();
    let name = arguments.first().ok_or_else(|| other("the process has no arguments"))?;
    let program = lookup::find(name, &environment)?;
    if place == Place::New {
        hooks::run_start_container(container, &environment)?;
    }
    if no_new_privileges {
        install(filter)?;
    }
    execute(&program, arguments, &environment)
}

/// Lets go of the agent's connections, and of the streams of other processes: they must close when the agent
/// closes them, and be out of reach while the process makes its way into the container.
fn close_agents_descriptors(plan: &Launch<'_>, channel: &ChildEnd) -> Result<()> {
    let mut keep = vec![channel.0.as_fd()];
    if let ChildStreams::Files { stdin, stdout, stderr } = &plan.streams {
        keep.extend([stdin, stdout, stderr].map(OwnedFd::as_fd));
    }
    keep.extend(plan.container.init.as_ref().map(|init| init.descriptor.as_fd()));
    keep.extend(plan.container.sysfs.as_ref().map(OwnedFd::as_fd));
    // SAFETY: of the agent's state, of which this process has a copy, nothing but the above is used or dropped: the
    // process ends by execve or _exit.
    unsafe { close_all_but(&keep) }.context(|| "closing the agent's descriptors")
}

/// The agent blocks and ignores signals, which `execve` would pass on.
fn restore_signals() -> Result<()> {
    SigSet::empty().thread_set_mask().context(|| "unblocking signals")?;
    // SAFETY: the default disposition runs no code of this process.
    unsafe { signal::signal(Signal::SIGPIPE, SigHandler::SigDfl) }
        .map(drop)
        .context(|| "restoring the disposition of SIGPIPE")
}

fn enter(container: &Container, place: Place, wants_terminal: bool) -> Result<Option<Terminal>> {
    let user_namespace = container.id_maps().is_some();
    match place {
        Place::New => {
            if user_namespace {
                namespaces::become_root()?;
            }
            rootfs::build(container, wants_terminal)
        }
        Place::Existing => {
            let init = container.init.as_ref().ok_or_else(container_not_running)?;
            namespaces::join(&init.descriptor, user_namespace)?;
            if user_namespace {
                namespaces::become_root()?;
            }
            let root = Tree::open(Path::new("/")).context(|| "opening the container's root")?;
            wants_terminal.then(|| Terminal::open(&root)).transpose()
        }
    }
}

fn take_streams(streams: ChildStreams, terminal: Option<Terminal>, channel: &ChildEnd) -> Result<()> {
    match (streams, terminal) {
        (ChildStreams::Terminal { rows, columns }, Some(Terminal { master, slave })) => {
            // Here and not by the agent, who may come to it only when the program has asked for the size already.
            if (rows, columns) != (0, 0) {
                set_terminal_size(&master, rows, columns).context(|| "setting the terminal's size")?;
            }
            channel.send_terminal(&master)?;
            Terminal::take(slave)
        }
        (ChildStreams::Terminal { .. }, None) => Err(other("the process has no terminal")),
        (ChildStreams::Files { stdin, stdout, stderr }, _) => {
            let what = || "setting the standard streams";
            unistd::dup2_stdin(stdin).context(what)?;
            unistd::dup2_stdout(stdout).context(what)?;
            unistd::dup2_stderr(stderr).context(what)
        }
    }
}

fn install(filter: Option<&SeccompProgram>) -> Result<()> {
    filter.map_or(Ok(()), seccomp::install)
}

fn set_personality(container: &Container) -> Result<()> {
    let personality = container.spec.linux().as_ref().and_then(|linux| linux.personality().as_ref());
    personality.map_or(Ok(()), scheduling::set_personality)
}

/// Whether the process is in its working directory yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Directory {
    /// It is.
    Entered,
    /// The directory is closed to root, as on a network file system; the process's user may be let in.
    Closed,
}

/// Enters the process's working directory, before the change of the user where that is permitted: it may be closed to the
/// user.
fn change_directory(process: &Process) -> Result<Directory> {
    let directory = process.cwd();
    match unistd::chdir(directory) {
        Err(Errno::EACCES | Errno::EPERM) => return Ok(Directory::Closed),
        entered => entered.context(|| format!("chdir to cwd ({directory:?}) set in config.json failed"))?,
    }
    // A descriptor of the agent's, named by way of /proc/self/fd, would lead out of the container.
    unistd::getcwd()
        .map(drop)
        .map_err(|_| other("current working directory is outside of container mount namespace root"))?;
    Ok(Directory::Entered)
}

/// Changes to the process's user, and into its working directory if it is not there yet.
fn assume_identity(process: &Process, directory: Directory) -> Result<()> {
    let sets = CapabilitySets::of(process.capabilities().as_ref())?;
    credentials::assume(process.user(), &sets, || match directory {
        Directory::Entered => Ok(()),
        Directory::Closed if change_directory(process)? == Directory::Entered => Ok(()),
        Directory::Closed => Err(Errno::EACCES)
            .context(|| format!("chdir to cwd ({:?}) set in config.json failed", process.cwd())),
    })
}

fn execute(program: &Path, arguments: &[String], environment: &Environment) -> Result<Infallible> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(program.as_os_str().as_bytes())
        .map_err(|_| other("the program's path holds a null byte"))?;
    let arguments = c_strings(arguments, "an argument")?;
    let environment = environment.to_c()?;
    unistd::execve(&path, &arguments, &environment).map_err(|errno| lookup::execution_error(program, errno))
}
