// SPDX-License-Identifier: MIT OR Apache-2.0
//! The network that chains run in: a namespace of each test thread, with one device and routes
//! that never change.

use std::fs;
use std::net::IpAddr;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};

/// What packets are redirected to.
pub const DEVICE: &str = "pc-model";
const PEER: &str = "pc-peer";
const OWN_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];

/// Longest frame that the device sends: its MTU, an Ethernet header and a tag.
pub const LONGEST: usize = 1500 + 14 + 4;

/// Where the routing table sends a packet.
pub enum Hop {
    Nowhere,
    /// To somebody whose link address is not known.
    Unknown,
    To {
        own: [u8; 6],
        next: [u8; 6],
    },
}

/// Next hops with their link address.
const NEIGHBOURS: [(&str, [u8; 6]); 4] = [
    ("10.0.0.1", [2, 0, 0, 0, 1, 1]),
    ("10.0.0.2", [2, 0, 0, 0, 1, 2]),
    ("2001:db8::1", [2, 0, 0, 0, 2, 1]),
    ("2001:db8::2", [2, 0, 0, 0, 2, 2]),
];

/// By which way packets leave.
pub fn route(from: IpAddr, to: IpAddr) -> Hop {
    if matches!(from, IpAddr::V6(from) if from.is_multicast()) {
        // nobody's address
        return Hop::Nowhere;
    }
    let known = NEIGHBOURS
        .iter()
        .find(|(address, _)| address.parse::<IpAddr>().unwrap() == to);
    let on_link = match to {
        IpAddr::V4(to) => (0x0a00_0001..=0x0a00_00fd).contains(&to.to_bits()),
        IpAddr::V6(to) => {
            let host = to.to_bits() as u64;
            // ours, and that of any router (RFC 4291, 2.6.1)
            to.to_bits() >> 64 == 0x2001_0db8_0000_0000 && host != 0xfe && host != 0
        }
    };
    match known {
        Some((_, next)) => Hop::To {
            own: OWN_MAC,
            next: *next,
        },
        None if on_link => Hop::Unknown,
        None => Hop::Nowhere,
    }
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn ip(arguments: &str) {
    let arguments: Vec<&str> = arguments.split_whitespace().collect();
    let output = Command::new("ip").args(&arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments:?}: {errors}");
}

/// Gives the calling thread a network namespace of its own, which ends with it.
pub fn enter() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    ip("link set lo up");
    let mac = text(OWN_MAC);
    ip(&format!(
        "link add {DEVICE} address {mac} type veth peer name {PEER}"
    ));
    ip(&format!("address add 10.0.0.254/24 dev {DEVICE}"));
    ip(&format!("address add 2001:db8::fe/64 dev {DEVICE} nodad"));
    ip(&format!("link set {PEER} up"));
    ip(&format!("link set {DEVICE} up"));
    for (address, mac) in NEIGHBOURS {
        let mac = text(mac);
        ip(&format!(
            "neighbour add {address} lladdr {mac} dev {DEVICE} nud permanent"
        ));
    }
    // of the calling thread's namespace
    for family in ["ipv4", "ipv6"] {
        fs::write(format!("/proc/sys/net/{family}/conf/all/forwarding"), "1").unwrap();
    }
}
