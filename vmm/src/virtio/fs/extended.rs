//! Requests about extended attributes.
//!
//! Those of users and the one with which programs get capabilities pass through. The host's own do not:
//! `trusted.*`, where overlayfs and others keep what they believe blindly, and the labels of the host's security
//! modules. Nor do access control lists (`system.posix_acl_*`): the guest checks permissions by modes alone, and a
//! list that is stored and not obeyed is worse than none.

use std::ffi::CStr;

use nix::errno::Errno;

use super::server::{FileServer, descriptor_path};
use super::system;

/// Longest value, and longest list of names (XATTR_SIZE_MAX, XATTR_LIST_MAX).
const MAX_LEN: usize = 64 << 10;

/// Whether an attribute is the guest's to see and to set.
fn is_allowed(name: &[u8]) -> bool {
    name.starts_with(b"user.") || name == b"security.capability"
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
    /// SETXATTR.
    pub(super) fn set_extended(&self, id: u64, name: &CStr, value: &[u8], flags: u32) -> Result<(), Errno> {
        check(name)?;
        let node = self.node(id)?;
        let _changing = self.unsynced.changing(&node);
        system::set_attribute(&descriptor_path(&node.file), name, value, flags as i32)
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
