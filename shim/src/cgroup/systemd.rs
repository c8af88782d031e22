//! Cgroups that systemd makes: `--systemd-cgroup`, the way of Docker and podman on hosts that run systemd.
//!
//! There, cgroups belong to systemd. A container's is a transient *scope*, a unit of processes that somebody else has
//! started: it comes into being with its first process and goes with its last. systemd is told the limits, too, or it
//! would reset them when it reads its configuration again. `Delegate` leaves what is below the scope to others.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use zbus::connection::Builder;
use zbus::{Connection, Variant};

use super::CgroupError;
use super::limits::Setting;

/// How long systemd may take for one thing.
const PATIENCE: Duration = Duration::from_secs(25);

/// What systemd runs on.
const RUNNING: &str = "/run/systemd/system";

const SERVICE: &str = "org.freedesktop.systemd1";
const OBJECT: &str = "/org/freedesktop/systemd1";
const INTERFACE: &str = "org.freedesktop.systemd1.Manager";

/// What a unit is told, by the names of systemd.resource-control(5).
type Properties = Vec<(&'static str, Variant<'static>)>;

/// A scope, by its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Scope {
    unit: String,
    slice: String,
}

impl Scope {
    /// The scope that `linux.cgroupsPath` names as `SLICE:PREFIX:NAME`. Without a path it is one of rvm's own.
    pub(super) fn of(path: Option<&Path>, id: &str) -> Result<Scope, CgroupError> {
        let text = path.map(|path| path.to_string_lossy()).unwrap_or_default();
        let mut parts = text.split(':');
        let (slice, prefix, name) =
            match (text.is_empty(), parts.next(), parts.next(), parts.next(), parts.next()) {
                (true, ..) => ("", "rvm", id),
                (_, Some(slice), Some(prefix), Some(name), None) if !name.is_empty() => (slice, prefix, name),
                _ => return Err(CgroupError::SystemdPath(text.into_owned())),
            };
        let slice = if slice.is_empty() { "system.slice" } else { slice };
        let unit = match prefix {
            "" => format!("{name}.scope"),
            _ => format!("{prefix}-{name}.scope"),
        };
        let scope = Scope { unit, slice: slice.to_owned() };
        if is_unit_name(&scope.unit) && slice_path(slice).is_some() {
            Ok(scope)
        } else {
            Err(CgroupError::SystemdPath(text.into_owned()))
        }
    }

    /// Where systemd puts the scope, from the root of the cgroups on.
    pub(super) fn path(&self) -> PathBuf {
        Path::new("/").join(slice_path(&self.slice).unwrap_or_default()).join(&self.unit)
    }

    /// Makes the scope with its first process and the limits.
    pub(super) fn start(&self, pid: u32, limits: &[Setting]) -> Result<(), CgroupError> {
        let mut properties: Properties = vec![
            ("Description", Variant::from(format!("container {}", self.unit.trim_end_matches(".scope")))),
            ("Slice", Variant::from(self.slice.clone())),
            ("PIDs", Variant::from(vec![pid])),
            ("Delegate", Variant::from(true)),
            // One that failed would keep its name for ever.
            ("CollectMode", Variant::from("inactive-or-failed")),
            ("DefaultDependencies", Variant::from(false)),
        ];
        properties.extend(of_limits(limits));
        let none: Vec<(&str, Properties)> = Vec::new();
        call("StartTransientUnit", &(self.unit.as_str(), "fail", properties, none))
    }

    /// Tells systemd of changed limits.
    pub(super) fn update(&self, limits: &[Setting]) -> Result<(), CgroupError> {
        let properties = of_limits(limits);
        if properties.is_empty() {
            return Ok(());
        }
        call("SetUnitProperties", &(self.unit.as_str(), true, properties))
    }
}

/// Waits until `holds`: systemd answers before it has done what it was asked for.
pub(super) fn wait_until(mut holds: impl FnMut() -> bool) -> Result<(), CgroupError> {
    let start = Instant::now();
    while !holds() {
        if start.elapsed() > PATIENCE {
            return Err(CgroupError::Systemd("the scope was asked for, but never came".into()));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn call<B>(method: &str, arguments: &B) -> Result<(), CgroupError>
where
    B: Serialize + zbus::Type,
{
    if !Path::new(RUNNING).is_dir() {
        return Err(CgroupError::Systemd(
            "it does not run on this host; use the engine's cgroupfs driver".into(),
        ));
    }
    let answered = futures_lite::future::block_on(async {
        let connection: Connection = Builder::system().method_timeout(PATIENCE).build().await?;
        connection.call_method(Some(SERVICE), OBJECT, Some(INTERFACE), method, arguments).await
    });
    answered.map(drop).map_err(|error| CgroupError::Systemd(words_of(&error)))
}

/// D-Bus's own words, of which some would be taken for the workload's.
fn words_of(error: &zbus::Error) -> String {
    match error {
        zbus::Error::InputOutput(error) if error.kind() == io::ErrorKind::NotFound => {
            "D-Bus cannot be reached: is the package dbus installed?".to_owned()
        }
        error => error.to_string().replace("No such file or directory", "nothing is there"),
    }
}

/// Limits in systemd's terms, those that it knows.
fn of_limits(limits: &[Setting]) -> Properties {
    let mut properties = Properties::new();
    for file in limits.iter().flat_map(|setting| &setting.files) {
        let number = || if file.value == "max" { Some(u64::MAX) } else { file.value.parse().ok() };
        let mut add = |name, value: Option<u64>| {
            properties.extend(value.map(|value| (name, Variant::from(value))));
        };
        match file.name {
            "memory.max" => add("MemoryMax", number()),
            "memory.swap.max" => add("MemorySwapMax", number()),
            "memory.low" => add("MemoryLow", number()),
            "cpu.weight" => add("CPUWeight", number()),
            "cpu.max" => add("CPUQuotaPerSecUSec", time_per_second(&file.value)),
            _ => {}
        }
    }
    properties
}

/// `QUOTA PERIOD` as microseconds of processor time in a second.
fn time_per_second(quota: &str) -> Option<u64> {
    let (quota, period) = quota.split_once(' ')?;
    let period: u64 = period.parse().ok().filter(|period| *period > 0)?;
    match quota {
        "max" => Some(u64::MAX),
        quota => quota.parse::<u64>().ok()?.checked_mul(1_000_000)?.checked_div(period),
    }
}

/// The directory of a slice: `a-b.slice` lies in `a.slice`, and `-.slice` is the root (systemd.slice(5)).
fn slice_path(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(PathBuf::new());
    }
    if !is_unit_name(slice) || name.split('-').any(str::is_empty) {
        return None;
    }
    let ends = name.match_indices('-').map(|(index, _)| index).chain([name.len()]);
    Some(ends.map(|end| format!("{}.slice", &name[..end])).collect())
}

/// The characters of unit names (systemd.unit(5)).
fn is_unit_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
    !name.is_empty() && name.len() < 256 && name.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::super::limits::ControlFile;
    use super::*;

    fn scope(path: &str) -> Result<Scope, CgroupError> {
        Scope::of(Some(Path::new(path)), "id")
    }

    #[test]
    fn a_scope_lies_in_its_slice() {
        let path = |path| scope(path).unwrap().path();
        assert_eq!(path("system.slice:docker:4711"), Path::new("/system.slice/docker-4711.scope"));
        assert_eq!(path(":libpod:x"), Path::new("/system.slice/libpod-x.scope"));
        assert_eq!(path("-.slice::x"), Path::new("/x.scope"));
        assert_eq!(path("a-b-c.slice:p:x"), Path::new("/a.slice/a-b.slice/a-b-c.slice/p-x.scope"));
        assert_eq!(path(""), Path::new("/system.slice/rvm-id.scope"));
    }

    #[test]
    fn a_path_of_another_form_is_refused() {
        for path in
            ["/docker/x", "a:b", "a.slice:b:", "a.slice:b:c:d", "a:b:c", "../x.slice:b:c", "a.slice:b:../c"]
        {
            assert!(scope(path).is_err(), "{path}");
        }
        for slice in ["a--b.slice", "-a.slice", "a-.slice", ".slice", "a/b.slice"] {
            assert!(scope(&format!("{slice}:p:x")).is_err(), "{slice}");
        }
    }

    #[test]
    fn limits_have_names_of_systemds_own() {
        let setting = |name, value: &str| Setting {
            controller: "",
            files: vec![ControlFile { name, value: value.to_owned() }],
            required: true,
        };
        let properties = of_limits(&[
            setting("memory.max", "1048576"),
            setting("memory.swap.max", "max"),
            setting("cpu.max", "50000 200000"),
            setting("cpuset.cpus", "0"),
        ]);
        let expected =
            [("MemoryMax", 1_048_576), ("MemorySwapMax", u64::MAX), ("CPUQuotaPerSecUSec", 250_000)];
        assert_eq!(properties, expected.map(|(name, value)| (name, Variant::from(value))));
    }
}
