//! The container runtime: what engines call.
//!
//! The short-lived [`commands`] of `rvm` do what needs privileges and the engine's files; the [`monitor`], one a
//! container, holds the virtual machine and is the process that the engine knows. They talk over [`control`].

pub mod bundle;
pub mod cause;
pub mod cgroup;
pub mod check;
pub mod commands;
pub mod compare;
pub mod console;
pub mod container;
pub mod control;
pub mod cost;
pub mod error;
pub mod features;
mod foreign;
pub mod hooks;
pub mod install;
pub mod logging;
pub mod monitor;
mod mountinfo;
pub mod network;
mod programs;
pub mod reexec;
pub mod rootfs;
pub mod seccomp;
pub mod signals;
pub mod spec;
pub mod stdio;
pub mod template;
pub mod timeline;
