//! What cannot be started, and the words that engines look for.

use rvm_protocol::{AgentError, AgentErrorKind, ExitStatus, ProcessId, Request, SeccompProgram};
use serde_json::json;

use crate::host::{Host, container, process, shell};

crate::tests![
    a_missing_program_is_not_found,
    a_missing_path_is_not_found,
    a_program_without_permission_is_not_executable,
    a_directory_is_not_executable,
    a_program_of_no_format_is_not_executable,
    a_missing_interpreter_is_not_found,
    a_directory_that_cannot_be_entered_is_told,
    a_mount_that_fails_is_told_with_its_place,
    a_configuration_that_is_none_is_told,
    a_failure_is_told_although_the_filter_forbids_to_send,
    a_filter_may_forbid_what_only_the_start_needs,
    a_failure_that_cannot_be_told_is_no_start,
    a_fifo_in_place_of_the_user_database_does_not_block,
    a_process_that_is_killed_on_its_way_is_no_start,
    a_container_starts_once,
    nothing_runs_before_the_start,
];

fn failure(host: &mut Host, arguments: &[&str]) -> (AgentErrorKind, String) {
    let error = host.start(&container(&process(arguments))).map(drop).unwrap_err();
    (error.kind, error.message)
}

fn a_missing_program_is_not_found() {
    let expected = r#"exec: "foo": executable file not found in $PATH"#;
    assert_eq!(failure(&mut Host::new(), &["foo"]), (AgentErrorKind::NotFound, expected.into()));
}

fn a_missing_path_is_not_found() {
    let expected = r#"exec: "/nope": stat /nope: no such file or directory"#;
    assert_eq!(failure(&mut Host::new(), &["/nope"]), (AgentErrorKind::NotFound, expected.into()));
}

fn a_program_without_permission_is_not_executable() {
    let expected = r#"exec: "/etc/passwd": permission denied"#;
    assert_eq!(failure(&mut Host::new(), &["/etc/passwd"]), (AgentErrorKind::NotExecutable, expected.into()));
}

fn a_directory_is_not_executable() {
    let expected = r#"exec: "/etc": is a directory"#;
    assert_eq!(failure(&mut Host::new(), &["/etc"]), (AgentErrorKind::NotExecutable, expected.into()));
}

fn write_program(host: &Host, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    let path = host.rootfs().join("bin/program");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
}

fn a_program_of_no_format_is_not_executable() {
    let mut host = Host::new();
    write_program(&host, "no program at all\n");
    let expected = "exec /bin/program: exec format error";
    assert_eq!(failure(&mut host, &["program"]), (AgentErrorKind::NotExecutable, expected.into()));
}

fn a_missing_interpreter_is_not_found() {
    let mut host = Host::new();
    write_program(&host, "#!/bin/no-such-shell\n");
    let expected = "exec /bin/program: no such file or directory";
    assert_eq!(failure(&mut host, &["program"]), (AgentErrorKind::NotFound, expected.into()));
}

fn a_directory_that_cannot_be_entered_is_told() {
    let mut description = process(&["true"]);
    description["cwd"] = "/etc/passwd".into();
    let error = Host::new().start(&container(&description)).map(drop).unwrap_err();
    assert!(error.message.contains("/etc/passwd"), "{error}");
    assert!(error.message.ends_with("not a directory"), "{error}");
}

fn a_mount_that_fails_is_told_with_its_place() {
    let mut spec = container(&process(&["true"]));
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=many"],
    }));
    let error = Host::new().start(&spec).map(drop).unwrap_err();
    assert!(error.message.starts_with(r#"mounting "tmpfs" at /tmp: setting the option "size""#), "{error}");
}

fn a_configuration_that_is_none_is_told() {
    let error = Host::new().start(&json!({ "ociVersion": 7 })).map(drop).unwrap_err();
    assert!(error.message.starts_with("the container's configuration: "), "{error}");
}

/// A filter that answers these system calls with EPERM, and lets everything else pass.
fn forbid(calls: &[libc::c_long]) -> SeccompProgram {
    let instruction = |code: u16, jt: u8, jf: u8, k: u32| {
        let [a, b] = code.to_le_bytes();
        let [c, d, e, f] = k.to_le_bytes();
        [a, b, jt, jf, c, d, e, f]
    };
    let (load, equal, give) = (0x20, 0x15, 0x06);
    let mut program = vec![instruction(load, 0, 0, 0)];
    for (index, call) in calls.iter().enumerate() {
        program.push(instruction(equal, (calls.len() - index) as u8, 0, *call as u32));
    }
    program.push(instruction(give, 0, 0, libc::SECCOMP_RET_ALLOW));
    program.push(instruction(give, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32));
    SeccompProgram { filter: program.concat(), flags: 0 }
}

fn start_without(calls: &[libc::c_long]) -> AgentError {
    Host::new().start_with(&container(&process(&["true"])), Some(forbid(calls))).map(drop).unwrap_err()
}

fn a_failure_is_told_although_the_filter_forbids_to_send() {
    let error = start_without(&[libc::SYS_execve, libc::SYS_sendmsg, libc::SYS_sendto]);
    assert_eq!(error.message, "exec /bin/true: operation not permitted");
}

fn a_filter_may_forbid_what_only_the_start_needs() {
    let mut host = Host::new();
    let spec = container(&process(&["echo", "started"]));
    let streams = host.start_with(&spec, Some(forbid(&[libc::SYS_getcwd]))).unwrap();
    assert_eq!(host.finish(ProcessId::INIT, streams).stdout, "started\n");
}

fn a_failure_that_cannot_be_told_is_no_start() {
    let error = start_without(&[libc::SYS_execve, libc::SYS_sendmsg, libc::SYS_sendto, libc::SYS_write]);
    assert_eq!(error.message, "the process ended before it came to its program");
}

fn a_fifo_in_place_of_the_user_database_does_not_block() {
    let mut host = Host::new();
    let database = host.rootfs().join("etc/passwd");
    std::fs::remove_file(&database).unwrap();
    nix::unistd::mkfifo(&database, nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
    assert_eq!(host.run(&container(&shell("echo $HOME"))).success(), "/\n");
}

fn a_process_that_is_killed_on_its_way_is_no_start() {
    let mut host = Host::new();
    let fifo = host.rootfs().join("tmp/gate");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
    let mut spec = container(&process(&["true"]));
    let command = "echo > /tmp/gate; sleep 1000";
    spec["hooks"] = json!({ "startContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", command] }] });
    let begun = host.begin(&spec);
    std::fs::read(&fifo).unwrap();
    let error = host.kill_while_starting(begun);
    assert_eq!(error.message, "the process ended before it came to its program");
}

fn a_container_starts_once() {
    let mut host = Host::new();
    let streams = host.start(&container(&process(&["cat"]))).unwrap();
    let error = host.start(&container(&process(&["cat"]))).map(drop).unwrap_err();
    assert!(error.message.contains("already"), "{error}");
    assert_eq!(host.finish(ProcessId::INIT, streams).status, ExitStatus::Code(0));
}

fn nothing_runs_before_the_start() {
    let mut host = Host::new();
    for body in [
        Request::Signal { process: ProcessId::INIT, signal: 9, all: false },
        Request::Signal { process: ProcessId::INIT, signal: 9, all: true },
        Request::List,
        Request::Resize { process: ProcessId(5), rows: 1, columns: 1 },
    ] {
        let error = host.request(body.clone()).unwrap_err();
        assert_eq!(error.kind, AgentErrorKind::NoSuchProcess, "{body:?}");
    }
    let error = host.exec(1, &shell("true")).map(drop).unwrap_err();
    assert_eq!(error.message, "container not running");
}
