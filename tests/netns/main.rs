// SPDX-License-Identifier: MIT OR Apache-2.0
//! Chains under real TCP connections, in network namespaces of their own. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;

mod actions;
mod agent;
mod devices;
mod flood;
mod generations;
mod jit;
mod learn;
mod matrix;
mod verdicts;
mod wakes;
mod windows;
