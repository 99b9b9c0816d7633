// SPDX-License-Identifier: MIT OR Apache-2.0
//! Internet checksums, summed by etherparse.

use std::net::IpAddr;

use etherparse::checksum::Sum16BitWords;
use etherparse::{NetSlice, SlicedPacket, TransportSlice};

use crate::layers::{Ip, Piece, TCP, UDP};

/// The folded sum, not complemented.
fn folded(sum: Sum16BitWords) -> u16 {
    !sum.ones_complement().to_be()
}

fn pseudo_header(src: IpAddr, dst: IpAddr, protocol: u8, length: usize) -> Sum16BitWords {
    let sum = Sum16BitWords::new()
        .add_2bytes([0, protocol])
        .add_slice(&(length as u32).to_be_bytes());
    let add = |sum: Sum16BitWords, address| match address {
        IpAddr::V4(address) => sum.add_slice(&address.octets()),
        IpAddr::V6(address) => sum.add_slice(&address.octets()),
    };
    add(add(sum, src), dst)
}

/// The sum that a field holds whose checksum somebody else is to complete.
pub fn seed(src: IpAddr, dst: IpAddr, protocol: u8, length: usize) -> u16 {
    folded(pseudo_header(src, dst, protocol, length))
}

/// The checksum of a segment in whose field there are zeros.
pub fn checksum(src: IpAddr, dst: IpAddr, protocol: u8, segment: &[u8]) -> u16 {
    !folded(pseudo_header(src, dst, protocol, segment.len()).add_slice(segment))
}

/// The checksum of an IPv4 header in whose field there are zeros.
pub fn header_checksum(header: &[u8]) -> u16 {
    !folded(Sum16BitWords::new().add_slice(header))
}

/// The field of data that changed, when it was `field` before: as right, or as wrong by as much.
/// `before` and `after` are sums of the data without the field.
fn carried_over(field: u16, before: u16, after: u16) -> u16 {
    let sum = u32::from(!field) + u32::from(!before) + u32::from(after);
    match sum % 0xffff {
        0 => 0,
        sum => !(sum as u16),
    }
}

/// How far the checksum of a TCP or UDP header is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Complete,
    Partial,
    Unclear,
}

/// The field of TCP or UDP in a frame.
pub fn field_at(ip: &Ip) -> usize {
    ip.transport + if ip.protocol == UDP { 6 } else { 16 }
}

pub fn read(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

pub fn write(frame: &mut [u8], at: usize, value: u16) {
    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

impl Kind {
    /// What XDP can tell of a packet whose checksum field is there.
    pub fn on_xdp(frame: &[u8], ip: &Ip) -> Kind {
        let length = ip.end.saturating_sub(ip.transport);
        let field = read(frame, field_at(ip));
        if ip.piece != Piece::Whole {
            return Kind::Complete;
        }
        if ip.detour {
            return Kind::Unclear;
        }
        if field != seed(ip.src, ip.dst, ip.protocol, length) {
            return Kind::Complete;
        }
        let whole = frame.get(ip.transport..ip.end);
        let whole = whole.filter(|whole| whole.len() <= 0x10000);
        match whole.map(|whole| checksum(ip.src, ip.dst, ip.protocol, whole)) {
            Some(0) => Kind::Unclear,
            _ => Kind::Partial,
        }
    }
}

/// The sum of a segment without its checksum field, as far as it is in the frame.
fn segment_sum(frame: &[u8], ip: &Ip) -> u16 {
    let mut segment = frame[ip.transport..ip.end.min(frame.len())].to_vec();
    write(&mut segment, field_at(ip) - ip.transport, 0);
    folded(pseudo_header(ip.src, ip.dst, ip.protocol, ip.end - ip.transport).add_slice(&segment))
}

/// Sets the TCP checksum of `after`, which was `before`.
pub fn update(kind: Kind, before: (&[u8], &Ip), after: (&mut [u8], &Ip)) {
    let field = read(before.0, field_at(before.1));
    let by = (after.1.end - after.1.transport) as i64 - (before.1.end - before.1.transport) as i64;
    let new = match kind {
        Kind::Partial if by == 0 => field,
        Kind::Partial => !carried_over(!field, 0, (by.rem_euclid(0xffff)) as u16),
        Kind::Complete | Kind::Unclear => carried_over(
            field,
            segment_sum(before.0, before.1),
            segment_sum(after.0, after.1),
        ),
    };
    write(after.0, field_at(after.1), new);
}

/// Sets the checksum of an IPv4 header that had another length field.
pub fn update_header(before: &[u8], after: &mut [u8]) {
    let sum = |header: &[u8]| {
        let mut header = header.to_vec();
        write(&mut header, 10, 0);
        folded(Sum16BitWords::new().add_slice(&header))
    };
    let field = carried_over(read(before, 10), sum(before), sum(after));
    write(after, 10, field);
}

/// Fills in a checksum that was left to a device.
pub fn complete(frame: &mut [u8], ip: &Ip) {
    let at = field_at(ip);
    write(frame, at, 0);
    let sum = checksum(ip.src, ip.dst, ip.protocol, &frame[ip.transport..ip.end]);
    // UDP: zero says that there is no checksum (RFC 768)
    let sum = if ip.protocol == UDP && sum == 0 {
        0xffff
    } else {
        sum
    };
    write(frame, at, sum);
}

/// What a receiver that knows nothing of us says of a frame's checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Right,
    /// TCP's field holds the sum of the pseudo-header; IPv4's is right.
    Seed,
    Wrong,
    /// No whole TCP segment.
    None,
}

/// Checks a frame with etherparse's own parsing of whole packets.
pub fn verify(frame: &[u8]) -> Verdict {
    let Ok(packet) = SlicedPacket::from_ethernet(frame) else {
        return Verdict::None;
    };
    let Some(TransportSlice::Tcp(tcp)) = &packet.transport else {
        return Verdict::None;
    };
    let length = tcp.slice().len();
    let (src, dst, header) = match &packet.net {
        Some(NetSlice::Ipv4(ip)) => {
            let header = ip.header();
            let right = header.to_header().calc_header_checksum();
            let (src, dst) = (header.source_addr(), header.destination_addr());
            (src.into(), dst.into(), header.header_checksum() == right)
        }
        Some(NetSlice::Ipv6(ip)) => {
            let header = ip.header();
            let (src, dst) = (header.source_addr(), header.destination_addr());
            (src.into(), dst.into(), true)
        }
        _ => return Verdict::None,
    };
    if !header {
        Verdict::Wrong
    } else if checksum(src, dst, TCP, tcp.slice()) == 0 {
        Verdict::Right
    } else if tcp.checksum() == seed(src, dst, TCP, length) {
        Verdict::Seed
    } else {
        Verdict::Wrong
    }
}
