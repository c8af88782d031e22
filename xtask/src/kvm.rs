//! Whether this machine can boot a microVM.

use std::fs::{self, File};

/// Whether `/dev/kvm` opens and the processor has virtualisation.
///
/// Both count: a `/dev/kvm` without SVM or VMX is one that emulates the guest's kernel mode (kvm_pvm), too incomplete
/// and too slow for a real kernel.
pub fn is_usable() -> bool {
    has_virtualisation(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
        && File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|flag| flag == "svm" || flag == "vmx")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn svm_and_vmx_are_whole_flags_of_the_processor() {
        assert!(has_virtualisation("processor : 0\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualisation("flags : svm\n"));
        assert!(!has_virtualisation("flags : fpu svm_lock\nvmx flags : ept\n"));
        assert!(!has_virtualisation(""));
    }
}
