//! The test host and the end-to-end suites of rvm, and what the chores of `xtask` share with them.

pub mod host;
pub mod support;
