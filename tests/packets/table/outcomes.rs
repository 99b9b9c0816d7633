// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an action is to make of a packet, told without the code under test.

use etherparse::checksum::Sum16BitWords;
use policy_chain::hook::Family;

use crate::frames::*;
use crate::mptcp;
use crate::wire;

pub const NEW_WINDOW: u16 = 9;
/// What both ends of a connection scale by, in bits.
pub const SCALE: u8 = 3;
const NEW_MSS: [u8; 4] = [2, 4, 0x02, 0x18];
/// 253 is for experiments (RFC 4727); the table's other options are of the other such kind.
pub const INSERTED: [u8; 4] = [253, 4, 0xaa, 0xbb];
pub const OTHER: u8 = 254;
pub const MPTCP: u8 = 30;
pub const NOP: u8 = 1;

/// What an action is to make of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Window,
    Mss,
    Nop,
    Remove,
    Insert,
    /// An MPTCP option is added, too.
    Add(Added),
    /// The packet becomes a RST.
    Reset,
    /// It stays as it is, and something is remembered.
    Note,
    Send {
        routed: bool,
    },
}

/// Options that actions add to packets of an established subflow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Added {
    Prio,
    Removed,
    Address,
    Held,
}

/// The id of an address that is added or removed.
pub const ADDRESS_ID: u8 = 5;
pub const ADDRESS: [u8; 4] = [10, 9, 8, 7];
/// MP_TCPRST, for an administrative reason (RFC 8684, 3.6).
const RESET: [u8; 4] = [MPTCP, 4, 0x80, 3];

impl Added {
    /// The option, in a segment of the client.
    pub fn option(self) -> Vec<u8> {
        match self {
            Added::Prio => vec![MPTCP, 3, 0x51],
            Added::Removed => vec![MPTCP, 4, 0x40, ADDRESS_ID],
            Added::Address => mptcp::add_addr_of_client(ADDRESS_ID, ADDRESS.into()),
            Added::Held => mptcp::announcement(ADDRESS_ID, 16),
        }
    }
}

pub fn transport_offset(frame: &Frame) -> usize {
    let extensions: usize = frame.extensions.iter().map(|(_, bytes)| bytes.len()).sum();
    let ip = if frame.src.is_ipv4() { 20 } else { 40 };
    14 + 4 * frame.tags.len() + ip + frame.ip_options.len() + extensions
}

/// A super-packet cut up as the kernel does: RFC 9293 segments in a row, flags of the end on the
/// last, IPv4 identifications counting up.
pub fn segments(frame: &Frame, size: usize) -> Vec<Vec<u8>> {
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

fn without_nops_at_end(mut options: Vec<&[u8]>) -> Vec<&[u8]> {
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
    after.ip_length = before
        .ip_length
        .map(|length| (i32::from(length) + by) as u16);
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
    pub fn outcomes(self, before: &Frame, family: Family) -> Vec<(&'static str, Frame)> {
        let outcomes = match self {
            Change::Window => vec![("done", before.clone().window(NEW_WINDOW))],
            Change::Mss => Change::mss(before),
            Change::Nop => Change::nop(before),
            Change::Remove => Change::remove(before),
            Change::Insert => Change::insert(before, &INSERTED),
            Change::Add(added) => Change::insert(before, &added.option()),
            Change::Reset => Change::reset(before),
            Change::Note => vec![("noted", before.clone())],
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
        if options.len() >= before.options.len() {
            return vec![];
        }
        let after = with_options(before, options);
        // Nobody reads what is behind a packet in the shortest of frames.
        let mut cleared = after.clone();
        cleared.trailer.fill(0);
        vec![("shrunk", after), ("shrunk", cleared)]
    }

    fn reset(before: &Frame) -> Vec<(&'static str, Frame)> {
        let mut rest = before.clone();
        let mut options = walk(&before.options).unwrap_or_default();
        options.retain(|option| option[0] != MPTCP);
        rest.options = options.concat();
        let missing = before.options.len().saturating_sub(rest.options.len());
        rest.options.resize(rest.options.len() + missing, NOP);
        let results = Change::insert(&rest, &RESET).into_iter();
        let flags = (before.flags | RST) & !(FIN | SYN | PSH);
        let results = results.map(|(word, after)| {
            let word = if word == "grown" { word } else { "done" };
            let mut whole = with_options(before, after.options);
            whole.flags = flags;
            (word, whole)
        });
        results.collect()
    }

    fn insert(before: &Frame, option: &[u8]) -> Vec<(&'static str, Frame)> {
        let Some(options) = walk(&before.options) else {
            return vec![];
        };
        let squeezed = options.iter().copied().filter(|it| *it != [NOP]).collect();
        let ways = [without_nops_at_end(options), squeezed];
        let results = ways.into_iter().map(|mut options| {
            options.push(option);
            joined(&options, before.options.len())
        });
        let results = results
            .filter(|options| options.len() <= 40)
            .map(|options| {
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
