//! What the guest reaches by ports and by memory outside of its memory.

use std::ops::ControlFlow;
use std::sync::{Mutex, PoisonError};

use crate::confine::Duty;
use crate::machine::ExitReason;
use crate::serial::{self, SerialPort};
use crate::shared_boot::{PORTS, TextPort};
use crate::virtio::mmio::slot::Slot;
use crate::{i8042, layout};

/// The last port of the serial port.
const SERIAL_END: u16 = layout::SERIAL_PORT + serial::PORTS - 1;
/// The last of the ports about the kernel's text.
const TEXT_END: u16 = layout::TEXT_PORT + PORTS - 1;
/// What nothing reads as: lines that nobody pulls low.
const FLOATING: u8 = 0xff;

/// All devices, shared by the vCPUs.
pub(crate) struct Bus {
    serial: Mutex<SerialPort>,
    text: TextPort,
    slots: Vec<Slot>,
}

impl Bus {
    pub(crate) fn new(serial: SerialPort, text: TextPort, slots: Vec<Slot>) -> Self {
        Self { serial: Mutex::new(serial), text, slots }
    }

    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    pub(crate) fn text(&self) -> &TextPort {
        &self.text
    }

    /// What the threads of vCPUs have to do, by the devices that are there now.
    pub(crate) fn duty_of_vcpus(&self) -> Duty {
        let with_files = self.slots.iter().any(Slot::serves_files_on_vcpus);
        if with_files { Duty::VcpuWithFiles } else { Duty::Vcpu }
    }

    /// What the guest has set of the serial port.
    pub(crate) fn serial_registers(&self) -> serial::Registers {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).registers()
    }

    /// An `in` instruction, or several of them in a row.
    pub(crate) fn read_port(&self, port: u16, data: &mut [u8]) {
        match port {
            layout::SERIAL_PORT..=SERIAL_END => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                data.fill_with(|| serial.read((port - layout::SERIAL_PORT) as u8));
            }
            i8042::DATA_PORT | i8042::COMMAND_PORT => data.fill(i8042::IDLE),
            layout::TEXT_PORT..=TEXT_END => match <&mut [u8; 4]>::try_from(&mut *data) {
                Ok(word) => *word = self.text.read(port - layout::TEXT_PORT).to_le_bytes(),
                Err(_) => data.fill(FLOATING),
            },
            _ => data.fill(FLOATING),
        }
    }

    /// An `out` instruction, or several of them in a row.
    pub(crate) fn write_port(&self, port: u16, data: &[u8]) -> ControlFlow<ExitReason> {
        match port {
            layout::SERIAL_PORT..=SERIAL_END => {
                let mut serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
                data.iter().for_each(|byte| serial.write((port - layout::SERIAL_PORT) as u8, *byte));
                ControlFlow::Continue(())
            }
            i8042::COMMAND_PORT => data.iter().try_for_each(|byte| i8042::command(*byte)),
            layout::TEXT_PORT..=TEXT_END => {
                if let Ok(word) = <[u8; 4]>::try_from(data) {
                    self.text.write(port - layout::TEXT_PORT, u32::from_le_bytes(word));
                }
                ControlFlow::Continue(())
            }
            _ => ControlFlow::Continue(()),
        }
    }

    /// A read of memory that is none.
    pub(crate) fn read_memory(&self, address: u64, data: &mut [u8]) {
        match self.slot_at(address) {
            Some((slot, offset)) => slot.read(offset, data),
            None => data.fill(FLOATING),
        }
    }

    /// A write to memory that is none.
    pub(crate) fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.slot_at(address) {
            slot.write(offset, data);
        }
    }

    fn slot_at(&self, address: u64) -> Option<(&Slot, u64)> {
        let (slot, offset) = layout::slot_at(address)?;
        Some((self.slots.get(slot)?, offset))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::console::Console;
    use crate::memory;

    fn bus() -> (Bus, Console) {
        let line = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let console = Console::default();
        (
            Bus::new(
                SerialPort::new(line, console.clone()),
                TextPort::new(memory::create(memory::MIN_MEMORY).unwrap()),
                Vec::new(),
            ),
            console,
        )
    }

    #[test]
    fn the_serial_port_is_ready_and_writes_to_the_console() {
        let (bus, console) = bus();
        let mut status = [0];
        bus.read_port(0x3fd, &mut status);
        assert_eq!(status[0] & 0x60, 0x60, "transmitter empty and idle");
        assert!(bus.write_port(0x3f8, b"Linux").is_continue());
        assert_eq!(console.text(), "Linux");
    }

    #[test]
    fn the_keyboard_controller_resets_and_does_nothing_else() {
        let (bus, _) = bus();
        let mut status = [0xff];
        bus.read_port(0x64, &mut status);
        assert_eq!(status, [0]);
        assert!(bus.write_port(0x64, &[0xd1]).is_continue());
        assert!(bus.write_port(0x60, &[0xfe]).is_continue());
        assert_eq!(bus.write_port(0x64, &[0xfe]), ControlFlow::Break(ExitReason::Reset));
    }

    #[test]
    fn where_nothing_is_all_bits_are_set() {
        let (bus, _) = bus();
        let mut data = [0; 4];
        bus.read_port(0xcfc, &mut data);
        assert_eq!(data, [0xff; 4]);
        data.fill(0);
        bus.read_memory(layout::slot_address(0).0, &mut data);
        assert_eq!(data, [0xff; 4], "there is no slot 0 here");
        bus.write_memory(u64::MAX, &data);
        assert!(bus.write_port(0, &data).is_continue());
    }
}
