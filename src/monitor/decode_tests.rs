// SPDX-License-Identifier: MIT OR Apache-2.0
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::mem::offset_of;

use super::*;

const SYN: u16 = 2;
const SYN_ACK: u16 = 18;
const ACK: u16 = 16;
const FIN_ACK: u16 = 17;
const RST: u16 = 4;

const CAPABLE: [u8; 4] = [30, 4, 0x01, 0x01];
const CAPABLE_ANSWER: [u8; 12] = [30, 12, 0x01, 0x81, 1, 2, 3, 4, 5, 6, 7, 8];

struct Fixed;

impl Names for Fixed {
    fn device(&mut self, ifindex: u32) -> String {
        format!("path{ifindex}")
    }

    fn chain(&mut self, id: u32) -> Option<String> {
        (id == 7).then(|| "watch".to_owned())
    }
}

fn set(report: &mut report, offset: usize, bytes: &[u8]) {
    // SAFETY: the report has no padding that is not a member, and every byte pattern is a value.
    let all = unsafe { plain::as_mut_bytes(report) };
    all[offset..offset + bytes.len()].copy_from_slice(bytes);
}

fn address(text: &str) -> [u8; 16] {
    match text.parse().unwrap() {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

fn segment(tcp_flags: u16, options: &[u8]) -> report {
    let mut segment = report {
        at: 5,
        source_port: 40000_u16.to_be(),
        destination_port: 80_u16.to_be(),
        ifindex: 1,
        chain: 7,
        sequence: 1000,
        tcp_flags,
        options_length: options.len() as u8,
        ..report::default()
    };
    segment.options[..options.len()].copy_from_slice(options);
    set(
        &mut segment,
        offset_of!(report, source),
        &address("10.0.1.1"),
    );
    let destination = offset_of!(report, destination);
    set(&mut segment, destination, &address("10.0.1.2"));
    segment
}

fn answer(options: &[u8], acknowledgment: u32) -> report {
    let mut answer = segment(SYN_ACK, options);
    set(
        &mut answer,
        offset_of!(report, source),
        &address("10.0.1.2"),
    );
    let destination = offset_of!(report, destination);
    set(&mut answer, destination, &address("10.0.1.1"));
    (answer.source_port, answer.destination_port) = (80_u16.to_be(), 40000_u16.to_be());
    answer.acknowledgment = acknowledgment;
    answer
}

fn decoder() -> Decoder {
    Decoder::new(Clock::new().unwrap())
}

fn kinds_of(decoder: &mut Decoder, report: &report) -> Vec<Kind> {
    let events = decoder.decode(report, &mut Fixed);
    events.into_iter().map(|event| event.kind).collect()
}

fn kinds(tcp_flags: u16, options: &[u8]) -> Vec<Kind> {
    kinds_of(&mut decoder(), &segment(tcp_flags, options))
}

#[track_caller]
fn one(tcp_flags: u16, options: &[u8]) -> Kind {
    let mut kinds = kinds(tcp_flags, options);
    assert_eq!(kinds.len(), 1, "{kinds:?}");
    kinds.remove(0)
}

fn join_parts(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn text(kinds: &[Kind]) -> Vec<String> {
    kinds.iter().map(Kind::to_string).collect()
}

#[test]
fn what_all_events_have() {
    let mut report = segment(FIN_ACK, &[]);
    report.source_token = 0x0102_0304;
    report.ingress = 1;
    let mut decoder = decoder();
    let event = decoder.decode(&report, &mut Fixed).remove(0);
    assert_eq!(event.time, decoder.clock.time(5));
    assert_eq!(event.device, "path1");
    assert_eq!(event.direction, Direction::In);
    assert_eq!(event.source.to_string(), "10.0.1.1:40000");
    assert_eq!(event.destination.to_string(), "10.0.1.2:80");
    assert_eq!(event.chain.as_deref(), Some("watch"));
    assert_eq!(event.connection, Some(0x0102_0304));
    assert_eq!(event.kind, Kind::Close { how: How::Fin });

    (report.source_token, report.ingress, report.chain) = (0, 0, 8);
    set(
        &mut report,
        offset_of!(report, source),
        &address("2001:db8::1"),
    );
    let event = decoder.decode(&report, &mut Fixed).remove(0);
    assert_eq!(event.source.to_string(), "[2001:db8::1]:40000");
    assert_eq!(event.direction, Direction::Out);
    assert_eq!((event.chain, event.connection), (None, None));
}

#[test]
fn capable_in_each_stage() {
    let capable = |stage, version, flags| Kind::MpCapable {
        stage,
        version,
        flags,
        checksum_required: flags & 0x80 != 0,
    };
    assert_eq!(one(SYN, &CAPABLE), capable(Stage::Syn, 1, 0x01));
    assert_eq!(
        one(SYN_ACK, &CAPABLE_ANSWER),
        capable(Stage::SynAck, 1, 0x81)
    );
    for length in [20, 22, 24] {
        let mut option = vec![9; length];
        option[..4].copy_from_slice(&[30, length as u8, 0x01, 0x21]);
        assert_eq!(one(ACK, &option), capable(Stage::Ack, 1, 0x21));
        // Without ACK it would be malformed, but no handshake.
        assert_eq!(one(0, &option), capable(Stage::Ack, 1, 0x21));
    }
    let old = [30, 12, 0x00, 0x81, 1, 2, 3, 4, 5, 6, 7, 8];
    assert_eq!(one(SYN, &old), capable(Stage::Syn, 0, 0x81));
    // Of a wrong length for its stage.
    assert!(kinds(SYN, &CAPABLE_ANSWER).is_empty());
    assert!(kinds(SYN_ACK, &CAPABLE).is_empty());
    assert!(kinds(ACK, &CAPABLE).is_empty());
}

#[test]
fn no_keys_are_shown() {
    let option = join_parts(&[&[30, 20, 0x01, 0x01], &[0xab; 16]]);
    let close = join_parts(&[&[30, 12, 0x70, 0], &[0xab; 8]]);
    for options in [&option, &close] {
        for event in decoder().decode(&segment(ACK, options), &mut Fixed) {
            let json = event.to_json().to_string();
            assert!(!json.contains("abab") && !json.contains("171"), "{json}");
        }
    }
}

#[test]
fn join_in_each_stage() {
    let syn = [30, 12, 0x11, 3, 0xde, 0xad, 0xbe, 0xef, 1, 2, 3, 4];
    assert_eq!(
        one(SYN, &syn),
        Kind::MpJoin {
            stage: Stage::Syn,
            address_id: Some(3),
            backup: Some(true),
            token: Some(0xdead_beef),
            nonce: Some(0x0102_0304),
        }
    );
    let syn_ack = [30, 16, 0x10, 4, 9, 9, 9, 9, 9, 9, 9, 9, 1, 2, 3, 4];
    assert_eq!(
        one(SYN_ACK, &syn_ack),
        Kind::MpJoin {
            stage: Stage::SynAck,
            address_id: Some(4),
            backup: Some(false),
            token: None,
            nonce: Some(0x0102_0304),
        }
    );
    let ack = join_parts(&[&[30, 24, 0x10, 0], &[9; 20]]);
    assert_eq!(
        one(ACK, &ack),
        Kind::MpJoin {
            stage: Stage::Ack,
            address_id: None,
            backup: None,
            token: None,
            nonce: None,
        }
    );
    for (flags, option) in [
        (SYN_ACK, &syn[..]),
        (SYN, &syn_ack),
        (ACK, &syn),
        (SYN, &ack),
    ] {
        assert!(kinds(flags, option).is_empty());
    }
}

#[test]
fn addresses_added() {
    let wide = address("2001:db8::7");
    let cases: [(Vec<u8>, &str, bool); 8] = [
        (
            join_parts(&[&[30, 8, 0x31, 1], &[10, 0, 2, 1]]),
            "id 1 10.0.2.1 echo",
            false,
        ),
        (
            join_parts(&[&[30, 10, 0x31, 1], &[10, 0, 2, 1], &[0x1f, 0x90]]),
            "id 1 10.0.2.1 port 8080 echo",
            false,
        ),
        (
            join_parts(&[&[30, 16, 0x30, 2], &[10, 0, 2, 1], &[9; 8]]),
            "id 2 10.0.2.1",
            true,
        ),
        (
            join_parts(&[&[30, 18, 0x30, 2], &[10, 0, 2, 1], &[0x1f, 0x90], &[9; 8]]),
            "id 2 10.0.2.1 port 8080",
            true,
        ),
        (
            join_parts(&[&[30, 20, 0x31, 3], &wide]),
            "id 3 2001:db8::7 echo",
            false,
        ),
        (
            join_parts(&[&[30, 22, 0x30, 3], &wide, &[0, 80]]),
            "id 3 2001:db8::7 port 80 no hmac",
            false,
        ),
        (
            join_parts(&[&[30, 28, 0x30, 4], &wide, &[9; 8]]),
            "id 4 2001:db8::7",
            true,
        ),
        (
            join_parts(&[&[30, 30, 0x30, 4], &wide, &[0xff, 0xff], &[9; 8]]),
            "id 4 2001:db8::7 port 65535",
            true,
        ),
    ];
    for (option, words, with_hmac) in cases {
        let kind = one(ACK, &option);
        assert_eq!(kind.to_string(), format!("add_addr {words}"));
        let Kind::AddAddr { hmac, length, .. } = kind else {
            panic!("{kind:?}")
        };
        assert_eq!((hmac, usize::from(length)), (with_hmac, option.len()));
    }
    for length in [4, 7, 9, 12, 24, 32] {
        let mut option = vec![0; length];
        option[..3].copy_from_slice(&[30, length as u8, 0x30]);
        assert!(kinds(ACK, &option).is_empty(), "{length}");
    }
}

#[test]
fn addresses_removed_and_priorities() {
    assert_eq!(
        one(ACK, &[30, 6, 0x40, 1, 2, 255]),
        Kind::RemoveAddr {
            address_ids: vec![1, 2, 255]
        }
    );
    assert!(kinds(ACK, &[30, 3, 0x40]).is_empty());
    let prio = |backup, address_id| Kind::MpPrio { backup, address_id };
    assert_eq!(one(ACK, &[30, 3, 0x51]), prio(true, None));
    assert_eq!(one(ACK, &[30, 3, 0x50]), prio(false, None));
    assert_eq!(one(ACK, &[30, 4, 0x51, 9]), prio(true, Some(9)));
    assert!(kinds(ACK, &[30, 5, 0x51, 9, 9]).is_empty());
}

#[test]
fn failures_and_ends() {
    let fail = [30, 12, 0x60, 0, 0xff, 0, 0, 0, 0, 0, 0, 2];
    assert_eq!(
        one(ACK, &fail),
        Kind::MpFail {
            data_sequence: DataSequence::Full(0xff00_0000_0000_0002)
        }
    );
    let fastclose = [30, 12, 0x70, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    assert_eq!(one(ACK, &fastclose), Kind::MpFastclose);
    assert_eq!(text(&kinds(RST, &fastclose)), ["mp_fastclose", "close rst"]);
    let names = [
        "unspecified",
        "mptcp_specific",
        "lack_of_resources",
        "administratively_prohibited",
        "too_much_outstanding_data",
        "unacceptable_performance",
        "middlebox_interference",
        "unassigned",
    ];
    for (reason, name) in (0..).zip(names) {
        let kinds = kinds(RST, &[30, 4, 0x81, reason]);
        let flags = 1;
        assert_eq!(kinds[0], Kind::MpTcprst { flags, reason });
        let line = format!("mp_tcprst {name} transient");
        assert_eq!(text(&kinds), [&line, "close rst"]);
    }
    for option in [&fail[..11], &fastclose[..11], &[30, 3, 0x80]] {
        let mut option = option.to_vec();
        option[1] = option.len() as u8;
        assert!(kinds(ACK, &option).is_empty(), "{option:?}");
    }
}

/// A DSS option: flags, and what follows them.
fn dss(flags: u8, parts: &[&[u8]]) -> Vec<u8> {
    let rest = parts.concat();
    join_parts(&[&[30, 4 + rest.len() as u8, 0x20, flags], &rest])
}

#[test]
fn the_end_of_data() {
    let acks: [(u8, &[u8]); 3] = [(0, &[]), (0x01, &[7; 4]), (0x03, &[7; 8])];
    let checksums: [&[u8]; 2] = [&[], &[0xab, 0xcd]];
    for (ack, acknowledged) in acks {
        for checksum in checksums {
            let tail = [&[0; 4][..], &[0, 1], checksum].concat();
            let option = dss(0x14 | ack, &[acknowledged, &[0, 0, 1, 0], &tail]);
            assert_eq!(text(&[one(ACK, &option)]), ["data_fin 00000100"]);
            let option = dss(
                0x1c | ack,
                &[acknowledged, &[0, 0, 0, 0, 0, 0, 1, 0], &tail],
            );
            assert_eq!(text(&[one(ACK, &option)]), ["data_fin 0000000000000100"]);
        }
        let option = dss(0x10 | ack, &[acknowledged]);
        let data_sequence = None;
        assert_eq!(one(ACK, &option), Kind::DataFin { data_sequence });
        // An acknowledgment, or a mapping, by itself.
        assert!(kinds(ACK, &dss(ack, &[acknowledged])).is_empty());
        let option = dss(0x04 | ack, &[acknowledged, &[0; 8], &[0, 1]]);
        assert!(kinds(ACK, &option).is_empty());
    }
    // With data in front of it; and round the end of the numbers.
    let option = dss(0x14, &[&[0xff; 4], &[0; 4], &[0, 11]]);
    assert_eq!(text(&[one(ACK, &option)]), ["data_fin 00000009"]);
    let option = dss(0x1c, &[&[0xff; 8], &[0; 4], &[0, 11]]);
    assert_eq!(text(&[one(ACK, &option)]), ["data_fin 0000000000000009"]);
}

#[test]
fn an_infinite_mapping_is_a_fallback() {
    let cause = Cause::InfiniteMapping;
    for option in [
        dss(0x04, &[&[7; 4], &[0; 4], &[0, 0]]),
        dss(0x04, &[&[7; 4], &[0; 4], &[0, 0], &[0, 0]]),
        dss(0x0f, &[&[7; 8], &[7; 8], &[0; 4], &[0, 0], &[0, 0]]),
    ] {
        assert_eq!(one(ACK, &option), Kind::Fallback { cause });
    }
    // Too short for what its flags say, or too long.
    for option in [
        dss(0x04, &[&[7; 4], &[0; 4], &[0]]),
        dss(0x0c, &[&[7; 4], &[0; 4], &[0, 0]]),
        dss(0x04, &[&[7; 4], &[0; 4], &[0, 0], &[0, 0, 0]]),
        dss(0x11, &[&[7; 3]]),
        vec![30, 3, 0x20],
    ] {
        assert!(kinds(ACK, &option).is_empty(), "{option:?}");
    }
}

#[test]
fn several_options_in_one_segment() {
    // MSS, window scale, and both; padding between them.
    let options = join_parts(&[
        &[2, 4, 5, 0xb4, 1, 1],
        &CAPABLE,
        &[1, 3, 3, 7],
        &[30, 12, 0x10, 3, 0, 0, 0, 1, 0, 0, 0, 2],
    ]);
    assert_eq!(
        text(&kinds(SYN, &options)),
        ["mp_capable syn v1", "mp_join syn id 3 token 00000001"]
    );
    let options = join_parts(&[
        &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
        &dss(0x11, &[&[7; 4]]),
        &[30, 4, 0x40, 5, 30, 3, 0x51, 30, 3, 0x50],
    ]);
    assert_eq!(
        text(&kinds(FIN_ACK, &options)),
        [
            "data_fin",
            "remove_addr id 5",
            "mp_prio backup",
            "mp_prio regular",
            "close fin"
        ]
    );
}

#[test]
fn malformed_lists_end_the_walk() {
    for bad in [
        &[30, 0][..],         // length 0
        &[30, 1],             // shorter than itself
        &[5, 0],              // of another kind
        &[30],                // no length
        &[30, 4, 0x40],       // truncated
        &[30, 255, 0x40],     // longer than any header
        &[0],                 // end of the list
        &[0, 30, 4, 0x40, 1], // and nothing counts behind it
    ] {
        let options = join_parts(&[&[30, 4, 0x40, 5], bad]);
        assert_eq!(text(&kinds(ACK, &options)), ["remove_addr id 5"], "{bad:?}");
    }
    for bad in [
        &[30, 0, 30, 4, 0x40, 5][..],
        &[9, 1, 30, 4, 0x40, 5],
        &[0, 30, 4, 0x40, 5],
    ] {
        assert!(kinds(ACK, bad).is_empty(), "{bad:?}");
    }
    // Only kind and length; subtypes that say nothing here.
    assert!(kinds(ACK, &[30, 2, 30, 3, 0x90, 30, 3, 0xf0]).is_empty());
    // A length that the report cannot have.
    let mut report = segment(ACK, &[1; 40]);
    report.options_length = 255;
    assert!(kinds_of(&mut decoder(), &report).is_empty());
}

#[test]
fn any_bytes_are_survived() {
    let mut state = 1_u64;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as u8
    };
    let mut decoder = decoder();
    for _ in 0..50_000 {
        let mut report = segment(u16::from(random()), &[]);
        report.options_length = random() % 64;
        report.options.fill_with(&mut random);
        report.options[0] = 30;
        report.options[1] %= 41;
        for event in decoder.decode(&report, &mut Fixed) {
            assert_eq!(Event::from_json(&event.to_json()).unwrap(), event);
        }
    }
}

#[test]
fn an_answer_without_mptcp_is_a_fallback() {
    let fallback = ["fallback syn_ack"];
    let mut decoder = decoder();
    let syn = segment(SYN, &CAPABLE);
    kinds_of(&mut decoder, &syn);
    assert_eq!(text(&kinds_of(&mut decoder, &answer(&[], 1001))), fallback);
    // Only once, for one SYN.
    assert!(kinds_of(&mut decoder, &answer(&[], 1001)).is_empty());

    kinds_of(&mut decoder, &syn);
    let answered = kinds_of(&mut decoder, &answer(&CAPABLE_ANSWER, 1001));
    assert_eq!(text(&answered), ["mp_capable syn_ack v1 checksum"]);
    assert!(kinds_of(&mut decoder, &answer(&[], 1001)).is_empty());

    // An answer to a SYN without MP_CAPABLE, to another SYN, or seen by another device.
    kinds_of(&mut decoder, &segment(SYN, &[]));
    assert!(kinds_of(&mut decoder, &answer(&[], 1001)).is_empty());
    kinds_of(&mut decoder, &syn);
    assert!(kinds_of(&mut decoder, &answer(&[], 1002)).is_empty());
    assert!(kinds_of(&mut decoder, &answer(&[], 1000)).is_empty());
    let mut elsewhere = answer(&[], 1001);
    elsewhere.ifindex = 2;
    assert!(kinds_of(&mut decoder, &elsewhere).is_empty());

    // Data in the SYN may be acknowledged, in part.
    let mut with_data = segment(SYN, &CAPABLE);
    with_data.payload = 10;
    for acknowledged in [1001, 1005, 1011] {
        kinds_of(&mut decoder, &with_data);
        let answer = answer(&[], acknowledged);
        assert_eq!(text(&kinds_of(&mut decoder, &answer)), fallback);
    }
    kinds_of(&mut decoder, &with_data);
    assert!(kinds_of(&mut decoder, &answer(&[], 1012)).is_empty());

    // Repeated without the option it is still a fallback; a new SYN is a new connection.
    kinds_of(&mut decoder, &syn);
    kinds_of(&mut decoder, &segment(SYN, &[]));
    assert_eq!(text(&kinds_of(&mut decoder, &answer(&[], 1001))), fallback);
    kinds_of(&mut decoder, &syn);
    let mut other = segment(SYN, &[]);
    other.sequence = 5000;
    kinds_of(&mut decoder, &other);
    assert!(kinds_of(&mut decoder, &answer(&[], 5001)).is_empty());
}

#[test]
fn what_is_remembered_is_bounded() {
    let mut decoder = decoder();
    for number in 0..5 * REMEMBERED as u32 {
        let mut syn = segment(SYN, &CAPABLE);
        let ports = number.to_be_bytes();
        let host = [ports[0], ports[1], ports[2], ports[3]];
        set(&mut syn, offset_of!(report, source) + 12, &host);
        kinds_of(&mut decoder, &syn);
        assert!(decoder.young.len() <= REMEMBERED && decoder.old.len() <= REMEMBERED);
    }
    kinds_of(&mut decoder, &segment(SYN, &CAPABLE));
    let answered = kinds_of(&mut decoder, &answer(&[], 1001));
    assert_eq!(text(&answered), ["fallback syn_ack"]);
}
