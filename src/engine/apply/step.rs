// SPDX-License-Identifier: MIT OR Apache-2.0
//! One attachment on its way from what it runs to what it shall run, and back.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use serde_json::Value;

use super::Change;
use super::desired::Target;
use crate::engine::attach::Hold;
use crate::engine::generation::{CarrierChoice, Generation};
use crate::engine::store::{self, Attachment, Record, Store};
use crate::engine::sys;
use crate::plan::Graph;
use crate::spec::{Chain, Mode};

/// One attachment on its way.
pub(super) struct Step {
    pub(super) target: Target,
    /// The mode it is or will be attached in; `auto` until that is known.
    pub(super) mode: Mode,
    pub(super) change: Change,
    pub(super) carrier: CarrierChoice,
    pub(super) graph: Graph,
    pub(super) made_from: Value,
    /// What runs there now.
    pub(super) old: Option<Attachment>,
    /// What shall run there: loaded, unless unchanged or removed.
    pub(super) new: Option<Generation>,
    /// Set once it is attached or switched, to go back.
    pub(super) done: Option<Done>,
}

/// What was changed at a hook.
pub(super) enum Done {
    /// Newly attached; what ran there before, by a link that is gone, if anything.
    Attached(Hold),
    Switched,
}

impl Step {
    /// To nothing.
    pub(super) fn remove(old: Attachment) -> Step {
        Step {
            target: Target {
                place: old.place.clone(),
                mode: old.record.mode,
                chains: Vec::new(),
                learns: BTreeSet::new(),
            },
            mode: old.record.mode,
            change: Change::Remove,
            carrier: CarrierChoice::Auto,
            graph: Graph::empty(),
            made_from: Value::Null,
            old: Some(old),
            new: None,
            done: None,
        }
    }

    /// Pins the new generation and makes it the one that runs.
    pub(super) fn commit(&mut self, store: &Store, our_qdiscs: &mut BTreeSet<u32>) -> Result<()> {
        let Some(generation) = &mut self.new else {
            return Ok(());
        };
        let place = &self.target.place;
        let folder = store.attachment_folder(place)?;
        let number = self.old.as_ref().map_or(1, |old| old.number + 1);
        let chains: Vec<&Chain> = self.target.chains.iter().collect();
        let carrier = generation.carrier;
        let record = |mode, qdisc_is_ours| {
            Record::json(
                place,
                mode,
                qdisc_is_ours,
                carrier,
                &chains,
                &self.made_from,
                &self.graph,
            )
        };
        let keep = self.old.as_ref().filter(|old| self.mode == old.record.mode);
        if let Some(old) = keep {
            let record = record(old.record.mode, old.record.qdisc_is_ours);
            generation.set_mode(self.mode)?;
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
        let entry = generation.entry.try_clone()?;
        let attached = place.attach(&entry, self.target.mode, |mode| {
            generation.set_mode(mode)?;
            if mode == Mode::Clsact {
                let record = record(mode, our_qdiscs.contains(&place.ifindex));
                store.pin_generation(&folder, number, generation, &record)?;
            }
            Ok(())
        });
        let (hold, mode) = match self.target.asked_by() {
            Some(origin) => attached.context(origin)?,
            None => attached?,
        };
        self.mode = mode;
        let kept = match hold {
            Hold::Link(_) => store
                .pin_generation(&folder, number, generation, &record(mode, false))
                .and_then(|()| hold.pin(&folder.join("link"))),
            Hold::Clsact { qdisc_is_ours } if qdisc_is_ours => {
                our_qdiscs.insert(place.ifindex);
                store.replace_record(&folder, number, &record(mode, true))
            }
            Hold::Clsact { .. } => Ok(()),
        };
        if let Err(error) = kept {
            place.detach(&hold)?;
            return Err(error);
        }
        self.done = Some(Done::Attached(hold));
        Ok(())
    }

    pub(super) fn go_back(&mut self, store: &Store) -> Result<()> {
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
    let (hold, _) = old.place.attach(entry, old.record.mode, |_| Ok(()))?;
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
