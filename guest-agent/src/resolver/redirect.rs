//! Sends what goes to 127.0.0.11, port 53, to the port where the agent listens, and makes it look as if it were not so.
//!
//! dockerd does this with rules of the firewall in the container's namespace. Here programs of the guest's root cgroup
//! do it: port 53 stays free for a name server of the container's own, the container's firewall has no rules in it that it did
//! not make, and flushing them takes no names away. Namespaces that the container makes (Docker in Docker) have a
//! 127.0.0.11 of their own, so only sockets of the guest's first network namespace are meant.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;

use super::DOCKER;
use crate::sys::bpf::{self, Hook, Instruction};

// Registers.
const ANSWER: u8 = 0;
const CONTEXT: u8 = 1;
const VALUE: u8 = 2;
const WANTED: u8 = 3;
/// Kept over the call of a helper.
const KEPT: u8 = 6;

// Operations (include/uapi/linux/bpf_common.h and bpf.h); those with immediate values end in K.
const LOAD_WORD: u8 = 0x61;
const STORE_WORD: u8 = 0x63;
const LOAD_LONG_K: u8 = 0x18;
const MOVE: u8 = 0xbf;
const MOVE_K: u8 = 0xb7;
const JUMP_IF_NOT: u8 = 0x5d;
const JUMP_IF_NOT_K: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// `bpf_get_netns_cookie`.
const NAMESPACE_COOKIE: i32 = 122;

// Fields of `struct bpf_sock_addr`, in network order.
const ADDRESS: i16 = 4;
const PORT: i16 = 24;

/// The programs that redirect to one port.
pub struct Redirection([(Hook, OwnedFd); 4]);

impl Redirection {
    /// Makes the programs for sockets of a namespace. They are in force nowhere yet.
    pub fn new(namespace: u64, port: u16) -> nix::Result<Redirection> {
        let load = |hook, from, to| Ok((hook, bpf::load_program(hook, &program(namespace, from, to))?));
        let (docker, ours) = (DOCKER.port(), port);
        Ok(Redirection([
            load(Hook::Connect, docker, ours)?,
            load(Hook::Send, docker, ours)?,
            load(Hook::Receive, ours, docker)?,
            load(Hook::PeerName, ours, docker)?,
        ]))
    }

    /// Puts them into force for a cgroup and all below it, as long as there is that cgroup.
    pub fn enforce(&self, cgroup: &Path) -> io::Result<()> {
        let cgroup = File::open(cgroup)?;
        for (hook, program) in &self.0 {
            bpf::attach_program(*hook, &cgroup, program, None)?;
        }
        Ok(())
    }
}

/// The kernel's name for the network namespace of a socket.
pub fn namespace_of(socket: impl AsFd) -> nix::Result<u64> {
    let (mut cookie, mut length) = (0_u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: the option is a number of 64 bits, as `cookie` is, and `length` says so.
    let result = unsafe {
        let fd = socket.as_fd().as_raw_fd();
        libc::getsockopt(fd, libc::SOL_SOCKET, SO_NETNS_COOKIE, (&raw mut cookie).cast(), &raw mut length)
    };
    Errno::result(result)?;
    Ok(cookie)
}

/// asm-generic/socket.h
const SO_NETNS_COOKIE: libc::c_int = 71;

/// The program that replaces one port of Docker's address by another.
fn program(namespace: u64, from: u16, to: u16) -> Vec<Instruction> {
    let one = |code, to: u8, from: u8, offset, value| Instruction {
        code,
        registers: from << 4 | to,
        offset,
        value,
    };
    let network_order = |port: u16| i32::from(port.to_be());
    let address: Ipv4Addr = *DOCKER.ip();
    let mut program = vec![
        one(MOVE, KEPT, CONTEXT, 0, 0),
        one(LOAD_WORD, VALUE, KEPT, ADDRESS, 0),
        one(JUMP_IF_NOT_K, VALUE, 0, 8, u32::from_ne_bytes(address.octets()).cast_signed()),
        one(LOAD_WORD, VALUE, KEPT, PORT, 0),
        one(JUMP_IF_NOT_K, VALUE, 0, 6, network_order(from)),
        one(CALL, 0, 0, 0, NAMESPACE_COOKIE),
        // The upper half of the number is in the place of a second instruction.
        one(LOAD_LONG_K, WANTED, 0, 0, namespace as i32),
        one(0, 0, 0, 0, (namespace >> 32) as i32),
        one(JUMP_IF_NOT, ANSWER, WANTED, 2, 0),
        one(MOVE_K, VALUE, 0, 0, network_order(to)),
        one(STORE_WORD, KEPT, VALUE, PORT, 0),
    ];
    // Go on, whatever it was.
    program.extend([one(MOVE_K, ANSWER, 0, 0, 1), one(EXIT, 0, 0, 0, 0)]);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_out_of_the_program_leads_to_its_end() {
        let program = program(0x1234_5678_9abc_def0, 53, 40_000);
        let end = program.len() - 2;
        for (at, instruction) in program.iter().enumerate() {
            if matches!(instruction.code, JUMP_IF_NOT | JUMP_IF_NOT_K) {
                assert_eq!(at + 1 + instruction.offset as usize, end, "{instruction:?}");
            }
        }
        assert_eq!((program[6].value, program[7].value), (0x9abc_def0_u32.cast_signed(), 0x1234_5678));
    }

    #[test]
    fn sockets_of_one_namespace_have_its_cookie() {
        let [one, other] = [(); 2].map(|()| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        assert_eq!(namespace_of(&one).unwrap(), namespace_of(&other).unwrap());
    }
}
