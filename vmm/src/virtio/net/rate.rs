//! Limits of what goes through a device in a second, one way each.
//!
//! A limited way is a line of that speed: each frame occupies it for as long as it takes, and the next has to wait for it
//! to be free, but for a short burst. What waits stays where it is, in the guest's queue or in the tap's,
//! so nothing is lost by the limit itself.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// How far frames may be ahead of the line. A timer is not exact, and neither is the guest.
const BURST: Duration = Duration::from_millis(20);

/// What the ways of a device are limited to, in bytes of frames a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// To the guest.
    pub receive: Option<NonZeroU64>,
    /// From the guest.
    pub transmit: Option<NonZeroU64>,
}

/// A way that is limited.
#[derive(Debug)]
pub(super) struct Throttle {
    rate: NonZeroU64,
    timer: Arc<TimerFd>,
    free_at: Instant,
}

impl Throttle {
    /// A free line with so many bytes a second.
    pub(super) fn new(rate: NonZeroU64) -> io::Result<Throttle> {
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        Ok(Throttle { rate, timer: Arc::new(timer), free_at: Instant::now() })
    }

    /// Another at the same timer: the worker's, while the device keeps its own for the next.
    pub(super) fn another(&self) -> Throttle {
        Throttle { rate: self.rate, timer: self.timer.clone(), free_at: Instant::now() }
    }

    /// Readable when a line that was not free has become so.
    pub(super) fn source(&self) -> RawFd {
        self.timer.as_fd().as_raw_fd()
    }

    /// Whether a frame may go now. If not, the timer tells when.
    pub(super) fn is_free(&mut self) -> bool {
        let ahead = self.free_at.saturating_duration_since(Instant::now());
        let wait = ahead.saturating_sub(BURST);
        if wait.is_zero() {
            return true;
        }
        let expiration = Expiration::OneShot(TimeSpec::from_duration(wait));
        // It fails for times that make no sense alone. Then rather too fast than never.
        self.timer.set(expiration, TimerSetTimeFlags::empty()).is_err()
    }

    /// The timer's news have been heard.
    pub(super) fn acknowledge(&self) {
        let _ = nix::unistd::read(&*self.timer, &mut [0; 8]);
    }

    /// A frame of this length goes.
    pub(super) fn take(&mut self, bytes: usize) {
        let nanoseconds = bytes as u128 * 1_000_000_000 / u128::from(self.rate.get());
        let time = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        let start = self.free_at.max(Instant::now());
        self.free_at = start.checked_add(time).unwrap_or(start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn throttle(rate: u64) -> Throttle {
        Throttle::new(NonZeroU64::new(rate).unwrap()).unwrap()
    }

    #[test]
    fn a_burst_goes_and_then_the_line_is_taken() {
        let mut throttle = throttle(1000);
        assert!(throttle.is_free());
        throttle.take(20);
        assert!(throttle.is_free(), "20 ms are within the burst");
        throttle.take(1000);
        assert!(!throttle.is_free());
        let ahead = throttle.free_at - Instant::now();
        assert!(ahead > Duration::from_millis(900) && ahead < Duration::from_millis(1100), "{ahead:?}");
    }

    #[test]
    fn the_timer_tells_when_it_is_free() {
        let mut throttle = throttle(1_000_000);
        throttle.take(100_000);
        assert!(!throttle.is_free());
        let mut fds = [nix::poll::PollFd::new(throttle.timer.as_fd(), nix::poll::PollFlags::POLLIN)];
        assert_eq!(nix::poll::poll(&mut fds, 20_000_u16).unwrap(), 1);
        throttle.acknowledge();
        assert!(throttle.is_free());
    }

    #[test]
    fn no_length_and_no_rate_overflow() {
        let mut slow = throttle(1);
        (0..10).for_each(|_| slow.take(usize::MAX));
        assert!(!slow.is_free());
        let mut fast = throttle(u64::MAX);
        fast.take(1 << 40);
        assert!(fast.is_free());
    }
}
