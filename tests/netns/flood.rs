// SPDX-License-Identifier: MIT OR Apache-2.0
//! A million malformed frames, as fast as they can be sent, into a chain of every action that
//! edits: each is counted, the kernel stays silent, and TCP works afterwards.

use policy_chain::hook::Hook;
use policy_chain::testbed::Role;
use serde_json::{Value, json};

use crate::common::klog::KernelLog;
use crate::common::malformed::Malformed;
use crate::common::sender::{BATCH, Sender};
use crate::common::traffic::transfer_both;
use crate::common::{Environment, eventually};

/// Those that the chain drops.
const FRAMES: u64 = 1_000_000;
/// Those that go on to the router's stack, which answers, forwards, complains.
const PASSING: u64 = 100_000;
const LENGTH: usize = 1 << 20;

/// Where the flood goes, and from where.
struct Target {
    hook: Hook,
    mode: &'static str,
    device: &'static str,
    sender: (Role, &'static str),
}

/// Every action that edits any packet of TCP, and those that remember.
fn actions(hook: Hook) -> Value {
    let mut actions = vec![
        json!({ "action": "record" }),
        json!({ "action": "report" }),
        json!({ "action": "strip_option", "kind": "timestamps" }),
        // Not "auto", which drops some.
        json!({
            "action": "strip_option", "kind": "mptcp", "subtype": "add_addr", "mode": "nop",
        }),
        json!({ "action": "set_mss", "bytes": 1000 }),
        json!({ "action": "insert_option", "kind": 253, "data": "c0ffee01" }),
        json!({ "action": "set_window", "bytes": 100_000 }),
        json!({ "action": "set_window", "raw": true, "bytes": 60 }),
    ];
    if hook == Hook::Xdp {
        actions.push(json!({ "action": "strip_option", "kind": "sack", "mode": "remove" }));
        actions.push(json!({ "action": "strip_option", "kind": 253, "mode": "remove" }));
    }
    actions.push(json!({ "action": "count" }));
    actions.into()
}

fn chain(target: &Target, name: &str, then: &str) -> Value {
    json!({
        "version": 1,
        "chains": [{
            "name": name,
            "attach": [{
                "device": target.device,
                "hook": target.hook.name(),
                "mode": target.mode,
            }],
            "actions": actions(target.hook),
            "then": then,
        }],
    })
}

/// Whether a frame gets as far as the hook. What has a VLAN's type and no room for a tag and the
/// type behind it is dropped by the kernel before TC ingress.
fn arrives(hook: Hook, frame: &[u8]) -> bool {
    let tagged = matches!(frame[12..14], [0x81, 0] | [0x88, 0xa8]);
    hook != Hook::TcIngress || !tagged || frame.len() >= 20
}

/// Sends frames; how many of them reach the hook.
fn send(environment: &Environment, target: &Target, malformed: &mut Malformed, count: u64) -> u64 {
    let (role, device) = target.sender;
    let sender = Sender::open(environment.namespace(role), device);
    let mut batch = vec![Vec::new(); BATCH];
    let mut arriving = 0;
    for _ in 0..count / BATCH as u64 {
        for frame in &mut batch {
            malformed.next(frame);
            arriving += u64::from(arrives(target.hook, frame));
        }
        sender.send(&batch);
    }
    arriving
}

/// That the entry counted `count` frames, and that every action saw each of them, and either did
/// its work or said why not.
fn check_counters(environment: &Environment, name: &str, count: u64) {
    let shown = eventually("every frame is counted", || {
        let shown = environment.json(Role::Router, &["show", name, "--json"]);
        (shown["nodes"][0]["entry"]["seen"].as_u64() >= Some(count)).then_some(shown)
    });
    let place = &shown["nodes"][0];
    assert_eq!(place["entry"]["seen"], count, "{shown:#}");
    assert_eq!(place["entry"]["reasons"], json!({}), "{shown:#}");
    for node in place["nodes"].as_array().unwrap() {
        assert_eq!(node["seen"], count, "{node}");
        assert_eq!(node["packets"], count, "{node}");
        let reasons = node["reasons"].as_object().unwrap();
        let sum: u64 = reasons.values().map(|it| it.as_u64().unwrap()).sum();
        assert!(sum < count, "did nothing: {node}");
        // `helper_failed` may be: packet sockets leave no room behind some frames to grow into.
        for broken in ["half_done", "tail_call_missed"] {
            assert!(!reasons.contains_key(broken), "{node}");
        }
    }
}

fn flood(target: Target) {
    let environment = Environment::routed();
    let mut log = KernelLog::from_now();
    let router = environment.testbed.path(1).unwrap().router.clone();
    let router = router.unwrap();
    let mac = match target.hook.is_ingress() {
        true => router.client.mac,
        false => environment.testbed.path(1).unwrap().server.mac,
    };
    let mut malformed = Malformed::new(0x6d61_6c66, mac);

    environment.apply(Role::Router, &chain(&target, "flood", "drop"));
    let arriving = send(&environment, &target, &mut malformed, FRAMES);
    check_counters(&environment, "flood", arriving);
    log.assert_clean();

    let file = environment.file("passing.json", &chain(&target, "passing", "pass"));
    environment.ok(Role::Router, &["apply", &file, "--prune"]);
    let arriving = send(&environment, &target, &mut malformed, PASSING);
    transfer_both(&environment, LENGTH);
    assert!(environment.packets(Role::Router, "passing") > arriving);
    log.assert_clean();
}

#[test]
fn malformed_frames_on_native_xdp() {
    flood(Target {
        hook: Hook::Xdp,
        mode: "native",
        device: "client1",
        sender: (Role::Client, "path1"),
    });
}

#[test]
fn malformed_frames_on_generic_xdp() {
    flood(Target {
        hook: Hook::Xdp,
        mode: "generic",
        device: "client1",
        sender: (Role::Client, "path1"),
    });
}

#[test]
fn malformed_frames_on_tc_ingress() {
    flood(Target {
        hook: Hook::TcIngress,
        mode: "auto",
        device: "client1",
        sender: (Role::Client, "path1"),
    });
}

#[test]
fn malformed_frames_on_tc_egress() {
    flood(Target {
        hook: Hook::TcEgress,
        mode: "auto",
        device: "server1",
        sender: (Role::Router, "server1"),
    });
}
