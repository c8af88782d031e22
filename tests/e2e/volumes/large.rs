//! Large pieces of files. They go past the guest's page cache, and nobody may notice that but by the memory they do not take.

use anyhow::{Context, Result, ensure};

use super::{folder, path};
use crate::Story;
use crate::beside_runc::{Docker, same, told};
use crate::command::{docker, docker_run, eventually, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("pieces_of_all_sizes_are_whole", pieces_of_all_sizes_are_whole),
    ("what_is_read_once_is_cached_once", what_is_read_once_is_cached_once),
];

/// How often the host changes something meanwhile.
const ROUNDS: usize = 4;

fn pieces_of_all_sizes_are_whole() -> Result<()> {
    for seed in ["one", "two"] {
        same(|docker| pieces(docker, seed))?;
    }
    Ok(())
}

/// What a program says that reads and writes by chance, and the host's sum of the file that it leaves.
fn pieces(docker_with: &Docker, seed: &str) -> Result<String> {
    let folder = folder()?;
    let host = path(folder.path());
    let volume = format!("{host}:/volume");
    let rounds = ROUNDS.to_string();
    let program = ["python3", "-c", include_str!("large.py"), seed, &rounds];
    let id = docker_with.start(&[&["-v", &volume, "-w", "/volume", "debian"], &program[..]].concat())?;
    let logs = || docker(&["logs", &id]).map_or(String::new(), |outcome| told(&outcome));
    for round in 0..ROUNDS {
        eventually("the program has written", || {
            let over = docker(&["inspect", "-f", "{{.State.Running}}", &id])?.text() == "false";
            ensure!(!over, "it has ended:\n{}", logs());
            Ok(folder.path().join(format!("wrote-{round}")).exists())
        })
        .with_context(logs)?;
        let change = "printf 'the host was here' | dd of=file bs=1 seek=1048581 conv=notrunc status=none";
        shell(&format!("cd {host} && {change} && touch changed-{round}"))?.expect_code(0)?;
    }
    docker(&["wait", &id])?.expect_text("0").with_context(logs)?;
    let shown = format!("{}\n{}", logs(), shell(&format!("sha256sum <{host}/file"))?.expect_code(0)?.text());
    docker(&["rm", &id])?.expect_code(0)?;
    Ok(shown)
}

/// How much more is cached by the guest after a file was written, read, and read again, in KiB.
const CACHED: &str = r#"
    cached() { awk '/^Cached:/ { print $2 }' /proc/meminfo; }
    before=$(cached)
    dd if=/dev/zero of=file bs=1M count=64 status=none; echo $(($(cached) - before))
    dd if=file of=/dev/null bs=1M status=none; echo $(($(cached) - before))
    dd if=file of=/dev/null bs=1M status=none; echo $(($(cached) - before))
"#;

fn what_is_read_once_is_cached_once() -> Result<()> {
    let folder = folder()?;
    let volume = format!("{}:/volume", path(folder.path()));
    let command = ["-v", &volume, "-w", "/volume", "debian", "sh", "-c", CACHED];
    let shown = docker_run(&command)?.expect_code(0)?.text();
    let grown: Vec<i64> = shown.lines().map(str::parse).collect::<Result<_, _>>()?;
    let [written, read, again] = grown[..] else { anyhow::bail!("it said {shown}") };
    ensure!(written < 8 << 10, "a guest caches {written} KiB of 64 MiB that it has written");
    ensure!(read < 8 << 10, "a guest caches {read} KiB of 64 MiB that it has read once");
    ensure!(again > 56 << 10, "a guest caches only {again} KiB of 64 MiB that it has read again");
    Ok(())
}
