// SPDX-License-Identifier: MIT OR Apache-2.0
//! What needs a process.

pub mod inject;
