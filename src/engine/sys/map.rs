// SPDX-License-Identifier: MIT OR Apache-2.0
//! Maps: creation, single elements, batches, per-CPU arrays, and frozen blobs.
//!
//! Keys and values are raw bytes as the map's C types lay them out, integers in host order unless
//! the type says otherwise.

use std::collections::HashSet;
use std::ffi::c_void;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use super::prog::{Ids, expect_kind, info_by_fd};
use super::{ENOTSUPP, MapType, c_string, check, errno, len32, object_name, owned};

/// Bytes that [`map_create_frozen_bytes`] takes at most.
pub const FROZEN_BYTES_MAX: usize = 16 << 20;
/// Length prefix of a frozen blob: little-endian u64.
const FROZEN_PREFIX: usize = 8;

/// Bytes of keys and values to move in one batch.
const BATCH_BYTES: usize = 4 << 20;

/// A map as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapInfo {
    pub id: u32,
    /// At most 15 bytes: the kernel keeps no more.
    pub name: String,
    pub kind: MapType,
    /// In bytes.
    pub key_size: u32,
    /// In bytes; of per-CPU maps, for one CPU.
    pub value_size: u32,
    pub max_entries: u32,
    /// `BPF_F_*` of the map's creation, and what the kernel adds.
    pub flags: u32,
}

/// A batch that was not stored whole.
#[derive(Debug)]
pub struct BatchError {
    /// Elements stored: those before the one that failed. With `EFAULT`, at least these.
    pub stored: usize,
    /// Elements there were to store.
    pub of: usize,
    /// Why the next one failed. Map full: `E2BIG` for a hash, `ENOSPC` for an LPM trie.
    pub source: io::Error,
}

impl BatchError {
    /// Whether the map has no room for more.
    pub fn is_full(&self) -> bool {
        matches!(
            self.source.raw_os_error(),
            Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM)
        )
    }
}

impl fmt::Display for BatchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "stored {} of {} elements: {}",
            self.stored, self.of, self.source
        )
    }
}

impl std::error::Error for BatchError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// All elements of a map, in the map's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entries {
    /// Bytes of one key, never 0.
    pub key_size: usize,
    /// Bytes of one value; of per-CPU maps, of all CPUs' values.
    pub value_size: usize,
    /// The keys, one after the other.
    pub keys: Vec<u8>,
    /// The values, in the order of the keys.
    pub values: Vec<u8>,
}

impl Entries {
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.keys
            .chunks_exact(self.key_size)
            .zip(self.values.chunks_exact(self.value_size))
    }

    pub fn len(&self) -> usize {
        self.keys.len() / self.key_size
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

/// The values of a whole per-CPU array.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PercpuArray {
    values: Vec<u8>,
    value_size: usize,
    cpus: usize,
}

impl PercpuArray {
    /// Elements of the array.
    pub fn len(&self) -> usize {
        self.values.len() / (stride(self.value_size) * self.cpus)
    }

    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The values of one element, one for each possible CPU; none beyond the end.
    pub fn values(&self, index: usize) -> impl Iterator<Item = &[u8]> {
        let stride = stride(self.value_size);
        let element = stride * self.cpus;
        self.values
            .get(index.saturating_mul(element)..)
            .and_then(|rest| rest.get(..element))
            .unwrap_or_default()
            .chunks_exact(stride)
            .map(|value| &value[..self.value_size])
    }
}

/// What the kernel lays down for a map's keys and values.
#[derive(Clone, Copy)]
struct Shape {
    kind: MapType,
    key: usize,
    /// Bytes that a system call reads or writes as one value: all CPUs' of a per-CPU map.
    value: usize,
    /// Bytes of one CPU's value, not rounded.
    value_size: usize,
    max_entries: usize,
}

impl Shape {
    fn of(map: BorrowedFd<'_>) -> io::Result<Self> {
        let info = raw_info(map)?;
        let kind = MapType::from(info.type_);
        let value_size = info.value_size as usize;
        let value = match kind {
            MapType::PercpuHash
            | MapType::PercpuArray
            | MapType::LruPercpuHash
            | MapType::PercpuCgroupStorage => stride(value_size) * possible_cpus()?,
            _ => value_size,
        };
        Ok(Shape {
            kind,
            key: info.key_size as usize,
            value,
            value_size,
            max_entries: info.max_entries as usize,
        })
    }

    /// Elements to move in one batch.
    fn batch(&self) -> usize {
        (BATCH_BYTES / (self.key + self.value).max(1)).clamp(1, self.max_entries.max(1))
    }
}

/// Distance of two CPUs' values.
fn stride(value_size: usize) -> usize {
    value_size.next_multiple_of(8)
}

/// CPUs that may ever be online: the number of values in an element of a per-CPU map.
pub fn possible_cpus() -> io::Result<usize> {
    // SAFETY: no arguments.
    check(unsafe { libbpf_sys::libbpf_num_possible_cpus() }).map(|cpus| cpus as usize)
}

/// The ids of all maps of the system.
pub fn maps() -> Ids {
    Ids::new(libbpf_sys::bpf_map_get_next_id)
}

/// Opens a map by id. `ENOENT`: gone; `EPERM` without `CAP_SYS_ADMIN`.
pub fn map_by_id(id: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain integers; the result is a new descriptor.
    unsafe { owned(libbpf_sys::bpf_map_get_fd_by_id(id)) }
}

/// Describes a map. `EINVAL` for a descriptor that is no map.
pub fn map_info(map: impl AsFd) -> io::Result<MapInfo> {
    let map = map.as_fd();
    expect_kind(map, "bpf-map")?;
    let info = raw_info(map)?;
    Ok(MapInfo {
        id: info.id,
        name: object_name(&info.name),
        kind: info.type_.into(),
        key_size: info.key_size,
        value_size: info.value_size,
        max_entries: info.max_entries,
        flags: info.map_flags,
    })
}

fn raw_info(map: BorrowedFd<'_>) -> io::Result<libbpf_sys::bpf_map_info> {
    let mut info = libbpf_sys::bpf_map_info::default();
    // SAFETY: plain integers, all zero.
    unsafe { info_by_fd(map, &mut info, libbpf_sys::bpf_map_get_info_by_fd)? };
    Ok(info)
}

/// Creates a map. `name`: at most 15 letters, digits, `_` and `.`; `flags`: `BPF_F_*`.
///
/// `EPERM`: not permitted, or the locked-memory limit of old kernels; `EINVAL`: not a possible
/// map, or a bad name; `E2BIG`, `ENOMEM`: too large.
pub fn map_create(
    kind: MapType,
    name: &str,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let opts = create_opts(flags);
    create(kind, name, [key_size, value_size, max_entries], &opts)
}

/// Creates an array or hash of maps; its elements take maps like `inner`.
pub fn map_create_outer(
    kind: MapType,
    name: &str,
    key_size: u32,
    max_entries: u32,
    inner: impl AsFd,
) -> io::Result<OwnedFd> {
    let mut opts = create_opts(0);
    opts.inner_map_fd = inner.as_fd().as_raw_fd() as u32;
    create(kind, name, [key_size, 4, max_entries], &opts)
}

fn create_opts(flags: u32) -> libbpf_sys::bpf_map_create_opts {
    libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as _,
        map_flags: flags,
        ..Default::default()
    }
}

fn create(
    kind: MapType,
    name: &str,
    [key_size, value_size, max_entries]: [u32; 3],
    opts: &libbpf_sys::bpf_map_create_opts,
) -> io::Result<OwnedFd> {
    if name.len() >= libbpf_sys::BPF_OBJ_NAME_LEN as usize {
        return Err(errno(libc::EINVAL));
    }
    let name = c_string(name)?;
    // SAFETY: the name and the options outlive the call; the result is a new descriptor.
    unsafe {
        owned(libbpf_sys::bpf_map_create(
            kind as _,
            name.as_ptr(),
            key_size,
            value_size,
            max_entries,
            opts,
        ))
    }
}

/// Keeps bytes in the kernel: an array of one element, which user space can no longer change.
/// `E2BIG` beyond [`FROZEN_BYTES_MAX`].
pub fn map_create_frozen_bytes(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    if bytes.len() > FROZEN_BYTES_MAX {
        return Err(errno(libc::E2BIG));
    }
    let mut value = Vec::with_capacity(FROZEN_PREFIX + bytes.len().next_multiple_of(8));
    value.extend((bytes.len() as u64).to_le_bytes());
    value.extend(bytes);
    value.resize(value.len().next_multiple_of(8), 0);
    let map = map_create(MapType::Array, name, 4, len32(value.len())?, 1, 0)?;
    map_update(&map, &0u32.to_ne_bytes(), &value, 0)?;
    // SAFETY: the descriptor is open during the call.
    check(unsafe { libbpf_sys::bpf_map_freeze(map.as_raw_fd()) })?;
    Ok(map)
}

/// The bytes that [`map_create_frozen_bytes`] was given. `EPROTO` for a map it did not make.
pub fn map_read_bytes(map: impl AsFd) -> io::Result<Vec<u8>> {
    let map = map.as_fd();
    let shape = Shape::of(map)?;
    if shape.kind != MapType::Array || shape.max_entries != 1 || shape.key != 4 {
        return Err(errno(libc::EPROTO));
    }
    let mut value = map_lookup(map, &0u32.to_ne_bytes(), shape.value_size)?
        .ok_or_else(|| errno(libc::EPROTO))?;
    let len = value
        .first_chunk::<FROZEN_PREFIX>()
        .and_then(|prefix| usize::try_from(u64::from_le_bytes(*prefix)).ok())
        .filter(|len| *len <= value.len() - FROZEN_PREFIX)
        .ok_or_else(|| errno(libc::EPROTO))?;
    value.drain(..FROZEN_PREFIX);
    value.truncate(len);
    Ok(value)
}

/// Stores one element. `flags`: 0 (`BPF_ANY`), `BPF_NOEXIST` or `BPF_EXIST`. The value of a per-CPU
/// map is all CPUs' values, each rounded up to 8 bytes; of a map of maps or programs, a descriptor.
///
/// Full: `E2BIG` for a hash, `ENOSPC` for an LPM trie; `EPERM`: frozen.
pub fn map_update(map: impl AsFd, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
    let map = map.as_fd();
    let shape = Shape::of(map)?;
    if key.len() != shape.key || value.len() != shape.value {
        return Err(errno(libc::EINVAL));
    }
    update_element(map, key, value, flags)
}

/// `key` and `value` have the map's sizes.
fn update_element(map: BorrowedFd<'_>, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as the map's sizes say, and the slices have them.
    check(unsafe {
        libbpf_sys::bpf_map_update_elem(map.as_raw_fd(), void(key), void(value), flags)
    })
    .map(drop)
}

/// The value of `key`, if it is there. `value_size` as [`MapInfo::value_size`], of a map that is
/// not per-CPU. Of a map of maps or programs it is an id.
pub fn map_lookup(map: impl AsFd, key: &[u8], value_size: usize) -> io::Result<Option<Vec<u8>>> {
    let map = map.as_fd();
    let shape = Shape::of(map)?;
    if key.len() != shape.key || value_size != shape.value {
        return Err(errno(libc::EINVAL));
    }
    lookup_element(map, key, shape.value)
}

/// `key` has the map's size and `value` is the shape's.
fn lookup_element(map: BorrowedFd<'_>, key: &[u8], value: usize) -> io::Result<Option<Vec<u8>>> {
    let mut found = vec![0u8; value];
    // SAFETY: the kernel reads and writes as many bytes as the map's sizes say, and the buffers
    // have them.
    let result = unsafe {
        libbpf_sys::bpf_map_lookup_elem(map.as_raw_fd(), void(key), void_mut(&mut found))
    };
    present(check(result)).map(|present| present.then_some(found))
}

/// Removes an element; tells whether it was there.
pub fn map_delete(map: impl AsFd, key: &[u8]) -> io::Result<bool> {
    let map = map.as_fd();
    if key.len() != Shape::of(map)?.key {
        return Err(errno(libc::EINVAL));
    }
    // SAFETY: the kernel reads as many bytes as the map's key has, and the slice has them.
    present(check(unsafe {
        libbpf_sys::bpf_map_delete_elem(map.as_raw_fd(), void(key))
    }))
}

/// False for `ENOENT`.
fn present(result: io::Result<i32>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The keys of a map, one system call each. When the key last returned is deleted meanwhile, a
/// hash starts again from its beginning: keys may come twice. Ends after twice the map's size.
#[derive(Debug)]
pub struct MapKeys<'map> {
    map: BorrowedFd<'map>,
    key_size: usize,
    last: Option<Vec<u8>>,
    left: usize,
}

/// Walks the keys of a map.
pub fn map_keys(map: BorrowedFd<'_>) -> io::Result<MapKeys<'_>> {
    let shape = Shape::of(map)?;
    Ok(MapKeys {
        map,
        key_size: shape.key,
        last: None,
        left: shape.max_entries.saturating_mul(2),
    })
}

impl Iterator for MapKeys<'_> {
    type Item = io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let mut key = vec![0u8; self.key_size];
        let last = self.last.as_deref().map_or(ptr::null(), void);
        // SAFETY: both keys have the map's key size, or the first is null.
        let result = unsafe {
            libbpf_sys::bpf_map_get_next_key(self.map.as_raw_fd(), last, void_mut(&mut key))
        };
        match present(check(result)) {
            Ok(true) => {
                self.last = Some(key.clone());
                Some(Ok(key))
            }
            Ok(false) => {
                self.left = 0;
                None
            }
            Err(error) => {
                self.left = 0;
                Some(Err(error))
            }
        }
    }
}

/// Stores `count` elements, new or not: `keys` and `values` hold them one after the other, per-CPU
/// values as for [`map_update`]. One by one where the kernel has no batches for this map.
pub fn map_update_batch(
    map: impl AsFd,
    keys: &[u8],
    values: &[u8],
    count: usize,
) -> Result<(), BatchError> {
    let map = map.as_fd();
    let failed = |stored, source| BatchError {
        stored,
        of: count,
        source,
    };
    let shape = Shape::of(map).map_err(|error| failed(0, error))?;
    if Some(keys.len()) != shape.key.checked_mul(count)
        || Some(values.len()) != shape.value.checked_mul(count)
    {
        return Err(failed(0, errno(libc::EINVAL)));
    }
    let mut stored = 0;
    while stored < count {
        let now = (count - stored).min(shape.batch());
        let keys = &keys[stored * shape.key..][..now * shape.key];
        let values = &values[stored * shape.value..][..now * shape.value];
        update_chunk(map, &shape, keys, values, now)
            .map_err(|(done, error)| failed(stored + done, error))?;
        stored += now;
    }
    Ok(())
}

/// Stores `count` elements of the map's shape; on failure, how many it had stored.
fn update_chunk(
    map: BorrowedFd<'_>,
    shape: &Shape,
    keys: &[u8],
    values: &[u8],
    count: usize,
) -> Result<(), (usize, io::Error)> {
    let mut done = len32(count).map_err(|error| (0, error))?;
    let opts = batch_opts();
    // SAFETY: the slices hold `count` keys and values of the map's sizes.
    let result = check(unsafe {
        libbpf_sys::bpf_map_update_batch(
            map.as_raw_fd(),
            void(keys),
            void(values),
            &mut done,
            &opts,
        )
    });
    let Err(error) = result else { return Ok(()) };
    // A kernel that refuses the operation as such leaves the count alone.
    let done = if done as usize >= count {
        0
    } else {
        done as usize
    };
    if !lacks_batch(&error) {
        return Err((done, error));
    }
    for at in done..count {
        let key = &keys[at * shape.key..][..shape.key];
        let value = &values[at * shape.value..][..shape.value];
        update_element(map, key, value, 0).map_err(|error| (at, error))?;
    }
    Ok(())
}

fn batch_opts() -> libbpf_sys::bpf_map_batch_opts {
    libbpf_sys::bpf_map_batch_opts {
        sz: size_of::<libbpf_sys::bpf_map_batch_opts>() as _,
        ..Default::default()
    }
}

/// Whether to try element by element: `EINVAL` comes from kernels without the operation, but also
/// for a bad element, which then fails again by itself; `EINTR` from a reader that lost a race.
fn lacks_batch(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EINTR | ENOTSUPP)
    )
}

/// All elements of a map, read in batches, or one by one where the kernel has none for this map.
/// Not a snapshot: an element stored or removed meanwhile may be there or not.
pub fn map_dump(map: impl AsFd) -> io::Result<Entries> {
    let map = map.as_fd();
    let shape = Shape::of(map)?;
    if shape.key == 0 || shape.value == 0 {
        return Err(errno(libc::EINVAL));
    }
    match dump_batches(map, &shape) {
        Err(error) if lacks_batch(&error) => dump_elements(map, &shape),
        result => result,
    }
}

/// As [`map_dump`], each element apart. The sizes must be the map's.
pub fn map_entries(
    map: impl AsFd,
    key_size: usize,
    value_size: usize,
) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let entries = map_dump(map)?;
    if (entries.key_size, entries.value_size) != (key_size, value_size) {
        return Err(errno(libc::EINVAL));
    }
    Ok(entries
        .iter()
        .map(|(key, value)| (key.to_vec(), value.to_vec()))
        .collect())
}

fn no_entries(shape: &Shape) -> Entries {
    Entries {
        key_size: shape.key,
        value_size: shape.value,
        keys: Vec::new(),
        values: Vec::new(),
    }
}

fn dump_batches(map: BorrowedFd<'_>, shape: &Shape) -> io::Result<Entries> {
    let mut entries = no_entries(shape);
    let mut walk = MapWalk::new(shape.batch());
    while let Some(more) = walk.next_of(map, shape)? {
        entries.keys.extend_from_slice(&more.keys);
        entries.values.extend_from_slice(&more.values);
    }
    Ok(entries)
}

/// A walk through a map, batch by batch: how far it got. Not a snapshot, as [`map_dump`].
#[derive(Clone, Debug)]
pub struct MapWalk {
    /// Elements of a batch.
    room: usize,
    /// Where to go on: a bucket number of a hash, or the last key of another map. Empty at first.
    position: Vec<u8>,
    ended: bool,
}

impl MapWalk {
    /// A walk from the beginning. A batch has `batch` elements, or more where the kernel gives no
    /// fewer.
    pub fn new(batch: usize) -> MapWalk {
        MapWalk {
            room: batch.max(1),
            position: Vec::new(),
            ended: false,
        }
    }

    /// The next elements; none at the end, or after an error. Always of the same map.
    ///
    /// `EINVAL`, `EOPNOTSUPP` or `ENOTSUPP` where the kernel has no batches for this map.
    pub fn next(&mut self, map: impl AsFd) -> io::Result<Option<Entries>> {
        let map = map.as_fd();
        let shape = Shape::of(map)?;
        if shape.key == 0 || shape.value == 0 {
            return Err(errno(libc::EINVAL));
        }
        self.next_of(map, &shape)
    }

    fn next_of(&mut self, map: BorrowedFd<'_>, shape: &Shape) -> io::Result<Option<Entries>> {
        if self.ended {
            return Ok(None);
        }
        let started = !self.position.is_empty();
        self.position.resize(shape.key.max(4), 0);
        let opts = batch_opts();
        loop {
            let mut entries = no_entries(shape);
            entries.keys = vec![0u8; self.room * shape.key];
            entries.values = vec![0u8; self.room * shape.value];
            let mut count = len32(self.room)?;
            let to = self.position.as_mut_ptr().cast::<c_void>();
            let from = if started { to } else { ptr::null_mut() };
            // SAFETY: there is room for `count` keys and values of the map's sizes, and for a
            // position of either form; the kernel reads the old one before it writes the new one.
            let result = check(unsafe {
                libbpf_sys::bpf_map_lookup_batch(
                    map.as_raw_fd(),
                    from,
                    to,
                    void_mut(&mut entries.keys),
                    void_mut(&mut entries.values),
                    &mut count,
                    &opts,
                )
            });
            match result {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => self.ended = true,
                // A hash gives whole buckets, and the next one does not fit.
                Err(error)
                    if error.raw_os_error() == Some(libc::ENOSPC)
                        && self.room <= shape.max_entries =>
                {
                    self.room *= 2;
                    continue;
                }
                Err(error) => {
                    self.ended = true;
                    return Err(error);
                }
            }
            let count = (count as usize).min(self.room);
            entries.keys.truncate(count * shape.key);
            entries.values.truncate(count * shape.value);
            return Ok(Some(entries));
        }
    }
}

fn dump_elements(map: BorrowedFd<'_>, shape: &Shape) -> io::Result<Entries> {
    let mut entries = no_entries(shape);
    let mut seen = HashSet::new();
    for key in map_keys(map)? {
        let key = key?;
        if seen.contains(&key) {
            continue;
        }
        if let Some(value) = lookup_element(map, &key, shape.value)? {
            entries.keys.extend_from_slice(&key);
            entries.values.extend_from_slice(&value);
        }
        seen.insert(key);
    }
    Ok(entries)
}

/// One element of a per-CPU array: a value for each possible CPU. `ENOENT` beyond the array's end.
pub fn percpu_lookup(map: impl AsFd, index: u32, value_size: usize) -> io::Result<Vec<Vec<u8>>> {
    let map = map.as_fd();
    let shape = percpu_shape(map)?;
    if value_size != shape.value_size {
        return Err(errno(libc::EINVAL));
    }
    let values = lookup_element(map, &index.to_ne_bytes(), shape.value)?
        .ok_or_else(|| errno(libc::ENOENT))?;
    Ok(values
        .chunks_exact(stride(value_size))
        .map(|value| value[..value_size].to_vec())
        .collect())
}

/// All elements of a per-CPU array.
pub fn percpu_read(map: impl AsFd) -> io::Result<PercpuArray> {
    let map = map.as_fd();
    let shape = percpu_shape(map)?;
    Ok(PercpuArray {
        values: map_dump(map)?.values,
        value_size: shape.value_size,
        cpus: shape.value / stride(shape.value_size),
    })
}

/// Zeroes the first `entries` elements of a per-CPU array, on all CPUs.
pub fn percpu_zero(map: impl AsFd, entries: u32, value_size: usize) -> io::Result<()> {
    let map = map.as_fd();
    let shape = percpu_shape(map)?;
    if value_size != shape.value_size {
        return Err(errno(libc::EINVAL));
    }
    let zeros = vec![0u8; shape.batch() * shape.value];
    let mut first = 0;
    while first < entries {
        let end = entries.min(first.saturating_add(len32(shape.batch())?));
        let keys: Vec<u8> = (first..end).flat_map(u32::to_ne_bytes).collect();
        let count = (end - first) as usize;
        map_update_batch(map, &keys, &zeros[..count * shape.value], count)
            .map_err(|error| error.source)?;
        first = end;
    }
    Ok(())
}

/// `EINVAL` for anything but a per-CPU array.
fn percpu_shape(map: BorrowedFd<'_>) -> io::Result<Shape> {
    let shape = Shape::of(map)?;
    match shape.kind {
        MapType::PercpuArray => Ok(shape),
        _ => Err(errno(libc::EINVAL)),
    }
}

/// Waits until no packet is in a program that was running when this was called: one RCU grace
/// period.
///
/// By updating a map of maps, which waits for one before it returns, so that the old inner map can
/// be relied upon to be unused (kernels from 5.0 on). `membarrier(2)` would be the plain way, but
/// its global command is refused where `nohz_full` CPUs exist, and the others wait for the caller's
/// own threads only.
pub fn wait_rcu() -> io::Result<()> {
    let inner = map_create(MapType::Array, "pc_rcu_inner", 4, 4, 1, 0)?;
    let outer = map_create_outer(MapType::ArrayOfMaps, "pc_rcu", 4, 1, &inner)?;
    let inner = inner.as_raw_fd().to_ne_bytes();
    map_update(&outer, &0u32.to_ne_bytes(), &inner, 0)
}

fn void(bytes: &[u8]) -> *const c_void {
    bytes.as_ptr().cast()
}

fn void_mut(bytes: &mut [u8]) -> *mut c_void {
    bytes.as_mut_ptr().cast()
}
