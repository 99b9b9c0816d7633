// SPDX-License-Identifier: MIT OR Apache-2.0
//! The selector `mptcp_connection`: all subflows of a connection, by the token of either host.

use super::*;
use crate::bench::{On, Probe, probe, select, select_in};

/// Packets of a connection and of a subflow that joins it. Of that, a host's SYN-ACK and all
/// later packets are known by both tokens as soon as its SYN is.
fn probes(connection: &Connection, by_client: On, by_server: On) -> Vec<Probe> {
    let either = match (by_client, by_server) {
        (On::Nowhere, On::Nowhere) => On::Nowhere,
        _ => On::All,
    };
    let join = connection.beside();
    let [syn, syn_ack, third] = connection.opening();
    let [join_syn, join_syn_ack, join_third] = join.joining();
    let [ping, pong] = connection.talk();
    let [join_ping, join_pong] = join.talk();
    vec![
        probe("no tokens on the SYN", &syn, On::Nowhere),
        probe("nor on the SYN-ACK", &syn_ack, On::Nowhere),
        probe("both keys", &third, either),
        probe("data", &ping, either),
        probe("data back", &pong, either),
        probe("no MPTCP option", &connection.client(), either),
        probe("SYN that joins", &join_syn, either),
        probe("its SYN-ACK", &join_syn_ack, either),
        probe("its third packet", &join_third, either),
        probe("its data", &join_ping, either),
        probe("its data back", &join_pong, either),
        probe("FIN", &join.client().flags(FIN | ACK), either),
        probe("RST", &join.server().flags(RST), either),
        probe("other ports", &connection.client().ports(1, 2), On::Nowhere),
    ]
}

fn by(token: u32) -> Value {
    json!([{ "selector": "mptcp_connection", "keys": [{ "token": hex(token) }] }])
}

#[test]
fn by_either_token() {
    for connection in Connection::all() {
        let selectors = by(token(connection.client));
        select(selectors, &probes(&connection, On::All, On::Nowhere));
        let selectors = by(token(connection.server));
        select(selectors, &probes(&connection, On::Nowhere, On::All));
        let other = by(token(connection.server) ^ 1);
        select(other, &probes(&connection, On::Nowhere, On::Nowhere));
    }
}

#[test]
fn by_a_named_set() {
    let connection = Connection::new(v4());
    let sets = json!({ "them": { "kind": "connection", "size": 10 } });
    let selectors = json!([{ "selector": "mptcp_connection", "set": "them" }]);
    let fill = |bench: &Bench| {
        let tokens = json!([{ "token": hex(token(connection.client)) }, { "token": "1" }]);
        bench.store("them", "connection", tokens);
    };
    let found = probes(&connection, On::All, On::Nowhere);
    select_in(&sets, fill, selectors.clone(), &found);
    let none = probes(&connection, On::Nowhere, On::Nowhere);
    select_in(&sets, |_| {}, selectors, &none);
}

/// A connection that opened elsewhere: the SYN that joins has its server's token, and that is all.
#[test]
fn by_the_token_of_a_join_alone() {
    let join = Connection::new(v6()).beside();
    let handshake = join.joining();
    let probes = |on| -> Vec<Probe> {
        let names = ["SYN that joins", "SYN-ACK", "third packet"];
        let frames = names.into_iter().zip(&handshake);
        frames.map(|(name, frame)| probe(name, frame, on)).collect()
    };
    select(by(token(join.server)), &probes(On::All));
    select(by(token(join.client)), &probes(On::Nowhere));
}

#[test]
fn what_has_no_tokens() {
    let connection = Connection::new(v4());
    let [syn, syn_ack, third] = connection.opening();
    let [ping, pong] = connection.talk();
    let plain = connection.beside();
    let old = mp(&[&[0, 1], &[1; 16]]);
    let short = mp(&[&[1, 1], &[1; 8]]);
    let probes = [
        probe("data before its handshake", &ping, On::Nowhere),
        probe("SYN of TCP", &plain.client().flags(SYN), On::Nowhere),
        probe("its ACK", &plain.client(), On::Nowhere),
        probe("UDP", &v4().protocol(UDP), On::Nowhere),
        probe("later fragment", &v4().fragment(3), On::Nowhere).because(&["fragment"]),
        probe("SYN", &syn, On::Nowhere),
        probe("SYN-ACK", &syn_ack, On::Nowhere),
        probe(
            "keys of version 0",
            &connection.client_with(&[&old]),
            On::Nowhere,
        ),
        probe("one key", &connection.client_with(&[&short]), On::Nowhere),
        probe("both keys", &third, On::All),
        probe("data", &pong, On::All),
        probe(
            "the SYN of a new connection",
            &syn.clone().sequence(7),
            On::Nowhere,
        ),
        probe("its data", &ping, On::Nowhere),
        probe("keys", &third, On::All),
        probe(
            "a SYN without MPTCP",
            &connection.client().flags(SYN),
            On::Nowhere,
        ),
        probe("its ACK", &connection.client(), On::Nowhere),
    ];
    select(by(token(connection.client)), &probes);
}

/// The negation matches what is known of nobody, but not what cannot be told.
#[test]
fn negated() {
    let connection = Connection::new(v4());
    let [syn, syn_ack, third] = connection.opening();
    let mut selectors = by(token(connection.client));
    selectors[0]["not"] = true.into();
    let probes = [
        probe("SYN", &syn, On::All),
        probe("SYN-ACK", &syn_ack, On::All),
        probe("keys", &third, On::Nowhere),
        probe("TCP", &connection.beside().client(), On::All),
        probe("UDP", &v4().protocol(UDP), On::All),
        probe("later fragment", &v4().fragment(3), On::Nowhere).because(&["fragment"]),
    ];
    select(selectors, &probes);
}
