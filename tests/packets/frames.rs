// SPDX-License-Identifier: MIT OR Apache-2.0
//! Frames, built and checked without the code under test.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::checksum::Sum16BitWords;
use etherparse::{NetSlice, SlicedPacket, TransportSlice};

pub const FIN: u16 = 0x01;
pub const SYN: u16 = 0x02;
pub const RST: u16 = 0x04;
pub const PSH: u16 = 0x08;
pub const ACK: u16 = 0x10;
pub const ECE: u16 = 0x40;
pub const AE: u16 = 0x100;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP: u8 = 1;

pub const HOP_BY_HOP: u8 = 0;
pub const ROUTING: u8 = 43;
pub const FRAGMENT: u8 = 44;
pub const AUTHENTICATION: u8 = 51;
pub const NO_NEXT: u8 = 59;
pub const DESTINATION: u8 = 60;

pub const MORE_FRAGMENTS: u16 = 0x2000;

/// Shortest Ethernet frame, without its check sequence.
pub const ETHERNET_MIN: usize = 60;

/// What the TCP checksum field holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    Complete,
    /// CHECKSUM_PARTIAL: the folded sum of the pseudo-header.
    Seed,
    /// This value.
    Raw(u16),
}

/// A packet to build. Fields say what stands in the headers; lengths and checksums follow.
#[derive(Clone, Debug)]
pub struct Frame {
    pub dst_mac: [u8; 6],
    pub src_mac: [u8; 6],
    /// Tag types, outermost first.
    pub tags: Vec<u16>,
    pub src: IpAddr,
    pub dst: IpAddr,
    pub ttl: u8,
    /// IPv4: flags and offset, as in the header.
    pub fragment: u16,
    /// IPv4, whole words.
    pub ip_options: Vec<u8>,
    /// IPv6: type and bytes of each extension header; the next header is filled in.
    pub extensions: Vec<(u8, Vec<u8>)>,
    pub protocol: u8,
    pub src_port: u16,
    pub dst_port: u16,
    pub sequence: u32,
    pub flags: u16,
    pub window: u16,
    /// TCP, as they stand.
    pub options: Vec<u8>,
    /// The data offset in words, if it is not to be that of the options.
    pub data_offset: Option<u8>,
    pub payload: Vec<u8>,
    pub check: Check,
    /// Length of IP, if it is not to be the right one.
    pub ip_length: Option<u16>,
    /// Bytes behind IP.
    pub trailer: Vec<u8>,
}

pub const V4_SRC: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
pub const V4_DST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
pub const V6_SRC: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
pub const V6_DST: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
pub const SRC_PORT: u16 = 40000;
pub const DST_PORT: u16 = 80;

/// A bare ACK from 10.0.0.1:40000 to 10.0.0.2:80.
pub fn v4() -> Frame {
    Frame {
        dst_mac: [2, 0, 0, 0, 0, 2],
        src_mac: [2, 0, 0, 0, 0, 1],
        tags: Vec::new(),
        src: V4_SRC.into(),
        dst: V4_DST.into(),
        ttl: 64,
        fragment: 0,
        ip_options: Vec::new(),
        extensions: Vec::new(),
        protocol: TCP,
        src_port: SRC_PORT,
        dst_port: DST_PORT,
        sequence: 1,
        flags: ACK,
        window: 512,
        options: Vec::new(),
        data_offset: None,
        payload: Vec::new(),
        check: Check::Complete,
        ip_length: None,
        trailer: Vec::new(),
    }
}

/// The same from 2001:db8::1 to 2001:db8::2.
pub fn v6() -> Frame {
    v4().between(V6_SRC, V6_DST)
}

/// Both, named: most rows hold for either version.
pub fn both() -> [(&'static str, Frame); 2] {
    [("IPv4", v4()), ("IPv6", v6())]
}

impl Frame {
    pub fn between(mut self, src: impl Into<IpAddr>, dst: impl Into<IpAddr>) -> Frame {
        (self.src, self.dst) = (src.into(), dst.into());
        self
    }

    pub fn ports(mut self, src: u16, dst: u16) -> Frame {
        (self.src_port, self.dst_port) = (src, dst);
        self
    }

    pub fn sequence(mut self, sequence: u32) -> Frame {
        self.sequence = sequence;
        self
    }

    /// The other way: addresses and ports exchanged.
    pub fn back(mut self) -> Frame {
        (self.src, self.dst) = (self.dst, self.src);
        (self.src_port, self.dst_port) = (self.dst_port, self.src_port);
        self
    }

    pub fn flags(mut self, flags: u16) -> Frame {
        self.flags = flags;
        self
    }

    pub fn window(mut self, window: u16) -> Frame {
        self.window = window;
        self
    }

    pub fn options(mut self, options: &[u8]) -> Frame {
        self.options = options.to_vec();
        self
    }

    /// A payload behind which the sequence number is that of the frame by now.
    pub fn payload_before(self, payload: &[u8]) -> Frame {
        let sequence = self.sequence.wrapping_sub(payload.len() as u32);
        self.sequence(sequence).payload(payload)
    }

    pub fn payload(mut self, payload: &[u8]) -> Frame {
        self.payload = payload.to_vec();
        self
    }

    pub fn protocol(mut self, protocol: u8) -> Frame {
        self.protocol = protocol;
        self
    }

    pub fn tags(mut self, tags: &[u16]) -> Frame {
        self.tags = tags.to_vec();
        self
    }

    pub fn ip_options(mut self, options: &[u8]) -> Frame {
        self.ip_options = options.to_vec();
        self
    }

    pub fn extension(mut self, kind: u8, bytes: &[u8]) -> Frame {
        self.extensions.push((kind, bytes.to_vec()));
        self
    }

    pub fn fragment(mut self, fragment: u16) -> Frame {
        self.fragment = fragment;
        self
    }

    pub fn check(mut self, check: Check) -> Frame {
        self.check = check;
        self
    }

    /// Zeros up to the length of the shortest Ethernet frame.
    pub fn padded(mut self) -> Frame {
        let length = self.build().len();
        self.trailer = vec![0; ETHERNET_MIN.saturating_sub(length)];
        self
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.src_port.to_be_bytes());
        bytes.extend(self.dst_port.to_be_bytes());
        match self.protocol {
            TCP => {
                let words = self
                    .data_offset
                    .unwrap_or(5 + (self.options.len() / 4) as u8);
                bytes.extend(self.sequence.to_be_bytes());
                bytes.extend([0, 0, 0, 2]);
                bytes.extend((u16::from(words) << 12 | self.flags).to_be_bytes());
                bytes.extend(self.window.to_be_bytes());
                bytes.extend([0; 4]);
                bytes.extend(&self.options);
            }
            UDP => {
                bytes.extend((8 + self.payload.len() as u16).to_be_bytes());
                bytes.extend([0; 2]);
            }
            _ => bytes.extend([0; 4]),
        }
        bytes.extend(&self.payload);
        if self.protocol == TCP {
            let pseudo = pseudo_header(self.src, self.dst, bytes.len());
            let check = match self.check {
                Check::Complete => pseudo.add_slice(&bytes).ones_complement().to_be(),
                Check::Seed => (!pseudo.ones_complement()).to_be(),
                Check::Raw(value) => value,
            };
            bytes[16..18].copy_from_slice(&check.to_be_bytes());
        }
        bytes
    }

    /// The bytes of the frame.
    pub fn build(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.dst_mac);
        bytes.extend(self.src_mac);
        for tag in &self.tags {
            bytes.extend(tag.to_be_bytes());
            bytes.extend([0, 100]);
        }
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => self.build_v4(&mut bytes, src, dst),
            (IpAddr::V6(src), IpAddr::V6(dst)) => self.build_v6(&mut bytes, src, dst),
            _ => unreachable!("addresses of both versions"),
        }
        bytes.extend(&self.trailer);
        bytes
    }

    fn build_v4(&self, bytes: &mut Vec<u8>, src: Ipv4Addr, dst: Ipv4Addr) {
        let transport = self.transport();
        let words = 5 + self.ip_options.len() / 4;
        let length = self
            .ip_length
            .unwrap_or((words * 4 + transport.len()) as u16);
        let mut header = vec![0x40 | words as u8, 0];
        header.extend(length.to_be_bytes());
        header.extend([0x12, 0x34]);
        header.extend(self.fragment.to_be_bytes());
        header.extend([self.ttl, self.protocol, 0, 0]);
        header.extend(src.octets());
        header.extend(dst.octets());
        header.extend(&self.ip_options);
        let check = Sum16BitWords::new().add_slice(&header).ones_complement();
        header[10..12].copy_from_slice(&check.to_ne_bytes());
        bytes.extend([8, 0]);
        bytes.extend(header);
        bytes.extend(transport);
    }

    fn build_v6(&self, bytes: &mut Vec<u8>, src: Ipv6Addr, dst: Ipv6Addr) {
        let mut payload = Vec::new();
        let mut kinds = self.extensions.iter().map(|(kind, _)| *kind);
        let first = kinds.next().unwrap_or(self.protocol);
        for (_, header) in &self.extensions {
            payload.push(kinds.next().unwrap_or(self.protocol));
            payload.extend(&header[1..]);
        }
        payload.extend(self.transport());
        let length = self.ip_length.unwrap_or(payload.len() as u16);
        bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        bytes.extend(length.to_be_bytes());
        bytes.extend([first, self.ttl]);
        bytes.extend(src.octets());
        bytes.extend(dst.octets());
        bytes.extend(payload);
    }
}

fn pseudo_header(src: IpAddr, dst: IpAddr, length: usize) -> Sum16BitWords {
    let sum = Sum16BitWords::new()
        .add_2bytes([0, TCP])
        .add_slice(&(length as u32).to_be_bytes());
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => sum.add_slice(&src.octets()).add_slice(&dst.octets()),
        (IpAddr::V6(src), IpAddr::V6(dst)) => sum.add_slice(&src.octets()).add_slice(&dst.octets()),
        _ => unreachable!("addresses of both versions"),
    }
}

/// Option bytes with NOPs behind them up to a whole word.
pub fn words(options: &[&[u8]]) -> Vec<u8> {
    let mut bytes = options.concat();
    bytes.resize(bytes.len().next_multiple_of(4), 1);
    bytes
}

/// An option of `length` bytes, the third being `first`; the others count.
pub fn option(kind: u8, length: u8, first: u8) -> Vec<u8> {
    let mut bytes = vec![kind, length, first];
    bytes.extend(3..length);
    bytes.truncate(length.into());
    bytes
}

/// What the checksums of a frame are worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sums {
    /// A whole TCP segment with right checksums.
    Right,
    /// A whole TCP segment with a right IPv4 checksum and the pseudo-header's sum as its own.
    Seed,
    Wrong,
    /// No whole TCP segment.
    None,
}

/// Checks a frame's checksums as etherparse does.
pub fn sums(frame: &[u8]) -> Sums {
    let Ok(packet) = SlicedPacket::from_ethernet(frame) else {
        return Sums::None;
    };
    let Some(TransportSlice::Tcp(tcp)) = &packet.transport else {
        return Sums::None;
    };
    let length = tcp.slice().len();
    let (right, seed, header) = match &packet.net {
        Some(NetSlice::Ipv4(ip)) => {
            let header = ip.header();
            let (src, dst) = (header.source_addr(), header.destination_addr());
            (
                tcp.calc_checksum_ipv4(src.octets(), dst.octets()).ok(),
                pseudo_header(src.into(), dst.into(), length),
                header.header_checksum() == header.to_header().calc_header_checksum(),
            )
        }
        Some(NetSlice::Ipv6(ip)) => {
            let (src, dst) = (ip.header().source_addr(), ip.header().destination_addr());
            (
                tcp.calc_checksum_ipv6(src.octets(), dst.octets()).ok(),
                pseudo_header(src.into(), dst.into(), length),
                true,
            )
        }
        _ => return Sums::None,
    };
    match (header, tcp.checksum()) {
        (false, _) => Sums::Wrong,
        (_, check) if Some(check) == right => Sums::Right,
        (_, check) if check == (!seed.ones_complement()).to_be() => Sums::Seed,
        _ => Sums::Wrong,
    }
}

/// The payload of a whole TCP segment.
pub fn payload(frame: &[u8]) -> Option<Vec<u8>> {
    match SlicedPacket::from_ethernet(frame).ok()?.transport? {
        TransportSlice::Tcp(tcp) => Some(tcp.payload().to_vec()),
        _ => None,
    }
}

#[test]
fn frames_are_what_another_parser_takes_for_valid() {
    let bases = [
        v4(),
        v6(),
        v4().tags(&[0x8100]).options(&option(2, 4, 5)),
        v4().ip_options(&[1, 1, 1, 0]).payload(b"odd"),
        v6().extension(DESTINATION, &[0; 8]).payload(b"x"),
    ];
    for base in bases {
        assert_eq!(sums(&base.build()), Sums::Right, "{base:?}");
        assert_eq!(sums(&base.clone().check(Check::Seed).build()), Sums::Seed);
        assert_eq!(
            sums(&base.clone().check(Check::Raw(7)).build()),
            Sums::Wrong
        );
    }
}
