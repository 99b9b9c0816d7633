// SPDX-License-Identifier: MIT OR Apache-2.0
//! Addresses kept back, given later, made up, and taken away.

use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use policy_chain::testbed::{Announce, Options, Role};
use serde_json::{Value, json};

use super::*;
use crate::common::agent::Agent;
use crate::common::mptcp::{Differs, MptcpConnection, Subflow, mptcp_options};
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

/// The client hears of no address, and keeps to MPTCP.
#[test]
fn announcements_filtered() {
    let options = mptcp_options(2, Announce::Signal);
    let places = [EGRESS, INGRESS, XDP, ROUTER_XDP];
    everywhere(&options, &places, Role::Server, filtered);
    let options = mptcp_options(3, Announce::Signal);
    everywhere(&options, &[EGRESS], Role::Server, filtered);
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
    // Where only the other side sends, there is room.
    joined.driven(count, || connection.transfer(MEGABYTE / 4).map(drop))?;
    connection.wait_subflows(scene.environment, Role::Client, addresses.len() + 1);
    eventually("all subflows carry data", || {
        connection.fetch(MEGABYTE).err().map(Err).or_else(|| {
            let subflows = connection.subflows(scene.environment, Role::Client);
            let all = subflows.iter().all(|it| it.bytes_received > 0);
            all.then_some(Ok(()))
        })
    })?;
    goes_on(&connection)?;
    heard.is(count);
    tried.is(count);
    joined.is(count);
    Ok(())
}

/// The client joins addresses that the server never announced.
#[test]
fn announcements_made_up() {
    let options = mptcp_options(2, Announce::Signal);
    let places = [EGRESS, INGRESS, XDP, ROUTER_EGRESS];
    everywhere(&options, &places, Role::Server, made_up);
    let options = mptcp_options(3, Announce::Signal);
    everywhere(&options, &[XDP], Role::Server, made_up);
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

/// The receiver ends the subflow of an address that is said to be lost.
#[test]
fn addresses_taken_away() {
    let options = mptcp_options(2, Announce::Subflow);
    let places = [EGRESS, INGRESS, XDP, ROUTER_INGRESS];
    everywhere(&options, &places, Role::Client, taken_away);
    let options = mptcp_options(3, Announce::Subflow);
    everywhere(&options, &[EGRESS], Role::Client, taken_away);
    let options = mptcp_options(2, Announce::Signal);
    everywhere(&options, &[XDP], Role::Server, taken_away);
}

/// How long addresses are held.
const HELD: Duration = Duration::from_secs(5);
/// When they are back at the latest after that, most of them: other work on this machine delays some.
const SOON: Duration = Duration::from_secs(1);

fn hold() -> Value {
    json!({ "action": "hold_add_addr" })
}

fn has_joined(connection: &MptcpConnection) -> bool {
    connection.info(Role::Client).unwrap().subflows > 0
}

/// Waits until the connections have joined, with packets on those that are `busy`. When each did, if
/// it has within [`DEADLINE`].
fn wait_joined(connections: &[(MptcpConnection, bool)]) -> Vec<Option<Instant>> {
    let limit = Instant::now() + DEADLINE;
    let mut joined = vec![None; connections.len()];
    while joined.contains(&None) && Instant::now() < limit {
        for ((connection, busy), joined) in connections.iter().zip(&mut joined) {
            if joined.is_none() && has_joined(connection) {
                *joined = Some(Instant::now());
            }
            if *busy {
                // A wrong byte is not what this is about.
                let _ = connection.exchange(1);
                let _ = connection.transfer(20_000);
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    joined
}

/// A busy connection and one that is idle, woken by the agent, hear of the address after its time:
/// how long after.
fn held(scene: &Scene, later: bool) -> Vec<Duration> {
    let environment = scene.environment;
    silence(scene);
    let address = scene.address(2).to_string();
    let endpoint = [
        "mptcp", "endpoint", "add", &address, "dev", "path2", "signal",
    ];
    environment.run(Role::Server, "ip", &endpoint);
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
    let connections = [true, false].map(|busy| {
        let connection = MptcpConnection::open(environment, scene.server, 0);
        connection.exchange(3).unwrap();
        (connection, busy)
    });
    let all_open = Instant::now();
    let (earliest, latest) = if later {
        // Until the kernel gives up.
        eventually("the last announcement", || {
            (announced.grown() >= 4 * 2).then_some(())
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
    let joins = wait_joined(&connections);
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
    heard.becomes(2);
    echoed.becomes(2);
    joined.becomes(2);
    for (connection, _) in &connections {
        // Its announcement came by an acknowledgement of the agent: nothing is amiss after that.
        goes_on(connection).unwrap_or_else(|differs| eprintln!("{differs}"));
    }
    agent.stop(nix::sys::signal::Signal::SIGTERM);
    for role in [Role::Client, Role::Server] {
        assert_eq!(environment.checksum_errors(role), 0, "{role}");
    }
    let late = joins.iter().map(|at| at.saturating_duration_since(latest));
    late.collect()
}

fn held_at(place: Place, family: usize, later: bool) -> Vec<Duration> {
    let environment = Environment::with(&Options {
        router: place.router,
        ..mptcp_options(2, Announce::Signal)
    });
    let scene = Scene {
        environment: &environment,
        announce: Announce::Signal,
        place,
        sender: Role::Server,
        server: server_addresses(&environment)[family],
    };
    held(&scene, later)
}

/// Most of the time is waiting, so some wait side by side: as many as do not make each other late.
fn held_everywhere(places: &[Place], later: bool) {
    const TOGETHER: usize = 3;
    let all: Vec<(Place, usize)> = places
        .iter()
        .flat_map(|place| [(*place, 0), (*place, 1)])
        .collect();
    let mut late = Vec::new();
    for some in all.chunks(TOGETHER) {
        thread::scope(|scope| {
            let start = |(place, family): &(Place, usize)| {
                let (place, family) = (*place, *family);
                scope.spawn(move || held_at(place, family, later))
            };
            let running: Vec<_> = some.iter().map(start).collect();
            for one in running {
                late.extend(one.join().unwrap());
            }
        });
    }
    late.sort();
    assert!(late[late.len() * 3 / 4] <= SOON, "too late: {late:?}");
}

#[test]
fn announcements_held_for_a_while() {
    held_everywhere(&[EGRESS, INGRESS, XDP, ROUTER_EGRESS], false);
}

#[test]
fn announcements_held_until_told() {
    held_everywhere(&[EGRESS, INGRESS, XDP, ROUTER_XDP], true);
}
