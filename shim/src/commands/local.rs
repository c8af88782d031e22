//! `do`: a command in a microVM over a directory of the host, whose writes are thrown away. The way to try rvm
//! without an engine.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use oci_spec::runtime::Spec;
use serde_json::json;

use super::inspect::Format;
use super::lifecycle::CreateArguments;
use super::run::{Foreground, RunArguments};
use super::{Context, strings};
use crate::bundle::Bundle;
use crate::container::{Container, Status, delete};
use crate::error::{Error, FAILURE};
use crate::spec::default_spec;

/// How the names of the bundles of this command begin.
const BUNDLE_PREFIX: &str = "rvm-do-";
const PERIOD: f64 = 100_000.0;
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Net {
    /// The loopback interface alone
    #[default]
    None,
}

#[derive(Debug, Args)]
pub(super) struct DoArguments {
    /// The directory to run over
    #[arg(long, value_name = "DIR", default_value = "/")]
    rootfs: PathBuf,
    /// Show afterwards when each phase of the start was reached
    #[arg(long, value_name = "FORMAT", value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    timeline: Option<Format>,
    /// Memory for the command, such as 512m or 2g
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// Processors for the command, such as 2 or 0.5
    #[arg(long, value_name = "N", value_parser = parse_cpus)]
    cpus: Option<f64>,
    /// Working directory; the present one where it exists in the directory to run over
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<PathBuf>,
    /// An environment variable; may be repeated
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// The network
    #[arg(long, value_enum, default_value_t)]
    net: Net,
    /// The command with its arguments
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

pub(super) fn run(context: &Context, arguments: DoArguments) -> Result<ExitCode, Error> {
    sweep(context);
    let lower = arguments
        .rootfs
        .canonicalize()
        .map_err(Error::system(format!("cannot use {} as root", arguments.rootfs.display())))?;
    let folder = TemporaryBundle::create()?;
    let timeline = arguments.timeline;
    let spec = make_spec(arguments, &lower)?;
    let bundle = Bundle::from_spec(&folder.path, spec)?;
    let run = RunArguments {
        create: CreateArguments {
            bundle: folder.path.clone(),
            console_socket: None,
            pid_file: None,
            pidfd_socket: None,
            no_pivot: false,
            no_new_keyring: false,
            preserve_fds: 0,
            id: format!("do-{}", std::process::id()),
        },
        detach: false,
        keep: false,
        no_subreaper: false,
        timeline,
    };
    let result = (Foreground { context, arguments: &run, lower: Some(lower) }).run(bundle);
    match result.as_ref().err().and_then(Error::refusal) {
        Some(refusal) => {
            context.log.error(&refusal.words);
            Ok(ExitCode::from(refusal.kind.shell_code().unwrap_or(FAILURE)))
        }
        None => result,
    }
}

/// Removes what commands of this kind have left that were killed: their containers have ended with them.
fn sweep(context: &Context) {
    for container in Container::list(&context.root).unwrap_or_default().iter().filter(|left| is_left(left)) {
        // Another such command may be at it too.
        let Ok(Some((container, _lock))) = Container::try_open_locked(&context.root, container.id()) else {
            continue;
        };
        // Under this name there may be another one by now.
        if is_left(&container) && delete::delete_locked(&container, false, &context.log).is_ok() {
            remove_bundle(&container.record.bundle);
        }
    }
}

/// Whether a container was made by a command of this kind that does not live any more, and has ended with it.
fn is_left(container: &Container) -> bool {
    container.record.throw_away.is_some_and(|command| !command.is_alive())
        && container.status() == Status::Stopped
}

/// Removes a bundle's folder, if it is one that [`TemporaryBundle`] has made.
fn remove_bundle(path: &Path) {
    use std::os::unix::fs::MetadataExt;
    let named = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(BUNDLE_PREFIX));
    let owned = std::fs::symlink_metadata(path)
        .is_ok_and(|found| found.is_dir() && found.uid() == nix::unistd::geteuid().as_raw());
    if named && owned {
        let _ = std::fs::remove_dir_all(path);
    }
}

fn make_spec(arguments: DoArguments, lower: &Path) -> Result<Spec, Error> {
    let cwd = arguments.workdir.or_else(|| std::env::current_dir().ok().filter(|cwd| is_within(lower, cwd)));
    let terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    let mut env = vec![PATH.to_owned(), "HOME=/root".to_owned()];
    env.extend(std::env::var("TERM").ok().filter(|_| terminal).map(|term| format!("TERM={term}")));
    env.extend(arguments.env);
    let capabilities: Vec<String> = caps::all().iter().map(ToString::to_string).collect();

    let invalid = |error: serde_json::Error| Error::Usage(format!("the command is not valid: {error}"));
    let mut spec = serde_json::to_value(default_spec(false)).map_err(invalid)?;
    spec["root"] = json!({ "path": TemporaryBundle::ROOTFS, "readonly": false });
    spec["process"] = json!({
        "terminal": terminal,
        "user": { "uid": 0, "gid": 0 },
        "args": strings(arguments.command)?,
        "env": env,
        "cwd": cwd.unwrap_or_else(|| "/".into()),
        "capabilities": {
            "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
        },
    });
    if let Some(memory) = arguments.memory {
        spec["linux"]["resources"]["memory"]["limit"] = json!(memory);
    }
    if let Some(cpus) = arguments.cpus {
        spec["linux"]["resources"]["cpu"] =
            json!({ "quota": (cpus * PERIOD) as i64, "period": PERIOD as u64 });
    }
    serde_json::from_value(spec).map_err(invalid)
}

fn is_within(root: &Path, directory: &Path) -> bool {
    directory.strip_prefix("/").is_ok_and(|relative| root.join(relative).is_dir())
}

/// A bundle's folder that disappears with the command.
struct TemporaryBundle {
    path: PathBuf,
}

impl TemporaryBundle {
    /// Name of the directory on which the throw-away layer is mounted.
    const ROOTFS: &str = "rootfs";

    fn create() -> Result<TemporaryBundle, Error> {
        let template = std::env::temp_dir().join(format!("{BUNDLE_PREFIX}XXXXXX"));
        let failed = || format!("cannot make a folder in {}", std::env::temp_dir().display());
        let path = nix::unistd::mkdtemp(&template).map_err(Error::system(failed()))?;
        let bundle = TemporaryBundle { path };
        std::fs::create_dir(bundle.path.join(Self::ROOTFS)).map_err(Error::system(failed()))?;
        Ok(bundle)
    }
}

impl Drop for TemporaryBundle {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches("ib").trim_end_matches('b');
    let (digits, shift) = split_unit(digits);
    let number = digits.parse::<u64>().map_err(|_| format!("{text:?} is no size such as 512m or 2g"))?;
    number
        .checked_mul(1 << shift)
        .filter(|size| *size > 0)
        .ok_or_else(|| format!("{text:?} is no possible size"))
}

/// A number without the letter behind it, and how far that letter shifts it.
pub(super) fn split_unit(text: &str) -> (&str, u32) {
    let shift = match text.as_bytes().last() {
        Some(b'k' | b'K') => 10,
        Some(b'm' | b'M') => 20,
        Some(b'g' | b'G') => 30,
        _ => return (text, 0),
    };
    (&text[..text.len() - 1], shift)
}

fn parse_cpus(text: &str) -> Result<f64, String> {
    let cpus = text.parse::<f64>().map_err(|_| format!("{text:?} is no number"))?;
    if (0.01..=64.0).contains(&cpus) {
        Ok(cpus)
    } else {
        Err("between 0.01 and 64 processors are possible".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, size) in
            [("512m", 512 << 20), ("2G", 2 << 30), ("64MiB", 64 << 20), ("4096", 4096), ("1kb", 1024)]
        {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
        for text in ["", "m", "0", "-1", "1t", "1.5g", "99999999999g"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn processors_are_bounded() {
        assert_eq!(parse_cpus("0.5"), Ok(0.5));
        for text in ["0", "-1", "nan", "inf", "65", "x"] {
            assert!(parse_cpus(text).is_err(), "{text}");
        }
    }

    #[test]
    fn only_a_bundle_of_this_command_is_removed() {
        let other = tempfile::tempdir().unwrap();
        remove_bundle(other.path());
        assert!(other.path().exists());
        let bundle = TemporaryBundle::create().unwrap();
        remove_bundle(&bundle.path);
        assert!(!bundle.path.exists());
    }

    #[test]
    fn the_bundle_disappears() {
        let bundle = TemporaryBundle::create().unwrap();
        let path = bundle.path.clone();
        assert!(path.join("rootfs").is_dir());
        drop(bundle);
        assert!(!path.exists());
    }
}
