// SPDX-License-Identifier: MIT OR Apache-2.0
//! A change of everything at once: planned, loaded and tried, then committed or taken back.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::desired::{Current, Desired, Target};
use super::step::Step;
use super::{Change, Options, Report};
use crate::engine::attach::Place;
use crate::engine::generation::{self, CarrierChoice, Environment, Generation};
use crate::engine::names::SystemNames;
use crate::engine::store::{self, Attachment, Store};
use crate::engine::{sets, sys};
use crate::hook::{Family, Hook};
use crate::netns;
use crate::plan::{self, Graph};
use crate::policy::Registry;
use crate::policy::btf::STATE_PREFIXES;
use crate::spec::{Chain, Checksum, Keys, Mode};

/// A change from what runs to what shall run.
pub(super) struct Transaction<'a> {
    store: &'a Store,
    current: Current,
    desired: Desired,
    steps: Vec<Step>,
    /// Sets that are new.
    new_sets: BTreeMap<String, OwnedFd>,
    /// Tells this build's policies from another's.
    program: String,
    options: Options<'a>,
}

impl<'a> Transaction<'a> {
    /// Plans all, loads what changes, and tries it. Nothing is attached or pinned yet.
    pub(super) fn new(
        store: &'a Store,
        mut current: Current,
        mut desired: Desired,
        options: Options<'a>,
    ) -> Result<Transaction<'a>> {
        let targets = std::mem::take(&mut desired.targets);
        let attachments = std::mem::take(&mut current.attachments);
        let mut change = Transaction {
            store,
            current: Current {
                attachments: Vec::new(),
                ..current
            },
            desired,
            steps: Vec::new(),
            new_sets: BTreeMap::new(),
            program: program_hash(store.registry()),
            options,
        };
        change.make_sets()?;
        change.plan(targets, attachments)?;
        change.load()?;
        Ok(change)
    }

    fn make_sets(&mut self) -> Result<()> {
        for (name, set) in &self.desired.sets {
            if self.current.state.sets.contains_key(name) {
                continue;
            }
            let map = sets::create(self.store.registry(), &set.kind, &map_name(name), set.size)?;
            self.new_sets.insert(name.clone(), map);
        }
        Ok(())
    }

    fn set(&self, name: &str) -> Result<OwnedFd> {
        match self.new_sets.get(name) {
            Some(set) => Ok(set.try_clone()?),
            None => self.store.set(name),
        }
    }

    fn plan(&mut self, targets: Vec<Target>, mut attachments: Vec<Attachment>) -> Result<()> {
        let subs: BTreeMap<String, &Chain> = self
            .desired
            .subs
            .iter()
            .map(|chain| (chain.name.clone(), chain))
            .collect();
        let mut steps = Vec::new();
        for target in self.add_learners(targets, &subs)? {
            let same = |old: &Attachment| {
                (old.place.ifindex, old.place.hook) == (target.place.ifindex, target.place.hook)
            };
            let old = attachments.iter().position(same);
            let old = old.map(|at| attachments.remove(at));
            steps.push(match old {
                Some(old) if target.is_empty() => Step::remove(old),
                old => self.step(target, old, &subs)?,
            });
        }
        steps.extend(attachments.into_iter().map(Step::remove));
        self.steps = steps;
        Ok(())
    }

    /// Adds what a policy needs that looks up connections: learners at its hook, and at one for the
    /// other direction, where the other half of each connection passes.
    fn add_learners(
        &self,
        mut targets: Vec<Target>,
        subs: &BTreeMap<String, &Chain>,
    ) -> Result<Vec<Target>> {
        let mut missing = Vec::new();
        for target in &targets {
            let reads = self.graph(target, subs)?.reads;
            if !reads.is_empty() {
                missing.push((target.place.clone(), reads));
            }
        }
        for (place, reads) in missing {
            // Where chains run already: the first that sees a packet. Else one that others share.
            let (hooks, new): (&[Hook], _) = match place.hook.is_ingress() {
                true => (&[Hook::TcEgress], Hook::TcEgress),
                false => (&[Hook::Xdp, Hook::TcIngress], Hook::TcIngress),
            };
            let runs = |target: &Target, hook| {
                (target.place.ifindex, target.place.hook) == (place.ifindex, hook)
                    && !target.chains.is_empty()
            };
            let mut hooks = hooks.iter().copied();
            let hook = hooks
                .find(|hook| targets.iter().any(|target| runs(target, *hook)))
                .unwrap_or(new);
            let same = |target: &&mut Target| {
                (target.place.ifindex, target.place.hook) == (place.ifindex, hook)
            };
            match targets.iter_mut().find(same) {
                Some(target) => target.learns.extend(reads),
                None => targets.push(Target {
                    place: Place::find(&place.device, hook)?,
                    mode: Mode::Auto,
                    chains: Vec::new(),
                    learns: reads,
                }),
            }
        }
        Ok(targets)
    }

    fn graph(&self, target: &Target, subs: &BTreeMap<String, &Chain>) -> Result<Graph> {
        let chains: Vec<&Chain> = target.chains.iter().collect();
        let graph = plan::plan(
            target.place.hook,
            &chains,
            subs,
            &self.desired.ids,
            self.store.registry(),
        )?;
        Ok(graph.with_learner(&target.learns)?)
    }

    /// From what runs at a hook, if anything does, to what shall run there.
    fn step(
        &self,
        mut target: Target,
        old: Option<Attachment>,
        subs: &BTreeMap<String, &Chain>,
    ) -> Result<Step> {
        if old.is_some() {
            // A record does not tell the link layer.
            target.place = Place::find(&target.place.device, target.place.hook)?;
        }
        let graph = self.graph(&target, subs)?;
        let carrier = self
            .options
            .carrier
            .unwrap_or_else(|| carrier_of(old.as_ref()));
        let made_from = self.made_from(&target, &graph, subs, carrier)?;
        let mode = match &old {
            Some(old) if target.mode == Mode::Auto => old.record.mode,
            _ => target.mode,
        };
        let change = match &old {
            None => Change::Create,
            Some(old) if self.is_as_made(old, &made_from) && old.record.mode == mode => {
                Change::Unchanged
            }
            Some(_) => Change::Replace,
        };
        Ok(Step {
            target,
            mode,
            change,
            carrier,
            graph,
            made_from,
            old,
            new: None,
            done: None,
        })
    }

    /// Whether what runs was made from the same.
    fn is_as_made(&self, old: &Attachment, made_from: &Value) -> bool {
        if !self.options.keep_programs {
            return old.record.made_from == *made_from;
        }
        let mut recorded = old.record.made_from.clone();
        if let Some(program) = recorded.get_mut("program") {
            *program = made_from["program"].clone();
        }
        recorded == *made_from
    }

    /// The named sets that a graph looks packets up in.
    fn sets(&self, graph: &Graph) -> Result<BTreeMap<String, OwnedFd>> {
        let mut sets = BTreeMap::new();
        for node in &graph.nodes {
            if let Keys::Set(name) = &node.keys {
                sets.insert(name.clone(), self.set(name)?);
            }
        }
        Ok(sets)
    }

    /// Everything the programs of an attachment are made from.
    fn made_from(
        &self,
        target: &Target,
        graph: &Graph,
        subs: &BTreeMap<String, &Chain>,
        carrier: CarrierChoice,
    ) -> Result<Value> {
        let mut sets = BTreeMap::new();
        for (name, set) in self.sets(graph)? {
            let info = sys::map_info(set).with_context(|| format!("look at the set {name}"))?;
            sets.insert(name, info.id);
        }
        let mut chains: BTreeSet<&str> = target.chains.iter().map(|c| c.name.as_str()).collect();
        chains.extend(graph.nodes.iter().map(|node| node.chain.as_str()));
        let ids: BTreeMap<&str, Option<&u32>> = chains
            .iter()
            .map(|name| (*name, self.desired.ids.get(*name)))
            .collect();
        let subs: Vec<Value> = subs
            .values()
            .filter(|sub| chains.contains(sub.name.as_str()))
            .map(|sub| sub.to_json())
            .collect();
        let mut attached: Vec<Value> = target.chains.iter().map(Chain::to_json).collect();
        attached.sort_by_key(|chain| chain["name"].to_string());
        Ok(json!({
            "program": self.program,
            "carrier": carrier.name(),
            "learns": graph.learns,
            "chains": attached,
            "subs": subs,
            "ids": ids,
            "sets": sets,
        }))
    }

    fn load(&mut self) -> Result<()> {
        let mut steps = std::mem::take(&mut self.steps);
        let changes = |step: &Step| matches!(step.change, Change::Create | Change::Replace);
        let changing = steps.iter().filter(|step| changes(step));
        let all = changing.map(|step| step.graph.nodes.len()).sum();
        let mut loaded = 0;
        let mut kept = Kept::read(&steps)?;
        for step in steps.iter_mut().filter(|step| changes(step)) {
            let device = step.target.place.ifindex;
            let new = self.load_one(step, &kept.of(device)?)?;
            kept.add(device, &new.state)?;
            step.new = Some(new);
            loaded += step.graph.nodes.len();
            if let Some(progress) = self.options.progress {
                progress(loaded, all);
            }
        }
        self.steps = steps;
        Ok(())
    }

    fn load_one(&self, step: &Step, state: &BTreeMap<String, OwnedFd>) -> Result<Generation> {
        let sets = self.sets(&step.graph)?;
        let place = &step.target.place;
        let names = SystemNames {
            chains: &self.desired.ids,
            any_device: false,
        };
        let environment = Environment {
            hook: place.hook,
            no_link: place.no_link,
            carrier: step.carrier,
            registry: self.store.registry(),
            names: &names,
            sets: &sets,
            checksum: Checksum::asked(&step.target.chains, &place.device, place.hook),
            state,
        };
        let generation = generation::load(&step.graph, &environment)?;
        try_out(&generation, place.hook)?;
        generation.zero_counters()?;
        Ok(generation)
    }

    pub(super) fn run(mut self, dry_run: bool) -> Result<Report> {
        if dry_run {
            return Ok(self.report());
        }
        if let Err(error) = self.commit() {
            return Err(match self.go_back() {
                Ok(()) => error,
                Err(also) => error.context(format!("and going back failed: {also:#}")),
            });
        }
        self.finish()?;
        Ok(self.report())
    }

    fn commit(&mut self) -> Result<()> {
        for (name, set) in &self.new_sets {
            self.store.add_set(name, set)?;
        }
        self.store.write_state(&self.desired.state()?)?;
        let mut our_qdiscs = self.our_qdiscs();
        for step in &mut self.steps {
            if step.new.is_some() {
                step.commit(self.store, &mut our_qdiscs)?;
            }
        }
        for step in &mut self.steps {
            if let (Change::Remove, Some(old)) = (step.change, &step.old) {
                old.place.detach(&old.hold)?;
            }
        }
        Ok(())
    }

    /// Devices whose clsact qdisc we made: whichever of our filters goes last removes it.
    fn our_qdiscs(&self) -> BTreeSet<u32> {
        let old = self.steps.iter().filter_map(|step| step.old.as_ref());
        old.filter(|old| old.record.qdisc_is_ours)
            .map(|old| old.place.ifindex)
            .collect()
    }

    /// Undoes a commit that failed: the old generations are all still loaded.
    fn go_back(&mut self) -> Result<()> {
        let mut failed = Ok(());
        for step in self.steps.iter_mut().rev() {
            if let Err(error) = step.go_back(self.store) {
                failed = Err(error);
            }
        }
        self.store.write_state(&self.current.state)?;
        for name in self.new_sets.keys() {
            self.store.remove_set(name)?;
        }
        self.store.remove_if_empty()?;
        failed
    }

    /// Removes what is no longer used.
    fn finish(&mut self) -> Result<()> {
        if self
            .steps
            .iter()
            .any(|step| step.change != Change::Unchanged)
        {
            sys::wait_rcu().context("wait for packets in flight")?;
        }
        for step in &self.steps {
            if step.change == Change::Remove {
                if let Some(old) = &step.old {
                    store::remove_attachment(&old.folder)?;
                }
            }
        }
        let here = netns::current_id()?;
        for attachment in self.store.attachments()? {
            if attachment.netns == here {
                self.store.settle(&attachment)?;
            }
        }
        for name in self.current.state.sets.keys() {
            if !self.desired.sets.contains_key(name) {
                self.store.remove_set(name)?;
            }
        }
        self.store.remove_if_empty()
    }

    fn report(&self) -> Report {
        let old: BTreeMap<&str, &Chain> = self
            .steps
            .iter()
            .filter_map(|step| step.old.as_ref())
            .flat_map(|old| &old.record.chains)
            .chain(&self.current.wanted)
            .chain(&self.current.state.subs)
            .map(|chain| (chain.name.as_str(), chain))
            .collect();
        let new: BTreeMap<&str, &Chain> = self
            .steps
            .iter()
            .flat_map(|step| &step.target.chains)
            .chain(&self.desired.wanted)
            .chain(&self.desired.subs)
            .map(|chain| (chain.name.as_str(), chain))
            .collect();
        Report {
            chains: compare(&old, &new),
            sets: compare(
                &self.current.state.sets.iter().map(by_name).collect(),
                &self.desired.sets.iter().map(by_name).collect(),
            ),
            attachments: self
                .steps
                .iter()
                .map(|step| {
                    let place = &step.target.place;
                    (place.device.clone(), place.hook, step.mode, step.change)
                })
                .collect(),
            ..Report::default()
        }
    }
}

/// The maps that a change carries over, by device and name. All hooks of a device share one of
/// each, those of [`EVERYWHERE`] all devices.
#[derive(Default)]
struct Kept(BTreeMap<(u32, String), OwnedFd>);

/// Stands for no device: maps of the network namespace.
const EVERYWHERE: u32 = 0;

impl Kept {
    fn read(steps: &[Step]) -> Result<Kept> {
        let mut kept = Kept::default();
        for old in steps.iter().filter_map(|step| step.old.as_ref()) {
            kept.add(old.place.ifindex, &old.state()?)?;
        }
        Ok(kept)
    }

    fn add(&mut self, device: u32, state: &BTreeMap<String, OwnedFd>) -> Result<()> {
        for (name, map) in state {
            let owner = if name.starts_with(STATE_PREFIXES[1]) {
                EVERYWHERE
            } else {
                device
            };
            self.0.insert((owner, name.clone()), map.try_clone()?);
        }
        Ok(())
    }

    /// What a device's programs are to use.
    fn of(&self, device: u32) -> Result<BTreeMap<String, OwnedFd>> {
        let own = self
            .0
            .iter()
            .filter(|((owner, _), _)| [EVERYWHERE, device].contains(owner));
        own.map(|((_, name), map)| Ok((name.clone(), map.try_clone()?)))
            .collect()
    }
}

/// The carrier that was asked for when an attachment was made.
fn carrier_of(old: Option<&Attachment>) -> CarrierChoice {
    match old {
        Some(old) if old.record.made_from["carrier"] == CarrierChoice::PerCpu.name() => {
            CarrierChoice::PerCpu
        }
        _ => CarrierChoice::Auto,
    }
}

pub(super) fn by_name<'a, T>((name, value): (&'a String, &'a T)) -> (&'a str, &'a T) {
    (name.as_str(), value)
}

fn compare<T: PartialEq>(
    old: &BTreeMap<&str, &T>,
    new: &BTreeMap<&str, &T>,
) -> Vec<(String, Change)> {
    let names: BTreeSet<&str> = old.keys().chain(new.keys()).copied().collect();
    names
        .into_iter()
        .map(|name| {
            let change = match (old.get(name), new.get(name)) {
                (None, _) => Change::Create,
                (_, None) => Change::Remove,
                (old, new) if old == new => Change::Unchanged,
                _ => Change::Replace,
            };
            (name.to_owned(), change)
        })
        .collect()
}

/// Kernel names are short: a set's is its beginning.
fn map_name(set: &str) -> String {
    let text: String = set
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .take(10)
        .collect();
    format!("{}s_{text}", generation::PREFIX)
}

/// Tells one build of the policies from another.
fn program_hash(registry: &Registry) -> String {
    let mut hasher = DefaultHasher::new();
    for policy in registry.policies().iter().chain(registry.learner()) {
        for family in [Family::Xdp, Family::Tc] {
            policy.object(family).hash(&mut hasher);
        }
    }
    format!("{} {:016x}", env!("CARGO_PKG_VERSION"), hasher.finish())
}

/// Runs a new generation on frames that touch no state, before any packet does.
fn try_out(generation: &Generation, hook: Hook) -> Result<()> {
    /// XDP_ABORTED
    const ABORTED: u32 = 0;
    let frames = [
        ("a frame that is not IP", frame(0x88b5, &[])),
        ("a truncated IP packet", frame(0x0800, &[0x45, 0, 0, 60])),
        (
            "a fragment",
            frame(0x0800, &[0x45, 0, 0, 40, 0, 0, 0x20, 0x10, 64, 6]),
        ),
    ];
    for (what, frame) in frames {
        let run = sys::test_run(&generation.entry, &frame, None)
            .with_context(|| format!("try the new chains on {what}"))?;
        if hook == Hook::Xdp && run.verdict == ABORTED {
            bail!("the new chains abort on {what}; nothing was changed");
        }
    }
    Ok(())
}

/// An Ethernet frame of the least length.
fn frame(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0u8; 12];
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame.extend_from_slice(payload);
    frame.resize(60, 0);
    frame
}
