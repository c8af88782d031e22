//! What the guest's processors say of themselves.
//!
//! The base is all that KVM can give. What is changed: the topology becomes that of one package with a core for each
//! vCPU, the timer that needs no calibration is shown, and what would not work, or belongs to the host alone, is
//! hidden.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use vmm_sys_util::errno;

/// Bits of leaf 1.
const ECX_VMX: u32 = 1 << 5;
const ECX_TSC_DEADLINE_TIMER: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_MULTIPLE_THREADS: u32 = 1 << 28;
/// The timer of the local APIC runs in all power states (leaf 6). With it, and with deadlines instead of periods,
/// a kernel needs neither a second timer nor a calibration.
const EAX_APIC_TIMER_ALWAYS_RUNS: u32 = 1 << 2;
/// Software guard extensions (leaf 7, subleaf 0).
const EBX_SGX: u32 = 1 << 2;
/// Bits of leaf 0x8000_0001: nested virtualization, and AMD's performance counters.
const ECX_LEGACY_MULTIPLE_CORES: u32 = 1 << 1;
const ECX_SVM: u32 = 1 << 2;
const ECX_PERFORMANCE_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;
const ECX_TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

/// Leaves that are shown empty: MONITOR, performance counters, SGX, resource control, SVM, encrypted memory, AMD's
/// performance counters, AMD's extended topology.
const HIDDEN: [u32; 9] = [0x5, 0xa, 0xf, 0x10, 0x12, 0x8000_000a, 0x8000_001f, 0x8000_0022, 0x8000_0026];
/// Leaves about the topology that are made anew (leaf 0x1f would be the same as 0xb).
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
/// Levels in leaf 0xb.
const LEVEL_THREADS: u32 = 1 << 8;
const LEVEL_CORES: u32 = 2 << 8;

/// What KVM can give to a guest on this host.
pub(crate) fn supported(kvm: &Kvm) -> Result<CpuId, errno::Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
}

/// The CPUID of one of `count` vCPUs.
pub(crate) fn for_vcpu(supported: &CpuId, vcpu: u8, count: u8) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let topology = Topology::new(vcpu, count);
    let mut entries: Vec<_> = supported
        .as_slice()
        .iter()
        .filter(|entry| !HIDDEN.contains(&entry.function) && !TOPOLOGY.contains(&entry.function))
        .copied()
        .collect();
    let has_extended_topology = supported.as_slice().iter().any(|entry| entry.function == 0xb);
    entries.iter_mut().for_each(|entry| fix(entry, topology));
    if has_extended_topology {
        entries.extend(topology.levels());
    }
    CpuId::from_entries(&entries)
}

/// Whether two lists of features are the same, but for the number of the processor that was asked.
pub(crate) fn is_same_processor(left: &[kvm_cpuid_entry2], right: &[kvm_cpuid_entry2]) -> bool {
    left.len() == right.len()
        && left.iter().zip(right).all(|(left, right)| without_number(left) == without_number(right))
}

fn without_number(entry: &kvm_cpuid_entry2) -> kvm_cpuid_entry2 {
    let mut entry = *entry;
    match entry.function {
        0x1 => entry.ebx &= 0x00ff_ffff,
        0xb | 0x1f => entry.edx = 0,
        // The size of the states that are enabled at the moment.
        0xd if entry.index <= 1 => entry.ebx = 0,
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (0, 0, 0),
        _ => {}
    }
    entry
}

/// One package with `count` cores of one thread each, and this vCPU's place in it. The APIC's ID is the core's number.
#[derive(Clone, Copy)]
struct Topology {
    apic_id: u32,
    count: u32,
    /// Bits that number the cores.
    bits: u32,
}

impl Topology {
    fn new(vcpu: u8, count: u8) -> Self {
        let count = u32::from(count.max(1));
        Self { apic_id: vcpu.into(), count, bits: count.next_power_of_two().trailing_zeros() }
    }

    /// Leaf 0xb: one thread a core, all cores in the package, and a level that ends the list.
    fn levels(self) -> [kvm_cpuid_entry2; 3] {
        let level = |index: u32, shift: u32, processors: u32, kind: u32| kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: kind | index,
            edx: self.apic_id,
            ..Default::default()
        };
        [level(0, 0, 1, LEVEL_THREADS), level(1, self.bits, self.count, LEVEL_CORES), level(2, 0, 0, 0)]
    }
}

fn fix(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    let is_multiple = topology.count > 1;
    match (entry.function, entry.index) {
        (0x1, _) => {
            let brand_and_line_size = entry.ebx & 0xffff;
            entry.ebx = brand_and_line_size | topology.count << 16 | topology.apic_id << 24;
            entry.ecx = entry.ecx & !ECX_VMX | ECX_HYPERVISOR | ECX_TSC_DEADLINE_TIMER;
            set(&mut entry.edx, EDX_MULTIPLE_THREADS, is_multiple);
        }
        (0x4 | 0x8000_001d, _) => fix_cache(entry, topology),
        (0x6, _) => {
            *entry = kvm_cpuid_entry2 { eax: EAX_APIC_TIMER_ALWAYS_RUNS, ..cleared(entry) };
        }
        (0x7, 0) => entry.ebx &= !EBX_SGX,
        (0x8000_0001, _) => {
            entry.ecx &= !(ECX_SVM | ECX_PERFORMANCE_COUNTERS);
            // Only AMD's processors have topology extensions, and with them this bit has a meaning.
            let is_amd = entry.ecx & ECX_TOPOLOGY_EXTENSIONS != 0;
            set(&mut entry.ecx, ECX_LEGACY_MULTIPLE_CORES, is_amd && is_multiple);
        }
        // Number of cores less one, and how many bits of the APIC's ID number them.
        (0x8000_0008, _) => entry.ecx = (topology.count - 1) | topology.bits << 12,
        (0x8000_001e, _) => {
            // ID of the APIC, of the core (one thread each), of the node.
            *entry =
                kvm_cpuid_entry2 { eax: topology.apic_id, ebx: topology.apic_id & 0xff, ..cleared(entry) };
        }
        _ => {}
    }
}

/// Caches of the first two levels belong to a core, others to all cores.
fn fix_cache(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    if entry.eax & 0x1f == 0 {
        return;
    }
    let level = entry.eax >> 5 & 0x7;
    let sharing = if level <= 2 { 0 } else { topology.count - 1 };
    entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
    if entry.function == 0x4 {
        // The largest core number that the package could have; a field of 6 bits.
        entry.eax = entry.eax & !(0x3f << 26) | ((1 << topology.bits) - 1).min(0x3f) << 26;
    }
}

/// The entry with all registers 0.
fn cleared(entry: &kvm_cpuid_entry2) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: entry.function,
        index: entry.index,
        flags: entry.flags,
        ..Default::default()
    }
}

fn set(register: &mut u32, bits: u32, value: bool) {
    *register = if value { *register | bits } else { *register & !bits };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn fixed(entries: &[kvm_cpuid_entry2], vcpu: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
        for_vcpu(&CpuId::from_entries(entries).unwrap(), vcpu, count).unwrap().as_slice().to_vec()
    }

    #[test]
    fn each_vcpu_has_an_apic_of_its_own() {
        for vcpu in 0..3 {
            let entries = fixed(&[leaf(1, 0, [0, 0x5511_0800, 0, 0]), leaf(0xb, 0, [9; 4])], vcpu, 3);
            assert_eq!(entries[0].ebx, u32::from(vcpu) << 24 | 3 << 16 | 0x0800);
            assert_eq!(entries[0].edx, EDX_MULTIPLE_THREADS);
            assert!(entries[1..].iter().all(|level| level.edx == u32::from(vcpu)));
        }
    }

    #[test]
    fn the_package_has_one_core_a_vcpu() {
        let levels = fixed(&[leaf(0xb, 0, [9; 4]), leaf(0xb, 1, [9; 4]), leaf(0x1f, 0, [9; 4])], 0, 3);
        let registers: Vec<_> =
            levels.iter().map(|level| (level.index, level.eax, level.ebx, level.ecx)).collect();
        assert_eq!(registers, [(0, 0, 1, 0x100), (1, 2, 3, 0x201), (2, 0, 0, 2)]);
        let amd = fixed(&[leaf(0x8000_0008, 0, [48, 1, 0x7fff, 2]), leaf(0x8000_001e, 0, [9; 4])], 2, 3);
        assert_eq!((amd[0].eax, amd[0].ecx), (48, 2 | 2 << 12));
        assert_eq!((amd[1].eax, amd[1].ebx, amd[1].ecx), (2, 2, 0));
    }

    #[test]
    fn processors_without_the_extended_topology_get_none() {
        assert!(fixed(&[leaf(0, 0, [1, 2, 3, 4])], 0, 2).iter().all(|entry| entry.function != 0xb));
    }

    #[test]
    fn a_single_core_is_not_said_to_be_several() {
        let entries =
            fixed(&[leaf(1, 0, [0, 0, 0, u32::MAX]), leaf(0x8000_0001, 0, [0, 0, u32::MAX, 0])], 0, 1);
        assert_eq!(entries[0].edx & EDX_MULTIPLE_THREADS, 0);
        assert_eq!(entries[1].ecx & ECX_LEGACY_MULTIPLE_CORES, 0);
    }

    #[test]
    fn nested_virtualization_and_counters_are_hidden() {
        let entries =
            [leaf(1, 0, [u32::MAX; 4]), leaf(0x8000_0001, 0, [u32::MAX; 4]), leaf(7, 0, [u32::MAX; 4])];
        let visible = fixed(&entries, 0, 1);
        assert_eq!(visible[0].ecx & ECX_VMX, 0);
        assert_eq!(visible[1].ecx & (ECX_SVM | ECX_PERFORMANCE_COUNTERS), 0);
        assert_eq!(visible[2].ebx, !EBX_SGX);
        let hidden: Vec<_> = HIDDEN.iter().map(|function| leaf(*function, 0, [u32::MAX; 4])).collect();
        assert!(fixed(&hidden, 0, 1).is_empty());
    }

    #[test]
    fn the_timer_needs_no_calibration() {
        let entries = fixed(&[leaf(1, 0, [0; 4]), leaf(6, 0, [0xff; 4])], 0, 1);
        assert_eq!(entries[0].ecx, ECX_HYPERVISOR | ECX_TSC_DEADLINE_TIMER);
        assert_eq!((entries[1].eax, entries[1].ebx, entries[1].ecx), (EAX_APIC_TIMER_ALWAYS_RUNS, 0, 0));
    }

    #[test]
    fn caches_are_shared_as_far_as_their_level_goes() {
        let cache = |level: u32| leaf(4, level, [level << 5 | 1 | u32::MAX << 14, 0, 0, 0]);
        let entries = fixed(&[cache(1), cache(3), leaf(4, 4, [0; 4])], 0, 6);
        let sharing: Vec<_> =
            entries.iter().map(|entry| (entry.eax >> 14 & 0xfff, entry.eax >> 26)).collect();
        assert_eq!(sharing, [(0, 7), (5, 7), (0, 0)]);
    }
}
