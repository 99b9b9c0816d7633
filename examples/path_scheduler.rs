// SPDX-License-Identifier: MIT OR Apache-2.0
//! A path scheduler: of each MPTCP connection, the path with the lower round-trip time is active
//! and the others are backup. It moves within a second when round-trip times change.
//!
//! ```text
//! path_scheduler [--bpffs DIR] DEVICE DEVICE...      as root, on the host that sends the data
//! ```
//!
//! How: a chain records the round-trip times of every subflow, and another asks both hosts, by
//! MP_PRIO, to use the flows of a set as backup or not. A path that carries nothing has no
//! round-trip time, so where the active path has become slow the next one is tried: it stays if it
//! is faster, else the connection goes back. From time to time another path is tried in any case.
//! Subflows are woken, for nothing can be asked without a packet. Connections that were there before
//! are left alone: their handshakes were not seen. Chains go when it ends.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use policy_chain::agent::{self, Failures, inject::Injector};
use policy_chain::engine::apply::{self, Options};
use policy_chain::engine::sets::NamedSet;
use policy_chain::engine::store::{DEFAULT_FOLDER, Store};
use policy_chain::monitor::connections::{self, Connection, State, Subflow};
use policy_chain::monitor::event::hex;
use policy_chain::policy::Registry;
use policy_chain::spec::Spec;
use serde_json::{Map, Value, json};

const SET: &str = "path-scheduler";
const OBSERVE: &str = "path-scheduler-observe";
const ASK: &str = "path-scheduler-ask";

/// Between two looks at the connections.
const TICK: Duration = Duration::from_millis(40);
/// What a path's round-trip time is the least of, of late.
const WINDOW: Duration = Duration::from_millis(250);
/// A path so much slower than it was is to be compared with the others.
const SLOWER: f64 = 1.5;
/// A difference below that is none.
const NOISE: Duration = Duration::from_millis(1);
/// How long a path is tried before it is judged.
const TRIAL: Duration = Duration::from_millis(300);
/// How long it may take to carry anything.
const TRIAL_MAX: Duration = Duration::from_secs(2);
/// Another path is tried after so long in any case.
const PROBE: Duration = Duration::from_secs(15);

#[allow(dead_code)] // of a test that includes this file
fn main() -> Result<()> {
    let mut folder = PathBuf::from(DEFAULT_FOLDER);
    let mut devices = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bpffs" => folder = arguments.next().context("--bpffs takes a folder")?.into(),
            _ => devices.push(argument),
        }
    }
    if devices.len() < 2 {
        bail!("usage: path_scheduler [--bpffs DIR] DEVICE DEVICE...");
    }
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    agent::on_stop(move || flag.store(true, Ordering::Relaxed))?;
    run(&folder, &devices, &stop)
}

/// Schedules until told to stop.
pub fn run(folder: &Path, devices: &[String], stop: &AtomicBool) -> Result<()> {
    let spec = chains(devices)?;
    apply::apply(&Store::lock(folder)?, &spec, Options::default())?;
    let mut scheduler = Scheduler::new(folder);
    let mut result = Ok(());
    while result.is_ok() && !stop.load(Ordering::Relaxed) {
        result = scheduler.tick(&Store::open(folder)?);
        thread::sleep(TICK);
    }
    let names = [OBSERVE, ASK].map(str::to_owned);
    apply::delete(&Store::lock(folder)?, &names, false)?;
    result
}

fn chains(devices: &[String]) -> Result<Spec> {
    let attach: Vec<Value> = devices
        .iter()
        .flat_map(|device| {
            ["tc-ingress", "tc-egress"].map(|hook| json!({ "device": device, "hook": hook }))
        })
        .collect();
    let file = json!({
        "version": 1,
        "sets": { SET: { "kind": "flow", "size": 10000 } },
        "chains": [
            {
                "name": OBSERVE,
                "attach": attach,
                "actions": [ { "action": "record" } ],
                "then": "continue"
            },
            {
                "name": ASK,
                "attach": attach,
                "selectors": [ { "selector": "flow", "set": SET } ],
                "actions": [
                    { "action": "mp_prio", "backup": { "from": "element" }, "every": "100ms" }
                ],
                "then": "continue"
            }
        ]
    });
    Ok(Spec::parse(
        &file.to_string(),
        "path_scheduler".as_ref(),
        Registry::embedded()?,
    )?)
}

/// Two ends, this host's first.
type Flow = [SocketAddr; 2];

struct Scheduler {
    choices: HashMap<u32, Choice>,
    /// Flows in the set, with what is asked for them.
    asked: HashMap<Flow, bool>,
    injector: Injector,
    failures: Failures,
}

impl Scheduler {
    fn new(folder: &Path) -> Scheduler {
        Scheduler {
            choices: HashMap::new(),
            asked: HashMap::new(),
            injector: Injector::new(folder),
            failures: Failures::default(),
        }
    }

    fn tick(&mut self, store: &Store) -> Result<()> {
        let now = Instant::now();
        let found = connections::read(store)?;
        let mut wanted = HashMap::new();
        let mut alive = Vec::new();
        for connection in &found {
            let Some((token, subflows)) = candidates(connection) else {
                continue;
            };
            alive.push(token);
            let choice = self
                .choices
                .entry(token)
                .or_insert_with(|| Choice::new(now));
            choice.observe(&subflows, now);
            if let Some(why) = choice.decide(&subflows, now) {
                println!("{}: {why}", hex(token));
            }
            for subflow in subflows {
                let backup = choice.active.as_ref() != Some(&flow(subflow));
                let unasked = subflow.local.backup != backup || subflow.remote.backup != backup;
                if unasked || (backup && choice.is_unheard(&flow(subflow), now)) {
                    wanted.insert(flow(subflow), backup);
                }
            }
        }
        self.choices.retain(|token, _| alive.contains(token));
        self.ask(store, wanted)
    }

    /// Makes the set say what is wanted, and wakes the flows that have to hear it.
    fn ask(&mut self, store: &Store, wanted: HashMap<Flow, bool>) -> Result<()> {
        let set = NamedSet::open(store, SET)?;
        let done = self.asked.keys().filter(|flow| !wanted.contains_key(*flow));
        set.delete(&done.map(element).collect::<Vec<_>>())?;
        let new = wanted
            .iter()
            .filter(|(flow, backup)| self.asked.get(*flow) != Some(backup));
        let new: Vec<Map<String, Value>> = new
            .map(|(flow, backup)| {
                let mut element = element(flow);
                element.insert("arg".to_owned(), u64::from(*backup).into());
                element
            })
            .collect();
        set.add(&new)?;
        self.asked = wanted;
        if self.asked.is_empty() {
            return Ok(());
        }
        // A path that cannot be woken is no reason to leave the others alone.
        if let Err(error) = self.injector.wake(store, self.asked.keys().copied()) {
            self.failures.say(&format!("{error:#}"));
        }
        Ok(())
    }
}

/// The subflows of a connection that data can take, if there is a choice.
fn candidates(connection: &Connection) -> Option<(u32, Vec<&Subflow>)> {
    let token = connection.tokens[0].or(connection.tokens[1])?;
    let usable = |subflow: &&Subflow| subflow.state == State::Established;
    let subflows: Vec<&Subflow> = connection.subflows.iter().filter(usable).collect();
    (subflows.len() > 1).then_some((token, subflows))
}

fn flow(subflow: &Subflow) -> Flow {
    [subflow.local.address, subflow.remote.address]
}

fn element([local, remote]: &Flow) -> Map<String, Value> {
    let members = [
        ("local", local.ip().to_string().into()),
        ("local_port", local.port().into()),
        ("remote", remote.ip().to_string().into()),
        ("remote_port", remote.port().into()),
    ];
    members
        .map(|(name, value)| (name.to_owned(), value))
        .into_iter()
        .collect()
}

/// The round-trip times of one path.
#[derive(Default)]
struct Times {
    last: Duration,
    /// Of late, with when they were seen.
    samples: Vec<(Instant, Duration)>,
    /// What it was when it was last chosen or left.
    known: Option<Duration>,
    /// Payload sent on it, both ways, and when that was last more.
    bytes: u64,
    carried_at: Option<Instant>,
}

impl Times {
    fn add(&mut self, rtt: Duration, now: Instant) {
        // The same time twice to the nanosecond is the same sample.
        if rtt != self.last {
            self.last = rtt;
            self.samples.push((now, rtt));
        }
        self.samples.retain(|(at, _)| now - *at < WINDOW);
    }

    fn least(&self) -> Option<Duration> {
        self.samples.iter().map(|(_, rtt)| *rtt).min()
    }
}

/// Which path a connection uses, and why.
struct Choice {
    active: Option<Flow>,
    since: Instant,
    /// The path that was left to try the active one.
    trial_of: Option<Flow>,
    times: HashMap<Flow, Times>,
}

impl Choice {
    fn new(now: Instant) -> Choice {
        Choice {
            active: None,
            since: now,
            trial_of: None,
            times: HashMap::new(),
        }
    }

    fn observe(&mut self, subflows: &[&Subflow], now: Instant) {
        for subflow in subflows {
            let times = self.times.entry(flow(subflow)).or_default();
            let bytes = subflow.local.bytes + subflow.remote.bytes;
            if bytes > times.bytes {
                (times.bytes, times.carried_at) = (bytes, Some(now));
            }
            if let Some(rtt) = subflow.local.rtt {
                times.add(rtt.last, now);
            }
        }
    }

    /// Whether a path still carries data a good while after the hosts were asked to use another:
    /// what was said can be lost with its packet.
    fn is_unheard(&self, path: &Flow, now: Instant) -> bool {
        let carried_at = self.times.get(path).and_then(|times| times.carried_at);
        now - self.since > TRIAL && carried_at.is_some_and(|at| now - at < 2 * TICK)
    }

    /// Chooses; what has changed, in words.
    fn decide(&mut self, subflows: &[&Subflow], now: Instant) -> Option<String> {
        let flows: Vec<Flow> = subflows.iter().map(|subflow| flow(subflow)).collect();
        let Some(active) = self.active.filter(|active| flows.contains(active)) else {
            self.active = flows.first().copied();
            (self.since, self.trial_of) = (now, None);
            return Some(format!("begins on {}", name(self.active?)));
        };
        let current = self.times.get(&active).and_then(Times::least);
        let spent = now - self.since;
        if let Some(left) = self.trial_of {
            return self.judge(active, left, current, spent, now);
        }
        let times = self.times.get_mut(&active)?;
        let (Some(current), true) = (current, spent > TRIAL) else {
            return None;
        };
        let known = *times.known.get_or_insert(current);
        times.known = Some(known.min(current));
        let slower = current > known.mul_f64(SLOWER) && current > known + NOISE;
        let untried = |flow: &&Flow| {
            **flow != active
                && self
                    .times
                    .get(*flow)
                    .is_some_and(|times| times.known.is_none())
        };
        let other = flows.iter().find(untried).copied();
        if !slower && other.is_none() && spent < PROBE {
            return None;
        }
        let other = other.or_else(|| self.best_other(&flows, active))?;
        if let Some(times) = self.times.get_mut(&active) {
            times.known = Some(current);
        }
        self.go(other, Some(active), now);
        Some(format!(
            "tries {}, {} takes {current:.1?}",
            name(other),
            name(active)
        ))
    }

    fn best_other(&self, flows: &[Flow], active: Flow) -> Option<Flow> {
        let others = flows.iter().filter(|flow| **flow != active);
        others
            .min_by_key(|flow| self.times.get(*flow).and_then(|times| times.known))
            .copied()
    }

    /// Ends a trial, if it is time, by staying or going back.
    fn judge(
        &mut self,
        active: Flow,
        left: Flow,
        current: Option<Duration>,
        spent: Duration,
        now: Instant,
    ) -> Option<String> {
        if spent < TRIAL || (current.is_none() && spent < TRIAL_MAX) {
            return None;
        }
        let before = self.times.get(&left).and_then(|times| times.known);
        if let Some(times) = self.times.get_mut(&active) {
            times.known = current.or(Some(Duration::MAX));
        }
        if current
            .zip(before)
            .is_some_and(|(current, before)| current < before)
        {
            (self.since, self.trial_of) = (now, None);
            return Some(format!("stays on {}, {:.1?}", name(active), current?));
        }
        self.go(left, None, now);
        Some(format!("goes back to {}", name(left)))
    }

    fn go(&mut self, to: Flow, trial_of: Option<Flow>, now: Instant) {
        self.active = Some(to);
        (self.since, self.trial_of) = (now, trial_of);
        // What was measured before it carried anything says nothing.
        if let Some(times) = self.times.get_mut(&to) {
            times.samples.clear();
        }
    }
}

fn name(flow: Flow) -> String {
    format!("{} -> {}", flow[0], flow[1])
}
