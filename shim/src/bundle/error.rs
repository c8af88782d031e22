//! Why a bundle is refused.

use std::path::PathBuf;

use crate::cause::Cause;

/// Why a bundle, or the description of a process, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The bundle's directory cannot be entered.
    #[error("cannot open the bundle {path}: {cause}", path = path.display())]
    Directory {
        /// The bundle.
        path: PathBuf,
        /// Why.
        cause: Cause,
    },
    /// The description cannot be read.
    #[error("cannot read {path}: {cause}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: Cause,
    },
    /// The description is a directory, a pipe or the like.
    #[error("{path} is not a regular file", path = path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// The description is larger than anything that the agent would be sent.
    #[error("{path} is larger than the limit of {limit} bytes", path = path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit, in bytes.
        limit: u64,
    },
    /// The JSON breaks off.
    #[error("{path} is cut short: the JSON ends at line {line} before it is complete", path = path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The last line.
        line: usize,
    },
    /// The description is no JSON.
    #[error("{path} is not valid JSON: {problem}", path = path.display())]
    NotJson {
        /// The file.
        path: PathBuf,
        /// What the parser says, with line and column.
        problem: String,
    },
    /// A field is missing, of the wrong type, or holds an unknown or senseless value.
    #[error("{file}: {field}: {problem}")]
    Field {
        /// Name of the description, such as `config.json`.
        file: &'static str,
        /// Path of the field, such as `mounts[3].options[1]`.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The field asks for something that a container in a virtual machine of its own cannot have.
    #[error("{file}: {field}: a microVM cannot do this: {problem}")]
    Impossible {
        /// Name of the description.
        file: &'static str,
        /// Path of the field.
        field: String,
        /// What it asks for, and what to do instead.
        problem: String,
    },
    /// The container's root file system is no usable directory.
    #[error("config.json: root.path: cannot use {path} as the root file system: {cause}", path = path.display())]
    Rootfs {
        /// The root file system.
        path: PathBuf,
        /// Why.
        cause: Cause,
    },
}
