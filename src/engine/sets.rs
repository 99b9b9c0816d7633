// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sets in the kernel: making them, and JSON elements to keys and values and back.

use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::{MapType, ObjectBuilder};
use serde_json::{Map, Value};

use super::bpf::types::{element, element_flags};
use super::bpf::{ELEMENT_SIZE, bytes_of};
use super::generation::kernel_error;
use super::names::SystemNames;
use super::store::Store;
use super::sys;
use crate::error::{Invalid, Refused, did_you_mean};
use crate::hook::Family;
use crate::policy::{Layout, Names, Registry, ReverseNames, parse_duration};
use crate::spec::json;

/// Members of an element that are not of its key.
pub const ARGUMENT: &str = "arg";
/// As [`ARGUMENT`], for a chain's name.
pub const CHAIN: &str = "chain";
/// As [`ARGUMENT`], for how long the element is to stay: a duration.
pub const EXPIRE: &str = "expire";

const SECOND: u64 = 1_000_000_000;

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
        let key = layout.pack(item, path, &[ARGUMENT, CHAIN, EXPIRE], names, false)?;
        self.keys.extend_from_slice(&key.bytes);
        let value = value_of(item, path, names)?;
        self.values.extend_from_slice(bytes_of(&value));
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
    if let Some(expire) = item.get(EXPIRE) {
        const EXPECTED: &str = "a duration of at least \"1s\" (units s m h)";
        let path = format!("{path}.{EXPIRE}");
        let span = expire.as_str().and_then(parse_duration);
        let at = span
            .filter(|span| *span >= SECOND)
            .and_then(|span| expires_at(nanoseconds_now(), span));
        value.expires = at.ok_or_else(|| Invalid::new(path, expire, EXPECTED))?;
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
    if element.expires != 0 {
        // At least what can be stored again, though its time may end right now.
        let left = seconds_left(element.expires, nanoseconds_now()).max(1);
        item.insert(EXPIRE.to_owned(), format!("{left}s").into());
    }
    item
}

/// The chain id an element names, if it does.
pub fn element_chain(value: &[u8]) -> Option<u32> {
    let mut element = element::default();
    plain::copy_from_bytes(&mut element, value).ok()?;
    (element.flags & element_flags::ELEMENT_CHAIN.0 != 0).then_some(element.argument as u32)
}

/// Whether an element counts no more, by its value.
pub fn has_expired(value: &[u8]) -> bool {
    expiry(value).is_some_and(|at| u64::from(at) * SECOND <= nanoseconds_now())
}

/// When an element's time is over, by its value; none if it stays.
fn expiry(value: &[u8]) -> Option<u32> {
    let mut element = element::default();
    plain::copy_from_bytes(&mut element, value).ok()?;
    (element.expires != 0).then_some(element.expires)
}

/// A walk through a set that removes what has expired, some elements at a time.
#[derive(Debug)]
pub struct ExpiryWalk {
    walk: sys::MapWalk,
    /// Elements removed.
    pub removed: usize,
    /// Elements seen that expire one day, or have.
    pub expiring: usize,
}

impl ExpiryWalk {
    /// A walk from the beginning, by so many elements.
    pub fn new(batch: usize) -> ExpiryWalk {
        ExpiryWalk {
            walk: sys::MapWalk::new(batch),
            removed: 0,
            expiring: 0,
        }
    }

    /// Removes what has expired of the next elements. Whether there are more.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn step(&mut self, set: impl AsFd) -> Result<bool> {
        let Some(entries) = self.walk.next(&set).context("read a set")? else {
            return Ok(false);
        };
        for (key, value) in entries.iter() {
            self.expiring += usize::from(expiry(value).is_some());
            if !has_expired(value) {
                continue;
            }
            // It may have been stored anew since.
            let now = sys::map_lookup(&set, key, ELEMENT_SIZE as usize).context("read a set")?;
            if now.is_some_and(|value| has_expired(&value)) {
                let there = sys::map_delete(&set, key).context("delete from a set")?;
                self.removed += usize::from(there);
            }
        }
        Ok(true)
    }
}

/// When what is to stay for `span` expires, both in nanoseconds: the end of a second, not before.
fn expires_at(now: u64, span: u64) -> Option<u32> {
    u32::try_from(now.checked_add(span)?.div_ceil(SECOND)).ok()
}

/// Whole seconds until then; at least 1 before, 0 from then on.
fn seconds_left(expires: u32, now: u64) -> u64 {
    match (u64::from(expires) * SECOND).saturating_sub(now) {
        0 => 0,
        left => (left / SECOND).max(1),
    }
}

/// Of the clock by which elements expire.
fn nanoseconds_now() -> u64 {
    // The kernel has this clock.
    let now = sys::monotonic().unwrap_or_default();
    now.as_secs() * SECOND + u64::from(now.subsec_nanos())
}

/// What `set load` did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Elements given, stored new or anew.
    pub stored: usize,
    /// Elements removed that were not given.
    pub removed: usize,
}

/// A named set, open to work on.
pub struct NamedSet<'a> {
    name: String,
    map: OwnedFd,
    layout: &'a Layout,
    ids: BTreeMap<String, u32>,
}

impl<'a> NamedSet<'a> {
    /// Opens a set by name.
    ///
    /// # Errors
    /// [`Invalid`] for a name that is not there.
    pub fn open(store: &'a Store, name: &str) -> Result<NamedSet<'a>> {
        let state = store.state()?;
        let Some(set) = state.sets.get(name) else {
            let names = state.sets.keys().map(String::as_str);
            return Err(Invalid::new(
                "SET",
                format!("\"{name}\", no such set{}", did_you_mean(name, names)),
                "the name of a set",
            )
            .advice("see `policy-chain set list`; sets are defined in chain files")
            .into());
        };
        let key = store
            .registry()
            .set_kind(&set.kind)
            .with_context(|| format!("no policy knows sets of kind {}", set.kind))?;
        let subs = state.subs.iter().map(|sub| sub.name.clone());
        let ids = subs
            .filter_map(|name| Some((name.clone(), *state.ids.get(&name)?)))
            .collect();
        Ok(NamedSet {
            name: name.to_owned(),
            map: store.set(name)?,
            layout: &key.layout,
            ids,
        })
    }

    fn names(&self) -> SystemNames<'_> {
        SystemNames {
            chains: &self.ids,
            any_device: false,
        }
    }

    /// Reads an element as users write it: JSON, or `member=value,...`.
    ///
    /// # Errors
    /// [`Invalid`] for what is neither.
    pub fn parse(&self, text: &str) -> Result<Map<String, Value>, Invalid> {
        let text = text.trim();
        if !text.starts_with('{') {
            return self.layout.parse_compact(text);
        }
        match json::parse(text, Path::new("element"))? {
            Value::Object(item) => Ok(item),
            other => Err(Invalid::new("element", other, "a JSON object")),
        }
    }

    /// Stores elements, new or not; those that are there and not given stay.
    ///
    /// # Errors
    /// [`Invalid`], and then nothing was stored; [`Refused`] where the set is full.
    pub fn add(&self, items: &[Map<String, Value>]) -> Result<()> {
        store_named(&self.map, &self.name, &self.pack(items)?)
    }

    fn pack(&self, items: &[Map<String, Value>]) -> Result<Packed, Invalid> {
        let mut packed = Packed::default();
        for (at, item) in items.iter().enumerate() {
            packed.push(
                self.layout,
                item,
                &format!("element {}", at + 1),
                &self.names(),
            )?;
        }
        Ok(packed)
    }

    /// Removes elements, and tells how many were there.
    ///
    /// # Errors
    /// [`Invalid`] for an element that is no key.
    pub fn delete(&self, items: &[Map<String, Value>]) -> Result<usize> {
        let packed = self.pack(items)?;
        let mut removed = 0;
        for key in packed.keys.chunks_exact(self.layout.size.max(1)) {
            let there = sys::map_delete(&self.map, key)
                .with_context(|| format!("delete from the set {}", self.name))?;
            removed += usize::from(there);
        }
        Ok(removed)
    }

    /// Every element that has not expired, in no order.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn list(&self) -> Result<Vec<Map<String, Value>>> {
        let entries =
            sys::map_dump(&self.map).with_context(|| format!("read the set {}", self.name))?;
        let names = self.names();
        Ok(entries
            .iter()
            .filter(|(_, value)| !has_expired(value))
            .map(|(key, value)| element_json(self.layout, key, value, &names))
            .collect())
    }

    /// Loads elements from text: a JSON list of objects, or one element a line (JSON or
    /// `member=value,...`; empty lines and those with `#` first do not count). With `replace`,
    /// what is not given is removed, after all that is given has been stored.
    ///
    /// # Errors
    /// [`Invalid`] with the line, and then nothing was stored.
    pub fn load(&self, text: &str, file: &Path, replace: bool) -> Result<Loaded> {
        let packed = self.pack_text(text).map_err(|error| error.in_file(file))?;
        store_named(&self.map, &self.name, &packed)?;
        let mut removed = 0;
        if replace {
            let given: HashSet<&[u8]> = packed.keys.chunks_exact(self.layout.size.max(1)).collect();
            let entries = sys::map_dump(&self.map)?;
            for (key, _) in entries.iter().filter(|(key, _)| !given.contains(key)) {
                removed += usize::from(sys::map_delete(&self.map, key)?);
            }
        }
        Ok(Loaded {
            stored: packed.count,
            removed,
        })
    }

    fn pack_text(&self, text: &str) -> Result<Packed, Invalid> {
        let names = self.names();
        let mut packed = Packed::default();
        if text.trim_start().starts_with('[') {
            let list = json::parse(text, Path::new(""))?;
            for (at, item) in list.as_array().into_iter().flatten().enumerate() {
                let path = format!("$[{at}]");
                let item = item
                    .as_object()
                    .ok_or_else(|| Invalid::new(&path, json::show(item), "a JSON object"))?;
                packed.push(self.layout, item, &path, &names)?;
            }
            return Ok(packed);
        }
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let path = format!("line {number}");
            let item = self.parse(line).map_err(|error| Invalid {
                path: path.clone(),
                ..error
            })?;
            packed.push(self.layout, &item, &path, &names)?;
        }
        Ok(packed)
    }
}

/// Takes a set away that no chain uses.
///
/// # Errors
/// [`Invalid`] for a name that is not there, [`Refused`] while a chain uses the set.
pub fn delete(store: &Store, name: &str) -> Result<()> {
    NamedSet::open(store, name)?;
    let mut state = store.state()?;
    let attachments = store.attachments()?;
    let attached = attachments.iter().flat_map(|a| &a.record.chains);
    let kept = state.attached.values().flatten().chain(&state.subs);
    let user = attached.chain(kept).find(|chain| {
        let selectors = chain.selectors.iter().map(|selector| &selector.keys);
        let mut keys = selectors.chain(chain.actions.iter().map(|action| &action.keys));
        keys.any(|keys| keys.set() == Some(name))
    });
    if let Some(chain) = user {
        return Err(Refused::state(
            format!("the set {name} is in use"),
            format!("the chain {} uses it", chain.name),
            format!("first `policy-chain delete {}`", chain.name),
        )
        .into());
    }
    state.sets.remove(name);
    store.write_state(&state)?;
    store.remove_set(name)?;
    store.remove_if_empty()
}

fn store_named(map: &OwnedFd, name: &str, packed: &Packed) -> Result<()> {
    store_packed(map, packed).map_err(|error| match error.downcast::<Refused>() {
        Ok(refused) => Refused {
            what: format!("the set {name}: {}", refused.what),
            ..refused
        }
        .into(),
        Err(error) => error,
    })
}

/// An element as `set list` prints it and `set add` takes it.
pub fn compact(item: &Map<String, Value>) -> String {
    let members: Vec<String> = item
        .iter()
        .map(|(name, value)| match value.as_str() {
            Some(text) => format!("{name}={text}"),
            None => format!("{name}={value}"),
        })
        .collect();
    members.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_expires_early() {
        let whole = 10 * SECOND;
        for (now, span, expires) in [
            (whole, SECOND, Some(11)),
            (whole + 1, SECOND, Some(12)),
            (whole + SECOND - 1, 2 * SECOND, Some(13)),
            (whole + SECOND / 2, SECOND * 3 / 2, Some(12)),
            (whole, u64::MAX, None),
            (whole, u64::from(u32::MAX) * SECOND, None),
        ] {
            assert_eq!(expires_at(now, span), expires, "{now} {span}");
        }
    }

    #[test]
    fn what_has_not_expired_has_a_second_left() {
        for (now, left) in [(7, 3), (10, 0), (11, 0)] {
            assert_eq!(seconds_left(10, now * SECOND), left);
        }
        assert_eq!(seconds_left(10, 7 * SECOND + 1), 2);
        assert_eq!(seconds_left(10, 10 * SECOND - 1), 1);
    }
}
