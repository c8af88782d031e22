//! What the monitor gives up before the guest runs its first instruction.
//!
//! Threads inherit all of this, so it happens before the threads of devices and vCPUs are started.

use std::io;

use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;
use nix::sys::prctl;

/// What a server of the container's files needs: to act as any user on any file. Nothing here reaches beyond
/// the files, and the process's root is the container's.
const FILE_SERVER: [Capability; 9] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
];

/// A change of the user ID changes no capabilities, and nothing changes that.
const SECUREBITS: libc::c_int = libc::SECBIT_NO_SETUID_FIXUP | libc::SECBIT_NO_SETUID_FIXUP_LOCKED;

/// Gives up new privileges and all capabilities but those of a file server.
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
    let _ = caps::clear(None, CapSet::Ambient);
    let _ = caps::clear(None, CapSet::Inheritable);
    caps::set(None, CapSet::Effective, &kept).map_err(io::Error::other)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(io::Error::other)?;
    Ok(())
}

fn keep_capabilities_across_users() -> io::Result<()> {
    // SAFETY: the call takes integers only, and changes nothing but this thread's securebits.
    let result = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, SECUREBITS, 0, 0, 0) };
    Errno::result(result)?;
    Ok(())
}

#[cfg(test)]
mod tests {
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
