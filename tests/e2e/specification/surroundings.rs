//! What a container finds around itself: all that the description may say of its process, its files and its limits, many of
//! them in one container.

use std::fmt::Write;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{RUNTIMES, add_mounts, both_print, create, mount, state};
use crate::Story;
use crate::bundle::Bundle;
use crate::command::{run, rvm, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("a_process_is_what_its_description_says", a_process_is_what_its_description_says),
    ("a_process_is_scheduled_as_its_description_says", a_process_is_scheduled_as_its_description_says),
    (
        "a_container_without_a_description_of_it_has_no_privileges",
        a_container_without_a_description_of_it_has_no_privileges,
    ),
    ("mounts_come_in_their_order", mounts_come_in_their_order),
    ("devices_are_made_as_described", devices_are_made_as_described),
    ("paths_are_masked_and_write_protected", paths_are_masked_and_write_protected),
    ("the_root_has_its_propagation", the_root_has_its_propagation),
    ("ids_are_mapped", ids_are_mapped),
    ("a_control_group_has_its_path_and_limits", a_control_group_has_its_path_and_limits),
    ("system_calls_are_filtered_by_their_arguments", system_calls_are_filtered_by_their_arguments),
    ("what_nobody_knows_is_ignored", what_nobody_knows_is_ignored),
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
        "2:two words:\nuid=1000 gid=1001 groups=5(tty),2000,1001\n0027\n/made/for/it\ngood day::/\n7\n\
                        CapInh:\t0000000000000020\nCapPrm:\t0000000000000020\nCapEff:\t0000000000000020\n\
                        CapBnd:\t0000000000002021\nCapAmb:\t0000000000000020\nNoNewPrivs:\t1\n321\nkitchen"
            .to_owned();
    for (index, (_, name)) in LIMITS.iter().enumerate() {
        let (soft, hard) = values(index);
        write!(expected, "\n{name} {soft} {hard}")?;
    }
    both_print(&bundle, &expected)
}

/// runc 1.1 knows nothing of these.
fn a_process_is_scheduled_as_its_description_says() -> Result<()> {
    let script = "cut -d ' ' -f 19,41 /proc/self/stat; ionice; uname -m; cat /proc/sys/kernel/domainname";
    let bundle = Bundle::new(&["sh", "-c", script])?.edit(|config| {
        config["domainname"] = json!("house.test");
        config["linux"]["personality"] = json!({ "domain": "LINUX32" });
        config["process"]["scheduler"] = json!({ "policy": "SCHED_BATCH", "nice": 5 });
        config["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_BE", "priority": 6 });
    })?;
    rvm(&["run", "--bundle", bundle.path(), "story"])?
        .expect_text("5 3\nbest-effort: prio 6\ni686\nhouse.test")
}

fn a_container_without_a_description_of_it_has_no_privileges() -> Result<()> {
    let script = "grep -E '^Cap...:' /proc/self/status | tr -d '\\n'";
    let bundle = Bundle::new(&["sh", "-c", script])?.edit(|config| {
        config["process"]["capabilities"] = json!({});
        config["process"]["noNewPrivileges"] = Value::Null;
    })?;
    let none = "0000000000000000";
    both_print(
        &bundle,
        &format!("CapInh:\t{none}CapPrm:\t{none}CapEff:\t{none}CapBnd:\t{none}CapAmb:\t{none}"),
    )
}

fn mounts_come_in_their_order() -> Result<()> {
    let script = "cat /outer/inner/file /link/file /etc/story /twice/file; ls /outer; \
                  echo x 2>/dev/null >/outer/inner/x || echo read-only; echo x >/link/x && echo written; \
                  echo x 2>/dev/null >/etc/story || echo read-only; /link/program 2>/dev/null || echo no program; \
                  stat -c '%a %u %g' /outer; df -k /outer | awk 'END {print $2}'; \
                  awk '$5 == \"/outer\" || $5 == \"/outer/inner\" {print $5, $6}' /proc/self/mountinfo; \
                  touch /new 2>/dev/null || echo read-only; touch /outer/inner/deep/new && echo written";
    let bundle = Bundle::new(&["sh", "-c", script])?;
    let folder = bundle.path().to_owned();
    shell(&format!(
        "cd {folder} && mkdir -p volume/deep second && echo of the volume >volume/file && echo second >second/file && \
         printf '#!/bin/sh\\necho ran\\n' >second/program && chmod 755 second/program && \
         ln -s outer/real rootfs/link && ln -s ../../../.. rootfs/escape"
    ))?
    .expect_code(0)?;
    let bundle = bundle.edit(|config| {
        config["root"]["readonly"] = json!(true);
        let options = ["nosuid", "nodev", "noexec", "mode=1750", "size=64k", "uid=3", "gid=4"];
        add_mounts(
            config,
            [
                mount("/outer", "tmpfs", "tmpfs", &options),
                // A source that is no absolute path is one of the bundle's.
                mount("/outer/inner", "bind", "volume", &["rbind", "ro", "nosuid", "nodev", "noexec"]),
                mount("/outer/inner/deep", "tmpfs", "tmpfs", &["size=4k"]),
                // Links are those of the container, and none leads out of it.
                mount("/link", "bind", &format!("{folder}/second"), &["bind", "noexec"]),
                mount("/escape/outer/caught", "tmpfs", "tmpfs", &["size=4k"]),
                mount("/etc/story", "bind", &format!("{folder}/second/file"), &["bind", "ro"]),
                mount("/twice", "bind", &format!("{folder}/second"), &["bind"]),
                mount("/twice", "bind", &format!("{folder}/volume"), &["bind"]),
            ],
        );
    })?;
    let expected = "of the volume\nsecond\nsecond\nof the volume\ncaught\ninner\nread-only\nwritten\n";
    let printed = |runtime| run(runtime, &["run", "--bundle", bundle.path(), "story"])?.expect_code(0);
    let (theirs, ours) = (printed("runc")?.text(), printed("rvm")?.text());
    ensure!(ours == theirs, "under runc:\n{theirs}\nunder rvm:\n{ours}");
    ensure!(ours.starts_with(expected), "{ours}");
    Ok(())
}

fn devices_are_made_as_described() -> Result<()> {
    let script = "cd /dev && for f in null zero full random urandom tty story deep/er/zero pipe; do \
                  stat -c '%n %F %a %u %g %t:%T' $f; done; for f in fd stdin stdout stderr ptmx; do readlink $f; done; \
                  echo x >story && head -c 3 deep/er/zero | wc -c; mknod /tmp/null c 1 3 && echo x >/tmp/null && echo allowed; \
                  mknod /tmp/port c 4 64 2>&1; cat /tmp/port 2>&1; mknod /tmp/disk b 7 0 2>&1; rm -f /tmp/null /tmp/port /tmp/disk";
    let bundle = Bundle::new(&["sh", "-c", script])?.edit(|config| {
        config["linux"]["devices"] = json!([
            { "path": "/dev/story", "type": "c", "major": 1, "minor": 3, "fileMode": 0o620, "uid": 7, "gid": 8 },
            { "path": "/dev/deep/er/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o666, "uid": 0, "gid": 0 },
            { "path": "/dev/pipe", "type": "p", "fileMode": 0o600, "uid": 1, "gid": 2 },
        ]);
        config["linux"]["resources"]["devices"] = json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 4, "minor": 64, "access": "m" },
        ]);
        for set in ["bounding", "permitted", "effective"] {
            config["process"]["capabilities"][set] = json!(["CAP_MKNOD"]);
        }
    })?;
    let printed = |runtime| run(runtime, &["run", "--bundle", bundle.path(), "story"]);
    let (theirs, ours) = (printed("runc")?.text(), printed("rvm")?.text());
    ensure!(ours == theirs, "under runc:\n{theirs}\nunder rvm:\n{ours}");
    let some = "story character special file 620 7 8 1:3\ndeep/er/zero character special file 666 0 0 1:5\npipe fifo 600 1 2";
    ensure!(ours.contains(some), "{ours}");
    Ok(())
}

fn paths_are_masked_and_write_protected() -> Result<()> {
    let script = "cat /data/secret; ls -A /data/secrets; echo x 2>/dev/null >/data/secrets/x || echo read-only; \
                  cat /data/kept /data/shown/file; echo x 2>/dev/null >/data/kept || echo read-only; \
                  rm /data/shown/file 2>/dev/null || echo read-only; echo x >/data/free && cat /data/free; \
                  cat /linked/secret";
    let bundle = Bundle::new(&["sh", "-c", script])?;
    shell(&format!(
        "cd {}/rootfs && mkdir -p data/secrets data/shown && echo secret >data/secret && echo key >data/secrets/key && \
         echo kept >data/kept && echo shown >data/shown/file && ln -s data linked",
        bundle.path()
    ))?
    .expect_code(0)?;
    let bundle = bundle.edit(|config| {
        config["linux"]["maskedPaths"] = json!(["/data/secret", "/data/secrets", "/data/absent"]);
        config["linux"]["readonlyPaths"] = json!(["/data/kept", "/data/shown", "/data/absent"]);
    })?;
    both_print(&bundle, "read-only\nkept\nshown\nread-only\nread-only\nx")
}

fn the_root_has_its_propagation() -> Result<()> {
    let script =
        "awk '$5 == \"/\" {for (i = 7; $i != \"-\"; i++) print $i}' /proc/self/mountinfo | sed 's/:.*//'";
    for (name, expected) in [("shared", "shared"), ("private", ""), ("unbindable", "unbindable")] {
        let bundle = Bundle::new(&["sh", "-c", script])?
            .edit(|config| config["linux"]["rootfsPropagation"] = json!(name))?;
        both_print(&bundle, expected)?;
    }
    Ok(())
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
        if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
            namespaces.push(json!({ "type": "user" }));
        }
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
    let script = "cd /sys/fs/cgroup && cat memory.max memory.high memory.low pids.max cpu.max cpu.weight cpuset.cpus; \
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

fn system_calls_are_filtered_by_their_arguments() -> Result<()> {
    let script = "mkdir /tmp/x 2>&1; kill -0 $$ && echo allowed; kill -10 $$ 2>&1; hostname other 2>&1; \
                  sh -c 'chroot / true'; echo $?; grep Seccomp: /proc/self/status";
    let bundle = Bundle::new(&["sh", "-c", script])?.edit(|config| {
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
                { "names": ["sethostname"], "action": "SCMP_ACT_ERRNO" },
                { "names": ["chroot"], "action": "SCMP_ACT_KILL_PROCESS" },
            ],
        });
    })?;
    let expected = "mkdir: can't create directory '/tmp/x': No space left on device\nallowed\n\
                    sh: can't kill pid 1: Function not implemented\nhostname: sethostname: Operation not permitted\n\
                    Bad system call\n159\nSeccomp:\t2";
    both_print(&bundle, expected)
}

/// The specification wants unknown fields ignored, so that a description of a later version can be used.
fn what_nobody_knows_is_ignored() -> Result<()> {
    let bundle = Bundle::new(&["echo", "runs"])?.edit(|config| {
        for pointer in ["", "/process", "/root", "/linux", "/linux/resources", "/mounts/0"] {
            if let Some(place) = config.pointer_mut(pointer) {
                place["fromTheFuture"] = json!({ "some": ["thing"] });
            }
        }
        config["annotations"] = json!({ "com.example.nobody-knows": "it" });
    })?;
    both_print(&bundle, "runs")
}
