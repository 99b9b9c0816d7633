// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the other actions do, and what chains of them do.

use policy_chain::engine::generation::CarrierChoice;
use policy_chain::hook::Hook;
use policy_chain::replay::Verdict;
use serde_json::{Value, json};

use crate::bench::{Bench, Row, Want, act, act_in, check_rows, file, gives, leaves, with_chains};
use crate::frames::*;

fn set_window(window: Value) -> Value {
    json!({ "action": "set_window", "raw": true, "bytes": window })
}

#[test]
fn set_window_everywhere_but_on_a_syn() {
    let bases = [
        ("IPv4", v4()),
        ("IPv6", v6()),
        ("payload", v4().payload(b"odd")),
        ("payload, IPv6", v6().payload(b"even")),
        ("options", v4().options(&[1; 40])),
        ("padding", v4().padded()),
        ("802.1Q", v4().tags(&[0x8100])),
        ("QinQ, IPv6", v6().tags(&[0x88a8, 0x8100])),
        ("IP options", v4().ip_options(&[1; 40])),
        (
            "extension headers",
            v6().extension(HOP_BY_HOP, &[0; 8])
                .extension(DESTINATION, &[0; 8]),
        ),
        (
            "first fragment",
            v4().fragment(MORE_FRAGMENTS).payload(&[1; 24]),
        ),
        ("FIN", v4().flags(FIN | ACK)),
        ("RST", v6().flags(RST)),
    ];
    for window in [0u16, 1, 511, 512, 0x1234, 65535] {
        let mut rows: Vec<Row> = bases
            .iter()
            .map(|(what, frame)| gives(*what, frame, &frame.clone().window(window)))
            .collect();
        rows.extend([
            leaves("SYN", &v4().flags(SYN), "syn"),
            leaves("SYN, ACK", &v6().flags(SYN | ACK), "syn"),
            leaves("UDP", &v4().protocol(UDP), "not_tcp"),
            leaves("UDP, IPv6", &v6().protocol(UDP), "not_tcp"),
            leaves("later fragment", &v4().fragment(1), "fragment"),
            leaves(
                "later fragment, IPv6",
                &v6().extension(FRAGMENT, &[0, 0, 0, 8, 0, 0, 0, 1]),
                "fragment",
            ),
            leaves("three tags", &v4().tags(&[0x8100; 3]), "not_ip"),
        ]);
        act(set_window(window.into()), &rows);
        let seeds = both().map(|(version, frame)| {
            let frame = frame.check(Check::Seed).payload(b"local");
            gives(version, &frame, &frame.clone().window(window))
        });
        let chain = file(json!({ "actions": [set_window(window.into())] }));
        act_in(chain, &[Hook::Xdp], &seeds);
    }
}

/// A checksum that was wrong stays wrong by as much: nobody may mistake the packet for a good one.
#[test]
fn wrong_checksums_stay_wrong() {
    for hook in Hook::ALL {
        let chain = file(json!({ "actions": [set_window(json!(9))] }));
        let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
        for (what, frame) in both() {
            let frame = frame.check(Check::Raw(0x1357)).payload(b"x").build();
            assert_eq!(sums(&frame), Sums::Wrong);
            let outcome = bench.run(what, &frame);
            assert_eq!(sums(&outcome.frame), Sums::Wrong, "{what} on {hook}");
            assert_ne!(outcome.frame, frame, "{what} on {hook}");
        }
    }
}

/// No extension headers may carry a write out of the range offsets are kept in.
#[test]
fn long_extension_headers_are_left_alone() {
    let chain = file(json!({ "actions": [set_window(json!(9))] }));
    for hook in Hook::ALL {
        let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
        for length in (8..600).step_by(8) {
            let mut header = vec![0; length];
            header[1] = (length / 8 - 1) as u8;
            let frame = v6().extension(DESTINATION, &header).payload(b"payload");
            let input = frame.build();
            let outcome = bench.run("a long destination header", &input);
            if outcome.reasons.is_empty() {
                assert_eq!(outcome.frame, frame.window(9).build(), "{hook}, {length}");
            } else {
                assert_eq!(outcome.frame, input, "{hook}, {length}");
            }
        }
    }
}

#[test]
fn verdicts() {
    let frames = [v4(), v6(), v4().protocol(ICMP), v4().tags(&[0x8100; 3])];
    let rows = |verdict: Verdict| {
        frames
            .clone()
            .map(|frame| gives("as it is", &frame, &frame).verdict(verdict))
    };
    let chain =
        |action: &str, then: &str| file(json!({ "actions": [{ "action": action }], "then": then }));
    act_in(chain("drop", "pass"), &Hook::ALL, &rows(Verdict::Drop));
    act_in(chain("pass", "drop"), &Hook::ALL, &rows(Verdict::Pass));
    act_in(chain("count", "pass"), &Hook::ALL, &rows(Verdict::Pass));
    act_in(chain("count", "drop"), &Hook::ALL, &rows(Verdict::Drop));
    act_in(chain("count", "continue"), &Hook::ALL, &rows(Verdict::Pass));
    act_in(file(json!({})), &Hook::ALL, &rows(Verdict::Pass));
}

#[test]
fn goto() {
    let subs = json!([
        { "name": "narrow", "selectors": [{ "selector": "service", "port": 80 }],
          "actions": [set_window(json!(9))], "then": { "goto": "end" } },
        { "name": "end", "actions": [{ "action": "drop" }] },
    ]);
    for members in [
        json!({ "actions": [{ "action": "goto", "chain": "narrow" }], "then": "drop" }),
        json!({ "then": { "goto": "narrow" }, "actions": [{ "action": "count" }] }),
    ] {
        let chain = with_chains(members, subs.clone(), json!({}));
        let rows = [
            gives("taken", &v4(), &v4().window(9)).verdict(Verdict::Drop),
            gives("taken, IPv6", &v6(), &v6().window(9)).verdict(Verdict::Drop),
            gives("not taken: passes", &v4().ports(1, 2), &v4().ports(1, 2)),
        ];
        act_in(chain, &Hook::ALL, &rows);
    }
}

const VERDICT_MAP: &str = r#"[{ "action": "goto", "chain": { "from": "element" } }]"#;

#[test]
fn goto_where_the_element_says() {
    let subs = json!([
        { "name": "slow", "actions": [set_window(json!(9))] },
        { "name": "none", "actions": [{ "action": "drop" }] },
        { "name": "narrow", "selectors": [{ "selector": "service", "port": 81 }],
          "actions": [{ "action": "drop" }] },
    ]);
    let actions: Value = serde_json::from_str(VERDICT_MAP).unwrap();
    let members = json!({
        "selectors": [{ "selector": "ip_pair", "set": "map" }, { "selector": "tcp", "op": "or" }],
        "actions": actions,
    });
    let sets = json!({ "map": { "kind": "ip_pair", "size": 100 } });
    let chains = with_chains(members, subs, sets);
    for hook in Hook::ALL {
        for carrier in [CarrierChoice::Auto, CarrierChoice::PerCpu] {
            let mut bench = Bench::load(&chains, hook, carrier);
            let pair = |last: u8| {
                let (a, b) = (format!("10.0.0.{last}"), "10.0.0.2");
                if hook.is_ingress() {
                    (b.to_owned(), a)
                } else {
                    (a, b.to_owned())
                }
            };
            let element = |last: u8, value: Value| {
                let (local, remote) = pair(last);
                let mut element = json!({ "local": local, "remote": remote });
                element
                    .as_object_mut()
                    .unwrap()
                    .extend(value.as_object().unwrap().clone());
                bench.store("map", "ip_pair", json!([element]));
            };
            element(11, json!({ "chain": "slow" }));
            element(12, json!({ "chain": "none" }));
            element(13, json!({ "chain": "narrow" }));
            element(14, json!({}));
            element(15, json!({ "chain": "gone-0" }));
            element(16, json!({ "chain": "gone-5" }));
            element(17, json!({ "chain": "gone-1000" }));
            element(18, json!({ "arg": 1 }));
            let from = |last: u8| v4().between([10, 0, 0, last], V4_DST);
            let rows = [
                gives("a chain", &from(11), &from(11).window(9)),
                gives("another", &from(12), &from(12)).verdict(Verdict::Drop),
                gives("one that does not take it", &from(13), &from(13)),
                gives(
                    "one that does",
                    &from(13).ports(1, 81),
                    &from(13).ports(1, 81),
                )
                .verdict(Verdict::Drop),
                leaves("no chain given", &from(14), "no_element"),
                leaves("id 0", &from(15), "no_chain"),
                leaves("a slot past the last", &from(16), "no_chain"),
                leaves("far away", &from(17), "no_chain"),
                leaves("a number, not a chain", &from(18), "bad_argument"),
                leaves("matched without an element", &v6(), "no_element"),
                gives("again", &from(11), &from(11).window(9)),
            ];
            check_rows(&mut bench, "verdict map", &rows);
        }
    }
}

/// The window from the element that matched, in the packet and per CPU.
#[test]
fn arguments() {
    let chains = with_chains(
        json!({
            "selectors": [
                { "selector": "prefix", "end": "src", "set": "windows" },
                { "selector": "service", "port": 80 },
                { "selector": "flow", "op": "or", "dst_port": 81 },
                { "selector": "service", "op": "or", "end": "dst",
                  "set": "ports" },
            ],
            "actions": [set_window(json!({ "from": "element" }))],
        }),
        json!([]),
        json!({
            "windows": { "kind": "prefix", "size": 10 },
            "ports": { "kind": "port", "size": 10 },
        }),
    );
    for hook in Hook::ALL {
        for carrier in [CarrierChoice::Auto, CarrierChoice::PerCpu] {
            let mut bench = Bench::load(&chains, hook, carrier);
            bench.store(
                "windows",
                "prefix",
                json!([
                    { "prefix": "10.0.0.0/8", "arg": 1000 },
                    { "prefix": "10.1.0.0/16", "arg": 65535 },
                    { "prefix": "10.1.2.0/24", "arg": 65536 },
                    { "prefix": "10.1.2.3/32" },
                    { "prefix": "10.1.2.4/32", "arg": u64::MAX },
                    { "prefix": "10.1.2.5/32", "arg": 0 },
                    { "prefix": "2001:db8::/32", "arg": 77 },
                ]),
            );
            bench.store(
                "ports",
                "port",
                json!([{ "port": 82, "arg": 820 }, { "port": 83 }, { "port": 84, "chain": "gone-5" }]),
            );
            let from = |a: u8, b: u8, c: u8| v4().between([10, a, b, c], V4_DST);
            let rows = [
                gives(
                    "the shortest prefix",
                    &from(0, 0, 1),
                    &from(0, 0, 1).window(1000),
                ),
                gives(
                    "a longer one, greatest value",
                    &from(1, 0, 1),
                    &from(1, 0, 1).window(65535),
                ),
                leaves("out of range by one", &from(1, 2, 9), "bad_argument"),
                leaves("the longest has no argument", &from(1, 2, 3), "no_element"),
                leaves("of 64 bits", &from(1, 2, 4), "bad_argument"),
                gives(
                    "zero is an argument",
                    &from(1, 2, 5),
                    &from(1, 2, 5).window(0),
                ),
                gives("IPv6", &v6(), &v6().window(77)),
                leaves(
                    "stale: the first alternative had an element, its second selector missed",
                    &from(0, 0, 1).ports(1, 81),
                    "no_element",
                ),
                leaves(
                    "no element at all",
                    &from(0, 0, 1).between([11, 0, 0, 1], V4_DST).ports(1, 81),
                    "no_element",
                ),
                gives(
                    "the last alternative's, not the first's",
                    &from(0, 0, 1).ports(1, 82),
                    &from(0, 0, 1).ports(1, 82).window(820),
                ),
                leaves(
                    "the last alternative's has none",
                    &from(0, 0, 1).ports(1, 83),
                    "no_element",
                ),
                leaves(
                    "a chain, not a number",
                    &from(0, 0, 1).ports(1, 84),
                    "bad_argument",
                ),
                leaves("SYN", &from(0, 0, 1).flags(SYN), "syn"),
            ];
            check_rows(&mut bench, "argument", &rows);
        }
    }
}

/// An argument is of one chain: the next chain of the packet does not see it.
#[test]
fn arguments_of_other_chains_are_not_used() {
    let chains = with_chains(
        json!({
            "selectors": [{ "selector": "service", "end": "dst", "keys": [{ "port": 80, "arg": 7 }] }],
            "actions": [set_window(json!({ "from": "element" })), { "action": "goto", "chain": "sub" }],
        }),
        json!([{
            "name": "sub",
            "selectors": [
                { "selector": "service", "end": "src", "keys": [{ "port": 1, "arg": 9 }] },
                { "selector": "tcp", "op": "or" },
            ],
            "actions": [set_window(json!({ "from": "element" }))],
        }]),
        json!({}),
    );
    let rows = [
        leaves("an element of the first only", &v4(), "no_element").output(&v4().window(7)),
        gives(
            "one of each",
            &v4().ports(1, 80),
            &v4().ports(1, 80).window(9),
        ),
    ];
    act_in(chains, &Hook::ALL, &rows);
}

#[test]
fn other_actions_take_arguments() {
    let key = |arg: u32| json!([{ "selector": "service", "end": "dst", "keys": [{ "port": 80, "arg": arg }] }]);
    let run = |arg: u32, action: Value, rows: &[Row]| {
        act_in(
            file(json!({ "selectors": key(arg), "actions": [action] })),
            &Hook::ALL,
            rows,
        );
    };
    let syn = v4().flags(SYN);
    run(
        1000,
        json!({ "action": "set_mss", "bytes": { "from": "element" } }),
        &[gives(
            "set_mss",
            &syn.clone().options(&[2, 4, 5, 0xb4]),
            &syn.options(&[2, 4, 3, 0xe8]),
        )],
    );
    run(
        8,
        json!({ "action": "strip_option", "kind": { "from": "element" } }),
        &[gives(
            "strip_option",
            &v4().options(&[8, 4, 5, 0xb4]),
            &v4().options(&[1; 4]),
        )],
    );
    run(
        3,
        json!({ "action": "strip_option", "kind": "mptcp", "subtype": { "from": "element" } }),
        &[gives(
            "subtype",
            &v4().options(&[30, 4, 0x34, 0xb4, 30, 4, 0x20, 0]),
            &v4().options(&[1, 1, 1, 1, 30, 4, 0x20, 0]),
        )],
    );
    run(
        2,
        json!({ "action": "strip_option", "kind": "mptcp", "subtype": { "from": "element" } }),
        &[leaves(
            "a subtype that is unsafe",
            &v4().options(&[30, 4, 0x34, 0xb4, 30, 4, 0x20, 0]),
            "unsafe",
        )],
    );
    run(
        253,
        json!({ "action": "insert_option", "kind": { "from": "element" }, "data": "0102" }),
        &[gives(
            "insert_option",
            &v4(),
            &v4().options(&[253, 4, 1, 2]),
        )],
    );
    run(
        1,
        json!({ "action": "redirect", "device": { "from": "element" } }),
        &[gives("redirect", &v4(), &v4()).verdict(Verdict::Redirect)],
    );
}

#[test]
fn on_error() {
    for (word, verdict, goes_on) in [
        ("continue", Verdict::Pass, true),
        ("pass", Verdict::Pass, false),
        ("drop", Verdict::Drop, false),
    ] {
        let mut first = set_window(json!(9));
        first["on_error"] = word.into();
        let chain = file(json!({ "actions": [first, { "action": "drop" }] }));
        let verdict = if goes_on { Verdict::Drop } else { verdict };
        let rows = [
            leaves("SYN", &v4().flags(SYN), "syn").verdict(verdict),
            leaves("UDP", &v6().protocol(UDP), "not_tcp").verdict(verdict),
            leaves("three tags", &v4().tags(&[0x8100; 3]), "not_ip").verdict(verdict),
            gives("no error", &v4(), &v4().window(9)).verdict(Verdict::Drop),
        ];
        act_in(chain, &Hook::ALL, &rows);
    }
    for (then, verdict) in [("pass", Verdict::Pass), ("drop", Verdict::Drop)] {
        for (word, wanted) in [
            ("continue", verdict),
            ("pass", Verdict::Pass),
            ("drop", Verdict::Drop),
        ] {
            let chain = file(json!({ "then": then, "actions": [
                { "action": "redirect", "device": "lo", "neighbour": true, "on_error": word } ] }));
            let frame = v4().between([192, 0, 2, 1], [192, 0, 2, 9]);
            let rows =
                [leaves("a terminal action that gave up", &frame, "no_route").verdict(wanted)];
            act_in(chain, &Hook::ALL, &rows);
        }
    }
}

#[test]
fn actions_of_a_chain_add_up() {
    let chain = file(json!({ "actions": [
        { "action": "strip_option", "kind": "mptcp" },
        { "action": "insert_option", "kind": 253, "data": "aabb" },
        set_window(json!(9)),
        { "action": "set_mss", "bytes": 1000 },
        { "action": "count" },
    ] }));
    let rows = [
        leaves(
            "all on a bare ACK",
            &v4().options(&[30, 3, 0, 1]),
            "not_syn",
        )
        .output(&v4().options(&[253, 4, 0xaa, 0xbb]).window(9)),
        leaves(
            "SYN",
            &v6().flags(SYN).options(&[2, 4, 5, 0xb4, 30, 4, 0, 1]),
            "syn",
        )
        .output(
            &v6()
                .flags(SYN)
                .options(&[2, 4, 3, 0xe8, 253, 4, 0xaa, 0xbb]),
        ),
        leaves(
            "what it makes stays whole",
            &v6().payload(b"data"),
            "option_absent",
        )
        .and("no_room")
        .and("not_syn")
        .output(&v6().payload(b"data").window(9)),
    ];
    act_in(chain.clone(), &Hook::ALL, &rows);
    let seed = |frame: Frame| frame.check(Check::Seed);
    let rows = both().map(|(version, frame)| {
        leaves(
            version,
            &seed(frame.clone()).options(&[30, 3, 0, 1]),
            "not_syn",
        )
        .output(&seed(frame).options(&[253, 4, 0xaa, 0xbb]).window(9))
    });
    act_in(chain, &[Hook::Xdp], &rows);
}

#[test]
fn redirect() {
    let macs = json!({ "action": "redirect", "device": "lo",
        "src_mac": "02:00:00:00:00:aa", "dst_mac": "02:00:00:00:00:bb" });
    let one = json!({ "action": "redirect", "device": "lo", "dst_mac": "02:00:00:00:00:bb" });
    let plain = json!({ "action": "redirect", "device": "lo" });
    let frames = [
        v4(),
        v6(),
        v4().protocol(UDP),
        v4().tags(&[0x8100; 3]),
        v6().tags(&[0x8100]),
    ];
    let rows = |src: Option<u8>, dst: Option<u8>| {
        frames.clone().map(|frame| {
            let mut out = frame.clone();
            if let Some(last) = src {
                out.src_mac[5] = last;
            }
            if let Some(last) = dst {
                out.dst_mac[5] = last;
            }
            gives("sent on", &frame, &out).verdict(Verdict::Redirect)
        })
    };
    act(macs, &rows(Some(0xaa), Some(0xbb)));
    act(one, &rows(None, Some(0xbb)));
    act(plain, &rows(None, None));
    let mut last_hop = v4();
    last_hop.ttl = 1;
    let mut last_hop_v6 = v6();
    last_hop_v6.ttl = 0;
    act(
        json!({ "action": "redirect", "device": "lo", "neighbour": true,
                "src_mac": "02:00:00:00:00:aa" }),
        &[
            leaves(
                "no route",
                &v4().between([192, 0, 2, 1], [192, 0, 2, 9]),
                "no_route",
            ),
            leaves("no route, IPv6", &v6(), "no_route"),
            leaves("TTL 1", &last_hop, "ttl_expired"),
            leaves("hop limit 0", &last_hop_v6, "ttl_expired"),
            leaves("not IP", &v4().tags(&[0x8100; 3]), "not_ip"),
        ],
    );
}

/// Runs through two chains of one attachment need an attachment; a sub-chain's miss is the same.
#[test]
fn an_unmatched_packet_is_not_of_the_chain() {
    let chain = file(json!({
        "selectors": [{ "selector": "tcp" }],
        "actions": [{ "action": "drop" }],
        "then": "drop",
    }));
    for hook in Hook::ALL {
        let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
        let udp = v4().protocol(UDP).build();
        let want = Want {
            verdict: Verdict::Pass,
            matched: false,
            reasons: &[],
            frame: &udp,
        };
        bench.check("UDP", &udp, &want);
    }
}

/// One key a flow and direction, local and remote by the hook; a full set takes no more.
#[test]
fn learn_stores_flows() {
    let tcp = v4().build();
    let back = v4().back().build();
    let udp = v6().protocol(UDP).build();
    let mut arp = tcp.clone();
    arp[12..14].copy_from_slice(&[8, 6]);
    let rows: [(&str, &[u8], &[&str], usize); 6] = [
        ("TCP", &tcp, &[], 1),
        ("again", &tcp, &[], 1),
        ("the answer, a flow of its own", &back, &[], 2),
        ("UDP on IPv6", &udp, &[], 3),
        ("no IP", &arp, &["not_ip"], 3),
        ("one too many", &v4().ports(7, 7).build(), &["set_full"], 3),
    ];
    let learn = json!({ "action": "learn", "set": "seen", "expire": "60s" });
    let sets = json!({ "seen": { "kind": "flow", "size": 3 } });
    let chain = with_chains(json!({ "actions": [learn] }), json!([]), sets);
    for hook in Hook::ALL {
        let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
        for (what, frame, reasons, size) in rows {
            let want = Want {
                verdict: Verdict::Pass,
                matched: true,
                reasons,
                frame,
            };
            bench.check(what, frame, &want);
            assert_eq!(bench.elements("seen"), size, "{what} on {hook}");
        }
    }
}

/// It keeps a flow for longer, never for less long, and for good where it says no time.
#[test]
fn learn_only_lengthens() {
    let element = |expire: &str| {
        json!([{ "local": "10.0.0.2", "remote": "10.0.0.1", "local_port": 80,
            "remote_port": 40000, "expire": expire }])
    };
    let frame = v4().build();
    for (learnt, shorter, longer) in [(Some("60s"), "2s", "1h"), (None, "1h", "0")] {
        let mut learn = json!({ "action": "learn", "set": "seen" });
        if let Some(expire) = learnt {
            learn["expire"] = expire.into();
        }
        let sets = json!({ "seen": { "kind": "flow", "size": 3 } });
        let chain = with_chains(json!({ "actions": [learn] }), json!([]), sets);
        for hook in [Hook::Xdp, Hook::TcIngress] {
            let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
            bench.store("seen", "flow", element(shorter));
            let before = bench.expiries("seen");
            bench.run("learnt", &frame);
            let after = bench.expiries("seen");
            assert_eq!(after.len(), 1, "the same flow");
            assert!(after[0] == 0 || (learnt.is_some() && after[0] > before[0] + 50));
            if learnt.is_some() {
                bench.store("seen", "flow", element(longer));
                let before = bench.expiries("seen");
                bench.run("again", &frame);
                assert_eq!(bench.expiries("seen"), before);
            }
        }
    }
}

#[test]
fn every_action_has_rows() {
    let registry = policy_chain::policy::Registry::embedded().unwrap();
    let names: Vec<&str> = registry
        .actions()
        .map(|policy| policy.name.as_str())
        .collect();
    let known = [
        "add_subflow",
        "count",
        "drop",
        "goto",
        "hold_add_addr",
        "insert_option",
        "learn",
        "mp_prio",
        "pass",
        "record",
        "redirect",
        "remove_addr",
        "report",
        "reset_subflow",
        "restore_add_addr",
        "set_mss",
        "set_window",
        "strip_option",
    ];
    assert_eq!(names, known);
}
