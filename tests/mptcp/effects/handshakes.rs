// SPDX-License-Identifier: MIT OR Apache-2.0
//! MPTCP's options taken out of handshakes, and of data, which is refused.

use policy_chain::testbed::{Announce, Role};
use serde_json::{Value, json};

use super::*;
use crate::common::mptcp::{Differs, MptcpConnection, mptcp_options};
use crate::common::{Environment, says};

fn strip(subtype: &str) -> Value {
    json!({ "action": "strip_option", "kind": "mptcp", "subtype": subtype })
}

fn syn() -> Value {
    json!({ "selector": "tcp_flags", "all": ["syn"] })
}

/// The server takes the SYN for one of TCP, and the client goes along.
#[test]
fn without_mp_capable() {
    let options = mptcp_options(1, Announce::Subflow);
    let places = [EGRESS, INGRESS, XDP, GENERIC, ROUTER_EGRESS];
    everywhere(&options, &places, Role::Client, |scene| {
        scene.apply(json!([syn()]), json!([strip("mp_capable")]));
        let fallback = scene.counter(Role::Client, "MPCapableFallbackSYNACK");
        let offered = scene.counter(Role::Server, "MPCapableSYNRX");
        let connection = MptcpConnection::open(scene.environment, scene.server, 0);
        fallback.becomes(1);
        assert!(!connection.is_mptcp());
        assert!(connection.info(Role::Server).is_none());
        // Plain TCP has no excuse.
        connection.exchange(3).unwrap();
        connection.transfer(MEGABYTE).unwrap();
        connection.fetch(MEGABYTE).unwrap();
        offered.is(0);
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

/// The connection stays on the path it began on.
#[test]
fn joins_refused() {
    let options = mptcp_options(2, Announce::Subflow);
    let places = [EGRESS, INGRESS, XDP, GENERIC, ROUTER_INGRESS];
    everywhere(&options, &places, Role::Client, without_mp_join);
    let options = mptcp_options(3, Announce::Subflow);
    everywhere(&options, &[EGRESS], Role::Client, without_mp_join);
}

/// Options that carry data stay, so that the connection lives.
#[test]
fn data_keeps_its_options() {
    let options = mptcp_options(2, Announce::Subflow);
    let places = [EGRESS, INGRESS, XDP, GENERIC];
    everywhere(&options, &places, Role::Client, |scene| {
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
