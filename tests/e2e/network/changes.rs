//! Interfaces that come, change and go: between `create` and `start`, and while the container runs.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::namespace::Namespace;
use crate::Story;
use crate::bundle::Bundle;
use crate::command::{docker, docker_start, eventually, rvm, rvm_detached, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("a_running_container_joins_and_leaves_networks", a_running_container_joins_and_leaves_networks),
    ("interfaces_may_come_between_create_and_start", interfaces_may_come_between_create_and_start),
    (
        "what_changes_in_the_namespace_changes_in_the_guest",
        what_changes_in_the_namespace_changes_in_the_guest,
    ),
    (
        "what_cannot_be_connected_is_told_and_harms_nothing",
        what_cannot_be_connected_is_told_and_harms_nothing,
    ),
];

const PING: &str = "ping -c 1 -W 20";

fn a_running_container_joins_and_leaves_networks() -> Result<()> {
    let create = "docker network create --subnet 172.30.1.0/24 e2e-one && \
                  docker network create --ipv6 --subnet 172.30.2.0/24 --subnet fd00:e2e::/64 e2e-two";
    shell(create)?.expect_code(0)?;
    let outcome = join_and_leave();
    shell("docker ps -aq | xargs -r docker rm -f -v; docker network rm e2e-one e2e-two")?.expect_code(0)?;
    outcome
}

fn join_and_leave() -> Result<()> {
    docker(&[
        "run",
        "-d",
        "--runtime=runc",
        "--name",
        "plain",
        "--network",
        "e2e-two",
        "busybox",
        "sleep",
        "1000",
    ])?
    .expect_code(0)?;
    docker_start(&["--name", "vm", "busybox", "sleep", "1000"])?;
    let shown = |line: &str| docker(&["exec", "vm", "sh", "-c", line]).map(|outcome| outcome.text());

    let at = ["network", "connect", "--ip", "172.30.1.77", "--alias", "till", "e2e-one", "vm"];
    docker(&at)?.expect_code(0)?;
    eventually("the guest has the address", || Ok(shown("ip addr show eth1")?.contains("172.30.1.77/24")))?;
    docker(&["network", "connect", "e2e-two", "vm"])?.expect_code(0)?;
    let form = "{{(index .NetworkSettings.Networks \"e2e-two\").GlobalIPv6Address}}";
    let address = docker(&["inspect", "-f", form, "vm"])?.text();
    eventually("the guest has the address", || {
        Ok(shown("ip addr show eth2")?.contains(&format!("{address}/64")))
    })?;
    let mac = "{{(index .NetworkSettings.Networks \"e2e-two\").MacAddress}}";
    let mac = docker(&["inspect", "-f", mac, "vm"])?.text();
    ensure!(shown("cat /sys/class/net/eth2/address")? == mac, "the interface has another address than {mac}");
    eventually("names are looked up by now", || {
        Ok(shown(&format!("{PING} plain"))?.contains("1 packets received"))
    })?;
    for line in [format!("{PING} vm"), format!("ping -6 -c 1 -W 20 {address}")] {
        docker(&["exec", "plain", "sh", "-c", &line])?.expect_code(0)?;
    }

    docker(&["network", "disconnect", "bridge", "vm"])?.expect_code(0)?;
    docker(&["network", "disconnect", "e2e-two", "vm"])?.expect_code(0)?;
    eventually("one network is left", || Ok(shown("ls /sys/class/net")? == "eth1\nlo"))?;
    docker(&["exec", "plain", "sh", "-c", &format!("ping -c 1 -W 1 {address}")])?.expect_code(1)?;
    docker(&["network", "connect", "e2e-two", "vm"])?.expect_code(0)?;
    eventually(
        "it is back",
        || Ok(docker(&["exec", "plain", "sh", "-c", &format!("{PING} vm")])?.code == 0),
    )?;
    ensure!(shown("ip route")?.contains("default via 172.30."), "no default route: {}", shown("ip route")?);
    // The machine has a handful of slots, and each is free again.
    for _ in 0..6 {
        docker(&["network", "disconnect", "e2e-two", "vm"])?.expect_code(0)?;
        docker(&["network", "connect", "e2e-two", "vm"])?.expect_code(0)?;
    }
    eventually("it is back again", || {
        Ok(docker(&["exec", "plain", "sh", "-c", &format!("{PING} vm")])?.code == 0)
    })
}

/// What Docker from 28 on does, in its order: the namespace is found by the process of the created container and
/// pinned, a cable's end moves there, is named, addressed and brought up, then come the routes, and then `start`.
fn interfaces_may_come_between_create_and_start() -> Result<()> {
    let bundle = Bundle::new(&["sh", "-c", "ip addr show eth0; ip route; ping -c 1 -W 20 10.77.0.1"])?
        .edit(allow_networking)?;
    let output = tempfile::NamedTempFile::new()?;
    let created = format!(
        "rvm create --bundle {} --pid-file {}/pid e2e-late >{} 2>&1 </dev/null",
        bundle.path(),
        bundle.path(),
        output.path().display()
    );
    shell(&created)?.expect_code(0)?;
    let pid = fs::read_to_string(format!("{}/pid", bundle.path()))?;
    let script = format!(
        "set -e; touch /run/e2e-netns; mount --bind /proc/{pid}/ns/net /run/e2e-netns; in='nsenter --net=/run/e2e-netns'
         $in ip link set lo up
         ip link add e2e-bridge type bridge; ip addr add 10.77.0.1/24 dev e2e-bridge; ip link set e2e-bridge up
         ip link add e2e-outer type veth peer name e2e-inner; ip link set e2e-outer master e2e-bridge
         ip link set e2e-inner netns {pid}; ip link set e2e-outer up
         $in ip link set e2e-inner name eth0; $in ip link set eth0 address 02:42:0a:4d:00:02
         $in ip addr add 10.77.0.2/24 brd 10.77.0.255 dev eth0; $in ip link set eth0 up
         $in ip route add default via 10.77.0.1"
    );
    let outcome = shell(&script)?
        .expect_code(0)
        .and_then(|_| rvm(&["start", "e2e-late"])?.expect_code(0))
        .and_then(|_| {
            eventually("it has ended", || Ok(rvm(&["state", "e2e-late"])?.text().contains("stopped")))?;
            let shown = fs::read_to_string(output.path())?;
            let expected = [
                "link/ether 02:42:0a:4d:00:02",
                "inet 10.77.0.2/24 brd 10.77.0.255",
                "default via 10.77.0.1 dev eth0",
                "1 packets received",
            ];
            for words in expected {
                ensure!(shown.contains(words), "{words} is not in: {shown}");
            }
            Ok(())
        });
    rvm(&["delete", "--force", "e2e-late"])?.expect_code(0)?;
    shell("umount /run/e2e-netns; rm /run/e2e-netns; ip link del e2e-bridge; ip link del e2e-outer 2>/dev/null; true")?.expect_code(0)?;
    outcome
}

fn allow_networking(config: &mut Value) {
    for set in ["bounding", "effective", "permitted"] {
        let held = config["process"]["capabilities"][set].as_array_mut();
        held.into_iter().for_each(|held| held.extend(["CAP_NET_ADMIN".into(), "CAP_NET_RAW".into()]));
    }
}

/// A namespace as an engine would have it, with a container in it that runs.
fn in_a_namespace(story: impl FnOnce(&dyn Fn(&str) -> Result<String>) -> Result<()>) -> Result<()> {
    let namespace = Namespace::new("e2e-changes")?;
    let plumb = "ip link add e2e-outer type veth peer name eth0 netns e2e-changes && \
                 ip addr add 10.78.0.1/24 dev e2e-outer && ip link set e2e-outer up";
    shell(plumb)?.expect_code(0)?;
    namespace.plumb(&["addr add 10.78.0.2/24 dev eth0", "link set eth0 up"])?;
    let bundle = Bundle::new(&["sleep", "1000"])?.edit(|config| {
        namespace.join(config);
        allow_networking(config);
    })?;
    let log = format!("{}/log", bundle.path());
    let run = ["--log", &log, "run", "--detach", "--bundle", bundle.path(), "e2e-changes"];
    let outcome = rvm_detached(&run).and_then(|()| {
        story(&|line| match line.strip_prefix("log") {
            Some(_) => Ok(fs::read_to_string(&log).unwrap_or_default()),
            None => Ok(rvm(&["exec", "e2e-changes", "sh", "-c", line])?.text()),
        })
    });
    rvm(&["delete", "--force", "e2e-changes"])?.expect_code(0)?;
    let left = shell("ip netns exec e2e-changes ls /sys/class/net; ip -n e2e-changes route")?.text();
    // With it goes the other end of the cable.
    drop(namespace);
    outcome?;
    ensure!(!left.contains("rvm"), "a tap is left: {left}");
    Ok(())
}

fn what_changes_in_the_namespace_changes_in_the_guest() -> Result<()> {
    in_a_namespace(|guest| {
        shell(
            "ip -n e2e-changes addr add 10.78.0.3/24 dev eth0; ip -n e2e-changes link set eth0 mtu 1400; \
               ip -n e2e-changes route add 192.0.2.0/24 via 10.78.0.1; \
               ip -n e2e-changes neigh add 10.78.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
        )?
        .expect_code(0)?;
        eventually("the guest has it all", || {
            let seen = guest("ip addr show eth0; ip route; ip neigh")?;
            let wanted = ["10.78.0.3/24", "mtu 1400", "192.0.2.0/24 via 10.78.0.1", "10.78.0.9"];
            Ok(wanted.iter().all(|words| seen.contains(words)))
        })?;
        // What the container has set itself is its own.
        guest("ip addr add 10.99.0.1/32 dev eth0")?;
        shell(
            "ip -n e2e-changes addr del 10.78.0.3/24 dev eth0; ip -n e2e-changes route del 192.0.2.0/24; \
               ip -n e2e-changes neigh del 10.78.0.9 dev eth0; ip -n e2e-changes link set eth0 mtu 1500",
        )?
        .expect_code(0)?;
        eventually("it is gone from the guest", || {
            let seen = guest("ip addr show eth0; ip route; ip neigh")?;
            let gone = ["10.78.0.3/24", "mtu 1400", "192.0.2.0/24", "10.78.0.9"];
            Ok(gone.iter().all(|words| !seen.contains(words)))
        })?;
        let seen = guest("ip addr show eth0")?;
        ensure!(seen.contains("10.78.0.2/24") && seen.contains("10.99.0.1/32"), "{seen}");
        shell(
            "ip -n e2e-changes link set eth0 down; ip -n e2e-changes link set eth0 name lan0; \
               ip -n e2e-changes link set lan0 up",
        )?
        .expect_code(0)?;
        eventually("it has its new name", || Ok(guest("ip addr show lan0")?.contains("10.78.0.2/24")))?;
        eventually("it is reached", || Ok(shell("ping -c 1 -W 5 10.78.0.2")?.code == 0))
    })
}

fn what_cannot_be_connected_is_told_and_harms_nothing() -> Result<()> {
    in_a_namespace(|guest| {
        shell("ip -n e2e-changes link add br9 type bridge; ip -n e2e-changes link set br9 up")?
            .expect_code(0)?;
        eventually("it is told", || {
            let log = guest("log")?;
            Ok(log.contains("br9") && log.contains("bridge"))
        })?;
        shell("ip -n e2e-changes addr add 10.78.0.3/24 dev eth0")?.expect_code(0)?;
        eventually("other changes arrive", || Ok(guest("ip addr show eth0")?.contains("10.78.0.3/24")))?;
        ensure!(shell("ping -c 1 -W 20 10.78.0.2")?.code == 0, "the container is not reached any more");
        ensure!(guest("log")?.matches("br9").count() == 1, "it is told again and again: {}", guest("log")?);
        Ok(())
    })
}
