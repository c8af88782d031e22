//! What all vCPUs are to do: wait, run, or end. And how each is made to look.
//!
//! ```text
//!            start/resume            stop, or the guest ended
//!   Paused <-------------> Running -------------------------> Stopped
//!      |        pause                                            ^
//!      +---------------------------------------------------------+
//! ```
//!
//! A change is written first and the vCPUs are kicked after it: a signal interrupts the one that runs guest code, and
//! its handler sets `immediate_exit`, so that one which is just about to enter the guest comes back at once.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};

use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void, siginfo_t};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::SigSet;
use vmm_sys_util::errno;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

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
}

struct State {
    phase: Phase,
    /// How many vCPUs are running guest code, or may be about to.
    running: usize,
    exit_reason: Option<ExitReason>,
}

impl Control {
    /// Paused, with no vCPU yet.
    pub(crate) fn new() -> std::io::Result<Self> {
        let state = State { phase: Phase::Paused, running: 0, exit_reason: None };
        Ok(Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            exit_event: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            exits: AtomicU64::new(0),
        })
    }

    /// Asks for another phase; the vCPUs have to be kicked afterwards. A stopped machine stays stopped.
    pub(crate) fn set_phase(&self, phase: Phase) {
        let mut state = self.lock();
        if state.phase != Phase::Stopped {
            state.phase = phase;
            self.changed.notify_all();
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// Waits until no vCPU runs guest code.
    pub(crate) fn wait_until_idle(&self) {
        let state = self.lock();
        let _state = self
            .changed
            .wait_while(state, |state| state.running > 0 && state.phase != Phase::Running)
            .unwrap_or_else(PoisonError::into_inner);
    }

    /// Readable once the guest ended by itself.
    pub(crate) fn exit_event(&self) -> BorrowedFd<'_> {
        self.exit_event.as_fd()
    }

    pub(crate) fn exit_reason(&self) -> Option<ExitReason> {
        self.lock().exit_reason.clone()
    }

    /// How often vCPUs returned from the guest to this process.
    pub(crate) fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }

    pub(super) fn count_exit(&self) {
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
        // It fails only when the counter is full, and then the event is readable.
        let _ = self.exit_event.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
pub(crate) fn kick_signal() -> c_int {
    SIGRTMIN()
}

/// Installs the handler of the kick, once in the process.
pub(crate) fn install_kick_handler() -> Result<(), errno::Error> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| result = register_signal_handler(kick_signal(), on_kick));
    result
}

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs, or null. Without a destructor and a lazy initializer it can be
    /// read in a signal handler.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: the pointer is set by this thread alone, to a field of `kvm_run` that stays mapped until
        // `Kickable` has set it to null again.
        unsafe { &*immediate_exit }.store(1, Ordering::SeqCst);
    }
}

/// A vCPU whose thread can be kicked.
pub(super) struct Kickable<'a> {
    vcpu: &'a mut VcpuFd,
}

impl<'a> Kickable<'a> {
    /// Lets this thread be kicked out of the vCPU. All other signals are left to the process's other threads.
    pub(super) fn new(vcpu: &'a mut VcpuFd) -> Self {
        // Neither fails for signals that exist.
        let _ = SigSet::all().thread_block();
        let immediate_exit = ptr::from_mut(&mut vcpu.get_kvm_run().immediate_exit);
        IMMEDIATE_EXIT.set(immediate_exit.cast_const().cast());
        let _ = unblock_signal(kick_signal());
        Self { vcpu }
    }

    /// The vCPU.
    pub(super) fn vcpu(&mut self) -> &mut VcpuFd {
        self.vcpu
    }
}

impl Drop for Kickable<'_> {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null());
    }
}
