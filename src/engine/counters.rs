// SPDX-License-Identifier: MIT OR Apache-2.0
//! What nodes counted, summed over CPUs.

use std::os::fd::AsFd;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::bpf::types::node_stats;
use super::bpf::{REASONS, STATS_SIZE, bytes_of};
use super::sys;

/// The counters of one node. Values only grow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets that reached the node.
    pub seen: u64,
    /// Selector: packets that matched. Action: all that reached it.
    pub packets: u64,
    /// Length of `packets` in bytes, on arrival, from the link header on.
    pub bytes: u64,
    /// Why packets were left alone, by number of the reason.
    pub reasons: Vec<u64>,
}

impl Counters {
    /// Adds what another counted.
    pub fn add(&mut self, other: &Counters) {
        self.seen += other.seen;
        self.packets += other.packets;
        self.bytes += other.bytes;
        self.reasons
            .resize(self.reasons.len().max(other.reasons.len()), 0);
        for (sum, more) in self.reasons.iter_mut().zip(&other.reasons) {
            *sum += more;
        }
    }

    /// What was counted since `before`.
    pub fn since(&self, before: &Counters) -> Counters {
        let reasons = self.reasons.iter().enumerate();
        Counters {
            seen: self.seen.saturating_sub(before.seen),
            packets: self.packets.saturating_sub(before.packets),
            bytes: self.bytes.saturating_sub(before.bytes),
            reasons: reasons
                .map(|(at, now)| now.saturating_sub(before.reasons.get(at).copied().unwrap_or(0)))
                .collect(),
        }
    }

    /// The reasons that were counted, by name.
    pub fn named_reasons(&self) -> impl Iterator<Item = (&'static str, u64)> {
        REASONS
            .iter()
            .zip(&self.reasons)
            .filter(|(_, count)| **count > 0)
            .map(|(name, count)| (*name, *count))
    }

    /// How often anything was left alone.
    pub fn given_up(&self) -> u64 {
        self.reasons.iter().sum()
    }

    /// `{"seen", "packets", "bytes", "reasons": {name: count}}`.
    pub fn to_json(&self) -> Map<String, Value> {
        let reasons: Map<String, Value> = self
            .named_reasons()
            .map(|(name, count)| (name.to_owned(), count.into()))
            .collect();
        let mut object = Map::new();
        object.insert("seen".into(), self.seen.into());
        object.insert("packets".into(), self.packets.into());
        object.insert("bytes".into(), self.bytes.into());
        object.insert("reasons".into(), json!(reasons));
        object
    }

    fn from_stats(stats: &node_stats) -> Counters {
        Counters {
            seen: stats.seen,
            packets: stats.packets,
            bytes: stats.bytes,
            reasons: stats.reasons.to_vec(),
        }
    }

    fn to_stats(&self) -> node_stats {
        let mut stats = node_stats {
            seen: self.seen,
            packets: self.packets,
            bytes: self.bytes,
            ..node_stats::default()
        };
        for (to, from) in stats.reasons.iter_mut().zip(&self.reasons) {
            *to = *from;
        }
        stats
    }
}

/// Reads a generation's counters: one for each node, and last those of the entry.
///
/// # Errors
/// What the kernel says.
pub fn read(counters: impl AsFd) -> Result<Vec<Counters>> {
    let array = sys::percpu_read(counters).context("read the counters")?;
    Ok((0..array.len())
        .map(|index| {
            let mut sum = Counters::default();
            for value in array.values(index) {
                sum.add(&decode(value));
            }
            sum
        })
        .collect())
}

/// Keeps totals in an array of their own, with the layout of a generation's counters.
///
/// # Errors
/// What the kernel says.
pub fn save(totals: &[Counters]) -> Result<std::os::fd::OwnedFd> {
    let entries = u32::try_from(totals.len()).context("too many nodes")?;
    let map = sys::map_create(sys::MapType::Array, "pc_base", 4, STATS_SIZE, entries, 0)
        .context("make a map for earlier totals")?;
    for (index, total) in (0u32..).zip(totals) {
        let stats = total.to_stats();
        sys::map_update(&map, &index.to_ne_bytes(), bytes_of(&stats), 0)
            .context("keep earlier totals")?;
    }
    Ok(map)
}

/// Reads what [`save`] kept.
///
/// # Errors
/// What the kernel says.
pub fn saved(map: impl AsFd) -> Result<Vec<Counters>> {
    let info = sys::map_info(&map).context("look at earlier totals")?;
    (0..info.max_entries)
        .map(|index| {
            let value = sys::map_lookup(&map, &index.to_ne_bytes(), STATS_SIZE as usize)
                .context("read earlier totals")?;
            Ok(value.map_or_else(Counters::default, |value| decode(&value)))
        })
        .collect()
}

fn decode(value: &[u8]) -> Counters {
    let mut stats = node_stats::default();
    match plain::copy_from_bytes(&mut stats, value) {
        Ok(()) => Counters::from_stats(&stats),
        Err(_) => Counters::default(),
    }
}
