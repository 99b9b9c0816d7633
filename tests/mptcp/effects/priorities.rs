// SPDX-License-Identifier: MIT OR Apache-2.0
//! Subflows made backups and back, and how often an action is done.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use policy_chain::testbed::{Announce, Options, Role};
use serde_json::{Value, json};

use super::*;
use crate::common::agent::Agent;
use crate::common::eventually;
use crate::common::mptcp::{Differs, MptcpConnection};

fn prio(backup: bool) -> Value {
    json!({ "action": "mp_prio", "backup": backup })
}

/// Bytes that the client has received on each subflow.
fn received(scene: &Scene, connection: &MptcpConnection) -> Vec<u64> {
    let subflows = connection.subflows(scene.environment, Role::Client);
    subflows.iter().map(|it| it.bytes_received).collect()
}

/// The shares of the paths in what the client is sent next.
fn shares(scene: &Scene, connection: &MptcpConnection) -> Result<Vec<f64>, Differs> {
    let before = received(scene, connection);
    connection.fetch(6 * MEGABYTE)?;
    let after = received(scene, connection);
    let grown = after
        .iter()
        .zip(&before)
        .map(|(after, before)| after - before);
    let grown: Vec<u64> = grown.collect();
    let all: u64 = grown.iter().sum();
    Ok(grown.iter().map(|it| *it as f64 / all as f64).collect())
}

/// Whether that is what one of so many equal paths carries.
fn is_fair(share: f64, paths: usize) -> bool {
    let fair = 1.0 / paths as f64;
    (0.6 * fair..1.4 * fair).contains(&share)
}

fn backup_and_back(scene: &Scene) -> Result<(), Differs> {
    let environment = scene.environment;
    let paths = usize::from(scene.paths());
    let connection = MptcpConnection::joined(environment, scene.server);
    connection.wait_subflows(environment, Role::Server, paths);
    let asked = scene.counter(Role::Server, "MPPrioRx");
    let is_backup = |backup: bool| {
        eventually("the flag of the subflow", || {
            let subflows = connection.subflows(environment, Role::Server);
            let flags = subflows.iter().map(|it| it.is_backup_by_peer());
            let expected = (1..=paths).map(|path| backup && path == 2);
            flags.eq(expected).then_some(())
        });
    };
    let all_fair = |shares: &Vec<f64>| shares.iter().all(|it| is_fair(*it, paths));
    let measure = || shares(scene, &connection);
    let before = of_five(measure, all_fair)?;
    assert!(all_fair(&before), "{before:?}");
    scene.apply_to_subflow(2, json!([prio(true)]));
    asked.driven(1, || connection.fetch(MEGABYTE / 4).map(drop))?;
    is_backup(true);
    connection.exchange(1)?;
    // All the others carry what it did.
    let others_fair = |shares: &Vec<f64>| {
        let mut others = shares.iter().zip(1..).filter(|(_, path)| *path != 2);
        others.all(|(share, _)| paths == 2 || is_fair(*share, paths - 1))
    };
    let backup = of_five(
        || {
            let backup = measure()?;
            assert!(backup[1] < 0.05, "{backup:?}");
            Ok(backup)
        },
        others_fair,
    )?;
    assert!(others_fair(&backup), "{backup:?}");
    asked.is(1);
    let agent = Agent::start(environment, scene.role(), "agent");
    scene.apply_to_subflow(2, json!([prio(false)]));
    asked.becomes(2);
    is_backup(false);
    let back = of_five(measure, all_fair)?;
    eprintln!("{before:.2?}, backup {backup:.2?}, back {back:.2?}");
    assert!(all_fair(&back), "{back:?}");
    goes_on(&connection)?;
    asked.is(2);
    agent.stop(Signal::SIGTERM);
    Ok(())
}

pub const BACKUP: &[Row] = &[
    Row {
        actions: &["mp_prio"],
        sender: Role::Client,
        announce: Announce::Subflow,
        paths: 2,
        places: &[EGRESS, INGRESS, XDP, ROUTER_EGRESS],
    },
    Row {
        actions: &["mp_prio"],
        sender: Role::Client,
        announce: Announce::Subflow,
        paths: 3,
        places: &[ROUTER_XDP],
    },
];

/// A backup carries nothing, and as much as any other path once it is none. Being idle then, it
/// takes an agent to have a packet that says it is one no longer.
#[test]
fn backup_and_no_longer() {
    let shape = Options {
        rate: vec![100],
        ..Options::default()
    };
    everywhere(BACKUP, &shape, backup_and_back);
}

pub const SO_MANY_TIMES: &[Row] = &[Row {
    actions: &["mp_prio"],
    sender: Role::Client,
    announce: Announce::Subflow,
    paths: 1,
    places: &[EGRESS, XDP, ROUTER_GENERIC],
}];

/// How often actions of one flow are done: by default of `mp_prio` once.
#[test]
fn so_many_times() {
    for (cadence, count) in [(json!({}), 1), (json!({ "first": 3 }), 3)] {
        everywhere(SO_MANY_TIMES, &Options::default(), |scene| {
            let mut action = prio(true);
            action
                .as_object_mut()
                .unwrap()
                .extend(cadence.as_object().unwrap().clone());
            scene.apply(json!([]), json!([action]));
            let asked = scene.counter(Role::Server, "MPPrioRx");
            let connection = MptcpConnection::open(scene.environment, scene.server, 0);
            connection.fetch(4 * MEGABYTE)?;
            // Of ACKs that say the same, the receiver may make one before it reads their options.
            asked.driven(1, || connection.fetch(MEGABYTE).map(drop))?;
            goes_on(&connection)?;
            assert!((1..=count).contains(&asked.grown()), "{}", asked.grown());
            assert_eq!(scene.done(), count);
            let later = scene.environment.reason(scene.role(), "t", "not_due");
            assert!(later > 20, "{later}");
            Ok(())
        });
    }
}

pub const ONCE_IN_A_WHILE: &[Row] = &[Row {
    actions: &["mp_prio"],
    sender: Role::Client,
    announce: Announce::Subflow,
    paths: 1,
    places: &[EGRESS, XDP],
}];

#[test]
fn once_in_a_while() {
    const EVERY: Duration = Duration::from_millis(200);
    everywhere(ONCE_IN_A_WHILE, &Options::default(), |scene| {
        let mut action = prio(true);
        action["every"] = "200ms".into();
        scene.apply(json!([]), json!([action]));
        let asked = scene.counter(Role::Server, "MPPrioRx");
        let start = Instant::now();
        let connection = MptcpConnection::open(scene.environment, scene.server, 0);
        asked.driven(4, || connection.fetch(MEGABYTE / 4).map(drop))?;
        assert!(start.elapsed() >= 3 * EVERY, "{:?}", start.elapsed());
        let done = scene.done();
        let most = start.elapsed().as_millis() / EVERY.as_millis() + 1;
        assert!(u128::from(done) <= most, "{done} of {most}");
        asked.becomes(done);
        Ok(())
    });
}

pub const FIRST_ONES: &[Row] = &[Row {
    actions: &["drop"],
    sender: Role::Client,
    announce: Announce::Subflow,
    paths: 1,
    places: &[EGRESS, XDP],
}];

/// A connection gets over the loss of its first segments.
#[test]
fn first_ones_dropped() {
    everywhere(FIRST_ONES, &Options::default(), |scene| {
        let data = json!({ "selector": "tcp_flags", "all": ["psh"] });
        scene.apply(json!([data]), json!([{ "action": "drop", "first": 3 }]));
        let sent = |scene: &Scene| {
            scene
                .environment
                .counter(Role::Client, "Tcp", "RetransSegs")
        };
        let before = sent(scene);
        let connection = MptcpConnection::open(scene.environment, scene.server, 0);
        goes_on(&connection)?;
        assert_eq!(scene.done(), 3);
        // What is dropped where it is sent was not sent.
        let again = sent(scene) - before;
        let here = scene.role() == scene.sender;
        assert!(here || again >= 3, "{again}");
        Ok(())
    });
}
