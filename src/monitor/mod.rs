// SPDX-License-Identifier: MIT OR Apache-2.0
//! What chains learnt of [`connections`], and what they report of Multipath TCP, as events.
//!
//! ```text
//! action `report` --> ring buffer --> Decoder --> Server --> socket --> Subscription
//!                     ring            decode      socket                subscription
//! ```
//!
//! A ring buffer has one consumer. It is whoever holds an abstract Unix socket that is called after
//! the folder in bpffs: such names belong to a network namespace, as the ring buffer does, and end
//! with their process. Everyone else connects to it. Who finds nobody becomes the consumer itself:
//!
//! ```no_run
//! use policy_chain::engine::store::DEFAULT_FOLDER;
//! use policy_chain::monitor::Events;
//!
//! # fn main() -> anyhow::Result<()> {
//! for message in Events::subscribe(DEFAULT_FOLDER.as_ref())? {
//!     println!("{}", message?);
//! }
//! # Ok(())
//! # }
//! ```

pub mod connections;
pub mod decode;
pub mod event;
mod json;
mod names;
pub mod ring;
pub mod socket;
pub mod subscription;
pub mod time;

use std::time::Duration;

use anyhow::Result;

pub use decode::Decoder;
pub use event::{Event, Kind, Message};
pub use socket::Server;
pub use subscription::{Events, Subscription};
pub use time::{Clock, Time};

/// Where events come from.
pub trait Source: Send {
    /// Waits for events, up to `wait`, and hands them on, in their order, each with when it was
    /// reported: nanoseconds of CLOCK_MONOTONIC.
    ///
    /// # Errors
    /// There will be no more.
    fn poll(&mut self, wait: Duration, sink: &mut dyn FnMut(u64, Event)) -> Result<()>;
}
