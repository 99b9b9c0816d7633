// SPDX-License-Identifier: MIT OR Apache-2.0
//! Packet policies composed into chains that the Linux kernel runs on XDP and TC.
//!
//! ```text
//! chain files --> Spec --> Graph --> Generation --> attached
//!              spec     plan     engine         engine
//! ```
//!
//! | Module | Holds |
//! |---|---|
//! | [`spec`] | chain files: types, checks that need no kernel, JSON Schema |
//! | [`policy`] | the registry of selectors and actions; parameters from BTF |
//! | [`plan`] | chains of one hook to a graph of nodes; the longest path |
//! | [`engine`] | loading, attaching, bpffs, sets, counters |
//! | [`agent`] | beside the chains: attaches them to devices that come, wakes subflows, fans events out |
//! | [`monitor`] | what chains learnt of connections, and report of Multipath TCP as events |
//! | [`replay`] | captured packets through the real programs |
//! | [`testbed`], [`netns`] | networks of namespaces to try chains on |
//! | [`hook`], [`error`] | the three hooks; errors by exit code |
//!
//! One node of a graph is one selector or action, and one BPF program, specialised when it is
//! loaded. `docs/architecture.md` tells how it works, `docs/chain-file.md` what a chain file says.
//!
//! ```
//! use policy_chain::{plan, policy::Registry, spec::Spec};
//!
//! # fn main() -> anyhow::Result<()> {
//! let registry = Registry::embedded()?;
//! let text = r#"{ "version": 1, "chains": [
//!     { "name": "clamp", "attach": [ { "device": "eth0", "hook": "tc-egress" } ],
//!       "selectors": [ { "selector": "tcp_flags", "all": [ "syn" ] } ],
//!       "actions": [ { "action": "set_mss", "bytes": 1300 } ] } ] }"#;
//! let spec = Spec::parse(text, "clamp.json".as_ref(), registry)?;
//! plan::check(&spec, registry)?;
//! assert_eq!(spec.chains[0].name, "clamp");
//! # Ok(())
//! # }
//! ```

pub mod agent;
pub mod engine;
pub mod error;
pub mod hook;
pub mod monitor;
pub mod netns;
mod packet_socket;
pub mod plan;
pub mod policy;
pub mod replay;
pub mod spec;
pub mod testbed;
