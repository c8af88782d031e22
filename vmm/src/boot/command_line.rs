//! The kernel's command line, made in this one place.

use linux_loader::cmdline::Cmdline;

use super::BootError;
use crate::layout;

/// What each guest is told, and why.
const BASE: [&str; 11] = [
    // Kernel messages, and only those that matter: each byte costs an exit.
    "console=ttyS0",
    "quiet",
    // One serial port, instead of a search for four.
    "8250.nr_uarts=1",
    // The end of the guest is a reset by the keyboard controller, also after a panic, and at once.
    "reboot=k",
    "panic=-1",
    // There is no keyboard and no mouse behind that controller.
    "i8042.noaux",
    "i8042.nokbd",
    // The timer is the local APIC's: no need to check that the interrupt of an old one arrives.
    "no_timer_check",
    // A single processor would have the lock prefixes of all the kernel's code taken out, thousands of places one by one.
    "noreplace-smp",
    // The host's kernel watches its time stamp counter, and the guest's clock is the host's word: an idle guest need not wake
    // up twice a second to compare the two.
    "tsc=nowatchdog",
    // The first file system is of the kind whose files can be the initramfs's own pages (patch `initramfs-in-place`).
    "rootfstype=ramfs",
];

/// The command line for a machine with so many slots, whose kernel may be one that is to ask for its text.
pub(super) fn build(slots: u8, asks_for_text: bool, extra: &str) -> Result<Cmdline, BootError> {
    let mut command_line = Cmdline::new(layout::COMMAND_LINE_SIZE).map_err(BootError::CommandLine)?;
    for word in BASE {
        command_line.insert_str(word).map_err(BootError::CommandLine)?;
    }
    for slot in 0..slots {
        command_line
            .add_virtio_mmio_device(
                layout::SLOT_SIZE,
                layout::slot_address(slot),
                layout::slot_gsi(slot),
                None,
            )
            .map_err(BootError::CommandLine)?;
    }
    if asks_for_text {
        let word = format!("host_text={:#x}", layout::TEXT_PORT);
        command_line.insert_str(word).map_err(BootError::CommandLine)?;
    }
    command_line.insert_str(extra).map_err(BootError::CommandLine)?;
    Ok(command_line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(slots: u8, extra: &str) -> String {
        build(slots, false, extra).unwrap().as_cstring().unwrap().into_string().unwrap()
    }

    #[test]
    fn slots_are_named_in_their_order() {
        let text = text(4, "debug");
        assert!(text.starts_with("console=ttyS0 "));
        assert!(text.contains("virtio_mmio.device=4K@0xd0000f00:5 virtio_mmio.device=4K@0xd0002f00:6 "));
        assert!(text.ends_with("virtio_mmio.device=4K@0xd0006f00:9 debug"), "{text}");
    }

    #[test]
    fn a_kernel_that_is_to_ask_for_its_text_is_told_where() {
        let told = build(0, true, "debug").unwrap().as_cstring().unwrap().into_string().unwrap();
        assert!(told.ends_with(" host_text=0x5e0 debug"), "{told}");
    }

    #[test]
    fn all_slots_leave_room_for_more() {
        assert!(text(layout::MAX_SLOTS, "").len() < layout::COMMAND_LINE_SIZE / 2);
    }

    #[test]
    fn what_a_kernel_cannot_take_is_refused() {
        assert!(matches!(build(0, false, &"x".repeat(2048)), Err(BootError::CommandLine(_))));
        assert!(matches!(build(0, false, "nul\0"), Err(BootError::CommandLine(_))));
        assert!(matches!(build(0, false, "über"), Err(BootError::CommandLine(_))));
    }
}
