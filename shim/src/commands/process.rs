//! The process that `exec` starts: from a file, or from the container's own process and flags.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use oci_spec::runtime::Process;
use serde_json::{Value, json};

use super::strings;
use crate::bundle;
use crate::container::Container;
use crate::error::Error;

/// What to execute, and as whom.
#[derive(Debug, Args)]
pub(super) struct ProcessArguments {
    /// A file with the spec's `process` as JSON, instead of the flags below and a command
    #[arg(short, long, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Give the process a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Working directory
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// An environment variable; may be repeated
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// User and group by number
    #[arg(short, long, value_name = "UID[:GID]")]
    user: Option<String>,
    /// A further group by number; may be repeated
    #[arg(short = 'g', long, value_name = "GID")]
    additional_gids: Vec<u32>,
    /// A capability to add; may be repeated
    #[arg(short, long, value_name = "CAP")]
    cap: Vec<String>,
    /// Allow the process no new privileges
    #[arg(long)]
    no_new_privs: bool,
    /// Accepted for compatibility, without effect
    #[arg(long, value_name = "LABEL", hide = true)]
    process_label: Option<String>,
    /// Accepted for compatibility, without effect
    #[arg(long, value_name = "PROFILE", hide = true)]
    apparmor: Option<String>,
    /// The command with its arguments
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

impl ProcessArguments {
    /// The process to start in a container, and what of its description has no effect.
    pub fn into_process(self, container: &Container, warnings: &mut Vec<String>) -> Result<Process, Error> {
        match &self.process {
            Some(file) => Ok(bundle::load_process(file, warnings)?),
            None => self.derive(container.record.process.as_ref()),
        }
    }

    /// The container's own process with what the flags say.
    fn derive(self, own: Option<&Process>) -> Result<Process, Error> {
        if self.command.is_empty() {
            return Err(Error::Usage("exec needs a command, or --process FILE".into()));
        }
        let malformed = |error: serde_json::Error| Error::Usage(format!("the process is not valid: {error}"));
        let mut process = serde_json::to_value(own.cloned().unwrap_or_default()).map_err(malformed)?;
        process["terminal"] = json!(self.tty);
        process["args"] = json!(strings(self.command)?);
        if let Some(cwd) = self.cwd {
            process["cwd"] = json!(cwd);
        }
        if let Some(user) = &self.user {
            set_user(&mut process, user)?;
        }
        if self.no_new_privs {
            process["noNewPrivileges"] = json!(true);
        }
        extend(&mut process, &["user", "additionalGids"], self.additional_gids);
        extend(&mut process, &["env"], self.env);
        for set in ["bounding", "effective", "permitted"] {
            extend(&mut process, &["capabilities", set], self.cap.clone());
        }
        serde_json::from_value(process).map_err(malformed)
    }
}

fn set_user(process: &mut Value, user: &str) -> Result<(), Error> {
    let number = |text: &str| {
        text.parse::<u32>()
            .map_err(|_| Error::Usage(format!("--user {user:?}: UID or UID:GID are expected, as numbers")))
    };
    let (uid, gid) = match user.split_once(':') {
        Some((uid, gid)) => (number(uid)?, Some(number(gid)?)),
        None => (number(user)?, None),
    };
    process["user"]["uid"] = json!(uid);
    if let Some(gid) = gid {
        process["user"]["gid"] = json!(gid);
    }
    Ok(())
}

fn extend<T: Into<Value>>(process: &mut Value, path: &[&str], values: Vec<T>) {
    if values.is_empty() {
        return;
    }
    let list = path.iter().fold(process, |value, name| &mut value[*name]);
    if !list.is_array() {
        *list = json!([]);
    }
    if let Some(list) = list.as_array_mut() {
        list.extend(values.into_iter().map(Into::into));
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        arguments: ProcessArguments,
    }

    fn own() -> Process {
        serde_json::from_value(json!({
            "terminal": true, "user": {"uid": 5, "gid": 6}, "args": ["own"], "env": ["A=1"], "cwd": "/own",
        }))
        .unwrap()
    }

    fn derive(words: &[&str]) -> Result<Process, Error> {
        Command::parse_from([&["exec"], words].concat()).arguments.derive(Some(&own()))
    }

    #[test]
    fn the_containers_process_is_the_base() {
        let process = derive(&["ls", "-l"]).unwrap();
        assert_eq!(process.args().as_deref().unwrap(), ["ls", "-l"]);
        assert_eq!(process.terminal(), Some(false));
        assert_eq!(process.cwd().to_str(), Some("/own"));
        assert_eq!((process.user().uid(), process.user().gid()), (5, 6));
    }

    #[test]
    fn flags_change_it() {
        let process = derive(&[
            "-t",
            "--cwd",
            "/x",
            "-e",
            "B=2",
            "--env",
            "C=3",
            "-u",
            "7:8",
            "-g",
            "9",
            "--cap",
            "CAP_NET_RAW",
            "--no-new-privs",
            "env",
            "-i",
        ])
        .unwrap();
        assert_eq!(process.terminal(), Some(true));
        assert_eq!(process.env().as_deref().unwrap(), ["A=1", "B=2", "C=3"]);
        assert_eq!((process.user().uid(), process.user().gid()), (7, 8));
        assert_eq!(process.user().additional_gids().as_deref(), Some(&[9][..]));
        assert_eq!(process.args().as_deref().unwrap(), ["env", "-i"]);
        assert_eq!(process.no_new_privileges(), Some(true));
        let capabilities = process.capabilities().as_ref().unwrap();
        assert_eq!(capabilities.effective().as_ref().map(std::collections::HashSet::len), Some(1));
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(derive(&[]).is_err());
        assert!(derive(&["-u", "root", "id"]).is_err());
        assert!(derive(&["--cap", "CAP_NO_SUCH", "id"]).is_err());
    }
}
