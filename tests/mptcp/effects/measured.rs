// SPDX-License-Identifier: MIT OR Apache-2.0
//! Windows that throttle a connection, and what `record` measures, on paths with a delay.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use policy_chain::testbed::{Announce, Options, Role};
use serde_json::{Value, json};

use super::*;
use crate::common::Environment;
use crate::common::mptcp::{Differs, MptcpConnection, exact_on, mptcp_options};
use crate::common::traffic::{Connection, server_addresses};

const WINDOW: u64 = 16384;
const DELAY: Duration = Duration::from_millis(20);

/// A chain for connections in a set, which sets their windows to the set's argument.
fn throttled(scene: &Scene) -> MptcpConnection {
    let selector = json!({ "selector": "mptcp_connection", "set": "slow" });
    let action = json!({ "action": "set_window", "bytes": { "from": "element" } });
    let chain = scene.chain(1..=scene.paths(), json!([selector]), json!([action]));
    let content = json!({
        "version": 1,
        "sets": { "slow": { "kind": "connection", "size": 10 } },
        "chains": [chain],
    });
    scene.environment.apply(scene.role(), &content);
    MptcpConnection::joined(scene.environment, scene.server)
}

fn throttle(scene: &Scene, token: u32) {
    let element = json!({ "token": format!("{token:08x}"), "arg": WINDOW }).to_string();
    let command = ["set", "add", "slow", &element];
    scene.environment.ok(scene.role(), &command);
}

pub const THROTTLED: &[Row] = &[
    Row {
        actions: &["set_window"],
        sender: Role::Server,
        announce: Announce::Subflow,
        paths: 2,
        places: &[EGRESS, INGRESS, XDP],
    },
    Row {
        actions: &["set_window"],
        sender: Role::Server,
        announce: Announce::Subflow,
        paths: 3,
        places: &[INGRESS],
    },
];

/// All subflows say the same small window, which is that of the connection.
#[test]
fn a_connection_throttled_by_its_window() {
    let shape = Options {
        delay: vec![DELAY],
        ..Options::default()
    };
    let expected = WINDOW as f64 * 8.0 / 1e6 / DELAY.as_secs_f64();
    everywhere(THROTTLED, &shape, |scene| {
        let connection = throttled(scene);
        let other = MptcpConnection::joined(scene.environment, scene.server);
        // By the server's token, or the client's.
        let end = [Role::Client, Role::Server][usize::from(scene.server.is_ipv4())];
        throttle(scene, connection.token(end));
        // What was advertised before may still be used up.
        connection.transfer(MEGABYTE / 4)?;
        // Other work on this machine makes a connection slower, never faster.
        let rate = of_five(
            || {
                let rate = connection.transfer(MEGABYTE / 2)? / expected;
                eprintln!("{rate:.2} of {expected:.2} Mbit/s expected");
                assert!(rate < 1.2, "{rate} of {expected}");
                Ok(rate)
            },
            |rate| *rate > 0.6,
        )?;
        assert!(rate > 0.6, "{rate} of {expected}");
        // The other direction, and other connections, are as they were.
        let is_free = |rate: &f64| *rate > 2.0 * expected;
        let back = of_five(|| connection.fetch(MEGABYTE), is_free)?;
        assert!(is_free(&back), "{back}");
        let free = of_five(|| other.transfer(MEGABYTE), is_free)?;
        assert!(is_free(&free), "{free}");
        assert!(connection.is_mptcp());
        Ok(())
    });
}

pub const ON_A_ROUTER: &[Row] = &[
    Row {
        actions: &["set_window"],
        sender: Role::Server,
        announce: Announce::Signal,
        paths: 2,
        places: &[ROUTER_INGRESS],
    },
    Row {
        actions: &["set_window"],
        sender: Role::Server,
        announce: Announce::Signal,
        paths: 3,
        places: &[ROUTER_XDP],
    },
];

/// With checksums that the receiver sees.
#[test]
fn a_window_set_on_a_router() {
    everywhere(ON_A_ROUTER, &Options::default(), |scene| {
        let connection = throttled(scene);
        throttle(scene, connection.token(Role::Client));
        goes_on(&connection)?;
        assert!(scene.done() > 20);
        Ok(())
    });
}

/// What `ss` tells of a socket of the client.
#[derive(Debug)]
struct Socket {
    rtt_min: f64,
    sent: [u64; 3],
    received: u64,
}

impl Socket {
    fn of(environment: &Environment, ports: [u16; 2]) -> Option<Socket> {
        let ports = ports.map(|port| format!(":{port}"));
        let table = environment.run(Role::Client, "ss", &["-tniHO"]);
        let lines = table.lines().map(|line| line.split_whitespace().collect());
        let words: Vec<&str> = lines.into_iter().find(|words: &Vec<&str>| {
            let ends = words.get(3..5).unwrap_or_default().iter();
            ends.zip(&ports)
                .filter(|(end, port)| end.ends_with(port.as_str()))
                .count()
                == 2
        })?;
        let after = |key: &str| words.iter().find_map(|word| word.strip_prefix(key));
        let number = |key| after(key).map_or(0, |text| text.parse().unwrap());
        let again = after("retrans:").and_then(|text| text.split_once('/'));
        let again = again.map_or(0, |(_, total)| total.parse().unwrap());
        Some(Socket {
            rtt_min: after("minrtt:")?.parse().unwrap(),
            sent: [number("segs_out:"), number("bytes_sent:"), again],
            received: number("segs_in:"),
        })
    }
}

/// Waits until what is recorded of a connection, or subflow, is what its socket says: the least
/// round trip to 5 %, and what was sent exactly. A round trip that other work made long is
/// forgotten once `exchange` has made more.
fn agrees(
    environment: &Environment,
    path: u8,
    ports: [u16; 2],
    exchange: impl Fn() -> Result<(), Differs>,
) -> Result<(), Differs> {
    let mut last = String::new();
    for _ in 0..20 {
        let list = environment.json(Role::Client, &["connections", "--json", "--over", "20ms"]);
        let socket = Socket::of(environment, ports).unwrap();
        let mut subflows = (list.as_array().unwrap().iter())
            .flat_map(|connection| connection["subflows"].as_array().unwrap());
        let subflow = subflows.find(|it| {
            ["local", "remote"].map(|end| it[end]["port"].as_u64())
                == ports.map(|it| Some(it.into()))
        });
        let subflow = subflow.unwrap();
        assert_eq!(subflow["device"], format!("path{path}"));
        let local = &subflow["local"];
        let sent = ["packets", "bytes", "retransmissions"].map(|key| local[key].as_u64().unwrap());
        let rtt = local["rtt_us"]["min"].as_f64().unwrap_or(0.0) / 1e3;
        let received = subflow["remote"]["packets"].as_u64().unwrap();
        last = format!("path {path}: {rtt} ms {sent:?} {received}, {socket:?}");
        if (0.95..1.05).contains(&(rtt / socket.rtt_min))
            && sent == socket.sent
            && received == socket.received
        {
            eprintln!("{last}");
            return Ok(());
        }
        exchange()?;
    }
    panic!("{last}");
}

const PATHS: [u8; 3] = [1, 2, 3];
const DELAYS: [u64; 3] = [20, 5, 10];

/// TCP and MPTCP over paths of 20, 5 and 10 ms, with losses; packets come in by one of the hooks.
fn recorded(ingress: &str) {
    let options = Options {
        delay: DELAYS.map(Duration::from_millis).to_vec(),
        ..mptcp_options(PATHS.len() as u8, Announce::Subflow)
    };
    let environment = Environment::with(&options);
    let attach = |hooks: &[&str]| -> Value {
        let all = |hook| PATHS.map(|path| json!({ "device": format!("path{path}"), "hook": hook }));
        hooks.iter().flat_map(all).collect()
    };
    let record = json!({
        "name": "record",
        "attach": attach(&[ingress, "tc-egress"]),
        "actions": [{ "action": "record" }],
    });
    let lose = json!({
        "name": "lose",
        "attach": attach(&["xdp"]),
        "selectors": [{ "selector": "tcp_flags", "all": ["psh"] }],
        "actions": [{ "action": "drop", "first": 2 }],
    });
    let file = |chain: Value| json!({ "version": 1, "chains": [chain] });
    environment.apply(Role::Client, &file(record));
    environment.apply(Role::Server, &file(lose));
    for family in 0..2 {
        for path in PATHS {
            let server = &environment.testbed.path(path).unwrap().server;
            let server: [IpAddr; 2] = [server.ipv4.into(), server.ipv6.into()];
            let mut connection = Connection::open(&environment, server[family], 0);
            connection.exchange(3);
            connection.transfer(MEGABYTE);
            let end = |address: io::Result<SocketAddr>| address.unwrap().port();
            let client = &connection.client;
            let ports = [end(client.local_addr()), end(client.peer_addr())];
            let exchange = || {
                connection.exchange(1);
                Ok(())
            };
            agrees(&environment, path, ports, exchange).unwrap();
        }
        let server = server_addresses(&environment)[family];
        exact_on(&options, || {
            let connection = MptcpConnection::joined(&environment, server);
            connection.exchange(3)?;
            connection.transfer(2 * MEGABYTE)?;
            for subflow in connection.subflows(&environment, Role::Client) {
                let ports = [subflow.local.port(), subflow.peer.port()];
                // What goes by each path.
                let exchange = || connection.transfer(MEGABYTE / 4).map(drop);
                agrees(&environment, subflow.path(), ports, exchange)?;
            }
            Ok(())
        });
    }
    let lost = environment.counter(Role::Client, "Tcp", "RetransSegs");
    assert!(lost >= 12, "{lost}");
}

#[test]
fn recorded_as_sockets_have_it() {
    recorded("xdp");
}

#[test]
fn recorded_as_sockets_have_it_by_tc_alone() {
    recorded("tc-ingress");
}
