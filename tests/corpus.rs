// SPDX-License-Identifier: MIT OR Apache-2.0
//! Captures of real traffic, and of frames nobody sends, through chains of every action, as `make
//! replay-corpus` runs a folder of captures; and that its judgement finds what is wrong.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/mod.rs"]
mod common;
#[path = "../tools/corpus/mod.rs"]
mod corpus;

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use common::capture::Capture;
use common::frames::{Check as Sum, *};
use common::malformed::Malformed;
use common::traffic::{Connection, PORT, server_addresses};
use common::{Environment, Files};
use corpus::verify::{Change, verify};
use corpus::{Corpus, captures};
use policy_chain::hook::Hook;
use policy_chain::testbed::Role;

const LENGTH: usize = 50_000;
const MALFORMED: usize = 300;
/// What a capture with headers only keeps of a packet.
const SNAP_LENGTH: usize = 90;
const ETHERNET: u32 = 1;

// ---- captures --------------------------------------------------------------------------------

/// A pcap file with microseconds, in little-endian order.
fn pcap(frames: &[Vec<u8>], snap_length: usize) -> Vec<u8> {
    let mut file = Vec::new();
    let limit = snap_length as u32;
    for word in [0xa1b2_c3d4, 4 << 16 | 2, 0, 0, limit, ETHERNET] {
        file.extend(u32::to_le_bytes(word));
    }
    for (number, frame) in (0u32..).zip(frames) {
        let kept = &frame[..frame.len().min(snap_length)];
        for word in [number, 0, kept.len() as u32, frame.len() as u32] {
            file.extend(word.to_le_bytes());
        }
        file.extend(kept);
    }
    file
}

/// A pcapng block in big-endian order.
fn block(kind: u32, words: &[u32], data: &[u8]) -> Vec<u8> {
    let data_length = data.len().next_multiple_of(4);
    let length = (12 + words.len() * 4 + data_length) as u32;
    let mut block = Vec::new();
    for word in [&[kind, length], words].concat() {
        block.extend(word.to_be_bytes());
    }
    block.extend(data);
    block.resize(length as usize - 4, 0);
    block.extend(length.to_be_bytes());
    block
}

/// A pcapng file of one section and interface.
fn pcapng(frames: &[Vec<u8>]) -> Vec<u8> {
    let order = [0x1a2b_3c4d, 1 << 16, u32::MAX, u32::MAX];
    let mut file = block(0x0a0d_0d0a, &order, &[]);
    file.extend(block(1, &[ETHERNET << 16, 0], &[]));
    for (number, frame) in (0u32..).zip(frames) {
        let length = frame.len() as u32;
        file.extend(block(6, &[0, 0, number, length, length], frame));
    }
    file
}

/// What the server receives and sends in some connections.
fn captured(environment: &Environment, connect: fn(&Environment)) -> Vec<Vec<u8>> {
    let mut capture = Capture::start(environment.namespace(Role::Server), "path1");
    connect(environment);
    capture.frames().to_vec()
}

fn tcp(environment: &Environment) {
    for address in server_addresses(environment) {
        let mut connection = Connection::open(environment, address, PORT);
        connection.exchange(5);
        connection.transfer(LENGTH);
    }
}

fn mptcp(environment: &Environment) {
    for address in server_addresses(environment) {
        let address = SocketAddr::new(address, PORT);
        let mut connection = Connection::open_mptcp(environment, address);
        connection.exchange(5);
        connection.transfer(LENGTH);
    }
}

/// Has both hosts send single segments, with complete checksums.
fn without_offloads(environment: &Environment) {
    for role in [Role::Client, Role::Server] {
        let arguments = ["-K", "path1", "tx", "off", "tso", "off", "gso", "off"];
        environment.run(role, "ethtool", &arguments);
    }
}

fn tagged(frame: &[u8], tags: &[[u8; 4]]) -> Vec<u8> {
    [&frame[..12], &tags.concat(), &frame[12..]].concat()
}

/// Addresses announced on a subflow that shows itself by DSS.
fn announcements() -> Vec<Vec<u8>> {
    let dss = option(30, 8, 0x20);
    let add_addr = option(30, 16, 0x30);
    let announced = [&add_addr[..], &dss].concat();
    let frames = both().map(|(_, frame)| {
        [
            frame.clone().options(&dss),
            frame.clone().options(&announced),
            frame.clone().options(&announced).payload(b"data"),
        ]
    });
    frames.iter().flatten().map(Frame::build).collect()
}

/// Every kind of capture there is to have here.
fn write_corpus(files: &Files) {
    let environment = Environment::direct();
    let with_offloads = captured(&environment, tcp);
    let of_mptcp = captured(&environment, mptcp);
    without_offloads(&environment);
    let complete = captured(&environment, tcp);
    for role in [Role::Client, Role::Server] {
        let arguments = ["link", "set", "dev", "path1", "mtu", "9000"];
        environment.run(role, "ip", &arguments);
    }
    let jumbo = captured(&environment, tcp);
    assert!(with_offloads.iter().any(|frame| frame.len() > 9014));
    assert!(complete.iter().all(|frame| frame.len() <= 1514));
    assert!(jumbo.iter().any(|frame| frame.len() > 8000));

    let vlan = [0x81, 0, 0, 100];
    let provider = [0x88, 0xa8, 0, 7];
    let once = complete.iter().map(|frame| tagged(frame, &[vlan]));
    let twice = complete
        .iter()
        .map(|frame| tagged(frame, &[provider, vlan]));
    let vlans: Vec<_> = once.chain(twice).collect();

    let mut malformed = Malformed::new(0x636f_7270, [2, 0, 0, 0, 0, 2]);
    let mut crafted = vec![Vec::new(); MALFORMED];
    crafted.iter_mut().for_each(|frame| malformed.next(frame));

    let whole = usize::from(u16::MAX) * 4;
    files.write("offloads.pcap", pcap(&with_offloads, whole));
    files.write("mptcp.pcapng", pcapng(&of_mptcp));
    files.write("complete.pcapng", pcapng(&complete));
    files.write("cut.pcap", pcap(&complete, SNAP_LENGTH));
    files.write("jumbo.pcapng", pcapng(&jumbo));
    files.write("vlan.pcap", pcap(&vlans, whole));
    files.write("crafted.cap", pcap(&crafted, whole));
    files.write("announcements.pcap", pcap(&announcements(), whole));
    files.write("README", "no capture");
}

#[test]
fn everything_comes_out_sound() {
    let files = Files::new();
    write_corpus(&files);
    let mut corpus = Corpus::load().unwrap();
    for file in captures(files.path()).unwrap() {
        corpus.run(&file);
    }
    let report = corpus.report();
    println!("{report}");
    assert_eq!(report.failed, 0, "{report}");
    assert_eq!(report.exit_code(), 0);
    assert_eq!(report.files, 8);
    assert!(report.right > 0 && report.partial > 0 && report.cut > 0);
    for ((name, hook), (changed, _)) in &report.chains {
        // No address of these packets has a route here.
        let untouched = [
            "count",
            "pass",
            "drop",
            "goto",
            "redirect-neighbour",
            "record",
            "learn",
            "report",
        ]
        .contains(name);
        assert_eq!(*changed == 0, untouched, "{name} on {hook}: {changed}");
    }
    let lines = report.to_string();
    assert!(lines.lines().all(|line| line.chars().count() <= 100));
}

#[test]
fn exit_codes() {
    let run = |folder: &Path| corpus::command(&[folder.to_str().unwrap().to_owned()]);
    let files = Files::new();
    assert_eq!(corpus::command(&[]), 2);
    assert_eq!(run(files.path()), 2, "no capture");
    assert_eq!(run(&files.path().join("missing")), 2);
    let good = pcap(&[v4().build()], 65535);
    files.write("cut-off.pcap", &good[..good.len() - 1]);
    assert_eq!(run(files.path()), 1);
}

// ---- judgement -------------------------------------------------------------------------------

#[track_caller]
fn sound(change: Change, hook: Hook, before: &Frame, after: &Frame) {
    assert_eq!(
        verify(change, hook, &before.build(), &after.build()),
        Ok(())
    );
}

#[track_caller]
fn unsound(change: Change, hook: Hook, before: &Frame, after: &Frame) {
    let judged = verify(change, hook, &before.build(), &after.build());
    assert!(judged.is_err(), "{before:?}\n{after:?}");
}

const TCP: Change = Change::Tcp;
const ROUTE: Change = Change::Route;

#[test]
fn sound_edits_are_recognised() {
    for (_, base) in both() {
        for hook in Hook::ALL {
            let frame = base.clone().payload(b"odd");
            sound(Change::Nothing, hook, &frame, &frame);
            sound(TCP, hook, &frame, &frame.clone().window(7));
            let grown = base.clone().options(&option(253, 4, 1));
            sound(TCP, hook, &base, &grown);
            sound(TCP, hook, &base.clone().padded(), &grown.clone().padded());
            let routed = Frame {
                ttl: 63,
                src_mac: [2; 6],
                ..frame.clone()
            };
            sound(ROUTE, hook, &frame, &routed);
        }
        let partial = base.clone().check(Sum::Seed);
        let grown = partial.clone().options(&option(253, 4, 1));
        sound(TCP, Hook::Xdp, &partial, &partial.clone().window(7));
        sound(TCP, Hook::Xdp, &partial, &grown);
        sound(ROUTE, Hook::Xdp, &partial, &base);
    }
}

#[test]
fn unsound_edits_are_found() {
    for (_, base) in both() {
        for hook in Hook::ALL {
            let reset = base.clone().flags(RST | ACK);
            sound(Change::Reset, hook, &base, &reset);
            unsound(TCP, hook, &base, &reset);
            unsound(Change::Reset, hook, &base, &reset.ports(1, 2));
            let frame = base.clone().payload(b"odd");
            let bytes = frame.build();
            unsound(Change::Nothing, hook, &frame, &frame.clone().window(7));
            let stale = u16::from_be_bytes(bytes[check_at(&frame)..][..2].try_into().unwrap());
            let stale = frame.clone().check(Sum::Raw(stale)).window(7);
            unsound(TCP, hook, &frame, &stale);
            unsound(TCP, hook, &frame, &frame.clone().payload(b"ODD"));
            unsound(TCP, hook, &frame, &frame.clone().payload(b"od"));
            unsound(TCP, hook, &frame, &frame.clone().ports(1, 2));
            unsound(TCP, hook, &frame, &frame.clone().flags(SYN));
            let longer = frame.clone().options(&option(253, 4, 1));
            let short = Frame {
                ip_length: Some(frame.build().len() as u16 - 14 - ipv6_header(&frame)),
                ..longer
            };
            unsound(TCP, hook, &frame, &short);
            let routed = Frame {
                ttl: 63,
                ..frame.clone()
            };
            unsound(TCP, hook, &frame, &routed);
            unsound(ROUTE, hook, &frame, &routed.clone().window(7));
            let trailing = Frame {
                trailer: vec![0; 4],
                ..frame.clone()
            };
            unsound(TCP, hook, &frame, &trailing);
            // One that was wrong and now looks right hides that it was wrong.
            unsound(TCP, hook, &stale, &frame);
        }
        let partial = base.clone().check(Sum::Seed);
        unsound(TCP, Hook::Xdp, &partial, &base.clone().window(7));
    }
    let mut wrong_ip = v4().window(7).build();
    wrong_ip[14 + 10] ^= 1;
    let judged = verify(TCP, Hook::Xdp, &v4().build(), &wrong_ip);
    assert_eq!(judged, Err("the IPv4 checksum is wrong".to_owned()));
}

/// An edit of a packet of which the capture has only the headers.
#[test]
fn cut_packets_are_judged_by_what_changed() {
    let cut = |frame: &Frame| {
        let mut bytes = frame.build();
        bytes.truncate(SNAP_LENGTH);
        bytes
    };
    for (_, base) in both() {
        let frame = base.payload(&[9; 200]);
        let before = cut(&frame);
        let edited = cut(&frame.clone().window(7));
        assert_eq!(verify(TCP, Hook::Xdp, &before, &edited), Ok(()));
        let mut stale = edited;
        let at = check_at(&frame);
        stale[at..at + 2].copy_from_slice(&before[at..at + 2]);
        assert!(verify(TCP, Hook::Xdp, &before, &stale).is_err());
    }
}

/// Offset of the TCP checksum of a frame without tags, IP options and extension headers.
fn check_at(frame: &Frame) -> usize {
    match frame.src {
        IpAddr::V4(_) => 14 + 20 + 16,
        IpAddr::V6(_) => 14 + 40 + 16,
    }
}

/// What IPv6 does not count in its length.
fn ipv6_header(frame: &Frame) -> u16 {
    if frame.src.is_ipv6() { 40 } else { 0 }
}
