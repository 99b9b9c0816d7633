// SPDX-License-Identifier: MIT OR Apache-2.0
//! Packets through the real programs of every policy, on every hook: tables of what goes in and
//! what must come out.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod actions;
mod attachment;
mod bench;
mod checksums;
mod defects;
mod frames;
mod mptcp;
mod options;
mod random;
mod selectors;
mod table;
mod truncation;
mod windows;
mod wire;
