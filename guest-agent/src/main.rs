//! PID 1 of the guest.
//!
//! The entry point is C's `main`, not Rust's: Rust's runtime opens `/dev/null` for each standard stream that
//! is closed, and aborts where it cannot. In an initramfs that holds nothing but this program there is no
//! `/dev` yet, and a kernel without a console starts its init with all three closed.

#![no_main]

/// Called by the C runtime, with nothing set up but the C library itself.
// SAFETY: the C runtime looks for exactly this symbol; no other crate that is linked defines it.
#[unsafe(no_mangle)]
pub extern "C" fn main() -> libc::c_int {
    rvm_agent::boot::run()
}
