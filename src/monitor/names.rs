// SPDX-License-Identifier: MIT OR Apache-2.0
//! Names of devices and chains, as they are now.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::decode::Names;
use crate::engine::store::Store;
use crate::engine::sys;

/// Asks once, and again after [`Current::forget`].
pub(super) struct Current {
    folder: PathBuf,
    devices: HashMap<u32, String>,
    chains: Option<HashMap<u32, String>>,
}

impl Current {
    pub(super) fn new(folder: &Path) -> Current {
        Current {
            folder: folder.to_owned(),
            devices: HashMap::new(),
            chains: None,
        }
    }

    pub(super) fn forget(&mut self) {
        self.devices.clear();
        self.chains = None;
    }

    fn read_chains(&self) -> HashMap<u32, String> {
        let state = Store::open(&self.folder).and_then(|store| store.state());
        // A name that cannot be had is none; the event is worth more.
        let ids = state.map(|state| state.ids).unwrap_or_default();
        ids.into_iter().map(|(name, id)| (id, name)).collect()
    }
}

impl Names for Current {
    fn device(&mut self, ifindex: u32) -> String {
        let name = || sys::device_name(ifindex).unwrap_or_else(|_| ifindex.to_string());
        self.devices.entry(ifindex).or_insert_with(name).clone()
    }

    fn chain(&mut self, id: u32) -> Option<String> {
        if self.chains.is_none() {
            self.chains = Some(self.read_chains());
        }
        self.chains.as_ref()?.get(&id).cloned()
    }
}
