//! The identity of a process: user, groups, capabilities, and the ownership of its standard streams.

use std::io;
use std::os::fd::AsFd;

use nix::sys::prctl;
use nix::sys::stat::{self, Mode};
use nix::unistd::{self, Gid, Uid};
use oci_spec::runtime::User;

use super::capabilities::CapabilitySets;
use crate::error::{Context, Result};

/// The umask of a process that asks for none.
const DEFAULT_UMASK: u32 = 0o022;

/// Changes to the user and puts the capabilities in force. `between` runs as the new user, before the
/// capabilities are reduced.
pub fn assume(
    user: &User,
    capabilities: &CapabilitySets,
    between: impl FnOnce() -> Result<()>,
) -> Result<()> {
    give_streams_to(user);
    let known = capabilities.reduce_bounding_set()?;
    prctl::set_keepcaps(true).context(|| "keeping the capabilities over the change of user")?;
    become_user(user)?;
    between()?;
    prctl::set_keepcaps(false).context(|| "no longer keeping the capabilities")?;
    capabilities.apply(known)?;
    stat::umask(Mode::from_bits_truncate(user.umask().unwrap_or(DEFAULT_UMASK)));
    Ok(())
}

fn become_user(user: &User) -> Result<()> {
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().copied().map(Gid::from_raw).collect();
    unistd::setgroups(&groups).context(|| "setting the supplementary groups")?;
    unistd::setgid(Gid::from_raw(user.gid())).context(|| format!("becoming group {}", user.gid()))?;
    unistd::setuid(Uid::from_raw(user.uid())).context(|| format!("becoming user {}", user.uid()))
}

/// Lets the user open its streams again, as `/dev/stdout`.
fn give_streams_to(user: &User) {
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    for stream in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
        let Ok(found) = stat::fstat(stream) else { continue };
        if found.st_uid != user.uid() && !is_null_device(&found) {
            // Not every file can change its owner, and a stream works without.
            let _ = unistd::fchown(stream, Some(Uid::from_raw(user.uid())), None);
        }
    }
}

fn is_null_device(found: &libc::stat) -> bool {
    found.st_rdev == libc::makedev(1, 3)
}
