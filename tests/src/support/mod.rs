//! What every chore needs: a cache outside the work tree, progress on the terminal, Debian packages, child processes, and
//! the pieces that both small machines and test hosts are made of.

pub mod archive;
pub mod cache;
pub mod kvm;
pub mod mirror;
pub mod modules;
pub mod packages;
pub mod process;
pub mod progress;
pub mod shell;
