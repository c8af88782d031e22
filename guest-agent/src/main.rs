//! PID 1 of the guest.
//!
//! The entry point is C's `main`, not Rust's: Rust's runtime opens `/dev/null` for each standard stream that
//! is closed, and aborts where it cannot. In an initramfs that holds nothing but this program there is no
//! `/dev` yet, and a kernel without a console starts its init with all three closed.

#![no_main]

use std::ffi::CStr;

use rvm_protocol::REHEARSAL_ARGUMENT;

/// Called by the C runtime, with nothing set up but the C library itself.
///
/// # Safety
///
/// There are `count` arguments, each a string that lives as long as the process.
// SAFETY: the C runtime looks for exactly this symbol; no other crate that is linked defines it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn main(count: libc::c_int, arguments: *const *const libc::c_char) -> libc::c_int {
    let Ok(count) = usize::try_from(count) else { return 1 };
    // SAFETY: the C runtime passes as many strings as it says, which live as long as the process.
    let arguments = unsafe { std::slice::from_raw_parts(arguments, count) };
    // SAFETY: as above.
    let mut arguments = arguments.iter().map(|argument| unsafe { CStr::from_ptr(*argument) });
    // No kernel passes this word to its init: the monitor makes its command line.
    if arguments.nth(1).is_some_and(|argument| argument.to_bytes() == REHEARSAL_ARGUMENT.as_bytes()) {
        return 0;
    }
    rvm_agent::boot::run()
}
