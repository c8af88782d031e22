//! A Docker daemon of a story's own, beside the host's: with other options, and images and containers of its own.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::command::{Outcome, eventually, run, shell, wait_for};

/// It ends, with all that it holds, when it is dropped.
pub struct Daemon {
    process: Child,
    folder: TempDir,
}

impl Daemon {
    /// Starts one that knows rvm and has the busybox image.
    pub fn start(options: &[&str]) -> Result<Daemon> {
        let folder = tempfile::Builder::new().prefix("e2e-docker").tempdir_in("/var/lib")?;
        // Mapped users have to get through.
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o711))?;
        let place = |name: &str| folder.path().join(name).display().to_string();
        // Without a bridge of its own it would remove the host's.
        let mut command = Command::new("unshare");
        command.args(["--net", "dockerd", "--data-root", &place("data"), "--exec-root", &place("exec")]);
        command.args(["--pidfile", &place("pid"), "--host", &format!("unix://{}", place("sock"))]);
        // What it shares with the host's is kept apart by name.
        command.args(["--containerd-namespace", "e2e", "--containerd-plugins-namespace", "e2e-plugins"]);
        command.args(["--bridge", "none", "--iptables=false", "--ip6tables=false"]);
        command.args(["--config-file", "/dev/null", "--add-runtime", "rvm=/usr/local/bin/rvm"]).args(options);
        let log = std::fs::File::create(folder.path().join("log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let process = command.spawn().context("dockerd cannot be started")?;
        let mut daemon = Daemon { process, folder };
        daemon.wait_until_it_answers().with_context(|| daemon.log())?;
        shell(&format!("docker save busybox | docker -H {} load", daemon.address()))?.expect_code(0)?;
        Ok(daemon)
    }

    /// `docker` with these arguments, at this daemon.
    pub fn docker(&self, arguments: &[&str]) -> Result<Outcome> {
        run("docker", &[&["-H", &self.address()], arguments].concat())
    }

    /// Where it listens, as `docker -H` wants it.
    pub fn address(&self) -> String {
        format!("unix://{}", self.place("sock"))
    }

    fn wait_until_it_answers(&mut self) -> Result<()> {
        eventually("the daemon answers", || {
            ensure!(self.process.try_wait()?.is_none(), "dockerd has ended");
            Ok(self.docker(&["info"])?.code == 0)
        })
    }

    fn place(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let address = self.address();
        let _ = shell(&format!("docker -H {address} ps -aq | xargs -r docker -H {address} rm -f -v"));
        let _ = shell(&format!("kill {}", self.process.id()));
        let _ = wait_for(&mut self.process, "dockerd");
        // Its mounts are its own to remove; a failed one leaves them.
        let _ = shell(&format!(
            "awk '$2 ~ \"^{}\" {{print $2}}' /proc/mounts | sort -r | xargs -r umount -l",
            self.place("")
        ));
    }
}
