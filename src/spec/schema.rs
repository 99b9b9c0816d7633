// SPDX-License-Identifier: MIT OR Apache-2.0
//! JSON Schema (draft 2020-12) of chain files, generated from the registry.

use serde_json::{Map, Value, json};

use super::names::NAME_MAX;
use super::parse::{PRIORITY_MAX, PRIORITY_MIN};
use super::{Checksum, Mode, OnError, SET_SIZE_MAX, VERSION};
use crate::hook::Hook;
use crate::policy::{Layout, Policy, Registry};

/// The schema of chain files that use the registry's policies. The same registry gives the same
/// text. What depends on more than one place (names, hooks, arguments of elements) is checked by
/// [`super::Spec`] only.
pub fn schema(registry: &Registry) -> Value {
    let mut definitions = Map::new();
    let selectors: Vec<&Policy> = registry.selectors().collect();
    let actions: Vec<&Policy> = registry.actions().collect();

    definitions.insert("name".into(), name());
    definitions.insert("device".into(), device());
    definitions.insert("set".into(), set(registry));
    definitions.insert("chain".into(), chain());
    definitions.insert("attach".into(), attach());
    definitions.insert("then".into(), then());
    definitions.insert("selector".into(), choice("selector", &selectors));
    definitions.insert("action".into(), choice("action", &actions));
    for policy in selectors {
        definitions.insert(format!("selector.{}", policy.name), selector(policy));
    }
    for policy in actions {
        definitions.insert(format!("action.{}", policy.name), action(policy));
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "policy-chain chain file",
        "type": "object",
        "required": ["version"],
        "additionalProperties": false,
        "properties": {
            "$schema": {
                "type": "string",
                "description": "this schema's address, for editors; has no effect"
            },
            "version": { "const": VERSION },
            "sets": {
                "type": "object",
                "description": "sets by name",
                "propertyNames": reference("name"),
                "additionalProperties": reference("set")
            },
            "chains": list("chain")
        },
        "$defs": definitions
    })
}

fn reference(definition: &str) -> Value {
    json!({ "$ref": format!("#/$defs/{definition}") })
}

fn list(of: &str) -> Value {
    json!({ "type": "array", "items": reference(of) })
}

/// The reference with a description of its own.
fn described(definition: &str, text: &str) -> Value {
    json!({ "$ref": format!("#/$defs/{definition}"), "description": text })
}

fn name() -> Value {
    json!({ "type": "string", "pattern": format!("^[A-Za-z0-9_-]{{1,{NAME_MAX}}}$") })
}

fn device() -> Value {
    json!({ "type": "string", "pattern": "^(?!\\.{1,2}$)[^/:\\s]{1,15}$" })
}

fn set(registry: &Registry) -> Value {
    let kinds = registry.set_kinds().map(|key| key.kind.as_str());
    let kinds: Vec<&str> = kinds.collect();
    json!({
        "type": "object",
        "required": ["kind", "size"],
        "additionalProperties": false,
        "properties": {
            "kind": { "type": "string", "enum": kinds, "description": "kind of key" },
            "size": {
                "type": "integer",
                "minimum": 1,
                "maximum": SET_SIZE_MAX,
                "description": "most elements"
            }
        }
    })
}

fn chain() -> Value {
    json!({
        "type": "object",
        "required": ["name"],
        "additionalProperties": false,
        "properties": {
            "name": described("name", "unique name"),
            "attach": {
                "type": "array",
                "items": reference("attach"),
                "description": "where the chain runs; without it the chain is entered by goto only"
            },
            "priority": {
                "type": "integer",
                "minimum": PRIORITY_MIN,
                "maximum": PRIORITY_MAX,
                "default": 0,
                "description": "lower runs first among the chains of one device and hook"
            },
            "selectors": {
                "type": "array",
                "items": reference("selector"),
                "description": "read left to right; none: every packet matches"
            },
            "actions": {
                "type": "array",
                "items": reference("action"),
                "description": "done in order to the packets that match"
            },
            "then": reference("then")
        }
    })
}

fn attach() -> Value {
    let place = |hooks: &[Hook]| {
        let modes = hooks.first().map_or(&[][..], |hook| Mode::of(*hook));
        let checksums = match hooks {
            [Hook::Xdp] => &Checksum::ALL[..],
            _ => &[Checksum::Auto],
        };
        json!({
            "type": "object",
            "required": ["device", "hook"],
            "additionalProperties": false,
            "properties": {
                "device": described("device", "interface name; * and ? stand for any text and any character"),
                "hook": { "enum": hooks.iter().map(|h| h.name()).collect::<Vec<_>>() },
                "mode": {
                    "enum": modes.iter().map(|m| m.name()).collect::<Vec<_>>(),
                    "default": Mode::Auto.name()
                },
                "checksum": {
                    "enum": checksums.iter().map(|c| c.name()).collect::<Vec<_>>(),
                    "default": Checksum::Auto.name(),
                    "description": "how far the TCP checksums of packets are done on arrival"
                }
            }
        })
    };
    json!({ "oneOf": [place(&[Hook::Xdp]), place(&[Hook::TcIngress, Hook::TcEgress])] })
}

fn then() -> Value {
    json!({
        "description": "what becomes of the packet after the actions",
        "default": "pass",
        "oneOf": [
            { "enum": ["pass", "drop", "continue"] },
            {
                "type": "object",
                "required": ["goto"],
                "additionalProperties": false,
                "properties": { "goto": described("name", "a chain without attach") }
            }
        ]
    })
}

/// One of the policies; with none to choose from nothing is valid.
fn choice(role: &str, policies: &[&Policy]) -> Value {
    if policies.is_empty() {
        return Value::Bool(false);
    }
    let policies = policies.iter();
    let references: Vec<Value> = policies
        .map(|policy| reference(&format!("{role}.{}", policy.name)))
        .collect();
    json!({ "oneOf": references })
}

fn selector(policy: &Policy) -> Value {
    let mut own = Map::new();
    own.insert("selector".into(), json!({ "const": policy.name }));
    own.insert(
        "op".into(),
        json!({ "enum": ["and", "or"], "default": "and" }),
    );
    own.insert("not".into(), json!({ "type": "boolean", "default": false }));
    if let Some(key) = &policy.key {
        let set = format!("name of a set of kind {}", key.kind);
        own.insert("set".into(), described("name", &set));
        own.insert("keys".into(), keys(&key.layout));
    }
    let params = policy.params.as_ref().map(Layout::schema);
    let mut schema = object("selector", own, policy, params.unwrap_or_default());
    if policy.key.is_some() {
        let both = json!({ "required": ["set", "keys"] });
        if policy.params.is_some() {
            schema["not"] = both;
        } else {
            schema["oneOf"] = json!([{ "required": ["set"] }, { "required": ["keys"] }]);
        }
    }
    schema
}

fn keys(layout: &Layout) -> Value {
    let mut key = layout.schema();
    key["type"] = "object".into();
    key["additionalProperties"] = false.into();
    key["properties"]["arg"] = json!({
        "type": "integer",
        "minimum": 0,
        "maximum": u64::MAX,
        "description": "argument that an action reads"
    });
    key["properties"]["chain"] = described("name", "chain that an action goes to");
    key["not"] = json!({ "required": ["arg", "chain"] });
    json!({ "type": "array", "minItems": 1, "items": key })
}

fn action(policy: &Policy) -> Value {
    let mut own = Map::new();
    own.insert("action".into(), json!({ "const": policy.name }));
    let words = OnError::ALL.map(OnError::name);
    own.insert(
        "on_error".into(),
        json!({
            "enum": words,
            "default": OnError::default().name(),
            "description": "what happens when the action gives up"
        }),
    );
    own.insert(
        "once".into(),
        json!({
            "type": "boolean",
            "default": policy.once,
            "description": "do it to one packet of a flow only"
        }),
    );
    own.insert(
        "first".into(),
        json!({
            "type": "integer",
            "minimum": 1,
            "maximum": u32::MAX,
            "description": "do it to so many packets of a flow"
        }),
    );
    own.insert(
        "every".into(),
        json!({
            "type": "string",
            "pattern": "^[0-9]+(ns|us|ms|s|m|h)$",
            "description": "do it to a packet of a flow once in so long"
        }),
    );
    if let Some(key) = &policy.key {
        let set = format!("name of a set of kind {}", key.kind);
        own.insert("set".into(), described("name", &set));
    }
    let params = policy.params.as_ref().map(Layout::schema_of_action);
    let mut schema = object("action", own, policy, params.unwrap_or_default());
    if let (Some(_), Some(required)) = (&policy.key, schema["required"].as_array_mut()) {
        required.push("set".into());
    }
    schema
}

/// The policy's object: the keys of its role, then its parameters.
fn object(role: &str, mut keys: Map<String, Value>, policy: &Policy, params: Value) -> Value {
    let mut required = vec![Value::from(role)];
    if let Some(names) = params["required"].as_array() {
        required.extend(names.iter().cloned());
    }
    if let Some(members) = params["properties"].as_object() {
        keys.extend(members.clone());
    }
    json!({
        "type": "object",
        "description": policy.doc,
        "required": required,
        "additionalProperties": false,
        "properties": keys
    })
}
