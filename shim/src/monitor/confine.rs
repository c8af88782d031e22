//! What the monitor gives up before the guest runs its first instruction.
//!
//! Threads inherit all of this, so it happens before the threads of devices and vCPUs are started.

use std::collections::BTreeMap;
use std::io;

use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::sys::prctl;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// What a server of the container's files needs: to act as any user on any file. Nothing here reaches beyond
/// the files, and the process's root is the container's.
const FILE_SERVER: [Capability; 10] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    // To ask whether anybody writes to a file that belongs to another user.
    Capability::CAP_LEASE,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
];

/// System calls that a monitor never needs once it is set up, and by which whoever took it over would go further:
/// into other programs, processes, namespaces and mounts, and into the rarely used corners of the host's kernel.
const REFUSED: &[libc::c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_setns,
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_mount_setattr,
    libc::SYS_open_by_handle_at,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_socket,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_vhangup,
    libc::SYS_syslog,
    libc::SYS_personality,
    libc::SYS_setpriority,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_mbind,
    libc::SYS_set_mempolicy,
];

/// A change of the user ID changes no capabilities, and nothing changes that.
const SECUREBITS: libc::c_int = libc::SECBIT_NO_SETUID_FIXUP | libc::SECBIT_NO_SETUID_FIXUP_LOCKED;

/// Gives up new privileges, the system calls that are not needed any more, and all capabilities but those of a file
/// server.
pub fn confine() -> io::Result<()> {
    prctl::set_no_new_privs()?;
    let held = caps::read(None, CapSet::Permitted).map_err(io::Error::other)?;
    // A file server creates files as their owners, with the capabilities that it has as itself. It cannot see to
    // that any more once CAP_SETPCAP is gone; without CAP_SETUID it has no need to.
    if held.contains(&Capability::CAP_SETUID) {
        keep_capabilities_across_users()?;
    }
    let kept: CapsHashSet = FILE_SERVER.into_iter().filter(|capability| held.contains(capability)).collect();
    for capability in caps::all().difference(&kept) {
        // Fails for those that this kernel does not know, and without CAP_SETPCAP, where nothing can be gained.
        let _ = caps::drop(None, CapSet::Bounding, *capability);
    }
    rvm_vmm::confine::keep_capabilities(&kept)?;
    seccompiler::apply_filter(&filter().map_err(io::Error::other)?).map_err(io::Error::other)
}

/// Refuses with an error instead of ending the process: a container is worth more than the alarm.
fn filter() -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<_, _> = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    // A thread that serves files has a umask of its own, and needs no more than that.
    let more_than_umask = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Qword,
        SeccompCmpOp::Ne,
        u64::from(libc::CLONE_FS.cast_unsigned()),
    )?;
    rules.insert(libc::SYS_unshare, vec![SeccompRule::new(vec![more_than_umask])?]);
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::x86_64)?.try_into()
}

fn keep_capabilities_across_users() -> io::Result<()> {
    // SAFETY: the call takes integers only, and changes nothing but this thread's securebits.
    let result = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, SECUREBITS, 0, 0, 0) };
    Errno::result(result)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn a_file_server_stays_one_under_another_user_id() {
        std::thread::spawn(|| {
            let held = caps::read(None, CapSet::Permitted).unwrap();
            if !held.contains(&Capability::CAP_SETUID) || !held.contains(&Capability::CAP_SETPCAP) {
                eprintln!("not tested: it takes CAP_SETUID and CAP_SETPCAP");
                return;
            }
            confine().unwrap();
            let before = caps::read(None, CapSet::Effective).unwrap();
            assert!(before.contains(&Capability::CAP_DAC_OVERRIDE));
            nix::unistd::setfsuid(nix::unistd::Uid::from_raw(1234));
            assert_eq!(caps::read(None, CapSet::Effective).unwrap(), before);
            assert!(!caps::read(None, CapSet::Permitted).unwrap().contains(&Capability::CAP_SETPCAP));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn what_leads_further_is_refused_to_all_threads_from_then_on() {
        // A filter belongs to a thread and to those that it starts.
        std::thread::spawn(|| {
            confine().unwrap();
            let refused = std::thread::spawn(|| {
                assert_eq!(unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS), Err(Errno::EPERM));
                unshare(CloneFlags::CLONE_FS).unwrap();
                std::process::Command::new("/bin/true").status().unwrap_err().raw_os_error()
            });
            assert_eq!(refused.join().unwrap(), Some(libc::EPERM));
            assert!(std::fs::read("/proc/self/stat").is_ok(), "files are still served");
        })
        .join()
        .unwrap();
    }

    #[test]
    fn only_a_file_servers_capabilities_stay() {
        // Capabilities belong to a thread: this one ends with the test.
        std::thread::spawn(|| {
            confine().unwrap();
            for set in [CapSet::Permitted, CapSet::Effective, CapSet::Inheritable] {
                let held = caps::read(None, set).unwrap();
                assert!(held.iter().all(|capability| FILE_SERVER.contains(capability)), "{set:?}: {held:?}");
            }
            assert!(prctl::get_no_new_privs().unwrap());
        })
        .join()
        .unwrap();
    }
}
