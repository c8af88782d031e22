//! Hosts where cgroups belong to systemd, which is how Docker and podman come on Debian. The test host has no systemd
//! for an init, so these stories boot one in namespaces and a cgroup of its own.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::Story;
use crate::bundle::Bundle;
use crate::command::{Outcome, eventually, run, shell};

pub const STORIES: &[(&str, Story)] = &[("systemd_makes_the_cgroup", systemd_makes_the_cgroup)];

fn systemd_makes_the_cgroup() -> Result<()> {
    let bundle = Bundle::new(&["sleep", "1000"])?.edit(|config| {
        config["linux"]["cgroupsPath"] = json!("system.slice:rvm:story");
        config["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
        config["linux"]["resources"]["cpu"] = json!({"quota": 50_000, "period": 100_000});
    })?;
    let systemd = Systemd::boot()?;
    let run =
        format!("rvm --systemd-cgroup run -d --bundle {} story </dev/null >/dev/null 2>&1", bundle.path());
    systemd.shell(&run)?.expect_code(0)?;

    let shown = |property: &str| -> Result<String> {
        Ok(systemd
            .shell(&format!("systemctl show --value -p {property} rvm-story.scope"))?
            .expect_code(0)?
            .text())
    };
    ensure!(shown("ControlGroup")? == "/system.slice/rvm-story.scope", "it is in {}", shown("ControlGroup")?);
    ensure!(shown("CPUQuotaPerSecUSec")? == "500ms", "its quota is {}", shown("CPUQuotaPerSecUSec")?);
    // What systemd knows stays when it reads its configuration again.
    systemd.shell("systemctl daemon-reload")?.expect_code(0)?;
    let memory = systemd.shell("cat /sys/fs/cgroup/system.slice/rvm-story.scope/memory.max")?.text();
    ensure!(shown("MemoryMax")? == memory, "systemd says {}, the kernel {memory}", shown("MemoryMax")?);
    ensure!(memory.parse::<u64>()? > 64 << 20, "the monitor and the guest's kernel have no room in {memory}");

    systemd.shell("rvm exec story echo alive")?.expect_text("alive")?;
    systemd.shell("rvm delete --force story")?.expect_code(0)?;
    eventually("the scope is gone", || {
        let left = systemd.shell("ls -d /sys/fs/cgroup/system.slice/rvm-story.scope")?;
        Ok(left.code != 0 && shown("LoadState")? == "not-found")
    })
}

/// A systemd that ends, with all that it started, when it is dropped.
struct Systemd {
    pid: String,
}

const CGROUP: &str = "/sys/fs/cgroup/e2e-systemd";

/// In a container, systemd takes its arguments for the kernel's. What would change the host's devices and files or
/// hide the bundles is left out.
const BOOT: &str = "mount -t proc proc /proc && mount -t cgroup2 cgroup2 /sys/fs/cgroup && \
                    mount -t tmpfs -o mode=755 run /run && \
                    exec env -i container=story /usr/lib/systemd/systemd --unit=basic.target --show-status=no \
                    systemd.mask=tmp.mount systemd.mask=systemd-udevd.service systemd.mask=systemd-udev-trigger.service \
                    systemd.mask=systemd-journald.service systemd.mask=systemd-modules-load.service \
                    systemd.mask=systemd-remount-fs.service systemd.mask=systemd-sysctl.service \
                    systemd.mask=systemd-tmpfiles-setup.service \
                    systemd.mask=systemd-tmpfiles-setup-dev-early.service \
                    systemd.mask=systemd-tmpfiles-setup-dev.service systemd.mask=systemd-tmpfiles-clean.timer";

impl Systemd {
    fn boot() -> Result<Systemd> {
        fs::create_dir_all(CGROUP)?;
        let line = format!(
            "echo $$ > {CGROUP}/cgroup.procs && exec unshare --mount --pid --cgroup --fork --kill-child \
             --propagation private sh -c '{BOOT}'"
        );
        let mut boot = Command::new("sh");
        boot.args(["-c", &line]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let parent = boot.spawn().context("systemd cannot be started")?.id();
        let mut systemd = Systemd { pid: String::new() };
        eventually("systemd runs", || {
            systemd.pid = shell("pgrep -x systemd")?.text();
            Ok(!systemd.pid.is_empty())
        })?;
        // With a process beside it that it cannot move, systemd could not hand controllers down.
        fs::write("/sys/fs/cgroup/cgroup.procs", parent.to_string())?;
        eventually("systemd is up", || {
            let state = systemd.shell("systemctl is-system-running")?.text();
            Ok(state == "running" || state == "degraded")
        })?;
        Ok(systemd)
    }

    /// Runs a line of shell where systemd is the init.
    fn shell(&self, line: &str) -> Result<Outcome> {
        // A process from outside of a cgroup namespace cannot be moved by those within.
        let enter = format!(
            "mkdir -p {CGROUP}/stories && echo $$ > {CGROUP}/stories/cgroup.procs && \
             exec nsenter -t {} -m -p -C sh -c \"$0\"",
            self.pid
        );
        run("sh", &["-c", &enter, line])
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // With process 1 the kernel ends all others of the namespace.
        let _ = shell(&format!("kill -KILL {}; while pgrep -x systemd; do sleep 0.1; done", self.pid));
        let _ = shell(&format!("find {CGROUP} -depth -type d -exec rmdir {{}} ';'"));
    }
}
