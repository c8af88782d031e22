//! What every chore needs: a cache outside the work tree, progress on the terminal, Debian packages, child processes.

pub mod cache;
pub mod packages;
pub mod process;
pub mod progress;
