//! Habits of Docker's users: the same commands under rvm and under runc, and the same must come out.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::Story;
use crate::command::{Outcome, docker, eventually, shell};
use crate::terminal::Terminal;

pub const STORIES: &[(&str, Story)] = &[
    ("what_a_container_sees", what_a_container_sees),
    ("what_a_privileged_container_sees", what_a_privileged_container_sees),
    ("what_a_privileged_container_does", what_a_privileged_container_does),
    ("what_an_unprivileged_user_sees", what_an_unprivileged_user_sees),
    ("what_a_restricted_container_sees", what_a_restricted_container_sees),
    ("what_a_limited_container_sees", what_a_limited_container_sees),
    ("memory_is_what_was_asked_for", memory_is_what_was_asked_for),
    ("what_an_exec_sees", what_an_exec_sees),
    ("an_init_process", an_init_process),
    ("restarts_after_failures", restarts_after_failures),
    ("health_checks", health_checks),
    ("a_stop_signal_of_its_own", a_stop_signal_of_its_own),
    ("limits_change_while_it_runs", limits_change_while_it_runs),
    ("a_terminal_is_left_and_entered_again", a_terminal_is_left_and_entered_again),
    ("changes_of_the_root_are_told_and_kept", changes_of_the_root_are_told_and_kept),
    ("events_come_in_the_same_order", events_come_in_the_same_order),
    ("logs_go_where_the_driver_says", logs_go_where_the_driver_says),
    ("seccomp_profiles_of_ones_own", seccomp_profiles_of_ones_own),
    ("volumes_of_every_kind", volumes_of_every_kind),
];

/// Docker with one of the runtimes.
pub struct Docker {
    pub runtime: &'static str,
}

impl Docker {
    /// Runs a container to its end.
    pub fn run(&self, arguments: &[&str]) -> Result<Outcome> {
        docker(&[&["run", "--rm", "--runtime", self.runtime], arguments].concat())
    }

    /// Starts a container in the background and returns its ID.
    pub fn start(&self, arguments: &[&str]) -> Result<String> {
        let words = [&["run", "-d", "--runtime", self.runtime], arguments].concat();
        Ok(docker(&words)?.expect_code(0)?.text())
    }
}

/// Fails unless a habit shows the same under both runtimes.
pub fn same(habit: impl Fn(&Docker) -> Result<String>) -> Result<()> {
    let shown = |runtime| habit(&Docker { runtime }).with_context(|| format!("under {runtime}"));
    let (theirs, ours) = (shown("runc")?, shown("rvm")?);
    let differences: Vec<_> = differences(&theirs, &ours);
    ensure!(differences.is_empty(), "it differs (- runc, + rvm):\n{}", differences.join("\n"));
    Ok(())
}

/// Lines that only one of the two has.
fn differences(theirs: &str, ours: &str) -> Vec<String> {
    let only = |sign: char, one: &str, other: &str| -> Vec<String> {
        let missing = one.lines().filter(|line| !other.lines().any(|of_other| of_other == *line));
        missing.map(|line| format!("{sign} {line}")).collect()
    };
    [only('-', theirs, ours), only('+', ours, theirs)].concat()
}

/// Both streams and the exit code, as one text.
pub fn told(outcome: &Outcome) -> String {
    format!("{}\n{}exit code {}", outcome.text(), outcome.error_text(), outcome.code)
}

/// Prints what a process can find out about itself and its surroundings. What must differ is left out: how much memory
/// and how many processors the machine has, what is mounted at `/`, and files of /proc that only the host's kernel has,
/// with what masks them.
const SURROUNDINGS: &str = r#"
    id; umask; pwd; env | grep -v ^HOSTNAME= | sort
    grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs|Seccomp|SigIgn|SigBlk):' /proc/self/status
    cat /proc/self/oom_score_adj
    cat /proc/self/limits
    ls -l /dev | grep -- '->' | sed 's/.* \([^ ]* -> .*\)/\1/' | grep -v kcore
    stat -c '%n %F %a %u %g' / /dev /dev/shm /dev/pts /proc /sys /etc/hosts /etc/resolv.conf /etc/hostname
    awk '$3 ~ /^(proc|tmpfs|sysfs|devpts|mqueue|cgroup2)$/ {print $2, $3, $4}' /proc/mounts |
        sed 's/,inode64//; s/,size=[0-9]*k,nr_inodes=[0-9]*//; s/,nsdelegate//; s/,memory_recursiveprot//' |
        grep -vE '^/proc/[a-z_-]+ |^/sys/firmware ' | sort
    cat /proc/sys/kernel/domainname /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range
    for f in /proc/keys /proc/timer_list /proc/sys/kernel/panic /sys/kernel/uevent_helper /sys/fs/cgroup/cgroup.procs; do
        (echo x >$f) 2>/dev/null && echo "$f can be written"
        head -c 1 $f 2>/dev/null | wc -c
    done
"#;

/// Devices, and what is said of the machine.
const MACHINE: &str = "ls -ln /dev | awk '/^[bc]/ {print $1, $3, $4, $5, $6, $10}'; ls /sys/firmware | wc -l";

fn surroundings(docker: &Docker, options: &[&str]) -> Result<String> {
    let container = ["busybox", "sh", "-c", SURROUNDINGS];
    Ok(told(&docker.run(&[options, &container].concat())?))
}

fn what_a_container_sees() -> Result<()> {
    same(|docker| surroundings(docker, &["--hostname", "kitchen"]))?;
    same(|docker| Ok(told(&docker.run(&["busybox", "sh", "-c", MACHINE])?)))
}

/// Its devices are those of another machine.
fn what_a_privileged_container_sees() -> Result<()> {
    same(|docker| surroundings(docker, &["--hostname", "kitchen", "--privileged"]))
}

/// What a privileged container may do with its kernel, which under rvm is the guest's.
fn what_a_privileged_container_does() -> Result<()> {
    const STEPS: &str = "mkdir /t && mount -t tmpfs none /t && touch /t/x && ls /t && umount /t && ls /t; \
                         dd if=/dev/zero of=/image bs=1M count=4 2>/dev/null; ls -l /dev/loop-control | cut -c 1; \
                         mknod /node b 7 7 && losetup /node /image && losetup /node && losetup -d /node; \
                         hostname other && hostname; ip link add d0 type veth peer name d1 && ip link | grep -c ' d[01]@'; \
                         echo 5 >/proc/sys/vm/swappiness && cat /proc/sys/vm/swappiness; \
                         mount -o remount,ro / && touch /y; echo $?";
    let before = shell("cat /proc/sys/vm/swappiness")?.text();
    let outcome = same(|docker| Ok(told(&docker.run(&["--privileged", "busybox", "sh", "-c", STEPS])?)));
    // Under runc the kernel is the host's.
    shell(&format!("echo {before} >/proc/sys/vm/swappiness"))?.expect_code(0)?;
    outcome
}

fn what_an_unprivileged_user_sees() -> Result<()> {
    let user = ["-u", "1000:1001", "--group-add", "2000", "-w", "/tmp", "-e", "A=b"];
    same(|docker| surroundings(docker, &user))
}

fn what_a_restricted_container_sees() -> Result<()> {
    same(|docker| {
        let locked = ["--read-only", "--cap-drop", "ALL", "--cap-add", "NET_BIND_SERVICE"];
        let more = ["--security-opt", "no-new-privileges", "--tmpfs", "/run:size=1m,mode=750"];
        surroundings(docker, &[&locked[..], &more[..]].concat())
    })
}

fn what_a_limited_container_sees() -> Result<()> {
    // Not cpu.weight: runc has changed how it follows from the shares.
    const LIMITS: &str = "cd /sys/fs/cgroup; grep . memory.max memory.swap.max memory.low cpu.max pids.max; \
                          nproc; ulimit -n; ulimit -c; df -k /dev/shm | awk 'NR==2 {print $2}'; \
                          cat /proc/sys/net/core/somaxconn /proc/sys/kernel/msgmax; cat /proc/self/oom_score_adj";
    let memory = ["--memory", "200m", "--memory-swap", "300m", "--memory-reservation", "100m"];
    let others = ["--cpus", "0.5", "--cpu-shares", "512", "--cpuset-cpus", "0", "--pids-limit", "77"];
    let more =
        ["--ulimit", "nofile=123:456", "--ulimit", "core=0", "--shm-size", "3m", "--oom-score-adj", "77"];
    let parameters = ["--sysctl", "net.core.somaxconn=99", "--sysctl", "kernel.msgmax=1000"];
    let options = [&memory[..], &others[..], &more[..], &parameters[..]].concat();
    same(|docker| Ok(told(&docker.run(&[&options[..], &["busybox", "sh", "-c", LIMITS]].concat())?)))
}

/// dd touches all of its buffer.
fn memory_is_what_was_asked_for() -> Result<()> {
    same(|docker| {
        let uses = |size: &str| {
            let dd = ["dd", "if=/dev/zero", "of=/dev/null", "count=1", size];
            let outcome = docker.run(&[&["-m", "512m", "busybox"][..], &dd[..]].concat())?;
            Ok::<_, anyhow::Error>(outcome.code)
        };
        Ok(format!("500 MiB: {}\n520 MiB: {}", uses("bs=500M")?, uses("bs=520M")?))
    })
}

fn what_an_exec_sees() -> Result<()> {
    same(|runtime| {
        let id = runtime.start(&[
            "--hostname",
            "kitchen",
            "-e",
            "A=b",
            "-w",
            "/tmp",
            "busybox",
            "sleep",
            "1000",
        ])?;
        let mut all = String::new();
        for options in [&[][..], &["-u", "1000:1001", "-w", "/usr", "-e", "C=d"], &["--privileged"], &["-i"]]
        {
            let words = [&["exec"], options, &[&id, "sh", "-c", SURROUNDINGS]].concat();
            all += &told(&docker(&words)?);
            all += &told(&docker(&[&["exec"], options, &[&id, "sh", "-c", "kill -TERM $$"]].concat())?);
        }
        docker(&["rm", "-f", &id])?.expect_code(0)?;
        Ok(all)
    })
}

fn an_init_process() -> Result<()> {
    same(|docker| {
        let processes = "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline | cut -c 1-30; done";
        Ok(told(&docker.run(&["--init", "busybox", "sh", "-c", &format!("{processes}; exit 5")])?))
    })
}

fn restarts_after_failures() -> Result<()> {
    same(|runtime| {
        let id =
            runtime.start(&["--restart", "on-failure:2", "busybox", "sh", "-c", "echo again; exit 4"])?;
        let state = || Ok(docker(&["inspect", "-f", "{{.RestartCount}} {{.State.Status}}", &id])?.text());
        eventually("it is given up", || Ok(state()? == "2 exited")).with_context(state_error(state))?;
        let end = docker(&["inspect", "-f", "{{.State.ExitCode}}", &id])?.text();
        let log = docker(&["logs", &id])?.text();
        docker(&["rm", &id])?.expect_code(0)?;
        Ok(format!("{end}\n{log}"))
    })
}

/// For the case that a state is never reached: which one was.
fn state_error(state: impl Fn() -> Result<String>) -> impl FnOnce() -> String {
    move || format!("the state: {}", state().unwrap_or_else(|error| error.to_string()))
}

fn health_checks() -> Result<()> {
    same(|runtime| {
        let check = ["--health-cmd", "test -e /well", "--health-interval", "1s", "--health-retries", "2"];
        let id = runtime.start(&[&check[..], &["busybox", "sleep", "1000"]].concat())?;
        let health = || Ok(docker(&["inspect", "-f", "{{.State.Health.Status}}", &id])?.text());
        eventually("it is unhealthy", || Ok(health()? == "unhealthy")).with_context(state_error(health))?;
        docker(&["exec", &id, "touch", "/well"])?.expect_code(0)?;
        eventually("it is healthy", || Ok(health()? == "healthy")).with_context(state_error(health))?;
        let last = "{{range .State.Health.Log}}{{.ExitCode}} {{end}}";
        let codes = docker(&["inspect", "-f", last, &id])?.text();
        docker(&["rm", "-f", &id])?.expect_code(0)?;
        Ok(codes.split(' ').next_back().unwrap_or_default().to_owned())
    })
}

fn a_stop_signal_of_its_own() -> Result<()> {
    same(|runtime| {
        let script = "trap 'echo user signal; exit 9' USR1; echo up; while :; do sleep 0.1; done";
        let id = runtime.start(&["--stop-signal", "USR1", "busybox", "sh", "-c", script])?;
        eventually("it is up", || Ok(docker(&["logs", &id])?.text() == "up"))?;
        docker(&["stop", "-t", "60", &id])?.expect_code(0)?;
        let shown = told(&docker(&["logs", &id])?) + &docker(&["wait", &id])?.text();
        docker(&["rm", &id])?.expect_code(0)?;
        Ok(shown)
    })
}

fn limits_change_while_it_runs() -> Result<()> {
    same(|runtime| {
        let id = runtime.start(&[
            "-m",
            "200m",
            "--cpus",
            "1",
            "--pids-limit",
            "50",
            "busybox",
            "sleep",
            "1000",
        ])?;
        let limits = ["-m", "100m", "--memory-swap", "100m", "--cpus", "0.25", "--pids-limit", "33"];
        docker(&[&["update"], &limits[..], &[&id]].concat())?.expect_code(0)?;
        let line = "cd /sys/fs/cgroup; cat memory.max memory.swap.max cpu.max pids.max";
        let inside = docker(&["exec", &id, "sh", "-c", line])?.text();
        let known = "{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.HostConfig.PidsLimit}}";
        let outside = docker(&["inspect", "-f", known, &id])?.text();
        docker(&["rm", "-f", &id])?.expect_code(0)?;
        Ok(format!("{inside}\n{outside}"))
    })
}

fn a_terminal_is_left_and_entered_again() -> Result<()> {
    same(|runtime| {
        let id =
            docker(&["create", "-it", "--runtime", runtime.runtime, "busybox", "sh"])?.expect_code(0)?.text();
        let mut first = Terminal::start(Command::new("docker").args(["start", "-ai", &id]), 25, 80)?;
        first.wait_for("#")?;
        // Not the echo of what is typed: the shell may draw its line anew in the middle of it.
        first.type_text("A=kept; echo set-to-$A\n")?;
        first.wait_for("set-to-kept")?;
        first.type_text("\u{10}\u{11}")?;
        let left = first.finish()?;
        docker(&["inspect", "-f", "{{.State.Status}}", &id])?.expect_text("running")?;
        let mut second = Terminal::start(Command::new("docker").args(["attach", &id]), 25, 80)?;
        second.type_text("echo it-was-$A; exit 8\n")?;
        second.wait_for("it-was-kept")?;
        let ended = second.finish()?;
        docker(&["rm", &id])?.expect_code(0)?;
        Ok(format!("{left} {ended}"))
    })
}

fn changes_of_the_root_are_told_and_kept() -> Result<()> {
    same(|runtime| {
        let name = format!("e2e-{}", runtime.runtime);
        let script = "echo new >/new; mkdir -p /folder/in; rm /bin/vi; chmod 600 /etc/passwd; ln -s new /link; \
                      ln /new /folder/hard; chown 5:6 /folder; mkfifo /pipe; echo gone >/x; rm /x";
        let made =
            docker(&["run", "--name", &name, "--runtime", runtime.runtime, "busybox", "sh", "-c", script])?;
        let mut told = told(&made);
        let differences = docker(&["diff", &name])?.expect_code(0)?.text();
        let mut lines: Vec<_> = differences.lines().collect();
        lines.sort_unstable();
        told += &lines.join("\n");
        docker(&["commit", &name, &name])?.expect_code(0)?;
        docker(&["cp", &format!("{name}:/folder"), &format!("/tmp/{name}")])?.expect_code(0)?;
        told +=
            &shell(&format!("cd /tmp/{name} && find . -printf '%p %y %m %s\\n' | sort; rm -r /tmp/{name}"))?
                .text();
        // Not `docker export`, which leaves a mount behind with any runtime.
        let archive = format!(
            "docker cp {name}:/ - | tar -tv | grep -E 'new|folder|link|pipe|passwd' | sed 's/20..-.*:.. //'"
        );
        told += &shell(&archive)?.expect_code(0)?.text();
        docker(&["rm", &name])?.expect_code(0)?;
        let line = "cat /new /link /folder/hard; ls /bin/vi /x; stat -c '%a %u %g %h %F' /folder /etc/passwd /new /pipe";
        told += &self::told(&runtime.run(&[&name, "sh", "-c", line])?);
        docker(&["rmi", &name])?.expect_code(0)?;
        Ok(told)
    })
}

fn events_come_in_the_same_order() -> Result<()> {
    same(|runtime| {
        let since = shell("date +%s.%N")?.text();
        let id = runtime.start(&["busybox", "sleep", "1000"])?;
        docker(&["exec", &id, "true"])?.expect_code(0)?;
        docker(&["pause", &id])?.expect_code(0)?;
        docker(&["unpause", &id])?.expect_code(0)?;
        docker(&["kill", &id])?.expect_code(0)?;
        docker(&["wait", &id])?.expect_text("137")?;
        docker(&["start", &id])?.expect_code(0)?;
        docker(&["rm", "-f", &id])?.expect_code(0)?;
        let until = shell("date +%s.%N")?.text();
        let line = "{{.Action}} {{.Actor.Attributes.exitCode}} {{.Actor.Attributes.signal}}";
        let window = ["--since", &since, "--until", &until, "--filter", &format!("container={id}")];
        Ok(docker(&[&["events", "--format", line], &window[..]].concat())?.expect_code(0)?.text())
    })
}

fn logs_go_where_the_driver_says() -> Result<()> {
    same(|runtime| {
        let mut told = String::new();
        for driver in ["json-file", "local", "none"] {
            let script = "echo out; echo err >&2; printf 'no newline'; head -c 40000 /dev/zero | tr '\\0' x";
            let id = runtime.start(&["--log-driver", driver, "busybox", "sh", "-c", script])?;
            docker(&["wait", &id])?.expect_text("0")?;
            told += &self::told(&docker(&["logs", &id])?);
            docker(&["rm", &id])?.expect_code(0)?;
        }
        Ok(told)
    })
}

fn seccomp_profiles_of_ones_own() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let profile = |name: &str, rule: &str| -> Result<String> {
        let path = folder.path().join(name);
        let text = format!(r#"{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{rule}]}}"#);
        std::fs::write(&path, text)?;
        Ok(format!("seccomp={}", path.display()))
    };
    let profiles = [
        profile("errno", r#"{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}"#)?,
        profile("log", r#"{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_LOG"}"#)?,
        profile("kill", r#"{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL_PROCESS"}"#)?,
        // chmod to 0700 only.
        profile(
            "argument",
            r#"{"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 1, "value": 448, "op": "SCMP_CMP_EQ"}]},
               {"names": ["fchmodat"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 2, "value": 448, "op": "SCMP_CMP_EQ"}]}"#,
        )?,
        "seccomp=unconfined".to_owned(),
    ];
    same(|docker| {
        let mut told = String::new();
        for profile in &profiles {
            let script = "mkdir /made; echo $?; touch /file; chmod 600 /file; echo $?; chmod 700 /file; echo $?; \
                          grep ^Seccomp: /proc/self/status";
            told += &self::told(&docker.run(&["--security-opt", profile, "busybox", "sh", "-c", script])?);
        }
        Ok(told)
    })
}

fn volumes_of_every_kind() -> Result<()> {
    same(|runtime| {
        let folder = tempfile::tempdir()?;
        let host = folder.path().display().to_string();
        shell(&format!(
            "cd {host} && mkdir -p outer/inner ro && echo deep >outer/inner/file && echo r >ro/file"
        ))?
        .expect_code(0)?;
        let volume = format!("e2e-{}", runtime.runtime);
        let mounts = [
            format!("type=bind,src={host}/outer,dst=/outer"),
            format!("type=bind,src={host}/ro,dst=/outer/inner,readonly"),
            format!("type=volume,src={volume},dst=/named"),
            "type=tmpfs,dst=/scratch,tmpfs-size=1m,tmpfs-mode=1770".to_owned(),
            format!("type=volume,src={volume},dst=/read-only,readonly"),
        ];
        let script = "cat /outer/inner/file; echo x >/outer/inner/new; echo y >/outer/y; echo z >/named/z; \
                      cat /read-only/z; echo q >/read-only/q; stat -c '%a %u %g' /scratch /named /outer; \
                      head -c 2m /dev/zero >/scratch/big; stat -c %s /scratch/big; mkfifo /named/pipe; \
                      ln -s /outer/y /named/link; ln /named/z /named/hard; stat -c '%h %F' /named/*; \
                      dd if=/dev/zero of=/named/sparse bs=1 seek=10M count=1 2>/dev/null; \
                      stat -c '%s %b' /named/sparse; touch -d @1000000000 /named/z; stat -c %Y /named/hard; \
                      mv /named/z /outer/z; cat /outer/z";
        let mut words: Vec<&str> = mounts.iter().flat_map(|mount| ["--mount", mount.as_str()]).collect();
        words.extend(["busybox", "sh", "-c", script]);
        let mut told = told(&runtime.run(&words)?);
        let list = format!("cd {host} && find . -type f -printf '%p %m %U %G %s\\n' | sort");
        told += &shell(&list)?.expect_code(0)?.text();
        let again = ["-v", &format!("{volume}:/named"), "busybox", "ls", "-ln", "/named"];
        let seen = runtime.run(&again)?.expect_code(0)?.text();
        told += &seen
            .lines()
            .map(|line| line.split_whitespace().take(5).collect::<Vec<_>>().join(" ") + "\n")
            .collect::<String>();
        docker(&["volume", "rm", &volume])?.expect_code(0)?;
        Ok(told)
    })
}
