// SPDX-License-Identifier: MIT OR Apache-2.0
//! Windows in bytes: what the peer of a rewritten window takes it for, and the learners that this
//! takes.

use policy_chain::testbed::Role;
use serde_json::{Value, json};

use crate::common::traffic::{Connection, PORT, server_addresses, tcp_info, transfer_both};
use crate::common::{Environment, eventually};

const WINDOW: u32 = 20_000;
const MEGABYTE: usize = 1 << 20;

/// A place where the windows of the client pass.
struct Place {
    role: Role,
    device: &'static str,
    hook: &'static str,
    mode: &'static str,
    /// Where the other half of a handshake passes.
    other: &'static str,
}

const PLACES: [Place; 5] = [
    Place {
        role: Role::Client,
        device: "path1",
        hook: "tc-egress",
        mode: "tcx",
        other: "tc-ingress",
    },
    Place {
        role: Role::Client,
        device: "path1",
        hook: "tc-egress",
        mode: "clsact",
        other: "tc-ingress",
    },
    Place {
        role: Role::Router,
        device: "client1",
        hook: "xdp",
        mode: "native",
        other: "tc-egress",
    },
    Place {
        role: Role::Router,
        device: "client1",
        hook: "xdp",
        mode: "generic",
        other: "tc-egress",
    },
    Place {
        role: Role::Router,
        device: "client1",
        hook: "tc-ingress",
        mode: "tcx",
        other: "tc-egress",
    },
];

/// Rewrites the windows of whoever talks to the server's port.
fn chain(place: &Place, bytes: u32) -> Value {
    let end = match place.hook {
        "tc-egress" => "remote_port",
        _ => "local_port",
    };
    json!({
        "version": 1,
        "chains": [{
            "name": "window",
            "attach": [{ "device": place.device, "hook": place.hook, "mode": place.mode }],
            "selectors": [{ "selector": "service", end: PORT }],
            "actions": [{ "action": "set_window", "bytes": bytes }],
        }],
    })
}

fn unknown(environment: &Environment, place: &Place) -> u64 {
    environment.reason(place.role, "window", "unknown_scale")
}

/// The hooks of a device that a program of ours is attached to.
fn hooks(environment: &Environment) -> Vec<String> {
    let generations = environment.generations();
    let hook = |name: &String| {
        let attachment = name.split('/').next().unwrap();
        attachment.rsplit('_').next().unwrap().to_owned()
    };
    generations.iter().map(hook).collect()
}

fn check(place: &Place) {
    let environment = Environment::routed();
    let [v4, v6] = server_addresses(&environment);
    let before = Connection::open(&environment, v4, PORT);
    environment.apply(place.role, &chain(place, WINDOW));
    let listed = environment.listed(place.role, "window");
    let mut learners = vec![place.hook, place.other];
    learners.sort_unstable();
    let mut shown: Vec<&str> = listed["attach"][0]["learners"]
        .as_array()
        .unwrap()
        .iter()
        .map(|hook| hook.as_str().unwrap())
        .collect();
    shown.sort_unstable();
    assert_eq!(shown, learners);
    let table = environment.ok(place.role, &["list"]);
    assert!(table.contains("learners "), "{table}");

    before.exchange(3);
    assert!(unknown(&environment, place) >= 3);
    let early = unknown(&environment, place);
    drop(before);

    for address in [v4, v6] {
        let connection = Connection::open(&environment, address, PORT);
        connection.exchange(3);
        let window = |bytes: u32| {
            eventually("the window the server knows of", || {
                let info = tcp_info(&connection.server);
                assert!(info.send_scale > 0);
                let wanted = bytes >> info.send_scale << info.send_scale;
                connection.exchange(1);
                (info.send_window == wanted).then_some(wanted)
            })
        };
        assert!(window(WINDOW) > 0);
        // What is known of connections goes on with the new chains.
        environment.apply(place.role, &chain(place, 2 * WINDOW));
        assert!(window(2 * WINDOW) > WINDOW);
        environment.apply(place.role, &chain(place, WINDOW));
    }
    transfer_both(&environment, MEGABYTE);
    let late = unknown(&environment, place);
    // the connection from before the chain closes in between
    assert!(late <= early + 4, "{late}, before {early}");
    assert_eq!(environment.checksum_errors(Role::Server), 0);
    assert_eq!(environment.checksum_errors(Role::Client), 0);

    let mut raw = chain(place, 100);
    raw["chains"][0]["actions"][0]["raw"] = true.into();
    environment.apply(place.role, &raw);
    assert_eq!(hooks(&environment), [place.hook]);
    environment.apply(place.role, &chain(place, WINDOW));
    assert_eq!(hooks(&environment).len(), 2);
    environment.ok(place.role, &["delete", "window"]);
    assert_eq!(hooks(&environment), Vec::<String>::new());
}

#[test]
fn client_tcx() {
    check(&PLACES[0]);
}

#[test]
fn client_clsact() {
    check(&PLACES[1]);
}

#[test]
fn router_native() {
    check(&PLACES[2]);
}

#[test]
fn router_generic() {
    check(&PLACES[3]);
}

#[test]
fn router_ingress() {
    check(&PLACES[4]);
}

/// A chain that runs at the other hook anyway learns there, whichever comes first.
#[test]
fn learners_share_the_attachments_of_chains() {
    let environment = Environment::direct();
    let attached = |name: &str, hook: &str, actions: Value| {
        json!({ "version": 1, "chains": [{
            "name": name,
            "attach": [{ "device": "path1", "hook": hook }],
            "actions": actions,
            "then": "continue",
        }] })
    };
    let window = attached(
        "window",
        "tc-egress",
        json!([{ "action": "set_window", "bytes": WINDOW }]),
    );
    let learners = || -> Vec<String> {
        let listed = environment.listed(Role::Client, "window");
        let learners = listed["attach"][0]["learners"].as_array().unwrap();
        learners
            .iter()
            .map(|hook| hook.as_str().unwrap().to_owned())
            .collect()
    };
    let other = attached("other", "xdp", json!([{ "action": "count" }]));
    environment.apply(Role::Client, &other);
    environment.apply(Role::Client, &window);
    assert_eq!(learners(), ["xdp", "tc-egress"]);
    assert_eq!(hooks(&environment).len(), 2);
    let [v4, _] = server_addresses(&environment);
    let connection = Connection::open(&environment, v4, PORT);
    connection.exchange(2);
    let known = |connection: &Connection| {
        let info = tcp_info(&connection.server);
        assert_eq!(
            info.send_window >> info.send_scale,
            WINDOW >> info.send_scale
        );
    };
    known(&connection);
    // The learner moves to TC with what it knows.
    environment.ok(Role::Client, &["delete", "other"]);
    assert_eq!(learners(), ["tc-ingress", "tc-egress"]);
    connection.exchange(2);
    known(&connection);
    let connection = Connection::open(&environment, v4, PORT);
    connection.exchange(2);
    known(&connection);
    // Two chains on one device need one of each.
    let ingress = attached(
        "ingress",
        "tc-ingress",
        json!([{ "action": "set_window", "bytes": WINDOW }]),
    );
    environment.apply(Role::Client, &ingress);
    assert_eq!(hooks(&environment).len(), 2);
    let info = tcp_info(&connection.client);
    connection.exchange(2);
    assert_eq!(
        tcp_info(&connection.client).send_window >> info.send_scale,
        WINDOW >> info.send_scale
    );
    environment.ok(Role::Client, &["delete", "window"]);
    assert_eq!(hooks(&environment).len(), 2);
    environment.ok(Role::Client, &["delete", "--all"]);
    assert_eq!(hooks(&environment), Vec::<String>::new());
}
