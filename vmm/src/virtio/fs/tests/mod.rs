//! Requests over real virtqueues, against a directory of the host.

mod driver;
mod files;
mod kernel;
mod malformed;
mod names;
mod pins;

use super::*;
use driver::Driver;
