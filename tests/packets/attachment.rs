// SPDX-License-Identifier: MIT OR Apache-2.0
//! What depends on the attachment: several chains on one, and devices without a link header.

use std::collections::BTreeMap;
use std::path::Path;

use policy_chain::engine::generation::{self, CarrierChoice, Environment, Generation};
use policy_chain::engine::names::SystemNames;
use policy_chain::engine::sys;
use policy_chain::hook::{Family, Hook};
use policy_chain::plan;
use policy_chain::policy::Registry;
use policy_chain::spec::{Chain, Checksum, Spec};
use serde_json::{Value, json};

use crate::frames::*;

const PASS: &str = "pass";
const DROP: &str = "drop";

/// What an attachment that runs all the chains has loaded.
fn attach(chains: &Value, hook: Hook, no_link: bool) -> Generation {
    let registry = Registry::embedded().unwrap();
    let file = json!({ "version": 1, "chains": chains }).to_string();
    let spec = Spec::parse(&file, Path::new("rows.json"), registry).unwrap();
    let main: Vec<&Chain> = spec.chains.iter().collect();
    let names = spec.chains.iter().map(|chain| chain.name.clone());
    let ids: BTreeMap<String, u32> = names.zip(1..).collect();
    let graph = plan::plan(hook, &main, &BTreeMap::new(), &ids, registry).unwrap();
    let environment = Environment {
        hook,
        no_link,
        carrier: CarrierChoice::Auto,
        registry,
        names: &SystemNames {
            chains: &ids,
            any_device: true,
        },
        sets: &BTreeMap::new(),
        checksum: Checksum::Auto,
        state: &BTreeMap::new(),
    };
    generation::load(&graph, &environment).unwrap()
}

#[track_caller]
fn check(
    attached: &Generation,
    hook: Hook,
    what: &str,
    frame: &[u8],
    verdict: &str,
    output: &[u8],
) {
    let run = sys::test_run(&attached.entry, frame, None).unwrap();
    let dropped = match hook.family() {
        Family::Xdp => run.verdict == 1,
        Family::Tc => run.verdict == 2,
    };
    assert_eq!(dropped, verdict == DROP, "{what} on {hook}");
    if !dropped {
        assert_eq!(run.frame, output, "{what} on {hook}");
    }
}

fn chain(name: &str, priority: i32, members: Value) -> Value {
    let mut chain = json!({ "name": name, "priority": priority,
                            "attach": [{ "device": "lo", "hook": "xdp" }] });
    chain
        .as_object_mut()
        .unwrap()
        .extend(members.as_object().unwrap().clone());
    chain
}

fn window(value: Value) -> Value {
    json!([{ "action": "set_window", "raw": true, "bytes": value }])
}

/// (A, spark) in one chain and (B, web) in another.
#[test]
fn chains_do_not_match_crosswise() {
    let of = |src: &str, port: u16| {
        json!([{ "selector": "ip_pair", "src": src, "dst": "10.0.0.2" },
               { "selector": "service", "port": port }])
    };
    let chains = json!([
        chain(
            "a",
            0,
            json!({ "selectors": of("10.0.0.11", 7077), "then": "drop" })
        ),
        chain(
            "b",
            0,
            json!({ "selectors": of("10.0.0.12", 80), "then": "drop" })
        ),
    ]);
    let from = |a: u8, port: u16| v4().between([10, 0, 0, a], V4_DST).ports(SRC_PORT, port);
    for hook in Hook::ALL {
        let attached = attach(&chains, hook, false);
        for (what, frame, verdict) in [
            ("A, spark", from(11, 7077), DROP),
            ("B, web", from(12, 80), DROP),
            ("A, web", from(11, 80), PASS),
            ("B, spark", from(12, 7077), PASS),
        ] {
            let frame = frame.build();
            check(&attached, hook, what, &frame, verdict, &frame);
        }
    }
}

#[test]
fn the_first_chain_that_matches_takes_the_packet() {
    let web = json!([{ "selector": "service", "port": 80 }]);
    let v4_only = json!([{ "selector": "prefix", "src": "0.0.0.0/0" }]);
    let chains = json!([
        chain("last", 30, json!({ "then": "drop" })),
        chain(
            "first",
            -5,
            json!({ "selectors": [{ "selector": "tcp", "not": true }] })
        ),
        chain(
            "second",
            0,
            json!({ "selectors": web, "actions": window(json!(7)),
                                   "then": "continue" })
        ),
        chain(
            "third",
            7,
            json!({ "selectors": v4_only, "actions": [{ "action": "pass" }] })
        ),
    ]);
    for hook in Hook::ALL {
        let attached = attach(&chains, hook, false);
        for (what, frame, verdict, output) in [
            ("not TCP", v6().protocol(UDP), PASS, v6().protocol(UDP)),
            (
                "edited, then taken by the third",
                v4(),
                PASS,
                v4().window(7),
            ),
            ("only the third", v4().ports(1, 2), PASS, v4().ports(1, 2)),
            ("edited, then the last", v6(), DROP, v6()),
            ("only the last", v6().ports(1, 2), DROP, v6()),
        ] {
            check(
                &attached,
                hook,
                what,
                &frame.build(),
                verdict,
                &output.build(),
            );
        }
    }
}

/// The second chain takes its argument from its own element, or from none.
#[test]
fn an_argument_is_not_left_for_the_next_chain() {
    let key = |end: &str, port: u16, arg: u16| json!({ "selector": "service", "end": end, "keys": [{ "port": port, "arg": arg }] });
    let element = json!({ "from": "element" });
    let chains = json!([
        chain(
            "a",
            0,
            json!({
            "selectors": [key("dst", 80, 100), { "selector": "tcp_flags", "all": "rst" }],
            "actions": window(element.clone()), "then": "continue" })
        ),
        chain(
            "b",
            1,
            json!({
            "selectors": [key("src", 5, 200), { "selector": "tcp", "op": "or" }],
            "actions": window(element) })
        ),
    ]);
    let reset = |frame: Frame| frame.flags(RST);
    for hook in Hook::ALL {
        let attached = attach(&chains, hook, false);
        for (what, frame, output) in [
            ("of the first", reset(v4()), reset(v4()).window(100)),
            (
                "of both",
                reset(v4().ports(5, 80)),
                reset(v4().ports(5, 80)).window(200),
            ),
            ("stored by the first, which then missed", v4(), v4()),
            (
                "of the second",
                v6().ports(5, 80),
                v6().ports(5, 80).window(200),
            ),
        ] {
            check(&attached, hook, what, &frame.build(), PASS, &output.build());
        }
    }
}

/// Packets of tunnels and of wwan devices begin with IP.
#[test]
fn devices_without_a_link_header() {
    let selectors = json!([{ "selector": "flow", "src_port": 40000, "dst_port": 80 }]);
    let taken = json!({ "selectors": selectors, "actions": window(json!(9)) });
    let grown = json!({ "actions": [{ "action": "insert_option", "kind": 253, "data": "aabb" }] });
    let without_link = |frame: &Frame| frame.build()[14..].to_vec();
    for hook in Hook::ALL {
        let attached = attach(&json!([chain("a", 0, taken.clone())]), hook, true);
        let growing = attach(&json!([chain("a", 0, grown.clone())]), hook, true);
        for (what, frame) in both() {
            let input = without_link(&frame.clone().payload(b"data"));
            let output = without_link(&frame.clone().payload(b"data").window(9));
            check(&attached, hook, what, &input, PASS, &output);
            let output = without_link(&frame.clone().options(&[253, 4, 0xaa, 0xbb]));
            check(&growing, hook, what, &without_link(&frame), PASS, &output);
        }
        let noise = [0x20; 60];
        check(
            &attached,
            hook,
            "neither IPv4 nor IPv6",
            &noise,
            PASS,
            &noise,
        );
    }
}

/// There is nowhere to write MAC addresses.
#[test]
fn redirect_without_a_link_header_leaves_ip_alone() {
    let action = json!({ "action": "redirect", "device": "lo",
        "src_mac": "02:00:00:00:00:aa", "dst_mac": "02:00:00:00:00:bb" });
    let chains = json!([chain("a", 0, json!({ "actions": [action] }))]);
    for hook in Hook::ALL {
        let attached = attach(&chains, hook, true);
        for (what, frame) in both() {
            let frame = frame.build()[14..].to_vec();
            check(&attached, hook, what, &frame, PASS, &frame);
        }
    }
}
