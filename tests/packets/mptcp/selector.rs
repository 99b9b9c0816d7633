// SPDX-License-Identifier: MIT OR Apache-2.0
//! The selector `mptcp`: every parameter on every sort of option.

use serde_json::{Value, json};

use super::*;
use crate::bench::{On, Probe, probe, raw_probe, select};

const ALL: On = On::All;
const NOWHERE: On = On::Nowhere;

/// Options by name, with the flags of a segment that has one.
fn options() -> Vec<(&'static str, u16, Vec<u8>)> {
    vec![
        ("capable syn", SYN, mp(&[&[0x01, 0x81]])),
        ("capable syn v0", SYN, mp(&[&[0x00, 0x01], &[9; 8]])),
        ("capable syn-ack", SYN | ACK, mp(&[&[0x01, 0x01], &[9; 8]])),
        ("capable third", ACK, mp(&[&[0x01, 0x21], &[9; 16]])),
        ("join syn", SYN, mp(&[&[0x10, 7], &[9; 8]])),
        ("join syn backup", SYN, mp(&[&[0x11, 8], &[9; 8]])),
        ("join syn-ack", SYN | ACK, mp(&[&[0x11, 7], &[9; 12]])),
        ("join third", ACK, mp(&[&[0x10, 7], &[9; 20]])),
        ("dss", ACK, mp(&[&[0x20, 1], &[9; 4]])),
        ("dss fin", ACK | PSH, mp(&[&[0x20, 0x15], &[9; 14]])),
        ("add", ACK, announcement(7, 16)),
        ("add v6 port", ACK, announcement(8, 30)),
        ("echo", ACK, mp(&[&[0x31, 7], &[9; 4]])),
        ("remove", ACK, mp(&[&[0x40, 7]])),
        ("remove several", ACK, mp(&[&[0x40, 3, 5, 8]])),
        (
            "remove many",
            ACK,
            mp(&[&[0x40], &[20, 21, 22, 23, 24, 25, 26, 27, 7, 8]]),
        ),
        ("prio", ACK, mp(&[&[0x50]])),
        ("prio backup", ACK, mp(&[&[0x51]])),
        ("prio of an id", ACK, mp(&[&[0x51, 7]])),
        ("fail", ACK, mp(&[&[0x60, 7], &[9; 8]])),
        ("fastclose", ACK, mp(&[&[0x70, 7], &[9; 8]])),
        ("tcprst", RST | ACK, mp(&[&[0x81, 7]])),
        ("subtype 15", ACK, mp(&[&[0xf1, 7]])),
    ]
}

/// Parameters, and the names of the options that all of them hold for.
fn cases() -> Vec<(Value, Vec<&'static str>)> {
    let every: Vec<&str> = options().iter().map(|(name, ..)| *name).collect();
    vec![
        (json!({}), every),
        (
            json!({ "subtype": "mp_capable" }),
            vec![
                "capable syn",
                "capable syn v0",
                "capable syn-ack",
                "capable third",
            ],
        ),
        (
            json!({ "subtype": "mp_join" }),
            vec!["join syn", "join syn backup", "join syn-ack", "join third"],
        ),
        (json!({ "subtype": 2 }), vec!["dss", "dss fin"]),
        (
            json!({ "subtype": ["add_addr", "mp_fail", 15] }),
            vec!["add", "add v6 port", "echo", "fail", "subtype 15"],
        ),
        (
            json!({ "subtype": ["mp_capable", "mp_join", "dss", "add_addr", "remove_addr",
                                "mp_prio", "mp_fail", "mp_fastclose", "mp_tcprst"],
                    "backup": "set" }),
            vec![
                "join syn backup",
                "join syn-ack",
                "prio backup",
                "prio of an id",
            ],
        ),
        (json!({ "version": 0 }), vec!["capable syn v0"]),
        (
            json!({ "version": [1] }),
            vec!["capable syn", "capable syn-ack", "capable third"],
        ),
        (json!({ "version": [1, 0], "subtype": "dss" }), vec![]),
        (json!({ "version": [2, 0] }), vec!["capable syn v0"]),
        (json!({ "version": [2, 3] }), vec![]),
        (json!({ "flags": 0x81 }), vec!["capable syn"]),
        (json!({ "flags": 0x20 }), vec!["capable third"]),
        (
            json!({ "flags": 1 }),
            vec![
                "capable syn",
                "capable syn v0",
                "capable syn-ack",
                "capable third",
                "dss",
                "dss fin",
            ],
        ),
        (json!({ "flags": 0x11, "subtype": "dss" }), vec!["dss fin"]),
        (
            json!({ "backup": "set" }),
            vec![
                "join syn backup",
                // the SYN-ACK is a SYN, too
                "join syn-ack",
                "prio backup",
                "prio of an id",
            ],
        ),
        (json!({ "backup": "clear" }), vec!["join syn", "prio"]),
        (
            json!({ "backup": "any", "subtype": "mp_prio" }),
            vec!["prio", "prio backup", "prio of an id"],
        ),
        (json!({ "echo": "set" }), vec!["echo"]),
        (json!({ "echo": "clear" }), vec!["add", "add v6 port"]),
        (json!({ "echo": "set", "backup": "set" }), vec![]),
        (
            json!({ "address_id": 7 }),
            vec![
                "join syn",
                "join syn-ack",
                "add",
                "echo",
                "remove",
                "prio of an id",
            ],
        ),
        (
            json!({ "address_id": [8, 9, 10, 11] }),
            vec!["join syn backup", "add v6 port", "remove several"],
        ),
        (json!({ "address_id": [0, 5] }), vec!["remove several"]),
        (json!({ "address_id": 27 }), vec!["remove many"]),
        (
            json!({ "address_id": 7, "subtype": "remove_addr" }),
            vec!["remove"],
        ),
        (
            json!({ "address_id": 7, "subtype": "add_addr", "echo": "clear" }),
            vec!["add"],
        ),
    ]
}

fn selector(parameters: &Value) -> Value {
    let mut selector = json!({ "selector": "mptcp" });
    let members = parameters.as_object().unwrap().clone();
    selector.as_object_mut().unwrap().extend(members);
    selector
}

#[test]
fn every_parameter_on_every_option() {
    for (parameters, wanted) in cases() {
        let mut probes = Vec::new();
        for (name, flags, bytes) in options() {
            let on = if wanted.contains(&name) { ALL } else { NOWHERE };
            for (_, frame) in both() {
                let frame = frame.flags(flags);
                let alone = frame.clone().options(&words(&[&bytes]));
                let odd = words(&[&[1], &[3, 3, 7], &[1], &bytes]);
                probes.push(probe(name, &alone, on));
                probes.push(probe(name, &frame.options(&odd).payload(b"data"), on));
            }
        }
        probes.extend(in_pairs(&wanted));
        select(json!([selector(&parameters)]), &probes);
    }
}

/// The option that fits may be any of a segment's: the parameters are all of one, not of several.
fn in_pairs(wanted: &[&str]) -> Vec<Probe> {
    let options = options();
    let mut probes = Vec::new();
    for (first, flags, a) in &options {
        for (second, others, b) in &options {
            let both = words(&[a, b]);
            if flags & SYN != others & SYN || both.len() > 40 {
                continue;
            }
            let on = match wanted.contains(first) || wanted.contains(second) {
                true => ALL,
                false => NOWHERE,
            };
            let frame = v4().flags(*flags).options(&both);
            probes.push(probe(first, &frame, on));
        }
    }
    assert!(probes.len() > 100);
    probes
}

#[test]
fn malformed_lists() {
    let dss = mp(&[&[0x20, 1], &[9; 4]]);
    let with = |options: &[&[u8]]| v4().options(&words(options)).payload(&[30; 40]);
    let bad =
        |what, options: &[&[u8]]| probe(what, &with(options), NOWHERE).because(&["bad_option"]);
    let rest = [0; 30];
    let mut first = v6().options(&words(&[&dss]));
    first.extensions = vec![(FRAGMENT, vec![0, 0, 0, 1, 0, 0, 0, 7])];
    let rows = || {
        vec![
            bad("length 0", &[&[30, 0, 0x20, 1]]),
            bad("length 1", &[&[30, 1, 0x20, 1]]),
            bad("another of length 0", &[&[8, 0], &dss]),
            bad("past the end", &[&[30, 9, 0x20, 1, 9, 9, 9, 9]]),
            bad("no length", &[&[1, 1, 1, 30]]),
            probe("UDP", &v4().protocol(UDP), NOWHERE),
            raw_probe(
                "neither IPv4 nor IPv6",
                [&[2; 12][..], &[8, 6], &rest].concat(),
                NOWHERE,
            ),
            probe("later fragment", &with(&[&dss]).fragment(3), NOWHERE).because(&["fragment"]),
        ]
    };
    let mut probes = rows();
    probes.extend([
        probe("no subtype", &with(&[&[30, 2]]), NOWHERE),
        probe("behind EOL", &with(&[&[0, 0, 0, 0], &dss]), NOWHERE),
        probe("no options", &v6(), NOWHERE),
        probe("of another subtype", &with(&[&mp(&[&[0x50]])]), NOWHERE),
        probe("of another kind", &with(&[&[253, 4, 0x20, 1]]), NOWHERE),
        probe("what fits, then length 0", &with(&[&dss, &[8, 0]]), ALL),
        probe("last of 40 bytes", &with(&[&[1; 32], &dss]), ALL),
        probe(
            "first fragment",
            &with(&[&dss]).fragment(MORE_FRAGMENTS),
            ALL,
        ),
        probe("first fragment, IPv6", &first, ALL),
    ]);
    select(json!([{ "selector": "mptcp", "subtype": "dss" }]), &probes);
    let mut probes = rows();
    // what cannot be told matches the negation as little
    probes[5] = probe("UDP", &v4().protocol(UDP), ALL);
    probes[6] = raw_probe(
        "neither IPv4 nor IPv6",
        [&[2; 12][..], &[8, 6], &rest].concat(),
        ALL,
    );
    probes.extend([
        probe("no subtype", &with(&[&[30, 2]]), ALL),
        probe("no options", &v6(), ALL),
        probe("DSS", &with(&[&dss]), NOWHERE),
    ]);
    select(
        json!([{ "selector": "mptcp", "subtype": "dss", "not": true }]),
        &probes,
    );
}
