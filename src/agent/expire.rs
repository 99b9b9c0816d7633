// SPDX-License-Identifier: MIT OR Apache-2.0
//! Removes elements of sets whose time is over. Packets match them no more in any case: this makes
//! room for others.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::{Duty, log};
use crate::engine::sets;
use crate::engine::store::Store;

/// Between two looks: sets can be large.
const INTERVAL: Duration = Duration::from_secs(5);

/// The duty to remove what has expired.
pub struct Expiry {
    folder: PathBuf,
}

impl Expiry {
    pub fn new(folder: &Path) -> Expiry {
        Expiry {
            folder: folder.to_owned(),
        }
    }

    fn look(&self) -> Result<()> {
        let store = Store::open(&self.folder)?;
        for name in store.state()?.sets.keys() {
            let removed = sets::remove_expired(store.set(name)?)?;
            if removed > 0 {
                log(&format!("removed {removed} expired from the set {name}"));
            }
        }
        Ok(())
    }
}

impl Duty for Expiry {
    fn run(&mut self) -> Duration {
        if let Err(error) = self.look() {
            log(&format!("cannot remove what has expired: {error:#}"));
        }
        INTERVAL
    }
}
