//! Good bundles, and every way known to us of breaking one.

mod possible;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// What Docker writes for `docker run -v /tmp:/data busybox`, shortened.
fn config() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "hostname": "b0c4",
        "process": {
            "user": { "uid": 0, "gid": 0, "additionalGids": [0, 10] },
            "args": ["sh"],
            "env": ["PATH=/bin", "HOSTNAME=b0c4"],
            "cwd": "/",
            "capabilities": {
                "bounding": ["CAP_CHOWN", "CAP_KILL"], "permitted": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"]
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 4096, "soft": 1024 }],
            "apparmorProfile": "docker-default",
            "oomScoreAdj": 0
        },
        "root": { "path": "rootfs" },
        "hooks": {
            "prestart": [{ "path": "/proc/1234/exe", "args": ["libnetwork-setkey", "b0c4"] }],
            "startContainer": [{ "path": "/bin/true" }]
        },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"] },
            { "destination": "/data", "type": "bind", "source": "/tmp", "options": ["rbind", "rprivate"] }
        ],
        "linux": {
            "cgroupsPath": "/docker/b0c4",
            "namespaces": [
                { "type": "mount" }, { "type": "network" }, { "type": "uts" }, { "type": "pid" }, { "type": "ipc" }
            ],
            "resources": { "devices": [{ "allow": false, "access": "rwm" }], "memory": { "limit": 1048576 } },
            "seccomp": { "defaultAction": "SCMP_ACT_ALLOW" },
            "maskedPaths": ["/proc/kcore"]
        }
    })
}

/// Loads a bundle whose description has these bytes.
fn load_bytes(bytes: &[u8]) -> Result<Bundle, BundleError> {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("rootfs")).unwrap();
    std::fs::write(directory.path().join(CONFIG), bytes).unwrap();
    Bundle::load(directory.path())
}

fn load(config: &Value) -> Result<Bundle, BundleError> {
    load_bytes(&serde_json::to_vec(config).unwrap())
}

/// The good description with one place changed; `pointer` is a JSON pointer.
fn with(pointer: &str, value: Value) -> Value {
    let mut config = config();
    match config.pointer_mut(pointer) {
        Some(place) => *place = value,
        None => {
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            let parent = config.pointer_mut(parent).unwrap();
            match parent {
                Value::Array(list) => list.push(value),
                _ => parent[key] = value,
            }
        }
    }
    config
}

fn refusal(config: &Value) -> String {
    let message = load(config).map(drop).expect_err("a refusal").to_string();
    assert!(!message.contains('\n'), "one line: {message}");
    message
}

fn guest(bundle: &Bundle) -> Value {
    serde_json::from_str(&bundle.guest_spec_json()).unwrap()
}

#[test]
fn a_bundle_of_docker_is_good() {
    let bundle = load(&config()).unwrap();
    assert_eq!(bundle.rootfs, bundle.path.join("rootfs"));
    assert_eq!(bundle.network_namespace(), NetworkNamespace::New);
    assert_eq!(
        bundle.warnings,
        ["process.apparmorProfile is ignored: the guest's kernel has no such security module"]
    );
}

#[test]
fn the_guest_gets_nothing_that_is_the_hosts() {
    let guest = guest(&load(&config()).unwrap());
    assert_eq!(guest["hooks"], json!({ "startContainer": [{ "path": "/bin/true" }] }));
    assert_eq!(guest["root"], json!({ "path": "/" }));
    for gone in ["/linux/seccomp", "/linux/cgroupsPath", "/process/apparmorProfile", "/mounts/3/source"] {
        assert_eq!(guest.pointer(gone), None, "{gone}");
    }
    for kept in
        ["/process/args/0", "/mounts/1/options/3", "/linux/resources/memory/limit", "/linux/maskedPaths/0"]
    {
        assert_eq!(guest.pointer(kept), config().pointer(kept), "{kept}");
    }
}

#[test]
fn every_broken_field_is_named_in_one_line() {
    let bound =
        |options: Value| json!({ "destination": "/x", "source": "/tmp", "type": "bind", "options": options });
    let cases = [
        ("/ociVersion", json!("invalid"), "ociVersion: `invalid` is not a version"),
        ("/ociVersion", json!("1.2"), "ociVersion: `1.2` is not a version"),
        ("/annotations", json!({ "": "x" }), "annotations: a key is empty"),
        ("/process/args", json!([]), "process.args: there is no command"),
        ("/process/args", json!("sh"), "process.args: invalid type: string \"sh\", expected a sequence"),
        ("/process/args/0", json!("a\u{0}b"), "process.args[0]: it contains a NUL"),
        ("/process/cwd", json!("tmp"), "process.cwd: `tmp` is not an absolute path"),
        ("/process/cwd", Value::Null, "process.cwd: invalid type: null"),
        ("/process/env/1", json!("HOSTNAME"), "process.env[1]: `HOSTNAME` is not of the form"),
        ("/process/user/uid", json!(-1), "process.user.uid: invalid value: integer `-1`"),
        (
            "/process/rlimits/0/type",
            json!("RLIMIT_FUN"),
            "process.rlimits[0].type: `RLIMIT_FUN` is not known",
        ),
        (
            "/process/rlimits/0/soft",
            json!(9999),
            "process.rlimits[0]: the soft limit of RLIMIT_NOFILE is above",
        ),
        (
            "/process/rlimits/-",
            config()["process"]["rlimits"][0].clone(),
            "process.rlimits[1]: RLIMIT_NOFILE is there",
        ),
        (
            "/process/rlimits/0/hard",
            json!(u64::MAX),
            "process.rlimits[0].hard: 18446744073709551615 open files",
        ),
        (
            "/process/capabilities/inheritable",
            json!(["CAP_FOWNER"]),
            "process.capabilities.inheritable: CAP_FOWNER is not in the bounding set",
        ),
        ("/root", Value::Null, "root: it is missing"),
        ("/root/path", json!("no-such-place"), "root.path: cannot use"),
        ("/root/path", json!("config.json"), "root.path: cannot use"),
        ("/root/path", json!(7), "root.path: invalid type: integer `7`"),
        (
            "/hooks/prestart/0/path",
            json!("setkey"),
            "hooks.prestart[0].path: `setkey` is not an absolute path",
        ),
        ("/hooks/prestart/0/timeout", json!(0), "hooks.prestart[0].timeout"),
        ("/mounts", json!({}), "mounts: invalid type: map, expected a sequence"),
        ("/mounts/0/destination", json!("/"), "mounts[0].destination: a mount cannot replace"),
        ("/mounts/0/destination", json!("/x/../.."), "mounts[0].destination: a mount cannot replace"),
        ("/mounts/0/destination", json!(""), "mounts[0].destination: a mount cannot replace"),
        (
            "/mounts/0/type",
            json!("nfs"),
            "mounts[0].type: a microVM cannot do this: mount a file system of type `nfs`",
        ),
        ("/mounts/2/type", Value::Null, "mounts[2].type: it is missing"),
        (
            "/mounts/0/options/0",
            json!("sideways"),
            "mounts[0].options: `sideways` is not an option of a proc mount",
        ),
        (
            "/mounts/-",
            bound(json!(["bind", "sighs=1m"])),
            "mounts[4].options: `sighs=1m` is not an option of a bind",
        ),
        ("/mounts/-", bound(json!(["bind", "idmap"])), "mounts[4]: a microVM cannot do this: id-mapped"),
        ("/mounts/3/source", Value::Null, "mounts[3].source: a bind mount needs a source"),
        ("/linux", Value::Null, "linux: it is missing"),
        ("/linux/namespaces/0/type", json!("soul"), "linux.namespaces[0].type: `soul` is not known"),
        (
            "/linux/namespaces/-",
            json!({ "type": "pid" }),
            "linux.namespaces[5].type: this namespace is there twice",
        ),
        (
            "/linux/namespaces/-",
            json!({ "type": "user" }),
            "linux.uidMappings: a user namespace needs a mapping",
        ),
        (
            "/linux/uidMappings",
            json!([{ "containerID": 0, "hostID": 0, "size": 1 }]),
            "linux.uidMappings: there is no",
        ),
        (
            "/linux/seccomp/defaultAction",
            json!("SCMP_ACT_HUG"),
            "linux.seccomp.defaultAction: `SCMP_ACT_HUG` is not",
        ),
        (
            "/linux/rootfsPropagation",
            json!("sideways"),
            "linux.rootfsPropagation: `sideways` is no kind of propagation",
        ),
        ("/linux/resources/memory/limit", json!("1g"), "linux.resources.memory.limit: invalid type: string"),
    ];
    for (pointer, value, expected) in cases {
        let message = refusal(&with(pointer, value));
        assert!(message.contains(expected), "{pointer}: {message}");
        assert!(message.starts_with("config.json: "), "{message}");
    }
}

#[test]
fn a_capability_that_nobody_knows_is_told_of_and_not_given() {
    let bundle = load(&with("/process/capabilities/bounding/1", json!("CAP_FLY"))).unwrap();
    assert_eq!(guest(&bundle)["process"]["capabilities"]["bounding"], json!(["CAP_CHOWN"]));
    assert!(bundle.warnings.iter().any(|warning| warning.contains("unavailable capabilities: [CAP_FLY]")));
    assert!(refusal(&with("/process/capabilities/bounding/1", json!(7))).contains("bounding[1]"));
}

#[test]
fn clocks_are_those_of_a_time_namespace() {
    let offsets = |clock: &str, nanoseconds: u32| {
        let mut config = with("/linux/namespaces/-", json!({ "type": "time" }));
        config["linux"]["timeOffsets"] = json!({ clock: { "secs": -5, "nanosecs": nanoseconds } });
        config
    };
    let bundle = load(&offsets("monotonic", 7)).unwrap();
    let shifted = json!({ "monotonic": { "secs": -5, "nanosecs": 7 } });
    assert_eq!(guest(&bundle).pointer("/linux/timeOffsets"), Some(&shifted));
    assert!(refusal(&offsets("realtime", 0)).contains("linux.timeOffsets.realtime: the clocks of a time"));
    assert!(
        refusal(&offsets("boottime", 1_000_000_000)).contains("linux.timeOffsets.boottime.nanosecs: it is a")
    );
    let without = with("/linux/timeOffsets", json!({ "boottime": { "secs": 1 } }));
    assert!(refusal(&without).contains("linux.timeOffsets.boottime: there is no time namespace"));
}

#[test]
fn the_propagation_of_the_root_may_be_left_empty() {
    let bundle = load(&with("/linux/rootfsPropagation", json!(""))).unwrap();
    assert_eq!(guest(&bundle).pointer("/linux/rootfsPropagation"), None);
}

#[test]
fn options_of_a_file_system_mean_nothing_to_a_bind() {
    let bind = json!({
        "destination": "/mnt", "type": "tmpfs", "source": "/etc", "options": ["strictatime", "mode=755", "size=1k", "bind"],
    });
    let bundle = load(&with("/mounts/-", bind)).unwrap();
    let words = bundle.warnings.join("\n");
    assert!(words.contains("`mode=755` is ignored") && words.contains("`size=1k` is ignored"), "{words}");
}

#[test]
fn mounts_come_in_one_form() {
    let mut config = config();
    config["mounts"] = json!([
        { "destination": "relative/../data", "source": "sources", "options": ["bind"] },
        { "destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "ro"] },
        { "destination": "/host/sys", "type": "none", "source": "/sys", "options": ["rbind"] },
        { "destination": "/t", "type": "tmpfs", "options": ["context=\"system_u\"", "size=1m"] }
    ]);
    let bundle = load(&config).unwrap();
    let mounts = bundle.spec.mounts().as_ref().unwrap();
    assert_eq!(mounts[0].destination(), Path::new("/data"));
    assert_eq!(mounts[0].source().as_ref().unwrap(), &bundle.path.join("sources"));
    let kinds: Vec<_> = mounts.iter().map(|mount| mount.typ().clone().unwrap()).collect();
    assert_eq!(kinds, ["bind", "sysfs", "bind", "tmpfs"], "the guest has a sysfs of its own");
    assert_eq!(guest(&bundle)["mounts"][3]["options"], json!(["size=1m"]));
    assert_eq!(bundle.warnings.len(), 3, "{:?}", bundle.warnings);
}

#[test]
fn a_description_that_is_no_json_is_told_from_one_cut_short() {
    let whole = serde_json::to_vec_pretty(&config()).unwrap();
    let cut = load_bytes(&whole[..whole.len() / 2]).unwrap_err().to_string();
    assert!(cut.contains("config.json is cut short"), "{cut}");
    assert!(load_bytes(b"").unwrap_err().to_string().contains("cut short: the JSON ends at line"));
    let garbage = load_bytes(b"\x7fELF").unwrap_err().to_string();
    assert!(garbage.contains("config.json is not valid JSON"), "{garbage}");
    let list = load_bytes(b"[]").unwrap_err().to_string();
    assert_eq!(list, "config.json: the document: it is no JSON object");
}

#[test]
fn a_description_that_cannot_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let absent = Bundle::load(directory.path()).unwrap_err().to_string();
    assert!(absent.starts_with("cannot read ") && absent.ends_with("config.json: nothing is there (ENOENT)"));
    let gone = Bundle::load(&directory.path().join("x")).unwrap_err().to_string();
    assert!(gone.starts_with("cannot open the bundle "), "{gone}");
    let config = directory.path().join(CONFIG);
    nix::unistd::mkfifo(&config, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(Bundle::load(directory.path()), Err(BundleError::NotAFile { .. })));
    std::fs::remove_file(&config).unwrap();
    std::fs::create_dir(&config).unwrap();
    assert!(matches!(Bundle::load(directory.path()), Err(BundleError::NotAFile { .. })));
    std::fs::remove_dir(&config).unwrap();
    std::fs::File::create(&config).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(Bundle::load(directory.path()), Err(BundleError::TooLarge { .. })));
}

#[test]
fn a_process_of_exec_is_checked_like_the_first() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("process");
    let mut process = config()["process"].clone();
    std::fs::write(&path, process.to_string()).unwrap();
    assert_eq!(load_process(&path, &mut Vec::new()).unwrap().args().as_ref().unwrap(), &["sh"]);
    process["cwd"] = json!("relative");
    std::fs::write(&path, process.to_string()).unwrap();
    let message = load_process(&path, &mut Vec::new()).unwrap_err().to_string();
    assert_eq!(message, "process.json: cwd: `relative` is not an absolute path");
}

#[test]
fn a_description_made_in_memory_is_checked_too() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("rootfs")).unwrap();
    let spec: Spec = serde_json::from_value(config()).unwrap();
    assert!(Bundle::from_spec(directory.path(), spec.clone()).is_ok());
    let mut without = spec;
    without.set_root(None);
    assert!(Bundle::from_spec(directory.path(), without).is_err());
}

/// Every place of a JSON document, as a pointer.
fn places(value: &Value, here: &str, found: &mut Vec<String>) {
    found.push(here.to_owned());
    match value {
        Value::Array(list) => {
            for (index, item) in list.iter().enumerate() {
                places(item, &format!("{here}/{index}"), found);
            }
        }
        Value::Object(map) => {
            for (key, item) in map {
                places(item, &format!("{here}/{key}"), found);
            }
        }
        _ => {}
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
        "(/|\\.\\.|[a-z]){0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            proptest::collection::hash_map("type|path|options|[a-z]{1,4}", inner, 0..3)
                .prop_map(|map| map.into_iter().collect::<serde_json::Map<_, _>>().into()),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_change_of_one_place_causes_a_panic(choice in any::<prop::sample::Index>(), value in any_value()) {
        let mut all = Vec::new();
        places(&config(), "", &mut all);
        let place = choice.get(&all);
        let mut changed = config();
        *changed.pointer_mut(place).unwrap() = value;
        if let Err(error) = load(&changed) {
            prop_assert!(!error.to_string().contains("expected one of"), "{}", error);
        }
    }

    #[test]
    fn no_damage_of_the_bytes_causes_a_panic(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()) {
        let mut bytes = serde_json::to_vec(&config()).unwrap();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if cut {
            bytes.truncate(at);
        }
        let _ = load_bytes(&bytes);
    }
}

#[test]
fn the_largest_description_fits_into_a_message_together_with_its_state() {
    let fill = |length: usize| with("/annotations", json!({ "filler": "x".repeat(length) }));
    let limit = parse::MAX_BYTES as usize;
    let bundle = load(&fill(limit - 8192)).unwrap();
    let annotations = serde_json::to_string(bundle.spec.annotations()).unwrap();
    let rest = 1 << 18;
    assert!(bundle.guest_spec_json().len() + annotations.len() + rest <= rvm_protocol::MAX_FRAME);
    assert!(refusal(&fill(limit)).contains("is larger than the limit"));
}

#[test]
fn a_bind_of_a_kernel_interface_becomes_a_mount_of_the_guests_own() {
    for (path, kind) in
        [("/proc", "proc"), ("/sys", "sysfs"), ("/sys/fs/cgroup", "cgroup"), ("/dev/mqueue", "mqueue")]
    {
        let mount = json!({ "destination": path, "source": path, "type": "bind",
            "options": ["rbind", "bind", "rslave", "private", "nosuid", "ro"] });
        let bundle = load(&with("/mounts/3", mount)).unwrap();
        let mount = &guest(&bundle)["mounts"][3];
        assert_eq!(mount["type"], kind);
        assert_eq!(mount["options"], json!(["nosuid", "ro"]), "{path}");
    }
}

#[test]
fn an_id_mapped_bind_is_refused_with_or_without_the_option() {
    let mappings = json!([{ "containerID": 0, "hostID": 1000, "size": 1 }]);
    for name in ["uidMappings", "gidMappings"] {
        let mut mount =
            json!({ "destination": "/x", "source": "/tmp", "type": "bind", "options": ["rbind"] });
        mount[name] = mappings.clone();
        assert!(
            refusal(&with("/mounts/3", mount)).contains("mounts[3]: a microVM cannot do this: id-mapped")
        );
    }
}

#[test]
fn what_the_agent_implements_reaches_it() {
    let priority = json!({ "class": "IOPRIO_CLASS_BE", "priority": 4 });
    let affinity = json!({ "initial": "0", "final": "0" });
    for (pointer, value) in [("/process/ioPriority", priority), ("/process/execCPUAffinity", affinity)] {
        let bundle = load(&with(pointer, value)).unwrap();
        assert!(guest(&bundle).pointer(pointer).is_some(), "{pointer}");
    }
    assert_eq!(
        guest(&load(&config()).unwrap()).pointer("/linux/resources/devices/0/access"),
        Some(&json!("rwm"))
    );
}
