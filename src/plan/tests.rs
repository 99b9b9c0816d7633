// SPDX-License-Identifier: MIT OR Apache-2.0
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::policy::Registry;
use crate::spec::Spec;

/// Plans all chains of a file for one hook; those with `attach` run there.
fn planned(chains: Value) -> Result<Graph, Invalid> {
    let registry = Registry::embedded().unwrap();
    let text = json!({ "version": 1, "sets": {}, "chains": chains }).to_string();
    let spec = Spec::parse(&text, Path::new("test.json"), registry)?;
    let attached: Vec<&Chain> = spec
        .chains
        .iter()
        .filter(|c| !c.attach.is_empty())
        .collect();
    let subs = spec.chains.iter().filter(|c| c.attach.is_empty());
    let subs: BTreeMap<String, &Chain> = subs.map(|c| (c.name.clone(), c)).collect();
    let ids = spec.chains.iter().map(|c| c.name.clone()).zip(1u32..);
    plan(Hook::Xdp, &attached, &subs, &ids.collect(), registry)
}

fn chain(name: &str, rest: Value) -> Value {
    let mut chain = json!({ "name": name, "attach": [{ "device": "eth0", "hook": "xdp" }] });
    let members = rest.as_object().unwrap().clone();
    chain.as_object_mut().unwrap().extend(members);
    chain
}

fn sub(name: &str, rest: Value) -> Value {
    let mut chain = chain(name, rest);
    chain.as_object_mut().unwrap().remove("attach");
    chain
}

/// The graph as text: `node -next-> / -otherwise->`, from the entry on.
fn drawn(graph: &Graph) -> Vec<String> {
    let place = |successor: Successor| match successor {
        Successor::Node(index) => graph.nodes[index].name(),
        Successor::Pass => "pass".to_owned(),
        Successor::Drop => "drop".to_owned(),
    };
    let mut lines = vec![format!("entry {}", place(graph.entry))];
    let mut nodes: Vec<&Node> = graph.nodes.iter().collect();
    nodes.sort_by_key(|node| (node.chain.clone(), node.ordinal));
    for node in nodes {
        let (next, otherwise) = (place(node.next), place(node.otherwise));
        lines.push(format!("{} {next} {otherwise}", node.name()));
    }
    lines
}

fn service(port: u16) -> Value {
    json!({ "selector": "service", "port": port })
}

#[test]
fn alternatives_are_short_circuited_from_left_to_right() {
    let mut b = service(2);
    b["op"] = json!("and");
    let mut c = service(3);
    c["op"] = json!("or");
    let graph = planned(json!([chain(
        "a",
        json!({ "selectors": [service(1), b, c], "actions": [{ "action": "count" }], "then": "drop" })
    )]))
    .unwrap();
    assert_eq!(
        drawn(&graph),
        [
            "entry a/0:service",
            "a/0:service a/1:service a/2:service",
            "a/1:service a/3:count a/2:service",
            "a/2:service a/3:count pass",
            "a/3:count drop drop",
        ]
    );
    let counting = graph.nodes.iter().filter(|node| node.counts_for_chain);
    let mut counting: Vec<usize> = counting.map(|node| node.ordinal).collect();
    counting.sort_unstable();
    assert_eq!(counting, [1, 2], "the last selector of each alternative");
}

#[test]
fn chains_run_by_priority_and_then_by_name() {
    let one = |name: &str, priority: i32, then: &str| {
        chain(
            name,
            json!({ "priority": priority, "selectors": [service(1)], "then": then }),
        )
    };
    let graph = planned(json!([
        one("z", 1, "pass"),
        one("b", 5, "continue"),
        one("a", 5, "drop")
    ]))
    .unwrap();
    assert_eq!(
        drawn(&graph),
        [
            "entry z/0:service",
            "a/0:service drop b/0:service",
            "b/0:service pass pass",
            "z/0:service pass a/0:service",
        ]
    );
}

#[test]
fn a_chain_without_anything_counts() {
    let graph = planned(json!([chain("a", json!({}))])).unwrap();
    assert_eq!(drawn(&graph), ["entry a/0:count", "a/0:count pass pass"]);
}

#[test]
fn on_error_is_where_an_action_goes_that_gave_up() {
    let action = |on_error: &str| json!({ "action": "set_mss", "bytes": 1, "on_error": on_error });
    let graph = planned(json!([chain(
        "a",
        json!({ "actions": [action("continue"), action("pass"), action("drop")] })
    )]))
    .unwrap();
    assert_eq!(
        drawn(&graph),
        [
            "entry a/0:set_mss",
            "a/0:set_mss a/1:set_mss a/1:set_mss",
            "a/1:set_mss a/2:set_mss pass",
            "a/2:set_mss pass drop",
        ]
    );
}

#[test]
fn a_sub_chain_is_compiled_once_and_ends_in_pass() {
    let goto = json!({ "then": { "goto": "s" } });
    let graph = planned(json!([
        chain(
            "a",
            json!({ "selectors": [service(1)], "then": { "goto": "s" } })
        ),
        chain("b", goto),
        sub(
            "s",
            json!({ "selectors": [service(2)], "then": "continue" })
        ),
    ]))
    .unwrap();
    assert_eq!(
        drawn(&graph),
        [
            "entry a/0:service",
            "a/0:service s/0:service b/0:count",
            "b/0:count s/0:service s/0:service",
            "s/0:service pass pass",
        ]
    );
}

#[test]
fn circles_are_refused_with_their_chains() {
    let to = |target: &str| json!({ "then": { "goto": target } });
    let error = planned(json!([
        chain("a", to("s")),
        sub("s", to("t")),
        sub("t", to("s"))
    ]))
    .unwrap_err();
    assert!(error.found.contains("s -> t -> s"), "{error}");
}

#[test]
fn the_longest_path_is_the_limit() {
    let chains = |count: usize| {
        let list = (0..count).map(|at| chain(&format!("c{at:02}"), json!({ "then": "continue" })));
        planned(list.collect::<Vec<_>>().into())
    };
    assert_eq!(chains(MAX_TAIL_CALLS).unwrap().nodes.len(), MAX_TAIL_CALLS);
    let error = chains(MAX_TAIL_CALLS + 1).unwrap_err();
    assert!(error.found.contains("a path of 34 nodes"), "{error}");
    assert!(
        error.found.contains("c00/0:count -> c01/0:count"),
        "{error}"
    );
    assert!(error.found.ends_with("c33/0:count"), "{error}");
}

#[test]
fn alternatives_do_not_add_up_but_misses_do() {
    // A packet can miss every alternative but the last, so all are on one path.
    let mut selectors: Vec<Value> = (1..=34).map(service).collect();
    for selector in &mut selectors {
        selector["op"] = json!("or");
    }
    let error = planned(json!([chain("a", json!({ "selectors": selectors }))])).unwrap_err();
    assert!(error.found.contains("34 nodes"), "{error}");
}

#[test]
fn a_verdict_map_leads_to_every_sub_chain() {
    let map = json!({
        "selectors": [{
            "selector": "service",
            "keys": [{ "port": 1, "chain": "s" }, { "port": 2, "chain": "t" }],
        }],
        "actions": [{ "action": "goto", "chain": { "from": "element" } }],
    });
    let long: Vec<Value> = (0..31).map(|_| json!({ "action": "count" })).collect();
    let graph = planned(json!([
        chain("a", map.clone()),
        sub("s", json!({})),
        sub("t", json!({ "actions": long })),
    ]))
    .unwrap();
    assert!(graph.has_context);
    assert_eq!(graph.heads.len(), 2);
    let longer: Vec<Value> = (0..32).map(|_| json!({ "action": "count" })).collect();
    let error = planned(json!([
        chain("a", map.clone()),
        sub("s", json!({})),
        sub("t", json!({ "actions": longer })),
    ]))
    .unwrap_err();
    assert!(error.found.contains("34 nodes"), "{error}");

    let error = planned(json!([
        chain("a", map.clone()),
        sub("s", map),
        sub("t", json!({}))
    ]))
    .unwrap_err();
    assert!(
        error.found.contains("a verdict map in the sub-chain"),
        "{error}"
    );
}

#[test]
fn stale_arguments_are_cleared_by_the_first_selector_of_an_alternative() {
    let keyed = json!({ "selector": "service", "keys": [{ "port": 1, "arg": 7 }] });
    let mut other = service(2);
    other["op"] = json!("or");
    let graph = planned(json!([chain(
        "a",
        json!({
            "selectors": [keyed, service(5), other, service(6)],
            "actions": [{ "action": "set_mss", "bytes": { "from": "element" } }],
        })
    )]))
    .unwrap();
    let mut uses: Vec<(usize, ArgumentUse)> = graph
        .nodes
        .iter()
        .filter(|node| node.kind == Kind::Selector)
        .map(|node| (node.ordinal, node.argument))
        .collect();
    uses.sort_by_key(|(ordinal, _)| *ordinal);
    let uses: Vec<ArgumentUse> = uses.into_iter().map(|(_, argument)| argument).collect();
    assert_eq!(
        uses,
        [
            ArgumentUse::Store,
            ArgumentUse::Leave,
            ArgumentUse::Clear,
            ArgumentUse::Leave
        ]
    );
}

/// Chains of a pattern and of a name that it matches run one after the other.
#[test]
fn patterns_are_planned_with_the_names_they_match() {
    let check = |first: &str, second: &str| {
        let actions = vec![json!({ "action": "count" }); 20];
        let on = |name: &str, device: &str| {
            let attach = json!([{ "device": device, "hook": "xdp" }]);
            json!({ "name": name, "attach": attach, "actions": actions, "then": "continue" })
        };
        let chains = json!([on("a", first), on("b", second)]);
        let text = json!({ "version": 1, "chains": chains }).to_string();
        let registry = Registry::embedded().unwrap();
        let spec = Spec::parse(&text, Path::new("test.json"), registry).unwrap();
        super::check(&spec, registry)
    };
    for (first, second) in [("d*", "d0"), ("d0", "d?"), ("d*", "*"), ("d*", "d*")] {
        let error = check(first, second).unwrap_err();
        assert!(error.expected.contains("33"), "{error}");
    }
    for (first, second) in [("d*", "e0"), ("*", "lo"), ("d0", "d1"), ("d*", "e*")] {
        check(first, second).unwrap();
    }
}

fn names(maps: &BTreeSet<String>) -> Vec<&str> {
    maps.iter().map(String::as_str).collect()
}

/// What a graph of these actions keeps, what of it learners fill, and what the learner is told.
#[track_caller]
fn keeps(actions: Value, state: &[&str], reads: &[&str], told: &[&str]) {
    let graph = planned(json!([chain("a", json!({ "actions": actions }))])).unwrap();
    assert_eq!(names(&graph.state), state, "{actions}");
    assert_eq!(names(&graph.reads), reads, "{actions}");
    let mut learns = graph.learns.clone();
    assert_eq!(learns.remove(OPENINGS), told.contains(&"openings"));
    assert_eq!(learns, graph.reads, "{actions}");
    let learner = graph.nodes.iter().find(|node| node.is_learner());
    let params: Vec<&str> = learner
        .iter()
        .flat_map(|node| node.params.keys().map(String::as_str))
        .collect();
    assert_eq!(params, told, "{actions}");
    if learner.is_some() {
        assert_eq!(graph.entry, Successor::Node(graph.nodes.len() - 1));
    }
}

#[test]
fn learners_fill_what_policies_look_up() {
    let strip = |subtype: Value| json!([{ "action": "strip_option", "kind": "mptcp", "subtype": subtype, "unsafe": true }]);
    let subflows = ["pcd_subflows", "pcn_connections"];
    keeps(json!([{ "action": "count" }]), &[], &[], &[]);
    keeps(
        json!([{ "action": "set_window", "bytes": 1 }]),
        &["pcd_flows"],
        &["pcd_flows"],
        &["handshakes"],
    );
    keeps(
        json!([{ "action": "set_window", "bytes": 1, "raw": true }]),
        &[],
        &[],
        &[],
    );
    for none in [json!("dss"), json!("any"), json!(2), json!("mp_prio")] {
        keeps(strip(none), &[], &[], &[]);
    }
    for some in [json!("add_addr"), json!(3)] {
        keeps(strip(some), &subflows, &subflows, &["subflows"]);
    }
    keeps(
        json!([{ "action": "record" }, { "action": "set_window", "bytes": 1 }]),
        &["pcd_flows", "pcd_subflows", "pcn_connections"],
        &["pcd_flows", "pcd_subflows", "pcn_connections"],
        &["handshakes", "subflows"],
    );
    let acks = ["pcd_acks", "pcd_subflows", "pcn_connections"];
    keeps(
        json!([{ "action": "mp_prio", "backup": true }]),
        &[
            "pcd_acks",
            "pcd_cadence",
            "pcd_openings",
            "pcd_subflows",
            "pcn_connections",
        ],
        &acks,
        &["subflows", "acks", "openings"],
    );
    keeps(
        json!([{ "action": "mp_prio", "backup": true, "once": false }]),
        &acks,
        &acks,
        &["subflows", "acks"],
    );
    let held = ["pcd_acks", "pcd_held", "pcd_subflows", "pcn_connections"];
    keeps(
        json!([{ "action": "hold_add_addr" }, { "action": "restore_add_addr" }]),
        &held,
        &held,
        &["subflows", "acks", "held"],
    );
    keeps(
        json!([{ "action": "add_subflow", "address": "10.0.0.9", "id": 1, "every": "1s" }]),
        &[
            "pcd_acks",
            "pcd_cadence",
            "pcd_openings",
            "pcd_subflows",
            "pcn_connections",
            "pcn_keys",
        ],
        &["pcd_acks", "pcd_subflows", "pcn_connections", "pcn_keys"],
        &["subflows", "secrets", "acks", "openings"],
    );
    keeps(
        json!([{ "action": "count", "first": 3 }]),
        &["pcd_cadence", "pcd_openings"],
        &[],
        &["openings"],
    );
}

/// The learner of a hook where no chain asks for one, for the other direction.
#[test]
fn a_graph_learns_for_another_hook() {
    let more = BTreeSet::from(["pcd_acks".to_owned(), "pcd_subflows".to_owned()]);
    let graph = Graph::empty().with_learner(&more).unwrap();
    assert_eq!(
        drawn(&graph),
        ["entry (entry)/0:learner", "(entry)/0:learner pass pass"]
    );
    assert_eq!((&graph.learns, &graph.state), (&more, &more));
    assert!(graph.reads.is_empty());
    let graph = planned(json!([chain(
        "a",
        json!({ "actions": [{ "action": "set_window", "bytes": 1 }] })
    )]))
    .unwrap();
    let graph = graph.with_learner(&more).unwrap();
    assert_eq!(graph.nodes.len(), 2, "one learner does for all");
    let learner = &graph.nodes[1];
    let told: Vec<&str> = learner.params.keys().map(String::as_str).collect();
    assert_eq!(told, ["handshakes", "subflows", "acks"]);
    assert_eq!(names(&graph.reads), ["pcd_flows"]);
    let graph = Graph::empty().with_learner(&BTreeSet::new()).unwrap();
    assert!(graph.nodes.is_empty());
}

#[test]
fn an_action_whose_turn_it_is_not_goes_on_with_the_next() {
    let graph = planned(json!([
        chain(
            "a",
            json!({ "actions": [
                { "action": "set_mss", "bytes": 1, "first": 3, "on_error": "drop" },
                { "action": "goto", "chain": "s", "once": true }], "then": "drop" })
        ),
        sub("s", json!({})),
    ]))
    .unwrap();
    let node = |ordinal| {
        let mut nodes = graph.nodes.iter();
        let found = nodes.find(|node| node.chain == "a" && node.ordinal == ordinal);
        found.unwrap()
    };
    let (first, goto) = (node(0), node(1));
    assert_eq!(
        (first.later, first.otherwise),
        (first.next, Successor::Drop)
    );
    assert_ne!(goto.next, goto.later);
    assert_eq!(goto.later, Successor::Drop);
    assert_eq!(first.cadence, Cadence::First(3));
    assert_eq!(goto.cadence, Cadence::First(1));
}
