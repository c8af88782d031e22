//! What all vCPUs are to do: wait, run, or end. And how each is made to look.
//!
//! ```text
//!            start/resume            stop, or the guest ended
//!   Paused <-------------> Running -------------------------> Stopped
//!      |        pause                                            ^
//!      +---------------------------------------------------------+
//! ```
//!
//! A change is written first and the vCPUs are kicked after it, both under the lock: a signal interrupts the one that runs guest code, and
//! its handler sets `immediate_exit`, so that one which is just about to enter the guest comes back at once.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void, siginfo_t};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::SigSet;
use vmm_sys_util::errno;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

use crate::clock::GuestClock;
use crate::machine::ExitReason;

/// What the vCPUs are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Wait.
    Paused,
    /// Run guest code.
    Running,
    /// End, for good.
    Stopped,
}

/// The state that vCPUs and machine share.
pub(crate) struct Control {
    state: Mutex<State>,
    changed: Condvar,
    exit_event: EventFd,
    exits: AtomicU64,
    clock: GuestClock,
}

struct State {
    phase: Phase,
    /// How many vCPUs are running guest code, or may be about to.
    running: usize,
    /// How many threads of vCPUs there are.
    threads: usize,
    /// Those of them that can be kicked.
    kickable: Vec<libc::pthread_t>,
    exit_reason: Option<ExitReason>,
}

impl State {
    /// Has each vCPU come back from the guest and look at the phase.
    fn kick(&self) {
        for thread in &self.kickable {
            // SAFETY: the thread has not ended: it takes itself off the list before, for which it needs the lock.
            let _ = unsafe { libc::pthread_kill(*thread, kick_signal()) };
        }
    }
}

impl Control {
    /// Paused, with no vCPU yet.
    pub(crate) fn new() -> std::io::Result<Self> {
        let state =
            State { phase: Phase::Paused, running: 0, threads: 0, kickable: Vec::new(), exit_reason: None };
        Ok(Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            exit_event: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            exits: AtomicU64::new(0),
            clock: GuestClock::default(),
        })
    }

    /// Asks for another phase. A stopped machine stays stopped.
    pub(crate) fn set_phase(&self, phase: Phase) {
        let mut state = self.lock();
        if state.phase != Phase::Stopped {
            state.phase = phase;
        }
        self.changed.notify_all();
        if state.phase != Phase::Running {
            state.kick();
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// Waits until no vCPU runs guest code, and returns whether it came to that in time. A vCPU that waits for a
    /// device cannot be kicked.
    pub(crate) fn wait_until_idle(&self, patience: Duration) -> bool {
        self.wait_while(patience, |state| state.running > 0)
    }

    /// Waits until all threads of vCPUs have ended, and returns whether they did in time.
    pub(crate) fn wait_until_ended(&self, patience: Duration) -> bool {
        self.wait_while(patience, |state| state.threads > 0)
    }

    fn wait_while(&self, patience: Duration, condition: impl Fn(&State) -> bool) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), patience, |state| condition(state));
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !condition(&state)
    }

    /// Counts one more thread of a vCPU, until what is returned is dropped.
    pub(super) fn add_thread(self: &Arc<Self>) -> ThreadCount {
        self.lock().threads += 1;
        ThreadCount { control: self.clone() }
    }

    /// Readable once the guest ended by itself.
    pub(crate) fn exit_event(&self) -> BorrowedFd<'_> {
        self.exit_event.as_fd()
    }

    pub(crate) fn exit_reason(&self) -> Option<ExitReason> {
        self.lock().exit_reason.clone()
    }

    /// What the time is by the guest's counter.
    pub(crate) fn clock(&self) -> &GuestClock {
        &self.clock
    }

    /// How often vCPUs returned from the guest to this process.
    pub(crate) fn exits(&self) -> u64 {
        // Relaxed: it is a figure, and nothing depends on it.
        self.exits.load(Ordering::Relaxed)
    }

    pub(super) fn count_exit(&self) {
        // Relaxed: as above.
        self.exits.fetch_add(1, Ordering::Relaxed);
    }

    /// For a vCPU: waits until it may run. `None` means that it has to end.
    pub(super) fn enter(&self) -> Option<Turn<'_>> {
        let state = self.lock();
        let mut state = self
            .changed
            .wait_while(state, |state| state.phase == Phase::Paused)
            .unwrap_or_else(PoisonError::into_inner);
        if state.phase == Phase::Stopped {
            return None;
        }
        state.running += 1;
        Some(Turn { control: self })
    }

    /// For a vCPU: the guest has ended, for all of them. The first reason is the one that counts.
    pub(super) fn guest_ended(&self, reason: ExitReason) {
        let mut state = self.lock();
        state.phase = Phase::Stopped;
        state.exit_reason.get_or_insert(reason);
        self.changed.notify_all();
        state.kick();
        // It fails only when the counter is full, and then the event is readable.
        let _ = self.exit_event.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread of a vCPU, as long as it exists.
pub(super) struct ThreadCount {
    control: Arc<Control>,
}

impl Drop for ThreadCount {
    fn drop(&mut self) {
        self.control.lock().threads -= 1;
        self.control.changed.notify_all();
    }
}

/// A vCPU's permission to run guest code, until it is dropped.
pub(super) struct Turn<'a> {
    control: &'a Control,
}

impl Turn<'_> {
    /// Whether the vCPU may go on after it was kicked.
    pub(super) fn goes_on(&self) -> bool {
        self.control.phase() == Phase::Running
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.control.lock().running -= 1;
        self.control.changed.notify_all();
    }
}

/// The signal that interrupts a vCPU.
fn kick_signal() -> c_int {
    SIGRTMIN()
}

/// Installs the handler of the kick, once in the process.
pub(crate) fn install_kick_handler() -> Result<(), errno::Error> {
    static INSTALLED: OnceLock<Result<(), errno::Error>> = OnceLock::new();
    *INSTALLED.get_or_init(|| register_signal_handler(kick_signal(), on_kick))
}

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs, or null. Without a destructor and a lazy initializer it can be
    /// read in a signal handler.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: the pointer leads to a byte of `kvm_run`, which is mapped as long as the vCPU that `Kickable`
        // borrows; that sets it to null before it ends. No other thread writes there, since the handler runs on the
        // one that owns the vCPU, and the write is volatile because this thread's own code, which it interrupts, and
        // the kernel know nothing of it.
        unsafe { immediate_exit.write_volatile(1) };
    }
}

/// A vCPU whose thread can be kicked.
pub(super) struct Kickable<'a> {
    vcpu: &'a mut VcpuFd,
    control: &'a Control,
    thread: libc::pthread_t,
}

impl<'a> Kickable<'a> {
    /// Lets this thread be kicked out of the vCPU. All other signals are left to the process's other threads.
    pub(super) fn new(vcpu: &'a mut VcpuFd, control: &'a Control) -> Self {
        // Neither fails for signals that exist.
        let _ = SigSet::all().thread_block();
        let immediate_exit = ptr::from_mut(&mut vcpu.get_kvm_run().immediate_exit);
        IMMEDIATE_EXIT.set(immediate_exit);
        let _ = unblock_signal(kick_signal());
        // SAFETY: it has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        control.lock().kickable.push(thread);
        Self { vcpu, control, thread }
    }

    /// The vCPU.
    pub(super) fn vcpu(&mut self) -> &mut VcpuFd {
        self.vcpu
    }
}

impl Drop for Kickable<'_> {
    fn drop(&mut self) {
        self.control.lock().kickable.retain(|thread| *thread != self.thread);
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}
