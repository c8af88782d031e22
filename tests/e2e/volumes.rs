//! Volumes: the same commands under rvm and under runc, and the same must come out. Where a virtual machine has to
//! differ, a story says how.

pub mod large;
pub mod small;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::Story;
use crate::beside_runc::{Docker, same, told};
use crate::bundle::{Bundle, add_mounts, mount};
use crate::command::{docker, eventually, run, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("mounts_of_every_kind", mounts_of_every_kind),
    ("options_of_mounts_hold", options_of_mounts_hold),
    ("options_of_an_engines_volume_hold", options_of_an_engines_volume_hold),
    ("mounts_of_the_host_come_along", mounts_of_the_host_come_along),
    ("files_are_as_programs_know_them", files_are_as_programs_know_them),
    ("processes_meet_on_a_volume", processes_meet_on_a_volume),
    ("users_and_groups_are_checked", users_and_groups_are_checked),
    ("a_user_of_ones_own_is_checked", a_user_of_ones_own_is_checked),
    ("a_volume_is_shared_live", a_volume_is_shared_live),
    ("the_host_changes_what_a_guest_has_open", the_host_changes_what_a_guest_has_open),
    ("the_host_changes_what_a_guest_knows", the_host_changes_what_a_guest_knows),
    ("locks_end_at_the_wall", locks_end_at_the_wall),
    ("one_of_two_makes_a_name", one_of_two_makes_a_name),
    ("what_is_closed_is_free", what_is_closed_is_free),
    ("a_full_disk_is_told_by_the_write", a_full_disk_is_told_by_the_write),
];

/// Prints mount points and options, of several mounts at one place those of the one on top.
const VISIBLE_MOUNTS: &str = "awk '{above[$2, $5] = 1; place[$1] = $5; how[$1] = $6} \
                              END {for (id in place) if (!((id, place[id]) in above)) print place[id], how[id]}' \
                              /proc/self/mountinfo | sort";

/// A directory of the host, on a disk, that users of containers get to.
fn folder() -> Result<TempDir> {
    let folder = tempfile::Builder::new().prefix("e2e-volume").tempdir_in("/var/tmp")?;
    shell(&format!("chmod 755 {}", path(folder.path())))?.expect_code(0)?;
    Ok(folder)
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

/// What a program of the debian image does in a volume, and what the host finds there afterwards.
fn program(docker: &Docker, options: &[&str], text: &str) -> Result<String> {
    let folder = folder()?;
    let volume = format!("{}:/volume", path(folder.path()));
    let command = ["-v", &volume, "-w", "/volume", "debian", "python3", "-c", text];
    let shown = told(&docker.run(&[options, &command[..]].concat())?);
    let found = "find . -printf '%p %y %m %U %G %n %s %l\\n' | sort";
    // Sizes of directories are the disk's affair.
    let found = format!("cd {} && {found} | sed -E '/^[^ ]+ d/s/[0-9]+ $//'", path(folder.path()));
    Ok(format!("{shown}\n{}", shell(&found)?.expect_code(0)?.text()))
}

fn files_are_as_programs_know_them() -> Result<()> {
    same(|docker| program(docker, &[], include_str!("volumes/files.py")))
}

/// Locks, sockets, pipes and notices of changes, among processes of one container.
fn processes_meet_on_a_volume() -> Result<()> {
    same(|docker| {
        program(docker, &[], concat!(include_str!("volumes/child.py"), include_str!("volumes/processes.py")))
    })
}

fn users_and_groups_are_checked() -> Result<()> {
    same(|docker| {
        program(docker, &[], concat!(include_str!("volumes/child.py"), include_str!("volumes/users.py")))
    })
}

/// The same by the engine's own options, which say who the container's first process is.
fn a_user_of_ones_own_is_checked() -> Result<()> {
    const STEPS: &str = "id; for f in *; do cat $f/x; echo new >$f/new; ls $f; done; ls -ln */new; \
                         touch /volume/x; stat -c '%u %g %a' */new";
    same(|docker| {
        let folder = folder()?;
        let prepare = "for d in own-700 own-755 group-770 group-2775 other-705 other-700; do mkdir $d; echo $d >$d/x; \
                       chmod ${d#*-} $d; done; chown -R 1000:1 own-*; chown -R 2:2000 group-*";
        shell(&format!("cd {} && {prepare}", path(folder.path())))?.expect_code(0)?;
        let volume = format!("{}:/volume", path(folder.path()));
        let user = ["-u", "1000:1001", "--group-add", "2000", "-v", &volume, "-w", "/volume"];
        let shown = told(&docker.run(&[&user[..], &["debian", "sh", "-c", STEPS]].concat())?);
        // When a file was made is no habit.
        Ok(shown.lines().filter(|line| !line.starts_with("-rw")).collect::<Vec<_>>().join("\n"))
    })
}

/// Folders and single files, read-only, recursive and not, named and nameless volumes, and volumes within volumes.
fn mounts_of_every_kind() -> Result<()> {
    const STEPS: &str = "cat /deep/er/inner/file /deep/er/below/file /flat/below/file /all/below/file /etc/of-host; \
        for f in /deep/er/x /all/x /all/below/x /flat/x /ro/x /ro/below/x /etc/of-host /file-ro /named/x /anonymous/x \
                 /scratch/x /scratch/named/x /deep/er/inner/x; do \
            echo y 2>/dev/null >>$f && echo \"$f can be written\" || echo \"$f cannot\"; done 2>/dev/null; \
        cat /etc/of-host; ls /copied | head -3; ls /not-copied | wc -l; \
        stat -c '%a %u %g' /scratch /named /etc/of-host; df -k /scratch | awk 'NR==2 {print $2}'; \
        printf '#!/bin/sh\\necho ran\\n' >/scratch/run; chmod 755 /scratch/run; /scratch/run; \
        head -c 200k /dev/zero >/scratch/big; stat -c %s /scratch/big;";
    let steps = format!(
        "{STEPS} {VISIBLE_MOUNTS} | grep -E '^/(deep|flat|all|ro|named|anonymous|scratch|file-ro|etc/of)'"
    );
    same(|docker| {
        let folder = folder()?;
        let host = path(folder.path());
        let prepare = "mkdir -p tree/inner tree/below && echo tree >tree/inner/file && echo single >single && \
                       mount -t tmpfs none tree/below && echo below >tree/below/file";
        shell(&format!("cd {host} && {prepare}"))?.expect_code(0)?;
        let name = format!("e2e-{}", docker.runtime);
        let mounts = [
            "type=tmpfs,dst=/deep".to_owned(),
            format!("type=bind,src={host}/tree,dst=/deep/er"),
            format!("type=bind,src={host}/tree,dst=/all"),
            format!("type=bind,src={host}/tree,dst=/flat,bind-recursive=disabled"),
            format!("type=bind,src={host}/tree,dst=/ro,readonly"),
            format!("type=bind,src={host}/single,dst=/etc/of-host"),
            format!("type=bind,src={host}/single,dst=/file-ro,readonly"),
            format!("type=volume,src={name},dst=/named"),
            "type=volume,dst=/anonymous".to_owned(),
            format!("type=volume,src={name},dst=/scratch/named"),
            format!("type=volume,src={name}-copied,dst=/copied"),
            format!("type=volume,src={name}-not,dst=/not-copied,volume-nocopy"),
        ];
        let mut words: Vec<&str> = mounts.iter().flat_map(|mount| ["--mount", mount.as_str()]).collect();
        words.extend([
            "--tmpfs",
            "/scratch:size=128k,mode=1711,uid=5,gid=6,noexec",
            "busybox",
            "sh",
            "-c",
            &steps,
        ]);
        let shown = docker.run(&words).map(|outcome| told(&outcome));
        let found = shell(&format!("cd {host} && find . -type f | sort; cat single"))?.text();
        shell(&format!("umount {host}/tree/below"))?.expect_code(0)?;
        docker_volumes_are_gone(&name)?;
        Ok(format!("{}\n{found}", without_access_times(&shown?)))
    })
}

fn docker_volumes_are_gone(name: &str) -> Result<()> {
    let line = format!("docker volume ls -q | grep '^{name}' | xargs -r docker volume rm");
    shell(&line)?.expect_code(0).map(drop)
}

/// How access times are kept is an option that follows from the host's disk, or from the guest's file system.
fn without_access_times(text: &str) -> String {
    text.replace(",relatime", "").replace(",noatime", "")
}

/// What a bundle says of its mounts, without an engine.
fn options_of_mounts_hold() -> Result<()> {
    const STEPS: &str = "cd /volume; ./run; ./link; cat null; echo x >new";
    let all = ["bind", "nosuid", "nodev", "noexec"];
    let sets: [&[&str]; 6] = [
        &["bind"],
        &all,
        &["bind", "ro"],
        &["rbind", "nosuid"],
        &["bind", "noexec", "nosymfollow"],
        &["bind", "nodev", "noatime"],
    ];
    let steps = format!("{STEPS}; {VISIBLE_MOUNTS} | grep ^/volume");
    for options in sets {
        let folder = folder()?;
        let prepare = "printf '#!/bin/sh\\necho ran\\n' >run && chmod 755 run && mknod null c 1 3 && chmod 666 null && \
                       ln -s run link";
        shell(&format!("cd {} && {prepare}", path(folder.path())))?.expect_code(0)?;
        let shown = |runtime: &str| -> Result<String> {
            let bundle = Bundle::new(&["sh", "-c", &steps])?.edit(|config| {
                add_mounts(config, [mount("/volume", "bind", &path(folder.path()), options)]);
                config["linux"]["resources"] = serde_json::json!({});
            })?;
            shell(&format!("rm -f {}/new", path(folder.path())))?;
            let outcome = run(runtime, &["run", "--bundle", bundle.path(), &format!("e2e-{runtime}")])?;
            Ok(without_access_times(&told(&outcome)))
        };
        let (theirs, ours) = (shown("runc")?, shown("rvm")?);
        ensure!(theirs == ours, "{options:?}\nrunc: {theirs}\nrvm: {ours}");
    }
    Ok(())
}

/// A named volume that is a file system of its own, with options.
fn options_of_an_engines_volume_hold() -> Result<()> {
    const STEPS: &str = "cd /volume; printf '#!/bin/sh\\necho ran\\n' >run; chmod 755 run; ./run; \
                         mknod null c 1 3; cat null; cp /usr/bin/id id; chmod 4755 id; \
                         setpriv --reuid 1000 ./id -u; head -c 100k /dev/zero >big; stat -c %s big; \
                         df -k . | awk 'NR==2 {print $2}'";
    same(|docker_with| {
        let mut shown = String::new();
        for options in ["size=64k", "size=64k,noexec,nodev", "size=4m,nosuid"] {
            let name = format!("e2e-{}", docker_with.runtime);
            let option = format!("o={options}");
            let create = ["volume", "create", "-o", "type=tmpfs", "-o", "device=tmpfs", "-o", &option, &name];
            docker(&create)?.expect_code(0)?;
            let volume = format!("{name}:/volume");
            let outcome = docker_with.run(&["-v", &volume, "debian", "sh", "-c", STEPS]);
            docker_volumes_are_gone(&name)?;
            shown += &told(&outcome?);
        }
        Ok(shown)
    })
}

/// What is mounted below a volume while the container runs comes along where that was asked for.
fn mounts_of_the_host_come_along() -> Result<()> {
    same(|docker_with| {
        let mut shown = String::new();
        for propagation in ["rprivate", "rslave"] {
            let folder = folder()?;
            let host = path(folder.path());
            let prepare =
                format!("mount --bind {host} {host} && mount --make-shared {host} && mkdir {host}/in");
            shell(&prepare)?.expect_code(0)?;
            let outcome = seen_later(docker_with, &host, propagation);
            shell(&format!("umount -R {host}"))?.expect_code(0)?;
            shown += &format!("{propagation}: {}\n", outcome?);
        }
        Ok(shown)
    })
}

fn seen_later(docker_with: &Docker, host: &str, propagation: &str) -> Result<String> {
    let volume = format!("type=bind,src={host},dst=/volume,bind-propagation={propagation}");
    let id = docker_with.start(&["--mount", &volume, "busybox", "sleep", "1000"])?;
    let list = || Ok::<_, anyhow::Error>(docker(&["exec", &id, "ls", "/volume/in"])?.text());
    let before = list()?;
    shell(&format!("mount -t tmpfs none {host}/in && touch {host}/in/mounted-later"))?.expect_code(0)?;
    let after = list()?;
    docker(&["rm", "-f", &id])?.expect_code(0)?;
    Ok(format!("'{before}' '{after}'"))
}

/// Two containers of rvm, one of runc and the host.
fn a_volume_is_shared_live() -> Result<()> {
    let folder = folder()?;
    let host = path(folder.path());
    let volume = format!("{host}:/volume");
    let start =
        |runtime| Docker { runtime }.start(&["-v", &volume, "-w", "/volume", "busybox", "sleep", "1000"]);
    let containers = [start("rvm")?, start("rvm")?, start("runc")?];
    let exec = |container: usize, line: &str| {
        let outcome = docker(&["exec", &containers[container], "sh", "-c", line])?;
        Ok::<_, anyhow::Error>(outcome.expect_code(0)?.text())
    };
    let everywhere = |line: &str, expected: &str| -> Result<()> {
        for container in 0..containers.len() {
            let seen = exec(container, line)?;
            ensure!(seen == expected, "container {container} sees {seen:?} instead of {expected:?}: {line}");
        }
        let seen = shell(&format!("cd {host} && {line}"))?.expect_code(0)?.text();
        ensure!(seen == expected, "the host sees {seen:?} instead of {expected:?}: {line}");
        Ok(())
    };
    everywhere("ls", "")?;
    for writer in 0..containers.len() {
        exec(
            writer,
            &format!(
                "echo of-{writer} >file; mkdir -p d; echo {writer} >>d/log; mv file moved; ln -sf moved link"
            ),
        )?;
        let log: Vec<_> = (0..=writer).map(|number| number.to_string()).collect();
        everywhere(
            "cat moved link; ls; cat d/log",
            &format!("of-{writer}\nof-{writer}\nd\nlink\nmoved\n{}", log.join("\n")),
        )?;
        // Of the same length, so that size alone tells nothing.
        exec(writer, &format!("printf OF-{writer} >moved; chmod 640 moved; chown 7:8 moved"))?;
        everywhere("cat moved; stat -c ' %a %u %g %s' moved", &format!("OF-{writer} 640 7 8 4"))?;
        exec(
            writer,
            "rm moved link; truncate -s 3 d/log; truncate -s 6 d/log; truncate -s 2 d/log; rmdir d 2>/dev/null || true",
        )?;
        everywhere("ls; stat -c %s d/log", "d\n2")?;
        shell(&format!("cd {host} && seq 0 {writer} >d/log"))?.expect_code(0)?;
    }
    for id in &containers {
        docker(&["rm", "-f", id])?.expect_code(0)?;
    }
    Ok(())
}

/// A container's program has a file open and mapped while the host changes, moves, cuts and removes it.
fn the_host_changes_what_a_guest_has_open() -> Result<()> {
    same(|docker_with| {
        let folder = folder()?;
        let host = path(folder.path());
        shell(&format!("cd {host} && printf %8192s first >file"))?.expect_code(0)?;
        let volume = format!("{host}:/volume");
        let program = include_str!("volumes/open.py");
        let id = docker_with.start(&["-v", &volume, "-w", "/volume", "debian", "python3", "-uc", program])?;
        let mut shown = String::new();
        for (step, change) in [
            "true",
            "printf %8192s SECOND >new && dd if=new of=file conv=notrunc 2>/dev/null && rm new",
            "printf more >>file",
            "mv file elsewhere && echo another >file",
            "truncate -s 100 elsewhere",
            "truncate -s 9000 elsewhere",
            "rm elsewhere",
            "rm file && mkdir file",
        ]
        .into_iter()
        .enumerate()
        {
            shell(&format!("cd {host} && {change}"))?.expect_code(0)?;
            shell(&format!("touch {host}/step-{step}"))?.expect_code(0)?;
            eventually("the program has looked", || Ok(folder.path().join(format!("seen-{step}")).exists()))
                .with_context(|| docker(&["logs", &id]).map_or(String::new(), |outcome| told(&outcome)))?;
        }
        docker(&["wait", &id])?.expect_text("0")?;
        shown += &told(&docker(&["logs", &id])?);
        docker(&["rm", &id])?.expect_code(0)?;
        Ok(shown)
    })
}

/// What the host does while a container's program knows everything: its caches must not be believed when the host is done.
/// The last one is a store to a mapping, of which nobody hears: it may be seen a little later.
const CHANGES: &[&str] = &[
    "true",
    "chmod 640 file; chown 7 file",
    "printf more >>file",
    "printf FIRST | dd of=file conv=notrunc status=none",
    "truncate -s 3 file",
    "echo replaced >new && mv new file",
    "python3 -c 'import os; os.setxattr(\"file\", \"user.note\", b\"text\")'",
    "ln file ../outside",
    "printf by-another-name >../outside; chmod 600 ../outside",
    "echo there >none",
    "chmod 711 folder; rm folder/inner",
    "echo again >folder/inner; mv folder moved",
    "rm file ../outside; mkdir file; rmdir file; ln -s none file",
    "mv moved folder; touch other; echo single >>../single",
    "chmod 755 ../single; mkdir moved; mv other moved/inner",
    "docker cp other.cp $id:/etc/copied && rm -f other.cp",
    "touch later-16; docker run --rm --runtime runc -v $PWD:/volume -w /volume debian python3 -c 'import mmap; file = open(\"none\", \"r+b\"); \
        memory = mmap.mmap(file.fileno(), 5); file.close(); memory[:5] = b\"THERE\"'",
];

fn the_host_changes_what_a_guest_knows() -> Result<()> {
    same(|docker_with| {
        let folder = folder()?;
        let host = path(folder.path());
        let prepare = "mkdir -p volume/folder && cd volume && echo first >file && echo in >folder/inner && \
                       echo single >../single && echo copied >other.cp";
        shell(&format!("cd {host} && {prepare}"))?.expect_code(0)?;
        let (volume, single) = (format!("{host}/volume:/volume"), format!("{host}/single:/single"));
        let (program, steps) = (include_str!("volumes/known.py"), CHANGES.len().to_string());
        let command =
            ["-v", &volume, "-v", &single, "-w", "/volume", "debian", "python3", "-uc", program, &steps];
        let id = docker_with.start(&command)?;
        for (step, change) in CHANGES.iter().enumerate() {
            let ready = folder.path().join(format!("volume/ready-{step}"));
            eventually("the program knows everything", || Ok(ready.exists()))
                .with_context(|| docker(&["logs", &id]).map_or(String::new(), |outcome| told(&outcome)))?;
            shell(&format!("cd {host}/volume && id={id} && {change} && touch done-{step}"))?
                .expect_code(0)?;
        }
        docker(&["wait", &id])?.expect_text("0")?;
        let shown = told(&docker(&["logs", &id])?);
        ensure!(shown.contains("16 none"), "the program saw too little: {shown}");
        docker(&["rm", &id])?.expect_code(0)?;
        Ok(shown)
    })
}

/// A lock taken in a guest is one among its processes alone, which the list of limits says; with runc the host has it.
fn locks_end_at_the_wall() -> Result<()> {
    let folder = folder()?;
    let host = path(folder.path());
    let volume = format!("{host}:/volume");
    for (runtime, of_others) in [("runc", "taken"), ("rvm", "free")] {
        let hold = "flock /volume/file sh -c 'touch /volume/held; sleep 1000'";
        let id = Docker { runtime }.start(&["-v", &volume, "debian", "sh", "-c", hold])?;
        eventually("it holds the lock", || Ok(folder.path().join("held").exists()))?;
        let try_it = "flock -n /volume/file true && echo free || echo taken";
        docker(&["exec", &id, "sh", "-c", try_it])?.expect_text("taken")?;
        for other in ["runc", "rvm"] {
            let seen = Docker { runtime: other }.run(&["-v", &volume, "debian", "sh", "-c", try_it])?;
            let expected = if other == "rvm" { "free" } else { of_others };
            seen.expect_text(expected).with_context(|| format!("held in {runtime}, tried in {other}"))?;
        }
        docker(&["rm", "-f", &id])?.expect_code(0)?;
        shell(&format!("rm {host}/held"))?.expect_code(0)?;
    }
    Ok(())
}

/// Two containers make the same files and directories at the same time, each of which one of them may have made.
fn one_of_two_makes_a_name() -> Result<()> {
    const NAMES: usize = 150;
    let folder = folder()?;
    let host = path(folder.path());
    let volume = format!("{host}:/volume");
    let program = include_str!("volumes/race.py");
    let start = |name: &str| {
        let command = ["debian", "python3", "-uc", program, name, &NAMES.to_string()];
        Docker { runtime: "rvm" }.start(&[&["-v", &volume, "-w", "/volume"], &command[..]].concat())
    };
    let containers = [start("one")?, start("two")?];
    for name in ["one", "two"] {
        eventually("it is ready", || Ok(folder.path().join(format!("ready-{name}")).exists()))?;
    }
    shell(&format!("touch {host}/go"))?.expect_code(0)?;
    let mut made = 0;
    for id in &containers {
        docker(&["wait", id])?.expect_text("0")?;
        let text = docker(&["logs", id])?.text();
        made += text.trim().parse::<usize>().with_context(|| format!("it says: {text}"))?;
        docker(&["rm", id])?.expect_code(0)?;
    }
    ensure!(made == 2 * NAMES, "{made} of {} were made", 2 * NAMES);
    // Who made a file has written its name into it, and nobody else.
    let count = format!("cat {host}/file-* | grep -cxE 'one|two'");
    shell(&count)?.expect_text(&NAMES.to_string())?;
    Ok(())
}

/// A program may be executed, a lock taken and a disk unmounted, as soon as who had it open has closed it.
fn what_is_closed_is_free() -> Result<()> {
    same(|docker_with| {
        let folder = folder()?;
        let host = path(folder.path());
        shell(&format!("mount -t tmpfs none {host}"))?.expect_code(0)?;
        let volume = format!("{host}:/volume:rslave");
        let id = docker_with.start(&["-v", &volume, "-w", "/volume", "debian", "sleep", "1000"])?;
        let mut shown = String::new();
        for round in 0..5 {
            // The file is there on the host before its writer has ended.
            let copy = "rm -f program done; cp /bin/true program; touch done; sleep 0.2";
            let run = format!("until [ -e {host}/done ]; do :; done; {host}/program && echo ran");
            let both = format!("docker exec {id} sh -c '{copy}' & {run}; wait");
            shown += &format!("{round}: {}\n", told(&shell(&format!("rm -f {host}/done; {both}"))?));
        }
        let lock = "for i in $(seq 50); do flock -n lock true || echo taken; done";
        shown += &told(&docker(&["exec", &id, "sh", "-c", lock])?);
        docker(&["rm", "-f", &id])?.expect_code(0)?;
        shell(&format!("umount {host}"))?.expect_code(0)?;
        Ok(shown)
    })
}

/// What does not fit on a disk is refused when it is written, and what was there stays.
fn a_full_disk_is_told_by_the_write() -> Result<()> {
    same(|docker_with| {
        let folder = folder()?;
        let host = path(folder.path());
        shell(&format!("mount -t tmpfs -o size=256k,nr_inodes=8 none {host}"))?.expect_code(0)?;
        let volume = format!("{host}:/volume");
        let program = include_str!("volumes/full.py");
        let outcome = docker_with.run(&["-v", &volume, "-w", "/volume", "debian", "python3", "-c", program]);
        shell(&format!("umount {host}"))?.expect_code(0)?;
        Ok(told(&outcome?))
    })
}
