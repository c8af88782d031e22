//! Real mounts, in mount namespaces of their own, each seen only by the thread that made it.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::thread;

use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

use super::*;
use crate::mountinfo;

/// Runs a test in a mount namespace that ends with it; whether it did, which takes root.
fn in_new_namespace(test: impl FnOnce() + Send) -> bool {
    if !nix::unistd::geteuid().is_root() {
        println!("not run: making mounts takes root");
        return false;
    }
    let before = mountinfo::read().unwrap();
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            test();
            // While the namespace still stands, nothing of it is seen outside.
            assert!(mountinfo::read().unwrap() != before, "the test has mounted something");
        });
        let result = thread.join();
        assert_eq!(mountinfo::read().unwrap(), before, "a mount has leaked");
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    true
}

/// A bundle's directory with an image, and things of the host to bind.
struct Stage {
    directory: tempfile::TempDir,
    cwd: &'static str,
}

impl Stage {
    fn new() -> Self {
        let stage = Self { directory: tempfile::tempdir().unwrap(), cwd: "/" };
        for directory in ["rootfs/etc", "rootfs/dev", "volume/sub", "secrets"] {
            fs::create_dir_all(stage.path(directory)).unwrap();
        }
        fs::write(stage.path("rootfs/etc/os-release"), "image").unwrap();
        fs::write(stage.path("volume/file"), "volume").unwrap();
        fs::write(stage.path("hosts"), "127.0.0.1").unwrap();
        stage
    }

    fn path(&self, below: &str) -> PathBuf {
        self.directory.path().join(below)
    }

    fn bind(&self, source: &str, destination: &str, options: &[&str]) -> Value {
        json!({ "destination": destination, "type": "bind", "source": self.path(source), "options": options })
    }

    fn prepare(&self, mounts: Value, read_only: bool) -> Result<Rootfs, RootfsError> {
        let namespaces = ["mount", "network", "uts", "pid", "ipc"].map(|kind| json!({ "type": kind }));
        let config = json!({
            "ociVersion": "1.2.0",
            "process": { "user": { "uid": 0, "gid": 0 }, "args": ["sh"], "cwd": self.cwd },
            "root": { "path": "rootfs", "readonly": read_only },
            "mounts": mounts,
            "linux": { "namespaces": namespaces, "maskedPaths": ["/proc/keys", "/circle", "/nothing"] }
        });
        fs::write(self.path("config.json"), config.to_string()).unwrap();
        Rootfs::prepare(&Bundle::load(self.directory.path()).unwrap())
    }

    fn refusal(&self, mounts: Value) -> String {
        self.prepare(mounts, false).map(drop).expect_err("a refusal").to_string()
    }
}

fn guest_mount(destination: &str, kind: &str) -> Value {
    json!({ "destination": destination, "type": kind, "source": kind })
}

fn errno<T>(result: io::Result<T>) -> Errno {
    Errno::from_raw(result.map(drop).unwrap_err().raw_os_error().unwrap())
}

#[test]
fn the_tree_becomes_the_root_with_everything_in_its_place() {
    let stage = Stage::new();
    let ran = in_new_namespace(|| {
        let mounts = json!([
            guest_mount("/proc", "proc"),
            stage.bind("volume", "/data", &["rbind"]),
            stage.bind("hosts", "/etc/hosts", &["bind", "ro"]),
            stage.bind("secrets", "/data/sub/deep", &["bind"]),
        ]);
        stage.prepare(mounts, false).unwrap().pivot().unwrap();
        assert_eq!(fs::read_to_string("/etc/os-release").unwrap(), "image");
        assert_eq!(fs::read_to_string("/data/file").unwrap(), "volume");
        assert_eq!(fs::read_to_string("/etc/hosts").unwrap(), "127.0.0.1");
        assert_eq!(errno(fs::write("/etc/hosts", "")), Errno::EROFS);
        fs::write("/data/sub/deep/key", "written").unwrap();
        assert!(Path::new("/proc").is_dir());
        let names: Vec<_> = fs::read_dir("/").unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(!names.contains(&"tmp".into()), "nothing of the host's root is left: {names:?}");
        // For the harness, which compares lists of mounts.
        fs::write("/etc/checked", "yes").unwrap();
        mount_proc();
    });
    if !ran {
        return;
    }
    assert_eq!(fs::read_to_string(stage.path("secrets/key")).unwrap(), "written");
    assert!(stage.path("rootfs/etc/checked").exists(), "writes go through to the image");
    assert!(stage.path("volume/sub/deep").is_dir(), "the mount point was made in the volume, as with runc");
}

/// The new root has none, and the harness reads the list of mounts.
fn mount_proc() {
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), None::<&str>).unwrap();
}

#[test]
fn places_below_mounts_of_the_guest_leave_nothing_in_the_image() {
    let stage = Stage::new();
    in_new_namespace(|| {
        let mounts = json!([
            guest_mount("/dev", "tmpfs"),
            guest_mount("/dev/shm", "tmpfs"),
            stage.bind("volume", "/dev/shm/volume", &["bind"]),
            stage.bind("hosts", "/dev/log", &["bind"]),
        ]);
        let root = stage.prepare(mounts, false).unwrap();
        let seen = stage.path("rootfs/dev");
        assert_eq!(fs::read_to_string(seen.join("shm/volume/file")).unwrap(), "volume");
        assert_eq!(fs::read_to_string(seen.join("log")).unwrap(), "127.0.0.1");
        drop(root);
    });
    assert_eq!(fs::read_dir(stage.path("rootfs/dev")).unwrap().count(), 0);
}

#[test]
fn a_read_only_root_still_gets_its_mount_points() {
    let stage = Stage::new();
    in_new_namespace(|| {
        let mounts = json!([guest_mount("/proc", "proc"), stage.bind("volume", "/new/place", &["rbind"])]);
        stage.prepare(mounts, true).unwrap().pivot().unwrap();
        assert_eq!(errno(fs::write("/etc/os-release", "")), Errno::EROFS);
        fs::write("/new/place/file", "volumes are not the root").unwrap();
        mount_proc();
    });
}

#[test]
fn proc_and_sys_are_mounted_on_no_link() {
    let stage = Stage::new();
    fs::create_dir(stage.path("rootfs/elsewhere")).unwrap();
    symlink("/elsewhere", stage.path("rootfs/sys")).unwrap();
    in_new_namespace(|| {
        let message = stage.refusal(json!([guest_mount("/sys", "sysfs")]));
        assert!(
            message.contains("mounts[0]: sysfs must be mounted on ordinary directory, and /sys"),
            "{message}"
        );
    });
}

#[test]
fn a_path_to_be_masked_may_be_missing_but_not_lead_in_circles() {
    let stage = Stage::new();
    in_new_namespace(|| {
        stage.prepare(json!([]), false).unwrap();
    });
    symlink("../circle", stage.path("rootfs/circle")).unwrap();
    in_new_namespace(|| {
        let message = stage.refusal(json!([]));
        assert!(message.contains("/circle cannot be protected: ") && message.contains("ELOOP"), "{message}");
    });
}

#[test]
fn hooks_can_still_write_to_a_root_that_will_be_read_only() {
    let stage = Stage::new();
    in_new_namespace(|| {
        let rootfs = stage.prepare(json!([guest_mount("/proc", "proc")]), true).unwrap();
        fs::write(stage.path("rootfs/cache"), "of a hook").unwrap();
        rootfs.pivot().unwrap();
        assert_eq!(fs::read_to_string("/cache").unwrap(), "of a hook");
        assert_eq!(errno(fs::write("/cache", "")), Errno::EROFS);
        mount_proc();
    });
}

#[test]
fn a_read_only_root_still_gets_its_working_directory() {
    let stage = Stage { cwd: "/link/deep/here", ..Stage::new() };
    symlink("/srv/../..", stage.path("rootfs/link")).unwrap();
    in_new_namespace(|| {
        stage.prepare(json!([guest_mount("/proc", "proc")]), true).unwrap().pivot().unwrap();
        assert!(fs::metadata("/deep/here").unwrap().is_dir());
        mount_proc();
    });
    let stage = Stage { cwd: "/run/work", ..Stage::new() };
    in_new_namespace(|| {
        let mounts = json!([guest_mount("/proc", "proc"), guest_mount("/run", "tmpfs")]);
        stage.prepare(mounts, true).unwrap().pivot().unwrap();
        assert!(!Path::new("/run/work").exists(), "the guest makes it in its own mount");
        mount_proc();
    });
}

#[test]
fn restrictions_hold_for_the_mount_and_where_asked_for_those_below() {
    let stage = Stage::new();
    in_new_namespace(|| {
        // A disk of the host below the volume.
        isolate().unwrap();
        let below = stage.path("volume/sub");
        mount(Some("disk"), &below, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let mounts = json!([
            stage.bind("volume", "/one", &["rbind", "ro", "nosuid", "nodev", "noexec"]),
            stage.bind("volume", "/all", &["rbind", "rro"]),
            stage.bind("volume", "/flat", &["bind"]),
        ]);
        stage.prepare(mounts, false).unwrap();
        let root = stage.path("rootfs");
        assert_eq!(errno(fs::write(root.join("one/x"), "")), Errno::EROFS);
        fs::write(root.join("one/sub/x"), "as with runc").unwrap();
        assert_eq!(errno(fs::write(root.join("all/sub/x"), "")), Errno::EROFS);
        assert!(root.join("all/sub/x").exists() && !root.join("flat/sub/x").exists());
        let flags = nix::sys::statvfs::statvfs(&root.join("one")).unwrap().flags();
        use nix::sys::statvfs::FsFlags;
        assert!(flags.contains(FsFlags::ST_NOSUID | FsFlags::ST_NODEV | FsFlags::ST_NOEXEC));
    });
}

#[test]
fn links_of_the_image_do_not_lead_out() {
    let stage = Stage::new();
    fs::create_dir(stage.path("outside")).unwrap();
    symlink(stage.path("outside"), stage.path("rootfs/absolute")).unwrap();
    symlink("../../../../../../../../outside", stage.path("rootfs/relative")).unwrap();
    in_new_namespace(|| {
        let mounts = json!([
            stage.bind("hosts", "/absolute/a", &["bind"]),
            stage.bind("hosts", "/relative/r", &["bind"]),
        ]);
        stage.prepare(mounts, false).unwrap();
        assert_eq!(fs::read_to_string(stage.path("rootfs/outside/r")).unwrap(), "127.0.0.1");
    });
    assert_eq!(fs::read_dir(stage.path("outside")).unwrap().count(), 0);
}

#[test]
fn mounts_that_cannot_be_made_are_named() {
    let stage = Stage::new();
    in_new_namespace(|| {
        let absent = stage.refusal(json!([stage.bind("absent", "/x", &["bind"])]));
        assert!(absent.starts_with("mounts[0]: cannot bind the source "), "{absent}");
        assert!(absent.ends_with("absent: nothing is there (ENOENT)"), "{absent}");
        let kinds = stage.refusal(json!([stage.bind("volume", "/etc/os-release", &["bind"])]));
        assert!(kinds.contains("/etc/os-release in the container is a file"), "{kinds}");
        let kinds = stage.refusal(json!([stage.bind("hosts", "/etc", &["bind"])]));
        assert!(kinds.contains("is a file, but /etc in the container is a directory"), "{kinds}");
        let through = stage.refusal(json!([stage.bind("hosts", "/etc/os-release/x", &["bind"])]));
        assert!(
            through.contains("cannot make the mount point /etc/os-release/x: Not a directory"),
            "{through}"
        );
    });
}

#[test]
fn a_layer_over_a_directory_throws_writes_away() {
    let stage = Stage::new();
    fs::create_dir(stage.path("at")).unwrap();
    in_new_namespace(|| {
        isolate().unwrap();
        // A second disk, which has to be shown and protected like the first.
        let disk = stage.path("volume/sub");
        mount(Some("disk"), &disk, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let overlay = Overlay::mount(&stage.path("volume"), &stage.path("at")).unwrap();
        assert_eq!(fs::read_to_string(overlay.path.join("file")).unwrap(), "volume");
        fs::write(overlay.path.join("file"), "changed").unwrap();
        fs::write(overlay.path.join("new"), "new").unwrap();
        assert_eq!(fs::read_to_string(overlay.path.join("file")).unwrap(), "changed");
        assert_eq!(fs::read_dir(overlay.path.join("sub")).unwrap().count(), 0);
    });
    assert_eq!(fs::read_to_string(stage.path("volume/file")).unwrap(), "volume");
    assert!(!stage.path("volume/new").exists());
    assert_eq!(fs::read_dir(stage.path("at")).unwrap().count(), 0);
}

#[test]
fn the_hosts_own_root_can_be_below() {
    let stage = Stage::new();
    let name = format!("/rvm-test-{}", std::process::id());
    in_new_namespace(|| {
        Overlay::mount(Path::new("/"), &stage.path("rootfs")).unwrap();
        stage.prepare(json!([guest_mount("/proc", "proc")]), false).unwrap().pivot().unwrap();
        assert!(Path::new("/etc/passwd").exists());
        fs::write(&name, "thrown away").unwrap();
        assert_eq!(fs::metadata(&name).unwrap().len(), 11);
        mount_proc();
    });
    assert!(!Path::new(&name).exists());
}

#[test]
fn a_missing_layer_base_is_named() {
    let stage = Stage::new();
    in_new_namespace(|| {
        let error = Overlay::mount(&stage.path("absent"), &stage.path("rootfs")).unwrap_err().to_string();
        assert!(error.contains("cannot put a throw-away layer over") && error.contains("ENOENT"), "{error}");
        mount(Some("x"), &stage.path("rootfs"), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    });
}

#[test]
fn mounts_below_volumes_are_known_by_their_places_in_the_container() {
    let stage = Stage::new();
    in_new_namespace(|| {
        fs::create_dir(stage.path("volume/nested")).unwrap();
        let place = stage.path("volume/nested");
        isolate().unwrap();
        mount(Some("x"), &place, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let mounts = json!([guest_mount("/proc", "proc"), stage.bind("volume", "/data", &["rbind"])]);
        let rootfs = stage.prepare(mounts, false).unwrap();
        let nested = HostMount { path: "data/nested".into(), attributes: 0 };
        assert_eq!(host_mounts(&stage.path("rootfs").canonicalize().unwrap()).unwrap(), [nested]);
        rootfs.pivot().unwrap();
        mount_proc();
    });
}

#[test]
fn restrictions_of_mounts_are_known_wherever_they_come_from() {
    let entry = |place: &str, options: &[&str]| MountEntry {
        root: "/".into(),
        mount_point: Path::new("/root").join(place),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        file_system: "ext4".into(),
        super_options: vec!["ro".into()],
    };
    let mounts = [
        entry("", &["ro", "noexec"]),
        entry("data", &["rw", "relatime"]),
        entry("data/in", &["rw"]),
        entry("twice", &["rw", "noexec"]),
        entry("twice", &["rw", "nosuid", "nodev"]),
        MountEntry { mount_point: "/elsewhere".into(), ..entry("", &["ro"]) },
    ];
    let expected = [("twice", libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV), ("data/in", 0)];
    let expected = expected.map(|(path, attributes)| HostMount { path: path.into(), attributes });
    assert_eq!(noteworthy(Path::new("/root"), &mounts), expected);
}
