//! How long stories take. They are what a run of all tests waits for, so the longest are named at the end of each suite.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many stories are named.
const NAMED: usize = 5;

static TAKEN: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());

/// Does something, and remembers how long it took.
pub fn noted<T>(name: &str, work: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let outcome = work();
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner).push((begin.elapsed(), name.to_owned()));
    outcome
}

/// Names those that took longest.
pub fn tell_longest() {
    let mut taken = std::mem::take(&mut *TAKEN.lock().unwrap_or_else(PoisonError::into_inner));
    taken.sort_unstable();
    let longest: Vec<_> = taken.iter().rev().take(NAMED).collect();
    let words: Vec<_> =
        longest.iter().map(|(time, name)| format!("{name} {:.0} s", time.as_secs_f64())).collect();
    if !words.is_empty() {
        println!("The longest: {}", words.join(", "));
    }
}
