// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tables in `docs/packets.md`: each cell is what the real program did with packets of its row,
//! compared with frames that are built here. `WRITE_DOCS=1` writes them.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use etherparse::checksum::Sum16BitWords;
use policy_chain::engine::attach;
use policy_chain::engine::counters;
use policy_chain::engine::generation::CarrierChoice;
use policy_chain::hook::{Family, Hook};
use policy_chain::policy::Registry;
use policy_chain::replay::{Runner, Verdict};
use policy_chain::spec::{Mode, Spec};
use serde_json::{Value, json};

use crate::bench::{file, with_chains};
use crate::checksums::by_chance;
use crate::frames::*;
use crate::wire::{self, Arrived, Note, Wire, with_wire};

const BEGIN: &str = "<!-- Made by `make docs` from tests/packets/table.rs, which runs every cell. -->\n";
const END: &str = "<!-- End of what is made. -->\n";

/// Actions that never look at a packet.
const BLIND: [&str; 4] = ["count", "drop", "goto", "pass"];

const NEW_WINDOW: u16 = 9;
/// What both ends of a connection scale by, in bits.
const SCALE: u8 = 3;
const NEW_MSS: [u8; 4] = [2, 4, 0x02, 0x18];
/// 253 is for experiments (RFC 4727); the table's other options are of the other such kind.
const INSERTED: [u8; 4] = [253, 4, 0xaa, 0xbb];
const OTHER: u8 = 254;
const MPTCP: u8 = 30;
const NOP: u8 = 1;

/// What an action is to make of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Window,
    Mss,
    Nop,
    Remove,
    Insert,
    Send { routed: bool },
}

/// An action of the catalogue.
struct Column {
    action: &'static str,
    /// What follows its name in the table.
    variant: &'static str,
    parameters: Value,
    change: Change,
    families: &'static [Family],
    /// It wants to know what the ends of a connection agreed on.
    learns: bool,
}

const BOTH: &[Family] = &[Family::Xdp, Family::Tc];
const XDP: &[Family] = &[Family::Xdp];

fn columns() -> Vec<Column> {
    let column = |action, variant, parameters, change| Column {
        action,
        variant,
        parameters,
        change,
        families: BOTH,
        learns: false,
    };
    vec![
        Column {
            learns: true,
            ..column(
                "set_window",
                "",
                json!({ "bytes": u32::from(NEW_WINDOW) << SCALE }),
                Change::Window,
            )
        },
        column(
            "set_window",
            "`raw`, `max`",
            json!({ "bytes": NEW_WINDOW, "raw": true, "max": true }),
            Change::Window,
        ),
        column("set_mss", "", json!({ "bytes": 0x218 }), Change::Mss),
        column(
            "strip_option",
            "",
            json!({ "kind": "mptcp" }),
            Change::Nop,
        ),
        Column {
            families: XDP,
            ..column(
                "strip_option",
                "`remove` (XDP)",
                json!({ "kind": "mptcp", "mode": "remove" }),
                Change::Remove,
            )
        },
        column(
            "insert_option",
            "",
            json!({ "kind": 253, "data": "aabb" }),
            Change::Insert,
        ),
        column(
            "redirect",
            "",
            json!({ "device": "to" }),
            Change::Send { routed: false },
        ),
        column(
            "redirect",
            "`neighbour`",
            json!({ "device": "to", "neighbour": true }),
            Change::Send { routed: true },
        ),
    ]
}

/// Where a packet meets the action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// In a test run of the kernel.
    Run(Hook),
    Native,
    Generic,
    Ingress,
    Egress,
    /// At TC egress, on the way from the ingress of another device.
    Forwarded,
}

const EVERY_HOOK: &[At] = &[
    At::Run(Hook::Xdp),
    At::Run(Hook::TcIngress),
    At::Run(Hook::TcEgress),
];
/// For what test runs refuse on TC, or make something else of.
const TC_ON_WIRE: &[At] = &[At::Run(Hook::Xdp), At::Ingress, At::Egress];
const ON_WIRE: &[At] = &[
    At::Run(Hook::Xdp),
    At::Native,
    At::Generic,
    At::Ingress,
    At::Egress,
];
const SUPER: &[At] = &[At::Generic, At::Ingress, At::Egress];
const TC_ONLY: &[At] = &[At::Ingress, At::Egress];
const RECEIVED: &[At] = &[At::Ingress, At::Forwarded];

impl At {
    fn hook(self) -> Hook {
        match self {
            At::Run(hook) => hook,
            At::Native | At::Generic => Hook::Xdp,
            At::Ingress => Hook::TcIngress,
            At::Egress | At::Forwarded => Hook::TcEgress,
        }
    }

    fn mode(self) -> Mode {
        match self {
            At::Native => Mode::Native,
            At::Generic => Mode::Generic,
            _ => Mode::Auto,
        }
    }

    /// The device of the wire whose hook it is, and where one sends to it from.
    fn device(self) -> (&'static str, wire::From) {
        match self {
            At::Egress => ("in", wire::From::In),
            At::Forwarded => ("to", wire::From::Out),
            _ => ("in", wire::From::Out),
        }
    }

    /// Whether a redirection to the wire's device goes anywhere from here.
    fn can_redirect(self) -> bool {
        // to itself, or by XDP to a device whose peer has no XDP
        !matches!(self, At::Native | At::Forwarded)
    }

    /// The name in a cell, from the coarsest that tells.
    fn names(self) -> [&'static str; 2] {
        match self {
            At::Generic => ["XDP", "generic XDP"],
            _ if self.hook() == Hook::Xdp => ["XDP", "native XDP"],
            _ if self.hook() == Hook::TcIngress => ["TC", "tc-ingress"],
            _ => ["TC", "tc-egress"],
        }
    }
}

/// A packet, and what it would be if only its headers were other ones.
struct Packet {
    frame: Frame,
    /// What happens to the bytes that the headers make.
    bend: fn(Vec<u8>) -> Vec<u8>,
    /// Payload of each segment of a super-packet.
    segment: Option<u16>,
    /// Bytes in the linear part.
    linear: u16,
    handshake_seen: bool,
    /// It arrives with its tag in metadata.
    tag_in_metadata: bool,
}

impl Packet {
    fn new(frame: Frame) -> Packet {
        Packet {
            frame,
            bend: |bytes| bytes,
            segment: None,
            linear: 0,
            handshake_seen: true,
            tag_in_metadata: false,
        }
    }

    /// What a test run gets, or gives.
    fn bytes_of(&self, frame: &Frame) -> Vec<u8> {
        (self.bend)(frame.build())
    }

    /// What comes out of a device without offloads.
    fn carried(&self, frame: &Frame) -> Vec<Vec<u8>> {
        let mut frame = frame.clone();
        if frame.check == Check::Seed {
            frame.check = Check::Complete;
        }
        match self.segment {
            Some(size) => segments(&frame, size.into()),
            None => vec![self.bytes_of(&frame)],
        }
    }

    fn note(&self) -> Note {
        let transport = transport_offset(&self.frame) as u16;
        Note {
            partial: (self.frame.check == Check::Seed).then_some((transport, 16)),
            segment: self.segment,
            linear: match self.segment {
                Some(_) => transport + 20 + self.frame.options.len() as u16,
                None => self.linear,
            },
        }
    }
}

fn transport_offset(frame: &Frame) -> usize {
    let extensions: usize = frame.extensions.iter().map(|(_, bytes)| bytes.len()).sum();
    let ip = if frame.src.is_ipv4() { 20 } else { 40 };
    14 + 4 * frame.tags.len() + ip + frame.ip_options.len() + extensions
}

/// A super-packet cut up as the kernel does: RFC 9293 segments in a row, flags of the end on the
/// last, IPv4 identifications counting up.
fn segments(frame: &Frame, size: usize) -> Vec<Vec<u8>> {
    let count = frame.payload.chunks(size).len();
    let parts = frame.payload.chunks(size).enumerate().map(|(at, part)| {
        let mut piece = frame.clone().payload(part);
        piece.sequence += (at * size) as u32;
        if at + 1 < count {
            piece.flags &= !(FIN | PSH);
        }
        let mut bytes = piece.build();
        if frame.src.is_ipv4() {
            let ip = 14 + 4 * frame.tags.len();
            let id = u16::from_be_bytes([bytes[ip + 4], bytes[ip + 5]]) + at as u16;
            bytes[ip + 4..ip + 6].copy_from_slice(&id.to_be_bytes());
            bytes[ip + 10..ip + 12].fill(0);
            let header = &bytes[ip..ip + 20 + frame.ip_options.len()];
            let check = Sum16BitWords::new().add_slice(header).ones_complement();
            bytes[ip + 10..ip + 12].copy_from_slice(&check.to_ne_bytes());
        }
        bytes
    });
    parts.collect()
}

/// The options of a list one by one, as far as EOL; nothing if they are malformed.
fn walk(options: &[u8]) -> Option<Vec<&[u8]>> {
    let mut found = Vec::new();
    let mut left = options;
    while let Some(kind) = left.first().filter(|kind| **kind != 0) {
        let length = match *kind {
            NOP => 1,
            _ => usize::from(*left.get(1).filter(|length| **length >= 2)?),
        };
        let (option, rest) = left.split_at_checked(length)?;
        found.push(option);
        left = rest;
    }
    Some(found)
}

/// Options in a row with NOPs behind them, to a whole word and at least to `length`.
fn joined(options: &[&[u8]], length: usize) -> Vec<u8> {
    let mut bytes = options.concat();
    let length = bytes.len().next_multiple_of(4).max(length);
    bytes.resize(length, NOP);
    bytes
}

fn without_nops_at_end<'a>(mut options: Vec<&'a [u8]>) -> Vec<&'a [u8]> {
    while options.last() == Some(&&[NOP][..]) {
        options.pop();
    }
    options
}

/// The frame with other options, and the lengths that follow.
fn with_options(before: &Frame, options: Vec<u8>) -> Frame {
    let mut after = before.clone();
    let by = options.len() as i32 - before.options.len() as i32;
    after.options = options;
    after.ip_length = before.ip_length.map(|length| (i32::from(length) + by) as u16);
    if before.payload.is_empty() {
        fit_trailer(before, &mut after);
    }
    after
}

/// What is behind a packet that was made longer or shorter: bytes of the frame that were there
/// stay, and it gets no shorter than the shortest frame, unless it was.
fn fit_trailer(before: &Frame, after: &mut Frame) {
    let old = before.build();
    after.trailer.clear();
    let end = after.build().len();
    let longer = after.options.len() > before.options.len();
    let length = match longer {
        true => old.len(),
        false => old.len().min(ETHERNET_MIN),
    };
    after.trailer = old.get(end..length).unwrap_or(&[]).to_vec();
}

impl Change {
    /// What the packet may become, with a word for each.
    fn outcomes(self, before: &Frame, family: Family) -> Vec<(&'static str, Frame)> {
        let outcomes = match self {
            Change::Window => vec![("done", before.clone().window(NEW_WINDOW))],
            Change::Mss => Change::mss(before),
            Change::Nop => Change::nop(before),
            Change::Remove => Change::remove(before),
            Change::Insert => Change::insert(before),
            Change::Send { routed } => return Change::send(before, routed, family),
        };
        let shifted = outcomes.into_iter().map(|(word, after)| {
            let check = shifted_check(before, &after);
            (word, after.check(check))
        });
        shifted.collect()
    }

    fn mss(before: &Frame) -> Vec<(&'static str, Frame)> {
        let options = walk(&before.options).unwrap_or_default();
        let changed = options.iter().map(|option| match option[0] {
            2 => &NEW_MSS[..],
            _ => option,
        });
        let changed: Vec<&[u8]> = changed.collect();
        let length = before.options.len();
        vec![("done", with_options(before, joined(&changed, length)))]
    }

    fn nop(before: &Frame) -> Vec<(&'static str, Frame)> {
        let mut options = before.options.clone();
        let mut at = 0;
        for option in walk(&before.options).unwrap_or_default() {
            if option[0] == MPTCP {
                options[at..at + option.len()].fill(NOP);
            }
            at += option.len();
        }
        vec![("done", with_options(before, options))]
    }

    fn remove(before: &Frame) -> Vec<(&'static str, Frame)> {
        let mut options = walk(&before.options).unwrap_or_default();
        options.retain(|option| option[0] != MPTCP);
        let options = joined(&without_nops_at_end(options), 0);
        match options.len() < before.options.len() {
            true => vec![("shrunk", with_options(before, options))],
            false => vec![],
        }
    }

    fn insert(before: &Frame) -> Vec<(&'static str, Frame)> {
        let Some(options) = walk(&before.options) else {
            return vec![];
        };
        let squeezed = options.iter().copied().filter(|it| *it != [NOP]).collect();
        let ways = [without_nops_at_end(options), squeezed];
        let results = ways.into_iter().map(|mut options| {
            options.push(&INSERTED);
            joined(&options, before.options.len())
        });
        let results = results.filter(|options| options.len() <= 40).map(|options| {
            let word = match options.len() > before.options.len() {
                true => "grown",
                false => "repacked",
            };
            (word, with_options(before, options))
        });
        results.collect()
    }

    fn send(before: &Frame, routed: bool, family: Family) -> Vec<(&'static str, Frame)> {
        let mut after = before.clone();
        if routed {
            after.dst_mac = wire::NEIGHBOUR_MAC;
            after.src_mac = wire::OWN_MAC;
            after.ttl = after.ttl.saturating_sub(1);
        }
        if before.check == Check::Seed && family == Family::Xdp {
            after.check = Check::Complete;
            return vec![("sent, completed", after)];
        }
        vec![("sent", after)]
    }
}

/// The field that a right update leaves in place of one that was wrong: as wrong as before.
fn shifted_check(before: &Frame, after: &Frame) -> Check {
    let Check::Raw(wrong) = before.check else {
        return before.check;
    };
    let field = |frame: &Frame| {
        let bytes = frame.clone().check(Check::Complete).build();
        let at = transport_offset(frame) + 16;
        u32::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]))
    };
    let error = u32::from(wrong) + 0xffff - field(before);
    Check::Raw(((field(after) + error) % 0xffff) as u16)
}

/// What is at the start of every row: the option a column is about, and flags that it looks at.
struct Base {
    subject: Vec<u8>,
    flags: u16,
    insert: bool,
}

impl Base {
    fn of(change: Change) -> Base {
        let subject = match change {
            Change::Mss => vec![2, 4, 5, 0xb4],
            Change::Nop | Change::Remove => vec![MPTCP, 4, 0x30, 1],
            _ => vec![],
        };
        Base {
            subject,
            flags: if change == Change::Mss { SYN } else { ACK },
            insert: change == Change::Insert,
        }
    }

    /// A segment without payload; of IPv4, and of IPv6.
    fn bare(&self) -> [Frame; 2] {
        [v4(), v6()].map(|frame| frame.flags(self.flags).options(&self.subject))
    }

    fn v4(&self) -> Frame {
        let [frame, _] = self.bare();
        frame
    }

    fn v6(&self) -> Frame {
        let [_, frame] = self.bare();
        frame
    }

    fn with(&self, more: &[&[u8]]) -> Vec<u8> {
        [&self.subject[..], &more.concat()].concat()
    }

    fn roomy(&self) -> Vec<u8> {
        self.with(&[&[NOP; 8]])
    }

    fn tight(&self) -> Vec<u8> {
        self.with(&[&option(OTHER, 12, 0)])
    }

    fn full(&self) -> Vec<u8> {
        let rest = 40 - self.subject.len();
        self.with(&[&option(OTHER, rest as u8, 0)])
    }
}

/// A kind of packets.
struct Row {
    what: &'static str,
    at: &'static [At],
    packets: Vec<Packet>,
}

fn row(what: &'static str, frames: impl IntoIterator<Item = Frame>) -> Row {
    Row {
        what,
        at: EVERY_HOOK,
        packets: frames.into_iter().map(Packet::new).collect(),
    }
}

impl Row {
    fn at(mut self, at: &'static [At]) -> Row {
        self.at = at;
        self
    }

    fn each(mut self, change: impl Fn(&mut Packet)) -> Row {
        self.packets.iter_mut().for_each(change);
        self
    }

    fn bend(self, bend: fn(Vec<u8>) -> Vec<u8>) -> Row {
        self.each(|packet| packet.bend = bend)
    }
}

/// Tables by title; each column has the same rows, of packets for its action.
fn tables(base: &Base) -> Vec<(&'static str, Vec<Row>)> {
    vec![
        ("Segments", segment_rows(base)),
        ("Around TCP", envelope_rows(base)),
        ("Checksums and sizes", checksum_rows(base)),
        ("Malformed packets", malformed_rows(base)),
    ]
}

const DATA: &[u8] = b"some data, odd!";

fn segment_rows(base: &Base) -> Vec<Row> {
    let frames = |flags: u16, options: Vec<u8>, payload: &[u8]| {
        [v4(), v6()].map(|frame| frame.flags(flags).options(&options).payload(payload))
    };
    let subject = || base.subject.clone();
    let nop_full = |base: &Base| {
        let rest = 32 - base.subject.len();
        base.with(&[&[NOP; 4], &option(OTHER, rest as u8, 0), &[NOP; 4]])
    };
    let absent = match base.insert {
        true => INSERTED.to_vec(),
        false if base.flags == SYN => vec![2, 4, 2, 0],
        false => vec![],
    };
    let low = [v4(), v6()].map(|frame| frame.flags(base.flags).options(&absent).window(8));
    let behind_end = [&[0, 0, 0, 0][..], &base.subject].concat();
    vec![
        row("ACK without payload", frames(ACK, subject(), b"")),
        row(
            "the same, padded to 60 bytes",
            [v4().options(&base.subject).padded()],
        ),
        row(
            "data, NOPs among the options",
            frames(ACK | PSH, base.roomy(), DATA),
        ),
        row("data, no NOPs", frames(ACK | PSH, base.tight(), DATA)),
        row("40 bytes of options, no NOPs", frames(ACK, base.full(), b"")),
        row(
            "40 bytes of options, NOPs among them",
            frames(ACK, nop_full(base), b"")
                .into_iter()
                .chain(frames(ACK, nop_full(base), DATA)),
        ),
        row("SYN", frames(SYN, subject(), b"")),
        row("SYN with ACK", frames(SYN | ACK, subject(), b"")),
        row(
            "FIN, RST",
            frames(FIN | ACK, subject(), b"")
                .into_iter()
                .chain(frames(RST, subject(), b"")),
        ),
        row(
            "option behind EOL",
            frames(base.flags, behind_end.clone(), b"")
                .into_iter()
                .chain(frames(base.flags, behind_end, DATA)),
        ),
        row("value no higher, option absent or there already", low),
        row("handshake not seen", base.bare().map(|it| it.ports(41000, 80)))
            .each(|packet| packet.handshake_seen = false),
    ]
}

fn envelope_rows(base: &Base) -> Vec<Row> {
    let routed = |left: u8| {
        let header = [0, 0, 0, left, 0, 0, 0, 0];
        base.v6().extension(ROUTING, &header)
    };
    let extended = |count: usize| {
        let start = base.v6().extension(HOP_BY_HOP, &[0; 8]);
        (1..count).fold(start, |frame, _| frame.extension(DESTINATION, &[0; 8]))
    };
    let mut far = vec![0; 480];
    far[1] = (far.len() / 8 - 1) as u8;
    let tagged = |tags: &[u16]| base.bare().map(|frame| frame.tags(tags));
    let roomy = |frame: Frame| frame.options(&base.roomy()).payload(&[7; 24]);
    let to = |v4: [u8; 4], v6: &str| {
        let v6: std::net::Ipv6Addr = v6.parse().unwrap();
        [
            base.v4().between(V4_SRC, v4),
            base.v6().between(V6_SRC, v6),
        ]
    };
    vec![
        row("IPv4 options", [base.v4().ip_options(&[7, 7, 4, 0, 0, 0, 0, 0])]),
        row("1 to 8 IPv6 extension headers", [extended(1), extended(8)]),
        row("9 of them", [extended(9)]),
        row(
            "TCP over 511 bytes into the frame",
            [base.v6().extension(DESTINATION, &far)],
        ),
        row("IPv6 routing header, on its way", [routed(1)]),
        row("IPv6 routing header, arrived", [routed(0)]),
        row("802.1Q tag", tagged(&[0x8100])),
        row("802.1ad and 802.1Q tags", tagged(&[0x88a8, 0x8100])),
        row("three tags", tagged(&[0x88a8, 0x8100, 0x8100])),
        row("tag in the kernel's metadata (TC)", tagged(&[0x8100]))
            .at(RECEIVED)
            .each(|packet| packet.tag_in_metadata = true),
        row(
            "first fragment",
            [
                roomy(base.v4().fragment(MORE_FRAGMENTS)),
                roomy(base.v6().extension(FRAGMENT, &[0, 0, 0, 1, 0, 0, 0, 7])),
            ],
        ),
        row(
            "later fragment",
            [
                roomy(base.v4().fragment(9)),
                roomy(base.v6().extension(FRAGMENT, &[0, 0, 0, 72, 0, 0, 0, 7])),
            ],
        ),
        row("UDP", base.bare().map(|frame| frame.protocol(UDP))),
        row("neither IPv4 nor IPv6", [base.v4()]).bend(|mut bytes| {
            bytes[12..14].copy_from_slice(&[0x86, 0x37]);
            bytes
        }),
        row(
            "TTL or hop limit 1",
            base.bare().map(|frame| Frame { ttl: 1, ..frame }),
        ),
        row("no route", to([192, 0, 2, 1], "2001:db8:1::1")),
        row("next hop's address unknown", to([10, 0, 0, 3], "2001:db8::3")),
    ]
}

fn checksum_rows(base: &Base) -> Vec<Row> {
    let seed = |frame: Frame| frame.check(Check::Seed);
    let bare = base.bare();
    let tagged = base.bare().map(|frame| frame.tags(&[0x8100]));
    let extended = base.v6().extension(DESTINATION, &[0; 8]);
    let loaded = |options: Vec<u8>| {
        let frames = base.bare().into_iter().chain([base.v4().ip_options(&[NOP; 4])]);
        frames.map(move |frame| frame.options(&options).payload(DATA))
    };
    let long: Vec<u8> = (0..9000u32).map(|at| (at % 251) as u8).collect();
    let heavy = |options: Vec<u8>, length: usize| {
        let payload: Vec<u8> = long.iter().copied().cycle().take(length).collect();
        [v4(), v6()].map(|frame| frame.flags(ACK | PSH).options(&options).payload(&payload))
    };
    let super_packets = |options: Vec<u8>| {
        let small = heavy(options.clone(), 3000);
        let large = heavy(options, 60_001);
        small.into_iter().chain(large).map(seed)
    };
    let flagged = |frame: Frame| frame.flags(base.flags);
    vec![
        row(
            "partial checksum, no payload",
            bare.clone()
                .into_iter()
                .chain(tagged)
                .chain([extended])
                .map(seed),
        )
        .at(ON_WIRE),
        row(
            "partial checksum, data, NOPs among the options",
            loaded(base.roomy()).map(seed),
        )
        .at(ON_WIRE),
        row(
            "partial checksum, data, no NOPs",
            loaded(base.tight()).map(seed),
        )
        .at(ON_WIRE),
        row(
            "checksum that could be either",
            base.bare()
                .map(|frame| by_chance(&frame.options(&base.roomy()))),
        ),
        row(
            "wrong checksum",
            bare.map(|frame| frame.check(Check::Raw(0x1234))),
        ),
        row("9,000 bytes", heavy(base.roomy(), 9000).map(flagged)).at(ON_WIRE),
        row(
            "headers outside the linear part (TC)",
            heavy(base.roomy(), 9000).map(flagged),
        )
        .at(TC_ONLY)
        .each(|packet| packet.linear = 14),
        row(
            "super-packet, NOPs among the options (TC, generic XDP)",
            super_packets(base.roomy()),
        )
        .at(SUPER)
        .each(|packet| packet.segment = Some(1000)),
        row(
            "super-packet, no NOPs (TC, generic XDP)",
            super_packets(base.tight()),
        )
        .at(SUPER)
        .each(|packet| packet.segment = Some(1000)),
        row("data shared with another packet (TC)", base.bare()).at(RECEIVED),
    ]
}

fn malformed_rows(base: &Base) -> Vec<Row> {
    let ip_length = |frames: [Frame; 2], v4: u16, v6: u16| {
        let [mut first, mut second] = frames;
        (first.ip_length, second.ip_length) = (Some(v4), Some(v6));
        [first, second]
    };
    let offset = |words| {
        base.bare().map(|frame| Frame {
            data_offset: Some(words),
            ..frame
        })
    };
    let broken = |options: &[u8]| {
        let options = base.with(&[options]);
        base.bare().map(|frame| frame.options(&options))
    };
    let loaded = base
        .bare()
        .map(|frame| frame.options(&base.roomy()).payload(DATA));
    vec![
        row("cut off in the IP header", base.bare())
            .at(TC_ON_WIRE)
            .bend(|bytes| bytes[..24].to_vec()),
        row("cut off in the TCP header", [base.v4()]).bend(|bytes| bytes[..44].to_vec()),
        row("cut off in the options", [base.v4().options(&base.full())])
            .bend(|bytes| bytes[..60].to_vec()),
        row("cut off in the payload", ip_length(loaded, 1400, 1400)),
        row("IPv4 header length under 20", [base.v4()]).bend(|mut bytes| {
            bytes[14] = 0x44;
            bytes
        }),
        row("IP version contradicts EtherType", base.bare()).bend(|mut bytes| {
            bytes[14] = 0x50 | bytes[14] & 0xf;
            bytes
        }),
        row(
            "IPv4 length under that of its header",
            [0, 10].map(|length| Frame {
                ip_length: Some(length),
                ..base.v4()
            }),
        ),
        row(
            "IP length ends in the TCP header",
            ip_length(base.bare(), 32, 12),
        ),
        row("TCP header length under 20", offset(4)),
        row("TCP header longer than the packet", offset(15)),
        row(
            "option of length 0 or 1",
            broken(&[3, 0, NOP, NOP])
                .into_iter()
                .chain(broken(&[3, 1, NOP, NOP])),
        ),
        row("option longer than the header", broken(&[NOP, NOP, 3, 4])),
    ]
}

/// A column's action, loaded.
struct Loaded<'a> {
    column: &'a Column,
    runner: Runner,
    hook: Hook,
    handshakes: u32,
}

/// What became of a packet.
#[derive(Debug)]
struct Got {
    verdict: Option<Verdict>,
    reasons: Vec<&'static str>,
    frames: Vec<Vec<u8>>,
}

fn load(chain: &Value, hook: Hook) -> Runner {
    let registry = Registry::embedded().unwrap();
    let spec = Spec::parse(&chain.to_string(), Path::new("table.json"), registry)
        .unwrap_or_else(|error| panic!("{error}\n{chain}"));
    Runner::new(&spec, "main", hook, CarrierChoice::Auto)
        .unwrap_or_else(|error| panic!("{hook}: {error:?}\n{chain}"))
}

fn chain_of(action: &str, parameters: &Value) -> Value {
    let mut item = json!({ "action": action });
    let members = parameters.as_object().unwrap().clone();
    item.as_object_mut().unwrap().extend(members);
    file(json!({ "actions": [item] }))
}

/// How often each reason was counted, at all nodes.
fn reasons_of(runner: &Runner) -> BTreeMap<&'static str, u64> {
    let mut sums = BTreeMap::new();
    for node in counters::read(&runner.generation().counters).unwrap() {
        for (name, count) in node.named_reasons() {
            *sums.entry(name).or_default() += count;
        }
    }
    sums
}

/// The reasons counted between two moments, each as often as it was.
fn counted(
    before: &BTreeMap<&'static str, u64>,
    after: &BTreeMap<&'static str, u64>,
) -> Vec<&'static str> {
    let more = |(name, count): (&&'static str, &u64)| {
        let times = count - before.get(name).unwrap_or(&0);
        vec![*name; times as usize]
    };
    after.iter().flat_map(more).collect()
}

impl<'a> Loaded<'a> {
    fn new(column: &'a Column, hook: Hook) -> Loaded<'a> {
        Loaded {
            column,
            runner: load(&chain_of(column.action, &column.parameters), hook),
            hook,
            handshakes: 0,
        }
    }

    /// Has the learners see how the packet's connection began, in a test run.
    fn shake_hands(&mut self, packet: &Packet) {
        if !self.column.learns || !packet.handshake_seen {
            return;
        }
        self.handshakes += 1;
        let frame = &packet.frame;
        let syn = if frame.src.is_ipv4() { v4() } else { v6() }
            .between(frame.src, frame.dst)
            .ports(frame.src_port, frame.dst_port)
            .options(&words(&[&[3, 3, SCALE]]))
            .sequence(self.handshakes);
        for frame in [syn.clone().flags(SYN), syn.back().flags(SYN | ACK)] {
            let outcome = self.runner.run(&frame.build()).unwrap();
            assert!(outcome.reasons.contains(&"syn"), "{:?}", outcome.reasons);
        }
    }

    fn test_run(&mut self, packet: &Packet) -> Got {
        self.shake_hands(packet);
        let outcome = self.runner.run(&packet.bytes_of(&packet.frame)).unwrap();
        assert_eq!(outcome.carrier, "test_run", "{}", outcome.frame.len());
        Got {
            verdict: Some(outcome.verdict),
            reasons: outcome.reasons,
            frames: vec![outcome.frame],
        }
    }

    fn on_wire(&mut self, wire: &mut Wire, at: At, packet: &Packet) -> Got {
        self.shake_hands(packet);
        let (_, from) = at.device();
        let start = reasons_of(&self.runner);
        wire.mark(from);
        let marked = reasons_of(&self.runner);
        let (bytes, note) = (packet.bytes_of(&packet.frame), packet.note());
        let passage = wire.pass(from, &bytes, &note);
        let end = reasons_of(&self.runner);
        // the markers behind the packet count as those before
        let mut reasons = counted(&marked, &end);
        for reason in counted(&start, &marked) {
            let at = reasons.iter().position(|other| *other == reason).unwrap();
            reasons.remove(at);
        }
        if matches!(at, At::Ingress | At::Forwarded) {
            check_received(packet, &bytes, &passage.received);
        }
        // Generic XDP keeps the notes, also where it sends past the device's offloads.
        let kept = match at == At::Generic {
            true => Note { linear: 0, ..note },
            false => Note::default(),
        };
        let sent_on = self.sends() && reasons.is_empty();
        let arrived = match at == At::Generic && !sent_on {
            true => passage.received,
            false => passage.left,
        };
        for each in &arrived {
            assert_eq!(each.note, kept, "{} {at:?}", self.column.action);
        }
        Got {
            verdict: None,
            reasons,
            frames: arrived.into_iter().map(|it| it.frame).collect(),
        }
    }

    fn sends(&self) -> bool {
        matches!(self.column.change, Change::Send { .. })
    }

    /// The word for what was done, or the reason for nothing.
    fn word(&self, at: At, packet: &Packet, got: &Got) -> Result<String, String> {
        let sends = self.sends();
        let expected = |frame: &Frame| match at {
            At::Run(_) | At::Generic => vec![packet.bytes_of(frame)],
            _ => packet.carried(frame),
        };
        let verdict = match sends && got.reasons.is_empty() {
            true => Verdict::Redirect,
            false => Verdict::Pass,
        };
        if got.verdict.is_some_and(|it| it != verdict) {
            return Err(format!("verdict {:?}", got.verdict));
        }
        let unchanged = expected(&packet.frame);
        if let [reason] = got.reasons[..] {
            return match got.frames == unchanged {
                true => Ok(format!("`{reason}`")),
                false => Err(format!("`{reason}`, and changed")),
            };
        }
        // nobody on the wire can tell who completed a checksum
        let family = match at {
            At::Run(hook) => hook.family(),
            _ => Family::Tc,
        };
        let outcomes = self.column.change.outcomes(&packet.frame, family);
        let mut fitting = outcomes
            .iter()
            .filter(|(_, frame)| got.frames == expected(frame));
        match fitting.next() {
            _ if !got.reasons.is_empty() => Err(format!("reasons {:?}", got.reasons)),
            Some((_, frame)) if !sends && expected(frame) == unchanged => {
                Err("done, and nothing to see of it".to_owned())
            }
            Some((_, frame)) if sends && at == At::Generic && frame.check == Check::Seed => {
                Ok("sent, still partial".to_owned())
            }
            Some((word, _)) => Ok((*word).to_owned()),
            None if got.frames == unchanged => Err("unchanged, and no reason".to_owned()),
            None => Err("something else".to_owned()),
        }
    }
}

/// That a packet came to the hook as what its row says. It is read when the packet has passed, so
/// it also shows whether the action wrote to data it shares.
fn check_received(packet: &Packet, sent: &[u8], received: &[Arrived]) {
    let [arrived] = received else {
        panic!("{received:?}");
    };
    assert_eq!(arrived.frame, sent);
    let note = Note {
        linear: 0,
        ..packet.note()
    };
    assert_eq!(arrived.note, note);
    if packet.tag_in_metadata {
        assert!(arrived.tag_in_metadata);
    }
}

/// Words by place, by title of row.
type Cells = BTreeMap<&'static str, Vec<(At, String)>>;

/// Runs all packets of a column; what went wrong goes into `failures`.
fn run_column(column: &Column, wire: &mut Wire, failures: &mut Vec<String>) -> Cells {
    let base = Base::of(column.change);
    let rows: Vec<Row> = tables(&base).into_iter().flat_map(|(_, rows)| rows).collect();
    let mut cells = Cells::new();
    for hook in Hook::ALL {
        if !column.families.contains(&hook.family()) {
            continue;
        }
        let mut loaded = Loaded::new(column, hook);
        let places = [
            At::Run(hook),
            At::Native,
            At::Generic,
            At::Ingress,
            At::Egress,
            At::Forwarded,
        ];
        let sends = matches!(column.change, Change::Send { .. });
        for at in places {
            if at.hook() != hook || (sends && !at.can_redirect()) {
                continue;
            }
            let held = match at {
                At::Run(_) => None,
                _ => Some(attach_at(&loaded.runner, at)),
            };
            for row in rows.iter().filter(|row| row.at.contains(&at)) {
                for packet in &row.packets {
                    let got = match at {
                        At::Run(_) => loaded.test_run(packet),
                        _ => loaded.on_wire(wire, at, packet),
                    };
                    match loaded.word(at, packet, &got) {
                        Ok(word) => cells.entry(row.what).or_default().push((at, word)),
                        Err(why) => failures.push(failure(&loaded, row, at, packet, &got, &why)),
                    }
                }
            }
            if let Some((place, hold)) = held {
                place.detach(&hold).unwrap();
            }
        }
    }
    cells
}

fn attach_at(runner: &Runner, at: At) -> (attach::Place, attach::Hold) {
    let (device, _) = at.device();
    let place = attach::Place::find(device, at.hook()).unwrap();
    let generation = runner.generation();
    let (hold, _) = place
        .attach(&generation.entry, at.mode(), |mode| generation.set_mode(mode))
        .unwrap();
    (place, hold)
}

fn failure(loaded: &Loaded, row: &Row, at: At, packet: &Packet, got: &Got, why: &str) -> String {
    let start = |frame: &Vec<u8>| {
        let start = &frame[..frame.len().min(130)];
        start.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let sent = packet.bytes_of(&packet.frame);
    let frames: Vec<String> = got.frames.iter().take(3).map(start).collect();
    format!(
        "{} {} on {:?} ({}): {}: {why}; verdict {:?}, reasons {:?}\n  {} bytes: {}\n  became {:?}: {}",
        loaded.column.action,
        loaded.column.parameters,
        at,
        loaded.hook,
        row.what,
        got.verdict,
        got.reasons,
        sent.len(),
        start(&sent),
        got.frames.iter().map(Vec::len).collect::<Vec<_>>(),
        frames.join("\n    "),
    )
}

/// One word if it is the same everywhere, else words by hook.
fn cell(words: &[(At, String)]) -> String {
    for level in 0..3 {
        let mut by_name: Vec<(&str, &str)> = Vec::new();
        for (at, word) in words {
            let name = if level == 0 { "" } else { at.names()[level - 1] };
            if !by_name.contains(&(name, word)) {
                by_name.push((name, word));
            }
        }
        let names: Vec<&str> = by_name.iter().map(|(name, _)| *name).collect();
        let unique = |name: &&str| names.iter().filter(|other| *other == name).count() == 1;
        if !names.iter().all(unique) {
            continue;
        }
        let texts = by_name.iter().map(|(name, word)| match level {
            0 => (*word).to_owned(),
            _ => format!("{name}: {word}"),
        });
        return texts.collect::<Vec<_>>().join("; ");
    }
    let texts = words.iter().map(|(at, word)| format!("{at:?}: {word}"));
    panic!("packets of one row differ: {:?}", texts.collect::<Vec<_>>());
}

fn render(columns: &[Column], cells: &[Cells]) -> String {
    let mut text = BEGIN.to_owned();
    for (title, rows) in tables(&Base::of(Change::Window)) {
        text += &format!("\n### {title}\n\n| Packet |");
        for column in columns {
            let names = format!(" `{}` {}", column.action, column.variant);
            text += &format!("{} |", names.trim_end());
        }
        text += &format!("\n|---|{}\n", "---|".repeat(columns.len()));
        for row in rows {
            text += &format!("| {} |", row.what);
            for cells in cells {
                let words = cells.get(row.what).map_or("–".to_owned(), |it| cell(it));
                text += &format!(" {words} |");
            }
            text += "\n";
        }
    }
    text + "\n" + END
}

/// Compares the tables with what every action does, or writes them if `make docs` asks for that.
#[test]
fn tables_are_current() {
    let columns = columns();
    let (cells, failures) = with_wire(|mut wire| {
        let mut failures = Vec::new();
        let run = |column| run_column(column, &mut wire, &mut failures);
        let cells: Vec<Cells> = columns.iter().map(run).collect();
        (cells, failures)
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let text = render(&columns, &cells);
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/packets.md");
    let document = fs::read_to_string(&path).unwrap();
    let (before, rest) = document.split_once(BEGIN).expect("the first marker");
    let (_, after) = rest.split_once(END).expect("the second marker");
    let current = format!("{before}{text}{after}");
    if env::var_os("WRITE_DOCS").is_some() {
        fs::write(path, current).unwrap();
        return;
    }
    assert!(
        document == current,
        "docs/packets.md is not current: run `make docs`"
    );
}

#[test]
fn every_action_has_a_column() {
    let columns = columns();
    for action in Registry::embedded().unwrap().actions() {
        let name = action.name.as_str();
        let shown = columns.iter().any(|column| column.action == name);
        assert!(shown != BLIND.contains(&name), "{name}");
    }
}

/// Actions without a column do the same with every packet: nothing to it.
#[test]
fn the_others_do_not_look() {
    let rows = tables(&Base::of(Change::Insert));
    let rows: Vec<&Row> = rows.iter().flat_map(|(_, rows)| rows).collect();
    for name in BLIND {
        let (action, verdict) = match name {
            "goto" => (json!({ "action": name, "chain": "sub" }), Verdict::Pass),
            "drop" => (json!({ "action": name }), Verdict::Drop),
            _ => (json!({ "action": name }), Verdict::Pass),
        };
        let chain = with_chains(
            json!({ "actions": [action] }),
            json!([{ "name": "sub" }]),
            json!({}),
        );
        for hook in Hook::ALL {
            let mut runner = load(&chain, hook);
            for row in rows.iter().filter(|row| row.at.contains(&At::Run(hook))) {
                for packet in &row.packets {
                    let bytes = packet.bytes_of(&packet.frame);
                    let outcome = runner.run(&bytes).unwrap();
                    assert_eq!(outcome.verdict, verdict, "{name}, {}", row.what);
                    assert!(outcome.reasons.is_empty(), "{name}, {}", row.what);
                    assert_eq!(outcome.frame, bytes, "{name}, {}", row.what);
                }
            }
        }
    }
}
