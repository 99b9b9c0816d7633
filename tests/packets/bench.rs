// SPDX-License-Identifier: MIT OR Apache-2.0
//! A chain loaded on every hook, and what every packet through it must hold to.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;

use policy_chain::engine::bpf::types::element;
use policy_chain::engine::bpf::value_of;
use policy_chain::engine::generation::CarrierChoice;
use policy_chain::engine::names::SystemNames;
use policy_chain::engine::sets;
use policy_chain::engine::sys;
use policy_chain::hook::Hook;
use policy_chain::policy::Registry;
use policy_chain::replay::{Outcome, Runner, Verdict};
use policy_chain::spec::Spec;
use serde_json::{Value, json};

use crate::frames::{Frame, Sums, sums};

/// The name of the chain that runs; others are sub-chains.
const MAIN: &str = "main";

/// Hooks on which something holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    All,
    Ingress,
    Egress,
    Nowhere,
}

impl On {
    pub fn holds(self, hook: Hook) -> bool {
        match self {
            On::All => true,
            On::Ingress => hook.is_ingress(),
            On::Egress => !hook.is_ingress(),
            On::Nowhere => false,
        }
    }
}

/// One chain on one hook.
pub struct Bench {
    pub hook: Hook,
    /// The chain file says what checksums are, true or not.
    told: bool,
    runner: Runner,
    ids: BTreeMap<String, u32>,
    runs: u64,
}

/// What one packet must come out as.
pub struct Want<'a> {
    pub verdict: Verdict,
    pub matched: bool,
    pub reasons: &'a [&'a str],
    pub frame: &'a [u8],
}

/// Ids under which `store` knows chains `gone-ID` that no generation has.
const GONE: [u32; 3] = [0, 5, 1000];

impl Bench {
    /// Loads a chain file's content on one hook.
    pub fn load(file: &Value, hook: Hook, carrier: CarrierChoice) -> Bench {
        let registry = Registry::embedded().unwrap();
        let spec = Spec::parse(&file.to_string(), Path::new("rows.json"), registry)
            .unwrap_or_else(|error| panic!("{error}\n{file}"));
        let runner = Runner::new(&spec, MAIN, hook, carrier)
            .unwrap_or_else(|error| panic!("{hook}: {error:?}\n{file}"));
        let names = spec.chains.iter().map(|chain| chain.name.clone());
        Bench {
            hook,
            told: ["complete", "partial"]
                .iter()
                .any(|told| file["chains"][0]["attach"][0]["checksum"] == *told),
            runner,
            ids: names.zip(1..).collect(),
            runs: 0,
        }
    }

    /// Stores elements in a named set.
    pub fn store(&self, set: &str, kind: &str, elements: Value) {
        let registry = Registry::embedded().unwrap();
        let items: Vec<_> = elements
            .as_array()
            .unwrap()
            .iter()
            .map(|item| item.as_object().unwrap().clone())
            .collect();
        let mut ids = self.ids.clone();
        for id in GONE {
            ids.insert(format!("gone-{id}"), id);
        }
        let names = SystemNames {
            chains: &ids,
            any_device: true,
        };
        let layout = &registry.set_kind(kind).unwrap().layout;
        let map = self.runner.set(set).unwrap();
        sets::store(map, layout, &items, set, &names).unwrap();
    }

    /// A map that is kept from one generation to the next.
    pub fn state(&self, map: &str) -> &OwnedFd {
        &self.runner.generation().state[map]
    }

    /// How many elements a named set has.
    pub fn elements(&self, set: &str) -> usize {
        let map = self.runner.set(set).unwrap();
        sys::map_dump(map).unwrap().len()
    }

    /// When the elements of a named set expire, in seconds of its clock.
    pub fn expiries(&self, set: &str) -> Vec<u32> {
        let entries = sys::map_dump(self.runner.set(set).unwrap()).unwrap();
        let elements = entries.iter().map(|(_, value)| value_of::<element>(value));
        elements.map(|it| it.unwrap().expires).collect()
    }

    /// Runs a frame and checks what holds for every packet and every chain.
    pub fn run(&mut self, what: &str, frame: &[u8]) -> Outcome {
        let hook = self.hook;
        self.runs += 1;
        let outcome = self
            .runner
            .run(frame)
            .unwrap_or_else(|error| panic!("{what} on {hook}: {error:?}"));
        let shown = || {
            let text = outcome.to_json(1, frame);
            format!("{what} on {hook}: {text}\n{}", hex(frame))
        };
        assert_ne!(outcome.verdict, Verdict::Aborted, "{}", shown());
        assert!(!outcome.reasons.contains(&"half_done"), "{}", shown());
        assert!(
            !outcome.reasons.contains(&"tail_call_missed"),
            "{}",
            shown()
        );
        match sums(frame) {
            _ if self.told => {}
            Sums::Right => assert_eq!(sums(&outcome.frame), Sums::Right, "{}", shown()),
            // TC is told which packets are partial, and these are not
            Sums::Seed if hook == Hook::Xdp => {
                let left = match outcome.verdict {
                    Verdict::Redirect => Sums::Right,
                    _ => Sums::Seed,
                };
                assert_eq!(sums(&outcome.frame), left, "{}", shown());
            }
            _ => {}
        }
        outcome
    }

    /// Runs a frame that must come out as `want` says.
    #[track_caller]
    pub fn check(&mut self, what: &str, frame: &[u8], want: &Want) {
        let hook = self.hook;
        let outcome = self.run(what, frame);
        let text = outcome.to_json(1, frame);
        assert_eq!(
            outcome.reasons, want.reasons,
            "reasons: {what} on {hook}: {text}"
        );
        assert_eq!(outcome.verdict, want.verdict, "{what} on {hook}: {text}");
        assert_eq!(
            outcome.matched, want.matched,
            "matched: {what} on {hook}: {text}"
        );
        assert_eq!(
            hex(&outcome.frame),
            hex(want.frame),
            "frame: {what} on {hook}: {text}"
        );
    }
}

/// Whoever shows the output of tests can add up how many packets ran (`make kernels` does).
impl Drop for Bench {
    fn drop(&mut self) {
        println!("{} packets", self.runs);
    }
}

/// A file with the chain `main`, to which `members` belong.
pub fn file(members: Value) -> Value {
    with_chains(members, json!([]), json!({}))
}

/// As [`file`], with more chains and with sets.
pub fn with_chains(members: Value, others: Value, sets: Value) -> Value {
    let mut chain = json!({ "name": MAIN, "attach": [{ "device": "lo", "hook": "xdp" }] });
    chain
        .as_object_mut()
        .unwrap()
        .extend(members.as_object().unwrap().clone());
    let mut chains = vec![chain];
    chains.extend(others.as_array().unwrap().iter().cloned());
    json!({ "version": 1, "sets": sets, "chains": chains })
}

/// One packet for a chain of selectors.
pub struct Probe {
    what: &'static str,
    frame: Vec<u8>,
    on: On,
    reasons: &'static [&'static str],
}

/// A packet that the selectors match on some hooks.
pub fn probe(what: &'static str, frame: &Frame, on: On) -> Probe {
    raw_probe(what, frame.build(), on)
}

pub fn raw_probe(what: &'static str, frame: Vec<u8>, on: On) -> Probe {
    Probe {
        what,
        frame,
        on,
        reasons: &[],
    }
}

impl Probe {
    pub fn because(mut self, reasons: &'static [&'static str]) -> Probe {
        self.reasons = reasons;
        self
    }
}

/// Runs packets through selectors on every hook. What matches is dropped, the rest passes.
#[track_caller]
pub fn select(selectors: Value, probes: &[Probe]) {
    select_in(&json!({}), |_| {}, selectors, probes);
}

/// As [`select`], with named sets that `fill` fills.
#[track_caller]
pub fn select_in(sets: &Value, fill: impl Fn(&Bench), selectors: Value, probes: &[Probe]) {
    let members = json!({ "selectors": selectors, "then": "drop" });
    let file = with_chains(members, json!([]), sets.clone());
    for hook in Hook::ALL {
        let mut bench = Bench::load(&file, hook, CarrierChoice::Auto);
        fill(&bench);
        for probe in probes {
            let matched = probe.on.holds(hook);
            let verdict = if matched {
                Verdict::Drop
            } else {
                Verdict::Pass
            };
            let want = Want {
                verdict,
                matched,
                reasons: probe.reasons,
                frame: &probe.frame,
            };
            bench.check(&format!("{selectors}: {}", probe.what), &probe.frame, &want);
        }
    }
}

/// One packet for a chain of actions.
#[derive(Clone)]
pub struct Row {
    what: String,
    input: Vec<u8>,
    output: Vec<u8>,
    verdict: Verdict,
    reasons: Vec<&'static str>,
}

/// A packet that comes out as another.
pub fn gives(what: impl Into<String>, input: &Frame, output: &Frame) -> Row {
    raw_gives(what, input.build(), output.build())
}

pub fn raw_gives(what: impl Into<String>, input: Vec<u8>, output: Vec<u8>) -> Row {
    Row {
        what: what.into(),
        input,
        output,
        verdict: Verdict::Pass,
        reasons: Vec::new(),
    }
}

/// A packet that is left alone for a reason.
pub fn leaves(what: impl Into<String>, input: &Frame, reason: &'static str) -> Row {
    raw_leaves(what, input.build(), reason)
}

pub fn raw_leaves(what: impl Into<String>, input: Vec<u8>, reason: &'static str) -> Row {
    Row {
        what: what.into(),
        output: input.clone(),
        input,
        verdict: Verdict::Pass,
        reasons: vec![reason],
    }
}

impl Row {
    pub fn verdict(mut self, verdict: Verdict) -> Row {
        self.verdict = verdict;
        self
    }

    /// What comes out although something gave up.
    pub fn output(mut self, frame: &Frame) -> Row {
        self.output = frame.build();
        self
    }

    /// More reasons, of later nodes.
    pub fn and(mut self, reason: &'static str) -> Row {
        self.reasons.push(reason);
        self
    }
}

/// Runs packets through one action on every hook.
#[track_caller]
pub fn act(action: Value, rows: &[Row]) {
    act_in(file(json!({ "actions": [action] })), &Hook::ALL, rows);
}

/// Runs packets that all match through a chain file on some hooks.
#[track_caller]
pub fn act_in(file: Value, hooks: &[Hook], rows: &[Row]) {
    for hook in hooks {
        let mut bench = Bench::load(&file, *hook, CarrierChoice::Auto);
        check_rows(&mut bench, &file["chains"][0]["actions"].to_string(), rows);
    }
}

/// Runs packets that all match through a loaded chain.
#[track_caller]
pub fn check_rows(bench: &mut Bench, name: &str, rows: &[Row]) {
    for row in rows {
        let want = Want {
            verdict: row.verdict,
            matched: true,
            reasons: &row.reasons,
            frame: &row.output,
        };
        bench.check(&format!("{name}: {}", row.what), &row.input, &want);
    }
}

fn hex(bytes: &[u8]) -> String {
    let rows: Vec<String> = bytes
        .chunks(16)
        .map(|row| row.iter().map(|byte| format!("{byte:02x} ")).collect())
        .collect();
    rows.join("\n")
}
