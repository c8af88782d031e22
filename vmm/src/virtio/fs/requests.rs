//! A queue of requests, as the threads share it that serve them.
//!
//! A request is answered by the device's own thread, or *at once*: on the thread of the vCPU whose guest has sent it, while
//! that waits for its kick to end. It finds the answer when it goes on, and neither another thread nor an interrupt was
//! needed. That is for what is quick; all else is put off to the device's thread, so that no vCPU waits for a disk:
//! - requests that wait for one by their nature;
//! - reads of what is not in the host's page cache;
//! - files that are not this host's own;
//! - for a moment everything, after a request that took long all the same.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;

use super::inodes::lock;
use super::pace::{Pace, Patience};
use super::server::FileServer;
use super::thread;
use crate::GuestMemory;
use crate::virtio::device::Bell;
use crate::virtio::virtqueue::{KeptChain, QueueError, Virtqueue};
use crate::virtio::{Activation, Interrupt};

/// How many requests are served before something else gets its turn.
const BATCH: usize = 64;

/// A queue of requests of an active device.
pub(super) struct Requests {
    memory: GuestMemory,
    interrupt: Interrupt,
    server: Arc<FileServer>,
    state: Mutex<State>,
    /// Whether requests may be served at once. Held while one is.
    at_once: RwLock<bool>,
    rests_until: Mutex<Option<Instant>>,
}

struct State {
    queue: Virtqueue,
    /// Chains that were taken from the queue and are left to the device's thread: no more than the queue can hold.
    put_off: VecDeque<KeptChain>,
}

impl std::fmt::Debug for Requests {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Requests")
    }
}

impl Requests {
    /// The requests of this queue.
    pub(super) fn new(activation: &Activation, queue: Virtqueue, server: Arc<FileServer>) -> Requests {
        Requests {
            memory: activation.memory.clone(),
            interrupt: activation.interrupt.clone(),
            server,
            state: Mutex::new(State { queue, put_off: VecDeque::new() }),
            at_once: RwLock::new(true),
            rests_until: Mutex::default(),
        }
    }

    /// The event that tells the device's thread of requests.
    pub(super) fn event(&self) -> RawFd {
        lock(&self.state).queue.as_raw_fd()
    }

    /// Serves one batch of requests on the device's thread.
    pub(super) fn serve(&self) -> Result<(), QueueError> {
        lock(&self.state).queue.acknowledge_kick();
        for _ in 0..BATCH {
            let Some(chain) = self.take_any()? else { return Ok(()) };
            let head = chain.head_index();
            let written = self.server.serve(&self.memory, chain, Pace::Any).unwrap_or(0);
            let mut state = lock(&self.state);
            state.queue.push_used(&self.memory, head, written)?;
            // Somebody waits for just this one, and the next may take long.
            state.queue.notify(&self.memory, &self.interrupt)?;
        }
        lock(&self.state).queue.kick_self();
        Ok(())
    }

    /// Serves what can be served at once, on the thread of a vCPU. The driver looks for the answers by itself.
    fn serve_at_once(&self) -> Result<(), QueueError> {
        for _ in 0..BATCH {
            let mut state = lock(&self.state);
            if self.is_resting() || state.put_off.len() >= usize::from(state.queue.size()) {
                break;
            }
            let Some(chain) = state.take(&self.memory)? else { return Ok(()) };
            drop(state);
            let head = chain.head_index();
            let begin = Instant::now();
            let written = self.server.serve(&self.memory, chain.clone(), Pace::AtOnce);
            let Patience { long, rest } = self.server.patience;
            if begin.elapsed() > long {
                *lock(&self.rests_until) = Some(Instant::now() + rest);
            }
            let mut state = lock(&self.state);
            match written {
                Some(written) => state.queue.push_used_unannounced(&self.memory, head, written)?,
                None => {
                    state.put_off.push_back(chain);
                    state.queue.kick_self();
                }
            }
        }
        lock(&self.state).queue.kick_self();
        Ok(())
    }

    /// A request for the device's thread.
    fn take_any(&self) -> Result<Option<KeptChain>, QueueError> {
        let mut state = lock(&self.state);
        match state.put_off.pop_front() {
            Some(chain) => Ok(Some(chain)),
            None => state.take(&self.memory),
        }
    }

    fn is_resting(&self) -> bool {
        lock(&self.rests_until).is_some_and(|until| Instant::now() < until)
    }

    /// When this returns, no vCPU's thread serves anything, nor will.
    pub(super) fn end_at_once(&self) {
        *self.at_once.write().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

impl State {
    /// The next request of the queue. Where there is none, the driver kicks for it.
    fn take(&mut self, memory: &GuestMemory) -> Result<Option<KeptChain>, QueueError> {
        loop {
            let chain = self.queue.pop_kept(memory)?;
            if chain.is_some() || !self.queue.enable_kicks(memory)? {
                return Ok(chain);
            }
        }
    }
}

impl Bell for Requests {
    fn ring(&self) {
        let at_once = self.at_once.read().unwrap_or_else(PoisonError::into_inner);
        // Where it fails the device's thread fails the same way, and sees to the rest.
        let served = *at_once && thread::enter_once(&self.server).is_ok() && self.serve_at_once().is_ok();
        if *at_once && !served {
            lock(&self.state).queue.kick_self();
        }
    }
}
