// SPDX-License-Identifier: MIT OR Apache-2.0
//! Offloads of devices.

use anyhow::{Context, Result};

use crate::engine::sys;

const ETHTOOL_STXCSUM: u32 = 0x17;
const ETHTOOL_STSO: u32 = 0x1f;
const ETHTOOL_SGSO: u32 = 0x24;
const ETHTOOL_SGRO: u32 = 0x2c;

/// Has a device, of the calling thread's namespace, send and receive frames as they are on a wire:
/// no longer than the MTU, with complete checksums.
pub(super) fn turn_off(device: &str) -> Result<()> {
    for command in [ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_SGRO, ETHTOOL_STXCSUM] {
        sys::device_set_feature(device, command, false)
            .with_context(|| format!("turn offloads of {device} off"))?;
    }
    Ok(())
}
