//! Networks of one's own: what a container on them has, and whom it reaches.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Network, RUNC, RVM};
use crate::Story;
use crate::beside_runc::{same, told};
use crate::command::{docker, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("interfaces_are_as_the_engine_was_told", interfaces_are_as_the_engine_was_told),
    ("name_servers_and_hosts_are_as_the_engine_was_told", name_servers_and_hosts_are_as_the_engine_was_told),
    ("neighbours_of_both_runtimes_reach_each_other", neighbours_of_both_runtimes_reach_each_other),
    ("networks_without_a_bridge", networks_without_a_bridge),
    ("a_network_without_a_way_out", a_network_without_a_way_out),
];

/// Prints the interfaces and the routes, once no address is being looked for elsewhere any more. Of an interface the kernel's
/// own number is left out.
const LOOK: &str = "while ip -o address | grep -q tentative; do sleep 0.2; done; \
                    cd /sys/class/net; for i in eth*; do echo $i; cat $i/address $i/mtu; \
                    ip -o address show dev $i | awk '{print $3, $4, $5, $6, $7, $8}'; done; \
                    ip route | sort; ip -6 route | grep -E 'fd00|default' | sort; cat /etc/hosts /etc/resolv.conf";

/// Several networks from the start, each with addresses, a hardware address and an MTU that somebody chose.
fn interfaces_are_as_the_engine_was_told() -> Result<()> {
    let dual = ["--subnet", "10.77.0.0/24", "--ipv6", "--subnet", "fd00:77::/64"];
    let _first =
        Network::create("e2e-first", &[&dual[..], &["-o", "com.docker.network.driver.mtu=1400"]].concat())?;
    let _second = Network::create(
        "e2e-second",
        &["--subnet", "10.78.0.0/24", "-o", "com.docker.network.driver.mtu=9000"],
    )?;
    same(|engine| {
        let place = ["--ip", "10.77.0.9", "--ip6", "fd00:77::9", "--mac-address", "02:42:0a:4d:00:63"];
        let names = ["--hostname", "kitchen", "--add-host", "pantry:10.9.9.9", "--dns", "10.77.0.53"];
        let create = ["create", "--runtime", engine.runtime, "--network", "e2e-first"];
        let id = docker(&[&create[..], &place, &names, &["busybox", "sh", "-c", LOOK]].concat())?;
        let id = id.expect_code(0)?.text();
        docker(&["network", "connect", "--ip", "10.78.0.9", "e2e-second", &id])?.expect_code(0)?;
        let shown = told(&docker(&["start", "-a", &id])?.expect_code(0)?);
        docker(&["rm", &id])?.expect_code(0)?;
        Ok(shown)
    })
}

fn name_servers_and_hosts_are_as_the_engine_was_told() -> Result<()> {
    let servers = ["--dns", "192.0.2.53", "--dns", "2001:db8::53", "--dns-search", "kitchen.example"];
    let options =
        ["--dns-option", "ndots:3", "--add-host", "pantry:192.0.2.9", "--add-host", "up:host-gateway"];
    let look = ["busybox", "sh", "-c", "cat /etc/resolv.conf; grep -E 'pantry|up|localhost' /etc/hosts"];
    same(|engine| Ok(told(&engine.run(&[&servers[..], &options, &look].concat())?)))
}

/// Serves a megabyte, more than fits into the buffers of any device on the way, and different in each container.
const SERVE: &str = "mkdir /www; (hostname; seq 150000) >/www/data; exec httpd -f -p 80 -h /www";

/// Waits until it serves, and prints the checksum of what it serves.
const SUM: &str =
    "until wget -q -O - http://127.0.0.1/data >/dev/null; do sleep 0.1; done; md5sum </www/data";

fn neighbours_of_both_runtimes_reach_each_other() -> Result<()> {
    let dual = ["--subnet", "10.77.0.0/24", "--ipv6", "--subnet", "fd00:77::/64"];
    let large = ["-o", "com.docker.network.driver.mtu=9000"];
    let _network = Network::create("e2e-own", &[&dual[..], &large].concat())?;
    let options = ["--network", "e2e-own", "busybox", "sh", "-c", SERVE];
    let (one, other, plain) = (RVM.start(&options)?, RVM.start(&options)?, RUNC.start(&options)?);
    for id in [&one, &other, &plain] {
        let places = places(id)?;
        ensure_has(id, &places)?;
        let sum = docker(&["exec", id, "sh", "-c", SUM])?.expect_code(0)?.text();
        let clients = [&one, &other, &plain].into_iter().filter(|client| *client != id);
        for (client, place) in clients.flat_map(|client| places.iter().map(move |place| (client, place))) {
            let fetch = format!("wget -q -O - http://{}/data | md5sum", literal(*place));
            docker(&["exec", client, "sh", "-c", &fetch])?
                .expect_text(&sum)
                .with_context(|| format!("{client} asks {id} at {place}"))?;
        }
        let place = literal(places[0]);
        shell(&format!("curl -s -m 60 http://{place}/data | md5sum"))?.expect_text(&sum)?;
    }
    Ok(())
}

/// The addresses that the network shows for a container.
fn places(id: &str) -> Result<Vec<IpAddr>> {
    let shown = docker(&["network", "inspect", "e2e-own", "-f", "{{json .Containers}}"])?.expect_code(0)?;
    let shown: Value = serde_json::from_str(&shown.text())?;
    ["IPv4Address", "IPv6Address"]
        .iter()
        .map(|field| {
            let text = shown[id][field].as_str().unwrap_or_default();
            let address = text.split('/').next().unwrap_or_default();
            address.parse().with_context(|| format!("the network shows {shown} for {id}"))
        })
        .collect()
}

fn ensure_has(id: &str, places: &[IpAddr]) -> Result<()> {
    let has = docker(&["exec", id, "ip", "address", "show", "eth0"])?.expect_code(0)?.text();
    for place in places {
        ensure!(has.contains(&format!("{place}/")), "{place} is not in: {has}");
    }
    Ok(())
}

/// An address as the host of a URL.
fn literal(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

/// The drivers' own ways between containers: other devices than a cable to a bridge.
fn networks_without_a_bridge() -> Result<()> {
    for driver in ["macvlan", "ipvlan"] {
        let _network =
            Network::create("e2e-driver", &["-d", driver, "--internal", "--subnet", "10.83.0.0/24"])?;
        let at = |ip| ["--network", "e2e-driver", "--ip", ip, "busybox", "sh", "-c", SERVE];
        let (one, plain) = (RVM.start(&at("10.83.0.8"))?, RUNC.start(&at("10.83.0.9"))?);
        for (client, server, ip) in [(&one, &plain, "10.83.0.9"), (&plain, &one, "10.83.0.8")] {
            let sum = docker(&["exec", server, "sh", "-c", SUM])?.expect_code(0)?.text();
            let fetch = format!("wget -q -O - http://{ip}/data | md5sum");
            docker(&["exec", client, "sh", "-c", &fetch])?.expect_text(&sum).context(driver)?;
        }
    }
    Ok(())
}

fn a_network_without_a_way_out() -> Result<()> {
    let _network = Network::create("e2e-internal", &["--internal", "--subnet", "10.79.0.0/24"])?;
    let neighbour =
        RVM.start(&["--network", "e2e-internal", "--ip", "10.79.0.7", "busybox", "sleep", "1000"])?;
    let look = "ip route; ping -c 1 -w 60 10.79.0.7 | grep -c ' 0% packet loss'; ping -c 1 -W 1 192.0.2.1 2>&1 | tail -n 1";
    let options = ["--network", "e2e-internal", "--ip", "10.79.0.9", "busybox", "sh", "-c", look];
    same(|engine| Ok(told(&engine.run(&options)?)))?;
    docker(&["exec", &neighbour, "ip", "route"])?
        .expect_text("10.79.0.0/24 dev eth0 scope link  src 10.79.0.7 ")
}
