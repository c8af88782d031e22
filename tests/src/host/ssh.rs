//! The way into the test host: OpenSSH over a forwarded port of 127.0.0.1.
//!
//! A handshake takes a second or two on the software processor, so one master connection is kept, and each command
//! is a channel of it. ssh carries stdin, stdout, stderr, exit status and terminals, binary-safe; it has one command
//! *line*, which the far shell splits into words again, so each word is quoted.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::support::process;
use crate::support::shell::quote;

/// The name under which the host key is known, whatever the port.
const HOST_NAME: &str = "rvm-test-host";

/// Makes the key pairs of an image: the caller's in `directory`, the test host's in `tree`.
pub fn make_keys(directory: &Path, tree: &Path) -> Result<()> {
    let caller = directory.join("id_ed25519");
    let host = tree.join("etc/ssh/ssh_host_ed25519_key");
    for key in [&caller, &host] {
        let _ = std::fs::remove_file(key);
        process::run(
            Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-C", HOST_NAME, "-f"])
                .arg(key),
        )?;
    }
    let public =
        |key: &Path| std::fs::read_to_string(key.with_extension("pub")).context("no public key was made");
    std::fs::write(tree.join("etc/ssh/authorized_keys"), public(&caller)?)?;
    std::fs::write(directory.join("known_hosts"), format!("{HOST_NAME} {}", public(&host)?))?;
    Ok(())
}

/// How to reach one running test host.
#[derive(Clone, Debug)]
pub struct Ssh {
    keys: PathBuf,
    master: PathBuf,
    port: u16,
}

impl Ssh {
    /// The way into the host whose keys lie in `keys`, which keeps its sockets in `run`, and listens on `port`.
    pub fn new(keys: &Path, run: &Path, port: u16) -> Self {
        Self { keys: keys.to_path_buf(), master: run.join("ssh.sock"), port }
    }

    /// Makes sure that the master connection is up.
    pub fn connect(&self) -> Result<()> {
        if UnixStream::connect(&self.master).is_ok() {
            return Ok(());
        }
        let _ = std::fs::remove_file(&self.master);
        let mut command = self.base();
        command
            .args(["-o", "ControlMaster=yes", "-o", "ControlPersist=yes", "-N", "-f"])
            .arg(Self::destination());
        // The master outlives this process: it must not hold a pipe that somebody waits on.
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        let status = status.context("cannot start ssh")?;
        anyhow::ensure!(status.success(), "cannot connect to the test host by ssh ({status})");
        Ok(())
    }

    /// A command that runs `words` in the test host, as root in /root; on a terminal of its own when asked.
    pub fn command<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>, terminal: bool) -> Command {
        let mut command = self.base();
        command
            .args(["-o", "ControlMaster=no", if terminal { "-tt" } else { "-T" }])
            .arg(Self::destination());
        let mut line = b"/usr/lib/rvm-host/run".to_vec();
        for word in words {
            line.push(b' ');
            line.extend(quote(word.as_ref().as_bytes()));
        }
        command.arg("--").arg(OsStr::from_bytes(&line));
        command
    }

    /// Runs `words` to their end with nothing on stdin; a failure says what they printed.
    pub fn run<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<()> {
        let words: Vec<S> = words.into_iter().collect();
        let name = words.first().map(|word| word.as_ref().to_string_lossy().into_owned()).unwrap_or_default();
        process::run(self.command(words, false).stdin(Stdio::null()))
            .with_context(|| format!("{name} failed in the test host"))
    }

    fn base(&self) -> Command {
        let mut command = Command::new("ssh");
        command.args(["-F", "none", "-p", &self.port.to_string()]).arg("-S").arg(&self.master);
        command.arg("-i").arg(self.keys.join("id_ed25519"));
        command.arg("-o").arg(format!("UserKnownHostsFile=\"{}\"", self.keys.join("known_hosts").display()));
        for option in [
            &format!("HostKeyAlias={HOST_NAME}"),
            "BatchMode=yes",
            "StrictHostKeyChecking=yes",
            "IdentitiesOnly=yes",
            "LogLevel=ERROR",
            "ConnectTimeout=60",
            "EscapeChar=none",
            // The cheapest on a software processor.
            "KexAlgorithms=curve25519-sha256",
            "Ciphers=aes128-ctr",
            "MACs=umac-64-etm@openssh.com",
        ] {
            command.args(["-o", option]);
        }
        command
    }

    fn destination() -> &'static str {
        "root@127.0.0.1"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_word_of_a_command_arrives_as_one() {
        let ssh = Ssh::new(Path::new("/image"), Path::new("/run/host"), 2222);
        let command = ssh.command(["sh", "-c", "echo 'a  b'"], false);
        let last = command.get_args().last().unwrap();
        assert_eq!(last, r"/usr/lib/rvm-host/run 'sh' '-c' 'echo '\''a  b'\'''");
    }
}
