//! The machine of a container: its configuration, its devices, and what went wrong when it ended by itself.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use rvm_protocol::{CONTROL_PORT, GUEST_CID, RESOLVER_PORT, ROOTFS_TAG, STREAM_PORT};
use rvm_vmm::event_loop::EventLoop;
use rvm_vmm::machine::{BootFiles, BootSource, ExitReason, Machine, MachineConfig, MachineError};
use rvm_vmm::virtio::balloon::BalloonDevice;
use rvm_vmm::virtio::block::BlockDevice;
use rvm_vmm::virtio::fs::{FileServer, FsDevice, PreparedFileServer};
use rvm_vmm::virtio::rng::RngDevice;
use rvm_vmm::virtio::vsock::{VsockDevice, VsockListener};

use super::disks::OpenDisk;
use super::{MonitorError, initramfs};
use crate::bundle::MAX_DISKS;
use crate::container::shape::Shape;
use crate::foreign::tame;
use crate::template::{Kept, Template, TemplateError};
use crate::timeline::{Phase, Timeline};

/// The slots of the devices that every machine has.
const VSOCK_SLOT: u8 = 0;
const RNG_SLOT: u8 = 1;
const ROOTFS_SLOT: u8 = 2;
const BALLOON_SLOT: u8 = 3;
/// The first slot that is free for devices that are plugged later.
pub const FIRST_FREE_SLOT: u8 = 4;
/// Number of slots for all but disks.
pub const SLOTS: u8 = 9;
/// How many of the kernel's last lines an error shows.
const LAST_LINES: usize = 12;
/// How many lines of the beginning of its report come before them.
const FIRST_OF_REPORT: usize = 4;
/// How the kernel begins to report that it cannot go on.
const REPORTS: [&str; 6] =
    ["BUG: ", "Oops: ", "general protection fault", "divide error", "invalid opcode", "Kernel panic"];

/// A machine that is built and not started, with what could only be opened before the change of the root.
pub struct Built {
    machine: Machine,
    /// What it goes on from, if it does not boot.
    template: Option<Template>,
    /// Where that is kept which it shares with others that boot, if it does.
    shared: Option<Kept>,
    files: PreparedFileServer,
    disks: Vec<OpenDisk>,
}

/// A machine that boots.
pub struct Booting {
    /// The machine.
    pub machine: Machine,
    /// Where the agent's control connection arrives.
    pub control: VsockListener,
    /// Where streams arrive.
    pub streams: VsockListener,
    /// Where the guest's resolver arrives.
    pub lookups: VsockListener,
    /// Drives the devices that never block.
    pub events: EventLoop,
    /// What it goes on from, if it does not boot.
    pub template: Option<Template>,
    /// Where that is kept which it shares with others that boot, if it does.
    pub shared: Option<Kept>,
}

/// The slots of disks follow those of everything else.
pub fn disk_slots(disks: usize) -> Range<u8> {
    // A bundle has no more disks than there are slots.
    SLOTS..SLOTS + disks.min(MAX_DISKS) as u8
}

/// The devices that every machine has, by their slots (virtio 1.2, section 5).
const DEVICES: [u32; SLOTS as usize] = [19, 4, 26, 5, 0, 0, 0, 0, 0];

/// Makes a machine that goes on from a template. The template is of no use when this fails.
pub fn restore(shape: Shape, template: &Template, timeline: &mut Timeline) -> Result<Machine, TemplateError> {
    let state = template.record.machine()?;
    if (state.vcpus(), state.memory()) != (shape.vcpus, shape.memory) || state.devices() != DEVICES {
        return Err(TemplateError::Damaged("it is of another machine"));
    }
    let machine = Machine::restore(state, &template.memory, &template.record.soon)?;
    let reached = machine.timeline();
    timeline.mark_at(Phase::KvmReady, reached.kvm_ready);
    timeline.mark_at(Phase::TemplateReady, reached.kernel_loaded);
    Ok(machine)
}

/// The kernel and the agent as a machine can boot them.
pub fn files(kernel: &File, agent: &File) -> Result<BootFiles, MonitorError> {
    let initramfs = agent
        .metadata()
        .and_then(|metadata| initramfs::build(agent, metadata.len()))
        .map_err(MonitorError::system("cannot read the guest's agent"))?;
    let kernel = kernel.try_clone().map_err(MonitorError::system("cannot keep the kernel open"))?;
    Ok(BootFiles { kernel, initramfs })
}

/// Makes a machine that boots.
pub fn make(
    shape: Shape,
    source: BootSource,
    slots: u8,
    timeline: &mut Timeline,
) -> Result<Machine, MachineError> {
    let machine = Machine::new(MachineConfig {
        vcpus: shape.vcpus,
        memory: shape.memory,
        source,
        command_line: String::new(),
        slots,
    })?;
    let reached = machine.timeline();
    timeline.mark_at(Phase::KvmReady, reached.kvm_ready);
    timeline.mark_at(Phase::KernelLoaded, reached.kernel_loaded);
    Ok(machine)
}

impl Built {
    /// One that goes on from a template.
    pub fn restored(machine: Machine, template: Template) -> Result<Built, MonitorError> {
        let files = FileServer::prepare()?;
        Ok(Built { machine, template: Some(template), shared: None, files, disks: Vec::new() })
    }

    /// One that boots, perhaps with what is kept there.
    pub fn booting(
        machine: Machine,
        shared: Option<Kept>,
        disks: Vec<OpenDisk>,
    ) -> Result<Built, MonitorError> {
        let files = FileServer::prepare()?;
        Ok(Built { machine, template: None, shared, files, disks })
    }

    /// Plugs the devices and lets the vCPUs run. What is served to the guest is the tree below `root`.
    pub fn start(mut self, root: &Path, timeline: &mut Timeline) -> Result<Booting, MonitorError> {
        let template = self.template.take();
        let booting = self.launch(root, template.is_some(), timeline);
        let Some(template) = template else { return booting };
        // Whatever it was: the next container is not to meet with the same.
        let dropped = |error| {
            template.discard();
            MonitorError::Template(Box::new(error))
        };
        let booting = booting.map_err(dropped)?;
        Ok(Booting { template: Some(template), ..booting })
    }

    fn launch(self, root: &Path, goes_on: bool, timeline: &mut Timeline) -> Result<Booting, MonitorError> {
        let Built { machine, files, disks, template, shared } = self;
        let events = EventLoop::spawn_confined("devices")?;
        let (vsock, guest) = VsockDevice::new(u64::from(GUEST_CID), events.handle())?;
        let control = guest.listen(CONTROL_PORT)?;
        let streams = guest.listen(STREAM_PORT)?;
        let lookups = guest.listen(RESOLVER_PORT)?;
        let root = FsDevice::new(ROOTFS_TAG, files.serve_root(root)?)?;
        machine.plug(VSOCK_SLOT, Box::new(vsock))?;
        machine.plug(RNG_SLOT, Box::new(RngDevice::new(events.handle())))?;
        machine.plug(ROOTFS_SLOT, Box::new(root))?;
        // A loop of its own, which ends with the device: to give pages back takes the host a while, for which no packet
        // shall wait. The guest reports what is free by itself; nobody asks it for more.
        let (balloon, _) = BalloonDevice::new(EventLoop::spawn_confined("balloon")?.handle());
        machine.plug(BALLOON_SLOT, Box::new(balloon))?;
        for (slot, disk) in disk_slots(disks.len()).zip(disks) {
            machine.plug(slot, Box::new(BlockDevice::new(disk.device, disk.read_only)?))?;
        }
        if goes_on {
            // The connections of the guest that was captured.
            guest.reset_transport()?;
        }
        machine.start()?;
        if let Some(entry) = machine.timeline().kernel_entry {
            let phase = if goes_on { Phase::GuestResumed } else { Phase::KernelEntry };
            timeline.mark_at(phase, entry);
        }
        Ok(Booting { machine, control, streams, lookups, events, template, shared })
    }
}

/// Why the guest ended by itself, with the last lines of its kernel.
pub fn post_mortem(machine: &Machine) -> String {
    let why = match machine.exit_reason() {
        None => "the guest stopped answering".to_owned(),
        Some(ExitReason::Reset) => "the guest's kernel gave up".to_owned(),
        Some(ExitReason::Shutdown) => "the guest's processor shut down".to_owned(),
        Some(ExitReason::Error(words)) => format!("the virtual machine failed: {words}"),
    };
    with_last_lines(why, machine)
}

/// What to say of a guest that is up and does not start the container.
pub fn unanswered_start(machine: &Machine, patience: Option<Duration>) -> String {
    let seconds = patience.unwrap_or_default().as_secs();
    let why = format!("the guest is up, but has not started the container's process within {seconds} s");
    with_last_lines(why, machine)
}

fn with_last_lines(why: String, machine: &Machine) -> String {
    match last_lines(&machine.console()) {
        lines if lines.is_empty() => why,
        lines => format!("{why}; its last messages: {lines}"),
    }
}

/// The last lines that say something, and before them how the kernel's report of its end begins: the registers which
/// follow that are more lines than are shown. The console's bytes are the guest's, so control characters go.
fn last_lines(console: &str) -> String {
    let lines: Vec<_> =
        console.lines().map(|line| tame(line).trim().to_owned()).filter(|line| !line.is_empty()).collect();
    let last = lines.len().saturating_sub(LAST_LINES);
    let report = lines[..last].iter().position(|line| REPORTS.iter().any(|begin| line.contains(begin)));
    let begin = report.map_or(0..0, |first| first..last.min(first + FIRST_OF_REPORT));
    [&lines[begin], &lines[last..]].concat().join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_one_line_without_control_characters() {
        let console = "first\r\n\r\n\x1b[31msecond\r\n";
        assert_eq!(last_lines(console), "first | [31msecond");
        let many = (0..100).map(|number| format!("{number}\n")).collect::<String>();
        assert!(last_lines(&many).starts_with("88 | ") && last_lines(&many).ends_with("| 99"));
        assert_eq!(last_lines(""), "");
    }

    #[test]
    fn a_report_longer_than_the_last_lines_is_shown_with_its_beginning() {
        let registers = (0..30).map(|number| format!("register {number}\n")).collect::<String>();
        let console = format!("Booting\nOops: general protection fault\nCPU: 0\n{registers}Kernel panic\n");
        let lines = last_lines(&console);
        assert!(lines.starts_with(
            "Oops: general protection fault | CPU: 0 | register 0 | register 1 | register 19 | "
        ));
        assert!(lines.ends_with("| register 29 | Kernel panic"), "{lines}");
        let short = last_lines("Oops: 0000\nCPU: 0\nKernel panic\n");
        assert_eq!(short, "Oops: 0000 | CPU: 0 | Kernel panic");
    }
}
