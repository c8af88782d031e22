//! Which devices the container may use (`linux.resources.devices`), as a BPF program of its cgroup.
//!
//! The rules are those of runc: at first everything is denied, then the rules apply in their order, and after them
//! those that allow what every container needs. Each access (read, write, mknod) is decided by the last rule that
//! speaks of it, so the program goes through them from the last to the first.

use std::os::fd::OwnedFd;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::cgroup::Cgroup;
use crate::error::{Context, Result, other};
use crate::sys::bpf::{self, Hook, Instruction};

const MKNOD: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;

/// Far more than anybody writes, and far less than the kernel takes.
const MAX_RULES: usize = 4096;

/// A kind of device, by the kernel's number for it (`BPF_DEVCG_DEV_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Block = 1,
    Character = 2,
}

/// A rule; what is `None` matches everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<Kind>,
    major: Option<i32>,
    minor: Option<i32>,
    access: u8,
}

/// What every container may do, as with runc: make any device file, and use the devices that it has anyway.
const DEFAULT: [Rule; 10] = [
    default(Kind::Character, None, None, MKNOD),
    default(Kind::Block, None, None, MKNOD),
    // null, zero, full, random, urandom, tty
    default(Kind::Character, Some(1), Some(3), ALL),
    default(Kind::Character, Some(1), Some(5), ALL),
    default(Kind::Character, Some(1), Some(7), ALL),
    default(Kind::Character, Some(1), Some(8), ALL),
    default(Kind::Character, Some(1), Some(9), ALL),
    default(Kind::Character, Some(5), Some(0), ALL),
    // ptmx, and the terminals that it makes
    default(Kind::Character, Some(5), Some(2), ALL),
    default(Kind::Character, Some(136), None, ALL),
];

const fn default(kind: Kind, major: Option<i32>, minor: Option<i32>, access: u8) -> Rule {
    Rule { allow: true, kind: Some(kind), major, minor, access }
}

/// Puts the rules in force for a cgroup, in the place of those that were in force before. The program that is
/// returned is what the next rules replace.
pub fn enforce(cgroup: &Cgroup, rules: &[LinuxDeviceCgroup], earlier: Option<&OwnedFd>) -> Result<OwnedFd> {
    let rules: Vec<Rule> = rules.iter().map(translate).collect::<Result<_>>()?;
    if rules.len() > MAX_RULES {
        return Err(other(format!(
            "{} device rules are more than the {MAX_RULES} that are taken",
            rules.len()
        )));
    }
    let what = || "enforcing the device rules";
    let program = bpf::load_program(Hook::Device, &program(&rules)).context(what)?;
    bpf::attach_program(Hook::Device, cgroup.open_directory()?, &program, earlier).context(what)?;
    Ok(program)
}

fn translate(rule: &LinuxDeviceCgroup) -> Result<Rule> {
    let number = |value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => i32::try_from(value)
            .ok()
            .filter(|value| *value >= 0)
            .map(Some)
            .ok_or_else(|| other(format!("the device rule \"{rule}\" has a number that no device has"))),
    };
    let kind = match rule.typ().unwrap_or(LinuxDeviceType::A) {
        // As the kernel did for version 1, whatever else the rule says.
        LinuxDeviceType::A => {
            return Ok(Rule { allow: rule.allow(), kind: None, major: None, minor: None, access: ALL });
        }
        LinuxDeviceType::B => Kind::Block,
        LinuxDeviceType::C | LinuxDeviceType::U => Kind::Character,
        LinuxDeviceType::P => {
            return Err(other(format!("the device rule \"{rule}\" is about FIFOs, which are no devices")));
        }
    };
    Ok(Rule {
        allow: rule.allow(),
        kind: Some(kind),
        major: number(rule.major())?,
        minor: number(rule.minor())?,
        access: access(rule)?,
    })
}

fn access(rule: &LinuxDeviceCgroup) -> Result<u8> {
    let letters = rule.access().as_deref().unwrap_or_default();
    let bits = letters.chars().try_fold(0, |bits, letter| match letter {
        'r' => Some(bits | READ),
        'w' => Some(bits | WRITE),
        'm' => Some(bits | MKNOD),
        _ => None,
    });
    bits.filter(|bits| *bits != 0)
        .ok_or_else(|| other(format!("the device rule \"{rule}\" must name an access out of r, w and m")))
}

// Registers: the answer, the context, and what the context says of the access.
const ANSWER: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

// Operations (include/uapi/linux/bpf_common.h and bpf.h); those with immediate values end in K.
const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xbf;
const MOVE_K: u8 = 0xb7;
const AND_K: u8 = 0x54;
const SHIFT_RIGHT_K: u8 = 0x74;
const JUMP: u8 = 0x05;
const JUMP_IF_NOT_K: u8 = 0x55;
const JUMP_IF_ANY_K: u8 = 0x45;
const EXIT: u8 = 0x95;

const fn instruction(code: u8, register: u8, offset: i16, value: i32) -> Instruction {
    Instruction { code, registers: register, offset, value }
}

/// The program for the rules and the default ones.
fn program(rules: &[Rule]) -> Vec<Instruction> {
    let load = |register, offset| instruction(LOAD_WORD, CONTEXT << 4 | register, offset, 0);
    // struct bpf_cgroup_dev_ctx: the access in the upper half of the first word, the kind in the lower one.
    let mut program = vec![
        load(ACCESS, 0),
        instruction(MOVE, ACCESS << 4 | KIND, 0, 0),
        instruction(AND_K, KIND, 0, 0xffff),
        instruction(SHIFT_RIGHT_K, ACCESS, 0, 16),
        load(MAJOR, 4),
        load(MINOR, 8),
    ];
    for rule in rules.iter().chain(&DEFAULT).rev() {
        add(&mut program, rule);
    }
    program.extend(answer(false));
    program
}

fn answer(allow: bool) -> [Instruction; 2] {
    [instruction(MOVE_K, ANSWER, 0, allow.into()), instruction(EXIT, 0, 0, 0)]
}

/// What is allowed is taken off the access, and once nothing is left the answer is yes; the first denial of what is
/// left makes it no.
fn add(program: &mut Vec<Instruction>, rule: &Rule) {
    let conditions = [(KIND, rule.kind.map(|kind| kind as i32)), (MAJOR, rule.major), (MINOR, rule.minor)];
    let conditions: Vec<(u8, i32)> =
        conditions.into_iter().filter_map(|(register, value)| Some((register, value?))).collect();
    let access = i32::from(rule.access);
    let mut decision = match rule.allow {
        // There is no other access, so nothing can be left: the kernel has less to verify, at each start. Where nothing
        // else is asked either, what follows would be out of reach, and the kernel takes no such program.
        true if rule.access == ALL && !conditions.is_empty() => Vec::new(),
        true => vec![instruction(AND_K, ACCESS, 0, !access), instruction(JUMP_IF_NOT_K, ACCESS, 2, 0)],
        false => vec![instruction(JUMP_IF_ANY_K, ACCESS, 1, access), instruction(JUMP, 0, 2, 0)],
    };
    decision.extend(answer(rule.allow));
    for (index, (register, value)) in conditions.iter().enumerate() {
        let behind = conditions.len() - index - 1 + decision.len();
        // A rule has a handful of instructions.
        program.push(instruction(JUMP_IF_NOT_K, *register, behind as i16, *value));
    }
    program.extend(decision);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Runs a program as the kernel does.
    fn run(program: &[Instruction], kind: Kind, access: u8, major: i32, minor: i32) -> bool {
        let mut registers = [0i64; 6];
        let mut next = 0;
        loop {
            let Instruction { code, registers: pair, offset, value } = program[next];
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            next += 1;
            let jump = match code {
                LOAD_WORD => {
                    let context = [i64::from(access) << 16 | kind as i64, major.into(), minor.into()];
                    registers[to] = context[offset as usize / 4];
                    false
                }
                MOVE => {
                    registers[to] = registers[from];
                    false
                }
                MOVE_K => {
                    registers[to] = value.into();
                    false
                }
                AND_K => {
                    registers[to] &= i64::from(value as u32);
                    false
                }
                SHIFT_RIGHT_K => {
                    registers[to] >>= value;
                    false
                }
                JUMP => true,
                JUMP_IF_NOT_K => registers[to] != i64::from(value),
                JUMP_IF_ANY_K => registers[to] & i64::from(value) != 0,
                EXIT => return registers[0] == 1,
                _ => panic!("no such operation: {code}"),
            };
            if jump {
                next += offset as usize;
            }
        }
    }

    fn rules(json: &str) -> Vec<Rule> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        rules.iter().map(|rule| translate(rule).unwrap()).collect()
    }

    fn allows(json: &str, kind: Kind, access: u8, major: i32, minor: i32) -> bool {
        run(&program(&rules(json)), kind, access, major, minor)
    }

    #[test]
    fn without_rules_there_are_the_devices_of_every_container() {
        for (major, minor) in [(1, 3), (1, 9), (5, 0), (5, 2), (136, 7)] {
            assert!(allows("[]", Kind::Character, READ | WRITE, major, minor), "{major}:{minor}");
        }
        assert!(allows("[]", Kind::Block, MKNOD, 8, 0));
        assert!(!allows("[]", Kind::Block, READ, 8, 0));
        assert!(!allows("[]", Kind::Character, READ, 10, 229));
        assert!(!allows("[]", Kind::Block, READ, 1, 3), "not the character device of these numbers");
    }

    #[test]
    fn the_last_rule_wins() {
        let json = r#"[{ "allow": false, "access": "rwm" },
            { "allow": true, "type": "b", "major": 8, "access": "rw" },
            { "allow": false, "type": "b", "major": 8, "minor": 1, "access": "w" }]"#;
        assert!(allows(json, Kind::Block, READ | WRITE, 8, 0));
        assert!(allows(json, Kind::Block, READ, 8, 1));
        assert!(!allows(json, Kind::Block, READ | WRITE, 8, 1));
        assert!(!allows(json, Kind::Block, READ, 9, 0));
    }

    /// The kernel refuses a program with an instruction that nothing leads to.
    fn every_instruction_can_be_reached(program: &[Instruction]) -> bool {
        let mut reached = vec![false; program.len()];
        let mut open = vec![0];
        while let Some(index) = open.pop() {
            if std::mem::replace(&mut reached[index], true) {
                continue;
            }
            let Instruction { code, offset, .. } = program[index];
            let jumps = index + 1 + offset as usize;
            match code {
                EXIT => {}
                JUMP => open.push(jumps),
                JUMP_IF_NOT_K | JUMP_IF_ANY_K => open.extend([index + 1, jumps]),
                _ => open.push(index + 1),
            }
        }
        reached.iter().all(|reached| *reached)
    }

    #[test]
    fn a_privileged_container_may_use_everything() {
        let json = r#"[{ "allow": true, "access": "rwm" }]"#;
        assert!(allows(json, Kind::Block, ALL, 8, 0));
        assert!(allows(json, Kind::Character, ALL, 10, 200));
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for json in [
            r#"{ "allow": true, "type": "c" }"#,
            r#"{ "allow": true, "type": "c", "access": "rx" }"#,
            r#"{ "allow": true, "type": "p", "access": "r" }"#,
            r#"{ "allow": true, "type": "c", "major": -7, "access": "r" }"#,
            r#"{ "allow": true, "type": "c", "minor": 99999999999, "access": "r" }"#,
        ] {
            assert!(translate(&serde_json::from_str(json).unwrap()).is_err(), "{json}");
        }
    }

    prop_compose! {
        fn any_rule()(
            allow in any::<bool>(),
            kind in proptest::option::of(prop_oneof![Just(Kind::Block), Just(Kind::Character)]),
            major in proptest::option::of(0..3i32),
            minor in proptest::option::of(0..3i32),
            access in 1..=ALL,
        ) -> Rule {
            Rule { allow, kind, major, minor, access }
        }
    }

    proptest! {
        #[test]
        fn each_access_is_decided_by_the_last_rule_that_speaks_of_it(
            rules in proptest::collection::vec(any_rule(), 0..8),
            block in any::<bool>(),
            access in 1..=ALL,
            major in 0..3i32,
            minor in 0..3i32,
        ) {
            let kind = if block { Kind::Block } else { Kind::Character };
            let all: Vec<Rule> = rules.iter().chain(&DEFAULT).copied().collect();
            let expected = [MKNOD, READ, WRITE].into_iter().filter(|bit| access & bit != 0).all(|bit| {
                let speaks = |rule: &&Rule| {
                    rule.access & bit != 0
                        && rule.kind.is_none_or(|wanted| wanted == kind)
                        && rule.major.is_none_or(|wanted| wanted == major)
                        && rule.minor.is_none_or(|wanted| wanted == minor)
                };
                all.iter().rfind(speaks).is_some_and(|rule| rule.allow)
            });
            let program = program(&rules);
            prop_assert!(every_instruction_can_be_reached(&program));
            prop_assert_eq!(run(&program, kind, access, major, minor), expected);
        }
    }
}
