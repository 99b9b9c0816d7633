// SPDX-License-Identifier: MIT OR Apache-2.0
#![allow(clippy::unwrap_used, clippy::expect_used)]

use serde_json::json;

use super::*;
use crate::policy::Registry;

fn registry() -> &'static Registry {
    Registry::embedded().unwrap()
}

fn parse_text(text: &str) -> Result<Spec, Invalid> {
    Spec::parse(text, Path::new("f.json"), registry())
}

fn parse_chains(chains: Value, sets: Value) -> Result<Spec, Invalid> {
    parse_text(&json!({ "version": 1, "sets": sets, "chains": chains }).to_string())
}

/// A chain called `c` with the members given.
fn parse_chain(members: Value) -> Result<Chain, Invalid> {
    let mut chain = json!({ "name": "c" });
    chain
        .as_object_mut()
        .unwrap()
        .extend(members.as_object().unwrap().clone());
    parse_chains(json!([chain]), json!({})).map(|mut spec| spec.chains.remove(0))
}

fn selector(selector: Value) -> Result<Chain, Invalid> {
    parse_chain(json!({ "selectors": [selector] }))
}

fn actions(actions: Value) -> Result<Chain, Invalid> {
    parse_chain(json!({ "actions": actions }))
}

fn attach(attach: Value) -> Result<Chain, Invalid> {
    parse_chain(json!({ "attach": attach }))
}

fn no_references(spec: &Spec) -> Result<(), Invalid> {
    spec.validate_references(&BTreeMap::new(), &BTreeSet::new())
}

/// Checks an error's path in full and its other parts by fragment. All errors fit one screen.
#[track_caller]
fn refused<T: fmt::Debug>(result: Result<T, Invalid>, path: &str, found: &str, expected: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.path, path, "{error}");
    assert!(error.found.contains(found), "{error}");
    assert!(error.expected.contains(expected), "{error}");
    assert_eq!(error.file.as_deref(), Some(Path::new("f.json")), "{error}");
    let text = error.to_string();
    assert!(text.lines().count() <= 4, "{error}");
    assert!(text.chars().count() < 800, "{error}");
}

const PAIR: &str = r#"{"local": "10.0.0.1", "remote": "10.0.0.2"}"#;

/// A key of kind `ip_pair` with the members given.
fn pair(members: Value) -> Value {
    let mut key: Value = serde_json::from_str(PAIR).unwrap();
    key.as_object_mut()
        .unwrap()
        .extend(members.as_object().unwrap().clone());
    key
}

fn everything() -> Value {
    json!({
        "$schema": "chain.schema.json",
        "version": 1,
        "sets": {
            "slow": { "kind": "flow", "size": 1000000 },
            "by-net": { "kind": "prefix", "size": 1 }
        },
        "chains": [
            {
                "name": "hold-back-wifi",
                "attach": [
                    { "device": "wlan0", "hook": "xdp", "mode": "generic" },
                    { "device": "wlan0", "hook": "tc-egress" }
                ],
                "priority": -10,
                "selectors": [
                    { "selector": "ip_pair", "op": "or", "remote": "10.0.1.1", "local": "10.0.1.2" },
                    { "selector": "service", "op": "and", "local_port": ["5201", "80-90", 443] },
                    { "selector": "flow", "op": "or", "set": "slow", "not": false },
                    { "selector": "tcp_flags", "not": true, "any": ["syn", "rst"] },
                    { "selector": "ip_pair", "op": "or", "keys": [
                        { "remote": "10.0.0.2", "local": "10.0.0.1", "arg": 7 },
                        { "remote": "10.0.0.3", "local": "10.0.0.1", "arg": 8 }
                    ] }
                ],
                "actions": [
                    { "action": "strip_option", "kind": "mptcp", "subtype": "add_addr" },
                    { "action": "set_mss", "bytes": { "from": "element" }, "on_error": "pass" },
                    { "action": "goto", "chain": "sub", "on_error": "continue" }
                ],
                "then": { "goto": "sub" }
            },
            { "name": "sub", "selectors": [], "actions": [], "then": "drop" },
            { "name": "other", "then": "continue", "priority": 0 },
            {
                "name": "by-map",
                "selectors": [{ "selector": "prefix", "keys": [
                    { "prefix": "10.0.0.0/8", "chain": "sub" },
                    { "prefix": "2001:db8::/32", "chain": "other" }
                ] }],
                "actions": [{ "action": "goto", "chain": { "from": "element" }, "on_error": "drop" }]
            }
        ]
    })
}

#[test]
fn a_full_file_is_read_in_full() {
    let spec = parse_text(&everything().to_string()).unwrap();
    assert_eq!(spec.sets["slow"].size, 1_000_000);
    let chain = &spec.chains[0];
    assert_eq!(
        (chain.name.as_str(), chain.priority),
        ("hold-back-wifi", -10)
    );
    assert_eq!(chain.attach[0].mode, Mode::Generic);
    assert_eq!(chain.attach[1].hook, Hook::TcEgress);
    assert_eq!(chain.then, Then::Goto("sub".to_owned()));
    let ops: Vec<Op> = chain.selectors.iter().map(|s| s.op).collect();
    assert_eq!(ops, [Op::And, Op::And, Op::Or, Op::And, Op::Or]);
    let sizes: Vec<usize> = chain.alternatives().iter().map(|a| a.len()).collect();
    assert_eq!(sizes, [2, 2, 1]);
    assert!(chain.selectors[3].negate);
    assert_eq!(chain.selectors[2].keys, Keys::Set("slow".to_owned()));
    assert_eq!(chain.selectors[2].kind.as_deref(), Some("flow"));
    assert_eq!(chain.selectors[1].origin.path, "$.chains[0].selectors[1]");
    assert_eq!(chain.actions[1].on_error, OnError::Pass);
    assert_eq!(
        chain.actions[1].params["bytes"],
        json!({ "from": "element" })
    );
    assert_eq!(chain.actions[2].references[0].chain, "sub");
    assert_eq!(
        chain.actions[2].references[0].origin.path,
        "$.chains[0].actions[2].chain"
    );
    let references: Vec<&str> = spec.chains[3].selectors[0]
        .references
        .iter()
        .map(|reference| reference.chain.as_str())
        .collect();
    assert_eq!(references, ["sub", "other"]);
    no_references(&spec).unwrap();
}

#[test]
fn empty_chains_match_every_packet() {
    let chain = parse_chain(json!({})).unwrap();
    assert_eq!(chain.alternatives(), [&[] as &[Selector]]);
    assert_eq!(chain.then, Then::Pass);
    assert_eq!(parse_text(r#"{"version": 1}"#).unwrap(), Spec::default());
    assert_eq!(
        parse_text(r#"{"version": 1, "chains": []}"#).unwrap(),
        Spec::default()
    );
}

#[test]
fn the_canonical_form_reads_back_the_same() {
    let spec = parse_text(&everything().to_string()).unwrap();
    let canonical = spec.to_json();
    let again = parse_text(&canonical.to_string()).unwrap();
    assert_eq!(again, spec);
    assert_eq!(again.to_json().to_string(), canonical.to_string());
    for chain in &spec.chains {
        let again = Chain::from_json(&chain.to_json(), registry()).unwrap();
        assert_eq!(again, *chain);
    }
    assert_eq!(
        canonical["chains"][1],
        json!({ "name": "sub", "then": "drop" })
    );
    // Members in another order make no difference.
    let pair = |text: &str| {
        let text =
            format!(r#"{{"version": 1, "chains": [{{"name": "c", "selectors": [{text}]}}]}}"#);
        parse_text(&text).unwrap().to_json().to_string()
    };
    assert_eq!(
        pair(r#"{"selector": "ip_pair", "local": "10.0.0.1", "remote": "10.0.0.2"}"#),
        pair(r#"{"remote": "10.0.0.2", "local": "10.0.0.1", "selector": "ip_pair"}"#)
    );
}

#[test]
fn files_of_another_form_are_refused() {
    let f = parse_text;
    refused(f("[]"), "$", "[]", "an object");
    refused(f("{}"), "$.version", "nothing", "1");
    refused(f(r#"{"version": 2, "news": 1}"#), "$.version", "2", "1");
    refused(f(r#"{"version": "1"}"#), "$.version", "\"1\"", "1");
    refused(f(r#"{"version": 1.0}"#), "$.version", "1.0", "1");
    refused(
        f(r#"{"version": 1, "chain": []}"#),
        "$.chain",
        "did you mean \"chains\"?",
        "\"chains\"",
    );
    refused(
        f(r#"{"version": 1, "chains": {}}"#),
        "$.chains",
        "{}",
        "a list",
    );
    refused(
        f(r#"{"version": 1, "chains": [1]}"#),
        "$.chains[0]",
        "1",
        "an object",
    );
    refused(
        f(r#"{"version": 1, "sets": []}"#),
        "$.sets",
        "[]",
        "an object",
    );
    refused(
        f("{\"version\": 1,\n\"version\": 1}"),
        "line 2, column 9",
        "\"version\" twice",
        "each key once",
    );
    let deep = format!(r#"{{"version": 1, "chains": {}"#, "[".repeat(5_000_000));
    refused(f(&deep), "line 1, column 152", "too deep", "127");
    // A long key is neither compared with the known ones nor shown in full.
    let long = format!(r#"{{"version": 1, "{}": 1}}"#, "chains".repeat(100_000));
    let error = f(&long).unwrap_err().to_string();
    assert!(error.len() < 800, "{error}");
}

#[test]
fn wrong_sets_are_refused() {
    let f = |sets: Value| parse_chains(json!([]), sets);
    refused(
        f(json!({ "a b": {} })),
        "$.sets[\"a b\"]",
        "\"a b\"",
        "letters",
    );
    refused(
        f(json!({ "s": {} })),
        "$.sets.s.kind",
        "nothing",
        "\"flow\"",
    );
    refused(
        f(json!({ "s": { "kind": "flw", "size": 1 } })),
        "$.sets.s.kind",
        "did you mean \"flow\"?",
        "\"ip_pair\"",
    );
    refused(
        f(json!({ "s": { "kind": "flow" } })),
        "$.sets.s.size",
        "nothing",
        "16777216",
    );
    for size in [
        json!(0),
        json!(16_777_217),
        json!(-1),
        json!(1.5),
        json!("1"),
    ] {
        let set = json!({ "s": { "kind": "flow", "size": size } });
        refused(f(set), "$.sets.s.size", &size.to_string(), "1 to 16777216");
    }
    refused(
        f(json!({ "s": { "kind": "flow", "sise": 1 } })),
        "$.sets.s.sise",
        "did you mean \"size\"?",
        "\"size\"",
    );
}

#[test]
fn wrong_chains_are_refused() {
    let f = parse_chain;
    for name in ["", "a.b", "../x", "ä", &"x".repeat(33)] {
        refused(
            f(json!({ "name": name })),
            "$.chains[0].name",
            "",
            "1 to 32",
        );
    }
    assert!(f(json!({ "name": "x".repeat(32) })).is_ok());
    refused(
        parse_chains(json!([{}]), json!({})),
        "$.chains[0].name",
        "nothing",
        "a name",
    );
    refused(
        parse_chains(
            json!([{ "name": "a" }, { "name": "b" }, { "name": "a" }]),
            json!({}),
        ),
        "$.chains[2].name",
        "$.chains[0]",
        "no other chain",
    );
    for priority in [
        json!(32768),
        json!(-32769),
        json!(1.0),
        json!("1"),
        json!(u64::MAX),
    ] {
        refused(
            f(json!({ "priority": priority })),
            "$.chains[0].priority",
            &priority.to_string(),
            "-32768 to 32767",
        );
    }
    refused(
        f(json!({ "action": [] })),
        "$.chains[0].action",
        "\"actions\"",
        "\"actions\"",
    );
    refused(
        f(json!({ "then": "dorp" })),
        "$.chains[0].then",
        "\"drop\"",
        "goto",
    );
    refused(
        f(json!({ "then": null })),
        "$.chains[0].then",
        "null",
        "goto",
    );
    refused(
        f(json!({ "then": {} })),
        "$.chains[0].then.goto",
        "nothing",
        "a name",
    );
    refused(
        f(json!({ "then": { "goto": 1 } })),
        "$.chains[0].then.goto",
        "1",
        "a name",
    );
    refused(
        f(json!({ "then": { "goto": "x", "y": 1 } })),
        "$.chains[0].then.y",
        "\"y\"",
        "\"goto\"",
    );
}

#[test]
fn wrong_attachments_are_refused() {
    let at = "$.chains[0].attach[0]";
    let device = format!("{at}.device");
    for name in [
        "",
        ".",
        "..",
        "a/b",
        "a b",
        "a:b",
        "a\0b",
        "sixteen-bytes-xx",
        "wl\nan",
    ] {
        let attached = attach(json!([{ "device": name, "hook": "xdp" }]));
        refused(attached, &device, "\"", "1 to 15 bytes");
    }
    assert!(attach(json!([{ "device": "fifteen-bytes-x", "hook": "xdp" }])).is_ok());
    refused(
        attach(json!([{ "hook": "xdp" }])),
        &device,
        "nothing",
        "interface",
    );
    refused(
        attach(json!([{ "device": "a", "hook": "tc-ingres" }])),
        &format!("{at}.hook"),
        "did you mean \"tc-ingress\"?",
        "\"xdp\", \"tc-ingress\" or \"tc-egress\"",
    );
    for (hook, mode, expected) in [
        (
            "xdp",
            "tcx",
            "\"auto\", \"native\" or \"generic\" on hook xdp",
        ),
        (
            "tc-egress",
            "native",
            "\"auto\", \"tcx\" or \"clsact\" on hook tc-egress",
        ),
        ("tc-egress", "clscat", "\"clsact\""),
    ] {
        refused(
            attach(json!([{ "device": "a", "hook": hook, "mode": mode }])),
            &format!("{at}.mode"),
            mode,
            expected,
        );
    }
    refused(
        attach(json!([
            { "device": "a", "hook": "xdp" },
            { "device": "a", "hook": "tc-egress" },
            { "device": "a", "hook": "xdp", "mode": "native" }
        ])),
        "$.chains[0].attach[2]",
        "as in $.chains[0].attach[0]",
        "once",
    );
    refused(
        parse_chains(
            json!([
                { "name": "a", "attach": [{ "device": "d", "hook": "xdp", "mode": "native" }] },
                { "name": "b", "attach": [{ "device": "d", "hook": "xdp" }] },
                { "name": "c", "attach": [{ "device": "d", "hook": "xdp", "mode": "generic" }] }
            ]),
            json!({}),
        ),
        "$.chains[2].attach[0].mode",
        "\"generic\"",
        "\"native\" as in chain \"a\"",
    );
    let pattern_and_name = |first: &str, second: &str| {
        parse_chains(
            json!([
                { "name": "a", "attach": [{ "device": first, "hook": "xdp", "mode": "native" }] },
                { "name": "b", "attach": [{ "device": second, "hook": "xdp", "mode": "generic" }] }
            ]),
            json!({}),
        )
    };
    for (first, second) in [("d*", "d0"), ("d0", "d*"), ("d*", "d*"), ("*", "d?")] {
        refused(
            pattern_and_name(first, second),
            "$.chains[1].attach[0].mode",
            "\"generic\"",
            "\"native\" as in chain \"a\"",
        );
    }
    for (first, second) in [("d*", "e0"), ("*", "lo"), ("d?", "d")] {
        assert!(pattern_and_name(first, second).is_ok());
    }
}

#[test]
fn patterns_match_as_in_shells() {
    for (pattern, name, expected) in [
        ("wlan*", "wlan0", true),
        ("wlan*", "wlan", true),
        ("wlan*", "wla", false),
        ("wlan?", "wlan", false),
        ("wlan?", "wlan1", true),
        ("wlan?", "wlan10", false),
        ("*", "x", true),
        ("*0", "eth0", true),
        ("*0", "eth01", false),
        ("e*0*1", "eth0x0y1", true),
        ("e*0*1", "eth0x0y", false),
        ("*ab", "aab", true),
        ("**?", "a", true),
        ("[ab]*", "a0", false),
        ("[ab]*", "[ab]0", true),
        ("?", "ü", true),
    ] {
        assert_eq!(matches_pattern(pattern, name), expected, "{pattern} {name}");
    }
}

#[test]
fn a_named_device_counts_before_patterns() {
    let spec = parse_chains(
        json!([{ "name": "a", "attach": [
            { "device": "d*", "hook": "xdp", "mode": "native" },
            { "device": "d0", "hook": "xdp", "mode": "generic" },
            { "device": "*", "hook": "tc-egress" }
        ] }]),
        json!({}),
    )
    .unwrap();
    let chain = &spec.chains[0];
    let mode = |device, hook| chain.attach_at(device, hook).map(|attach| attach.mode);
    assert_eq!(mode("d0", Hook::Xdp), Some(Mode::Generic));
    assert_eq!(mode("d1", Hook::Xdp), Some(Mode::Native));
    assert_eq!(mode("e0", Hook::Xdp), None);
    assert_eq!(mode("e0", Hook::TcEgress), Some(Mode::Auto));
    assert_eq!(mode("lo", Hook::TcEgress), None);
    assert_eq!(mode("d0", Hook::TcIngress), None);
}

#[test]
fn wrong_selectors_are_refused() {
    let at = "$.chains[0].selectors[0]";
    let key = |key: &str| format!("{at}.{key}");
    refused(selector(json!("tcp")), at, "\"tcp\"", "an object");
    refused(
        selector(json!({})),
        &key("selector"),
        "nothing",
        "a selector",
    );
    refused(
        selector(json!({ "selector": "flwo" })),
        &key("selector"),
        "did you mean \"flow\"?",
        "a selector",
    );
    refused(
        selector(json!({ "selector": "drop" })),
        &key("selector"),
        "which is an action",
        "a selector",
    );
    refused(
        selector(json!({ "selector": "tcp", "nott": true })),
        &key("nott"),
        "did you mean \"not\"?",
        "\"not\"",
    );
    refused(
        selector(json!({ "selector": "tcp", "not": 1 })),
        &key("not"),
        "1",
        "true or false",
    );
    refused(
        selector(json!({ "selector": "tcp", "op": "nor" })),
        &key("op"),
        "\"nor\"",
        "\"and\" or \"or\"",
    );
    refused(
        selector(json!({ "selector": "ip_pair", "locl": "10.0.0.1" })),
        &key("locl"),
        "did you mean \"local\"?",
        "\"remote\"",
    );
    refused(
        selector(json!({ "selector": "ip_pair", "local": "10.0.0" })),
        &key("local"),
        "10.0.0",
        "address",
    );
    refused(
        selector(json!({ "selector": "service", "local_port": "no-such-service" })),
        &key("local_port"),
        "no-such-service",
        "port",
    );
    refused(
        selector(json!({ "selector": "prefix", "src": "10.1.2.3/8" })),
        &key("src"),
        "10.1.2.3/8",
        "",
    );
    refused(
        selector(json!({ "selector": "flow", "local_port": { "from": "element" } })),
        &key("local_port"),
        "only an action",
        "",
    );
}

#[test]
fn wrong_keys_are_refused() {
    let at = "$.chains[0].selectors[0]";
    let keys = |keys: Value| selector(json!({ "selector": "ip_pair", "keys": keys }));
    refused(
        selector(json!({ "selector": "tcp", "set": "s" })),
        &format!("{at}.set"),
        "\"tcp\", which looks nothing up",
        "\"flow\"",
    );
    refused(
        selector(json!({ "selector": "flow", "set": "s", "keys": [] })),
        &format!("{at}.keys"),
        "both",
        "one of the two",
    );
    refused(
        selector(json!({ "selector": "flow", "set": "a/b" })),
        &format!("{at}.set"),
        "a/b",
        "a name",
    );
    refused(
        keys(json!([])),
        &format!("{at}.keys"),
        "empty",
        "at least one",
    );
    refused(keys(json!({})), &format!("{at}.keys"), "{}", "a list");
    refused(
        keys(json!([{ "local": "10.0.0.1" }])),
        &format!("{at}.keys[0].remote"),
        "nothing",
        "address",
    );
    refused(
        keys(json!([pair(json!({ "argg": 1 }))])),
        &format!("{at}.keys[0].argg"),
        "did you mean \"arg\"?",
        "\"arg\"",
    );
    refused(
        keys(json!([
            pair(json!({})),
            pair(json!({ "local": "10.0.0.x" }))
        ])),
        &format!("{at}.keys[1].local"),
        "10.0.0.x",
        "address",
    );
    // One key in two spellings.
    refused(
        keys(json!([
            pair(json!({})),
            pair(json!({ "local": "::ffff:10.0.0.1" }))
        ])),
        &format!("{at}.keys[1]"),
        "::ffff:10.0.0.1",
        "each key once",
    );
    for arg in [json!(-1), json!(1.5), json!("1"), json!(null)] {
        refused(
            keys(json!([pair(json!({ "arg": arg }))])),
            &format!("{at}.keys[0].arg"),
            &arg.to_string(),
            "0 to 18446744073709551615",
        );
    }
    refused(
        keys(json!([pair(json!({ "chain": "a b" }))])),
        &format!("{at}.keys[0].chain"),
        "a b",
        "a name",
    );
    refused(
        keys(json!([pair(json!({ "arg": 1, "chain": "a" }))])),
        &format!("{at}.keys[0].chain"),
        "both",
        "one of the two",
    );
    refused(
        keys(json!([
            pair(json!({ "arg": 1 })),
            pair(json!({ "remote": "10.0.0.3" }))
        ])),
        &format!("{at}.keys[1]"),
        "no argument",
        "\"arg\"",
    );
}

#[test]
fn wrong_actions_are_refused() {
    let at = "$.chains[0].actions[0]";
    refused(
        actions(json!([{ "selector": "tcp" }])),
        &format!("{at}.action"),
        "nothing",
        "an action",
    );
    refused(
        actions(json!([{ "action": "tcp" }])),
        &format!("{at}.action"),
        "which is a selector",
        "an action",
    );
    refused(
        actions(json!([{ "action": "set_msss" }])),
        &format!("{at}.action"),
        "did you mean \"set_mss\"?",
        "an action",
    );
    refused(
        actions(json!([{ "action": "set_mss" }])),
        &format!("{at}.bytes"),
        "nothing",
        "1 to 65535",
    );
    refused(
        actions(json!([{ "action": "set_mss", "bytes": 65536 }])),
        &format!("{at}.bytes"),
        "65536",
        "1 to 65535",
    );
    refused(
        actions(json!([{ "action": "set_mss", "bytes": 1, "set": "s" }])),
        &format!("{at}.set"),
        "\"set\"",
        "\"on_error\"",
    );
    refused(
        actions(json!([{ "action": "count", "on_error": "pas" }])),
        &format!("{at}.on_error"),
        "did you mean \"pass\"?",
        "\"continue\", \"pass\" or \"drop\"",
    );
    refused(
        actions(json!([{ "action": "drop" }, { "action": "count" }])),
        &format!("{at}.action"),
        "\"drop\", which ends the chain",
        "last place",
    );
    refused(
        actions(json!([{ "action": "redirect", "device": "a/b" }])),
        &format!("{at}.device"),
        "a/b",
        "device",
    );
    refused(
        actions(json!([{ "action": "goto", "chain": "a b" }])),
        &format!("{at}.chain"),
        "a b",
        "chain",
    );
    let long = "x".repeat(1_000_000);
    refused(
        actions(json!([{ "action": "strip_option", "kind": long }])),
        &format!("{at}.kind"),
        "xxx...",
        "mptcp",
    );
}

/// How often an action is done to a flow, and the form that is written back.
#[test]
fn cadences_are_read() {
    let read = |members: Value, written: Value, cadence: Option<Cadence>| {
        let mut action = json!({ "action": "count" });
        let given = members.as_object().unwrap().clone();
        action.as_object_mut().unwrap().extend(given);
        let chain = actions(json!([action])).unwrap();
        assert_eq!(chain.actions[0].cadence, cadence, "{members}");
        let mut canonical = json!({ "action": "count" });
        let wanted = written.as_object().unwrap().clone();
        canonical.as_object_mut().unwrap().extend(wanted);
        assert_eq!(chain.to_json()["actions"][0], canonical, "{members}");
        let again = Chain::from_json(&chain.to_json(), registry()).unwrap();
        assert_eq!(again, chain, "{members}");
    };
    let same = |members: Value, cadence| read(members.clone(), members, cadence);
    same(json!({}), None);
    same(json!({ "once": true }), Some(Cadence::First(1)));
    same(json!({ "once": false }), Some(Cadence::Always));
    same(json!({ "first": 3 }), Some(Cadence::First(3)));
    same(json!({ "first": u32::MAX }), Some(Cadence::First(u32::MAX)));
    same(
        json!({ "every": "200ms" }),
        Some(Cadence::Every(200_000_000)),
    );
    read(
        json!({ "first": 1 }),
        json!({ "once": true }),
        Some(Cadence::First(1)),
    );
    read(
        json!({ "every": "60s" }),
        json!({ "every": "1m" }),
        Some(Cadence::Every(60_000_000_000)),
    );
}

#[test]
fn wrong_cadences_are_refused() {
    let wrong = |members: Value, member: &str, found: &str, expected: &str| {
        let mut action = json!({ "action": "count" });
        let given = members.as_object().unwrap().clone();
        action.as_object_mut().unwrap().extend(given);
        let at = format!("$.chains[0].actions[0].{member}");
        refused(actions(json!([action])), &at, found, expected);
    };
    for value in [json!(1), json!("yes"), Value::Null] {
        let found = value.to_string();
        wrong(json!({ "once": value }), "once", &found, "true or false");
    }
    let counts = [
        (json!(0), "0"),
        (json!(-1), "-1"),
        (json!(1.5), "1.5"),
        (json!("3"), "\"3\""),
        (json!(1u64 << 32), "4294967296"),
    ];
    for (value, found) in counts {
        wrong(json!({ "first": value }), "first", found, "1 to 4294967295");
    }
    let spans = [
        (json!("0s"), "0s"),
        (json!("5"), "5"),
        (json!("5 s"), "5 s"),
        (json!("-5s"), "-5s"),
        (json!("99999999999999h"), "99999999999999h"),
        (json!(5), "5"),
    ];
    for (value, found) in spans {
        wrong(json!({ "every": value }), "every", found, "a duration");
    }
    let one = "one of \"once\", \"first\" and \"every\"";
    wrong(
        json!({ "once": true, "first": 2 }),
        "first",
        "both \"once\" and \"first\"",
        one,
    );
    wrong(
        json!({ "every": "5s", "first": 2 }),
        "every",
        "both \"first\" and \"every\"",
        one,
    );
    wrong(
        json!({ "every": "5s", "once": false }),
        "every",
        "both \"once\" and \"every\"",
        one,
    );
}

#[test]
fn what_breaks_a_connection_must_be_asked_for() {
    let at = "$.chains[0].actions[0]";
    let strip = |subtype: Value, more: Value| {
        let mut action = json!({ "action": "strip_option", "kind": "mptcp", "subtype": subtype });
        let more = more.as_object().unwrap().clone();
        action.as_object_mut().unwrap().extend(more);
        actions(json!([action]))
    };
    for dss in [json!("dss"), json!(2)] {
        let path = format!("{at}.subtype");
        refused(
            strip(dss.clone(), json!({})),
            &path,
            "loses data",
            "\"unsafe\": true",
        );
        refused(
            strip(dss.clone(), json!({ "unsafe": false })),
            &path,
            "loses data",
            "\"unsafe\": true",
        );
        strip(dss, json!({ "unsafe": true })).unwrap();
    }
    strip(json!("add_addr"), json!({})).unwrap();
    let remove = |more: Value| {
        let mut action = json!({ "action": "remove_addr" });
        let more = more.as_object().unwrap().clone();
        action.as_object_mut().unwrap().extend(more);
        actions(json!([action]))
    };
    refused(
        remove(json!({ "id": 0 })),
        &format!("{at}.id"),
        "first subflow",
        "\"unsafe\": true",
    );
    remove(json!({ "id": 0, "unsafe": true })).unwrap();
    remove(json!({ "id": 1 })).unwrap();
}

#[test]
fn misplaced_policies_say_where_they_belong() {
    for (error, advice) in [
        (actions(json!([{ "selector": "tcp" }])), "\"selectors\""),
        (actions(json!([{ "action": "tcp" }])), "\"selectors\""),
        (selector(json!({ "action": "drop" })), "\"actions\""),
        (selector(json!({ "selector": "drop" })), "\"actions\""),
    ] {
        let error = error.unwrap_err();
        assert!(error.advice.contains(advice), "{error}");
    }
}

#[test]
fn elements_must_be_there_and_fit() {
    let mss = json!({ "action": "set_mss", "bytes": { "from": "element" } });
    let bytes = "$.chains[0].actions[0].bytes";
    let goto = json!({ "action": "goto", "chain": { "from": "element" } });
    let chain = |selectors: Value, actions: Value| {
        parse_chain(json!({ "selectors": selectors, "actions": actions }))
    };
    let keys = |keys: Value| json!([{ "selector": "ip_pair", "keys": keys }]);
    for selectors in [
        json!([]),
        json!([{ "selector": "ip_pair", "local": "10.0.0.1" }]),
        json!([{ "selector": "flow", "set": "s", "not": true }]),
    ] {
        refused(
            chain(selectors, json!([mss])),
            bytes,
            "without a selector",
            "not negated",
        );
    }
    let set = json!([{ "selector": "flow", "set": "s" }]);
    chain(set.clone(), json!([mss])).unwrap();
    chain(set.clone(), json!([mss, mss])).unwrap();
    refused(
        chain(set, json!([mss, goto])),
        "$.chains[0].actions[1].chain",
        "\"goto\" reads a chain",
        "a number, as $.chains[0].actions[0].bytes",
    );
    let key = "$.chains[0].selectors[0].keys[0]";
    refused(
        chain(keys(json!([pair(json!({}))])), json!([mss])),
        key,
        "without \"arg\"",
        bytes,
    );
    refused(
        chain(keys(json!([pair(json!({ "chain": "x" }))])), json!([mss])),
        key,
        "without \"arg\"",
        bytes,
    );
    refused(
        chain(keys(json!([pair(json!({ "arg": 1 }))])), json!([goto])),
        key,
        "without \"chain\"",
        "$.chains[0].actions[0].chain",
    );
    for arg in [0u64, 65536, u64::MAX] {
        refused(
            chain(keys(json!([pair(json!({ "arg": arg }))])), json!([mss])),
            &format!("{key}.arg"),
            &arg.to_string(),
            "1 to 65535",
        );
    }
    chain(keys(json!([pair(json!({ "arg": 65535 }))])), json!([mss])).unwrap();
    chain(keys(json!([pair(json!({ "chain": "x" }))])), json!([goto])).unwrap();
    refused(
        chain(
            json!([{ "selector": "flow", "set": "s" }]),
            json!([{ "action": "set_mss", "bytes": { "from": "elemnt" } }]),
        ),
        bytes,
        "elemnt",
        "element",
    );
}

#[test]
fn policies_must_run_on_the_hooks_of_their_chain() {
    let mut policy = (**registry().action("count").unwrap()).clone();
    policy.hooks = vec!["xdp".to_owned(), "tc-ingress".to_owned()];
    let chain = attach(json!([
        { "device": "a", "hook": "xdp" },
        { "device": "b", "hook": "tc-egress" }
    ]))
    .unwrap();
    let value = Value::from("count");
    let at = parse::At {
        value: &value,
        path: "$.p".to_owned(),
    };
    assert_eq!(parse::check_hooks(&policy, &at, &chain.attach[..1]), Ok(()));
    let error = parse::check_hooks(&policy, &at, &chain.attach).unwrap_err();
    assert_eq!(error.path, "$.p");
    assert!(error.found.contains("tc-egress of b"), "{error}");
    assert!(error.advice.contains("xdp, tc-ingress only"), "{error}");
    policy.hooks.clear();
    assert_eq!(parse::check_hooks(&policy, &at, &chain.attach), Ok(()));
}

#[test]
fn references_must_be_defined_and_fit() {
    let sets = json!({ "pairs": { "kind": "ip_pair", "size": 1 } });
    let spec = |chain: Value| {
        let sub = json!({ "name": "sub" });
        let up = json!({ "name": "up", "attach": [{ "device": "a", "hook": "xdp" }] });
        parse_chains(json!([sub, up, chain]), sets.clone()).unwrap()
    };
    let flow =
        |set: &str| spec(json!({ "name": "c", "selectors": [{ "selector": "flow", "set": set }] }));
    let at = "$.chains[2].selectors[0].set";
    refused(
        no_references(&flow("pairz")),
        at,
        "did you mean \"pairs\"?",
        "kind flow",
    );
    refused(
        no_references(&flow("pairs")),
        at,
        "of kind ip_pair",
        "of kind flow",
    );
    let known = |kind: &str| {
        let kind = kind.to_owned();
        BTreeMap::from([("known".to_owned(), SetSpec { kind, size: 1 })])
    };
    let none = BTreeSet::new();
    refused(
        flow("known").validate_references(&known("port"), &none),
        at,
        "of kind port",
        "of kind flow",
    );
    flow("known")
        .validate_references(&known("flow"), &none)
        .unwrap();

    let then = |to: &str| spec(json!({ "name": "c", "then": { "goto": to } }));
    let action =
        |to: &str| spec(json!({ "name": "c", "actions": [{ "action": "goto", "chain": to }] }));
    let key = |to: &str| {
        let keys = json!([pair(json!({ "chain": to }))]);
        spec(json!({ "name": "c", "selectors": [{ "selector": "ip_pair", "keys": keys }] }))
    };
    for (spec, at) in [
        (&then as &dyn Fn(&str) -> Spec, "$.chains[2].then.goto"),
        (&action, "$.chains[2].actions[0].chain"),
        (&key, "$.chains[2].selectors[0].keys[0].chain"),
    ] {
        no_references(&spec("sub")).unwrap();
        refused(
            no_references(&spec("up")),
            at,
            "$.chains[1] of f.json",
            "without \"attach\"",
        );
        refused(
            no_references(&spec("subb")),
            at,
            "did you mean \"sub\"?",
            "without \"attach\"",
        );
        let known = BTreeSet::from(["known".to_owned(), "up".to_owned()]);
        let sets = BTreeMap::new();
        spec("known").validate_references(&sets, &known).unwrap();
        // What the file says of a chain counts before what is loaded.
        assert!(spec("up").validate_references(&sets, &known).is_err());
    }
}

/// Files of a test, removed at its end.
struct Files(Vec<PathBuf>);

impl Files {
    fn new(test: &str, texts: &[Value]) -> Files {
        let folder = std::env::temp_dir();
        let files = texts.iter().enumerate().map(|(at, text)| {
            let file = folder.join(format!(
                "policy-chain-{test}-{}-{at}.json",
                std::process::id()
            ));
            std::fs::write(&file, text.to_string()).unwrap();
            file
        });
        Files(files.collect())
    }

    fn read(&self) -> anyhow::Result<Spec> {
        Spec::read(&self.0, registry())
    }

    /// Checks that the error is of the second file and names the first.
    fn contradict(&self, path: &str) {
        let error = self.read().unwrap_err().downcast::<Invalid>().unwrap();
        assert_eq!(error.file.as_deref(), Some(self.0[1].as_path()));
        assert_eq!(error.path, path);
        assert!(
            error.to_string().contains(&self.0[0].display().to_string()),
            "{error}"
        );
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for file in &self.0 {
            let _ = std::fs::remove_file(file);
        }
    }
}

#[test]
fn files_are_read_as_one() {
    let set = |size: u32| json!({ "s": { "kind": "flow", "size": size } });
    let file = |sets: Value, chain: Value| json!({ "version": 1, "sets": sets, "chains": [chain] });
    let goes = json!({ "name": "a", "then": { "goto": "b" } });

    let files = Files::new(
        "merge",
        &[
            file(set(5), goes.clone()),
            file(set(5), json!({ "name": "b" })),
        ],
    );
    let spec = files.read().unwrap();
    assert_eq!((spec.chains.len(), spec.sets.len()), (2, 1));
    assert_eq!(
        spec.chains[1].origin.file.as_deref(),
        Some(files.0[1].as_path())
    );
    no_references(&spec).unwrap();

    Files::new(
        "name",
        &[file(set(5), goes.clone()), file(set(5), goes.clone())],
    )
    .contradict("$.chains[0].name");
    Files::new(
        "set",
        &[file(set(5), goes), file(set(6), json!({ "name": "b" }))],
    )
    .contradict("$.sets.s");
    let attached = |name: &str, mode: &str| {
        let attach = json!([{ "device": "d", "hook": "xdp", "mode": mode }]);
        file(json!({}), json!({ "name": name, "attach": attach }))
    };
    Files::new("mode", &[attached("a", "native"), attached("b", "generic")])
        .contradict("$.chains[0].attach[0].mode");
}

#[test]
fn a_chain_by_itself_is_checked_too() {
    let error = Chain::from_json(&json!({ "name": "c", "then": 1 }), registry()).unwrap_err();
    assert_eq!((error.file, error.path.as_str()), (None, "$.then"));
}

#[test]
fn the_schema_names_every_policy_and_is_stable() {
    let first = schema(registry());
    assert_eq!(first.to_string(), schema(registry()).to_string());
    let definitions = &first["$defs"];
    for (role, policies) in [
        ("selector", registry().selectors().collect::<Vec<_>>()),
        ("action", registry().actions().collect()),
    ] {
        for policy in policies {
            let name = format!("{role}.{}", policy.name);
            let reference = json!({ "$ref": format!("#/$defs/{name}") });
            let choices = definitions[role]["oneOf"].as_array().unwrap();
            assert!(choices.contains(&reference), "{name}");
            let object = &definitions[&name];
            assert_eq!(object["properties"][role], json!({ "const": policy.name }));
            assert_eq!(object["additionalProperties"], json!(false));
            let fields = policy.params.iter().flat_map(|layout| &layout.fields);
            for field in fields {
                assert_eq!(object["properties"][&field.name]["description"], field.doc);
            }
        }
    }
    let from_element = |name: &str, param: &str| {
        let schema = definitions[name]["properties"][param].to_string();
        schema.contains("\"element\"")
    };
    assert!(from_element("action.set_mss", "bytes"));
    assert!(!from_element("action.redirect", "src_mac"));
    assert!(!from_element("selector.ip_pair", "reverse"));
    let required = &definitions["action.set_mss"]["required"];
    assert_eq!(*required, json!(["action", "bytes"]));
    check_references(&first, definitions);
}

/// Checks that every `$ref` leads somewhere.
fn check_references(schema: &Value, definitions: &Value) {
    match schema {
        Value::Object(members) => {
            if let Some(target) = members.get("$ref").and_then(Value::as_str) {
                let name = target.strip_prefix("#/$defs/").unwrap();
                assert!(definitions.get(name).is_some(), "{target}");
            }
            members
                .values()
                .for_each(|member| check_references(member, definitions));
        }
        Value::Array(items) => items
            .iter()
            .for_each(|item| check_references(item, definitions)),
        _ => {}
    }
}
