// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the headers of a frame are (IEEE 802.1Q, RFC 791, RFC 8200, RFC 9293).

use std::net::IpAddr;

use etherparse::err::tcp::HeaderSliceError;
use etherparse::{Ethernet2HeaderSlice, Ipv4HeaderSlice, Ipv6HeaderSlice, TcpHeaderSlice};

/// A reason as `stats` prints it.
pub type Reason = &'static str;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;

pub const HOP_BY_HOP: u8 = 0;
pub const ROUTING: u8 = 43;
pub const FRAGMENT: u8 = 44;
pub const AUTHENTICATION: u8 = 51;
pub const DESTINATION: u8 = 60;

pub const FIN: u16 = 0x01;
pub const SYN: u16 = 0x02;
pub const RST: u16 = 0x04;
pub const PSH: u16 = 0x08;
pub const ACK: u16 = 0x10;
pub const URG: u16 = 0x20;

/// What docs/policies.md and the reason `extension_headers` say of IPv6.
const MOST_EXTENSIONS: usize = 8;
const FARTHEST_TRANSPORT: usize = 0x1ff;
const MOST_TAGS: usize = 2;
const ETHERNET: usize = 14;
const IPV4: usize = 20;
const IPV6: usize = 40;
const TCP_HEADER: usize = 20;
/// Most bytes that IP's length fields can say.
const LENGTH_MAX: usize = 0xffff;

/// Whether a packet is a piece of a fragmented one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    Whole,
    First,
    Later,
}

/// An IP packet in a frame. Offsets count from the frame's first byte.
#[derive(Clone, Debug)]
pub struct Ip {
    pub at: usize,
    pub src: IpAddr,
    pub dst: IpAddr,
    pub protocol: u8,
    pub transport: usize,
    /// Where IP's length says that the packet ends; the frame may end before.
    pub end: usize,
    pub piece: Piece,
    /// A routing header names another destination than the IP header does.
    pub detour: bool,
    /// An authentication header signs the packet.
    pub signed: bool,
}

/// An address as what selectors and connections compare: IPv4 as mapped into IPv6 (RFC 4291,
/// 2.5.5.2), which nobody else uses on the wire.
pub fn as_number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// Ports of the transport protocols that have some; 0 for those that have none.
pub type Ports = (u16, u16);

/// A TCP segment whose whole header is there.
#[derive(Clone, Debug)]
pub struct Segment {
    pub ip: Ip,
    /// Bytes, options included.
    pub header: usize,
    pub flags: u16,
    pub ports: Ports,
    pub sequence: u32,
}

/// The first bytes of what is left of a frame, filled up with zeros: for what reads headers
/// further than it is asked to.
fn window(rest: &[u8], size: usize) -> Vec<u8> {
    let mut bytes = rest[..rest.len().min(size)].to_vec();
    bytes.resize(size, 0);
    bytes
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_be_bytes([bytes[0], bytes[1]]))
}

/// Finds the IP packet.
pub fn ip(frame: &[u8]) -> Result<Ip, Reason> {
    let ethernet = Ethernet2HeaderSlice::from_slice(frame).map_err(|_| "truncated")?;
    let mut kind = ethernet.ether_type().0;
    let mut at = ETHERNET;
    for _ in 0..MOST_TAGS {
        if kind == 0x8100 || kind == 0x88a8 {
            kind = word(frame, at + 2).ok_or("truncated")?;
            at += 4;
        }
    }
    match kind {
        0x0800 => ipv4(frame, at),
        0x86dd => ipv6(frame, at),
        _ => Err("not_ip"),
    }
}

fn ipv4(frame: &[u8], at: usize) -> Result<Ip, Reason> {
    let rest = frame.get(at..).unwrap_or_default();
    if rest.len() < IPV4 {
        return Err("truncated");
    }
    let bytes = window(rest, 60);
    let header = Ipv4HeaderSlice::from_slice(&bytes).map_err(|_| "bad_header")?;
    let length = match usize::from(header.total_len()) {
        0 if rest.len() > LENGTH_MAX => rest.len(),
        length => length,
    };
    if length < header.slice().len() {
        return Err("bad_header");
    }
    let piece = match (header.fragments_offset().value(), header.more_fragments()) {
        (0, false) => Piece::Whole,
        (0, true) => Piece::First,
        _ => Piece::Later,
    };
    Ok(Ip {
        at,
        src: header.source_addr().into(),
        dst: header.destination_addr().into(),
        protocol: header.protocol().0,
        transport: at + header.slice().len(),
        end: at + length,
        piece,
        detour: false,
        signed: false,
    })
}

fn ipv6(frame: &[u8], at: usize) -> Result<Ip, Reason> {
    let rest = frame.get(at..).unwrap_or_default();
    if rest.len() < IPV6 {
        return Err("truncated");
    }
    let header = Ipv6HeaderSlice::from_slice(rest).map_err(|_| "bad_header")?;
    let length = match usize::from(header.payload_length()) {
        0 if rest.len() - IPV6 > LENGTH_MAX => rest.len() - IPV6,
        length => length,
    };
    let mut ip = Ip {
        at,
        src: header.source_addr().into(),
        dst: header.destination_addr().into(),
        protocol: header.next_header().0,
        transport: at + IPV6,
        end: at + IPV6 + length,
        piece: Piece::Whole,
        detour: false,
        signed: false,
    };
    let mut count = 0;
    while ip.piece != Piece::Later && skip_extension(frame, &mut ip)? {
        count += 1;
        // a piece has no transport header to walk on to, be it said by the ninth
        let too_many = count > MOST_EXTENSIONS && ip.piece != Piece::Later;
        if too_many || ip.transport > FARTHEST_TRANSPORT {
            return Err("extension_headers");
        }
    }
    Ok(ip)
}

/// Moves behind an extension header (RFC 8200, 4; RFC 4302, 2). False: there is none.
fn skip_extension(frame: &[u8], ip: &mut Ip) -> Result<bool, Reason> {
    let kind = ip.protocol;
    if ![HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION].contains(&kind) {
        return Ok(false);
    }
    let head = frame
        .get(ip.transport..ip.transport + 8)
        .ok_or("truncated")?;
    let units = usize::from(head[1]);
    ip.protocol = head[0];
    ip.transport += match kind {
        FRAGMENT => 8,
        AUTHENTICATION => (units + 2) * 4,
        _ => (units + 1) * 8,
    };
    if kind == FRAGMENT {
        let position = u16::from_be_bytes([head[2], head[3]]);
        match (position >> 3, position & 1) {
            (0, 0) => {}
            (0, _) => ip.piece = Piece::First,
            _ => ip.piece = Piece::Later,
        }
    }
    ip.signed |= kind == AUTHENTICATION;
    ip.detour |= kind == ROUTING && head[3] != 0;
    Ok(true)
}

impl Ip {
    pub fn has_ports(&self) -> bool {
        [TCP, UDP, SCTP].contains(&self.protocol)
    }

    pub fn ports(&self, frame: &[u8]) -> Result<Ports, Reason> {
        if !self.has_ports() {
            return Ok((0, 0));
        }
        if self.piece == Piece::Later {
            return Err("fragment");
        }
        let whole = &frame[..frame.len().min(self.end)];
        match (word(whole, self.transport), word(whole, self.transport + 2)) {
            (Some(src), Some(dst)) => Ok((src, dst)),
            _ => Err("truncated"),
        }
    }
}

/// Finds the TCP segment.
pub fn tcp(frame: &[u8]) -> Result<Segment, Reason> {
    let ip = ip(frame)?;
    if ip.protocol != TCP {
        return Err("not_tcp");
    }
    if ip.piece == Piece::Later {
        return Err("fragment");
    }
    let rest = frame.get(ip.transport..).unwrap_or_default();
    if rest.len() < TCP_HEADER {
        return Err("truncated");
    }
    let bytes = window(rest, 60);
    let header = TcpHeaderSlice::from_slice(&bytes).map_err(|error| match error {
        HeaderSliceError::Len(_) => "truncated",
        HeaderSliceError::Content(_) => "bad_header",
    })?;
    let length = header.slice().len();
    if ip.transport + length > ip.end {
        return Err("bad_header");
    }
    if length > rest.len() {
        return Err("truncated");
    }
    Ok(Segment {
        header: length,
        flags: u16::from_be_bytes([bytes[12], bytes[13]]) & 0x1ff,
        ports: (header.source_port(), header.destination_port()),
        sequence: header.sequence_number(),
        ip,
    })
}

/// As [`tcp`], for what changes the segment.
pub fn tcp_to_change(frame: &[u8]) -> Result<Segment, Reason> {
    let segment = tcp(frame)?;
    if segment.ip.signed {
        return Err("authenticated");
    }
    Ok(segment)
}

impl Segment {
    /// Where the payload begins.
    pub fn payload(&self) -> usize {
        self.ip.transport + self.header
    }

    pub fn is_bare(&self) -> bool {
        self.payload() == self.ip.end
    }

    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    pub fn options<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        &frame[self.ip.transport + TCP_HEADER..self.payload()]
    }
}
