//! The serial port (8250), by which the guest's kernel writes its messages. Nothing is ever sent to the guest.

use std::sync::Arc;

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::console::Console;

/// Number of ports.
pub(crate) const PORTS: u16 = 8;

/// The serial port with what it wrote.
pub(crate) struct SerialPort(Serial<Line, NoEvents, Console>);

impl SerialPort {
    /// A port that interrupts through `line`.
    pub(crate) fn new(line: Arc<EventFd>, console: Console) -> Self {
        Self(Serial::new(Line(line), console))
    }

    pub(crate) fn read(&mut self, register: u8) -> u8 {
        self.0.read(register)
    }

    pub(crate) fn write(&mut self, register: u8, value: u8) {
        // A line that cannot be raised is raised already, and the console takes everything.
        let _ = self.0.write(register, value);
    }
}

/// The port's interrupt.
struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = std::io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.write(1)
    }
}
