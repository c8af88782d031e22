//! The file system device (virtio 1.2, section 5.11): FUSE requests over virtqueues, answered from a directory tree
//! of the host in this same process.
//!
//! - [`FileServer`] is the tree with the inodes and open files that the guest refers to. It answers one request
//!   at a time for each thread that serves a queue.
//! - [`FsDevice`] is the device: configuration, queues, and the thread behind them. What is quick is served on the threads
//!   of vCPUs, see [`requests`].
//!
//! # Who checks permissions
//!
//! The guest's kernel does: the virtiofs driver always mounts with `default_permissions`, so modes, owners, groups
//! (supplementary ones too), access control lists, sticky bits and capabilities are judged where the processes are
//! known. A hostile
//! guest kernel could lie about who asks, so a second check of the same users on the host would keep nothing out;
//! what it may reach is bounded by the tree alone. Requests are therefore served with the server's own rights, and
//! what they create belongs from its first moment to the user and group that the request names, see [`thread`].
//!
//! # What is cached
//!
//! `docker cp`, volumes and other containers change files under a running guest, and it has to see that. Names
//! and attributes are valid until the server hears of a change and gives the guest a notice, see [`watches`] and
//! [`notices`]. Where it would not hear of one they are valid for 50 ms ([`VALIDITY`]), no longer than it takes to start a
//! process with `docker exec`, yet enough for the dozens of look-ups of one `execve` or `#include` to cost one round trip
//! each. File contents stay in the guest's page cache across opens only if the file has not changed since the last
//! open, and are dropped when its attributes show a change. Writes go through at once (no write-back cache), so a
//! `sync` has only the host's cache to write out, see [`sync`].
//! File locks are the guest's own: they hold between its processes, not against processes of the host. Nor does
//! inotify in the guest hear of changes that the host makes.

mod attributes;
mod create;
mod directory;
mod extended;
mod files;
mod handles;
#[cfg(any(test, feature = "fuzzing"))]
pub mod hostile;
mod identity;
mod inodes;
mod message;
mod names;
mod notices;
mod pace;
mod pins;
mod proc;
mod requests;
mod server;
mod session;
mod sync;
mod system;
#[cfg(test)]
mod tests;
mod thread;
mod watches;
mod wire;
mod worker;
mod writers;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use event_manager::SubscriberId;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::requests::Requests;
use self::worker::Worker;
use super::device::Bell;
use super::{ActivateError, Activation, VirtioDevice};
use crate::event_loop::{EventLoop, EventLoopError};

pub use server::{FileServer, PreparedFileServer};
use watches::Listener;

/// Length of the tag in the configuration space.
const TAG_LEN: usize = 36;
/// The queue of requests that must not wait, which is FORGET.
const HIGH_PRIORITY_QUEUE: u16 = 0;
/// The queue of all other requests.
const REQUEST_QUEUE: u16 = 1;
/// The queue by which the driver lends memory for [notices].
const NOTICES_QUEUE: u16 = 2;
/// A request of 1 MiB takes 256 descriptors for its pages and a few for headers, and the driver shortens its
/// requests to what the queue can hold.
const QUEUE_SIZES: [u16; 3] = [128, 1024, 2];
const REQUEST_QUEUES: u32 = 1;
/// The feature of a device that gives notices. It is the project's own, as is the patch of the driver.
const FEATURE_NOTICES: u32 = 23;
/// The feature of a device that serves requests [at once](requests) when its driver rings. It is the project's own, too.
const FEATURE_AT_ONCE: u32 = 24;
/// The feature of a device that takes requests to read what was not opened, as it was looked at and has not changed.
const FEATURE_READ_UNOPENED: u32 = 22;
/// Where the driver rings in the configuration space.
const BELL: u64 = 64;

/// How long the guest may use what it was told without asking again, where the server would not hear of a change.
const VALIDITY: Duration = Duration::from_millis(50);

/// Why a directory tree cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag does not fit.
    #[error("the file system tag '{0}' is empty or longer than {TAG_LEN} bytes")]
    Tag(String),
    /// The monitor has no proc file system at this point.
    #[error("/proc/self/fd could not be opened, which a file server needs: {0}")]
    Proc(#[source] io::Error),
    /// The root of the tree cannot be opened.
    #[error("the directory {path:?} could not be opened to be served: {source}")]
    Root {
        /// The root that was asked for.
        path: PathBuf,
        /// What the operating system reported.
        source: io::Error,
    },
    /// The device's thread could not be made one that serves files as any user.
    #[error("the thread that serves files could not be prepared for it: {0}")]
    Thread(#[source] io::Error),
    /// The device's thread could not be started.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
}

/// The file system device.
#[derive(Debug)]
pub struct FsDevice {
    tag: [u8; TAG_LEN],
    server: Arc<FileServer>,
    events: EventLoop,
    _listening: EventLoop,
    worker: Option<SubscriberId>,
    requests: Option<Arc<Requests>>,
}

impl FsDevice {
    /// A device whose file system the guest mounts by this tag. It starts a thread, which serves files from the
    /// moment the driver is ready; the thread keeps the capabilities and securebits that this one has now.
    pub fn new(tag: &str, server: FileServer) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG_LEN || tag.contains('\0') {
            return Err(FsError::Tag(tag.to_owned()));
        }
        let mut padded = [0; TAG_LEN];
        padded[..tag.len()].copy_from_slice(tag.as_bytes());
        let (server, events) = (Arc::new(server), EventLoop::spawn("virtio-fs")?);
        worker::enter(&events, &server)?;
        let listening = EventLoop::spawn_confined("fs-notices")?;
        listening.handle().add(Box::new(Listener::new(server.clone())))?;
        Ok(Self { tag: padded, server, events, _listening: listening, worker: None, requests: None })
    }
}

impl VirtioDevice for FsDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << FEATURE_NOTICES
            | 1 << FEATURE_AT_ONCE
            | 1 << FEATURE_READ_UNOPENED
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let request_queues = REQUEST_QUEUES.to_le_bytes();
        let config = self.tag.iter().chain(&request_queues).copied();
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        data.iter_mut()
            .zip(config.skip(offset).chain(std::iter::repeat(0)))
            .for_each(|(to, from)| *to = from);
    }

    fn bell(&self, offset: u64) -> Option<Arc<dyn Bell>> {
        let requests = self.requests.as_ref().filter(|_| offset == BELL)?;
        Some(requests.clone())
    }

    fn serves_files_on_vcpus(&self) -> bool {
        true
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let at_once = activation.features & 1 << FEATURE_AT_ONCE != 0;
        let worker = Worker::new(activation, self.server.clone())?;
        let requests = worker.requests();
        self.worker = Some(self.events.handle().add(Box::new(worker))?);
        self.requests = Some(requests).filter(|_| at_once);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(requests) = self.requests.take() {
            requests.end_at_once();
        }
        if let Some(worker) = self.worker.take() {
            // It fails only when the loop has ended, and the worker with it.
            let _ = self.events.handle().remove(worker);
            self.server.notices.give_back();
            self.server.reset();
        }
    }
}
