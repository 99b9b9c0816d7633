// SPDX-License-Identifier: MIT OR Apache-2.0
//! What names in chain files stand for on this system.

use std::collections::BTreeMap;

use super::sys;
use crate::policy::{Names, ReverseNames, ServicesFile};

/// Index of the loopback device in every network namespace.
const LOOPBACK: u32 = 1;

/// Devices of the current network namespace, chains by id, services by the system's file.
pub struct SystemNames<'a> {
    /// Id of each chain.
    pub chains: &'a BTreeMap<String, u32>,
    /// Take a device that is not here for the loopback device: for runs that send nothing.
    pub any_device: bool,
}

impl Names for SystemNames<'_> {
    fn device(&self, name: &str) -> Result<u32, String> {
        match sys::device_index(name) {
            Ok(index) => Ok(index),
            Err(_) if self.any_device => Ok(LOOPBACK),
            Err(error) => Err(format!("no such device here: {error}")),
        }
    }

    fn chain(&self, name: &str) -> Result<u32, String> {
        self.chains
            .get(name)
            .copied()
            .ok_or_else(|| "no such chain".to_owned())
    }

    fn service(&self, name: &str) -> Option<u16> {
        ServicesFile::system().port(name)
    }
}

impl ReverseNames for SystemNames<'_> {
    fn device(&self, index: u32) -> Option<String> {
        sys::device_name(index).ok()
    }

    fn chain(&self, id: u32) -> Option<String> {
        let mut chains = self.chains.iter();
        chains
            .find(|(_, known)| **known == id)
            .map(|(name, _)| name.clone())
    }
}
