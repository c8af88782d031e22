//! What cannot be started, and the words that engines look for.

use rvm_protocol::{AgentErrorKind, ExitStatus, ProcessId, Request};
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
