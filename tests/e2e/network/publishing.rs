//! Published ports: from the host, from other containers, and from the container itself.

use std::net::TcpStream;

use anyhow::{Result, ensure};

use super::{
    Network, Programs, RUNC, RVM, ensure_answers_in, ensure_tcp_answers, ensure_udp_answers, gateway,
};
use crate::Story;
use crate::beside_runc::Docker;
use crate::command::docker;

pub const STORIES: &[(&str, Story)] = &[
    ("published_ports_are_reached_from_everywhere", published_ports_are_reached_from_everywhere),
    ("published_ports_of_both_families", published_ports_of_both_families),
];

fn published_ports_are_reached_from_everywhere() -> Result<()> {
    // That runc passes shows that the story asks for no more than the engine promises.
    [RUNC, RVM].iter().try_for_each(all_ports)
}

fn all_ports(engine: &Docker) -> Result<()> {
    let programs = Programs::new()?;
    let published = [
        ["-p", "18081:7"],
        ["-p", "18081:7/udp"],
        ["-p", "18090-18092:8-10"],
        ["-p", "127.0.0.2:18083:7"],
        ["-p", "[::1]:18084:7"],
    ];
    let server = programs.start_echo(engine, published.as_flattened(), &["7", "8", "9", "10"])?;
    for place in ["127.0.0.1:18081", "[::1]:18081", "127.0.0.1:18090", "127.0.0.1:18091", "127.0.0.1:18092"] {
        ensure_tcp_answers(place)?;
    }
    ensure_tcp_answers("127.0.0.2:18083")?;
    ensure_tcp_answers("[::1]:18084")?;
    ensure_udp_answers("127.0.0.1:18081")?;
    for place in ["127.0.0.1:18083", "127.0.0.1:18084", "127.0.0.1:18093"] {
        ensure!(TcpStream::connect(place).is_err(), "{place} is open");
    }

    let gateway = gateway()?;
    ensure_tcp_answers(&format!("{gateway}:18081"))?;
    let other = RVM.start(&["-v", &programs.volume(), "debian", "sleep", "1000"])?;
    for container in [&other, &server] {
        for (kind, port) in [("tcp", "18081"), ("udp", "18081"), ("tcp", "18091")] {
            ensure_answers_in(container, kind, &gateway, port)?;
        }
    }
    docker(&["rm", "-f", &other, &server])?.expect_code(0).map(drop)
}

fn published_ports_of_both_families() -> Result<()> {
    let programs = Programs::new()?;
    let dual = ["--subnet", "10.77.0.0/24", "--ipv6", "--subnet", "fd00:77::/64"];
    let _network = Network::create("e2e-dual", &dual)?;
    let place = ["--network", "e2e-dual", "--ip", "10.77.0.9", "--ip6", "fd00:77::9"];
    let published = ["-p", "18085:7", "-p", "18085:7/udp"];
    let server = programs.start_echo(&RVM, &[&place[..], &published].concat(), &["7"])?;
    for place in ["127.0.0.1:18085", "[::1]:18085", "[fd00:77::9]:7", "10.77.0.9:7", "[fd00:77::1]:18085"] {
        ensure_tcp_answers(place)?;
        ensure_udp_answers(place)?;
    }
    for kind in ["tcp", "udp"] {
        ensure_answers_in(&server, kind, "10.77.0.1", "18085")?;
        ensure_answers_in(&server, kind, "fd00:77::1", "18085")?;
    }
    Ok(())
}
