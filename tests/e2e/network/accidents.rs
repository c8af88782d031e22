//! What happens to networks from outside: devices vanish, others cannot be connected, and containers come and go.

use anyhow::{Result, ensure};

use super::namespace::Namespace;
use super::{Network, address, gateway};
use crate::Story;
use crate::bundle::Bundle;
use crate::command::{docker, docker_run, docker_start, eventually, rvm, rvm_detached, shell};

pub const STORIES: &[(&str, Story)] = &[
    ("the_network_is_taken_away_under_a_container", the_network_is_taken_away_under_a_container),
    ("a_device_that_cannot_be_connected_is_named", a_device_that_cannot_be_connected_is_named),
    ("containers_come_and_go_in_one_namespace", containers_come_and_go_in_one_namespace),
    ("containers_come_and_go_on_a_network", containers_come_and_go_on_a_network),
];

fn the_network_is_taken_away_under_a_container() -> Result<()> {
    let script = "trap 'echo bye; exit 7' TERM; while :; do sleep 0.1; done";
    let id = docker_start(&["busybox", "sh", "-c", script])?;
    let (place, gateway) = (address(&id)?, gateway()?);
    shell(&format!("ping -c 1 -w 60 {place}"))?.expect_code(0)?;
    let pid = docker(&["inspect", "-f", "{{.State.Pid}}", &id])?.text();
    let within = |line: &str| Ok::<_, anyhow::Error>(docker(&["exec", &id, "sh", "-c", line])?.text());
    let remove = |device| {
        shell(&format!("nsenter -t {pid} -n ip link delete {device}"))?.expect_code(0)?;
        ensure!(shell(&format!("ping -c 1 -W 1 {place}"))?.code != 0, "it answers without {device}");
        Ok(())
    };
    // The tap first: what the guest sends goes nowhere, and holds nothing up.
    remove("rvm0")?;
    let shown = within(&format!("ping -c 3 -W 1 {gateway}; cat /sys/class/net/eth0/mtu"))?;
    let is_lost = shown.contains("3 packets transmitted, 0 packets received") && shown.ends_with("1500");
    ensure!(is_lost, "{shown}");
    // And then the cable to the bridge, of which both ends vanish together, and so does the guest's interface.
    remove("eth0")?;
    eventually("no interface is left", || Ok(within("ls /sys/class/net")? == "lo"))?;
    docker(&["stop", "-t", "60", &id])?.expect_code(0)?;
    docker(&["wait", &id])?.expect_text("7")?;
    docker(&["rm", &id])?.expect_code(0).map(drop)
}

const NAMESPACE: &str = "e2e";

/// A bundle for a container in a namespace.
fn bundle_in(namespace: &Namespace, command: &[&str]) -> Result<Bundle> {
    Bundle::new(command)?.edit(|config| namespace.join(config))
}

fn a_device_that_cannot_be_connected_is_named() -> Result<()> {
    let namespace = Namespace::new(NAMESPACE)?;
    let bundle = bundle_in(&namespace, &["ls", "/sys/class/net"])?;
    namespace.plumb(&["link add good type veth peer name far", "link set good up"])?;
    for (name, kind, add) in [
        ("b0", "bridge", "link add b0 type bridge"),
        ("d0", "dummy", "link add d0 type dummy"),
        ("v0", "vlan", "link add link good name v0 type vlan id 7"),
    ] {
        namespace.plumb(&[add, &format!("link set {name} up")])?;
        rvm(&["run", "--bundle", bundle.path(), "story"])?
            .expect_failure(&[&format!("network interface {name} is a {kind}, which cannot be connected")])?;
        rvm(&["state", "story"])?.expect_failure(&["does not exist"])?;
        // Of the one that can be connected nothing stays behind either.
        let found = traces()?;
        ensure!(found == NONE, "it leaves {found:?}");
        namespace.plumb(&[&format!("link set {name} down")])?;
    }
    // As long as nobody uses them, they are in nobody's way.
    rvm(&["run", "--bundle", bundle.path(), "story"])?.expect_text("good\nlo")
}

/// What a container leaves in the namespace, counted. What else it could leave, sockets and namespaces of its own, is some
/// process's or mounted somewhere, for which the host is searched after each story.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    taps: usize,
    rules: usize,
}

const NONE: Traces = Traces { taps: 0, rules: 0 };

fn traces() -> Result<Traces> {
    let count = |line: &str| -> Result<usize> { Ok(shell(line)?.expect_code(0)?.text().trim().parse()?) };
    Ok(Traces {
        taps: count(&format!("ip -n {NAMESPACE} -o link show type tun | wc -l"))?,
        rules: count(&format!(
            "for i in $(ip netns exec {NAMESPACE} ls /sys/class/net); do tc -n {NAMESPACE} filter show dev $i ingress; \
             tc -n {NAMESPACE} qdisc show dev $i | grep ingress; done | wc -l"
        ))?,
    })
}

/// How many containers come and go.
const CYCLES: usize = 200;
/// How many are killed.
const KILLED: usize = 5;

fn containers_come_and_go_in_one_namespace() -> Result<()> {
    let namespace = Namespace::with_interface(NAMESPACE, "10.82.0.2/24")?;
    namespace.plumb(&["link set far up", "link set lo up"])?;
    let bundle = bundle_in(&namespace, &["ip", "-o", "-4", "address", "show", "dev", "eth0"])?;
    for cycle in 0..CYCLES {
        let shown = rvm(&["run", "--bundle", bundle.path(), "story"])?.expect_code(0)?.text();
        ensure!(shown.contains("10.82.0.2/24"), "{shown}");
        // Each takes away what it finds of the one before, so to look at the end would tell of the last one only.
        if cycle % 10 == 9 {
            let left = traces()?;
            ensure!(left == NONE, "container {cycle} leaves {left:?}");
        }
    }

    // Some that are killed as well, and deleted while the kernel still takes them apart.
    let bundle = bundle_in(&namespace, &["sleep", "1000"])?;
    for cycle in 0..KILLED {
        rvm_detached(&["run", "--detach", "--bundle", bundle.path(), "story"])?;
        let during = traces()?;
        ensure!(during.taps > 0 && during.rules > 0, "this looks at the wrong place: {during:?}");
        shell("pkill -9 -f '^rvm: story' && rvm delete --force story")?.expect_code(0)?;
        let left = traces()?;
        ensure!(left == NONE, "killed container {cycle} leaves {left:?}");
    }
    Ok(())
}

fn containers_come_and_go_on_a_network() -> Result<()> {
    let _network = Network::create("e2e-cycles", &[])?;
    let cycle =
        || docker_run(&["--network", "e2e-cycles", "-p", "18080:80", "busybox", "true"])?.expect_code(0);
    let look = "ls /sys/class/net | wc -l; ip -o link show type veth | wc -l; ss -H -tunl | wc -l; \
                iptables-save | grep -c 18080; ls -l /proc/[0-9]*/exe 2>/dev/null | grep -c docker-proxy";
    cycle()?;
    let before = shell(look)?.text();
    for _ in 0..4 {
        cycle()?;
    }
    eventually("devices, ports and rules are as before", || Ok(shell(look)?.text() == before))
}
