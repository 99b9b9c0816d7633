// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sets in the kernel: making them, and JSON elements to keys and values and back.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use libbpf_rs::{MapType, ObjectBuilder};
use serde_json::{Map, Value};

use super::bpf::ELEMENT_SIZE;
use super::bpf::types::{element, element_flags};
use super::generation::kernel_error;
use super::sys;
use crate::error::{Invalid, Refused};
use crate::hook::Family;
use crate::policy::{Layout, Names, Registry, ReverseNames};

/// Members of an element that are not of its key.
pub const ARGUMENT: &str = "arg";
/// As [`ARGUMENT`], for a chain's name.
pub const CHAIN: &str = "chain";

/// What the maps of a kind of set look like.
struct Shape {
    kind: MapType,
    key_size: u32,
    flags: u32,
}

/// Makes an empty set of a kind for up to `size` elements; `name` is the map's.
///
/// # Errors
/// An unknown kind, or what the kernel refuses.
pub fn create(registry: &Registry, kind: &str, name: &str, size: u32) -> Result<OwnedFd> {
    let shape = shape(registry, kind)?;
    sys::map_create(
        shape.kind,
        name,
        shape.key_size,
        ELEMENT_SIZE,
        size,
        shape.flags,
    )
    .map_err(|error| kernel_error(format!("make a set of kind {kind} for {size}"), &error))
}

/// A kind of set is declared by the selectors that look it up.
fn shape(registry: &Registry, kind: &str) -> Result<Shape> {
    let policy = registry
        .selectors()
        .find(|policy| policy.key.as_ref().is_some_and(|key| key.kind == kind))
        .with_context(|| format!("no selector looks up sets of kind {kind}"))?;
    let family = [Family::Xdp, Family::Tc]
        .into_iter()
        .find(|family| !policy.object(*family).is_empty())
        .with_context(|| format!("the policy {} has no object", policy.name))?;
    let object = ObjectBuilder::default().open_memory(policy.object(family))?;
    let map = object
        .maps()
        .find(|map| map.name() == "set")
        .with_context(|| format!("the policy {} has no set", policy.name))?;
    Ok(Shape {
        kind: map.map_type(),
        key_size: map.key_size(),
        flags: map.map_flags(),
    })
}

/// Keys and values of elements, one after the other, as batches take them.
#[derive(Default)]
pub struct Packed {
    pub keys: Vec<u8>,
    pub values: Vec<u8>,
    pub count: usize,
}

impl Packed {
    /// Adds an element. `path` is its place, for errors.
    ///
    /// # Errors
    /// [`Invalid`] for what does not fit the key.
    pub fn push(
        &mut self,
        layout: &Layout,
        item: &Map<String, Value>,
        path: &str,
        names: &dyn Names,
    ) -> Result<(), Invalid> {
        let key = layout.pack(item, path, &[ARGUMENT, CHAIN], names, false)?;
        self.keys.extend_from_slice(&key.bytes);
        let value = value_of(item, path, names)?;
        // SAFETY: a C struct of integers without padding.
        self.values
            .extend_from_slice(unsafe { plain::as_bytes(&value) });
        self.count += 1;
        Ok(())
    }
}

fn value_of(item: &Map<String, Value>, path: &str, names: &dyn Names) -> Result<element, Invalid> {
    let mut value = element::default();
    if let Some(argument) = item.get(ARGUMENT) {
        let path = format!("{path}.{ARGUMENT}");
        value.argument = argument.as_u64().ok_or_else(|| {
            Invalid::new(
                &path,
                argument,
                "a whole number from 0 to 18446744073709551615",
            )
        })?;
        value.flags = element_flags::ELEMENT_ARGUMENT.0;
    }
    if let Some(chain) = item.get(CHAIN) {
        let path = format!("{path}.{CHAIN}");
        if value.flags != 0 {
            return Err(Invalid::new(path, "both arg and chain", "one of them"));
        }
        let name = chain
            .as_str()
            .ok_or_else(|| Invalid::new(&path, chain, "the name of a sub-chain"))?;
        let id = names
            .chain(name)
            .map_err(|why| Invalid::new(&path, format!("\"{name}\", {why}"), "a sub-chain"))?;
        value.argument = id.into();
        value.flags = element_flags::ELEMENT_ARGUMENT.0 | element_flags::ELEMENT_CHAIN.0;
    }
    Ok(value)
}

/// Stores elements, new or not.
///
/// # Errors
/// [`Invalid`] for an element that does not fit, [`Refused`] where the set is full; elements
/// before that stay.
pub fn store(
    set: impl AsFd,
    layout: &Layout,
    items: &[Map<String, Value>],
    path: &str,
    names: &dyn Names,
) -> Result<()> {
    let mut packed = Packed::default();
    for (at, item) in items.iter().enumerate() {
        packed.push(layout, item, &format!("{path}[{at}]"), names)?;
    }
    store_packed(set, &packed)
}

/// As [`store`], for elements already packed.
///
/// # Errors
/// [`Refused`] where the set is full.
pub fn store_packed(set: impl AsFd, packed: &Packed) -> Result<()> {
    if packed.count == 0 {
        return Ok(());
    }
    sys::map_update_batch(&set, &packed.keys, &packed.values, packed.count).map_err(|error| {
        if !error.is_full() {
            return anyhow::Error::new(error).context("store elements");
        }
        let size = sys::map_info(&set).map_or(0, |info| info.max_entries);
        Refused::state(
            format!(
                "the set is full: {} of {} elements stored",
                error.stored, packed.count
            ),
            format!("it was made for {size} elements"),
            "delete elements, or delete the set and define it with a larger \"size\"",
        )
        .into()
    })
}

/// An element as JSON: the key's members, then `arg` or `chain`.
pub fn element_json(
    layout: &Layout,
    key: &[u8],
    value: &[u8],
    names: &dyn ReverseNames,
) -> Map<String, Value> {
    let mut item = layout.unpack(key, names);
    let mut element = element::default();
    if plain::copy_from_bytes(&mut element, value).is_err() {
        return item;
    }
    if element.flags & element_flags::ELEMENT_CHAIN.0 != 0 {
        let id = element.argument as u32;
        let name = names.chain(id).unwrap_or_else(|| format!("#{id}"));
        item.insert(CHAIN.to_owned(), name.into());
    } else if element.flags & element_flags::ELEMENT_ARGUMENT.0 != 0 {
        item.insert(ARGUMENT.to_owned(), element.argument.into());
    }
    item
}

/// The chain id an element names, if it does.
pub fn element_chain(value: &[u8]) -> Option<u32> {
    let mut element = element::default();
    plain::copy_from_bytes(&mut element, value).ok()?;
    (element.flags & element_flags::ELEMENT_CHAIN.0 != 0).then_some(element.argument as u32)
}
