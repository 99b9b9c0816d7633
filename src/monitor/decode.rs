// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reported segments to events. Nothing here touches the system.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::event::{Cause, DataSequence, Direction, Event, How, Kind, Stage};
use super::time::Clock;
use crate::engine::bpf;
use crate::engine::bpf::types::{report, tcp_flag};

/// The TCP option of MPTCP (RFC 8684, 8.1).
const MPTCP: u8 = 30;
/// SYNs that are remembered: at least this many, at most twice as many.
const REMEMBERED: usize = 16_384;

/// Tells the names of what reports have by number.
pub trait Names {
    /// A device by index.
    fn device(&mut self, ifindex: u32) -> String;
    /// A chain by id.
    fn chain(&mut self, id: u32) -> Option<String>;
}

/// Makes events of reports; remembers the SYNs with MP_CAPABLE that wait for their SYN-ACK.
pub struct Decoder {
    clock: Clock,
    young: HashMap<Flow, Syn>,
    old: HashMap<Flow, Syn>,
}

/// A connection as its SYN passed a device: index, source, destination.
type Flow = (u32, SocketAddr, SocketAddr);

#[derive(Clone, Copy)]
struct Syn {
    sequence: u32,
    payload: u32,
}

impl Decoder {
    pub fn new(clock: Clock) -> Decoder {
        Decoder {
            clock,
            young: HashMap::new(),
            old: HashMap::new(),
        }
    }

    /// The events of one segment, in the order of its options; that of TCP itself last.
    pub fn decode(&mut self, report: &report, names: &mut dyn Names) -> Vec<Event> {
        let [source, destination] = ends(report);
        let kinds = self.kinds(report, source, destination);
        if kinds.is_empty() {
            return Vec::new();
        }
        let device = names.device(report.ifindex);
        let chain = names.chain(report.chain);
        let event = |kind| Event {
            time: self.clock.time(report.at),
            device: device.clone(),
            direction: match report.ingress {
                0 => Direction::Out,
                _ => Direction::In,
            },
            source,
            destination,
            chain: chain.clone(),
            connection: (report.source_token != 0).then_some(report.source_token),
            kind,
        };
        kinds.into_iter().map(event).collect()
    }

    fn kinds(&mut self, report: &report, source: SocketAddr, destination: SocketAddr) -> Vec<Kind> {
        let has = |flag: tcp_flag| u32::from(report.tcp_flags) & flag.0 != 0;
        let syn = has(tcp_flag::TCP_FLAG_SYN);
        let stage = match (syn, has(tcp_flag::TCP_FLAG_ACK)) {
            (true, false) => Stage::Syn,
            (true, true) => Stage::SynAck,
            (false, _) => Stage::Ack,
        };
        let length = usize::from(report.options_length).min(report.options.len());
        let mut kinds: Vec<Kind> = Options(&report.options[..length])
            .filter(|option| option[0] == MPTCP)
            .filter_map(|option| mptcp(option, stage))
            .collect();
        let capable = |kind: &Kind| matches!(kind, Kind::MpCapable { .. });
        let capable = kinds.iter().any(capable);
        let rst = has(tcp_flag::TCP_FLAG_RST);
        match stage {
            Stage::Syn => self.syn((report.ifindex, source, destination), report, capable),
            // The answer names the ends the other way round.
            Stage::SynAck if !rst => {
                let flow = (report.ifindex, destination, source);
                if self.answers(flow, report) && !capable {
                    let cause = Cause::SynAck;
                    kinds.push(Kind::Fallback { cause });
                }
            }
            _ => {}
        }
        if rst {
            kinds.push(Kind::Close { how: How::Rst });
        } else if has(tcp_flag::TCP_FLAG_FIN) {
            kinds.push(Kind::Close { how: How::Fin });
        }
        kinds
    }

    /// A SYN; repeated without MP_CAPABLE, which hosts do when nobody answers, it stays one that
    /// asked for MPTCP.
    fn syn(&mut self, flow: Flow, report: &report, capable: bool) {
        let known = self.take(flow);
        let again = known.filter(|syn| syn.sequence == report.sequence);
        let syn = match capable {
            true => Some(Syn {
                sequence: report.sequence,
                payload: report.payload,
            }),
            false => again,
        };
        if let Some(syn) = syn {
            if self.young.len() >= REMEMBERED {
                self.old = std::mem::take(&mut self.young);
            }
            self.young.insert(flow, syn);
        }
    }

    /// Whether a SYN-ACK is the first to answer a SYN with MP_CAPABLE.
    fn answers(&mut self, flow: Flow, report: &report) -> bool {
        let syn = self.young.get(&flow).or_else(|| self.old.get(&flow));
        let answers = syn.is_some_and(|syn| {
            let acknowledged = report.acknowledgment.wrapping_sub(syn.sequence);
            acknowledged.wrapping_sub(1) <= syn.payload
        });
        if answers {
            self.take(flow);
        }
        answers
    }

    fn take(&mut self, flow: Flow) -> Option<Syn> {
        let young = self.young.remove(&flow);
        let old = self.old.remove(&flow);
        young.or(old)
    }
}

fn ends(report: &report) -> [SocketAddr; 2] {
    let [source, destination] = bpf::report_addresses(report);
    [
        (source, u16::from_be(report.source_port)).into(),
        (destination, u16::from_be(report.destination_port)).into(),
    ]
}

/// The options of a TCP header (RFC 9293, 3.1), each whole, with kind and length; padding left
/// out. A malformed one ends the walk.
struct Options<'a>(&'a [u8]);

impl<'a> Iterator for Options<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        const END: u8 = 0;
        const NO_OPERATION: u8 = 1;

        while let [NO_OPERATION, rest @ ..] = self.0 {
            self.0 = rest;
        }
        let length = match self.0 {
            [] | [END, ..] | [_] => 0,
            [_, length, ..] => usize::from(*length),
        };
        if length < 2 || length > self.0.len() {
            self.0 = &[];
            return None;
        }
        let (option, rest) = self.0.split_at(length);
        self.0 = rest;
        Some(option)
    }
}

/// What an MPTCP option says; `None` if it is of no event, or not as RFC 8684 has it.
fn mptcp(option: &[u8], stage: Stage) -> Option<Kind> {
    let [_, length, first, rest @ ..] = option else {
        return None;
    };
    let low = first & 0x0f;
    match first >> 4 {
        0x0 => capable(*length, low, rest, stage),
        0x1 => join(*length, low, rest, stage),
        0x2 => data(option),
        0x3 => add_address(*length, low & 1 != 0, rest),
        0x4 if !rest.is_empty() => Some(Kind::RemoveAddr {
            address_ids: rest.to_vec(),
        }),
        0x5 if rest.len() <= 1 => Some(Kind::MpPrio {
            backup: low & 1 != 0,
            address_id: rest.first().copied(),
        }),
        0x6 if *length == 12 => Some(Kind::MpFail {
            data_sequence: DataSequence::Full(u64::from_be_bytes(bytes(option, 4)?)),
        }),
        0x7 if *length == 12 => Some(Kind::MpFastclose),
        0x8 if *length == 4 => Some(Kind::MpTcprst {
            flags: low,
            reason: *rest.first()?,
        }),
        _ => None,
    }
}

/// MP_CAPABLE. Version 0 (RFC 6824, 3.1) has a key in the SYN already.
fn capable(length: u8, version: u8, rest: &[u8], stage: Stage) -> Option<Kind> {
    let fits = match stage {
        Stage::Syn => length == 4 || (length == 12 && version == 0),
        Stage::SynAck => length == 12,
        Stage::Ack => matches!(length, 20 | 22 | 24),
    };
    let flags = *rest.first()?;
    fits.then_some(Kind::MpCapable {
        stage,
        version,
        flags,
        checksum_required: flags & 0x80 != 0,
    })
}

fn join(length: u8, low: u8, rest: &[u8], stage: Stage) -> Option<Kind> {
    let hello = stage != Stage::Ack;
    let nonce = match (stage, length) {
        (Stage::Syn, 12) => Some(bytes(rest, 5)?),
        (Stage::SynAck, 16) => Some(bytes(rest, 9)?),
        (Stage::Ack, 24) => None,
        _ => return None,
    };
    let token = match stage {
        Stage::Syn => Some(bytes(rest, 1)?),
        _ => None,
    };
    Some(Kind::MpJoin {
        stage,
        address_id: rest.first().copied().filter(|_| hello),
        backup: hello.then_some(low & 1 != 0),
        token: token.map(u32::from_be_bytes),
        nonce: nonce.map(u32::from_be_bytes),
    })
}

/// DSS (RFC 8684, 3.3): only one that ends the data, or MPTCP, is an event.
fn data(option: &[u8]) -> Option<Kind> {
    const ACK: u8 = 0x01;
    const LONG_ACK: u8 = 0x02;
    const MAPPING: u8 = 0x04;
    const LONG_SEQUENCE: u8 = 0x08;
    const FIN: u8 = 0x10;
    const CHECKSUM_LENGTH: usize = 2;

    let flags = *option.get(3)?;
    let has = |flag| flags & flag != 0;
    let at = 4 + match (has(ACK), has(LONG_ACK)) {
        (false, _) => 0,
        (true, false) => 4,
        (true, true) => 8,
    };
    if !has(MAPPING) {
        let data_sequence = None;
        return (has(FIN) && at <= option.len()).then_some(Kind::DataFin { data_sequence });
    }
    let width = if has(LONG_SEQUENCE) { 8 } else { 4 };
    // Behind the data sequence number, the one of the subflow.
    let end = at + width + 4;
    let length = u16::from_be_bytes(bytes(option, end)?);
    if ![end + 2, end + 2 + CHECKSUM_LENGTH].contains(&option.len()) {
        return None;
    }
    if length == 0 {
        let cause = Cause::InfiniteMapping;
        return Some(Kind::Fallback { cause });
    }
    // The DATA_FIN counts as the mapping's last byte.
    let ahead = length - 1;
    let data_sequence = match has(LONG_SEQUENCE) {
        true => {
            let first = u64::from_be_bytes(bytes(option, at)?);
            DataSequence::Full(first.wrapping_add(ahead.into()))
        }
        false => {
            let first = u32::from_be_bytes(bytes(option, at)?);
            DataSequence::Low(first.wrapping_add(ahead.into()))
        }
    };
    has(FIN).then_some(Kind::DataFin {
        data_sequence: Some(data_sequence),
    })
}

fn add_address(length: u8, echo: bool, rest: &[u8]) -> Option<Kind> {
    let (wide, with_port, hmac) = match length {
        8 => (false, false, false),
        10 => (false, true, false),
        16 => (false, false, true),
        18 => (false, true, true),
        20 => (true, false, false),
        22 => (true, true, false),
        28 => (true, false, true),
        30 => (true, true, true),
        _ => return None,
    };
    let address: IpAddr = match wide {
        false => Ipv4Addr::from(bytes::<4>(rest, 1)?).into(),
        true => Ipv6Addr::from(bytes::<16>(rest, 1)?).into(),
    };
    let port = match with_port {
        true => Some(bytes(rest, if wide { 17 } else { 5 })?),
        false => None,
    };
    Some(Kind::AddAddr {
        address_id: *rest.first()?,
        address,
        port: port.map(u16::from_be_bytes),
        echo,
        hmac,
        length,
    })
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
#[path = "decode_tests.rs"]
mod tests;
