// SPDX-License-Identifier: MIT OR Apache-2.0
//! Captures through chains of every action, on every hook: nothing may fail to load or to run, and
//! every packet must come out as sound as it went in ([`verify`]).
//!
//! A packet that the capture cut short (by its snap length) runs like any other. Its headers are
//! there, so actions edit it; that its checksum is right cannot be told, but that an edit accounted
//! for what it changed can.

pub mod verify;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use policy_chain::engine::generation::CarrierChoice;
use policy_chain::hook::Hook;
use policy_chain::policy::Registry;
use policy_chain::replay::capture::{Packet, Reader};
use policy_chain::replay::{Outcome, Runner, Verdict};
use policy_chain::spec::Spec;
use serde_json::{Value, json};

use verify::{Change, Check, Facts};

/// Names of captures end so.
const ENDINGS: [&str; 3] = ["pcap", "pcapng", "cap"];
/// Failures shown; all are counted.
const SHOWN: usize = 20;
/// Reasons that say something of the program, not of the packet.
const BROKEN: [&str; 2] = ["half_done", "tail_call_missed"];

/// A chain to try, on the hooks of `hooks`.
struct Trial {
    name: &'static str,
    change: Change,
    actions: Value,
    hooks: &'static [Hook],
    /// Whether only TCP gets to the actions. Frames that the kernel's test run refuses go over a
    /// device, with a marker behind them that must not be dropped or sent elsewhere.
    only_tcp: bool,
}

const EVERYWHERE: &[Hook] = &Hook::ALL;

fn trial(name: &'static str, change: Change, actions: Value) -> Trial {
    Trial {
        name,
        change,
        actions,
        hooks: EVERYWHERE,
        only_tcp: false,
    }
}

/// One chain an action and way to use it, and one of several.
fn trials() -> Vec<Trial> {
    let strip = |kind: &str| json!({ "action": "strip_option", "kind": kind, "unsafe": true });
    let insert = |data: &str| json!({ "action": "insert_option", "kind": 253, "data": data });
    let mss = |mode: &str| json!({ "action": "set_mss", "bytes": 1000, "mode": mode });
    let window = json!({ "action": "set_window", "raw": true, "bytes": 60 });
    let bytes = json!({ "action": "set_window", "bytes": 40_000 });
    let max = json!({ "action": "set_window", "bytes": 40_000, "max": true });
    let remove = |kind: &str| {
        json!([{ "action": "strip_option", "kind": kind, "mode": "remove",
        "unsafe": true }])
    };
    let again = json!({ "action": "insert_option", "kind": 254, "data": "ab", "again": true });
    let add_addr = json!({ "action": "strip_option", "kind": "mptcp", "subtype": "add_addr" });
    let subflow =
        json!({ "action": "add_subflow", "address": "192.0.2.9", "id": 9, "once": false });
    let hold = json!({ "action": "hold_add_addr" });
    let macs = json!({
        "action": "redirect",
        "device": "lo",
        "src_mac": "02:00:00:00:00:0a",
        "dst_mac": "02:00:00:00:00:0b",
    });
    let neighbour = json!({ "action": "redirect", "device": "lo", "neighbour": true });
    let all = json!([
        strip("timestamps"),
        mss("clamp"),
        insert("c0ffee01"),
        add_addr,
        window,
        { "action": "count" },
    ]);
    let mut trials = vec![
        trial("count", Change::Nothing, json!([{ "action": "count" }])),
        trial("pass", Change::Nothing, json!([{ "action": "pass" }])),
        trial("drop", Change::Nothing, json!([{ "action": "drop" }])),
        trial(
            "goto",
            Change::Nothing,
            json!([{ "action": "goto", "chain": "goal" }]),
        ),
        trial("window-field", Change::Tcp, json!([window])),
        trial("window", Change::Tcp, json!([bytes])),
        trial("window-max", Change::Tcp, json!([max])),
        trial("mss-clamp", Change::Tcp, json!([mss("clamp")])),
        trial("mss-set", Change::Tcp, json!([mss("set")])),
        trial(
            "strip-timestamps",
            Change::Tcp,
            json!([strip("timestamps")]),
        ),
        trial("strip-mptcp", Change::Tcp, json!([strip("mptcp")])),
        trial("strip-add-addr", Change::Tcp, json!([add_addr])),
        trial("remove-timestamps", Change::Tcp, remove("timestamps")),
        trial("remove-mptcp", Change::Tcp, remove("mptcp")),
        trial("hold", Change::Tcp, json!([hold])),
        trial(
            "hold-restore",
            Change::Tcp,
            json!([hold, { "action": "restore_add_addr" }]),
        ),
        trial("add-subflow", Change::Tcp, json!([subflow])),
        trial(
            "remove-addr",
            Change::Tcp,
            json!([{ "action": "remove_addr", "id": 9, "every": "1us" }]),
        ),
        trial(
            "mp-prio",
            Change::Tcp,
            json!([{ "action": "mp_prio", "backup": true, "first": 1000 }]),
        ),
        trial(
            "reset",
            Change::Reset,
            json!([{ "action": "reset_subflow" }]),
        ),
        trial("record", Change::Nothing, json!([{ "action": "record" }])),
        trial(
            "learn",
            Change::Nothing,
            json!([{ "action": "learn", "set": "seen" }]),
        ),
        trial("report", Change::Nothing, json!([{ "action": "report" }])),
        trial("insert", Change::Tcp, json!([insert("c0ffee01")])),
        trial("insert-again", Change::Tcp, json!([again])),
        trial("redirect-macs", Change::Route, json!([macs])),
        trial("redirect-neighbour", Change::Route, json!([neighbour])),
        trial("all", Change::Tcp, all),
    ];
    for trial in &mut trials {
        if ["remove-timestamps", "remove-mptcp"].contains(&trial.name) {
            trial.hooks = &[Hook::Xdp];
        }
        trial.only_tcp = trial.name == "drop" || trial.change == Change::Route;
    }
    trials
}

impl Trial {
    fn spec(&self, hook: Hook, registry: &Registry) -> Result<Spec> {
        let selectors = match self.only_tcp {
            true => json!([{ "selector": "tcp" }]),
            false => json!([]),
        };
        let file = json!({
            "version": 1,
            "sets": { "seen": { "kind": "flow", "size": 10_000 } },
            "chains": [
                {
                    "name": self.name,
                    "attach": [{ "device": "lo", "hook": hook.name() }],
                    "selectors": selectors,
                    "actions": self.actions,
                },
                { "name": "goal", "actions": [{ "action": "count" }] },
            ],
        });
        Ok(Spec::parse(
            &file.to_string(),
            Path::new(self.name),
            registry,
        )?)
    }

    fn action_names(&self) -> impl Iterator<Item = &str> {
        let actions = self.actions.as_array().into_iter().flatten();
        actions.filter_map(|action| action["action"].as_str())
    }
}

/// A chain on one hook, and what became of packets.
struct Lane {
    trial: usize,
    hook: Hook,
    runner: Runner,
    changed: u64,
    skipped: u64,
}

/// `replay-corpus FOLDER`: prints what became of the captures. The exit code: 0 if every packet came
/// out as sound as it went in, 1 if not, 2 if there is nothing to run.
pub fn command(arguments: &[String]) -> u8 {
    let [folder] = arguments else {
        eprintln!("usage: replay-corpus FOLDER");
        return 2;
    };
    match run(Path::new(folder)) {
        Ok(report) => {
            println!("{report}");
            report.exit_code()
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            2
        }
    }
}

fn run(folder: &Path) -> Result<Report> {
    let files = captures(folder)?;
    let mut corpus = Corpus::load()?;
    for file in &files {
        eprintln!("{}", file.display());
        corpus.run(file);
    }
    Ok(corpus.report())
}

/// A corpus being run.
pub struct Corpus {
    trials: Vec<Trial>,
    lanes: Vec<Lane>,
    report: Report,
}

/// What became of the packets of a corpus. `Display` is a table of at most 100 columns.
#[derive(Default)]
pub struct Report {
    pub files: u64,
    pub packets: u64,
    /// Packets that the capture cut short.
    pub cut: u64,
    /// Packets that came with a right TCP checksum, and with one left to the device.
    pub right: u64,
    pub partial: u64,
    /// Runs of a packet through a chain.
    pub runs: u64,
    pub reasons: BTreeMap<&'static str, u64>,
    /// Runs that changed a packet, and that left one alone for a reason, by chain and hook.
    pub chains: BTreeMap<(&'static str, Hook), (u64, u64)>,
    pub failed: u64,
    /// The first failures, each with file and packet.
    pub failures: Vec<String>,
}

impl Report {
    /// 0, or 1 with failures.
    pub fn exit_code(&self) -> u8 {
        u8::from(self.failed > 0)
    }

    fn fail(&mut self, text: String) {
        self.failed += 1;
        if self.failures.len() < SHOWN {
            self.failures.push(text);
        }
    }
}

impl Corpus {
    /// Loads every chain on every hook.
    ///
    /// # Errors
    /// A chain that is refused, or an action that none of them has.
    pub fn load() -> Result<Corpus> {
        let registry = Registry::embedded()?;
        let trials = trials();
        let mut lanes = Vec::new();
        for hook in Hook::ALL {
            let mut tried = BTreeSet::new();
            for (number, trial) in trials.iter().enumerate() {
                if !trial.hooks.contains(&hook) {
                    continue;
                }
                tried.extend(trial.action_names());
                let spec = trial.spec(hook, registry)?;
                let runner = Runner::new(&spec, trial.name, hook, CarrierChoice::Auto)
                    .with_context(|| format!("load {} on {hook}", trial.name))?;
                lanes.push(Lane {
                    trial: number,
                    hook,
                    runner,
                    changed: 0,
                    skipped: 0,
                });
            }
            for policy in registry.actions().filter(|policy| policy.runs_at(hook)) {
                let name = policy.name.as_str();
                ensure!(tried.contains(name), "no chain tries {name} on {hook}");
            }
        }
        Ok(Corpus {
            trials,
            lanes,
            report: Report::default(),
        })
    }

    /// Runs the packets of a capture; that it is damaged counts as a failure.
    pub fn run(&mut self, file: &Path) {
        self.report.files += 1;
        if let Err(error) = self.run_file(file) {
            self.report.fail(format!("{}: {error:#}", file.display()));
        }
    }

    /// What became of all packets.
    pub fn report(mut self) -> Report {
        for lane in &self.lanes {
            let key = (self.trials[lane.trial].name, lane.hook);
            self.report.chains.insert(key, (lane.changed, lane.skipped));
        }
        self.report
    }

    fn run_file(&mut self, file: &Path) -> Result<()> {
        let mut reader = Reader::open(file)?;
        let mut number = 0u64;
        while let Some(packet) = reader.next_packet()? {
            number += 1;
            self.run_packet(&packet, &format!("{}:{number}", file.display()));
        }
        Ok(())
    }

    fn run_packet(&mut self, packet: &Packet, place: &str) {
        let report = &mut self.report;
        report.packets += 1;
        report.cut += u64::from(packet.truncated);
        match Facts::of(&packet.frame).and_then(|facts| facts.check()) {
            Some(Check::Right) => report.right += 1,
            Some(Check::Partial) => report.partial += 1,
            _ => {}
        }
        for lane in &mut self.lanes {
            report.runs += 1;
            let trial = &self.trials[lane.trial];
            let verdict = match lane.runner.run(&packet.frame) {
                Ok(outcome) => {
                    lane.changed += u64::from(outcome.frame != packet.frame);
                    lane.skipped += u64::from(!outcome.reasons.is_empty());
                    for reason in &outcome.reasons {
                        *report.reasons.entry(reason).or_default() += 1;
                    }
                    judge(trial, lane.hook, &packet.frame, &outcome)
                }
                Err(error) => Err(format!("{error:#}")),
            };
            if let Err(what) = verdict {
                let (name, hook) = (trial.name, lane.hook);
                report.fail(format!("{place}: {name} on {hook}: {what}"));
            }
        }
    }
}

/// What is wrong with the outcome of a run, if anything.
fn judge(trial: &Trial, hook: Hook, before: &[u8], outcome: &Outcome) -> Result<(), String> {
    if outcome.verdict == Verdict::Aborted {
        return Err("the program gave no verdict".to_owned());
    }
    if let Some(reason) = outcome.reasons.iter().find(|it| BROKEN.contains(it)) {
        return Err(format!("reason {reason}"));
    }
    let single = trial.actions.as_array().is_some_and(|it| it.len() == 1);
    if single && !outcome.reasons.is_empty() && outcome.frame != before {
        return Err(format!("left alone ({:?}), yet changed", outcome.reasons));
    }
    verify::verify(trial.change, hook, before, &outcome.frame)
}

/// The captures of a folder, in order.
///
/// # Errors
/// A folder that cannot be read, or without a capture.
pub fn captures(folder: &Path) -> Result<Vec<PathBuf>> {
    let reading = || format!("read {}", folder.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(reading)? {
        let path = entry.with_context(reading)?.path();
        let ending = path.extension().and_then(|ending| ending.to_str());
        if ending.is_some_and(|ending| ENDINGS.contains(&ending)) {
            found.push(path);
        }
    }
    found.sort();
    let names = ENDINGS.join(", .");
    ensure!(!found.is_empty(), "{} has no .{names}", folder.display());
    Ok(found)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<20}  {:<10}  {:>9}  {:>9}",
            "CHAIN", "HOOK", "CHANGED", "SKIPPED"
        )?;
        for ((name, hook), (changed, skipped)) in &self.chains {
            writeln!(f, "{name:<20}  {hook:<10}  {changed:>9}  {skipped:>9}")?;
        }
        writeln!(f, "\n{:<20}  {:>9}", "SKIPPED FOR", "RUNS")?;
        for (reason, count) in &self.reasons {
            writeln!(f, "{reason:<20}  {count:>9}")?;
        }
        writeln!(
            f,
            "\n{} files, {} packets, {} of them cut short by the capture",
            self.files, self.packets, self.cut
        )?;
        writeln!(
            f,
            "TCP checksums: {} right, {} left to the device",
            self.right, self.partial
        )?;
        write!(f, "{} runs, {} failures", self.runs, self.failed)?;
        for failure in &self.failures {
            write!(f, "\n  {failure}")?;
        }
        if self.failed > self.failures.len() as u64 {
            write!(f, "\n  ...")?;
        }
        Ok(())
    }
}
