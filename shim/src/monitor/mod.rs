//! The monitor: the one process of a container. It holds the machine, serves its files and streams, and is the
//! process id that the engine knows.
//!
//! Set-up happens in an order that each step needs of the one before: namespaces and mounts while the host's
//! files are still visible; what must be opened there (`/dev/kvm`, `/proc`); the change of the root; giving up
//! privileges; and only then threads, and with them the guest. From there on [`Service`](service::Service) waits
//! for whatever happens, and the process ends as the container's process did.

pub mod handshake;

pub(crate) mod agent;
pub(crate) mod boot;
mod clients;
mod commands;
mod confine;
mod disks;
mod events;
mod execution;
mod init;
mod initramfs;
mod network;
mod oom;
mod patience;
mod resolver;
mod service;
mod setup;
mod streams;
mod update;

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use rvm_protocol::{AgentError, ExitStatus};
use rvm_vmm::machine::{BootError, BootSource, Machine, MachineError};

use crate::cause::Cause;
use crate::container::{Folder, Step, folder};
use crate::control::{ControlError, Refusal, receive, send};
use crate::hooks::{self, HookError, HookKind};
use crate::logging::Log;
use crate::reexec;
use crate::rootfs::{self, Overlay, Rootfs, RootfsError};
use crate::signals::{self, Signals};
use crate::template::{Kept, KeptBoot, Key, Store, Template};
use crate::timeline::Phase;
use boot::Built;
use handshake::{FromMonitor, SETUP_DESCRIPTORS, Setup, ToMonitor};
use init::Init;
use resolver::Resolver;
use service::{Outcome, Service};

/// Exit status of a monitor whose machine failed.
const FAILED: i32 = 255;

/// Why a container could not be created or its machine not be run.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The process was not started by `create`.
    #[error("the monitor is started by 'rvm create', not by hand")]
    NotStartedByCreate,
    /// `create` has ended or said something unexpected.
    #[error("'rvm create' gave up: {0}")]
    Handshake(#[from] ControlError),
    /// The container's mounts.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// A hook.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The container's program.
    #[error(transparent)]
    Program(#[from] AgentError),
    /// The machine.
    #[error(transparent)]
    Machine(MachineError),
    /// A machine that goes on from a template. There are reasons for it that a boot would meet with, too.
    #[error(
        "the machine that was to go on from a template could not be started; the template was dropped, so that the \
         next start boots its machine: {0}"
    )]
    Template(#[source] Box<MonitorError>),
    /// The guest's kernel image.
    #[error("cannot boot {path}: {source}", path = path.display())]
    Kernel {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        source: BootError,
    },
    /// A disk.
    #[error(transparent)]
    Block(#[from] rvm_vmm::virtio::block::BlockError),
    /// The file server.
    #[error(transparent)]
    Files(#[from] rvm_vmm::virtio::fs::FsError),
    /// The vsock.
    #[error(transparent)]
    Vsock(#[from] rvm_vmm::virtio::vsock::VsockError),
    /// The devices' thread.
    #[error(transparent)]
    EventLoop(#[from] rvm_vmm::event_loop::EventLoopError),
    /// The spec that `create` sent.
    #[error("the spec cannot be decoded: {0}")]
    Spec(#[from] serde_json::Error),
    /// An operation of the system.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// What the operating system reported.
        source: Cause,
    },
}

impl From<MachineError> for MonitorError {
    fn from(error: MachineError) -> Self {
        MonitorError::Machine(error)
    }
}

impl MonitorError {
    /// An error of the machine's making, with the image's name where the image is to blame.
    fn of_boot(kernel: &Path, error: MachineError) -> Self {
        match error {
            MachineError::Boot(source) => MonitorError::Kernel { path: kernel.to_owned(), source },
            other => MonitorError::Machine(other),
        }
    }

    /// What `create` is told.
    fn into_refusal(self) -> Refusal {
        match self {
            MonitorError::Program(error) => error.into(),
            other => other.to_string().into(),
        }
    }

    /// Makes the closure that `map_err` wants.
    fn system<E: Into<Cause>>(what: &str) -> impl FnOnce(E) -> MonitorError {
        let what = what.to_owned();
        move |error| MonitorError::System { what, source: error.into() }
    }
}

/// The descriptors of [`ToMonitor::Setup`].
struct Inherited {
    folder: Folder,
    listener: OwnedFd,
    kernel: File,
    agent: File,
    log: Option<File>,
}

/// Runs the monitor. Returns only if it was not started by `create`.
pub fn run() -> Result<(), MonitorError> {
    let socket = reexec::inherited_socket().map_err(|_| MonitorError::NotStartedByCreate)?;
    let (setup, inherited) = receive_setup(&socket)?;
    let mut service = match prepare(&socket, setup, inherited) {
        Ok(service) => service,
        Err(error) => {
            let _ = send(&socket, &FromMonitor::Failed(error.into_refusal()), &[]);
            signals::end(FAILED);
        }
    };
    drop(socket);
    // Each of these ends the process at once; nothing of the service is dropped.
    match service.run() {
        Outcome::Ended(status) => signals::exit_as(status),
        Outcome::NotStarted(code) => signals::end(code),
        Outcome::Failed(words) => {
            service.log_failure(&words);
            signals::exit_as(ExitStatus::Code(FAILED as u8));
        }
    }
}

fn receive_setup(socket: &OwnedFd) -> Result<(Box<Setup>, Inherited), MonitorError> {
    let packet = receive::<ToMonitor>(socket)?.ok_or(ControlError::Closed)?;
    let ToMonitor::Setup(setup) = packet.message else { return Err(ControlError::Unexpected.into()) };
    if packet.descriptors.len() < SETUP_DESCRIPTORS {
        return Err(ControlError::Unexpected.into());
    }
    let mut descriptors = packet.descriptors.into_iter();
    let mut next = || descriptors.next().ok_or(ControlError::Unexpected);
    let inherited = Inherited {
        folder: Folder::from_handle(next()?.into()),
        listener: next()?,
        kernel: next()?.into(),
        agent: next()?.into(),
        log: next().ok().map(File::from),
    };
    Ok((setup, inherited))
}

/// The template for a machine, if there is one and it is fit to be used.
fn find_template(setup: &Setup, kernel: &File, agent: &File, log: &Log) -> Option<Template> {
    let store = Store::new(setup.templates.as_deref().filter(|_| setup.may_go_on)?);
    let key = Key::of(kernel, agent, setup.shape, boot::SLOTS).ok()?;
    store.find(key).unwrap_or_else(|error| {
        // Removing may fail, too. The machine boots all the same.
        let _ = store.remove(key);
        log.warning_now(&format!("the template {key} is dropped, and the machine boots: {error}"));
        None
    })
}

/// What a machine that boots can begin with, if it is kept and fit to be used.
fn find_boot(setup: &Setup, kernel: &File, agent: &File, log: &Log) -> Option<KeptBoot> {
    let store = Store::new(setup.templates.as_deref()?);
    let key = Key::of_boot(kernel, agent, setup.shape).ok()?;
    store.boot(key).unwrap_or_else(|error| {
        // Removing may fail, too. The machine boots without.
        let _ = store.remove_boot(key);
        warn_of_boot(log, &error);
        None
    })
}

fn warn_of_boot(log: &Log, error: &dyn std::error::Error) {
    log.warning_now(&format!("what is kept for machines that boot is dropped: {error}"));
}

/// The machine that goes on from a template; none where it turns out that none can.
fn restore(setup: &mut Setup, template: Template, log: &Log) -> Option<(Machine, Template)> {
    match boot::restore(setup.shape, &template, &mut setup.timeline) {
        Ok(machine) => Some((machine, template)),
        Err(error) => {
            template.discard();
            log.warning_now(&format!("the machine's template is dropped, and the machine boots: {error}"));
            None
        }
    }
}

/// The machine that begins with what is kept; none where it turns out that none can.
fn share(setup: &mut Setup, boot: KeptBoot, slots: u8, log: &Log) -> Option<(Machine, Kept)> {
    let KeptBoot { boot, kept } = boot;
    match boot::make(setup.shape, BootSource::Shared(boot), slots, &mut setup.timeline) {
        Ok(machine) => Some((machine, kept)),
        Err(MachineError::Boot(error @ BootError::Shared(_))) => {
            kept.discard();
            warn_of_boot(log, &error);
            None
        }
        // Nothing of what is kept is to blame; without, there will be the same error.
        Err(_) => None,
    }
}

/// The machine that boots for itself.
fn boot(setup: &mut Setup, kernel: &File, agent: &File, slots: u8) -> Result<Machine, MonitorError> {
    let source = BootSource::Own(boot::files(kernel, agent)?);
    boot::make(setup.shape, source, slots, &mut setup.timeline).map_err(|error| {
        // `create` opened the image; its name is for the error message alone.
        let name = std::fs::read_link(format!("/proc/self/fd/{}", kernel.as_raw_fd())).unwrap_or_default();
        MonitorError::of_boot(&name, error)
    })
}

/// Everything up to the moment when the container counts as created.
fn prepare(socket: &OwnedFd, setup: Box<Setup>, inherited: Inherited) -> Result<Service, MonitorError> {
    let mut setup = setup;
    let Inherited { folder, listener, kernel, agent, log } = inherited;
    setup.timeline.mark(Phase::MonitorUp);
    setup::detach(setup.terminal.is_some())
        .map_err(MonitorError::system("cannot detach from 'rvm create'"))?;
    // Without a file the log would be the container's standard error.
    let debug = setup.debug && log.is_some();
    let log = Log::to_file(log, setup.log_format, debug);
    let signals = Signals::block().map_err(MonitorError::system("cannot wait for signals"))?;
    let spec: Spec = serde_json::from_str(&setup.spec)?;

    let disks = disks::open_all(&setup.disks)?;
    // While the host's files can be seen.
    let template = find_template(&setup, &kernel, &agent, &log);
    let kept = if template.is_some() { None } else { find_boot(&setup, &kernel, &agent, &log) };
    setup::enter_namespaces(&spec)?;
    let resolver = Resolver::open()
        .inspect_err(|error| {
            log.warning_now(&format!("the container's names will not be looked up: {error}"))
        })
        .ok();
    let _overlay = setup.lower.as_deref().map(|lower| Overlay::mount(lower, &setup.rootfs)).transpose()?;
    let rootfs = Rootfs::prepare_spec(&setup.rootfs, &spec)?;
    setup.host_mounts = rootfs::host_mounts(&setup.rootfs)
        .map_err(MonitorError::system("cannot read the table of mounts"))?;
    setup.timeline.mark(Phase::RootfsReady);
    let built = match template.and_then(|template| restore(&mut setup, template, &log)) {
        Some((machine, template)) => Built::restored(machine, template)?,
        None => {
            let slots = boot::disk_slots(disks.len()).end;
            match kept.and_then(|kept| share(&mut setup, kept, slots, &log)) {
                Some((machine, kept)) => Built::booting(machine, Some(kept), disks)?,
                None => Built::booting(boot(&mut setup, &kernel, &agent, slots)?, None, disks)?,
            }
        }
    };
    let stdio = setup::Stdio::take().map_err(MonitorError::system("cannot take the standard streams"))?;

    send(socket, &FromMonitor::Prepared, &[])?;
    match receive::<ToMonitor>(socket)?.ok_or(ControlError::Closed)?.message {
        ToMonitor::Continue => {}
        ToMonitor::Setup(_) => return Err(ControlError::Unexpected.into()),
    }
    if let Some(hooks) = spec.hooks().as_ref().and_then(|hooks| hooks.create_container().as_deref()) {
        hooks::run(HookKind::CreateContainer, hooks, &setup.hook_state)?;
    }
    // After the hooks, which may have put it there.
    rootfs.check_program(&spec)?;
    rootfs.pivot()?;
    std::env::set_current_dir(Path::new("/")).map_err(MonitorError::system("cannot enter the new root"))?;
    confine::confine().map_err(MonitorError::system("cannot give up privileges"))?;
    let step = folder
        .open_byte(folder::STEP, Step::Created.to_byte())
        .map_err(MonitorError::system("cannot write the container's state (is there space?)"))?;
    let tie = setup
        .tied
        .then(|| socket.try_clone())
        .transpose()
        .map_err(MonitorError::system("cannot keep the conversation with 'rvm create'"))?;
    let init = Init::new(stdio, setup.terminal.is_some())
        .map_err(MonitorError::system("cannot make an event descriptor"))?;
    // Nothing may fail from here on: a machine that runs is not dropped (see `Service::run`).
    let booting = built.start(Path::new("/"), &mut setup.timeline)?;
    let mut service = Service::new(setup, folder, step, listener, signals, init, booting);
    service.tie_to(tie);
    service.look_names_up_with(resolver);
    service.log_to(log);
    service.expect_start_within(patience::of_start(&spec));
    // The threads that serve files run by now and keep theirs; this one deals with what is open already.
    rvm_vmm::confine::drop_capabilities();
    send(socket, &FromMonitor::Ready, &[])?;
    Ok(service)
}
