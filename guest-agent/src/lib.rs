//! The guest agent of rvm: PID 1 of every guest, and the only program of its initramfs.
//!
//! It is single-threaded on purpose. Everything waits in one epoll loop ([`agent`]), so the agent may `fork`
//! at any time and do all the set-up of a container's process in the child, in Rust, before `execve`.
//!
//! The way of a container through the modules: [`boot`] mounts what the agent itself needs and says that the
//! guest is up; [`agent`] takes the requests of the [`control`] connection; [`network`] configures the
//! interfaces; [`process::launch`] forks; the child makes the [`container`] around itself, or joins it, takes
//! on the process's identity ([`process`]) and executes the program; [`stream`] carries what it reads and
//! writes; and [`resolver`] looks names up.

pub mod agent;
pub mod boot;
pub mod container;
pub mod control;
pub mod error;
pub mod event;
pub mod host;
pub mod network;
pub mod process;
pub mod resolver;
pub mod slots;
pub mod stream;
pub mod sys;
