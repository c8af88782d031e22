//! Names on Docker's networks: dockerd answers them at 127.0.0.11 in the container's namespace, and so in the guest.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::Story;
use crate::command::{docker, docker_start, eventually, shell};
use crate::daemon::{Daemon, Setup};

use super::{Network, address};

pub const STORIES: &[(&str, Story)] = &[
    ("containers_of_both_runtimes_know_each_other", containers_of_both_runtimes_know_each_other),
    ("a_name_server_of_the_containers_own_has_port_53", a_name_server_of_the_containers_own_has_port_53),
    ("names_outlive_the_daemon", names_outlive_the_daemon),
    ("names_of_the_outside_are_asked_for_by_the_daemon", names_of_the_outside_are_asked_for_by_the_daemon),
    ("who_floods_it_harms_nobody_else", who_floods_it_harms_nobody_else),
];

/// One query, as a program over TCP sends it: the name "plain", its address (RFC 1035, section 4.1).
const TCP_QUERY: &str =
    r"printf '\000\027\022\064\001\000\000\001\000\000\000\000\000\000\005plain\000\000\001\000\001'";

fn containers_of_both_runtimes_know_each_other() -> Result<()> {
    let _network = Network::create("e2e-names", &[])?;
    let on_it = ["--network", "e2e-names"];
    docker(
        &[
            &["run", "-d", "--runtime=runc", "--name", "plain", "--network-alias", "shop"],
            &on_it[..],
            &["busybox", "sleep", "1000"],
        ]
        .concat(),
    )?
    .expect_code(0)?;
    docker_start(
        &[&["--name", "first", "--network-alias", "cart"], &on_it[..], &["busybox", "sleep", "1000"]]
            .concat(),
    )?;
    docker_start(&[&["--name", "second"], &on_it[..], &["busybox", "sleep", "1000"]].concat())?;
    for (from, to) in
        [("first", "plain"), ("first", "shop"), ("plain", "cart"), ("second", "cart"), ("first", "first")]
    {
        let shown = docker(&["exec", from, "ping", "-c", "1", "-W", "20", to])?.expect_code(0)?.text();
        ensure!(shown.contains("1 packets received"), "{from} to {to}: {shown}");
    }
    let address = address("plain")?;
    for of in ["first", "plain"] {
        let answer = docker(&["exec", of, "nslookup", "plain"])?.expect_code(0)?.text();
        ensure!(answer.contains("Server:\t\t127.0.0.11") && answer.contains(&address), "{of}: {answer}");
        let back = docker(&["exec", of, "nslookup", &address])?.expect_code(0)?.text();
        ensure!(back.contains("plain.e2e-names"), "{of}: {back}");
        // The address is the end of the answer.
        let line = format!("{TCP_QUERY} | nc -w 10 127.0.0.11 53 | tail -c 4 | od -An -tu1 | tr -s ' ' .");
        let over_tcp = docker(&["exec", of, "sh", "-c", &line])?.expect_code(0)?.text();
        ensure!(over_tcp.trim_matches('.') == address, "{of}: {over_tcp} is not {address}");
        docker(&["exec", of, "nslookup", "nobody"])?.expect_code(1)?;
    }
    Ok(())
}

fn a_name_server_of_the_containers_own_has_port_53() -> Result<()> {
    let _network = Network::create("e2e-names", &[])?;
    let script = "nc -l -p 53 -e echo mine & until nc 127.0.0.1 53 2>/dev/null; do sleep 0.1; done; \
                  nslookup dns | grep -c 'Name:.dns'";
    docker(&[
        "run",
        "--rm",
        "--runtime=rvm",
        "--network",
        "e2e-names",
        "--name",
        "dns",
        "busybox",
        "sh",
        "-c",
        script,
    ])?
    .expect_text("mine\n1")
}

/// dockerd listens at another port when it has been started anew; the containers have gone on meanwhile.
fn names_outlive_the_daemon() -> Result<()> {
    shell("ip netns add e2e-names")?.expect_code(0)?;
    let setup = Setup {
        options: &["--live-restore"],
        bridge: true,
        namespace: Some("/run/netns/e2e-names"),
        ..Setup::default()
    };
    let outcome = Daemon::start(&setup).and_then(|mut daemon| {
        daemon.docker(&["network", "create", "app"])?.expect_code(0)?;
        for (runtime, name) in [("rvm", "first"), ("runc", "plain")] {
            let words = [
                "run",
                "-d",
                "--runtime",
                runtime,
                "--network",
                "app",
                "--name",
                name,
                "busybox",
                "sleep",
                "1000",
            ];
            daemon.docker(&words)?.expect_code(0)?;
        }
        let lookup = "nslookup plain | grep -A1 'Name:.*plain'";
        let address = daemon.docker(&["exec", "first", "sh", "-c", lookup])?.expect_code(0)?.text();
        daemon.restart(&setup)?;
        daemon.docker(&["exec", "first", "sh", "-c", lookup])?.expect_text(&address)
    });
    shell("ip netns del e2e-names")?.expect_code(0)?;
    outcome
}

/// A name server that knows one address for everything.
const SERVER: &str = r"
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('', 53))
while True:
    q, who = s.recvfrom(512)
    end = q.index(0, 12) + 5
    s.sendto(q[:2] + b'\x81\x80\0\1\0\1\0\0\0\0' + q[12:end] + b'\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xcb\0\x71\x07', who)
";

/// This dockerd asks the servers of `--dns` from the container's own namespace: the answers must not go to the guest.
/// Answers one request, once it has been read to its empty line: who closes a connection with something unread resets it.
const ANSWER: &str =
    r#"while read -r line && [ ${#line} -gt 1 ]; do :; done; printf 'HTTP/1.0 200 OK\r\n\r\nwelcome'"#;

fn names_of_the_outside_are_asked_for_by_the_daemon() -> Result<()> {
    let _network = Network::create("e2e-names", &[])?;
    let server = ["run", "-d", "--runtime=runc", "--network", "e2e-names", "--name", "server", "debian"];
    docker(&[&server[..], &["python3", "-c", SERVER]].concat())?.expect_code(0)?;
    let address = address("server")?;
    docker_start(&[
        "--name",
        "first",
        "--network",
        "e2e-names",
        "--dns",
        &address,
        "busybox",
        "sleep",
        "1000",
    ])?;
    eventually("the name is found", || {
        let answer = docker(&["exec", "first", "nslookup", "-type=a", "shop.example"])?;
        Ok(answer.code == 0 && answer.text().contains("203.0.113.7"))
    })?;
    let program =
        "nslookup -type=a shop.example && nslookup -type=a server && wget -q -O- -T 20 http://first:8000/";
    docker(&["exec", "-d", "first", "nc", "-ll", "-p", "8000", "-e", "sh", "-c", ANSWER])?.expect_code(0)?;
    let shown = docker(&["exec", "first", "sh", "-c", program])?.expect_code(0)?.text();
    ensure!(shown.contains("203.0.113.7") && shown.contains(&address), "{shown}");
    Ok(())
}

/// Garbage and queries without end from one container, for as long as another looks names up.
fn who_floods_it_harms_nobody_else() -> Result<()> {
    let _network = Network::create("e2e-names", &[])?;
    let flood = r"
import os, socket
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.connect(('127.0.0.11', 53))
held = []
n = 0
while True:
    n += 1
    for m in (os.urandom(40), os.urandom(2) + b'\1\0\0\1\0\0\0\0\0\0\4name\7example\0\0\1\0\1', b'', b'\0' * 9000):
        try: u.send(m)
        except OSError: pass
    if n % 50 == 0:
        t = socket.create_connection(('127.0.0.11', 53)); t.send(os.urandom(3000)); held.append(t); held = held[-100:]
";
    docker_start(&["--name", "wild", "--network", "e2e-names", "debian", "python3", "-c", flood])?;
    docker_start(&["--name", "quiet", "--network", "e2e-names", "busybox", "sleep", "1000"])?;
    for _ in 0..5 {
        docker(&["exec", "quiet", "nslookup", "wild"])?.expect_code(0)?;
        thread::sleep(Duration::from_secs(1));
    }
    docker(&["inspect", "-f", "{{.State.Running}}", "wild"])?.expect_text("true")
}
