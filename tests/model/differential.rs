// SPDX-License-Identifier: MIT OR Apache-2.0
//! The real programs against the model, packet by packet.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use policy_chain::engine::generation::CarrierChoice;
use policy_chain::engine::names::SystemNames;
use policy_chain::engine::sets;
use policy_chain::hook::{Family, Hook};
use policy_chain::policy::Registry;
use policy_chain::replay::{Outcome, Runner, Verdict};
use policy_chain::spec::Spec;
use serde_json::{Map, Value};

use crate::judge::{Event, Expected, MAIN, Model};
use crate::layers;
use crate::sums::{self, Kind};

/// A chain that elements name, though it is not there any more, and the id it had.
pub const GONE: (&str, u32) = ("gone", 1000);

/// Most bytes that the kernel's test run takes on TC.
pub const TC_MOST: usize = 3712;
/// Most that it takes on XDP, with some distance.
const XDP_MOST: usize = 65536;

/// Whether a frame has to go through a real device, which takes long.
pub fn needs_device(hook: Hook, frame: &[u8]) -> bool {
    let least = match frame[12..14] {
        [0x08, 0x00] => 34,
        [0x86, 0xdd] => 54,
        _ => 14,
    };
    match hook.family() {
        Family::Xdp => frame.len() > XDP_MOST,
        Family::Tc => frame.len() < least || frame.len() > TC_MOST,
    }
}

/// One chain, loaded on one hook, and its model.
pub struct Session {
    runner: Runner,
    model: Model,
}

impl Session {
    /// # Errors
    /// What the product says of the file.
    pub fn new(file: &Value, hook: Hook) -> Result<Session, String> {
        let registry = Registry::embedded().unwrap();
        let mut product = file.clone();
        let elements = product.as_object_mut().and_then(|it| it.remove("elements"));
        let spec = Spec::parse(&product.to_string(), Path::new("model.json"), registry)
            .map_err(|error| error.to_string())?;
        let runner = Runner::new(&spec, MAIN, hook, CarrierChoice::Auto)
            .map_err(|error| format!("{error:?}"))?;
        if let Some(Value::Object(elements)) = elements {
            fill(&spec, &runner, &elements);
        }
        let model = Model::new(file, hook);
        Ok(Session { runner, model })
    }

    /// Runs a frame through both. What the kernel made of it and what it should have, with how
    /// these differ.
    pub fn run(&mut self, frame: &[u8]) -> (Expected, Outcome, Result<(), String>) {
        let expected = self.model.judge(frame);
        let outcome = self.runner.run(frame).unwrap();
        let compared = compare(frame, &expected, &outcome);
        (expected, outcome, compared)
    }
}

/// Stores elements in the named sets, as `set load` does.
fn fill(spec: &Spec, runner: &Runner, elements: &Map<String, Value>) {
    let registry = Registry::embedded().unwrap();
    let chains = spec.chains.iter().map(|chain| chain.name.clone());
    let mut ids: BTreeMap<String, u32> = chains.zip(1..).collect();
    ids.insert(GONE.0.to_owned(), GONE.1);
    let names = SystemNames {
        chains: &ids,
        any_device: true,
    };
    for (set, items) in elements {
        // pruned files may have lost it
        let (Some(map), Some(described)) = (runner.set(set), spec.sets.get(set)) else {
            continue;
        };
        let items = items.as_array().unwrap().iter();
        let items: Vec<_> = items
            .map(|item| item.as_object().unwrap().clone())
            .collect();
        let layout = &registry.set_kind(&described.kind).unwrap().layout;
        sets::store(map, layout, &items, set, &names).unwrap();
    }
}

fn compare(input: &[u8], expected: &Expected, outcome: &Outcome) -> Result<(), String> {
    let mut wrong = String::new();
    let mut differ = |what: &str, model: String, programs: String| {
        if model != programs {
            writeln!(wrong, "  {what}: model {model}, programs {programs}").unwrap();
        }
    };
    let debug = |verdict: Verdict| format!("{verdict:?}");
    differ("verdict", debug(expected.verdict), debug(outcome.verdict));
    differ(
        "matched",
        expected.matched.to_string(),
        outcome.matched.to_string(),
    );
    differ(
        "reasons",
        expected.reasons.join(", "),
        outcome.reasons.join(", "),
    );
    // what a real device swallows nobody sees again
    if outcome.carrier == "test_run" || outcome.verdict == Verdict::Pass {
        differ("frame", shown(&expected.frame), shown(&outcome.frame));
    }
    if outcome.carrier == "test_run" {
        if let Err(error) = keeps_checksums(expected.checksum, input, outcome) {
            writeln!(wrong, "  {error}").unwrap();
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong) }
}

/// Holds without any model: who gets a right checksum gives a right one.
fn keeps_checksums(told: Option<Kind>, input: &[u8], outcome: &Outcome) -> Result<(), String> {
    let after = sums::verify(&outcome.frame);
    // headers that policies do not read: nobody knows what to complete
    let readable = layers::tcp(input).is_ok();
    let kept = match (sums::verify(input), told) {
        (sums::Verdict::Right, None | Some(Kind::Complete)) => after == sums::Verdict::Right,
        (sums::Verdict::Seed, None | Some(Kind::Partial)) => match outcome.verdict {
            Verdict::Redirect if readable => after == sums::Verdict::Right,
            _ => after == sums::Verdict::Seed,
        },
        _ => true,
    };
    if kept {
        return Ok(());
    }
    Err(format!("checksums became {after:?}"))
}

fn shown(frame: &[u8]) -> String {
    if frame.len() <= 200 {
        return hex(frame);
    }
    let (head, rest) = frame.split_at(160);
    let sum = rest.iter().enumerate();
    let sum = sum.fold(0u32, |sum, (at, byte)| {
        sum.rotate_left(1) ^ (u32::from(*byte) + at as u32)
    });
    format!("{}... ({} bytes, {sum:08x})", hex(head), frame.len())
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Runs sequences of frames, each through a chain that has seen nothing before.
pub struct Replayer {
    hook: Hook,
    loaded: Option<(Value, Session)>,
}

impl Replayer {
    pub fn new(hook: Hook) -> Replayer {
        Replayer { hook, loaded: None }
    }

    /// What is wrong with the outcome, if anything is.
    pub fn difference(&mut self, file: &Value, frames: &[Vec<u8>]) -> Option<String> {
        // loading takes longer than everything else
        let usable =
            |(loaded, session): &mut (Value, Session)| loaded == file && !session.model.remembers();
        let kept = self.loaded.take_if(usable);
        let session = match kept {
            Some((_, session)) => session,
            None => Session::new(file, self.hook).ok()?,
        };
        let (_, session) = self.loaded.insert((file.clone(), session));
        frames.iter().find_map(|frame| session.run(frame).2.err())
    }
}

/// What a failure prints: to be pasted into rows.rs.
pub fn row(file: &Value, hook: Hook, frames: &[Vec<u8>]) -> String {
    let frames: Vec<String> = frames
        .iter()
        .map(|frame| format!("            \"{}\",\n", hex(frame)))
        .collect();
    format!(
        "    Row {{\n        what: \"\",\n        file: r#\"{file}\"#,\n        hook: Hook::{hook:?},\n        \
         frames: &[\n{}        ],\n    }},",
        frames.concat()
    )
}

#[derive(Default)]
struct Done {
    yes: u64,
    no: u64,
    changed: u64,
}

/// What packets were run, and what became of them.
#[derive(Default)]
pub struct Tally {
    pub chains: u64,
    pub packets: u64,
    verdicts: BTreeMap<&'static str, u64>,
    changed: u64,
    resized: u64,
    matched: u64,
    by_device: u64,
    /// Number of the chain from which on another one may use a device.
    pub next_by_device: u64,
    /// Not run, to save time.
    pub skipped: u64,
    tcp: u64,
    reasons: BTreeMap<&'static str, u64>,
    inputs: BTreeMap<String, u64>,
    /// Matched and missed.
    selectors: BTreeMap<String, Done>,
    /// Done and given up.
    actions: BTreeMap<String, Done>,
}

impl Tally {
    pub fn add(&mut self, input: &[u8], expected: &Expected, outcome: &Outcome) {
        self.packets += 1;
        *self.verdicts.entry(outcome.verdict.name()).or_default() += 1;
        self.changed += u64::from(outcome.frame != input);
        self.resized += u64::from(outcome.frame.len() != input.len());
        self.matched += u64::from(outcome.matched);
        self.by_device += u64::from(outcome.carrier == "veth");
        self.tcp += u64::from(layers::tcp(input).is_ok());
        let sums = format!("{:?}", sums::verify(input));
        *self.inputs.entry(sums).or_default() += 1;
        for reason in &outcome.reasons {
            *self.reasons.entry(reason).or_default() += 1;
        }
        for event in &expected.events {
            let (done, yes, changed) = match event {
                Event::Selector { policy, matched } => {
                    (self.selectors.entry(policy.clone()), *matched, false)
                }
                Event::Action {
                    policy,
                    done,
                    changed,
                } => (self.actions.entry(policy.clone()), *done, *changed),
            };
            let done = done.or_default();
            *(if yes { &mut done.yes } else { &mut done.no }) += 1;
            done.changed += u64::from(changed);
        }
    }

    pub fn print(&self, hook: Hook) {
        let share = |count: u64| 100.0 * count as f64 / self.packets as f64;
        let list = |counts: &mut dyn Iterator<Item = (String, u64)>| {
            let items: Vec<String> = counts
                .map(|(name, count)| format!("{name} {count}"))
                .collect();
            items.join(", ")
        };
        let named = |(name, count): (&&str, &u64)| (name.to_string(), *count);
        println!(
            "{hook}: {} packets through {} chains, {} by a device, {} skipped",
            self.packets, self.chains, self.by_device, self.skipped
        );
        println!(
            "  {:.1} % whole TCP headers, {:.1} % matched, {:.1} % changed, {:.1} % of another length",
            share(self.tcp),
            share(self.matched),
            share(self.changed),
            share(self.resized)
        );
        println!("  verdicts: {}", list(&mut self.verdicts.iter().map(named)));
        let inputs = self
            .inputs
            .iter()
            .map(|(name, count)| (name.clone(), *count));
        println!("  TCP checksums before: {}", list(&mut { inputs }));
        println!("  reasons: {}", list(&mut self.reasons.iter().map(named)));
        for (name, done) in &self.selectors {
            println!("  {name}: matched {}, missed {}", done.yes, done.no);
        }
        for (name, done) in &self.actions {
            let (yes, no, changed) = (done.yes, done.no, done.changed);
            println!("  {name}: done {yes}, changed {changed}, gave up {no}");
        }
    }

    /// That the packets said something of every policy.
    pub fn check(&self, hook: Hook) {
        let registry = Registry::embedded().unwrap();
        let least = |count: u64, share: f64, what: &str| {
            let wanted = (self.packets as f64 * share) as u64;
            assert!(
                count >= wanted.max(1),
                "{hook}: {what}: {count}, of {wanted}"
            );
        };
        least(self.tcp, 0.5, "whole TCP headers");
        least(self.matched, 0.4, "matched");
        least(self.changed, 0.06, "changed");
        least(self.resized, 0.006, "of another length");
        for verdict in ["pass", "drop", "redirect"] {
            let count = self.verdicts.get(verdict).copied();
            least(count.unwrap_or_default(), 0.01, verdict);
        }
        for policy in registry.selectors() {
            let done = self.selectors.get(&policy.name);
            let done = done.unwrap_or_else(|| panic!("{hook}: no {}", policy.name));
            let rare = policy.name == "mptcp_connection";
            let share = if rare { 0.0005 } else { 0.002 };
            least(done.yes, share, &format!("{} matched", policy.name));
            least(done.no, 0.002, &format!("{} missed", policy.name));
        }
        for policy in registry.actions() {
            let done = self.actions.get(&policy.name);
            let done = done.unwrap_or_else(|| panic!("{hook}: no {}", policy.name));
            let name = policy.name.as_str();
            let changes =
                !["count", "drop", "goto", "learn", "pass", "record", "report"].contains(&name);
            // few packets are of a subflow that is known well enough
            let rare = [
                "add_subflow",
                "hold_add_addr",
                "mp_prio",
                "remove_addr",
                "restore_add_addr",
            ];
            let rare = rare.contains(&name);
            let share = if changes && !rare { 0.001 } else { 0.0 };
            least(done.yes, share, &format!("{name} done"));
            if changes {
                least(done.changed, share, &format!("{name} changed"));
                least(done.no, 0.001, &format!("{name} gave up"));
            }
        }
        for reason in self.expected_reasons(hook) {
            let count = self.reasons.get(reason).copied();
            least(count.unwrap_or_default(), 0.0, reason);
        }
    }

    /// What packets and chains alone can bring about.
    fn expected_reasons(&self, hook: Hook) -> Vec<&'static str> {
        let mut reasons = vec![
            "not_ip",
            "not_tcp",
            "not_syn",
            "fragment",
            "syn",
            "truncated",
            "bad_header",
            "bad_option",
            "extension_headers",
            "option_absent",
            "option_present",
            "not_lower",
            "no_room",
            "no_element",
            "bad_argument",
            "no_chain",
            "no_route",
            "no_neighbour",
            "ttl_expired",
            "unknown_scale",
            "authenticated",
            "not_due",
            "not_mptcp",
            "unsafe",
            "no_keys",
            "not_held",
            "old_segment",
            "not_reported",
        ];
        if hook == Hook::Xdp {
            reasons.extend(["checksum_unclear", "checksum_partial"]);
        }
        reasons
    }
}
