//! Standard input, output and error go through unchanged, whole and apart.

use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use sha2::{Digest, Sha256};

use crate::Story;
use crate::command::{self, docker, docker_run, docker_start, run_with_input};

pub const STORIES: &[(&str, Story)] = &[
    ("input_comes_back_from_cat", input_comes_back_from_cat),
    ("fifty_megabytes_arrive_unchanged", fifty_megabytes_arrive_unchanged),
    ("output_and_error_stay_apart", output_and_error_stay_apart),
    ("the_last_bytes_before_the_end_are_not_lost", the_last_bytes_before_the_end_are_not_lost),
    ("exec_has_streams_of_its_own", exec_has_streams_of_its_own),
    ("closed_input_is_seen_as_the_end", closed_input_is_seen_as_the_end),
    ("a_reader_that_goes_away_ends_the_writer", a_reader_that_goes_away_ends_the_writer),
];

const RUN: &[&str] = &["run", "--rm", "-i", "--runtime=rvm", "busybox"];

fn input_comes_back_from_cat() -> Result<()> {
    run_with_input("docker", &[RUN, &["cat"]].concat(), b"x\n")?.expect_text("x")
}

fn fifty_megabytes_arrive_unchanged() -> Result<()> {
    let data = noise(50 << 20);
    let outcome = run_with_input("docker", &[RUN, &["cat"]].concat(), &data)?.expect_code(0)?;
    ensure!(outcome.stdout.len() == data.len(), "{} bytes of {} came back", outcome.stdout.len(), data.len());
    ensure!(Sha256::digest(&outcome.stdout) == Sha256::digest(&data), "the bytes changed on their way");
    Ok(())
}

fn output_and_error_stay_apart() -> Result<()> {
    let outcome = docker_run(&["busybox", "sh", "-c", "echo to-out; echo to-err >&2"])?.expect_code(0)?;
    ensure!(outcome.text() == "to-out", "standard output: {:?}", outcome.text());
    ensure!(outcome.error_text() == "to-err\n", "standard error: {:?}", outcome.error_text());
    Ok(())
}

fn the_last_bytes_before_the_end_are_not_lost() -> Result<()> {
    let outcome =
        docker_run(&["busybox", "sh", "-c", "head -c 3000000 /dev/zero; exit 5"])?.expect_code(5)?;
    ensure!(outcome.stdout.len() == 3_000_000, "{} bytes arrived", outcome.stdout.len());
    Ok(())
}

fn exec_has_streams_of_its_own() -> Result<()> {
    let id = docker_start(&["busybox", "sleep", "1000"])?;
    let data = noise(1 << 20);
    let outcome = run_with_input("docker", &["exec", "-i", &id, "cat"], &data)?.expect_code(0)?;
    ensure!(outcome.stdout == data, "exec changed its input: {} bytes came back", outcome.stdout.len());
    let outcome = docker(&["exec", &id, "sh", "-c", "echo out; echo err >&2; exit 4"])?.expect_code(4)?;
    ensure!(outcome.text() == "out" && outcome.error_text() == "err\n", "{outcome:?}");
    let outcome = docker(&["exec", &id, "head", "-c", "2000000", "/dev/zero"])?.expect_code(0)?;
    ensure!(outcome.stdout.len() == 2_000_000, "{} bytes arrived", outcome.stdout.len());
    Ok(())
}

fn closed_input_is_seen_as_the_end() -> Result<()> {
    docker_run(&["busybox", "sh", "-c", "cat; echo ended"])?.expect_text("ended")?;
    let mut closed = Command::new("docker");
    closed.args(["run", "--rm", "-i", "--runtime=rvm", "busybox", "sh", "-c", "cat; echo ended"]);
    closed.stdin(Stdio::null());
    command::finish_as_it_is(closed)?.expect_text("ended")?;
    // Without -i the input is the null device, as with any runtime: programs look at its kind.
    docker_run(&["busybox", "sh", "-c", "readlink /proc/self/fd/0"])?.expect_text("/dev/null")
}

fn a_reader_that_goes_away_ends_the_writer() -> Result<()> {
    let outcome = command::shell("rvm do -- sh -c 'while :; do echo line || exit 7; done' | head -n 1")?;
    outcome.expect_text("line")
}

/// Bytes without a pattern that a cut or a repetition could hide in (xorshift).
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
