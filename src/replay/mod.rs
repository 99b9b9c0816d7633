// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs packets through the real programs of a chain, without a device.

pub mod capture;
pub mod veth;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::engine::counters::{self, Counters};
use crate::engine::generation::{self, CarrierChoice, Environment, Generation};
use crate::engine::names::SystemNames;
use crate::engine::{sets, sys};
use crate::error::{Invalid, did_you_mean};
use crate::hook::{Family, Hook};
use crate::plan::{self, Graph, Node, Successor};
use crate::policy::{Kind, Registry};
use crate::spec::{Chain, Spec};

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
}

/// A chain, loaded for one hook and attached nowhere.
pub struct Runner {
    hook: Hook,
    chain: String,
    graph: Graph,
    generation: Generation,
    sets: BTreeMap<String, OwnedFd>,
    before: Vec<Counters>,
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

    /// Runs one Ethernet frame.
    ///
    /// # Errors
    /// A frame that the kernel can run nowhere, or what it says.
    pub fn run(&mut self, frame: &[u8]) -> Result<Outcome> {
        let run = sys::test_run(&self.generation.entry, frame, None)
            .with_context(|| format!("run a frame of {} bytes", frame.len()))?;
        let verdict = Verdict::of(self.hook.family(), run.verdict);
        self.outcome(verdict, run.frame, "test_run")
    }

    /// Puts together what the counters tell of the one packet that ran since the last call.
    fn outcome(
        &mut self,
        verdict: Verdict,
        frame: Vec<u8>,
        carrier: &'static str,
    ) -> Result<Outcome> {
        let now = counters::read(&self.generation.counters)?;
        let counted: Vec<Counters> = now
            .iter()
            .zip(&self.before)
            .map(|(now, before)| now.since(before))
            .collect();
        self.before = now;
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
            at = self.next(node, count, &counted);
        }
        Ok(outcome)
    }

    /// Where the packet went from a node.
    fn next(&self, node: &Node, count: &Counters, counted: &[Counters]) -> Successor {
        let reached = |successor: &&Successor| matches!(successor, Successor::Node(index) if counted[*index].seen > 0);
        match node.kind {
            Kind::Selector if count.packets > 0 => node.next,
            Kind::Selector => node.otherwise,
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
