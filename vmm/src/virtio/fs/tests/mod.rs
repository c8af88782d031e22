//! Requests over real virtqueues, against a directory of the host.

mod at_once;
mod balance;
mod driver;
mod files;
mod kernel;
mod malformed;
mod names;
mod notices;
mod overlay;
mod pins;

use super::*;
use driver::Driver;

/// Says that a test did nothing, for want of something; where that is promised, it fails.
fn skipped(wanted: &str) {
    assert!(std::env::var_os("RVM_TESTS_NEED_ROOT").is_none(), "this test takes {wanted}");
    eprintln!("not tested: this test takes {wanted}");
}
