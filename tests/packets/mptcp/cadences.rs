// SPDX-License-Identifier: MIT OR Apache-2.0
//! `once`, `first` and `every`: how often an action is done to the packets of a flow.

use std::thread::sleep;
use std::time::Duration;

use policy_chain::replay::Verdict;

use super::*;
use crate::bench::{gives, with_chains};

fn window(more: Value) -> Value {
    let mut action = json!({ "action": "set_window", "bytes": 9, "raw": true });
    let members = more.as_object().unwrap().clone();
    action.as_object_mut().unwrap().extend(members);
    action
}

fn done(what: &str, frame: &Frame) -> Row {
    gives(what, frame, &frame.clone().window(9))
}

fn not_due(what: &str, frame: &Frame) -> Row {
    leaves(what, frame, "not_due")
}

#[test]
fn the_first_packets_of_a_flow() {
    for (members, count) in [
        (json!({ "once": true }), 1),
        (json!({ "first": 1 }), 1),
        (json!({ "first": 3 }), 3),
    ] {
        for (_, frame) in both() {
            let back = frame.clone().back();
            let other = frame.clone().ports(1, 2);
            let mut rows = vec![
                leaves("gave up: does not count", &frame.clone().flags(SYN), "syn"),
                leaves("nor does UDP", &frame.clone().protocol(UDP), "not_tcp"),
            ];
            for turn in 0..count {
                let either = if turn % 2 == 0 { &frame } else { &back };
                rows.push(done("its turn, whichever end sends", either));
            }
            rows.extend([
                not_due("enough", &frame),
                not_due("enough of the other end, too", &back),
                not_due("whatever it is", &frame.clone().flags(SYN)),
                done("another flow", &other),
                leaves("no IP", &frame.clone().tags(&[0x8100; 3]), "not_ip"),
            ]);
            if frame.src == V4_SRC {
                let later = frame.clone().fragment(3);
                rows.push(leaves("no ports", &later, "fragment"));
            }
            sequence(&window(members.clone()), &rows);
        }
    }
}

/// A connection that has the ports of one before begins anew; a SYN sent again is none.
#[test]
fn each_connection_has_turns_of_its_own() {
    for members in [json!({ "once": true }), json!({ "every": "1h" })] {
        for (_, frame) in both() {
            let back = frame.clone().back();
            let syn = |sequence| frame.clone().flags(SYN).sequence(sequence);
            let syn_ack = |sequence| back.clone().flags(SYN | ACK).sequence(sequence);
            let rows = [
                leaves("SYN", &syn(1), "syn"),
                leaves("SYN-ACK", &syn_ack(5), "syn"),
                done("its turn", &frame),
                not_due("SYN again", &syn(1)),
                not_due("SYN-ACK again", &syn_ack(5)),
                not_due("had its turn", &frame),
                leaves("a new SYN", &syn(2), "syn"),
                done("of a new connection", &back),
                not_due("its SYN-ACK, late", &syn_ack(6)),
                not_due("had its turn, too", &frame),
                leaves("the SYN was missed", &syn_ack(7), "syn"),
                done("once more", &frame),
                not_due("but once", &back),
                leaves("opened by the other end", &back.clone().flags(SYN), "syn"),
                done("the other end's", &frame),
            ];
            sequence(&window(members.clone()), &rows);
        }
    }
}

/// That holds as well for an action whose chain does not see the SYN.
#[test]
fn connections_begin_behind_selectors() {
    let chain = file(json!({
        "selectors": [{ "selector": "tcp_flags", "none": "syn" }],
        "actions": [window(json!({ "first": 2 }))],
    }));
    for hook in Hook::ALL {
        let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
        for sequence in 1..4 {
            let syn = v6().flags(SYN).sequence(sequence);
            feed(&mut bench, [&syn]);
            check_rows(&mut bench, "first", &[done("1", &v6())]);
            feed(&mut bench, [&syn]);
            let rows = [done("2", &v6()), not_due("3", &v6())];
            check_rows(&mut bench, "first", &rows);
        }
    }
}

/// What has the same addresses and ports, but is of another protocol, is another flow.
#[test]
fn each_protocol_has_turns_of_its_own() {
    let chain = file(json!({ "actions": [{ "action": "drop", "once": true }] }));
    let udp = v4().protocol(UDP);
    let rows = [
        gives("TCP", &v4(), &v4()).verdict(Verdict::Drop),
        not_due("TCP", &v4()),
        gives("UDP", &udp, &udp).verdict(Verdict::Drop),
        not_due("UDP", &udp),
    ];
    sequence_in(&chain, &rows);
}

#[test]
fn once_in_a_while() {
    let frame = v4();
    let always = json!({ "every": "1ns" });
    sequence(&window(always), &[done("1", &frame), done("2", &frame)]);
    let never = json!({ "once": false });
    sequence(&window(never), &[done("1", &frame), done("2", &frame)]);
    let hourly = json!({ "every": "1h" });
    let rows = [
        done("the first", &frame),
        not_due("not for an hour", &frame),
        not_due("nor back", &frame.clone().back()),
        done("another flow", &frame.clone().ports(1, 2)),
        done("another protocol's", &v6()),
    ];
    sequence(&window(hourly), &rows);
    for hook in Hook::ALL {
        let chain = file(json!({ "actions": [window(json!({ "every": "400ms" }))] }));
        let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
        for _ in 0..2 {
            let rows = [done("due", &frame), not_due("too early", &frame)];
            check_rows(&mut bench, "every", &rows);
            sleep(Duration::from_millis(420));
        }
    }
}

/// Each action of a chain has turns of its own, be it the same twice.
#[test]
fn turns_are_of_one_action() {
    let stack = json!({ "action": "insert_option", "kind": 253, "data": "aabb", "again": true,
        "once": true });
    let one = [253, 4, 0xaa, 0xbb];
    let chain = file(json!({ "actions": [stack, stack] }));
    let rows = [
        gives("both", &v4(), &v4().options(&words(&[&one, &one]))),
        leaves("neither", &v4(), "not_due").and("not_due"),
    ];
    sequence_in(&chain, &rows);
}

/// That it is not an action's turn is no failure: the next one follows, whatever `on_error` says.
#[test]
fn what_is_not_due_goes_on() {
    for on_error in ["continue", "pass", "drop"] {
        let chain = file(json!({ "actions": [
            { "action": "strip_option", "kind": 253, "once": true, "on_error": on_error },
            window(json!({})) ], "then": "drop" }));
        let with = v4().options(&[253, 4, 1, 2]);
        let rows = [
            gives("its turn", &with, &v4().options(&[1; 4]).window(9)).verdict(Verdict::Drop),
            leaves("not its turn", &with, "not_due")
                .output(&with.clone().window(9))
                .verdict(Verdict::Drop),
        ];
        sequence_in(&chain, &rows);
    }
}

#[test]
fn verdicts_in_turn() {
    let two = |action: &str, more: Value| {
        let mut action = json!({ "action": action, "first": 2 });
        let members = more.as_object().unwrap().clone();
        action.as_object_mut().unwrap().extend(members);
        action
    };
    for (action, verdict) in [
        (two("drop", json!({})), Verdict::Drop),
        (two("pass", json!({})), Verdict::Pass),
        (
            two("redirect", json!({ "device": "lo" })),
            Verdict::Redirect,
        ),
    ] {
        let (then, other) = match verdict {
            Verdict::Pass => ("drop", Verdict::Drop),
            _ => ("pass", Verdict::Pass),
        };
        let chain = file(json!({ "actions": [action], "then": then }));
        let now = gives("its turn", &v4(), &v4()).verdict(verdict);
        let then = not_due("then", &v4()).verdict(other);
        sequence_in(&chain, &[now.clone(), now, then.clone(), then]);
    }
}

/// There is no coming back from a sub-chain, so a `goto` takes note before.
#[test]
fn gotos_in_turn() {
    let fixed = json!([]);
    let from_element = json!([{ "selector": "service", "keys": [
        { "port": 80, "chain": "sub" }, { "port": 40000, "chain": "sub" }] }]);
    for (selectors, target) in [
        (fixed, json!("sub")),
        (from_element, json!({ "from": "element" })),
    ] {
        let chain = with_chains(
            json!({ "selectors": selectors, "then": "drop", "actions": [
                { "action": "goto", "chain": target, "first": 2, "on_error": "pass" }] }),
            json!([{ "name": "sub", "actions": [window(json!({}))] }]),
            json!({}),
        );
        let rows = [
            done("there", &v4()),
            done("there", &v4().back()),
            not_due("past it", &v4()).verdict(Verdict::Drop),
            done("another flow", &v6()),
        ];
        sequence_in(&chain, &rows);
    }
}

/// A new connection with the same ports is asked, too.
#[test]
fn once_in_each_subflow() {
    for connection in Connection::all() {
        let prio = mp(&[&[MP_PRIO | 1]]);
        let bare = connection.client();
        let mut rows = Vec::new();
        for initial in [1, 2] {
            let [syn, syn_ack, third] = connection.opening();
            let opening = [syn.sequence(initial), syn_ack, third];
            rows.extend(shake(&opening, ["syn", "syn", "not_mptcp"]));
            let [ping, _] = connection.talk();
            rows.extend([
                leaves("no room", &ping, "no_room"),
                gives("asked", &bare, &connection.client_with(&[&prio])),
                not_due("asked already", &bare),
                not_due("SYN again", &opening[0]),
                not_due("asked all the same", &bare),
            ]);
        }
        sequence(&json!({ "action": "mp_prio", "backup": true }), &rows);
    }
}

/// Actions that add an option do so once, unless the chain says otherwise.
#[test]
fn once_by_default() {
    let connection = Connection::new(v6());
    let prio = mp(&[&[MP_PRIO | 1]]);
    let remove = mp(&[&[REMOVE_ADDR, 4]]);
    let full = connection.client_with(&[&option(254, 40, 0)]);
    let with = |options: &[&[u8]]| connection.client_with(options);
    let chain = file(json!({ "actions": [
        { "action": "mp_prio", "backup": true },
        { "action": "remove_addr", "id": 4, "first": 2 } ] }));
    let mut rows: Vec<Row> = connection
        .opening()
        .iter()
        .zip(["syn", "syn", "not_mptcp"])
        .map(|(frame, reason)| leaves("opening", frame, reason).and(reason))
        .collect();
    let [ping, pong] = connection.talk();
    rows.extend([
        leaves("no room", &ping, "no_room").and("no_room"),
        leaves("no room", &pong, "no_room").and("no_room"),
        leaves("full", &full, "no_room").and("no_room"),
        gives("both", &with(&[]), &with(&[&prio, &remove])),
        leaves("of two", &with(&[]), "not_due").output(&with(&[&remove])),
        leaves("neither", &with(&[]), "not_due").and("not_due"),
    ]);
    sequence_in(&chain, &rows);
    let action = json!({ "action": "add_subflow", "address": "10.0.0.9", "id": 1 });
    for hook in Hook::ALL {
        let chain = file(json!({ "actions": [action] }));
        let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
        feed(&mut bench, &connection.opening());
        feed(&mut bench, &connection.talk());
        let bare = connection.client().build();
        let outcome = bench.run("first", &bare);
        assert_eq!(outcome.frame.len(), bare.len() + 16);
        check_rows(
            &mut bench,
            "then",
            &[not_due("not again", &connection.client())],
        );
    }
}
