//! The real thing in namespaces of its own: as root; without root the kernel offers nothing to test with.

use std::fs::File;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use super::*;

/// Runs in a thread with a fresh network namespace, so that neither host nor other tests see anything of it.
fn in_new_namespace(test: impl FnOnce(File) + Send) {
    if !nix::unistd::geteuid().is_root() {
        println!("not run: making network namespaces and taps takes root");
        return;
    }
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            test(File::open("/proc/thread-self/ns/net").unwrap());
        });
        thread.join().unwrap();
    });
}

/// Whether this kernel has what connecting takes; build machines often lack the tun driver.
fn can_connect() -> bool {
    let able = std::path::Path::new("/dev/net/tun").exists()
        && ip("link add probe0 type veth peer name probe1")
        && ip("link del probe0")
        && tap::create().is_ok();
    if !able {
        println!("not run: this kernel has no tun or veth; the end-to-end suite covers it in the test host");
    }
    able
}

fn ip(arguments: &str) -> bool {
    Command::new("ip").args(arguments.split(' ')).output().is_ok_and(|output| output.status.success())
}

fn plumb() {
    for line in [
        "link add eth0 address 02:00:00:00:00:07 mtu 1400 type veth peer name outside",
        "addr add 10.9.0.2/24 brd 10.9.0.255 dev eth0",
        "link set eth0 up",
        "link set outside up",
        "link set lo up",
        "route add default via 10.9.0.1 dev eth0",
        "neigh add 10.9.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
    ] {
        assert!(ip(line), "ip {line}");
    }
}

#[test]
fn a_namespace_with_loopback_only_needs_nothing() {
    in_new_namespace(|namespace| {
        let connected = connect(namespace.as_fd()).unwrap();
        assert_eq!(connected.wiring, Wiring::default());
    });
}

#[test]
fn what_the_engine_plumbed_is_read() {
    in_new_namespace(|namespace| {
        if !can_connect() {
            return;
        }
        plumb();
        let _far = far_end(&namespace);
        let connected = match connect(namespace.as_fd()) {
            Err(NetworkError::Redirect(error)) => {
                println!("not run: this kernel has no traffic control ({error})");
                return;
            }
            other => other.unwrap(),
        };
        let config = &connected.wiring.config;
        let interface = &config.interfaces[0];
        assert_eq!((interface.name.as_str(), interface.mtu), ("eth0", 1400));
        assert_eq!(interface.mac, [2, 0, 0, 0, 0, 7]);
        assert_eq!(interface.addresses.len(), 1, "without the link-local one: {:?}", interface.addresses);
        assert_eq!(interface.addresses[0].ip.to_string(), "10.9.0.2");
        assert_eq!(interface.addresses[0].prefix, 24);
        assert_eq!(config.routes.len(), 1, "{:?}", config.routes);
        assert_eq!(config.routes[0].gateway.unwrap().to_string(), "10.9.0.1");
        assert_eq!(config.routes[0].destination.prefix, 0);
        assert_eq!(config.neighbours.len(), 1);
        assert_eq!(config.neighbours[0].mac, [2, 0, 0, 0, 0, 9]);

        let second = connect(namespace.as_fd()).unwrap_err();
        assert!(matches!(&second, NetworkError::Taken { name } if name == "eth0"), "{second}");
        // As when the monitor is killed: the tap goes, the rules stay, and lead nowhere.
        drop(connected);
        drop(connect(namespace.as_fd()).unwrap());
        disconnect(namespace.as_fd()).unwrap();
        let successor = connect(namespace.as_fd()).expect("it can be connected anew");
        disconnect(namespace.as_fd()).unwrap();
        let third = connect(namespace.as_fd()).unwrap_err();
        assert!(matches!(third, NetworkError::Taken { .. }), "the successor's connection is gone: {third}");
        drop(successor);
    });
}

/// Puts the far end of the cable into a namespace of its own, where another thread is the network.
fn far_end(near: &File) -> File {
    let (far, receiver) = std::sync::mpsc::channel();
    let near = near.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let own = File::open("/proc/thread-self/ns/net").unwrap();
            // `ip` names a namespace by a process of it.
            let holder = Command::new("sleep").arg("1000").spawn();
            setns(&near, CloneFlags::CLONE_NEWNET).unwrap();
            let mut holder = holder.unwrap();
            let moved = ip(&format!("link set outside netns {}", holder.id()));
            let _ = holder.kill();
            let _ = holder.wait();
            assert!(moved, "ip link set outside netns");
            setns(&own, CloneFlags::CLONE_NEWNET).unwrap();
            for line in ["addr add 10.9.0.1/24 dev outside", "link set outside up"] {
                assert!(ip(line), "ip {line}");
            }
            far.send(own).unwrap();
        });
    });
    receiver.recv().unwrap()
}

const HEADER: usize = 12;

/// The next frame at the tap of this Ethernet type.
fn frame(tap: &mut File, kind: u16) -> Vec<u8> {
    let mut buffer = [0; 2048];
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < Duration::from_secs(60), "no frame of type {kind:#x} reached the tap");
        match tap.read(&mut buffer) {
            Ok(length) if buffer[HEADER + 12..HEADER + 14] == kind.to_be_bytes() => {
                return buffer[HEADER..length].to_vec();
            }
            _ => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// The guest's answer to an ARP request.
fn arp_reply(request: &[u8]) -> Vec<u8> {
    let mut reply = vec![0; HEADER];
    let mac = [2, 0, 0, 0, 0, 7];
    reply.extend_from_slice(&request[6..12]);
    reply.extend_from_slice(&mac);
    reply.extend_from_slice(&request[12..20]);
    reply.extend_from_slice(&[0, 2]);
    reply.extend_from_slice(&mac);
    reply.extend_from_slice(&request[38..42]);
    reply.extend_from_slice(&request[22..32]);
    reply
}

#[test]
fn the_guest_is_on_the_cable_and_the_host_is_not() {
    in_new_namespace(|namespace| {
        if !can_connect() {
            return;
        }
        plumb();
        let far = far_end(&namespace);
        let connected = match connect(namespace.as_fd()) {
            Err(NetworkError::Redirect(error)) => {
                println!("not run: this kernel has no traffic control ({error})");
                return;
            }
            other => other.unwrap(),
        };
        let mut tap = File::from(connected.taps.into_iter().next().unwrap());
        setns(&far, CloneFlags::CLONE_NEWNET).unwrap();
        let peer = UdpSocket::bind("10.9.0.1:0").unwrap();
        peer.send_to(b"hello", "10.9.0.2:9").unwrap();

        let request = frame(&mut tap, 0x0806);
        let neighbours = Command::new("ip").args(["neigh", "show"]).output().unwrap().stdout;
        let neighbours = String::from_utf8(neighbours).unwrap();
        assert!(!neighbours.contains("lladdr"), "the host's stack has answered for the guest: {neighbours}");
        tap.write_all(&arp_reply(&request)).unwrap();
        let datagram = frame(&mut tap, 0x0800);
        assert!(datagram.windows(5).any(|window| window == b"hello"), "{datagram:?}");
    });
}

#[test]
fn the_probe_leaves_an_answer_and_nothing_else() {
    if !nix::unistd::geteuid().is_root() {
        println!("not run: making network namespaces and taps takes root");
        return;
    }
    if let Err(error) = probe() {
        assert!(matches!(
            error,
            NetworkError::TunDevice(_) | NetworkError::Tap(_) | NetworkError::Redirect(_)
        ));
    }
}

#[test]
fn a_device_that_cannot_be_connected_is_named() {
    in_new_namespace(|namespace| {
        if !ip("link add br9 type bridge") {
            println!("not run: this kernel has no bridges");
            return;
        }
        assert!(ip("link set br9 up"));
        let message = connect(namespace.as_fd()).unwrap_err().to_string();
        assert!(message.contains("br9") && message.contains("bridge"), "{message}");
    });
}
