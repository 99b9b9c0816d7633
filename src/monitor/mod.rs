// SPDX-License-Identifier: MIT OR Apache-2.0
//! What chains learnt and tell: connections, and events.

pub mod connections;
