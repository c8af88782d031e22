//! Who a process is: names, ids, groups, capabilities, limits, filters.

use nix::sys::resource::{Resource, getrlimit};
use rvm_protocol::{ExitStatus, ProcessId, Reply, Request, SeccompProgram};
use serde_json::{Value, json};

use crate::host::{Host, container, process, shell};

crate::tests![
    the_first_process_is_the_program_itself,
    the_host_name_is_the_containers,
    user_groups_and_home_are_taken_on,
    streams_belong_to_the_user,
    capabilities_are_those_asked_for,
    ambient_capabilities_survive_the_change_of_user,
    without_capabilities_there_are_none,
    limits_and_scores_are_set,
    no_new_privileges_is_set,
    a_filter_is_in_force,
    a_filter_is_in_force_with_no_new_privileges,
    signals_are_neither_blocked_nor_ignored,
    no_descriptor_leaks,
    a_user_namespace_maps_its_users,
    a_bind_mount_in_a_user_namespace_may_name_how_access_times_are_kept,
    sys_is_mounted_in_its_turn_in_a_user_namespace_too,
    streams_belong_to_the_user_in_a_user_namespace_too,
    an_exec_joins_the_user_namespace,
    clocks_count_from_another_moment,
    scheduling_is_as_asked_for,
    processors_of_an_exec_are_as_asked_for,
    only_the_devices_of_the_rules_can_be_used,
    device_rules_can_be_changed,
    hooks_run_in_the_container,
    a_hook_without_an_environment_has_that_of_the_process,
    a_failing_hook_ends_the_start,
];

fn run(process: &Value) -> String {
    Host::new().run(&container(process)).success()
}

fn the_first_process_is_the_program_itself() {
    let out = run(&process(&["cat", "/proc/1/cmdline"]));
    assert_eq!(out, "cat\0/proc/1/cmdline\0");
}

fn the_host_name_is_the_containers() {
    assert_eq!(run(&process(&["hostname"])), "container\n");
}

fn user_groups_and_home_are_taken_on() {
    let mut description =
        shell("id -u; id -g; id -G; umask; echo $HOME; pwd; touch /tmp/x; stat -c %u:%g /tmp/x");
    description["user"] = json!({ "uid": 1000, "gid": 1001, "additionalGids": [7, 8], "umask": 0o027 });
    description["cwd"] = "/tmp".into();
    assert_eq!(run(&description), "1000\n1001\n1001 7 8\n0027\n/srv/app\n/tmp\n1000:1001\n");
}

fn streams_belong_to_the_user() {
    let mut description = shell("echo again > /dev/stdout; echo error > /dev/stderr");
    description["user"] = json!({ "uid": 1000, "gid": 1000 });
    assert_eq!(run(&description), "again\n");
}

fn status(process: &Value, field: &str) -> String {
    let text = run(process);
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {field} in {text}")).trim().to_owned()
}

fn capabilities_are_those_asked_for() {
    let mut description = process(&["cat", "/proc/self/status"]);
    let sets = ["CAP_CHOWN", "CAP_NET_RAW"];
    description["capabilities"] =
        json!({ "bounding": sets, "effective": ["CAP_CHOWN"], "permitted": sets, "inheritable": [] });
    // An executing root gets the whole bounding set (capabilities(7)).
    assert_eq!(status(&description, "CapBnd"), "0000000000002001");
    assert_eq!(status(&description, "CapEff"), "0000000000002001");
    description["user"] = json!({ "uid": 1000, "gid": 1000 });
    assert_eq!(status(&description, "CapEff"), "0000000000000000");
    assert_eq!(status(&description, "CapBnd"), "0000000000002001");
}

fn ambient_capabilities_survive_the_change_of_user() {
    let mut description = process(&["cat", "/proc/self/status"]);
    let sets = ["CAP_NET_BIND_SERVICE"];
    description["user"] = json!({ "uid": 1000, "gid": 1000 });
    description["capabilities"] = json!({
        "bounding": sets, "effective": sets, "permitted": sets, "inheritable": sets, "ambient": sets,
    });
    assert_eq!(status(&description, "CapEff"), "0000000000000400");
    assert_eq!(status(&description, "CapAmb"), "0000000000000400");
}

fn without_capabilities_there_are_none() {
    let mut description = process(&["cat", "/proc/self/status"]);
    description.as_object_mut().unwrap().remove("capabilities");
    assert_eq!(status(&description, "CapEff"), "0000000000000000");
    assert_eq!(status(&description, "CapBnd"), "0000000000000000");
}

fn limits_and_scores_are_set() {
    let mut description = shell("ulimit -Sn; ulimit -Hn; cat /proc/self/oom_score_adj");
    description["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 123, "hard": 456 }]);
    description["oomScoreAdj"] = json!(77);
    assert_eq!(run(&description), "123\n456\n77\n");
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert_eq!(run(&shell("ulimit -Sn; ulimit -Hn")), format!("1024\n{hard}\n"));
}

fn no_new_privileges_is_set() {
    let mut description = process(&["cat", "/proc/self/status"]);
    assert_eq!(status(&description, "NoNewPrivs"), "0");
    description["noNewPrivileges"] = json!(true);
    assert_eq!(status(&description, "NoNewPrivs"), "1");
}

/// Answers mkdir(2) and mkdirat(2) with EPERM, and lets everything else pass.
fn filter() -> SeccompProgram {
    let instruction = |code: u16, jt: u8, jf: u8, k: u32| {
        let [a, b] = code.to_le_bytes();
        let [c, d, e, f] = k.to_le_bytes();
        [a, b, jt, jf, c, d, e, f]
    };
    let (load, equal, give) = (0x20, 0x15, 0x06);
    let program = [
        instruction(load, 0, 0, 0),
        instruction(equal, 2, 0, libc::SYS_mkdir as u32),
        instruction(equal, 1, 0, libc::SYS_mkdirat as u32),
        instruction(give, 0, 0, libc::SECCOMP_RET_ALLOW),
        instruction(give, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
    ];
    SeccompProgram { filter: program.concat(), flags: 0 }
}

fn assert_filtered(description: &Value) {
    let mut host = Host::new();
    let streams = host.start_with(&container(description), Some(filter())).unwrap();
    let outcome = host.finish(ProcessId::INIT, streams);
    assert_eq!(outcome.status, ExitStatus::Code(1), "{outcome:?}");
    assert!(outcome.stderr.contains("Operation not permitted"), "{outcome:?}");
    assert!(outcome.stdout.contains("Seccomp:\t2"), "{outcome:?}");
}

fn a_filter_is_in_force() {
    assert_filtered(&shell("grep Seccomp: /proc/self/status; mkdir /tmp/x"));
}

fn a_filter_is_in_force_with_no_new_privileges() {
    let mut description = shell("grep Seccomp: /proc/self/status; mkdir /tmp/x");
    description["noNewPrivileges"] = json!(true);
    description["capabilities"] = json!({});
    assert_filtered(&description);
}

fn signals_are_neither_blocked_nor_ignored() {
    let description = process(&["cat", "/proc/self/status"]);
    for field in ["SigBlk", "SigIgn", "SigCgt"] {
        let signals = u64::from_str_radix(&status(&description, field), 16).unwrap();
        // 32 and 33 are the C library's; whoever runs the tests may have passed them on as ignored.
        assert_eq!(signals & !(0b11 << 31), 0, "{field}");
    }
}

fn no_descriptor_leaks() {
    // The fourth is the directory that is being listed.
    assert_eq!(run(&process(&["ls", "/proc/self/fd"])), "0\n1\n2\n3\n");
}

fn a_user_namespace_maps_its_users() {
    let (mut host, spec) = with_user_namespace(&shell(
        "id -u; cat /proc/self/uid_map; touch /tmp/new; stat -c %u /tmp/new; echo x > /dev/null; mount | grep -c cgroup2",
    ));
    let out = host.run(&spec);
    let words: Vec<&str> = out.stdout.split_whitespace().collect();
    assert_eq!(words, ["0", "0", "100000", "65536", "0", "1"], "{out:?}");
    use std::os::unix::fs::MetadataExt;
    let made = std::fs::metadata(host.rootfs().join("tmp/new")).unwrap();
    assert_eq!(made.uid(), 100_000);
}

fn a_bind_mount_in_a_user_namespace_may_name_how_access_times_are_kept() {
    let (mut host, mut spec) =
        with_user_namespace(&shell("cat /data/file; grep -c ' /data .*nosuid' /proc/mounts"));
    let options = ["rbind", "noatime", "nodiratime", "nosuid"];
    let bind =
        json!({ "destination": "/data", "type": "bind", "source": "/on/the/host", "options": options });
    spec["mounts"].as_array_mut().unwrap().push(bind);
    assert_eq!(host.run(&spec).success(), "from the host1\n");
}

fn sys_is_mounted_in_its_turn_in_a_user_namespace_too() {
    // The table is in the mounts' order. Their numbers are not: the lowest free one is taken, and other tests
    // free some at any time.
    let line = "awk '$5 == \"/proc\" || $5 == \"/sys\" { print $5, $(NF-1) }' /proc/self/mountinfo";
    let (mut host, spec) = with_user_namespace(&shell(line));
    assert_eq!(host.run(&spec).success(), "/proc proc\n/sys sysfs\n");
}

fn streams_belong_to_the_user_in_a_user_namespace_too() {
    for user in [0, 5] {
        let mut description =
            shell("echo again > /dev/stdout; echo error > /dev/stderr; stat -Lc %u:%g /dev/stdin");
        description["user"] = json!({ "uid": user, "gid": user });
        let (mut host, spec) = with_user_namespace(&description);
        let outcome = host.run(&spec);
        assert_eq!(outcome.stderr, "error\n");
        assert_eq!(outcome.stdout, format!("again\n{user}:{user}\n"));
    }
}

fn an_exec_joins_the_user_namespace() {
    let (mut host, spec) = with_user_namespace(&process(&["cat"]));
    let streams = host.start(&spec).unwrap();
    let mut description =
        shell("id -u; id -g; ulimit -Hn; readlink /proc/self/ns/user; cat /proc/self/uid_map");
    description["user"] = json!({ "uid": 5, "gid": 6 });
    description["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 }]);
    let out = host.run_exec(1, &description).success();
    let words: Vec<&str> = out.split_whitespace().collect();
    let own = std::fs::read_link("/proc/self/ns/user").unwrap();
    assert_eq!(words[..3], ["5", "6", "200"], "{out}");
    assert_ne!(words[3], own.to_str().unwrap());
    assert_eq!(words[4..], ["0", "100000", "65536"], "{out}");
    let Reply::Processes(list) = host.request(Request::List).unwrap() else { panic!("no list") };
    assert_eq!(list[0].user, 0);
    assert_eq!(host.finish(ProcessId::INIT, streams).status, ExitStatus::Code(0));
}

fn with_user_namespace(process: &Value) -> (Host, Value) {
    let host = Host::new();
    chown_all(&host.rootfs(), 100_000);
    let mut spec = container(process);
    let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
    (host, spec)
}

fn chown_all(path: &std::path::Path, owner: u32) {
    std::os::unix::fs::lchown(path, Some(owner), Some(owner)).unwrap();
    if path.is_dir() && !path.is_symlink() {
        for entry in std::fs::read_dir(path).unwrap() {
            chown_all(&entry.unwrap().path(), owner);
        }
    }
}

/// Asks for clocks that are ahead.
fn shift_clocks(spec: &mut Value) {
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "time" }));
    spec["linux"]["timeOffsets"] =
        json!({ "boottime": { "secs": 1_000_000_000, "nanosecs": 5 }, "monotonic": { "secs": 7 } });
}

fn clocks_count_from_another_moment() {
    const LOOK: &str = "cut -d . -f 1 /proc/uptime | cut -c 1; tr -s ' ' </proc/self/timens_offsets; \
                        readlink /proc/self/ns/time";
    let kept = |out: &str| out.starts_with("1\nmonotonic 7 0\nboottime 1000000000 5\n");
    let mut host = Host::new();
    let mut spec = container(&shell(&format!("{LOOK}; cat")));
    shift_clocks(&mut spec);
    let streams = host.start(&spec).unwrap();
    let out = host.run_exec(1, &shell(LOOK)).success();
    assert!(kept(&out), "{out}");
    let first = host.finish(ProcessId::INIT, streams).success();
    assert_eq!(first, out, "the first process and the other share a namespace");

    let (mut host, mut spec) = with_user_namespace(&shell(LOOK));
    shift_clocks(&mut spec);
    let out = host.run(&spec).success();
    assert!(kept(&out), "{out}");
    spec["linux"]["timeOffsets"] = json!({ "monotonic": { "secs": -1_000_000_000 } });
    let error = Host::new().start(&spec).map(drop).unwrap_err().message;
    assert!(
        error.starts_with("setting the container's clocks to \"monotonic -1000000000 0\\n\": "),
        "{error}"
    );
}

fn scheduling_is_as_asked_for() {
    let mut description = process(&["cat", "/proc/self/stat"]);
    description["scheduler"] = json!({ "policy": "SCHED_BATCH", "nice": 7 });
    description["ioPriority"] = json!({ "class": "IOPRIO_CLASS_BE", "priority": 6 });
    let line = run(&description);
    let fields: Vec<&str> = line.split_whitespace().collect();
    // Fields 19 and 41 of proc_pid_stat(5).
    assert_eq!((fields[18], fields[40]), ("7", "3"), "{line}");
    description["scheduler"] = json!({ "policy": "SCHED_FIFO", "priority": 1000 });
    let error = Host::new().start(&container(&description)).map(drop).unwrap_err();
    assert_eq!(error.message, "setting the scheduling policy SCHED_FIFO: invalid argument");
}

fn processors_of_an_exec_are_as_asked_for() {
    let mut host = Host::new();
    let streams = host.start(&container(&process(&["cat"]))).unwrap();
    let mut description = shell("grep Cpus_allowed_list /proc/self/status");
    description["execCPUAffinity"] = json!({ "initial": "0", "final": "0" });
    assert_eq!(host.run_exec(1, &description).success(), "Cpus_allowed_list:\t0\n");
    description["execCPUAffinity"] = json!({ "final": "1000" });
    let error = host.exec(2, &description).map(drop).unwrap_err();
    assert_eq!(error.message, "the virtual machine has none of the processors \"1000\"");
    assert_eq!(host.finish(ProcessId::INIT, streams).status, ExitStatus::Code(0));
}

/// A container with the device file of FUSE, which every kernel of ours has, and these rules.
fn with_fuse_device(process: &Value, rules: &Value) -> Value {
    let mut spec = container(process);
    spec["linux"]["devices"] = json!([{ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229 }]);
    spec["linux"]["resources"]["devices"] = rules.clone();
    spec
}

const TRY: &str = "for d in null zero fuse; do dd if=/dev/$d count=0 2>/dev/null && echo $d; done; \
                   (echo > /dev/fuse) 2>/dev/null || echo not written";

fn fuse_rule(access: &str) -> Value {
    json!([{ "allow": false, "access": "rwm" },
           { "allow": true, "type": "c", "major": 10, "minor": 229, "access": access }])
}

fn only_the_devices_of_the_rules_can_be_used() {
    let run = |rules: &Value| Host::new().run(&with_fuse_device(&shell(TRY), rules)).success();
    assert_eq!(run(&json!([])), "null\nzero\nnot written\n");
    assert_eq!(run(&fuse_rule("r")), "null\nzero\nfuse\nnot written\n");
}

fn device_rules_can_be_changed() {
    let mut host = Host::new();
    let streams = host.start(&with_fuse_device(&process(&["cat"]), &json!([]))).unwrap();
    assert_eq!(host.run_exec(1, &shell(TRY)).success(), "null\nzero\nnot written\n");
    let resources = json!({ "devices": fuse_rule("r") }).to_string();
    assert_eq!(host.request(Request::Update { resources }).unwrap(), Reply::Done);
    assert_eq!(host.run_exec(2, &shell(TRY)).success(), "null\nzero\nfuse\nnot written\n");
    assert_eq!(host.finish(ProcessId::INIT, streams).status, ExitStatus::Code(0));
}

fn hooks_run_in_the_container() {
    let mut spec = container(&shell("cat /tmp/state; echo; cat /tmp/variable"));
    spec["hooks"] = json!({ "startContainer": [{
        "path": "/bin/sh",
        "args": ["sh", "-c", "cat > /tmp/state; echo $VARIABLE > /tmp/variable; echo noise"],
        "env": ["PATH=/bin", "VARIABLE=value"],
        "timeout": 60,
    }] });
    let out = Host::new().run(&spec).success();
    let (state, variable) = out.split_once('\n').unwrap();
    let state: Value = serde_json::from_str(state).unwrap();
    assert_eq!(state["pid"], 1);
    assert_eq!(state["status"], "created");
    assert_eq!(state["bundle"], "/bundle");
    assert_eq!(variable, "value\n");
}

fn a_hook_without_an_environment_has_that_of_the_process() {
    let mut process = shell("cat /tmp/variable");
    process["env"] = json!(["PATH=/bin", "VARIABLE=of the process"]);
    let mut spec = container(&process);
    let command = "echo $VARIABLE > /tmp/variable";
    spec["hooks"] = json!({ "startContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", command] }] });
    assert_eq!(Host::new().run(&spec).success(), "of the process\n");
}

fn a_failing_hook_ends_the_start() {
    let mut spec = container(&shell("true"));
    spec["hooks"] =
        json!({ "startContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", "echo no >&2; exit 5"] }] });
    let error = Host::new().start(&spec).map(drop).unwrap_err();
    assert_eq!(error.message, "the startContainer hook /bin/sh failed with exit code 5: no");
}
