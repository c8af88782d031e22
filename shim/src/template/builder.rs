//! Making a template: boot a machine until its agent is up, capture it, and see whether one goes on from there.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rvm_protocol::{AGENT_PATH, AgentError, FromAgent, REHEARSAL_ARGUMENT, REHEARSAL_ID, Reply, Request};
use rvm_vmm::BootSource;
use serde::{Deserialize, Serialize};

use super::store::Lock;
use super::{Key, Record, Store, TemplateError, trial};
use crate::container::shape::Shape;
use crate::control::{ControlError, Packet, receive, send};
use crate::install::Installation;
use crate::logging::{Log, LogFormat};
use crate::monitor::MonitorError;
use crate::monitor::agent::{Agent, GREETING};
use crate::monitor::boot::{self, Booting, Built};
use crate::reexec::{self, Start, Started};
use crate::timeline::Timeline;

/// The hidden subcommand of the process that makes a template while nobody waits.
pub const SUBCOMMAND: &str = "make-template";

/// How long a guest may take to come up, which has all the time that others leave it.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long a guest that is up is left alone, so that it is idle when it is captured: by then it has reported all that is
/// free, which its kernel does within a second, so that not each of its clones has to.
const REST: Duration = Duration::from_secs(2);
/// Larger guests get no template by themselves: what their kernel notes of each page takes hundreds of MiB of it.
const MOST_MEMORY: u64 = 16 << 30;

/// Makes the template for a shape, unless there is one by now.
pub fn make(
    store: &Store,
    lock: &Lock,
    installation: Installation,
    shape: Shape,
) -> Result<Key, TemplateError> {
    let Installation { kernel, agent: program } = installation;
    // Before they are read: what is made of files that are changed meanwhile, nobody finds.
    let (key, boot_key) = keys(&kernel, &program, shape)?;
    let is_boot_known = store.has_boot(boot_key);
    if is_boot_known && store.find(key).is_ok_and(|found| found.is_some()) {
        return Ok(key);
    }
    let unfinished = store.begin(lock)?;
    // No guest that is captured is to know of any file.
    let root = unfinished.path().join("root");
    fs::create_dir(&root).map_err(TemplateError::system(format!("cannot make {}", root.display())))?;

    let files = boot::files(&kernel, &program)?;
    // Its own boot shows what others could share, if that is not known.
    let source = if is_boot_known { BootSource::Own(files) } else { BootSource::Recorded(files) };
    let machine =
        boot::make(shape, source, boot::SLOTS, &mut Timeline::default()).map_err(MonitorError::from)?;
    let built = Built::booting(machine, None, Vec::new())?;
    // As long as there is a connection, the agent waits.
    let (booting, mut agent) = come_up(built, &root)?;
    // A guest that is captured has nothing under way.
    // What it says is of no interest.
    let _ = await_answer(&booting, &mut agent, GREETING)?;
    rehearse(&booting, &mut agent, &root)?;
    thread::sleep(REST);
    let recorded = booting.machine.recorded_boot()?;
    let state = booting.machine.capture(&unfinished.memory)?;
    drop(booting);

    let found = unfinished.memory.metadata().map_err(TemplateError::system("cannot look at its memory"))?;
    let mut record = Record::new(&state, &found);
    unfinished.write(&record)?;
    record.soon = trial::run(unfinished.open()?, shape, &root)?;
    unfinished.write(&record)?;
    fs::remove_dir_all(&root).map_err(TemplateError::system(format!("cannot remove {}", root.display())))?;
    unfinished.finish(key)?;
    if !is_boot_known {
        store.keep_boot(lock, boot_key, recorded.as_ref())?;
    }
    Ok(key)
}

/// The names of a shape's template, and of what machines of all sizes share that boot.
fn keys(kernel: &File, agent: &File, shape: Shape) -> Result<(Key, Key), TemplateError> {
    Key::of(kernel, agent, shape, boot::SLOTS)
        .and_then(|key| Ok((key, Key::of_boot(kernel, agent, shape)?)))
        .map_err(TemplateError::system("cannot look at kernel and agent"))
}

/// Starts a machine, and waits until its agent says that it is ready.
pub(super) fn come_up(built: Built, root: &Path) -> Result<(Booting, Agent), TemplateError> {
    let booting = built.start(root, &mut Timeline::default())?;
    let mut agent = Agent::new(booting.machine.clock(), booting.template.is_some());
    await_message(&booting, &mut agent, |message| matches!(message, FromAgent::Ready { .. }).then_some(()))?;
    Ok((booting, agent))
}

/// Has a guest start a container that nobody asked for. What its kernel does for the first one only, it has done then for all
/// that go on from its state.
fn rehearse(booting: &Booting, agent: &mut Agent, root: &Path) -> Result<(), TemplateError> {
    let start = trial::container(REHEARSAL_ID, root, &[AGENT_PATH, REHEARSAL_ARGUMENT])
        .map_err(TemplateError::container)?;
    let number = agent.request(Request::Rehearse(Box::new(start))).map_err(TemplateError::guest)?;
    let answer = await_answer(booting, agent, number).map_err(TemplateError::with_container)?;
    answer.map(drop).map_err(TemplateError::container)
}

/// Waits for the answer to a request.
fn await_answer(
    booting: &Booting,
    agent: &mut Agent,
    number: u64,
) -> Result<Result<Reply, AgentError>, TemplateError> {
    await_message(booting, agent, |message| match message {
        FromAgent::Reply { request, result } if request == number => Some(result),
        _ => None,
    })
}

/// Waits for the message that is looked for.
pub(super) fn await_message<T>(
    booting: &Booting,
    agent: &mut Agent,
    look: impl Fn(FromAgent) -> Option<T>,
) -> Result<T, TemplateError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(stream) = booting.control.accept().filter(|_| !agent.is_connected()) {
            agent.connect(stream).map_err(TemplateError::system("cannot talk to the guest"))?;
        }
        let messages = agent.flush().and_then(|()| agent.receive()).map_err(TemplateError::guest)?;
        if let Some(found) = messages.into_iter().find_map(&look) {
            return Ok(found);
        }
        wait(booting, agent, deadline)?;
    }
}

/// Waits for something of the guest.
fn wait(booting: &Booting, agent: &Agent, deadline: Instant) -> Result<(), TemplateError> {
    let input = |fd| PollFd::new(fd, PollFlags::POLLIN);
    let mut fds = vec![input(booting.machine.exit_event()), input(booting.control.as_fd())];
    fds.extend(agent.interest().map(|(fd, flags)| PollFd::new(fd, flags)));
    let left = deadline.saturating_duration_since(Instant::now());
    let polled = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
    let count = polled.map_err(TemplateError::system("cannot wait for the guest"))?;
    if count == 0 || fds[0].any().unwrap_or(true) {
        return Err(TemplateError::Guest(boot::post_mortem(&booting.machine)));
    }
    Ok(())
}

/// What a container's start leaves to be done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WarmUp {
    /// The folder of all templates.
    folder: PathBuf,
    /// The guest's kernel.
    kernel: PathBuf,
    /// The guest's agent.
    agent: PathBuf,
}

/// What the process that makes a template is told. Its descriptors are the guest's kernel and agent, and the log if there is
/// one.
#[derive(Debug, Serialize, Deserialize)]
struct Assignment {
    folder: PathBuf,
    shape: Shape,
    log_format: LogFormat,
}

impl WarmUp {
    /// To be done for containers that begin with these files.
    pub fn new(folder: PathBuf, installation: &Installation) -> io::Result<WarmUp> {
        let path = |file: &File| fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        Ok(WarmUp { folder, kernel: path(&installation.kernel)?, agent: path(&installation.agent)? })
    }

    /// Starts a process that makes the template for a shape, if there is none and nobody is at it. Nothing waits for it.
    pub fn begin(&self, shape: Shape, log: &Log) -> Result<(), TemplateError> {
        let open = |path: &Path| {
            File::open(path).map_err(TemplateError::system(format!("cannot open {}", path.display())))
        };
        let installation = Installation { kernel: open(&self.kernel)?, agent: open(&self.agent)? };
        let Installation { kernel, agent } = &installation;
        let (key, boot_key) = keys(kernel, agent, shape)?;
        let store = Store::new(&self.folder);
        if shape.memory > MOST_MEMORY
            || (store.has(key) && store.has_boot(boot_key))
            || store.has_failed_lately()
            || store.lock(false)?.is_none()
        {
            return Ok(());
        }
        let assignment = Assignment { folder: self.folder.clone(), shape, log_format: log.format() };
        let mut descriptors = vec![kernel.as_fd(), agent.as_fd()];
        descriptors.extend(log.file().map(AsFd::as_fd));
        spawn(&assignment, &descriptors)
    }
}

fn spawn(assignment: &Assignment, descriptors: &[BorrowedFd<'_>]) -> Result<(), TemplateError> {
    // The standard streams are the engine's, which waits until they are closed.
    let null = File::options().read(true).write(true).open("/dev/null");
    let started = null.and_then(|null| {
        let terminal = Some(null.as_fd());
        Start { title: "rvm template", subcommand: SUBCOMMAND, terminal, cgroup: None }.spawn()
    });
    let Started { socket, .. } =
        started.map_err(TemplateError::system("cannot start the process that makes a template"))?;
    send(&socket, assignment, descriptors).map_err(|error| {
        TemplateError::Guest(format!("the process that makes it cannot be talked to: {error}"))
    })
}

/// Runs as that process.
pub fn run() -> Result<(), ControlError> {
    let socket = reexec::inherited_socket().map_err(|_| ControlError::Unexpected)?;
    let Packet { message, descriptors } = receive::<Assignment>(&socket)?.ok_or(ControlError::Closed)?;
    drop(socket);
    let mut descriptors = descriptors.into_iter();
    let mut next = || descriptors.next().ok_or(ControlError::Unexpected);
    let installation = Installation { kernel: next()?.into(), agent: next()?.into() };
    let log = Log::to_file(next().ok().map(File::from), message.log_format, false);
    step_back();
    let store = Store::new(&message.folder);
    let made = store.lock(false).and_then(|lock| match lock {
        Some(lock) => make(&store, &lock, installation, message.shape).map(drop),
        None => Ok(()),
    });
    if let Err(error) = made {
        store.note_failure();
        log.warning_now(&format!("no template was made, so containers of this shape boot: {error}"));
    }
    Ok(())
}

/// Lets all others have the processor and the memory first, and depends on nothing of whoever started this process.
fn step_back() {
    let _ = nix::unistd::setsid();
    let _ = std::env::set_current_dir("/");
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    // SAFETY: all fields are integers, for which zero is a value, and the only one for this policy.
    let parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is valid, and outlives the call.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
}
