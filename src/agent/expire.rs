// SPDX-License-Identifier: MIT OR Apache-2.0
//! Removes elements of sets whose time is over. Packets match them no more in any case: this makes
//! room for others.
//!
//! Sets can be large: one is walked through in portions, between which other duties run, and the
//! more that costs, the rarer it is done.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::{Duty, Failures, log};
use crate::engine::sets::ExpiryWalk;
use crate::engine::store::Store;

/// From the end of one walk through a set to the next, at least.
const INTERVAL: Duration = Duration::from_secs(5);
/// The same as a multiple of what the walk took: for a set with elements that expire, and for one
/// without.
const SPACING: [u32; 2] = [20, 200];
/// No walk is further away.
const INTERVAL_MAX: Duration = Duration::from_secs(300);
/// How long other duties wait for this one, about, and how long it then waits for them.
const PORTION: Duration = Duration::from_millis(10);
const PAUSE: Duration = Duration::from_millis(20);
/// Elements between two looks at the clock.
const BATCH: usize = 512;

/// The duty to remove what has expired.
pub struct Expiry {
    folder: PathBuf,
    sets: BTreeMap<String, Set>,
    failures: Failures,
}

/// A set, and when to look at it.
struct Set {
    due: Instant,
    /// A walk that is not over.
    walk: Option<ExpiryWalk>,
    /// What that has taken.
    spent: Duration,
}

impl Expiry {
    pub fn new(folder: &Path) -> Expiry {
        Expiry {
            folder: folder.to_owned(),
            sets: BTreeMap::new(),
            failures: Failures::default(),
        }
    }

    /// Walks on through the sets that are due. When to be called again.
    fn look(&mut self) -> Result<Instant> {
        let begin = Instant::now();
        let store = Store::open(&self.folder)?;
        let mut known = std::mem::take(&mut self.sets);
        let names = store.state()?.sets.into_keys();
        self.sets = names
            .map(|name| (known.remove_entry(&name)).unwrap_or_else(|| (name, Set::new(begin))))
            .collect();
        for (name, set) in &mut self.sets {
            if set.due > begin {
                continue;
            }
            match set.walk_until(&store, name, begin + PORTION) {
                Ok(Some(removed)) if removed > 0 => {
                    log(&format!("removed {removed} expired from the set {name}"));
                }
                Ok(_) => {}
                Err(error) => {
                    set.pause(INTERVAL);
                    let why = format!("cannot remove what has expired from {name}: {error:#}");
                    self.failures.say(&why);
                }
            }
            if begin.elapsed() >= PORTION {
                return Ok(Instant::now() + PAUSE);
            }
        }
        let next = self.sets.values().map(|set| set.due).min();
        // A set may be new.
        let latest = Instant::now() + INTERVAL;
        Ok(next.map_or(latest, |next| next.min(latest)))
    }
}

impl Set {
    fn new(due: Instant) -> Set {
        Set {
            due,
            walk: None,
            spent: Duration::ZERO,
        }
    }

    /// Walks on, for a batch at least. At the end of the set, how many elements the walk removed.
    fn walk_until(&mut self, store: &Store, name: &str, limit: Instant) -> Result<Option<usize>> {
        let begin = Instant::now();
        let set = store.set(name)?;
        let walk = self.walk.get_or_insert_with(|| ExpiryWalk::new(BATCH));
        let mut is_over = false;
        while !is_over {
            is_over = !walk.step(&set)?;
            if Instant::now() >= limit {
                break;
            }
        }
        self.spent += begin.elapsed();
        if !is_over {
            return Ok(None);
        }
        let (removed, expiring) = (walk.removed, walk.expiring > 0);
        self.pause(interval(self.spent, expiring));
        Ok(Some(removed))
    }

    /// Ends the walk; the next one begins after so long.
    fn pause(&mut self, interval: Duration) {
        *self = Set::new(Instant::now() + interval);
    }
}

/// From a walk that took so long to the next.
fn interval(spent: Duration, expiring: bool) -> Duration {
    let [often, rarely] = SPACING;
    let spacing = if expiring { often } else { rarely };
    (spent * spacing).clamp(INTERVAL, INTERVAL_MAX)
}

impl Duty for Expiry {
    fn run(&mut self) -> Duration {
        match self.look() {
            Ok(next) => next.saturating_duration_since(Instant::now()),
            Err(error) => {
                self.failures
                    .say(&format!("cannot remove what has expired: {error:#}"));
                INTERVAL
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_costs_more_is_done_less() {
        let after = |millis, expiring| interval(Duration::from_millis(millis), expiring).as_secs();
        assert_eq!(after(0, true), 5);
        assert_eq!(after(0, false), 5);
        assert_eq!(after(500, true), 10);
        assert_eq!(after(500, false), 100);
        assert_eq!(after(60_000, true), 300);
    }
}
