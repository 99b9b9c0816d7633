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
        assert_eq!((found.flags, found.initiator_is_client), (0, None));
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
        feed(&mut bench, [&data(u32::MAX), &ack(0), &ack(u32::MAX)]);
        assert_eq!(
            rtt(&bench).2,
            last,
            "its echo was lost: a later one, past 0"
        );
        let server = known(&bench, &v4()).unwrap().server;
        assert_eq!(server.rtt_last, 0, "no data of the server");
        let answer = stamped(v4().back().payload(b"y"), 900, 7);
        feed(&mut bench, [&answer, &stamped(v4(), 300, 900)]);
        let found = known(&bench, &v4()).unwrap();
        assert_ne!(found.server.rtt_last, 0, "the other direction");
        assert_eq!(found.client.rtt_last, last);
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
