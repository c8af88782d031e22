//! A container of no consequence, before the guest is captured: from the guest's own files, which are this machine's here.

use std::time::{Duration, Instant};

use rvm_protocol::{AgentErrorKind, ProcessId, Reply};
use serde_json::Value;

use crate::host::{Host, container, process, shell};

crate::tests![
    a_rehearsal_comes_before_the_container,
    a_rehearsal_leaves_no_process,
    a_rehearsal_that_fails_is_told,
    there_is_no_rehearsal_beside_the_container,
];

fn rehearsal(command: &str) -> Value {
    container(&process(&["/bin/sh", "-c", command]))
}

fn a_rehearsal_comes_before_the_container() {
    let mut host = Host::new();
    assert_eq!(host.rehearse(&rehearsal("test $$ = 1")), Ok(Reply::Done));
    assert_eq!(host.run(&container(&shell("echo done"))).success(), "done\n");
}

fn a_rehearsal_leaves_no_process() {
    let mut host = Host::new();
    let begin = Instant::now();
    assert_eq!(host.rehearse(&rehearsal("sleep 600 & echo lost")), Ok(Reply::Done));
    assert!(begin.elapsed() < Duration::from_secs(300), "it does not wait for others than its first process");
    // In the guest's namespace of processes it would be seen.
    let mut spec = container(&shell("cat /proc/[0-9]*/comm"));
    spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "pid");
    let names = host.run(&spec).success();
    assert!(names.lines().any(|name| name == "cat"), "{names}");
    assert!(names.lines().all(|name| name != "sleep"), "{names}");
}

fn a_rehearsal_that_fails_is_told() {
    let mut host = Host::new();
    let error = host.rehearse(&rehearsal("exit 3")).unwrap_err();
    assert_eq!(error.message, "the rehearsal's program ended with Some(Code(3))");
    // Its cgroup is there, and the next one cannot have it.
    assert!(host.rehearse(&rehearsal("true")).is_err());
    assert_eq!(host.run(&container(&shell("echo done"))).success(), "done\n");

    let error = Host::new().rehearse(&container(&process(&["/nope"]))).unwrap_err();
    assert_eq!(error.kind, AgentErrorKind::NotFound, "{error}");
}

fn there_is_no_rehearsal_beside_the_container() {
    let mut host = Host::new();
    let streams = host.start(&container(&process(&["cat"]))).unwrap();
    let error = host.rehearse(&rehearsal("true")).unwrap_err();
    assert!(error.message.contains("already"), "{error}");
    host.finish(ProcessId::INIT, streams).success();
}
