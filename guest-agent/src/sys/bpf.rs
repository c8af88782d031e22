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
/// Programs of the cgroups below are asked as well.
const ALLOW_MULTI: u32 = 2;
const REPLACE: u32 = 4;

/// What a program is asked about, by the kernel's numbers (`enum bpf_prog_type` and `bpf_attach_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// An access to a device.
    Device,
    /// The address that a socket of IPv4 is about to connect to.
    Connect,
    /// The address that a datagram of IPv4 is about to be sent to.
    Send,
    /// The address that a datagram of IPv4 has come from.
    Receive,
    /// The address that a socket of IPv4 is connected to.
    PeerName,
}

impl Hook {
    fn program_type(self) -> u32 {
        match self {
            Hook::Device => 15,
            _ => 18,
        }
    }

    fn attach_type(self) -> u32 {
        match self {
            Hook::Device => 6,
            Hook::Connect => 10,
            Hook::Send => 14,
            Hook::Receive => 19,
            Hook::PeerName => 29,
        }
    }
}

/// Loads a program for a hook.
pub fn load_program(hook: Hook, instructions: &[Instruction]) -> nix::Result<OwnedFd> {
    /// The fields of `union bpf_attr` for loading, up to the last that is used.
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log: [u64; 2],
        version_and_flags: [u32; 2],
        name: [u8; 16],
        interface: u32,
        attach_type: u32,
    }
    let load = Load {
        kind: hook.program_type(),
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log: [0; 2],
        version_and_flags: [0; 2],
        name: [0; 16],
        interface: 0,
        attach_type: hook.attach_type(),
    };
    // SAFETY: `load` names `count` instructions and a C string, which the kernel only reads, and is passed with its
    // size.
    descriptor(unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const load, size_of::<Load>()) })
}

/// Attaches a program to a cgroup, in the place of an earlier one if there is one.
pub fn attach_program(
    hook: Hook,
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
        kind: hook.attach_type(),
        flags: ALLOW_MULTI | if earlier.is_some() { REPLACE } else { 0 },
        replaced: earlier.map_or(0, |earlier| earlier.as_raw_fd()),
    };
    // SAFETY: the descriptors are open for the whole call, and `attach` is passed with its size.
    check(unsafe { libc::syscall(libc::SYS_bpf, PROG_ATTACH, &raw const attach, size_of::<Attach>()) })
}
