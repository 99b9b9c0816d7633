// SPDX-License-Identifier: MIT OR Apache-2.0
//! Real MPTCP connections, in network namespaces of their own. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;

mod agent;
mod connections;
mod effects;
mod events;
mod examples;
mod follower;
mod testbed;
mod tshark;
