//! `docker exec` and `docker attach`: many at once, privileged, in the background, with and without input, under rvm as under
//! runc.

use std::io::{BufRead, BufReader, Write, read_to_string};

use anyhow::{Context, Result, ensure};

use crate::Story;
use crate::beside_runc::{same, told};
use crate::command::{docker, eventually, run_with_input, shell, spawn, wait_for};

pub const STORIES: &[(&str, Story)] = &[
    ("ten_at_once", ten_at_once),
    ("a_privileged_one_has_all_capabilities", a_privileged_one_has_all_capabilities),
    ("one_in_the_background_goes_on", one_in_the_background_goes_on),
    ("input_that_ends_or_never_was", input_that_ends_or_never_was),
    ("output_of_any_size_is_whole_at_the_end", output_of_any_size_is_whole_at_the_end),
    ("attach_follows_and_feeds_the_first_process", attach_follows_and_feeds_the_first_process),
];

fn ten_at_once() -> Result<()> {
    same(|runtime| {
        let id = runtime.start(&["busybox", "sleep", "1000"])?;
        let script = "read word; sleep 1; echo out-$word; echo err-$word >&2; exit $word";
        let line = format!(
            "for i in 1 2 3 4 5 6 7 8 9 10; do (echo $i | docker exec -i {id} sh -c '{script}' 2>&1; \
             echo code $?) & done; wait"
        );
        let seen = shell(&line)?.expect_code(0)?.text();
        let mut lines: Vec<_> = seen.lines().collect();
        lines.sort_unstable();
        docker(&["rm", "-f", &id])?.expect_code(0)?;
        Ok(lines.join("\n"))
    })
}

fn a_privileged_one_has_all_capabilities() -> Result<()> {
    same(|runtime| {
        let id = runtime.start(&["--cap-drop", "ALL", "--user", "7:8", "busybox", "sleep", "1000"])?;
        let look = [
            "grep",
            "-E",
            "^(Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs|Seccomp|Uid|Gid|Groups):",
            "/proc/self/status",
        ];
        let mut seen = told(&docker(&[&["exec", &id], &look[..]].concat())?);
        seen += &told(&docker(&[&["exec", "--privileged", "-u", "0", &id], &look[..]].concat())?);
        seen += &told(&docker(&[&["exec", "-u", "0:5", &id], &look[..]].concat())?);
        docker(&["rm", "-f", &id])?.expect_code(0)?;
        Ok(seen)
    })
}

fn one_in_the_background_goes_on() -> Result<()> {
    same(|runtime| {
        let id = runtime.start(&["busybox", "sleep", "1000"])?;
        let script = "sleep 1; echo $A >/made; exec sleep 999";
        docker(&["exec", "-d", "-e", "A=background", &id, "sh", "-c", script])?.expect_code(0)?;
        eventually("the process has written", || {
            Ok(docker(&["exec", &id, "cat", "/made"])?.text() == "background")
        })?;
        let running = docker(&["exec", &id, "sh", "-c", "ps -o args | grep -c '[s]leep 999'"])?.text();
        docker(&["rm", "-f", &id])?.expect_code(0)?;
        Ok(running)
    })
}

fn input_that_ends_or_never_was() -> Result<()> {
    same(|runtime| {
        let id = runtime.start(&["busybox", "sleep", "1000"])?;
        let count = ["sh", "-c", "wc -c; readlink /proc/self/fd/0 | sed 's/[0-9]*//g'"];
        let with_input = run_with_input("docker", &[&["exec", "-i", &id], &count[..]].concat(), b"12345")?;
        let empty = run_with_input("docker", &[&["exec", "-i", &id], &count[..]].concat(), b"")?;
        let never = run_with_input("docker", &[&["exec", &id], &count[..]].concat(), b"12345")?;
        let closed = shell(&format!("docker exec -i {id} wc -c <&-"))?;
        docker(&["rm", "-f", &id])?.expect_code(0)?;
        Ok(format!("{} {} {} {}", told(&with_input), told(&empty), told(&never), closed.text()))
    })
}

fn output_of_any_size_is_whole_at_the_end() -> Result<()> {
    same(|runtime| {
        let id = runtime.start(&["busybox", "sleep", "1000"])?;
        let mut seen = String::new();
        for size in [1, 65_536, 65_537, 10_000_000] {
            let script = format!("head -c {size} /dev/zero; head -c {size} /dev/zero >&2");
            let outcome = docker(&["exec", &id, "sh", "-c", &script])?;
            seen += &format!("{} {} {}\n", outcome.stdout.len(), outcome.stderr.len(), outcome.code);
        }
        docker(&["rm", "-f", &id])?.expect_code(0)?;
        Ok(seen)
    })
}

fn attach_follows_and_feeds_the_first_process() -> Result<()> {
    same(|runtime| {
        let script = "until test -e /go; do echo tick; sleep 0.1; done; \
                      while read word && test $word != stop; do echo got $word; done; echo end; exit 4";
        let id = runtime.start(&["-i", "busybox", "sh", "-c", script])?;
        let mut watcher = spawn("docker", &["attach", "--no-stdin", &id])?;
        let mut lines = BufReader::new(watcher.stdout.take().context("the watcher has an output")?).lines();
        // From here on it follows.
        ensure!(lines.next().transpose()?.as_deref() == Some("tick"), "the watcher follows nothing");
        docker(&["exec", &id, "touch", "/go"])?.expect_code(0)?;
        // Docker lets go of a client's output when its input ends: it has to stay open.
        let mut feeder = spawn("docker", &["attach", &id])?;
        let mut input = feeder.stdin.take().context("the feeder has an input")?;
        input.write_all(b"one\ntwo\nstop\n")?;
        let fed = read_to_string(feeder.stdout.take().context("the feeder has an output")?)?;
        let code = wait_for(&mut feeder, "docker attach")?.code();
        let watched = lines.collect::<Result<Vec<_>, _>>()?.join("\n");
        let ended = wait_for(&mut watcher, "docker attach")?.code();
        let log = docker(&["logs", &id])?.text();
        docker(&["rm", &id])?.expect_code(0)?;
        let seen = format!("{fed}{code:?}\n{watched}\n{ended:?}\n{log}");
        Ok(seen.lines().filter(|line| *line != "tick").collect::<Vec<_>>().join("\n"))
    })
}
