// SPDX-License-Identifier: MIT OR Apache-2.0
//! What was found once, and must not come back.

use policy_chain::hook::Hook;

/// Frames through a chain, in order. Failures of the random tests print one.
pub struct Row {
    /// What is special about it.
    pub what: &'static str,
    /// A chain file, whose chain `main` runs.
    pub file: &'static str,
    pub hook: Hook,
    /// Hexadecimal.
    pub frames: &'static [&'static str],
}

pub const ROWS: &[Row] = &[];
