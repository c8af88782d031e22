//! Guests that misuse their network: they harm no neighbour and not the host.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::process::Child;
use std::thread;

use anyhow::{Context, Result, ensure};

use super::{Programs, RUNC, RVM, address, ensure_answers_in, ensure_tcp_answers, gateway};
use crate::Story;
use crate::command::{docker, eventually, shell, spawn};

pub const STORIES: &[(&str, Story)] = &[
    ("garbage_floods_and_full_tables_harm_nobody", garbage_floods_and_full_tables_harm_nobody),
    ("a_thousand_connections_are_dropped", a_thousand_connections_are_dropped),
];

/// A container that misuses the network, and one of each runtime that it could harm.
struct Street {
    programs: Programs,
    culprit: String,
    /// Where the neighbours answer.
    places: [String; 2],
}

impl Street {
    fn new() -> Result<Street> {
        let programs = Programs::new()?;
        let volume = programs.volume();
        let culprit = RVM.start(&["--privileged", "-v", &volume, "debian", "sleep", "1000"])?;
        let neighbour = programs.start_echo(&RVM, &[], &["7"])?;
        let plain = programs.start_echo(&RUNC, &[], &["7"])?;
        let places = [format!("{}:7", address(&neighbour)?), format!("{}:7", address(&plain)?)];
        Ok(Street { programs, culprit, places })
    }

    fn ensure_neighbours_answer(&self) -> Result<()> {
        self.places.iter().try_for_each(|place| ensure_tcp_answers(place))
    }

    /// Fails unless the neighbours answer all the while that the culprit runs a program, which prints how much of
    /// its misuse came about, and everybody afterwards.
    fn ensure_nobody_is_harmed_by(&self, program: &[&str], least: usize) -> Result<()> {
        let exec = ["exec", &self.culprit, "python3"];
        let mut misuse = spawn("docker", &[&exec[..], program].concat())?;
        while misuse.try_wait()?.is_none() {
            self.ensure_neighbours_answer().with_context(|| format!("during {program:?}"))?;
        }
        let count: usize = printed(misuse)?.parse()?;
        ensure!(count >= least, "{program:?} came only to {count}");
        self.ensure_neighbours_answer().with_context(|| format!("after {program:?}"))?;
        for place in &self.places {
            let host = place.trim_end_matches(":7");
            ensure_answers_in(&self.culprit, "tcp", host, "7")
                .with_context(|| format!("to the culprit of {program:?}"))?;
        }
        Ok(())
    }

    fn ensure_who_comes_late_is_reached(&self) -> Result<()> {
        let late = self.programs.start_echo(&RVM, &[], &["7"])?;
        ensure_tcp_answers(&format!("{}:7", address(&late)?))
    }
}

fn printed(program: Child) -> Result<String> {
    let output = program.wait_with_output()?;
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "the program failed: {errors}");
    Ok(text.trim_end().to_owned())
}

fn garbage_floods_and_full_tables_harm_nobody() -> Result<()> {
    let street = Street::new()?;
    let bridge = shell("cat /sys/class/net/docker0/address")?.expect_code(0)?.text();
    street.ensure_nobody_is_harmed_by(&["/story/garbage.py", &bridge, "1000"], 300)?;

    let neighbour = street.places[0].trim_end_matches(":7");
    street.ensure_nobody_is_harmed_by(&["/story/flood.py", neighbour, "5"], 300)?;

    // Beyond 512 the kernel clears such a table up, and at 1024 it takes no more.
    let outcome = street.ensure_nobody_is_harmed_by(&["/story/neighbours.py", &gateway()?, "1500"], 500);
    let late = street.ensure_who_comes_late_is_reached();
    shell("ip neighbour flush dev docker0")?.expect_code(0)?;
    outcome.and(late)
}

const CONNECTIONS: usize = 1000;

fn a_thousand_connections_are_dropped() -> Result<()> {
    let programs = Programs::new()?;
    let server = programs.start_echo(&RVM, &[], &["7"])?;
    let place = format!("{}:7", address(&server)?);
    for number in 0..CONNECTIONS {
        let mut peer = TcpStream::connect(&place)?;
        if number % 2 == 1 {
            // The answer to this comes too late, and is refused.
            peer.write_all(b"hello\n")?;
        }
    }
    ensure_tcp_answers(&place)?;

    // And the other way round.
    let listener = TcpListener::bind("0.0.0.0:18080")?;
    let accept = thread::spawn(move || listener.incoming().take(CONNECTIONS).filter(Result::is_ok).count());
    let gateway = gateway()?;
    let count = CONNECTIONS.to_string();
    docker(&["exec", &server, "python3", "/story/connect.py", &gateway, "18080", &count])?
        .expect_text(&format!("dropped {CONNECTIONS}"))?;
    let accepted = accept.join().map_err(|_| anyhow::anyhow!("the listener has failed"))?;
    ensure!(accepted == CONNECTIONS, "only {accepted} arrived");

    // Neither end keeps one: states 01 (established) and 08 (the other side has closed).
    let kept = "cat /proc/net/tcp /proc/net/tcp6 | awk '$4 == \"01\" || $4 == \"08\"' | wc -l";
    eventually("the guest keeps no connection", || {
        Ok(docker(&["exec", &server, "sh", "-c", kept])?.expect_code(0)?.text() == "0")
    })?;
    ensure_tcp_answers(&place)
}
