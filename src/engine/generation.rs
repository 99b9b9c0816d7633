// SPDX-License-Identifier: MIT OR Apache-2.0
//! Loads a graph: one specialised copy of a policy's program for each node, their PROG_ARRAYs and
//! counters, and the entry program that is attached.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use anyhow::{Context, Result, anyhow, bail};
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapType, ObjectBuilder, OpenMapMut};
use serde_json::Value;

use super::bpf::types::{self, node_config, node_flags};
use super::bpf::{self, ATTACHMENT_SIZE, CONTEXT_SIZE, STATS_SIZE, bytes_of};
use super::kernel;
use super::sets;
use super::sys;
use crate::error::Refused;
use crate::hook::{Family, Hook};
use crate::plan::{ArgumentUse, Graph, Node, Successor};
use crate::policy::btf::is_state;
use crate::policy::{ElementParam, FieldType, Kind, Names, Policy, Registry};
use crate::spec::{Cadence, Checksum, Keys, Mode};

/// In front of the name of every kernel object we make.
pub const PREFIX: &str = "pc_";
/// Name of the objects nodes are loaded from; their `.rodata` is called after it.
const OBJECT: &str = "pc_node";
/// Map that a policy declares for the devices its parameters name.
const DEVICES: &str = "pc_devices";
/// Map that a keyed selector looks packets up in.
const SET: &str = "set";

/// [`Generation::carrier`] of packets that carry their context in front of them.
pub const DATA_META: &str = "data_meta";

/// Where the context of packets lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CarrierChoice {
    /// In the packet; per CPU on devices that cannot carry it.
    #[default]
    Auto,
    PerCpu,
}

impl CarrierChoice {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            CarrierChoice::Auto => "auto",
            CarrierChoice::PerCpu => "percpu",
        }
    }
}

/// What loading a graph takes besides the graph.
pub struct Environment<'a> {
    pub hook: Hook,
    /// The device has no link header: packets begin with IP.
    pub no_link: bool,
    pub carrier: CarrierChoice,
    pub registry: &'a Registry,
    /// What names stand for.
    pub names: &'a dyn Names,
    /// Named sets.
    pub sets: &'a BTreeMap<String, OwnedFd>,
    /// How far TCP checksums are done on arrival.
    pub checksum: Checksum,
    /// The maps of [`Graph::state`] that there are already, by name. Those that fit are used, the
    /// others are made anew.
    pub state: &'a BTreeMap<String, OwnedFd>,
}

/// A loaded graph. It runs once its entry program is attached.
pub struct Generation {
    pub entry: OwnedFd,
    /// Does nothing; what replaced slots are overwritten with.
    pub stub: OwnedFd,
    /// The nodes by index.
    pub nodes: OwnedFd,
    /// First nodes of sub-chains by chain id.
    pub chains: OwnedFd,
    /// Counters: nodes by index, and behind them those of the entry.
    pub counters: OwnedFd,
    /// What is known once it is attached.
    attachment: OwnedFd,
    /// The maps of [`Graph::state`], by name.
    pub state: BTreeMap<String, OwnedFd>,
    pub node_count: usize,
    pub carrier: &'static str,
    /// Its maps are pinned, and stay when this is dropped.
    pub pinned: bool,
}

/// Loads `graph`.
///
/// # Errors
/// What the kernel refuses, with the node and the end of the verifier's log.
pub fn load(graph: &Graph, environment: &Environment<'_>) -> Result<Generation> {
    kernel::require()?;
    let count = u32::try_from(graph.nodes.len()).context("too many nodes")?;
    let heads = graph.heads.keys().max().map_or(1, |id| id + 1);
    let shared = Shared {
        nodes: create(MapType::ProgArray, "pc_nodes", 4, count.max(1))?,
        chains: create(MapType::ProgArray, "pc_chains", 4, heads)?,
        counters: create(MapType::PercpuArray, "pc_counters", STATS_SIZE, count + 1)?,
        context: create(MapType::PercpuArray, "pc_context", CONTEXT_SIZE, 1)?,
        attachment: create(MapType::Array, "pc_attachment", ATTACHMENT_SIZE, 1)?,
    };
    let carrier = match environment.carrier {
        _ if !graph.has_context => types::carrier::CARRIER_NONE,
        CarrierChoice::Auto => types::carrier::CARRIER_PACKET,
        CarrierChoice::PerCpu => types::carrier::CARRIER_PERCPU,
    };
    let mut loader = Loader {
        environment,
        shared: &shared,
        carrier: carrier.0,
        private: BTreeMap::new(),
        wanted: &graph.state,
        state: BTreeMap::new(),
    };
    for (index, node) in graph.nodes.iter().enumerate() {
        let index = u32::try_from(index).context("too many nodes")?;
        let program = loader
            .node(node, index)
            .with_context(|| format!("load {} for {}", node.name(), environment.hook))?;
        put_program(&shared.nodes, index, &program)?;
        for (id, head) in &graph.heads {
            if *head == Successor::Node(index as usize) {
                put_program(&shared.chains, *id, &program)?;
            }
        }
    }
    let (entry, stub) = loader
        .entry(graph.entry, count)
        .with_context(|| format!("load the entry program for {}", environment.hook))?;
    let state = loader.state;
    Ok(Generation {
        entry,
        stub,
        nodes: shared.nodes,
        chains: shared.chains,
        counters: shared.counters,
        attachment: shared.attachment,
        state,
        node_count: graph.nodes.len(),
        carrier: carrier_name(environment.hook, carrier),
        pinned: false,
    })
}

impl Generation {
    /// Tells the programs how the entry is attached; before it is.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn set_mode(&self, mode: Mode) -> Result<()> {
        let attachment = types::attachment {
            generic: u32::from(mode == Mode::Generic),
        };
        sys::map_update(
            &self.attachment,
            &0u32.to_ne_bytes(),
            bytes_of(&attachment),
            0,
        )
        .context("tell the programs how they are attached")
    }

    /// Zeroes all counters.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn zero_counters(&self) -> Result<()> {
        let entries = u32::try_from(self.node_count + 1).context("too many nodes")?;
        sys::percpu_zero(&self.counters, entries, STATS_SIZE as usize).context("zero the counters")
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if self.pinned {
            return;
        }
        for array in [&self.nodes, &self.chains] {
            // The kernel releases it in any case, only more slowly.
            drop(overwrite(array, &self.stub));
        }
    }
}

/// Overwrites every slot of a PROG_ARRAY with a program that does nothing. To be done before the
/// array is released, when no packet runs in it any more: the kernel clears slots one by one and
/// waits for each direct call site.
///
/// # Errors
/// What the kernel says.
pub fn overwrite(array: impl AsFd, stub: impl AsFd) -> Result<()> {
    let info = sys::map_info(&array).context("look at a program array")?;
    for slot in 0..info.max_entries {
        let key = slot.to_ne_bytes();
        let used = sys::map_lookup(&array, &key, 4).context("read a program array")?;
        if used.is_some() {
            put_program(&array, slot, &stub)?;
        }
    }
    Ok(())
}

fn checksum_value(checksum: Checksum) -> u32 {
    let value = match checksum {
        Checksum::Auto => types::checksum::CHECKSUM_AUTO,
        Checksum::Complete => types::checksum::CHECKSUM_COMPLETE,
        Checksum::Partial => types::checksum::CHECKSUM_PARTIAL,
    };
    value.0
}

fn carrier_name(hook: Hook, carrier: types::carrier) -> &'static str {
    match (carrier, hook.family()) {
        (types::carrier::CARRIER_PACKET, Family::Xdp) => DATA_META,
        (types::carrier::CARRIER_PACKET, Family::Tc) => "cb",
        (types::carrier::CARRIER_PERCPU, _) => "percpu",
        _ => "none",
    }
}

/// The maps all nodes of a generation use.
struct Shared {
    nodes: OwnedFd,
    chains: OwnedFd,
    counters: OwnedFd,
    context: OwnedFd,
    attachment: OwnedFd,
}

struct Loader<'a> {
    environment: &'a Environment<'a>,
    shared: &'a Shared,
    carrier: u32,
    /// Scratch maps the policies bring, shared by the nodes that name them alike.
    private: BTreeMap<String, OwnedFd>,
    /// Names of the maps that are kept from one generation to the next.
    wanted: &'a BTreeSet<String>,
    /// Those of them that are there.
    state: BTreeMap<String, OwnedFd>,
}

impl Loader<'_> {
    fn node(&mut self, node: &Node, index: u32) -> Result<OwnedFd> {
        let registry = self.environment.registry;
        let policy = match node.kind {
            _ if node.is_learner() => registry.learner(),
            Kind::Selector => registry.selector(&node.policy),
            Kind::Action => registry.action(&node.policy),
        }
        .ok_or_else(|| anyhow!("no policy {}", node.policy))?;
        let (params, element) = self.params(node, policy)?;
        let config = self.node_config(node, index, element);
        let keys = self.keys(node, policy)?;
        let mut object = ObjectBuilder::default()
            .name(OBJECT)?
            .open_memory(policy.object(self.environment.hook.family()))?;
        let mut own = Vec::new();
        for mut map in object.maps_mut() {
            let name = map.name().to_string_lossy().into_owned();
            if name.ends_with(".rodata") {
                let Some(rodata) = map.initial_value_mut() else {
                    bail!("the policy's constants have no initial value");
                };
                write_at(rodata, policy.node_offset, bytes_of(&config))?;
                write_at(rodata, policy.params_offset, &params)?;
            } else if name == SET {
                match &keys {
                    Some(set) => map.reuse_fd(set.as_fd())?,
                    None => map.set_autocreate(false)?,
                }
            } else if is_state(&name) && !self.wanted.contains(&name) {
                // Its parameters say that the node does without.
                map.set_autocreate(false)?;
            } else if let Some(shared) = self.shared_map(&name) {
                map.reuse_fd(shared)?;
            } else if let Some(known) = self.known(&map)? {
                map.reuse_fd(known.as_fd())?;
                self.state.insert(name, known);
            } else {
                own.push(name);
            }
        }
        let object = object.load().map_err(load_error)?;
        for map in object.maps() {
            let name = map.name().to_string_lossy().into_owned();
            if name == DEVICES {
                self.fill_devices(map.as_fd(), policy, &params)?;
            } else if own.contains(&name) && is_state(&name) {
                self.state.insert(name, map.as_fd().try_clone_to_owned()?);
            } else if own.contains(&name) {
                self.private.insert(name, map.as_fd().try_clone_to_owned()?);
            }
        }
        let program = object.progs().next().context("the policy has no program")?;
        Ok(program.as_fd().try_clone_to_owned()?)
    }

    fn shared_map(&self, name: &str) -> Option<BorrowedFd<'_>> {
        let map = match name {
            "pc_nodes" => &self.shared.nodes,
            "pc_chains" => &self.shared.chains,
            "pc_counters" => &self.shared.counters,
            "pc_context" => &self.shared.context,
            "pc_attachment" => &self.shared.attachment,
            other => self.private.get(other).or(self.state.get(other))?,
        };
        Some(map.as_fd())
    }

    /// A map that was kept, if it is of the shape the object wants.
    fn known(&self, map: &OpenMapMut<'_>) -> Result<Option<OwnedFd>> {
        let Some(known) = self.environment.state.get(&*map.name().to_string_lossy()) else {
            return Ok(None);
        };
        let info = sys::map_info(known).context("look at a map that was kept")?;
        let fits = (info.kind, info.key_size, info.value_size, info.max_entries)
            == (
                map.map_type(),
                map.key_size(),
                map.value_size(),
                map.max_entries(),
            );
        Ok(fits.then(|| known.try_clone()).transpose()?)
    }

    fn params(&self, node: &Node, policy: &Policy) -> Result<(Vec<u8>, Option<ElementParam>)> {
        let Some(layout) = &policy.params else {
            return Ok((Vec::new(), None));
        };
        let allow = node.kind == Kind::Action;
        let packed = layout
            .pack(
                &node.params,
                &node.origin.path,
                &[],
                self.environment.names,
                allow,
            )
            .map_err(|invalid| match &node.origin.file {
                Some(file) => invalid.in_file(file),
                None => invalid,
            })?;
        Ok((packed.bytes, packed.element))
    }

    fn node_config(&self, node: &Node, slot: u32, element: Option<ElementParam>) -> node_config {
        let mut flags = self.flags();
        if node.negate {
            flags |= node_flags::NODE_NEGATE.0;
        }
        if node.keys != Keys::None {
            flags |= node_flags::NODE_SET.0;
        }
        flags |= match node.argument {
            ArgumentUse::Leave => 0,
            ArgumentUse::Clear => node_flags::NODE_CLEAR_ARGUMENT.0,
            ArgumentUse::Store => node_flags::NODE_STORE_ARGUMENT.0,
        };
        let mut config = node_config {
            slot,
            next: successor_value(node.next),
            otherwise: successor_value(node.otherwise),
            later: successor_value(node.later),
            chain: node.chain_id,
            flags,
            carrier: self.carrier,
            checksum: checksum_value(self.environment.checksum),
            ..node_config::default()
        };
        match node.cadence {
            Cadence::Always => {}
            Cadence::First(count) => config.cadence_first = count,
            Cadence::Every(span) => config.cadence_every = span,
        }
        if node.cadence != Cadence::Always {
            config.cadence_id = self.cadence_id(node);
        }
        if let Some(param) = element {
            config.argument_at = 1 + param.offset as u32;
            config.argument_swap = if param.big_endian {
                param.size as u32
            } else {
                0
            };
            if param.is_chain {
                config.flags |= node_flags::NODE_ARGUMENT_IS_CHAIN.0;
            }
            config.argument_min = param.min;
            config.argument_max = param.max;
        }
        config
    }

    /// Tells actions apart in the map of when they were done, as long as they stay what they are.
    fn cadence_id(&self, node: &Node) -> u32 {
        let mut params = node.params.clone();
        params.sort_keys();
        let mut hasher = DefaultHasher::new();
        let params = Value::Object(params).to_string();
        (self.environment.hook, node.name(), params, node.cadence).hash(&mut hasher);
        hasher.finish() as u32
    }

    /// The flags all nodes of the generation have.
    fn flags(&self) -> u32 {
        let mut flags = 0;
        if self.environment.hook.is_ingress() {
            flags |= node_flags::NODE_INGRESS.0;
        }
        if self.environment.no_link {
            flags |= node_flags::NODE_NO_LINK.0;
        }
        flags
    }

    /// The set a selector looks packets up in, made here for inline keys.
    fn keys(&self, node: &Node, policy: &Policy) -> Result<Option<OwnedFd>> {
        match &node.keys {
            Keys::None => Ok(None),
            Keys::Set(name) => {
                let set = self
                    .environment
                    .sets
                    .get(name)
                    .with_context(|| format!("the set {name} is not loaded"))?;
                Ok(Some(set.try_clone()?))
            }
            Keys::Inline(keys) => {
                let key = policy.key.as_ref().context("the selector takes no keys")?;
                let size = u32::try_from(keys.len()).context("too many keys")?;
                let set = sets::create(self.environment.registry, &key.kind, "pc_keys", size)?;
                let path = format!("{}.keys", node.origin.path);
                sets::store(&set, &key.layout, keys, &path, self.environment.names)?;
                Ok(Some(set))
            }
        }
    }

    /// Lets a program redirect to the devices its parameters name.
    fn fill_devices(&self, map: BorrowedFd<'_>, policy: &Policy, params: &[u8]) -> Result<()> {
        let fields = policy.params.iter().flat_map(|layout| &layout.fields);
        for field in fields.filter(|field| field.ty == FieldType::Device) {
            let Some(index) = params.get(field.offset..field.offset + 4) else {
                continue;
            };
            if index != [0; 4] {
                sys::map_update(map, index, index, 0)
                    .context("make the device a target of redirects")?;
            }
        }
        Ok(())
    }

    /// The entry program and the stub.
    fn entry(&self, first: Successor, slot: u32) -> Result<(OwnedFd, OwnedFd)> {
        let config = node_config {
            slot,
            next: successor_value(first),
            otherwise: types::successor::SUCCESSOR_PASS.0,
            flags: self.flags(),
            carrier: self.carrier,
            ..node_config::default()
        };
        match self.environment.hook.family() {
            Family::Xdp => self.entry_xdp(config),
            Family::Tc => self.entry_tc(config),
        }
    }
}

/// One function for each skeleton: their types differ though their members do not.
macro_rules! entry_from_skeleton {
    ($function:ident, $module:ident) => {
        impl Loader<'_> {
            fn $function(&self, config: node_config) -> Result<(OwnedFd, OwnedFd)> {
                let mut storage = MaybeUninit::uninit();
                let builder = bpf::$module::PcEntrySkelBuilder::default();
                let mut open = builder.open(&mut storage)?;
                let rodata = open
                    .maps
                    .rodata_data
                    .as_deref_mut()
                    .context("the entry program has no constants")?;
                plain::copy_from_bytes(&mut rodata.node, bytes_of(&config))
                    .map_err(|_| anyhow!("the hooks disagree on node_config"))?;
                open.maps.pc_nodes.reuse_fd(self.shared.nodes.as_fd())?;
                open.maps
                    .pc_counters
                    .reuse_fd(self.shared.counters.as_fd())?;
                open.maps.pc_context.reuse_fd(self.shared.context.as_fd())?;
                open.maps.pc_chains.reuse_fd(self.shared.chains.as_fd())?;
                open.maps
                    .pc_attachment
                    .reuse_fd(self.shared.attachment.as_fd())?;
                let skeleton = open.load().map_err(load_error)?;
                Ok((
                    skeleton.progs.pc_entry.as_fd().try_clone_to_owned()?,
                    skeleton.progs.pc_stub.as_fd().try_clone_to_owned()?,
                ))
            }
        }
    };
}

entry_from_skeleton!(entry_xdp, xdp);
entry_from_skeleton!(entry_tc, tc);

// SAFETY: the same C struct as `bpf::types::node_config`, from the other compilation.
unsafe impl plain::Plain for bpf::tc::types::node_config {}

fn successor_value(successor: Successor) -> u32 {
    match successor {
        Successor::Node(index) => index as u32,
        Successor::Pass => types::successor::SUCCESSOR_PASS.0,
        Successor::Drop => types::successor::SUCCESSOR_DROP.0,
    }
}

fn write_at(to: &mut [u8], offset: usize, bytes: &[u8]) -> Result<()> {
    to.get_mut(offset..offset + bytes.len())
        .context("the policy's constants are smaller than its BTF says")?
        .copy_from_slice(bytes);
    Ok(())
}

fn create(kind: MapType, name: &str, value_size: u32, entries: u32) -> Result<OwnedFd> {
    sys::map_create(kind, name, 4, value_size, entries, 0)
        .map_err(|error| kernel_error(format!("create the map {name}"), &error))
}

fn put_program(array: impl AsFd, slot: u32, program: impl AsFd) -> Result<()> {
    use std::os::fd::AsRawFd;
    let value = program.as_fd().as_raw_fd().to_ne_bytes();
    sys::map_update(array, &slot.to_ne_bytes(), &value, 0)
        .map_err(|error| kernel_error(format!("put a program into slot {slot}"), &error))
}

/// An error of the kernel as one users can act on, where it is about permission.
pub(super) fn kernel_error(what: String, error: &std::io::Error) -> anyhow::Error {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => Refused::denied(
            what,
            error,
            "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
        )
        .into(),
        _ => anyhow!(error.to_string()).context(what),
    }
}

/// Adds what libbpf and the verifier said.
fn load_error(error: libbpf_rs::Error) -> anyhow::Error {
    const LINES: usize = 12;
    let log = sys::take_log();
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    let end = lines[lines.len().saturating_sub(LINES)..].join("\n");
    let denied = matches!(error.kind(), libbpf_rs::ErrorKind::PermissionDenied);
    // The verifier says so too, of what a program does, and ends its log with what it processed.
    if denied && !end.is_empty() && !end.contains("processed") {
        return kernel_error(
            "load a BPF program".to_owned(),
            &std::io::Error::from_raw_os_error(libc::EPERM),
        );
    }
    anyhow!("{error}\n{end}")
}
