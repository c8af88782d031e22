//! From the bytes of a description to its types, with messages that name the field.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use oci_spec::runtime::Capability;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::BundleError;

/// The largest description. The message to the agent has a limit of its own, and holds, besides the description,
/// the state with the same annotations, the network and the seccomp filter.
pub(super) const MAX_BYTES: u64 = rvm_protocol::MAX_FRAME as u64 * 3 / 8;

/// Names the whole where a message names no field.
const DOCUMENT: &str = "the document";

/// Reads a description. `file` is its name in messages, `capabilities` the place of the process's capabilities in it.
pub(super) fn read<T: DeserializeOwned>(
    path: &Path,
    file: &'static str,
    capabilities: &str,
    warnings: &mut Vec<String>,
) -> Result<T, BundleError> {
    let mut json = json(path, &bytes(path)?)?;
    if let Some(sets) = json.pointer_mut(capabilities).and_then(Value::as_object_mut) {
        drop_unknown_capabilities(sets, warnings);
    }
    typed(&json, file)
}

/// The specification wants capabilities that cannot be granted told of, and no failure: an engine may know newer ones.
fn drop_unknown_capabilities(sets: &mut Map<String, Value>, warnings: &mut Vec<String>) {
    let mut unknown: Vec<String> = Vec::new();
    for set in sets.values_mut().filter_map(Value::as_array_mut) {
        set.retain(|name| {
            let known = !name.is_string() || Capability::deserialize(name).is_ok();
            if let Some(name) =
                name.as_str().filter(|name| !known && !unknown.iter().any(|other| other == name))
            {
                unknown.push(name.to_owned());
            }
            known
        });
    }
    if !unknown.is_empty() {
        warnings.push(format!(
            "process.capabilities: ignoring unknown or unavailable capabilities: [{}]",
            unknown.join(" ")
        ));
    }
}

fn bytes(path: &Path) -> Result<Vec<u8>, BundleError> {
    let failed = |error: std::io::Error| BundleError::Read { path: path.into(), cause: error.into() };
    // A pipe in place of the file must not block the engine.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(BundleError::NotAFile { path: path.into() });
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(BundleError::TooLarge { path: path.into(), limit: MAX_BYTES });
    }
    Ok(bytes)
}

fn json(path: &Path, bytes: &[u8]) -> Result<Value, BundleError> {
    serde_json::from_slice(bytes).map_err(|error| match error.is_eof() {
        true => BundleError::Truncated { path: path.into(), line: error.line() },
        false => BundleError::NotJson { path: path.into(), problem: error.to_string() },
    })
}

/// Gives JSON its types; an error names the field by its path.
pub(super) fn typed<T: DeserializeOwned>(json: &Value, file: &'static str) -> Result<T, BundleError> {
    // The types would take a list's items for the fields in their order.
    if !json.is_object() {
        let problem = "it is no JSON object".into();
        return Err(BundleError::Field { file, field: DOCUMENT.into(), problem });
    }
    serde_path_to_error::deserialize(json).map_err(|error| BundleError::Field {
        file,
        field: match error.path().iter().next() {
            Some(_) => error.path().to_string(),
            None => DOCUMENT.into(),
        },
        problem: in_words(&error.into_inner().to_string()),
    })
}

/// The parser's message without its lists of everything that would have been accepted.
fn in_words(message: &str) -> String {
    let unknown = message
        .strip_prefix("unknown variant `")
        .and_then(|rest| rest.split_once('`'))
        .or_else(|| message.strip_prefix("no variant for ").and_then(|rest| rest.split_once(" (converted")));
    if let Some((value, _)) = unknown {
        return format!("`{value}` is not known");
    }
    match message.strip_prefix("missing field ") {
        Some(field) => format!("the field {field} is missing"),
        None => message.into(),
    }
}
