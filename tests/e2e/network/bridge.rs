//! The default bridge: a container reaches its neighbours, and is reached where its ports are published.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::address;
use crate::Story;
use crate::command::{docker, docker_run, docker_start, eventually, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("the_gateway_answers_ping", the_gateway_answers_ping),
    ("containers_of_both_runtimes_reach_each_other", containers_of_both_runtimes_reach_each_other),
    ("a_published_port_is_reached_from_the_host", a_published_port_is_reached_from_the_host),
    ("no_network_is_loopback_only", no_network_is_loopback_only),
    ("the_guest_has_the_address_that_docker_shows", the_guest_has_the_address_that_docker_shows),
    ("what_the_network_is_limited_to_holds", what_the_network_is_limited_to_holds),
];

const PING: &str = "ping -c 2 -W 20";

fn the_gateway_answers_ping() -> Result<()> {
    let line = format!("{PING} $(ip route | awk '/default/ {{print $3}}')");
    let shown = docker_run(&["busybox", "sh", "-c", &line])?.expect_code(0)?.text();
    ensure!(shown.contains("2 packets received"), "{shown}");
    Ok(())
}

fn containers_of_both_runtimes_reach_each_other() -> Result<()> {
    let micro_vm = docker_start(&["busybox", "sleep", "1000"])?;
    let plain = docker(&["run", "-d", "--runtime=runc", "busybox", "sleep", "1000"])?.expect_code(0)?.text();
    let (to_vm, to_plain) = (address(&micro_vm)?, address(&plain)?);
    docker_run(&["busybox", "sh", "-c", &format!("{PING} {to_vm} && {PING} {to_plain}")])?.expect_code(0)?;
    docker(&["exec", &plain, "sh", "-c", &format!("{PING} {to_vm}")])?.expect_code(0)?;
    docker(&["exec", &micro_vm, "sh", "-c", &format!("{PING} {to_plain}")])?.expect_code(0).map(drop)
}

fn a_published_port_is_reached_from_the_host() -> Result<()> {
    let serve = "mkdir /www; echo welcome > /www/index.html; exec httpd -f -p 80 -h /www";
    let id = docker_start(&["-p", "18080:80", "busybox", "sh", "-c", serve])?;
    eventually("the server answers", || {
        Ok(shell("curl -s -m 20 http://127.0.0.1:18080/")?.text() == "welcome")
    })?;
    let direct = format!("curl -s -m 20 http://{}/", address(&id)?);
    shell(&direct)?.expect_text("welcome")
}

fn no_network_is_loopback_only() -> Result<()> {
    docker_run(&["--network", "none", "busybox", "ls", "/sys/class/net"])?.expect_text("lo")?;
    docker_run(&["--network", "none", "busybox", "ping", "-c", "1", "127.0.0.1"])?.expect_code(0).map(drop)
}

fn the_guest_has_the_address_that_docker_shows() -> Result<()> {
    let id = docker_start(&["busybox", "sleep", "1000"])?;
    let shown = docker(&["exec", &id, "ip", "addr", "show", "eth0"])?.expect_code(0)?.text();
    let ip = address(&id)?;
    let mac = docker(&["inspect", "-f", "{{.NetworkSettings.MacAddress}}", &id])?.text();
    ensure!(shown.contains(&format!("inet {ip}/")) && shown.contains(&mac), "{ip} {mac} is not in: {shown}");
    Ok(())
}

/// Three megabytes at eight megabits a second take three seconds, however fast the machine is.
fn what_the_network_is_limited_to_holds() -> Result<()> {
    let limits =
        ["--annotation", "dev.rvm.network.send-rate=8M", "--annotation", "dev.rvm.network.receive-rate=8M"];
    let serve = "nc -ll -p 1 -e head -c 3000000 /dev/zero & nc -ll -p 2 -e sh -c 'head -c 3000000 | wc -c'";
    let id = docker_start(&[&limits[..], &["busybox", "sh", "-c", serve]].concat())?;
    let address = address(&id)?;
    eventually("it listens", || Ok(docker(&["exec", &id, "netstat", "-ltn"])?.text().contains(":::2 ")))?;
    for line in [
        format!("busybox nc {address} 1 </dev/null | wc -c"),
        format!("head -c 3000000 /dev/zero | busybox nc {address} 2"),
    ] {
        let start = Instant::now();
        shell(&line)?.expect_text("3000000")?;
        ensure!(start.elapsed() > Duration::from_millis(2500), "{line}: {:?}", start.elapsed());
    }
    let refused = docker_run(&["--annotation", "dev.rvm.network.send-rate=fast", "busybox", "true"])?;
    refused.expect_failure(&["dev.rvm.network.send-rate", "`fast` is not a rate"]).map(drop)
}
