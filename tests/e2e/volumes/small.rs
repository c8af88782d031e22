//! Small files that are read again and again, as interpreters and compilers do. Nothing is asked for while nothing changes, and
//! nobody may notice that but by the time that it takes.

use anyhow::{Context, Result, ensure};

use super::{folder, path};
use crate::Story;
use crate::beside_runc::{Docker, same, told};
use crate::command::{docker, docker_start, kvm_figure, rvm, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("what_has_not_changed_is_not_asked_for", what_has_not_changed_is_not_asked_for),
    ("each_change_is_read", each_change_is_read),
    ("access_times_are_left_alone_for_who_asks", access_times_are_left_alone_for_who_asks),
];

/// How many files are read.
const FILES: u64 = 100;
/// How often each of them is read.
const TIMES: u64 = 50;

/// Reads all files so many times, and before that until they are known: with pauses longer than anything is valid for a time.
const READ: &str = "
import os, sys, time
def read():
    for number in range(100):
        os.stat(f'file-{number}')
        with open(f'file-{number}', 'rb') as file:
            assert len(file.read()) == 1000
for _ in range(3):
    read()
    time.sleep(0.1)
for _ in range(int(sys.argv[1])):
    read()
";

fn what_has_not_changed_is_not_asked_for() -> Result<()> {
    let folder = folder()?;
    let host = path(folder.path());
    shell(&format!("cd {host} && for i in $(seq 0 {}); do printf %1000s x >file-$i; done", FILES - 1))?
        .expect_code(0)?;
    let volume = format!("{host}:/volume");
    let options = ["-v", &volume, "-w", "/volume", "debian", "sleep", "1000"];
    rvm(&["template", "create"])?.expect_code(0)?;
    for template in ["on", "off"] {
        let id = docker_start(
            &[&["--annotation", &format!("dev.rvm.template={template}")], &options[..]].concat(),
        )?;
        let asked = ensure_nothing_is_asked_for(&id).with_context(|| format!("with templates {template}"));
        docker(&["rm", "-f", &id])?.expect_code(0)?;
        asked?;
    }
    Ok(())
}

fn ensure_nothing_is_asked_for(id: &str) -> Result<()> {
    let monitor = docker(&["inspect", "-f", "{{.State.Pid}}", id])?.expect_code(0)?.text();
    // How often the machine's vCPUs have rung at a device, which is how a file system is asked.
    let requests = || kvm_figure(&monitor, "mmio_exits").map(i64::cast_unsigned);
    let requests_for = |times: u64| -> Result<u64> {
        let before = requests()?;
        docker(&["exec", id, "python3", "-c", READ, &times.to_string()])?.expect_code(0)?;
        Ok(requests()? - before)
    };
    // The first time the interpreter itself is read, too.
    requests_for(0)?;
    let (none, many) = (requests_for(0)?, requests_for(TIMES)?);
    println!("{none} requests without, {many} with {TIMES} readings of {FILES} files");
    ensure!(many < none + FILES * TIMES / 10, "{none} requests without, {many} with {TIMES} readings");
    Ok(())
}

/// How often the host changes a file.
const CHANGES: usize = 40;

/// Has a file in its caches all the time, and says what is in it as soon as it was told that there is something new. The file is
/// as long as before, and may have been changed twice in a tick of the host's clock, so that its times tell nothing.
const FOLLOW: &str = "
import os, sys
def read():
    os.stat('file')
    with open('file') as file:
        return file.read()
for step in range(int(sys.argv[1])):
    while not os.path.exists(f'changed-{step}'):
        read()
    print(read())
    open(f'seen-{step}', 'w').close()
";

fn each_change_is_read() -> Result<()> {
    same(|docker_with| {
        let folder = folder()?;
        let host = path(folder.path());
        shell(&format!("cd {host} && echo 000 >file"))?.expect_code(0)?;
        let volume = format!("{host}:/volume");
        let steps = CHANGES.to_string();
        let command = ["-v", &volume, "-w", "/volume", "debian", "python3", "-uc", FOLLOW, &steps];
        let id = docker_with.start(&command)?;
        let change = format!(
            "cd {host}; for i in $(seq 0 {}); do for n in 700 800 9$(printf %02d $i); do printf $n 1<>file; done; \
             >changed-$i; until [ -e seen-$i ]; do :; done; done",
            CHANGES - 1
        );
        shell(&change)?.expect_code(0)?;
        docker(&["wait", &id])?.expect_text("0")?;
        let shown = told(&docker(&["logs", &id])?);
        docker(&["rm", &id])?.expect_code(0)?;
        ensure!(shown.contains("939"), "the program saw too little: {shown}");
        Ok(shown)
    })
}

/// Reads a file as programs for backups do, and one as all others do.
const READ_QUIETLY: &str = "
import os
for name, flags in [('quiet', os.O_NOATIME), ('loud', 0)]:
    os.stat(name)
    file = os.open(name, os.O_RDONLY | flags)
    os.read(file, 100)
    os.close(file)
";

fn access_times_are_left_alone_for_who_asks() -> Result<()> {
    same(|docker_with| {
        let folder = folder()?;
        let host = path(folder.path());
        // The host's disk is mounted without access times.
        shell(&format!("mount -t tmpfs -o relatime,mode=755 e2e-tmpfs {host}"))?.expect_code(0)?;
        let shown = times_after_reading(docker_with, &host);
        shell(&format!("umount {host}"))?.expect_code(0)?;
        shown
    })
}

fn times_after_reading(docker_with: &Docker, host: &str) -> Result<String> {
    // Before the last change, so that any reading is noted.
    shell(&format!(
        "cd {host} && for name in quiet loud; do echo x >$name && touch -a -d @1000 $name; done"
    ))?
    .expect_code(0)?;
    let volume = format!("{host}:/volume");
    docker_with
        .run(&["-v", &volume, "-w", "/volume", "debian", "python3", "-c", READ_QUIETLY])?
        .expect_code(0)?;
    let shown = shell(&format!("cd {host} && stat -c '%n %X' quiet loud"))?.expect_code(0)?.text();
    ensure!(shown.contains("quiet 1000") && !shown.contains("loud 1000"), "{shown}");
    Ok(shown.replace(|letter: char| letter.is_ascii_digit(), ""))
}
