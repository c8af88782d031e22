//! The host's clock, told by the guest's time stamp counter: guest and host can both read that, and so it does not matter
//! how long the message takes in which the one tells the other what time it is.

use std::sync::{Arc, Mutex, PoisonError};

use nix::time::{ClockId, clock_gettime};

/// How often a clock is read at most until that took no time worth mentioning.
const ATTEMPTS: u32 = 8;
/// How long it may take in nanoseconds.
const BRIEF: u64 = 20_000;

/// What time it is where the guest's counter has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockReading {
    /// The host's clock, in nanoseconds since the epoch.
    pub realtime: u64,
    /// What the guest's time stamp counter says at that instant.
    pub counter: u64,
    /// How often it counts in a millisecond; 0 where that is not known.
    pub khz: u32,
}

/// Tells what time it is by the counter of one machine.
#[derive(Clone, Debug, Default)]
pub struct GuestClock {
    noted: Arc<Mutex<Option<Noted>>>,
}

/// What the counter said.
#[derive(Clone, Copy, Debug)]
struct Noted {
    counter: u64,
    khz: u32,
    /// When that was, by a clock of the host that runs at the pace of the counter, whatever else changes the time.
    at: u64,
}

impl Noted {
    /// What the counter says at another time.
    fn counter_at(&self, at: u64) -> u64 {
        let elapsed = i128::from(at) - i128::from(self.at);
        let counted = elapsed * i128::from(self.khz) / 1_000_000;
        // It wraps, as the counter itself does.
        self.counter.wrapping_add(counted as u64)
    }
}

impl GuestClock {
    /// Notes what the counter says, which `read` finds out.
    pub(crate) fn note<E>(&self, khz: u32, read: impl FnMut() -> Result<u64, E>) -> Result<(), E> {
        let (counter, at) = beside(ClockId::CLOCK_MONOTONIC_RAW, read)?;
        *self.noted.lock().unwrap_or_else(PoisonError::into_inner) = Some(Noted { counter, khz, at });
        Ok(())
    }

    /// What time it is.
    pub fn read(&self) -> ClockReading {
        let noted = *self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        let realtime = || Ok::<_, std::convert::Infallible>(nanoseconds(ClockId::CLOCK_REALTIME));
        let Ok((realtime, at)) = beside(ClockId::CLOCK_MONOTONIC_RAW, realtime);
        match noted {
            Some(noted) => ClockReading { realtime, counter: noted.counter_at(at), khz: noted.khz },
            None => ClockReading { realtime, counter: 0, khz: 0 },
        }
    }
}

/// Reads something, and a clock at the same time: halfway between two readings of it, of which nothing else came between.
fn beside<T, E>(clock: ClockId, mut read: impl FnMut() -> Result<T, E>) -> Result<(T, u64), E> {
    let mut attempt = || {
        let before = nanoseconds(clock);
        let value = read()?;
        let took = nanoseconds(clock).saturating_sub(before);
        Ok((took, value, before + took / 2))
    };
    let mut best = attempt()?;
    for _ in 1..ATTEMPTS {
        if best.0 <= BRIEF {
            break;
        }
        let next = attempt()?;
        if next.0 < best.0 {
            best = next;
        }
    }
    Ok((best.1, best.2))
}

/// What a clock of the host says, in nanoseconds; a u64 of them lasts for centuries.
fn nanoseconds(clock: ClockId) -> u64 {
    // These clocks exist on every Linux, and are never negative.
    clock_gettime(clock).map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_counter_goes_on_at_its_pace() {
        let noted = Noted { counter: 1000, khz: 2_000_000, at: 5_000_000 };
        assert_eq!(noted.counter_at(5_000_000), 1000);
        assert_eq!(noted.counter_at(6_000_000), 2_001_000);
        assert_eq!(noted.counter_at(4_999_999), 998);
        // A month.
        assert_eq!(noted.counter_at(5_000_000 + 2_592_000_000_000_000), 5_184_000_000_001_000);
    }

    #[test]
    fn a_reading_is_of_now() {
        let clock = GuestClock::default();
        let unknown = clock.read();
        assert_eq!((unknown.counter, unknown.khz), (0, 0));
        // One that counts nanoseconds.
        let count = || Ok::<_, ()>(nanoseconds(ClockId::CLOCK_MONOTONIC_RAW));
        clock.note(1_000_000, count).unwrap();
        std::thread::sleep(Duration::from_millis(3));
        let (before, reading, after) = (count().unwrap(), clock.read(), count().unwrap());
        assert!((before..after + 1_000_000).contains(&(reading.counter + 500_000)), "{before} {reading:?}");
        assert!(reading.realtime >= unknown.realtime + 3_000_000);
        assert_eq!(clock.note(1, || Err(5)), Err(5));
        assert_eq!(clock.read().khz, 1_000_000, "what is known stays");
    }

    #[test]
    fn the_quickest_reading_counts() {
        let mut delays = [5, 1, 0, 9].into_iter();
        let read = || {
            let delay = delays.next().unwrap_or(9);
            std::thread::sleep(Duration::from_millis(delay));
            Ok::<_, ()>(delay)
        };
        // To sleep takes longer than is brief in any case, so all are tried.
        assert_eq!(beside(ClockId::CLOCK_MONOTONIC_RAW, read).unwrap().0, 0);
    }
}
