//! The clock of the guest, put right by the time stamp counter that the host can read as well.

use std::arch::x86_64::_rdtsc;

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};
use rvm_protocol::ClockReading;

const SECOND: i64 = 1_000_000_000;
/// How long ago a reading may be before it is rather the counter that is wrong, in nanoseconds.
const LONGEST: i64 = 600 * SECOND;
/// How often the clock is read to find it together with the counter.
const ATTEMPTS: u32 = 5;

/// Sets the clock to what a reading of the host's says it is by now.
pub fn set(reading: ClockReading) -> nix::Result<()> {
    // Time that passes from here on goes for both.
    let (now, counter) = read()?;
    match elapsed(&reading, counter) {
        // More than 292 years since the epoch are nobody's time.
        Some(elapsed) => shift((reading.realtime as i64).wrapping_add(elapsed).wrapping_sub(now)),
        None => {
            // A u64 of nanoseconds is some 580 years of seconds, which fit.
            let (seconds, rest) = (reading.realtime / SECOND as u64, reading.realtime % SECOND as u64);
            clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds as i64, rest as i64))
        }
    }
}

/// How many nanoseconds ago a reading was when the counter said this. None if the counter tells nothing.
fn elapsed(reading: &ClockReading, counter: u64) -> Option<i64> {
    let counted = i128::from(counter.wrapping_sub(reading.counter).cast_signed());
    let elapsed = (counted * 1_000_000).checked_div(i128::from(reading.khz))?;
    // Host and guest read the counter with small errors, so it can be less than nothing.
    i64::try_from(elapsed).ok().filter(|elapsed| (-SECOND..LONGEST).contains(elapsed))
}

/// The clock in nanoseconds since the epoch, and the counter at the same instant: where both were read the quickest.
fn read() -> nix::Result<(i64, u64)> {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..ATTEMPTS {
        let before = counter();
        let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
        let took = counter().wrapping_sub(before);
        if took < best.0 {
            best = (took, now.tv_sec() * SECOND + now.tv_nsec(), before.wrapping_add(took / 2));
        }
    }
    Ok((best.1, best.2))
}

fn counter() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and nobody forbids it to this process.
    unsafe { _rdtsc() }
}

/// Puts the clock forward, or back, at once.
fn shift(nanoseconds: i64) -> nix::Result<()> {
    // In microseconds: after a shift in nanoseconds the kernel would tell everybody the time in those.
    const SECOND: i64 = 1_000_000;
    // SAFETY: all fields are integers, for which zero is a value.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_SETOFFSET;
    let microseconds = nanoseconds.div_euclid(1000);
    change.time.tv_sec = microseconds.div_euclid(SECOND);
    change.time.tv_usec = microseconds.rem_euclid(SECOND);
    // SAFETY: the structure is valid, and outlives the call.
    Errno::result(unsafe { libc::adjtimex(&raw mut change) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const READING: ClockReading = ClockReading { realtime: 0, counter: 1000, khz: 2_000_000 };

    #[test]
    fn the_counter_tells_how_long_ago_it_was() {
        assert_eq!(elapsed(&READING, 1000), Some(0));
        assert_eq!(elapsed(&READING, 2_001_000), Some(1_000_000));
        assert_eq!(elapsed(&READING, 0), Some(-500));
        let before = ClockReading { counter: u64::MAX - 999, ..READING };
        assert_eq!(elapsed(&before, 1000), Some(1000), "it wraps");
    }

    #[test]
    fn a_counter_that_tells_nothing_is_not_believed() {
        assert_eq!(elapsed(&ClockReading { khz: 0, ..READING }, 1000), None);
        assert_eq!(elapsed(&READING, 2_000_000 * 1000 * 700), None);
        assert_eq!(elapsed(&READING, u64::MAX / 2), None);
        assert_eq!(elapsed(&ClockReading { khz: 1, ..READING }, u64::MAX / 2), None);
    }

    #[test]
    fn clock_and_counter_are_read_together() {
        let (before, from) = read().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        let (after, to) = read().unwrap();
        assert!(after - before >= 20_000_000 && to > from);
    }
}
