// SPDX-License-Identifier: MIT OR Apache-2.0
//! JSON values to typed chains, checking all that needs neither kernel nor plan.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Display;
use std::path::Path;
use std::str::FromStr;

use serde_json::{Map, Value};

use super::json::{member, quote, show};
use super::names::{Permissive, is_device_name, is_name};
use super::{
    Action, Attach, Cadence, Chain, Checksum, Keys, Mode, OnError, Op, Origin, Reference,
    SET_SIZE_MAX, Selector, SetSpec, Spec, Then, VERSION,
};
use crate::error::{Invalid, did_you_mean};
use crate::hook::{Family, Hook};
use crate::policy::{Description, ElementParam, Layout, Packed, Policy, Registry, parse_duration};

pub(super) const SPEC_KEYS: [&str; 4] = ["$schema", "version", "sets", "chains"];
pub(super) const SET_KEYS: [&str; 2] = ["kind", "size"];
pub(super) const CHAIN_KEYS: [&str; 6] =
    ["name", "attach", "priority", "selectors", "actions", "then"];
pub(super) const ATTACH_KEYS: [&str; 4] = ["device", "hook", "mode", "checksum"];
/// Keys of a selector that are not its policy's parameters.
pub(super) const SELECTOR_KEYS: [&str; 5] = ["selector", "op", "not", "set", "keys"];
/// Keys of an action that are not its policy's parameters.
pub(super) const ACTION_KEYS: [&str; 5] = ["action", "on_error", "once", "every", "first"];
/// Keys of an inline key that are not members of the kind's key.
pub(super) const ARGUMENT_KEYS: [&str; 2] = ["arg", "chain"];

pub(super) const PRIORITY_MIN: i32 = i16::MIN as i32;
pub(super) const PRIORITY_MAX: i32 = i16::MAX as i32;

const NAME: &str = "a name of 1 to 32 letters, digits, \"_\" or \"-\"";

/// A value and where it stands.
pub(super) struct At<'a> {
    pub(super) value: &'a Value,
    pub(super) path: String,
}

impl<'a> At<'a> {
    fn invalid(&self, expected: impl Display) -> Invalid {
        Invalid::new(&self.path, show(self.value), expected)
    }

    fn object(self) -> Result<Object<'a>, Invalid> {
        match self.value {
            Value::Object(members) => Ok(Object {
                members,
                path: self.path,
            }),
            _ => Err(self.invalid("an object")),
        }
    }

    fn items(self) -> Result<impl Iterator<Item = At<'a>>, Invalid> {
        let Value::Array(items) = self.value else {
            return Err(self.invalid("a list"));
        };
        Ok(items.iter().enumerate().map(move |(at, value)| At {
            value,
            path: format!("{}[{at}]", self.path),
        }))
    }

    fn text(&self, expected: impl Display) -> Result<&'a str, Invalid> {
        self.value.as_str().ok_or_else(|| self.invalid(expected))
    }

    fn name(&self) -> Result<String, Invalid> {
        let text = self.text(NAME)?;
        if is_name(text) {
            Ok(text.to_owned())
        } else {
            Err(self.invalid(NAME))
        }
    }

    fn integer(&self, min: i64, max: i64) -> Result<i64, Invalid> {
        self.value
            .as_i64()
            .filter(|value| (min..=max).contains(value))
            .ok_or_else(|| self.invalid(format_args!("an integer from {min} to {max}")))
    }

    /// The one of `all` that the text names.
    fn word<T: Copy>(&self, all: &[T], name: impl Fn(T) -> &'static str) -> Result<T, Invalid> {
        let names: Vec<&str> = all.iter().map(|item| name(*item)).collect();
        let text = self.value.as_str();
        let found = all.iter().find(|item| Some(name(**item)) == text);
        found.copied().ok_or_else(|| {
            Invalid::new(
                &self.path,
                suggest(self.value, names.iter().copied()),
                one_of(&names),
            )
        })
    }
}

/// An object and where it stands.
struct Object<'a> {
    members: &'a Map<String, Value>,
    path: String,
}

impl<'a> Object<'a> {
    fn get(&self, key: &str) -> Option<At<'a>> {
        self.members.get(key).map(|value| At {
            value,
            path: member(&self.path, key),
        })
    }

    /// The items of an optional list.
    fn list(&self, key: &str) -> Result<Vec<At<'a>>, Invalid> {
        Ok(match self.get(key) {
            Some(list) => list.items()?.collect(),
            None => Vec::new(),
        })
    }

    fn required(&self, key: &str, expected: impl Display) -> Result<At<'a>, Invalid> {
        self.get(key).ok_or_else(|| {
            Invalid::new(member(&self.path, key), "nothing", expected)
                .advice(format_args!("add \"{key}\""))
        })
    }

    fn only(&self, known: &[&str]) -> Result<(), Invalid> {
        match self
            .members
            .keys()
            .find(|key| !known.contains(&key.as_str()))
        {
            None => Ok(()),
            Some(key) => Err(Invalid::new(
                member(&self.path, key),
                format_args!(
                    "the unknown key {}{}",
                    quote(key),
                    nearest(key, known.iter().copied())
                ),
                one_of(known),
            )
            .advice("correct or remove it")),
        }
    }

    /// The members that are not `keys`.
    fn without(&self, keys: &[&str]) -> Map<String, Value> {
        self.members
            .iter()
            .filter(|(key, _)| !keys.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }
}

/// [`did_you_mean`], but not for words so long that comparing them takes time.
fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    if word.len() > 100 {
        return String::new();
    }
    did_you_mean(word, known)
}

/// The value as an error shows it, with the nearest of `known`.
fn suggest<'a>(value: &Value, known: impl IntoIterator<Item = &'a str>) -> String {
    let near = value.as_str().map(|word| nearest(word, known));
    format!("{}{}", show(value), near.unwrap_or_default())
}

fn one_of(words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|word| format!("\"{word}\"")).collect();
    match words.as_slice() {
        [] => "nothing".to_owned(),
        [one] => one.clone(),
        [several @ .., last] => format!("{} or {last}", several.join(", ")),
    }
}

fn members(layout: Option<&Layout>) -> impl Iterator<Item = &str> {
    let fields = layout.map_or(&[][..], |layout| &layout.fields);
    fields.iter().map(|field| field.name.as_str())
}

/// A selector or an action, in the words of errors.
#[derive(Clone, Copy)]
enum Role {
    Selector,
    Action,
}

impl Role {
    fn key(self) -> &'static str {
        match self {
            Role::Selector => "selector",
            Role::Action => "action",
        }
    }

    fn other(self) -> Role {
        match self {
            Role::Selector => Role::Action,
            Role::Action => Role::Selector,
        }
    }

    fn find<'a>(self, registry: &'a Registry, name: &str) -> Option<&'a Policy> {
        match self {
            Role::Selector => registry.selector(name),
            Role::Action => registry.action(name),
        }
    }

    fn names(self, registry: &Registry) -> Vec<&str> {
        match self {
            Role::Selector => registry.selectors().map(|p| p.name.as_str()).collect(),
            Role::Action => registry.actions().map(|p| p.name.as_str()).collect(),
        }
    }
}

/// An action parameter that takes the element's argument.
struct Reader {
    path: String,
    policy: String,
    element: ElementParam,
}

/// What the keys of an inline list carry beside the key.
#[derive(Clone, Copy, PartialEq)]
enum Carried {
    Nothing,
    Number,
    Chain,
}

impl Carried {
    fn describe(self) -> &'static str {
        match self {
            Carried::Nothing => "no argument",
            Carried::Number => "\"arg\"",
            Carried::Chain => "\"chain\"",
        }
    }
}

/// Reads the values of one file.
pub(super) struct Parser<'a> {
    registry: &'a Registry,
    file: Option<&'a Path>,
}

impl<'a> Parser<'a> {
    pub(super) fn new(registry: &'a Registry, file: Option<&'a Path>) -> Self {
        Parser { registry, file }
    }

    /// A whole chain file.
    pub(super) fn spec(&self, value: &Value) -> Result<Spec, Invalid> {
        let file = At {
            value,
            path: "$".to_owned(),
        }
        .object()?;
        version(&file)?;
        file.only(&SPEC_KEYS)?;
        let mut spec = Spec::default();
        if let Some(sets) = file.get("sets") {
            spec.sets = self.sets(&sets.object()?)?;
        }
        for chain in file.list("chains")? {
            spec.chains.push(self.chain_at(chain)?);
        }
        Ok(spec)
    }

    /// One chain by itself.
    pub(super) fn chain(&self, value: &Value) -> Result<Chain, Invalid> {
        self.chain_at(At {
            value,
            path: "$".to_owned(),
        })
    }

    fn origin(&self, path: &str) -> Origin {
        Origin {
            file: self.file.map(Path::to_owned),
            path: path.to_owned(),
        }
    }

    fn sets(&self, sets: &Object) -> Result<BTreeMap<String, SetSpec>, Invalid> {
        let mut specs = BTreeMap::new();
        for (name, value) in sets.members {
            let path = member(&sets.path, name);
            if !is_name(name) {
                return Err(Invalid::new(path, quote(name), NAME).advice("rename the set"));
            }
            let set = At { value, path }.object()?;
            set.only(&SET_KEYS)?;
            specs.insert(name.clone(), self.set(&set)?);
        }
        Ok(specs)
    }

    fn set(&self, set: &Object) -> Result<SetSpec, Invalid> {
        let kinds = self.registry.set_kinds().map(|key| key.kind.as_str());
        let kinds: Vec<&str> = kinds.collect();
        let kind = set.required("kind", one_of(&kinds))?;
        let Some(name) = kind.value.as_str().filter(|name| kinds.contains(name)) else {
            let found = suggest(kind.value, kinds.iter().copied());
            return Err(Invalid::new(kind.path, found, one_of(&kinds)));
        };
        let size = set.required(
            "size",
            format_args!("the most elements it is to hold, 1 to {SET_SIZE_MAX}"),
        )?;
        let size = size.integer(1, SET_SIZE_MAX.into())?;
        Ok(SetSpec {
            kind: name.to_owned(),
            size: u32::try_from(size).unwrap_or(SET_SIZE_MAX),
        })
    }

    fn chain_at(&self, at: At) -> Result<Chain, Invalid> {
        let chain = at.object()?;
        chain.only(&CHAIN_KEYS)?;
        let name = chain.required("name", NAME)?.name()?;
        let attach = attachments(&chain)?;
        let priority = match chain.get("priority") {
            Some(priority) => priority.integer(PRIORITY_MIN.into(), PRIORITY_MAX.into())?,
            None => 0,
        };
        let mut selectors = Vec::new();
        for at in chain.list("selectors")? {
            selectors.push(self.selector(at, selectors.is_empty(), &attach)?);
        }
        let mut actions = Vec::new();
        let mut readers = Vec::new();
        let list = chain.list("actions")?;
        let last = list.len().saturating_sub(1);
        for (index, at) in list.into_iter().enumerate() {
            let (action, reader) = self.action(at, index == last, &attach)?;
            actions.push(action);
            readers.extend(reader);
        }
        check_readers(&readers, &selectors)?;
        Ok(Chain {
            name,
            attach,
            priority: i32::try_from(priority).unwrap_or_default(),
            selectors,
            actions,
            then: chain.get("then").map_or(Ok(Then::Pass), then)?,
            origin: self.origin(&chain.path),
        })
    }

    fn selector(&self, at: At, first: bool, attach: &[Attach]) -> Result<Selector, Invalid> {
        let object = at.object()?;
        let policy = self.policy(&object, Role::Selector, attach)?;
        object.only(&known(&SELECTOR_KEYS, policy.params.as_ref()))?;
        let op = object.get("op").map_or(Ok(Op::And), |op| {
            op.word(&[Op::And, Op::Or], |op| match op {
                Op::And => "and",
                Op::Or => "or",
            })
        })?;
        let negate = object.get("not").map_or(Ok(false), |not| {
            not.value
                .as_bool()
                .ok_or_else(|| not.invalid("true or false"))
        })?;
        let params = object.without(&SELECTOR_KEYS);
        let (_, mut references) = self.params(policy, &params, &object.path, false)?;
        let keys = self.keys(&object, policy, &mut references)?;
        Ok(Selector {
            policy: policy.name.clone(),
            op: if first { Op::And } else { op },
            negate,
            keys,
            params,
            kind: policy.key.as_ref().map(|key| key.kind.clone()),
            references,
            origin: self.origin(&object.path),
        })
    }

    fn action(
        &self,
        at: At,
        last: bool,
        attach: &[Attach],
    ) -> Result<(Action, Option<Reader>), Invalid> {
        let object = at.object()?;
        let policy = self.policy(&object, Role::Action, attach)?;
        let stored = policy.key.is_some().then_some("set");
        let keys: Vec<&str> = ACTION_KEYS.iter().copied().chain(stored).collect();
        object.only(&known(&keys, policy.params.as_ref()))?;
        if policy.terminal && !last {
            return Err(Invalid::new(
                member(&object.path, "action"),
                format_args!(
                    "\"{}\", which ends the chain, before other actions",
                    policy.name
                ),
                "an action that ends the chain in last place only",
            )
            .advice("move it to the end, or remove what follows it"));
        }
        let on_error = object
            .get("on_error")
            .map_or(Ok(OnError::default()), |word| {
                word.word(&OnError::ALL, OnError::name)
            })?;
        let set = match &policy.key {
            Some(key) => {
                let expected = format!("the name of a set of kind {}", key.kind);
                Keys::Set(object.required("set", expected)?.name()?)
            }
            None => Keys::None,
        };
        let params = object.without(&keys);
        let (packed, references) = self.params(policy, &params, &object.path, true)?;
        let reader = packed
            .and_then(|packed| packed.element)
            .map(|element| Reader {
                path: element_path(&object.path, &params),
                policy: policy.name.clone(),
                element,
            });
        let action = Action {
            policy: policy.name.clone(),
            on_error,
            keys: set,
            kind: policy.key.as_ref().map(|key| key.kind.clone()),
            cadence: cadence(&object)?,
            params,
            references,
            origin: self.origin(&object.path),
        };
        Ok((action, reader))
    }

    /// The policy an object names, which must run on every hook the chain is attached to.
    fn policy(
        &self,
        object: &Object,
        role: Role,
        attach: &[Attach],
    ) -> Result<&'a Policy, Invalid> {
        let key = role.key();
        let other = role.other();
        let expected = format!("the name of {} {key}", article(role));
        let advice = "`policy-chain policies` lists them";
        let Some(at) = object.get(key) else {
            let missing = Invalid::new(member(&object.path, key), "nothing", expected);
            return Err(if object.members.contains_key(other.key()) {
                missing.advice(format_args!(
                    "this is {} {}: move it to the chain's \"{}s\"",
                    article(other),
                    other.key(),
                    other.key()
                ))
            } else {
                missing.advice(format_args!("add \"{key}\"; {advice}"))
            });
        };
        let name = at.text(&expected)?;
        let Some(policy) = role.find(self.registry, name) else {
            if other.find(self.registry, name).is_some() {
                let found = format!(
                    "{}, which is {} {}",
                    quote(name),
                    article(other),
                    other.key()
                );
                return Err(Invalid::new(at.path, found, expected)
                    .advice(format_args!("move it to the chain's \"{}s\"", other.key())));
            }
            let found = suggest(at.value, role.names(self.registry));
            return Err(Invalid::new(at.path, found, expected).advice(advice));
        };
        check_hooks(policy, &at, attach)?;
        Ok(policy)
    }

    /// Packs parameters to see whether they fit, and collects the chains they name.
    fn params(
        &self,
        policy: &Policy,
        params: &Map<String, Value>,
        path: &str,
        allow_element: bool,
    ) -> Result<(Option<Packed>, Vec<Reference>), Invalid> {
        let Some(layout) = &policy.params else {
            return Ok((None, Vec::new()));
        };
        let names = Permissive::default();
        let packed = layout.pack(params, path, &[], &names, allow_element)?;
        let chains = names.into_chains();
        let references = chains.into_iter().map(|chain| {
            let by = params.iter().find(|(_, given)| names_chain(given, &chain));
            let path = by.map_or_else(|| path.to_owned(), |(key, _)| member(path, key));
            Reference {
                chain,
                origin: self.origin(&path),
            }
        });
        Ok((Some(packed), references.collect()))
    }

    fn keys(
        &self,
        selector: &Object,
        policy: &Policy,
        references: &mut Vec<Reference>,
    ) -> Result<Keys, Invalid> {
        let (set, keys) = (selector.get("set"), selector.get("keys"));
        let Some(key) = &policy.key else {
            return match set.or(keys) {
                None => Ok(Keys::None),
                Some(at) => Err(Invalid::new(
                    at.path,
                    format_args!("keys for \"{}\", which looks nothing up", policy.name),
                    one_of(&keyed(self.registry)),
                )
                .advice("remove it, or use a selector that looks packets up")),
            };
        };
        match (set, keys) {
            (Some(_), Some(keys)) => Err(Invalid::new(
                keys.path,
                "both \"set\" and \"keys\"",
                "one of the two",
            )
            .advice("add the keys to the set, or use two selectors joined by \"op\": \"or\"")),
            (Some(set), None) => Ok(Keys::Set(set.name()?)),
            (None, Some(keys)) => self.inline(keys, &key.layout, references),
            (None, None) if policy.params.is_none() => Err(Invalid::new(
                &selector.path,
                format_args!("\"{}\" without keys to look up", policy.name),
                "\"set\" or \"keys\"",
            )
            .advice(format_args!(
                "add \"set\" with the name of a set of kind {}, or \"keys\" with a list",
                key.kind
            ))),
            (None, None) => Ok(Keys::None),
        }
    }

    fn inline(
        &self,
        list: At,
        layout: &Layout,
        references: &mut Vec<Reference>,
    ) -> Result<Keys, Invalid> {
        let known = known(&ARGUMENT_KEYS, Some(layout));
        let whole = list.path.clone();
        let names = Permissive::default();
        let mut seen = HashSet::new();
        let mut carried_by_first = None;
        let mut keys = Vec::new();
        for at in list.items()? {
            let key = at.object()?;
            key.only(&known)?;
            let carried = carried(&key)?;
            let first = *carried_by_first.get_or_insert(carried);
            if carried != first {
                return Err(Invalid::new(
                    &key.path,
                    format_args!("a key with {}", carried.describe()),
                    format_args!("{}, as in the list's first key", first.describe()),
                )
                .advice("give all keys of the list the same"));
            }
            if carried == Carried::Chain {
                let chain = key.required("chain", NAME)?;
                references.push(Reference {
                    chain: chain.name()?,
                    origin: self.origin(&chain.path),
                });
            }
            let packed = layout.pack(key.members, &key.path, &ARGUMENT_KEYS, &names, false)?;
            if !seen.insert(packed.bytes) {
                return Err(Invalid::new(
                    &key.path,
                    show(&key.without(&ARGUMENT_KEYS).into()),
                    "each key once",
                )
                .advice("remove the key, the list has it already"));
            }
            keys.push(key.members.clone());
        }
        if keys.is_empty() {
            return Err(Invalid::new(whole, "an empty list", "at least one key")
                .advice("add a key, use a set, or remove the selector"));
        }
        Ok(Keys::Inline(keys))
    }
}

/// How often an action is done to the packets of a flow, by at most one of three keys.
fn cadence(action: &Object) -> Result<Option<Cadence>, Invalid> {
    const DURATION: &str = "a duration such as \"5s\" (units ns us ms s m h), above 0";
    let mut given = ["once", "first", "every"]
        .into_iter()
        .filter_map(|key| Some((key, action.get(key)?)));
    let Some((key, at)) = given.next() else {
        return Ok(None);
    };
    if let Some((other, second)) = given.next() {
        return Err(Invalid::new(
            second.path,
            format_args!("both \"{key}\" and \"{other}\""),
            "one of \"once\", \"first\" and \"every\"",
        )
        .advice("keep the one that is meant"));
    }
    Ok(Some(match key {
        "once" => match at.value.as_bool() {
            Some(true) => Cadence::First(1),
            Some(false) => Cadence::Always,
            None => return Err(at.invalid("true or false")),
        },
        "first" => {
            let count = at.integer(1, i64::from(u32::MAX))?;
            Cadence::First(u32::try_from(count).unwrap_or(u32::MAX))
        }
        _ => match parse_duration(at.text(DURATION)?).filter(|span| *span > 0) {
            Some(span) => Cadence::Every(span),
            None => return Err(at.invalid(DURATION)),
        },
    }))
}

fn version(file: &Object) -> Result<(), Invalid> {
    let version = file.get("version").ok_or_else(|| {
        Invalid::new("$.version", "nothing", VERSION)
            .advice(format_args!("add \"version\": {VERSION}"))
    })?;
    if version.value.as_u64() == Some(VERSION) {
        return Ok(());
    }
    Err(version
        .invalid(VERSION)
        .advice(format_args!("this program reads version {VERSION} only")))
}

fn attachments(chain: &Object) -> Result<Vec<Attach>, Invalid> {
    let mut attachments: Vec<Attach> = Vec::new();
    for at in chain.list("attach")? {
        let object = at.object()?;
        object.only(&ATTACH_KEYS)?;
        let attach = attachment(&object)?;
        let same = |other: &Attach| other.device == attach.device && other.hook == attach.hook;
        if let Some(other) = attachments.iter().position(same) {
            return Err(Invalid::new(
                &object.path,
                format_args!(
                    "{} of {}, as in {}.attach[{other}]",
                    attach.hook, attach.device, chain.path
                ),
                "each device and hook once",
            )
            .advice("remove one of the two"));
        }
        attachments.push(attach);
    }
    Ok(attachments)
}

fn attachment(object: &Object) -> Result<Attach, Invalid> {
    const DEVICE: &str = "an interface name, or a pattern with * and ?: 1 to 15 bytes without \"/\", \":\" or blanks, \
         not \".\" or \"..\"";
    let device = object.required("device", DEVICE)?;
    let name = device.text(DEVICE)?;
    if !is_device_name(name) {
        return Err(device
            .invalid(DEVICE)
            .advice("`ip link` lists the interfaces"));
    }
    let hooks = Hook::ALL.map(Hook::name);
    let hook = object
        .required("hook", one_of(&hooks))?
        .word(&Hook::ALL, Hook::name)?;
    let mode = match object.get("mode") {
        Some(mode) => mode_of(&mode, hook)?,
        None => Mode::Auto,
    };
    let checksum = match object.get("checksum") {
        Some(checksum) => checksum_of(&checksum, hook)?,
        None => Checksum::Auto,
    };
    Ok(Attach {
        device: name.to_owned(),
        hook,
        mode,
        checksum,
    })
}

fn checksum_of(at: &At, hook: Hook) -> Result<Checksum, Invalid> {
    let checksum = at.word(&Checksum::ALL, Checksum::name)?;
    if hook.family() == Family::Tc && checksum != Checksum::Auto {
        return Err(at
            .invalid("\"auto\" on a TC hook")
            .advice("leave it out: the kernel tells TC programs how far each checksum is done"));
    }
    Ok(checksum)
}

fn mode_of(at: &At, hook: Hook) -> Result<Mode, Invalid> {
    at.word(Mode::of(hook), Mode::name)
        .map_err(|error| Invalid {
            expected: format!("{} on hook {hook}", error.expected),
            ..error
        })
}

fn then(at: At) -> Result<Then, Invalid> {
    const EXPECTED: &str = "\"pass\", \"drop\", \"continue\" or {\"goto\": NAME}";
    match at.value {
        Value::Object(_) => {
            let object = at.object()?;
            object.only(&["goto"])?;
            Ok(Then::Goto(object.required("goto", NAME)?.name()?))
        }
        Value::String(word) => match word.as_str() {
            "pass" => Ok(Then::Pass),
            "drop" => Ok(Then::Drop),
            "continue" => Ok(Then::Continue),
            _ => {
                let found = suggest(at.value, ["pass", "drop", "continue"]);
                Err(Invalid::new(at.path, found, EXPECTED))
            }
        },
        _ => Err(at.invalid(EXPECTED)),
    }
}

fn article(role: Role) -> &'static str {
    match role {
        Role::Selector => "a",
        Role::Action => "an",
    }
}

/// All keys an object may have.
fn known<'a>(reserved: &[&'a str], layout: Option<&'a Layout>) -> Vec<&'a str> {
    reserved.iter().copied().chain(members(layout)).collect()
}

/// Names of the selectors that look packets up.
fn keyed(registry: &Registry) -> Vec<&str> {
    let keyed = registry.selectors().filter(|policy| policy.key.is_some());
    keyed.map(|policy| policy.name.as_str()).collect()
}

pub(super) fn check_hooks(policy: &Description, at: &At, attach: &[Attach]) -> Result<(), Invalid> {
    let runs_on = |hook: Hook| {
        policy.hooks.is_empty()
            || policy
                .hooks
                .iter()
                .any(|name| Hook::from_str(name) == Ok(hook))
    };
    let Some(missing) = attach.iter().find(|attach| !runs_on(attach.hook)) else {
        return Ok(());
    };
    Err(Invalid::new(
        &at.path,
        format_args!(
            "\"{}\" in a chain attached to {} of {}",
            policy.name, missing.hook, missing.device
        ),
        format_args!("a policy that runs on {}", missing.hook),
    )
    .advice(format_args!(
        "\"{}\" runs on {} only: attach the chain there, or split it",
        policy.name,
        policy.hooks.join(", ")
    )))
}

fn carried(key: &Object) -> Result<Carried, Invalid> {
    match (key.get("arg"), key.get("chain")) {
        (Some(_), Some(chain)) => {
            Err(
                Invalid::new(chain.path, "both \"arg\" and \"chain\"", "one of the two")
                    .advice("an element has one argument: keep the one the action reads"),
            )
        }
        (Some(arg), None) if arg.value.as_u64().is_none() => {
            Err(arg.invalid(format_args!("an integer from 0 to {}", u64::MAX)))
        }
        (Some(_), None) => Ok(Carried::Number),
        (None, Some(_)) => Ok(Carried::Chain),
        (None, None) => Ok(Carried::Nothing),
    }
}

/// Whether a parameter's value is the name, or a list with it.
fn names_chain(value: &Value, name: &str) -> bool {
    match value {
        Value::Array(items) => items.iter().any(|item| item == name),
        _ => value == name,
    }
}

/// Path of the parameter given as `{"from": "element"}`.
fn element_path(path: &str, params: &Map<String, Value>) -> String {
    let from = params.iter().find(|(_, value)| value.get("from").is_some());
    from.map_or_else(|| path.to_owned(), |(key, _)| member(path, key))
}

/// Checks that what actions take from the element is there and of their type.
fn check_readers(readers: &[Reader], selectors: &[Selector]) -> Result<(), Invalid> {
    let Some(first) = readers.first() else {
        return Ok(());
    };
    let keyed: Vec<&Selector> = selectors
        .iter()
        .filter(|selector| !selector.negate && selector.keys != Keys::None)
        .collect();
    if keyed.is_empty() {
        return Err(Invalid::new(
            &first.path,
            "{\"from\":\"element\"} without a selector whose element to read",
            "a selector of the same chain with \"set\" or \"keys\", not negated",
        )
        .advice("add such a selector, or give the value here"));
    }
    let chain = |reader: &Reader| reader.element.is_chain;
    if let Some(other) = readers.iter().find(|reader| chain(reader) != chain(first)) {
        let kind = |reader| if chain(reader) { "a chain" } else { "a number" };
        return Err(Invalid::new(
            &other.path,
            format_args!(
                "\"{}\" reads {} from the element",
                other.policy,
                kind(other)
            ),
            format_args!("{}, as {} does", kind(first), first.path),
        )
        .advice("an element has one argument: give one of the two values in the file"));
    }
    for selector in keyed {
        check_arguments(readers, first, selector)?;
    }
    Ok(())
}

/// Checks the arguments of a selector's inline keys; those of a set are not in the file.
fn check_arguments(readers: &[Reader], first: &Reader, selector: &Selector) -> Result<(), Invalid> {
    let Keys::Inline(keys) = &selector.keys else {
        return Ok(());
    };
    let wanted = if first.element.is_chain {
        "chain"
    } else {
        "arg"
    };
    for (index, key) in keys.iter().enumerate() {
        let path = format!("{}.keys[{index}]", selector.origin.path);
        let Some(value) = key.get(wanted) else {
            let found = Value::Object(key.clone());
            return Err(Invalid::new(
                path,
                format_args!("{} without \"{wanted}\"", show(&found)),
                format_args!("a key with \"{wanted}\", which {} reads", first.path),
            )
            .advice(format_args!("add \"{wanted}\" to every key of the list")));
        };
        for reader in readers {
            check_range(reader, value, &path)?;
        }
    }
    Ok(())
}

fn check_range(reader: &Reader, value: &Value, key: &str) -> Result<(), Invalid> {
    let ElementParam { min, max, .. } = reader.element;
    match value.as_u64() {
        Some(arg) if !(min..=max).contains(&arg) => Err(Invalid::new(
            member(key, "arg"),
            arg,
            format_args!("{min} to {max}, the range of {}", reader.path),
        )),
        _ => Ok(()),
    }
}
