// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sets that decide, changed while traffic flows, and which chain takes which packet.

use std::net::IpAddr;

use policy_chain::testbed::Role;
use serde_json::{Value, json};

use crate::common::capture::{Capture, RST};
use crate::common::traffic::{Connection, PORT, client_addresses, server_addresses, tcp_info};
use crate::common::{Environment, eventually, says};

const HOOKS: [&str; 3] = ["xdp", "tc-ingress", "tc-egress"];

/// The flow of a connection as an element, seen from the server.
fn flow(environment: &Environment, connection: &Connection, rest: &str) -> String {
    let [local, _] = server_addresses(environment);
    let [remote, _] = client_addresses(environment);
    let port = connection.client_port();
    format!("local={local},local_port={PORT},remote={remote},remote_port={port}{rest}")
}

/// Chain `main` on the server, which hands the flows of the set `fate` to sub-chains.
fn verdict_map(hook: &str) -> Value {
    // Each hook sees the same packets or their answers.
    json!({
        "version": 1,
        "sets": { "fate": { "kind": "flow", "size": 3 } },
        "chains": [
            {
                "name": "main",
                "attach": [{ "device": "path1", "hook": hook }],
                "selectors": [{ "selector": "flow", "set": "fate" }],
                "actions": [{ "action": "goto", "chain": { "from": "element" } }],
            },
            {
                "name": "narrow",
                "actions": [{ "action": "set_window", "raw": true, "bytes": 99 }],
            },
            { "name": "stop", "then": "drop" },
        ],
    })
}

fn nodes(environment: &Environment, chain: &str) -> Value {
    let shown = environment.json(Role::Server, &["show", chain, "--json"]);
    shown["nodes"][0]["nodes"].clone()
}

/// The window in the last segments, of the direction that the hook sees.
fn raw_window(connection: &Connection, hook: &str) -> u32 {
    let end = match hook {
        "tc-egress" => &connection.client,
        _ => &connection.server,
    };
    let info = tcp_info(end);
    info.send_window >> info.send_scale
}

fn verdict_map_at(hook: &str) {
    let environment = Environment::direct();
    environment.apply(Role::Server, &verdict_map(hook));
    let generations = environment.generations();
    let server = |arguments: &[&str]| environment.ok(Role::Server, arguments);
    let connection = Connection::open(&environment, server_addresses(&environment)[0], PORT);
    let other = Connection::open(&environment, server_addresses(&environment)[0], PORT + 1);
    connection.exchange(5);
    assert_ne!(raw_window(&connection, hook), 99);
    assert_eq!(environment.packets(Role::Server, "main"), 0);

    // A flow gets a chain.
    let element = |rest: &str| flow(&environment, &connection, rest);
    server(&["set", "add", "fate", &element(",chain=narrow")]);
    connection.exchange(5);
    assert_eq!(raw_window(&connection, hook), 99);
    other.exchange(5);
    assert_ne!(raw_window(&other, hook), 99);
    // A last acknowledgement may come between the two looks.
    eventually("both chains count the same", || {
        let [main, narrow] = ["main", "narrow"].map(|name| environment.packets(Role::Server, name));
        (main == narrow && narrow >= 5).then_some(())
    });
    let list = environment.json(Role::Server, &["set", "list", "fate", "--json"]);
    assert_eq!(list[0]["chain"], "narrow");
    assert_eq!(list.as_array().unwrap().len(), 1);

    // Another chain, at once.
    server(&["set", "add", "fate", &element(",chain=stop")]);
    connection.server.set_nonblocking(true).unwrap();
    let (mut writer, mut reader) = (&connection.client, &connection.server);
    std::io::Write::write_all(&mut writer, b"?").unwrap();
    eventually("the flow is stopped", || {
        (environment.packets(Role::Server, "stop") > 0).then_some(())
    });
    let mut buffer = [0; 8];
    if hook != "tc-egress" {
        assert!(std::io::Read::read(&mut reader, &mut buffer).is_err());
    }
    // And away with it: the retransmission comes through.
    server(&["set", "del", "fate", &element("")]);
    eventually("the flow goes on", || {
        (std::io::Read::read(&mut reader, &mut buffer).ok() == Some(1)).then_some(())
    });
    connection.server.set_nonblocking(false).unwrap();
    connection.exchange(5);

    // A chain that elements name is not deleted, unless by force; then packets pass.
    server(&["set", "add", "fate", &element(",chain=narrow")]);
    let refused = environment.fails(Role::Server, 1, &["delete", "narrow"]);
    says(&refused, &["narrow", "fate", "--force"]);
    assert_eq!(environment.generations(), generations);
    server(&["delete", "narrow", "--force"]);
    connection.exchange(5);
    let shown = nodes(&environment, "main");
    let lost = shown[1]["reasons"]["no_chain"].as_u64();
    assert!(lost >= Some(5), "{shown}");
    // The element still says so, and its id is not given to another chain.
    let listed = server(&["set", "list", "fate"]);
    assert!(listed.contains("chain="), "{listed}");
    let fourth = json!({ "version": 1, "chains": [{ "name": "late", "then": "drop" }] });
    environment.apply(Role::Server, &fourth);
    connection.exchange(5);
}

#[test]
fn verdict_map_by_xdp() {
    verdict_map_at(HOOKS[0]);
}

#[test]
fn verdict_map_by_tc_ingress() {
    verdict_map_at(HOOKS[1]);
}

#[test]
fn verdict_map_by_tc_egress() {
    verdict_map_at(HOOKS[2]);
}

/// Each flow has a window of its own, from its element.
fn windows_at(hook: &str) {
    let environment = Environment::direct();
    environment.apply(
        Role::Server,
        &json!({
            "version": 1,
            "sets": { "slow": { "kind": "flow", "size": 2 } },
            "chains": [{
                "name": "t",
                "attach": [{ "device": "path1", "hook": hook }],
                "selectors": [{ "selector": "flow", "set": "slow" }],
                "actions": [{
                    "action": "set_window", "raw": true, "bytes": { "from": "element" },
                }],
            }],
        }),
    );
    let generations = environment.generations();
    let listener = crate::common::traffic::listen(
        &environment,
        (server_addresses(&environment)[0], PORT).into(),
    );
    let mut connections: Vec<Connection> = (0..3)
        .map(|_| Connection::open_to(&environment, &listener))
        .collect();
    let element = |at: usize, rest: &str| flow(&environment, &connections[at], rest);
    let add = |element: &str| environment.cli(Role::Server, &["set", "add", "slow", element]);
    assert!(add(&element(0, ",arg=111")).status.success());
    assert!(add(&element(1, ",arg=222")).status.success());
    // The set is full; what it has, stays, and can be changed.
    let full = add(&element(2, ",arg=333"));
    let message = crate::common::failed("set add", 1, &full);
    says(&message, &["slow", "full", "2 elements", "size"]);
    for (at, window) in [(0, Some(111)), (1, Some(222)), (2, None)] {
        connections[at].exchange(3);
        let seen = raw_window(&connections[at], hook);
        match window {
            Some(window) => assert_eq!(seen, window),
            None => assert!(![111, 222, 333].contains(&seen)),
        }
    }
    assert!(add(&element(0, ",arg=112")).status.success());
    connections[0].exchange(3);
    assert_eq!(raw_window(&connections[0], hook), 112);

    // An argument that does not fit the field is counted, and the packet left alone.
    assert!(add(&element(0, ",arg=70000")).status.success());
    connections[0].exchange(3);
    assert!(raw_window(&connections[0], hook) != 70_000 % 65_536);
    let shown = nodes(&environment, "t");
    assert!(
        shown[1]["reasons"]["bad_argument"].as_u64() >= Some(3),
        "{shown}"
    );

    // Others in the place of all.
    let lines = format!(
        "# from a file\n{}\n\n{{\"local\": \"{}\", \"local_port\": {PORT}, \"remote\": \"{}\", \
         \"remote_port\": {}, \"arg\": 333}}\n",
        element(1, ",arg=223"),
        server_addresses(&environment)[0],
        client_addresses(&environment)[0],
        connections[2].client_port(),
    );
    let file = environment.files.write("elements.txt", lines);
    let file = file.to_str().unwrap();
    // There is no room for old and new together.
    let message = environment.fails(Role::Server, 1, &["set", "load", "slow", file, "--replace"]);
    says(&message, &["slow", "full"]);
    environment.ok(Role::Server, &["set", "del", "slow", &element(0, "")]);
    let said = environment.ok(Role::Server, &["set", "load", "slow", file, "--replace"]);
    assert_eq!(said, "stored 2, removed 0\n");
    for (at, window) in [(1, 223), (2, 333)] {
        connections[at].exchange(3);
        assert_eq!(raw_window(&connections[at], hook), window);
    }
    let only_one = environment.files.write("one.txt", element(2, ",arg=334"));
    let said = environment.ok(
        Role::Server,
        &[
            "set",
            "load",
            "slow",
            only_one.to_str().unwrap(),
            "--replace",
        ],
    );
    assert_eq!(said, "stored 1, removed 1\n");
    connections[1].exchange(3);
    assert_ne!(raw_window(&connections[1], hook), 223);
    connections[2].exchange(3);
    assert_eq!(raw_window(&connections[2], hook), 334);
    assert_eq!(environment.generations(), generations);
    for connection in &mut connections {
        connection.transfer(50_000);
    }
}

#[test]
fn windows_by_xdp() {
    windows_at("xdp");
}

#[test]
fn windows_by_tc_ingress() {
    windows_at("tc-ingress");
}

/// (A and spark) and (B and web): a packet (A, web) is taken by neither.
#[test]
fn no_cross_pairs() {
    const SPARK: u16 = 7077;
    const WEB: u16 = 80;
    for hook in ["xdp", "tc-ingress"] {
        let environment = Environment::direct();
        let [a, b]: [IpAddr; 2] = client_addresses(&environment);
        // Also as two alternatives of one chain.
        let pair = |address: IpAddr, port: u16| {
            json!([
                { "selector": "ip_pair", "op": "or", "remote": address },
                { "selector": "service", "local_port": port },
            ])
        };
        let chain = |name: &str, selectors: Value| {
            json!({
                "name": name,
                "attach": [{ "device": "path1", "hook": hook }],
                "selectors": selectors,
                "actions": [{ "action": "count" }],
                "then": "continue",
            })
        };
        let either: Vec<Value> = [pair(a, SPARK), pair(b, WEB)]
            .iter()
            .flat_map(|pair| pair.as_array().unwrap().clone())
            .collect();
        environment.apply(
            Role::Server,
            &json!({
                "version": 1,
                "chains": [
                    chain("a-spark", pair(a, SPARK)),
                    chain("b-web", pair(b, WEB)),
                    chain("either", either.into()),
                ],
            }),
        );
        let counts =
            || ["a-spark", "b-web", "either"].map(|name| environment.packets(Role::Server, name));
        let servers = server_addresses(&environment);
        // Address 0 is A's way, address 1 is B's.
        for (address, port) in [(0, WEB), (1, SPARK)] {
            let mut connection = Connection::open(&environment, servers[address], port);
            connection.transfer(10_000);
        }
        assert_eq!(counts(), [0, 0, 0]);
        let mut capture = Capture::start(environment.namespace(Role::Server), "path1");
        for (address, port) in [(0, SPARK), (1, WEB)] {
            Connection::open(&environment, servers[address], port).exchange(10);
        }
        eventually("both chains count what was captured", || {
            let [spark, web, either] = counts();
            let mut captured = |port| {
                let segments = capture.segments().iter();
                segments.filter(|s| s.destination_port == port).count() as u64
            };
            let fits = spark == captured(SPARK) && web == captured(WEB);
            (fits && spark > 10 && web > 10 && either == spark + web).then_some(())
        });
        assert!(capture.segments().iter().all(|s| s.flags & RST == 0));
    }
}
