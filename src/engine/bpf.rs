// SPDX-License-Identifier: MIT OR Apache-2.0
//! The entry programs as skeletons, and the types their BTF shares with user space.

/// Generated from `src/bpf/entry.bpf.c`, compiled for XDP.
#[allow(clippy::all, clippy::undocumented_unsafe_blocks)]
#[allow(clippy::expect_used, clippy::unwrap_used)]
#[allow(dead_code, non_snake_case, non_camel_case_types)]
pub(super) mod xdp {
    include!(concat!(env!("OUT_DIR"), "/entry_xdp.skel.rs"));
}

/// The same, compiled for TC.
#[allow(clippy::all, clippy::undocumented_unsafe_blocks)]
#[allow(clippy::expect_used, clippy::unwrap_used)]
#[allow(dead_code, non_snake_case, non_camel_case_types)]
pub(super) mod tc {
    include!(concat!(env!("OUT_DIR"), "/entry_tc.skel.rs"));
}

use std::mem::offset_of;
use std::net::{IpAddr, Ipv6Addr};

pub use xdp::types;

use types::{
    attachment, chain_ctx, connection, element, flow_id, held_options, node_config, node_stats,
    report, saved_ack, sender, subflow,
};

include!(concat!(env!("OUT_DIR"), "/reasons.rs"));

// SAFETY: C structs of integers without padding; every bit pattern is a value.
unsafe impl plain::Plain for node_config {}
// SAFETY: as above.
unsafe impl plain::Plain for node_stats {}
// SAFETY: as above.
unsafe impl plain::Plain for element {}
// SAFETY: as above.
unsafe impl plain::Plain for chain_ctx {}
// SAFETY: as above.
unsafe impl plain::Plain for attachment {}
// SAFETY: as above; the generated struct names the four bytes behind its options.
unsafe impl plain::Plain for report {}
// SAFETY: as above.
unsafe impl plain::Plain for flow_id {}
// SAFETY: as above.
unsafe impl plain::Plain for sender {}
// SAFETY: as above; the generated struct names the bytes behind its frame.
unsafe impl plain::Plain for saved_ack {}
// SAFETY: as above.
unsafe impl plain::Plain for held_options {}
// SAFETY: as above.
unsafe impl plain::Plain for subflow {}
// SAFETY: as above.
unsafe impl plain::Plain for connection {}

/// Size of a per-packet context, in bytes.
pub const CONTEXT_SIZE: u32 = size_of::<chain_ctx>() as u32;
/// Size of what is known of an attachment, in bytes.
pub const ATTACHMENT_SIZE: u32 = size_of::<attachment>() as u32;
/// Size of a node's counters, in bytes.
pub const STATS_SIZE: u32 = size_of::<node_stats>() as u32;
/// Size of the value of a set's element, in bytes.
pub const ELEMENT_SIZE: u32 = size_of::<element>() as u32;

/// A value of one of the types above, from what the kernel gave; none of another size.
pub fn value_of<T: plain::Plain + Default>(bytes: &[u8]) -> Option<T> {
    let mut value = T::default();
    (bytes.len() == size_of::<T>()).then_some(())?;
    plain::copy_from_bytes(&mut value, bytes).ok()?;
    Some(value)
}

/// A value of one of the types above, as the kernel takes it.
pub fn bytes_of<T: plain::Plain>(value: &T) -> &[u8] {
    // SAFETY: what is marked plain here has no padding, so every byte is initialised.
    unsafe { plain::as_bytes(value) }
}

/// A report out of a record of the ring buffer; `None` if the record is too short for one.
pub(crate) fn report_of(record: &[u8]) -> Option<report> {
    let mut found = report::default();
    plain::copy_from_bytes(&mut found, record).ok()?;
    Some(found)
}

/// Source and destination of a reported segment; IPv4 as such.
pub(crate) fn report_addresses(report: &report) -> [IpAddr; 2] {
    [offset_of!(report, source), offset_of!(report, destination)].map(|offset| {
        let mut address = [0; 16];
        address.copy_from_slice(&bytes_of(report)[offset..][..16]);
        Ipv6Addr::from(address).to_canonical()
    })
}
