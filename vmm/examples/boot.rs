//! Boots a kernel with an initramfs, shows what it writes to its console, and when each phase of the start was over.
//!
//! ```text
//! cargo run --example boot -- vmlinux initramfs.cpio [vCPUs [MiB [command line]]]
//! ```
//!
//! The initramfs should end by a reset (`reboot -f`). Messages of the kernel are shown with `debug` as the command
//! line. A device of random numbers is in slot 1.

use std::env;
use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rvm_vmm::event_loop::EventLoop;
use rvm_vmm::virtio::rng::RngDevice;
use rvm_vmm::{BootFiles, BootSource, Machine, MachineConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [kernel, initramfs, options @ ..] = arguments.as_slice() else {
        return Err("usage: boot KERNEL INITRAMFS [VCPUS [MIB [COMMAND LINE]]]".into());
    };
    let option = |index: usize, default: &str| options.get(index).map_or(default, String::as_str).to_owned();

    let start = Instant::now();
    let machine = Machine::new(MachineConfig {
        vcpus: option(0, "1").parse()?,
        memory: option(1, "256").parse::<u64>()? << 20,
        source: BootSource::Own(BootFiles { kernel: File::open(kernel)?, initramfs: fs::read(initramfs)? }),
        command_line: option(2, ""),
        slots: 4,
    })?;
    let first_message = Arc::new(OnceLock::new());
    machine.mirror_console(Box::new(Screen { first_message: first_message.clone() }));
    let events = EventLoop::spawn_confined("devices")?;
    machine.plug(1, Box::new(RngDevice::new(events.handle())))?;
    machine.start()?;

    poll(&mut [PollFd::new(machine.exit_event(), PollFlags::POLLIN)], PollTimeout::NONE)?;
    let end = Instant::now();
    machine.stop();

    let timeline = machine.timeline();
    let report = |what: &str, instant: Instant| {
        eprintln!("{:9.3} ms  {what}", instant.duration_since(start).as_secs_f64() * 1e3);
    };
    report("KVM ready", timeline.kvm_ready);
    report("kernel loaded", timeline.kernel_loaded);
    timeline.kernel_entry.into_iter().for_each(|instant| report("kernel entered", instant));
    first_message.get().into_iter().for_each(|instant| report("first message", *instant));
    report("end", end);
    eprintln!("{:?} after {} exits to user space", machine.exit_reason(), machine.exits());
    kvm_counters().into_iter().for_each(|counter| eprintln!("{counter}"));
    Ok(())
}

/// What KVM counted for the machine of this process, where debugfs is mounted.
fn kvm_counters() -> Vec<String> {
    let own = format!("{}-", std::process::id());
    let machines = fs::read_dir("/sys/kernel/debug/kvm").into_iter().flatten().flatten();
    let own = machines.filter(|entry| entry.file_name().to_string_lossy().starts_with(&own));
    let counters = own.flat_map(|machine| fs::read_dir(machine.path()).into_iter().flatten().flatten());
    let lines = counters.filter_map(|counter| {
        let value = fs::read_to_string(counter.path()).ok()?;
        let count: u64 = value.trim().parse().ok().filter(|count| *count > 0)?;
        Some(format!("{count:12}  {}", counter.file_name().to_string_lossy()))
    });
    lines.collect()
}

/// Standard output, with the time of the first message.
struct Screen {
    first_message: Arc<OnceLock<Instant>>,
}

impl Write for Screen {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.first_message.get_or_init(Instant::now);
        io::stdout().write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}
