//! The seccomp filter of a process, which the host has compiled.

use rvm_protocol::SeccompProgram;

use crate::error::{Context, Result, other};
use crate::sys::process::install_filter;

/// Size of the kernel's `struct sock_filter`.
const INSTRUCTION: usize = 8;
/// `BPF_MAXINSNS`.
const MAX_INSTRUCTIONS: usize = 4096;
/// `SECCOMP_FILTER_FLAG_NEW_LISTENER`: there is nobody in the guest who could listen.
const NEW_LISTENER: u32 = 1 << 3;

/// Installs the filter in the calling process, for the rest of its life.
pub fn install(program: &SeccompProgram) -> Result<()> {
    if program.flags & NEW_LISTENER != 0 {
        return Err(other("seccomp notification is not supported in a virtual machine"));
    }
    let instructions = instructions(&program.filter)?;
    install_filter(&instructions, program.flags).context(|| "installing the seccomp filter")
}

fn instructions(bytes: &[u8]) -> Result<Vec<libc::sock_filter>> {
    let (chunks, rest) = bytes.as_chunks::<INSTRUCTION>();
    if chunks.is_empty() || !rest.is_empty() || chunks.len() > MAX_INSTRUCTIONS {
        return Err(other(format!(
            "the seccomp filter of {} bytes is none that a kernel takes",
            bytes.len()
        )));
    }
    Ok(chunks.iter().map(instruction).collect())
}

fn instruction(bytes: &[u8; INSTRUCTION]) -> libc::sock_filter {
    let [a, b, jt, jf, k @ ..] = *bytes;
    libc::sock_filter { code: u16::from_le_bytes([a, b]), jt, jf, k: u32::from_le_bytes(k) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_become_instructions() {
        // BPF_RET | BPF_K, SECCOMP_RET_ALLOW
        let instructions = instructions(&[0x06, 0, 1, 2, 0, 0, 0xff, 0x7f]).unwrap();
        let [only] = instructions.as_slice() else { panic!("one instruction") };
        assert_eq!((only.code, only.jt, only.jf, only.k), (6, 1, 2, 0x7fff_0000));
    }

    #[test]
    fn what_is_no_filter_is_refused() {
        for length in [0, 7, 9, (MAX_INSTRUCTIONS + 1) * INSTRUCTION] {
            assert!(instructions(&vec![0; length]).is_err(), "{length}");
        }
    }

    #[test]
    fn a_filter_that_wants_a_listener_is_refused() {
        let program = SeccompProgram { filter: vec![0; 8], flags: NEW_LISTENER };
        assert!(install(&program).unwrap_err().message.contains("not supported"));
    }
}
