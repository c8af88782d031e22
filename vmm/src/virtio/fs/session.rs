//! From requests to operations: the FUSE protocol, version 7.

use std::sync::atomic::Ordering;

use fuse_backend_rs::abi::fuse_abi::{
    BatchForgetIn, CopyFileRangeIn, CreateIn, FallocateIn, ForgetIn, ForgetOne, FsOptions, FsyncIn,
    GetxattrIn, GetxattrOut, InitIn, InitOut, KERNEL_MINOR_VERSION, KERNEL_VERSION, LinkIn, LseekIn, MkdirIn,
    MknodIn, OpenIn, ReadIn, ReleaseIn, Rename2In, RenameIn, SetattrIn, SetxattrIn, WriteIn,
};
use nix::errno::Errno;
use nix::unistd::UnlinkatFlags;
use vm_memory::GuestMemoryMmap;

use super::extended::Value;
use super::message::{MAX_PAGES, MAX_WRITE, Reply, Request, component, decode, split_text};
use super::pace::{Pace, has_to_wait};
use super::server::FileServer;
use super::wire::{SETXATTR_ACL_KILL_SGID, SETXATTR_EXT, SetxattrMore, StatxIn, opcode};
use crate::virtio::virtqueue::KeptChain;

/// The oldest protocol that the virtiofs driver was ever released with.
const OLDEST_MINOR: u32 = 31;
/// How many requests the guest may have under way that nobody waits for, such as read-ahead.
const MAX_BACKGROUND: u16 = 256;

impl FileServer {
    /// Answers the request in a chain; returns how many bytes were written to it, or nothing if it would have to wait and
    /// may not: then it is as if it had not come. The thread must have [entered](super::thread::enter).
    pub(super) fn serve(&self, memory: &GuestMemoryMmap, chain: KeptChain, pace: Pace) -> Option<u32> {
        // A chain without sense or a request without a header cannot be answered.
        let Ok((request, mut reply)) = decode(memory, chain) else { return Some(0) };
        let Some(mut request) = request else { return Some(reply.finish(0, Err(Errno::EINVAL))) };
        if pace == Pace::AtOnce && !self.is_quick(&request.header) {
            return None;
        }
        let unique = request.header.unique;
        Some(match request.header.opcode {
            opcode::FORGET | opcode::BATCH_FORGET => {
                // Nobody waits for an answer, so an error has no place to go to.
                let _ = self.forget_request(&mut request);
                0
            }
            // No request blocks in a way that could be interrupted. This one has no answer.
            opcode::INTERRUPT => 0,
            _ => {
                // What may take long must not keep others from hearing of the host's changes.
                let is_brief = pace == Pace::AtOnce && causes_events(request.header.opcode);
                let change = is_brief.then(|| self.begin_change());
                let result = self.dispatch(&mut request, &mut reply, pace);
                // Who sees a change by this answer must not go on to believe what was before an earlier one.
                self.hear_changes();
                drop(change);
                if pace == Pace::AtOnce && result.is_err_and(has_to_wait) {
                    return None;
                }
                reply.finish(unique, result)
            }
        })
    }

    fn dispatch(&self, request: &mut Request<'_>, reply: &mut Reply<'_>, pace: Pace) -> Result<(), Errno> {
        let header = request.header;
        let node = header.nodeid;
        match header.opcode {
            opcode::INIT => reply.object(&self.initialize(request.take()?)?),
            opcode::DESTROY => {
                self.reset();
                Ok(())
            }
            opcode::LOOKUP => reply.object(&self.lookup(node, &request.name()?)?),
            opcode::GETATTR => reply.object(&self.attributes(node)?),
            opcode::STATX => {
                request.take::<StatxIn>()?;
                reply.object(&self.all_attributes(node)?)
            }
            opcode::SETATTR => reply.object(&self.set_attributes(node, &request.take::<SetattrIn>()?)?),
            opcode::STATFS => reply.object(&self.statistics(node)?),
            opcode::READLINK => reply.bytes(self.read_link(node)?.to_bytes()),
            opcode::OPEN => {
                let OpenIn { flags, fuse_flags } = request.take()?;
                reply.object(&self.open(node, flags, fuse_flags)?)
            }
            opcode::OPENDIR => reply.object(&self.open_directory(node)?),
            opcode::READ => self.read(node, request.take()?, reply, pace),
            opcode::READDIR => self.read_directory(node, request.take::<ReadIn>()?, false, reply),
            opcode::READDIRPLUS => self.read_directory(node, request.take::<ReadIn>()?, true, reply),
            opcode::WRITE => {
                let what = request.take::<WriteIn>()?;
                reply.object(&self.write(node, what, &mut request.arguments, pace)?)
            }
            opcode::RELEASE | opcode::RELEASEDIR => self.release(request.take::<ReleaseIn>()?.fh),
            opcode::FSYNC | opcode::FSYNCDIR => self.sync(node, request.take::<FsyncIn>()?),
            opcode::SYNCFS => self.sync_all(),
            opcode::FALLOCATE => self.allocate(node, request.take::<FallocateIn>()?),
            opcode::LSEEK => reply.object(&self.seek(node, request.take::<LseekIn>()?)?),
            opcode::COPY_FILE_RANGE => reply.object(&self.copy(node, request.take::<CopyFileRangeIn>()?)?),
            // The kernel asks no more once it heard that something is not there. Of these FLUSH and ACCESS have
            // nothing to do here, and locks are the guest's own.
            opcode::IOCTL => Err(Errno::ENOTTY),
            _ => self.dispatch_names(request, reply),
        }
    }

    /// Requests that change directories, and those about extended attributes: all that come with text.
    fn dispatch_names(&self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> Result<(), Errno> {
        let header = request.header;
        let node = header.nodeid;
        match header.opcode {
            opcode::MKDIR => {
                let how = request.take::<MkdirIn>()?;
                reply.object(&self.make_directory(&header, &request.name()?, how)?)
            }
            opcode::MKNOD => {
                let how = request.take::<MknodIn>()?;
                reply.object(&self.make_node(&header, &request.name()?, how)?)
            }
            opcode::SYMLINK => {
                let text = request.rest()?;
                let (name, rest) = split_text(&text)?;
                let (target, _) = split_text(rest)?;
                reply.object(&self.make_link(&header, &component(name)?, target)?)
            }
            opcode::LINK => {
                let LinkIn { oldnodeid } = request.take()?;
                reply.object(&self.link(oldnodeid, node, &request.name()?)?)
            }
            opcode::CREATE => {
                let how = request.take::<CreateIn>()?;
                let (entry, opened) = self.create(&header, &request.name()?, how)?;
                reply.object(&entry)?;
                reply.object(&opened)
            }
            opcode::TMPFILE => {
                let (entry, opened) = self.create_unnamed(&header, request.take()?)?;
                reply.object(&entry)?;
                reply.object(&opened)
            }
            opcode::UNLINK => self.unlink(node, &request.name()?, UnlinkatFlags::NoRemoveDir),
            opcode::RMDIR => self.unlink(node, &request.name()?, UnlinkatFlags::RemoveDir),
            opcode::RENAME => {
                let RenameIn { newdir } = request.take()?;
                let (old, new) = request.two_names()?;
                self.rename((node, &old), (newdir, &new), 0)
            }
            opcode::RENAME2 => {
                let Rename2In { newdir, flags, .. } = request.take()?;
                let (old, new) = request.two_names()?;
                self.rename((node, &old), (newdir, &new), flags)
            }
            opcode::SETXATTR => {
                let SetxattrIn { size, flags } = request.take()?;
                let SetxattrMore { flags: more, .. } = match self.agreed(SETXATTR_EXT) {
                    true => request.take()?,
                    false => SetxattrMore::default(),
                };
                let text = request.rest()?;
                let (name, value) = split_text(&text)?;
                if value.len() != size as usize {
                    return Err(Errno::EINVAL);
                }
                self.set_extended(node, name, value, flags, more & SETXATTR_ACL_KILL_SGID != 0)
            }
            opcode::GETXATTR => {
                let GetxattrIn { size, .. } = request.take()?;
                let text = request.rest()?;
                let (name, _) = split_text(&text)?;
                value(reply, self.extended(node, name, size)?)
            }
            opcode::LISTXATTR => {
                let GetxattrIn { size, .. } = request.take()?;
                value(reply, self.extended_names(node, size)?)
            }
            opcode::REMOVEXATTR => {
                let text = request.rest()?;
                self.remove_extended(node, split_text(&text)?.0)
            }
            _ => Err(Errno::ENOSYS),
        }
    }

    /// INIT: a driver starts, and knows nothing of what another one before it referred to.
    fn initialize(&self, offer: InitIn) -> Result<InitOut, Errno> {
        if offer.major < KERNEL_VERSION || offer.major == KERNEL_VERSION && offer.minor < OLDEST_MINOR {
            return Err(Errno::EPROTO);
        }
        let version = InitOut { major: KERNEL_VERSION, minor: KERNEL_MINOR_VERSION, ..Default::default() };
        if offer.major > KERNEL_VERSION {
            // The driver tries again with our version.
            return Ok(version);
        }
        self.reset();
        // The wanted options all lie in the lower half.
        let flags = offer.flags & (wanted_options().bits() as u32 | SETXATTR_EXT);
        // Relaxed: requests that come before the driver has seen the answer are nobody's.
        self.options.store(flags, Ordering::Relaxed);
        Ok(InitOut {
            max_readahead: offer.max_readahead.min(MAX_WRITE),
            flags,
            max_background: MAX_BACKGROUND,
            congestion_threshold: MAX_BACKGROUND / 4 * 3,
            max_write: MAX_WRITE,
            // Nanoseconds count.
            time_gran: 1,
            max_pages: MAX_PAGES,
            ..version
        })
    }

    /// Whether the driver makes use of an option.
    fn agreed(&self, option: u32) -> bool {
        // Relaxed: as for the other side.
        self.options.load(Ordering::Relaxed) & option != 0
    }

    fn forget_request(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        if request.header.opcode == opcode::FORGET {
            let ForgetIn { nlookup } = request.take()?;
            self.forget(ForgetOne { nodeid: request.header.nodeid, nlookup });
            return Ok(());
        }
        let BatchForgetIn { count, .. } = request.take()?;
        for _ in 0..self.forget_count(count) {
            self.forget(request.take()?);
        }
        Ok(())
    }
}

/// Whether to serve a request of this kind causes events of names, and takes hardly any time. To remove something does not
/// either: it is pinned meanwhile, so that its space is given back later. To give it another name may, as a file of an overlay's
/// lower layer is copied for that.
fn causes_events(opcode: u32) -> bool {
    matches!(
        opcode,
        opcode::CREATE | opcode::MKDIR | opcode::MKNOD | opcode::SYMLINK | opcode::UNLINK | opcode::RMDIR
    )
}

fn value(reply: &mut Reply<'_>, value: Value) -> Result<(), Errno> {
    match value {
        Value::Length(size) => reply.object(&GetxattrOut { size, padding: 0 }),
        Value::Bytes(bytes) => reply.bytes(&bytes),
    }
}

/// What the guest's kernel shall make use of, where it can.
fn wanted_options() -> FsOptions {
    // Large requests, and many of them at a time.
    FsOptions::BIG_WRITES
        | FsOptions::MAX_PAGES
        | FsOptions::ASYNC_READ
        | FsOptions::ASYNC_DIO
        | FsOptions::PARALLEL_DIROPS
        | FsOptions::DO_READDIRPLUS
        | FsOptions::READDIRPLUS_AUTO
        // Open with O_TRUNC as one request.
        | FsOptions::ATOMIC_O_TRUNC
        // Pages of a file that changed on the host are dropped.
        | FsOptions::AUTO_INVAL_DATA
        // A symbolic link never changes: another one in its place is another inode.
        | FsOptions::CACHE_SYMLINKS
        // The server clears set-user-ID bits, so the guest need not ask for attributes before each write.
        | FsOptions::HANDLE_KILLPRIV_V2
        | FsOptions::SUBMOUNTS
        // The guest checks access control lists, too. What they are worth for something new the host's kernel knows,
        // and whether the umask counts.
        | FsOptions::POSIX_ACL
        | FsOptions::DONT_MASK
}
