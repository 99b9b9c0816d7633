// SPDX-License-Identifier: MIT OR Apache-2.0
//! MPTCP's options taken out of handshakes, and of data, which is refused.

use policy_chain::testbed::{Announce, Options, Role};
use serde_json::{Value, json};

use super::*;
use crate::common::mptcp::{Differs, MptcpConnection};
use crate::common::{Environment, says};

fn strip(subtype: &str) -> Value {
    json!({ "action": "strip_option", "kind": "mptcp", "subtype": subtype })
}

fn syn() -> Value {
    json!({ "selector": "tcp_flags", "all": ["syn"] })
}

pub const MP_CAPABLE: &[Row] = &[
    Row {
        actions: &["strip_option"],
        sender: Role::Client,
        announce: Announce::Subflow,
        paths: 2,
        places: &[EGRESS, INGRESS, XDP, GENERIC, ROUTER_EGRESS],
    },
    Row {
        actions: &["strip_option"],
        sender: Role::Client,
        announce: Announce::Subflow,
        paths: 3,
        places: &[ROUTER_XDP],
    },
];

/// The server takes the SYN for one of TCP, and the client goes along.
#[test]
fn without_mp_capable() {
    everywhere(MP_CAPABLE, &Options::default(), |scene| {
        scene.apply(json!([syn()]), json!([strip("mp_capable")]));
        let fallback = scene.counter(Role::Client, "MPCapableFallbackSYNACK");
        let offered = scene.counter(Role::Server, "MPCapableSYNRX");
        let tried = scene.counter(Role::Client, "MPJoinSynTx");
        let connection = MptcpConnection::open(scene.environment, scene.server, 0);
        fallback.becomes(1);
        assert!(!connection.is_mptcp());
        assert!(connection.info(Role::Server).is_none());
        // Plain TCP has no excuse.
        connection.exchange(3).unwrap();
        connection.transfer(MEGABYTE).unwrap();
        connection.fetch(MEGABYTE).unwrap();
        offered.is(0);
        tried.is(0);
        Ok(())
    });
}

fn without_mp_join(scene: &Scene) -> Result<(), Differs> {
    let joins = u64::from(scene.paths()) - 1;
    scene.apply(json!([syn()]), json!([strip("mp_join")]));
    let refused = scene.counter(Role::Client, "MPRstTx");
    let tried = scene.counter(Role::Client, "MPJoinSynTx");
    let seen = scene.counter(Role::Server, "MPJoinSynRx");
    let connection = MptcpConnection::open(scene.environment, scene.server, 0);
    connection.exchange(1)?;
    refused.becomes(joins);
    goes_on(&connection)?;
    tried.is(joins);
    seen.is(0);
    for role in [Role::Client, Role::Server] {
        assert_eq!(connection.subflows(scene.environment, role).len(), 1);
    }
    Ok(())
}

pub const MP_JOIN: &[Row] = &[
    Row {
        actions: &["strip_option"],
        sender: Role::Client,
        announce: Announce::Subflow,
        paths: 2,
        places: &[
            EGRESS,
            INGRESS,
            XDP,
            GENERIC,
            ROUTER_INGRESS,
            ROUTER_GENERIC,
        ],
    },
    Row {
        actions: &["strip_option"],
        sender: Role::Client,
        announce: Announce::Subflow,
        paths: 3,
        places: &[EGRESS, ROUTER_XDP],
    },
];

/// The connection stays on the path it began on.
#[test]
fn joins_refused() {
    everywhere(MP_JOIN, &Options::default(), without_mp_join);
}

pub const DATA: &[Row] = &[Row {
    actions: &["strip_option"],
    sender: Role::Client,
    announce: Announce::Subflow,
    paths: 2,
    places: &[EGRESS, INGRESS, XDP, GENERIC],
}];

/// Options that carry data stay, so that the connection lives.
#[test]
fn data_keeps_its_options() {
    everywhere(DATA, &Options::default(), |scene| {
        let connection = MptcpConnection::joined(scene.environment, scene.server);
        scene.apply(
            json!([]),
            json!([{ "action": "strip_option", "kind": "mptcp" }]),
        );
        goes_on(&connection)?;
        connection.wait_subflows(scene.environment, Role::Server, 2);
        let unsafe_ = scene.environment.reason(scene.role(), "t", "unsafe");
        assert!(unsafe_ > 20, "{unsafe_}");
        Ok(())
    });
}

#[test]
fn data_options_are_not_stripped_by_mistake() {
    let environment = Environment::direct();
    let file = |action: Value| {
        let attach = json!([{ "device": "path1", "hook": "tc-egress" }]);
        let chain = json!({ "name": "t", "attach": attach, "actions": [action] });
        environment.file("t.json", &json!({ "version": 1, "chains": [chain] }))
    };
    let mut action = strip("dss");
    let message = environment.fails(Role::Client, 2, &["check", &file(action.clone())]);
    says(&message, &["$.chains[0].actions[0]", "\"dss\"", "unsafe"]);
    action["unsafe"] = true.into();
    environment.ok(Role::Client, &["check", &file(action)]);
    let mut action = json!({ "action": "remove_addr", "id": 0 });
    let message = environment.fails(Role::Client, 2, &["check", &file(action.clone())]);
    says(&message, &["$.chains[0].actions[0]", "unsafe"]);
    action["unsafe"] = true.into();
    environment.ok(Role::Client, &["check", &file(action)]);
}
