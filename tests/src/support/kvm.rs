//! Whether this machine can run virtual machines, and ones that do so in turn.

use std::fs::{self, File};

/// What executes the instructions of a machine that needs a working `/dev/kvm` inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The machine's KVM, with nested virtualisation.
    Kvm,
    /// QEMU's software processor, an AMD one with SVM and nested paging.
    Software,
}

impl Accelerator {
    /// The fastest one there is.
    pub fn detect() -> Self {
        let nested =
            ["amd", "intel"].map(|vendor| read(&format!("/sys/module/kvm_{vendor}/parameters/nested")));
        if is_usable() && allows_nesting(&nested) { Self::Kvm } else { Self::Software }
    }

    /// QEMU's arguments for it. The translator of the software processor may take `buffer_mib` of memory.
    pub fn arguments(self, buffer_mib: u32) -> Vec<String> {
        let software = format!("tcg,thread=single,tb-size={buffer_mib}");
        let words = match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host", "-smp", "2"],
            // More than one CPU or thread is not reliable here: QEMU's multi-threaded translator loses races with
            // the host kernel's patching of its own code (`Oops: int3`), and guests with two CPUs on one thread hang.
            // Without cmpxchg16b, of which QEMU 7.2 takes an operand of the instruction before it for the flags. Kernels
            // allocate memory with it where they can; one that is interrupted right behind it, as a guest is by each exit,
            // goes on with flags that trap its next step, or have it in virtual-8086 mode.
            Self::Software => ["-accel", &software, "-cpu", "EPYC,-cx16", "-smp", "1"],
        };
        words.map(str::to_owned).into()
    }
}

/// Whether `/dev/kvm` opens and the processor has virtualisation.
///
/// Both count: a `/dev/kvm` without SVM or VMX is one that emulates the guest's kernel mode (kvm_pvm), too incomplete
/// and too slow for a real kernel.
pub fn is_usable() -> bool {
    has_virtualisation(&read("/proc/cpuinfo"))
        && File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|flag| flag == "svm" || flag == "vmx")
}

fn allows_nesting(parameters: &[String]) -> bool {
    parameters.iter().any(|value| matches!(value.trim(), "1" | "Y"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn svm_and_vmx_are_whole_flags_of_the_processor() {
        assert!(has_virtualisation("processor : 0\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualisation("flags : svm\n"));
        assert!(!has_virtualisation("flags : fpu svm_lock\nvmx flags : ept\n"), "kvm_pvm");
        assert!(!has_virtualisation(""));
    }

    #[test]
    fn either_vendors_module_says_that_it_allows_nesting_in_its_own_way() {
        let allows = |values: [&str; 2]| allows_nesting(&values.map(str::to_owned));
        assert!(allows(["1\n", ""]) && allows(["", "Y\n"]));
        assert!(!allows(["0\n", ""]) && !allows(["", "N\n"]) && !allows(["", ""]));
    }

    #[test]
    fn the_software_processor_is_a_single_amd_one() {
        let line = Accelerator::Software.arguments(512).join(" ");
        assert_eq!(line, "-accel tcg,thread=single,tb-size=512 -cpu EPYC,-cx16 -smp 1");
    }
}
