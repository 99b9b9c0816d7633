// SPDX-License-Identifier: MIT OR Apache-2.0
//! The packets of the tables.

use policy_chain::hook::Hook;

use super::outcomes::{Change, INSERTED, MPTCP, NOP, OTHER, segments, transport_offset};
use super::run::At;
use crate::checksums::by_chance;
use crate::frames::*;
use crate::wire::Note;

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
    At::Forwarded,
];
const SUPER: &[At] = &[At::Generic, At::Ingress, At::Egress, At::Forwarded];
const TC_ONLY: &[At] = &[At::Ingress, At::Egress];
const RECEIVED: &[At] = &[At::Ingress, At::Forwarded];

/// A packet, and what it would be if only its headers were other ones.
pub struct Packet {
    pub frame: Frame,
    /// What happens to the bytes that the headers make.
    bend: fn(Vec<u8>) -> Vec<u8>,
    /// Payload of each segment of a super-packet.
    pub segment: Option<u16>,
    /// Bytes in the linear part of a long one, if that is not all headers.
    linear: Option<u16>,
    pub handshake_seen: bool,
    /// It arrives with its tag in metadata.
    pub tag_in_metadata: bool,
}

impl Packet {
    fn new(frame: Frame) -> Packet {
        Packet {
            frame,
            bend: |bytes| bytes,
            segment: None,
            linear: None,
            handshake_seen: true,
            tag_in_metadata: false,
        }
    }

    /// What a test run gets, or gives.
    pub fn bytes_of(&self, frame: &Frame) -> Vec<u8> {
        (self.bend)(frame.build())
    }

    /// What comes out of a device without offloads.
    pub fn carried(&self, frame: &Frame) -> Vec<Vec<u8>> {
        let mut frame = frame.clone();
        if frame.check == Check::Seed {
            frame.check = Check::Complete;
        }
        match self.segment {
            Some(size) => segments(&frame, size.into()),
            None => vec![self.bytes_of(&frame)],
        }
    }

    pub fn note(&self) -> Note {
        let transport = transport_offset(&self.frame);
        let headers = transport + 20 + self.frame.options.len();
        let length = self.bytes_of(&self.frame).len();
        Note {
            partial: (self.frame.check == Check::Seed).then_some((transport as u16, 16)),
            segment: self.segment,
            linear: self.linear.unwrap_or(headers.min(length) as u16),
        }
    }
}

/// What is at the start of every row: the option a column is about, and flags that it looks at.
pub struct Base {
    subject: Vec<u8>,
    flags: u16,
    /// What is not inserted again.
    present: Vec<u8>,
}

impl Base {
    pub fn of(change: Change) -> Base {
        let subject = match change {
            Change::Mss => vec![2, 4, 5, 0xb4],
            Change::Nop | Change::Remove | Change::Reset | Change::Note => vec![MPTCP, 4, 0x30, 1],
            _ => vec![],
        };
        Base {
            subject,
            flags: if change == Change::Mss { SYN } else { ACK },
            present: match change {
                Change::Insert => INSERTED.to_vec(),
                Change::Add(added) => words(&[&added.option()]),
                _ => vec![],
            },
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
pub struct Row {
    pub what: &'static str,
    pub at: &'static [At],
    pub packets: Vec<Packet>,
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
pub fn tables(base: &Base) -> Vec<(&'static str, Vec<Row>)> {
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
    let absent = match base.flags {
        SYN => vec![2, 4, 2, 0],
        _ => base.present.clone(),
    };
    let low = [v4(), v6()].map(|frame| frame.flags(base.flags).options(&absent).window(8));
    let mut behind_end = [&[0, 0, 0, 0][..], &base.subject].concat();
    behind_end.resize(16, 0);
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
        row(
            "40 bytes of options, no NOPs",
            frames(ACK, base.full(), b""),
        ),
        row(
            "40 bytes of options, NOPs among them",
            frames(ACK, nop_full(base), b"")
                .into_iter()
                .chain(frames(ACK, nop_full(base), DATA)),
        ),
        row("SYN", frames(SYN, subject(), b"")),
        row("SYN with ACK", frames(SYN | ACK, subject(), b"")),
        row("FIN", frames(FIN | ACK, subject(), b"")),
        row("RST", frames(RST, subject(), b"")),
        row(
            "option behind EOL",
            frames(base.flags, behind_end.clone(), b"")
                .into_iter()
                .chain(frames(base.flags, behind_end, DATA)),
        ),
        row("value no higher, option absent or there already", low),
        row(
            "handshake not seen",
            base.bare().map(|it| it.ports(41000, 80)),
        )
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
    let mut signed = [0; 24];
    signed[1] = (signed.len() / 4 - 2) as u8;
    let tagged = |tags: &[u16]| base.bare().map(|frame| frame.tags(tags));
    let roomy = |frame: Frame| frame.options(&base.roomy()).payload(&[7; 24]);
    let to = |v4: [u8; 4], v6: &str| {
        let v6: std::net::Ipv6Addr = v6.parse().unwrap();
        [base.v4().between(V4_SRC, v4), base.v6().between(V6_SRC, v6)]
    };
    vec![
        row(
            "IPv4 options",
            [base.v4().ip_options(&[7, 7, 4, 0, 0, 0, 0, 0])],
        ),
        row("1 to 8 IPv6 extension headers", [extended(1), extended(8)]),
        row("9 of them", [extended(9)]),
        row(
            "TCP over 511 bytes into the frame",
            [base.v6().extension(DESTINATION, &far)],
        ),
        row("IPv6 routing header, on its way", [routed(1)]),
        row("IPv6 routing header, arrived", [routed(0)]),
        row(
            "IPv6 authentication header",
            [base.v6().extension(AUTHENTICATION, &signed)],
        ),
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
        row(
            "UDP, ICMP, IPv4 authentication header",
            base.bare()
                .map(|frame| frame.protocol(UDP))
                .into_iter()
                .chain([base.v4().protocol(ICMP), base.v4().protocol(AUTHENTICATION)]),
        ),
        row("neither IPv4 nor IPv6", [base.v4()]).bend(|mut bytes| {
            bytes[12..14].copy_from_slice(&[0x86, 0x37]);
            bytes
        }),
        row(
            "TTL or hop limit 1",
            base.bare().map(|frame| Frame { ttl: 1, ..frame }),
        ),
        row("no route", to([192, 0, 2, 1], "2001:db8:1::1")),
        row(
            "next hop's address unknown",
            to([10, 0, 0, 3], "2001:db8::3"),
        ),
    ]
}

fn checksum_rows(base: &Base) -> Vec<Row> {
    let seed = |frame: Frame| frame.check(Check::Seed);
    let bare = base.bare();
    let tagged = base.bare().map(|frame| frame.tags(&[0x8100]));
    let extended = base.v6().extension(DESTINATION, &[0; 8]);
    let loaded = |options: Vec<u8>| {
        let frames = base
            .bare()
            .into_iter()
            .chain([base.v4().ip_options(&[NOP; 4])]);
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
                // veth leaves the shortest frames no room to grow in
                .map(|frame| seed(frame.options(&base.tight()))),
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
        .each(|packet| packet.linear = Some(14)),
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
        row(
            "super-packet, tag in metadata (TC)",
            super_packets(base.roomy()).map(|frame| frame.tags(&[0x8100])),
        )
        .at(RECEIVED)
        .each(|packet| {
            packet.segment = Some(1000);
            packet.tag_in_metadata = true;
        }),
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
