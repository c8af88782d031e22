//! What the threads that a guest can talk to are not allowed.
//!
//! A monitor needs capabilities to serve files, and threads inherit them. One that runs a vCPU, or moves packets and
//! sectors between descriptors that are open already, needs none: should a guest take it over, it gains none either.

use caps::CapSet;

/// Takes all capabilities from the calling thread, for good. Other threads keep theirs; those that this one starts
/// have none.
pub fn drop_capabilities() {
    // The bounding set stays: without a permitted capability it gives nothing, short of executing a file that has
    // some, which the monitor forbids itself for all threads (no new privileges).
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        // To give up is always allowed. A kernel without ambient capabilities has none to give up.
        let _ = caps::clear(None, set);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const SETS: [CapSet; 4] = [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted];

    fn count() -> usize {
        SETS.iter().map(|set| caps::read(None, *set).unwrap().len()).sum()
    }

    #[test]
    fn a_thread_gives_up_its_own_capabilities_and_those_of_threads_it_starts() {
        let before = count();
        let confined = thread::spawn(|| {
            drop_capabilities();
            (count(), thread::spawn(count).join().unwrap())
        });
        assert_eq!(confined.join().unwrap(), (0, 0));
        assert_eq!(count(), before);
    }
}
