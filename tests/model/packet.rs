// SPDX-License-Identifier: MIT OR Apache-2.0
//! Packets to be generated: what they are made of, and how it becomes bytes.

use std::net::IpAddr;

use crate::layers::{AUTHENTICATION, FRAGMENT, ROUTING, SCTP, TCP, UDP};
use crate::sums;

const MORE_FRAGMENTS: u16 = 0x2000;

/// What a TCP or UDP checksum field holds.
#[derive(Clone, Copy, Debug)]
pub enum Check {
    Right,
    /// The folded pseudo-header sum: a device is to complete it.
    Seed,
    /// That, where it happens to be right as well.
    Both,
    Value(u16),
}

#[derive(Clone, Debug)]
pub struct Extension {
    pub kind: u8,
    /// Length as in the header's own field.
    pub units: u8,
    /// Routing: segments left. Fragment: the low byte of offset and flags.
    pub detail: u8,
}

#[derive(Clone, Debug)]
pub struct Network {
    pub tags: Vec<u16>,
    pub src: IpAddr,
    pub dst: IpAddr,
    pub ttl: u8,
    /// IPv4: words of options.
    pub option_words: u8,
    /// IPv4: fragment offset.
    pub offset: u16,
    pub more_fragments: bool,
    /// IPv6.
    pub extensions: Vec<Extension>,
    pub protocol: u8,
}

#[derive(Clone, Debug)]
pub struct Transport {
    pub src_port: u16,
    pub dst_port: u16,
    pub sequence: u32,
    pub flags: u16,
    pub window: u16,
    /// As they stand; filled up to words by `fill`.
    pub options: Vec<u8>,
    pub fill: u8,
    pub payload: usize,
    pub check: Check,
}

/// How a packet is not what it should be.
#[derive(Clone, Debug)]
pub enum Damage {
    /// What IP's length field is wrong by.
    IpLength(i16),
    IpLengthZero,
    /// What the data offset is wrong by, in words.
    DataOffset(i8),
    /// The first byte of the IP header.
    Version(u8),
    EtherType(u16),
    HeaderChecksum,
    /// One byte behind the Ethernet addresses.
    Byte {
        at: usize,
        value: u8,
    },
    /// The frame ends early.
    Cut(usize),
}

#[derive(Clone, Debug)]
pub struct Packet {
    pub network: Network,
    pub transport: Transport,
    /// Bytes behind IP.
    pub trailer: Vec<u8>,
    pub damages: Vec<Damage>,
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    if at + 2 <= bytes.len() {
        sums::write(bytes, at, value);
    }
}

impl Transport {
    fn bytes(&self, network: &Network) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.src_port.to_be_bytes());
        bytes.extend(self.dst_port.to_be_bytes());
        let mut field = None;
        match network.protocol {
            TCP => {
                let mut options = self.options.clone();
                options.truncate(40);
                options.resize(options.len().next_multiple_of(4), self.fill);
                let words = 5 + options.len() as u16 / 4;
                bytes.extend(self.sequence.to_be_bytes());
                bytes.extend([0, 0, 0, 2]);
                bytes.extend((words << 12 | self.flags).to_be_bytes());
                bytes.extend(self.window.to_be_bytes());
                bytes.extend([0; 4]);
                bytes.extend(options);
                field = Some((16, 18));
            }
            UDP => {
                bytes.extend((8 + self.payload as u16).to_be_bytes());
                bytes.extend([0; 2]);
                field = Some((6, 0));
            }
            SCTP => bytes.extend([0; 8]),
            _ => bytes.extend([0; 4]),
        }
        // no two words alike, so that whatever moves is seen
        bytes.extend((0..self.payload).map(|at| (at / 2 * 7 + at % 2 * 131 + 1) as u8));
        if let Some((at, spare)) = field {
            self.sum_up(&mut bytes, network, at, spare);
        }
        bytes
    }

    /// `spare` is a field that is free to make the sum what it shall be.
    fn sum_up(&self, bytes: &mut [u8], network: &Network, at: usize, spare: usize) {
        let (src, dst, protocol) = (network.src, network.dst, network.protocol);
        let seed = sums::seed(src, dst, protocol, bytes.len());
        let value = match self.check {
            Check::Right => sums::checksum(src, dst, protocol, bytes),
            Check::Seed => seed,
            Check::Both => {
                sums::write(bytes, at, seed);
                sums::write(bytes, spare, 0);
                let balance = sums::checksum(src, dst, protocol, bytes);
                sums::write(bytes, spare, balance);
                seed
            }
            Check::Value(value) => value,
        };
        sums::write(bytes, at, value);
    }
}

impl Extension {
    fn bytes(&self, next: u8) -> Vec<u8> {
        let length = match self.kind {
            FRAGMENT => 8,
            AUTHENTICATION => (usize::from(self.units) + 2) * 4,
            _ => (usize::from(self.units) + 1) * 8,
        };
        let mut bytes = vec![0; length];
        (bytes[0], bytes[1]) = (next, self.units);
        if [FRAGMENT, ROUTING].contains(&self.kind) {
            bytes[3] = self.detail;
        }
        bytes
    }
}

impl Network {
    fn v4(&self, inner: &[u8]) -> Vec<u8> {
        let words = 5 + self.option_words;
        let length = usize::from(words) * 4 + inner.len();
        let mut header = vec![0x40 | words, 0];
        header.extend((length as u16).to_be_bytes());
        header.extend([0x12, 0x34]);
        let more = if self.more_fragments {
            MORE_FRAGMENTS
        } else {
            0
        };
        header.extend((self.offset | more).to_be_bytes());
        header.extend([self.ttl, self.protocol, 0, 0]);
        for address in [self.src, self.dst] {
            match address {
                IpAddr::V4(address) => header.extend(address.octets()),
                IpAddr::V6(_) => unreachable!("addresses of both versions"),
            }
        }
        header.resize(usize::from(words) * 4, 1);
        let check = sums::header_checksum(&header);
        sums::write(&mut header, 10, check);
        [&header, inner].concat()
    }

    fn v6(&self, inner: &[u8]) -> Vec<u8> {
        let kinds = self.extensions.iter().map(|extension| extension.kind);
        let mut kinds = kinds.chain([self.protocol]);
        let first = kinds.next().unwrap();
        let extensions = self.extensions.iter().zip(kinds);
        let extensions: Vec<u8> = extensions
            .flat_map(|(extension, next)| extension.bytes(next))
            .collect();
        let length = extensions.len() + inner.len();
        let mut header = vec![0x60, 0, 0, 0];
        header.extend((length as u16).to_be_bytes());
        header.extend([first, self.ttl]);
        for address in [self.src, self.dst] {
            match address {
                IpAddr::V6(address) => header.extend(address.octets()),
                IpAddr::V4(_) => unreachable!("addresses of both versions"),
            }
        }
        [header, extensions, inner.to_vec()].concat()
    }
}

impl Packet {
    pub fn build(&self) -> Vec<u8> {
        let network = &self.network;
        let inner = self.transport.bytes(network);
        let mut bytes = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        for tag in &network.tags {
            bytes.extend(tag.to_be_bytes());
            bytes.extend([0, 100]);
        }
        let ip = bytes.len() + 2;
        if network.src.is_ipv4() {
            bytes.extend([8, 0]);
            bytes.extend(network.v4(&inner));
        } else {
            bytes.extend([0x86, 0xdd]);
            bytes.extend(network.v6(&inner));
        }
        let transport = bytes.len() - inner.len();
        bytes.extend(&self.trailer);
        for damage in &self.damages {
            damage.apply(&mut bytes, ip, transport, network.src.is_ipv4());
        }
        bytes
    }
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>, ip: usize, transport: usize, v4: bool) {
        let length = ip + if v4 { 2 } else { 4 };
        match *self {
            Damage::IpLength(by) if length + 2 <= bytes.len() => {
                let value = sums::read(bytes, length).wrapping_add_signed(by);
                put16(bytes, length, value);
            }
            Damage::IpLength(_) => {}
            Damage::IpLengthZero => put16(bytes, length, 0),
            Damage::DataOffset(by) => {
                if let Some(byte) = bytes.get_mut(transport + 12) {
                    *byte = byte.wrapping_add_signed(by << 4);
                }
            }
            Damage::Version(value) => {
                if let Some(byte) = bytes.get_mut(ip) {
                    *byte = value;
                }
            }
            Damage::EtherType(value) => put16(bytes, ip - 2, value),
            Damage::HeaderChecksum => put16(bytes, ip + 10, 0xffff),
            Damage::Byte { at, value } => {
                let at = 12 + at % (bytes.len() - 12);
                bytes[at] = value;
            }
            Damage::Cut(length) => bytes.truncate(length.max(14)),
        }
    }
}
