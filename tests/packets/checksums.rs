// SPDX-License-Identifier: MIT OR Apache-2.0
//! Checksums that are complete, partial, or cannot be told: what XDP makes of them.

use etherparse::checksum::Sum16BitWords;
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use policy_chain::hook::Hook;
use policy_chain::replay::Verdict;
use serde_json::{Value, json};

use crate::bench::{Row, act_in, file, gives, leaves, raw_gives};
use crate::frames::*;

const NEW_WINDOW: u16 = 9;

fn window() -> Value {
    json!({ "action": "set_window", "raw": true, "bytes": NEW_WINDOW })
}

/// A chain on XDP that is told what checksums are, or not.
fn told(checksum: &str, action: Value) -> Value {
    let attach = json!([{ "device": "lo", "hook": "xdp", "checksum": checksum }]);
    file(json!({ "attach": attach, "actions": [action] }))
}

/// A segment whose right checksum happens to be the sum of its pseudo-header, as one in 65,536 is.
pub fn by_chance(frame: &Frame) -> Frame {
    let with = |word: u16| {
        let mut payload = frame.payload.clone();
        payload.truncate(payload.len() / 2 * 2);
        payload.extend(word.to_be_bytes());
        frame.clone().payload(&payload)
    };
    let field = |frame: Frame| {
        let end = frame.build().len() - frame.payload.len() - frame.options.len();
        let check = &frame.build()[end - 4..end - 2];
        u16::from_be_bytes(check.try_into().unwrap())
    };
    let (check, seed) = (field(with(0)), field(with(0).check(Check::Seed)));
    // a word more in the segment is a word less in the field, modulo 0xffff
    let word = (u32::from(check) + 0xffff - u32::from(seed)) % 0xffff;
    let frame = with(word as u16);
    assert_eq!(frame.build(), frame.clone().check(Check::Seed).build());
    frame
}

fn chances() -> Vec<(&'static str, Frame)> {
    vec![
        ("IPv4", by_chance(&v4())),
        ("IPv6", by_chance(&v6())),
        ("802.1Q", by_chance(&v4().tags(&[0x8100]))),
        ("IP options", by_chance(&v4().ip_options(&[1; 12]))),
        (
            "extension header",
            by_chance(&v6().extension(DESTINATION, &[0; 8])),
        ),
        ("512 bytes", by_chance(&v4().payload(&[5; 490]))),
        ("a page", by_chance(&v6().payload(&[0x5a; 3000]))),
        ("many pages", by_chance(&v4().payload(&[0xa5; 30_000]))),
    ]
}

#[test]
fn what_could_be_either_is_left_alone() {
    let options = words(&[&[30, 4, 0x30, 1], &[2, 4, 5, 0xb4], &[1; 8]]);
    for action in [
        window(),
        json!({ "action": "strip_option", "kind": "mptcp" }),
        json!({ "action": "strip_option", "kind": "mptcp", "mode": "remove" }),
        json!({ "action": "insert_option", "kind": 253, "data": "aabb" }),
    ] {
        let rows: Vec<Row> = [("IPv4", v4()), ("IPv6", v6())]
            .iter()
            .map(|(version, frame)| {
                let frame = by_chance(&frame.clone().options(&options));
                leaves(*version, &frame, "checksum_unclear")
            })
            .collect();
        act_in(told("auto", action), &[Hook::Xdp], &rows);
    }
    let rows: Vec<Row> = chances()
        .iter()
        .map(|(what, frame)| leaves(*what, frame, "checksum_unclear"))
        .collect();
    act_in(told("auto", window()), &[Hook::Xdp], &rows);
}

/// The kernel tells TC programs, so there is no chance in it.
#[test]
fn tc_is_told() {
    let rows: Vec<Row> = chances()
        .iter()
        .map(|(what, frame)| gives(*what, frame, &frame.clone().window(NEW_WINDOW)))
        .collect();
    let chain = file(json!({ "actions": [window()] }));
    act_in(chain, &[Hook::TcIngress, Hook::TcEgress], &rows);
}

#[test]
fn the_chain_file_can_tell() {
    let complete: Vec<Row> = chances()
        .iter()
        .map(|(what, frame)| gives(*what, frame, &frame.clone().window(NEW_WINDOW)))
        .collect();
    act_in(told("complete", window()), &[Hook::Xdp], &complete);
    let partial: Vec<Row> = chances()
        .iter()
        .map(|(what, frame)| {
            let seed = frame.clone().check(Check::Seed);
            gives(*what, frame, &seed.window(NEW_WINDOW))
        })
        .collect();
    act_in(told("partial", window()), &[Hook::Xdp], &partial);
}

/// The kernel completes checksums before it fragments, so what looks partial is not.
#[test]
fn a_fragment_is_complete() {
    let fragment = |frame: Frame| frame.fragment(MORE_FRAGMENTS).payload(&[7; 24]);
    let seed = fragment(v4()).check(Check::Seed);
    let field = u16::from_be_bytes(seed.build()[50..52].try_into().unwrap());
    // RFC 1624, 3: HC' = ~(~HC + ~m + m')
    let sum = u32::from(!field) + u32::from(!512u16) + u32::from(NEW_WINDOW);
    let folded = (sum & 0xffff) + (sum >> 16);
    let after = !((folded & 0xffff) + (folded >> 16)) as u16;
    let rows = [gives(
        "first fragment",
        &seed,
        &fragment(v4()).check(Check::Raw(after)).window(NEW_WINDOW),
    )];
    act_in(told("auto", window()), &[Hook::Xdp], &rows);
}

/// Its pseudo-header has the last address of the routing header, so a seed is not recognised.
#[test]
fn behind_a_routing_header_it_is_unclear() {
    let routed = |left: u8| v6().extension(ROUTING, &[0, 0, 0, left, 0, 0, 0, 0]);
    let rows = [
        leaves("on its way", &routed(1), "checksum_unclear"),
        gives("arrived", &routed(0), &routed(0).window(NEW_WINDOW)),
    ];
    act_in(told("auto", window()), &[Hook::Xdp], &rows);
    let rows = [gives("told", &routed(1), &routed(1).window(NEW_WINDOW))];
    act_in(told("complete", window()), &[Hook::Xdp], &rows);
    let chain = file(json!({ "actions": [window()] }));
    act_in(chain, &[Hook::TcIngress, Hook::TcEgress], &rows);
}

/// The sum of the pseudo-header of a UDP frame, and its right checksum.
fn udp_checks(frame: &[u8]) -> (u16, u16) {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(TransportSlice::Udp(udp)) = &packet.transport else {
        panic!("no UDP");
    };
    let header = udp.to_header();
    let sum = Sum16BitWords::new()
        .add_2bytes([0, UDP])
        .add_2bytes(header.length.to_be_bytes());
    let (sum, right) = match &packet.net {
        Some(NetSlice::Ipv4(ip)) => {
            let (src, dst) = (ip.header().source(), ip.header().destination());
            (
                sum.add_slice(&src).add_slice(&dst),
                header.calc_checksum_ipv4_raw(src, dst, udp.payload()),
            )
        }
        Some(NetSlice::Ipv6(ip)) => {
            let (src, dst) = (ip.header().source(), ip.header().destination());
            (
                sum.add_slice(&src).add_slice(&dst),
                header.calc_checksum_ipv6_raw(src, dst, udp.payload()),
            )
        }
        _ => panic!("no IP"),
    };
    ((!sum.ones_complement()).to_be(), right.unwrap())
}

#[test]
fn redirect_completes_what_nobody_does_later() {
    let redirect = json!({ "action": "redirect", "device": "lo" });
    let frames = || {
        [
            ("bare", v4()),
            ("IPv6", v6()),
            ("odd payload", v4().payload(b"abc")),
            ("QinQ, IPv6", v6().tags(&[0x88a8, 0x8100]).payload(b"abcd")),
            ("512 bytes", v4().payload(&[9; 492])),
            ("513 bytes", v4().payload(&[9; 493])),
            ("many pages", v6().payload(&[0xa5; 60_000])),
            ("padding", v4().padded()),
        ]
    };
    let mut rows: Vec<Row> = Vec::new();
    for (what, frame) in frames() {
        let seed = frame.clone().check(Check::Seed);
        rows.push(gives(format!("partial, {what}"), &seed, &frame));
        rows.push(gives(format!("complete, {what}"), &frame, &frame));
        let wrong = frame.check(Check::Raw(0x1234));
        rows.push(gives(format!("wrong, {what}"), &wrong, &wrong));
    }
    for (what, frame) in chances() {
        rows.push(gives(format!("either, {what}"), &frame, &frame));
    }
    for (what, frame) in both() {
        let frame = frame.protocol(UDP).payload(b"datagram");
        let none = frame.build();
        let (seed, right) = udp_checks(&none);
        let with = |check: u16| {
            let mut bytes = none.clone();
            let at = bytes.len() - 8 - 2;
            bytes[at..at + 2].copy_from_slice(&check.to_be_bytes());
            bytes
        };
        rows.push(raw_gives(
            format!("UDP, partial, {what}"),
            with(seed),
            with(right),
        ));
        rows.push(raw_gives(
            format!("UDP, complete, {what}"),
            with(right),
            with(right),
        ));
        rows.push(raw_gives(
            format!("UDP, none, {what}"),
            none.clone(),
            none.clone(),
        ));
    }
    let rows: Vec<Row> = rows
        .into_iter()
        .map(|row| row.verdict(Verdict::Redirect))
        .collect();
    act_in(told("auto", redirect.clone()), &[Hook::Xdp], &rows);
    let routed = v6()
        .extension(ROUTING, &[0, 0, 0, 1, 0, 0, 0, 0])
        .check(Check::Seed);
    // Its pseudo-header counts the 980 bytes of a segment that is not all here.
    let whole = v4().payload(&[0; 960]).check(Check::Seed).build();
    let seed = u16::from_be_bytes(whole[50..52].try_into().unwrap());
    let mut cut = v4().check(Check::Raw(seed));
    cut.ip_length = Some(1000);
    let rows = [
        leaves("routed", &routed, "checksum_unclear"),
        leaves("cut off", &cut, "checksum_partial"),
    ];
    act_in(told("auto", redirect), &[Hook::Xdp], &rows);
}
