//! Loading BPF programs for cgroups, by bpf(2) itself.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::{check, descriptor};

/// An instruction, as the kernel's `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What it does.
    pub code: u8,
    /// The destination register, and in the upper half the source register.
    pub registers: u8,
    /// Offset of a jump or of an access to memory.
    pub offset: i16,
    /// An immediate value.
    pub value: i32,
}

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
/// `BPF_PROG_TYPE_CGROUP_DEVICE`.
const TYPE: u32 = 15;
/// `BPF_CGROUP_DEVICE`.
const ATTACH_TYPE: u32 = 6;
/// Programs of the cgroups below are asked as well.
const ALLOW_MULTI: u32 = 2;
const REPLACE: u32 = 4;

/// Loads a program that decides on accesses to devices.
pub fn load_device_program(instructions: &[Instruction]) -> nix::Result<OwnedFd> {
    /// The fields of `union bpf_attr` for loading, as far as they are used; the kernel takes the rest as zero.
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
    }
    let load = Load {
        kind: TYPE,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
    };
    // SAFETY: `load` names `count` instructions and a C string, which the kernel only reads, and is passed with its
    // size.
    descriptor(unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const load, size_of::<Load>()) })
}

/// Attaches a program to a cgroup, in the place of an earlier one if there is one.
pub fn attach_device_program(
    cgroup: impl AsFd,
    program: impl AsFd,
    earlier: Option<&OwnedFd>,
) -> nix::Result<()> {
    #[repr(C)]
    struct Attach {
        target: i32,
        program: i32,
        kind: u32,
        flags: u32,
        replaced: i32,
    }
    let attach = Attach {
        target: cgroup.as_fd().as_raw_fd(),
        program: program.as_fd().as_raw_fd(),
        kind: ATTACH_TYPE,
        flags: ALLOW_MULTI | if earlier.is_some() { REPLACE } else { 0 },
        replaced: earlier.map_or(0, |earlier| earlier.as_raw_fd()),
    };
    // SAFETY: the descriptors are open for the whole call, and `attach` is passed with its size.
    check(unsafe { libc::syscall(libc::SYS_bpf, PROG_ATTACH, &raw const attach, size_of::<Attach>()) })
}
