//! A container of no consequence, before the guest is captured.
//!
//! The first container has a guest's kernel do much that no later one does: it turns limits of memory on in its own code,
//! which makes copies of that code's pages, and fills its caches for namespaces, mounts and programs. What is done before the
//! state is captured, no guest has to do that goes on from there.
//!
//! Its cgroup stays, empty: with the last one goes what the kernel has turned on for the first.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rvm_protocol::{ExitStatus, REHEARSAL_ID, StartContainer};

use crate::container::{Container, RootSource, Settings};
use crate::error::{Context, Result, other};
use crate::process::channel::Message;
use crate::process::launch::{ChildStreams, Launched};
use crate::process::{Launch, Place, launch, open_null};
use crate::sys::process::reap;

/// Starts such a container, and returns when nothing is left of it but its cgroup.
pub(super) fn rehearse(start: &StartContainer, settings: &Settings) -> Result<()> {
    if start.id != REHEARSAL_ID {
        return Err(other(format!("a rehearsal has the ID {REHEARSAL_ID}, and not {}", start.id)));
    }
    let settings = Settings { source: RootSource::Directory("/".into()), ..settings.clone() };
    let container = Container::prepare(start, &settings)?;
    let ended = run(start, &container);
    container.finish();
    ended
}

fn run(start: &StartContainer, container: &Container) -> Result<()> {
    let streams = ChildStreams::Files { stdin: open_null()?, stdout: open_null()?, stderr: open_null()? };
    let (process, seccomp) = (container.process()?, start.seccomp.as_ref());
    let Launched { child, channel } =
        launch(Launch { container, place: Place::New, process, seccomp, streams })?;
    await_input(&channel.0)?;
    if let Some(Message::Failed(error)) = channel.receive() {
        // The agent reaps the child when it has ended.
        return Err(error);
    }
    await_input(&child.descriptor)?;
    match reap(child.pid) {
        Some(ExitStatus::Code(0)) => Ok(()),
        Some(status) => Err(other(format!("its process ended with {status:?}"))),
        None => Err(other("its process was not this one's child")),
    }
}

/// Waits without an end: the host gives up a guest that takes too long, and knows how much of a processor it has.
fn await_input(descriptor: impl AsFd) -> Result<()> {
    let mut descriptors = [PollFd::new(descriptor.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut descriptors, PollTimeout::NONE) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context(|| "waiting for its process"),
        }
    }
}
