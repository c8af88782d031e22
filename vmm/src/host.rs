//! Can this host run microVMs? One clear sentence when it cannot.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

/// Where KVM is found.
const DEVICE: &str = "/dev/kvm";
/// Where the host's processors are described.
const CPU_INFO: &str = "/proc/cpuinfo";

/// The version of the KVM API, unchanged since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// What the machine needs of KVM, with the kernel's name of it.
const REQUIRED: [(Cap, &str); 12] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::KvmclockCtrl, "KVM_CAP_KVMCLOCK_CTRL"),
];

/// Why this host cannot run a machine.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There is no KVM device.
    #[error(
        "this host has no /dev/kvm: load the module kvm_intel or kvm_amd, or enable virtualization in the \
         firmware (in a virtual machine: nested virtualization)"
    )]
    NoDevice,
    /// The KVM device may not be opened.
    #[error("no permission to open /dev/kvm: run as root, or join the group that owns it")]
    NoPermission,
    /// The KVM device could not be opened for another reason.
    #[error("/dev/kvm could not be opened: {0}")]
    Open(io::Error),
    /// The device speaks another version of the interface.
    #[error("/dev/kvm speaks version {0} of its interface, and not {API_VERSION}")]
    Version(i32),
    /// KVM emulates guest kernels instead of running them.
    #[error(
        "/dev/kvm of this host cannot run a guest kernel: its processor offers neither vmx nor svm, so KVM \
         emulates the guest's ring 0 (kvm_pvm); use a host with hardware or nested virtualization"
    )]
    EmulatedKernelMode,
    /// The host's processor could not be identified.
    #[error("/proc/cpuinfo could not be read: {0}")]
    CpuInfo(io::Error),
    /// KVM lacks something.
    #[error("this host's KVM lacks {0}: a newer kernel is needed")]
    MissingCapability(&'static str),
}

/// The virtualization that this host's processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Virtualization {
    /// Intel VT-x.
    Vmx,
    /// AMD-V.
    Svm,
}

/// What a fit host offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSupport {
    /// The processor's virtualization.
    pub virtualization: Virtualization,
    /// The most vCPUs that one machine can have.
    pub max_vcpus: usize,
}

/// Says whether this host can run microVMs, and if not, why and what to do.
pub fn host_support() -> Result<HostSupport, HostError> {
    let (kvm, virtualization) = open_kvm_for_kernels()?;
    Ok(HostSupport { virtualization, max_vcpus: kvm.get_max_vcpus() })
}

/// Opens /dev/kvm and checks that it can do what the machine needs, whichever way it runs guests.
pub(crate) fn open_kvm() -> Result<Kvm, HostError> {
    open_kvm_at(Path::new(DEVICE))
}

/// Opens /dev/kvm for a machine that runs a kernel, which takes a processor that can.
pub(crate) fn open_kvm_for_kernels() -> Result<(Kvm, Virtualization), HostError> {
    open_for_kernels(Path::new(DEVICE), Path::new(CPU_INFO))
}

/// The device comes first: where there is none, the processor is not what the user has to look at.
fn open_for_kernels(device: &Path, cpu_info: &Path) -> Result<(Kvm, Virtualization), HostError> {
    let kvm = open_kvm_at(device)?;
    let cpu_info = std::fs::read_to_string(cpu_info).map_err(HostError::CpuInfo)?;
    Ok((kvm, virtualization_in(&cpu_info).ok_or(HostError::EmulatedKernelMode)?))
}

fn open_kvm_at(path: &Path) -> Result<Kvm, HostError> {
    let device = open_device(path)?;
    let kvm = kvm_from(device);
    if kvm.get_api_version() != API_VERSION {
        return Err(HostError::Version(kvm.get_api_version()));
    }
    match REQUIRED.iter().find(|(capability, _)| !kvm.check_extension(*capability)) {
        Some((_, name)) => Err(HostError::MissingCapability(name)),
        None => Ok(kvm),
    }
}

fn open_device(path: &Path) -> Result<File, HostError> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(path).map_err(|error| {
        match error.kind() {
            ErrorKind::NotFound => HostError::NoDevice,
            ErrorKind::PermissionDenied => HostError::NoPermission,
            // The module is not loaded, but a node was made for it.
            _ if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => HostError::NoDevice,
            _ => HostError::Open(error),
        }
    })
}

fn kvm_from(device: File) -> Kvm {
    use std::os::fd::{FromRawFd, IntoRawFd};
    let descriptor = OwnedFd::from(device).into_raw_fd();
    // SAFETY: the descriptor is open, and owned by nobody else since `into_raw_fd`.
    unsafe { Kvm::from_raw_fd(descriptor) }
}

fn virtualization_in(cpuinfo: &str) -> Option<Virtualization> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    flags.split_ascii_whitespace().find_map(|flag| match flag {
        "vmx" => Some(Virtualization::Vmx),
        "svm" => Some(Virtualization::Svm),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_decides_whether_guest_kernels_run() {
        let intel = "processor\t: 0\nflags\t\t: fpu vme vmx smx\n";
        assert_eq!(virtualization_in(intel), Some(Virtualization::Vmx));
        let amd = "processor\t: 0\nflags\t\t: fpu vme svm\nbugs\t\t:\n";
        assert_eq!(virtualization_in(amd), Some(Virtualization::Svm));
        let neither = "processor\t: 0\nflags\t\t: fpu vme avmx\nvmx flags\t: vnmi\nmodel name\t: svm\n";
        assert_eq!(virtualization_in(neither), None);
        assert_eq!(virtualization_in(""), None);
    }

    #[test]
    fn without_a_device_the_processor_is_not_blamed() {
        let folder = tempfile::tempdir().unwrap();
        let cpu_info = folder.path().join("cpuinfo");
        std::fs::write(&cpu_info, "flags\t\t: fpu\n").unwrap();
        let refusal = |device: &Path| open_for_kernels(device, &cpu_info).err().unwrap();
        let error = refusal(&folder.path().join("kvm"));
        assert!(matches!(error, HostError::NoDevice), "{error}");
        if open_kvm().is_ok() {
            let error = refusal(Path::new(DEVICE));
            assert!(matches!(error, HostError::EmulatedKernelMode), "{error}");
        }
    }

    #[test]
    fn an_absent_device_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = open_device(&folder.path().join("kvm")).unwrap_err();
        assert!(matches!(error, HostError::NoDevice), "{error}");
    }

    #[test]
    fn the_device_must_be_one_of_kvm() {
        let error = open_device(Path::new("/dev/tty_of_nobody/kvm")).unwrap_err();
        assert!(error.to_string().contains("no /dev/kvm"), "{error}");
    }
}
