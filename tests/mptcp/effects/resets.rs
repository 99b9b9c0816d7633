// SPDX-License-Identifier: MIT OR Apache-2.0
//! Subflows ended by a reset.

use std::fs;

use policy_chain::testbed::{Announce, Options, Role};
use serde_json::json;

use super::*;
use crate::common::eventually;
use crate::common::mptcp::{Differs, MptcpConnection};
use crate::common::spawned::Spawned;

/// `ip mptcp monitor` on a host, ended when dropped.
struct Monitor(Spawned);

impl Monitor {
    fn start(scene: &Scene, role: Role) -> Monitor {
        let said = scene.environment.files.path().join("monitor");
        let mut command = scene.environment.namespace(role).command("ip");
        let monitor = Spawned::printing(command.args(["mptcp", "monitor"]), said);
        let group = format!("/proc/{}/net/netlink", monitor.id());
        let pid = monitor.id().to_string();
        // It listens once its socket has a group.
        eventually("the monitor listens", || {
            let table = fs::read_to_string(&group).unwrap();
            let mut rows = table.lines().map(str::split_whitespace);
            rows.any(|mut row| {
                row.nth(1) == Some("16")
                    && row.next() == Some(&pid)
                    && row.next() != Some("00000000")
            })
            .then_some(())
        });
        Monitor(monitor)
    }

    fn said(&self) -> String {
        self.0.said()
    }
}

fn reset(scene: &Scene, path: u8) -> Result<(), Differs> {
    let receiver = scene.receiver();
    let connection = MptcpConnection::joined(scene.environment, scene.server);
    let paths = usize::from(scene.paths());
    connection.wait_subflows(scene.environment, Role::Server, paths);
    let monitor = Monitor::start(scene, receiver);
    let seen = scene.counter(receiver, "MPRstRx");
    let action = json!({
        "action": "reset_subflow", "reason": "unacceptable_performance", "once": true,
    });
    scene.apply_to_subflow(path, json!([action]));
    seen.driven(1, || both_ways(&connection))?;
    for role in [Role::Client, Role::Server] {
        let left = connection.wait_subflows(scene.environment, role, paths - 1);
        assert!(left.iter().all(|it| it.path() != path), "{left:#?}");
    }
    goes_on(&connection)?;
    seen.is(1);
    let said = eventually("the monitor tells of it", || {
        Some(monitor.said()).filter(|said| said.contains("SF_CLOSED"))
    });
    assert!(said.contains("reset_reason=5"), "{said}");
    Ok(())
}

pub const SECOND: &[Row] = &[
    Row {
        actions: &["reset_subflow"],
        sender: Role::Client,
        announce: Announce::Subflow,
        paths: 2,
        places: &[EGRESS, INGRESS, XDP, ROUTER_INGRESS],
    },
    Row {
        actions: &["reset_subflow"],
        sender: Role::Server,
        announce: Announce::Signal,
        paths: 3,
        places: &[EGRESS, ROUTER_XDP],
    },
];

#[test]
fn second_subflow_reset() {
    everywhere(SECOND, &Options::default(), |scene| reset(scene, 2));
}

pub const FIRST: &[Row] = &[
    Row {
        actions: &["reset_subflow"],
        sender: Role::Server,
        announce: Announce::Signal,
        paths: 2,
        places: &[EGRESS, INGRESS, XDP, ROUTER_EGRESS],
    },
    Row {
        actions: &["reset_subflow"],
        sender: Role::Client,
        announce: Announce::Subflow,
        paths: 2,
        places: &[XDP],
    },
];

#[test]
fn first_subflow_reset() {
    everywhere(FIRST, &Options::default(), |scene| reset(scene, 1));
}
