//! Whether somebody may be writing to a file.
//!
//! Who has a file open for writing may have it mapped, too, and change it without an event. The host's kernel counts such
//! openings, and tells by refusing a lease: one of the kind that only readers take is not to be had while the file is open for
//! writing. It is given back at once.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// `F_SETSIG` and `F_SETOWN_EX` (linux/fcntl.h).
const SET_SIGNAL: libc::c_int = 10;
const SET_OWNER: libc::c_int = 15;
/// `F_OWNER_TID`: a thread.
const OWNER_THREAD: libc::c_int = 0;

/// Who is told that a lease has to be given back (`struct f_owner_ex`).
#[repr(C)]
struct Owner {
    kind: libc::c_int,
    id: libc::pid_t,
}

/// Whether anybody may have this regular file open for writing, through another descriptor or this one. Where it
/// cannot be told, somebody may.
pub(super) fn may_exist(file: BorrowedFd<'_>) -> bool {
    let fd = file.as_raw_fd();
    let owner = Owner { kind: OWNER_THREAD, id: nix::unistd::gettid().as_raw() };
    // Who opens the file for writing between the next two calls makes the kernel send a signal. It must not be taken for
    // one to the container: it goes to this thread, which has no use for it, and is one that does nothing.
    // SAFETY: the kernel reads the structure, which outlives the call.
    let owned = unsafe { libc::fcntl(fd, SET_OWNER, &raw const owner) };
    // SAFETY: the call takes integers only, and changes nothing but this open file.
    let signal = unsafe { libc::fcntl(fd, SET_SIGNAL, libc::SIGURG) };
    if owned < 0 || signal < 0 {
        return true;
    }
    // SAFETY: as above.
    let leased = Errno::result(unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) });
    if leased.is_err() {
        return true;
    }
    // SAFETY: as above.
    let returned = Errno::result(unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK) });
    returned.is_err()
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_writer_is_noticed_as_long_as_it_has_the_file_open_or_mapped() {
        let file = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        std::fs::write(&file, [0; 4096]).unwrap();
        let reader = File::open(&file).unwrap();
        assert!(!may_exist(reader.as_fd()));
        let writer = OpenOptions::new().read(true).write(true).open(&file).unwrap();
        assert!(may_exist(reader.as_fd()));
        // SAFETY: a new mapping where there is none touches no other memory.
        let mapping = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), 4096, protection, libc::MAP_SHARED, writer.as_raw_fd(), 0)
        };
        drop(writer);
        assert!(may_exist(reader.as_fd()), "it is mapped");
        // SAFETY: it is the mapping that was made above, and nothing refers to it.
        unsafe { libc::munmap(mapping, 4096) };
        assert!(!may_exist(reader.as_fd()));
    }
}
