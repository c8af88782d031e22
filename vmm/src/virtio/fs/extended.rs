//! Requests about extended attributes.
//!
//! Those of users, the one with which programs get capabilities, and access control lists pass through. The host's own
//! do not: `trusted.*`, where overlayfs and others keep what they believe blindly, and the labels of the host's security
//! modules.

use std::ffi::CStr;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat};

use super::pins::Node;
use super::server::{FileServer, descriptor_path};
use super::system;

/// Longest value, and longest list of names (XATTR_SIZE_MAX, XATTR_LIST_MAX).
const MAX_LEN: usize = 64 << 10;

/// Attributes that the guest may see and set, beside those of users.
const ALLOWED: [&[u8]; 3] = [b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default"];

/// Whether an attribute is the guest's to see and to set.
fn is_allowed(name: &[u8]) -> bool {
    name.starts_with(b"user.") || ALLOWED.contains(&name)
}

fn check(name: &CStr) -> Result<(), Errno> {
    if is_allowed(name.to_bytes()) { Ok(()) } else { Err(Errno::EOPNOTSUPP) }
}

/// What was asked for: how long it is, or itself.
pub(super) enum Value {
    /// The length in bytes.
    Length(u32),
    /// The bytes.
    Bytes(Vec<u8>),
}

impl Value {
    /// Answers a request that has room for `room` bytes, where none means that the length is asked for.
    fn within(bytes: Vec<u8>, room: u32) -> Result<Value, Errno> {
        match room {
            0 => Ok(Value::Length(bytes.len() as u32)),
            room if bytes.len() > room as usize => Err(Errno::ERANGE),
            _ => Ok(Value::Bytes(bytes)),
        }
    }
}

impl FileServer {
    /// SETXATTR. Whether the file may stay set-group-ID depends on groups of the caller that only the guest knows.
    pub(super) fn set_extended(
        &self,
        id: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_set_group_id: bool,
    ) -> Result<(), Errno> {
        check(name)?;
        let node = self.node(id)?;
        let _changing = self.unsynced.changing(&node);
        system::set_attribute(&descriptor_path(&node.file), name, value, flags as i32)?;
        if kill_set_group_id {
            self.kill_set_group_id(&node)?;
        }
        Ok(())
    }

    fn kill_set_group_id(&self, node: &Node) -> Result<(), Errno> {
        let mode = Mode::from_bits_truncate(system::attributes(node.file.as_fd())?.stx_mode.into());
        if !mode.contains(Mode::S_ISGID) {
            return Ok(());
        }
        let path = descriptor_path(&node.file);
        let mode = mode.difference(Mode::S_ISGID);
        fchmodat(&self.descriptors, path.as_c_str(), mode, FchmodatFlags::FollowSymlink)
    }

    /// GETXATTR.
    pub(super) fn extended(&self, id: u64, name: &CStr, room: u32) -> Result<Value, Errno> {
        check(name)?;
        let node = self.node(id)?;
        let mut buffer = vec![0; (room as usize).min(MAX_LEN)];
        let len = system::attribute(&descriptor_path(&node.file), name, &mut buffer)?;
        if room == 0 {
            return Ok(Value::Length(len as u32));
        }
        buffer.truncate(len);
        Value::within(buffer, room)
    }

    /// LISTXATTR.
    pub(super) fn extended_names(&self, id: u64, room: u32) -> Result<Value, Errno> {
        let node = self.node(id)?;
        let mut buffer = vec![0; MAX_LEN];
        let len = system::attribute_names(&descriptor_path(&node.file), &mut buffer)?;
        let names = buffer[..len].split_inclusive(|&byte| byte == 0);
        let allowed = names.filter(|name| is_allowed(name.strip_suffix(b"\0").unwrap_or(name)));
        Value::within(allowed.flatten().copied().collect(), room)
    }

    /// REMOVEXATTR.
    pub(super) fn remove_extended(&self, id: u64, name: &CStr) -> Result<(), Errno> {
        check(name)?;
        let node = self.node(id)?;
        let _changing = self.unsynced.changing(&node);
        system::remove_attribute(&descriptor_path(&node.file), name)
    }
}
