// SPDX-License-Identifier: MIT OR Apache-2.0
//! Brings what runs to what chain files say: new generations are built beside the running ones,
//! tried, and switched to one by one. A failure anywhere leaves the old ones running.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use super::attach::{Hold, Place};
use super::generation::{self, CarrierChoice, Environment, Generation};
use super::names::SystemNames;
use super::store::{self, Attachment, Record, State, Store};
use super::{sets, sys};
use crate::error::{Invalid, Refused, did_you_mean};
use crate::hook::{Family, Hook};
use crate::netns;
use crate::plan::{self, Graph};
use crate::policy::Registry;
use crate::spec::{Attach, Chain, Keys, Mode, SetSpec, Spec, Then};

/// How `apply` goes about it.
#[derive(Clone, Copy, Default)]
pub struct Options<'a> {
    /// Remove the chains and sets the files do not name.
    pub prune: bool,
    /// Build and try everything, then change nothing.
    pub dry_run: bool,
    /// `None`: as before, for what runs already.
    pub carrier: Option<CarrierChoice>,
    /// Told how many nodes are loaded, and of how many.
    pub progress: Option<&'a dyn Fn(usize, usize)>,
}

/// What happens to a chain or a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Create,
    Replace,
    Unchanged,
    Remove,
}

impl Change {
    pub fn name(self) -> &'static str {
        match self {
            Change::Create => "create",
            Change::Replace => "replace",
            Change::Unchanged => "unchanged",
            Change::Remove => "remove",
        }
    }
}

/// What a command did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub chains: Vec<(String, Change)>,
    pub sets: Vec<(String, Change)>,
    /// Attachments: device, hook, mode, and what happens to what they run.
    pub attachments: Vec<(String, Hook, Mode, Change)>,
}

impl Report {
    /// `{"chains": [{"name", "change"}], "sets": [...], "attachments": [{"device", "hook", "mode",
    /// "change"}]}`.
    pub fn to_json(&self) -> Value {
        let named = |list: &[(String, Change)]| -> Vec<Value> {
            list.iter()
                .map(|(name, change)| json!({ "name": name, "change": change.name() }))
                .collect()
        };
        let attachments: Vec<Value> = self
            .attachments
            .iter()
            .map(|(device, hook, mode, change)| {
                json!({
                    "device": device,
                    "hook": hook.name(),
                    "mode": mode.name(),
                    "change": change.name(),
                })
            })
            .collect();
        json!({
            "chains": named(&self.chains),
            "sets": named(&self.sets),
            "attachments": attachments,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, change) in &self.sets {
            writeln!(f, "{:<10} set    {name}", change.name())?;
        }
        for (name, change) in &self.chains {
            writeln!(f, "{:<10} chain  {name}", change.name())?;
        }
        for (device, hook, mode, change) in &self.attachments {
            writeln!(f, "{:<10} device {device} {hook} ({mode})", change.name())?;
        }
        Ok(())
    }
}

/// Applies chain files.
///
/// # Errors
/// [`Invalid`] or [`Refused`], with what was wrong; then nothing has changed.
pub fn apply(store: &Store, files: &Spec, options: Options<'_>) -> Result<Report> {
    let current = Current::read(store)?;
    let mut desired = Desired::merge(&current, files, options.prune)?;
    desired.add_places(files)?;
    desired.check()?;
    desired.drop_unused_ids(store, &current.state)?;
    Transaction::new(store, current, desired, options)?.run(options.dry_run)
}

/// Removes chains by name.
///
/// # Errors
/// [`Invalid`] for a name that is not there, [`Refused`] for a chain that others go to; with
/// `force` elements of sets may still name it: such packets then pass, reason `no_chain`.
pub fn delete(store: &Store, names: &[String], force: bool) -> Result<Report> {
    let current = Current::read(store)?;
    let known: BTreeSet<&str> = current.chain_names();
    for name in names {
        if !known.contains(name.as_str()) {
            return Err(Invalid::new(
                "NAME",
                format!(
                    "\"{name}\", no such chain{}",
                    did_you_mean(name, known.iter().copied())
                ),
                "the name of a chain that runs",
            )
            .advice("see `policy-chain list`")
            .into());
        }
        if !force {
            refuse_if_named(store, &current.state, name)?;
        }
    }
    let mut desired = Desired::keep(&current, |name| !names.iter().any(|gone| gone == name));
    desired.check()?;
    desired.drop_unused_ids(store, &current.state)?;
    Transaction::new(store, current, desired, Options::default())?.run(false)
}

/// Removes every chain of this network namespace, or of all, and the sub-chains and sets unless
/// chains of other namespaces may use them.
///
/// # Errors
/// With `all_netns`, [`Refused`] where filters of another namespace are left, which can be removed
/// from inside it only. What the kernel says.
pub fn delete_all(store: &Store, all_netns: bool) -> Result<Report> {
    let current = if all_netns {
        Current::everywhere(store)?
    } else {
        Current::read(store)?
    };
    let elsewhere = store.others(&current.attachments)?;
    let mut desired = Desired::default();
    if !elsewhere.is_empty() {
        desired = Desired::keep(&current, |_| true);
        desired.targets.clear();
    }
    let report = Transaction::new(store, current, desired, Options::default())?.run(false)?;
    store.remove_if_empty()?;
    match elsewhere.first().filter(|_| all_netns) {
        None => Ok(report),
        Some(folder) => Err(Refused::state(
            "filters of another network namespace stay, and what they use",
            format!(
                "they can be removed from inside it only; see {}",
                folder.display()
            ),
            "run `policy-chain delete --all` there (`ls -i /run/netns` finds it by the number in \
             front of the folder's name); if it is gone, remove the folder",
        )
        .into()),
    }
}

/// Refuses to delete a chain that elements of sets name.
fn refuse_if_named(store: &Store, state: &State, name: &str) -> Result<()> {
    let Some(id) = state.ids.get(name) else {
        return Ok(());
    };
    for set in state.sets.keys() {
        if set_names_chain(store, set, *id)? {
            return Err(Refused::state(
                format!("the chain {name} is in use"),
                format!("elements of the set {set} name it"),
                format!("remove them (`policy-chain set list {set}`), or delete with --force"),
            )
            .into());
        }
    }
    Ok(())
}

fn set_names_chain(store: &Store, set: &str, id: u32) -> Result<bool> {
    let entries = sys::map_dump(store.set(set)?).with_context(|| format!("read the set {set}"))?;
    let named = entries
        .iter()
        .any(|(_, value)| sets::element_chain(value) == Some(id));
    Ok(named)
}

/// What runs.
struct Current {
    state: State,
    /// In this network namespace, unless read everywhere.
    attachments: Vec<Attachment>,
}

impl Current {
    fn read(store: &Store) -> Result<Current> {
        let here = netns::current_id()?;
        let mut current = Current::everywhere(store)?;
        let attachments = &mut current.attachments;
        attachments.retain(|attachment| attachment.netns == here);
        Ok(current)
    }

    /// With what runs in other network namespaces.
    fn everywhere(store: &Store) -> Result<Current> {
        Ok(Current {
            state: store.state()?,
            attachments: store.attachments()?,
        })
    }

    fn chain_names(&self) -> BTreeSet<&str> {
        let attached = self.attachments.iter().flat_map(|a| &a.record.chains);
        attached
            .chain(&self.state.subs)
            .map(|chain| chain.name.as_str())
            .collect()
    }
}

/// What shall run.
#[derive(Default)]
struct Desired {
    sets: BTreeMap<String, SetSpec>,
    ids: BTreeMap<String, u32>,
    subs: Vec<Chain>,
    targets: Vec<Target>,
}

/// What shall run at one hook of one device.
struct Target {
    place: Place,
    mode: Mode,
    chains: Vec<Chain>,
}

impl Target {
    /// Where a chain file asks for it, if one does.
    fn asked_by(&self) -> Option<String> {
        self.chains.iter().find_map(|chain| {
            chain.origin.file.as_ref()?;
            let mut attach = chain.attach.iter();
            let at = attach.position(|attach| {
                (&attach.device, attach.hook) == (&self.place.device, self.place.hook)
            })?;
            Some(attach_place(chain, at))
        })
    }
}

/// `FILE: PATH` of an item of a chain's `attach`.
fn attach_place(chain: &Chain, at: usize) -> String {
    let file = chain.origin.file.as_ref();
    let file = file.map(|file| format!("{}: ", file.display()));
    let path = &chain.origin.path;
    format!("{}{path}.attach[{at}]", file.unwrap_or_default())
}

impl Desired {
    /// What runs now, as far as `keep` wants it.
    fn keep(current: &Current, keep: impl Fn(&str) -> bool) -> Desired {
        let kept = |chains: &[Chain]| -> Vec<Chain> {
            let kept = chains.iter().filter(|chain| keep(&chain.name));
            kept.cloned().collect()
        };
        Desired {
            sets: current.state.sets.clone(),
            ids: current.state.ids.clone(),
            subs: kept(&current.state.subs),
            targets: current
                .attachments
                .iter()
                .map(|attachment| Target {
                    place: attachment.place.clone(),
                    mode: attachment.record.mode,
                    chains: kept(&attachment.record.chains),
                })
                .collect(),
        }
    }

    /// What runs now with the files' chains in the place of those of the same name, without yet
    /// placing them.
    fn merge(current: &Current, files: &Spec, prune: bool) -> Result<Desired, Invalid> {
        let named: BTreeSet<&str> = files.chains.iter().map(|c| c.name.as_str()).collect();
        let mut desired = Desired::keep(current, |name| !prune && !named.contains(name));
        if prune {
            desired.sets.clear();
        }
        for (name, set) in &files.sets {
            if let Some(existing) = current.state.sets.get(name) {
                refuse_other_shape(name, existing, set)?;
            }
            desired.sets.insert(name.clone(), set.clone());
        }
        let subs = files.chains.iter().filter(|c| c.attach.is_empty());
        desired.subs.extend(subs.cloned());
        desired.assign_ids(files);
        Ok(desired)
    }

    /// Every chain has an id, from 1. An id is used again when its chain is gone and no element
    /// names it, which `delete` sees to.
    fn assign_ids(&mut self, files: &Spec) {
        for chain in &files.chains {
            if self.ids.contains_key(&chain.name) {
                continue;
            }
            let used: BTreeSet<u32> = self.ids.values().copied().collect();
            let free = (1..).find(|id| !used.contains(id));
            self.ids.extend(free.map(|id| (chain.name.clone(), id)));
        }
    }

    /// Forgets the ids of chains that are gone, unless elements still name them.
    fn drop_unused_ids(&mut self, store: &Store, state: &State) -> Result<()> {
        let live: BTreeSet<String> = self.chains().map(|chain| chain.name.clone()).collect();
        for (name, id) in &state.ids {
            if live.contains(name) {
                continue;
            }
            let mut named = false;
            for set in state.sets.keys() {
                named = named || set_names_chain(store, set, *id)?;
            }
            if !named {
                self.ids.remove(name);
            }
        }
        Ok(())
    }

    fn chains(&self) -> impl Iterator<Item = &Chain> {
        let attached = self.targets.iter().flat_map(|target| &target.chains);
        attached.chain(&self.subs)
    }

    /// Refuses to take a sub-chain from under a chain that goes to it.
    fn check(&self) -> Result<(), Refused> {
        let subs: BTreeSet<&str> = self.subs.iter().map(|chain| chain.name.as_str()).collect();
        for chain in self.chains() {
            let then = match &chain.then {
                Then::Goto(target) => Some(target),
                _ => None,
            };
            let actions = chain.actions.iter().flat_map(|action| &action.references);
            let selectors = chain.selectors.iter().flat_map(|s| &s.references);
            let named = actions.chain(selectors).map(|reference| &reference.chain);
            if let Some(gone) = named.chain(then).find(|name| !subs.contains(name.as_str())) {
                return Err(Refused::state(
                    format!("the chain {gone} is in use"),
                    format!("the chain {} goes to it", chain.name),
                    format!("first delete {}, or apply it without this goto", chain.name),
                ));
            }
        }
        Ok(())
    }

    /// Puts the files' chains where they attach.
    fn add_places(&mut self, files: &Spec) -> Result<()> {
        let known = self.subs.iter().map(|chain| chain.name.clone()).collect();
        files.validate_references(&self.sets, &known)?;
        for chain in &files.chains {
            for (at, attach) in chain.attach.iter().enumerate() {
                let place = attach_place(chain, at);
                self.add_place(chain, attach).context(place)?;
            }
        }
        Ok(())
    }

    fn add_place(&mut self, chain: &Chain, attach: &Attach) -> Result<()> {
        let place = Place::find(&attach.device, attach.hook)?;
        let same = |target: &&mut Target| {
            (target.place.ifindex, target.place.hook) == (place.ifindex, place.hook)
        };
        match self.targets.iter_mut().find(same) {
            Some(target) => {
                // Found in a record, the place does not know its link layer.
                target.place = place;
                if attach.mode != Mode::Auto {
                    target.mode = attach.mode;
                }
                target.chains.push(chain.clone());
            }
            None => self.targets.push(Target {
                place,
                mode: attach.mode,
                chains: vec![chain.clone()],
            }),
        }
        Ok(())
    }
}

fn refuse_other_shape(name: &str, existing: &SetSpec, set: &SetSpec) -> Result<(), Invalid> {
    if existing == set {
        return Ok(());
    }
    Err(Invalid::new(
        format!("$.sets.{name}"),
        format!("kind {}, size {}", set.kind, set.size),
        format!(
            "kind {}, size {}, as the set that exists",
            existing.kind, existing.size
        ),
    )
    .advice(format!(
        "give it another name, or first `policy-chain delete` the chains that use it, then \
         `policy-chain set delete {name}`"
    )))
}

/// One attachment on its way.
struct Step {
    target: Target,
    /// The mode it is or will be attached in; `auto` until that is known.
    mode: Mode,
    change: Change,
    carrier: CarrierChoice,
    graph: Graph,
    made_from: Value,
    /// What runs there now.
    old: Option<Attachment>,
    /// What shall run there: loaded, unless unchanged or removed.
    new: Option<Generation>,
    /// Set once it is attached or switched, to go back.
    done: Option<Done>,
}

/// What was changed at a hook.
enum Done {
    /// Newly attached; what ran there before, by a link that is gone, if anything.
    Attached(Hold),
    Switched,
}

/// A change from what runs to what shall run.
struct Transaction<'a> {
    store: &'a Store,
    current: Current,
    desired: Desired,
    steps: Vec<Step>,
    /// Sets that are new.
    new_sets: BTreeMap<String, OwnedFd>,
    options: Options<'a>,
}

impl<'a> Transaction<'a> {
    /// Plans all, loads what changes, and tries it. Nothing is attached or pinned yet.
    fn new(
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
                state: current.state,
                attachments: Vec::new(),
            },
            desired,
            steps: Vec::new(),
            new_sets: BTreeMap::new(),
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

    fn plan(&mut self, targets: Vec<Target>, attachments: Vec<Attachment>) -> Result<()> {
        let subs: BTreeMap<String, &Chain> = self
            .desired
            .subs
            .iter()
            .map(|chain| (chain.name.clone(), chain))
            .collect();
        let mut attachments: Vec<Option<Attachment>> = attachments.into_iter().map(Some).collect();
        let mut steps = Vec::new();
        for mut target in targets {
            let old = attachments
                .iter_mut()
                .find(|old| {
                    old.as_ref().is_some_and(|old| {
                        (old.place.ifindex, old.place.hook)
                            == (target.place.ifindex, target.place.hook)
                    })
                })
                .and_then(Option::take);
            if target.place.device.is_empty() || old.is_some() {
                target.place = Place::find(&target.place.device, target.place.hook)?;
            }
            let chains: Vec<&Chain> = target.chains.iter().collect();
            let graph = plan::plan(
                target.place.hook,
                &chains,
                &subs,
                &self.desired.ids,
                self.store.registry(),
            )?;
            let carrier = self
                .options
                .carrier
                .unwrap_or_else(|| carrier_of(old.as_ref()));
            let made_from = self.made_from(&target, &graph, &subs, carrier)?;
            let change = match &old {
                _ if target.chains.is_empty() => Change::Remove,
                None => Change::Create,
                Some(old)
                    if old.record.made_from == made_from
                        && (target.mode == Mode::Auto || target.mode == old.record.mode) =>
                {
                    Change::Unchanged
                }
                Some(_) => Change::Replace,
            };
            let mode = match &old {
                Some(old) if target.mode == Mode::Auto => old.record.mode,
                _ => target.mode,
            };
            steps.push(Step {
                target,
                mode,
                change,
                carrier,
                graph,
                made_from,
                old,
                new: None,
                done: None,
            });
        }
        for old in attachments.into_iter().flatten() {
            steps.push(Step {
                target: Target {
                    place: old.place.clone(),
                    mode: old.record.mode,
                    chains: Vec::new(),
                },
                mode: old.record.mode,
                change: Change::Remove,
                carrier: CarrierChoice::Auto,
                graph: Graph::empty(),
                made_from: Value::Null,
                old: Some(old),
                new: None,
                done: None,
            });
        }
        self.steps = steps;
        Ok(())
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
        let mut chains: BTreeSet<&str> = target.chains.iter().map(|c| c.name.as_str()).collect();
        for node in &graph.nodes {
            chains.insert(&node.chain);
            if let Keys::Set(name) = &node.keys {
                let id = sys::map_info(self.set(name)?)
                    .with_context(|| format!("look at the set {name}"))?
                    .id;
                sets.insert(name.clone(), id);
            }
        }
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
            "program": program_hash(self.store.registry()),
            "carrier": carrier.name(),
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
        for step in steps.iter_mut().filter(|step| changes(step)) {
            step.new = Some(self.load_one(step)?);
            loaded += step.graph.nodes.len();
            if let Some(progress) = self.options.progress {
                progress(loaded, all);
            }
        }
        self.steps = steps;
        Ok(())
    }

    fn load_one(&self, step: &Step) -> Result<Generation> {
        let mut sets = BTreeMap::new();
        for node in &step.graph.nodes {
            if let Keys::Set(name) = &node.keys {
                sets.insert(name.clone(), self.set(name)?);
            }
        }
        let names = SystemNames {
            chains: &self.desired.ids,
            any_device: false,
        };
        let environment = Environment {
            hook: step.target.place.hook,
            no_link: step.target.place.no_link,
            carrier: step.carrier,
            registry: self.store.registry(),
            names: &names,
            sets: &sets,
        };
        let generation = generation::load(&step.graph, &environment)?;
        try_out(&generation, step.target.place.hook)?;
        generation.zero_counters()?;
        Ok(generation)
    }

    fn run(mut self, dry_run: bool) -> Result<Report> {
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
        self.store.write_state(&State {
            ids: self.desired.ids.clone(),
            subs: self.desired.subs.clone(),
            sets: self.desired.sets.clone(),
        })?;
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
            .chain(&self.current.state.subs)
            .map(|chain| (chain.name.as_str(), chain))
            .collect();
        let new: BTreeMap<&str, &Chain> = self
            .steps
            .iter()
            .flat_map(|step| &step.target.chains)
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
        }
    }
}

impl Step {
    /// Pins the new generation and makes it the one that runs.
    fn commit(&mut self, store: &Store, our_qdiscs: &mut BTreeSet<u32>) -> Result<()> {
        let Some(generation) = &self.new else {
            return Ok(());
        };
        let place = &self.target.place;
        let folder = store.attachment_folder(place)?;
        let number = self.old.as_ref().map_or(1, |old| old.number + 1);
        let chains: Vec<&Chain> = self.target.chains.iter().collect();
        let record = |mode, qdisc_is_ours| {
            Record::json(
                place,
                mode,
                qdisc_is_ours,
                generation,
                &chains,
                &self.made_from,
                &self.graph,
            )
        };
        let keep = self
            .old
            .as_ref()
            .filter(|old| self.target.mode == Mode::Auto || self.target.mode == old.record.mode);
        if let Some(old) = keep {
            let record = record(old.record.mode, old.record.qdisc_is_ours);
            store.pin_generation(&folder, number, generation, &record)?;
            place.switch(&old.hold, &generation.entry)?;
            self.done = Some(Done::Switched);
            return Ok(());
        }
        // A new mode needs a new link. The device is without chains for a moment.
        if let Some(old) = &self.old {
            old.place.detach(&old.hold)?;
            unpin_link(&folder)?;
        }
        let attached = place.attach(&generation.entry, self.target.mode);
        let (hold, mode) = match self.target.asked_by() {
            Some(origin) => attached.context(origin)?,
            None => attached?,
        };
        self.mode = mode;
        if matches!(hold, Hold::Clsact { qdisc_is_ours } if qdisc_is_ours) {
            our_qdiscs.insert(place.ifindex);
        }
        let qdisc_is_ours = mode == Mode::Clsact && our_qdiscs.contains(&place.ifindex);
        let record = record(mode, qdisc_is_ours);
        let pinned = store
            .pin_generation(&folder, number, generation, &record)
            .and_then(|_| hold.pin(&folder.join("link")));
        if let Err(error) = pinned {
            place.detach(&hold)?;
            return Err(error);
        }
        self.done = Some(Done::Attached(hold));
        Ok(())
    }

    fn go_back(&mut self, store: &Store) -> Result<()> {
        if self.new.is_none() {
            return Ok(());
        }
        let place = &self.target.place;
        let folder = store.attachment_folder(place)?;
        let old_entry = match &self.old {
            Some(old) => Some(
                sys::open_pin(&old.generation().join("entry")).context("open the old program")?,
            ),
            None => None,
        };
        match (self.done.take(), &self.old, &old_entry) {
            (Some(Done::Switched), Some(old), Some(entry)) => place.switch(&old.hold, entry)?,
            (Some(Done::Attached(hold)), old, _) => {
                place.detach(&hold)?;
                unpin_link(&folder)?;
                if let (Some(old), Some(entry)) = (old, &old_entry) {
                    reattach(old, entry, &folder)?;
                }
            }
            (None, Some(old), Some(entry)) if place.running(&old.hold)?.is_none() => {
                reattach(old, entry, &folder)?;
            }
            _ => {}
        }
        let number = self.old.as_ref().map_or(1, |old| old.number + 1);
        let new = folder.join(format!("g{number}"));
        if new.exists() {
            sys::wait_rcu().context("wait for packets in flight")?;
            store::remove_generation(&new)?;
        }
        if self.old.is_none() && folder.exists() {
            fs::remove_dir(&folder).context("remove the attachment's folder")?;
        }
        Ok(())
    }
}

/// Attaches what ran before in its old mode.
fn reattach(old: &Attachment, entry: &OwnedFd, folder: &Path) -> Result<()> {
    let (hold, _) = old.place.attach(entry, old.record.mode)?;
    hold.pin(&folder.join("link"))
}

fn unpin_link(folder: &Path) -> Result<()> {
    match sys::unpin(&folder.join("link")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(anyhow!("remove the old link: {error}"))
        }
        _ => Ok(()),
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

fn by_name<'a, T>((name, value): (&'a String, &'a T)) -> (&'a str, &'a T) {
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
    for policy in registry.policies() {
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
