// SPDX-License-Identifier: MIT OR Apache-2.0
//! JSON objects to the bytes of a [`Layout`] and back.

use serde_json::{Map, Value};

use super::btf::{Field, FieldType, Layout, Limit, RESERVED_IN_KEY};
use super::value::{decode, encode, get, hex, hex_text, put, seen};
use crate::error::{Invalid, did_you_mean};

/// What names in a chain file stand for on this system. An `Err` says why a name has no meaning.
pub trait Names {
    /// Interface index of a network device.
    fn device(&self, name: &str) -> Result<u32, String>;
    /// Id of a chain.
    fn chain(&self, name: &str) -> Result<u32, String>;
    /// Port of a service, host byte order.
    fn service(&self, name: &str) -> Option<u16>;
}

/// Names of what bytes hold; none where there is no name (any more).
pub trait ReverseNames {
    /// Name of the network device with an interface index.
    fn device(&self, index: u32) -> Option<String>;
    /// Name of the chain with an id.
    fn chain(&self, id: u32) -> Option<String>;
}

/// Bytes of a [`Layout`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// As long as the struct; padding and absent members are zero.
    pub bytes: Vec<u8>,
    /// The member to be read from the element's argument at run time, if one is.
    pub element: Option<ElementParam>,
}

/// A member whose value is the matching element's 64-bit argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ElementParam {
    /// Offset in the struct, in bytes.
    pub offset: usize,
    /// Size in bytes.
    pub size: usize,
    /// Least argument the policy accepts.
    pub min: u64,
    /// Greatest argument the policy accepts.
    pub max: u64,
    /// Whether the member is in network byte order; the argument is in host order.
    pub big_endian: bool,
    /// Whether the argument is a chain id.
    pub is_chain: bool,
}

impl ElementParam {
    fn of(field: &Field) -> Self {
        let (min, max) = field.bounds().unwrap_or((0, u64::MAX));
        ElementParam {
            offset: field.offset,
            size: field.ty.size(),
            min,
            max,
            big_endian: matches!(
                field.ty,
                FieldType::Unsigned {
                    big_endian: true,
                    ..
                }
            ),
            is_chain: field.ty == FieldType::Chain,
        }
    }
}

impl Layout {
    /// The member called `name`.
    pub fn field(&self, name: &str) -> Option<&Field> {
        self.fields.iter().find(|field| field.name == name)
    }

    /// Packs the members found in a JSON object.
    ///
    /// `path` is the object's JSON path. Keys in `ignore` belong to the engine and are skipped.
    /// With `allow_element` one scalar may be `{"from": "element"}`; its bytes stay zero.
    ///
    /// # Errors
    /// For an unknown key, a missing required member, and a value of the wrong type or out of
    /// range.
    pub fn pack(
        &self,
        values: &Map<String, Value>,
        path: &str,
        ignore: &[&str],
        names: &dyn Names,
        allow_element: bool,
    ) -> Result<Packed, Invalid> {
        self.refuse_unknown(values, path, ignore)?;
        let mut packed = Packed {
            bytes: vec![0; self.size],
            element: None,
        };
        for field in &self.fields {
            let path = format!("{path}.{}", field.name);
            match values.get(&field.name) {
                Some(value) if is_from(value) => {
                    let mut param = element_param(field, value, &path, allow_element)?;
                    if let Some(limit) = limit_in_force(field, values) {
                        param.min = param.min.max(limit.low);
                        param.max = param.max.min(limit.high);
                    }
                    if packed.element.replace(param).is_some() {
                        return Err(second_element(&path, value));
                    }
                }
                Some(value) => {
                    pack_field(field, value, &path, names, &mut packed.bytes)?;
                    refuse_unguarded(field, value, values, &path)?;
                    refuse_beyond_limit(field, value, values, &path)?;
                }
                None if field.required => return Err(missing(field, &path)),
                None => {
                    if let Some(default) = field.default_value() {
                        pack_field(field, &default, &path, names, &mut packed.bytes)?;
                    }
                }
            }
        }
        Ok(packed)
    }

    /// The JSON object that packs to `bytes`; optional members that are all zero are left out.
    /// Bytes past a short slice count as zero.
    pub fn unpack(&self, bytes: &[u8], names: &dyn ReverseNames) -> Map<String, Value> {
        let mut whole = vec![0; self.size];
        let length = bytes.len().min(whole.len());
        whole[..length].copy_from_slice(&bytes[..length]);
        self.fields
            .iter()
            .filter_map(|field| Some((field.name.clone(), unpack_field(field, &whole, names)?)))
            .collect()
    }

    /// Reads the command line's form of an object: `local=10.0.0.1,local_port=80,arg=5`.
    ///
    /// Items of a list stand between plus signs: `flags=syn+ack`. If the layout has exactly one
    /// required member, its value may come first and alone: `10.0.0.0/8,arg=5`. Values become
    /// JSON numbers or booleans where the member takes them, else strings; keys are checked later,
    /// by [`pack`](Self::pack).
    ///
    /// # Errors
    /// For a part without `=` that is not such a value, and for a key given twice.
    pub fn parse_compact(&self, text: &str) -> Result<Map<String, Value>, Invalid> {
        let mut values = Map::new();
        for (index, part) in text.split(',').map(str::trim).enumerate() {
            let (name, value) = match (part.split_once('='), self.only_required()) {
                (Some((name, value)), _) => (name.trim(), value.trim()),
                (None, Some(field)) if index == 0 && !part.is_empty() => (&*field.name, part),
                (None, _) => return Err(self.not_compact(text, part)),
            };
            let value = compact_value(self.field(name), name, value);
            if values.insert(name.to_owned(), value).is_some() {
                let found = format!("\"{name}\" twice in \"{text}\"");
                return Err(Invalid::new("element", found, "each member once"));
            }
        }
        Ok(values)
    }

    /// Checks that every default is a value of its member.
    ///
    /// # Errors
    /// As [`pack`](Self::pack).
    pub fn check_defaults(&self, path: &str) -> Result<(), Invalid> {
        let mut bytes = vec![0; self.size];
        for field in &self.fields {
            if let Some(default) = field.default_value() {
                let path = format!("{path}.{} (default)", field.name);
                pack_field(field, &default, &path, &AnyService, &mut bytes)?;
            }
        }
        Ok(())
    }

    fn refuse_unknown(
        &self,
        values: &Map<String, Value>,
        path: &str,
        ignore: &[&str],
    ) -> Result<(), Invalid> {
        let known = || {
            let fields = self.fields.iter().map(|field| field.name.as_str());
            fields.chain(ignore.iter().copied())
        };
        match values.keys().find(|key| !known().any(|name| name == *key)) {
            None => Ok(()),
            Some(key) => Err(Invalid::new(
                path,
                format!("unknown key \"{key}\"{}", did_you_mean(key, known())),
                if known().next().is_none() {
                    "no parameters".to_owned()
                } else {
                    known().collect::<Vec<_>>().join(", ")
                },
            )),
        }
    }

    fn only_required(&self) -> Option<&Field> {
        let mut required = self.fields.iter().filter(|field| field.required);
        required.next().filter(|_| required.next().is_none())
    }

    fn not_compact(&self, text: &str, part: &str) -> Invalid {
        let names: Vec<&str> = self.fields.iter().map(|field| &*field.name).collect();
        let found = if part.is_empty() {
            format!("an empty part in \"{text}\"")
        } else {
            format!("\"{part}\" in \"{text}\"")
        };
        let expected = format!("MEMBER=VALUE,... with members {}", names.join(", "));
        Invalid::new("element", found, expected)
    }
}

impl Field {
    /// The default as JSON; text that is not JSON is a string.
    pub fn default_value(&self) -> Option<Value> {
        let text = self.default.as_deref()?;
        Some(serde_json::from_str(text).unwrap_or_else(|_| Value::from(text)))
    }
}

/// Stands in where only the form of a value is checked.
struct AnyService;

impl Names for AnyService {
    fn device(&self, _: &str) -> Result<u32, String> {
        Ok(1)
    }
    fn chain(&self, _: &str) -> Result<u32, String> {
        Ok(1)
    }
    fn service(&self, _: &str) -> Option<u16> {
        Some(1)
    }
}

fn is_from(value: &Value) -> bool {
    value
        .as_object()
        .is_some_and(|object| object.contains_key("from"))
}

fn element_param(
    field: &Field,
    value: &Value,
    path: &str,
    allowed: bool,
) -> Result<ElementParam, Invalid> {
    let element = Value::from_iter([("from", "element")]);
    let refuse = |why: &str| {
        let found = format!("{}, {why}", seen(value));
        Err(Invalid::new(path, found, field.expectation()))
    };
    if !allowed {
        return refuse("but only an action's parameter can come from an element");
    }
    if *value != element {
        let found = seen(value);
        return Err(Invalid::new(path, found, "{\"from\": \"element\"}"));
    }
    if !field.can_come_from_element() {
        return refuse("but an element carries one number, a device or a chain");
    }
    Ok(ElementParam::of(field))
}

/// The bounds of a member where the bool they depend on is given as true.
fn limit_in_force<'f>(field: &'f Field, values: &Map<String, Value>) -> Option<&'f Limit> {
    let limit = field.limit.as_ref()?;
    (values.get(&limit.when) == Some(&Value::Bool(true))).then_some(limit)
}

fn refuse_beyond_limit(
    field: &Field,
    value: &Value,
    values: &Map<String, Value>,
    path: &str,
) -> Result<(), Invalid> {
    let Some(limit) = limit_in_force(field, values) else {
        return Ok(());
    };
    let number = value.as_u64();
    if number.is_some_and(|number| (limit.low..=limit.high).contains(&number)) {
        return Ok(());
    }
    Err(Invalid::new(
        path,
        seen(value),
        format!(
            "an integer from {} to {}, with \"{}\": true",
            limit.low, limit.high, limit.when
        ),
    ))
}

/// Refuses a value that needs a bool to be true which is not.
fn refuse_unguarded(
    field: &Field,
    value: &Value,
    values: &Map<String, Value>,
    path: &str,
) -> Result<(), Invalid> {
    let Some(guard) = &field.guard else {
        return Ok(());
    };
    if !field.is(value, &guard.value) || values.get(&guard.by) == Some(&Value::Bool(true)) {
        return Ok(());
    }
    Err(Invalid::new(
        path,
        format!("{}: {}", seen(value), guard.why),
        format!("another value, or \"{}\": true", guard.by),
    )
    .advice(format!(
        "add \"{}\": true if that is what you want",
        guard.by
    )))
}

fn second_element(path: &str, value: &Value) -> Invalid {
    Invalid::new(
        path,
        format!("{} for a second parameter", seen(value)),
        "at most one parameter from the element, which has one argument",
    )
}

fn missing(field: &Field, path: &str) -> Invalid {
    Invalid::new(path, "nothing", field.expectation())
        .advice(format!("add \"{}\", which is required", field.name))
}

fn pack_field(
    field: &Field,
    value: &Value,
    path: &str,
    names: &dyn Names,
    bytes: &mut [u8],
) -> Result<(), Invalid> {
    let size = field.ty.size();
    let Some(array) = &field.array else {
        let out = &mut bytes[field.offset..field.offset + size];
        return encode(field, value, path, names, out);
    };
    let wrong = |found: String| Invalid::new(path, found, field.expectation());
    let out = &mut bytes[field.offset..field.offset + size * array.capacity];
    let count = if field.ty == FieldType::Bytes {
        let data = value.as_str().and_then(hex).filter(|data| !data.is_empty());
        let data = data.ok_or_else(|| wrong(seen(value)))?;
        let room = out.get_mut(..data.len());
        let room = room.ok_or_else(|| wrong(format!("{} bytes", data.len())))?;
        room.copy_from_slice(&data);
        data.len()
    } else {
        let items = match value {
            Value::Array(items) => items.as_slice(),
            one => std::slice::from_ref(one),
        };
        if items.is_empty() || items.len() > array.capacity {
            return Err(wrong(format!("a list of {}", items.len())));
        }
        for (index, (item, out)) in items.iter().zip(out.chunks_exact_mut(size)).enumerate() {
            let path = match value {
                Value::Array(_) => format!("{path}[{index}]"),
                _ => path.to_owned(),
            };
            encode(field, item, &path, names, out)?;
        }
        items.len()
    };
    let end = array.length_offset + array.length_size;
    put(&mut bytes[array.length_offset..end], count as u64, false);
    Ok(())
}

fn unpack_field(field: &Field, bytes: &[u8], names: &dyn ReverseNames) -> Option<Value> {
    let size = field.ty.size();
    let Some(array) = &field.array else {
        let item = bytes.get(field.offset..field.offset + size)?;
        let shown = field.required || field.default.is_some() || item.iter().any(|b| *b != 0);
        return shown.then(|| decode(&field.ty, item, names));
    };
    let length = bytes.get(array.length_offset..array.length_offset + array.length_size)?;
    let count = usize::try_from(get(length, false))
        .ok()?
        .min(array.capacity);
    if count == 0 && !field.required && field.default.is_none() {
        return None;
    }
    let items = bytes.get(field.offset..field.offset + size * count)?;
    Some(match field.ty {
        FieldType::Bytes => hex_text(items, "").into(),
        _ => items
            .chunks_exact(size)
            .map(|item| decode(&field.ty, item, names))
            .collect(),
    })
}

/// The JSON value a piece of text stands for, by the member it is meant for.
fn compact_value(field: Option<&Field>, name: &str, text: &str) -> Value {
    let Some(field) = field else {
        // `arg` is a number, `chain` a name that may look like one.
        let is_argument = RESERVED_IN_KEY.first() == Some(&name);
        return plain_value(text, is_argument);
    };
    let literal = takes_literals(&field.ty);
    let is_list = field.array.is_some() && field.ty != FieldType::Bytes
        || matches!(field.ty, FieldType::Enum { flags: true, .. });
    if is_list && text.contains('+') {
        return text
            .split('+')
            .map(|item| plain_value(item, literal))
            .collect();
    }
    plain_value(text, literal)
}

/// Whether JSON numbers or booleans can be values of the type.
fn takes_literals(ty: &FieldType) -> bool {
    matches!(
        ty,
        FieldType::Unsigned { .. }
            | FieldType::Bool
            | FieldType::Enum { .. }
            | FieldType::Port
            | FieldType::PortRange
    )
}

fn plain_value(text: &str, literal: bool) -> Value {
    serde_json::from_str(text)
        .ok()
        .filter(|value: &Value| literal && (value.is_number() || value.is_boolean()))
        .unwrap_or_else(|| Value::from(text))
}
