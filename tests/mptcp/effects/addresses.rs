// SPDX-License-Identifier: MIT OR Apache-2.0
//! Addresses kept back, given later, made up, and taken away.

use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use policy_chain::testbed::{Announce, Options, Role};
use serde_json::{Value, json};

use super::*;
use crate::common::agent::Agent;
use crate::common::mptcp::{Differs, MptcpConnection, Subflow, exact_on};
use crate::common::traffic::server_addresses;
use crate::common::{DEADLINE, Environment, eventually};

/// Announcements of one address, which the kernel repeats.
const REPEATED: u64 = 3;

fn filtered(scene: &Scene) -> Result<(), Differs> {
    let strip = json!({ "action": "strip_option", "kind": "mptcp", "subtype": "add_addr" });
    scene.apply(json!([]), json!([strip]));
    let sent = scene.counter(Role::Server, "AddAddrTx");
    let zero = [
        scene.counter(Role::Client, "AddAddr"),
        scene.counter(Role::Client, "MPJoinSynTx"),
        scene.counter(Role::Client, "MPCapableDataFallback"),
        scene.counter(Role::Server, "MPCapableDataFallback"),
    ];
    let connection = MptcpConnection::open(scene.environment, scene.server, 0);
    sent.driven(REPEATED, || connection.exchange(1))?;
    goes_on(&connection)?;
    zero.iter().for_each(|counter| counter.is(0));
    for role in [Role::Client, Role::Server] {
        assert_eq!(connection.subflows(scene.environment, role).len(), 1);
    }
    Ok(())
}

pub const FILTERED: &[Row] = &[
    Row {
        actions: &["strip_option"],
        sender: Role::Server,
        announce: Announce::Signal,
        paths: 2,
        places: &[EGRESS, INGRESS, XDP, ROUTER_INGRESS],
    },
    Row {
        actions: &["strip_option"],
        sender: Role::Server,
        announce: Announce::Signal,
        paths: 3,
        places: &[ROUTER_XDP],
    },
];

/// The client hears of no address, and keeps to MPTCP.
#[test]
fn announcements_filtered() {
    everywhere(FILTERED, &Options::default(), filtered);
}

/// The server's addresses after the first, of the connection's family.
fn others(scene: &Scene) -> Vec<IpAddr> {
    (2..=scene.paths())
        .map(|path| scene.address(path))
        .collect()
}

/// Has the server announce nothing by itself.
fn silence(scene: &Scene) {
    let arguments = ["mptcp", "endpoint", "flush"];
    scene.environment.run(Role::Server, "ip", &arguments);
}

fn made_up(scene: &Scene) -> Result<(), Differs> {
    silence(scene);
    let addresses = others(scene);
    let actions = addresses.iter().zip(7..);
    let actions: Value = actions
        .map(|(address, id)| json!({ "action": "add_subflow", "address": address, "id": id }))
        .collect();
    scene.apply_to_subflow(1, actions);
    let count = addresses.len() as u64;
    let heard = scene.counter(Role::Client, "AddAddr");
    let tried = scene.counter(Role::Client, "MPJoinSynTx");
    let joined = scene.counter(Role::Server, "MPJoinAckRx");
    let connection = MptcpConnection::open(scene.environment, scene.server, 0);
    // Where only the other side sends, there is room. Not much at a time: where a subflow joins while
    // more is sent than the window of a new connection, Linux 6.18 delivers wrong bytes of right
    // segments in one of a hundred connections, or resets the subflow.
    joined.driven(count, || connection.transfer(1000).map(drop))?;
    carried_by_all(scene, &connection)?;
    heard.is(count);
    tried.is(count);
    joined.is(count);
    Ok(())
}

/// That data takes a subflow on each path.
fn carried_by_all(scene: &Scene, connection: &MptcpConnection) -> Result<(), Differs> {
    connection.wait_subflows(scene.environment, Role::Client, scene.paths().into());
    eventually("all subflows carry data", || {
        connection.fetch(MEGABYTE).err().map(Err).or_else(|| {
            let subflows = connection.subflows(scene.environment, Role::Client);
            let all = subflows.iter().all(|it| it.bytes_received > 0);
            all.then_some(Ok(()))
        })
    })?;
    goes_on(connection)
}

pub const MADE_UP: &[Row] = &[
    Row {
        actions: &["add_subflow"],
        sender: Role::Server,
        announce: Announce::Signal,
        paths: 2,
        places: &[EGRESS, INGRESS, XDP, ROUTER_EGRESS],
    },
    Row {
        actions: &["add_subflow"],
        sender: Role::Server,
        announce: Announce::Signal,
        paths: 3,
        places: &[ROUTER_XDP],
    },
];

/// The client joins addresses that the server never announced.
#[test]
fn announcements_made_up() {
    everywhere(MADE_UP, &Options::default(), made_up);
}

fn made_up_while_idle(scene: &Scene) -> Result<(), Differs> {
    silence(scene);
    let address = scene.address(2);
    let add = json!({ "action": "add_subflow", "address": address, "id": 7 });
    let nothing = json!({ "selector": "tcp_flags", "all": ["syn", "fin"] });
    // Keys are kept from now on, and no segment is to have the option.
    scene.apply(json!([nothing]), json!([add]));
    let heard = scene.counter(Role::Client, "AddAddr");
    let joined = scene.counter(Role::Server, "MPJoinAckRx");
    let connection = MptcpConnection::open(scene.environment, scene.server, 0);
    connection.exchange(3)?;
    let agent = Agent::start(scene.environment, scene.role(), "agent");
    heard.is(0);
    scene.apply_to_subflow(1, json!([add]));
    joined.becomes(1);
    heard.is(1);
    agent.stop(Signal::SIGTERM);
    carried_by_all(scene, &connection)?;
    heard.is(1);
    joined.is(1);
    Ok(())
}

pub const MADE_UP_WHILE_IDLE: &[Row] = &[Row {
    actions: &["add_subflow"],
    sender: Role::Server,
    announce: Announce::Signal,
    paths: 2,
    places: &[EGRESS, INGRESS, ROUTER_XDP],
}];

/// A connection that has nothing to send joins all the same: the agent makes a packet for the option.
#[test]
fn announcements_made_up_while_idle() {
    everywhere(MADE_UP_WHILE_IDLE, &Options::default(), made_up_while_idle);
}

/// The id of the sender's address on a subflow, as its `ss` has it: `token:0000(id:0)/9c2e(id:1)`,
/// the remote one first.
fn address_id(subflow: &Subflow) -> u8 {
    let token = subflow.line.split_once("token:").unwrap().1;
    let id = token.split("id:").nth(2).unwrap();
    id.split(')').next().unwrap().parse().unwrap()
}

fn taken_away(scene: &Scene) -> Result<(), Differs> {
    let paths = scene.paths();
    let connection = MptcpConnection::joined(scene.environment, scene.server);
    let subflows = connection.wait_subflows(scene.environment, scene.sender, paths.into());
    let id = address_id(subflows.last().unwrap());
    assert_ne!(id, 0, "{subflows:#?}");
    let told = scene.counter(scene.receiver(), "RmAddr");
    let action = json!({ "action": "remove_addr", "id": id });
    scene.apply_to_subflow(1, json!([action]));
    told.driven(1, || both_ways(&connection))?;
    for role in [Role::Client, Role::Server] {
        let left = connection.wait_subflows(scene.environment, role, usize::from(paths) - 1);
        assert!(left.iter().all(|it| it.path() < paths), "{left:#?}");
    }
    goes_on(&connection)?;
    told.is(1);
    Ok(())
}

pub const TAKEN_AWAY: &[Row] = &[
    Row {
        actions: &["remove_addr"],
        sender: Role::Client,
        announce: Announce::Subflow,
        paths: 2,
        places: &[EGRESS, INGRESS, XDP, ROUTER_INGRESS, ROUTER_GENERIC],
    },
    Row {
        actions: &["remove_addr"],
        sender: Role::Client,
        announce: Announce::Subflow,
        paths: 3,
        places: &[EGRESS, ROUTER_XDP],
    },
    Row {
        actions: &["remove_addr"],
        sender: Role::Server,
        announce: Announce::Signal,
        paths: 2,
        places: &[XDP],
    },
];

/// The receiver ends the subflow of an address that is said to be lost.
#[test]
fn addresses_taken_away() {
    everywhere(TAKEN_AWAY, &Options::default(), taken_away);
}

/// How long addresses are held.
const HELD: Duration = Duration::from_secs(5);
/// When they are back at the latest after that, most of them: other work on this machine delays some.
const SOON: Duration = Duration::from_secs(1);

/// After which they are given again, if nobody has echoed them.
const REPEAT: Duration = Duration::from_secs(1);

fn hold() -> Value {
    json!({ "action": "hold_add_addr" })
}

/// Waits until the connections have joined all paths, with packets on those that are `busy`. When
/// each did, if it has within [`DEADLINE`].
fn wait_joined(
    scene: &Scene,
    connections: &[(MptcpConnection, bool)],
) -> Result<Vec<Option<Instant>>, Differs> {
    let limit = Instant::now() + DEADLINE;
    let mut joined = vec![None; connections.len()];
    while joined.contains(&None) && Instant::now() < limit {
        for ((connection, busy), joined) in connections.iter().zip(&mut joined) {
            let info = connection.info(Role::Client);
            let info = info.expect("the connection is plain TCP");
            if joined.is_none() && info.subflows + 1 == scene.paths() {
                *joined = Some(Instant::now());
            }
            if *busy {
                connection.exchange(1)?;
                connection.transfer(20_000)?;
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(joined)
}

/// Has the server announce what it has on the other paths, in the connection's family only.
fn announce(scene: &Scene) {
    silence(scene);
    for path in 2..=scene.paths() {
        let (address, device) = (scene.address(path).to_string(), format!("path{path}"));
        let endpoint = [
            "mptcp", "endpoint", "add", &address, "dev", &device, "signal",
        ];
        scene.environment.run(Role::Server, "ip", &endpoint);
    }
}

/// A busy connection and one that is idle, woken by the agent, hear of the addresses after their
/// time: how long after, each.
fn held(scene: &Scene, later: bool) -> Result<Vec<Duration>, Differs> {
    let environment = scene.environment;
    announce(scene);
    let restore = match later {
        true => json!({ "action": "restore_add_addr" }),
        false => json!({ "action": "restore_add_addr", "after": "5s" }),
    };
    match later {
        true => scene.apply(json!([]), json!([hold()])),
        false => scene.apply(json!([]), json!([hold(), restore])),
    }
    let agent = Agent::start(environment, scene.role(), "agent");
    let announced = scene.counter(Role::Server, "AddAddrTx");
    let heard = scene.counter(Role::Client, "AddAddr");
    let echoed = scene.counter(Role::Server, "EchoAdd");
    let joined = scene.counter(Role::Server, "MPJoinAckRx");
    let opened = Instant::now();
    let mut connections = Vec::new();
    for busy in [true, false] {
        let connection = MptcpConnection::open(environment, scene.server, 0);
        connection.exchange(3)?;
        connections.push((connection, busy));
    }
    let all_open = Instant::now();
    let addresses = u64::from(scene.paths()) - 1;
    let (earliest, latest) = if later {
        // Until the kernel gives up.
        eventually("the last announcement", || {
            (announced.grown() >= 4 * 2 * addresses).then_some(())
        });
        heard.is(0);
        let before = Instant::now();
        scene.apply(json!([]), json!([hold(), restore]));
        (before, Instant::now())
    } else {
        while opened.elapsed() < HELD - Duration::from_millis(100) {
            heard.is(0);
            thread::sleep(Duration::from_millis(100));
        }
        (opened + HELD, all_open + HELD)
    };
    let joins = wait_joined(scene, &connections)?;
    let counts = [&heard, &echoed, &joined].map(|counter| counter.grown());
    assert!(
        !joins.contains(&None),
        "{:?} {}: busy and idle joined: {joins:?}; heard, echoed, joined: {counts:?}; {:#}",
        scene.place,
        scene.server,
        environment.json(scene.role(), &["show", "t", "--json"])["nodes"],
    );
    let joins: Vec<Instant> = joins.into_iter().flatten().collect();
    for at in &joins {
        assert!(*at >= earliest, "{:?} too early", earliest - *at);
    }
    for counter in [&heard, &echoed, &joined] {
        counter.becomes(2 * addresses);
    }
    for (connection, _) in &connections {
        goes_on(connection)?;
    }
    // What was echoed is not given again.
    thread::sleep(REPEAT + Duration::from_millis(200));
    for (connection, _) in &connections {
        connection.exchange(1)?;
    }
    heard.is(2 * addresses);
    agent.stop(Signal::SIGTERM);
    let late = joins.iter().map(|at| at.saturating_duration_since(latest));
    Ok(late.collect())
}

fn held_at(row: &Row, place: Place, family: usize, later: bool) -> Vec<Duration> {
    let options = row.options(place.router, &Options::default());
    exact_on(&options, || {
        let environment = Environment::with(&options);
        let scene = Scene {
            environment: &environment,
            options: &options,
            row,
            place,
            sender: row.sender,
            server: server_addresses(&environment)[family],
        };
        scene.begins();
        let late = held(&scene, later)?;
        scene.checksums_are_right();
        Ok(late)
    })
}

/// Most of the time is waiting, so some wait side by side: as many as do not make each other late.
fn held_everywhere(rows: &[Row], later: bool) {
    const TOGETHER: usize = 3;
    let places = rows
        .iter()
        .flat_map(|row| row.places.iter().map(move |place| (row, *place)));
    let all: Vec<(&Row, Place, usize)> = places
        .flat_map(|(row, place)| [(row, place, 0), (row, place, 1)])
        .collect();
    let mut late = Vec::new();
    for some in all.chunks(TOGETHER) {
        thread::scope(|scope| {
            let running: Vec<_> = some
                .iter()
                .map(|&(row, place, family)| {
                    scope.spawn(move || held_at(row, place, family, later))
                })
                .collect();
            for one in running {
                late.extend(one.join().unwrap());
            }
        });
    }
    late.sort();
    assert!(late[late.len() * 3 / 4] <= SOON, "too late: {late:?}");
}

pub const HELD_FOR_A_WHILE: &[Row] = &[Row {
    actions: &["hold_add_addr", "restore_add_addr"],
    sender: Role::Server,
    announce: Announce::Signal,
    paths: 2,
    places: &[EGRESS, INGRESS, XDP, ROUTER_EGRESS],
}];

#[test]
fn announcements_held_for_a_while() {
    held_everywhere(HELD_FOR_A_WHILE, false);
}

pub const HELD_UNTIL_TOLD: &[Row] = &[
    Row {
        actions: &["hold_add_addr", "restore_add_addr"],
        sender: Role::Server,
        announce: Announce::Signal,
        paths: 2,
        places: &[EGRESS, INGRESS, XDP],
    },
    Row {
        actions: &["hold_add_addr", "restore_add_addr"],
        sender: Role::Server,
        announce: Announce::Signal,
        paths: 3,
        places: &[ROUTER_XDP],
    },
];

#[test]
fn announcements_held_until_told() {
    held_everywhere(HELD_UNTIL_TOLD, true);
}
