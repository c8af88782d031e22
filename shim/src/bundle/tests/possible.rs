//! What a microVM can do of what the description asks for.

use super::*;

#[test]
fn what_a_microvm_cannot_do_is_refused_in_its_own_words() {
    let namespaces = |list: &[&str]| -> Value { list.iter().map(|kind| json!({ "type": kind })).collect() };
    let joined = |kind: &str, path: &str| json!({ "type": kind, "path": path });
    let device = device_of_the_host("/dev/snd");
    let cases = [
        ("/linux/namespaces", namespaces(&["mount", "network", "ipc"]), "--pid=host"),
        ("/linux/namespaces", namespaces(&["mount", "network", "pid"]), "--ipc=host"),
        ("/linux/namespaces", namespaces(&["mount", "ipc", "pid"]), "--network=host"),
        ("/linux/namespaces/3", joined("pid", "/proc/1/ns/pid"), "processes of another container"),
        ("/linux/namespaces/4", joined("ipc", "/proc/1/ns/ipc"), "IPC objects with another container"),
        ("/linux/namespaces/1", joined("network", "/proc/self/ns/net"), "share the host's network"),
        ("/linux/namespaces/0", joined("mount", "/proc/1/ns/mnt"), "share the mounts"),
        ("/linux/namespaces/0", joined("time", "/proc/1/ns/time"), "join a time namespace"),
        ("/linux/devices", json!([device]), "pass the host's device /dev/snd"),
        ("/linux/netDevices", json!({ "eth1": {} }), "network devices of the host"),
    ];
    for (pointer, value, expected) in cases {
        let message = refusal(&with(pointer, value));
        assert!(message.contains("a microVM cannot do this: "), "{message}");
        assert!(message.contains(expected), "{pointer}: {message}");
    }
    let message = refusal(&with("/linux/namespaces/1", joined("network", "/run/netns/absent")));
    assert!(message.contains("linux.namespaces[1].path: cannot use /run/netns/absent"), "{message}");
}

/// Some device of this host that a guest has not: neither memory, terminal, nor one of the miscellaneous.
fn device_of_the_host(path: &str) -> Value {
    let names = std::fs::read_dir("/sys/dev/char")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut numbers = names.filter_map(|name| {
        let (major, minor) = name.split_once(':')?;
        Some((major.parse::<i64>().ok()?, minor.parse::<i64>().ok()?))
    });
    let (major, minor) = numbers.find(|(major, _)| ![1, 5, 10].contains(major)).unwrap();
    json!({ "path": path, "type": "c", "major": major, "minor": minor })
}

/// The numbers of some block device of this host.
fn disk_of_the_host() -> Option<(i64, i64)> {
    let name = std::fs::read_dir("/sys/dev/block").ok()?.next()?.ok()?.file_name().into_string().ok()?;
    let (major, minor) = name.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[test]
fn a_block_device_that_the_rules_let_it_read_is_a_disk() {
    let Some((major, minor)) = disk_of_the_host() else {
        eprintln!("not tested: this machine shows no block devices");
        return;
    };
    let node = |path: &str| json!({ "path": path, "type": "b", "major": major, "minor": minor });
    let mut config = with("/linux/devices", json!([node("/dev/xvdc"), node("/dev/again")]));
    let message = refusal(&config);
    assert!(message.contains("which no rule of linux.resources.devices lets it read"), "{message}");
    config["linux"]["resources"]["devices"] = json!([
        { "allow": false, "access": "rwm" },
        { "allow": true, "type": "b", "major": major, "minor": minor, "access": "rm" },
    ]);
    let bundle = load(&config).unwrap();
    let disk = HostDisk { major: major as u32, minor: minor as u32, read_only: true };
    assert_eq!(bundle.disks, [disk]);
    assert_eq!(guest(&bundle)["linux"]["devices"].as_array().unwrap().len(), 2);
}

#[test]
fn a_privileged_container_gets_no_disks_of_the_host() {
    let Some((major, minor)) = disk_of_the_host() else { return };
    let node = json!({ "path": "/dev/sda", "type": "b", "major": major, "minor": minor });
    let mut config = with("/linux/devices", json!([node]));
    config["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
    let bundle = load(&config).unwrap();
    assert!(bundle.disks.is_empty());
    assert_eq!(guest(&bundle)["linux"]["devices"], json!([]));
}

#[test]
fn devices_of_the_guest_are_fine_and_privileged_gets_no_others() {
    let sink = json!({ "path": "/dev/null", "type": "c", "major": 1, "minor": 3 });
    let disk = device_of_the_host("/dev/disk");
    assert!(load(&with("/linux/devices", json!([sink]))).is_ok());
    let mut privileged = with("/linux/devices", json!([sink, disk]));
    assert!(load(&privileged).is_err());
    privileged["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
    let bundle = load(&privileged).unwrap();
    assert_eq!(guest(&bundle)["linux"]["devices"], json!([sink]));
    assert!(bundle.warnings.iter().any(|warning| warning.contains("1 devices of the host")));
}

#[test]
fn a_node_that_is_no_device_of_the_host_is_a_node() {
    let nodes = json!([
        { "path": "/dev/test1", "type": "c", "major": 10, "minor": 66_600 },
        { "path": "/dev/test2", "type": "b", "major": 8, "minor": 66_600 },
        { "path": "/dev/test3", "type": "p" },
    ]);
    let bundle = load(&with("/linux/devices", nodes)).unwrap();
    assert_eq!(guest(&bundle)["linux"]["devices"].as_array().unwrap().len(), 3);
}

#[test]
fn what_has_no_effect_is_said_and_what_cannot_be_done_is_refused() {
    let ignored = [
        ("/linux/resources/memory/swappiness", json!(10), "linux.resources.memory.swappiness is ignored"),
        ("/linux/resources/memory/disableOOMKiller", json!(true), "linux.resources.memory.disableOOMKiller"),
        ("/linux/resources/memory/kernel", json!(1000), "linux.resources.memory.kernel is ignored"),
        ("/linux/resources/memory/kernelTCP", json!(1000), "linux.resources.memory.kernelTCP is ignored"),
        ("/linux/resources/network", json!({ "classID": 7 }), "linux.resources.network.classID is ignored"),
        ("/linux/personality", json!({ "domain": "LINUX", "flags": ["X"] }), "linux.personality.flags"),
        ("/mounts/3/options", json!(["rbind", "rshared"]), "mounts[3]: mounts that the container makes"),
    ];
    for (pointer, value, warning) in ignored {
        let bundle = load(&with(pointer, value)).unwrap();
        assert!(bundle.warnings.iter().any(|line| line.starts_with(warning)), "{:?}", bundle.warnings);
    }
    let quiet = with("/linux/resources/network", json!({}));
    assert_eq!(load(&quiet).unwrap().warnings, load(&config()).unwrap().warnings, "nothing is asked for");
    let kernel = |rest: Value| {
        let mut vm = json!({ "kernel": { "path": "/boot/vmlinux" } });
        vm.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        vm
    };
    let refused = [
        ("/linux/resources/cpu", json!({ "realtimeRuntime": 5 }), "linux.resources.cpu.realtimeRuntime"),
        ("/linux/resources/blockIO", json!({ "leafWeight": 5 }), "linux.resources.blockIO.leafWeight"),
        ("/vm", kernel(json!({ "hypervisor": { "path": "/x" } })), "vm.hypervisor"),
        ("/vm", json!({ "kernel": { "path": "/x", "parameters": ["quiet"] } }), "vm.kernel.parameters"),
        ("/vm", json!({ "kernel": { "path": "x" } }), "vm.kernel.path"),
    ];
    for (pointer, value, name) in refused {
        let words = refusal(&with(pointer, value));
        assert!(words.starts_with(&format!("config.json: {name}: ")), "{words}");
    }
    let bundle = load(&with("/vm", kernel(json!({})))).unwrap();
    assert_eq!(bundle.kernel(), Some(Path::new("/boot/vmlinux")));
}

#[test]
fn a_container_that_joins_a_uts_namespace_has_its_name() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let joined = |kind: &str| {
        let path = format!("/proc/{}/ns/{kind}", std::process::id());
        let mut config = with("/linux/namespaces/2", json!({ "type": "uts", "path": path }));
        config.as_object_mut().unwrap().remove("hostname");
        config
    };
    let bundle = load(&joined("uts")).unwrap();
    let name = nix::unistd::gethostname().unwrap();
    assert_eq!(guest(&bundle)["hostname"], name.to_str().unwrap());
    assert!(bundle.warnings.iter().any(|warning| warning.contains("that namespace's name")));
    let message = refusal(&joined("cgroup"));
    assert!(message.contains("linux.namespaces[2].path: cannot use /proc/"), "{message}");
}

#[test]
fn without_a_uts_namespace_the_guest_gets_the_hosts_name() {
    let mut config = config();
    config["hostname"] = Value::Null;
    config["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "uts");
    let bundle = load(&config).unwrap();
    let name = nix::unistd::gethostname().unwrap();
    assert_eq!(guest(&bundle)["hostname"], name.to_str().unwrap());
    assert!(
        bundle.warnings.iter().any(|line| line.starts_with("linux.namespaces: the container has the host's"))
    );
}
