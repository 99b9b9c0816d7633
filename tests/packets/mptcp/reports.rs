// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `record` counts and `report` tells, read from their maps.

use std::thread::sleep;
use std::time::Duration;

use libbpf_rs::{MapHandle, RingBufferBuilder};

use policy_chain::engine::bpf::types::{report, subflow, subflow_end};
use policy_chain::engine::bpf::value_of;

use super::*;
use crate::bench::gives;

/// What is known of one end.
#[derive(Debug, PartialEq, Eq)]
struct End {
    packets: u64,
    bytes: u64,
    retransmissions: u64,
    rtt_min: u64,
    rtt_smoothed: u64,
    rtt_last: u64,
    sequence_end: u32,
    token: u32,
    backup: u8,
    address_id: u8,
    data_seen: u8,
}

#[derive(Debug)]
struct Known {
    flags: u32,
    initiator_is_client: Option<bool>,
    client: End,
    server: End,
}

impl End {
    fn new(end: &subflow_end) -> End {
        End {
            packets: end.packets,
            bytes: end.bytes,
            retransmissions: end.retransmissions,
            rtt_min: end.rtt_min,
            rtt_smoothed: end.rtt_smoothed,
            rtt_last: end.rtt_last,
            sequence_end: end.sequence_end,
            token: end.token,
            backup: end.backup,
            address_id: end.address_id,
            data_seen: end.data_seen,
        }
    }
}

/// What `pcd_subflows` has of the connection of a packet from its client.
fn known(bench: &Bench, client: &Frame) -> Option<Known> {
    let find = |frame: &Frame| {
        let key = flow_id(frame);
        let found = sys::map_lookup(bench.state("pcd_subflows"), &key, size_of::<subflow>());
        value_of::<subflow>(&found.unwrap()?)
    };
    // either end is the first
    let (known, swapped) = match find(client) {
        Some(known) => (known, false),
        None => (find(&client.clone().back())?, true),
    };
    let mut ends = known.ends.each_ref().map(End::new);
    if swapped {
        ends.reverse();
    }
    let [client, server] = ends;
    let initiator = known.initiator;
    Some(Known {
        flags: known.flags,
        initiator_is_client: (initiator < 2).then_some((initiator == 1) == swapped),
        client,
        server,
    })
}

fn same(what: &str, frame: &Frame) -> Row {
    gives(what, frame, frame)
}

#[test]
fn record_counts_packets_bytes_and_retransmissions() {
    let chain = file(json!({ "actions": [{ "action": "record" }] }));
    for hook in Hook::ALL {
        for connection in Connection::all() {
            let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
            let [syn, syn_ack, third] = connection.opening();
            let data = |at: u32, bytes: &[u8]| connection.client().sequence(at).payload(bytes);
            let reply = |at: u32, bytes: &[u8]| connection.server().sequence(at).payload(bytes);
            let fin = data(16, b"").flags(FIN | ACK);
            let rows = [
                same("SYN", &syn.sequence(1)),
                same("SYN-ACK", &syn_ack.sequence(u32::MAX)),
                same("third", &third.sequence(2)),
                same("data", &data(2, b"0123456789")),
                same("more", &data(12, b"abcd").options(&words(&[&mapping()]))),
                same("again", &data(2, b"0123456789")),
                same("half of it", &data(12, b"ab")),
                same("bare, however old", &data(2, b"")),
                same("FIN", &fin),
                same("FIN again", &fin),
                same("past 0", &reply(0, b"xyz")),
                same("again", &reply(0, b"xyz")),
                same("the next", &reply(3, b"z")),
            ];
            check_rows(&mut bench, "record", &rows);
            let found = known(&bench, &connection.client()).unwrap();
            assert_eq!(found.initiator_is_client, Some(true));
            // offered, accepted, established, FIN
            assert_eq!(found.flags, 1 | 4 | 8 | 16, "{found:?}");
            let (client, server) = (&found.client, &found.server);
            assert_eq!((client.packets, client.bytes), (9, 26), "{found:?}");
            assert_eq!((server.packets, server.bytes), (4, 7), "{found:?}");
            assert_eq!((client.retransmissions, server.retransmissions), (3, 1));
            assert_eq!((client.sequence_end, server.sequence_end), (17, 4));
            let tokens = (token(connection.client), token(connection.server));
            assert_eq!((client.token, server.token), tokens);
            assert_eq!((client.data_seen, server.data_seen), (1, 0));
            assert_eq!((client.rtt_min, server.rtt_min), (0, 0), "no timestamps");
        }
    }
}

#[test]
fn record_knows_subflows_and_tcp() {
    let chain = file(json!({ "actions": [{ "action": "record" }] }));
    for hook in Hook::ALL {
        let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
        let connection = Connection::new(v4());
        let join = connection.beside();
        feed(&mut bench, &connection.opening());
        feed(&mut bench, &join.joining());
        let found = known(&bench, &join.client()).unwrap();
        // joins, accepted, established
        assert_eq!(found.flags, 2 | 4 | 8, "{found:?}");
        assert_eq!((found.client.address_id, found.server.address_id), (5, 6));
        assert_eq!((found.client.backup, found.server.backup), (1, 0));
        let tokens = (token(connection.client), token(connection.server));
        assert_eq!((found.client.token, found.server.token), tokens);
        // later words on it
        let prio = |frame: Frame, bit: u8| frame.options(&words(&[&mp(&[&[MP_PRIO | bit]])]));
        feed(
            &mut bench,
            [&prio(join.client(), 0), &prio(join.server(), 1)],
        );
        let found = known(&bench, &join.client()).unwrap();
        assert_eq!((found.client.backup, found.server.backup), (0, 1));
        feed(&mut bench, [&join.server().flags(RST)]);
        assert_eq!(known(&bench, &join.client()).unwrap().flags, 2 | 4 | 8 | 32);

        let plain = v6();
        assert!(known(&bench, &plain).is_none());
        let syn = plain.clone().flags(SYN);
        let answer = plain.clone().back().flags(SYN | ACK);
        let data = plain.clone().sequence(2).payload(b"data");
        check_rows(
            &mut bench,
            "TCP",
            &[
                same("SYN", &syn),
                same("SYN-ACK", &answer),
                same("data", &data),
            ],
        );
        let found = known(&bench, &plain).unwrap();
        assert_eq!((found.flags, found.initiator_is_client), (0, Some(true)));
        assert_eq!((found.client.packets, found.client.bytes), (2, 4));
        assert_eq!((found.server.packets, found.server.bytes), (1, 0));
        // FIN, RST; by which it does not become MPTCP
        for (flags, wanted) in [(FIN | ACK, 16), (RST, 16 | 32)] {
            let end = plain.clone().sequence(6).flags(flags);
            check_rows(&mut bench, "TCP", &[same("its end", &end)]);
            assert_eq!(known(&bench, &plain).unwrap().flags, wanted);
        }
        check_rows(
            &mut bench,
            "not TCP",
            &[
                leaves("UDP", &plain.clone().protocol(UDP), "not_tcp"),
                leaves("later fragment", &v4().fragment(3), "fragment"),
            ],
        );
    }
}

/// A SYN of TCP begins a connection, and one sent again is of the same.
#[test]
fn record_counts_the_syn_of_tcp() {
    let chain = file(json!({ "actions": [{ "action": "record" }] }));
    for hook in Hook::ALL {
        for client in [v4(), v6().back()] {
            let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
            let syn = client.clone().flags(SYN).sequence(7);
            feed(&mut bench, [&syn, &syn]);
            let found = known(&bench, &client).unwrap();
            assert_eq!(found.initiator_is_client, Some(true));
            assert_eq!((found.client.packets, found.client.retransmissions), (2, 1));
            feed(&mut bench, [&client.clone().sequence(8).payload(b"data")]);
            feed(&mut bench, [&syn.clone().sequence(99)]);
            let found = known(&bench, &client).unwrap();
            assert_eq!(
                (found.client.packets, found.client.bytes),
                (1, 0),
                "a new one"
            );
            // seen from its middle on
            let other = client.clone().ports(1, 2);
            feed(&mut bench, [&other.clone().back().flags(SYN | ACK)]);
            assert_eq!(known(&bench, &other).unwrap().initiator_is_client, None);
        }
    }
}

/// What the SYN-ACK does not take up is plain TCP; its end is taken note of.
#[test]
fn refused_connections_are_tcp() {
    const REFUSED: u32 = 64;
    let chain = file(json!({ "actions": [{ "action": "mp_prio", "backup": true }] }));
    for hook in Hook::ALL {
        for connection in Connection::all() {
            let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
            for (handshake, offer) in [(connection.opening(), 1), (connection.joining(), 2)] {
                let syn = handshake[0].clone().sequence(offer);
                feed(&mut bench, [&syn]);
                let flags = |bench: &Bench| known(bench, &connection.client()).unwrap().flags;
                assert_eq!(flags(&bench), offer);
                feed(&mut bench, [&connection.server().flags(SYN | ACK)]);
                assert_eq!(flags(&bench), REFUSED);
                feed(&mut bench, [&syn, &connection.client()]);
                assert_eq!(flags(&bench), REFUSED, "sent again");
                feed(&mut bench, [&connection.client().flags(FIN | ACK)]);
                assert_eq!(flags(&bench), REFUSED | 16);
                feed(&mut bench, [&connection.server().flags(RST)]);
                assert_eq!(flags(&bench), REFUSED | 16 | 32);
            }
        }
    }
}

/// Learners at XDP and at TC ingress of a device see the same segments, which count once.
#[test]
fn two_learners_count_a_segment_once() {
    let chain = file(json!({ "actions": [{ "action": "mp_prio", "backup": true }] }));
    let connection = Connection::new(v4());
    let mut xdp = Bench::load(&chain, Hook::Xdp, CarrierChoice::Auto);
    let mut tc = Bench::load(&chain, Hook::TcIngress, CarrierChoice::Auto);
    // Only one bench can hold the map of a device, so each is given what the other left there.
    let pass_on = |from: &Bench, to: &Bench| {
        let entries = sys::map_dump(from.state("pcd_subflows")).unwrap();
        for (key, value) in entries.iter() {
            sys::map_update(to.state("pcd_subflows"), key, value, 0).unwrap();
        }
    };
    let seen = |bench: &Bench| known(bench, &connection.client()).unwrap().client.data_seen;
    for (frame, count) in connection.opening().iter().map(|it| (it, 0)).chain([
        (&connection.client_with(&[&data_ack()]), 1),
        (&connection.client_with(&[&mapping()]), 2),
        (&connection.client_with(&[&data_ack()]), 2),
    ]) {
        feed(&mut xdp, [frame]);
        pass_on(&xdp, &tc);
        feed(&mut tc, [frame]);
        pass_on(&tc, &xdp);
        assert_eq!(seen(&tc), count);
    }
}

/// A saved acknowledgement of a connection is not compared with those of a later one.
#[test]
fn acknowledgements_end_with_their_connection() {
    let chain = file(json!({ "actions": [{ "action": "mp_prio", "backup": true }] }));
    for hook in Hook::ALL {
        for connection in Connection::all() {
            let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
            let acks = |bench: &Bench| sys::map_dump(bench.state("pcd_acks")).unwrap().len();
            for (at, last) in [(1, 2000), (2, 1000)] {
                feed(&mut bench, [&connection.syn().sequence(at)]);
                assert_eq!(acks(&bench), 0, "nothing of the one before");
                feed(&mut bench, &connection.opening()[1..]);
                let talk = connection.talk().map(|frame| frame.sequence(last));
                feed(&mut bench, &talk);
                feed(&mut bench, [&connection.syn().sequence(at)]);
                assert_eq!(acks(&bench), 2);
            }
            feed(&mut bench, [&connection.client().flags(SYN).sequence(3)]);
            assert_eq!(acks(&bench), 0, "TCP");
        }
    }
}

/// From a segment with a timestamp to the first one back that echoes it.
#[test]
fn record_pairs_timestamps() {
    const MILLISECOND: u64 = 1_000_000;
    let chain = file(json!({ "actions": [{ "action": "record" }] }));
    for hook in Hook::ALL {
        let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
        let stamped =
            |frame: Frame, value, echo| frame.options(&words(&[&timestamps(value, echo)]));
        let data = |value: u32| {
            let frame = v4().sequence(value).payload(b"x");
            stamped(frame, value, 7)
        };
        let ack = |echo: u32| stamped(v4().back(), 500, echo);
        let rtt = |bench: &Bench| {
            let client = known(bench, &v4()).unwrap().client;
            (client.rtt_min, client.rtt_smoothed, client.rtt_last)
        };
        feed(&mut bench, [&stamped(v4(), 90, 7), &ack(90)]);
        assert_eq!(rtt(&bench), (0, 0, 0), "nothing to acknowledge");
        feed(&mut bench, [&data(100)]);
        sleep(Duration::from_millis(30));
        // sent again, or more of it: the first is waited for
        feed(&mut bench, [&data(101), &ack(99)]);
        assert_eq!(rtt(&bench), (0, 0, 0), "an older echo");
        feed(&mut bench, [&ack(100)]);
        let (min, smoothed, last) = rtt(&bench);
        assert!(
            (30 * MILLISECOND..2000 * MILLISECOND).contains(&min),
            "{min}"
        );
        assert_eq!((smoothed, last), (min, min));
        feed(&mut bench, [&ack(100), &ack(101)]);
        assert_eq!(rtt(&bench), (min, min, min), "nothing is waited for");
        feed(&mut bench, [&data(200), &ack(200)]);
        let (second, smoothed, last) = rtt(&bench);
        assert!(second < min && last == second, "{second}, {min}");
        assert_eq!(smoothed, min - min / 8 + second / 8);
        feed(&mut bench, [&data(250), &ack(251), &ack(250)]);
        assert_eq!(rtt(&bench).2, last, "its echo was lost: a later one");
        let server = known(&bench, &v4()).unwrap().server;
        assert_eq!(server.rtt_last, 0, "no data of the server");
        let answer = stamped(v4().back().payload(b"y"), 900, 7);
        feed(&mut bench, [&answer, &stamped(v4(), 300, 900)]);
        let found = known(&bench, &v4()).unwrap();
        assert_ne!(found.server.rtt_last, 0, "the other direction");
        assert_eq!(found.client.rtt_last, last);
    }
}

/// Only the first segment with a timestamp is timed, in whatever order they come.
#[test]
fn record_times_new_timestamps_only() {
    let chain = file(json!({ "actions": [{ "action": "record" }] }));
    for hook in Hook::ALL {
        let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
        // Past 0 they go on.
        for (port, begin) in [(1, 100), (2, u32::MAX - 3), (3, i32::MAX as u32 - 3)] {
            let client = v4().ports(port, 80);
            let stamped = |frame: Frame, value: u32, echo: u32| {
                frame.options(&words(&[&timestamps(value, echo)]))
            };
            let at = |tick: u32| begin.wrapping_add(tick);
            let data = |tick| stamped(client.clone().payload(b"x"), at(tick), 7);
            let ack = |tick| stamped(client.clone().back(), 500, at(tick));
            let last = |bench: &Bench| known(bench, &client).unwrap().client.rtt_last;
            feed(&mut bench, [&data(0), &ack(0)]);
            assert_eq!(last(&bench), 0, "there may have been one before");
            feed(&mut bench, [&data(2), &ack(2)]);
            let first = last(&bench);
            assert_ne!(first, 0);
            feed(&mut bench, [&data(1), &data(2), &ack(2), &ack(1)]);
            assert_eq!(last(&bench), first, "an older one, and the same again");
            feed(&mut bench, [&data(9)]);
            let wait = Duration::from_millis(2);
            sleep(wait);
            feed(&mut bench, [&ack(9)]);
            assert!(last(&bench) >= wait.as_nanos() as u64, "a newer one");
            let client = client.ports(port + 10, 80);
            let syn = stamped(client.clone().flags(SYN), at(0), 0);
            let syn_ack = stamped(client.clone().back().flags(SYN | ACK), 500, at(0));
            feed(&mut bench, [&syn, &syn_ack]);
            let found = known(&bench, &client).unwrap();
            assert_ne!(found.client.rtt_last, 0, "nothing is before a SYN");
        }
    }
}

/// The records in the ring buffer.
fn events(bench: &Bench) -> Vec<Vec<u8>> {
    let id = sys::map_info(bench.state("pcn_events")).unwrap().id;
    let map = MapHandle::from_map_id(id).unwrap();
    let mut records = Vec::new();
    let mut builder = RingBufferBuilder::new();
    builder
        .add(&map, |record| {
            records.push(record.to_vec());
            0
        })
        .unwrap();
    builder.build().unwrap().consume().unwrap();
    records
}

#[test]
fn report_tells_of_signals() {
    let chain = file(json!({ "actions": [{ "action": "report" }] }));
    for hook in Hook::ALL {
        for connection in Connection::all() {
            let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
            let [syn, syn_ack, third] = connection.opening();
            let [ping, _] = connection.talk();
            let with = |options: &[&[u8]]| connection.client_with(options);
            let fin = mp(&[&[DSS, DATA_ACK | DATA_FIN], &[0; 4]]);
            // RFC 8684, 3.7: a data-level length of 0
            let infinite = mp(&[&[DSS, MAPPING], &[1; 8], &[0; 2], &[1; 2]]);
            let wide = mp(&[&[DSS, 0x0f], &[1; 20], &[0; 2]]);
            let worth = [
                syn.clone(),
                syn_ack,
                third,
                with(&[&announcement(1, 16)]),
                with(&[&[3, 3, 7], &data_ack(), &mp(&[&[REMOVE_ADDR, 1]])]),
                with(&[&mp(&[&[MP_PRIO | 1]])]),
                with(&[&fin]),
                with(&[&infinite]).payload(b"odd"),
                with(&[&data_ack(), &mp(&[&[MP_FASTCLOSE, 0], &[9; 8]])]),
                connection
                    .client_with(&[&mp(&[&[MP_FASTCLOSE, 0], &[9; 8]])])
                    .flags(RST),
                with(&[&wide]),
                connection.server().flags(FIN | ACK),
                connection.client().flags(RST),
                v4().ports(9, 9)
                    .options(&words(&[&mp(&[&[0x61, 0], &[1; 8]])])),
            ];
            let dull = [
                ping,
                connection.client(),
                with(&[&data_ack()]),
                v6().ports(9, 9).flags(SYN),
                v6().ports(9, 9).flags(FIN | ACK),
                with(&[&[30, 2]]),
            ];
            for frame in &worth {
                check_rows(&mut bench, "report", &[same("worth it", frame)]);
                for frame in &dull {
                    let rows = [leaves("nothing to tell", frame, "not_reported")];
                    check_rows(&mut bench, "report", &rows);
                }
            }
            let records = events(&bench);
            assert_eq!(records.len(), worth.len());
            for (at, (record, frame)) in records.iter().zip(&worth).enumerate() {
                check_record(record, frame, hook, &format!("{at} on {hook}"));
                let told = value_of::<report>(record).unwrap();
                let tokens = (told.source_token, told.destination_token);
                let own = (token(connection.client), token(connection.server));
                let wanted = match at {
                    0 | 1 | 13 => (0, 0),
                    11 => (own.1, own.0),
                    _ => own,
                };
                assert_eq!(tokens, wanted, "{at} on {hook}");
            }
            let at = |record: &Vec<u8>| value_of::<report>(record).unwrap().at;
            let times: Vec<u64> = records.iter().map(at).collect();
            assert!(times.is_sorted() && times[0] > 0);
        }
    }
}

/// A connection that became TCP has no more signals than that, and its end.
#[test]
fn report_tells_of_refusal() {
    let chain = file(json!({ "actions": [{ "action": "report" }] }));
    for hook in Hook::ALL {
        for connection in Connection::all() {
            let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
            let dull = |what, frame: &Frame| leaves(what, frame, "not_reported");
            let rows = [
                same("SYN", &connection.syn()),
                same("again, without MPTCP", &connection.client().flags(SYN)),
                same("SYN-ACK", &connection.server().flags(SYN | ACK)),
                dull("ACK", &connection.client()),
                dull("data", &connection.server().payload(b"data")),
                same("FIN", &connection.client().flags(FIN | ACK)),
                same("RST", &connection.server().flags(RST)),
            ];
            check_rows(&mut bench, "report", &rows);
            assert_eq!(events(&bench).len(), 5);
        }
    }
}

/// Where keys may be anywhere, nothing is told.
#[test]
fn report_hides_keys_that_are_out_of_place() {
    let chain = file(json!({ "actions": [{ "action": "report" }] }));
    let keys = mp(&[
        &[1, 1],
        &CLIENT_KEY.to_be_bytes(),
        &SERVER_KEY.to_be_bytes(),
    ]);
    let close = mp(&[&[MP_FASTCLOSE, 0], &SERVER_KEY.to_be_bytes()]);
    for hook in Hook::ALL {
        let connection = Connection::new(v4());
        let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
        feed(&mut bench, &connection.opening());
        events(&bench);
        let capable = mp(&[&[1, 1]]);
        for (flags, options) in [
            (ACK, [&keys[..], &keys].concat()),
            (ACK, [&capable[..], &keys].concat()),
            (ACK, [&close[..], &[1], &close].concat()),
            (ACK, [&close[..], &keys, &[30, 3, 0x01]].concat()),
            (RST, [&keys[..], &[3, 0]].concat()),
            (RST, [&close[..], &[3, 9]].concat()),
        ] {
            let frame = connection.client_with(&[&options]).flags(flags);
            check_rows(&mut bench, "report", &[same("it is told of", &frame)]);
            let records = events(&bench);
            let told = value_of::<report>(&records[0]).unwrap();
            assert_eq!(told.options, [0; 64], "{options:02x?}");
            assert_eq!(usize::from(told.options_length), frame.options.len());
        }
        // no keys, however far behind
        let far = connection.client_with(&[&[1; 36], &capable]).flags(ACK);
        check_rows(&mut bench, "report", &[same("far behind", &far)]);
        let records = events(&bench);
        let told = value_of::<report>(&records[0]).unwrap();
        assert_eq!(told.options[..40], far.options[..40]);
    }
}

/// The options with zeros for the keys of MP_CAPABLE and MP_FASTCLOSE: 8 bytes each, from the
/// fifth byte on.
fn without_keys(options: &[u8]) -> Vec<u8> {
    let mut blank = options.to_vec();
    let mut at = 0;
    while at < blank.len() && blank[at] != 0 {
        let size = match blank[at] {
            1 => 1,
            _ => usize::from(blank[at + 1]),
        };
        if blank[at] == 30 && size >= 12 && matches!(blank[at + 2] >> 4, 0 | 7) {
            let keys = (size - 4) / 8 * 8;
            blank[at + 4..at + 4 + keys].fill(0);
        }
        at += size.max(1);
    }
    blank
}

/// `struct report` of src/bpf/mptcp_types.h.
fn check_record(record: &[u8], frame: &Frame, hook: Hook, what: &str) {
    let told = value_of::<report>(record).unwrap();
    // The addresses, behind the time: the type has no names for their parts.
    assert_eq!(record[8..24], mapped(frame.src), "{what}");
    assert_eq!(record[24..40], mapped(frame.dst), "{what}");
    assert_eq!(told.source_port, frame.src_port.to_be(), "{what}");
    assert_eq!(told.destination_port, frame.dst_port.to_be(), "{what}");
    assert_eq!(told.chain, 1, "{what}");
    assert_eq!(told.sequence, frame.sequence, "{what}");
    assert_eq!(told.acknowledgment, 2, "{what}: what frames acknowledge");
    assert_eq!(told.payload as usize, frame.payload.len(), "{what}");
    assert_eq!(told.tcp_flags, frame.flags, "{what}");
    assert_eq!(told.ingress, u8::from(hook.is_ingress()), "{what}");
    assert_eq!(
        usize::from(told.options_length),
        frame.options.len(),
        "{what}"
    );
    let (options, rest) = told.options.split_at(frame.options.len());
    assert_eq!(options, without_keys(&frame.options), "{what}");
    assert!(rest.iter().all(|byte| *byte == 0), "{what}");
}
