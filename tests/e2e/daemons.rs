//! Docker daemons that are set up in other ways: rvm for everything, builds included; users that are mapped; BuildKit; and
//! the older release, whose network comes by a hook.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::Story;
use crate::command::{ensure_guest_kernel, shell};
use crate::daemon::{Builder, Daemon, Setup};

pub const STORIES: &[(&str, Story)] = &[
    ("a_dockerfile_builds_in_microvms", a_dockerfile_builds_in_microvms),
    ("mapped_users_are_mapped_in_the_guest", mapped_users_are_mapped_in_the_guest),
    ("buildkit_builds_in_microvms", buildkit_builds_in_microvms),
    ("the_older_docker_runs_it", the_older_docker_runs_it),
    ("the_older_docker_builds_with_it", the_older_docker_builds_with_it),
];

fn a_dockerfile_builds_in_microvms() -> Result<()> {
    let daemon = Daemon::start(&Setup { options: &["--default-runtime", "rvm"], ..Setup::default() })?;
    let folder = tempfile::tempdir()?;
    let dockerfile = "FROM busybox\nWORKDIR /srv\nADD page.html .\nENV GREETING=hello\n\
                      RUN uname -r > kernel && mkdir made && chown 7:8 made\nEXPOSE 80\n\
                      CMD [\"sh\", \"-c\", \"echo $GREETING; cat page.html kernel; stat -c '%u %g' made\"]\n";
    fs::write(folder.path().join("Dockerfile"), dockerfile)?;
    fs::write(folder.path().join("page.html"), "<p>page</p>\n")?;
    let path = folder.path().display().to_string();
    daemon.build(Builder::Classic, &["-t", "tutorial", &path])?.expect_code(0)?;
    let seen = daemon.docker(&["run", "--rm", "tutorial"])?.expect_code(0)?.text();
    let lines: Vec<_> = seen.lines().collect();
    let [greeting, page, kernel, owner] = lines[..] else { anyhow::bail!("the image printed {seen}") };
    ensure!((greeting, page, owner) == ("hello", "<p>page</p>", "7 8"), "the image printed {seen}");
    ensure_guest_kernel(kernel)?;
    let ports = daemon.docker(&["inspect", "-f", "{{.Config.ExposedPorts}}", "tutorial"])?;
    ports.expect_text("map[80/tcp:{}]")
}

fn mapped_users_are_mapped_in_the_guest() -> Result<()> {
    // What `adduser` would do for Docker's default user of mappings.
    let user = "grep -q ^dockremap: /etc/passwd || echo dockremap:x:990:990::/:/bin/false >>/etc/passwd; \
                grep -q ^dockremap: /etc/group || echo dockremap:x:990: >>/etc/group; \
                for f in /etc/subuid /etc/subgid; do \
                grep -q ^dockremap: $f 2>/dev/null || echo dockremap:200000:65536 >>$f; done";
    shell(user)?.expect_code(0)?;
    let daemon = Daemon::start(&Setup { options: &["--userns-remap", "default"], ..Setup::default() })?;
    let folder = tempfile::tempdir()?;
    shell(&format!("chmod 777 {}", folder.path().display()))?.expect_code(0)?;
    let volume = format!("{}:/x", folder.path().display());
    let script = "id -u; tr -s ' ' </proc/self/uid_map; stat -c '%u %g' / /etc/passwd /x; echo made >/x/made; \
                  stat -c '%u %g' /x/made; touch /in-root && chown 5:6 /in-root && stat -c '%u %g' /in-root; \
                  hostname other 2>&1; mount -t tmpfs none /mnt 2>&1; echo $?";
    let mut seen = Vec::new();
    for runtime in ["runc", "rvm"] {
        let _ = fs::remove_file(folder.path().join("made"));
        let words = ["run", "--rm", "--runtime", runtime, "--hostname", "kitchen", "-v", &volume];
        let told =
            daemon.docker(&[&words[..], &["busybox", "sh", "-c", script]].concat())?.expect_code(0)?.text();
        let owner = shell(&format!("stat -c '%u %g' {}/made", folder.path().display()))?.text();
        ensure!(owner == "200000 200000", "under {runtime} the host sees the owner {owner}");
        seen.push(told);
    }
    ensure!(seen[0] == seen[1], "under runc:\n{}\nunder rvm:\n{}", seen[0], seen[1]);
    Ok(())
}

/// BuildKit runs its steps in the foreground, with `run` instead of `create` and `start`.
fn buildkit_builds_in_microvms() -> Result<()> {
    let environment = [("DOCKER_BUILDKIT_RUNC_COMMAND", "/usr/local/bin/rvm")];
    let daemon = Daemon::start(&Setup { environment: &environment, bridge: true, ..Setup::default() })?;
    let folder = tempfile::tempdir()?;
    let dockerfile = "FROM busybox AS made\nWORKDIR /srv\nARG WORD=default\nRUN uname -r >kernel\n\
                      RUN --mount=type=cache,target=/cache echo $WORD >/cache/word && cp /cache/word .\n\
                      RUN --network=none ip link | grep -c eth0 >links || true\n\
                      RUN ip -o -4 address show eth0 | wc -l >addresses\nUSER 7:8\nRUN id -u >/tmp/user\n\
                      FROM busybox\nCOPY --from=made /srv /tmp/user /srv/\n\
                      CMD [\"sh\", \"-c\", \"cd /srv; cat kernel word links addresses user\"]\n";
    fs::write(folder.path().join("Dockerfile"), dockerfile)?;
    let path = folder.path().display().to_string();
    let build =
        |more: &[&str]| daemon.build(Builder::BuildKit, &[&["--progress", "plain"], more, &[&path]].concat());
    build(&["-t", "made", "--build-arg", "WORD=given"])?.expect_code(0)?;
    let seen = daemon.docker(&["run", "--rm", "made"])?.expect_code(0)?.text();
    let (kernel, rest) = seen.split_once('\n').unwrap_or_default();
    ensure_guest_kernel(kernel)?;
    ensure!(rest == "given\n0\n1\n7", "the image printed {seen}");

    fs::write(folder.path().join("Dockerfile"), "FROM busybox\nRUN echo said; exit 7\n")?;
    build(&["--no-cache"])?.expect_failure(&["said", "exit code: 7"])?;
    fs::write(folder.path().join("Dockerfile"), "FROM busybox\nRUN --network=host true\n")?;
    build(&["--no-cache", "--allow", "network.host"])?.expect_failure(&["share the host's network"]).map(drop)
}

fn the_older_docker_runs_it() -> Result<()> {
    let daemon = Daemon::start(&Setup { bridge: true, older: true, ..Setup::default() })?;
    daemon.docker(&["version", "-f", "{{.Server.Version}}"])?.expect_code(0).and_then(|version| {
        ensure!(version.text().starts_with("20.10"), "the older daemon is {}", version.text());
        Ok(())
    })?;
    let mut seen = Vec::new();
    for runtime in ["runc", "rvm"] {
        seen.push(older_habits(&daemon, runtime).with_context(|| format!("under {runtime}"))?);
    }
    ensure!(seen[0] == seen[1], "under runc:\n{}\nunder rvm:\n{}", seen[0], seen[1]);
    Ok(())
}

/// A container's life, and what was seen of it.
fn older_habits(daemon: &Daemon, runtime: &str) -> Result<String> {
    let docker = |words: &[&str]| daemon.docker(words);
    let script = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.1; done";
    let start = ["run", "-d", "--name", "older", "--hostname", "kitchen", "--runtime", runtime, "-m", "64m"];
    docker(&[&start[..], &["-p", "8080:80", "busybox", "sh", "-c", script]].concat())?.expect_code(0)?;
    // Its words about a program are each runtime's own.
    let mut seen = docker(&["exec", "older", "no-such-program"])?.code.to_string();
    // The network is there when the program starts, and leads to the host's end of the bridge.
    let network = "hostname; ip -o -4 address show eth0 | awk '{print $4}'; ip route | grep -c default; \
                   ping -c 1 -w 60 $(ip route | awk '/default/ {print $3}') | grep -c ' 0% packet loss'; \
                   cat /etc/resolv.conf | wc -l; grep -c kitchen /etc/hosts";
    seen += &docker(&["exec", "older", "sh", "-c", network])?.expect_code(0)?.text();
    for words in [
        &["exec", "-u", "7:8", "-w", "/tmp", "-e", "A=b", "older", "sh", "-c", "id -u; pwd; echo $A; exit 6"]
            [..],
        &["pause", "older"],
        &["unpause", "older"],
        &["update", "-m", "60m", "--memory-swap", "60m", "older"],
        &["exec", "older", "sh", "-c", "cat /sys/fs/cgroup/memory.max; echo made >/made"],
        &["diff", "older"],
        &["stop", "-t", "60", "older"],
        &["wait", "older"],
        &["logs", "older"],
        &["start", "older"],
        &["kill", "older"],
        &["wait", "older"],
        &["inspect", "-f", "{{.State.ExitCode}} {{.State.OOMKilled}} {{.State.Error}}", "older"],
        &["rm", "older"],
        &["run", "--rm", "--runtime", runtime, "busybox", "no-such-program"],
        &["run", "--rm", "--runtime", runtime, "--init", "busybox", "sh", "-c", "exit 9"],
        &["run", "--rm", "--runtime", runtime, "--network", "none", "busybox", "ip", "-o", "link"],
    ] {
        let outcome = docker(words)?;
        seen += &format!("\n{}: {} {}", words[0], outcome.code, outcome.text());
    }
    Ok(seen)
}

/// Its BuildKit knows no runtime but runc.
fn the_older_docker_builds_with_it() -> Result<()> {
    let options = ["--default-runtime", "rvm"];
    let daemon = Daemon::start(&Setup { options: &options, bridge: true, older: true, ..Setup::default() })?;
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("Dockerfile"), "FROM busybox\nRUN uname -r >/kernel\nCMD cat /kernel\n")?;
    let path = folder.path().display().to_string();
    daemon.build(Builder::Classic, &["--no-cache", "-t", "made", &path])?.expect_code(0)?;
    ensure_guest_kernel(&daemon.docker(&["run", "--rm", "made"])?.expect_code(0)?.text())
}
