//! The `rvm` program from outside, on any machine: what it says and how it ends when something is wrong, and that
//! nothing stays behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// A root for states and a place for bundles that disappear with the test.
struct Sandbox {
    folder: TempDir,
}

impl Sandbox {
    fn new() -> Sandbox {
        let sandbox = Sandbox { folder: tempfile::tempdir().unwrap() };
        // Something where the kernel and the agent are looked for, that nothing can boot.
        for name in ["lib/vmlinux", "lib/rvm-agent"] {
            let path = sandbox.path(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "no program at all").unwrap();
        }
        sandbox
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn rvm(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_rvm"))
            .arg("--root")
            .arg(self.path("root"))
            .args(["--log-format", "json", "--log"])
            .arg(self.path("log.json"))
            .args(arguments)
            .env("RVM_LIB", self.path("lib"))
            .env_remove("RVM_KERNEL")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Runs a command that must fail, and returns its line on standard error.
    fn refused(&self, code: i32, arguments: &[&str]) -> String {
        let _ = fs::remove_file(self.path("log.json"));
        let output = self.rvm(arguments);
        let words = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {words}");
        assert_eq!(words.lines().count(), 1, "one line: {words}");
        let words = words.trim_end().strip_prefix("error: ").expect(&words).to_owned();
        assert_eq!(self.logged(), words, "the log says the same");
        words
    }

    /// The message of the log's one object.
    fn logged(&self) -> String {
        let log = fs::read_to_string(self.path("log.json")).unwrap();
        let object: serde_json::Value = serde_json::from_str(&log).unwrap();
        assert_eq!(object["level"], "error");
        object["msg"].as_str().unwrap().to_owned()
    }

    fn bundle(&self, process: &str) -> String {
        let bundle = self.path("bundle");
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let config = format!(
            r#"{{"ociVersion":"1.0.2","root":{{"path":"rootfs"}},"process":{process},
                "linux":{{"namespaces":[{{"type":"mount"}},{{"type":"pid"}},{{"type":"network"}},{{"type":"ipc"}},
                {{"type":"uts"}}]}}}}"#
        );
        fs::write(bundle.join("config.json"), config).unwrap();
        bundle.to_str().unwrap().to_owned()
    }

    fn states(&self) -> usize {
        fs::read_dir(self.path("root")).map_or(0, Iterator::count)
    }
}

const PROCESS: &str = r#"{"args":["true"],"cwd":"/","user":{"uid":0,"gid":0}}"#;
const PROCESS_WITH_TERMINAL: &str = r#"{"args":["true"],"cwd":"/","user":{"uid":0,"gid":0},"terminal":true}"#;

#[test]
fn an_unknown_id_is_said_in_the_words_that_engines_know() {
    let sandbox = Sandbox::new();
    for command in [
        &["start", "no"][..],
        &["state", "no"],
        &["kill", "no", "KILL"],
        &["kill", "--all", "no", "9"],
        &["delete", "no"],
        &["ps", "no"],
        &["pause", "no"],
        &["resume", "no"],
        &["update", "--memory", "1000000", "no"],
    ] {
        assert_eq!(sandbox.refused(1, command), "container \"no\" does not exist");
    }
    assert_eq!(sandbox.refused(255, &["exec", "no", "ls"]), "container \"no\" does not exist");
}

#[test]
fn to_delete_by_force_what_is_not_there_is_no_failure() {
    let sandbox = Sandbox::new();
    let output = sandbox.rvm(&["delete", "--force", "no"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn ids_that_lead_out_of_the_root_are_refused() {
    let sandbox = Sandbox::new();
    let bundle = sandbox.bundle(PROCESS);
    fs::create_dir_all(sandbox.path("precious")).unwrap();
    for id in ["..", "../precious", "a/b", "a b", ".", ""] {
        for command in [&["delete", "--force", id][..], &["state", id], &["create", "--bundle", &bundle, id]]
        {
            assert!(sandbox.refused(1, command).starts_with("invalid container ID format"), "{command:?}");
        }
    }
    assert!(sandbox.path("precious").is_dir());
}

#[test]
fn a_bundle_that_is_not_there_is_named_and_leaves_nothing() {
    let sandbox = Sandbox::new();
    for command in ["create", "run"] {
        let words = sandbox.refused(1, &[command, "--bundle", "/absent/bundle", "c"]);
        assert!(words.contains("/absent/bundle"), "{words}");
        assert!(!words.contains("No such file"), "that would be the program's absence: {words}");
    }
    assert_eq!(sandbox.states(), 0);
}

#[test]
fn a_missing_kernel_or_agent_is_named_and_leaves_nothing() {
    let sandbox = Sandbox::new();
    let bundle = sandbox.bundle(PROCESS);
    let words = sandbox.refused(1, &["--kernel", "/absent/vmlinux", "create", "-b", &bundle, "c"]);
    assert!(words.starts_with("cannot open /absent/vmlinux"), "{words}");

    fs::remove_file(sandbox.path("lib/rvm-agent")).unwrap();
    let words = sandbox.refused(1, &["create", "-b", &bundle, "c"]);
    assert!(words.starts_with("the guest's rvm-agent was not found"), "{words}");
    assert_eq!(sandbox.states(), 0);
}

#[test]
fn a_create_that_fails_late_leaves_nothing() {
    let sandbox = Sandbox::new();
    let bundle = sandbox.bundle(PROCESS);
    let mounts = mounts();
    let pid_file = sandbox.path("pid");
    // Whatever this machine lacks first (privileges, KVM), or else the kernel that is none.
    sandbox.refused(1, &["create", "-b", &bundle, "--pid-file", pid_file.to_str().unwrap(), "late"]);
    assert_eq!(sandbox.states(), 0);
    assert!(!pid_file.exists());
    assert_eq!(mounts, self::mounts());
    assert_eq!(processes("rvm: late"), 0);
    // The name is free again, or another error would come now.
    let words = sandbox.refused(1, &["create", "-b", &bundle, "late"]);
    assert!(!words.contains("exists"), "{words}");
}

#[test]
fn terminal_and_console_socket_have_to_fit() {
    let sandbox = Sandbox::new();
    let bundle = sandbox.bundle(PROCESS_WITH_TERMINAL);
    let words = sandbox.refused(1, &["create", "-b", &bundle, "c"]);
    assert!(words.contains("--console-socket"), "{words}");
    let bundle = sandbox.bundle(PROCESS);
    let words = sandbox.refused(1, &["create", "-b", &bundle, "--console-socket", "/s", "c"]);
    assert!(words.contains("console socket"), "{words}");
    assert_eq!(sandbox.states(), 0);
}

#[test]
fn descriptors_cannot_be_preserved() {
    let sandbox = Sandbox::new();
    let bundle = sandbox.bundle(PROCESS);
    let words = sandbox.refused(1, &["create", "-b", &bundle, "--preserve-fds", "2", "c"]);
    assert!(words.starts_with("--preserve-fds"), "{words}");
}

#[test]
fn a_usage_error_ends_with_the_commands_own_code() {
    let sandbox = Sandbox::new();
    assert_eq!(sandbox.rvm(&["no-such-command"]).status.code(), Some(1));
    assert_eq!(sandbox.rvm(&["start"]).status.code(), Some(1));
    assert_eq!(sandbox.rvm(&["exec"]).status.code(), Some(255));
    assert_eq!(sandbox.rvm(&["--help"]).status.code(), Some(0));
}

#[test]
fn a_usage_error_is_one_line_of_the_log() {
    let sandbox = Sandbox::new();
    sandbox.rvm(&["create", "--no-such-flag", "c"]);
    let text = fs::read_to_string(sandbox.path("log.json")).unwrap();
    let line: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(line["level"], "error");
    assert_eq!(line["msg"], "unexpected argument '--no-such-flag' found");
}

#[test]
fn an_unknown_signal_is_named() {
    let sandbox = Sandbox::new();
    assert_eq!(sandbox.refused(1, &["kill", "c", "NOSUCH"]), "unknown signal \"NOSUCH\"");
}

#[test]
fn the_processes_that_stay_are_not_started_by_hand() {
    for name in ["monitor", "exec-stub"] {
        let output = Command::new(env!("CARGO_BIN_EXE_rvm")).arg(name).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains("not by hand"));
    }
}

#[test]
fn an_empty_root_lists_nothing() {
    let sandbox = Sandbox::new();
    let output = sandbox.rvm(&["list", "--format=json"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "[]\n");
    let output = sandbox.rvm(&["list"]);
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("ID"), "the table's header stays");
}

#[test]
fn a_spec_is_written_once() {
    let sandbox = Sandbox::new();
    let folder = sandbox.path("new");
    fs::create_dir(&folder).unwrap();
    let folder = folder.to_str().unwrap();
    assert!(sandbox.rvm(&["spec", "--bundle", folder]).status.success());
    let spec: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(Path::new(folder).join("config.json")).unwrap()).unwrap();
    assert_eq!(spec["root"]["path"], "rootfs");
    let words = sandbox.refused(1, &["spec", "--bundle", folder]);
    assert!(words.starts_with("cannot write"), "{words}");
}

#[test]
fn a_damaged_state_is_an_error_and_can_be_deleted_by_force() {
    let sandbox = Sandbox::new();
    fs::create_dir_all(sandbox.path("root/damaged")).unwrap();
    let output = sandbox.rvm(&["delete", "--force", "damaged"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(sandbox.states(), 0);
}

#[test]
fn a_state_that_cannot_be_understood_is_listed_and_can_be_deleted_by_force() {
    let sandbox = Sandbox::new();
    let folder = sandbox.path("root/damaged");
    fs::create_dir_all(&folder).unwrap();
    for state in ["{\"id\":\"damaged\",\"later\":1}", "{\"id\":", "", "[]"] {
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("state.json"), state).unwrap();
        assert!(sandbox.refused(1, &["delete", "damaged"]).contains("cannot be used"), "{state}");
        let list = sandbox.rvm(&["list", "--quiet"]);
        assert_eq!(String::from_utf8_lossy(&list.stdout), "damaged\n", "{state}");
        let output = sandbox.rvm(&["delete", "--force", "damaged"]);
        assert!(output.status.success(), "{state}: {output:?}");
        assert_eq!(sandbox.states(), 0);
    }
}

fn mounts() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap()
}

/// Number of processes whose command line begins so.
fn processes(title: &str) -> usize {
    let lines = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path().join("cmdline"));
    lines.filter(|path| fs::read(path).is_ok_and(|line| line.starts_with(title.as_bytes()))).count()
}
