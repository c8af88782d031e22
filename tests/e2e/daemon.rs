//! A Docker daemon of a story's own, beside the host's: with other options, of another release, and with images and
//! containers of its own.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::command::{Outcome, eventually, run, shell, wait_for};

/// The older release: Docker 20.10, containerd 1.6 and runc 1.1.5.
const OLDER: &str = "/opt/bookworm/usr";

/// How a daemon is to be started.
#[derive(Default)]
pub struct Setup<'a> {
    /// Further options of `dockerd`.
    pub options: &'a [&'a str],
    /// Variables of its environment.
    pub environment: &'a [(&'a str, &'a str)],
    /// Whether it has the usual network, in a network namespace of its own.
    pub bridge: bool,
    /// The network namespace that it is in, as `nsenter` takes it; otherwise one of its own.
    pub namespace: Option<&'a str>,
    /// Whether it is of the older release, down to its runc.
    pub older: bool,
}

/// Who makes images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Builder {
    /// Runs each step as a container of the daemon's.
    Classic,
    /// Runs each step by itself.
    BuildKit,
}

/// It ends, with all that it holds, when it is dropped.
pub struct Daemon {
    docker: Child,
    containerd: Option<Child>,
    folder: TempDir,
}

impl Daemon {
    /// Starts one that knows rvm and has the busybox image.
    pub fn start(setup: &Setup<'_>) -> Result<Daemon> {
        let folder = tempfile::Builder::new().prefix("e2e-docker").tempdir_in("/var/lib")?;
        // Mapped users have to get through.
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o711))?;
        let containerd = setup.older.then(|| start_older_containerd(folder.path())).transpose()?;
        let docker = start_docker(setup, folder.path())?;
        let mut daemon = Daemon { docker, containerd, folder };
        daemon.wait_until_it_answers().with_context(|| daemon.log())?;
        shell(&format!("docker save busybox | docker -H {} load", daemon.address()))?.expect_code(0)?;
        Ok(daemon)
    }

    /// Ends it and starts it anew. Its containers go on if it was told so (`--live-restore`).
    pub fn restart(&mut self, setup: &Setup<'_>) -> Result<()> {
        shell(&format!("kill {}", self.docker.id()))?.expect_code(0)?;
        wait_for(&mut self.docker, "dockerd")?;
        self.docker = start_docker(setup, self.folder.path())?;
        self.wait_until_it_answers().with_context(|| self.log())
    }

    /// `docker` with these arguments, at this daemon.
    pub fn docker(&self, arguments: &[&str]) -> Result<Outcome> {
        run("docker", &[&["-H", &self.address()], arguments].concat())
    }

    /// `docker build` with these arguments, by the classic builder or by BuildKit.
    pub fn build(&self, builder: Builder, arguments: &[&str]) -> Result<Outcome> {
        let choice = if builder == Builder::BuildKit { "DOCKER_BUILDKIT=1" } else { "DOCKER_BUILDKIT=0" };
        run("env", &[&[choice, "docker", "-H", &self.address(), "build"], arguments].concat())
    }

    /// Where it listens, as `docker -H` wants it.
    pub fn address(&self) -> String {
        format!("unix://{}", place(self.folder.path(), "sock"))
    }

    fn wait_until_it_answers(&mut self) -> Result<()> {
        eventually("the daemon answers", || {
            ensure!(self.docker.try_wait()?.is_none(), "dockerd has ended");
            Ok(self.docker(&["info"])?.code == 0)
        })
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

fn place(folder: &Path, name: &str) -> String {
    folder.join(name).display().to_string()
}

fn start_docker(setup: &Setup<'_>, folder: &Path) -> Result<Child> {
    let place = |name: &str| place(folder, name);
    // In the host's namespace it would remove the host's bridge.
    let mut command = Command::new(if setup.namespace.is_some() { "nsenter" } else { "unshare" });
    command.arg(setup.namespace.map_or("--net".into(), |path| format!("--net={path}")));
    command.arg(if setup.older { format!("{OLDER}/sbin/dockerd") } else { "dockerd".into() });
    command.args(["--data-root", &place("data"), "--exec-root", &place("exec")]);
    command.args(["--pidfile", &place("pid"), "--host", &format!("unix://{}", place("sock"))]);
    // What it shares with the host's is kept apart by name.
    command.args(["--containerd-namespace", "e2e", "--containerd-plugins-namespace", "e2e-plugins"]);
    if setup.older {
        command.args(["--containerd", &place("containerd.sock")]).env("PATH", older_path());
    }
    if !setup.bridge {
        command.args(["--bridge", "none", "--iptables=false", "--ip6tables=false"]);
    }
    std::fs::write(folder.join("daemon.json"), "{}")?;
    command.args(["--config-file", &place("daemon.json"), "--add-runtime", "rvm=/usr/local/bin/rvm"]);
    command.args(setup.options).envs(setup.environment.iter().copied());
    spawn(command, folder, "log").context("dockerd cannot be started")
}

fn start_older_containerd(folder: &Path) -> Result<Child> {
    let (config, socket) = (folder.join("containerd.toml"), folder.join("containerd.sock"));
    let [data, state] = ["containerd-data", "containerd-state"].map(|name| place(folder, name));
    let text = format!(
        "version = 2\nroot = {data:?}\nstate = {state:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
         [grpc]\naddress = {socket:?}\n"
    );
    std::fs::write(&config, text)?;
    let mut command = Command::new(format!("{OLDER}/bin/containerd"));
    command.arg("--config").arg(&config).env("PATH", older_path());
    let child = spawn(command, folder, "containerd.log").context("containerd cannot be started")?;
    eventually("containerd listens", || Ok(socket.exists()))?;
    Ok(child)
}

/// Its own runc and shim come first.
fn older_path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{OLDER}/bin:{OLDER}/sbin:{path}")
}

fn spawn(mut command: Command, folder: &Path, log: &str) -> Result<Child> {
    let log = std::fs::File::create(folder.join(log))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    Ok(command.spawn()?)
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let address = self.address();
        let _ = shell(&format!("docker -H {address} ps -aq | xargs -r docker -H {address} rm -f -v"));
        let containerd = self.containerd.iter_mut().map(|child| (child, "containerd"));
        for (child, name) in [(&mut self.docker, "dockerd")].into_iter().chain(containerd) {
            let _ = shell(&format!("kill {}", child.id()));
            let _ = wait_for(child, name);
        }
        // BuildKit's parent of cgroups stays with any runtime.
        let _ = std::fs::remove_dir("/sys/fs/cgroup/docker/buildkit");
        // Its mounts are its own to remove; a failed one leaves them.
        let folder = place(self.folder.path(), "");
        let _ = shell(&format!(
            "awk '$2 ~ \"^{folder}\" {{print $2}}' /proc/mounts | sort -r | xargs -r umount -l"
        ));
    }
}
