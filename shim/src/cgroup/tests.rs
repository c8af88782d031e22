//! Limits and paths on paper, and then the real thing where this is root.

use std::process::{Child, Command};

use oci_spec::runtime::Spec;
use serde_json::json;

use super::limits::{processor_time, version1, version2};
use super::*;
use crate::container::shape::{HostSize, Shape, host_memory};
use crate::mountinfo::MountEntry;

fn resources(json: serde_json::Value) -> LinuxResources {
    serde_json::from_value(json).unwrap()
}

/// Controls and values as `file=value`.
fn written(settings: &[Setting]) -> Vec<String> {
    settings.iter().map(|setting| format!("{}={}", setting.files[0].name, setting.files[0].value)).collect()
}

fn entry(file_system: &str, mount_point: &str, root: &str, options: &str) -> MountEntry {
    MountEntry {
        root: root.into(),
        mount_point: mount_point.into(),
        options: Vec::new(),
        file_system: file_system.into(),
        super_options: options.split(',').map(str::to_owned).collect(),
    }
}

fn paths(layout: &Layout, path: Option<&str>) -> Vec<String> {
    let cgroup = layout.locate(path.map(Path::new), "c1").unwrap();
    cgroup.paths().iter().map(|path| path.display().to_string()).collect()
}

#[test]
fn docker_limits_in_version_2() {
    let limits = resources(json!({
        "memory": { "limit": 536_870_912, "swap": 1_073_741_824, "reservation": 1024 },
        "cpu": { "shares": 1024, "quota": 150_000, "period": 100_000, "cpus": "0-1" },
        "pids": { "limit": 100 }
    }));
    assert_eq!(
        written(&version2(&limits, None)),
        [
            format!("memory.max={}", host_memory(536_870_912)),
            "memory.swap.max=536870912".into(),
            "memory.low=1024".into(),
            "cpu.weight=100".into(),
            "cpu.max=150000 100000".into(),
            "cpuset.cpus=0-1".into(),
        ],
        "and nothing about processes"
    );
}

#[test]
fn of_the_controls_by_name_the_host_heeds_those_about_its_own_hardware() {
    let unified = json!({ "cpu.max": "5 10", "cpu.weight": "17", "cpuset.cpus": "0", "memory.max": "1", "pids.max": "20" });
    let limits = resources(json!({ "unified": unified }));
    let expected = ["cpu.max=5 10", "cpu.weight=17", "cpuset.cpus=0"];
    assert_eq!(written(&version2(&limits, None)), expected);
}

#[test]
fn docker_limits_in_version_1() {
    let limits = resources(json!({
        "memory": { "limit": 536_870_912, "swap": -1, "swappiness": 10 },
        "cpu": { "shares": 512, "quota": -1, "mems": "0" },
        "blockIO": { "weight": 300, "throttleReadBpsDevice": [{ "major": 8, "minor": 0, "rate": 1000 }] }
    }));
    assert_eq!(
        written(&version1(&limits)),
        [
            format!("memory.limit_in_bytes={}", host_memory(536_870_912)),
            "memory.memsw.limit_in_bytes=-1".into(),
            "memory.swappiness=10".into(),
            "cpu.shares=512".into(),
            "cpu.cfs_quota_us=-1".into(),
            "cpuset.mems=0".into(),
            "blkio.weight=300".into(),
            "blkio.throttle.read_bps_device=8:0 1000".into(),
        ]
    );
}

#[test]
fn zero_is_not_set_and_extremes_do_not_overflow() {
    let zero = resources(
        json!({ "memory": { "limit": 0, "swap": 0 }, "cpu": { "shares": 0, "quota": 0, "period": 0 } }),
    );
    assert_eq!(version1(&zero), []);
    assert_eq!(version2(&zero, None), []);
    let huge = resources(json!({
        "memory": { "limit": i64::MAX, "swap": i64::MIN },
        "cpu": { "shares": u64::MAX, "quota": i64::MIN, "period": u64::MAX },
        "blockIO": { "weight": 65535 }
    }));
    assert!(written(&version1(&huge)).contains(&format!("memory.limit_in_bytes={}", i64::MAX)));
    assert!(written(&version2(&huge, None)).contains(&"cpu.weight=10000".into()));
}

#[test]
fn the_weights_of_version_2_meet_both_ends_and_the_default() {
    for (shares, weight) in [(1, 1), (2, 1), (1024, 100), (262_144, 10_000), (u64::MAX, 10_000)] {
        let limits = resources(json!({ "cpu": { "shares": shares } }));
        assert_eq!(written(&version2(&limits, None)), [format!("cpu.weight={weight}")], "{shares}");
    }
}

#[test]
fn half_of_a_quota_keeps_the_other_half() {
    let quota = resources(json!({ "cpu": { "quota": 20_000 } }));
    assert_eq!(written(&version2(&quota, Some("max 50000\n"))), ["cpu.max=20000 50000"]);
    let period = resources(json!({ "cpu": { "period": 10_000 } }));
    assert_eq!(written(&version2(&period, Some("20000 50000\n"))), ["cpu.max=20000 10000"]);
    assert_eq!(written(&version2(&quota, None)), ["cpu.max=20000 100000"]);
}

#[test]
fn the_processor_time_in_force_is_read() {
    let time = |quota, period| Some(ProcessorTime { quota, period });
    assert_eq!(processor_time("20000 50000\n"), time(Some(20_000), 50_000));
    assert_eq!(processor_time("max 100000\n"), time(None, 100_000));
    assert_eq!(processor_time("-1 100000\n"), time(None, 100_000));
    assert_eq!(processor_time("max"), None);
}

#[test]
fn the_machine_needs_more_than_its_workload() {
    assert!(host_memory(4 << 20) > 128 << 20, "the smallest guest fits");
    assert!(host_memory(1 << 30) > (1 << 30) + (64 << 20));
    assert_eq!(host_memory(u64::MAX), u64::MAX);
}

#[test]
fn a_guest_that_uses_all_its_memory_fits_the_hosts_limit() {
    let host = HostSize { processors: 4, memory: 1 << 40 };
    for limit in [1 << 20, 6 << 20, 64 << 20, 512 << 20, 1 << 30, 64 << 30_u64] {
        let machine = Shape::of(&spec("/x", json!({ "memory": { "limit": limit } })), host).memory;
        assert!(host_memory(limit) >= machine + (48 << 20), "{limit}: {machine}, {}", host_memory(limit));
    }
}

#[test]
fn version_2_counts_in_its_usual_place_only() {
    let unified = [entry("cgroup2", "/sys/fs/cgroup", "/", "rw,nsdelegate")];
    let layout = Layout::of(&unified, "0::/system.slice/docker.service\n").unwrap();
    assert_eq!(paths(&layout, Some("/docker/x")), ["/sys/fs/cgroup/docker/x"]);
    assert_eq!(paths(&layout, None), ["/sys/fs/cgroup/c1"]);
    assert_eq!(paths(&layout, Some("x")), ["/sys/fs/cgroup/system.slice/x"], "beside the caller's own");
    let hybrid = [
        entry("cgroup", "/sys/fs/cgroup/memory", "/", "rw,memory"),
        entry("cgroup", "/sys/fs/cgroup/cpu,cpuacct", "/", "rw,cpu,cpuacct"),
        entry("cgroup2", "/sys/fs/cgroup/unified", "/", "rw"),
    ];
    let own = "3:cpu,cpuacct:/a\n2:memory:/b\n0::/c\n";
    let layout = Layout::of(&hybrid, own).unwrap();
    assert_eq!(paths(&layout, Some("x")), ["/sys/fs/cgroup/memory/b/x", "/sys/fs/cgroup/cpu,cpuacct/a/x"]);
    assert_eq!(Layout::of(&[entry("tmpfs", "/", "/", "rw")], ""), None);
}

#[test]
fn a_part_of_a_hierarchy_that_is_mounted_is_not_named_twice() {
    let inside = [entry("cgroup", "/sys/fs/cgroup/memory", "/docker/outer", "rw,memory")];
    let layout = Layout::of(&inside, "2:memory:/docker/outer/sub\n").unwrap();
    assert_eq!(paths(&layout, Some("x")), ["/sys/fs/cgroup/memory/sub/x"]);
}

#[test]
fn no_path_leads_out_of_the_hierarchy_or_to_its_root() {
    let unified = [entry("cgroup2", "/sys/fs/cgroup", "/", "rw")];
    let layout = Layout::of(&unified, "0::/\n").unwrap();
    assert_eq!(paths(&layout, Some("/../../etc/x")), ["/sys/fs/cgroup/etc/x"]);
    assert_eq!(paths(&layout, Some("../../x")), ["/sys/fs/cgroup/x"]);
    for root in ["/", "/a/..", "..", "."] {
        let result = layout.locate(Some(Path::new(root)), "c1");
        assert!(matches!(result, Err(CgroupError::Root(_))), "{root}");
    }
}

#[test]
fn without_systemd_its_driver_is_refused_in_words() {
    if Path::new("/run/systemd/system").is_dir() {
        eprintln!("not run: systemd runs here, and would make the cgroup");
        return;
    }
    let refused = HostCgroup::locate(&Spec::default(), "test", true)
        .and_then(|cgroup| cgroup.add_first(std::process::id(), false, &Spec::default()))
        .unwrap_err()
        .to_string();
    assert!(refused.starts_with("--systemd-cgroup") && refused.contains("cgroupfs driver"), "{refused}");
}

/// A version 2 hierarchy of plain files, to see what is written where.
fn paper_hierarchy(controls: &[&str]) -> (tempfile::TempDir, HostCgroup) {
    let directory = tempfile::tempdir().unwrap();
    for control in controls {
        fs::write(directory.path().join(control), "").unwrap();
    }
    let path = directory.path().to_owned();
    let cgroup = HostCgroup {
        version: Version::V2,
        directories: vec![Directory { controllers: BTreeSet::new(), path }],
        scope: None,
    };
    (directory, cgroup)
}

#[test]
fn a_control_that_is_not_there_is_an_error_and_never_made() {
    let (directory, cgroup) = paper_hierarchy(&["cpu.max", "io.weight"]);
    cgroup.update(&resources(json!({ "cpu": { "quota": 5 }, "blockIO": { "weight": 10 } }))).unwrap();
    let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
    assert_eq!(read("cpu.max"), "5 100000");
    assert_eq!(read("io.weight"), "1", "where the other scheduler's control is missing");
    let error = cgroup.update(&resources(json!({ "memory": { "limit": 1, "swap": 1 } }))).unwrap_err();
    assert!(error.to_string().contains("linux.resources: memory.max cannot be set"), "{error}");
    assert!(!directory.path().join("memory.max").exists());
}

#[test]
fn an_update_that_is_taken_back_leaves_the_controls_as_they_were() {
    let (_directory, cgroup) = paper_hierarchy(&["memory.max", "cpu.max"]);
    let path = cgroup.paths().remove(0);
    fs::write(path.join("memory.max"), "max").unwrap();
    fs::write(path.join("cpu.max"), "5000 50000").unwrap();
    let limits = resources(json!({ "memory": { "limit": 1000 }, "cpu": { "quota": 7000 } }));
    let before = cgroup.snapshot(&limits);
    cgroup.update(&limits).unwrap();
    assert_ne!(fs::read_to_string(path.join("memory.max")).unwrap(), "max");
    // Unlike a control, a file keeps what is not overwritten.
    fs::write(path.join("memory.max"), "").unwrap();
    fs::write(path.join("cpu.max"), "").unwrap();
    cgroup.restore(&before);
    assert_eq!(fs::read_to_string(path.join("memory.max")).unwrap(), "max");
    assert_eq!(fs::read_to_string(path.join("cpu.max")).unwrap(), "5000 50000");
}

#[test]
fn state_survives_the_way_to_disk() {
    let (_directory, cgroup) = paper_hierarchy(&[]);
    let json = serde_json::to_string(&cgroup).unwrap();
    assert_eq!(serde_json::from_str::<HostCgroup>(&json).unwrap(), cgroup);
}

/// Ends the process when the test does, however it does.
struct Sleeper(Child);

impl Sleeper {
    fn new() -> Self {
        Self(Command::new("sleep").arg("1000").spawn().unwrap())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn create(spec: &Spec, id: &str, systemd: bool) -> Result<HostCgroup, CgroupError> {
    let cgroup = HostCgroup::locate(spec, id, systemd)?;
    cgroup.make(spec).map(|()| cgroup)
}

fn can_make_cgroups() -> bool {
    let able = nix::unistd::geteuid().is_root()
        && Layout::read().is_ok_and(|layout| {
            let probe = format!("rvm-probe-{}-{:?}", std::process::id(), thread::current().id());
            let made = layout
                .locate(None, &probe.replace(['(', ')'], ""))
                .and_then(|cgroup| cgroup.make_in(&layout, None).map(|()| cgroup));
            made.is_ok_and(|cgroup| cgroup.remove().is_ok())
        });
    if !able {
        println!("not run: this takes root and a writable cgroup hierarchy");
    }
    able
}

fn spec(path: &str, resources: serde_json::Value) -> Spec {
    let linux = json!({ "cgroupsPath": path, "resources": resources });
    serde_json::from_value(json!({ "ociVersion": "1.2.0", "linux": linux })).unwrap()
}

#[test]
fn a_cgroup_holds_processes_until_they_are_killed() {
    if !can_make_cgroups() {
        return;
    }
    let path = format!("/rvm-test-{}/hold", std::process::id());
    let cgroup = create(&spec(&path, json!({})), "c1", false).unwrap();
    let mut sleeper = Sleeper::new();
    cgroup.add(sleeper.0.id()).unwrap();
    assert_eq!(cgroup.pids().unwrap(), [sleeper.0.id()]);
    let again = create(&spec(&path, json!({})), "c1", false).unwrap_err();
    assert!(matches!(again, CgroupError::Busy { count: 1, .. }), "{again}");
    assert!(cgroup.paths().iter().all(|path| path.is_dir()), "the failed attempt removed nothing");

    cgroup.kill_all().unwrap();
    assert!(!sleeper.0.wait().unwrap().success());
    cgroup.remove().unwrap();
    assert!(cgroup.paths().iter().all(|path| !path.exists()));
    cgroup.remove().unwrap();
    cgroup.kill_all().unwrap();
    assert_eq!(cgroup.pids().unwrap(), Vec::<u32>::new());
    for parent in cgroup.paths() {
        let _ = fs::remove_dir(parent.parent().unwrap());
    }
}

#[test]
fn limits_reach_the_kernel_and_a_refused_one_leaves_nothing() {
    if !can_make_cgroups() {
        return;
    }
    let path = format!("/rvm-test-limits-{}", std::process::id());
    let limits = json!({ "memory": { "limit": 67_108_864 }, "cpu": { "quota": 50_000, "period": 100_000 } });
    let cgroup = match create(&spec(&path, limits), "c1", false) {
        Err(CgroupError::Unavailable { file, .. }) => {
            println!("not run: this host's hierarchy has no {file}");
            return;
        }
        other => other.unwrap(),
    };
    let read = |controller: &str, names: [&str; 2]| {
        let directory = &cgroup.with_controller(controller).unwrap().path;
        let mut texts = names.iter().filter_map(|name| fs::read_to_string(directory.join(name)).ok());
        texts.next().unwrap().trim().to_owned()
    };
    let memory = ["memory.max", "memory.limit_in_bytes"];
    assert_eq!(read("memory", memory), host_memory(67_108_864).to_string());
    assert!(read("cpu", ["cpu.max", "cpu.cfs_quota_us"]).starts_with("50000"));
    cgroup.update(&resources(json!({ "memory": { "limit": 134_217_728 } }))).unwrap();
    assert_eq!(read("memory", memory), host_memory(134_217_728).to_string());
    assert!(read("cpu", ["cpu.max", "cpu.cfs_quota_us"]).starts_with("50000"), "what is not given stays");
    cgroup.remove().unwrap();

    let senseless = json!({ "cpu": { "cpus": "4000-5000" } });
    let error = create(&spec(&path, senseless), "c1", false).unwrap_err();
    assert!(matches!(&error, CgroupError::Refused { .. } | CgroupError::Unavailable { .. }), "{error}");
    assert!(cgroup.paths().iter().all(|path| !path.exists()));
}
