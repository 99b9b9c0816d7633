// SPDX-License-Identifier: MIT OR Apache-2.0
//! What runs, for people and programs to read: behind `list` and `show`.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::counters::Counters;
use super::store::{Attachment, RecordedNode, Store};
use super::wanted;
use crate::error::{Invalid, did_you_mean};
use crate::hook::Hook;
use crate::netns;
use crate::spec::{Chain, Checksum, Mode};

/// A chain and where it runs.
pub struct ChainView {
    pub chain: Chain,
    /// Where it is attached; for a sub-chain, nowhere.
    pub attached: Vec<AttachView>,
    /// Where it shall run and does not: device or pattern, and hook.
    pub absent: Vec<(String, Hook)>,
    /// Packets its selectors took, everywhere.
    pub packets: u64,
    /// Their length in bytes.
    pub bytes: u64,
    /// Every copy of its nodes that runs, those of a sub-chain included.
    pub nodes: Vec<NodesView>,
}

/// One place a chain is attached to.
pub struct AttachView {
    pub device: String,
    pub hook: Hook,
    pub mode: Mode,
    /// Number of the generation that runs, from 1.
    pub generation: u64,
    /// Where the context of packets lives.
    pub carrier: String,
    /// How far the TCP checksums of packets are done; on TC the kernel tells.
    pub checksum: Checksum,
    /// Hooks of the device where handshakes are remembered, if something here needs it.
    pub learners: Vec<Hook>,
    /// Inode of the network namespace.
    pub netns: u64,
    pub packets: u64,
    pub bytes: u64,
}

/// The nodes of a chain at one place.
pub struct NodesView {
    pub device: String,
    pub hook: Hook,
    /// Counters of the whole attachment.
    pub entry: Counters,
    pub nodes: Vec<(RecordedNode, Counters)>,
}

/// All chains, by priority and name; of other network namespaces too if `all_netns`.
///
/// # Errors
/// No permission.
pub fn chains(store: &Store, all_netns: bool) -> Result<Vec<ChainView>> {
    let here = netns::Id::current()?;
    let mut views: BTreeMap<(bool, i32, String), ChainView> = BTreeMap::new();
    let mut add = |chain: &Chain| {
        views.entry(key(chain)).or_insert_with(|| ChainView {
            chain: chain.clone(),
            attached: Vec::new(),
            absent: Vec::new(),
            packets: 0,
            bytes: 0,
            nodes: Vec::new(),
        });
    };
    let mut attachments = store.attachments()?;
    attachments.retain(|attachment| all_netns || attachment.netns == here.inode);
    for attachment in &attachments {
        attachment.record.chains.iter().for_each(&mut add);
    }
    let state = store.state()?;
    state.subs.iter().for_each(&mut add);
    let runs = |inode| attachments.iter().any(|at| at.netns == inode);
    let others = state
        .attached
        .keys()
        .copied()
        .filter(|id| all_netns && *id != here && (runs(id.inode) || netns::is_alive(id.inode)));
    let mut absent = Vec::new();
    for id in others.chain([here]) {
        let within = |attachment: &&Attachment| attachment.netns == id.inode;
        let within: Vec<&Attachment> = attachments.iter().filter(within).collect();
        for chain in wanted::chains(&state, id, within.iter().copied()) {
            add(&chain);
            let places = wanted::absent(&chain, &within, id == here);
            absent.push((chain, places));
        }
    }
    for (chain, places) in absent {
        if let Some(view) = views.get_mut(&key(&chain)) {
            view.absent.extend(places);
        }
    }
    for attachment in &attachments {
        let totals = attachment.totals()?;
        let learners = learners(attachment, &attachments);
        for view in views.values_mut() {
            view.add(attachment, &totals, &learners);
        }
    }
    Ok(views.into_values().collect())
}

/// In the order packets see chains, sub-chains last.
fn key(chain: &Chain) -> (bool, i32, String) {
    (chain.attach.is_empty(), chain.priority, chain.name.clone())
}

/// The hooks where the handshakes are remembered that an attachment needs to know.
fn learners(attachment: &Attachment, all: &[Attachment]) -> Vec<Hook> {
    if attachment.record.reads.is_empty() {
        return Vec::new();
    }
    let device = |other: &&Attachment| {
        (other.netns, other.place.ifindex) == (attachment.netns, attachment.place.ifindex)
    };
    let learns = |other: &&Attachment| other.record.nodes.iter().any(|node| node.is_learner());
    let hooks = all.iter().filter(device).filter(learns);
    hooks.map(|other| other.place.hook).collect()
}

/// One chain.
///
/// # Errors
/// [`Invalid`] for a name that is not there.
pub fn chain(store: &Store, name: &str) -> Result<ChainView> {
    let mut views = chains(store, false)?;
    match views.iter().position(|view| view.chain.name == name) {
        Some(at) => Ok(views.swap_remove(at)),
        None => {
            let names: Vec<&str> = views.iter().map(|v| v.chain.name.as_str()).collect();
            Err(Invalid::new(
                "NAME",
                format!(
                    "\"{name}\", no such chain{}",
                    did_you_mean(name, names.iter().copied())
                ),
                "the name of a chain that runs",
            )
            .advice("see `policy-chain list`")
            .into())
        }
    }
}

impl ChainView {
    fn add(&mut self, attachment: &Attachment, totals: &[Counters], learners: &[Hook]) {
        let (mut packets, mut bytes) = (0, 0);
        let mut nodes = Vec::new();
        for (node, counters) in attachment.record.nodes.iter().zip(totals) {
            if node.chain != self.chain.name {
                continue;
            }
            if node.counts_for_chain {
                packets += counters.packets;
                bytes += counters.bytes;
            }
            nodes.push((node.clone(), counters.clone()));
        }
        let chains = &attachment.record.chains;
        let attached_here = chains.iter().any(|chain| chain.name == self.chain.name);
        if nodes.is_empty() && !attached_here {
            return;
        }
        nodes.sort_by_key(|(node, _)| node.ordinal);
        self.packets += packets;
        self.bytes += bytes;
        self.nodes.push(NodesView {
            device: attachment.place.device.clone(),
            hook: attachment.place.hook,
            entry: totals.last().cloned().unwrap_or_default(),
            nodes,
        });
        if attached_here {
            self.attached.push(AttachView {
                device: attachment.place.device.clone(),
                hook: attachment.place.hook,
                mode: attachment.record.mode,
                generation: attachment.number,
                carrier: attachment.record.carrier.clone(),
                checksum: Checksum::asked(chains, &attachment.record.device, attachment.place.hook),
                learners: learners.to_vec(),
                netns: attachment.netns,
                packets,
                bytes,
            });
        }
    }

    /// An item of `list --json`: `name`, `priority`, `attach`, `selectors`, `actions`, `then`,
    /// `packets`, `bytes`.
    pub fn to_json(&self) -> Map<String, Value> {
        let canonical = self.chain.to_json();
        let part = |key: &str, or: Value| canonical.get(key).cloned().unwrap_or(or);
        let attached: Vec<Value> = self.attached.iter().map(AttachView::to_json).collect();
        let absent = self
            .absent
            .iter()
            .map(|(device, hook)| json!({ "device": device, "hook": hook.name() }));
        let mut object = Map::new();
        object.insert("name".into(), self.chain.name.as_str().into());
        object.insert("priority".into(), self.chain.priority.into());
        object.insert("attach".into(), attached.into());
        object.insert("absent".into(), absent.collect());
        object.insert("selectors".into(), part("selectors", json!([])));
        object.insert("actions".into(), part("actions", json!([])));
        object.insert("then".into(), part("then", json!("pass")));
        object.insert("packets".into(), self.packets.into());
        object.insert("bytes".into(), self.bytes.into());
        object
    }

    /// What `show --json` prints: as [`ChainView::to_json`], and `nodes` with their counters.
    pub fn to_json_with_nodes(&self) -> Value {
        let mut object = self.to_json();
        let places: Vec<Value> = self
            .nodes
            .iter()
            .map(|place| {
                let nodes: Vec<Value> = place.nodes.iter().map(node_json).collect();
                json!({
                    "device": place.device,
                    "hook": place.hook.name(),
                    "entry": place.entry.to_json(),
                    "nodes": nodes,
                })
            })
            .collect();
        object.insert("nodes".into(), places.into());
        Value::Object(object)
    }

    /// The table `show` prints.
    pub fn page(&self) -> String {
        let mut page = format!(
            "{}  priority {}  then {}\n",
            self.chain.name,
            self.chain.priority,
            then_text(&self.to_json()["then"])
        );
        for attach in &self.attached {
            page.push_str(&format!(
                "  on {} {} ({}), generation {}, context {}\n",
                attach.device, attach.hook, attach.mode, attach.generation, attach.carrier
            ));
            for line in &attach.lines()[1..] {
                page.push_str(&format!("   {line}\n"));
            }
        }
        for (device, hook) in &self.absent {
            page.push_str(&format!("  absent: {device} {hook}\n"));
        }
        for place in &self.nodes {
            page.push_str(&format!(
                "\n{:<32} {:>12} {:>12} {:>14}\n",
                format!("{} {}", place.device, place.hook),
                "SEEN",
                "PACKETS",
                "BYTES"
            ));
            for (node, counters) in &place.nodes {
                page.push_str(&format!(
                    "{:<32} {:>12} {:>12} {:>14}\n",
                    format!(
                        "{}:{} {}",
                        node.ordinal,
                        node.policy,
                        if node.selector { "" } else { "(action)" }
                    ),
                    counters.seen,
                    counters.packets,
                    counters.bytes
                ));
                for (reason, count) in counters.named_reasons() {
                    page.push_str(&format!("    {reason:<28} {count:>12}\n"));
                }
            }
        }
        page
    }
}

impl AttachView {
    /// The place, and what is not as it mostly is there.
    fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("{} {} ({})", self.device, self.hook, self.mode)];
        if self.checksum != Checksum::Auto {
            lines.push(format!("  checksums {}", self.checksum.name()));
        }
        if !self.learners.is_empty() {
            let hooks: Vec<&str> = self.learners.iter().map(|hook| hook.name()).collect();
            lines.push(format!("  learners {}", hooks.join(", ")));
        }
        lines
    }

    fn to_json(&self) -> Value {
        json!({
            "device": self.device,
            "hook": self.hook.name(),
            "mode": self.mode.name(),
            "generation": self.generation,
            "carrier": self.carrier,
            "checksum": self.checksum.name(),
            "learners": self.learners.iter().map(|hook| hook.name()).collect::<Vec<_>>(),
            "netns": self.netns,
            "packets": self.packets,
            "bytes": self.bytes,
        })
    }
}

fn node_json((node, counters): &(RecordedNode, Counters)) -> Value {
    let mut object = Map::new();
    object.insert(
        "node".into(),
        format!("{}/{}:{}", node.chain, node.ordinal, node.policy).into(),
    );
    object.insert("policy".into(), node.policy.as_str().into());
    object.insert(
        "kind".into(),
        if node.selector { "selector" } else { "action" }.into(),
    );
    object.extend(counters.to_json());
    object.into()
}

fn then_text(then: &Value) -> String {
    match then.get("goto").and_then(Value::as_str) {
        Some(chain) => format!("goto {chain}"),
        None => then.as_str().unwrap_or_default().to_owned(),
    }
}

/// The table `list` prints, within 100 columns.
pub fn table(views: &[ChainView]) -> String {
    if views.is_empty() {
        return "no chains run here\n".to_owned();
    }
    let mut table = format!(
        "{:<20} {:>5} {:<34} {:<12} {:>11} {:>13}\n",
        "CHAIN", "PRIO", "DEVICE HOOK (MODE)", "THEN", "PACKETS", "BYTES"
    );
    for view in views {
        let mut places: Vec<String> = view.attached.iter().flat_map(AttachView::lines).collect();
        let absent = view.absent.iter();
        places.extend(absent.map(|(device, hook)| format!("{device} {hook} (absent)")));
        if places.is_empty() {
            places.push("- (entered by goto)".to_owned());
        }
        let then = then_text(&view.to_json()["then"]);
        table.push_str(&format!(
            "{:<20} {:>5} {:<34} {:<12} {:>11} {:>13}\n",
            shorten(&view.chain.name, 20),
            view.chain.priority,
            shorten(&places[0], 34),
            shorten(&then, 12),
            view.packets,
            view.bytes
        ));
        for place in &places[1..] {
            table.push_str(&format!("{:<26} {}\n", "", shorten(place, 34)));
        }
    }
    table
}

fn shorten(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width - 1).chain(['…']).collect()
}
