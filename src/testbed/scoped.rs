// SPDX-License-Identifier: MIT OR Apache-2.0
//! Testbeds of tests.

use std::ops::Deref;
use std::path::Path;
use std::process;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;

use super::{Options, Relay, Testbed, down, existing, list};

/// A testbed of one test: it has a name of its own and is removed when dropped.
///
/// Names are `scoped-PID-NUMBER`. The first one made in a process also removes those of processes
/// that no longer exist. With a delay, threads of this process are the relay.
#[derive(Debug)]
pub struct ScopedTestbed {
    testbed: Testbed,
    relay: Option<Relay>,
}

pub(super) const SCOPED: &str = "scoped-";

impl ScopedTestbed {
    /// Makes the testbed.
    ///
    /// # Errors
    /// As [`Testbed::up`].
    pub fn up(options: &Options) -> Result<ScopedTestbed> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        SWEEP.call_once(remove_stale);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{SCOPED}{}-{number}", process::id());
        let mut scoped = ScopedTestbed {
            testbed: Testbed::up(&name, options)?,
            relay: None,
        };
        if !options.delay.is_empty() {
            scoped.relay = Some(scoped.testbed.relay()?);
        }
        Ok(scoped)
    }
}

impl Deref for ScopedTestbed {
    type Target = Testbed;

    fn deref(&self) -> &Testbed {
        &self.testbed
    }
}

impl Drop for ScopedTestbed {
    fn drop(&mut self) {
        self.relay = None;
        // The test may have removed it.
        if existing(self.name()).is_empty() {
            return;
        }
        if let Err(error) = down(self.name()) {
            eprintln!("testbed {} stays: {error:#}", self.name());
        }
    }
}

/// Removes scoped testbeds whose process is gone. Another process may be doing the same, so
/// failures are not errors.
pub(super) fn remove_stale() {
    for name in list().unwrap_or_default() {
        if scoped_owner(&name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = down(&name);
        }
    }
}

/// The process that made the scoped testbed `name`.
fn scoped_owner(name: &str) -> Option<u32> {
    let (pid, number) = name.strip_prefix(SCOPED)?.split_once('-')?;
    number.parse::<u32>().ok()?;
    pid.parse().ok()
}
