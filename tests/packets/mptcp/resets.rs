// SPDX-License-Identifier: MIT OR Apache-2.0
//! `reset_subflow`: a packet that becomes a RST with MP_TCPRST.

use super::*;
use crate::bench::gives;

fn reset(reason: Value, transient: bool) -> Value {
    json!({ "action": "reset_subflow", "reason": reason, "transient": transient })
}

/// `before` with `flags` becomes `after` with the flags that a RST has then.
fn becomes(what: &str, frame: &Frame, flags: (u16, u16), before: &[&[u8]], after: &[&[u8]]) -> Row {
    let before = words(before);
    let mut after = words(after);
    after.resize(after.len().max(before.len()), 1);
    gives(
        what,
        &frame.clone().flags(flags.0).options(&before),
        &frame.clone().flags(flags.1).options(&after),
    )
}

#[test]
fn packets_become_resets() {
    let cases = [
        (json!("administrative"), false, 3),
        (json!("unspecified"), true, 0),
        (json!("mptcp_error"), false, 1),
        (json!("lack_of_resources"), true, 2),
        (json!("too_much_data"), false, 4),
        (json!("unacceptable_performance"), true, 5),
        (json!("middlebox"), false, 6),
        (json!(255), false, 255),
    ];
    for (at, (reason, transient, code)) in cases.into_iter().enumerate() {
        let action = reset(reason, transient);
        let rst = mp(&[&[MP_TCPRST | u8::from(transient), code]]);
        let connection = &Connection::all()[at % 4];
        let mut rows = vec![leaves("not known", &connection.client(), "not_mptcp")];
        let [syn, syn_ack, third] = connection.opening();
        rows.extend([
            leaves("SYN", &syn, "syn"),
            leaves("SYN-ACK", &syn_ack, "syn"),
            becomes(
                "third packet",
                &connection.client(),
                (ACK, RST | ACK),
                &[&third.options],
                &[&rst],
            ),
        ]);
        for frame in [connection.client(), connection.server()] {
            rows.extend(every_shape(&frame, &rst));
        }
        sequence(&action, &rows);
    }
}

fn every_shape(frame: &Frame, rst: &[u8]) -> Vec<Row> {
    let to_rst = (ACK, RST | ACK);
    let loaded = frame.clone().payload(b"odd");
    let stamps = timestamps(1, 2);
    let prio = mp(&[&[MP_PRIO]]);
    let odd = mp(&[&[DSS, 1], &[9; 5]]);
    vec![
        becomes("bare", frame, to_rst, &[], &[rst]),
        becomes("DSS", frame, to_rst, &[&data_ack()], &[rst]),
        becomes(
            "odd length",
            &loaded,
            to_rst,
            &[&odd, &stamps],
            &[&stamps, rst],
        ),
        becomes(
            "all other MPTCP options go",
            frame,
            to_rst,
            &[&prio, &stamps, &data_ack(), &prio],
            &[&stamps, rst],
        ),
        becomes(
            "data",
            &loaded,
            (ACK | PSH, RST | ACK),
            &[&[1, 1], &stamps, &mapping()],
            &[&stamps, rst],
        ),
        becomes(
            "FIN, URG, ECE",
            frame,
            (FIN | ACK | PSH | 0x20 | ECE | AE, RST | ACK | ECE | AE),
            &[&stamps],
            &[&stamps, rst],
        ),
        becomes(
            "NOPs make room",
            &loaded,
            to_rst,
            &[&[1, 1], &stamps, &[1, 1, 1, 1]],
            &[&stamps, rst],
        ),
        becomes(
            "40 bytes",
            frame,
            to_rst,
            &[&option(254, 36, 0)],
            &[&option(254, 36, 0), rst],
        ),
        leaves(
            "no room",
            &loaded.clone().options(&words(&[&[1, 1], &stamps])),
            "no_room",
        ),
        leaves(
            "full",
            &frame.clone().options(&option(254, 40, 0)),
            "no_room",
        ),
        leaves(
            "malformed",
            &frame.clone().options(&[3, 1, 1, 1]),
            "bad_option",
        ),
        leaves("RST", &frame.clone().flags(RST), "not_mptcp"),
        leaves("SYN", &frame.clone().flags(SYN | ACK), "syn"),
        leaves("UDP", &frame.clone().protocol(UDP), "not_tcp"),
        leaves("another flow", &frame.clone().ports(1, 2), "not_mptcp"),
    ]
}

#[test]
fn tcp_is_not_reset() {
    let frame = v4();
    let rows = [
        leaves("SYN of TCP", &frame.clone().flags(SYN), "not_mptcp"),
        leaves("TCP", &frame, "not_mptcp"),
        leaves("later fragment", &frame.clone().fragment(3), "fragment"),
        becomes(
            "seen late",
            &frame,
            (ACK, RST | ACK),
            &[&data_ack()],
            &[&mp(&[&[MP_TCPRST, 3]])],
        ),
    ];
    sequence(&json!({ "action": "reset_subflow" }), &rows);
    let header = [0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 7, 7, 7, 7];
    let signed = v6().extension(AUTHENTICATION, &header).options(&data_ack());
    let rows = [leaves("AH", &signed, "authenticated")];
    sequence(&json!({ "action": "reset_subflow" }), &rows);
}

/// A SYN that asks for MPTCP may be answered by a host that does without: plain TCP goes on.
#[test]
fn refused_connections_are_not_reset() {
    let action = json!({ "action": "reset_subflow" });
    let rst = mp(&[&[MP_TCPRST, 3]]);
    for connection in Connection::all() {
        let (client, server) = (connection.client(), connection.server());
        let plain = |what, frame: &Frame| leaves(what, frame, "not_mptcp");
        for request in [&connection.opening()[0], &connection.joining()[0]] {
            let answer = server.clone().options(&[2, 4, 5, 0xb4]).flags(SYN | ACK);
            let [syn, syn_ack, third] = connection.opening();
            let rows = [
                leaves("SYN", request, "syn"),
                plain("SYN-ACK", &answer),
                plain("ACK", &client),
                plain("data", &client.clone().payload(b"data")),
                plain("data back", &server.clone().payload(b"data")),
                leaves("SYN again", request, "not_mptcp"),
                plain("SYN-ACK again", &answer),
                plain("FIN", &client.clone().flags(FIN | ACK)),
                leaves("a new SYN", &syn.sequence(9), "syn"),
                leaves("SYN-ACK", &syn_ack, "syn"),
                leaves("without MPTCP, sent again", &answer, "syn"),
                becomes("ACK", &client, (ACK, RST | ACK), &[&third.options], &[&rst]),
            ];
            sequence(&action, &rows);
        }
    }
}

/// Where the answer is not seen, data with DSS say what it was.
#[test]
fn offers_alone_are_not_reset() {
    let rst = mp(&[&[MP_TCPRST, 3]]);
    for connection in Connection::all() {
        let [syn, ..] = connection.opening();
        let ack = connection.client();
        let rows = [
            leaves("SYN", &syn, "syn"),
            leaves("ACK", &ack, "not_mptcp"),
            leaves("data", &ack.clone().payload(b"data"), "not_mptcp"),
            becomes("DSS", &ack, (ACK, RST | ACK), &[&data_ack()], &[&rst]),
            becomes("from then on", &ack, (ACK, RST | ACK), &[], &[&rst]),
        ];
        sequence(&json!({ "action": "reset_subflow" }), &rows);
    }
}

#[test]
fn seeds_stay_seeds() {
    let connection = Connection::new(v6());
    let chain = file(json!({ "actions": [{ "action": "reset_subflow" }] }));
    let mut bench = Bench::load(&chain, Hook::Xdp, CarrierChoice::Auto);
    feed(&mut bench, &connection.opening());
    let seed = connection.client().check(Check::Seed);
    let rst = mp(&[&[MP_TCPRST, 3]]);
    let rows = [
        becomes("grows", &seed, (ACK, RST | ACK), &[], &[&rst]),
        becomes(
            "data",
            &seed.payload(b"odd"),
            (ACK | PSH, RST | ACK),
            &[&mapping()],
            &[&rst],
        ),
    ];
    check_rows(&mut bench, "seed", &rows);
}
