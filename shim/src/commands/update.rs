//! `update`: other limits for a container that runs. The host's cgroup and the guest's get them both.

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::Args;
use oci_spec::runtime::LinuxResources;

use super::Context;
use super::lifecycle::order;
use crate::bundle::resources;
use crate::cgroup::HostCgroup;
use crate::container::{Container, ContainerError, Status};
use crate::control::Command;
use crate::error::Error;

/// No description of limits is this long.
const MAX_LENGTH: u64 = 1 << 20;

#[derive(Debug, Args)]
pub(super) struct UpdateArguments {
    /// A file with the spec's `linux.resources` as JSON; - for standard input
    #[arg(short, long, value_name = "FILE")]
    resources: Option<PathBuf>,
    /// Limit of the memory in bytes, or with a unit such as M; -1 for none
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true, value_parser = size)]
    memory: Option<i64>,
    /// Limit of memory and swap, likewise
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true, value_parser = size)]
    memory_swap: Option<i64>,
    /// Memory that is not reclaimed while other cgroups have some to give, likewise
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true, value_parser = size)]
    memory_reservation: Option<i64>,
    /// Processor time in microseconds a period
    #[arg(long, value_name = "MICROSECONDS", allow_hyphen_values = true)]
    cpu_quota: Option<i64>,
    /// Length of a period in microseconds
    #[arg(long, value_name = "MICROSECONDS")]
    cpu_period: Option<u64>,
    /// Microseconds saved in earlier periods that may be used on top of the quota
    #[arg(long, value_name = "MICROSECONDS")]
    cpu_burst: Option<u64>,
    /// Relative share of processor time
    #[arg(long, value_name = "SHARES")]
    cpu_share: Option<u64>,
    /// 1 to run only where nothing else wants to, 0 as ever
    #[arg(long, value_name = "0|1")]
    cpu_idle: Option<i64>,
    /// The host's processors that may be used, such as 0-2,4
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// The host's memory nodes that may be used
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// Relative share of input and output, from 10 to 1000
    #[arg(long, value_name = "WEIGHT")]
    blkio_weight: Option<u16>,
    /// Limit of the number of processes
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pids_limit: Option<i64>,
    /// The container's ID
    #[arg(value_name = "ID")]
    id: String,
}

pub(super) fn update(context: &Context, arguments: &UpdateArguments) -> Result<(), Error> {
    let (container, _lock) = Container::open_locked(&context.root, &arguments.id)?;
    let json = arguments.to_json()?;
    let limits: LinuxResources = serde_json::from_value(json.clone()).map_err(|error| malformed(&error))?;
    match container.status() {
        Status::Stopped | Status::Creating => return Err(ContainerError::NotRunning.into()),
        // The guest cannot answer while it is halted.
        Status::Paused => return Err(ContainerError::Paused.into()),
        Status::Created | Status::Running => {}
    }
    if let Some(shape) = &container.record.shape {
        let in_force = container.record.cgroup.as_ref().and_then(HostCgroup::processor_time);
        shape
            .can_give(&limits, in_force.unwrap_or_default())
            .map_err(|error| Error::Usage(error.to_string()))?;
    }
    let mut warnings = Vec::new();
    resources::check(&limits, "linux.resources", &mut warnings)?;
    warnings.iter().for_each(|warning| context.log.warning(warning));
    let order = || order(&container, &Command::Update { resources: json.to_string() });
    let Some(cgroup) = &container.record.cgroup else { return order() };
    let before = cgroup.snapshot(&limits);
    let changed = cgroup.update(&limits).map_err(Error::from).and_then(|()| order());
    changed.inspect_err(|_| cgroup.restore(&before))
}

impl UpdateArguments {
    fn to_json(&self) -> Result<serde_json::Value, Error> {
        let mut json = match &self.resources {
            Some(path) => serde_json::from_str(&read(path)?).map_err(|error| malformed(&error))?,
            None => serde_json::json!({}),
        };
        if !json.is_object() {
            return Err(Error::Usage("the resources are no JSON object".into()));
        }
        let values: [(_, _, Option<serde_json::Value>); 12] = [
            ("memory", "limit", self.memory.map(Into::into)),
            ("memory", "swap", self.memory_swap.map(Into::into)),
            ("memory", "reservation", self.memory_reservation.map(Into::into)),
            ("cpu", "quota", self.cpu_quota.map(Into::into)),
            ("cpu", "period", self.cpu_period.map(Into::into)),
            ("cpu", "burst", self.cpu_burst.map(Into::into)),
            ("cpu", "shares", self.cpu_share.map(Into::into)),
            ("cpu", "idle", self.cpu_idle.map(Into::into)),
            ("cpu", "cpus", self.cpuset_cpus.clone().map(Into::into)),
            ("cpu", "mems", self.cpuset_mems.clone().map(Into::into)),
            ("blockIO", "weight", self.blkio_weight.map(Into::into)),
            ("pids", "limit", self.pids_limit.map(Into::into)),
        ];
        for (group, name, value) in values {
            if let Some(value) = value {
                if !json[group].is_object() {
                    json[group] = serde_json::json!({});
                }
                json[group][name] = value;
            }
        }
        Ok(json)
    }
}

/// A number of bytes: `-1`, `33554432`, or with a unit as in `50M`, `1.5g` and `64KiB`, all powers of 1024.
fn size(text: &str) -> Result<i64, String> {
    if let Ok(bytes) = text.parse() {
        return Ok(bytes);
    }
    let wrong = || format!("`{text}` is no number of bytes, such as 33554432, 32M or -1");
    let lower = text.to_ascii_lowercase();
    let (number, unit) = lower.split_at(lower.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(lower.len()));
    let power = match unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(unit) {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return Err(wrong()),
    };
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    let bytes = number * 1024_f64.powi(power);
    // 2^63, above which there is no such number of bytes.
    if (0.0..9_223_372_036_854_775_808.0).contains(&bytes) { Ok(bytes as i64) } else { Err(wrong()) }
}

fn malformed(error: &serde_json::Error) -> Error {
    Error::Usage(format!("the resources cannot be understood: {error}"))
}

fn read(path: &Path) -> Result<String, Error> {
    let failed = || format!("cannot read the resources from {}", path.display());
    let mut text = String::new();
    let result = if path == Path::new("-") {
        std::io::stdin().take(MAX_LENGTH).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(MAX_LENGTH).read_to_string(&mut text))
    };
    result.map_err(Error::system(failed()))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        arguments: UpdateArguments,
    }

    #[test]
    fn flags_are_entered_over_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resources.json");
        std::fs::write(&path, r#"{"memory":{"limit":1,"swap":2},"pids":null}"#).unwrap();
        let path = path.to_str().unwrap();
        let words =
            ["update", "--resources", path, "--memory", "5", "--memory-swap", "-1", "--pids-limit", "9", "c"];
        let json = Command::parse_from(words).arguments.to_json().unwrap();
        assert_eq!(json, serde_json::json!({"memory": {"limit": 5, "swap": -1}, "pids": {"limit": 9}}));
    }

    #[test]
    fn every_flag_is_entered_under_its_name_in_the_spec() {
        let words = "update --memory-reservation 24M --cpu-burst 7 --cpu-idle 1 --cpuset-cpus 0-2 --cpuset-mems 0 \
                     --blkio-weight 500 c";
        let json = Command::parse_from(words.split_whitespace()).arguments.to_json().unwrap();
        let expected = serde_json::json!({
            "memory": {"reservation": 24 << 20},
            "cpu": {"burst": 7, "idle": 1, "cpus": "0-2", "mems": "0"},
            "blockIO": {"weight": 500},
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn sizes_have_the_units_of_other_runtimes() {
        let sizes = ["-1", "0", "33554432", "50M", "50mb", "50MiB", "1.5k", "1g", "2b"]
            .map(|text| size(text).unwrap());
        assert_eq!(sizes, [-1, 0, 33_554_432, 50 << 20, 50 << 20, 50 << 20, 1536, 1 << 30, 2]);
        for text in ["", "M", "5x", "-5M", "1e400", "9999999P", "nan", "inf"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resources.json");
        for text in ["[]", "{", "3"] {
            std::fs::write(&path, text).unwrap();
            let command = Command::parse_from(["update", "-r", path.to_str().unwrap(), "c"]);
            assert!(command.arguments.to_json().is_err(), "{text}");
        }
    }
}
