// SPDX-License-Identifier: MIT OR Apache-2.0
//! ADD_ADDR taken out: for good, and for a while.

use std::thread::sleep;
use std::time::Duration;

use policy_chain::replay::Verdict;

use super::*;
use crate::bench::{gives, with_chains};

fn strip() -> Value {
    json!({ "action": "strip_option", "kind": "mptcp", "subtype": "add_addr" })
}

fn dropped(what: &str, frame: &Frame) -> Row {
    gives(what, frame, frame).verdict(Verdict::Drop)
}

/// An announcement that becomes NOPs.
fn blanked(what: &str, frame: &Frame, before: &[&[u8]], after: &[&[u8]]) -> Row {
    gives(
        what,
        &frame.clone().options(&words(before)),
        &frame.clone().options(&words(after)),
    )
}

fn nops(count: usize) -> Vec<u8> {
    vec![1; count]
}

/// What holds for `strip_option` and `hold_add_addr` alike, in a connection whose handshake was
/// seen. Ends that have shown one DSS at most lose a bare ACK as a whole.
fn removals(connection: &Connection, what: &str) -> Vec<Row> {
    let (client, server) = (connection.client(), connection.server());
    let (add, v6) = (announcement(1, 16), announcement(2, 28));
    let (echo, ack) = (mp(&[&[ADD_ADDR | 1, 3], &[9; 4]]), data_ack());
    let with = |frame: &Frame, options: &[&[u8]]| frame.clone().options(&words(options));
    let mut rows = Vec::new();
    for frame in [&client, &server] {
        rows.extend([
            dropped(what, &with(frame, &[&add])),
            dropped("IPv6 form", &with(frame, &[&v6])),
            dropped("padded", &with(frame, &[&add]).padded()),
            blanked(
                "with payload",
                &frame.clone().payload(b"odd"),
                &[&add],
                &[&nops(16)],
            ),
            blanked(
                "FIN",
                &frame.clone().flags(FIN | ACK),
                &[&add],
                &[&nops(16)],
            ),
            leaves("an echo", &with(frame, &[&echo]), "option_absent"),
            leaves("no option", &with(frame, &[&[3, 3, 7]]), "option_absent"),
            // with a DSS on it, and then without
            blanked("first DSS", frame, &[&ack, &add], &[&ack, &nops(16)]),
            dropped("that may be lost", &with(frame, &[&add])),
            blanked("second DSS", frame, &[&ack, &add], &[&ack, &nops(16)]),
            blanked("from now on", frame, &[&add], &[&nops(16)]),
            blanked("odd offset", frame, &[&[1], &v6], &[&nops(32)]),
            blanked(
                "behind DSS and timestamps",
                frame,
                &[&ack, &timestamps(1, 2), &add],
                &[&ack, &timestamps(1, 2), &nops(16)],
            ),
        ]);
    }
    // an echo stays beside an announcement
    let rest: [&[u8]; 2] = [&echo, &add];
    rows.push(blanked("echo first", &client, &rest, &[&echo, &nops(16)]));
    let twice: [&[u8]; 2] = [&add, &announcement(4, 18)];
    rows.push(blanked("two", &client, &twice, &[&nops(36)]));
    let malformed = with(&client, &[&add, &[3, 0]]);
    rows.push(leaves(
        "malformed",
        &malformed.clone().payload(b"x"),
        "bad_option",
    ));
    rows.push(leaves("malformed, bare", &malformed, "bad_option"));
    rows
}

#[test]
fn announcements_are_stripped_or_dropped() {
    for connection in Connection::all() {
        let mut rows = shake(&connection.opening(), ["option_absent"; 3]);
        rows.extend(removals(&connection, "announced"));
        sequence(&strip(), &rows);
        let mut by_number = strip();
        by_number["subtype"] = 3.into();
        by_number["mode"] = "auto".into();
        sequence(&by_number, &rows);
    }
}

/// Nothing is known of a subflow that was never seen: an announcement on a bare ACK may be the
/// one right after the handshake.
#[test]
fn announcements_of_nobody_known() {
    for connection in Connection::all() {
        sequence(&strip(), &removals(&connection, "announced"));
    }
    let mut nop = strip();
    nop["mode"] = "nop".into();
    for connection in Connection::all() {
        let rows = [
            blanked(
                "mode nop drops nothing",
                &connection.client(),
                &[&announcement(1, 16)],
                &[&nops(16)],
            ),
            blanked(
                "an echo is an ADD_ADDR, too",
                &connection.client(),
                &[&mp(&[&[ADD_ADDR | 1, 3], &[9; 4]])],
                &[&nops(8)],
            ),
        ];
        sequence(&nop, &rows);
    }
}

/// A SYN and a RST are no ACKs that would be all of MPTCP.
#[test]
fn announcements_where_none_belong() {
    let add = announcement(1, 16);
    let rows: Vec<Row> = [SYN, SYN | ACK, RST, FIN | ACK]
        .into_iter()
        .map(|flags| blanked("flags", &v4().flags(flags), &[&add], &[&nops(16)]))
        .collect();
    sequence(&strip(), &rows);
    let fragment = v4().options(&words(&[&add])).fragment(3);
    sequence(
        &strip(),
        &[
            leaves("later fragment", &fragment, "fragment"),
            leaves("UDP", &v4().protocol(UDP), "not_tcp"),
        ],
    );
}

#[test]
fn dss_is_stripped_only_on_demand() {
    for (parameters, subtype) in [
        (json!({}), None),
        (json!({ "subtype": "any" }), None),
        (json!({ "subtype": "dss", "unsafe": true }), Some("dss")),
        (json!({ "unsafe": true }), Some("any")),
        (json!({ "unsafe": true, "mode": "nop" }), Some("any")),
    ] {
        let mut action = json!({ "action": "strip_option", "kind": "mptcp" });
        let members = parameters.as_object().unwrap().clone();
        action.as_object_mut().unwrap().extend(members);
        let (dss, prio) = (data_ack(), mp(&[&[MP_PRIO]]));
        let mut rows = Vec::new();
        for (_, frame) in both() {
            for frame in [frame.clone(), frame.payload(b"data")] {
                let before: [&[u8]; 3] = [&prio, &timestamps(1, 2), &dss];
                let with = frame.clone().options(&words(&before));
                let only = frame.clone().options(&words(&[&prio]));
                match subtype {
                    None => {
                        rows.push(leaves("DSS", &with, "unsafe"));
                        rows.push(blanked("no DSS", &frame, &[&prio], &[&nops(3)]));
                    }
                    Some("dss") => {
                        let after: [&[u8]; 3] = [&prio, &timestamps(1, 2), &nops(8)];
                        rows.push(blanked("DSS", &frame, &before, &after));
                        rows.push(leaves("no DSS", &only, "option_absent"));
                    }
                    Some(_) => {
                        let after: [&[u8]; 3] = [&nops(3), &timestamps(1, 2), &nops(8)];
                        rows.push(blanked("all", &frame, &before, &after));
                    }
                }
            }
        }
        sequence(&action, &rows);
    }
}

#[test]
fn hold_takes_announcements_out_alike() {
    let hold = json!({ "action": "hold_add_addr" });
    for connection in Connection::all() {
        let mut rows = vec![leaves(
            "not known",
            &connection.client_with(&[&announcement(1, 16)]),
            "not_mptcp",
        )];
        rows.extend(shake(&connection.opening(), ["option_absent"; 3]));
        rows.extend(removals(&connection, "held"));
        sequence(&hold, &rows);
    }
}

/// Announcements are held in `main`; they are given back on segments with PSH only.
fn holding(after: Option<&str>) -> Value {
    let mut restore = json!({ "action": "restore_add_addr", "apart": "0ns", "repeat": "0s" });
    if let Some(after) = after {
        restore["after"] = after.into();
    }
    holding_and(restore)
}

fn holding_and(restore: Value) -> Value {
    with_chains(
        json!({ "actions": [{ "action": "hold_add_addr" }], "then": { "goto": "back" } }),
        json!([{ "name": "back", "selectors": [{ "selector": "tcp_flags", "all": "psh" }],
                 "actions": [restore] }]),
        json!({}),
    )
}

fn held_back() -> &'static str {
    "option_absent"
}

/// A packet that something is given back on.
fn given(what: &str, frame: &Frame, before: &[&[u8]], after: &[&[u8]]) -> Row {
    let frame = frame.clone().flags(ACK | PSH);
    let mut after = words(after);
    let before = words(before);
    after.resize(after.len().max(before.len()), 1);
    let (input, output) = (
        frame.clone().options(&before),
        frame.clone().options(&after),
    );
    leaves(what, &input, held_back()).output(&output)
}

/// Each end sends two DSS.
fn talks(connection: &Connection) -> Vec<Row> {
    let talk = [connection.talk(), connection.talk()].concat();
    let rows = talk.iter().map(|frame| leaves("DSS", frame, held_back()));
    rows.collect()
}

fn opened(connection: &Connection) -> Vec<Row> {
    let mut rows = shake(&connection.opening(), [held_back(); 3]);
    rows.extend(talks(connection));
    rows
}

#[test]
fn what_is_held_comes_back_as_it_was() {
    for connection in Connection::all() {
        let (client, server) = (connection.client(), connection.server());
        let push = |frame: &Frame| frame.clone().flags(ACK | PSH);
        let nothing = |what, frame: &Frame| leaves(what, &push(frame), held_back()).and("not_held");
        let mut rows = opened(&connection);
        rows.push(nothing("nothing yet", &client));
        for length in [8, 16, 18, 28, 30] {
            for (frame, other) in [(&client, &server), (&server, &client)] {
                let add = announcement(5, length);
                rows.push(blanked(
                    "held",
                    frame,
                    &[&add],
                    &[&nops(length.next_multiple_of(4))],
                ));
                rows.push(nothing("nothing of the other end", other));
                let full = [&[1; 3][..], &option(254, 35, 0)].concat();
                let data = push(frame).payload_before(b"data");
                rows.push(
                    leaves(
                        "no room",
                        &data.clone().options(&words(&[&full])),
                        held_back(),
                    )
                    .and("no_room"),
                );
                rows.push(given(
                    "given back",
                    frame,
                    &[&[3, 3, 7]],
                    &[&[3, 3, 7], &add],
                ));
                rows.push(nothing("only once", frame));
            }
        }
        // several, by the low bits of their ids
        let adds: Vec<Vec<u8>> = (0..4).map(|id| announcement(8 + id, 16)).collect();
        for add in adds.iter().rev() {
            rows.push(blanked("several", &client, &[add], &[&nops(16)]));
        }
        let again = announcement(13, 18);
        rows.push(blanked(
            "in the place of 9",
            &client,
            &[&again],
            &[&nops(20)],
        ));
        for add in [&adds[0], &again, &adds[2], &adds[3]] {
            rows.push(given("one after the other", &client, &[], &[add]));
        }
        rows.push(nothing("that was all", &client));
        // a full ACK that only acknowledges makes room
        let (long, stamps) = (announcement(2, 28), timestamps(3, 4));
        let full: [&[u8]; 3] = [&[1, 1], &stamps, &data_ack()];
        rows.push(blanked("held", &client, &[&long], &[&nops(28)]));
        rows.push(given(
            "in place of DSS",
            &client,
            &full,
            &[&[1, 1], &stamps, &long],
        ));
        sequence_in(&holding(None), &rows);
    }
}

/// What was held of a connection is not given to a later one with the same ports: it was signed
/// with other keys.
#[test]
fn what_is_held_ends_with_its_connection() {
    for connection in Connection::all() {
        let (client, add) = (connection.client(), announcement(1, 16));
        let push = client.clone().flags(ACK | PSH);
        let held = blanked("held", &client, &[&add], &[&nops(16)]);
        let again = |initial| {
            let [syn, syn_ack, third] = connection.opening();
            let opening = [syn.sequence(initial), syn_ack, third];
            let mut rows = shake(&opening, [held_back(); 3]);
            rows.extend(talks(&connection));
            rows
        };
        let mut rows = again(1);
        rows.push(held.clone());
        rows.push(leaves("SYN again", &connection.syn(), held_back()));
        rows.push(given("still held", &client, &[], &[&add]));
        rows.push(held.clone());
        rows.extend(again(2));
        rows.push(leaves("of the old one", &push, held_back()).and("not_held"));
        rows.push(held);
        rows.push(given("of the new one", &client, &[], &[&add]));
        sequence_in(&holding(None), &rows);
    }
}

/// The time counts anew in a later connection, although the same address is held.
#[test]
fn held_for_a_while_in_each_connection() {
    let connection = Connection::new(v4());
    let add = announcement(1, 16);
    let held = blanked("held", &connection.client(), &[&add], &[&nops(16)]);
    let push = connection.client().flags(ACK | PSH);
    for hook in Hook::ALL {
        let mut bench = Bench::load(&holding(Some("600ms")), hook, CarrierChoice::Auto);
        check_rows(&mut bench, "opening", &opened(&connection));
        check_rows(&mut bench, "held", std::slice::from_ref(&held));
        sleep(Duration::from_millis(650));
        feed(&mut bench, [&connection.syn().sequence(2)]);
        feed(&mut bench, &connection.opening()[1..]);
        check_rows(&mut bench, "talk", &talks(&connection));
        let early = leaves("too early", &push, held_back()).and("not_held");
        check_rows(&mut bench, "held anew", &[held.clone(), early]);
    }
}

/// What is dropped right after the handshake is held, too.
#[test]
fn what_is_dropped_comes_back() {
    for connection in Connection::all() {
        let add = announcement(1, 16);
        let mut rows = shake(&connection.opening(), [held_back(); 3]);
        rows.push(dropped("right after", &connection.client_with(&[&add])));
        rows.push(dropped("sent again", &connection.client_with(&[&add])));
        let early = connection.client().flags(ACK | PSH);
        rows.push(leaves("no DSS yet", &early, held_back()).and("not_mptcp"));
        let ack = data_ack();
        rows.push(given(
            "with the first DSS",
            &connection.client(),
            &[&ack],
            &[&ack, &add],
        ));
        sequence_in(&holding(None), &rows);
    }
}

/// The time counts from the first announcement; it is not longer for one that is sent again.
#[test]
fn held_for_a_while() {
    let connection = Connection::new(v4());
    let add = announcement(1, 16);
    let held = blanked("held", &connection.client(), &[&add], &[&nops(16)]);
    let push = connection.client().flags(ACK | PSH);
    let early = leaves("too early", &push, held_back()).and("not_held");
    let due = given("due", &connection.client(), &[], &[&add]);
    for hook in Hook::ALL {
        let mut bench = Bench::load(&holding(Some("600ms")), hook, CarrierChoice::Auto);
        check_rows(&mut bench, "opening", &opened(&connection));
        check_rows(&mut bench, "held", &[held.clone(), early.clone()]);
        sleep(Duration::from_millis(350));
        check_rows(&mut bench, "again", std::slice::from_ref(&held));
        sleep(Duration::from_millis(300));
        check_rows(&mut bench, "due", &[due.clone(), early.clone()]);
        // and another time
        check_rows(&mut bench, "held", &[held.clone(), early.clone()]);
        sleep(Duration::from_millis(650));
        check_rows(&mut bench, "due", std::slice::from_ref(&due));
    }
}

/// The receiver may not have heard it: it is given again until an echo comes back, not for ever.
#[test]
fn given_again_until_echoed() {
    let restore =
        |repeat| json!({ "action": "restore_add_addr", "apart": "0ns", "repeat": repeat });
    for connection in Connection::all() {
        let (client, server) = (connection.client(), connection.server());
        let push = client.clone().flags(ACK | PSH);
        let none = |what| leaves(what, &push, held_back()).and("not_held");
        let echo = |frame: &Frame, id| {
            let echo = mp(&[&[ADD_ADDR | 1, id]]);
            let frame = frame.clone().options(&words(&[&echo]));
            leaves("an echo", &frame, held_back())
        };
        let [first, second] = [1, 2].map(|id| announcement(id, 16));
        let held = |add: &[u8]| blanked("held", &client, &[add], &[&nops(16)]);
        let back = |add: &[u8]| given("given", &client, &[], &[add]);
        let mut rows = opened(&connection);
        rows.extend([held(&first), echo(&server, 1)]);
        rows.extend([back(&first), back(&first)]);
        rows.extend([echo(&client, 1), echo(&server, 5), back(&first)]);
        rows.extend([echo(&server, 1), none("echoed")]);
        // the host announces it anew, and another one
        rows.extend([held(&first), held(&second), back(&first)]);
        rows.extend([echo(&server, 1), back(&second), back(&second)]);
        rows.extend([held(&second), back(&second), back(&second)]);
        rows.push(none("four times in all"));
        rows.extend([held(&second), back(&second)]);
        // another one takes its id
        let other = announcement(2, 18);
        let removal = |ids: &[u8]| {
            let removal = mp(&[&[REMOVE_ADDR], ids]);
            let frame = client.clone().options(&words(&[&removal]));
            leaves("withdrawn", &frame, held_back())
        };
        rows.push(blanked("held", &client, &[&other], &[&nops(20)]));
        for _ in 0..4 {
            rows.push(back(&other));
        }
        rows.push(none("as often"));
        rows.extend([held(&first), held(&second), removal(&[1]), back(&second)]);
        rows.push(echo(&server, 2));
        rows.extend([held(&first), removal(&[9, 8, 7, 6, 5, 4, 3, 2, 1])]);
        rows.extend([back(&first), removal(&[3, 1]), none("withdrawn")]);
        // those that never were given come first
        rows.extend([held(&first), back(&first), held(&second), back(&second)]);
        rows.extend([back(&first), back(&second), back(&first), back(&second)]);
        sequence_in(&holding_and(restore("1ns")), &rows);
        let mut rows = opened(&connection);
        rows.extend([held(&first), back(&first), none("waits for the echo")]);
        rows.extend([held(&first), none("is the same one"), held(&second)]);
        rows.extend([back(&second), none("that waits, too")]);
        sequence_in(&holding_and(restore("1h")), &rows);
    }
}
