// SPDX-License-Identifier: MIT OR Apache-2.0
//! The canonical form: the chain file grammar with defaults left out, keys in one order. Equal
//! specifications give equal text, and parsing it gives the specification back.

use serde_json::{Map, Value, json};

use crate::policy::duration_text;

use super::{
    Action, Attach, Cadence, Chain, Checksum, Keys, Mode, OnError, Op, Selector, SetSpec, Spec,
    Then, VERSION,
};

impl Spec {
    /// The canonical chain file.
    pub fn to_json(&self) -> Value {
        let mut object = Map::new();
        object.insert("version".into(), VERSION.into());
        if !self.sets.is_empty() {
            let sets = self.sets.iter();
            let sets: Map<_, _> = sets
                .map(|(name, set)| (name.clone(), set.to_json()))
                .collect();
            object.insert("sets".into(), sets.into());
        }
        insert_list(&mut object, "chains", &self.chains, Chain::to_json);
        object.into()
    }
}

impl SetSpec {
    /// The canonical form of a member of `sets`.
    pub fn to_json(&self) -> Value {
        json!({ "kind": self.kind, "size": self.size })
    }
}

impl Chain {
    /// The canonical form of an item of `chains`.
    pub fn to_json(&self) -> Value {
        let mut object = Map::new();
        object.insert("name".into(), self.name.as_str().into());
        insert_list(&mut object, "attach", &self.attach, attach);
        if self.priority != 0 {
            object.insert("priority".into(), self.priority.into());
        }
        insert_list(&mut object, "selectors", &self.selectors, selector);
        insert_list(&mut object, "actions", &self.actions, action);
        match &self.then {
            Then::Pass => None,
            Then::Drop => object.insert("then".into(), "drop".into()),
            Then::Continue => object.insert("then".into(), "continue".into()),
            Then::Goto(chain) => object.insert("then".into(), json!({ "goto": chain })),
        };
        object.into()
    }
}

fn insert_list<T>(
    object: &mut Map<String, Value>,
    key: &str,
    items: &[T],
    to_json: impl Fn(&T) -> Value,
) {
    if !items.is_empty() {
        object.insert(key.into(), items.iter().map(to_json).collect());
    }
}

fn attach(attach: &Attach) -> Value {
    let mut object = Map::new();
    object.insert("device".into(), attach.device.as_str().into());
    object.insert("hook".into(), attach.hook.name().into());
    if attach.mode != Mode::Auto {
        object.insert("mode".into(), attach.mode.name().into());
    }
    if attach.checksum != Checksum::Auto {
        object.insert("checksum".into(), attach.checksum.name().into());
    }
    object.into()
}

fn selector(selector: &Selector) -> Value {
    let mut object = Map::new();
    object.insert("selector".into(), selector.policy.as_str().into());
    if selector.op == Op::Or {
        object.insert("op".into(), "or".into());
    }
    if selector.negate {
        object.insert("not".into(), true.into());
    }
    object.extend(sorted(&selector.params));
    match &selector.keys {
        Keys::None => None,
        Keys::Set(name) => object.insert("set".into(), name.as_str().into()),
        Keys::Inline(keys) => {
            let keys = keys.iter().map(|key| Value::Object(sorted(key)));
            object.insert("keys".into(), keys.collect())
        }
    };
    object.into()
}

fn action(action: &Action) -> Value {
    let mut object = Map::new();
    object.insert("action".into(), action.policy.as_str().into());
    object.extend(sorted(&action.params));
    if let Some(set) = action.keys.set() {
        object.insert("set".into(), set.into());
    }
    match action.cadence {
        None => None,
        Some(Cadence::Always) => object.insert("once".into(), false.into()),
        Some(Cadence::First(1)) => object.insert("once".into(), true.into()),
        Some(Cadence::First(count)) => object.insert("first".into(), count.into()),
        Some(Cadence::Every(span)) => object.insert("every".into(), duration_text(span).into()),
    };
    if action.on_error != OnError::Continue {
        object.insert("on_error".into(), action.on_error.name().into());
    }
    object.into()
}

/// The members in the order of their names: parameters have no order of their own.
fn sorted(object: &Map<String, Value>) -> Map<String, Value> {
    let mut object = object.clone();
    object.sort_keys();
    object
}
