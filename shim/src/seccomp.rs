//! Seccomp profiles: compiled here, on the host, and enforced in the guest.
//!
//! The rules are those of runc, so that a profile written for it means the same: names that libseccomp does not
//! know are left out, several conditions on one argument are alternatives, and a system call that is newer than
//! all that a refusing profile names answers "not implemented", for which programs have a way around, rather
//! than the profile's error, for which they have none.

use std::fs::File;
use std::io::{self, Read, Seek};

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
    LinuxSyscall,
};
use rvm_protocol::SeccompProgram;

/// Flags of `seccomp(2)`, from linux/seccomp.h.
const FLAG_LOG: u32 = 1 << 1;
const FLAG_SPEC_ALLOW: u32 = 1 << 2;

/// The two architectures of an x86-64 guest, with their number in `struct seccomp_data` (linux/audit.h).
const GUEST_ARCHITECTURES: [(ScmpArch, u32); 2] =
    [(ScmpArch::X8664, 0xc000_003e), (ScmpArch::X86, 0x4000_0003)];

/// Number of the first x32 system call (asm/unistd.h): they share x86-64's architecture number.
const FIRST_X32_CALL: u32 = 0x4000_0000;

/// Why a profile could not be compiled.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The profile notifies a process of the host.
    #[error(
        "the seccomp action SCMP_ACT_NOTIFY cannot be used: its listener would be on the host, outside the microVM"
    )]
    Notify,
    /// A rule looks at an argument that no system call has.
    #[error("the seccomp rule for {call} looks at argument {index}, but system calls have arguments 0 to 5")]
    Argument {
        /// The rule's first system call.
        call: String,
        /// The argument's index.
        index: usize,
    },
    /// An action returns a number that does not fit its field.
    #[error("the seccomp profile has an action return {0}, but errno values end at 65535")]
    ReturnValue(u32),
    /// libseccomp refused.
    #[error("the seccomp profile could not be compiled: {0}")]
    Compile(#[from] libseccomp::error::SeccompError),
    /// The compiled filter could not be read back.
    #[error("the compiled seccomp profile could not be read: {0}")]
    Read(#[from] io::Error),
}

/// Compiles a profile; nothing for one that allows everything.
pub fn compile(profile: &LinuxSeccomp) -> Result<Option<SeccompProgram>, SeccompError> {
    let rules = profile.syscalls().as_deref().unwrap_or_default();
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    if default == ScmpAction::Allow && rules.is_empty() {
        return Ok(None);
    }
    let mut context = ScmpFilterContext::new(default)?;
    // The agent sets no_new_privs itself, where the container asks for it.
    context.set_ctl_nnp(false)?;
    for architecture in profile.architectures().iter().flatten() {
        add_architecture(&mut context, *architecture)?;
    }
    for rule in rules {
        add_rule(&mut context, rule, default)?;
    }
    let mut filter = if refuses(default) { unknown_calls_prologue(profile, rules) } else { Vec::new() };
    filter.extend(instructions(&context)?);
    Ok(Some(SeccompProgram { filter, flags: flags(profile) }))
}

/// The compiled filter, by way of a file in memory, which is how libseccomp gives it out.
fn instructions(context: &ScmpFilterContext) -> Result<Vec<u8>, SeccompError> {
    let fd = memfd_create("seccomp", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from)?;
    let mut file = File::from(fd);
    context.export_bpf(&file)?;
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, SeccompError> {
    let errno = errno.unwrap_or(libc::EPERM as u32);
    // The library would cut it short.
    let narrow = u16::try_from(errno).map_err(|_| SeccompError::ReturnValue(errno));
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(narrow?.into()),
        LinuxSeccompAction::ScmpActNotify => return Err(SeccompError::Notify),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(narrow?),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
    })
}

/// Architectures that an x86-64 guest cannot run need no rules: the kernel never sees a call of theirs.
fn add_architecture(context: &mut ScmpFilterContext, architecture: Arch) -> Result<(), SeccompError> {
    let known = match architecture {
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        _ => return Ok(()),
    };
    context.add_arch(known)?;
    Ok(())
}

fn add_rule(
    context: &mut ScmpFilterContext,
    rule: &LinuxSyscall,
    default: ScmpAction,
) -> Result<(), SeccompError> {
    let action = action(rule.action(), rule.errno_ret())?;
    if action == default {
        return Ok(());
    }
    let conditions = conditions(rule)?;
    for name in rule.names() {
        let Ok(call) = ScmpSyscall::from_name(name) else { continue };
        if conditions.is_empty() {
            context.add_rule(action, call)?;
        } else if one_each(rule.args().as_deref().unwrap_or_default()) {
            context.add_rule_conditional(action, call, &conditions)?;
        } else {
            // libseccomp takes one condition an argument in a rule, so several become alternatives.
            for condition in &conditions {
                context.add_rule_conditional(action, call, &[*condition])?;
            }
        }
    }
    Ok(())
}

fn conditions(rule: &LinuxSyscall) -> Result<Vec<ScmpArgCompare>, SeccompError> {
    rule.args().iter().flatten().map(|argument| condition(rule, argument)).collect()
}

fn condition(rule: &LinuxSyscall, argument: &LinuxSeccompArg) -> Result<ScmpArgCompare, SeccompError> {
    let index = argument.index();
    if index > 5 {
        let call = rule.names().first().cloned().unwrap_or_default();
        return Err(SeccompError::Argument { call, index });
    }
    let (operator, value) = match argument.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, argument.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, argument.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, argument.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, argument.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, argument.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, argument.value()),
        // The spec's `value` is the mask here, and `valueTwo` what the masked argument has to equal.
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            (ScmpCompareOp::MaskedEqual(argument.value()), argument.value_two().unwrap_or(0))
        }
    };
    Ok(ScmpArgCompare::new(index as u32, operator, value))
}

fn one_each(arguments: &[LinuxSeccompArg]) -> bool {
    let mut seen = [false; 6];
    arguments.iter().all(|argument| !std::mem::replace(&mut seen[argument.index().min(5)], true))
}

fn refuses(default: ScmpAction) -> bool {
    !matches!(default, ScmpAction::Allow | ScmpAction::Log | ScmpAction::Trace(_))
}

/// Instructions that answer ENOSYS to calls which are newer than any that the profile names.
fn unknown_calls_prologue(profile: &LinuxSeccomp, rules: &[LinuxSyscall]) -> Vec<u8> {
    let mut program = Vec::new();
    for (architecture, audit) in GUEST_ARCHITECTURES {
        let native = architecture == ScmpArch::X8664;
        let covered =
            native || profile.architectures().iter().flatten().any(|arch| *arch == Arch::ScmpArchX86);
        let newest = rules
            .iter()
            .flat_map(LinuxSyscall::names)
            .filter_map(|name| ScmpSyscall::from_name_by_arch(name, architecture).ok())
            .filter_map(|call| u32::try_from(call.as_raw_syscall()).ok())
            .max();
        let Some(newest) = newest.filter(|_| covered) else { continue };
        program.extend([
            bpf::load(bpf::ARCHITECTURE),
            bpf::jump_if_equal(audit, 0, 4),
            bpf::load(bpf::CALL),
            bpf::jump_if_at_least(FIRST_X32_CALL, 2, 0),
            bpf::jump_if_greater(newest, 0, 1),
            bpf::give(bpf::RETURN_ERRNO | libc::ENOSYS as u32),
        ]);
    }
    program.concat()
}

fn flags(profile: &LinuxSeccomp) -> u32 {
    let Some(flags) = profile.flags() else { return FLAG_SPEC_ALLOW };
    flags.iter().fold(0, |sum, flag| {
        sum | match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => FLAG_SPEC_ALLOW,
            // The filter is loaded by a process of one thread, and without a listener nothing waits.
            _ => 0,
        }
    })
}

/// The few instructions of classic BPF (linux/filter.h) that the prologue needs, as `struct sock_filter`.
mod bpf {
    /// Offsets into `struct seccomp_data` (linux/seccomp.h).
    pub const CALL: u32 = 0;
    pub const ARCHITECTURE: u32 = 4;
    /// `SECCOMP_RET_ERRNO`.
    pub const RETURN_ERRNO: u32 = 0x0005_0000;

    pub fn load(offset: u32) -> [u8; 8] {
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
    }

    pub fn jump_if_equal(value: u32, yes: u8, no: u8) -> [u8; 8] {
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, yes, no, value)
    }

    pub fn jump_if_at_least(value: u32, yes: u8, no: u8) -> [u8; 8] {
        instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, yes, no, value)
    }

    pub fn jump_if_greater(value: u32, yes: u8, no: u8) -> [u8; 8] {
        instruction(libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K, yes, no, value)
    }

    pub fn give(value: u32) -> [u8; 8] {
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, value)
    }

    fn instruction(code: u32, yes: u8, no: u8, value: u32) -> [u8; 8] {
        let code = (code as u16).to_le_bytes();
        let value = value.to_le_bytes();
        [code[0], code[1], yes, no, value[0], value[1], value[2], value[3]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(json: serde_json::Value) -> LinuxSeccomp {
        serde_json::from_value(json).unwrap()
    }

    /// What the kernel would answer: a tiny interpreter of the instructions that libseccomp emits.
    fn answer(program: &SeccompProgram, call: u32, argument: u64) -> u32 {
        let mut data = Vec::new();
        data.extend(call.to_le_bytes());
        data.extend(GUEST_ARCHITECTURES[0].1.to_le_bytes());
        data.extend(0_u64.to_le_bytes());
        data.extend(argument.to_le_bytes());
        data.resize(64, 0);
        let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let (mut accumulator, mut next) = (0_u32, 0_usize);
        loop {
            let instruction = &program.filter[next * 8..next * 8 + 8];
            let code = u32::from(u16::from_le_bytes([instruction[0], instruction[1]]));
            let value = word(instruction, 4);
            next += 1;
            let holds = match code & 0xf7 {
                0x20 => {
                    accumulator = word(&data, value as usize);
                    continue;
                }
                0x54 => {
                    accumulator &= value;
                    continue;
                }
                0x06 => return value,
                0x15 => accumulator == value,
                0x25 => accumulator > value,
                0x35 => accumulator >= value,
                other => panic!("instruction {other:#x}"),
            };
            next += usize::from(if holds { instruction[2] } else { instruction[3] });
        }
    }

    const ALLOW: u32 = 0x7fff_0000;

    fn errno(number: i32) -> u32 {
        bpf::RETURN_ERRNO | number as u32
    }

    #[test]
    fn a_refusing_profile_allows_what_it_names() {
        let program = compile(&profile(serde_json::json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
            "syscalls": [
                {"names": ["read", "clone3", "no-such-call"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["write"], "action": "SCMP_ACT_ERRNO", "errnoRet": 77},
            ],
        })))
        .unwrap()
        .unwrap();
        assert_eq!(answer(&program, libc::SYS_read as u32, 0), ALLOW);
        assert_eq!(answer(&program, libc::SYS_write as u32, 0), errno(77));
        assert_eq!(answer(&program, libc::SYS_open as u32, 0), errno(libc::EPERM));
        assert_eq!(answer(&program, 9999, 0), errno(libc::ENOSYS), "newer than clone3");
    }

    #[test]
    fn an_argument_decides() {
        let program = compile(&profile(serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{
                "names": ["socket"],
                "action": "SCMP_ACT_ERRNO",
                "errnoRet": 97,
                "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_EQ"}],
            }, {
                "names": ["personality"],
                "action": "SCMP_ACT_ERRNO",
                "args": [{"index": 0, "value": 0xff, "valueTwo": 8, "op": "SCMP_CMP_MASKED_EQ"}],
            }],
        })))
        .unwrap()
        .unwrap();
        assert_eq!(answer(&program, libc::SYS_socket as u32, 40), errno(97));
        assert_eq!(answer(&program, libc::SYS_socket as u32, 2), ALLOW);
        assert_eq!(answer(&program, libc::SYS_personality as u32, 0x1108), errno(libc::EPERM));
        assert_eq!(answer(&program, libc::SYS_personality as u32, 0x1109), ALLOW);
        assert_eq!(answer(&program, 9999, 0), ALLOW, "an allowing profile leaves new calls alone");
    }

    #[test]
    fn conditions_on_one_argument_are_alternatives() {
        let program = compile(&profile(serde_json::json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{
                "names": ["socket"],
                "action": "SCMP_ACT_ALLOW",
                "args": [
                    {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"},
                    {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"},
                ],
            }],
        })))
        .unwrap()
        .unwrap();
        assert_eq!(answer(&program, libc::SYS_socket as u32, 1), ALLOW);
        assert_eq!(answer(&program, libc::SYS_socket as u32, 2), ALLOW);
        assert_eq!(answer(&program, libc::SYS_socket as u32, 3), errno(libc::EPERM));
    }

    #[test]
    fn flags_are_those_of_the_profile_and_of_runc_without_any() {
        let filter = serde_json::json!([{"names": ["read"], "action": "SCMP_ACT_ERRNO"}]);
        let with = |flags: serde_json::Value| {
            let mut json = serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": filter});
            if !flags.is_null() {
                json["flags"] = flags;
            }
            compile(&profile(json)).unwrap().unwrap().flags
        };
        assert_eq!(with(serde_json::Value::Null), FLAG_SPEC_ALLOW);
        assert_eq!(with(serde_json::json!(["SECCOMP_FILTER_FLAG_LOG"])), FLAG_LOG);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        let notify = serde_json::json!({"defaultAction": "SCMP_ACT_NOTIFY"});
        assert!(matches!(compile(&profile(notify)), Err(SeccompError::Notify)));
        let value = serde_json::json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 65536});
        assert!(matches!(compile(&profile(value)), Err(SeccompError::ReturnValue(65536))));
        let argument = serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{
                "names": ["read"],
                "action": "SCMP_ACT_ERRNO",
                "args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}],
            }],
        });
        assert!(matches!(compile(&profile(argument)), Err(SeccompError::Argument { index: 6, .. })));
    }

    #[test]
    fn a_profile_that_allows_everything_is_no_filter() {
        assert!(compile(&profile(serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW"}))).unwrap().is_none());
    }
}
