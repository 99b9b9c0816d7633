// SPDX-License-Identifier: MIT OR Apache-2.0
//! Attaches chains to devices that come: those that came back, and new ones of a pattern.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::devices::DeviceWatch;
use super::{Duty, log};
use crate::engine::apply;
use crate::engine::store::Store;
use crate::engine::wanted::{self, Missing};
use crate::hook::Hook;

/// From the first sign of a change to a look at it: devices come in several steps.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// A look without a sign.
const INTERVAL: Duration = Duration::from_secs(5);
/// Before a place that failed is tried again, at first and at most.
const BACKOFF: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];
/// How long the other duties wait because a command holds the lock.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// Interface index and hook.
type Address = (u32, Hook);

/// The duty to attach what shall run.
pub struct Attaching {
    folder: PathBuf,
    /// None if it broke: it is made anew at the next look.
    watch: Option<DeviceWatch>,
    look_at: Instant,
    failed: Option<Failed>,
}

/// What did not work the last time.
struct Failed {
    at: BTreeSet<Address>,
    why: String,
    backoff: Duration,
    retry_at: Instant,
}

impl Attaching {
    pub fn new(folder: &Path) -> Attaching {
        Attaching {
            folder: folder.to_owned(),
            watch: None,
            look_at: Instant::now(),
            failed: None,
        }
    }

    fn drain(&mut self) {
        let Some(watch) = &mut self.watch else {
            return;
        };
        match watch.drain() {
            Ok(true) => self.look_at = self.look_at.min(Instant::now() + DEBOUNCE),
            Ok(false) => {}
            Err(error) => {
                log(&format!("cannot watch devices: {error}"));
                self.watch = None;
            }
        }
    }

    fn subscribe(&mut self) {
        match DeviceWatch::new() {
            Ok(watch) => self.watch = Some(watch),
            Err(error) => log(&format!("cannot watch devices: {error}")),
        }
    }

    /// Attaches what is missing, unless that has just failed.
    fn look(&mut self) {
        let found = Store::open(&self.folder).and_then(|store| wanted::missing(&store));
        let missing = match found {
            Ok(missing) => missing,
            Err(error) => return self.fail(BTreeSet::new(), format!("{error:#}")),
        };
        let missing: BTreeSet<Address> = missing.iter().map(address).collect();
        if missing.is_empty() {
            self.failed = None;
            return;
        }
        let waits = self.failed.as_ref().is_some_and(|failed| {
            missing.is_subset(&failed.at) && Instant::now() < failed.retry_at
        });
        if waits {
            return;
        }
        match self.reattach() {
            Ok((still_missing, why)) if !why.is_empty() => self.fail(still_missing, why),
            Ok(_) => self.failed = None,
            Err(error) => self.fail(missing, format!("{error:#}")),
        }
    }

    /// What then is still missing, and why.
    fn reattach(&self) -> Result<(BTreeSet<Address>, String)> {
        let store = Store::lock_within(&self.folder, LOCK_WAIT)?;
        let nowhere = BTreeSet::new();
        let failed = self.failed.as_ref().map_or(&nowhere, |failed| &failed.at);
        let report = apply::reattach_after(&store, failed)?;
        for (chain, device, hook) in &report.attached {
            log(&format!("attached {chain} to {device} {hook}"));
        }
        let missing = wanted::missing(&store)?;
        store.remove_if_empty()?;
        let why: Vec<String> = report.failures.iter().map(ToString::to_string).collect();
        Ok((missing.iter().map(address).collect(), why.join("\n")))
    }

    /// Says why, once for each reason.
    fn fail(&mut self, at: BTreeSet<Address>, why: String) {
        let before = self.failed.take();
        let [least, most] = BACKOFF;
        let backoff = match &before {
            Some(before) if before.why == why => (before.backoff * 2).min(most),
            _ => least,
        };
        if before.is_none_or(|before| before.why != why) {
            log(&why);
        }
        self.failed = Some(Failed {
            at,
            why,
            backoff,
            retry_at: Instant::now() + backoff,
        });
    }
}

fn address(missing: &Missing) -> Address {
    (missing.place.ifindex, missing.place.hook)
}

impl Duty for Attaching {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.watch.as_ref().map(AsFd::as_fd)
    }

    fn run(&mut self) -> Duration {
        self.drain();
        if self.look_at <= Instant::now() {
            if self.watch.is_none() {
                self.subscribe();
            }
            self.look();
            let retry_at = self.failed.as_ref().map(|failed| failed.retry_at);
            let next = Instant::now() + INTERVAL;
            self.look_at = retry_at.map_or(next, |retry_at| retry_at.min(next));
        }
        self.look_at.saturating_duration_since(Instant::now())
    }
}
