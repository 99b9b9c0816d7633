// SPDX-License-Identifier: MIT OR Apache-2.0
//! What runs and what shall run.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde_json::Value;

use super::set_names_chain;
use crate::engine::attach::Place;
use crate::engine::store::{Attachment, State, Store};
use crate::engine::wanted;
use crate::error::{Invalid, Refused};
use crate::netns;
use crate::spec::{Chain, Mode, SetSpec, Spec, Then};

/// What runs.
pub(super) struct Current {
    pub(super) state: State,
    /// Chains that shall run in this network namespace, where there are devices for them.
    pub(super) wanted: Vec<Chain>,
    /// In this network namespace, unless read everywhere.
    pub(super) attachments: Vec<Attachment>,
    /// In other network namespaces. They share the sub-chains and sets, and stay as they are.
    pub(super) elsewhere: Vec<Attachment>,
}

impl Current {
    pub(super) fn read(store: &Store) -> Result<Current> {
        let here = netns::Id::current()?;
        let mut current = Current::everywhere(store)?;
        (current.attachments, current.elsewhere) = std::mem::take(&mut current.attachments)
            .into_iter()
            .partition(|attachment| attachment.netns == here.inode);
        current.wanted = wanted::chains(&current.state, here, &current.attachments);
        Ok(current)
    }

    /// With what runs in other network namespaces, to change that too.
    pub(super) fn everywhere(store: &Store) -> Result<Current> {
        let state = store.state()?;
        Ok(Current {
            wanted: state.attached.values().flatten().cloned().collect(),
            state,
            attachments: store.attachments()?,
            elsewhere: Vec::new(),
        })
    }

    pub(super) fn chain_names(&self) -> BTreeSet<&str> {
        let wanted = self.wanted.iter().chain(&self.state.subs);
        wanted.map(|chain| chain.name.as_str()).collect()
    }
}

/// What shall run.
#[derive(Default)]
pub(super) struct Desired {
    pub(super) sets: BTreeMap<String, SetSpec>,
    pub(super) ids: BTreeMap<String, u32>,
    pub(super) subs: Vec<Chain>,
    /// Chains of this network namespace, whether there are devices for them or not.
    pub(super) wanted: Vec<Chain>,
    /// The same of others.
    pub(super) elsewhere: BTreeMap<netns::Id, Vec<Chain>>,
    pub(super) targets: Vec<Target>,
}

/// What shall run at one hook of one device.
pub(super) struct Target {
    pub(super) place: Place,
    pub(super) mode: Mode,
    pub(super) chains: Vec<Chain>,
    /// What a learner is to fill here for another hook of the device: names of maps.
    pub(super) learns: BTreeSet<String>,
}

impl Target {
    /// Whether anything is left to run.
    pub(super) fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.learns.is_empty()
    }

    /// Where a chain file asks for it, if one does.
    pub(super) fn asked_by(&self) -> Option<String> {
        self.chains.iter().find_map(|chain| {
            chain.origin.file.as_ref()?;
            let mut attach = chain.attach.iter();
            let asks = chain.attach_at(&self.place.device, self.place.hook)?;
            let at = attach.position(|attach| attach == asks)?;
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
    pub(super) fn keep(current: &Current, keep: impl Fn(&str) -> bool) -> Result<Desired> {
        let kept = |chains: &[Chain]| -> Vec<Chain> {
            let kept = chains.iter().filter(|chain| keep(&chain.name));
            kept.cloned().collect()
        };
        let mut elsewhere = current.state.attached.clone();
        elsewhere.remove(&netns::Id::current()?);
        Ok(Desired {
            sets: current.state.sets.clone(),
            ids: current.state.ids.clone(),
            subs: kept(&current.state.subs),
            wanted: kept(&current.wanted),
            elsewhere,
            targets: current
                .attachments
                .iter()
                .map(|attachment| Target {
                    place: attachment.place.clone(),
                    mode: attachment.record.mode,
                    chains: kept(&attachment.record.chains),
                    learns: BTreeSet::new(),
                })
                .collect(),
        })
    }

    /// The state to keep.
    pub(super) fn state(&self) -> Result<State> {
        let mut attached = self.elsewhere.clone();
        if !self.wanted.is_empty() {
            attached.insert(netns::Id::current()?, self.wanted.clone());
        }
        Ok(State {
            ids: self.ids.clone(),
            subs: self.subs.clone(),
            attached,
            sets: self.sets.clone(),
        })
    }

    /// What runs now with the files' chains in the place of those of the same name, without yet
    /// placing them.
    pub(super) fn merge(current: &Current, files: &Spec, prune: bool) -> Result<Desired> {
        let named: BTreeSet<&str> = files.chains.iter().map(|c| c.name.as_str()).collect();
        let mut desired = Desired::keep(current, |name| !prune && !named.contains(name))?;
        if prune {
            desired.sets.clear();
        }
        for (name, set) in &files.sets {
            if let Some(existing) = current.state.sets.get(name) {
                refuse_other_shape(name, existing, set)?;
            }
            desired.sets.insert(name.clone(), set.clone());
        }
        let (subs, wanted): (Vec<&Chain>, _) = files
            .chains
            .iter()
            .partition(|chain| chain.attach.is_empty());
        desired.subs.extend(subs.into_iter().cloned());
        desired.wanted.extend(wanted.into_iter().cloned());
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
    pub(super) fn drop_unused_ids(&mut self, store: &Store, current: &Current) -> Result<()> {
        let state = &current.state;
        let kept = self.chains().chain(self.elsewhere.values().flatten());
        let kept = kept.map(|chain| &chain.name);
        let nodes = current.elsewhere.iter().flat_map(|a| &a.record.nodes);
        let live: BTreeSet<String> = kept.chain(nodes.map(|node| &node.chain)).cloned().collect();
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
        attached.chain(&self.wanted).chain(&self.subs)
    }

    /// Refuses to take sub-chains and sets from under chains of other network namespaces, whose
    /// programs were made from them.
    pub(super) fn check_elsewhere(&self, elsewhere: &[Attachment]) -> Result<(), Refused> {
        let subs: Vec<Value> = self.subs.iter().map(Chain::to_json).collect();
        for attachment in elsewhere {
            let made_from = &attachment.record.made_from;
            let mut used = made_from["subs"].as_array().into_iter().flatten();
            let changed = used.find(|sub| !subs.contains(sub));
            if let Some(name) = changed.and_then(|sub| sub["name"].as_str()) {
                return Err(in_use_elsewhere("chain", name, attachment));
            }
            let mut used = made_from["sets"].as_object().into_iter().flatten();
            if let Some((name, _)) = used.find(|(name, _)| !self.sets.contains_key(*name)) {
                return Err(in_use_elsewhere("set", name, attachment));
            }
        }
        let subs: BTreeSet<&str> = self.subs.iter().map(|chain| chain.name.as_str()).collect();
        for (namespace, chains) in &self.elsewhere {
            for chain in chains {
                let gone = |name: &&str| !subs.contains(name);
                if let Some(name) = targets(chain).find(gone) {
                    return Err(awaited_elsewhere("chain", name, chain, *namespace));
                }
                let keys = chain.selectors.iter().map(|selector| &selector.keys);
                let keys = keys.chain(chain.actions.iter().map(|action| &action.keys));
                let mut used = keys.filter_map(|keys| keys.set());
                if let Some(name) = used.find(|name| !self.sets.contains_key(*name)) {
                    return Err(awaited_elsewhere("set", name, chain, *namespace));
                }
            }
        }
        Ok(())
    }

    /// Refuses to take a sub-chain from under a chain that goes to it.
    pub(super) fn check(&self) -> Result<(), Refused> {
        let subs: BTreeSet<&str> = self.subs.iter().map(|chain| chain.name.as_str()).collect();
        for chain in self.chains() {
            if let Some(gone) = targets(chain).find(|name| !subs.contains(name)) {
                return Err(Refused::state(
                    format!("the chain {gone} is in use"),
                    format!("the chain {} goes to it", chain.name),
                    format!("first delete {}, or apply it without this goto", chain.name),
                ));
            }
        }
        Ok(())
    }

    /// Puts the files' chains where they attach, and with them the others that shall run there.
    /// Tells the patterns that no device matches.
    pub(super) fn add_places(&mut self, files: &Spec) -> Result<Vec<String>> {
        let known = self.subs.iter().map(|chain| chain.name.clone()).collect();
        files.validate_references(&self.sets, &known)?;
        let mut unmatched = Vec::new();
        let mut places: Vec<Place> = Vec::new();
        for chain in &files.chains {
            for (at, attach) in chain.attach.iter().enumerate() {
                let found = match attach.is_pattern() {
                    true => Place::covered(attach),
                    false => {
                        let found = Place::find(&attach.device, attach.hook);
                        vec![found.with_context(|| attach_place(chain, at))?]
                    }
                };
                if found.is_empty() {
                    unmatched.push(attach.device.clone());
                }
                for place in found {
                    self.add_place(chain, &place);
                    places.push(place);
                }
            }
        }
        for chain in self.wanted.clone() {
            for place in &places {
                self.add_place(&chain, place);
            }
        }
        unmatched.dedup();
        Ok(unmatched)
    }

    /// Has a chain run at a place, if it shall run there and does not yet.
    pub(super) fn add_place(&mut self, chain: &Chain, place: &Place) {
        let Some(attach) = chain.attach_at(&place.device, place.hook) else {
            return;
        };
        let same = |target: &&mut Target| {
            (target.place.ifindex, target.place.hook) == (place.ifindex, place.hook)
        };
        let target = match self.targets.iter_mut().find(same) {
            Some(target) => target,
            None => {
                self.targets.push(Target {
                    place: place.clone(),
                    mode: attach.mode,
                    chains: vec![chain.clone()],
                    learns: BTreeSet::new(),
                });
                return;
            }
        };
        // Found in a record, the place does not know its link layer.
        target.place = place.clone();
        if target.chains.iter().any(|there| there.name == chain.name) {
            return;
        }
        if attach.mode != Mode::Auto {
            target.mode = attach.mode;
        }
        target.chains.push(chain.clone());
    }
}

/// The sub-chains that a chain goes to.
fn targets(chain: &Chain) -> impl Iterator<Item = &str> {
    let then = match &chain.then {
        Then::Goto(target) => Some(target),
        _ => None,
    };
    let actions = chain.actions.iter().flat_map(|action| &action.references);
    let selectors = chain.selectors.iter().flat_map(|s| &s.references);
    let named = actions.chain(selectors).map(|reference| &reference.chain);
    named.chain(then).map(String::as_str)
}

fn awaited_elsewhere(what: &str, name: &str, user: &Chain, namespace: netns::Id) -> Refused {
    Refused::state(
        format!("the {what} {name} is in use"),
        format!(
            "by the chain {}, which waits for a device in network namespace {}",
            user.name, namespace.inode
        ),
        "first delete it, inside that namespace, or use another --bpffs folder for each",
    )
}

fn in_use_elsewhere(what: &str, name: &str, user: &Attachment) -> Refused {
    Refused::state(
        format!("the {what} {name} is in use"),
        format!(
            "by the chains on {} {} of network namespace {}",
            user.record.device, user.place.hook, user.netns
        ),
        "first delete those, inside that namespace, or use another --bpffs folder for each",
    )
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
