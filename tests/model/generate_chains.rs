// SPDX-License-Identifier: MIT OR Apache-2.0
//! Chain files over the whole catalogue of policies.

use policy_chain::hook::{Family, Hook};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Map, Value, json};

use crate::differential::GONE;
use crate::generate_packets::{ADDRESSES, CONNECTIONS, MPTCP_KEYS, PORTS};
use crate::judge::MAIN;
use crate::subflows::token;
use crate::world::DEVICE;

/// What keys carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carries {
    Nothing,
    Number,
    Chain,
}

const SUBS: [&str; 2] = ["sub", "last"];
/// In the range of every parameter that takes one, and worth taking.
const ARGUMENTS: [u64; 5] = [3, 8, 30, 253, 254];
const NETWORKS: [&str; 8] = [
    "10.0.0.0/8",
    "10.0.0.1/32",
    "10.0.0.0/31",
    "0.0.0.0/0",
    "2001:db8::/32",
    "2001:db8::2/127",
    "::/0",
    "2001:db8::1",
];

/// An object of those members that have a value.
fn object(members: Vec<(&str, Option<Value>)>) -> Value {
    let members = members
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)));
    Value::Object(members.collect::<Map<_, _>>())
}

/// `option::weighted()`, which wants neither 0 nor 1.
fn weighted<S>(share: f64, of: S) -> BoxedStrategy<Option<S::Value>>
where
    S: Strategy + 'static,
    S::Value: Clone + 'static,
{
    if share <= 0.0 {
        Just(None).boxed()
    } else if share >= 1.0 {
        of.prop_map(Some).boxed()
    } else {
        option::weighted(share, of).boxed()
    }
}

fn maybe<S>(of: S) -> impl Strategy<Value = Option<Value>>
where
    S: Strategy + 'static,
    S::Value: Into<Value>,
{
    weighted(0.2, of.prop_map(Into::into))
}

fn address() -> impl Strategy<Value = &'static str> {
    select(&ADDRESSES[..8])
}

fn port() -> impl Strategy<Value = u16> {
    select(&PORTS[..])
}

fn protocol() -> impl Strategy<Value = Value> {
    select(vec![
        json!("tcp"),
        json!("udp"),
        json!("sctp"),
        json!("icmp"),
        json!(6),
    ])
}

fn end() -> impl Strategy<Value = &'static str> {
    select(vec!["local", "remote", "src", "dst"])
}

fn range() -> impl Strategy<Value = Value> {
    prop_oneof![
        3 => port().prop_map(Value::from),
        1 => select(vec![json!("http"), json!("https"), json!("443-5201"), json!("1-65535")]),
    ]
}

fn ranges() -> impl Strategy<Value = Value> {
    prop_oneof![range(), vec(range(), 1..9).prop_map(Value::from)]
}

/// Those of several addresses or networks that a selector names: seldom more than two.
fn addresses(networks: bool) -> impl Strategy<Value = Vec<(&'static str, Option<Value>)>> {
    let one = move || {
        let pool = if networks {
            &NETWORKS[..]
        } else {
            &ADDRESSES[..8]
        };
        maybe(select(pool))
    };
    (one(), one(), one(), one()).prop_map(|(local, remote, src, dst)| {
        vec![
            ("local", local),
            ("remote", remote),
            ("src", src),
            ("dst", dst),
        ]
    })
}

/// Keys of a selector; the element carries what `carries` says.
fn keys(
    key: impl Strategy<Value = Value> + 'static,
    carries: Carries,
) -> impl Strategy<Value = Value> {
    let key = (key, select(&ARGUMENTS[..]), select(&SUBS[..]));
    vec(key, 2..12).prop_map(move |keys| {
        let mut seen = Vec::new();
        let mut list = Vec::new();
        for (mut key, number, chain) in keys {
            if seen.contains(&key) {
                continue;
            }
            seen.push(key.clone());
            match carries {
                Carries::Nothing => {}
                Carries::Number => key["arg"] = number.into(),
                Carries::Chain => key["chain"] = chain.into(),
            }
            list.push(key);
        }
        Value::from(list)
    })
}

fn pair_of_ends() -> impl Strategy<Value = (&'static str, &'static str)> {
    let connection = (select(&CONNECTIONS[..]), any::<bool>());
    let connection = connection.prop_map(|((a, _, b, _), back)| if back { (b, a) } else { (a, b) });
    prop_oneof![
        4 => connection,
        1 => (select(&ADDRESSES[..3]), select(&ADDRESSES[..4])),
        1 => (select(&ADDRESSES[4..6]), select(&ADDRESSES[4..8])),
        1 => (address(), address()),
    ]
}

fn flow_key() -> impl Strategy<Value = Value> {
    let protocol = weighted(0.2, select(vec![json!("tcp"), json!("udp"), json!(6)]));
    let connection = (select(&CONNECTIONS[..]), any::<bool>());
    let connection = connection.prop_map(
        |((a, b, c, d), back)| {
            if back { (c, d, a, b) } else { (a, b, c, d) }
        },
    );
    let any = (pair_of_ends(), port(), port()).prop_map(|((a, c), b, d)| (a, b, c, d));
    (prop_oneof![3 => connection, 1 => any], protocol).prop_map(
        |((local, local_port, remote, remote_port), protocol)| {
            // the default, spelt out, would be the same key twice
            let protocol = protocol.filter(|protocol| *protocol == "udp");
            object(vec![
                ("local", Some(local.into())),
                ("remote", Some(remote.into())),
                ("local_port", Some(local_port.into())),
                ("remote_port", Some(remote_port.into())),
                ("protocol", protocol),
            ])
        },
    )
}

fn ip_pair_key() -> impl Strategy<Value = Value> {
    pair_of_ends().prop_map(|(local, remote)| json!({ "local": local, "remote": remote }))
}

fn prefix_key() -> impl Strategy<Value = Value> {
    select(&NETWORKS[..7]).prop_map(|prefix| json!({ "prefix": prefix }))
}

fn port_key() -> impl Strategy<Value = Value> {
    let protocol = weighted(0.2, Just(json!("udp")));
    (port(), protocol).prop_map(|(port, protocol)| {
        object(vec![("port", Some(port.into())), ("protocol", protocol)])
    })
}

/// A keyed selector: with keys surely if they carry something, else perhaps.
fn keyed(
    key: impl Strategy<Value = Value> + 'static,
    carries: Carries,
) -> impl Strategy<Value = Option<Value>> {
    let share = if carries == Carries::Nothing {
        0.5
    } else {
        1.0
    };
    weighted(share, keys(key, carries))
}

fn flow(carries: Carries) -> BoxedStrategy<Value> {
    let ports = (maybe(port()), maybe(port()), maybe(port()), maybe(port()));
    let parts = (
        addresses(false),
        ports,
        maybe(protocol()),
        maybe(any::<bool>()),
        keyed(flow_key(), carries),
        0..6usize,
    );
    parts
        .prop_map(|(addresses, ports, protocol, reverse, keys, most)| {
            let mut members = vec![("selector", Some("flow".into()))];
            let mut narrow = addresses;
            narrow.extend([
                ("local_port", ports.0),
                ("remote_port", ports.1),
                ("src_port", ports.2),
                ("dst_port", ports.3),
            ]);
            narrow.retain(|(_, value)| value.is_some());
            narrow.truncate(if keys.is_some() { most / 4 } else { most });
            members.extend(narrow);
            let reverse = reverse.filter(|_| keys.is_some());
            members.extend([("protocol", protocol), ("reverse", reverse), ("keys", keys)]);
            object(members)
        })
        .boxed()
}

fn ip_pair(carries: Carries) -> BoxedStrategy<Value> {
    let parts = (
        addresses(false),
        maybe(any::<bool>()),
        keyed(ip_pair_key(), carries),
    );
    parts
        .prop_map(|(addresses, reverse, keys)| {
            let mut members = vec![("selector", Some("ip_pair".into()))];
            members.extend(addresses);
            if keys.is_some() {
                members.truncate(2);
            }
            let reverse = reverse.filter(|_| keys.is_some());
            members.extend([("reverse", reverse), ("keys", keys)]);
            object(members)
        })
        .boxed()
}

fn prefix(carries: Carries) -> BoxedStrategy<Value> {
    let parts = (addresses(true), maybe(end()), keyed(prefix_key(), carries));
    parts
        .prop_map(|(addresses, end, keys)| {
            let mut members = vec![("selector", Some("prefix".into()))];
            members.extend(addresses);
            if keys.is_some() {
                members.truncate(2);
            }
            let end = end.filter(|_| keys.is_some());
            members.extend([("end", end), ("keys", keys)]);
            object(members)
        })
        .boxed()
}

fn service(carries: Carries) -> BoxedStrategy<Value> {
    let protocols = select(vec!["any", "tcp", "udp"]);
    let parts = (
        maybe(ranges()),
        maybe(ranges()),
        maybe(ranges()),
        maybe(protocols),
        maybe(end()),
        keyed(port_key(), carries),
    );
    parts
        .prop_map(|(local, remote, either, protocol, end, keys)| {
            let end = end.filter(|_| keys.is_some());
            object(vec![
                ("selector", Some("service".into())),
                ("local_port", local),
                ("remote_port", remote.filter(|_| keys.is_none())),
                ("port", either),
                ("protocol", protocol),
                ("end", end),
                ("keys", keys),
            ])
        })
        .boxed()
}

fn tcp_flags() -> BoxedStrategy<Value> {
    let names = vec!["syn", "ack", "fin", "rst", "psh", "urg", "ece", "cwr", "ae"];
    let list = move |most: usize| {
        let names = select(names.clone());
        prop_oneof![
            names.clone().prop_map(Value::from),
            vec(names, 1..most).prop_map(|mut names| {
                names.sort_unstable();
                names.dedup();
                Value::from(names)
            }),
        ]
    };
    let parts = (maybe(list(3)), maybe(list(4)), maybe(list(3)));
    parts
        .prop_map(|(all, any, none)| {
            object(vec![
                ("selector", Some("tcp_flags".into())),
                ("all", all),
                ("any", any),
                ("none", none),
            ])
        })
        .boxed()
}

fn mptcp() -> BoxedStrategy<Value> {
    let subtypes = || {
        prop_oneof![
            3 => select(vec![json!("dss"), json!("add_addr"), json!("mp_capable")]),
            1 => (0..16u8).prop_map(Value::from),
        ]
    };
    let subtypes = prop_oneof![subtypes(), vec(subtypes(), 1..5).prop_map(Value::from)];
    let ids = prop_oneof![
        select(vec![json!(87), json!(1), json!(0)]),
        vec(
            select(vec![json!(17), json!(116), json!(87), json!(9)]),
            1..5
        )
        .prop_map(Value::from),
    ];
    let bit = || select(vec!["set", "clear", "any"]);
    let parts = (
        weighted(0.5, subtypes),
        weighted(0.1, select(vec![json!(1), json!(0), json!([0, 2])])),
        weighted(0.1, select(vec![1u8, 4, 0x11, 0x50]).prop_map(Value::from)),
        weighted(0.1, bit().prop_map(Value::from)),
        weighted(0.1, bit().prop_map(Value::from)),
        weighted(0.15, ids),
    );
    parts
        .prop_map(|(subtype, version, flags, backup, echo, ids)| {
            object(vec![
                ("selector", Some("mptcp".into())),
                ("subtype", subtype),
                ("version", version),
                ("flags", flags),
                ("backup", backup),
                ("echo", echo),
                ("address_id", ids),
            ])
        })
        .boxed()
}

/// One key where it carries something: which of a connection's two tokens counts is nobody's
/// business.
fn mptcp_connection(carries: Carries) -> BoxedStrategy<Value> {
    let (own, peer) = MPTCP_KEYS.split_at(8);
    // what options join by, too
    let tokens = [token(own), token(peer), 0x7491_aecb, 1];
    let tokens = select(tokens.map(|token| format!("{token:08x}")).to_vec());
    let most = if carries == Carries::Nothing { 3 } else { 2 };
    (
        vec(tokens, 1..most),
        select(&ARGUMENTS[..]),
        select(&SUBS[..]),
    )
        .prop_map(move |(mut tokens, number, chain)| {
            tokens.sort_unstable();
            tokens.dedup();
            let key = |token: &String| match carries {
                Carries::Nothing => json!({ "token": token }),
                Carries::Number => json!({ "token": token, "arg": number }),
                Carries::Chain => json!({ "token": token, "chain": chain }),
            };
            let keys: Vec<Value> = tokens.iter().map(key).collect();
            json!({ "selector": "mptcp_connection", "keys": keys })
        })
        .boxed()
}

fn selector(carries: Carries) -> BoxedStrategy<Value> {
    let which = prop_oneof![
        Just(json!({ "selector": "tcp" })),
        mptcp(),
        mptcp_connection(carries),
        tcp_flags(),
        flow(carries),
        ip_pair(carries),
        prefix(carries),
        service(carries),
    ];
    let or = prop::bool::weighted(0.6);
    let not = prop::bool::weighted(0.25);
    (which, or, not)
        .prop_map(|(mut selector, or, not)| {
            if or {
                selector["op"] = "or".into();
            }
            if not {
                selector["not"] = true.into();
            }
            selector
        })
        .boxed()
}

/// The one that an action's argument comes from.
fn source(carries: Carries) -> BoxedStrategy<Value> {
    prop_oneof![
        flow(carries),
        ip_pair(carries),
        prefix(carries),
        service(carries)
    ]
    .boxed()
}

/// A number, or the element's.
fn number(
    carries: Carries,
    of: impl Strategy<Value = Value> + 'static,
) -> impl Strategy<Value = Value> {
    let share = if carries == Carries::Number { 0.6 } else { 0.0 };
    (weighted(share, Just(json!({ "from": "element" }))), of)
        .prop_map(|(from, constant)| from.unwrap_or(constant))
}

fn kind() -> impl Strategy<Value = Value> {
    prop_oneof![
        3 => Just(json!("mptcp")),
        2 => select(vec![json!(253), json!("timestamps"), json!("window_scale")]),
        1 => select(vec![json!("mss"), json!("sack_permitted"), json!("sack"), json!(8)]),
    ]
}

fn set_window(carries: Carries) -> BoxedStrategy<Value> {
    let bytes = prop_oneof![select(vec![1460u32, 0, 1, 9, 255, 65535]), 0..65536u32,];
    let scaled = prop_oneof![
        3 => bytes.clone(),
        1 => select(vec![65536u32, 1 << 20, 1_073_725_440]),
    ];
    let bytes = number(carries, bytes.prop_map(Value::from));
    let scaled = number(carries, scaled.prop_map(Value::from));
    let parts = (bytes, scaled, any::<bool>(), maybe(any::<bool>()));
    parts
        .prop_map(|(bytes, scaled, raw, max)| {
            object(vec![
                ("action", Some("set_window".into())),
                ("bytes", Some(if raw { bytes } else { scaled })),
                ("raw", raw.then_some(true.into())),
                ("max", max),
            ])
        })
        .boxed()
}

fn set_mss(carries: Carries) -> BoxedStrategy<Value> {
    let bytes = prop_oneof![select(vec![1000u16, 1, 536, 65535]), 1..=65535u16];
    let parts = (
        number(carries, bytes.prop_map(Value::from)),
        maybe(select(vec!["clamp", "set"])),
    );
    parts
        .prop_map(|(bytes, mode)| {
            object(vec![
                ("action", Some("set_mss".into())),
                ("bytes", Some(bytes)),
                ("mode", mode),
            ])
        })
        .boxed()
}

fn strip_option(hook: Hook, carries: Carries) -> BoxedStrategy<Value> {
    let subtype = prop_oneof![
        select(vec![
            json!("dss"),
            json!("add_addr"),
            json!("mp_capable"),
            json!("mp_prio")
        ]),
        (0..16u8).prop_map(Value::from),
        Just(json!("any")),
    ];
    let kind = kind();
    let mode = if hook.family() == Family::Xdp {
        select(vec![json!("remove"), json!("nop"), json!("auto")])
    } else {
        select(vec![json!("nop"), json!("auto")])
    };
    let subtype = weighted(0.25, subtype);
    let parts = (
        number(carries, kind),
        subtype,
        weighted(0.7, mode),
        maybe(any::<bool>()),
    );
    parts
        .prop_map(|(kind, subtype, mode, sure)| {
            let dss = [Some(json!("dss")), Some(json!(2))].contains(&subtype);
            let sure = if dss { Some(true.into()) } else { sure };
            object(vec![
                ("unsafe", sure),
                ("action", Some("strip_option".into())),
                ("kind", Some(kind)),
                ("subtype", subtype),
                ("mode", mode),
            ])
        })
        .boxed()
}

fn insert_option(carries: Carries) -> BoxedStrategy<Value> {
    let length = prop_oneof![6 => 0..8usize, 1 => 8..39usize];
    let data = length.prop_map(|length| {
        let bytes = (0..length).map(|at| format!("{:02x}", (at * 17 + 3) % 256));
        bytes.collect::<String>()
    });
    let parts = (
        number(carries, kind()),
        weighted(0.8, data),
        maybe(any::<bool>()),
    );
    parts
        .prop_map(|(kind, data, again)| {
            object(vec![
                ("action", Some("insert_option".into())),
                ("kind", Some(kind)),
                ("data", data.filter(|it| !it.is_empty()).map(Value::from)),
                ("again", again),
            ])
        })
        .boxed()
}

fn redirect() -> BoxedStrategy<Value> {
    let mac = || maybe(select(vec!["02:00:00:00:00:aa", "02:00:00:00:00:bb"]));
    let parts = (any::<bool>(), mac(), mac());
    parts
        .prop_map(|(neighbour, src, dst)| {
            object(vec![
                ("action", Some("redirect".into())),
                ("device", Some(DEVICE.into())),
                ("neighbour", neighbour.then_some(true.into())),
                ("src_mac", src),
                ("dst_mac", dst),
            ])
        })
        .boxed()
}

/// Actions on MPTCP subflows.
fn on_subflows(carries: Carries) -> BoxedStrategy<Value> {
    let id = prop_oneof![select(vec![1u8, 5, 87]), 1..=255u8];
    let id = move || number(carries, id.clone().prop_map(Value::from));
    let address = select(vec!["192.0.2.9", "2001:db8::9"]);
    let port = maybe(select(vec![80u16, 5201]));
    let add = (address, id(), port).prop_map(|(address, id, port)| {
        object(vec![
            ("action", Some("add_subflow".into())),
            ("address", Some(address.into())),
            ("id", Some(id)),
            ("port", port),
            // The model has no clock.
            ("apart", Some("0ns".into())),
        ])
    });
    let remove = (id(), maybe(any::<bool>())).prop_map(|(id, sure)| {
        object(vec![
            ("action", Some("remove_addr".into())),
            ("id", Some(id)),
            ("unsafe", sure),
        ])
    });
    let prio = any::<bool>().prop_map(|backup| json!({ "action": "mp_prio", "backup": backup }));
    let reasons = select(vec![
        json!("middlebox"),
        json!("mptcp_error"),
        json!(0),
        json!(200),
    ]);
    let reset = (maybe(reasons), maybe(any::<bool>())).prop_map(|(reason, transient)| {
        object(vec![
            ("action", Some("reset_subflow".into())),
            ("reason", reason),
            ("transient", transient),
        ])
    });
    let after = weighted(0.4, select(vec!["1ns", "1ns", "1h"]));
    let restore = (after, select(vec!["0s", "1h"])).prop_map(|(after, repeat)| {
        let after = after.map(Value::from);
        object(vec![
            ("action", Some("restore_add_addr".into())),
            ("after", after),
            ("apart", Some("0ns".into())),
            ("repeat", Some(repeat.into())),
        ])
    });
    prop_oneof![
        5 => add,
        2 => remove,
        2 => prio,
        2 => reset,
        3 => restore,
        2 => Just(json!({ "action": "hold_add_addr" })),
        2 => Just(json!({ "action": "record" })),
        2 => Just(json!({ "action": "report" })),
    ]
    .boxed()
}

/// How often it is done to a flow: only where no element has to be looked at first.
fn with_turns(action: BoxedStrategy<Value>) -> BoxedStrategy<Value> {
    let turns = select(vec![
        ("once", json!(true)),
        ("once", json!(false)),
        ("once", json!(false)),
        ("first", json!(3)),
        ("every", json!("1h")),
        ("every", json!("1ns")),
    ]);
    (action, weighted(0.15, turns), weighted(0.8, Just(())))
        .prop_map(|(mut action, turns, also)| {
            let from = action
                .as_object()
                .unwrap()
                .values()
                .any(|value| value.is_object());
            let once = ["add_subflow", "mp_prio", "remove_addr"]
                .contains(&action["action"].as_str().unwrap());
            if from && once {
                action["once"] = false.into();
            } else if from {
            } else if let Some((name, value)) = turns {
                action[name] = value;
            } else if once && also.is_some() {
                action["once"] = false.into();
            }
            action
        })
        .boxed()
}

fn with_on_error(action: BoxedStrategy<Value>) -> BoxedStrategy<Value> {
    let on_error = weighted(0.3, select(vec!["continue", "pass", "drop"]));
    (action, on_error)
        .prop_map(|(mut action, on_error)| {
            if let Some(on_error) = on_error {
                action["on_error"] = on_error.into();
            }
            action
        })
        .boxed()
}

fn action(hook: Hook, carries: Carries) -> BoxedStrategy<Value> {
    let which = prop_oneof![
        1 => Just(json!({ "action": "count" })),
        1 => Just(json!({ "action": "learn", "set": LEARNT })),
        4 => set_window(carries),
        3 => set_mss(carries),
        5 => strip_option(hook, carries),
        4 => insert_option(carries),
        7 => on_subflows(carries),
    ];
    with_on_error(with_turns(which.boxed()))
}

/// An action that must be the last; `subs` are the chains there are to go to.
fn terminal(subs: &'static [&'static str], carries: Carries) -> BoxedStrategy<Value> {
    let plain = prop_oneof![
        Just(json!({ "action": "pass" })),
        Just(json!({ "action": "drop" })),
    ];
    let others = prop_oneof![2 => plain, 3 => redirect()];
    let any = match (subs, carries) {
        (_, Carries::Chain) => {
            Just(json!({ "action": "goto", "chain": { "from": "element" } })).boxed()
        }
        ([], _) => others.boxed(),
        _ => {
            let goto = select(subs).prop_map(|sub| json!({ "action": "goto", "chain": sub }));
            prop_oneof![others, goto].boxed()
        }
    };
    with_on_error(with_turns(any))
}

/// Nothing is given back that was not held.
fn with_holds(actions: Vec<Value>) -> Vec<Value> {
    let mut all = Vec::new();
    for action in actions {
        if action["action"] == "restore_add_addr" {
            all.push(json!({ "action": "hold_add_addr" }));
        }
        all.push(action);
    }
    all
}

fn then(subs: &'static [&'static str]) -> BoxedStrategy<Option<Value>> {
    let plain = select(vec![json!("pass"), json!("drop"), json!("continue")]);
    let then = if subs.is_empty() {
        plain.boxed()
    } else {
        let goto = select(subs).prop_map(|sub| json!({ "goto": sub }));
        prop_oneof![2 => plain, 1 => goto].boxed()
    };
    weighted(0.4, then).boxed()
}

fn chain(
    name: &'static str,
    hook: Hook,
    carries: Carries,
    subs: &'static [&'static str],
) -> BoxedStrategy<Value> {
    let selectors = prop_oneof![
        3 => Just(vec![]),
        3 => vec(selector(carries), 1..2),
        3 => vec(selector(carries), 1..5),
    ];
    let ends = carries == Carries::Chain;
    let told = name == MAIN && hook == Hook::Xdp;
    let checksum = weighted(
        if told { 0.25 } else { 0.0 },
        select(vec!["auto", "complete", "partial"]),
    );
    let parts = (
        weighted(
            if carries == Carries::Nothing {
                0.0
            } else {
                1.0
            },
            source(carries),
        ),
        selectors,
        vec(action(hook, carries), 0..4),
        weighted(if ends { 1.0 } else { 0.4 }, terminal(subs, carries)),
        then(subs),
        checksum,
    );
    parts
        .prop_map(
            move |(source, selectors, actions, terminal, then, checksum)| {
                let selectors: Vec<Value> = source.into_iter().chain(selectors).collect();
                let mut actions = with_holds(actions);
                actions.extend(terminal);
                let mut place = json!({ "device": "lo", "hook": hook.name() });
                if let Some(checksum) = checksum {
                    place["checksum"] = checksum.into();
                }
                object(vec![
                    ("name", Some(name.into())),
                    ("attach", (name == MAIN).then(|| json!([place]))),
                    ("selectors", Some(selectors.into())),
                    ("actions", Some(actions.into())),
                    ("then", then),
                ])
            },
        )
        .boxed()
}

/// Kind of the set that a selector looks packets up in.
fn set_kind(selector: &str) -> &str {
    match selector {
        "service" => "port",
        "mptcp_connection" => "connection",
        other => other,
    }
}

/// The set that flows are learnt into, which no selector looks at.
const LEARNT: &str = "learnt";

/// Moves the keys of a chain into named sets: there elements may also carry nothing, or what is
/// no argument. `spoil` says which do. Sets are members of the file, as their elements are for
/// [`crate::differential`].
fn into_sets(file: &mut Value, spoil: &[u8]) {
    let mut spoil = spoil.iter().cycle();
    let (mut sets, mut elements) = (Map::new(), Map::new());
    let selectors = file["chains"][0]["selectors"].as_array_mut().unwrap();
    for (number, selector) in selectors.iter_mut().enumerate() {
        let members = selector.as_object_mut().unwrap();
        let Some(mut keys) = members.remove("keys") else {
            continue;
        };
        let name = format!("set-{number}");
        members.insert("set".to_owned(), name.clone().into());
        for key in keys.as_array_mut().unwrap() {
            let key = key.as_object_mut().unwrap();
            let number = key.contains_key("arg");
            let chain = key.contains_key("chain");
            match spoil.next() {
                Some(0) => drop((key.remove("arg"), key.remove("chain"))),
                Some(1) if number => drop(key.insert("arg".to_owned(), (1u64 << 33).into())),
                Some(2) if number => drop(key.insert("arg".to_owned(), 0.into())),
                Some(1 | 2) if chain => drop(key.insert("chain".to_owned(), GONE.0.into())),
                Some(3) if chain => {
                    key.remove("chain");
                    key.insert("arg".to_owned(), 1.into());
                }
                _ => {}
            }
        }
        let kind = set_kind(members["selector"].as_str().unwrap());
        sets.insert(name.clone(), json!({ "kind": kind, "size": 100 }));
        elements.insert(name, keys);
    }
    file["sets"] = sets.into();
    file["elements"] = elements.into();
}

/// Files of all sorts, to be taken in turn: what is rare by chance is not rare then.
pub fn files(hook: Hook) -> Vec<BoxedStrategy<Value>> {
    use Carries::{Chain, Nothing, Number};
    let sorts = [
        (Nothing, 0.2),
        (Number, 0.0),
        (Nothing, 0.2),
        (Chain, 1.0),
        (Nothing, 0.2),
        (Number, 1.0),
        (Nothing, 0.2),
        (Chain, 0.0),
    ];
    sorts
        .map(|(carries, named)| file(hook, carries, named))
        .into()
}

/// A file with a chain `main` for `hook`, and chains that it may go to.
fn file(hook: Hook, carries: Carries, named: f64) -> BoxedStrategy<Value> {
    let parts = (
        chain(MAIN, hook, carries, &SUBS),
        chain(SUBS[0], hook, Carries::Nothing, &SUBS[1..]),
        chain(SUBS[1], hook, Carries::Nothing, &[]),
        weighted(named, vec(0..8u8, 20)),
    );
    parts
        .prop_map(|(main, sub, last, spoil)| {
            let mut file = json!({ "version": 1, "chains": [main, sub, last], "sets": {} });
            if let Some(spoil) = spoil {
                into_sets(&mut file, &spoil);
            }
            // Larger than the number of flows.
            file["sets"][LEARNT] = json!({ "kind": "flow", "size": 10_000 });
            file
        })
        .boxed()
}
