// SPDX-License-Identifier: MIT OR Apache-2.0
//! Packets, valid and not. They share a few addresses, ports and option kinds with the chains, so
//! that these match often.

use std::net::IpAddr;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use crate::layers::{ACK, AUTHENTICATION, DESTINATION, FIN, FRAGMENT, HOP_BY_HOP, ROUTING, SYN};
use crate::layers::{SCTP, TCP, UDP};
use crate::options::{MPTCP, MSS, NOP, WINDOW_SCALE};
use crate::packet::{Check, Damage, Extension, Network, Packet, Transport};

pub const ADDRESSES: [&str; 9] = [
    "10.0.0.1",
    "10.0.0.2",
    "10.0.0.3",
    "192.0.2.9",
    "2001:db8::1",
    "2001:db8::2",
    "2001:db8::3",
    "2001:db9::1",
    "::ffff:10.0.0.1",
];
pub const PORTS: [u16; 4] = [80, 443, 40000, 5201];

/// The first that comes is what shrinking leads to.
pub const CONNECTIONS: [(&str, u16, &str, u16); 5] = [
    ("10.0.0.1", 40000, "10.0.0.2", 80),
    ("10.0.0.1", 443, "10.0.0.2", 5201),
    ("2001:db8::1", 40000, "2001:db8::2", 80),
    ("10.0.0.2", 40000, "192.0.2.9", 443),
    ("2001:db9::1", 80, "2001:db8::2", 80),
];

/// What fills MPTCP options, keys and tokens too.
const fn mptcp_byte(at: usize) -> u8 {
    (at * 29) as u8
}

/// Both keys of a connection.
pub const MPTCP_KEYS: [u8; 16] = {
    let mut keys = [0; 16];
    let mut at = 0;
    while at < 16 {
        keys[at] = mptcp_byte(at + 4);
        at += 1;
    }
    keys
};

type Ends = (IpAddr, u16, IpAddr, u16);

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn ends() -> impl Strategy<Value = Ends> {
    let known = (select(&CONNECTIONS[..]), any::<bool>()).prop_map(|((a, b, c, d), back)| {
        let (a, c) = (address(a), address(c));
        if back { (c, d, a, b) } else { (a, b, c, d) }
    });
    let ports = || prop_oneof![9 => select(&PORTS[..]), 1 => any::<u16>(), 1 => Just(0)];
    let any = |addresses: &'static [&'static str]| {
        (select(addresses), ports(), select(addresses), ports())
            .prop_map(|(a, b, c, d)| (address(a), b, address(c), d))
    };
    prop_oneof![
        20 => known,
        2 => any(&ADDRESSES[..4]),
        2 => any(&ADDRESSES[4..]),
    ]
}

fn protocol() -> impl Strategy<Value = u8> {
    prop_oneof![
        24 => Just(TCP),
        3 => Just(UDP),
        1 => select(vec![1u8, 58, 59, 50, 135]),
        1 => Just(SCTP),
        1 => any::<u8>(),
    ]
}

fn extension() -> impl Strategy<Value = Extension> {
    let kinds = vec![DESTINATION, HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION];
    let units = prop_oneof![12 => 0..4u8, 1 => 4..70u8];
    let detail = prop_oneof![6 => Just(0u8), 1 => Just(1), 1 => select(vec![8u8, 9, 2, 6])];
    (select(kinds), units, detail).prop_map(|(kind, units, detail)| Extension {
        kind,
        units,
        detail,
    })
}

fn network() -> impl Strategy<Value = (Network, u16, u16)> {
    let tags = prop_oneof![
        10 => Just(vec![]),
        1 => Just(vec![0x8100]),
        1 => Just(vec![0x88a8, 0x8100]),
        1 => vec(select(vec![0x8100u16, 0x88a8]), 0..4),
    ];
    let ttl = prop_oneof![12 => Just(64u8), 1 => 0..3u8];
    let words = prop_oneof![8 => Just(0u8), 2 => 0..11u8];
    let offset = prop_oneof![20 => Just(0u16), 1 => Just(1), 1 => 0..0x2000u16];
    let more = prop::bool::weighted(0.06);
    let extensions = prop_oneof![
        8 => Just(vec![]),
        4 => vec(extension(), 1..3),
        1 => vec(extension(), 0..11),
    ];
    let parts = (
        ends(),
        protocol(),
        tags,
        ttl,
        words,
        offset,
        more,
        extensions,
    );
    parts.prop_map(
        |((src, src_port, dst, dst_port), protocol, tags, ttl, words, offset, more, extensions)| {
            let network = Network {
                tags,
                src,
                dst,
                ttl,
                option_words: words,
                offset,
                more_fragments: more,
                extensions,
                protocol,
            };
            (network, src_port, dst_port)
        },
    )
}

fn flags() -> impl Strategy<Value = u16> {
    prop_oneof![
        6 => Just(ACK),
        2 => Just(0x08 | ACK),
        4 => Just(SYN),
        3 => Just(SYN | ACK),
        1 => Just(FIN | ACK),
        1 => Just(0x04),
        1 => 0..0x200u16,
    ]
}

fn option() -> impl Strategy<Value = Vec<u8>> {
    let sized = |kind: u8, lengths: Vec<usize>| {
        (select(lengths), any::<u8>()).prop_map(move |(length, first)| {
            let mut bytes = vec![kind, length as u8];
            bytes.extend((2..length).map(|at| first.wrapping_add((at * 37) as u8)));
            bytes
        })
    };
    let mss = prop_oneof![select(vec![1460u16, 1000, 536, 8960]), any::<u16>()];
    let mss = mss.prop_map(|value| [&[MSS, 4][..], &value.to_be_bytes()].concat());
    let scale = prop_oneof![8 => 0..15u8, 1 => any::<u8>()];
    let lengths = vec![3usize, 4, 8, 12, 16, 20, 24, 28];
    let subtype = prop_oneof![4 => 0..9u8, 3 => select(vec![0, 2, 2, 3]), 1 => 9..16u8];
    let low = prop_oneof![3 => Just(1u8), 2 => Just(0)];
    let fourth = select(vec![1u8, 0, 0x11, 5, 87]);
    let mptcp =
        (select(lengths), subtype, low, fourth).prop_map(|(length, subtype, low, fourth)| {
            let mut bytes = vec![MPTCP, length as u8, subtype << 4 | low];
            bytes.extend((3..length).map(mptcp_byte));
            if let Some(byte) = bytes.get_mut(3) {
                *byte = fourth;
            }
            bytes
        });
    // the third packet of a handshake
    let keys = Just([&[MPTCP, 20, 1, 1][..], &MPTCP_KEYS].concat());
    prop_oneof![
        6 => Just(vec![NOP]),
        3 => mss,
        4 => scale.prop_map(|scale| vec![WINDOW_SCALE, 3, scale]),
        2 => Just(vec![4, 2]),
        3 => sized(8, vec![10]),
        5 => mptcp,
        1 => keys,
        2 => sized(253, vec![2, 3, 4, 7]),
        1 => sized(5, vec![10, 18]),
        1 => Just(vec![0]),
        1 => (2..=255u8, 0..3u8).prop_map(|(kind, length)| vec![kind, length]),
        1 => (select(vec![MSS, WINDOW_SCALE, MPTCP, 8]), 0..8u8)
            .prop_map(|(kind, length)| {
                let mut bytes = vec![kind, length];
                bytes.resize(usize::from(length.max(2)), kind);
                bytes
            }),
    ]
}

fn options(of_a_syn: bool) -> impl Strategy<Value = Vec<u8>> {
    let list = prop_oneof![
        2 => Just(vec![]),
        6 => vec(option(), 1..4),
        4 => vec(option(), 1..9),
        1 => vec(option(), 8..20),
    ];
    // as hosts send them on a SYN, in any order; those of MPTCP with what begins a subflow
    let capable = vec![MPTCP, 4, 1, 1];
    let join = [
        &[MPTCP, 12, 0x10, 5][..],
        &[0x74, 0x91, 0xae, 0xcb],
        &[9; 4],
    ]
    .concat();
    let begins = select(vec![vec![], capable.clone(), capable, join]);
    let syn = (0..1500u16, 0..15u8, begins).prop_map(|(mss, scale, begins)| {
        vec![
            [&[MSS, 4][..], &mss.to_be_bytes()].concat(),
            vec![4, 2],
            vec![8, 10, 0, 0, 0, 1, 0, 0, 0, 0],
            begins,
            vec![WINDOW_SCALE, 3, scale],
        ]
    });
    prop_oneof![
        16 => list.prop_map(|list| list.concat()),
        if of_a_syn { 16 } else { 2 } => syn.prop_shuffle().prop_map(|list| list.concat()),
        if of_a_syn { 1 } else { 16 } => signals(),
        1 => vec(any::<u8>(), 0..41),
    ]
}

/// As MPTCP hosts send them once a subflow is established.
fn signals() -> impl Strategy<Value = Vec<u8>> {
    let dss = |bits: u8, length: usize| {
        let mut bytes = vec![MPTCP, length as u8, 0x20, bits];
        bytes.resize(length, 7);
        bytes
    };
    let dss = select(vec![
        dss(1, 8),
        dss(1, 8),
        dss(3, 12),
        dss(5, 18),
        dss(0x15, 18),
    ]);
    let stamps = || prop::bool::weighted(0.4);
    let announced = (0..5u8, select(vec![8usize, 16, 18, 28])).prop_map(|(id, length)| {
        let mut bytes = vec![MPTCP, length as u8, 0x30, id];
        bytes.resize(length, id ^ 0x55);
        bytes
    });
    let other = prop_oneof![
        8 => Just(vec![]),
        4 => Just([&[MPTCP, 20, 1, 1][..], &MPTCP_KEYS].concat()),
        5 => announced,
        1 => Just(vec![MPTCP, 4, 0x40, 3]),
        1 => Just(vec![MPTCP, 3, 0x51]),
        2 => Just(vec![NOP; 8]),
    ];
    (stamps(), prop::option::weighted(0.8, dss), other).prop_map(|(stamps, dss, other)| {
        let stamps = match stamps {
            true => vec![NOP, NOP, 8, 10, 0, 0, 0, 1, 0, 0, 0, 1],
            false => vec![],
        };
        [stamps, dss.unwrap_or_default(), other].concat()
    })
}

/// Behind the last byte that an end sends; payloads are shorter.
const NEWEST: u32 = 1 << 14;

fn payload() -> impl Strategy<Value = usize> {
    prop_oneof![
        60 => Just(0usize),
        60 => 1..40usize,
        10 => 40..1460usize,
        1 => 3300..9000usize,
    ]
}

fn check() -> impl Strategy<Value = Check> {
    prop_oneof![
        12 => Just(Check::Right),
        4 => Just(Check::Seed),
        1 => Just(Check::Both),
        1 => any::<u16>().prop_map(Check::Value),
        1 => Just(Check::Value(0xffff)),
        1 => Just(Check::Value(0)),
    ]
}

fn transport(ports: (u16, u16)) -> impl Strategy<Value = Transport> {
    let fill = prop_oneof![4 => Just(NOP), 1 => Just(0u8)];
    let sequence = (1..3u32, prop::bool::weighted(0.8));
    let window = prop_oneof![1 => select(vec![512u16, 0, 1, 9, 65535]), 1 => any::<u16>()];
    let flags = flags().prop_flat_map(|flags| (Just(flags), options(flags & SYN != 0)));
    let parts = (flags, fill, payload(), check(), sequence, window);
    parts.prop_map(
        move |((flags, options), fill, payload, check, (sequence, newest), window)| Transport {
            src_port: ports.0,
            dst_port: ports.1,
            // Most end where all of them end: an end that has sent more says nothing new.
            sequence: match newest && flags & SYN == 0 {
                true => NEWEST - payload as u32,
                false => sequence,
            },
            flags,
            window,
            options,
            fill,
            payload,
            check,
        },
    )
}

fn damage() -> impl Strategy<Value = Damage> {
    let byte = (0..110usize, any::<u8>()).prop_map(|(at, value)| Damage::Byte { at, value });
    prop_oneof![
        3 => prop_oneof![-70..70i16, any::<i16>()].prop_map(Damage::IpLength),
        1 => Just(Damage::IpLengthZero),
        3 => (-6..=10i8).prop_map(Damage::DataOffset),
        1 => any::<u8>().prop_map(Damage::Version),
        1 => select(vec![0x0806u16, 0x0800, 0x86dd, 0x8100, 0x88a8]).prop_map(Damage::EtherType),
        1 => Just(Damage::HeaderChecksum),
        4 => byte,
        3 => (14..140usize).prop_map(Damage::Cut),
    ]
}

/// Any packet.
pub fn packet() -> BoxedStrategy<Packet> {
    let trailer = prop_oneof![
        6 => Just(vec![]),
        2 => (1..30usize).prop_map(|length| vec![0; length]),
        2 => vec(any::<u8>(), 1..30),
    ];
    let damages = prop_oneof![
        14 => Just(vec![]),
        5 => vec(damage(), 1..2),
        1 => vec(damage(), 2..5),
    ];
    let layers = network().prop_flat_map(|(network, src_port, dst_port)| {
        (Just(network), transport((src_port, dst_port)))
    });
    let parts = (layers, trailer, damages);
    parts
        .prop_map(|((network, transport), trailer, damages)| Packet {
            network,
            transport,
            trailer,
            damages,
        })
        .boxed()
}
