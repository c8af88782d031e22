//! Further processes of a running container, and what is done to all of them.

use std::io::Write;

use rvm_protocol::{AgentErrorKind, ExitStatus, ProcessId, Reply, Request};
use serde_json::json;

use crate::host::{Host, Streams, container, process, read_all, read_until, shell};

crate::tests![
    an_exec_lives_in_the_container,
    an_exec_has_an_identity_of_its_own,
    an_exec_that_fails_leaves_the_container_alone,
    a_real_time_signal_ends_an_exec_like_any_other,
    orphans_of_an_exec_do_not_hold_it_up,
    orphans_of_an_exec_may_go_on_writing,
    what_descendants_of_an_exec_write_follows_its_end,
    an_exec_ends_with_the_container_and_is_told_first,
    output_of_an_exec_that_nobody_reads_does_not_hold_the_container,
    a_signal_reaches_all,
    processes_are_listed_as_the_container_sees_them,
    limits_that_the_kernel_lacks_are_refused,
    ids_are_not_used_twice,
];

fn running() -> (Host, Streams) {
    let mut host = Host::new();
    let streams = host.start(&container(&process(&["cat"]))).unwrap();
    (host, streams)
}

fn end((mut host, streams): (Host, Streams)) {
    assert_eq!(host.finish(ProcessId::INIT, streams).status, ExitStatus::Code(0));
}

fn an_exec_lives_in_the_container() {
    let (mut host, streams) = running();
    let namespaces = "for n in pid mnt uts ipc cgroup net user; do \
                      test $(readlink /proc/1/ns/$n) = $(readlink /proc/self/ns/$n) || echo other $n; done";
    let mut description = shell(&format!("hostname; {namespaces}; grep ^0: /proc/self/cgroup; exit 9"));
    // Reading the links of another process takes this.
    for set in ["bounding", "effective", "permitted"] {
        description["capabilities"][set].as_array_mut().unwrap().push("CAP_SYS_PTRACE".into());
    }
    let outcome = host.run_exec(1, &description);
    assert_eq!(outcome.stdout, "container\n0::/\n", "{outcome:?}");
    assert_eq!(outcome.status, ExitStatus::Code(9));
    end((host, streams));
}

fn an_exec_has_an_identity_of_its_own() {
    let (mut host, streams) = running();
    let mut description = shell("id -u; pwd; echo $A $HOME; grep CapBnd /proc/self/status");
    description["user"] = json!({ "uid": 1000, "gid": 1000 });
    description["cwd"] = "/tmp".into();
    description["env"] = json!(["PATH=/bin", "A=b"]);
    description["capabilities"] = json!({ "bounding": ["CAP_CHOWN"] });
    let out = host.run_exec(1, &description).success();
    assert_eq!(out, "1000\n/tmp\nb /srv/app\nCapBnd:\t0000000000000001\n");
    end((host, streams));
}

fn an_exec_that_fails_leaves_the_container_alone() {
    let (mut host, streams) = running();
    let error = host.exec(1, &process(&["nope"])).map(drop).unwrap_err();
    assert_eq!(error.kind, AgentErrorKind::NotFound);
    let mut description = process(&["true"]);
    description["cwd"] = "/nope".into();
    let error = host.exec(2, &description).map(drop).unwrap_err();
    assert_eq!(
        error.message,
        r#"chdir to cwd ("/nope") set in config.json failed: no such file or directory"#
    );
    assert_eq!(host.run_exec(3, &shell("echo still here")).success(), "still here\n");
    end((host, streams));
}

fn a_real_time_signal_ends_an_exec_like_any_other() {
    let (mut host, streams) = running();
    let _exec = host.exec(1, &process(&["sleep", "1000"])).unwrap();
    host.signal(1, 40, false).unwrap();
    assert_eq!(host.exited(ProcessId(1)), ExitStatus::Signal(40));
    // Nor does it keep the agent from taking further ends.
    assert_eq!(host.run_exec(2, &shell("echo on")).success(), "on\n");
    end((host, streams));
}

fn orphans_of_an_exec_do_not_hold_it_up() {
    let (mut host, streams) = running();
    let outcome = host.run_exec(1, &shell("sleep 1000 & echo started"));
    assert_eq!(outcome.success(), "started\n");
    end((host, streams));
}

fn orphans_of_an_exec_may_go_on_writing() {
    let (mut host, streams) = running();
    let command = "(read x; i=0; while [ $i -lt 20000 ]; do echo orphan $i || exit; i=$((i+1)); done; \
                    echo alive > /tmp/result) < /tmp/gate & echo parent";
    host.run_exec(1, &shell("touch /tmp/go")).success();
    // Busybox's shell reads from a pipe in the root file system: nothing is timed.
    let fifo = host.rootfs().join("tmp/gate");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
    assert_eq!(host.run_exec(2, &shell(command)).success(), "parent\n");
    std::fs::OpenOptions::new().write(true).open(&fifo).unwrap().write_all(b"go\n").unwrap();
    let waiting = host.run_exec(3, &shell("while [ ! -s /tmp/result ]; do sleep 0.1; done; cat /tmp/result"));
    assert_eq!(waiting.success(), "alive\n");
    end((host, streams));
}

fn what_descendants_of_an_exec_write_follows_its_end() {
    let (mut host, streams) = running();
    let fifo = host.rootfs().join("tmp/gate");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
    let exec = host.exec(1, &shell("(read x; echo late) < /tmp/gate & echo early")).unwrap();
    assert_eq!(host.exited(ProcessId(1)), ExitStatus::Code(0));
    std::fs::OpenOptions::new().write(true).open(&fifo).unwrap().write_all(b"go\n").unwrap();
    assert_eq!(read_all(host.stdout(&exec)).join().unwrap(), "early\nlate\n");
    end((host, streams));
}

fn output_of_an_exec_that_nobody_reads_does_not_hold_the_container() {
    let (mut host, _streams) = running();
    let exec = host.exec(1, &shell("echo on; cat /dev/zero")).unwrap();
    read_until(&mut host.stdout(&exec), "on");
    host.signal(0, libc::SIGKILL, false).unwrap();
    assert_eq!(host.order_of_ends(2), [ProcessId(1), ProcessId::INIT]);
}

fn an_exec_ends_with_the_container_and_is_told_first() {
    let (mut host, _streams) = running();
    let _exec = host.exec(1, &process(&["sleep", "1000"])).unwrap();
    host.signal(0, libc::SIGKILL, false).unwrap();
    assert_eq!(host.order_of_ends(2), [ProcessId(1), ProcessId::INIT]);
    assert_eq!(host.exited(ProcessId(1)), ExitStatus::Signal(9));
}

fn a_signal_reaches_all() {
    let mut host = Host::new();
    let trap = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    let first = host.start(&container(&shell(trap))).unwrap();
    let second = host.exec(1, &shell(trap)).unwrap();
    for streams in [&first, &second] {
        read_until(&mut host.stdout(streams), "ready");
    }
    host.signal(0, libc::SIGTERM, true).unwrap();
    assert!(matches!(host.exited(ProcessId(1)), ExitStatus::Code(5) | ExitStatus::Signal(9)));
    assert_eq!(host.exited(ProcessId::INIT), ExitStatus::Code(5));
}

fn processes_are_listed_as_the_container_sees_them() {
    let (mut host, streams) = running();
    let mut description = process(&["sleep", "1000"]);
    description["user"] = json!({ "uid": 1000, "gid": 1000 });
    let _exec = host.exec(1, &description).unwrap();
    let Reply::Processes(mut list) = host.request(Request::List).unwrap() else { panic!("no list") };
    list.sort_by_key(|process| process.pid);
    let lines: Vec<_> =
        list.iter().map(|line| (line.pid, line.parent, line.user, line.command.as_str())).collect();
    assert_eq!(lines[0], (1, 0, 0, "cat"));
    assert!(matches!(lines[1], (2.., 0, 1000, "sleep 1000")), "{lines:?}");
    assert_eq!(lines.len(), 2);
    end((host, streams));
}

fn limits_that_the_kernel_lacks_are_refused() {
    let (mut host, streams) = running();
    let resources = json!({ "unified": { "no.such": "1" } }).to_string();
    let error = host.request(Request::Update { resources }).unwrap_err();
    assert!(error.message.contains("does not support the limit no.such"), "{error}");
    end((host, streams));
}

fn ids_are_not_used_twice() {
    let (mut host, streams) = running();
    let _exec = host.exec(1, &process(&["cat"])).unwrap();
    assert!(host.exec(1, &process(&["cat"])).is_err());
    end((host, streams));
}
