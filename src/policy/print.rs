// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `policy-chain policies` prints.

use serde_json::{Map, Value, json};

use super::btf::{Field, FieldType, HOOKS, Kind, Layout};
use super::value::{duration_text, hex_text};
use super::{Policy, Registry};

/// Columns of human output.
const WIDTH: usize = 100;

/// A table of all policies, selectors first.
pub fn policies_table(registry: &Registry) -> String {
    let mut rows = vec![["NAME", "KIND", "HOOKS", "WHAT IT DOES"].map(str::to_owned)];
    rows.extend(registry.policies().iter().map(|policy| {
        [
            policy.name.clone(),
            policy.kind.name().to_owned(),
            hooks_text(policy),
            policy.doc.clone(),
        ]
    }));
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    rows.iter()
        .map(|[name, kind, hooks, doc]| {
            let start = format!(
                "{name:0$}  {kind:1$}  {hooks:2$}  ",
                widths[0], widths[1], widths[2]
            );
            hanging(&start, doc)
        })
        .collect()
}

/// Everything about one policy: what it does, where it runs, its parameters and keys, an example.
pub fn policy_page(policy: &Policy) -> String {
    let mut page = hanging(
        &format!("{} ({}): ", policy.name, policy.kind.name()),
        &policy.doc,
    );
    page += &hanging("  hooks:     ", &policy.hooks.join(", "));
    if policy.kind == Kind::Action {
        let terminal = if policy.terminal {
            "yes: must be the last action of its chain"
        } else {
            "no: the next action follows"
        };
        page += &hanging("  terminal:  ", terminal);
        if policy.once {
            page += &hanging(
                "  cadence:   ",
                "once per flow, unless the chain says otherwise",
            );
        }
    }
    page += "\nParameters:\n";
    match &policy.params {
        Some(params) if !params.fields.is_empty() => page += &members(params, policy.kind),
        _ => page += "  none\n",
    }
    if let Some(key) = &policy.key {
        let given = match policy.kind {
            Kind::Selector => "by \"set\": NAME or \"keys\": [...]",
            Kind::Action => "by \"set\": NAME",
        };
        let text = format!("Sets of kind \"{}\", {given}; members of a key:", key.kind);
        page += "\n";
        page += &hanging("", &text);
        page += &members(&key.layout, Kind::Selector);
        page += &key_arguments(&key.layout);
    }
    page += "\nExample:\n";
    for example in examples(policy) {
        page += &hanging("  ", &compact_json(&example));
    }
    page
}

/// The stable JSON form of all policies.
pub fn policies_json(registry: &Registry) -> Value {
    let policies: Vec<Value> = registry.policies().iter().map(policy_json).collect();
    json!({ "policies": policies })
}

/// The stable JSON form of one policy.
pub fn policy_json(policy: &Policy) -> Value {
    let parameters = policy
        .params
        .as_ref()
        .map_or_else(Vec::new, |params| fields_json(params, policy.kind));
    let set = policy
        .key
        .as_ref()
        .map(|key| json!({ "kind": key.kind, "key": fields_json(&key.layout, Kind::Selector) }));
    json!({
        "name": policy.name,
        "kind": policy.kind.name(),
        "doc": policy.doc,
        "terminal": policy.terminal,
        "once": policy.once,
        "hooks": policy.hooks,
        "parameters": parameters,
        "set": set,
    })
}

fn fields_json(layout: &Layout, kind: Kind) -> Vec<Value> {
    layout
        .fields
        .iter()
        .map(|field| field_json(field, kind))
        .collect()
}

fn field_json(field: &Field, kind: Kind) -> Value {
    let mut object = Map::new();
    let mut put = |key: &str, value: Value| object.insert(key.to_owned(), value);
    put("name", field.name.as_str().into());
    put("type", type_name(&field.ty).into());
    put("values", field.words().into());
    put("doc", field.doc.as_str().into());
    put("required", field.required.into());
    put("default", field.default_value().unwrap_or(Value::Null));
    if let FieldType::Unsigned { .. } | FieldType::Duration = field.ty {
        let (low, high) = field.bounds().unwrap_or_default();
        put("minimum", low.into());
        put("maximum", high.into());
    }
    if let FieldType::Enum { names, .. } = &field.ty {
        put("names", names.iter().map(|(name, _)| &**name).collect());
        if let Some((low, high)) = field.range {
            put("minimum", low.into());
            put("maximum", high.into());
        }
    }
    if let Some(limit) = &field.limit {
        let bounds = json!({ "when": limit.when, "minimum": limit.low, "maximum": limit.high });
        put("limit", bounds);
    }
    if let Some(only) = &field.only {
        let hooks = json!({ "value": only.value, "hooks": only.hooks, "why": only.why });
        put("only", hooks);
    }
    if let Some(array) = field.array {
        put("capacity", array.capacity.into());
    }
    let from_element = kind == Kind::Action && field.can_come_from_element();
    put("from_element", from_element.into());
    Value::Object(object)
}

fn type_name(ty: &FieldType) -> &'static str {
    match ty {
        FieldType::Unsigned { .. } => "integer",
        FieldType::Bool => "bool",
        FieldType::Enum { flags: false, .. } => "enum",
        FieldType::Enum { flags: true, .. } => "flags",
        FieldType::Ip => "ip",
        FieldType::Prefix => "prefix",
        FieldType::Mac => "mac",
        FieldType::Device => "device",
        FieldType::Chain => "chain",
        FieldType::Token => "token",
        FieldType::Port => "port",
        FieldType::PortRange => "port_range",
        FieldType::Duration => "duration",
        FieldType::Bytes => "bytes",
    }
}

fn hooks_text(policy: &Policy) -> String {
    if policy.hooks.len() == HOOKS.len() {
        "all".to_owned()
    } else {
        policy.hooks.join(",")
    }
}

/// One paragraph a member: name and meaning, then the values it takes.
fn members(layout: &Layout, kind: Kind) -> String {
    let width = name_width(layout);
    layout
        .fields
        .iter()
        .map(|field| {
            let first = hanging(&format!("  {:width$}  ", field.name), &field.doc);
            let indent = " ".repeat(width + 4);
            first + &hanging(&indent, &value_text(field, kind))
        })
        .collect()
}

/// What a key carries besides its members.
fn key_arguments(layout: &Layout) -> String {
    let width = name_width(layout);
    let line = |name: &str, text: &str| hanging(&format!("  {name:width$}  "), text);
    line("arg", "the element's number, for {\"from\": \"element\"}")
        + &line("chain", "instead of arg: the chain a goto enters")
        + &line(
            "expire",
            "in a set: how long the element counts, such as 30s; for good if absent",
        )
}

fn name_width(layout: &Layout) -> usize {
    let longest = layout.fields.iter().map(|field| field.name.len()).max();
    longest.unwrap_or(0).max("expire".len())
}

fn value_text(field: &Field, kind: Kind) -> String {
    let presence = match (&field.default, field.required) {
        (Some(default), _) => format!("default {default}"),
        (None, true) => "required".to_owned(),
        (None, false) => "optional".to_owned(),
    };
    let element = if kind == Kind::Action && field.can_come_from_element() {
        ", or {\"from\": \"element\"}"
    } else {
        ""
    };
    let limit = match &field.limit {
        Some(limit) => format!(
            "; {} to {} with \"{}\": true",
            limit.low, limit.high, limit.when
        ),
        None => String::new(),
    };
    let only = match &field.only {
        Some(only) => format!("; {} on {} only", only.value, only.hooks.join(", ")),
        None => String::new(),
    };
    format!("{presence}: {}{limit}{only}{element}", field.words())
}

/// Chain-file objects that use the policy: by its parameters, and by a set's keys.
fn examples(policy: &Policy) -> Vec<Value> {
    let named = || {
        let mut object = Map::new();
        object.insert(policy.kind.name().to_owned(), policy.name.as_str().into());
        object
    };
    let required = policy.params.as_ref().map(required_examples);
    let mut plain = named();
    plain.extend(required.clone().unwrap_or_default());
    let first_optional = policy
        .params
        .as_ref()
        .and_then(|params| params.fields.first());
    if let (1, None, Some(field)) = (plain.len(), &policy.key, first_optional) {
        plain.insert(field.name.clone(), field.example());
    }
    let Some(key) = &policy.key else {
        return vec![plain.into()];
    };
    let mut by_set = plain.clone();
    by_set.insert("set".to_owned(), "NAME".into());
    if policy.kind == Kind::Action {
        return vec![by_set.into()];
    }
    let mut by_keys = plain;
    by_keys.insert("keys".to_owned(), json!([key_example(&key.layout)]));
    vec![by_set.into(), by_keys.into()]
}

fn required_examples(layout: &Layout) -> Map<String, Value> {
    let required = layout.fields.iter().filter(|field| field.required);
    required
        .map(|field| (field.name.clone(), field.example()))
        .collect()
}

fn key_example(layout: &Layout) -> Map<String, Value> {
    let mut example = required_examples(layout);
    if let (true, Some(field)) = (example.is_empty(), layout.fields.first()) {
        example.insert(field.name.clone(), field.example());
    }
    example
}

impl Field {
    /// A value the member accepts, if the names in it exist.
    pub fn example(&self) -> Value {
        if let Some(default) = self.default_value() {
            return default;
        }
        let (low, high) = self.bounds().unwrap_or_default();
        match &self.ty {
            FieldType::Unsigned { .. } => low.max(1).min(high).into(),
            FieldType::Bool => true.into(),
            FieldType::Enum { names, .. } => {
                let name = names.iter().find(|(_, value)| *value != 0);
                name.or(names.first())
                    .map_or(Value::Null, |(name, _)| name.as_str().into())
            }
            FieldType::Ip => "192.0.2.1".into(),
            FieldType::Prefix => "198.51.100.0/24".into(),
            FieldType::Mac => "02:00:00:00:00:01".into(),
            FieldType::Device => "eth0".into(),
            FieldType::Chain => "NAME".into(),
            FieldType::Token => "5e1cb2d0".into(),
            FieldType::Port => 443.into(),
            FieldType::PortRange => "8000-8999".into(),
            FieldType::Duration => duration_text(200_000_000.max(low).min(high)).into(),
            FieldType::Bytes => {
                let most = self.array.map_or(1, |array| array.capacity);
                hex_text(&[0x1e, 0x0c, 0x00, 0x01][..most.min(4)], "").into()
            }
        }
    }
}

/// JSON on one line with a space after commas and colons, so that it wraps between words.
fn compact_json(value: &Value) -> String {
    match value {
        Value::Object(object) => {
            let members: Vec<String> = object
                .iter()
                .map(|(key, value)| {
                    format!("{}: {}", Value::from(key.as_str()), compact_json(value))
                })
                .collect();
            format!("{{ {} }}", members.join(", "))
        }
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(compact_json).collect();
            format!("[{}]", items.join(", "))
        }
        scalar => scalar.to_string(),
    }
}

/// `start` and `text` within [`WIDTH`] columns; further lines are indented below the text.
fn hanging(start: &str, text: &str) -> String {
    let indent = start.chars().count();
    let mut lines = vec![start.to_owned()];
    let mut used = indent;
    let mut fresh = true;
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if !fresh && used + 1 + length > WIDTH {
            lines.push(" ".repeat(indent));
            (used, fresh) = (indent, true);
        }
        if let Some(line) = lines.last_mut() {
            if !fresh {
                line.push(' ');
                used += 1;
            }
            line.push_str(word);
        }
        used += length;
        fresh = false;
    }
    lines
        .iter()
        .map(|line| format!("{}\n", line.trim_end()))
        .collect()
}
