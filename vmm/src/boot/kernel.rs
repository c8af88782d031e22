//! The kernel's image and the initramfs: where they go in memory.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion};

use super::{BootError, page_tables};
use crate::GuestMemory;
use crate::layout::HIGH_MEMORY;

/// How the ELF file of a 64-bit machine begins: with its signature and its class.
const ELF_64: [u8; 5] = *b"\x7fELF\x02";
/// `e_machine` of x86-64, and where it is.
const EM_X86_64: u16 = 62;
const E_MACHINE: usize = 18;

/// Offsets into a bzImage, and the signature at the first (Documentation/arch/x86/boot.rst).
const SETUP_SIGNATURE: (usize, &[u8; 4]) = (0x202, b"HdrS");
/// `xloadflags`: there is an entry point for 64-bit mode, at this offset from the load address.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;

/// Initramfs and kernel begin at pages.
const PAGE: u64 = 0x1000;

/// A kernel in memory.
pub(super) struct Kernel {
    /// Where to enter it in 64-bit mode.
    pub(super) entry: GuestAddress,
    /// The first address that it does not use, before it knows of its memory.
    pub(super) end: GuestAddress,
    /// The last address at which it can find an initramfs.
    pub(super) initramfs_max: GuestAddress,
    /// What a bzImage says of itself.
    pub(super) setup_header: Option<setup_header>,
}

impl Kernel {
    /// One that lies there from its entry point on, and stays.
    pub(super) fn elf(place: Range<u64>) -> Kernel {
        Kernel {
            entry: GuestAddress(place.start),
            end: GuestAddress(place.end),
            initramfs_max: GuestAddress(u64::MAX),
            setup_header: None,
        }
    }
}

/// Loads a kernel of either form.
pub(super) fn load(memory: &GuestMemory, file: &mut File) -> Result<Kernel, BootError> {
    let kernel = match format(file)? {
        Format::Elf => load_elf(memory, file)?,
        Format::BzImage => load_bzimage(memory, file)?,
    };
    if kernel.entry < HIGH_MEMORY || kernel.entry >= kernel.end {
        return Err(BootError::EntryOutside);
    }
    if kernel.end > page_tables::MAPPED {
        return Err(BootError::TooBig { kernel: kernel.end.0 >> 10, initramfs: 0 });
    }
    Ok(kernel)
}

/// The highest place for an initramfs: the kernel, which grows at its end, keeps its distance.
pub(super) fn place_initramfs(
    memory: &GuestMemory,
    kernel: &Kernel,
    size: u64,
) -> Result<Range<u64>, BootError> {
    let low_end = memory.iter().next().map_or(0, |region| region.last_addr().0 + 1);
    let end = low_end.min(kernel.initramfs_max.0.saturating_add(1));
    end.checked_sub(size)
        .map(|start| start - start % PAGE)
        .filter(|start| *start >= kernel.end.0)
        .map(|start| start..start + size)
        .ok_or_else(|| BootError::TooBig {
            kernel: kernel.end.0.saturating_sub(HIGH_MEMORY.0) >> 10,
            initramfs: size >> 10,
        })
}

enum Format {
    Elf,
    BzImage,
}

fn format(file: &File) -> Result<Format, BootError> {
    let mut start = [0; SETUP_SIGNATURE.0 + SETUP_SIGNATURE.1.len()];
    file.read_exact_at(&mut start, 0).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => BootError::Format,
        _ => BootError::Read(error),
    })?;
    let machine = u16::from_le_bytes([start[E_MACHINE], start[E_MACHINE + 1]]);
    if start.starts_with(&ELF_64) && machine == EM_X86_64 {
        Ok(Format::Elf)
    } else if start.ends_with(SETUP_SIGNATURE.1) {
        Ok(Format::BzImage)
    } else {
        Err(BootError::Format)
    }
}

fn load_elf(memory: &GuestMemory, file: &mut File) -> Result<Kernel, BootError> {
    let loaded = Elf::load(&**memory, None, file, Some(HIGH_MEMORY))?;
    Ok(Kernel::elf(loaded.kernel_load.0..loaded.kernel_end))
}

fn load_bzimage(memory: &GuestMemory, file: &mut File) -> Result<Kernel, BootError> {
    let loaded = BzImage::load(&**memory, None, file, Some(HIGH_MEMORY))?;
    let header = loaded.setup_header.ok_or(BootError::Format)?;
    let flags = header.xloadflags;
    if flags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry);
    }
    // It moves to the address that it prefers, and there it needs `init_size` bytes to unpack itself.
    let unpacked = loaded.kernel_load.0.max(header.pref_address).saturating_add(header.init_size.into());
    Ok(Kernel {
        entry: GuestAddress(loaded.kernel_load.0 + ENTRY_64),
        end: GuestAddress(unpacked.max(loaded.kernel_end)),
        initramfs_max: GuestAddress(header.initrd_addr_max.into()),
        setup_header: Some(header),
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    }

    /// An ELF file with one segment: `code`, at 16 MiB, with some zeroes behind it.
    fn elf(code: &[u8]) -> Vec<u8> {
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(16, 0);
        let half = |bytes: &mut Vec<u8>, value: u16| bytes.extend(value.to_le_bytes());
        let word = |bytes: &mut Vec<u8>, value: u32| bytes.extend(value.to_le_bytes());
        let long = |bytes: &mut Vec<u8>, value: u64| bytes.extend(value.to_le_bytes());
        half(&mut bytes, 2);
        half(&mut bytes, EM_X86_64);
        word(&mut bytes, 1);
        [16 * MIB, 64, 0].into_iter().for_each(|value| long(&mut bytes, value));
        word(&mut bytes, 0);
        [64, 56, 1, 64, 0, 0].into_iter().for_each(|value| half(&mut bytes, value));
        // The program header: PT_LOAD, executable.
        [1, 5].into_iter().for_each(|value| word(&mut bytes, value));
        let length = code.len() as u64;
        [0x1000, 16 * MIB, 16 * MIB, length, length + 0x1000, 0x1000]
            .into_iter()
            .for_each(|value| long(&mut bytes, value));
        bytes.resize(0x1000, 0);
        bytes.extend(code);
        bytes
    }

    /// A bzImage with one sector of setup code and `code` as what follows.
    fn bzimage(xloadflags: u16, code: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        bytes[0x1f1] = 1;
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        bytes[0x211] = 1;
        bytes[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
        bytes[0x22c..0x230].copy_from_slice(&0x01ff_ffff_u32.to_le_bytes());
        bytes[0x236..0x238].copy_from_slice(&xloadflags.to_le_bytes());
        bytes[0x258..0x260].copy_from_slice(&(16 * MIB).to_le_bytes());
        bytes[0x260..0x264].copy_from_slice(&(4 * MIB as u32).to_le_bytes());
        bytes.extend(code);
        bytes
    }

    fn memory() -> GuestMemory {
        crate::memory::create(64 * MIB).unwrap()
    }

    #[test]
    fn an_elf_kernel_goes_where_its_segments_say() {
        let memory = memory();
        let kernel = load(&memory, &mut file(&elf(b"\xf4code"))).unwrap();
        assert_eq!(kernel.entry, GuestAddress(16 * MIB));
        assert_eq!(kernel.end, GuestAddress(16 * MIB + 5 + 0x1000));
        assert_eq!(memory.read_obj::<[u8; 5]>(kernel.entry).unwrap(), *b"\xf4code");
    }

    #[test]
    fn a_bzimage_is_entered_behind_its_32_bit_code() {
        let memory = memory();
        let kernel = load(&memory, &mut file(&bzimage(XLF_KERNEL_64, b"code"))).unwrap();
        assert_eq!(kernel.entry, GuestAddress(MIB + 0x200));
        assert_eq!(kernel.end, GuestAddress(20 * MIB), "room to unpack itself");
        assert_eq!(kernel.initramfs_max, GuestAddress(0x01ff_ffff));
        assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(MIB)).unwrap(), *b"code");
    }

    #[test]
    fn kernels_of_other_kinds_are_refused() {
        let refused = |bytes: &[u8]| load(&memory(), &mut file(bytes)).err().unwrap();
        assert!(matches!(refused(&bzimage(0, b"code")), BootError::No64BitEntry));
        assert!(matches!(refused(b""), BootError::Format));
        assert!(matches!(refused(&[0; 4096]), BootError::Format));
        let mut other = elf(b"code");
        other[E_MACHINE] = 183;
        assert!(matches!(refused(&other), BootError::Format), "AArch64");
        other = elf(b"code");
        other[4] = 1;
        assert!(matches!(refused(&other), BootError::Format), "32 bits");
        other = elf(b"code");
        other[64] = 2;
        assert!(matches!(refused(&other), BootError::EntryOutside), "nothing to load");
        other = elf(b"code");
        other.truncate(0x1002);
        assert!(matches!(refused(&other), BootError::Load(_)), "cut short");
    }

    #[test]
    fn the_initramfs_lies_at_the_end_of_what_the_kernel_reaches() {
        let memory = memory();
        let mut kernel = load(&memory, &mut file(&elf(b"code"))).unwrap();
        assert_eq!(place_initramfs(&memory, &kernel, 4097).unwrap().start, 64 * MIB - 8192);
        kernel.initramfs_max = GuestAddress(32 * MIB - 1);
        assert_eq!(place_initramfs(&memory, &kernel, 4096).unwrap(), 32 * MIB - 4096..32 * MIB);
        for size in [17 * MIB, 64 * MIB, 1 << 40, u64::MAX] {
            assert!(matches!(place_initramfs(&memory, &kernel, size), Err(BootError::TooBig { .. })));
        }
    }

    proptest! {
        #[test]
        fn damaged_kernels_are_errors_and_nothing_worse(
            is_elf: bool,
            damage in proptest::collection::vec((0_usize..0x260, any::<u8>()), 1..8),
        ) {
            let mut bytes = if is_elf { elf(b"code") } else { bzimage(XLF_KERNEL_64, b"code") };
            for (offset, value) in damage {
                bytes[offset] = value;
            }
            let memory = crate::memory::create(32 * MIB).unwrap();
            if let Ok(kernel) = load(&memory, &mut file(&bytes)) {
                let _ = place_initramfs(&memory, &kernel, 4096);
            }
        }
    }
}
