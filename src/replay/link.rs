// SPDX-License-Identifier: MIT OR Apache-2.0
//! Link layers of captures, and the Ethernet frames that policies need.
//!
//! A packet of a link layer other than Ethernet gets a **synthetic Ethernet header**:
//!
//! | link type | destination | source | EtherType |
//! |---|---|---|---|
//! | raw IP (101, 12, 14) | [`SYNTHETIC_DESTINATION`] | [`SYNTHETIC_SOURCE`] | IPv4 or IPv6 by the version field, else [`ETHERTYPE_NONE`] |
//! | IPv4 (228), IPv6 (229) | the same | the same | IPv4, IPv6 |
//! | Linux cooked v1 (113), v2 (276) | the same | the cooked address if it has six bytes, else the same | the cooked protocol |
//!
//! What a frame becomes when it is written:
//!
//! - Ethernet: the frame itself.
//! - Raw IP: what follows the Ethernet header and its VLAN tags. A changed address, EtherType or
//!   tag has no place in such a capture and is lost.
//! - Linux cooked: the header as read, with the frame's EtherType as protocol (a VLAN tag stays:
//!   cooked captures hold it as protocol 0x8100), and the frame's source as address if the
//!   capture had a six-byte address there. The destination is lost.

/// Destination of a synthetic Ethernet header.
pub const SYNTHETIC_DESTINATION: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Source of a synthetic Ethernet header.
pub const SYNTHETIC_SOURCE: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// EtherType of a raw IP packet that is neither IPv4 nor IPv6 (a value IEEE reserves).
pub const ETHERTYPE_NONE: u16 = 0xffff;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;
const ETHERNET_HEADER: usize = 14;
const VLAN_TAG: usize = 4;

/// The supported link types, for messages.
pub const SUPPORTED: &str = "Ethernet (1), raw IP (101, 12, 14), IPv4 (228), IPv6 (229), \
                         Linux cooked v1 (113) or Linux cooked v2 (276)";

/// Where the fields stand in a Linux cooked header; all are in network byte order.
#[derive(Debug, PartialEq, Eq)]
pub struct Cooked {
    len: usize,
    protocol: usize,
    /// The low byte of the address length.
    address_len: usize,
    address: usize,
}

static COOKED_V1: Cooked = Cooked {
    len: 16,
    protocol: 14,
    address_len: 5,
    address: 6,
};
static COOKED_V2: Cooked = Cooked {
    len: 20,
    protocol: 0,
    address_len: 11,
    address: 12,
};

impl Cooked {
    /// The address, if it is a MAC address.
    fn mac(&self, header: &[u8]) -> Option<std::ops::Range<usize>> {
        (header[self.address_len] == 6).then_some(self.address..self.address + 6)
    }
}

/// Offset of what follows the Ethernet header and the VLAN tags; past the end if they are cut.
fn payload_offset(frame: &[u8]) -> usize {
    let mut offset = ETHERNET_HEADER;
    while let Some(ethertype) = frame.get(offset - 2..offset) {
        match u16::from_be_bytes([ethertype[0], ethertype[1]]) {
            ETHERTYPE_VLAN | ETHERTYPE_QINQ => offset += VLAN_TAG,
            _ => break,
        }
    }
    offset
}

fn ethernet(source: &[u8], ethertype: &[u8], payload: &[u8]) -> Vec<u8> {
    [&SYNTHETIC_DESTINATION, source, ethertype, payload].concat()
}

/// The supported link types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkType {
    Ethernet,
    /// IP, with its EtherType if it is only one of the two.
    Ip(Option<u16>),
    Cooked(&'static Cooked),
}

impl LinkType {
    pub fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => LinkType::Ethernet,
            12 | 14 | 101 => LinkType::Ip(None),
            113 => LinkType::Cooked(&COOKED_V1),
            228 => LinkType::Ip(Some(ETHERTYPE_IPV4)),
            229 => LinkType::Ip(Some(ETHERTYPE_IPV6)),
            276 => LinkType::Cooked(&COOKED_V2),
            _ => return None,
        })
    }

    /// Bytes of the header that is replaced by a synthetic one.
    pub fn header_len(self) -> usize {
        match self {
            LinkType::Ethernet | LinkType::Ip(_) => 0,
            LinkType::Cooked(layout) => layout.len,
        }
    }

    /// The frame for a captured packet, whose header and payload are given.
    pub fn frame(self, header: &[u8], payload: &[u8]) -> Vec<u8> {
        match self {
            LinkType::Ethernet => payload.to_vec(),
            LinkType::Ip(ethertype) => {
                let ethertype = ethertype.unwrap_or(match payload.first().map(|byte| byte >> 4) {
                    Some(4) => ETHERTYPE_IPV4,
                    Some(6) => ETHERTYPE_IPV6,
                    _ => ETHERTYPE_NONE,
                });
                ethernet(&SYNTHETIC_SOURCE, &ethertype.to_be_bytes(), payload)
            }
            LinkType::Cooked(layout) => {
                let source = layout
                    .mac(header)
                    .map_or(&SYNTHETIC_SOURCE[..], |mac| &header[mac]);
                let protocol = &header[layout.protocol..layout.protocol + 2];
                ethernet(source, protocol, payload)
            }
        }
    }

    /// The packet that `frame` stands for; `header` is the one that was replaced.
    pub fn restore(self, header: &[u8], frame: &[u8]) -> Vec<u8> {
        let layout = match self {
            LinkType::Ethernet => return frame.to_vec(),
            LinkType::Ip(_) => return frame.get(payload_offset(frame)..).unwrap_or(&[]).to_vec(),
            LinkType::Cooked(layout) => layout,
        };
        let mut packet = header.to_vec();
        if let Some((ethernet, payload)) = frame.split_at_checked(ETHERNET_HEADER) {
            packet[layout.protocol..layout.protocol + 2].copy_from_slice(&ethernet[12..14]);
            if let Some(mac) = layout.mac(header) {
                packet[mac].copy_from_slice(&ethernet[6..12]);
            }
            packet.extend_from_slice(payload);
        }
        packet
    }
}
