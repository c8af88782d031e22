//! The serial port (8250), by which the guest's kernel writes its messages. Nothing is ever sent to the guest.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
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

    /// A port as another one was.
    pub(crate) fn restored(registers: &Registers, line: Arc<EventFd>, console: Console) -> Self {
        let state = SerialState {
            baud_divisor_low: registers.baud_divisor[0],
            baud_divisor_high: registers.baud_divisor[1],
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            in_buffer: Vec::new(),
        };
        let (port, event) = (Line(line.clone()), NoEvents);
        // It fails only where the interrupt that is due cannot be raised, and then it is.
        match Serial::from_state(&state, port, event, console.clone()) {
            Ok(serial) => Self(serial),
            Err(_) => Self::new(line, console),
        }
    }

    /// What the guest has set.
    pub(crate) fn registers(&self) -> Registers {
        let state = self.0.state();
        Registers {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
        }
    }

    pub(crate) fn read(&mut self, register: u8) -> u8 {
        self.0.read(register)
    }

    pub(crate) fn write(&mut self, register: u8, value: u8) {
        // A line that cannot be raised is raised already, and the console takes everything.
        let _ = self.0.write(register, value);
    }
}

/// The registers of a port to which nothing was sent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registers {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
}

/// The port's interrupt.
struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = std::io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.write(1)
    }
}
