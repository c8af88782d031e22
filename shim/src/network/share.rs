//! What the host's own stack in the container's namespace still receives.
//!
//! Up to version 27, and later with `--dns`, dockerd asks name servers of the outside from the container's namespace.
//! Were everything led into the machine, the answers would be, too. So the namespace's stack draws its ports from a
//! window at the end of the range, what comes to these ports stays with it, and so does a copy of what tells it the
//! hardware addresses that it has asked for. The guest draws no port of the window for itself.

use std::fs;
use std::ops::RangeInclusive;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use rvm_protocol::HOST_PORTS;

use super::NetworkError;
use super::netlink::Netlink;
use super::redirect::{Rule, refused, selector};

/// The kernel's own choice in a new namespace.
const USUAL_PORTS: RangeInclusive<u16> = 32_768..=60_999;

/// The window as a mask: it begins at a multiple of its size.
const WINDOW_MASK: u32 = !(*HOST_PORTS.end() as u32 - *HOST_PORTS.start() as u32) & 0xffff;
const WINDOW: u32 = *HOST_PORTS.start() as u32;

const TCP: u32 = 6;
const UDP: u32 = 17;
const ICMPV6: u32 = 58;

/// Has the stack of the calling thread's namespace draw its ports from the window.
pub fn keep_ports() {
    set_ports(&HOST_PORTS);
}

/// Has it draw them as usual.
pub fn release_ports() {
    set_ports(&USUAL_PORTS);
}

fn set_ports(range: &RangeInclusive<u16>) {
    // Where the system's parameters cannot be written, names of the outside may not be found; everything else works.
    let _ = fs::write("/proc/sys/net/ipv4/ip_local_port_range", format!("{} {}", range.start(), range.end()));
}

/// Adds the rules to those that lead all from the device to the tap; they come before them.
pub fn leave_to_host(netlink: &mut Netlink, device: u32, tap: u32) -> Result<(), NetworkError> {
    for rule in rules(tap) {
        let request = RouteNetlinkMessage::NewTrafficFilter(rule.to_message(device));
        netlink.change(request, NLM_F_CREATE | NLM_F_EXCL).map_err(refused)?;
    }
    Ok(())
}

/// The kernel wants a priority for each protocol.
fn rules(tap: u32) -> impl Iterator<Item = Rule> {
    // ARP (RFC 826): the operation, a reply, is in the second half of the second word.
    let arp_reply = selector(&[(4, 0x0000_ffff, 2)]);
    // ICMPv6 (RFC 4861): the type follows the header of 40 bytes.
    let advertisement = selector(&[next_header(ICMPV6), (40, 0xff00_0000, 136 << 24)]);
    let copies = [(libc::ETH_P_ARP, arp_reply), (libc::ETH_P_IPV6, advertisement)];
    let copies = copies.map(|(protocol, selector)| Rule::copy(priority(protocol), protocol, selector, tap));
    copies.into_iter().chain(passes())
}

/// Those that name no tap.
pub fn passes() -> impl Iterator<Item = Rule> {
    [TCP, UDP].into_iter().flat_map(|protocol| {
        // IPv4 (RFC 791): without options, the first of its fragments, and the protocol; then the two ports.
        let version4 = selector(&[
            (0, 0xff00_0000, 0x4500_0000),
            (4, 0x0000_1fff, 0),
            (8, 0x00ff_0000, protocol << 16),
            (20, WINDOW_MASK, WINDOW),
        ]);
        let version6 = selector(&[next_header(protocol), (40, WINDOW_MASK, WINDOW)]);
        let both = [(libc::ETH_P_IP, version4), (libc::ETH_P_IPV6, version6)];
        both.map(|(protocol, selector)| Rule::pass(priority(protocol), protocol, selector))
    })
}

fn priority(protocol: libc::c_int) -> u16 {
    match protocol {
        libc::ETH_P_ARP => 1,
        libc::ETH_P_IP => 2,
        _ => 3,
    }
}

/// IPv6 (RFC 8200): the next header is in the second word.
fn next_header(number: u32) -> (i32, u32, u32) {
    (4, 0x0000_ff00, number << 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_is_what_the_mask_says() {
        for port in 0..=u16::MAX {
            assert_eq!(u32::from(port) & WINDOW_MASK == WINDOW, HOST_PORTS.contains(&port), "{port}");
        }
    }
}
