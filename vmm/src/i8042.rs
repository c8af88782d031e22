//! The keyboard controller, of which only the line to the processor's reset pin is left.
//!
//! A kernel that was told `reboot=k` ends by writing the command 0xfe, "pulse line 0 low".

use std::ops::ControlFlow;

use crate::machine::ExitReason;

/// The controller's data port.
pub(crate) const DATA_PORT: u16 = 0x60;
/// The controller's status and command port.
pub(crate) const COMMAND_PORT: u16 = 0x64;

const RESET: u8 = 0xfe;

/// What both ports read as. For the status it means: nothing to read, and ready for a command.
pub(crate) const IDLE: u8 = 0;

/// A command byte.
pub(crate) fn command(byte: u8) -> ControlFlow<ExitReason> {
    if byte == RESET { ControlFlow::Break(ExitReason::Reset) } else { ControlFlow::Continue(()) }
}
