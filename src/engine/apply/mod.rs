// SPDX-License-Identifier: MIT OR Apache-2.0
//! Brings what runs to what chain files say: new generations are built beside the running ones,
//! tried, and switched to one by one. A failure anywhere leaves the old ones running.

mod desired;
mod step;
mod transaction;

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::generation::CarrierChoice;
use super::store::{State, Store};
use super::wanted::{self, Missing};
use super::{sets, sys};
use crate::error::{Invalid, Refused, did_you_mean};
use crate::hook::Hook;
use crate::netns;
use crate::spec::{Mode, Spec};
use desired::{Current, Desired};
use transaction::Transaction;

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
    /// Leave running what another build made of the same chains.
    pub keep_programs: bool,
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
    /// What it was together with a change after it.
    fn then(self, after: Change) -> Change {
        match self {
            Change::Unchanged => after,
            _ => self,
        }
    }

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
    /// Patterns that no device matches.
    pub unmatched: Vec<String>,
    /// Chains that were attached again, or to a device that came: chain, device, hook.
    pub attached: Vec<(String, String, Hook)>,
    /// Where that failed.
    pub failures: Vec<Failure>,
}

/// A place that lacks chains, and why they could not be attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub device: String,
    pub hook: Hook,
    pub why: String,
}

impl Report {
    /// Adds what was done after it.
    fn absorb(&mut self, after: Report) {
        for (device, hook, mode, change) in after.attachments {
            let same = |(other, at, ..): &&mut (String, Hook, Mode, Change)| {
                (other.as_str(), *at) == (device.as_str(), hook)
            };
            match self.attachments.iter_mut().find(same) {
                Some(before) => (before.2, before.3) = (mode, before.3.then(change)),
                None => self.attachments.push((device, hook, mode, change)),
            }
        }
        self.attached.extend(after.attached);
        self.failures.extend(after.failures);
    }

    /// What was left undone, for people.
    pub fn warnings(&self) -> Vec<String> {
        let unmatched = self.unmatched.iter().map(|pattern| {
            format!(
                "no device matches \"{pattern}\" yet; `policy-chain agent` attaches as they come"
            )
        });
        unmatched
            .chain(self.failures.iter().map(Failure::to_string))
            .collect()
    }

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

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "not attached to {} {}: {}",
            self.device, self.hook, self.why
        )
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
    let unmatched = desired.add_places(files)?;
    desired.check()?;
    desired.check_elsewhere(&current.elsewhere)?;
    desired.drop_unused_ids(store, &current)?;
    let mut report = Transaction::new(store, current, desired, options)?.run(options.dry_run)?;
    report.unmatched = unmatched;
    if !options.dry_run {
        report.absorb(reattach(store)?);
    }
    Ok(report)
}

/// Attaches chains wherever they shall run and do not: at devices that came back, and at new ones
/// that a pattern matches. What fails is in the report, changes nothing, and keeps no other place
/// waiting. What runs elsewhere stays, though another build made it.
///
/// # Errors
/// What is kept cannot be read.
pub fn reattach(store: &Store) -> Result<Report> {
    reattach_after(store, &BTreeSet::new())
}

/// As [`reattach`], where some places have just failed (interface index and hook): those come last,
/// one by one.
///
/// # Errors
/// As [`reattach`].
pub fn reattach_after(store: &Store, failed: &BTreeSet<(u32, Hook)>) -> Result<Report> {
    let mut report = Report::default();
    let (doubtful, fresh): (Vec<Missing>, Vec<Missing>) = wanted::missing(store)?
        .into_iter()
        .partition(|at| failed.contains(&(at.place.ifindex, at.place.hook)));
    reattach_all(store, &fresh, &mut report);
    for one in doubtful.chunks(1) {
        reattach_all(store, one, &mut report);
    }
    Ok(report)
}

/// All places by one change: each looks at everything that runs. If it fails, by halves, down to
/// the places that fail.
fn reattach_all(store: &Store, missing: &[Missing], report: &mut Report) {
    if missing.is_empty() {
        return;
    }
    match (reattach_at(store, missing), missing) {
        (Ok(done), _) => report.absorb(done),
        (Err(error), [one]) => report.failures.push(Failure {
            device: one.place.device.clone(),
            hook: one.place.hook,
            why: format!("{error:#}"),
        }),
        (Err(_), _) => {
            let (first, second) = missing.split_at(missing.len() / 2);
            reattach_all(store, first, report);
            reattach_all(store, second, report);
        }
    }
}

fn reattach_at(store: &Store, missing: &[Missing]) -> Result<Report> {
    let current = Current::read(store)?;
    let mut desired = Desired::keep(&current, |_| true)?;
    let mut attached = Vec::new();
    for at in missing {
        for chain in &at.chains {
            desired.add_place(chain, &at.place);
            attached.push((chain.name.clone(), at.place.device.clone(), at.place.hook));
        }
    }
    desired.check()?;
    let options = Options {
        keep_programs: true,
        ..Options::default()
    };
    let mut report = Transaction::new(store, current, desired, options)?.run(false)?;
    report.attached = attached;
    report
        .attachments
        .retain(|(.., change)| *change != Change::Unchanged);
    report.chains.clear();
    report.sets.clear();
    Ok(report)
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
    let mut desired = Desired::keep(&current, |name| !names.iter().any(|gone| gone == name))?;
    desired.check()?;
    desired.check_elsewhere(&current.elsewhere)?;
    desired.drop_unused_ids(store, &current)?;
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
    let here = netns::Id::current()?;
    let awaited = current.state.attached.keys().any(|id| *id != here);
    if !elsewhere.is_empty() || (awaited && !all_netns) {
        desired = Desired::keep(&current, |_| true)?;
        desired.targets.clear();
        desired.wanted.clear();
        if all_netns {
            desired.elsewhere.clear();
        }
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
        .any(|(_, value)| sets::element_chain(value) == Some(id) && !sets::has_expired(value));
    Ok(named)
}
