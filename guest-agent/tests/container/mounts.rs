//! The container's file systems.

use serde_json::{Value, json};

use crate::host::{Host, container, process, shell};

crate::tests![
    the_root_is_the_containers_and_nothing_else,
    a_read_only_root_cannot_be_written,
    a_bind_mount_is_taken_from_the_served_tree,
    a_bind_mount_can_be_read_only,
    a_bind_mount_lies_over_a_tmpfs,
    a_tmpfs_has_its_options,
    a_tmpfs_can_start_with_what_it_covers,
    a_tmpfs_can_be_read_only,
    a_read_only_tmpfs_has_its_propagation,
    options_of_the_old_mount_call_are_taken,
    the_type_of_a_mount_outweighs_its_options,
    devices_and_links_are_there,
    masked_paths_are_empty,
    read_only_paths_cannot_be_written,
    system_parameters_are_set,
    links_of_the_image_lead_nowhere_else,
    proc_is_not_mounted_through_a_link,
    a_missing_working_directory_is_made,
    the_cgroup_is_the_root_of_its_namespace,
];

fn with_mounts(command: &str, mounts: &[Value]) -> Value {
    let mut spec = container(&shell(command));
    spec["mounts"].as_array_mut().unwrap().extend_from_slice(mounts);
    spec
}

fn run(command: &str, mounts: &[Value]) -> String {
    Host::new().run(&with_mounts(command, mounts)).success()
}

fn the_root_is_the_containers_and_nothing_else() {
    let out =
        run("ls /; grep -c pristine /proc/self/mountinfo; head -1 /proc/self/mountinfo | grep -c ' / '", &[]);
    assert_eq!(out, "bin\ndata\ndev\netc\nproc\nrun\nsys\ntmp\n0\n1\n");
}

fn a_read_only_root_cannot_be_written() {
    let mut spec = container(&shell("touch /file 2>&1; touch /dev/shm/file && echo yes; echo x > /tmp/x"));
    spec["root"]["readonly"] = json!(true);
    let outcome = Host::new().run(&spec);
    assert!(outcome.stdout.contains("Read-only file system"), "{outcome:?}");
    assert!(outcome.stdout.ends_with("yes\n"), "{outcome:?}");
}

fn bind(destination: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": "bind", "source": "/on/the/host", "options": options })
}

fn a_bind_mount_is_taken_from_the_served_tree() {
    let out = run(
        "cat /data/file; echo; echo new > /data/other; grep ' /data ' /proc/self/mountinfo | grep -c nosuid",
        &[bind("/data", &["rbind", "rprivate", "nosuid"])],
    );
    assert_eq!(out, "from the host\n1\n");
}

fn a_bind_mount_can_be_read_only() {
    let command = "echo x > /data/file || cat /data/file";
    let out = run(command, &[bind("/data", &["bind", "ro"])]);
    assert_eq!(out, "from the host");
    let out = run(command, &[bind("/data/file", &["bind", "ro"])]);
    assert_eq!(out, "from the host");
}

fn a_bind_mount_lies_over_a_tmpfs() {
    let tmpfs = json!({ "destination": "/data", "type": "tmpfs", "source": "tmpfs" });
    let out = run("ls /data; cat /data/file", &[tmpfs, bind("/data/file", &["bind"])]);
    assert_eq!(out, "file\nfrom the host");
}

fn a_tmpfs_has_its_options() {
    let tmpfs = json!({
        "destination": "/new/place", "type": "tmpfs", "source": "tmpfs",
        "options": ["nosuid", "noexec", "size=64k", "mode=1750", "uid=7"],
    });
    let out = run(
        "stat -c '%a %u' /new/place; grep ' /new/place ' /proc/self/mountinfo | grep -o 'size=64k'; \
         dd if=/dev/zero of=/new/place/x bs=1k count=100 2>&1 | grep -o 'No space.*'",
        &[tmpfs],
    );
    assert_eq!(out, "1750 7\nsize=64k\nNo space left on device\n");
    // Without a mode it has that of the directory it covers.
    let tmpfs = json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs" });
    assert_eq!(run("stat -c %a /tmp", &[tmpfs]), "1777\n");
}

fn a_tmpfs_can_start_with_what_it_covers() {
    let tmpfs =
        json!({ "destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"] });
    let mut host = Host::new();
    let out = host.run(&with_mounts("cat /data/file; echo changed > /data/file", &[tmpfs])).success();
    assert_eq!(out, "from the host");
    assert_eq!(std::fs::read_to_string(host.rootfs().join("data/file")).unwrap(), "from the host");
}

fn a_tmpfs_can_be_read_only() {
    let tmpfs = json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["ro"] });
    assert_eq!(run("touch /tmp/x 2>/dev/null || echo refused", &[tmpfs]), "refused\n");
}

fn a_read_only_tmpfs_has_its_propagation() {
    let tmpfs =
        json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["ro", "shared"] });
    let out =
        run("grep ' /tmp ' /proc/self/mountinfo | grep -c shared:; touch /tmp/x 2>&1 | wc -l", &[tmpfs]);
    assert_eq!(out, "1\n1\n");
}

fn options_of_the_old_mount_call_are_taken() {
    let options = ["silent", "loud", "iversion", "acl", "noacl"];
    let tmpfs = json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": options });
    assert_eq!(run("echo mounted", &[tmpfs]), "mounted\n");
}

fn the_type_of_a_mount_outweighs_its_options() {
    let proc = json!({ "destination": "/data/proc", "type": "proc", "source": "proc", "options": ["rbind", "nosuid"] });
    assert_eq!(run("test -e /data/proc/1/comm && echo yes", &[proc]), "yes\n");
}

fn devices_and_links_are_there() {
    let mut spec = container(&shell(
        "for d in null zero full random urandom tty extra; do stat -c '%F %t:%T %a %u' /dev/$d; done; \
         for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done; \
         echo lost > /dev/null; head -c 2 /dev/zero | wc -c; stat -c %t:%T /dev/pts/ptmx",
    ));
    spec["linux"]["devices"] = json!([
        { "path": "/dev/extra", "type": "c", "major": 1, "minor": 5, "fileMode": 0o600, "uid": 9, "gid": 9 },
    ]);
    let out = Host::new().run(&spec).success();
    let device =
        |number: &str, mode_and_user: &str| format!("character special file {number} {mode_and_user}\n");
    let mut expected: String =
        ["1:3", "1:5", "1:7", "1:8", "1:9", "5:0"].map(|number| device(number, "666 0")).concat();
    expected += &device("1:5", "600 9");
    expected += "/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\n2\n5:2\n";
    assert_eq!(out, expected);
}

fn masked_paths_are_empty() {
    let out = run("cat /proc/keys | wc -c; stat -c %t:%T /proc/keys; ls /sys/firmware | wc -l", &[]);
    assert_eq!(out, "0\n1:3\n0\n");
}

fn read_only_paths_cannot_be_written() {
    let out = run("echo x > /proc/sys/kernel/hostname; hostname", &[]);
    assert_eq!(out, "container\n");
}

fn system_parameters_are_set() {
    let mut spec = container(&shell("cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax"));
    spec["linux"]["sysctl"] = json!({ "net.ipv4.ip_forward": "1", "kernel.msgmax": "12345" });
    assert_eq!(Host::new().run(&spec).success(), "1\n12345\n");
}

fn links_of_the_image_lead_nowhere_else() {
    let mut host = Host::new();
    let outside = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(outside.path(), host.rootfs().join("link")).unwrap();
    // The link's target does not exist in the image, where it is made, as with runc.
    let tmpfs = json!({ "destination": "/link/below", "type": "tmpfs", "source": "tmpfs" });
    let outcome = host.run(&with_mounts("touch /link/below/x; ls /link", &[tmpfs]));
    assert_eq!(outcome.success(), "below\n");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
}

fn proc_is_not_mounted_through_a_link() {
    let mut host = Host::new();
    std::fs::remove_dir(host.rootfs().join("proc")).unwrap();
    std::os::unix::fs::symlink("/tmp", host.rootfs().join("proc")).unwrap();
    let error = host.start(&container(&process(&["true"]))).map(drop).unwrap_err();
    assert!(error.message.contains("ordinary directory"), "{error}");
}

fn a_missing_working_directory_is_made() {
    let mut description = process(&["pwd"]);
    description["cwd"] = "/srv/deep/work".into();
    assert_eq!(Host::new().run(&container(&description)).success(), "/srv/deep/work\n");
}

fn the_cgroup_is_the_root_of_its_namespace() {
    let out = run("grep ^0: /proc/self/cgroup; cat /sys/fs/cgroup/cgroup.procs | head -1", &[]);
    assert_eq!(out, "0::/\n1\n");
}
