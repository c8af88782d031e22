//! Options of `docker run` whose effect shows inside the container.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};

use crate::Story;
use crate::command::{docker, docker_run, docker_start};

pub const STORIES: &[(&str, Story)] = &[
    ("environment_and_working_directory", environment_and_working_directory),
    ("user_and_groups", user_and_groups),
    ("host_name", host_name),
    ("a_read_only_root", a_read_only_root),
    ("a_tmpfs", a_tmpfs),
    ("a_volume_is_shared_both_ways", a_volume_is_shared_both_ways),
    ("a_read_only_volume", a_read_only_volume),
    ("a_single_file_as_volume", a_single_file_as_volume),
    ("a_volume_below_a_tmpfs", a_volume_below_a_tmpfs),
    ("dropped_capabilities", dropped_capabilities),
    ("memory_limit", memory_limit),
    ("processor_limit", processor_limit),
    ("process_limit", process_limit),
    ("shared_memory_size", shared_memory_size),
    ("limits_of_a_process", limits_of_a_process),
    ("a_kernel_parameter", a_kernel_parameter),
    ("masked_paths", masked_paths),
    ("seccomp_refuses_what_docker_refuses", seccomp_refuses_what_docker_refuses),
    ("no_new_privileges", no_new_privileges),
    ("supplementary_groups_may_write", supplementary_groups_may_write),
    ("devices_follow_the_rules", devices_follow_the_rules),
    ("a_bind_of_sys_is_the_guests", a_bind_of_sys_is_the_guests),
    ("what_a_virtual_machine_cannot_do_is_refused", what_a_virtual_machine_cannot_do_is_refused),
];

fn environment_and_working_directory() -> Result<()> {
    docker_run(&[
        "-e",
        "GREETING=good day",
        "-w",
        "/usr",
        "busybox",
        "sh",
        "-c",
        "echo $GREETING; pwd; echo $HOME",
    ])?
    .expect_text("good day\n/usr\n/root")
}

fn user_and_groups() -> Result<()> {
    docker_run(&["-u", "1000:1000", "--group-add", "2000", "busybox", "sh", "-c", "id -u; id -g; id -G"])?
        .expect_text("1000\n1000\n1000 2000")?;
    docker_run(&["-u", "1000:1000", "busybox", "sh", "-c", "echo x > /root/x"])?
        .expect_failure(&["Permission denied"])
        .map(drop)
}

fn host_name() -> Result<()> {
    docker_run(&["--hostname", "kitchen", "--domainname", "house.test", "busybox", "hostname"])?
        .expect_text("kitchen")
}

fn a_read_only_root() -> Result<()> {
    docker_run(&["--read-only", "busybox", "sh", "-c", "echo x > /x"])?
        .expect_failure(&["Read-only file system"])?;
    docker_run(&["--read-only", "--tmpfs", "/run", "busybox", "sh", "-c", "echo x > /run/x; cat /run/x"])?
        .expect_text("x")
}

fn a_tmpfs() -> Result<()> {
    let line =
        "mount | grep ' /scratch '; df -k /scratch | tail -n 1 | awk '{print $2}'; stat -c %a /scratch";
    let shown = docker_run(&["--tmpfs", "/scratch:size=3m,mode=1700,noexec", "busybox", "sh", "-c", line])?
        .expect_code(0)?
        .text();
    ensure!(shown.contains("type tmpfs") && shown.contains("noexec"), "mounted as {shown}");
    ensure!(shown.ends_with("3072\n1700"), "size and mode: {shown}");
    Ok(())
}

fn a_volume_is_shared_both_ways() -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("from-host"), "one")?;
    let volume = format!("{}:/x", folder.path().display());
    let line =
        "cat /x/from-host; echo two > /x/from-guest; chown 12:34 /x/from-guest; chmod 640 /x/from-guest";
    docker_run(&["-v", &volume, "busybox", "sh", "-c", line])?.expect_text("one")?;
    let made = folder.path().join("from-guest");
    ensure!(fs::read_to_string(&made)? == "two\n", "the host sees another content");
    use std::os::unix::fs::MetadataExt;
    let meta = fs::metadata(&made)?;
    ensure!((meta.uid(), meta.gid(), meta.mode() & 0o7777) == (12, 34, 0o640), "the host sees {meta:?}");
    changes_show_while_the_container_runs(folder.path(), &volume)
}

fn changes_show_while_the_container_runs(folder: &Path, volume: &str) -> Result<()> {
    let id = docker_start(&["-v", volume, "busybox", "sleep", "1000"])?;
    docker(&["exec", &id, "cat", "/x/from-host"])?.expect_text("one")?;
    fs::write(folder.join("from-host"), "changed")?;
    fs::rename(folder.join("from-guest"), folder.join("renamed"))?;
    docker(&["exec", &id, "sh", "-c", "cat /x/from-host /x/renamed; ls /x; rm /x/renamed"])?
        .expect_text("changedtwo\nfrom-host\nrenamed")?;
    ensure!(!folder.join("renamed").exists(), "the host still has the file that the guest removed");
    docker(&["rm", "-f", &id])?.expect_code(0).map(drop)
}

fn a_read_only_volume() -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("file"), "content")?;
    let volume = format!("{}:/x:ro", folder.path().display());
    docker_run(&["-v", &volume, "busybox", "sh", "-c", "cat /x/file; echo y > /x/file"])?
        .expect_failure(&["Read-only file system"])?;
    ensure!(fs::read_to_string(folder.path().join("file"))? == "content", "the file was changed");
    Ok(())
}

fn a_single_file_as_volume() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("settings");
    fs::write(&file, "a=1\n")?;
    let volume = format!("{}:/etc/settings", file.display());
    docker_run(&["-v", &volume, "busybox", "sh", "-c", "cat /etc/settings; echo b=2 >> /etc/settings"])?
        .expect_text("a=1")?;
    ensure!(fs::read_to_string(&file)? == "a=1\nb=2\n", "the host sees {:?}", fs::read_to_string(&file)?);
    Ok(())
}

fn a_volume_below_a_tmpfs() -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("file"), "below")?;
    let volume = format!("{}:/outer/inner", folder.path().display());
    docker_run(&[
        "--tmpfs",
        "/outer",
        "-v",
        &volume,
        "busybox",
        "sh",
        "-c",
        "cat /outer/inner/file; ls /outer",
    ])?
    .expect_text("belowinner")
}

fn dropped_capabilities() -> Result<()> {
    docker_run(&["--cap-drop=ALL", "busybox", "sh", "-c", "grep CapEff /proc/self/status; chown 1 /tmp"])?
        .expect_failure(&["Operation not permitted"])?;
    docker_run(&["--cap-drop=ALL", "busybox", "grep", "CapEff", "/proc/self/status"])?
        .expect_text("CapEff:\t0000000000000000")?;
    docker_run(&["--cap-drop=ALL", "--cap-add=CHOWN", "busybox", "grep", "CapEff", "/proc/self/status"])?
        .expect_text("CapEff:\t0000000000000001")
}

fn memory_limit() -> Result<()> {
    let line = "cat /sys/fs/cgroup/memory.max";
    docker_run(&["--memory", "64m", "busybox", "sh", "-c", line])?.expect_text("67108864")?;
    // 40 MiB fit; 96 MiB do not, and the guest's kernel ends the one who asks for them, but not the container.
    let line = "fill() { head -c $1 /dev/zero | { tail -n 1 > /tmp/out; echo $?; }; }; \
                fill 40m; wc -c < /tmp/out; fill 96m; echo alive";
    docker_run(&["--memory", "64m", "busybox", "sh", "-c", line])?
        .expect_text(&format!("0\n{}\n137\nalive", 40 << 20))
}

fn processor_limit() -> Result<()> {
    docker_run(&["--cpus", "0.5", "busybox", "cat", "/sys/fs/cgroup/cpu.max"])?
        .expect_text("50000 100000")?;
    docker_run(&["--cpus", "1", "busybox", "nproc"])?.expect_text("1")
}

fn process_limit() -> Result<()> {
    docker_run(&["--pids-limit", "77", "busybox", "cat", "/sys/fs/cgroup/pids.max"])?.expect_text("77")
}

fn shared_memory_size() -> Result<()> {
    docker_run(&["--shm-size", "5m", "busybox", "sh", "-c", "df -k /dev/shm | tail -n 1 | awk '{print $2}'"])?
        .expect_text("5120")
}

fn limits_of_a_process() -> Result<()> {
    docker_run(&["--ulimit", "nofile=111:222", "busybox", "sh", "-c", "ulimit -Sn; ulimit -Hn"])?
        .expect_text("111\n222")
}

fn a_kernel_parameter() -> Result<()> {
    docker_run(&["--sysctl", "net.ipv4.ip_forward=1", "busybox", "cat", "/proc/sys/net/ipv4/ip_forward"])?
        .expect_text("1")
}

fn masked_paths() -> Result<()> {
    // A masked file reads as the null device, a masked directory is empty.
    docker_run(&["busybox", "sh", "-c", "wc -c < /proc/timer_list; ls -A /sys/firmware | wc -l"])?
        .expect_text("0\n0")?;
    docker_run(&["busybox", "sh", "-c", "echo 1 > /proc/sys/kernel/panic"])?
        .expect_failure(&["Read-only file system"])
        .map(drop)
}

fn seccomp_refuses_what_docker_refuses() -> Result<()> {
    docker_run(&["busybox", "sh", "-c", "grep Seccomp: /proc/self/status"])?.expect_text("Seccomp:\t2")?;
    docker_run(&[
        "--security-opt",
        "seccomp=unconfined",
        "busybox",
        "sh",
        "-c",
        "grep Seccomp: /proc/self/status",
    ])?
    .expect_text("Seccomp:\t0")?;
    docker_run(&["busybox", "unshare", "-U", "true"])?.expect_failure(&["Operation not permitted"]).map(drop)
}

fn no_new_privileges() -> Result<()> {
    docker_run(&[
        "--security-opt",
        "no-new-privileges",
        "busybox",
        "grep",
        "NoNewPrivs",
        "/proc/self/status",
    ])?
    .expect_text("NoNewPrivs:\t1")?;
    docker(&["run", "--rm", "--runtime=rvm", "busybox", "grep", "NoNewPrivs", "/proc/self/status"])?
        .expect_text("NoNewPrivs:\t0")
}

fn supplementary_groups_may_write() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let volume = format!("{}:/x", folder.path().display());
    let prepare = format!("chown 2000:3000 {0} && chmod 770 {0}", folder.path().display());
    crate::command::shell(&prepare)?.expect_code(0)?;
    let line = "echo hello > /x/file && stat -c %u:%g /x/file";
    docker_run(&["-u", "1000:1000", "--group-add", "3000", "-v", &volume, "busybox", "sh", "-c", line])?
        .expect_text("1000:1000")?;
    docker_run(&["-u", "1000:1000", "-v", &volume, "busybox", "sh", "-c", line])?
        .expect_failure(&["Permission denied"])
        .map(drop)
}

fn devices_follow_the_rules() -> Result<()> {
    // Making a node is allowed, opening it is not: so it is with runc's default rules.
    let line = "mknod /tmp/port c 4 64 && echo made; cat /tmp/port";
    let outcome = docker_run(&["busybox", "sh", "-c", line])?.expect_failure(&["Operation not permitted"])?;
    ensure!(outcome.text() == "made", "{outcome:?}");
    docker_run(&["busybox", "sh", "-c", "head -c 4 /dev/urandom | wc -c; echo x > /dev/null && echo y"])?
        .expect_text("4\ny")
}

fn a_bind_of_sys_is_the_guests() -> Result<()> {
    docker_run(&["-v", "/sys:/sys:ro", "busybox", "ls", "/sys/class/net"])?.expect_text("eth0\nlo")
}

fn what_a_virtual_machine_cannot_do_is_refused() -> Result<()> {
    for (option, words) in [
        ("--network=host", "network"),
        ("--pid=host", "pid"),
        ("--ipc=host", "ipc"),
        ("--device=/dev/kvm", "/dev/kvm"),
    ] {
        docker_run(&[option, "busybox", "true"])?.expect_code(125)?.expect_failure(&[words])?;
    }
    let other = docker_start(&["--ipc=shareable", "busybox", "sleep", "1000"])?;
    for (kind, words) in [
        ("network", "share the network of another container"),
        ("pid", "processes of another container"),
        ("ipc", "IPC objects with another container"),
    ] {
        let option = format!("--{kind}=container:{other}");
        docker_run(&[&option, "busybox", "true"])?.expect_code(125)?.expect_failure(&[words])?;
    }
    docker(&["rm", "-f", &other])?.expect_code(0)?;
    Ok(())
}
