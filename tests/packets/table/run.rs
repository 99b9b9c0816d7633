// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs packets through an action, at every place where they can meet it.

use std::collections::BTreeMap;
use std::path::Path;

use etherparse::checksum::Sum16BitWords;
use policy_chain::engine::attach;
use policy_chain::engine::counters;
use policy_chain::engine::generation::CarrierChoice;
use policy_chain::hook::{Family, Hook};
use policy_chain::policy::Registry;
use policy_chain::replay::{Runner, Verdict};
use policy_chain::spec::{Mode, Spec};
use serde_json::{Value, json};

use super::outcomes::{Added, Change, SCALE};
use super::rows::{Base, Packet, Row, tables};
use super::{Column, Learns};
use crate::bench::with_chains;
use crate::frames::*;
use crate::mptcp;
use crate::wire::{self, Arrived, MARKERS, Note, Passage, Wire};

/// Where a packet meets the action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// In a test run of the kernel.
    Run(Hook),
    Native,
    Generic,
    Ingress,
    Egress,
    /// At TC egress, on the way from the ingress of another device.
    Forwarded,
}

impl At {
    fn hook(self) -> Hook {
        match self {
            At::Run(hook) => hook,
            At::Native | At::Generic => Hook::Xdp,
            At::Ingress => Hook::TcIngress,
            At::Egress | At::Forwarded => Hook::TcEgress,
        }
    }

    fn mode(self) -> Mode {
        match self {
            At::Native => Mode::Native,
            At::Generic => Mode::Generic,
            _ => Mode::Auto,
        }
    }

    /// The device of the wire whose hook it is, and where one sends to it from.
    fn device(self) -> (&'static str, wire::From) {
        match self {
            At::Egress => ("in", wire::From::In),
            At::Forwarded => ("to", wire::From::Out),
            _ => ("in", wire::From::Out),
        }
    }

    /// Whether a redirection to the wire's device goes anywhere from here.
    fn can_redirect(self) -> bool {
        // to itself, or by XDP to a device whose peer has no XDP
        !matches!(self, At::Native | At::Forwarded)
    }

    /// Its names in a cell, the coarser one first.
    pub fn names(self) -> [&'static str; 2] {
        match self {
            At::Generic => ["XDP", "generic XDP"],
            _ if self.hook() == Hook::Xdp => ["XDP", "native XDP"],
            _ if self.hook() == Hook::TcIngress => ["TC", "tc-ingress"],
            _ => ["TC", "tc-egress"],
        }
    }
}

/// A column's action, loaded.
struct Loaded<'a> {
    column: &'a Column,
    runner: Runner,
    hook: Hook,
    handshakes: u32,
    /// What the markers behind a packet add to the counters.
    markers: Counts,
}

/// What became of a packet.
#[derive(Debug)]
struct Got {
    verdict: Option<Verdict>,
    reasons: Vec<&'static str>,
    frames: Vec<Vec<u8>>,
}

pub fn load(chain: &Value, hook: Hook) -> Runner {
    let registry = Registry::embedded().unwrap();
    let spec = Spec::parse(&chain.to_string(), Path::new("table.json"), registry)
        .unwrap_or_else(|error| panic!("{error}\n{chain}"));
    Runner::new(&spec, "main", hook, CarrierChoice::Auto)
        .unwrap_or_else(|error| panic!("{hook}: {error:?}\n{chain}"))
}

fn chain_of(action: &str, parameters: &Value) -> Value {
    let mut item = json!({ "action": action });
    let members = parameters.as_object().unwrap().clone();
    item.as_object_mut().unwrap().extend(members);
    let sets = json!({ "seen": { "kind": "flow", "size": 100_000 } });
    with_chains(json!({ "actions": [item] }), json!([]), sets)
}

/// The frame with its checksum completed as a device does: by all bytes from a place on.
fn completed(arrived: Arrived) -> Vec<u8> {
    let Arrived {
        mut frame, note, ..
    } = arrived;
    if let (Some((start, offset)), None) = (note.partial, note.segment) {
        let (start, field) = (usize::from(start), usize::from(start + offset));
        let sum = Sum16BitWords::new().add_slice(&frame[start..]);
        frame[field..field + 2].copy_from_slice(&sum.ones_complement().to_ne_bytes());
    }
    frame
}

/// What all nodes counted.
#[derive(Clone, Debug, Default)]
struct Counts {
    /// Packets that came to the hook.
    seen: u64,
    reasons: BTreeMap<&'static str, u64>,
}

impl Counts {
    fn read(runner: &Runner) -> Counts {
        let nodes = counters::read(&runner.generation().counters).unwrap();
        let mut counts = Counts::default();
        for node in &nodes {
            for (name, count) in node.named_reasons() {
                *counts.reasons.entry(name).or_default() += count;
            }
        }
        counts.seen = nodes.last().map_or(0, |entry| entry.seen);
        counts
    }

    fn since(&self, before: &Counts) -> Counts {
        let mut since = self.clone();
        since.seen -= before.seen;
        for (name, count) in &before.reasons {
            *since.reasons.entry(name).or_default() -= count;
        }
        since.reasons.retain(|_, count| *count > 0);
        since
    }
}

impl<'a> Loaded<'a> {
    fn new(column: &'a Column, hook: Hook) -> Loaded<'a> {
        Loaded {
            column,
            runner: load(&chain_of(column.action, &column.parameters), hook),
            hook,
            handshakes: 0,
            markers: Counts::default(),
        }
    }

    /// Has the learners see how the packet's connection began, in a test run.
    fn shake_hands(&mut self, packet: &Packet) {
        if !packet.handshake_seen {
            return;
        }
        match self.column.learns {
            Learns::Nothing => {}
            Learns::Scale => self.offer_to_scale(&packet.frame),
            Learns::Mptcp => {
                self.handshakes += 1;
                for frame in mptcp::established(&packet.frame, self.handshakes) {
                    self.runner.run(&frame.build()).unwrap();
                }
            }
        }
    }

    fn offer_to_scale(&mut self, frame: &Frame) {
        self.handshakes += 1;
        let syn = if frame.src.is_ipv4() { v4() } else { v6() }
            .between(frame.src, frame.dst)
            .ports(frame.src_port, frame.dst_port)
            .options(&words(&[&[3, 3, SCALE]]))
            .sequence(self.handshakes);
        for frame in [syn.clone().flags(SYN), syn.back().flags(SYN | ACK)] {
            let outcome = self.runner.run(&frame.build()).unwrap();
            assert!(outcome.reasons.contains(&"syn"), "{:?}", outcome.reasons);
        }
    }

    /// Holds an address for both ends of the packet's connection, if the action gives one back.
    fn hold(&self, packet: &Packet) {
        if self.column.change == Change::Add(Added::Held) && packet.handshake_seen {
            let held = &self.runner.generation().state["pcd_held"];
            mptcp::hold(held, &packet.frame, &Added::Held.option());
        }
    }

    fn attach(&mut self, wire: &mut Wire, at: At) -> (attach::Place, attach::Hold) {
        let (device, from) = at.device();
        let place = attach::Place::find(device, at.hook()).unwrap();
        let generation = self.runner.generation();
        let (hold, _) = place
            .attach(&generation.entry, at.mode(), |mode| {
                generation.set_mode(mode)
            })
            .unwrap();
        let (_, markers) = self.undisturbed(0, || wire.mark(from));
        self.markers = markers;
        (place, hold)
    }

    fn test_run(&mut self, packet: &Packet) -> Got {
        self.shake_hands(packet);
        self.hold(packet);
        let outcome = self.runner.run(&packet.bytes_of(&packet.frame)).unwrap();
        assert_eq!(outcome.carrier, "test_run", "{}", outcome.frame.len());
        Got {
            verdict: Some(outcome.verdict),
            reasons: outcome.reasons,
            frames: vec![outcome.frame],
        }
    }

    fn on_wire(&mut self, wire: &mut Wire, at: At, packet: &Packet) -> Got {
        self.shake_hands(packet);
        let (bytes, note) = (packet.bytes_of(&packet.frame), packet.note());
        let (passage, counts) = self.counted(wire, at, packet, &note);
        let names = counts.reasons.iter();
        let reasons: Vec<&str> = names
            .flat_map(|(name, count)| vec![*name; *count as usize])
            .collect();
        if matches!(at, At::Ingress | At::Forwarded) {
            check_received(packet, &bytes, &passage.received);
        }
        // Generic XDP keeps the notes, also where it sends past the device's offloads.
        let kept = match at == At::Generic {
            true => Note { linear: 0, ..note },
            false => Note::default(),
        };
        let sent_on = self.sends() && reasons.is_empty();
        let arrived = match at == At::Generic && !sent_on {
            true => passage.received,
            false => passage.left,
        };
        for each in &arrived {
            assert_eq!(each.note, kept, "{} {at:?}", self.column.action);
        }
        Got {
            verdict: None,
            reasons,
            frames: arrived.into_iter().map(completed).collect(),
        }
    }

    /// Sends a packet, and tells what only that added to the counters.
    fn counted(&self, wire: &mut Wire, at: At, packet: &Packet, note: &Note) -> (Passage, Counts) {
        let (_, from) = at.device();
        let bytes = packet.bytes_of(&packet.frame);
        let (passage, counts) = self.undisturbed(1, || {
            self.hold(packet);
            wire.pass(from, &bytes, note)
        });
        (passage, counts.since(&self.markers))
    }

    /// What is counted while `packets` and markers pass. Again, if the kernel sent a packet of its
    /// own meanwhile.
    fn undisturbed<R>(&self, packets: u64, mut pass: impl FnMut() -> R) -> (R, Counts) {
        for _ in 0..100 {
            let start = Counts::read(&self.runner);
            let result = pass();
            let counts = Counts::read(&self.runner).since(&start);
            if counts.seen == MARKERS + packets {
                return (result, counts);
            }
        }
        panic!("{}: other packets, all the time", self.hook);
    }

    fn sends(&self) -> bool {
        matches!(self.column.change, Change::Send { .. })
    }

    /// The word for what was done, or the reason for nothing.
    fn word(&self, at: At, packet: &Packet, got: &Got) -> Result<String, String> {
        let sends = self.sends();
        let expected = |frame: &Frame| match at {
            At::Run(_) => vec![packet.bytes_of(frame)],
            // not cut up yet
            At::Generic if packet.segment.is_some() => vec![packet.bytes_of(frame)],
            _ => packet.carried(frame),
        };
        let verdict = match sends && got.reasons.is_empty() {
            true => Verdict::Redirect,
            false => Verdict::Pass,
        };
        let unchanged = expected(&packet.frame);
        if self.column.may_drop && got.verdict == Some(Verdict::Drop) && got.reasons.is_empty() {
            return match got.frames == unchanged {
                true => Ok("dropped".to_owned()),
                false => Err("dropped, and changed".to_owned()),
            };
        }
        if got.verdict.is_some_and(|it| it != verdict) {
            return Err(format!("verdict {:?}", got.verdict));
        }
        if let [reason] = got.reasons[..] {
            return match got.frames == unchanged {
                true => Ok(format!("`{reason}`")),
                false => Err(format!("`{reason}`, and changed")),
            };
        }
        // nobody on the wire can tell who completed a checksum
        let family = match at {
            At::Run(hook) => hook.family(),
            _ => Family::Tc,
        };
        let notes = self.column.change == Change::Note;
        let outcomes = self.column.change.outcomes(&packet.frame, family);
        let mut fitting = outcomes
            .iter()
            .filter(|(_, frame)| got.frames == expected(frame));
        match fitting.next() {
            _ if !got.reasons.is_empty() => Err(format!("reasons {:?}", got.reasons)),
            Some((_, frame)) if !sends && !notes && expected(frame) == unchanged => {
                Err("done, and nothing to see of it".to_owned())
            }
            Some((word, _)) => Ok((*word).to_owned()),
            None if got.frames == unchanged => Err("unchanged, and no reason".to_owned()),
            None => Err("something else".to_owned()),
        }
    }
}

/// That a packet came to the hook as what its row says. It is read when the packet has passed, so
/// it also shows whether the action wrote to data it shares.
fn check_received(packet: &Packet, sent: &[u8], received: &[Arrived]) {
    let [arrived] = received else {
        panic!("{received:?}");
    };
    assert_eq!(arrived.frame, sent);
    let note = Note {
        linear: 0,
        ..packet.note()
    };
    assert_eq!(arrived.note, note);
    if packet.tag_in_metadata {
        assert!(arrived.tag_in_metadata);
    }
}

/// Words by place, by title of row.
pub type Cells = BTreeMap<&'static str, Vec<(At, String)>>;

/// Runs all packets of a column; what went wrong goes into `failures`.
pub fn run_column(column: &Column, wire: &mut Wire, failures: &mut Vec<String>) -> Cells {
    let base = Base::of(column.change);
    let rows: Vec<Row> = tables(&base)
        .into_iter()
        .flat_map(|(_, rows)| rows)
        .collect();
    let mut cells = Cells::new();
    for hook in Hook::ALL {
        if !column.families.contains(&hook.family()) {
            continue;
        }
        let mut loaded = Loaded::new(column, hook);
        let places = [
            At::Run(hook),
            At::Native,
            At::Generic,
            At::Ingress,
            At::Egress,
            At::Forwarded,
        ];
        let sends = matches!(column.change, Change::Send { .. });
        for at in places {
            if at.hook() != hook || (sends && !at.can_redirect()) {
                continue;
            }
            let held = match at {
                At::Run(_) => None,
                _ => Some(loaded.attach(wire, at)),
            };
            for row in rows.iter().filter(|row| row.at.contains(&at)) {
                for packet in &row.packets {
                    let got = match at {
                        At::Run(_) => loaded.test_run(packet),
                        _ => loaded.on_wire(wire, at, packet),
                    };
                    match loaded.word(at, packet, &got) {
                        Ok(word) => cells.entry(row.what).or_default().push((at, word)),
                        Err(why) => failures.push(failure(&loaded, row, at, packet, &got, &why)),
                    }
                }
            }
            if let Some((place, hold)) = held {
                place.detach(&hold).unwrap();
            }
        }
    }
    cells
}

fn failure(loaded: &Loaded, row: &Row, at: At, packet: &Packet, got: &Got, why: &str) -> String {
    let start = |frame: &Vec<u8>| {
        let start = &frame[..frame.len().min(130)];
        start
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let sent = packet.bytes_of(&packet.frame);
    let frames: Vec<String> = got.frames.iter().take(3).map(start).collect();
    format!(
        "{} {} on {:?} ({}): {}: {why}; verdict {:?}, reasons {:?}\n  {} bytes: {}\n  became {:?}: {}",
        loaded.column.action,
        loaded.column.parameters,
        at,
        loaded.hook,
        row.what,
        got.verdict,
        got.reasons,
        sent.len(),
        start(&sent),
        got.frames.iter().map(Vec::len).collect::<Vec<_>>(),
        frames.join("\n    "),
    )
}
