//! The boot: what a kernel expects to find in memory and registers when it is entered in 64-bit mode.
//!
//! The kernel is entered by the Linux 64-bit boot protocol (Documentation/arch/x86/boot.rst), which each x86-64
//! kernel has, as `vmlinux` and as `bzImage`: no firmware, no real mode, no decompression for a `vmlinux`.

mod command_line;
mod gdt;
mod kernel;
mod mptable;
mod page_tables;
mod params;

use std::fs::File;
use std::ops::Range;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

pub(crate) use self::gdt::{LIMIT as SEGMENT_LIMIT, TABLE as SEGMENTS};
use self::kernel::Kernel;
pub(crate) use self::page_tables::MAPPED;
use crate::shared_boot::{SharedBoot, SharedBootError};
use crate::touched::Touched;
use crate::{GuestMemory, layout};

/// Why the guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel's file is of no form that can be booted.
    #[error("the kernel is neither an x86-64 ELF file (vmlinux) nor a bzImage")]
    Format,
    /// The kernel's file could not be read.
    #[error("the kernel could not be read: {0}")]
    Read(#[from] std::io::Error),
    /// The kernel has no entry point for 64-bit mode.
    #[error(
        "the kernel is a bzImage without a 64-bit entry point: it is too old, or one for 32-bit processors"
    )]
    No64BitEntry,
    /// The kernel begins where nothing of it is.
    #[error("the kernel's entry point is outside of the kernel: the file is damaged")]
    EntryOutside,
    /// The kernel could not be put into memory.
    #[error("the kernel could not be loaded: {0}; is it damaged, or the guest's memory too small for it?")]
    Load(#[from] linux_loader::loader::Error),
    /// Not all of it fits.
    #[error(
        "a kernel of {kernel} KiB and an initramfs of {initramfs} KiB do not fit into the guest's memory"
    )]
    TooBig {
        /// Size of the kernel in memory.
        kernel: u64,
        /// Size of the initramfs.
        initramfs: u64,
    },
    /// The command line cannot be handed over.
    #[error("the kernel command line is longer than {max} bytes or holds characters other than printable ASCII: {0}",
        max = layout::COMMAND_LINE_SIZE)]
    CommandLine(linux_loader::cmdline::Error),
    /// What is kept of an earlier boot cannot be begun with.
    #[error(transparent)]
    Shared(#[from] SharedBootError),
    /// A table lies outside of the guest's memory.
    #[error("the guest's memory could not be written: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// What a machine boots.
#[derive(Debug)]
pub enum BootSource {
    /// These, for itself.
    Own(BootFiles),
    /// The same, and what others can share of it is recorded if the kernel is loaded as it is (an ELF file).
    Recorded(BootFiles),
    /// What was recorded.
    Shared(SharedBoot),
}

/// A kernel and its first file system.
#[derive(Debug)]
pub struct BootFiles {
    /// The kernel: an ELF `vmlinux` or a `bzImage`.
    pub kernel: File,
    /// The initramfs (cpio, compressed or not); may be empty.
    pub initramfs: Vec<u8>,
}

/// How it is booted.
pub(crate) struct Boot<'a> {
    pub(crate) source: &'a mut BootSource,
    /// To be added to the command line.
    pub(crate) command_line: &'a str,
    pub(crate) vcpus: u8,
    pub(crate) slots: u8,
}

/// A kernel that is loaded.
pub(crate) struct Loaded {
    /// Where to enter it.
    pub(crate) entry: GuestAddress,
    /// Where it is from its entry point on, if it stays there (an ELF file).
    pub(crate) stays: Option<Range<u64>>,
    /// Pages that the host has for it, and KVM can map at once.
    pub(crate) provided: Touched,
}

/// Puts all that the kernel needs into memory.
pub(crate) fn load(memory: &GuestMemory, boot: Boot<'_>) -> Result<Loaded, BootError> {
    let asks_for_text = !matches!(boot.source, BootSource::Own(_));
    let (kernel, initramfs, provided) = match boot.source {
        BootSource::Own(files) | BootSource::Recorded(files) => load_files(memory, files)?,
        BootSource::Shared(shared) => load_shared(memory, shared)?,
    };
    let command_line = command_line::build(boot.slots, asks_for_text, boot.command_line)?;
    linux_loader::loader::load_cmdline(&**memory, layout::COMMAND_LINE, &command_line)?;

    let params = params::build(memory, &kernel, &initramfs);
    memory.write_obj(params, layout::ZERO_PAGE)?;
    memory.write_slice(&mptable::pointer(), layout::MP_POINTER)?;
    memory.write_slice(&mptable::table(boot.vcpus, boot.slots), layout::MP_TABLE)?;
    memory.write_slice(&gdt::bytes(), layout::GDT)?;
    memory.write_slice(&page_tables::identity(layout::PAGE_TABLES), layout::PAGE_TABLES)?;
    let stays = kernel.setup_header.is_none().then_some(kernel.entry.0..kernel.end.0);
    Ok(Loaded { entry: kernel.entry, stays, provided })
}

fn load_files(
    memory: &GuestMemory,
    files: &mut BootFiles,
) -> Result<(Kernel, Range<u64>, Touched), BootError> {
    let kernel = kernel::load(memory, &mut files.kernel)?;
    let initramfs = kernel::place_initramfs(memory, &kernel, files.initramfs.len() as u64)?;
    memory.write_slice(&files.initramfs, GuestAddress(initramfs.start))?;
    Ok((kernel, initramfs, Touched::default()))
}

fn load_shared(
    memory: &GuestMemory,
    shared: &SharedBoot,
) -> Result<(Kernel, Range<u64>, Touched), BootError> {
    let kernel = Kernel::elf(shared.kernel());
    let initramfs = kernel::place_initramfs(memory, &kernel, shared.initramfs_length())?;
    let provided = shared.load(memory, initramfs.start)?;
    Ok((kernel, initramfs, provided))
}
