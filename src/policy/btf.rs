// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a compiled policy says about itself: its kind, documentation, parameters and set keys,
//! read from the BTF of its object.
//!
//! The build script includes this file too, so that a policy which breaks a rule fails the build.
//! It therefore depends on libbpf-rs and anyhow only.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use libbpf_rs::btf::types::{
    Array as BtfArray, DataSec, DeclTag, Enum, Enum64, Func, Int, IntEncoding, Linkage, MemberAttr,
    Ptr, Struct, Var,
};
use libbpf_rs::btf::{Btf, BtfKind, BtfType, HasSize, ReferencesType, TypeId};

/// Hook names a `hooks:` tag may list; the ones of `hook::Hook`.
pub const HOOKS: [&str; 3] = ["xdp", "tc-ingress", "tc-egress"];

/// JSON keys of a selector or action object that belong to the engine.
pub const RESERVED: [&str; 11] = [
    "selector", "op", "not", "set", "keys", "action", "on_error", "from", "once", "every", "first",
];

/// JSON keys that stand beside the members of a set's key.
pub const RESERVED_IN_KEY: [&str; 3] = ["arg", "chain", "expire"];

/// Typedefs a parameter may have, for messages.
const VOCABULARY: &str = "__u8 __u16 __u32 __u64 __be16 __be32 __be64 bool enum ip_t prefix_t \
     mac_t device_t chain_t token_t port_t port_range_t duration_t bytes_t";

/// In front of the names of maps that are kept from one generation to the next, by who shares
/// them: all hooks of a device, or all of a network namespace.
pub const STATE_PREFIXES: [&str; 2] = ["pcd_", "pcn_"];
/// Map of when actions were last done; of every action, but needed only by one with a cadence.
pub const CADENCE: &str = "pcd_cadence";
/// Map of when connections began; as [`CADENCE`], and a learner at the same hook fills it.
pub const OPENINGS: &str = "pcd_openings";
/// Maps that learners fill: who opened a connection,
pub const FLOWS: &str = "pcd_flows";
/// what is known of subflows,
pub const SUBFLOWS: &str = "pcd_subflows";
/// tokens to the peers' tokens,
pub const CONNECTIONS: &str = "pcn_connections";
/// and to keys,
pub const KEYS: &str = "pcn_keys";
/// the last segment of each end,
pub const ACKS: &str = "pcd_acks";
/// announcements that are held back: actions fill it, a learner empties it.
pub const HELD: &str = "pcd_held";
/// The ring buffer of reports.
pub const EVENTS: &str = "pcn_events";

/// What a policy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Answers match or miss.
    Selector,
    /// Does something to or with the packet.
    Action,
}

impl Kind {
    /// `selector` or `action`: the tag, and the JSON key that names the policy.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Selector => "selector",
            Kind::Action => "action",
        }
    }
}

/// A policy as its object describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    pub name: String,
    pub kind: Kind,
    pub doc: String,
    /// An action that ends the chain unless it gives up.
    pub terminal: bool,
    /// Hooks the policy can run at, a subset of [`HOOKS`] in that order.
    pub hooks: Vec<String>,
    /// None when the policy takes no parameters.
    pub params: Option<Layout>,
    /// Offset of `params` in `.rodata`, in bytes; 0 without parameters.
    pub params_offset: usize,
    /// Offset of `node` in `.rodata`, in bytes.
    pub node_offset: usize,
    /// Key of the map `set`, if the object has one.
    pub key: Option<Key>,
    /// Maps it uses that are kept from one generation to the next, by name; see
    /// [`Field::stateless`] and [`Field::stateful`].
    pub state: Vec<String>,
    /// An action that is done once per flow unless the chain says otherwise.
    pub once: bool,
}

/// The key of a set, from `struct KIND_key`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Kind of the sets that have this key, such as `flow`.
    pub kind: String,
    pub layout: Layout,
}

/// A documented struct.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Name of the C struct.
    pub name: String,
    /// Size in bytes, padding included.
    pub size: usize,
    /// Members in order; length companions and padding are not among them.
    pub fields: Vec<Field>,
}

/// A member of a [`Layout`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    pub name: String,
    pub doc: String,
    /// Offset in the struct, in bytes.
    pub offset: usize,
    /// Type of the member, or of one item if `array` is set.
    pub ty: FieldType,
    pub required: bool,
    /// Value when none is given: JSON, or a string if it is not JSON.
    pub default: Option<String>,
    /// Inclusive bounds of an integer, an enum's plain number, a bool (`1..1`: must be true), or a
    /// duration in nanoseconds.
    pub range: Option<(u64, u64)>,
    /// Bounds that hold where a bool is true.
    pub limit: Option<Limit>,
    /// A value that not every hook has.
    pub only: Option<Only>,
    /// A bool: true says that the policy does without the maps that are kept.
    pub stateless: bool,
    /// The one value with which the policy uses the maps that are kept.
    pub stateful: Option<String>,
    /// A value that is refused unless a bool is true.
    pub guard: Option<Guard>,
    pub array: Option<Array>,
}

/// Inclusive bounds of a member that hold where another, a bool, is true.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Name of the bool.
    pub when: String,
    pub low: u64,
    pub high: u64,
}

/// A value that is refused unless a bool is true.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    /// As in chain files.
    pub value: String,
    /// Name of the bool.
    pub by: String,
    /// What the value would do.
    pub why: String,
}

/// A value that only some hooks have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Only {
    /// As in chain files.
    pub value: String,
    pub hooks: Vec<String>,
    /// Why the others do not.
    pub why: String,
}

impl Field {
    /// Offset of the first byte after the member and its length companion.
    fn end(&self) -> usize {
        match &self.array {
            None => self.offset + self.ty.size(),
            Some(array) => (self.offset + self.ty.size() * array.capacity)
                .max(array.length_offset + array.length_size),
        }
    }
}

/// Where an array member keeps its items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Array {
    /// Most items it holds.
    pub capacity: usize,
    /// Offset of the companion that counts the items, in bytes from the start of the struct.
    pub length_offset: usize,
    /// Size of the companion in bytes; host byte order.
    pub length_size: usize,
}

/// How JSON becomes bytes. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FieldType {
    Unsigned {
        size: usize,
        big_endian: bool,
    },
    Bool,
    /// One enumerator, or with `flags` the OR of several; host byte order.
    Enum {
        size: usize,
        flags: bool,
        /// JSON names with their values, in the order of the C source.
        names: Vec<(String, u64)>,
    },
    /// 16 bytes, IPv4 as `::ffff:a.b.c.d`; all zero means absent.
    Ip,
    /// Host-order length in the 128-bit space, then 16 bytes of address.
    Prefix,
    /// 6 bytes.
    Mac,
    /// Host-order interface index.
    Device,
    /// Host-order chain id.
    Chain,
    /// Host-order token of an MPTCP connection.
    Token,
    /// 2 bytes, network order.
    Port,
    /// First and last port, inclusive, 2 bytes each, host order.
    PortRange,
    /// Nanoseconds, 8 bytes, host order.
    Duration,
    /// One byte of a byte string; always an array.
    Bytes,
}

impl FieldType {
    /// Size of one item in bytes.
    pub fn size(&self) -> usize {
        match self {
            FieldType::Unsigned { size, .. } | FieldType::Enum { size, .. } => *size,
            FieldType::Bool | FieldType::Bytes => 1,
            FieldType::Ip => 16,
            FieldType::Prefix => 20,
            FieldType::Mac => 6,
            FieldType::Device | FieldType::Chain | FieldType::Token | FieldType::PortRange => 4,
            FieldType::Port => 2,
            FieldType::Duration => 8,
        }
    }
}

/// Reads the description of policy `name` (its file's stem) from the bytes of its object.
///
/// # Errors
/// If the bytes are no BPF object with BTF, or the policy breaks a rule: wrong program name,
/// missing documentation, unknown type or tag, reserved name. The message names policy and member
/// and says what to change.
pub fn read(object: &[u8], name: &str) -> Result<Description> {
    describe(object, name).map_err(|error| anyhow!("policy {name}: {error:#}"))
}

/// The enumerators of `enum name` in an object's BTF, in order, as [`Description`]s name them.
///
/// # Errors
/// If the object has no BTF or no such enum.
pub fn enumerators_of(object: &[u8], name: &str) -> Result<Vec<String>> {
    let btf = Btf::from_raw(name, object)
        .context("cannot be opened as a BPF object")?
        .context("the object has no BTF: compile it with clang -g")?;
    let ty = btf
        .type_by_kind::<BtfType<'_>>()
        .find(|ty| ty.is_any_enum() && name_of(ty) == Some(name))
        .with_context(|| format!("enum {name} is not in the object's BTF"))?;
    let values = enum_values(ty)?.map(|(_, values)| values);
    let names = enumerators(name, values.unwrap_or_default())?;
    Ok(names.into_iter().map(|(name, _)| name).collect())
}

fn describe(object: &[u8], name: &str) -> Result<Description> {
    ensure!(
        !name.is_empty() && !name.contains('\0'),
        "not a usable policy name"
    );
    let btf = Btf::from_raw(name, object)
        .context("cannot be opened as a BPF object")?
        .context("the object has no BTF: compile it with clang -g")?;
    let reader = Reader::new(&btf);
    let function = reader.program(name)?;
    let rodata = reader.section_variables(".rodata")?;
    let node = rodata
        .get("node")
        .context("has no `node` in .rodata: include \"policy.h\"")?;
    let params = rodata.get("params");
    Ok(Description {
        name: name.to_owned(),
        kind: function.kind,
        doc: function.doc,
        terminal: function.terminal,
        hooks: function.hooks,
        params_offset: params.map_or(0, |params| params.offset),
        params: params
            .map(|params| reader.parameters(params.ty))
            .transpose()?,
        node_offset: node.offset,
        key: reader.set_key()?,
        state: reader
            .section_variables(".maps")?
            .into_keys()
            .filter(|map| is_state(map) && ![CADENCE, OPENINGS].contains(map))
            .map(str::to_owned)
            .collect(),
        once: function.once,
    })
}

/// Whether a map is kept from one generation to the next, by its name.
pub fn is_state(map: &str) -> bool {
    STATE_PREFIXES.iter().any(|prefix| map.starts_with(prefix))
}

/// What the tags of the program's function say.
struct Function {
    once: bool,
    kind: Kind,
    doc: String,
    terminal: bool,
    hooks: Vec<String>,
}

/// A global variable of a section.
struct Variable<'a> {
    /// Offset in the section, in bytes.
    offset: usize,
    ty: BtfType<'a>,
}

/// A member of a struct before its tags are understood.
struct Member<'a> {
    name: &'a str,
    /// In bytes.
    offset: usize,
    ty: BtfType<'a>,
    tags: &'a [&'a str],
}

/// The tags of a member, sorted out.
#[derive(Default)]
struct Tags<'a> {
    doc: Option<&'a str>,
    required: bool,
    default: Option<&'a str>,
    range: Option<(u64, u64)>,
    limit: Option<Limit>,
    only: Option<Only>,
    stateless: bool,
    stateful: Option<&'a str>,
    guard: Option<Guard>,
    flags: bool,
}

struct Reader<'a> {
    btf: &'a Btf<'a>,
    /// Tags by type and, for a member, its index.
    tags: BTreeMap<(TypeId, Option<u32>), Vec<&'a str>>,
}

impl<'a> Reader<'a> {
    fn new(btf: &'a Btf<'a>) -> Self {
        let mut tags: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for tag in btf.type_by_kind::<DeclTag<'a>>() {
            let place = (tag.referenced_type_id(), tag.component_index());
            tags.entry(place).or_default().extend(name_of(&tag));
        }
        Reader { btf, tags }
    }

    fn tags(&self, ty: TypeId, component: Option<u32>) -> &[&'a str] {
        self.tags
            .get(&(ty, component))
            .map_or(&[], |tags| tags.as_slice())
    }

    fn program(&self, name: &str) -> Result<Function> {
        let wanted = format!("pc_{name}");
        let tagged: Vec<Func<'a>> = self
            .btf
            .type_by_kind::<Func<'a>>()
            .filter(|function| {
                self.tags(function.type_id(), None)
                    .iter()
                    .any(|tag| kind_of_tag(tag).is_some())
            })
            .collect();
        let function = match tagged.as_slice() {
            [one] => one,
            [] => bail!(
                "no function carries the tag \"selector\" or \"action\": \
                 define the program with SELECTOR({name}, ...) or ACTION({name}, ...)"
            ),
            _ => bail!("more than one function is tagged as a policy: one policy a file"),
        };
        let found = name_of(function).unwrap_or_default();
        ensure!(
            found == wanted,
            "the program is called `{found}`, expected `{wanted}` after the file's name"
        );
        function_tags(self.tags(function.type_id(), None))
    }

    fn section_variables(&self, section: &str) -> Result<BTreeMap<&'a str, Variable<'a>>> {
        let mut variables = BTreeMap::new();
        let Some(section) = self
            .btf
            .type_by_kind::<DataSec<'a>>()
            .find(|candidate| name_of(candidate) == Some(section))
        else {
            return Ok(variables);
        };
        for entry in (0..section.len()).filter_map(|index| section.get(index)) {
            let Some(variable) = self.btf.type_by_id::<Var<'a>>(entry.ty) else {
                continue;
            };
            let Some(name) = name_of(&variable) else {
                continue;
            };
            // libbpf finds the offset of a global variable only; a static one would read 0.
            if matches!(name, "node" | "params" | "set") {
                ensure!(
                    variable.linkage() == Linkage::Global,
                    "`{name}` must not be static"
                );
            }
            let variable = Variable {
                offset: entry.offset as usize,
                ty: variable.referenced_type(),
            };
            variables.insert(name, variable);
        }
        Ok(variables)
    }

    fn parameters(&self, ty: BtfType<'a>) -> Result<Layout> {
        let layout = self
            .layout(as_struct(ty).context("`params` is not a struct")?)
            .context("struct params")?;
        refuse_names(&layout, &RESERVED)?;
        check_limits(&layout)?;
        Ok(layout)
    }

    fn set_key(&self) -> Result<Option<Key>> {
        let maps = self.section_variables(".maps")?;
        let Some(set) = maps.get("set") else {
            return Ok(None);
        };
        let map = as_struct(set.ty).context("map `set` is not defined by a struct")?;
        let key = self
            .map_type(&map, "key")
            .context("map `set` must have __type(key, struct KIND_key)")?;
        let value = self
            .map_type(&map, "value")
            .context("map `set` must have __type(value, struct element)")?;
        ensure!(
            name_of(&value) == Some("element") && value.size() == 16,
            "map `set` must have __type(value, struct element) of 16 bytes"
        );
        let name = name_of(&key).unwrap_or_default();
        let kind = name
            .strip_suffix("_key")
            .filter(|kind| !kind.is_empty())
            .with_context(|| {
                format!("the key of map `set` is struct `{name}`, expected a name like `flow_key`")
            })?;
        let context = || format!("struct {name}");
        let layout = self.layout(key).with_context(context)?;
        self.refuse_holes(&key).with_context(context)?;
        refuse_names(&layout, &RESERVED)?;
        refuse_names(&layout, &RESERVED_IN_KEY)?;
        let kind = kind.to_owned();
        Ok(Some(Key { kind, layout }))
    }

    /// The struct a map's member points to: `__type(key, struct x)` declares `struct x *key`.
    fn map_type(&self, map: &Struct<'a>, member: &str) -> Option<Struct<'a>> {
        (0..map.len())
            .filter_map(|index| map.get(index))
            .find(|candidate| candidate.name.and_then(|name| name.to_str()) == Some(member))
            .and_then(|found| self.btf.type_by_id::<Ptr<'a>>(found.ty))
            .and_then(|pointer| as_struct(pointer.referenced_type()))
    }

    /// A key is compared byte by byte, and the compiler leaves implicit padding unset.
    fn refuse_holes(&self, key: &Struct<'a>) -> Result<()> {
        let mut end = 0;
        for index in 0..key.len() {
            let member = self.member(key, index)?;
            ensure!(
                member.offset == end,
                "a hole of {} bytes before `{}`: name it, as in `__u8 pad[{0}];`",
                member.offset.saturating_sub(end),
                member.name
            );
            end = member.offset + self.size_of(member.ty)?;
        }
        let hole = key.size().saturating_sub(end);
        ensure!(
            hole == 0,
            "a hole of {hole} bytes at the end: name it, as in `__u8 pad[{hole}];`"
        );
        Ok(())
    }

    fn size_of(&self, ty: BtfType<'a>) -> Result<usize> {
        let ty = ty.skip_mods_and_typedefs();
        if let Ok(array) = BtfArray::try_from(ty) {
            return Ok(array.capacity() * self.size_of(array.contained_type())?);
        }
        Int::try_from(ty)
            .map(|int| int.size())
            .or_else(|ty| Struct::try_from(ty).map(|composite| composite.size()))
            .or_else(|ty| Enum::try_from(ty).map(|enumeration| enumeration.size()))
            .or_else(|ty| Enum64::try_from(ty).map(|enumeration| enumeration.size()))
            .map_err(|ty| anyhow!("a member of kind {:?} has no known size", ty.kind()))
    }

    fn layout(&self, composite: Struct<'a>) -> Result<Layout> {
        let members: Vec<Member<'_>> = (0..composite.len())
            .map(|index| self.member(&composite, index))
            .collect::<Result<_>>()?;
        let mut fields = Vec::new();
        for member in &members {
            if is_padding(member) || companion_of(member, &members).is_some() {
                continue;
            }
            let field = self
                .field(member, &members)
                .with_context(|| format!("member `{}`", member.name))?;
            ensure!(
                field.end() <= composite.size(),
                "member `{}` ends past the struct",
                member.name
            );
            fields.push(field);
        }
        Ok(Layout {
            name: name_of(&composite).unwrap_or_default().to_owned(),
            size: composite.size(),
            fields,
        })
    }

    fn member(&self, composite: &Struct<'a>, index: usize) -> Result<Member<'_>> {
        let member = composite
            .get(index)
            .with_context(|| format!("has no member {index}"))?;
        let name = member
            .name
            .and_then(|name| name.to_str())
            .with_context(|| format!("member {index} has no name"))?;
        let MemberAttr::Normal { offset } = member.attr else {
            bail!("member `{name}`: bit fields are not supported");
        };
        let ty = self
            .btf
            .type_by_id::<BtfType<'a>>(member.ty)
            .with_context(|| format!("member `{name}` has no type"))?;
        Ok(Member {
            name,
            offset: offset as usize / 8,
            ty,
            tags: self.tags(composite.type_id(), u32::try_from(index).ok()),
        })
    }

    fn field(&self, member: &Member<'_>, members: &[Member<'_>]) -> Result<Field> {
        let tags = member_tags(member.tags)?;
        let doc = tags
            .doc
            .context("is not documented: add __doc(\"...\") after its name")?;
        ensure!(
            !(tags.required && tags.default.is_some()),
            "is both required and has a default: drop one tag"
        );
        let array = as_array(member.ty);
        let item = array.map_or(member.ty, |array| array.contained_type());
        let mut ty = self.field_type(item, &tags)?;
        if let (FieldType::Enum { names, .. }, Some((low, high))) = (&mut ty, tags.range) {
            names.retain(|(_, value)| (low..=high).contains(value));
        }
        let array = match array {
            Some(array) => Some(self.array(member.name, array.capacity(), members)?),
            None => None,
        };
        check_tags(&ty, array.is_some(), &tags)?;
        Ok(Field {
            name: member.name.to_owned(),
            doc: doc.to_owned(),
            offset: member.offset,
            ty,
            required: tags.required,
            default: tags.default.map(str::to_owned),
            range: tags.range,
            limit: tags.limit,
            only: tags.only,
            stateless: tags.stateless,
            stateful: tags.stateful.map(str::to_owned),
            guard: tags.guard,
            array,
        })
    }

    fn array(&self, name: &str, capacity: usize, members: &[Member<'_>]) -> Result<Array> {
        let companion = format!("{name}_len");
        let length = members
            .iter()
            .find(|member| member.name == companion)
            .with_context(|| format!("is an array without its length: add `__u8 {companion};`"))?;
        let FieldType::Unsigned {
            size,
            big_endian: false,
        } = self.named_type(length.ty)?
        else {
            bail!("its length `{companion}` must be a __u8, __u16, __u32 or __u64");
        };
        ensure!(capacity > 0, "is an array without room");
        ensure!(
            capacity as u64 <= max_of(size),
            "holds {capacity} items, more than `{companion}` can count"
        );
        Ok(Array {
            capacity,
            length_offset: length.offset,
            length_size: size,
        })
    }

    fn field_type(&self, ty: BtfType<'a>, tags: &Tags<'_>) -> Result<FieldType> {
        let mut ty = self.named_type(ty)?;
        if let FieldType::Enum { flags, .. } = &mut ty {
            *flags = tags.flags;
        }
        Ok(ty)
    }

    /// The type a typedef of the vocabulary, a `bool` or an enum stands for.
    fn named_type(&self, start: BtfType<'a>) -> Result<FieldType> {
        let mut ty = start;
        loop {
            if ty.kind() == BtfKind::Typedef {
                if let Some(found) = vocabulary(name_of(&ty).unwrap_or_default()) {
                    let size = self.size_of(ty)?;
                    ensure!(
                        size == found.size(),
                        "type `{}` has {size} bytes, expected {}",
                        name_of(&ty).unwrap_or_default(),
                        found.size()
                    );
                    return Ok(found);
                }
            } else if !ty.is_mod() {
                break;
            }
            ty = ty.next_type().context("has no type")?;
        }
        if let Ok(int) = Int::try_from(ty) {
            if matches!(int.encoding, IntEncoding::Bool) && int.size() == 1 {
                return Ok(FieldType::Bool);
            }
        }
        if let Some((size, values)) = enum_values(ty)? {
            let name = name_of(&ty).unwrap_or_default();
            return Ok(FieldType::Enum {
                size,
                flags: false,
                names: enumerators(name, values)?,
            });
        }
        bail!(
            "has type `{}`, which JSON cannot describe; known types: {VOCABULARY}",
            name_of(&start).unwrap_or("(unnamed)")
        )
    }
}

fn name_of<'a>(ty: &BtfType<'a>) -> Option<&'a str> {
    ty.name().and_then(|name| name.to_str())
}

fn as_struct(ty: BtfType<'_>) -> Option<Struct<'_>> {
    Struct::try_from(ty.skip_mods_and_typedefs()).ok()
}

/// An array, unless a typedef of the vocabulary hides it.
fn as_array(mut ty: BtfType<'_>) -> Option<BtfArray<'_>> {
    while ty.is_mod() {
        ty = ty.next_type()?;
    }
    BtfArray::try_from(ty).ok()
}

/// Greatest unsigned integer of `size` bytes.
pub fn max_of(size: usize) -> u64 {
    match size {
        0..=7 => (1 << (8 * size)) - 1,
        _ => u64::MAX,
    }
}

fn vocabulary(typedef: &str) -> Option<FieldType> {
    let unsigned = |size, big_endian| Some(FieldType::Unsigned { size, big_endian });
    match typedef {
        "__u8" => unsigned(1, false),
        "__u16" => unsigned(2, false),
        "__u32" => unsigned(4, false),
        "__u64" => unsigned(8, false),
        "__be16" => unsigned(2, true),
        "__be32" => unsigned(4, true),
        "__be64" => unsigned(8, true),
        "ip_t" => Some(FieldType::Ip),
        "prefix_t" => Some(FieldType::Prefix),
        "mac_t" => Some(FieldType::Mac),
        "device_t" => Some(FieldType::Device),
        "chain_t" => Some(FieldType::Chain),
        "token_t" => Some(FieldType::Token),
        "port_t" => Some(FieldType::Port),
        "port_range_t" => Some(FieldType::PortRange),
        "duration_t" => Some(FieldType::Duration),
        "bytes_t" => Some(FieldType::Bytes),
        _ => None,
    }
}

/// Size in bytes and enumerators as C names them.
type EnumValues = (usize, Vec<(String, i128)>);

/// Size and raw enumerators of an enum; none if `ty` is something else.
fn enum_values(ty: BtfType<'_>) -> Result<Option<EnumValues>> {
    let text = |name: Option<&std::ffi::OsStr>| {
        name.and_then(|name| name.to_str())
            .map(str::to_owned)
            .context("has an enumerator without a name")
    };
    if let Ok(found) = Enum::try_from(ty) {
        let values = (0..found.len())
            .filter_map(|index| found.get(index))
            .map(|member| Ok((text(member.name)?, i128::from(member.value))))
            .collect::<Result<_>>()?;
        return Ok(Some((found.size(), values)));
    }
    if let Ok(found) = Enum64::try_from(ty) {
        let values = (0..found.len())
            .filter_map(|index| found.get(index))
            .map(|member| Ok((text(member.name)?, member.value)))
            .collect::<Result<_>>()?;
        return Ok(Some((found.size(), values)));
    }
    Ok(None)
}

/// JSON names: without the enum's own name in front, in lower case. Names with two leading
/// underscores (`__X_MAX`) are bookkeeping and left out.
fn enumerators(name: &str, values: Vec<(String, i128)>) -> Result<Vec<(String, u64)>> {
    let prefix = format!("{}_", name.to_uppercase());
    let names: Vec<(String, u64)> = values
        .into_iter()
        .filter(|(enumerator, _)| !enumerator.starts_with("__"))
        .map(|(enumerator, value)| {
            let short = enumerator.strip_prefix(&prefix).unwrap_or(&enumerator);
            let value = u64::try_from(value)
                .map_err(|_| anyhow!("enumerator `{enumerator}` is negative"))?;
            Ok((short.to_lowercase(), value))
        })
        .collect::<Result<_>>()?;
    ensure!(!names.is_empty(), "enum {name} has no enumerators");
    Ok(names)
}

fn kind_of_tag(tag: &str) -> Option<Kind> {
    [Kind::Selector, Kind::Action]
        .into_iter()
        .find(|kind| kind.name() == tag)
}

fn function_tags(tags: &[&str]) -> Result<Function> {
    let mut kinds = tags.iter().filter_map(|tag| kind_of_tag(tag));
    let kind = kinds.next().context("has neither kind")?;
    ensure!(
        kinds.next().is_none(),
        "is tagged both \"selector\" and \"action\""
    );
    let mut function = Function {
        once: false,
        kind,
        doc: String::new(),
        terminal: false,
        hooks: HOOKS.map(str::to_owned).to_vec(),
    };
    for tag in tags.iter().filter(|tag| kind_of_tag(tag).is_none()) {
        match tag.split_once(':') {
            Some(("doc", text)) => function.doc = text.trim().to_owned(),
            Some(("hooks", list)) => function.hooks = hooks(list)?,
            None if *tag == "terminal" => function.terminal = true,
            None if *tag == "once" => function.once = true,
            _ => bail!("unknown tag \"{tag}\" on the program; known: doc: hooks: terminal once"),
        }
    }
    ensure!(
        !function.doc.is_empty(),
        "is not documented: say what it does in the second argument of {}(...)",
        kind.name().to_uppercase()
    );
    ensure!(
        !((function.terminal || function.once) && kind == Kind::Selector),
        "a selector can be neither terminal nor once"
    );
    Ok(function)
}

fn hooks(list: &str) -> Result<Vec<String>> {
    let listed: Vec<&str> = list.split(',').map(str::trim).collect();
    for hook in &listed {
        ensure!(
            HOOKS.contains(hook),
            "tag \"hooks:{list}\": unknown hook `{hook}`; known: {}",
            HOOKS.join(", ")
        );
    }
    Ok(HOOKS
        .into_iter()
        .filter(|hook| listed.contains(hook))
        .map(str::to_owned)
        .collect())
}

fn member_tags<'a>(tags: &[&'a str]) -> Result<Tags<'a>> {
    let mut found = Tags::default();
    for tag in tags {
        match tag.split_once(':') {
            Some(("doc", text)) => found.doc = Some(text.trim()).filter(|text| !text.is_empty()),
            Some(("default", text)) => found.default = Some(text),
            Some(("range", text)) => found.range = Some(range(text)?),
            Some(("limit", text)) => found.limit = Some(limit(text)?),
            Some(("only", text)) => found.only = Some(only(text)?),
            Some(("stateful", text)) => found.stateful = Some(text),
            Some(("guard", text)) => found.guard = Some(guard(text)?),
            None if *tag == "required" => found.required = true,
            None if *tag == "flags" => found.flags = true,
            None if *tag == "stateless" => found.stateless = true,
            _ => bail!(
                "unknown tag \"{tag}\"; known: doc: required default: range: limit: only: flags \
                 stateless stateful: guard:"
            ),
        }
    }
    Ok(found)
}

fn range(text: &str) -> Result<(u64, u64)> {
    text.split_once("..")
        .and_then(|(low, high)| Some((integer(low)?, integer(high)?)))
        .filter(|(low, high)| low <= high)
        .with_context(|| {
            format!("tag \"range:{text}\": expected LO..HI, not negative, LO not above HI")
        })
}

fn limit(text: &str) -> Result<Limit> {
    let (when, bounds) = text
        .split_once(':')
        .with_context(|| format!("tag \"limit:{text}\": expected MEMBER:LO..HI"))?;
    let (low, high) = range(bounds)?;
    Ok(Limit {
        when: when.to_owned(),
        low,
        high,
    })
}

fn guard(text: &str) -> Result<Guard> {
    let mut parts = text.splitn(3, ':');
    let (Some(value), Some(by), Some(why)) = (parts.next(), parts.next(), parts.next()) else {
        bail!("tag \"guard:{text}\": expected VALUE:MEMBER:WHY");
    };
    Ok(Guard {
        value: value.to_owned(),
        by: by.to_owned(),
        why: why.trim().to_owned(),
    })
}

fn only(text: &str) -> Result<Only> {
    let mut parts = text.splitn(3, ':');
    let (Some(value), Some(list), Some(why)) = (parts.next(), parts.next(), parts.next()) else {
        bail!("tag \"only:{text}\": expected VALUE:HOOKS:WHY");
    };
    Ok(Only {
        value: value.to_owned(),
        hooks: hooks(list)?,
        why: why.trim().to_owned(),
    })
}

fn integer(text: &str) -> Option<u64> {
    let text = text.trim();
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn check_tags(ty: &FieldType, is_array: bool, tags: &Tags<'_>) -> Result<()> {
    if let Some((_, high)) = tags.range {
        let most = match ty {
            FieldType::Bool => 1,
            FieldType::Unsigned { .. } | FieldType::Enum { .. } | FieldType::Duration => {
                max_of(ty.size())
            }
            _ => bail!("tag \"range:\" needs an integer, an enum, a bool or a duration"),
        };
        ensure!(
            high <= most,
            "tag \"range:\": {high} is above {most}, the greatest value of the type"
        );
    }
    ensure!(
        !tags.stateless || *ty == FieldType::Bool,
        "tag \"stateless\" needs a bool"
    );
    if tags.flags {
        ensure!(
            matches!(ty, FieldType::Enum { .. }),
            "tag \"flags\" needs an enum"
        );
        ensure!(!is_array, "tag \"flags\" cannot stand on an array");
    }
    ensure!(
        !(tags.default.is_some() && matches!(ty, FieldType::Device | FieldType::Chain)),
        "a device or chain cannot have a default: names differ between systems"
    );
    ensure!(
        is_array || *ty != FieldType::Bytes,
        "bytes_t must be an array, as in `bytes_t x[8]; __u8 x_len;`"
    );
    Ok(())
}

fn check_limits(layout: &Layout) -> Result<()> {
    for field in &layout.fields {
        let guard = field.guard.as_ref().map(|guard| &guard.by);
        let by = layout
            .fields
            .iter()
            .find(|other| Some(&other.name) == guard);
        ensure!(
            guard.is_none() || by.is_some_and(|by| by.ty == FieldType::Bool),
            "{}: tag \"guard:\" names no bool member",
            field.name
        );
        let Some(limit) = &field.limit else {
            continue;
        };
        let when = layout.fields.iter().find(|other| other.name == limit.when);
        ensure!(
            when.is_some_and(|when| when.ty == FieldType::Bool),
            "{}: tag \"limit:\" names `{}`, which is no bool member",
            field.name,
            limit.when
        );
    }
    Ok(())
}

fn is_padding(member: &Member<'_>) -> bool {
    member.name.starts_with("pad") && member.tags.is_empty()
}

/// The array whose items `member` counts.
fn companion_of<'m>(member: &Member<'_>, members: &'m [Member<'m>]) -> Option<&'m Member<'m>> {
    let name = member.name.strip_suffix("_len")?;
    members
        .iter()
        .find(|other| other.name == name && as_array(other.ty).is_some())
}

fn refuse_names(layout: &Layout, reserved: &[&str]) -> Result<()> {
    for field in &layout.fields {
        ensure!(
            !reserved.contains(&field.name.as_str()),
            "struct {}: member `{}` has a name the engine uses itself (reserved: {}): rename it",
            layout.name,
            field.name,
            reserved.join(" ")
        );
    }
    Ok(())
}
