// SPDX-License-Identifier: MIT OR Apache-2.0
//! `set_window` in bytes: what it makes of the handshakes that it saw.

use policy_chain::engine::generation::CarrierChoice;
use policy_chain::hook::Hook;
use serde_json::{Value, json};

use crate::bench::{Bench, Row, check_rows, file, gives, leaves};
use crate::frames::*;

const WINDOW: u32 = 10_000;

/// The options of a SYN that offers to scale by `shift` bits.
fn scale(shift: u8) -> Vec<u8> {
    words(&[&[2, 4, 5, 0xb4], &[3, 3, shift]])
}

/// A packet that leaves as it is.
fn same(what: &str, frame: &Frame, reason: &'static str) -> Row {
    leaves(what, frame, reason)
}

/// A window of the client, and one of the server, that are rewritten.
fn windows(what: &str, frame: &Frame, client: u16, server: u16) -> [Row; 2] {
    let back = frame.clone().back();
    [
        gives(
            format!("{what}, client"),
            frame,
            &frame.clone().window(client),
        ),
        gives(
            format!("{what}, server"),
            &back,
            &back.clone().window(server),
        ),
    ]
}

/// Packets of one connection after another, in this order, on every hook.
#[track_caller]
fn sequence(action: &Value, rows: &[Row]) {
    let chain = file(json!({ "actions": [action] }));
    for hook in Hook::ALL {
        let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
        check_rows(&mut bench, &action.to_string(), rows);
    }
}

#[test]
fn handshakes_of_every_sort() {
    let action = json!({ "action": "set_window", "bytes": WINDOW });
    for (_, ack) in both() {
        let syn = ack.clone().flags(SYN);
        let syn_ack = ack.clone().flags(SYN | ACK).back();
        let with = |frame: &Frame, shift| frame.clone().options(&scale(shift));
        let mut rows = vec![
            same("nothing seen", &ack, "unknown_scale"),
            same("the SYN", &with(&syn, 7), "syn"),
            same("half a handshake", &ack, "unknown_scale"),
            same("half a handshake", &ack.clone().back(), "unknown_scale"),
            same("the SYN-ACK", &with(&syn_ack, 2), "syn"),
        ];
        rows.extend(windows("both scale", &ack, 10_000 >> 7, 10_000 >> 2));
        rows.extend(windows(
            "with payload",
            &ack.clone().payload(b"data"),
            10_000 >> 7,
            10_000 >> 2,
        ));
        rows.push(same("the same SYN again", &with(&syn, 7), "syn"));
        rows.extend(windows("still known", &ack, 10_000 >> 7, 10_000 >> 2));

        rows.push(same("a new SYN", &with(&syn.clone().sequence(7), 9), "syn"));
        rows.push(same("forgotten", &ack, "unknown_scale"));
        rows.push(same("a SYN-ACK without", &syn_ack, "syn"));
        rows.extend(windows("nobody scales", &ack, 10_000, 10_000));

        rows.push(same("a SYN without", &syn.clone().sequence(8), "syn"));
        rows.extend(windows("nobody can scale", &ack, 10_000, 10_000));

        let other = |frame: &Frame| frame.clone().ports(40001, 80);
        let reply = |shift| with(&syn_ack, shift).ports(80, 40001);
        rows.push(same("only the SYN-ACK seen", &reply(20), "syn"));
        rows.push(same("its client", &other(&ack), "unknown_scale"));
        let server = other(&ack).back();
        rows.push(gives(
            "its server, 20 bits count as 14",
            &server,
            &server.clone().window(1),
        ));
        rows.push(same(
            "the first connection",
            &ack.clone().flags(SYN | ACK | FIN).options(&[3, 2, 1, 1]),
            "syn",
        ));
        rows.push(same("a scale of 2 bytes", &ack, "unknown_scale"));
        rows.push(same(
            "malformed",
            &syn.clone().sequence(9).options(&[3, 1, 1, 1]),
            "syn",
        ));
        rows.push(same("is not learnt", &ack, "unknown_scale"));
        rows.push(same(
            "twice",
            &syn.clone()
                .sequence(10)
                .options(&words(&[&[3, 3, 1], &[3, 3, 2]])),
            "syn",
        ));
        rows.push(same("is not learnt either", &ack, "unknown_scale"));
        sequence(&action, &rows);
    }
}

/// Who has the lower address makes no difference, and neither have ports of one host.
#[test]
fn either_end_may_sort_first() {
    let action = json!({ "action": "set_window", "bytes": WINDOW });
    for (_, ack) in both() {
        for ack in [
            ack.clone(),
            ack.clone().back(),
            ack.clone().between(ack.src, ack.src),
            ack.clone().between(ack.src, ack.src).back(),
        ] {
            let syn = ack.clone().flags(SYN).options(&scale(3));
            let syn_ack = ack.clone().flags(SYN | ACK).back().options(&scale(5));
            let mut rows = vec![same("SYN", &syn, "syn"), same("SYN-ACK", &syn_ack, "syn")];
            rows.extend(windows("data", &ack, 10_000 >> 3, 10_000 >> 5));
            sequence(&action, &rows);
        }
    }
}

#[test]
fn bytes_become_a_field() {
    for (bytes, shift, field) in [
        (0, 7, 0),
        (1, 7, 1),
        (127, 7, 1),
        (128, 7, 1),
        (255, 7, 1),
        (256, 7, 2),
        (65_535, 0, 65_535),
        (65_536, 0, 65_535),
        (1_073_725_440, 14, 65_535),
        (1_073_725_440, 13, 65_535),
    ] {
        let action = json!({ "action": "set_window", "bytes": bytes });
        let ack = v4();
        let mut rows = vec![
            same("SYN", &v4().flags(SYN).options(&scale(shift)), "syn"),
            same(
                "SYN-ACK",
                &v4().flags(SYN | ACK).back().options(&scale(shift)),
                "syn",
            ),
        ];
        rows.extend(windows(&format!("{bytes} >> {shift}"), &ack, field, field));
        sequence(&action, &rows);
    }
}

#[test]
fn max_only_lowers() {
    let action = json!({ "action": "set_window", "bytes": 1 << 16, "max": true });
    let mut rows = vec![
        same("SYN", &v4().flags(SYN).options(&scale(8)), "syn"),
        same(
            "SYN-ACK",
            &v4().flags(SYN | ACK).back().options(&scale(0)),
            "syn",
        ),
    ];
    rows.extend(
        windows("above", &v4().window(65_535), 256, 65_535)
            .into_iter()
            .take(1),
    );
    rows.extend([
        same("the same", &v4().window(256), "not_lower"),
        same("below", &v4().window(255), "not_lower"),
        same("closed", &v4().window(0), "not_lower"),
        same(
            "as far as it goes",
            &v4().back().window(65_535),
            "not_lower",
        ),
    ]);
    sequence(&action, &rows);
    let raw = json!({ "action": "set_window", "bytes": 100, "raw": true, "max": true });
    let rows = [
        gives("above", &v4().window(101), &v4().window(100)),
        same("the same", &v4().window(100), "not_lower"),
        same("below", &v4().window(1), "not_lower"),
        same("SYN", &v4().flags(SYN).window(200), "syn"),
    ];
    sequence(&raw, &rows);
}

/// A connection is told by addresses and ports, all of them.
#[test]
fn connections_are_kept_apart() {
    let action = json!({ "action": "set_window", "bytes": WINDOW });
    let syn = |frame: &Frame| frame.clone().flags(SYN).options(&scale(4));
    let reply = |frame: &Frame| frame.clone().back().flags(SYN | ACK).options(&scale(4));
    let others = [
        v4().ports(40000, 81),
        v4().ports(40001, 80),
        v4().between([10, 0, 0, 3], [10, 0, 0, 2]),
        v4().between([10, 0, 0, 1], [10, 0, 0, 3]),
        v4().ports(80, 40000),
        v6(),
    ];
    let mut rows = vec![
        same("SYN", &syn(&v4()), "syn"),
        same("SYN-ACK", &reply(&v4()), "syn"),
    ];
    rows.extend(windows("known", &v4(), 10_000 >> 4, 10_000 >> 4));
    let unknown = |frame| same("another", frame, "unknown_scale");
    rows.extend(others.iter().map(unknown));
    sequence(&action, &rows);
}
