// SPDX-License-Identifier: MIT OR Apache-2.0
//! `mp_prio`, `remove_addr` and `add_subflow`: options added to packets of an established subflow.

use hmac::{Hmac, Mac};

use super::*;
use crate::bench::gives;

fn mp_prio(backup: bool) -> Value {
    json!({ "action": "mp_prio", "backup": backup, "once": false })
}

fn prio(backup: bool) -> Vec<u8> {
    mp(&[&[MP_PRIO | u8::from(backup)]])
}

/// A packet that gets an option.
fn gets(what: &str, frame: &Frame, before: &[&[u8]], after: &[&[u8]]) -> Row {
    let before = words(before);
    let mut after = words(after);
    after.resize(after.len().max(before.len()), 1);
    gives(
        what,
        &frame.clone().options(&before),
        &frame.clone().options(&after),
    )
}

/// An end that shows that it takes MPTCP for established: with two DSS its next may be replaced.
fn established(connection: &Connection) -> Vec<Row> {
    let mut rows = opening_rows(connection);
    for frame in connection.talk() {
        rows.push(leaves("first DSS", &frame, "no_room"));
    }
    rows
}

/// Where an option of `new` bytes goes, and where not. Holds for every action that adds one.
fn placements(connection: &Connection, new: &[u8], present: &[u8]) -> Vec<Row> {
    let (client, server) = (connection.client(), connection.server());
    let stamps = [&[1, 1][..], &timestamps(3, 4)].concat();
    let ack = data_ack();
    let filler = |length: usize| option(254, length as u8, 0);
    let mut rows = established(connection);
    for (who, frame) in [("client", &client), ("server", &server)] {
        rows.extend([
            gets(&format!("{who}, bare"), frame, &[], &[new]),
            gets("odd", frame, &[&[3, 3, 7]], &[&[3, 3, 7], new]),
            gets(
                "in place of NOPs",
                &frame.clone().payload_before(b"data"),
                &[&[1; 8], &[254, 2], &vec![1; new.len()]],
                &[&[254, 2], new, &[1; 8]],
            ),
            leaves(
                "no NOPs",
                &frame
                    .clone()
                    .options(&words(&[&filler(8)]))
                    .payload_before(b"x"),
                "no_room",
            ),
            gets(
                "exact fit of 40 bytes",
                frame,
                &[&filler(40 - new.len()), &[1]],
                &[&filler(40 - new.len()), new],
            ),
            leaves(
                "one byte short",
                &frame.clone().options(&words(&[&filler(41 - new.len())])),
                "no_room",
            ),
            leaves(
                "there already",
                &frame.clone().options(&words(&[present])),
                "option_present",
            ),
            leaves("SYN", &frame.clone().flags(SYN | ACK), "syn"),
            leaves("FIN", &frame.clone().flags(FIN | ACK), "not_mptcp"),
            leaves("RST", &frame.clone().flags(RST), "not_mptcp"),
            leaves(
                "malformed",
                &frame.clone().options(&[3, 1, 1, 1]),
                "bad_option",
            ),
            leaves("UDP", &frame.clone().protocol(UDP), "not_tcp"),
            leaves("other ports", &frame.clone().ports(1, 2), "not_mptcp"),
        ]);
        rows.push(gets(
            "behind timestamps and DSS",
            frame,
            &[&stamps, &ack],
            &[&stamps, &ack, new],
        ));
        // a DSS that only acknowledges makes room where nothing else does
        let rest = filler(32);
        rows.push(gets(
            "in place of DSS",
            frame,
            &[&ack, &rest],
            &[&rest, new],
        ));
        for (what, flags) in [("a mapping", MAPPING), ("DATA_FIN", DATA_FIN)] {
            let dss = mp(&[&[DSS, DATA_ACK | flags], &[9; 4]]);
            rows.push(leaves(
                what,
                &frame.clone().options(&words(&[&dss, &rest])),
                "no_room",
            ));
        }
    }
    if client.src == V4_SRC {
        rows.push(leaves(
            "later fragment",
            &client.clone().fragment(3),
            "fragment",
        ));
        rows.push(leaves(
            "first fragment does not grow",
            &client.fragment(MORE_FRAGMENTS),
            "no_room",
        ));
    } else if client.src == V6_SRC {
        let header = [0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 7, 7, 7, 7];
        let signed = client.extension(AUTHENTICATION, &header);
        rows.push(leaves("AH", &signed, "authenticated"));
    }
    rows
}

/// The receiver looks at no options of what it has got already.
#[test]
fn not_on_old_segments() {
    for connection in Connection::all() {
        let new = prio(true);
        let mut rows = established(&connection);
        for frame in [connection.client(), connection.server()] {
            let at = |sequence| frame.clone().sequence(sequence);
            let old = |what, frame: &Frame| leaves(what, frame, "old_segment");
            let latest = |what, frame: &Frame| gets(what, frame, &[], &[&new]);
            rows.extend([
                latest("an acknowledgement", &at(1)),
                leaves(
                    "data",
                    &at(1).options(&option(254, 40, 0)).payload(&[7; 100]),
                    "no_room",
                ),
                old("before the data", &at(1)),
                old("a probe", &at(100)),
                latest("behind it", &at(101)),
                gets(
                    "its last bytes again",
                    &at(81).payload(&[7; 20]),
                    &[&[1; 8]],
                    &[&new],
                ),
                old("its first bytes again", &at(1).payload(&[7; 99])),
                leaves(
                    "a malformed one",
                    &at(200).options(&[3, 1, 1, 1]),
                    "bad_option",
                ),
                old("before that", &at(199)),
                latest("far ahead, wherever it came from", &at(0x1000_0000)),
                latest("the end goes on", &at(1000)),
                latest("16 MiB on", &at(1000 + (1 << 24))),
                old("as far behind", &at(1000)),
                latest("farther behind", &at(999)),
                latest("half round", &at(0x7000_0000)),
                latest("nearly round", &at(0xe000_0000)),
                latest("round", &at(5)),
                old("before the turn", &at(0xffff_fff0)),
                leaves("FIN", &at(9).flags(FIN | ACK), "not_mptcp"),
                latest("of the same", &at(5)),
            ]);
        }
        rows.push(leaves("a new SYN", &connection.syn().sequence(7), "syn"));
        let ack = data_ack();
        for frame in [connection.client(), connection.server()] {
            rows.push(gets("of the new one", &frame, &[&ack], &[&ack, &new]));
        }
        sequence(&mp_prio(true), &rows);
    }
}

#[test]
fn mp_prio_has_three_bytes() {
    for (connection, backup) in Connection::all().iter().zip([false, true, true, false]) {
        let rows = placements(connection, &prio(backup), &prio(!backup));
        sequence(&mp_prio(backup), &rows);
    }
}

#[test]
fn remove_addr_has_one_id() {
    for (connection, id) in Connection::all().iter().zip([1, 9, 128, 255]) {
        let new = mp(&[&[REMOVE_ADDR, id]]);
        let present = mp(&[&[REMOVE_ADDR, 77, 78]]);
        let action = json!({ "action": "remove_addr", "id": id, "once": false });
        sequence(&action, &placements(connection, &new, &present));
    }
}

/// The address of the first subflow has id 0, and taking it away can end all.
#[test]
fn remove_addr_of_id_0() {
    let connection = Connection::new(v4());
    let new = mp(&[&[REMOVE_ADDR, 0]]);
    let action = json!({ "action": "remove_addr", "id": 0, "unsafe": true, "once": false });
    sequence(&action, &placements(&connection, &new, &new));
    // what an element brings is known with the packet only
    for (arg, sure, reason) in [
        (0, false, Some("unsafe")),
        (0, true, None),
        (3, false, None),
    ] {
        let action = json!({ "action": "remove_addr", "id": { "from": "element" },
            "unsafe": sure, "once": false });
        let port = json!([{ "selector": "service", "keys": [
            { "port": 80, "arg": arg }, { "port": 40000, "arg": arg }] }]);
        let chain = file(json!({ "selectors": port, "actions": [action] }));
        let mut rows = opening_rows(&connection);
        let [ping, _] = connection.talk();
        let last = if reason.is_some() {
            "unsafe"
        } else {
            "no_room"
        };
        rows.push(leaves("first DSS", &ping, last));
        let new = mp(&[&[REMOVE_ADDR, arg]]);
        rows.push(match reason {
            Some(reason) => leaves("unsafe", &connection.client(), reason),
            None => gets("an element's id", &connection.client(), &[], &[&new]),
        });
        sequence_in(&chain, &rows);
    }
}

/// Before the other end takes MPTCP for established an option would make it fall back.
#[test]
fn not_before_data_was_seen() {
    for connection in Connection::all() {
        let bare = leaves("no DSS yet", &connection.client(), "not_mptcp");
        let mut rows = vec![bare.clone()];
        rows.extend(opening_rows(&connection));
        rows.push(bare);
        let new = prio(true);
        let ack = data_ack();
        // a DSS of the other end says nothing of this one's
        rows.push(gets(
            "the server's first",
            &connection.server(),
            &[&ack],
            &[&ack, &new],
        ));
        rows.push(leaves("still none", &connection.client(), "not_mptcp"));
        rows.push(gets(
            "the client's first",
            &connection.client(),
            &[&ack],
            &[&ack, &new],
        ));
        rows.push(gets("from now on", &connection.client(), &[], &[&new]));
        rows.push(leaves("a new SYN", &connection.syn().sequence(9), "syn"));
        rows.push(leaves("begins anew", &connection.client(), "not_mptcp"));
        sequence(&mp_prio(true), &rows);
    }
}

/// The first DSS of an end must arrive, the second need not.
#[test]
fn the_first_dss_is_not_replaced() {
    for connection in Connection::all() {
        let (ack, rest) = (data_ack(), option(254, 30, 0));
        let full = connection.client_with(&[&ack, &rest]);
        let mut rows = opening_rows(&connection);
        rows.push(leaves("the first", &full, "no_room"));
        rows.push(gets(
            "the second",
            &connection.client(),
            &[&ack, &rest],
            &[&rest, &prio(true)],
        ));
        sequence(&mp_prio(true), &rows);
    }
}

/// A subflow that joined, and one whose handshake nobody saw.
#[test]
fn other_subflows() {
    let connection = Connection::new(v4());
    let join = connection.beside();
    let new = prio(false);
    let mut rows = opening_rows(&connection);
    rows.extend(shake(&join.joining(), ["syn", "syn", "not_mptcp"]));
    let ack = data_ack();
    rows.push(gets("joined", &join.client(), &[&ack], &[&ack, &new]));
    let mut late = connection.beside();
    late.frame = late.frame.ports(3, 4);
    rows.push(leaves("of TCP so far", &late.client(), "not_mptcp"));
    rows.push(gets("seen late", &late.client(), &[&ack], &[&ack, &new]));
    rows.push(leaves("its other end", &late.server(), "not_mptcp"));
    sequence(&mp_prio(false), &rows);
}

/// The last 8 bytes of an HMAC (RFC 8684, 3.4.1).
fn proof(own: u64, peer: u64, id: u8, address: IpAddr, port: u16) -> [u8; 8] {
    let key = [own.to_be_bytes(), peer.to_be_bytes()].concat();
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
    mac.update(&[id]);
    match address {
        IpAddr::V4(address) => mac.update(&address.octets()),
        IpAddr::V6(address) => mac.update(&address.octets()),
    }
    mac.update(&port.to_be_bytes());
    let whole = mac.finalize().into_bytes();
    whole[whole.len() - 8..].try_into().unwrap()
}

pub fn add_addr(own: u64, peer: u64, id: u8, address: IpAddr, port: Option<u16>) -> Vec<u8> {
    let bytes = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let port_bytes = port.map_or(vec![], |port| port.to_be_bytes().to_vec());
    let proof = proof(own, peer, id, address, port.unwrap_or(0));
    mp(&[&[ADD_ADDR, id], &bytes, &port_bytes, &proof])
}

fn addresses() -> Vec<(IpAddr, u8, Option<u16>, usize)> {
    let (v4, v6) = ("10.9.8.7", "2001:db8:9::7");
    let of = |address: &str, id, port, length| (address.parse().unwrap(), id, port, length);
    vec![
        of(v4, 5, None, 16),
        of(v4, 255, Some(8080), 18),
        of(v6, 1, None, 28),
        of(v6, 5, Some(443), 30),
    ]
}

fn add_subflow(address: IpAddr, id: u8, port: Option<u16>) -> Value {
    let mut action = json!({ "action": "add_subflow", "address": address.to_string(),
        "id": id, "once": false, "apart": "0ns" });
    if let Some(port) = port {
        action["port"] = port.into();
    }
    action
}

#[test]
fn add_subflow_is_signed_with_the_keys_of_its_sender() {
    for (at, connection) in Connection::all().into_iter().enumerate() {
        // each with an IPv4 and an IPv6 address
        for (address, id, port, length) in addresses().into_iter().skip(at % 2).step_by(2) {
            let (own, peer) = (connection.client, connection.server);
            let from_client = add_addr(own, peer, id, address, port);
            let from_server = add_addr(peer, own, id, address, port);
            assert_eq!(from_client.len(), length);
            assert_ne!(from_client, from_server);
            let ack = data_ack();
            let stamps = [&[1, 1][..], &timestamps(3, 4)].concat();
            let mut rows = opening_rows(&connection);
            for (frame, new) in [
                (connection.client(), &from_client),
                (connection.server(), &from_server),
            ] {
                let fits = 18 + length <= 40;
                let full = frame.clone().options(&words(&[&stamps, &ack]));
                rows.push(match fits {
                    true => gets("first DSS", &frame, &[&stamps, &ack], &[&stamps, &ack, new]),
                    false => leaves("first DSS", &full, "no_room"),
                });
                rows.push(match fits {
                    true => gets("the next", &frame, &[&stamps, &ack], &[&stamps, &ack, new]),
                    // the NOPs go, too, where that does not suffice
                    false if length == 30 => {
                        gets("replaced", &frame, &[&stamps, &ack], &[&stamps[2..], new])
                    }
                    false => gets("replaced", &frame, &[&stamps, &ack], &[&stamps, new]),
                });
                rows.push(gets("bare", &frame, &[], &[new]));
                let data = frame.clone().payload_before(b"data");
                rows.push(gets("in place of NOPs", &data, &[&[1; 40]], &[new]));
                rows.push(leaves(
                    "there already",
                    &frame.clone().options(&words(&[&announcement(9, 16)])),
                    "option_present",
                ));
                for (what, dss) in [
                    ("a mapping", mapping()),
                    ("DATA_FIN", mp(&[&[DSS, DATA_ACK | DATA_FIN], &[0; 4]])),
                ] {
                    let filler = option(254, (40 - dss.len()) as u8, 0);
                    let full = frame.clone().options(&words(&[&dss, &filler]));
                    rows.push(leaves(what, &full, "no_room"));
                }
            }
            sequence(&add_subflow(address, id, port), &rows);
        }
    }
}

#[test]
fn a_signature_is_what_the_standard_says() {
    // of 05 0a090807 0000, by Python's hmac
    let (address, ..) = addresses()[0];
    let expected = [0x36, 0x54, 0x51, 0xc0, 0xd4, 0xc7, 0x20, 0x08];
    assert_eq!(proof(CLIENT_KEY, SERVER_KEY, 5, address, 0), expected);
}

/// Any id and address: 64 HMACs each way.
#[test]
fn signatures_of_many_keys() {
    let address: IpAddr = "10.9.8.7".parse().unwrap();
    for hook in Hook::ALL {
        let chain = file(json!({ "actions": [add_subflow(address, 5, None)] }));
        let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
        for round in 0..64u64 {
            let mut connection = Connection::new(v4().ports(1000 + round as u16, 80));
            connection.client = CLIENT_KEY
                .rotate_left(round as u32)
                .wrapping_mul(2 * round + 1);
            connection.server = SERVER_KEY.rotate_left(round as u32) ^ round << 40;
            feed(&mut bench, &connection.opening());
            let new = |own, peer| add_addr(own, peer, 5, address, None);
            let ack = data_ack();
            let rows = [
                gets(
                    "client",
                    &connection.client(),
                    &[&ack],
                    &[&ack, &new(connection.client, connection.server)],
                ),
                gets(
                    "server",
                    &connection.server(),
                    &[&ack],
                    &[&ack, &new(connection.server, connection.client)],
                ),
            ];
            check_rows(&mut bench, "add_subflow", &rows);
        }
    }
}

#[test]
fn add_subflow_on_a_subflow_that_joined() {
    for connection in Connection::all() {
        let (address, id, port, _) = addresses()[0];
        let join = connection.beside();
        let (own, peer) = (join.client, join.server);
        let mut rows = opening_rows(&connection);
        rows.extend(shake(&join.joining(), ["syn", "syn", "not_mptcp"]));
        let ack = data_ack();
        for (frame, new) in [
            (join.client(), add_addr(own, peer, id, address, port)),
            (join.server(), add_addr(peer, own, id, address, port)),
        ] {
            rows.push(gets("joined", &frame, &[&ack], &[&ack, &new]));
        }
        sequence(&add_subflow(address, id, port), &rows);
    }
}

/// A host's own announcement keeps its peer busy as well; an echo does not.
#[test]
fn add_subflow_waits_after_what_the_host_announced() {
    let (address, id, port, _) = addresses()[0];
    let mut action = add_subflow(address, id, port);
    action["apart"] = "1h".into();
    let ack = data_ack();
    for connection in Connection::all() {
        let (client, server) = (connection.client, connection.server);
        let own = add_addr(client, server, 9, address, None);
        let echo = mp(&[&[ADD_ADDR | 1, 9], &[9; 4]]);
        let with = |options: &[&[u8]]| connection.client_with(options);
        let mut rows = opening_rows(&connection);
        rows.extend([
            leaves("announced", &with(&[&own]), "not_mptcp"),
            leaves("too early", &with(&[&ack]), "not_due"),
            leaves("an echo", &connection.server_with(&[&echo]), "not_mptcp"),
            gets(
                "the other host",
                &connection.server(),
                &[&ack],
                &[&ack, &add_addr(server, client, id, address, port)],
            ),
        ]);
        sequence(&action, &rows);
    }
}

#[test]
fn add_subflow_needs_the_keys() {
    let (address, id, port, _) = addresses()[0];
    let connection = Connection::new(v6());
    let ack = data_ack();
    let [syn, syn_ack, third] = connection.opening();
    let acks = || connection.client_with(&[&ack]);
    let join = connection.beside();
    let [join_syn, join_syn_ack, join_third] = join.joining();
    let mut rows = vec![
        leaves("no handshake", &acks(), "no_keys"),
        leaves("SYN", &syn, "syn"),
        leaves("SYN-ACK", &syn_ack, "syn"),
        leaves("third packet missed", &acks(), "no_keys"),
        leaves("a join of nothing known", &join_syn, "syn"),
        leaves("SYN-ACK", &join_syn_ack, "syn"),
        leaves("third", &join_third, "not_mptcp"),
        leaves("its keys", &join.client_with(&[&ack]), "no_keys"),
    ];
    let new = add_addr(connection.client, connection.server, id, address, port);
    // the client has shown a DSS by now
    rows.push(gets(
        "the third packet, late",
        &connection.client(),
        &[&third.options],
        &[&third.options, &new],
    ));
    sequence(&add_subflow(address, id, port), &rows);
}

/// A device that adds up the rest of a checksum does so as before.
#[test]
fn seeds_stay_seeds() {
    let connection = Connection::new(v6());
    let (address, id, port, _) = addresses()[0];
    let added = add_addr(connection.client, connection.server, id, address, port);
    for (action, new) in [
        (mp_prio(true), prio(true)),
        (add_subflow(address, id, port), added),
    ] {
        let chain = file(json!({ "actions": [action] }));
        let mut bench = Bench::load(&chain, Hook::Xdp, CarrierChoice::Auto);
        feed(&mut bench, &connection.opening());
        feed(&mut bench, &connection.talk());
        let seed = connection.client().check(Check::Seed);
        let rows = [
            gets("grows", &seed, &[], &[&new]),
            gets(
                "in place of NOPs",
                &seed.payload_before(b"data"),
                &[&[1; 20]],
                &[&new],
            ),
        ];
        check_rows(&mut bench, "seed", &rows);
    }
}
