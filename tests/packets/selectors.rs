// SPDX-License-Identifier: MIT OR Apache-2.0
//! What selectors match. The frames go from 10.0.0.1:40000 (2001:db8::1) to 10.0.0.2:80
//! (2001:db8::2): on ingress the local end is 10.0.0.2:80, on egress 10.0.0.1:40000.

use policy_chain::hook::Hook;
use serde_json::{Value, json};

use crate::bench::{On, probe, raw_probe, select, select_in};
use crate::frames::*;

const ALL: On = On::All;
const INGRESS: On = On::Ingress;
const EGRESS: On = On::Egress;
const NOWHERE: On = On::Nowhere;

/// An ARP request.
fn arp() -> Vec<u8> {
    let mut bytes = v4().build()[..12].to_vec();
    bytes.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    bytes.resize(ETHERNET_MIN, 0);
    bytes
}

/// A fragment header for `offset` units of eight bytes.
fn fragment_header(offset: u16, more: bool) -> Vec<u8> {
    let mut bytes = vec![0, 0];
    bytes.extend((offset << 3 | u16::from(more)).to_be_bytes());
    bytes.extend([0, 0, 0, 1]);
    bytes
}

fn later_v4() -> Frame {
    v4().fragment(100)
}

fn later_v6() -> Frame {
    v6().extension(FRAGMENT, &fragment_header(100, true))
}

/// Packets of the flow in every wrapping that leaves its ports readable.
fn wrapped() -> Vec<(&'static str, Frame)> {
    vec![
        ("IPv4", v4()),
        ("IPv6", v6()),
        ("802.1Q", v4().tags(&[0x8100])),
        ("802.1Q, IPv6", v6().tags(&[0x8100])),
        ("QinQ", v4().tags(&[0x88a8, 0x8100])),
        ("two 802.1Q tags", v6().tags(&[0x8100, 0x8100])),
        ("IP options", v4().ip_options(&[1, 1, 1, 0])),
        ("40 bytes of IP options", v4().ip_options(&[1; 40])),
        ("first fragment", v4().fragment(MORE_FRAGMENTS)),
        ("hop-by-hop", v6().extension(HOP_BY_HOP, &[0; 8])),
        ("destination options", v6().extension(DESTINATION, &[0; 8])),
        (
            "routing",
            v6().extension(
                ROUTING,
                &[0, 2, 0, 0, 0, 0, 0, 0]
                    .iter()
                    .chain(&[0; 16])
                    .copied()
                    .collect::<Vec<u8>>(),
            ),
        ),
        (
            "authentication",
            v6().extension(
                AUTHENTICATION,
                &[0, 4].iter().chain(&[0; 22]).copied().collect::<Vec<u8>>(),
            ),
        ),
        (
            "atomic fragment",
            v6().extension(FRAGMENT, &fragment_header(0, false)),
        ),
        (
            "first fragment, IPv6",
            v6().extension(FRAGMENT, &fragment_header(0, true)),
        ),
        (
            "four extension headers",
            v6().extension(
                HOP_BY_HOP,
                &[0, 1].iter().chain(&[0; 14]).copied().collect::<Vec<u8>>(),
            )
            .extension(DESTINATION, &[0; 8])
            .extension(ROUTING, &[0; 8])
            .extension(DESTINATION, &[0; 8]),
        ),
        ("Ethernet padding", v4().padded()),
    ]
}

#[test]
fn tcp() {
    let mut probes: Vec<_> = wrapped()
        .iter()
        .map(|(what, frame)| probe(what, frame, ALL))
        .collect();
    probes.extend([
        probe("later fragment: TCP says IP", &later_v4(), ALL),
        probe("UDP", &v4().protocol(UDP), NOWHERE),
        probe("UDP, IPv6", &v6().protocol(UDP), NOWHERE),
        probe("ICMP", &v4().protocol(ICMP), NOWHERE),
        probe("no next header", &v6().extension(NO_NEXT, &[0; 8]), NOWHERE),
        raw_probe("ARP", arp(), NOWHERE),
        probe("three tags", &v4().tags(&[0x8100; 3]), NOWHERE),
        probe(
            "nine extension headers",
            &(0..9).fold(v6(), |frame, _| frame.extension(DESTINATION, &[0; 8])),
            NOWHERE,
        )
        .because(&["extension_headers"]),
    ]);
    select(json!([{ "selector": "tcp" }]), &probes);
}

#[test]
fn not_tcp() {
    select(
        json!([{ "selector": "tcp", "not": true }]),
        &[
            probe("TCP", &v4(), NOWHERE),
            probe("TCP, IPv6", &v6(), NOWHERE),
            probe("UDP", &v4().protocol(UDP), ALL),
            raw_probe("ARP", arp(), ALL),
            raw_probe(
                "a tag and nothing behind it",
                {
                    let mut bytes = v4().build()[..12].to_vec();
                    bytes.extend([0x81, 0]);
                    bytes
                },
                NOWHERE,
            )
            .because(&["truncated"]),
        ],
    );
}

/// Selectors of the flow's addresses and ports that hold on ingress, and on egress.
#[test]
fn ends_are_as_the_hook_sees_them() {
    for (version, frame, src, dst) in [
        ("IPv4", v4(), "10.0.0.1", "10.0.0.2"),
        ("IPv6", v6(), "2001:db8::1", "2001:db8::2"),
    ] {
        let back = match version {
            "IPv4" => v4().between(V4_DST, V4_SRC).ports(DST_PORT, SRC_PORT),
            _ => v6().between(V6_DST, V6_SRC).ports(DST_PORT, SRC_PORT),
        };
        let oriented = [
            json!({ "selector": "ip_pair", "local": dst, "remote": src }),
            json!({ "selector": "ip_pair", "local": dst }),
            json!({ "selector": "ip_pair", "remote": src }),
            json!({ "selector": "ip_pair", "keys": [{ "local": dst, "remote": src }] }),
            json!({ "selector": "ip_pair", "reverse": true,
                    "keys": [{ "local": src, "remote": dst }] }),
            json!({ "selector": "flow", "local": dst, "remote": src, "local_port": 80,
                    "remote_port": 40000, "protocol": "tcp" }),
            json!({ "selector": "flow", "local_port": 80 }),
            json!({ "selector": "flow", "remote_port": 40000, "local": dst }),
            json!({ "selector": "flow", "keys": [{ "local": dst, "remote": src,
                    "local_port": 80, "remote_port": 40000 }] }),
            json!({ "selector": "flow", "reverse": true, "keys": [{ "local": src,
                    "remote": dst, "local_port": 40000, "remote_port": 80 }] }),
            json!({ "selector": "prefix", "local": dst }),
            json!({ "selector": "prefix", "remote": src }),
            json!({ "selector": "prefix", "keys": [{ "prefix": src }] }),
            json!({ "selector": "prefix", "end": "local", "keys": [{ "prefix": dst }] }),
            json!({ "selector": "service", "local_port": 80 }),
            json!({ "selector": "service", "remote_port": 40000, "local_port": 80 }),
            json!({ "selector": "service", "keys": [{ "port": 80 }] }),
            json!({ "selector": "service", "end": "remote", "keys": [{ "port": 40000 }] }),
        ];
        for selector in oriented {
            let probes = [
                probe(version, &frame, INGRESS),
                probe("the way back", &back, EGRESS),
            ];
            select(json!([selector]), &probes);
        }
        let fixed = [
            json!({ "selector": "ip_pair", "src": src, "dst": dst }),
            json!({ "selector": "ip_pair", "src": src }),
            json!({ "selector": "flow", "src": src, "dst": dst, "src_port": 40000,
                    "dst_port": 80 }),
            json!({ "selector": "flow", "dst_port": 80 }),
            json!({ "selector": "prefix", "src": src, "dst": dst }),
            json!({ "selector": "prefix", "end": "src", "keys": [{ "prefix": src }] }),
            json!({ "selector": "prefix", "end": "dst", "keys": [{ "prefix": dst }] }),
            json!({ "selector": "service", "end": "src", "keys": [{ "port": 40000 }] }),
            json!({ "selector": "service", "end": "dst", "keys": [{ "port": 80 }] }),
        ];
        for selector in fixed {
            let probes = [
                probe(version, &frame, ALL),
                probe("the way back", &back, NOWHERE),
            ];
            select(json!([selector]), &probes);
        }
    }
}

#[test]
fn ip_pair() {
    let mut probes: Vec<_> = wrapped()
        .iter()
        .filter(|(_, frame)| frame.src == V4_SRC)
        .map(|(what, frame)| probe(what, frame, INGRESS))
        .collect();
    probes.extend([
        probe("later fragment", &later_v4(), INGRESS),
        probe("UDP", &v4().protocol(UDP), INGRESS),
        probe("ICMP", &v4().protocol(ICMP), INGRESS),
        probe("IPv6", &v6(), NOWHERE),
        probe(
            "another source",
            &v4().between([10, 0, 0, 3], V4_DST),
            NOWHERE,
        ),
        raw_probe("ARP", arp(), NOWHERE),
    ]);
    select(
        json!([{ "selector": "ip_pair", "local": "10.0.0.2", "remote": "10.0.0.1" }]),
        &probes,
    );
    let probes: Vec<_> = wrapped()
        .iter()
        .filter(|(_, frame)| frame.src == V6_SRC)
        .map(|(what, frame)| probe(what, frame, INGRESS))
        .chain([probe("later fragment", &later_v6(), INGRESS)])
        .collect();
    select(
        json!([{ "selector": "ip_pair", "keys": [
            { "local": "2001:db8::2", "remote": "2001:db8::1" }] }]),
        &probes,
    );
}

#[test]
fn a_selector_without_parameters_takes_all_of_ip() {
    for selector in ["ip_pair", "flow", "prefix", "service"] {
        select(
            json!([{ "selector": selector }]),
            &[
                probe("TCP", &v4(), ALL),
                probe("UDP, IPv6", &v6().protocol(UDP), ALL),
                raw_probe("ARP", arp(), NOWHERE),
            ],
        );
    }
}

#[test]
fn flow() {
    let wanted = json!({ "selector": "flow", "local": "10.0.0.2", "remote": "10.0.0.1",
                         "local_port": "http", "remote_port": 40000 });
    let udp = json!({ "selector": "flow", "local_port": 80, "protocol": "udp" });
    let mut probes: Vec<_> = wrapped()
        .iter()
        .filter(|(_, frame)| frame.src == V4_SRC)
        .map(|(what, frame)| probe(what, frame, INGRESS))
        .collect();
    probes.extend([
        probe("UDP", &v4().protocol(UDP), INGRESS),
        probe("another port", &v4().ports(SRC_PORT, 81), NOWHERE),
        probe("later fragment", &later_v4(), NOWHERE).because(&["fragment"]),
        probe("ICMP has no ports", &v4().protocol(ICMP), NOWHERE),
        raw_probe("ARP", arp(), NOWHERE),
    ]);
    select(json!([wanted]), &probes);
    select(
        json!([udp]),
        &[
            probe("TCP", &v6(), NOWHERE),
            probe("UDP", &v6().protocol(UDP), INGRESS),
        ],
    );
    let by_key = json!({ "selector": "flow", "protocol": "tcp", "keys": [
        { "local": "10.0.0.2", "remote": "10.0.0.1", "local_port": 80, "remote_port": 40000 },
        { "local": "10.0.0.2", "remote": "10.0.0.1", "local_port": 53, "remote_port": 40000,
          "protocol": "udp" },
        { "local": "2001:db8::2", "remote": "2001:db8::1", "local_port": 80,
          "remote_port": 40000 }] });
    let mut probes: Vec<_> = wrapped()
        .iter()
        .map(|(what, frame)| probe(what, frame, INGRESS))
        .collect();
    probes.extend([
        probe("UDP: not that key", &v4().protocol(UDP), NOWHERE),
        probe(
            "key matches, parameter not",
            &v4().protocol(UDP).ports(SRC_PORT, 53),
            NOWHERE,
        ),
    ]);
    select(json!([by_key]), &probes);
}

#[test]
fn prefix() {
    let from = |a: u8, b: u8| v4().between([10, a, b, 9], V4_DST);
    select(
        json!([{ "selector": "prefix", "src": "10.16.0.0/12" }]),
        &[
            probe("first", &from(16, 0), ALL),
            probe("last", &from(31, 255), ALL),
            probe("below", &from(15, 255), NOWHERE),
            probe("above", &from(32, 0), NOWHERE),
            probe("IPv6", &v6(), NOWHERE),
            probe("later fragment", &from(16, 0).fragment(3), ALL),
        ],
    );
    select(
        json!([{ "selector": "prefix", "src": "2001:db8::/33", "dst": "2001:db8::2/127" }]),
        &[
            probe("IPv6", &v6(), ALL),
            probe(
                "dst above",
                &v6().between(V6_SRC, [0x2001, 0xdb8, 0, 0, 0, 0, 0, 4]),
                NOWHERE,
            ),
            probe(
                "src above",
                &v6().between([0x2001, 0xdb8, 0x8000, 0, 0, 0, 0, 1], V6_DST),
                NOWHERE,
            ),
            probe("IPv4", &v4(), NOWHERE),
        ],
    );
    select(
        json!([{ "selector": "prefix", "src": "0.0.0.0/0" }]),
        &[probe("IPv4", &v4(), ALL), probe("IPv6", &v6(), NOWHERE)],
    );
}

/// Port ranges, lists and names, and both ends.
#[test]
fn service() {
    let to = |port: u16| v4().ports(SRC_PORT, port);
    select(
        json!([{ "selector": "service", "port": [22, "https", "1000-2000", "http"] }]),
        &[
            probe("a number", &to(22), ALL),
            probe("a name", &to(443), ALL),
            probe("another name", &v6(), ALL),
            probe("first of a range", &to(1000), ALL),
            probe("last of a range", &to(2000), ALL),
            probe("before the range", &to(999), NOWHERE),
            probe("behind the range", &to(2001), NOWHERE),
            probe("as source", &v4().ports(1500, 5), ALL),
            probe("UDP", &to(22).protocol(UDP), ALL),
            probe("ICMP", &v4().protocol(ICMP), NOWHERE),
            probe("later fragment", &later_v4(), NOWHERE).because(&["fragment"]),
            probe("later fragment, IPv6", &later_v6(), NOWHERE).because(&["fragment"]),
            raw_probe("ARP", arp(), NOWHERE),
        ],
    );
    select(
        json!([{ "selector": "service", "local_port": ["79-81"], "protocol": "udp" }]),
        &[
            probe("TCP", &v4(), NOWHERE),
            probe("UDP", &v4().protocol(UDP), INGRESS),
        ],
    );
    let probes: Vec<_> = wrapped()
        .iter()
        .map(|(what, frame)| probe(what, frame, INGRESS))
        .collect();
    select(
        json!([{ "selector": "service", "local_port": "http" }]),
        &probes,
    );
    select(
        json!([{ "selector": "service", "keys": [
            { "port": 80 }, { "port": 443 }, { "port": 53, "protocol": "udp" }] }]),
        &[
            probe("TCP 80", &v4(), INGRESS),
            probe("TCP 443", &to(443), INGRESS),
            probe("TCP 53", &to(53), NOWHERE),
            probe("UDP 53", &to(53).protocol(UDP), INGRESS),
            probe("UDP 80", &v6().protocol(UDP), NOWHERE),
        ],
    );
}

/// What has no ports it could be told by is of neither kind.
#[test]
fn later_fragments_match_neither_ports_nor_their_negation() {
    let selectors = [
        json!({ "selector": "service", "port": 80 }),
        json!({ "selector": "service", "keys": [{ "port": 80 }] }),
        json!({ "selector": "flow", "dst_port": 80 }),
        json!({ "selector": "tcp_flags", "all": "ack" }),
    ];
    for mut selector in selectors {
        for not in [false, true] {
            selector["not"] = not.into();
            select(
                json!([selector]),
                &[
                    probe("IPv4", &later_v4(), NOWHERE).because(&["fragment"]),
                    probe("IPv6", &later_v6(), NOWHERE).because(&["fragment"]),
                    probe("last one", &later_v4().fragment(1), NOWHERE).because(&["fragment"]),
                ],
            );
        }
    }
}

#[test]
fn negation() {
    select(
        json!([{ "selector": "service", "port": 80, "not": true }]),
        &[
            probe("that port", &v4(), NOWHERE),
            probe("another", &v4().ports(1, 2), ALL),
            probe("no ports", &v4().protocol(ICMP), ALL),
            raw_probe("ARP", arp(), ALL),
        ],
    );
    select(
        json!([{ "selector": "ip_pair", "not": true, "keys": [
            { "local": "10.0.0.2", "remote": "10.0.0.1" }] }]),
        &[probe("the pair", &v4(), EGRESS), probe("IPv6", &v6(), ALL)],
    );
    select(
        json!([{ "selector": "prefix", "src": "10.0.0.0/8", "not": true }]),
        &[probe("inside", &v4(), NOWHERE), probe("IPv6", &v6(), ALL)],
    );
}

#[test]
fn tcp_flags() {
    let with = |flags: u16| v4().flags(flags);
    select(
        json!([{ "selector": "tcp_flags", "all": ["syn"], "none": ["ack", "rst"] }]),
        &[
            probe("SYN", &with(SYN), ALL),
            probe("SYN, ECE", &with(SYN | ECE), ALL),
            probe("SYN, ACK", &with(SYN | ACK), NOWHERE),
            probe("ACK", &with(ACK), NOWHERE),
            probe("SYN, RST", &with(SYN | RST), NOWHERE),
            probe("UDP", &with(SYN).protocol(UDP), NOWHERE),
            probe("IPv6", &v6().flags(SYN), ALL),
            raw_probe("ARP", arp(), NOWHERE),
        ],
    );
    select(
        json!([{ "selector": "tcp_flags", "any": ["fin", "rst", "ae"], "all": "ack" }]),
        &[
            probe("FIN, ACK", &with(FIN | ACK), ALL),
            probe("ninth flag", &with(AE | ACK), ALL),
            probe("FIN", &with(FIN), NOWHERE),
            probe("PSH, ACK", &with(PSH | ACK), NOWHERE),
        ],
    );
    select(
        json!([{ "selector": "tcp_flags", "all": ["syn"], "not": true }]),
        &[
            probe("SYN", &with(SYN), NOWHERE),
            probe("ACK", &with(ACK), ALL),
            probe("UDP", &v4().protocol(UDP), ALL),
        ],
    );
    let mut short = v4();
    short.data_offset = Some(4);
    let mut long = v4();
    long.data_offset = Some(6);
    select(
        json!([{ "selector": "tcp_flags", "all": "ack", "not": true }]),
        &[
            probe("data offset 4", &short, NOWHERE).because(&["bad_header"]),
            probe("data offset behind IP", &long.clone().padded(), NOWHERE)
                .because(&["bad_header"]),
        ],
    );
}

/// `a and b or c` is `(a and b) or c`.
#[test]
fn alternatives() {
    let a = json!({ "selector": "ip_pair", "src": "10.0.0.1" });
    let b = json!({ "selector": "service", "port": 80 });
    let c = json!({ "selector": "tcp_flags", "all": ["rst"] });
    let or = |selector: &Value| {
        let mut selector = selector.clone();
        selector["op"] = "or".into();
        selector
    };
    let reset = |frame: Frame| frame.flags(RST);
    let not_a = || v4().between([10, 0, 0, 9], V4_DST);
    let not_b = || v4().ports(1, 2);
    select(
        json!([a, b, or(&c)]),
        &[
            probe("a, b", &v4(), ALL),
            probe("a", &not_b(), NOWHERE),
            probe("b", &not_a(), NOWHERE),
            probe("c", &reset(not_a().ports(1, 2)), ALL),
            probe("a, c", &reset(not_b()), ALL),
            probe("b, c", &reset(not_a()), ALL),
            probe("a, b, c", &reset(v4()), ALL),
            probe("none", &not_a().ports(1, 2), NOWHERE),
        ],
    );
    select(
        json!([c, or(&a), b]),
        &[
            probe("a, b", &v4(), ALL),
            probe("a", &not_b(), NOWHERE),
            probe("b", &not_a(), NOWHERE),
            probe("c", &reset(not_a().ports(1, 2)), ALL),
        ],
    );
    let mut not = or(&b);
    not["not"] = true.into();
    select(
        json!([c, not]),
        &[
            probe("b", &v4(), NOWHERE),
            probe("not b", &not_b(), ALL),
            probe("c, b", &reset(v4()), ALL),
            probe("cannot tell b", &later_v4(), NOWHERE).because(&["fragment", "fragment"]),
        ],
    );
}

/// (A, spark) and (B, web) were given, so (A, web) and (B, spark) were not.
#[test]
fn alternatives_do_not_match_crosswise() {
    let from = |a: u8, port: u16| v4().between([10, 0, 0, a], V4_DST).ports(SRC_PORT, port);
    let [pair_a, pair_b] = ["10.0.0.11", "10.0.0.12"]
        .map(|remote| json!({ "selector": "ip_pair", "src": remote, "dst": "10.0.0.2" }));
    let [spark, web] = [7077, 80].map(|port| json!({ "selector": "service", "port": port }));
    let mut or = pair_b.clone();
    or["op"] = "or".into();
    let probes = [
        probe("A, spark", &from(11, 7077), ALL),
        probe("B, web", &from(12, 80), ALL),
        probe("A, web", &from(11, 80), NOWHERE),
        probe("B, spark", &from(12, 7077), NOWHERE),
    ];
    select(json!([pair_a, spark, or, web]), &probes);
}

#[test]
fn many_keys() {
    let keys: Vec<Value> = (0..2000u16)
        .map(|n| json!({ "local": "10.0.0.2", "remote": format!("10.1.{}.{}", n / 250, n % 250) }))
        .collect();
    let from = |a: u8, b: u8| v4().between([10, 1, a, b], V4_DST);
    select(
        json!([{ "selector": "ip_pair", "keys": keys }]),
        &[
            probe("first", &from(0, 0), INGRESS),
            probe("last", &from(7, 249), INGRESS),
            probe("behind", &from(8, 0), NOWHERE),
        ],
    );
}

#[test]
fn named_sets() {
    let sets = json!({
        "flows": { "kind": "flow", "size": 10 },
        "pairs": { "kind": "ip_pair", "size": 10 },
        "nets": { "kind": "prefix", "size": 10 },
        "ports": { "kind": "port", "size": 10 },
    });
    let using = |selector: &str, set: &str| json!([{ "selector": selector, "set": set }]);
    select_in(
        &sets,
        |bench| {
            bench.store("flows", "flow", json!([
                { "local": "10.0.0.2", "remote": "10.0.0.1", "local_port": 80, "remote_port": 40000 },
                { "local": "2001:db8::1", "remote": "2001:db8::2", "local_port": 40000,
                  "remote_port": 80 }]));
        },
        using("flow", "flows"),
        &[
            probe("IPv4", &v4(), INGRESS),
            probe("IPv6", &v6(), EGRESS),
            probe("UDP", &v4().protocol(UDP), NOWHERE),
        ],
    );
    select_in(
        &sets,
        |bench| {
            bench.store(
                "pairs",
                "ip_pair",
                json!([{ "local": "10.0.0.1", "remote": "10.0.0.2" }]),
            )
        },
        using("ip_pair", "pairs"),
        &[probe("IPv4", &v4(), EGRESS), probe("IPv6", &v6(), NOWHERE)],
    );
    select_in(
        &sets,
        |bench| {
            bench.store(
                "nets",
                "prefix",
                json!([{ "prefix": "10.0.0.0/31" }, { "prefix": "2001:db8::/32" }]),
            )
        },
        using("prefix", "nets"),
        &[probe("IPv4", &v4(), INGRESS), probe("IPv6", &v6(), ALL)],
    );
    select_in(
        &sets,
        |bench| bench.store("ports", "port", json!([{ "port": "http" }])),
        using("service", "ports"),
        &[probe("IPv4", &v4(), INGRESS), probe("IPv6", &v6(), INGRESS)],
    );
    for (selector, set) in [
        ("flow", "flows"),
        ("ip_pair", "pairs"),
        ("prefix", "nets"),
        ("service", "ports"),
    ] {
        select_in(
            &sets,
            |_| {},
            using(selector, set),
            &[probe("empty set", &v4(), NOWHERE)],
        );
    }
}

#[test]
fn every_selector_has_rows() {
    let registry = policy_chain::policy::Registry::embedded().unwrap();
    let names: Vec<&str> = registry
        .selectors()
        .map(|policy| policy.name.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "flow",
            "ip_pair",
            "mptcp",
            "mptcp_connection",
            "prefix",
            "service",
            "tcp",
            "tcp_flags"
        ]
    );
    assert_eq!(Hook::ALL.len(), 3);
}
