//! `process` and what else is the container's as a whole: its limits, its filter, its users, its control group.

use std::fmt::Write;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{RUNTIMES, both_print, create, state};
use crate::Story;
use crate::bundle::{Bundle, add_mounts, add_namespace, mount};
use crate::command::{run, rvm, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("a_process_is_what_its_description_says", a_process_is_what_its_description_says),
    ("what_runc_does_not_know_of_is_done_all_the_same", what_runc_does_not_know_of_is_done_all_the_same),
    ("system_calls_are_filtered_by_their_arguments", system_calls_are_filtered_by_their_arguments),
    ("ids_are_mapped", ids_are_mapped),
    ("a_control_group_has_its_path_and_limits", a_control_group_has_its_path_and_limits),
];

/// Every limit: its name in the description, and in /proc/self/limits.
const LIMITS: [(&str, &str); 16] = [
    ("CPU", "cpu time"),
    ("FSIZE", "file size"),
    ("DATA", "data size"),
    ("STACK", "stack size"),
    ("CORE", "core file size"),
    ("RSS", "resident set"),
    ("NPROC", "processes"),
    ("NOFILE", "open files"),
    ("MEMLOCK", "locked memory"),
    ("AS", "address space"),
    ("LOCKS", "file locks"),
    ("SIGPENDING", "pending signals"),
    ("MSGQUEUE", "msgqueue size"),
    ("NICE", "nice priority"),
    ("RTPRIO", "realtime priority"),
    ("RTTIME", "realtime timeout"),
];

/// The soft and the hard value of the limit at this place in the list: never twice the same, and enough to run with.
fn values(index: usize) -> (u64, u64) {
    match LIMITS[index].0 {
        "NICE" | "RTPRIO" => (3, 7),
        "NPROC" | "NOFILE" | "LOCKS" | "SIGPENDING" => (1000 + index as u64, 2000 + index as u64),
        _ => ((1 << 33) + index as u64, (1 << 34) + index as u64),
    }
}

fn a_process_is_what_its_description_says() -> Result<()> {
    let script = "echo \"$#:$1:$2\"; id; umask; pwd; echo \"$GREETING:$EMPTY:${HOME-no home}\"; env | wc -l; \
                  grep -E '^(Cap...|NoNewPrivs):' /proc/self/status; cat /proc/self/oom_score_adj; hostname; \
                  tail -n +2 /proc/self/limits | cut -c 5-67 | tr -s ' ' | sed 's/ $//'";
    let limits = LIMITS.iter().enumerate().map(|(index, (name, _))| {
        let (soft, hard) = values(index);
        json!({ "type": format!("RLIMIT_{name}"), "soft": soft, "hard": hard })
    });
    let limits: Value = limits.collect();
    let bundle = Bundle::new(&["sh", "-c", script, "name", "two words", ""])?.edit(|config| {
        // A description of a later version has fields that nobody knows, and can be used all the same.
        for pointer in ["", "/process", "/root", "/linux", "/linux/resources", "/mounts/0"] {
            if let Some(place) = config.pointer_mut(pointer) {
                place["fromTheFuture"] = json!({ "some": ["thing"] });
            }
        }
        config["annotations"] = json!({ "com.example.nobody-knows": "it" });
        config["hostname"] = json!("kitchen");
        let process = &mut config["process"];
        process["cwd"] = json!("/made/for/it");
        process["env"] = json!(["PATH=/bin", "GREETING=good day", "EMPTY="]);
        process["user"] = json!({ "uid": 1000, "gid": 1001, "umask": 0o27, "additionalGids": [5, 2000] });
        process["capabilities"] = json!({
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"], "permitted": ["CAP_CHOWN", "CAP_KILL"],
            "inheritable": ["CAP_KILL"], "effective": ["CAP_CHOWN", "CAP_KILL"], "ambient": ["CAP_KILL"],
        });
        process["noNewPrivileges"] = json!(true);
        process["oomScoreAdj"] = json!(321);
        process["rlimits"] = limits;
    })?;
    let mut expected =
        "2:two words:\nuid=1000 gid=1001 groups=5(tty),2000\n0027\n/made/for/it\ngood day::/\n6\n\
                        CapInh:\t0000000000000020\nCapPrm:\t0000000000000020\nCapEff:\t0000000000000020\n\
                        CapBnd:\t0000000000002021\nCapAmb:\t0000000000000020\nNoNewPrivs:\t1\n321\nkitchen"
            .to_owned();
    for (index, (_, name)) in LIMITS.iter().enumerate() {
        let (soft, hard) = values(index);
        write!(expected, "\n{name} {soft} {hard}")?;
    }
    both_print(&bundle, &expected)
}

/// runc 1.1 knows nothing of these, and leaves the root without propagation.
fn what_runc_does_not_know_of_is_done_all_the_same() -> Result<()> {
    let script = "cut -d ' ' -f 19,41 /proc/self/stat; ionice; uname -m; cat /proc/sys/kernel/domainname; \
                  awk '$5 == \"/\" {print $7}' /proc/self/mountinfo; tr -s ' ' </proc/self/timens_offsets";
    let bundle = Bundle::new(&["sh", "-c", script])?.edit(|config| {
        config["domainname"] = json!("house.test");
        config["linux"]["rootfsPropagation"] = json!("unbindable");
        add_namespace(config, "time");
        config["linux"]["timeOffsets"] =
            json!({ "boottime": { "secs": 1_000_000 }, "monotonic": { "secs": 7, "nanosecs": 5 } });
        config["linux"]["personality"] = json!({ "domain": "LINUX32" });
        config["process"]["scheduler"] = json!({ "policy": "SCHED_BATCH", "nice": 5 });
        config["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_BE", "priority": 6 });
    })?;
    rvm(&["run", "--bundle", bundle.path(), "story"])?.expect_text(
        "5 3\nbest-effort: prio 6\ni686\nhouse.test\nunbindable\nmonotonic 7 5\nboottime 1000000 0",
    )
}

/// What is not described is not there: the process has no capability.
fn system_calls_are_filtered_by_their_arguments() -> Result<()> {
    let script = "mkdir /tmp/x 2>&1; kill -0 $$ && echo allowed; kill -10 $$ 2>&1; sh -c 'chroot / true'; echo $?; \
                  grep -E '^(Cap...|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\n'";
    let bundle = Bundle::new(&["sh", "-c", script])?.edit(|config| {
        config["process"]["capabilities"] = json!({});
        config["process"]["noNewPrivileges"] = Value::Null;
        let errno =
            |names: Value, code: u32| json!({ "names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": code });
        let mut kill = errno(json!(["kill"]), 38);
        kill["args"] = json!([{ "index": 1, "value": 10, "op": "SCMP_CMP_EQ" }]);
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [
                errno(json!(["mkdir", "mkdirat", "no_such_call"]), 28),
                kill,
                { "names": ["chroot"], "action": "SCMP_ACT_KILL_PROCESS" },
            ],
        });
    })?;
    let sets: String =
        ["Inh", "Prm", "Eff", "Bnd", "Amb"].iter().map(|set| format!("Cap{set}:\t{:016}", 0)).collect();
    let expected = "mkdir: can't create directory '/tmp/x': No space left on device\nallowed\n\
                    sh: can't kill pid 1: Function not implemented\n159";
    both_print(&bundle, &format!("{expected}\n{sets}NoNewPrivs:\t0Seccomp:\t2"))
}

fn ids_are_mapped() -> Result<()> {
    let script = "id -u; id -g; cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '; touch /data/own /own; \
                  touch /data/others && chown 5:6 /data/others; stat -c '%u %g' / /data /data/own /data/others; \
                  cat /proc/sys/kernel/ns_last_pid >/dev/null && hostname other 2>/dev/null; hostname; \
                  chown 70000 /own 2>/dev/null || echo not mapped";
    let bundle = Bundle::new(&["sh", "-c", script])?;
    let volume = format!("{}/volume", bundle.path());
    shell(&format!("chmod 755 {0} && chown -R 100000:200000 {0}/rootfs && mkdir {volume} && chown 100000:200000 {volume}", bundle.path()))?
        .expect_code(0)?;
    let bundle = bundle.edit(|config| {
        config["hostname"] = json!("kitchen");
        for set in ["bounding", "permitted", "effective"] {
            config["process"]["capabilities"][set] = json!(["CAP_CHOWN"]);
        }
        add_namespace(config, "user");
        config["linux"]["uidMappings"] = json!([{ "containerID": 0, "hostID": 100_000, "size": 1000 }]);
        config["linux"]["gidMappings"] = json!([{ "containerID": 0, "hostID": 200_000, "size": 2000 }]);
        add_mounts(config, [mount("/data", "bind", &volume, &["bind"])]);
    })?;
    for runtime in RUNTIMES {
        let expected = "0\n0\n 0 100000 1000\n 0 200000 2000\n0 0\n0 0\n0 0\n5 6\nkitchen\nnot mapped";
        run(runtime, &["run", "--bundle", bundle.path(), "story"])?.expect_text(expected)?;
        shell(&format!("cd {volume} && stat -c '%u %g' own others && rm own others"))?
            .expect_text("100000 200000\n100005 200006")?;
    }
    Ok(())
}

fn a_control_group_has_its_path_and_limits() -> Result<()> {
    let script = "cd /sys/fs/cgroup && cat memory.max memory.high memory.low pids.max cpu.max cpu.weight; \
                  cat /proc/self/cgroup";
    let bundle = Bundle::new(&["sleep", "1000"])?.edit(|config| {
        config["linux"]["cgroupsPath"] = json!("/e2e-story/inner");
        config["linux"]["resources"] = json!({
            "memory": { "limit": 256 << 20, "reservation": 64 << 20 },
            "pids": { "limit": 55 },
            "cpu": { "shares": 1024, "quota": 50_000, "period": 100_000, "cpus": "0" },
            "unified": { "memory.high": "209715200", "cpu.weight": "77" },
        });
    })?;
    let mut shown = Vec::new();
    for runtime in RUNTIMES {
        create(runtime, &bundle)?.expect_code(0)?;
        let pid = state(runtime)?["pid"].to_string();
        shell(&format!("grep -x {pid} /sys/fs/cgroup/e2e-story/inner/cgroup.procs"))?.expect_text(&pid)?;
        // These are processors of the host.
        shell("cat /sys/fs/cgroup/e2e-story/inner/cpuset.cpus")?.expect_text("0")?;
        run(runtime, &["start", "story"])?.expect_code(0)?;
        shown.push(run(runtime, &["exec", "story", "sh", "-c", script])?.expect_code(0)?.text());
        run(runtime, &["delete", "--force", "story"])?.expect_code(0)?;
        shell("ls -d /sys/fs/cgroup/e2e-story/inner")?.expect_failure(&[])?;
        // A folder above, which the description names only as part of the path, may stay.
        shell("rmdir /sys/fs/cgroup/e2e-story 2>/dev/null; ls -d /sys/fs/cgroup/e2e-story")?
            .expect_failure(&[])?;
    }
    ensure!(shown[0] == shown[1], "under runc:\n{}\nunder rvm:\n{}", shown[0], shown[1]);
    ensure!(shown[1].starts_with("268435456\n209715200\n67108864\n55\n50000 100000\n77\n"), "{}", shown[1]);
    Ok(())
}
