// SPDX-License-Identifier: MIT OR Apache-2.0
//! Subflows made backups and back, and how often an action is done.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use policy_chain::testbed::{Announce, Options, Role};
use serde_json::{Value, json};

use super::*;
use crate::common::agent::Agent;
use crate::common::eventually;
use crate::common::mptcp::{Differs, MptcpConnection, mptcp_options};

fn prio(backup: bool) -> Value {
    json!({ "action": "mp_prio", "backup": backup })
}

/// Bytes that the client has received on each subflow.
fn received(scene: &Scene, connection: &MptcpConnection) -> Vec<u64> {
    let subflows = connection.subflows(scene.environment, Role::Client);
    subflows.iter().map(|it| it.bytes_received).collect()
}

/// The share of the second path in what the client is sent next.
fn share(scene: &Scene, connection: &MptcpConnection) -> Result<f64, Differs> {
    let before = received(scene, connection);
    connection.fetch(6 * MEGABYTE)?;
    let after = received(scene, connection);
    let grown = after
        .iter()
        .zip(&before)
        .map(|(after, before)| after - before);
    let grown: Vec<u64> = grown.collect();
    Ok(grown[1] as f64 / grown.iter().sum::<u64>() as f64)
}

fn backup_and_back(scene: &Scene) -> Result<(), Differs> {
    let environment = scene.environment;
    let connection = MptcpConnection::joined(environment, scene.server);
    connection.wait_subflows(environment, Role::Server, 2);
    let asked = scene.counter(Role::Server, "MPPrioRx");
    let is_backup = |backup: bool| {
        eventually("the flag of the subflow", || {
            let subflows = connection.subflows(environment, Role::Server);
            (subflows[1].is_backup_by_peer() == backup).then_some(())
        });
    };
    let both = share(scene, &connection)?;
    assert!((0.2..0.8).contains(&both), "{both}");
    scene.apply_to_subflow(2, json!([prio(true)]));
    asked.driven(1, || connection.fetch(MEGABYTE / 4).map(drop))?;
    is_backup(true);
    connection.exchange(1)?;
    let backup = share(scene, &connection)?;
    assert!(backup < 0.05, "{backup}");
    asked.is(1);
    let agent = Agent::start(environment, scene.role(), "agent");
    scene.apply_to_subflow(2, json!([prio(false)]));
    asked.becomes(2);
    is_backup(false);
    let back = share(scene, &connection)?;
    assert!(back > 0.6 * both, "{back} of {both}");
    goes_on(&connection)?;
    asked.is(2);
    agent.stop(Signal::SIGTERM);
    Ok(())
}

/// A backup carries nothing. Being idle then, it takes an agent to have a packet that says it is
/// one no longer.
#[test]
fn backup_and_no_longer() {
    let options = Options {
        rate: vec![100],
        ..mptcp_options(2, Announce::Subflow)
    };
    let places = [EGRESS, INGRESS, XDP, ROUTER_EGRESS];
    everywhere(&options, &places, Role::Client, backup_and_back);
}

/// How often actions of one flow are done: by default of `mp_prio` once.
#[test]
fn so_many_times() {
    let options = mptcp_options(1, Announce::Subflow);
    for (cadence, count) in [(json!({}), 1), (json!({ "first": 3 }), 3)] {
        everywhere(&options, &[EGRESS, XDP], Role::Client, |scene| {
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

#[test]
fn once_in_a_while() {
    const EVERY: Duration = Duration::from_millis(200);
    let options = mptcp_options(1, Announce::Subflow);
    everywhere(&options, &[EGRESS, XDP], Role::Client, |scene| {
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

/// A connection gets over the loss of its first segments.
#[test]
fn first_ones_dropped() {
    let options = mptcp_options(1, Announce::Subflow);
    everywhere(&options, &[EGRESS, XDP], Role::Client, |scene| {
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
