//! Whether a story failed for a fault of the software processor, and not of rvm.
//!
//! Rarely, on a busy machine, the emulator leaves a guest with flags that are the operand of some calculation, and resumes it
//! so. Older versions of QEMU may have written what an instruction's flags follow from when its store to memory faults, and
//! then take it for flags. The guest's kernel dies, and says what its flags were. That is told apart from a fault of rvm's by
//! bits that no processor has: flags that KVM or a guest had set would have lost them.

/// The bits of EFLAGS that are always zero: 3, 5, 15, and all from 22 (AMD64 Architecture Programmer's Manual, volume 2, 3.1.6).
const RESERVED: u64 = !0 << 22 | 1 << 15 | 1 << 5 | 1 << 3;
/// The one that is always one.
const ALWAYS: u64 = 1 << 1;

/// Whether what a story failed with shows flags that no processor can have.
pub fn is_at_fault(failure: &str) -> bool {
    failure.split("EFLAGS: ").skip(1).any(|rest| {
        let digits = rest.split(|letter: char| !letter.is_ascii_hexdigit()).next().unwrap_or_default();
        u64::from_str_radix(digits, 16).is_ok_and(|flags| flags & RESERVED != 0 || flags & ALWAYS == 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_with_reserved_bits_are_no_flags() {
        let died =
            |flags| format!("its last messages: RSP: 0018:ffffc9000000bc68 EFLAGS: {flags} | RAX: ffffc9");
        assert!(is_at_fault(&died("0083d646")) && is_at_fault(&died("00000244")));
        assert!(!is_at_fault(&died("00010246")) && !is_at_fault(&died("00000002")));
        assert!(is_at_fault(&format!("{}\n{}", died("00010246"), died("0000ffff"))), "the second one");
    }

    #[test]
    fn other_failures_show_none() {
        assert!(!is_at_fault("it never came true that the page shows it"));
        assert!(!is_at_fault("EFLAGS: ") && !is_at_fault("EFLAGS: none"));
    }
}
