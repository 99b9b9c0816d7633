// SPDX-License-Identifier: MIT OR Apache-2.0
//! What handshakes say of window scales (RFC 7323, 2.2), and where connections begin.

use std::collections::HashMap;

use crate::layers::{self, ACK, SYN, Segment};
use crate::options::{Options, WINDOW_SCALE};
use crate::subflows::{self, Flow};

/// One end of a connection.
type Socket = (u128, u16);

const SCALE_MAX: u8 = 14;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Offer {
    Nothing,
    Scale(u8),
}

#[derive(Clone, Debug, Default)]
struct Connection {
    /// Sequence number of the SYN that began it.
    syn: Option<(Socket, u32)>,
    /// Who answered, once that is known.
    responder: Option<Socket>,
    offers: HashMap<Socket, Offer>,
}

/// Connections by their two ends, the lower one first.
#[derive(Clone, Debug, Default)]
pub struct Flows(HashMap<[Socket; 2], Connection>);

fn ends(segment: &Segment) -> (Socket, Socket) {
    (
        (layers::as_number(segment.ip.src), segment.ports.0),
        (layers::as_number(segment.ip.dst), segment.ports.1),
    )
}

fn key(a: Socket, b: Socket) -> [Socket; 2] {
    [a.min(b), a.max(b)]
}

/// `None` for options that say nothing reliable.
fn offer(segment: &Segment, frame: &[u8]) -> Option<Offer> {
    let options = Options::parse(segment.options(frame)).ok()?;
    let scales: Vec<&[u8]> = options.of_kind(WINDOW_SCALE).map(Vec::as_slice).collect();
    match scales[..] {
        [] => Some(Offer::Nothing),
        [[_, 3, scale]] => Some(Offer::Scale((*scale).min(SCALE_MAX))),
        _ => None,
    }
}

impl Flows {
    /// Takes note of a SYN or SYN-ACK.
    pub fn learn(&mut self, frame: &[u8]) {
        let Ok(segment) = layers::tcp(frame) else {
            return;
        };
        if !segment.has(SYN) {
            return;
        }
        let (sender, receiver) = ends(&segment);
        let key = key(sender, receiver);
        let first = (!segment.has(ACK)).then_some((sender, segment.sequence));
        let known = self.0.get(&key);
        if first.is_some() && known.is_some_and(|known| known.syn == first) {
            return;
        }
        let mut connection = match (first, known) {
            (None, Some(known)) => known.clone(),
            (None, None) => Connection {
                responder: Some(sender),
                ..Connection::default()
            },
            (Some(_), _) => Connection {
                syn: first,
                // a socket that talks to itself is both ends at once
                responder: Some(receiver).filter(|_| sender != receiver),
                ..Connection::default()
            },
        };
        match offer(&segment, frame) {
            Some(offer) => {
                connection.offers.insert(sender, offer);
                self.0.insert(key, connection);
            }
            None => {
                self.0.remove(&key);
            }
        }
    }

    /// Bits that the sender of a segment shifts its window by.
    pub fn scale(&self, segment: &Segment) -> Option<u8> {
        let (sender, receiver) = ends(segment);
        let connection = self.0.get(&key(sender, receiver))?;
        let own = connection.offers.get(&sender);
        let other = connection
            .offers
            .get(&receiver)
            .filter(|_| sender != receiver);
        match (own, other) {
            (Some(Offer::Nothing), _) | (_, Some(Offer::Nothing)) => Some(0),
            (Some(Offer::Scale(scale)), Some(_)) => Some(*scale),
            // an answer scales only if that was offered
            (Some(Offer::Scale(scale)), None) if connection.responder == Some(sender) => {
                Some(*scale)
            }
            _ => None,
        }
    }
}

/// The sequence numbers by which the ends of connections began.
#[derive(Clone, Debug, Default)]
pub struct Openings(HashMap<Flow, [Option<u32>; 2]>);

impl Openings {
    /// The connection that a segment begins, if it does: not one that is sent again, and no answer
    /// to a SYN that was seen.
    pub fn learn(&mut self, frame: &[u8]) -> Option<Flow> {
        let segment = layers::tcp(frame).ok()?;
        if !segment.has(SYN) {
            return None;
        }
        let (flow, sender) = subflows::flow(&segment.ip, segment.ports);
        let known = self.0.entry(flow).or_default();
        let own = known[sender];
        let answers = segment.has(ACK) && own.is_none() && known[1 - sender].is_some();
        if own == Some(segment.sequence) {
            return None;
        }
        if !answers {
            *known = [None; 2];
        }
        known[sender] = Some(segment.sequence);
        (!answers).then_some(flow)
    }
}
