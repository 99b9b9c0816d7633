// SPDX-License-Identifier: MIT OR Apache-2.0
//! Chain files: what a user wants, typed and checked as far as it can be without a kernel.
//!
//! [`Spec::read`] and [`Spec::parse`] check everything that one file says by itself, down to each
//! parameter's range. [`Spec::validate_references`] then checks the names that may also belong to
//! sets and chains already loaded. Whether devices exist, how long a path is, and what a hook
//! offers at run time is for the planner and the engine.

mod canonical;
pub mod json;
mod names;
mod parse;
mod schema;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Invalid, did_you_mean};
use crate::hook::{Family, Hook};
use crate::policy::Registry;

pub use names::{NAME_MAX, is_device_name, is_name, is_pattern, matches_pattern};
pub use schema::schema;

/// The only `version` of chain files this program reads.
pub const VERSION: u64 = 1;

/// Most elements a set can be made for.
pub const SET_SIZE_MAX: u32 = 1 << 24;

/// What only a chain that names it is attached to.
const LOOPBACK: &str = "lo";

/// The chains and sets of one or more files.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spec {
    /// Sets by name.
    pub sets: BTreeMap<String, SetSpec>,
    /// Chains in the order of the files; names are unique.
    pub chains: Vec<Chain>,
}

/// A named collection of keys.
#[derive(Clone, Debug, PartialEq)]
pub struct SetSpec {
    /// Kind of key: `flow`, `ip_pair`, `port`, `prefix`, or one a policy brought.
    pub kind: String,
    /// Most elements, 1 to [`SET_SIZE_MAX`].
    pub size: u32,
}

/// Selectors, and the actions done to the packets they match.
#[derive(Clone, Debug, PartialEq)]
pub struct Chain {
    /// Unique, see [`is_name`].
    pub name: String,
    /// Where the chain runs. Empty: entered by `goto` only.
    pub attach: Vec<Attach>,
    /// Lower runs first among the chains of one device and hook; 0 unless given.
    pub priority: i32,
    /// See [`Chain::alternatives`]. Empty: every packet matches.
    pub selectors: Vec<Selector>,
    /// Done in order.
    pub actions: Vec<Action>,
    /// What becomes of the packet after the actions.
    pub then: Then,
    /// Where the chain was read.
    pub origin: Origin,
}

/// One place where a chain runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Attach {
    /// Interface name, or a pattern of them; whether any exists has not been checked.
    pub device: String,
    pub hook: Hook,
    /// One that the hook has.
    pub mode: Mode,
    /// [`Checksum::Auto`] on TC.
    pub checksum: Checksum,
}

/// How far the TCP checksums of packets at an XDP hook are done. TC programs are told by the
/// kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Checksum {
    /// Found out per packet.
    #[default]
    Auto,
    /// The field holds the checksum.
    Complete,
    /// The field holds the sum of the pseudo-header; a device adds the rest.
    Partial,
}

/// How a program is attached to a hook.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// The best one that the device and the kernel have.
    #[default]
    Auto,
    /// XDP in the driver.
    Native,
    /// XDP after the driver, in the network stack.
    Generic,
    /// TC by a link (Linux 6.6).
    Tcx,
    /// TC by a filter of the `clsact` queueing discipline.
    Clsact,
}

/// One condition on packets.
#[derive(Clone, Debug, PartialEq)]
pub struct Selector {
    /// Name in the registry.
    pub policy: String,
    /// How it joins the selectors before it. Always [`Op::And`] on a chain's first selector, where
    /// there is nothing to join: what the file says there is accepted and has no effect.
    pub op: Op,
    /// Match the packets that the policy does not (`"not"` in the file).
    pub negate: bool,
    /// What a keyed policy looks packets up in.
    pub keys: Keys,
    /// Parameters by name, as in the file; known to fit the policy's layout.
    pub params: Map<String, Value>,
    /// Kind of set a keyed policy takes.
    pub kind: Option<String>,
    /// Chains that parameters or inline keys name, in the order of the file.
    pub references: Vec<Reference>,
    /// Where the selector was read.
    pub origin: Origin,
}

/// How a selector joins those before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Op {
    /// Narrows the current alternative.
    #[default]
    And,
    /// Starts a new alternative.
    Or,
}

/// What a keyed selector looks packets up in.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Keys {
    /// Nothing: the selector is not keyed, or used by its own parameters alone.
    #[default]
    None,
    /// A named set.
    Set(String),
    /// The keys themselves, at least one, no two the same. Each holds the key's members as in the
    /// file and, if any key of the list does, either `arg` (an unsigned 64-bit integer) or `chain`
    /// (a chain's name).
    Inline(Vec<Map<String, Value>>),
}

/// Something done to a packet.
#[derive(Clone, Debug, PartialEq)]
pub struct Action {
    /// Name in the registry.
    pub policy: String,
    /// What happens when the action gives up.
    pub on_error: OnError,
    /// The set that a policy of [`Action::kind`] stores to; else nothing.
    pub keys: Keys,
    /// Kind of set it stores to.
    pub kind: Option<String>,
    /// How often it is done to the packets of one flow; none: as its policy has it.
    pub cadence: Option<Cadence>,
    /// Parameters by name, as in the file; known to fit the policy's layout. One of them may be
    /// `{"from": "element"}`: the chain then has a selector whose element gives the value.
    pub params: Map<String, Value>,
    /// Chains that parameters name, in the order of the file.
    pub references: Vec<Reference>,
    /// Where the action was read.
    pub origin: Origin,
}

/// How often an action is done to the packets of one flow: the two addresses, ports and the
/// protocol, whichever end sends. A packet that the action gave up on does not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Cadence {
    /// To every packet.
    #[default]
    Always,
    /// To so many.
    First(u32),
    /// To one in so many nanoseconds.
    Every(u64),
}

/// What happens to a packet whose action gave up (no room, not TCP, ...).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnError {
    /// Go on with the next action.
    #[default]
    Continue,
    /// Leave the chain and let the packet pass.
    Pass,
    /// Leave the chain and drop the packet.
    Drop,
}

/// What becomes of a packet after a chain's actions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Then {
    #[default]
    Pass,
    Drop,
    /// On to the attachment's next chain.
    Continue,
    /// On to the named chain, which has no `attach`; there is no way back.
    Goto(String),
}

/// A chain's name used as a value, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    pub chain: String,
    pub origin: Origin,
}

/// Where something was read, for errors found later. Any two are equal: it is no part of what a
/// specification says.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// None for what was not read from a file.
    pub file: Option<PathBuf>,
    /// JSON path, such as `$.chains[0].actions[1]`.
    pub path: String,
}

impl PartialEq for Origin {
    fn eq(&self, _: &Origin) -> bool {
        true
    }
}

impl Origin {
    /// An error about what stands `below` this place (`.attach[0].device`; empty: here).
    pub fn invalid(
        &self,
        below: &str,
        found: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Invalid {
        let error = Invalid::new(format_args!("{}{below}", self.path), found, expected);
        match &self.file {
            Some(file) => error.in_file(file),
            None => error,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{} of {}", self.path, file.display()),
            None => f.write_str(&self.path),
        }
    }
}

impl Mode {
    /// The modes a hook has, `auto` first.
    pub fn of(hook: Hook) -> &'static [Mode] {
        match hook.family() {
            Family::Xdp => &[Mode::Auto, Mode::Native, Mode::Generic],
            Family::Tc => &[Mode::Auto, Mode::Tcx, Mode::Clsact],
        }
    }

    /// As in chain files.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Auto => "auto",
            Mode::Native => "native",
            Mode::Generic => "generic",
            Mode::Tcx => "tcx",
            Mode::Clsact => "clsact",
        }
    }
}

impl Checksum {
    /// `auto` first.
    pub const ALL: [Checksum; 3] = [Checksum::Auto, Checksum::Complete, Checksum::Partial];

    /// As in chain files.
    pub fn name(self) -> &'static str {
        match self {
            Checksum::Auto => "auto",
            Checksum::Complete => "complete",
            Checksum::Partial => "partial",
        }
    }

    /// What chains ask for at a hook of a device; the last that asks counts.
    pub fn asked<'a>(
        chains: impl IntoIterator<Item = &'a Chain>,
        device: &str,
        hook: Hook,
    ) -> Checksum {
        chains
            .into_iter()
            .filter_map(|chain| chain.attach_at(device, hook))
            .map(|attach| attach.checksum)
            .filter(|checksum| *checksum != Checksum::Auto)
            .last()
            .unwrap_or_default()
    }
}

impl Keys {
    /// The named set, if it is one.
    pub fn set(&self) -> Option<&str> {
        match self {
            Keys::Set(name) => Some(name),
            _ => None,
        }
    }
}

impl Attach {
    /// Whether it stands for every device whose name matches.
    pub fn is_pattern(&self) -> bool {
        is_pattern(&self.device)
    }

    /// Whether some device is meant by both, as far as one of the two tells.
    fn meets(&self, other: &Attach) -> bool {
        self.hook == other.hook && (self.covers(&other.device) || other.covers(&self.device))
    }

    /// Whether it means this device. A pattern does not mean the loopback device.
    pub fn covers(&self, device: &str) -> bool {
        self.device == device
            || (self.is_pattern() && device != LOOPBACK && matches_pattern(&self.device, device))
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl OnError {
    pub const ALL: [OnError; 3] = [OnError::Continue, OnError::Pass, OnError::Drop];

    /// As in chain files.
    pub fn name(self) -> &'static str {
        match self {
            OnError::Continue => "continue",
            OnError::Pass => "pass",
            OnError::Drop => "drop",
        }
    }
}

impl Chain {
    /// The selectors as alternatives, each a conjunction: `a and b or c` is `[[a, b], [c]]`. No
    /// selectors: one alternative without conditions, which every packet meets.
    pub fn alternatives(&self) -> Vec<&[Selector]> {
        let mut alternatives = Vec::new();
        let mut from = 0;
        for (at, selector) in self.selectors.iter().enumerate().skip(1) {
            if selector.op == Op::Or {
                alternatives.push(&self.selectors[from..at]);
                from = at;
            }
        }
        alternatives.push(&self.selectors[from..]);
        alternatives
    }

    /// What is said of a hook of a device, if the chain is to run there: where the device is named,
    /// else the first pattern that matches.
    pub fn attach_at(&self, device: &str, hook: Hook) -> Option<&Attach> {
        let mut here = self.attach.iter().filter(|attach| attach.hook == hook);
        let named = here.clone().find(|attach| attach.device == device);
        named.or_else(|| here.find(|attach| attach.covers(device)))
    }

    /// Reads one chain from the form it has in a chain file; paths of errors begin at `$`.
    ///
    /// # Errors
    /// What [`Spec::parse`] refuses in a chain.
    pub fn from_json(value: &Value, registry: &Registry) -> Result<Chain, Invalid> {
        parse::Parser::new(registry, None).chain(value)
    }
}

impl Spec {
    /// Reads one chain file's text; `file` is for errors only.
    ///
    /// # Errors
    /// The first thing that is wrong, with its JSON path (line and column if it is no JSON).
    pub fn parse(text: &str, file: &Path, registry: &Registry) -> Result<Spec, Invalid> {
        let value = json::parse(text, file)?;
        let spec = parse::Parser::new(registry, Some(file))
            .spec(&value)
            .map_err(|error| error.in_file(file))?;
        spec.check_together()?;
        Ok(spec)
    }

    /// Reads several chain files as one. A set may be defined in more than one of them if the
    /// definitions agree.
    ///
    /// # Errors
    /// As [`Spec::parse`], [`Invalid`] when files contradict each other, and files that cannot be
    /// read.
    pub fn read(files: &[PathBuf], registry: &Registry) -> anyhow::Result<Spec> {
        let mut all = Spec::default();
        let mut defined_in: BTreeMap<String, &Path> = BTreeMap::new();
        for file in files {
            let spec = Spec::parse(&json::read_text(file)?, file, registry)?;
            for (name, set) in spec.sets {
                if let (Some(before), Some(other)) = (all.sets.get(&name), defined_in.get(&name)) {
                    if *before != set {
                        return Err(set_defined_twice(&name, &set, file, before, other).into());
                    }
                }
                defined_in.insert(name.clone(), file);
                all.sets.insert(name, set);
            }
            all.chains.extend(spec.chains);
        }
        all.check_together()?;
        Ok(all)
    }

    /// Checks that every set and chain named is defined here or already known, sets are of the
    /// kind their selector needs, and the chains gone to have no `attach`. What the files define
    /// counts before what is known.
    ///
    /// `known_sets`: sets already loaded. `known_chains`: loaded chains without `attach`.
    ///
    /// # Errors
    /// The first name that fails.
    pub fn validate_references(
        &self,
        known_sets: &BTreeMap<String, SetSpec>,
        known_chains: &BTreeSet<String>,
    ) -> Result<(), Invalid> {
        let own: BTreeMap<&str, &Chain> = self
            .chains
            .iter()
            .map(|chain| (chain.name.as_str(), chain))
            .collect();
        for chain in &self.chains {
            for selector in &chain.selectors {
                let Selector {
                    keys, kind, origin, ..
                } = selector;
                self.validate_set(keys, kind.as_deref(), origin, known_sets)?;
            }
            for action in &chain.actions {
                let Action {
                    keys, kind, origin, ..
                } = action;
                self.validate_set(keys, kind.as_deref(), origin, known_sets)?;
            }
            let selectors = chain.selectors.iter().flat_map(|s| &s.references);
            let actions = chain.actions.iter().flat_map(|a| &a.references);
            for reference in selectors.chain(actions) {
                validate_target(&reference.chain, &reference.origin, "", &own, known_chains)?;
            }
            if let Then::Goto(target) = &chain.then {
                validate_target(target, &chain.origin, ".then.goto", &own, known_chains)?;
            }
        }
        Ok(())
    }

    fn validate_set(
        &self,
        keys: &Keys,
        kind: Option<&str>,
        origin: &Origin,
        known: &BTreeMap<String, SetSpec>,
    ) -> Result<(), Invalid> {
        let (Keys::Set(name), Some(kind)) = (keys, kind) else {
            return Ok(());
        };
        let Some(set) = self.sets.get(name).or_else(|| known.get(name)) else {
            let names = self.sets.keys().chain(known.keys()).map(String::as_str);
            return Err(origin
                .invalid(
                    ".set",
                    format_args!("\"{name}\", no such set{}", did_you_mean(name, names)),
                    format_args!("a set of kind {kind}"),
                )
                .advice(format_args!(
                    "define it: \"sets\": {{\"{name}\": {{\"kind\": \"{kind}\", \"size\": 1000}}}}"
                )));
        };
        if set.kind != kind {
            return Err(origin
                .invalid(
                    ".set",
                    format_args!("\"{name}\", a set of kind {}", set.kind),
                    format_args!("a set of kind {kind}"),
                )
                .advice(format_args!(
                    "name another set, or a policy whose sets are of kind {}",
                    set.kind
                )));
        }
        Ok(())
    }

    /// Checks what chains of different files can get wrong about each other.
    fn check_together(&self) -> Result<(), Invalid> {
        let mut names: BTreeMap<&str, &Chain> = BTreeMap::new();
        for chain in &self.chains {
            if let Some(other) = names.insert(&chain.name, chain) {
                return Err(chain
                    .origin
                    .invalid(
                        ".name",
                        format_args!("\"{}\", also the name of {}", chain.name, other.origin),
                        "a name no other chain has",
                    )
                    .advice("rename or remove one of the two"));
            }
        }
        self.check_agreement("mode", |attach| {
            (attach.mode != Mode::Auto).then(|| attach.mode.name())
        })?;
        self.check_agreement("checksum", |attach| {
            (attach.checksum != Checksum::Auto).then(|| attach.checksum.name())
        })
    }

    /// Checks that chains at one hook of a device ask for the same, if they ask at all.
    fn check_agreement(
        &self,
        key: &str,
        asked: impl Fn(&Attach) -> Option<&'static str>,
    ) -> Result<(), Invalid> {
        let mut before: Vec<(&Attach, &str, &Chain)> = Vec::new();
        for chain in &self.chains {
            for (at, attach) in chain.attach.iter().enumerate() {
                let Some(value) = asked(attach) else {
                    continue;
                };
                let contradicts = before.iter().find(|(earlier, first, other)| {
                    // Of one chain, what names the device counts before its pattern.
                    *first != value && other.name != chain.name && attach.meets(earlier)
                });
                if let Some((_, first, other)) = contradicts {
                    return Err(chain
                        .origin
                        .invalid(
                            &format!(".attach[{at}].{key}"),
                            format_args!("\"{value}\""),
                            format_args!(
                                "\"{first}\" as in chain \"{}\" ({}), or \"auto\"",
                                other.name, other.origin
                            ),
                        )
                        .advice(format_args!(
                            "all chains on {} of {} have one {key}: give them the same",
                            attach.hook, attach.device
                        )));
                }
                before.push((attach, value, chain));
            }
        }
        Ok(())
    }
}

fn set_defined_twice(
    name: &str,
    set: &SetSpec,
    file: &Path,
    before: &SetSpec,
    other: &Path,
) -> Invalid {
    let describe = |set: &SetSpec| format!("kind {}, size {}", set.kind, set.size);
    Invalid::new(
        json::member("$.sets", name),
        describe(set),
        format_args!("{}, as in {}", describe(before), other.display()),
    )
    .advice("define the set in one file only, or give it another name")
    .in_file(file)
}

/// `below` the `origin`, a chain is gone to.
fn validate_target(
    name: &str,
    origin: &Origin,
    below: &str,
    own: &BTreeMap<&str, &Chain>,
    known: &BTreeSet<String>,
) -> Result<(), Invalid> {
    const EXPECTED: &str = "a chain without \"attach\"";
    match own.get(name) {
        Some(chain) if chain.attach.is_empty() => Ok(()),
        Some(chain) => Err(origin
            .invalid(
                below,
                format_args!("\"{name}\", which has \"attach\" ({})", chain.origin),
                EXPECTED,
            )
            .advice(format_args!(
                "remove \"attach\" there, or move what both need into a chain without it"
            ))),
        None if known.contains(name) => Ok(()),
        None => {
            let subs = own.iter().filter(|(_, chain)| chain.attach.is_empty());
            let names = subs
                .map(|(name, _)| *name)
                .chain(known.iter().map(String::as_str));
            Err(origin
                .invalid(
                    below,
                    format_args!("\"{name}\", no such chain{}", did_you_mean(name, names)),
                    EXPECTED,
                )
                .advice("add the chain to the file, or correct the name"))
        }
    }
}
