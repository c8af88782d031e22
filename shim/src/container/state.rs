//! What is known of a container: what `create` recorded, what the monitor reports, and what engines are shown.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use jiff::Timestamp;
use oci_spec::runtime::Hook;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ContainerId;
use super::liveness::ProcessIdentity;
use super::shape::Shape;
use crate::cgroup::HostCgroup;
use crate::spec::OCI_VERSION;
use crate::template::builder::WarmUp;

/// What `create` recorded. It changes no more once the container is created.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The container's ID.
    pub id: String,
    /// The bundle's folder.
    pub bundle: PathBuf,
    /// The root filesystem as the host sees it.
    pub rootfs: PathBuf,
    /// The monitor, once it was started.
    pub monitor: Option<ProcessIdentity>,
    /// When `create` was called.
    pub created: Timestamp,
    /// The spec's annotations.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// Who called `create`.
    #[serde(default)]
    pub owner: u32,
    /// The host's cgroup.
    pub cgroup: Option<HostCgroup>,
    /// Hooks to run after the container's process was started.
    #[serde(default)]
    pub poststart: Vec<Hook>,
    /// Hooks to run after the container was deleted.
    #[serde(default)]
    pub poststop: Vec<Hook>,
    /// The engine's network namespace, where the container joins one.
    #[serde(default)]
    pub network_namespace: Option<PathBuf>,
    /// The spec's `process`, from which `exec` takes what its caller leaves out.
    #[serde(default)]
    pub process: Option<oci_spec::runtime::Process>,
    /// The machine's size.
    #[serde(default)]
    pub shape: Option<Shape>,
    /// What makes a template for containers like this one, if it may go on from one.
    #[serde(default)]
    pub warm_up: Option<WarmUp>,
    /// The command that the container ends with, where it was made to be thrown away: `rvm do`.
    #[serde(default)]
    pub throw_away: Option<ProcessIdentity>,
}

/// How far the monitor has come. It writes this itself, so that no crash of a command can falsify it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The machine boots or has booted; the container's process was not started.
    Created,
    /// The container's process was started.
    Running,
    /// The machine's vCPUs are halted.
    Paused,
}

impl Step {
    /// The step as it is written down: one byte, which a reader finds whole and a full file system does not stop.
    pub fn to_byte(self) -> u8 {
        match self {
            Step::Created => b'c',
            Step::Running => b'r',
            Step::Paused => b'p',
        }
    }

    /// The step that a byte stands for.
    pub fn from_byte(byte: u8) -> Option<Step> {
        [Step::Created, Step::Running, Step::Paused].into_iter().find(|step| step.to_byte() == byte)
    }
}

/// A container's status in the words of the OCI runtime specification, and `paused` as runc has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// `create` is at work.
    Creating,
    /// Waits for `start`.
    Created,
    /// The container's process runs.
    Running,
    /// The container's process is halted.
    Paused,
    /// The container's process has ended, or never came to be.
    Stopped,
}

impl Status {
    /// The status that follows from what is recorded and what is seen.
    pub fn derive(monitor_alive: bool, step: Option<Step>) -> Status {
        match (monitor_alive, step) {
            (false, _) => Status::Stopped,
            (true, None) => Status::Creating,
            (true, Some(Step::Created)) => Status::Created,
            (true, Some(Step::Running)) => Status::Running,
            (true, Some(Step::Paused)) => Status::Paused,
        }
    }

    /// Whether there is a machine, and processes on the host that belong to it.
    pub fn has_machine(self) -> bool {
        matches!(self, Status::Created | Status::Running | Status::Paused)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        })
    }
}

/// The state as `state` and `list` print it and as hooks get it: the OCI fields, and those that runc adds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StateReport {
    /// Version of the specification.
    pub oci_version: String,
    /// The container's ID.
    pub id: String,
    /// The monitor's process id; 0 when it has ended.
    pub pid: i32,
    /// The status.
    pub status: Status,
    /// The bundle's folder.
    pub bundle: PathBuf,
    /// The root filesystem as the host sees it.
    pub rootfs: PathBuf,
    /// When it was created.
    pub created: Timestamp,
    /// The spec's annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Name of the user who called `create`; empty where the user has none.
    pub owner: String,
}

impl Record {
    /// The report for a status.
    pub fn report(&self, status: Status) -> StateReport {
        let pid = self.monitor.map_or(0, |monitor| monitor.pid);
        StateReport {
            oci_version: OCI_VERSION.to_owned(),
            id: self.id.clone(),
            pid: if status == Status::Stopped { 0 } else { pid },
            status,
            bundle: self.bundle.clone(),
            rootfs: self.rootfs.clone(),
            created: self.created,
            annotations: self.annotations.clone(),
            owner: user_name(self.owner),
        }
    }

    /// What can still be read of a record that is damaged or of another version, so that the container can be
    /// listed and taken apart.
    pub fn salvage(id: &ContainerId, bytes: &[u8]) -> Record {
        let json = serde_json::from_slice::<Value>(bytes).unwrap_or_default();
        fn field<T: DeserializeOwned + Default>(json: &Value, name: &str) -> T {
            serde_json::from_value(json[name].clone()).unwrap_or_default()
        }
        Record {
            id: id.to_string(),
            bundle: field(&json, "bundle"),
            rootfs: field(&json, "rootfs"),
            monitor: field(&json, "monitor"),
            created: field(&json, "created"),
            annotations: field(&json, "annotations"),
            owner: field(&json, "owner"),
            cgroup: field(&json, "cgroup"),
            poststart: field(&json, "poststart"),
            poststop: field(&json, "poststop"),
            network_namespace: field(&json, "network_namespace"),
            process: field(&json, "process"),
            shape: field(&json, "shape"),
            warm_up: field(&json, "warm_up"),
            throw_away: field(&json, "throw_away"),
        }
    }
}

impl StateReport {
    /// The report as the JSON that hooks read from their standard input.
    pub fn to_json(&self) -> String {
        // A structure of strings and numbers always has a JSON form.
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// A user's name from `/etc/passwd`. Read directly: a statically linked program has no name service.
fn user_name(uid: u32) -> String {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let entry = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| matches!(fields[..], [_, _, number, ..] if number.parse() == Ok(uid)));
    entry.map(|fields| fields[0].to_owned()).unwrap_or_default()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::container) fn record() -> Record {
        Record {
            id: "web".into(),
            bundle: "/bundles/web".into(),
            rootfs: "/bundles/web/rootfs".into(),
            monitor: Some(ProcessIdentity { pid: 42, start_time: 7 }),
            created: "2026-01-02T03:04:05.006Z".parse().unwrap(),
            annotations: BTreeMap::from([("a".into(), "b".into())]),
            owner: 0,
            cgroup: None,
            poststart: vec![],
            poststop: vec![],
            network_namespace: None,
            process: None,
            shape: None,
            warm_up: None,
            throw_away: None,
        }
    }

    #[test]
    fn a_dead_monitor_means_stopped_whatever_was_recorded() {
        for step in [None, Some(Step::Created), Some(Step::Running), Some(Step::Paused)] {
            assert_eq!(Status::derive(false, step), Status::Stopped);
        }
        assert_eq!(Status::derive(true, None), Status::Creating);
        assert_eq!(Status::derive(true, Some(Step::Created)), Status::Created);
        assert_eq!(Status::derive(true, Some(Step::Running)), Status::Running);
        assert_eq!(Status::derive(true, Some(Step::Paused)), Status::Paused);
    }

    #[test]
    fn every_step_survives_its_byte() {
        for step in [Step::Created, Step::Running, Step::Paused] {
            assert_eq!(Step::from_byte(step.to_byte()), Some(step));
        }
        assert_eq!(Step::from_byte(b'x'), None);
    }

    #[test]
    fn the_report_has_the_fields_of_runc() {
        let report: Value = serde_json::from_str(&record().report(Status::Running).to_json()).unwrap();
        assert_eq!(
            report,
            serde_json::json!({
                "ociVersion": OCI_VERSION, "id": "web", "pid": 42, "status": "running",
                "bundle": "/bundles/web", "rootfs": "/bundles/web/rootfs",
                "created": "2026-01-02T03:04:05.006Z", "annotations": {"a": "b"}, "owner": "root",
            })
        );
    }

    #[test]
    fn a_stopped_container_has_no_pid() {
        assert_eq!(record().report(Status::Stopped).pid, 0);
    }

    #[test]
    fn what_is_whole_of_a_damaged_record_is_salvaged() {
        let id = "web".parse().unwrap();
        let mut json = serde_json::to_value(record()).unwrap();
        json["created"] = "yesterday".into();
        json["poststop"] = 5.into();
        let salvaged = Record::salvage(&id, json.to_string().as_bytes());
        assert_eq!((salvaged.monitor, salvaged.bundle), (record().monitor, record().bundle));
        let nothing = Record::salvage(&id, b"{\"monitor\": {\"pid\":");
        assert_eq!((nothing.id.as_str(), nothing.monitor), ("web", None));
    }

    #[test]
    fn a_record_survives_the_file() {
        let json = serde_json::to_string(&record()).unwrap();
        let back: Record = serde_json::from_str(&json).unwrap();
        assert_eq!(serde_json::to_string(&back).unwrap(), json);
    }
}
