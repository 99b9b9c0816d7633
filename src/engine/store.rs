// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is kept in bpffs between commands.
//!
//! ```text
//! FOLDER/state                         chain ids, chains, sets: one frozen map of JSON
//!        sets/NAME                     a named set
//!        NETNS_IFINDEX_HOOK/link       an attachment's link (none for clsact)
//!                           gN/        a generation: entry stub nodes chains counters
//!                                      record [base], and the maps that are kept (pcd_*, pcn_*)
//! ```
//!
//! The program that a link or filter runs is the only commit point: the generation with that entry
//! program is live, every other one is left over from a command that was cut off, and removed by
//! the next one that takes the lock.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow};
use serde_json::{Map, Value, json};

use super::attach::{Hold, Place};
use super::counters::{self, Counters};
use super::generation::{self, Generation, kernel_error};
use super::sys;
use crate::error::Refused;
use crate::hook::Hook;
use crate::netns;
use crate::plan::{self, Graph};
use crate::policy::Registry;
use crate::policy::btf::is_state;
use crate::spec::{Chain, Mode, SetSpec};

/// Where chains are kept unless told otherwise.
pub const DEFAULT_FOLDER: &str = "/sys/fs/bpf/policy-chain";
const BPFFS: &str = "/sys/fs/bpf";
/// How long a command waits for another one.
const LOCK_WAIT: Duration = Duration::from_secs(60);

/// The folder, and the right to write in it if it is locked.
pub struct Store {
    folder: PathBuf,
    registry: &'static Registry,
    lock: Option<sys::FolderLock>,
}

/// What is known besides the attachments.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Id of every chain, attached or not.
    pub ids: BTreeMap<String, u32>,
    /// Chains entered by `goto` only.
    pub subs: Vec<Chain>,
    /// Chains that are to run whenever there is a device for them, as they were written.
    pub attached: BTreeMap<netns::Id, Vec<Chain>>,
    pub sets: BTreeMap<String, SetSpec>,
}

/// What a generation runs, as its record says.
#[derive(Clone, Debug)]
pub struct Record {
    pub device: String,
    /// The mode it is attached in; never `auto`.
    pub mode: Mode,
    pub carrier: String,
    /// Whether the clsact qdisc is ours to remove.
    pub qdisc_is_ours: bool,
    /// The maps that nodes look up and learners fill.
    pub reads: BTreeSet<String>,
    /// Those that a learner here fills.
    pub learns: BTreeSet<String>,
    /// The chains attached here.
    pub chains: Vec<Chain>,
    /// Everything the programs were made from, to tell whether anything changed.
    pub made_from: Value,
    /// The nodes, in the order of their counters.
    pub nodes: Vec<RecordedNode>,
}

/// A node as its record keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedNode {
    pub chain: String,
    pub ordinal: usize,
    pub policy: String,
    pub selector: bool,
    pub counts_for_chain: bool,
}

/// Tells two times apart between which generations came or went; see [`Store::stamp`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp(BTreeSet<(PathBuf, SystemTime)>);

/// A hook of a device that runs chains of ours.
pub struct Attachment {
    pub folder: PathBuf,
    /// Inode of the network namespace.
    pub netns: u64,
    pub place: Place,
    pub hold: Hold,
    /// Number of the live generation.
    pub number: u64,
    pub record: Record,
}

impl Store {
    /// Opens the folder to look.
    ///
    /// # Errors
    /// No permission.
    pub fn open(folder: &Path) -> Result<Store> {
        Ok(Store {
            folder: folder.to_owned(),
            registry: Registry::embedded()?,
            lock: None,
        })
    }

    /// Makes the folder, mounting bpffs if need be, takes the lock, and removes what earlier
    /// commands left over.
    ///
    /// # Errors
    /// No permission, no bpffs, or another command holds the lock.
    pub fn lock(folder: &Path) -> Result<Store> {
        Store::lock_within(folder, LOCK_WAIT)
    }

    /// As [`Store::lock`], with a patience of the caller's.
    ///
    /// # Errors
    /// As [`Store::lock`].
    pub fn lock_within(folder: &Path, wait: Duration) -> Result<Store> {
        let store = Store {
            folder: folder.to_owned(),
            registry: Registry::embedded()?,
            lock: Some(lock_prepared(folder, wait)?),
        };
        store.clean_up()?;
        Ok(store)
    }

    /// The policies of this program.
    pub fn registry(&self) -> &'static Registry {
        self.registry
    }

    /// What is known besides the attachments; nothing if there is no state yet.
    ///
    /// # Errors
    /// A state that cannot be read.
    pub fn state(&self) -> Result<State> {
        let Some(value) = read_json(&self.folder.join("state"))? else {
            return Ok(State::default());
        };
        self.parse_state(&value)
            .with_context(|| format!("read {}/state", self.folder.display()))
    }

    fn parse_state(&self, value: &Value) -> Result<State> {
        let mut state = State::default();
        for (name, id) in members(value, "ids") {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            state.ids.insert(name.clone(), id.context("a chain's id")?);
        }
        for chain in items(value, "subs") {
            state.subs.push(Chain::from_json(chain, self.registry)?);
        }
        for kept in items(value, "attached") {
            let number = |key| kept.get(key).and_then(Value::as_u64).context(key);
            let id = netns::Id {
                inode: number("netns")?,
                cookie: number("cookie")?,
            };
            let chains = items(kept, "chains").map(|chain| Chain::from_json(chain, self.registry));
            state.attached.insert(id, chains.collect::<Result<_, _>>()?);
        }
        for (name, set) in members(value, "sets") {
            let size = set.get("size").and_then(Value::as_u64).context("a size")?;
            state.sets.insert(
                name.clone(),
                SetSpec {
                    kind: text(set, "kind")?,
                    size: u32::try_from(size)?,
                },
            );
        }
        Ok(state)
    }

    /// Replaces the state in one step.
    ///
    /// # Errors
    /// What the kernel says; the old state then stays.
    pub fn write_state(&self, state: &State) -> Result<()> {
        let sets: Map<String, Value> = state
            .sets
            .iter()
            .map(|(name, set)| (name.clone(), set.to_json()))
            .collect();
        let list = |chains: &[Chain]| chains.iter().map(Chain::to_json).collect::<Vec<_>>();
        let attached = state.attached.iter().map(|(id, chains)| {
            json!({ "netns": id.inode, "cookie": id.cookie, "chains": list(chains) })
        });
        let value = json!({
            "ids": state.ids,
            "subs": list(&state.subs),
            "attached": attached.collect::<Vec<_>>(),
            "sets": sets,
        });
        let new = self.folder.join("state_new");
        remove_pin(&new)?;
        write_json("pc_state", &value, &new)?;
        fs::rename(&new, self.folder.join("state")).context("replace the state")
    }

    /// The attachments, of all network namespaces. What has no live generation is left out.
    ///
    /// # Errors
    /// No permission, or a record that cannot be read.
    pub fn attachments(&self) -> Result<Vec<Attachment>> {
        let mut found = Vec::new();
        for folder in self.attachment_folders()? {
            found.extend(self.attachment(&folder)?);
        }
        found.sort_by(|a, b| {
            (a.netns, &a.place.device, a.place.hook).cmp(&(b.netns, &b.place.device, b.place.hook))
        });
        Ok(found)
    }

    /// A stamp that stays the same while generations do, at the price of a few system calls. None
    /// while something is going on: the clock of folders is coarse, and a new generation is there a
    /// while before it runs.
    ///
    /// # Errors
    /// No permission.
    pub fn stamp(&self) -> Result<Option<Stamp>> {
        const SETTLED: Duration = Duration::from_secs(1);
        let mut folders = BTreeSet::new();
        for folder in self.attachment_folders()? {
            let Ok(changed) = fs::metadata(&folder).and_then(|it| it.modified()) else {
                return Ok(None);
            };
            if changed.elapsed().unwrap_or_default() < SETTLED {
                return Ok(None);
            }
            folders.insert((folder, changed));
        }
        Ok(Some(Stamp(folders)))
    }

    /// The folders of attachments that are none of `found`: those of other network namespaces.
    ///
    /// # Errors
    /// No permission.
    pub fn others(&self, found: &[Attachment]) -> Result<Vec<PathBuf>> {
        let mut folders = self.attachment_folders()?;
        folders.retain(|folder| found.iter().all(|attachment| attachment.folder != *folder));
        Ok(folders)
    }

    fn attachment_folders(&self) -> Result<Vec<PathBuf>> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                let what = format!("read {}", self.folder.display());
                return Err(kernel_error(what, &error));
            }
        };
        let folders = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.is_dir() && address(path).is_some())
            .collect();
        Ok(folders)
    }

    /// The attachment kept in a folder, unless its device or its program is gone.
    fn attachment(&self, folder: &Path) -> Result<Option<Attachment>> {
        let Some((netns, ifindex, hook)) = address(folder) else {
            return Ok(None);
        };
        let link = match sys::open_pin(&folder.join("link")) {
            Ok(link) => Some(link),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                let what = format!("open the link in {}", folder.display());
                return Err(kernel_error(what, &error));
            }
        };
        if link.is_none() && netns != netns::current_id()? {
            // Only from inside its namespace can a filter be asked for.
            return Ok(None);
        }
        let mut place = Place {
            device: String::new(),
            ifindex,
            hook,
            no_link: false,
        };
        let mut hold = link.map_or(
            Hold::Clsact {
                qdisc_is_ours: false,
            },
            Hold::Link,
        );
        let mut running = place.running(&hold)?;
        let (number, record) = loop {
            let Some(program) = running else {
                return Ok(None);
            };
            if let Some(live) = self.generation_of(folder, program)? {
                break live;
            }
            // Whoever looks has no lock: a command may have replaced it meanwhile.
            running = place.running(&hold)?;
            if running == Some(program) {
                return Ok(None);
            }
        };
        place.device = match netns == netns::current_id()? {
            true => sys::device_name(ifindex).unwrap_or_else(|_| record.device.clone()),
            false => record.device.clone(),
        };
        if let Hold::Clsact { qdisc_is_ours } = &mut hold {
            *qdisc_is_ours = record.qdisc_is_ours;
        }
        Ok(Some(Attachment {
            folder: folder.to_owned(),
            netns,
            place,
            hold,
            number,
            record,
        }))
    }

    /// The generation in an attachment's folder whose entry program has an id.
    fn generation_of(&self, folder: &Path, program: u32) -> Result<Option<(u64, Record)>> {
        for (number, generation) in generations(folder)? {
            let Ok(entry) = sys::open_pin(&generation.join("entry")) else {
                continue;
            };
            if sys::prog_info(&entry)?.id != program {
                continue;
            }
            let Some(value) = read_json(&generation.join("record"))? else {
                continue;
            };
            let record = self
                .parse_record(&value)
                .with_context(|| format!("read {}/record", generation.display()))?;
            return Ok(Some((number, record)));
        }
        Ok(None)
    }

    fn parse_record(&self, value: &Value) -> Result<Record> {
        let mode = text(value, "mode")?;
        let mut record = Record {
            device: text(value, "device")?,
            mode: [Mode::Native, Mode::Generic, Mode::Tcx, Mode::Clsact]
                .into_iter()
                .find(|known| known.name() == mode)
                .context("a mode")?,
            carrier: text(value, "carrier")?,
            qdisc_is_ours: value["qdisc_is_ours"] == Value::Bool(true),
            reads: names(&value["reads"]),
            learns: names(&value["learns"]),
            chains: Vec::new(),
            made_from: value["made_from"].clone(),
            nodes: Vec::new(),
        };
        for chain in items(value, "chains") {
            let chain = Chain::from_json(chain, self.registry)?;
            record.chains.push(chain);
        }
        for node in items(value, "nodes") {
            let ordinal = node.get("ordinal").and_then(Value::as_u64);
            record.nodes.push(RecordedNode {
                chain: text(node, "chain")?,
                ordinal: usize::try_from(ordinal.context("an ordinal")?)?,
                policy: text(node, "policy")?,
                selector: node["selector"] == Value::Bool(true),
                counts_for_chain: node["counts_for_chain"] == Value::Bool(true),
            });
        }
        Ok(record)
    }

    /// Removes generations that are not live, folding their counters, attachments whose device is
    /// gone, a state that was not finished, and what is kept for network namespaces that are gone.
    fn clean_up(&self) -> Result<()> {
        remove_pin(&self.folder.join("state_new"))?;
        self.forget_dead_namespaces()?;
        let here = netns::current_id()?;
        let mut dead = Vec::new();
        let mut unsettled = Vec::new();
        for folder in self.attachment_folders()? {
            match self.attachment(&folder)? {
                Some(attachment) if generations(&folder)?.len() > 1 => unsettled.push(attachment),
                Some(_) => {}
                None if address(&folder).is_some_and(|(netns, ..)| netns == here)
                    || link_is_dead(&folder) =>
                {
                    dead.push(folder);
                }
                None => {}
            }
        }
        if dead.is_empty() && unsettled.is_empty() {
            return Ok(());
        }
        sys::wait_rcu().context("wait for packets in flight")?;
        dead.iter()
            .try_for_each(|folder| remove_attachment(folder))?;
        unsettled
            .iter()
            .try_for_each(|attachment| self.settle(attachment))
    }

    /// Forgets the chains of network namespaces in which nothing of ours runs and that are gone.
    fn forget_dead_namespaces(&self) -> Result<()> {
        let mut state = self.state()?;
        let here = netns::Id::current()?;
        let folders = self.attachment_folders()?;
        let runs = |inode| {
            let mut addresses = folders.iter().filter_map(|folder| address(folder));
            addresses.any(|(netns, ..)| netns == inode)
        };
        let before = state.attached.len();
        state.attached.retain(|id, _| match id.inode == here.inode {
            true => *id == here,
            false => runs(id.inode) || netns::is_alive(id.inode),
        });
        match state.attached.len() == before {
            true => Ok(()),
            false => self.write_state(&state),
        }
    }

    /// Folds the counters of an attachment's earlier generations into its live one and removes
    /// them. No packet may run in them any more.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn settle(&self, attachment: &Attachment) -> Result<()> {
        let live = attachment.generation();
        let others: Vec<(u64, PathBuf)> = generations(&attachment.folder)?
            .into_iter()
            .filter(|(number, _)| *number != attachment.number)
            .collect();
        if others.is_empty() {
            return Ok(());
        }
        let base = live.join("base");
        // The pin is the mark that the fold is done: it is made when the totals are complete.
        if !base.exists() {
            let mut totals = vec![Counters::default(); attachment.record.nodes.len() + 1];
            for (_, folder) in others.iter().filter(|(n, _)| *n < attachment.number) {
                if let Some(old) = self.totals(folder)? {
                    fold(&old, &attachment.record.nodes, &mut totals);
                }
            }
            let map = counters::save(&totals)?;
            sys::pin(&map, &base).context("keep earlier totals")?;
        }
        for (_, folder) in &others {
            remove_generation(folder)?;
        }
        Ok(())
    }

    /// The nodes of a generation with what they counted, itself and before it, the entry's last.
    /// `None` for a generation that was not finished.
    fn totals(&self, folder: &Path) -> Result<Option<Vec<(RecordedNode, Counters)>>> {
        let Some(value) = read_json(&folder.join("record"))? else {
            return Ok(None);
        };
        let record = self.parse_record(&value)?;
        let counted = read_totals(folder)?;
        let nodes = record.nodes.into_iter().chain([entry_node()]);
        Ok(Some(nodes.zip(counted).collect()))
    }

    /// Pins a new generation beside the running one.
    ///
    /// # Errors
    /// What the kernel says; nothing is left then.
    pub fn pin_generation(
        &self,
        folder: &Path,
        number: u64,
        generation: &mut Generation,
        record: &Value,
    ) -> Result<()> {
        make_folder(folder)?;
        let path = folder.join(format!("g{number}"));
        make_folder(&path)?;
        let pinned = || -> Result<()> {
            let objects = [
                ("entry", &generation.entry),
                ("stub", &generation.stub),
                ("nodes", &generation.nodes),
                ("chains", &generation.chains),
                ("counters", &generation.counters),
            ];
            let state = generation.state.iter();
            let state = state.map(|(name, map)| (name.as_str(), map));
            for (name, object) in objects.into_iter().chain(state) {
                sys::pin(object, &path.join(name)).with_context(|| format!("pin {name}"))?;
            }
            write_json("pc_record", record, &path.join("record"))
        };
        if let Err(error) = pinned() {
            // The failure to pin is the one to report.
            drop(remove_generation(&path));
            return Err(error);
        }
        generation.pinned = true;
        Ok(())
    }

    /// Replaces the record of a generation in one step.
    ///
    /// # Errors
    /// What the kernel says; the old record then stays.
    pub fn replace_record(&self, folder: &Path, number: u64, record: &Value) -> Result<()> {
        let generation = folder.join(format!("g{number}"));
        let new = generation.join("record_new");
        write_json("pc_record", record, &new)?;
        fs::rename(&new, generation.join("record")).context("replace the record")
    }

    /// Folder of an attachment.
    ///
    /// # Errors
    /// The network namespace cannot be told.
    pub fn attachment_folder(&self, place: &Place) -> Result<PathBuf> {
        let name = format!(
            "{}_{}_{}",
            netns::current_id()?,
            place.ifindex,
            place.hook.name()
        );
        Ok(self.folder.join(name))
    }

    /// Opens a named set.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set(&self, name: &str) -> Result<OwnedFd> {
        sys::open_pin(&self.folder.join("sets").join(name))
            .map_err(|error| kernel_error(format!("open the set {name}"), &error))
    }

    /// Keeps a new named set.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add_set(&self, name: &str, set: impl AsFd) -> Result<()> {
        let folder = self.folder.join("sets");
        make_folder(&folder)?;
        let path = folder.join(name);
        remove_pin(&path)?;
        sys::pin(set, &path).with_context(|| format!("pin the set {name}"))
    }

    /// Lets go of a named set.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove_set(&self, name: &str) -> Result<()> {
        remove_pin(&self.folder.join("sets").join(name))
    }

    /// Removes the folder if nothing is kept in it. If it is removed already, that at its place is
    /// another command's.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove_if_empty(&self) -> Result<()> {
        if let Some(lock) = &self.lock {
            let ours = lock.is_at(&self.folder);
            if !ours.with_context(|| format!("look at {}", self.folder.display()))? {
                return Ok(());
            }
        }
        let state = self.state()?;
        if !state.subs.is_empty() || !state.sets.is_empty() || !state.attached.is_empty() {
            return Ok(());
        }
        if !self.attachment_folders()?.is_empty() {
            return Ok(());
        }
        remove_pin(&self.folder.join("state"))?;
        for folder in [self.folder.join("sets"), self.folder.clone()] {
            match fs::remove_dir(&folder) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                Err(error) => {
                    return Err(anyhow!("remove {}: {error}", folder.display()));
                }
            }
        }
        Ok(())
    }
}

impl Attachment {
    /// Folder of the live generation.
    pub fn generation(&self) -> PathBuf {
        self.folder.join(format!("g{}", self.number))
    }

    /// Whether a chain is attached here.
    pub fn runs(&self, chain: &str) -> bool {
        self.record
            .chains
            .iter()
            .any(|running| running.name == chain)
    }

    /// The maps of the live generation that are kept for the next one, by name.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn state(&self) -> Result<BTreeMap<String, OwnedFd>> {
        let folder = self.generation();
        let entries = fs::read_dir(&folder);
        let entries = entries.with_context(|| format!("read {}", folder.display()))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut state = BTreeMap::new();
        for name in names.filter(|name| is_state(name)) {
            let map = self.kept(&name)?;
            state.insert(name, map);
        }
        Ok(state)
    }

    /// Whether the live generation has such a map.
    pub fn keeps(&self, name: &str) -> bool {
        self.generation().join(name).exists()
    }

    /// One of its maps that are kept.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn kept(&self, name: &str) -> Result<OwnedFd> {
        sys::open_pin(&self.generation().join(name))
            .map_err(|error| kernel_error(format!("open the map {name}"), &error))
    }

    /// As [`Attachment::kept`]; none where there is no such map, or the generation was replaced
    /// meanwhile.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn kept_if_there(&self, name: &str) -> Result<Option<OwnedFd>> {
        match sys::open_pin(&self.generation().join(name)) {
            Ok(map) => Ok(Some(map)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(kernel_error(format!("open the map {name}"), &error)),
        }
    }

    /// What nodes counted since they were first applied, in their order; the entry's last.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn totals(&self) -> Result<Vec<Counters>> {
        read_totals(&self.generation())
    }
}

impl Record {
    /// The record of a new generation.
    pub fn json(
        place: &Place,
        mode: Mode,
        qdisc_is_ours: bool,
        carrier: &str,
        chains: &[&Chain],
        made_from: &Value,
        graph: &Graph,
    ) -> Value {
        let nodes: Vec<Value> = graph
            .nodes
            .iter()
            .map(|node| {
                json!({
                    "chain": node.chain,
                    "ordinal": node.ordinal,
                    "policy": node.policy,
                    "selector": node.kind == crate::policy::Kind::Selector,
                    "counts_for_chain": node.counts_for_chain,
                })
            })
            .collect();
        json!({
            "device": place.device,
            "mode": mode.name(),
            "carrier": carrier,
            "qdisc_is_ours": qdisc_is_ours,
            "reads": graph.reads,
            "learns": graph.learns,
            "chains": chains.iter().map(|chain| chain.to_json()).collect::<Vec<_>>(),
            "made_from": made_from,
            "nodes": nodes,
        })
    }
}

impl RecordedNode {
    /// Whether it is the node that remembers what packets tell.
    pub fn is_learner(&self) -> bool {
        self.chain == plan::ENTRY
    }
}

/// Stands for the entry program among nodes.
fn entry_node() -> RecordedNode {
    RecordedNode {
        chain: String::new(),
        ordinal: 0,
        policy: "entry".to_owned(),
        selector: false,
        counts_for_chain: false,
    }
}

/// Adds old totals to the nodes that are the same as before: chain, ordinal and policy.
fn fold(old: &[(RecordedNode, Counters)], nodes: &[RecordedNode], totals: &mut [Counters]) {
    let entry = entry_node();
    for (node, total) in nodes.iter().chain([&entry]).zip(totals) {
        let same = |(other, _): &&(RecordedNode, Counters)| {
            (&other.chain, other.ordinal, &other.policy)
                == (&node.chain, node.ordinal, &node.policy)
        };
        if let Some((_, counted)) = old.iter().find(same) {
            total.add(counted);
        }
    }
}

fn read_totals(generation: &Path) -> Result<Vec<Counters>> {
    let counters = sys::open_pin(&generation.join("counters")).context("open the counters")?;
    let mut totals = counters::read(&counters)?;
    match sys::open_pin(&generation.join("base")) {
        Ok(base) => {
            for (total, earlier) in totals.iter_mut().zip(counters::saved(&base)?) {
                total.add(&earlier);
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).context("open earlier totals"),
    }
    Ok(totals)
}

/// Removes an attachment's folder; it must be detached, and no packet run in it any more.
///
/// # Errors
/// What the kernel says.
pub fn remove_attachment(folder: &Path) -> Result<()> {
    remove_pin(&folder.join("link"))?;
    for (_, generation) in generations(folder)? {
        remove_generation(&generation)?;
    }
    fs::remove_dir(folder).with_context(|| format!("remove {}", folder.display()))
}

/// Removes a generation in which no packet runs any more.
///
/// # Errors
/// What the kernel says.
pub fn remove_generation(folder: &Path) -> Result<()> {
    if let Ok(stub) = sys::open_pin(&folder.join("stub")) {
        for array in ["nodes", "chains"] {
            if let Ok(array) = sys::open_pin(&folder.join(array)) {
                generation::overwrite(&array, &stub)?;
            }
        }
    }
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    for entry in entries {
        remove_pin(&entry?.path())?;
    }
    fs::remove_dir(folder).with_context(|| format!("remove {}", folder.display()))
}

fn remove_pin(path: &Path) -> Result<()> {
    match sys::unpin(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(anyhow!("remove {}: {error}", path.display())),
    }
}

fn link_is_dead(folder: &Path) -> bool {
    sys::open_pin(&folder.join("link"))
        .and_then(sys::link_info)
        .is_ok_and(|info| info.ifindex == 0)
}

/// The generations in an attachment's folder, oldest first.
fn generations(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match fs::read_dir(folder) {
        // Whoever looks has no lock.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("read {}", folder.display()))?,
    };
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let number = path.file_name()?.to_str()?.strip_prefix('g')?;
            Some((number.parse().ok()?, path))
        })
        .collect();
    found.sort();
    Ok(found)
}

/// Network namespace, interface index and hook that an attachment's folder is called after.
fn address(folder: &Path) -> Option<(u64, u32, Hook)> {
    let mut parts = folder.file_name()?.to_str()?.splitn(3, '_');
    Some((
        parts.next()?.parse().ok()?,
        parts.next()?.parse().ok()?,
        parts.next()?.parse().ok()?,
    ))
}

/// Makes the folder and takes the lock.
fn lock_prepared(folder: &Path, wait: Duration) -> Result<sys::FolderLock> {
    let start = Instant::now();
    loop {
        prepare(folder)?;
        let left = wait.saturating_sub(start.elapsed());
        match sys::lock_folder(folder, left) {
            Ok(lock) => return Ok(lock),
            // Who held the lock, or made the folder and found nothing to do, has removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !left.is_zero() => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(Refused::state(
                    format!("another command works on {}", folder.display()),
                    format!("it has held the lock for {} s", wait.as_secs()),
                    "wait for it, or end it",
                )
                .into());
            }
            Err(error) => {
                return Err(kernel_error(format!("lock {}", folder.display()), &error));
            }
        }
    }
}

/// The one name of a folder, that there is to be one process of a kind for: without links and
/// detours, as far as it exists.
///
/// # Errors
/// The current folder cannot be told.
pub fn canonical(folder: &Path) -> Result<PathBuf> {
    let folder = std::path::absolute(folder).context("find the current folder")?;
    let there = folder.ancestors().find_map(|ancestor| {
        let rest = folder.strip_prefix(ancestor).ok()?;
        let there = ancestor.canonicalize().ok()?;
        // Without a slash behind the folder itself.
        Some(there.components().chain(rest.components()).collect())
    });
    Ok(there.unwrap_or(folder))
}

fn prepare(folder: &Path) -> Result<()> {
    let on_bpffs = sys::is_bpffs(folder)
        .map_err(|error| kernel_error(format!("look at {}", folder.display()), &error))?;
    if !on_bpffs && folder.starts_with(BPFFS) {
        sys::mount_bpffs(Path::new(BPFFS)).map_err(|error| {
            Refused::denied(
                format!("{BPFFS} is not mounted, and cannot be"),
                error,
                format!("as root: mount -t bpf bpf {BPFFS}"),
            )
        })?;
    } else if !on_bpffs {
        return Err(Refused::state(
            format!("{} is not in a bpffs", folder.display()),
            "programs and maps can be pinned in a bpffs only",
            format!("choose a folder below {BPFFS}, or mount one: mount -t bpf bpf DIR"),
        )
        .into());
    }
    make_folder(folder)
}

fn make_folder(path: &Path) -> Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(kernel_error(format!("make {}", path.display()), &error)),
    }
}

fn write_json(name: &str, value: &Value, path: &Path) -> Result<()> {
    let bytes = value.to_string().into_bytes();
    let map = sys::map_create_frozen_bytes(name, &bytes)
        .with_context(|| format!("keep {} bytes of chains in the kernel", bytes.len()))?;
    sys::pin(&map, path).with_context(|| format!("pin {}", path.display()))?;
    // The pins of links and programs are for those who may load them; so is this one.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("set the mode of {}", path.display()))
}

fn read_json(path: &Path) -> Result<Option<Value>> {
    let map = match sys::open_pin(path) {
        Ok(map) => map,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(kernel_error(format!("open {}", path.display()), &error)),
    };
    let bytes = sys::map_read_bytes(&map).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&bytes)
        .map(Some)
        .with_context(|| format!("{} is not ours", path.display()))
}

fn names(list: &Value) -> BTreeSet<String> {
    let items = list.as_array().into_iter().flatten();
    items
        .filter_map(|item| Some(item.as_str()?.to_owned()))
        .collect()
}

fn text(value: &Value, key: &str) -> Result<String> {
    value
        .get(key)
        .and_then(Value::as_str)
        .map(str::to_owned)
        .with_context(|| format!("no {key}"))
}

fn items<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value
        .get(key)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

fn members<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = (&'a String, &'a Value)> {
    value
        .get(key)
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn folders_have_one_name() {
        let temporary = std::env::temp_dir().canonicalize().unwrap();
        let folder = temporary.join(format!("pc-names-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        let link = folder.join("link");
        std::os::unix::fs::symlink(&folder, &link).unwrap();
        let names = |rest: &str| {
            let detour = folder.join("..").join(folder.file_name().unwrap());
            [folder.join(rest), link.join(rest), detour.join(rest)]
                .map(|it| canonical(&it).unwrap())
        };
        let absent = names("a/b/");
        assert_eq!(absent, [(); 3].map(|()| folder.join("a/b")));
        fs::create_dir_all(folder.join("a/b")).unwrap();
        assert_eq!(names("a/b/"), absent);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(
            canonical("/nowhere/a".as_ref()).unwrap(),
            Path::new("/nowhere/a")
        );
    }
}
