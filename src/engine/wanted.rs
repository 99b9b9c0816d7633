// SPDX-License-Identifier: MIT OR Apache-2.0
//! What shall run in a network namespace, and where of it does not.
//!
//! The state keeps chains as they were written. What runs counts before it: a command that was cut
//! off may have kept chains that never came to run.

use std::collections::BTreeMap;

use anyhow::Result;

use super::attach::Place;
use super::store::{Attachment, State, Store};
use crate::hook::Hook;
use crate::netns;
use crate::spec::Chain;

/// A hook of a device of the current network namespace that lacks chains.
pub struct Missing {
    pub place: Place,
    pub chains: Vec<Chain>,
}

/// The chains that shall run in a network namespace, by name. `attachments` are those of it.
pub fn chains<'a>(
    state: &State,
    namespace: netns::Id,
    attachments: impl IntoIterator<Item = &'a Attachment>,
) -> Vec<Chain> {
    let kept = state.attached.get(&namespace).into_iter().flatten();
    let mut wanted: BTreeMap<&str, &Chain> =
        kept.map(|chain| (chain.name.as_str(), chain)).collect();
    let mut running: BTreeMap<&str, Vec<&Chain>> = BTreeMap::new();
    for chain in attachments.into_iter().flat_map(|a| &a.record.chains) {
        running.entry(&chain.name).or_default().push(chain);
    }
    for (name, chains) in running {
        let runs = wanted.get(name).is_some_and(|kept| chains.contains(kept));
        if let (false, Some(first)) = (runs, chains.first()) {
            wanted.insert(name, first);
        }
    }
    wanted.into_values().cloned().collect()
}

/// Where the chains of the current network namespace shall run and do not, though a device is
/// there. Needs no lock.
///
/// # Errors
/// A state or a record that cannot be read.
pub fn missing(store: &Store) -> Result<Vec<Missing>> {
    let state = store.state()?;
    let here = netns::Id::current()?;
    // Without chains kept, all there are run.
    if !state.attached.contains_key(&here) {
        return Ok(Vec::new());
    }
    let mut attachments = store.attachments()?;
    attachments.retain(|attachment| attachment.netns == here.inode);
    let mut missing: Vec<Missing> = Vec::new();
    for chain in chains(&state, here, &attachments) {
        for place in places(&chain) {
            if is_at(&chain, &place, &attachments) {
                continue;
            }
            match missing.iter_mut().find(|at| at.place == place) {
                Some(at) => at.chains.push(chain.clone()),
                None => missing.push(Missing {
                    place,
                    chains: vec![chain.clone()],
                }),
            }
        }
    }
    Ok(missing)
}

/// Where a chain shall run: the hooks of devices that are there and can be attached to.
fn places(chain: &Chain) -> Vec<Place> {
    let mut places: Vec<Place> = Vec::new();
    for attach in &chain.attach {
        for place in Place::covered(attach) {
            if !places.contains(&place) {
                places.push(place);
            }
        }
    }
    places
}

fn is_at(chain: &Chain, place: &Place, attachments: &[Attachment]) -> bool {
    attachments.iter().any(|attachment| {
        (attachment.place.ifindex, attachment.place.hook) == (place.ifindex, place.hook)
            && attachment.runs(&chain.name)
    })
}

/// Where a chain shall run and does not, as device or pattern and hook: for lack of a device, or
/// because it could not be attached. `attachments` are those of one network namespace; of another
/// than the current one it is not known what devices there are.
pub fn absent(chain: &Chain, attachments: &[&Attachment], is_here: bool) -> Vec<(String, Hook)> {
    let mut absent = Vec::new();
    let runs_at = |covers: &dyn Fn(&str) -> bool, hook| {
        attachments.iter().any(|attachment| {
            attachment.place.hook == hook
                && covers(&attachment.place.device)
                && attachment.runs(&chain.name)
        })
    };
    for attach in &chain.attach {
        let mut lacking: Vec<String> = match attach.is_pattern() && is_here {
            true => Place::covered(attach)
                .into_iter()
                .map(|p| p.device)
                .collect(),
            false => Vec::new(),
        };
        lacking.retain(|device| !runs_at(&|name| name == device, attach.hook));
        if lacking.is_empty() && !runs_at(&|name| attach.covers(name), attach.hook) {
            lacking.push(attach.device.clone());
        }
        for device in lacking {
            if !absent.contains(&(device.clone(), attach.hook)) {
                absent.push((device, attach.hook));
            }
        }
    }
    absent
}
