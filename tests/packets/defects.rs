// SPDX-License-Identifier: MIT OR Apache-2.0
//! Defects that other implementations have shown, each named after what went wrong.

use policy_chain::hook::Hook;
use policy_chain::replay::Verdict;
use serde_json::{Value, json};

use crate::bench::{Row, act, act_in, file, gives, leaves};
use crate::frames::*;

fn strip() -> Value {
    json!({ "action": "strip_option", "kind": "mptcp", "subtype": "add_addr" })
}

fn window() -> Value {
    json!({ "action": "set_window", "raw": true, "bytes": 9 })
}

/// Actions that look at TCP options.
fn on_options() -> [Value; 3] {
    [
        strip(),
        json!({ "action": "set_mss", "bytes": 1 }),
        json!({ "action": "insert_option", "kind": 253, "data": "aabb" }),
    ]
}

fn add_addr(length: u8) -> Vec<u8> {
    option(30, length, 0x30)
}

/// Forty bytes of options that end in NOP, none of them the one looked for.
#[test]
fn payload_overwritten_when_options_end_in_nop() {
    let timestamps_and_dss = [
        &[1, 1][..],
        &option(8, 10, 1),
        &option(30, 26, 0x20),
        &[1, 1],
    ]
    .concat();
    for options in [vec![1; 40], timestamps_and_dss] {
        assert_eq!(options.len(), 40);
        for payload in [&[0x41, 0x10][..], &[30, 16, 0x30, 1, 1, 1], &[30, 8, 0x31]] {
            let rows = both().map(|(version, frame)| {
                let frame = frame
                    .options(&options)
                    .payload(&[payload, &[7; 40]].concat());
                leaves(version, &frame, "option_absent")
            });
            act(strip(), &rows);
            act(json!({ "action": "strip_option", "kind": 0x41 }), &rows);
        }
    }
}

#[test]
fn wrong_checksum_for_an_option_at_an_odd_offset() {
    let rows = both().map(|(version, frame)| {
        let before = words(&[&[1], &add_addr(16)]);
        let frame = frame.payload(b"odd");
        gives(
            version,
            &frame.clone().options(&before),
            &frame.options(&[1; 20]),
        )
    });
    act(strip(), &rows);
}

/// Data offset 7, option length 18: the option would reach into the payload.
#[test]
fn payload_overwritten_by_an_option_past_the_data_offset() {
    for action in on_options() {
        let mut rows = Vec::new();
        for (version, frame) in both() {
            for kind in [30, 2, 253] {
                let option = option(kind, 18, 0x30);
                let mut frame = frame.clone().flags(SYN).options(&option[..8]);
                frame.payload = [&option[8..], &[1; 20]].concat();
                rows.push(leaves(version, &frame, "bad_option"));
            }
        }
        act(action, &rows);
    }
}

/// What follows the IP header of a later fragment is no TCP header.
#[test]
fn later_fragments_rewritten_as_tcp_headers() {
    let lookalike = v4().options(&words(&[&add_addr(16), &[2, 4, 5, 0xb4]]));
    let actions = on_options().into_iter().chain([window()]);
    for action in actions {
        let mut rows = Vec::new();
        for flags in [ACK, SYN] {
            let frame = lookalike.clone().flags(flags);
            for fragment in [1, 185, 0x1fff, MORE_FRAGMENTS | 185] {
                rows.push(leaves(
                    "IPv4",
                    &frame.clone().fragment(fragment),
                    "fragment",
                ));
            }
            let header = [0, 0, 0, 8, 0, 0, 0, 1];
            let frame = frame.between(V6_SRC, V6_DST);
            rows.push(leaves(
                "IPv6",
                &frame.clone().extension(FRAGMENT, &header),
                "fragment",
            ));
            rows.push(leaves(
                "IPv6, behind another header",
                &frame
                    .extension(DESTINATION, &[0; 8])
                    .extension(FRAGMENT, &header),
                "fragment",
            ));
        }
        act(action, &rows);
    }
}

#[test]
fn options_found_behind_the_end_of_the_list() {
    let behind = [&[1, 0][..], &add_addr(8), &[2, 4, 5, 0xb4, 1, 1]].concat();
    let rows = |reason: &'static str| -> Vec<Row> {
        both()
            .map(|(version, frame)| leaves(version, &frame.flags(SYN).options(&behind), reason))
            .into()
    };
    act(strip(), &rows("option_absent"));
    act(
        json!({ "action": "set_mss", "bytes": 1 }),
        &rows("option_absent"),
    );
}

#[test]
fn options_inserted_behind_the_end_of_the_list() {
    let rows = both().map(|(version, frame)| {
        let before = [&[3, 3, 7, 0][..], &[0; 4]].concat();
        let after = words(&[&[3, 3, 7], &[253, 4, 0xaa, 0xbb]]);
        let frame = frame.payload(b"data");
        gives(
            version,
            &frame.clone().options(&before),
            &frame.options(&after),
        )
    });
    act(
        json!({ "action": "insert_option", "kind": 253, "data": "aabb" }),
        &rows,
    );
}

#[test]
fn options_of_length_0_and_1_walked() {
    for action in on_options() {
        let mut rows = Vec::new();
        for (version, frame) in both() {
            for kind in [5, 30, 2] {
                for length in [0, 1] {
                    let options = [&[kind, length][..], &add_addr(8), &[1, 1]].concat();
                    let frame = frame.clone().flags(SYN).options(&options);
                    rows.push(leaves(version, &frame, "bad_option"));
                    let bare = words(&[&[1, 1], &[kind, length]]);
                    rows.push(leaves(version, &frame.options(&bare), "bad_option"));
                }
            }
        }
        act(action, &rows);
    }
}

#[test]
fn packets_of_a_flow_bypass_the_policy_by_their_headers() {
    let packets = |frame: Frame| {
        let mut packets = vec![
            frame.clone(),
            frame.clone().tags(&[0x8100]),
            frame.clone().tags(&[0x88a8, 0x8100]),
            frame.clone().options(&[1; 40]).payload(b"data"),
        ];
        if frame.src == V4_SRC {
            packets.push(frame.clone().ip_options(&[1; 4]));
            packets.push(frame.clone().ip_options(&[1; 40]).tags(&[0x8100]));
        } else {
            packets.push(frame.clone().extension(HOP_BY_HOP, &[0; 8]));
            packets.push(
                frame
                    .clone()
                    .extension(DESTINATION, &[0; 8])
                    .tags(&[0x8100]),
            );
        }
        packets
    };
    for (src, dst, frame) in [
        ("10.0.0.1", "10.0.0.2", v4()),
        ("2001:db8::1", "2001:db8::2", v6()),
    ] {
        let rows: Vec<Row> = packets(frame)
            .iter()
            .map(|frame| gives("of the flow", frame, &frame.clone().window(9)))
            .collect();
        let flow = json!({ "selector": "flow", "src": src, "dst": dst, "dst_port": 80 });
        let chain = file(json!({ "selectors": [flow], "actions": [window()] }));
        act_in(chain, &Hook::ALL, &rows);
    }
}

#[test]
fn only_the_first_option_of_a_segment_stripped() {
    let dss = option(30, 12, 0x20);
    let rows = both().map(|(version, frame)| {
        let before = words(&[&add_addr(8), &dss, &add_addr(16)]);
        let after = words(&[&[1; 8], &dss, &[1; 16]]);
        gives(
            version,
            &frame.clone().options(&before),
            &frame.options(&after),
        )
    });
    act(strip(), &rows);
}

#[test]
fn the_28_byte_form_not_stripped() {
    for length in [28, 30, 26, 20, 18, 16, 10, 8] {
        let before = words(&[&add_addr(length)]);
        let after = vec![1; before.len()];
        let mut rows = Vec::new();
        for (version, frame) in both() {
            let loaded = frame.clone().payload(b"data");
            rows.push(gives(
                version,
                &loaded.clone().options(&before),
                &loaded.options(&after),
            ));
            // all that makes this ACK one of MPTCP: it goes as a whole
            let bare = frame.options(&before);
            rows.push(gives("no payload", &bare, &bare).verdict(Verdict::Drop));
        }
        act(strip(), &rows);
    }
}

/// An implementation that looks at the first MPTCP option only takes DSS for ADD_ADDR.
#[test]
fn another_option_of_the_kind_stripped_in_its_place() {
    let dss = option(30, 20, 0x20);
    let before = words(&[&dss, &add_addr(16)]);
    let after = words(&[&dss, &[1; 16]]);
    let rows = both().map(|(version, frame)| {
        gives(
            version,
            &frame.clone().options(&before),
            &frame.options(&after),
        )
    });
    act(strip(), &rows);
}

/// A dropped packet's context is not part of what is reported either.
#[test]
fn context_left_on_the_packet() {
    for (then, verdict) in [("pass", Verdict::Pass), ("drop", Verdict::Drop)] {
        let chain = file(json!({
            "selectors": [
                { "selector": "service", "port": 443 },
                { "selector": "ip_pair", "op": "or", "keys": [
                    { "local": "10.0.0.2", "remote": "10.0.0.1", "arg": 9 },
                    { "local": "10.0.0.1", "remote": "10.0.0.2", "arg": 9 }] } ],
            "actions": [{ "action": "set_window", "raw": true, "bytes": { "from": "element" } }],
            "then": then,
        }));
        let rows = [gives("an alternative", &v4(), &v4().window(9)).verdict(verdict)];
        act_in(chain, &Hook::ALL, &rows);
    }
}

/// Timestamps 12, DSS 12 and 16 more are exactly 40.
#[test]
fn exact_fit_refused_on_one_hook() {
    let timestamps = option(8, 10, 1);
    let dss = option(30, 12, 0x20);
    let inserted = add_addr(16);
    let data: String = inserted[2..]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let action = json!({ "action": "insert_option", "kind": 30, "data": data, "again": true });
    let before = [&[1, 1][..], &timestamps, &dss].concat();
    let after = [&before[..], &inserted].concat();
    assert_eq!((before.len(), after.len()), (24, 40));
    let mut rows: Vec<Row> = both()
        .map(|(version, frame)| {
            gives(
                version,
                &frame.clone().options(&before),
                &frame.options(&after),
            )
        })
        .into();
    let longer = [&before[..], &[3, 3, 7, 1]].concat();
    rows.extend(both().map(|(version, frame)| leaves(version, &frame.options(&longer), "no_room")));
    act(action, &rows);
}

/// An IP length of 0 stands for a packet over 64 KiB, and no packet here is one.
#[test]
fn a_length_of_0_taken_for_a_super_packet() {
    for action in on_options().into_iter().chain([window()]) {
        let rows = both().map(|(version, frame)| {
            let mut frame = frame.options(&words(&[&add_addr(8)]));
            frame.ip_length = Some(0);
            leaves(version, &frame, "bad_header")
        });
        act(action, &rows);
    }
}

/// What an authentication header signs must arrive as it was sent.
#[test]
fn authenticated_packets_are_not_changed() {
    for action in on_options().into_iter().chain([window()]) {
        let frame = v6()
            // 16 bytes: the field is their words less 2 (RFC 4302, 2.2)
            .extension(
                AUTHENTICATION,
                &[0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 7, 7, 7, 7],
            )
            .options(&words(&[&add_addr(8)]));
        act(action, &[leaves("AH", &frame, "authenticated")]);
    }
}
