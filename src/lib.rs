// SPDX-License-Identifier: MIT OR Apache-2.0
//! Packet policies composed into chains that the Linux kernel runs on XDP and TC.

pub mod engine;
pub mod error;
pub mod hook;
pub mod netns;
pub mod plan;
pub mod policy;
pub mod replay;
pub mod spec;
pub mod testbed;
