//! Command lines exactly as engines give them.

use clap::Parser;

use super::*;

fn parse(line: &str) -> Arguments {
    let words = std::iter::once("rvm").chain(line.split_whitespace());
    Arguments::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"))
}

#[test]
fn containerds_shim_is_understood() {
    let globals = "--root /run/containerd/runc/k8s.io --log /b/log.json --log-format json --systemd-cgroup";
    for command in [
        "create --bundle /b --pid-file /b/init.pid --console-socket /tmp/pty.sock ID",
        "create --bundle /b --pid-file /b/init.pid --no-pivot --no-new-keyring --preserve-fds 0 ID",
        "start ID",
        "state ID",
        "pause ID",
        "resume ID",
        "delete ID",
        "delete --force ID",
        "kill --all ID 9",
        "kill ID 15",
        "exec --process /tmp/p.json --console-socket /s --detach --pid-file /b/e.pid ID",
        "ps --format json ID",
        "list --format=json",
        "update --resources=- ID",
        "features",
    ] {
        let arguments = parse(&format!("{globals} {command}"));
        assert_eq!(arguments.globals.root, PathBuf::from("/run/containerd/runc/k8s.io"));
        assert_eq!(arguments.globals.log_format, LogFormat::Json);
        assert!(arguments.globals.systemd_cgroup);
    }
}

#[test]
fn conmon_and_podman_are_understood() {
    for line in [
        "--log-format=json --log /l --systemd-cgroup create --bundle /b --pid-file /p --console-socket /s ID",
        "create --bundle /b --pid-file /p --no-pivot --no-new-keyring --preserve-fds 0 ID",
        "exec --pid-file /p --process /f --detach --tty ID",
        "update --resources=/f ID",
        "kill ID KILL",
        "--root=/run/crio update --resources - ID",
        "--rootless=false --debug state ID",
    ] {
        parse(line);
    }
}

#[test]
fn buildkit_is_understood() {
    let Command::Run(run) = parse("--log /l --log-format json run --bundle /b --keep ID").command else {
        panic!("not a run")
    };
    assert!(run.keep && !run.detach);
    assert_eq!(run.create.id, "ID");
}

#[test]
fn flags_may_follow_the_id() {
    let Command::Create(create) = parse("create ID --bundle /b").command else { panic!("not a create") };
    assert_eq!((create.id.as_str(), create.bundle), ("ID", PathBuf::from("/b")));
    let Command::Delete(_) = parse("delete ID --force").command else { panic!("not a delete") };
}

#[test]
fn flags_of_a_command_that_is_executed_are_its_own() {
    parse("exec ID ls --all -l --debug");
    parse("exec -t -e A=B ID sh -c true");
    parse("do --rootfs /x -- uname -a");
    parse("do uname -a --rootfs");
}

#[test]
fn the_version_has_the_form_that_engines_parse() {
    let error = Arguments::try_parse_from(["rvm", "--version"]).unwrap_err();
    let text = error.to_string();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some(concat!("rvm version ", env!("CARGO_PKG_VERSION"))));
    let commit = lines.next().and_then(|line| line.strip_prefix("commit: ")).unwrap();
    assert!(commit == "unknown" || commit.len() == 40, "{commit}");
    assert_eq!(lines.next(), Some(format!("spec: {}", OCI_VERSION).as_str()));
}

#[test]
fn the_definition_is_sound() {
    use clap::CommandFactory;
    Arguments::command().debug_assert();
}
