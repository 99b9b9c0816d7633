// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether a packet came out as sound as it went in, judged without the code under test: headers
//! are found and sums are made by etherparse.
//!
//! A capture holds packets whose checksums are right, packets of its own host whose TCP checksum is
//! only the sum of the pseudo-header (the device was to add the rest), packets it cut short, and
//! packets that are simply wrong. Of each, more can be asked than that right ones stay right: an
//! edit that accounts for exactly what it changed keeps the difference between a checksum and the
//! right one. That can be told of a cut packet, too, as what is missing does not change.

use std::ops::Range;

use etherparse::checksum::Sum16BitWords;
use etherparse::{
    IpNumber, Ipv6ExtensionSlice, LaxNetSlice, LaxSlicedPacket, TcpSlice, TransportSlice,
};
use policy_chain::hook::Hook;

/// Shortest Ethernet frame, without its check sequence, in bytes.
const SHORTEST_FRAME: usize = 60;
const MACS: Range<usize> = 0..12;

/// What a chain may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Nothing,
    /// Window, options and checksum of TCP, with the lengths that follow.
    Tcp,
    /// The same, and TCP flags.
    Reset,
    /// MAC addresses and TTL, and a TCP checksum that was left to the device.
    Route,
}

/// What a TCP checksum field holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    Right,
    /// The sum of the pseudo-header: the rest is left to the device.
    Partial,
    /// Not right, or the capture has only a part of the segment.
    Other,
}

#[derive(Debug)]
struct Tcp {
    /// Offset in the frame.
    at: usize,
    /// Bytes of the header.
    header: usize,
    check: Check,
    /// How far the checksum is from a right one, as far as the segment is there.
    deviation: u16,
}

/// Where things are in a frame, and what its checksums are worth.
#[derive(Debug)]
pub struct Facts {
    ip: usize,
    version: u8,
    /// End of the IP packet, by its length.
    end: usize,
    ipv4_check_is_right: Option<bool>,
    tcp: Option<Tcp>,
}

impl Facts {
    /// None of a frame without an IP header.
    pub fn of(frame: &[u8]) -> Option<Facts> {
        let packet = LaxSlicedPacket::from_ethernet(frame).ok()?;
        let mut facts = match packet.net.as_ref()? {
            LaxNetSlice::Ipv4(net) => {
                let header = net.header();
                let ip = offset(frame, header.slice());
                let right = header.to_header().calc_header_checksum();
                Facts {
                    ip,
                    version: 4,
                    end: ip + usize::from(header.total_len()),
                    ipv4_check_is_right: Some(header.header_checksum() == right),
                    tcp: None,
                }
            }
            LaxNetSlice::Ipv6(net) => {
                let header = net.header();
                let ip = offset(frame, header.slice());
                Facts {
                    ip,
                    version: 6,
                    end: ip + header.slice().len() + usize::from(header.payload_length()),
                    ipv4_check_is_right: None,
                    tcp: None,
                }
            }
            LaxNetSlice::Arp(_) => return None,
        };
        if let Some(TransportSlice::Tcp(tcp)) = &packet.transport {
            let at = offset(frame, tcp.slice());
            facts.tcp = facts.tcp(frame, at, tcp.header_slice().len());
        } else if let Some(tcp) = tcp_of_first_fragment(packet.net.as_ref()?) {
            let at = offset(frame, tcp.slice());
            let tcp = facts.tcp(frame, at, tcp.header_slice().len());
            // Of what, the other fragments say.
            let check = Check::Other;
            facts.tcp = tcp.map(|tcp| Tcp { check, ..tcp });
        }
        Some(facts)
    }

    fn tcp(&self, frame: &[u8], at: usize, header: usize) -> Option<Tcp> {
        let length = self.end.checked_sub(at)?;
        let segment = frame.get(at..self.end.min(frame.len()))?;
        let field = segment.get(16..18)?;
        let pseudo = self.addresses(frame)?;
        let pseudo = Sum16BitWords::new()
            .add_slice(pseudo)
            .add_2bytes([0, 6])
            .add_slice(&u32::try_from(length).ok()?.to_be_bytes());
        let deviation = match !pseudo.clone().add_slice(segment).ones_complement() {
            0xffff => 0,
            sum => sum,
        };
        let check = if field == (!pseudo.ones_complement()).to_ne_bytes() {
            Check::Partial
        } else if deviation == 0 && segment.len() == length {
            Check::Right
        } else {
            Check::Other
        };
        Some(Tcp {
            at,
            header,
            check,
            deviation,
        })
    }

    /// Source and destination.
    fn addresses<'a>(&self, frame: &'a [u8]) -> Option<&'a [u8]> {
        match self.version {
            4 => frame.get(self.ip + 12..self.ip + 20),
            _ => frame.get(self.ip + 8..self.ip + 40),
        }
    }

    /// The TCP checksum, of a frame that has one.
    pub fn check(&self) -> Option<Check> {
        self.tcp.as_ref().map(|tcp| tcp.check)
    }

    /// The frame without what `change` may change: equal before and after.
    fn lasting(&self, frame: &[u8], change: Change) -> Vec<u8> {
        let mut masked = frame.to_vec();
        let mut blank = |range: Range<usize>| {
            if let Some(bytes) = masked.get_mut(range) {
                bytes.fill(0);
            }
        };
        let (length, ttl) = match self.version {
            4 => (2..4, 8..9),
            _ => (4..6, 7..8),
        };
        let in_ip = |range: Range<usize>| self.ip + range.start..self.ip + range.end;
        if self.version == 4 {
            blank(in_ip(10..12));
        }
        match change {
            Change::Nothing => {}
            Change::Tcp | Change::Reset => blank(in_ip(length)),
            Change::Route => {
                blank(MACS);
                blank(in_ip(ttl));
            }
        }
        let Some(tcp) = &self.tcp else {
            masked.truncate(self.end);
            return masked;
        };
        blank(tcp.at + 16..tcp.at + 18);
        if change == Change::Reset {
            blank(tcp.at + 13..tcp.at + 14);
        }
        if change == Change::Tcp || change == Change::Reset {
            blank(tcp.at + 14..tcp.at + 16);
            if let Some(byte) = masked.get_mut(tcp.at + 12) {
                *byte &= 0x0f;
            }
            masked.truncate(self.end);
            let options = tcp.at + 20..(tcp.at + tcp.header).min(masked.len());
            masked.drain(options);
        }
        masked.truncate(self.end);
        masked
    }

    fn has_payload(&self) -> bool {
        let tcp = self.tcp.as_ref();
        tcp.is_some_and(|tcp| tcp.at + tcp.header < self.end)
    }
}

/// The first bytes of a segment that comes in pieces.
fn tcp_of_first_fragment<'a>(net: &LaxNetSlice<'a>) -> Option<TcpSlice<'a>> {
    let (first, payload) = match net {
        LaxNetSlice::Ipv4(net) => {
            let offset = net.header().fragments_offset();
            (offset.value() == 0, net.payload())
        }
        LaxNetSlice::Ipv6(net) => {
            let is_later = |extension| match extension {
                Ipv6ExtensionSlice::Fragment(header) => header.fragment_offset().value() != 0,
                _ => false,
            };
            let mut extensions = net.extensions().clone().into_iter();
            (!extensions.any(is_later), net.payload())
        }
        LaxNetSlice::Arp(_) => return None,
    };
    let holds_it = first && payload.fragmented && payload.ip_number == IpNumber::TCP;
    TcpSlice::from_slice(payload.payload)
        .ok()
        .filter(|_| holds_it)
}

fn offset(outer: &[u8], inner: &[u8]) -> usize {
    (inner.as_ptr() as usize).saturating_sub(outer.as_ptr() as usize)
}

/// What is wrong with a frame that came out, if anything.
pub fn verify(change: Change, hook: Hook, before: &[u8], after: &[u8]) -> Result<(), String> {
    if before == after {
        return Ok(());
    }
    if change == Change::Nothing {
        return Err("it was changed".to_owned());
    }
    let Some(was) = Facts::of(before) else {
        // Only its MAC addresses can have been of any use.
        let same = change == Change::Route && before.get(12..) == after.get(12..);
        return same
            .then_some(())
            .ok_or_else(|| "it is no IP packet, and was changed".to_owned());
    };
    let Some(is) = Facts::of(after) else {
        return Err("it is no IP packet any more".to_owned());
    };
    lengths(&was, before, &is, after)?;
    if was.lasting(before, change) != is.lasting(after, change) {
        return Err("bytes changed that are not the chain's to change".to_owned());
    }
    if was.ipv4_check_is_right == Some(true) && is.ipv4_check_is_right != Some(true) {
        return Err("the IPv4 checksum is wrong".to_owned());
    }
    match (&was.tcp, &is.tcp) {
        (Some(was), Some(is)) => checksums(change, hook, was, is),
        (None, None) => Ok(()),
        _ => Err("the TCP header is lost".to_owned()),
    }
}

fn lengths(was: &Facts, before: &[u8], is: &Facts, after: &[u8]) -> Result<(), String> {
    let header = |facts: &Facts| facts.tcp.as_ref().map_or(0, |tcp| tcp.header);
    if is.end + header(was) != was.end + header(is) {
        return Err(format!(
            "IP ends at {} in place of {}, the TCP header has {} bytes in place of {}",
            is.end,
            was.end,
            header(is),
            header(was)
        ));
    }
    let have = before.len();
    let expected = if is.end == was.end {
        have
    } else if is.end > was.end {
        have.max(is.end)
    } else if was.has_payload() {
        have.saturating_sub(was.end - is.end)
    } else {
        is.end.max(have.min(SHORTEST_FRAME))
    };
    if after.len() != expected {
        return Err(format!("{} bytes in place of {expected}", after.len()));
    }
    // Payload that moved takes with it what is behind it; else nothing there moves. What a header
    // without payload leaves behind is cleared.
    let moved = is.end < was.end && was.has_payload();
    let from = if moved { was.end } else { is.end };
    let mut behind = before.get(from..).unwrap_or_default().to_vec();
    let left = was.end.saturating_sub(from).min(behind.len());
    behind[..left].fill(0);
    let found = after.get(is.end..).unwrap_or_default();
    match found == &behind[..found.len().min(behind.len())] {
        true => Ok(()),
        false => Err("bytes behind the IP packet changed".to_owned()),
    }
}

fn checksums(change: Change, hook: Hook, was: &Tcp, is: &Tcp) -> Result<(), String> {
    let completed = change == Change::Route && is.check == Check::Right;
    let kept = match (was.check, hook) {
        (Check::Right, _) => is.check == Check::Right,
        (Check::Partial, Hook::Xdp) => is.check == Check::Partial || completed,
        // TC is told that a packet is partial, and of these it is not.
        _ => is.deviation == was.deviation,
    };
    match kept {
        true => Ok(()),
        false => Err(format!(
            "the TCP checksum was {:?}, {:#06x} off, and is {:?}, {:#06x} off",
            was.check, was.deviation, is.check, is.deviation
        )),
    }
}
