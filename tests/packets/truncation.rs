// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every policy on every beginning of a packet.

use policy_chain::engine::generation::CarrierChoice;
use policy_chain::hook::Hook;
use policy_chain::replay::{Outcome, Verdict};
use serde_json::{Value, json};

use crate::bench::{Bench, file};
use crate::frames::*;

/// A packet, and where its headers end.
struct Whole {
    what: &'static str,
    bytes: Vec<u8>,
    /// End of the fixed IP header and of the first eight bytes of every extension header.
    ip: usize,
    transport: usize,
    tcp: usize,
}

fn packets() -> Vec<Whole> {
    // every option an action below looks for, and NOPs to insert one in place of
    let options = [
        &[1, 2, 4, 5, 0xb4][..],
        &option(30, 12, 0x30),
        &option(8, 10, 1),
        &[1; 9],
    ]
    .concat();
    let header = 20 + options.len();
    let fill = |frame: Frame| frame.options(&options).payload(b"some payload").build();
    vec![
        Whole {
            what: "IPv4 with options",
            bytes: fill(v4().ip_options(&[1; 12])),
            ip: 34,
            transport: 46,
            tcp: 46 + header,
        },
        Whole {
            what: "IPv4 with options, SYN",
            bytes: fill(v4().flags(SYN).ip_options(&[1; 12])),
            ip: 34,
            transport: 46,
            tcp: 46 + header,
        },
        Whole {
            what: "IPv6",
            bytes: fill(v6()),
            ip: 54,
            transport: 54,
            tcp: 54 + header,
        },
        Whole {
            what: "IPv6 with extension headers, two tags, SYN",
            bytes: fill(
                v6().flags(SYN)
                    .tags(&[0x88a8, 0x8100])
                    .extension(HOP_BY_HOP, &[0; 8])
                    .extension(DESTINATION, &[0; 8]),
            ),
            ip: 78,
            transport: 78,
            tcp: 78 + header,
        },
    ]
}

/// How long a packet must be for a selector to tell.
type Needs<'a> = &'a dyn Fn(&Whole) -> usize;

impl Whole {
    /// From the shortest frame that gets to a hook on. What the kernel's test run refuses goes
    /// through a veth pair.
    fn lengths(&self) -> impl Iterator<Item = usize> + use<> {
        14..=self.bytes.len()
    }
}

/// Runs every beginning of every packet; `check` gets the packet, the length and the outcome.
fn run_all(chain: &Value, check: impl Fn(&str, &Whole, usize, &Outcome)) {
    run_those(chain, |_| true, check);
}

/// As [`run_all`], of these lengths only.
fn run_those(
    chain: &Value,
    wanted: impl Fn(usize) -> bool,
    check: impl Fn(&str, &Whole, usize, &Outcome),
) {
    for hook in Hook::ALL {
        let mut bench = Bench::load(chain, hook, CarrierChoice::Auto);
        for packet in packets() {
            for length in packet.lengths().filter(|length| wanted(*length)) {
                let what = format!("{}, {length} bytes on {hook}: {chain}", packet.what);
                let outcome = bench.run(&what, &packet.bytes[..length]);
                check(&what, &packet, length, &outcome);
            }
        }
    }
}

#[test]
fn selectors_do_not_guess() {
    let net = |packet: &Whole| packet.ip;
    let ports = |packet: &Whole| packet.transport + 4;
    let tcp = |packet: &Whole| packet.tcp;
    let selectors: [(Value, Needs); 9] = [
        (json!({ "selector": "tcp" }), &net),
        (json!({ "selector": "ip_pair" }), &net),
        (json!({ "selector": "prefix" }), &net),
        (
            json!({ "selector": "prefix", "end": "src", "keys": [
            { "prefix": "10.0.0.0/8" }, { "prefix": "2001:db8::/32" }] }),
            &net,
        ),
        (json!({ "selector": "flow", "dst_port": 80 }), &ports),
        (
            json!({ "selector": "flow", "keys": [
            { "local": "10.0.0.2", "remote": "10.0.0.1", "local_port": 80, "remote_port": 40000 },
            { "local": "10.0.0.1", "remote": "10.0.0.2", "local_port": 40000, "remote_port": 80 },
            { "local": "2001:db8::2", "remote": "2001:db8::1", "local_port": 80, "remote_port": 40000 },
            { "local": "2001:db8::1", "remote": "2001:db8::2", "local_port": 40000, "remote_port": 80 }
        ] }),
            &ports,
        ),
        (json!({ "selector": "service", "port": 80 }), &ports),
        (
            json!({ "selector": "service", "end": "dst", "keys": [{ "port": 80 }] }),
            &ports,
        ),
        (
            json!({ "selector": "tcp_flags", "any": ["syn", "ack"] }),
            &tcp,
        ),
    ];
    for (mut selector, needs) in selectors {
        for not in [false, true] {
            selector["not"] = not.into();
            let chain = file(json!({ "selectors": [selector], "then": "drop" }));
            run_all(&chain, |what, packet, length, outcome| {
                let whole = length >= needs(packet);
                let matched = whole && !not;
                assert_eq!(outcome.matched, matched, "{what}: {outcome:?}");
                assert_eq!(outcome.verdict == Verdict::Drop, matched, "{what}");
                assert_eq!(outcome.reasons.is_empty(), whole, "{what}: {outcome:?}");
                assert_eq!(outcome.frame, packet.bytes[..length], "{what}");
            });
        }
    }
}

#[test]
fn actions_on_tcp_want_the_whole_header() {
    for action in [
        json!({ "action": "set_window", "raw": true, "bytes": 9 }),
        json!({ "action": "set_mss", "bytes": 1 }),
        json!({ "action": "strip_option", "kind": "mptcp" }),
        json!({ "action": "strip_option", "kind": "mptcp", "subtype": "add_addr" }),
        json!({ "action": "insert_option", "kind": 253, "data": "aabb" }),
        json!({ "action": "insert_option", "kind": 253, "data": "aabbccddeeff00" }),
    ] {
        let chain = file(json!({ "actions": [action] }));
        run_all(&chain, |what, packet, length, outcome| {
            assert_eq!(outcome.verdict, Verdict::Pass, "{what}");
            assert_eq!(outcome.frame.len(), length, "{what}");
            if length < packet.tcp {
                assert_eq!(outcome.reasons, ["truncated"], "{what}");
                assert_eq!(outcome.frame, packet.bytes[..length], "{what}");
            } else {
                assert_eq!(
                    outcome.frame[packet.tcp..],
                    packet.bytes[packet.tcp..length],
                    "{what}"
                );
                let changed = outcome.frame != packet.bytes[..length];
                assert_eq!(changed, outcome.reasons.is_empty(), "{what}: {outcome:?}");
            }
        });
    }
}

#[test]
fn other_actions_take_any_packet() {
    let sub = json!([{ "name": "sub", "actions": [{ "action": "count" }] }]);
    for (action, verdict) in [
        (json!({ "action": "count" }), Verdict::Pass),
        (json!({ "action": "pass" }), Verdict::Pass),
        (json!({ "action": "drop" }), Verdict::Drop),
        (json!({ "action": "goto", "chain": "sub" }), Verdict::Pass),
        (
            json!({ "action": "redirect", "device": "lo" }),
            Verdict::Redirect,
        ),
        (
            json!({ "action": "redirect", "device": "lo", "neighbour": true }),
            Verdict::Pass,
        ),
    ] {
        let members = json!({ "actions": [action] });
        let chain = crate::bench::with_chains(members, sub.clone(), json!({}));
        // What is sent elsewhere is waited for in vain, where the kernel's test run does not take
        // the frame: so not every short one.
        let wanted = |length| verdict != Verdict::Redirect || length == 14 || length >= 54;
        run_those(&chain, wanted, |what, packet, length, outcome| {
            assert_eq!(outcome.verdict, verdict, "{what}: {outcome:?}");
            assert_eq!(outcome.frame, packet.bytes[..length], "{what}");
        });
    }
    let macs = json!({ "action": "redirect", "device": "lo", "dst_mac": "02:00:00:00:00:bb" });
    run_those(
        &file(json!({ "actions": [macs] })),
        |length| length == 14 || length >= 54,
        |what, packet, length, outcome| {
            assert_eq!(outcome.frame[6..], packet.bytes[6..length], "{what}");
        },
    );
}

/// No room for a header behind the Ethernet header.
#[test]
fn an_empty_packet_of_each_type() {
    for kind in [[8, 0], [0x86, 0xdd], [0x81, 0], [0x88, 0xa8]] {
        let frame = [&[2; 12][..], &kind].concat();
        let chain =
            file(json!({ "actions": [{ "action": "set_window", "raw": true, "bytes": 9 }] }));
        let mut bench = Bench::load(&chain, Hook::Xdp, CarrierChoice::Auto);
        let outcome = bench.run("empty", &frame);
        assert_eq!(outcome.reasons, ["truncated"], "{kind:?}");
        assert_eq!(outcome.frame, frame);
    }
}
