// SPDX-License-Identifier: MIT OR Apache-2.0
//! Chain files as the model understands them. What it does not know of is a failure: a policy or
//! a parameter must not go untested.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Map, Value};

use crate::layers;
use crate::options;
use crate::signals;
use crate::sums::Kind;

/// Policies and their parameters, in the order of the registry.
pub const SELECTORS: [(&str, &[&str]); 8] = [
    (
        "flow",
        &[
            "local",
            "remote",
            "src",
            "dst",
            "local_port",
            "remote_port",
            "src_port",
            "dst_port",
            "protocol",
            "reverse",
        ],
    ),
    ("ip_pair", &["local", "remote", "src", "dst", "reverse"]),
    (
        "mptcp",
        &[
            "subtype",
            "version",
            "flags",
            "backup",
            "echo",
            "address_id",
        ],
    ),
    ("mptcp_connection", &[]),
    ("prefix", &["local", "remote", "src", "dst", "end"]),
    (
        "service",
        &["local_port", "remote_port", "port", "protocol", "end"],
    ),
    ("tcp", &[]),
    ("tcp_flags", &["all", "any", "none"]),
];

pub const ACTIONS: [(&str, &[&str]); 18] = [
    ("add_subflow", &["address", "id", "port", "apart"]),
    ("count", &[]),
    ("drop", &[]),
    ("goto", &["chain"]),
    ("hold_add_addr", &[]),
    ("insert_option", &["kind", "data", "again"]),
    ("learn", &["expire"]),
    ("mp_prio", &["backup"]),
    ("pass", &[]),
    ("record", &[]),
    ("redirect", &["device", "neighbour", "src_mac", "dst_mac"]),
    ("remove_addr", &["id", "unsafe"]),
    ("report", &[]),
    ("reset_subflow", &["reason", "transient"]),
    ("restore_add_addr", &["after", "apart", "repeat"]),
    ("set_mss", &["bytes", "mode"]),
    ("set_window", &["bytes", "raw", "max"]),
    ("strip_option", &["kind", "subtype", "mode", "unsafe"]),
];

pub struct File(pub BTreeMap<String, Chain>);

pub struct Chain {
    /// Where it attaches: `checksum`, if it is told.
    pub checksum: Option<Kind>,
    /// What `or` separates.
    pub alternatives: Vec<Vec<Selector>>,
    pub actions: Vec<Action>,
    pub then: Then,
}

pub enum Then {
    Pass,
    Drop,
    Goto(String),
}

pub struct Selector {
    pub policy: String,
    pub not: bool,
    pub asks: Asks,
    /// All must hold.
    pub conditions: Vec<Condition>,
    /// One must be the packet's.
    pub keys: Option<Vec<Key>>,
    /// An MPTCP option must be there.
    pub signal: Option<signals::Wanted>,
}

/// How far a selector looks into a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Asks {
    Addresses,
    Ports,
    /// Ports, and nothing of a packet that has none.
    PortsOnly,
    Tcp,
    /// Its MPTCP options.
    Signals,
    /// The tokens of its MPTCP connection.
    Tokens,
}

/// An end of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    Local,
    Remote,
    Src,
    Dst,
}

pub enum Condition {
    Address(End, Network),
    Port(End, Ports),
    EitherPort(Ports),
    Protocol(u8),
    AllFlags(u16),
    AnyFlag(u16),
    NoFlag(u16),
}

pub struct Key {
    pub conditions: Vec<Condition>,
    pub token: Option<u32>,
    pub argument: Option<Argument>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Argument {
    Number(u64),
    Chain(String),
}

/// Of numbers as [`layers::as_number`] makes them.
#[derive(Clone, Copy)]
pub struct Network {
    address: u128,
    pub length: u32,
}

/// Ranges of ports.
pub struct Ports(Vec<(u16, u16)>);

pub struct Action {
    pub policy: String,
    pub on_error: OnError,
    pub turns: Turns,
    pub what: What,
}

/// How often it is done to packets of a flow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Turns {
    /// To every packet, whatever it is.
    Always,
    First(u64),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    Continue,
    Pass,
    Drop,
}

pub enum What {
    Count,
    Drop,
    Pass,
    /// `None`: the chain that the element names.
    Goto(Option<String>),
    InsertOption {
        kind: Number,
        data: Vec<u8>,
        again: bool,
    },
    Redirect {
        neighbour: bool,
        src_mac: Option<[u8; 6]>,
        dst_mac: Option<[u8; 6]>,
    },
    SetMss {
        bytes: Number,
        clamp: bool,
    },
    SetWindow {
        bytes: Number,
        raw: bool,
        max: bool,
    },
    StripOption {
        kind: Number,
        subtype: Option<u8>,
        mode: Mode,
        sure: bool,
    },
    AddSubflow {
        address: IpAddr,
        id: Number,
        port: Option<u16>,
    },
    HoldAddAddr,
    MpPrio {
        backup: bool,
    },
    Record,
    Learn,
    RemoveAddr {
        id: Number,
        sure: bool,
    },
    Report,
    ResetSubflow {
        reason: u8,
        transient: bool,
    },
    RestoreAddAddr {
        /// Longer than any test takes.
        never: bool,
        /// Kept until it is echoed; until it is given again is longer than any test takes, too.
        repeat: bool,
    },
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Auto,
    Nop,
    Remove,
}

/// A parameter: its value, or the element's argument.
#[derive(Clone, Copy)]
pub enum Number {
    Is(u32),
    FromElement,
}

impl Network {
    fn new(text: &str) -> Network {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length.parse::<u32>().unwrap())),
            None => (text, None),
        };
        let parsed: IpAddr = address.parse().unwrap();
        let length = match parsed {
            IpAddr::V4(_) => 96 + length.unwrap_or(32),
            IpAddr::V6(_) => length.unwrap_or(128),
        };
        Network {
            address: layers::as_number(parsed),
            length,
        }
    }

    pub fn holds(&self, address: IpAddr) -> bool {
        let differs = layers::as_number(address) ^ self.address;
        differs.leading_zeros() >= self.length
    }
}

impl Ports {
    fn new(value: &Value) -> Ports {
        let items = match value {
            Value::Array(items) => items.clone(),
            one => vec![one.clone()],
        };
        Ports(items.iter().map(port_range).collect())
    }

    pub fn holds(&self, port: u16) -> bool {
        self.0
            .iter()
            .any(|(low, high)| (*low..=*high).contains(&port))
    }
}

fn port_range(value: &Value) -> (u16, u16) {
    let one = |text: &str| text.parse::<u16>().unwrap_or_else(|_| service(text));
    match value {
        Value::String(text) => match text.split_once('-') {
            Some((low, high)) => (one(low), one(high)),
            None => (one(text), one(text)),
        },
        number => {
            let port = number.as_u64().unwrap() as u16;
            (port, port)
        }
    }
}

/// IANA's registry, as far as the generator uses it.
fn service(name: &str) -> u16 {
    match name {
        "http" => 80,
        "https" => 443,
        _ => panic!("the model does not know the service {name}"),
    }
}

fn protocol(value: &Value) -> u8 {
    match value.as_str() {
        Some("icmp") => 1,
        Some("tcp") => 6,
        Some("udp") => 17,
        Some("icmpv6") => 58,
        Some("sctp") => 132,
        Some(other) => panic!("the model does not know the protocol {other}"),
        None => value.as_u64().unwrap() as u8,
    }
}

fn flags(value: &Value) -> u16 {
    const NAMES: [&str; 9] = ["fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr", "ae"];
    let one = |value: &Value| {
        let name = value.as_str().unwrap();
        1 << NAMES.iter().position(|known| *known == name).unwrap()
    };
    match value {
        Value::Array(items) => items.iter().map(one).sum(),
        item => one(item),
    }
}

fn option_kind(value: &Value) -> Number {
    let Some(name) = value.as_str() else {
        return number(value);
    };
    Number::Is(match name {
        "eol" => 0,
        "nop" => 1,
        "mss" => 2,
        "window_scale" => 3,
        "sack_permitted" => 4,
        "sack" => 5,
        "timestamps" => 8,
        "md5" => 19,
        "user_timeout" => 28,
        "ao" => 29,
        "mptcp" => u32::from(options::MPTCP),
        "fast_open" => 34,
        _ => panic!("the model does not know the option {name}"),
    })
}

fn subtype(value: &Value) -> Option<u8> {
    const NAMES: [&str; 9] = [
        "mp_capable",
        "mp_join",
        "dss",
        "add_addr",
        "remove_addr",
        "mp_prio",
        "mp_fail",
        "mp_fastclose",
        "mp_tcprst",
    ];
    match value.as_str() {
        Some("any") => None,
        Some(name) => Some(NAMES.iter().position(|known| *known == name).unwrap() as u8),
        None => Some(value.as_u64().unwrap() as u8),
    }
}

/// Spans that are over at once, and those that no test waits for.
fn is_long(span: &str) -> bool {
    match span {
        "1ns" => false,
        "1h" => true,
        _ => panic!("the model does not know a span of {span}"),
    }
}

fn turns(members: &mut Members, by_default: Turns) -> Turns {
    let once = members.get("once").map(|it| it.as_bool().unwrap());
    let first = members.get("first").map(|it| it.as_u64().unwrap());
    let every = members.text("every").map(is_long);
    match (once, first, every) {
        (None, None, None) => by_default,
        (Some(true), ..) | (.., Some(true)) => Turns::First(1),
        (_, Some(count), _) => Turns::First(count),
        (.., Some(false)) => Turns::First(u64::MAX),
        (Some(false), ..) => Turns::Always,
    }
}

/// RFC 8684, 3.6.
fn reset_reason(value: Option<&Value>) -> u8 {
    const NAMES: [&str; 7] = [
        "unspecified",
        "mptcp_error",
        "lack_of_resources",
        "administrative",
        "too_much_data",
        "unacceptable_performance",
        "middlebox",
    ];
    let named = |name: &str| NAMES.iter().position(|known| *known == name).unwrap() as u8;
    match value {
        None => named("administrative"),
        Some(Value::String(name)) => named(name),
        Some(number) => number.as_u64().unwrap() as u8,
    }
}

fn number(value: &Value) -> Number {
    match value {
        Value::Object(from) => {
            assert_eq!(from["from"], "element");
            Number::FromElement
        }
        value => Number::Is(value.as_u64().unwrap() as u32),
    }
}

fn mac(value: &Value) -> [u8; 6] {
    let bytes = value.as_str().unwrap().split(':');
    let bytes = bytes.map(|byte| u8::from_str_radix(byte, 16).unwrap());
    bytes.collect::<Vec<_>>().try_into().unwrap()
}

pub fn unhex(text: &str) -> Vec<u8> {
    let digit = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(digit).collect()
}

/// Members of an object, of which all must be asked for.
struct Members<'a> {
    all: &'a Map<String, Value>,
    known: Vec<&'static str>,
}

impl<'a> Members<'a> {
    fn new(value: &'a Value) -> Members<'a> {
        Members {
            all: value.as_object().unwrap(),
            known: Vec::new(),
        }
    }

    fn get(&mut self, name: &'static str) -> Option<&'a Value> {
        self.known.push(name);
        self.all.get(name)
    }

    fn text(&mut self, name: &'static str) -> Option<&'a str> {
        self.get(name).map(|value| value.as_str().unwrap())
    }

    fn flag(&mut self, name: &'static str) -> bool {
        self.get(name).is_some_and(|value| value.as_bool().unwrap())
    }

    fn list(&mut self, name: &'static str) -> Vec<&'a Value> {
        let value = self.get(name);
        value.map_or(Vec::new(), |list| list.as_array().unwrap().iter().collect())
    }

    fn end(self) {
        for name in self.all.keys() {
            let known = self.known.contains(&name.as_str());
            assert!(
                known,
                "the model does not know \"{name}\" of {:?}",
                self.all
            );
        }
    }
}

impl File {
    pub fn new(file: &Value) -> File {
        let chains = file["chains"].as_array().unwrap().iter();
        let named = |chain: &Value| {
            let name = chain["name"].as_str().unwrap().to_owned();
            (name, Chain::new(chain, &file["elements"]))
        };
        File(chains.map(named).collect())
    }
}

impl Chain {
    /// `elements` are those of named sets.
    fn new(chain: &Value, elements: &Value) -> Chain {
        let mut members = Members::new(chain);
        members.get("name");
        let place = members.list("attach").into_iter().next();
        let checksum = place.and_then(|place| place.get("checksum")?.as_str());
        let checksum = match checksum {
            None | Some("auto") => None,
            Some("complete") => Some(Kind::Complete),
            Some("partial") => Some(Kind::Partial),
            Some(other) => panic!("the model does not know checksum: {other}"),
        };
        let mut alternatives: Vec<Vec<Selector>> = Vec::new();
        for item in members.list("selectors") {
            let (or, selector) = Selector::new(item, elements);
            match alternatives.last_mut() {
                Some(last) if !or => last.push(selector),
                _ => alternatives.push(vec![selector]),
            }
        }
        let actions = members.list("actions").into_iter().map(Action::new);
        let actions = actions.collect();
        let then = match members.get("then") {
            None => Then::Pass,
            Some(Value::String(then)) => match then.as_str() {
                // there is no chain behind it
                "pass" | "continue" => Then::Pass,
                "drop" => Then::Drop,
                _ => panic!("the model does not know then: {then}"),
            },
            Some(then) => Then::Goto(then["goto"].as_str().unwrap().to_owned()),
        };
        members.end();
        Chain {
            checksum,
            alternatives,
            actions,
            then,
        }
    }
}

const ENDS: [(&str, &str, End); 4] = [
    ("local", "local_port", End::Local),
    ("remote", "remote_port", End::Remote),
    ("src", "src_port", End::Src),
    ("dst", "dst_port", End::Dst),
];

fn addresses(members: &mut Members, conditions: &mut Vec<Condition>) {
    for (name, _, end) in ENDS {
        if let Some(text) = members.text(name) {
            conditions.push(Condition::Address(end, Network::new(text)));
        }
    }
}

fn ports(members: &mut Members, ends: &[(&str, &'static str, End)], to: &mut Vec<Condition>) {
    for (_, name, end) in ends {
        if let Some(value) = members.get(name) {
            to.push(Condition::Port(*end, Ports::new(value)));
        }
    }
}

impl End {
    fn named(name: Option<&str>, default: End) -> End {
        match name {
            None => default,
            Some(name) => ENDS.iter().find(|(known, ..)| *known == name).unwrap().2,
        }
    }

    fn reversed(self, reverse: bool) -> End {
        match (self, reverse) {
            (End::Local, true) => End::Remote,
            (End::Remote, true) => End::Local,
            _ => self,
        }
    }
}

impl Selector {
    /// And whether it begins an alternative.
    fn new(item: &Value, elements: &Value) -> (bool, Selector) {
        let mut members = Members::new(item);
        let policy = members.text("selector").unwrap().to_owned();
        let or = match members.text("op") {
            None | Some("and") => false,
            Some("or") => true,
            Some(op) => panic!("the model does not know op: {op}"),
        };
        let not = members.flag("not");
        let named = members.text("set").map(|set| &elements[set]);
        let keys = members.get("keys").or(named);
        // a set without elements is empty
        let keys = keys.map(|keys| keys.as_array().map_or(&[][..], Vec::as_slice));
        let mut conditions = Vec::new();
        let mut end = End::Remote;
        let mut reverse = false;
        let mut signal = None;
        let asks = match policy.as_str() {
            "tcp" => {
                conditions.push(Condition::Protocol(6));
                Asks::Addresses
            }
            "tcp_flags" => {
                let mut flags = |name| members.get(name).map(flags);
                conditions.extend(flags("all").map(Condition::AllFlags));
                conditions.extend(flags("any").map(Condition::AnyFlag));
                conditions.extend(flags("none").map(Condition::NoFlag));
                Asks::Tcp
            }
            "ip_pair" => {
                addresses(&mut members, &mut conditions);
                reverse = members.flag("reverse");
                Asks::Addresses
            }
            "prefix" => {
                addresses(&mut members, &mut conditions);
                end = End::named(members.text("end"), End::Remote);
                Asks::Addresses
            }
            "flow" => {
                addresses(&mut members, &mut conditions);
                ports(&mut members, &ENDS, &mut conditions);
                conditions.extend(
                    members
                        .get("protocol")
                        .map(|it| Condition::Protocol(protocol(it))),
                );
                reverse = members.flag("reverse");
                Asks::Ports
            }
            "service" => {
                ports(&mut members, &ENDS[..2], &mut conditions);
                let either = members.get("port");
                conditions.extend(either.map(|it| Condition::EitherPort(Ports::new(it))));
                let protocols = members.get("protocol").filter(|it| **it != "any");
                conditions.extend(protocols.map(|it| Condition::Protocol(protocol(it))));
                end = End::named(members.text("end"), End::Local);
                Asks::PortsOnly
            }
            "mptcp" => {
                let byte = |value: &Value| value.as_u64().unwrap() as u8;
                let named = |value: &Value| subtype(value).unwrap();
                signal = Some(signals::Wanted {
                    subtypes: signals::numbers(members.get("subtype"), named),
                    versions: signals::numbers(members.get("version"), byte),
                    flags: members.get("flags").map_or(0, byte),
                    backup: signals::bit(members.text("backup")),
                    echo: signals::bit(members.text("echo")),
                    ids: signals::numbers(members.get("address_id"), byte),
                });
                Asks::Signals
            }
            "mptcp_connection" => Asks::Tokens,
            _ => panic!("the model does not know the selector {policy}"),
        };
        members.end();
        let key = |item| Key::new(&policy, item, end, reverse);
        let selector = Selector {
            not,
            asks,
            conditions,
            keys: keys.map(|keys| keys.iter().map(key).collect()),
            signal,
            policy,
        };
        (or, selector)
    }
}

impl Key {
    fn new(policy: &str, item: &Value, end: End, reverse: bool) -> Key {
        let mut members = Members::new(item);
        let mut conditions = Vec::new();
        let with_address = |members: &mut Members, name, end: End| {
            let network = Network::new(members.text(name).unwrap());
            Condition::Address(end, network)
        };
        if policy == "flow" || policy == "ip_pair" {
            for (name, _, end) in &ENDS[..2] {
                conditions.push(with_address(&mut members, name, end.reversed(reverse)));
            }
        }
        match policy {
            "flow" => {
                for (_, name, end) in &ENDS[..2] {
                    let ports = Ports::new(members.get(name).unwrap());
                    conditions.push(Condition::Port(end.reversed(reverse), ports));
                }
            }
            "service" => {
                let ports = Ports::new(members.get("port").unwrap());
                conditions.push(Condition::Port(end, ports));
            }
            "prefix" => conditions.push(with_address(&mut members, "prefix", end)),
            _ => {}
        }
        if policy == "flow" || policy == "service" {
            let number = members.get("protocol").map_or(6, protocol);
            conditions.push(Condition::Protocol(number));
        }
        let token = members.text("token");
        let token = token.map(|digits| u32::from_str_radix(digits, 16).unwrap());
        let number = members.get("arg");
        let chain = members.text("chain");
        let argument = match (number, chain) {
            (Some(number), _) => Some(Argument::Number(number.as_u64().unwrap())),
            (None, Some(chain)) => Some(Argument::Chain(chain.to_owned())),
            (None, None) => None,
        };
        members.end();
        Key {
            conditions,
            token,
            argument,
        }
    }

    /// Bits that its networks say of addresses: the key that says more counts.
    pub fn length(&self) -> u32 {
        let lengths = self.conditions.iter().map(|condition| match condition {
            Condition::Address(_, network) => network.length,
            _ => 0,
        });
        lengths.sum()
    }
}

impl Action {
    fn new(item: &Value) -> Action {
        let mut members = Members::new(item);
        let policy = members.text("action").unwrap().to_owned();
        let on_error = match members.text("on_error") {
            None | Some("continue") => OnError::Continue,
            Some("pass") => OnError::Pass,
            Some("drop") => OnError::Drop,
            Some(other) => panic!("the model does not know on_error: {other}"),
        };
        let what = match policy.as_str() {
            "count" => What::Count,
            "drop" => What::Drop,
            "pass" => What::Pass,
            "goto" => What::Goto(members.get("chain").unwrap().as_str().map(str::to_owned)),
            "insert_option" => What::InsertOption {
                kind: option_kind(members.get("kind").unwrap()),
                data: unhex(members.text("data").unwrap_or_default()),
                again: members.flag("again"),
            },
            "redirect" => {
                members.text("device").unwrap();
                What::Redirect {
                    neighbour: members.flag("neighbour"),
                    src_mac: members.get("src_mac").map(mac),
                    dst_mac: members.get("dst_mac").map(mac),
                }
            }
            "set_mss" => What::SetMss {
                bytes: number(members.get("bytes").unwrap()),
                clamp: match members.text("mode") {
                    None | Some("clamp") => true,
                    Some("set") => false,
                    Some(mode) => panic!("the model does not know mode: {mode}"),
                },
            },
            "set_window" => What::SetWindow {
                bytes: number(members.get("bytes").unwrap()),
                raw: members.flag("raw"),
                max: members.flag("max"),
            },
            "strip_option" => What::StripOption {
                kind: option_kind(members.get("kind").unwrap()),
                subtype: members.get("subtype").and_then(subtype),
                mode: match members.text("mode") {
                    None | Some("auto") => Mode::Auto,
                    Some("nop") => Mode::Nop,
                    Some("remove") => Mode::Remove,
                    Some(mode) => panic!("the model does not know mode: {mode}"),
                },
                sure: members.flag("unsafe"),
            },
            "add_subflow" => What::AddSubflow {
                address: members.text("address").unwrap().parse().unwrap(),
                id: number(members.get("id").unwrap()),
                port: members.get("port").map(|it| it.as_u64().unwrap() as u16),
            },
            "hold_add_addr" => What::HoldAddAddr,
            "mp_prio" => What::MpPrio {
                backup: members.get("backup").unwrap().as_bool().unwrap(),
            },
            "learn" => {
                members.text("set").unwrap();
                What::Learn
            }
            "record" => What::Record,
            "remove_addr" => What::RemoveAddr {
                id: number(members.get("id").unwrap()),
                sure: members.flag("unsafe"),
            },
            "report" => What::Report,
            "reset_subflow" => What::ResetSubflow {
                reason: reset_reason(members.get("reason")),
                transient: members.flag("transient"),
            },
            "restore_add_addr" => What::RestoreAddAddr {
                never: members.text("after").is_some_and(is_long),
                repeat: members.text("repeat").unwrap() != "0s",
            },
            _ => panic!("the model does not know the action {policy}"),
        };
        // There is no clock here.
        assert!(members.text("apart").is_none_or(|apart| apart == "0ns"));
        let once = ["add_subflow", "mp_prio", "remove_addr"].contains(&policy.as_str());
        let by_default = match once {
            true => Turns::First(1),
            false => Turns::Always,
        };
        let turns = turns(&mut members, by_default);
        members.end();
        Action {
            policy,
            on_error,
            turns,
            what,
        }
    }
}
