// SPDX-License-Identifier: MIT OR Apache-2.0
//! The policies there are, what they take, and how JSON becomes their parameters.
//!
//! A policy describes itself in the BTF of its object ([`btf`]); nothing about a single policy is
//! written in Rust.

pub mod btf;
pub mod pack;
mod print;
mod schema;
pub mod services;
mod value;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod tests;

use std::ops::Deref;
use std::sync::OnceLock;

use anyhow::{Result, anyhow, ensure};
use serde_json::{Map, Value};

pub use btf::{Array, Description, Field, FieldType, Guard, Key, Kind, Layout, Limit, Only};
pub use pack::{ElementParam, Names, Packed, ReverseNames};
pub use print::{policies_json, policies_table, policy_json, policy_page};
pub use services::ServicesFile;
pub use value::{duration_text, parse_duration};

use crate::hook::{Family, Hook};

/// A policy as the build script embeds it.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddedPolicy {
    /// Stem of the policy's file.
    pub name: &'static str,
    /// Object compiled for XDP; empty if the policy cannot run there.
    pub xdp: &'static [u8],
    /// Object compiled for TC; empty if the policy cannot run there.
    pub tc: &'static [u8],
}

mod embedded {
    use super::EmbeddedPolicy;

    include!(concat!(env!("OUT_DIR"), "/registry.rs"));
}

/// A policy: its description and its objects.
#[derive(Clone, Debug)]
pub struct Policy {
    description: Description,
    objects: EmbeddedPolicy,
}

impl Deref for Policy {
    type Target = Description;

    fn deref(&self) -> &Description {
        &self.description
    }
}

impl Policy {
    /// Reads the description of a policy from its objects, of which the first that is not empty
    /// is taken: both have one source.
    ///
    /// # Errors
    /// If the object breaks a rule of [`btf::read`], or a default is no value of its parameter.
    pub fn new(objects: EmbeddedPolicy) -> Result<Policy> {
        let object = if objects.xdp.is_empty() {
            objects.tc
        } else {
            objects.xdp
        };
        let description = btf::read(object, objects.name)?;
        let key = description.key.as_ref().map(|key| &key.layout);
        for layout in description.params.iter().chain(key) {
            layout
                .check_defaults(&layout.name)
                .map_err(|invalid| anyhow!("policy {}: {invalid}", objects.name))?;
        }
        let policy = Policy {
            description,
            objects,
        };
        for hook in Hook::ALL.into_iter().filter(|hook| policy.runs_at(*hook)) {
            ensure!(
                !policy.object(hook.family()).is_empty(),
                "policy {}: its hooks include {hook}, but it has no object for it",
                policy.name
            );
        }
        Ok(policy)
    }

    /// The bytes of the ELF object for a family; empty if the policy cannot run there.
    pub fn object(&self, family: Family) -> &'static [u8] {
        match family {
            Family::Xdp => self.objects.xdp,
            Family::Tc => self.objects.tc,
        }
    }

    /// The maps it uses, with these parameters, that are kept from one generation to the next.
    pub fn state_with(&self, params: &Map<String, Value>) -> &[String] {
        let mut fields = self.params.iter().flat_map(|layout| &layout.fields);
        let needless = fields.any(|field| {
            let given = params.get(&field.name);
            let stateless = field.stateless && given == Some(&Value::Bool(true));
            // What an element brings is not known.
            let other = field.stateful.as_ref().is_some_and(|value| {
                !given.is_some_and(|given| given.is_object() || field.is(given, value))
            });
            stateless || other
        });
        if needless { &[] } else { &self.state }
    }

    /// A parameter whose value a hook does not have.
    pub fn missing_at(&self, hook: Hook, params: &Map<String, Value>) -> Option<&Field> {
        let fields = self.params.iter().flat_map(|layout| &layout.fields);
        fields.into_iter().find(|field| {
            let (Some(only), Some(value)) = (&field.only, params.get(&field.name)) else {
                return false;
            };
            // What an element brings is not known.
            (value.is_object() || value.as_str() == Some(&only.value))
                && !only.hooks.iter().any(|name| name == hook.name())
        })
    }

    /// Whether the policy can run at a hook.
    pub fn runs_at(&self, hook: Hook) -> bool {
        self.hooks.iter().any(|name| name == hook.name())
    }
}

/// Policies by kind and name.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    policies: Vec<Policy>,
    set_kinds: Vec<Key>,
    learner: Option<Policy>,
}

impl Registry {
    /// The policies compiled into this program.
    ///
    /// # Errors
    /// As [`Registry::new`].
    pub fn embedded() -> Result<&'static Registry> {
        static REGISTRY: OnceLock<Result<Registry, String>> = OnceLock::new();
        let read = || -> Result<Registry> {
            Ok(Registry {
                learner: Some(Policy::new(embedded::LEARNER)?),
                ..Registry::new(embedded::EMBEDDED)?
            })
        };
        REGISTRY
            .get_or_init(|| read().map_err(|error| format!("{error:#}")))
            .as_ref()
            .map_err(|error| anyhow!("{error}"))
    }

    /// Reads the descriptions of `objects`.
    ///
    /// # Errors
    /// If a description cannot be read, two policies of one kind share a name, or two policies
    /// disagree on the key of a kind of set.
    pub fn new(objects: &[EmbeddedPolicy]) -> Result<Registry> {
        let mut registry = Registry::default();
        for objects in objects {
            registry.add(Policy::new(*objects)?)?;
        }
        registry
            .policies
            .sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
        registry.set_kinds.sort_by(|a, b| a.kind.cmp(&b.kind));
        Ok(registry)
    }

    fn add(&mut self, policy: Policy) -> Result<()> {
        ensure!(
            self.find(policy.kind, &policy.name).is_none(),
            "two {}s are called {}",
            policy.kind.name(),
            policy.name
        );
        if let Some(key) = &policy.key {
            match self.set_kind(&key.kind) {
                None => self.set_kinds.push(key.clone()),
                Some(known) => ensure!(
                    known == key,
                    "policy {}: its struct {} differs from that of another policy",
                    policy.name,
                    key.layout.name
                ),
            }
        }
        self.policies.push(policy);
        Ok(())
    }

    /// All policies, selectors first, by name.
    pub fn policies(&self) -> &[Policy] {
        &self.policies
    }

    pub fn selectors(&self) -> impl Iterator<Item = &Policy> {
        self.of_kind(Kind::Selector)
    }

    pub fn actions(&self) -> impl Iterator<Item = &Policy> {
        self.of_kind(Kind::Action)
    }

    pub fn selector(&self, name: &str) -> Option<&Policy> {
        self.find(Kind::Selector, name)
    }

    pub fn action(&self, name: &str) -> Option<&Policy> {
        self.find(Kind::Action, name)
    }

    /// What stands in front of graphs that need to know connections; not for chain files.
    pub fn learner(&self) -> Option<&Policy> {
        self.learner.as_ref()
    }

    /// The kinds of sets that policies use, by name.
    pub fn set_kinds(&self) -> impl Iterator<Item = &Key> {
        self.set_kinds.iter()
    }

    pub fn set_kind(&self, kind: &str) -> Option<&Key> {
        self.set_kinds.iter().find(|key| key.kind == kind)
    }

    fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Policy> {
        self.policies
            .iter()
            .filter(move |policy| policy.kind == kind)
    }

    fn find(&self, kind: Kind, name: &str) -> Option<&Policy> {
        self.of_kind(kind).find(|policy| policy.name == name)
    }
}
