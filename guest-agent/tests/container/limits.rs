//! Limits, where the machine has the controllers of cgroup version 2 for them, as a guest has.

use rvm_protocol::{ExitStatus, FromAgent, ProcessId, Reply, Request};
use serde_json::{Value, json};

use crate::host::{Host, container, process, shell};

crate::tests![
    limits_are_in_force,
    limits_can_be_changed,
    a_kill_for_want_of_memory_is_told_before_the_end,
    a_fork_bomb_does_not_reach_the_agent,
];

/// Why these tests cannot run on this machine.
pub fn obstacle() -> Option<&'static str> {
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    let has = |wanted| controllers.split_whitespace().any(|controller| controller == wanted);
    let missing = !["memory", "pids", "cpu"].into_iter().all(has);
    missing.then_some("needs the memory, pids and cpu controllers of cgroup v2")
}

fn limited(process: &Value, resources: &Value) -> Value {
    let mut spec = container(process);
    spec["linux"]["resources"] = resources.clone();
    spec
}

const SHOW: &str = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight";

fn limits_are_in_force() {
    let resources = json!({
        "memory": { "limit": 64 << 20, "swap": 64 << 20 },
        "pids": { "limit": 33 },
        "cpu": { "quota": 50_000, "period": 100_000, "shares": 1024 },
    });
    let out = Host::new().run(&limited(&shell(SHOW), &resources)).success();
    assert_eq!(out, "67108864\n33\n50000 100000\n100\n");
}

fn limits_can_be_changed() {
    let mut host = Host::new();
    let streams = host.start(&container(&process(&["cat"]))).unwrap();
    let resources = json!({ "memory": { "limit": 32 << 20 }, "pids": { "limit": 44 } }).to_string();
    assert_eq!(host.request(Request::Update { resources }).unwrap(), Reply::Done);
    let out = host.run_exec(1, &shell(SHOW)).success();
    assert!(out.starts_with("33554432\n44\n"), "{out}");
    host.finish(ProcessId::INIT, streams);
}

fn a_kill_for_want_of_memory_is_told_before_the_end() {
    let mut host = Host::new();
    let resources = json!({ "memory": { "limit": 16 << 20, "swap": 16 << 20 } });
    let spec = limited(&process(&["dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"]), &resources);
    let streams = host.start(&spec).unwrap();
    assert_eq!(host.finish(ProcessId::INIT, streams).status, ExitStatus::Signal(9));
    // Already there: what comes first is read first.
    host.event(|event| (*event == FromAgent::OutOfMemory).then_some(()));
}

fn a_fork_bomb_does_not_reach_the_agent() {
    let mut host = Host::new();
    let resources = json!({ "pids": { "limit": 50 } });
    let spec = limited(&shell("bomb() { while :; do bomb & done; }; echo lit; bomb 2>/dev/null"), &resources);
    let streams = host.start(&spec).unwrap();
    crate::host::read_until(&mut host.stdout(&streams), "lit");
    let Reply::Processes(list) = host.request(Request::List).unwrap() else { panic!("no list") };
    assert!(!list.is_empty() && list.len() <= 50, "{}", list.len());
    host.signal(0, libc::SIGKILL, true).unwrap();
    assert_eq!(host.exited(ProcessId::INIT), ExitStatus::Signal(9));
}
