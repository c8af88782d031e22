//! A seccomp filter as the kernel has it: which system calls can get through, whatever their arguments are.
//!
//! Such a filter is a program without loops. Where it looks at anything but the call's number, both of what it can find
//! are followed.

use std::collections::HashSet;

use libseccomp::{ScmpArch, ScmpSyscall};

/// No system call of x86-64 has a higher number.
const NUMBERS: u32 = 1024;
/// x86-64 in `struct seccomp_data` (linux/audit.h).
const ARCHITECTURE: u32 = 0xc000_003e;
/// What a filter answers in its upper half if the call is made (linux/seccomp.h).
const ALLOWED: [u32; 2] = [0x7fff_0000, 0x7ffc_0000];
/// Words that a program may keep (`BPF_MEMWORDS`).
const WORDS: usize = 16;

/// One instruction (`struct sock_filter`).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Instruction {
    code: u16,
    if_true: u8,
    if_false: u8,
    value: u32,
}

/// The numbers of all system calls of x86-64 that have a name.
pub fn all_calls() -> Vec<u32> {
    let has_name = |number: &u32| {
        let call = i32::try_from(*number).map(ScmpSyscall::from);
        call.is_ok_and(|call| call.get_name_by_arch(ScmpArch::X8664).is_ok())
    };
    (0..NUMBERS).filter(has_name).collect()
}

/// Whether a call can get through a filter with some arguments. None if it has instructions that no filter has.
pub fn may_pass(filter: &[Instruction], call: u32) -> Option<bool> {
    let mut seen = HashSet::new();
    let mut waiting = vec![State::default()];
    while let Some(state) = waiting.pop() {
        if !seen.insert(state) {
            continue;
        }
        match state.step(*filter.get(state.next)?, call)? {
            Next::Go(states) => waiting.extend(states),
            Next::Answer(answer) if answer.is_none_or(|it| ALLOWED.contains(&(it & 0xffff_0000))) => {
                return Some(true);
            }
            Next::Answer(_) => {}
        }
    }
    Some(false)
}

/// A program under way. What depends on arguments is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct State {
    next: usize,
    accumulator: Option<u32>,
    index: Option<u32>,
    words: [Option<u32>; WORDS],
}

/// What an instruction leads to.
enum Next {
    Go(Vec<State>),
    Answer(Option<u32>),
}

impl State {
    /// Classes of instructions and their variants are those of linux/bpf_common.h.
    fn step(mut self, instruction: Instruction, call: u32) -> Option<Next> {
        let Instruction { code, value, .. } = instruction;
        self.next += 1;
        match code & 0x07 {
            0x00 => self.accumulator = self.loaded(code, value, call)?,
            0x01 => self.index = self.loaded(code, value, call)?,
            0x02 => *self.words.get_mut(value as usize)? = self.accumulator,
            0x03 => *self.words.get_mut(value as usize)? = self.index,
            0x04 => self.accumulator = self.calculated(code, value)?,
            0x05 => return self.jump(instruction),
            0x06 => {
                return Some(Next::Answer(if code & 0x18 == 0x10 { self.accumulator } else { Some(value) }));
            }
            _ if code & 0xf8 == 0x80 => self.accumulator = self.index,
            _ => self.index = self.accumulator,
        }
        Some(Next::Go(vec![self]))
    }

    fn loaded(&self, code: u16, value: u32, call: u32) -> Option<Option<u32>> {
        match code & 0xe0 {
            0x00 => Some(Some(value)),
            // From `struct seccomp_data`.
            0x20 => Some(match value {
                0 => Some(call),
                4 => Some(ARCHITECTURE),
                _ => None,
            }),
            0x60 => self.words.get(value as usize).copied(),
            // The length of that.
            0x80 => Some(Some(64)),
            _ => None,
        }
    }

    fn operand(&self, code: u16, value: u32) -> Option<u32> {
        if code & 0x08 == 0 { Some(value) } else { self.index }
    }

    fn calculated(&self, code: u16, value: u32) -> Option<Option<u32>> {
        let operand = self.operand(code, value);
        let both = |calculate: fn(u32, u32) -> Option<u32>| {
            Some(self.accumulator.zip(operand).and_then(|(left, right)| calculate(left, right)))
        };
        match code & 0xf0 {
            0x00 => both(|left, right| Some(left.wrapping_add(right))),
            0x10 => both(|left, right| Some(left.wrapping_sub(right))),
            0x20 => both(|left, right| Some(left.wrapping_mul(right))),
            0x30 => both(u32::checked_div),
            0x40 => both(|left, right| Some(left | right)),
            0x50 => both(|left, right| Some(left & right)),
            0x60 => both(u32::checked_shl),
            0x70 => both(u32::checked_shr),
            0x80 => Some(self.accumulator.map(u32::wrapping_neg)),
            0xa0 => both(|left, right| Some(left ^ right)),
            _ => None,
        }
    }

    /// Where it goes on when so many instructions are left out.
    fn after(mut self, distance: usize) -> State {
        self.next = self.next.saturating_add(distance);
        self
    }

    fn jump(self, instruction: Instruction) -> Option<Next> {
        let Instruction { code, if_true, if_false, value } = instruction;
        let known = self.accumulator.zip(self.operand(code, value));
        let holds = match code & 0xf0 {
            0x00 => return Some(Next::Go(vec![self.after(value as usize)])),
            0x10 => known.map(|(left, right)| left == right),
            0x20 => known.map(|(left, right)| left > right),
            0x30 => known.map(|(left, right)| left >= right),
            0x40 => known.map(|(left, right)| left & right != 0),
            _ => return None,
        };
        let (yes, no) = (self.after(if_true.into()), self.after(if_false.into()));
        Some(Next::Go(match holds {
            Some(true) => vec![yes],
            Some(false) => vec![no],
            None => vec![yes, no],
        }))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use oci_spec::runtime::LinuxSeccomp;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn parsed(bytes: &[u8]) -> Vec<Instruction> {
        let instructions = bytes.chunks_exact(8).map(|bytes| Instruction {
            code: u16::from_ne_bytes([bytes[0], bytes[1]]),
            if_true: bytes[2],
            if_false: bytes[3],
            value: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        });
        instructions.collect()
    }

    #[test]
    fn what_a_profile_lets_through_is_found_in_its_filter() {
        let profile: LinuxSeccomp = serde_json::from_value(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [
                { "names": ["read", "write"], "action": "SCMP_ACT_ALLOW" },
                { "names": ["clone"], "action": "SCMP_ACT_LOG" },
                { "names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 },
                { "names": ["personality"], "action": "SCMP_ACT_ALLOW",
                  "args": [{ "index": 0, "value": 8, "op": "SCMP_CMP_EQ" }] },
            ],
        }))
        .unwrap();
        let filter = parsed(&crate::seccomp::compile(&profile).unwrap().unwrap().filter);
        let passing = all_calls().into_iter().filter(|call| may_pass(&filter, *call).unwrap());
        let expected = [libc::SYS_read, libc::SYS_write, libc::SYS_clone, libc::SYS_personality];
        assert_eq!(passing.map(i64::from).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn x86_64_has_some_hundreds_of_calls() {
        let calls = all_calls();
        assert!((300..600).contains(&calls.len()), "{}", calls.len());
        assert!(calls.contains(&(libc::SYS_io_uring_setup as u32)));
    }

    proptest! {
        #[test]
        fn no_program_causes_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), call: u32) {
            let _ = may_pass(&parsed(&bytes), call);
        }
    }
}
