// SPDX-License-Identifier: MIT OR Apache-2.0
//! Multipath TCP (RFC 8684): what packets say of subflows and connections, and what is held back.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

use crate::layers::{self, ACK, FIN, Piece, RST, Reason, SYN, Segment};
use crate::options::{Bytes, MPTCP, Options};

pub const MP_CAPABLE: u8 = 0;
pub const MP_JOIN: u8 = 1;
pub const DSS: u8 = 2;
pub const ADD_ADDR: u8 = 3;
pub const REMOVE_ADDR: u8 = 4;
pub const MP_PRIO: u8 = 5;
const LAST_SUBTYPE: u8 = 8;
/// Bits of the fourth byte of DSS.
const DATA_ACK: u8 = 1;
const DATA_ACK_64: u8 = 2;
const MAPPING: u8 = 4;
const SEQUENCE_64: u8 = 8;
const DATA_FIN: u8 = 0x10;
const MP_FASTCLOSE: u8 = 7;
/// Ids of a REMOVE_ADDR that are heeded.
const MOST_REMOVED: usize = 8;
/// Bytes that an old segment is behind at most.
const FURTHEST_BEHIND: u32 = 1 << 24;
/// Bytes of headers that are kept of a segment.
const LONGEST_HEADERS: usize = 256;

/// Addresses an end has held, by the two low bits of their ids.
const SLOTS: usize = 4;
const LONGEST_ADD_ADDR: usize = 30;

/// Both ends' addresses and ports, the lower first.
pub type Flow = [(u128, u16); 2];

/// What is known of an end of a subflow.
#[derive(Clone, Copy, Debug, Default)]
struct End {
    token: Option<u32>,
    /// DSS options that it has sent, up to 2.
    dss: u8,
}

#[derive(Clone, Debug, Default)]
struct Subflow {
    /// Who sent its SYN, and that one's sequence number.
    syn: Option<(usize, u32)>,
    /// An answer to the SYN, keys, an HMAC or DSS have shown MPTCP.
    agreed: bool,
    /// The answer had nothing of MPTCP: it is TCP.
    refused: bool,
    ends: [End; 2],
}

/// What all packets before have told.
#[derive(Clone, Debug, Default)]
pub struct Subflows {
    flows: HashMap<Flow, Subflow>,
    /// The peer's token of a connection.
    peers: HashMap<u32, u32>,
    /// Own and the peer's key, by own token.
    keys: HashMap<u32, [[u8; 8]; 2]>,
    held: HashMap<(Flow, usize), [Option<Held>; SLOTS]>,
    /// Behind the last byte that an end has sent.
    sent: HashMap<(Flow, usize), u32>,
}

/// An announcement that is held.
#[derive(Clone, Debug)]
struct Held {
    option: Bytes,
    /// It was given, and nobody has echoed it.
    given: bool,
}

/// A segment as policies on MPTCP see it.
pub struct Signals {
    pub segment: Segment,
    pub flow: Flow,
    /// Which end of the flow sent it.
    pub sender: usize,
    /// The first option of each subtype; none of a malformed list.
    first: BTreeMap<u8, Bytes>,
}

pub fn flow(ip: &layers::Ip, ports: layers::Ports) -> (Flow, usize) {
    let source = (layers::as_number(ip.src), ports.0);
    let destination = (layers::as_number(ip.dst), ports.1);
    let sender = usize::from(destination < source);
    ([source.min(destination), source.max(destination)], sender)
}

/// Subtype of an MPTCP option that has one.
pub fn subtype(option: &[u8]) -> Option<u8> {
    match option {
        [MPTCP, _, third, ..] => Some(third >> 4),
        _ => None,
    }
}

/// An announcement that is no echo.
pub fn announces(option: &[u8]) -> bool {
    subtype(option) == Some(ADD_ADDR) && option[2] & 1 == 0
}

pub fn token(key: &[u8]) -> u32 {
    let hash = Sha256::digest(key);
    u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]])
}

impl Signals {
    pub fn of(frame: &[u8]) -> Result<Signals, Reason> {
        let segment = layers::tcp(frame)?;
        let (flow, sender) = flow(&segment.ip, segment.ports);
        let mut first = BTreeMap::new();
        if let Ok(options) = Options::parse(segment.options(frame)) {
            for option in &options.list {
                if let Some(subtype) = subtype(option).filter(|it| *it <= LAST_SUBTYPE) {
                    first.entry(subtype).or_insert_with(|| option.clone());
                }
            }
        }
        Ok(Signals {
            segment,
            flow,
            sender,
            first,
        })
    }

    pub fn has(&self, subtype: u8) -> bool {
        self.first.contains_key(&subtype)
    }

    /// The first option of a subtype, of at least so many bytes.
    pub fn option(&self, subtype: u8, least: usize) -> Option<&Bytes> {
        let option = self.first.get(&subtype);
        option.filter(|option| option.len() >= least)
    }

    /// Behind its last byte in the stream.
    fn sequence_end(&self) -> u32 {
        let segment = &self.segment;
        let payload = segment.ip.end - segment.ip.transport - segment.header;
        segment.sequence.wrapping_add(payload as u32)
    }

    /// Whether it tells how far its end has come: it can be said again as an acknowledgement.
    fn can_be_said_again(&self) -> bool {
        let segment = &self.segment;
        segment.ip.piece == Piece::Whole
            && segment.ip.transport + segment.header <= LONGEST_HEADERS
            && ![SYN, FIN, RST].iter().any(|flag| segment.has(*flag))
            && !self.has(MP_CAPABLE)
            && !self.has(MP_FASTCLOSE)
    }

    /// A DSS without which nothing is lost.
    pub fn acknowledges_only(&self) -> bool {
        let dss = self.option(DSS, 4);
        dss.is_some_and(|dss| dss[3] & (MAPPING | DATA_FIN) == 0)
    }

    /// The mapping that is none, by which an end falls back to TCP (3.7).
    fn falls_back(&self, dss: &[u8]) -> bool {
        if dss[3] & MAPPING == 0 {
            return false;
        }
        let acknowledgment = match dss[3] & (DATA_ACK | DATA_ACK_64) {
            0 | DATA_ACK_64 => 0,
            DATA_ACK => 4,
            _ => 8,
        };
        let sequence = if dss[3] & SEQUENCE_64 != 0 { 8 } else { 4 };
        let at = 4 + acknowledgment + sequence + 4;
        dss.get(at..at + 2) == Some(&[0, 0])
    }
}

impl Subflow {
    fn agrees(&self) -> bool {
        self.agreed || self.ends.iter().any(|end| end.dss > 0)
    }
}

impl Subflows {
    /// Takes note of a segment.
    pub fn learn(&mut self, frame: &[u8]) {
        let Ok(signals) = Signals::of(frame) else {
            return;
        };
        let segment = &signals.segment;
        if segment.has(SYN) && !segment.has(ACK) {
            self.learn_syn(&signals);
            return;
        }
        if signals.has(DSS) && !self.knows(&signals) {
            if !self.flows.contains_key(&signals.flow) {
                self.forget_sent(&signals);
            }
            let known = self.flows.entry(signals.flow).or_default();
            known.refused = false;
            known.agreed = true;
            // the SYN said something else
            known.syn = None;
        }
        let known = self.flows.get_mut(&signals.flow);
        let Some(known) = known.filter(|known| !known.refused) else {
            return;
        };
        let answered = signals.has(MP_CAPABLE) || signals.option(MP_JOIN, 16).is_some();
        if segment.has(SYN) {
            known.refused = !answered && !known.agrees();
            known.agreed |= answered;
            return;
        }
        let ends = (signals.sender, 1 - signals.sender);
        known.agreed |= signals.option(MP_JOIN, 24).is_some();
        if let (Some(keys), None) = (
            signals.option(MP_CAPABLE, 20),
            known.ends[signals.sender].token,
        ) {
            // of version 1
            if keys[2] & 0xf == 1 {
                let (own, peer) = (&keys[4..12], &keys[12..20]);
                let tokens = (token(own), token(peer));
                let [own, peer]: [[u8; 8]; 2] = [own, peer].map(|it| it.try_into().unwrap());
                self.peers.insert(tokens.0, tokens.1);
                self.peers.insert(tokens.1, tokens.0);
                self.keys.insert(tokens.0, [own, peer]);
                self.keys.insert(tokens.1, [peer, own]);
                known.ends[ends.0].token = Some(tokens.0);
                known.ends[ends.1].token = Some(tokens.1);
                known.agreed = true;
            }
        }
        if signals.has(DSS) {
            known.ends[signals.sender].dss = (known.ends[signals.sender].dss + 1).min(2);
        }
        if let Some(option) = signals.option(ADD_ADDR, 4).filter(|it| !announces(it)) {
            self.echoed(&signals, option[3]);
        }
        if let Some(option) = signals.option(REMOVE_ADDR, 4) {
            let ids = option[3..].iter().take(MOST_REMOVED);
            self.withdrawn(&signals, &ids.copied().collect::<Vec<u8>>());
        }
        if signals.can_be_said_again() && !self.is_old(&signals) {
            let sent = (signals.flow, signals.sender);
            self.sent.insert(sent, signals.sequence_end());
        }
    }

    /// The receiver of an announcement has heard it.
    fn echoed(&mut self, signals: &Signals, id: u8) {
        let held = self.held.get_mut(&(signals.flow, 1 - signals.sender));
        for slot in held.into_iter().flatten() {
            slot.take_if(|held| held.given && held.option[3] == id);
        }
    }

    /// Its sender has lost addresses.
    fn withdrawn(&mut self, signals: &Signals, ids: &[u8]) {
        let held = self.held.get_mut(&(signals.flow, signals.sender));
        for slot in held.into_iter().flatten() {
            slot.take_if(|held| ids.contains(&held.option[3]));
        }
    }

    /// Whether its end has sent more than it says.
    fn is_old(&self, signals: &Signals) -> bool {
        let sent = self.sent.get(&(signals.flow, signals.sender));
        sent.is_some_and(|sent| {
            let behind = sent.wrapping_sub(signals.sequence_end());
            (1..=FURTHEST_BEHIND).contains(&behind)
        })
    }

    fn forget_sent(&mut self, signals: &Signals) {
        for end in 0..2 {
            self.sent.remove(&(signals.flow, end));
        }
    }

    fn learn_syn(&mut self, signals: &Signals) {
        let known = self.flows.get(&signals.flow);
        let syn = Some((signals.sender, signals.segment.sequence));
        // the same again
        if known.is_some_and(|it| it.syn == syn) {
            return;
        }
        for end in 0..2 {
            self.held.remove(&(signals.flow, end));
        }
        self.forget_sent(signals);
        let join = signals.option(MP_JOIN, 12);
        if join.is_none() && !signals.has(MP_CAPABLE) {
            self.flows.remove(&signals.flow);
            return;
        }
        let mut subflow = Subflow {
            syn,
            ..Subflow::default()
        };
        if let Some(join) = join {
            let token = u32::from_be_bytes(join[4..8].try_into().unwrap());
            let peer = self.peers.get(&token).copied();
            subflow.ends[signals.sender].token = peer;
            subflow.ends[1 - signals.sender].token = Some(token).filter(|it| *it != 0);
        }
        self.flows.insert(signals.flow, subflow);
    }

    pub fn knows(&self, signals: &Signals) -> bool {
        self.flows.get(&signals.flow).is_some_and(|it| !it.refused)
    }

    /// Whether both ends have shown that they speak MPTCP.
    pub fn agree(&self, signals: &Signals) -> bool {
        self.flows.get(&signals.flow).is_some_and(Subflow::agrees)
    }

    /// Tokens of a segment's connection.
    pub fn tokens(&self, signals: &Signals) -> Vec<u32> {
        let known = self.flows.get(&signals.flow);
        let known = known.filter(|known| !known.refused);
        let ends = known.iter().flat_map(|known| &known.ends);
        ends.filter_map(|end| end.token).collect()
    }

    /// DSS options that the sender of a segment has sent, up to 2.
    pub fn dss_seen(&self, signals: &Signals) -> u8 {
        let known = self.flows.get(&signals.flow);
        known.map_or(0, |known| known.ends[signals.sender].dss)
    }

    /// A segment whose receiver takes MPTCP for established.
    pub fn ready(&self, frame: &[u8]) -> Result<Signals, Reason> {
        let signals = Signals::of(frame)?;
        if !self.knows(&signals) {
            return Err("not_mptcp");
        }
        if signals.segment.ip.signed {
            return Err("authenticated");
        }
        if signals.segment.has(SYN) {
            return Err("syn");
        }
        let last = signals.segment.has(FIN) || signals.segment.has(RST);
        if last || self.dss_seen(&signals) == 0 {
            return Err("not_mptcp");
        }
        if self.is_old(&signals) {
            return Err("old_segment");
        }
        Ok(signals)
    }

    /// Whether a segment is one of those that are reported.
    pub fn worth_reporting(&self, signals: &Signals) -> bool {
        let other = signals.first.keys().any(|subtype| *subtype != DSS);
        let segment = &signals.segment;
        let edge = segment.has(SYN) || segment.has(FIN) || segment.has(RST);
        let ends = |dss: &Bytes| dss[3] & DATA_FIN != 0 || signals.falls_back(dss);
        let known = self.flows.get(&signals.flow);
        let refused = known.is_some_and(|known| known.refused);
        other
            || ((refused || self.knows(signals)) && edge)
            || signals.option(DSS, 4).is_some_and(ends)
    }

    /// The ADD_ADDR by which the sender of a segment announces an address (3.4.1).
    pub fn announcement(
        &self,
        signals: &Signals,
        address: IpAddr,
        id: u8,
        port: Option<u16>,
    ) -> Result<Bytes, Reason> {
        let known = self.flows.get(&signals.flow).ok_or("not_mptcp")?;
        let own = known.ends[signals.sender].token.ok_or("no_keys")?;
        let keys = self.keys.get(&own).ok_or("no_keys")?;
        let address = match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        let mut mac = Hmac::<Sha256>::new_from_slice(&keys.concat()).unwrap();
        mac.update(&[id]);
        mac.update(&address);
        mac.update(&port.unwrap_or(0).to_be_bytes());
        let proof = mac.finalize().into_bytes();
        let port = port.map_or(vec![], |port| port.to_be_bytes().to_vec());
        let body = [
            &[ADD_ADDR << 4, id],
            &address[..],
            &port,
            &proof[proof.len() - 8..],
        ]
        .concat();
        Ok([&[MPTCP, 2 + body.len() as u8], &body[..]].concat())
    }

    /// Keeps the first announcement of a segment: in which slot.
    pub fn hold(&mut self, frame: &[u8], signals: &Signals) -> Result<usize, Reason> {
        let options = Options::parse(signals.segment.options(frame))?;
        let mut announcements = options.list.iter().filter(|it| announces(it));
        let option = announcements.next().ok_or("option_absent")?;
        if !(4..=LONGEST_ADD_ADDR).contains(&option.len()) {
            return Err("bad_option");
        }
        let held = self.held.entry((signals.flow, signals.sender)).or_default();
        let slot = usize::from(option[3]) % SLOTS;
        let known = held[slot].as_ref();
        held[slot] = Some(Held {
            option: option.clone(),
            given: known.is_some_and(|it| it.given && it.option == *option),
        });
        Ok(slot)
    }

    /// The first that was not given, and its slot. Those that were are kept only if they are to be
    /// given again.
    pub fn held(&mut self, signals: &Signals, repeat: bool) -> Option<(usize, Bytes)> {
        let held = self.held.get_mut(&(signals.flow, signals.sender))?;
        for slot in held.iter_mut() {
            slot.take_if(|held| held.given && !repeat);
        }
        let mut slots = held.iter().enumerate();
        slots.find_map(|(slot, held)| {
            let held = held.as_ref().filter(|held| !held.given)?;
            Some((slot, held.option.clone()))
        })
    }

    /// It was given back, and is kept until it is echoed.
    pub fn give(&mut self, signals: &Signals, slot: usize) {
        let held = self.held.get_mut(&(signals.flow, signals.sender));
        if let Some(held) = held.and_then(|held| held[slot].as_mut()) {
            held.given = true;
        }
    }

    /// It is no longer kept.
    pub fn release(&mut self, signals: &Signals, slot: usize) {
        if let Some(held) = self.held.get_mut(&(signals.flow, signals.sender)) {
            held[slot] = None;
        }
    }
}
