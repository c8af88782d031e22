//! A container of no consequence, before the guest is captured: from the guest's own files, which are this machine's here.

use std::time::{Duration, Instant};

use rvm_protocol::{AgentErrorKind, ProcessId, Reply};
use serde_json::Value;

use crate::host::{Host, Traces, container, process, shell};

crate::tests![
    a_rehearsal_comes_before_the_container,
    a_rehearsal_leaves_the_agent_as_it_was,
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

fn a_rehearsal_leaves_the_agent_as_it_was() {
    let mut host = Host::new();
    let before = host.traces();
    let begin = Instant::now();
    assert_eq!(host.rehearse(&rehearsal("sleep 600 & echo lost")), Ok(Reply::Done));
    assert!(begin.elapsed() < Duration::from_secs(300), "it does not wait for others than its first process");
    let after = host.traces();
    // Two sockets and four programs.
    assert_eq!(after.descriptors, before.descriptors + 6, "the name server's, and nothing else");
    assert_eq!(Traces { descriptors: before.descriptors, ..after }, before);
    assert!(before.children.is_empty() && before.descriptors > 3 && before.mounts.contains(" /proc "));
}

fn a_rehearsal_that_fails_is_told() {
    let mut host = Host::new();
    let error = host.rehearse(&rehearsal("exit 3")).unwrap_err();
    assert_eq!(error.message, "its process ended with Code(3)");
    let before = host.traces();
    // Its cgroup is there, and the next one cannot have it.
    let error = host.rehearse(&rehearsal("true")).unwrap_err();
    assert!(error.message.contains("making the cgroup"), "{error}");
    assert_eq!(host.traces(), before);
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
