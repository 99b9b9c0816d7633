// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs packets through the real programs of a chain, without a device.

pub mod capture;
pub mod link;
pub mod veth;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::engine::attach::{Hold, Place};
use crate::engine::bpf::CONTEXT_SIZE;
use crate::engine::counters::{self, Counters};
use crate::engine::generation::{self, CarrierChoice, Environment, Generation};
use crate::engine::names::SystemNames;
use crate::engine::{sets, sys};
use crate::error::{Invalid, did_you_mean};
use crate::hook::{Family, Hook};
use crate::plan::{self, Graph, Node, Successor};
use crate::policy::{Kind, Registry};
use crate::spec::{Chain, Checksum, Mode, Spec};

use capture::{Reader, Writer};
use veth::VethCarrier;

/// What a hook does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    Drop,
    Tx,
    Redirect,
    Aborted,
}

impl Verdict {
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Drop => "drop",
            Verdict::Tx => "tx",
            Verdict::Redirect => "redirect",
            Verdict::Aborted => "aborted",
        }
    }

    /// From a program's return value (`enum xdp_action`, `TC_ACT_*`).
    fn of(family: Family, value: u32) -> Verdict {
        const TC_ACT_SHOT: u32 = 2;
        const TC_ACT_REDIRECT: u32 = 7;
        match (family, value) {
            (Family::Xdp, 1) | (Family::Tc, TC_ACT_SHOT) => Verdict::Drop,
            (Family::Xdp, 2) => Verdict::Pass,
            (Family::Xdp, 3) => Verdict::Tx,
            (Family::Xdp, 4) | (Family::Tc, TC_ACT_REDIRECT) => Verdict::Redirect,
            (Family::Xdp, _) => Verdict::Aborted,
            (Family::Tc, _) => Verdict::Pass,
        }
    }
}

/// What became of one packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub verdict: Verdict,
    /// The packet as it left, dropped or not.
    pub frame: Vec<u8>,
    /// Whether the chain's selectors took it.
    pub matched: bool,
    /// The nodes it ran through, in order.
    pub path: Vec<String>,
    /// Why nodes left it alone, in order.
    pub reasons: Vec<&'static str>,
    /// How it was run: `test_run`, or `veth` where the kernel's test run refuses the frame.
    pub carrier: &'static str,
}

impl Outcome {
    /// The line `replay --json` prints; `number` counts from 1, `input` is the packet before.
    pub fn to_json(&self, number: u64, input: &[u8]) -> Value {
        json!({
            "packet": number,
            "verdict": self.verdict.name(),
            "matched": self.matched,
            "path": self.path,
            "changed": self.frame != input,
            "reasons": self.reasons,
            "carrier": self.carrier,
        })
    }

    /// The line `replay` prints.
    pub fn line(&self, number: u64, input: &[u8]) -> String {
        let mut line = format!("{number:>6}  {:<8}", self.verdict.name());
        line.push_str(if self.matched {
            "  matched"
        } else {
            "         "
        });
        line.push_str(if self.frame == input {
            "           "
        } else {
            "  changed  "
        });
        line.push_str(&self.path.join(" -> "));
        if !self.reasons.is_empty() {
            line.push_str(&format!("  ({})", self.reasons.join(", ")));
        }
        line
    }
}

/// A chain, loaded for one hook and attached nowhere.
pub struct Runner {
    hook: Hook,
    chain: String,
    graph: Graph,
    generation: Generation,
    sets: BTreeMap<String, OwnedFd>,
    before: Vec<Counters>,
    carrier: Option<Carrier>,
}

/// What a chain asks for where it attaches to a hook.
fn checksum_at(chain: &Chain, hook: Hook) -> Checksum {
    let mut attach = chain.attach.iter().filter(|attach| attach.hook == hook);
    attach
        .next()
        .map_or(Checksum::Auto, |attach| attach.checksum)
}

/// The reason of an action whose turn it was not.
const NOT_DUE: &str = "not_due";
/// Length of an Ethernet header, in bytes.
const ETHERNET_HEADER: usize = 14;

/// A real device in a namespace of its own, running the chain.
struct Carrier {
    veth: VethCarrier,
    _hold: Hold,
}

impl Carrier {
    fn new(hook: Hook, generation: &Generation) -> Result<Carrier> {
        let veth = VethCarrier::new()?;
        let place = Place {
            device: "pc-in".to_owned(),
            ifindex: veth.device(veth::Side::In),
            hook,
            no_link: false,
        };
        let mode = match hook {
            Hook::Xdp => Mode::Native,
            Hook::TcIngress | Hook::TcEgress => Mode::Auto,
        };
        let (hold, _) =
            veth.in_namespace(|| place.attach(&generation.entry, mode, |_| Ok(())))??;
        Ok(Carrier { veth, _hold: hold })
    }
}

impl Runner {
    /// Loads the chain and the sub-chains it can go to. Named sets are there, and empty. Devices
    /// that do not exist here are accepted: nothing is sent.
    ///
    /// # Errors
    /// No such chain, or what cannot be planned or loaded.
    pub fn new(spec: &Spec, chain: &str, hook: Hook, carrier: CarrierChoice) -> Result<Runner> {
        let registry = Registry::embedded()?;
        let main = find(spec, chain)?;
        let subs: BTreeMap<String, &Chain> = spec
            .chains
            .iter()
            .filter(|other| other.attach.is_empty() && other.name != chain)
            .map(|sub| (sub.name.clone(), sub))
            .collect();
        let ids: BTreeMap<String, u32> = spec
            .chains
            .iter()
            .map(|chain| chain.name.clone())
            .zip(1u32..)
            .collect();
        let graph = plan::plan(hook, &[main], &subs, &ids, registry)?;
        let mut sets = BTreeMap::new();
        for (name, set) in &spec.sets {
            sets.insert(
                name.clone(),
                sets::create(registry, &set.kind, "pc_s_replay", set.size)?,
            );
        }
        let names = SystemNames {
            chains: &ids,
            any_device: true,
        };
        let environment = Environment {
            hook,
            no_link: false,
            carrier,
            registry,
            names: &names,
            sets: &sets,
            checksum: checksum_at(main, hook),
            state: &BTreeMap::new(),
        };
        let generation = generation::load(&graph, &environment)?;
        let before = counters::read(&generation.counters)?;
        Ok(Runner {
            hook,
            chain: chain.to_owned(),
            graph,
            generation,
            sets,
            before,
            carrier: None,
        })
    }

    /// The graph that runs.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The loaded programs and maps.
    pub fn generation(&self) -> &Generation {
        &self.generation
    }

    /// A named set of the chain file.
    pub fn set(&self, name: &str) -> Option<&OwnedFd> {
        self.sets.get(name)
    }

    /// Runs one Ethernet frame. A frame shorter than an Ethernet header gets to no hook of a real
    /// device either: it passes as it is.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn run(&mut self, frame: &[u8]) -> Result<Outcome> {
        if frame.len() < ETHERNET_HEADER {
            return Ok(Outcome {
                verdict: Verdict::Pass,
                frame: frame.to_vec(),
                matched: false,
                path: Vec::new(),
                reasons: vec!["truncated"],
                carrier: "none",
            });
        }
        match sys::test_run(&self.generation.entry, frame, None) {
            Ok(run) => {
                let verdict = Verdict::of(self.hook.family(), run.verdict);
                let mut left = run.frame;
                // A dropped packet keeps its context: metadata, which comes in front of it.
                if verdict == Verdict::Drop && self.generation.carrier == generation::DATA_META {
                    left.drain(..left.len().min(CONTEXT_SIZE as usize));
                }
                let counted = self.counted()?;
                Ok(self.outcome(verdict, left, &counted, "test_run"))
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.run_on_veth(frame),
            Err(error) => {
                Err(error).with_context(|| format!("run a frame of {} bytes", frame.len()))
            }
        }
    }

    /// Sends the frame through a real device of a private namespace, where the chain is attached.
    fn run_on_veth(&mut self, frame: &[u8]) -> Result<Outcome> {
        let marker = self.count_of_marker()?;
        if self.carrier.is_none() {
            self.carrier = Some(Carrier::new(self.hook, &self.generation)?);
        }
        let Some(carrier) = &self.carrier else {
            bail!("no device to send on");
        };
        let seen = carrier.veth.send(self.hook.into(), frame)?;
        let counted: Vec<Counters> = self
            .counted()?
            .iter()
            .zip(&marker)
            .map(|(both, marker)| both.since(marker))
            .collect();
        let (verdict, left) = match (seen.passed, seen.returned) {
            (Some(frame), _) => (Verdict::Pass, frame),
            (None, Some(frame)) => (Verdict::Tx, frame),
            (None, None) => (Verdict::Drop, frame.to_vec()),
        };
        let mut outcome = self.outcome(verdict, left, &counted, "veth");
        let redirects = |node: &Node| node.policy == "redirect" && node.terminal;
        let last = outcome.path.last();
        let last = self.graph.nodes.iter().find(|n| Some(&n.name()) == last);
        // Where it went, to loopback perhaps, says nothing of the verdict.
        if last.is_some_and(redirects) && outcome.reasons.is_empty() {
            outcome.verdict = Verdict::Redirect;
        }
        Ok(outcome)
    }

    /// What the frame that follows ours on the device, to tell a drop, adds to the counters.
    fn count_of_marker(&mut self) -> Result<Vec<Counters>> {
        let mut marker = vec![0u8; 60];
        marker[12..14].copy_from_slice(&veth::MARKER_ETHERTYPE.to_be_bytes());
        sys::test_run(&self.generation.entry, &marker, None).context("run a marker frame")?;
        self.counted()
    }

    /// What was counted since the last call.
    fn counted(&mut self) -> Result<Vec<Counters>> {
        let now = counters::read(&self.generation.counters)?;
        let before = std::mem::replace(&mut self.before, now);
        Ok(self
            .before
            .iter()
            .zip(&before)
            .map(|(now, before)| now.since(before))
            .collect())
    }

    /// Puts together what the counters tell of one packet.
    fn outcome(
        &self,
        verdict: Verdict,
        frame: Vec<u8>,
        counted: &[Counters],
        carrier: &'static str,
    ) -> Outcome {
        let mut outcome = Outcome {
            verdict,
            frame,
            matched: false,
            path: Vec::new(),
            reasons: Vec::new(),
            carrier,
        };
        if let Some(entry) = counted.last() {
            outcome
                .reasons
                .extend(entry.named_reasons().map(|(name, _)| name));
        }
        let mut at = self.graph.entry;
        while let Successor::Node(index) = at {
            let (node, count) = (&self.graph.nodes[index], &counted[index]);
            if count.seen == 0 {
                break;
            }
            outcome.path.push(node.name());
            outcome
                .reasons
                .extend(count.named_reasons().map(|(name, _)| name));
            outcome.matched |=
                node.chain == self.chain && node.counts_for_chain && count.packets > 0;
            at = self.next(node, count, counted);
        }
        outcome
    }

    /// Where the packet went from a node.
    fn next(&self, node: &Node, count: &Counters, counted: &[Counters]) -> Successor {
        let reached = |successor: &&Successor| matches!(successor, Successor::Node(index) if counted[*index].seen > 0);
        match node.kind {
            Kind::Selector if count.packets > 0 => node.next,
            Kind::Selector => node.otherwise,
            Kind::Action if count.named_reasons().any(|(name, _)| name == NOT_DUE) => node.later,
            Kind::Action if count.given_up() > 0 => node.otherwise,
            Kind::Action if node.is_verdict_map() => {
                let head = self.graph.heads.values().find(reached);
                head.copied().unwrap_or(Successor::Pass)
            }
            Kind::Action if node.terminal && node.goto_target().is_none() => Successor::Pass,
            Kind::Action => node.next,
        }
    }
}

fn find<'a>(spec: &'a Spec, name: &str) -> Result<&'a Chain, Invalid> {
    let found = spec.chains.iter().find(|chain| chain.name == name);
    found.ok_or_else(|| {
        let names: Vec<&str> = spec.chains.iter().map(|c| c.name.as_str()).collect();
        Invalid::new(
            "--chain",
            format!("\"{name}\"{}", did_you_mean(name, names.iter().copied())),
            format!("a chain of the file: {}", names.join(", ")),
        )
    })
}

/// Runs the packets of a capture file through a chain; those not dropped go to `output`, with
/// their timestamps. Calls `each` with the number of the packet (from 1), what it was, and what
/// became of it.
///
/// # Errors
/// A file that cannot be read or written, or what the kernel says.
pub fn capture(
    runner: &mut Runner,
    input: &Path,
    output: Option<&Path>,
    mut each: impl FnMut(u64, &[u8], &Outcome) -> Result<()>,
) -> Result<()> {
    let mut reader = Reader::open(input)?;
    let mut writer = match output {
        Some(output) => Some(Writer::create(output, &reader)?),
        None => None,
    };
    let mut number = 0;
    while let Some(packet) = reader.next_packet()? {
        number += 1;
        let outcome = runner
            .run(&packet.frame)
            .with_context(|| format!("packet {number} of {}", input.display()))?;
        each(number, &packet.frame, &outcome)?;
        if let (Some(writer), false) = (&mut writer, outcome.verdict == Verdict::Drop) {
            writer.write(&packet, &outcome.frame)?;
        }
    }
    match writer {
        Some(writer) => writer.finish(),
        None => Ok(()),
    }
}
