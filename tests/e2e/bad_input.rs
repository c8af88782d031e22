//! What a user gets wrong gets one clear line, and leaves nothing behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};
use serde_json::json;

use crate::Story;
use crate::bundle::Bundle;
use crate::command::{Outcome, rvm, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("no_config", no_config),
    ("a_truncated_config", a_truncated_config),
    ("a_config_of_the_wrong_type", a_config_of_the_wrong_type),
    ("a_capability_that_is_no_name", a_capability_that_is_no_name),
    ("an_unknown_namespace", an_unknown_namespace),
    ("an_unknown_mount_option", an_unknown_mount_option),
    ("no_root_filesystem", no_root_filesystem),
    ("no_kernel_image", no_kernel_image),
    ("a_kernel_image_that_is_none", a_kernel_image_that_is_none),
    ("no_kvm_device", no_kvm_device),
    ("a_device_that_is_not_kvm", a_device_that_is_not_kvm),
    ("a_kvm_that_emulates_the_kernel_mode", a_kvm_that_emulates_the_kernel_mode),
    ("no_space_for_the_state", no_space_for_the_state),
    ("an_id_that_exists", an_id_that_exists),
    ("an_id_that_is_a_path", an_id_that_is_a_path),
    ("an_unknown_id_for_every_command", an_unknown_id_for_every_command),
    ("a_command_that_cannot_be_executed", a_command_that_cannot_be_executed),
    ("a_command_that_is_missing_at_create", a_command_that_is_missing_at_create),
    ("an_option_that_does_not_exist", an_option_that_does_not_exist),
    ("errors_in_the_engines_form", errors_in_the_engines_form),
];

/// Fails unless it failed with one line on standard error that holds these words.
fn one_line(outcome: Outcome, words: &[&str]) -> Result<()> {
    let outcome = outcome.expect_failure(words)?;
    let message = outcome.error_text();
    ensure!(
        message.trim_end().lines().count() == 1,
        "`{}` said more than one line: {message}",
        outcome.command
    );
    ensure!(message.starts_with("error: "), "`{}` said: {message}", outcome.command);
    Ok(())
}

fn run_bundle(bundle: &Bundle) -> Result<Outcome> {
    rvm(&["run", "--bundle", bundle.path(), "story"])
}

fn no_config() -> Result<()> {
    let bundle = Bundle::new(&["true"])?;
    fs::remove_file(bundle.config_path())?;
    one_line(run_bundle(&bundle)?, &["config.json"])
}

fn a_truncated_config() -> Result<()> {
    let bundle = Bundle::new(&["true"])?;
    let whole = fs::read(bundle.config_path())?;
    fs::write(bundle.config_path(), &whole[..whole.len() / 2])?;
    one_line(run_bundle(&bundle)?, &["config.json"])
}

fn a_config_of_the_wrong_type() -> Result<()> {
    let bundle = Bundle::new(&["true"])?.edit(|config| config["process"]["args"] = json!("true"))?;
    one_line(run_bundle(&bundle)?, &["config.json", "args"])?;
    let bundle = Bundle::new(&["true"])?.edit(|config| *config = json!([1, 2]))?;
    one_line(run_bundle(&bundle)?, &["config.json"])
}

fn a_capability_that_is_no_name() -> Result<()> {
    let bundle =
        Bundle::new(&["true"])?.edit(|config| config["process"]["capabilities"]["bounding"] = json!([7]))?;
    one_line(run_bundle(&bundle)?, &["capabilities.bounding[0]"])
}

fn an_unknown_namespace() -> Result<()> {
    let bundle =
        Bundle::new(&["true"])?.edit(|config| config["linux"]["namespaces"] = json!([{"type": "dream"}]))?;
    one_line(run_bundle(&bundle)?, &["dream"])
}

fn an_unknown_mount_option() -> Result<()> {
    let mount =
        json!([{"destination": "/x", "type": "bind", "source": "/etc", "options": ["bind", "sparkling"]}]);
    let bundle = Bundle::new(&["true"])?.edit(|config| config["mounts"] = mount)?;
    one_line(run_bundle(&bundle)?, &["sparkling"])
}

fn no_root_filesystem() -> Result<()> {
    let bundle = Bundle::new(&["true"])?.edit(|config| config["root"]["path"] = json!("absent"))?;
    one_line(run_bundle(&bundle)?, &["absent"])
}

fn no_kernel_image() -> Result<()> {
    let bundle = Bundle::new(&["true"])?;
    one_line(
        rvm(&["--kernel", "/nowhere/vmlinux", "run", "--bundle", bundle.path(), "story"])?,
        &["/nowhere/vmlinux"],
    )
}

fn a_kernel_image_that_is_none() -> Result<()> {
    let bundle = Bundle::new(&["true"])?;
    one_line(rvm(&["--kernel", "/etc/passwd", "run", "--bundle", bundle.path(), "story"])?, &["/etc/passwd"])
}

/// Runs a bundle and `rvm check` where `change`, a line of shell, has changed the mounts. Both must complain.
fn both_complain(change: &str, words: &[&str]) -> Result<()> {
    let bundle = Bundle::new(&["true"])?;
    let changed = |command: &str| shell(&format!("unshare -m sh -c '{change} && {command}'"));
    one_line(changed(&format!("rvm run --bundle {} story", bundle.path()))?, words)?;
    let report = changed("rvm check")?.expect_code(1)?.text();
    for word in words {
        ensure!(report.contains(word), "the report does not say {word:?}: {report}");
    }
    Ok(())
}

fn no_kvm_device() -> Result<()> {
    let without = "mount -t tmpfs dev /mnt && \
                   cp -a /dev/null /dev/zero /dev/random /dev/urandom /dev/tty /dev/ptmx /dev/net /mnt && \
                   mount --move /mnt /dev";
    both_complain(without, &["has no /dev/kvm"])
}

fn a_device_that_is_not_kvm() -> Result<()> {
    both_complain("mount --bind /dev/null /dev/kvm", &["/dev/kvm"])
}

fn a_kvm_that_emulates_the_kernel_mode() -> Result<()> {
    // Such a host is known by a processor that has neither SVM nor VMX.
    let folder = tempfile::Builder::new().prefix("e2e-cpuinfo").tempdir()?;
    let path = folder.path().join("cpuinfo");
    let processor = fs::read_to_string("/proc/cpuinfo")?.replace(" svm ", " ").replace(" vmx ", " ");
    fs::write(&path, processor)?;
    both_complain(&format!("mount --bind {} /proc/cpuinfo", path.display()), &["kvm_pvm"])
}

fn no_space_for_the_state() -> Result<()> {
    let bundle = Bundle::new(&["true"])?;
    let full = format!(
        "unshare -m sh -c 'mkdir -p /mnt && mount -t tmpfs -o size=8k none /mnt && \
         (head -c 100k /dev/zero > /mnt/filler) 2>/dev/null; rvm --root /mnt run --bundle {} story; \
         code=$?; ls -A /mnt; exit $code'",
        bundle.path()
    );
    let outcome = shell(&full)?;
    ensure!(outcome.text() == "filler", "left in the state folder: {}", outcome.text());
    one_line(outcome, &["/mnt", "No space left on device"])
}

fn an_id_that_exists() -> Result<()> {
    let bundle = Bundle::new(&["sleep", "1000"])?;
    let create = format!("rvm create --bundle {} story </dev/null >/dev/null 2>&1", bundle.path());
    shell(&create)?.expect_code(0)?;
    let again = shell(&format!("rvm create --bundle {} story </dev/null", bundle.path()))?;
    let delete = rvm(&["delete", "--force", "story"])?;
    one_line(again, &["story", "exists"])?;
    delete.expect_code(0).map(drop)
}

fn an_id_that_is_a_path() -> Result<()> {
    let bundle = Bundle::new(&["true"])?;
    for id in ["a/b", "..", "../up", ".", "", "with space", "new\nline"] {
        one_line(rvm(&["create", "--bundle", bundle.path(), id])?, &["ID"])?;
        one_line(rvm(&["delete", id])?, &["ID"])?;
    }
    Ok(())
}

fn an_unknown_id_for_every_command() -> Result<()> {
    let commands: &[&[&str]] = &[
        &["start", "nobody"],
        &["state", "nobody"],
        &["kill", "nobody", "KILL"],
        &["delete", "nobody"],
        &["exec", "nobody", "true"],
        &["ps", "nobody"],
        &["pause", "nobody"],
        &["resume", "nobody"],
    ];
    for command in commands {
        one_line(rvm(command)?, &["nobody", "does not exist"])?;
    }
    rvm(&["delete", "--force", "nobody"])?.expect_code(0).map(drop)
}

fn a_command_that_cannot_be_executed() -> Result<()> {
    one_line(run_bundle(&Bundle::new(&["no-such-program"])?)?, &["executable file not found in $PATH"])?;
    one_line(run_bundle(&Bundle::new(&["/no/such/program"])?)?, &["no such file or directory"])?;
    one_line(run_bundle(&Bundle::new(&["/etc/passwd"])?)?, &["permission denied"])?;
    one_line(run_bundle(&Bundle::new(&["/etc"])?)?, &["/etc"])?;
    let text = Bundle::new(&["/bin/text"])?;
    let program = format!("{}/rootfs/bin/text", text.path());
    fs::write(&program, "neither ELF nor script")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    one_line(run_bundle(&text)?, &["exec format error"])
}

fn a_command_that_is_missing_at_create() -> Result<()> {
    let bundle = Bundle::new(&["no-such-program"])?;
    one_line(
        rvm(&["create", "--bundle", bundle.path(), "story"])?,
        &["exec: \"no-such-program\": executable file not found in $PATH"],
    )?;
    rvm(&["state", "story"])?.expect_failure(&["does not exist"])?;
    rvm(&["do", "--", "/no/such/program"])?.expect_code(127)?;
    rvm(&["do", "--", "/etc/passwd"])?.expect_code(126)?;
    // What the guest mounts only the guest can look into.
    let below = Bundle::new(&["/dev/shm/program"])?;
    shell(&format!("rvm create --bundle {} story </dev/null >/dev/null 2>&1", below.path()))?
        .expect_code(0)?;
    one_line(rvm(&["start", "story"])?, &["no such file or directory"])?;
    rvm(&["delete", "--force", "story"])?.expect_code(0).map(drop)
}

fn an_option_that_does_not_exist() -> Result<()> {
    let outcome = rvm(&["run", "--sparkling", "story"])?;
    outcome.expect_failure(&["--sparkling"]).map(drop)
}

fn errors_in_the_engines_form() -> Result<()> {
    let folder = tempfile::Builder::new().prefix("e2e-log").tempdir()?;
    let log = folder.path().join("log.json");
    let path = log.display().to_string();
    rvm(&["--log", &path, "--log-format", "json", "start", "nobody"])?.expect_code(1)?;
    let text = fs::read_to_string(&log)?;
    let lines: Vec<serde_json::Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let last = lines.last().cloned().unwrap_or_default();
    ensure!(last["level"] == "error", "the log holds {text}");
    ensure!(
        last["msg"].as_str().is_some_and(|words| words.contains("does not exist")),
        "the log holds {text}"
    );
    ensure!(last["time"].as_str().is_some_and(|time| time.contains('T')), "the log holds {text}");
    Ok(())
}
