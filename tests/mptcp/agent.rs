// SPDX-License-Identifier: MIT OR Apache-2.0
//! What waits for the agent outlives it.

use std::thread;
use std::time::{Duration, Instant};

use policy_chain::testbed::{Announce, Role};
use serde_json::json;

use crate::common::agent::Agent;
use crate::common::mptcp::MptcpConnection;
use crate::common::traffic::server_addresses;
use crate::common::{Environment, eventually};

/// When the kernel has announced an address for the last time.
const GIVEN_UP: Duration = Duration::from_millis(1800);
/// How long it is held: until then, the first agent is long dead.
const HELD: Duration = Duration::from_secs(8);
/// From when it is given until the subflow is there; other work on this machine counted in.
const SOON: Duration = Duration::from_secs(2);

/// An address is held while its agent is killed; the next one gives it in time.
#[test]
fn a_held_address_outlives_the_agent() {
    let environment = Environment::mptcp(2, Announce::Signal);
    let chain = json!({
        "version": 1,
        "chains": [{
            "name": "later",
            "attach": [{ "device": "path1", "hook": "tc-ingress" }],
            "actions": [
                { "action": "hold_add_addr" },
                { "action": "restore_add_addr", "after": "8s" },
            ],
        }],
    });
    environment.apply(Role::Client, &chain);
    let first = Agent::start(&environment, Role::Client, "first");
    let opened = Instant::now();
    let connection = MptcpConnection::open(&environment, server_addresses(&environment)[0], 0);
    connection.exchange(3).unwrap();
    let announced = Instant::now();
    thread::sleep(GIVEN_UP.saturating_sub(opened.elapsed()));
    first.kill();
    // The chain goes on, and so does the connection.
    let before = environment.packets(Role::Client, "later");
    connection.exchange(3).unwrap();
    assert!(environment.packets(Role::Client, "later") > before);
    connection.wait_subflows(&environment, Role::Client, 1);
    assert_eq!(environment.counter(Role::Client, "MPTcpExt", "AddAddr"), 0);
    assert!(opened.elapsed() < HELD, "{:?}", opened.elapsed());
    let _second = Agent::start(&environment, Role::Client, "second");
    let due = (announced + HELD).max(Instant::now());
    eventually("it joins", || {
        let late = due.elapsed();
        let joined = connection.subflows(&environment, Role::Client).len() == 2;
        assert!(joined || late < SOON, "{late:?} too late");
        joined.then_some(())
    });
    assert!(opened.elapsed() >= HELD, "{:?}", opened.elapsed());
    connection.exchange(3).unwrap();
}
