// SPDX-License-Identifier: MIT OR Apache-2.0
//! Chains in the kernel: loading, attaching, keeping and counting them.

pub mod apply;
pub mod attach;
pub mod bpf;
pub mod counters;
pub mod generation;
pub mod kernel;
pub mod names;
pub mod sets;
pub mod store;
pub mod sys;
pub mod view;
pub mod wanted;
