// SPDX-License-Identifier: MIT OR Apache-2.0
//! What actions do to segments, as the receiver sees them: at every hook and mode, IPv4 and IPv6,
//! behind a router that completes checksums.

use policy_chain::testbed::Role;
use serde_json::{Value, json};

use crate::common::capture::{Capture, SACK_PERMITTED, Segment, TIMESTAMPS};
use crate::common::traffic::{
    Connection, PORT, client_addresses, server_addresses, tcp_info, transfer_both,
};
use crate::common::{Environment, eventually};

const MEGABYTES: usize = 2 << 20;

/// A hook of the router that every packet to the server passes.
struct Place {
    device: &'static str,
    hook: &'static str,
    mode: &'static str,
}

const fn place(device: &'static str, hook: &'static str, mode: &'static str) -> Place {
    Place { device, hook, mode }
}

/// Chain `t` at a place, for packets from the client to the server's [`PORT`] with these flags.
fn chain(environment: &Environment, place: &Place, flags: &Value, actions: Value) -> Value {
    let servers = server_addresses(environment);
    let clients = client_addresses(environment);
    let (near, far) = match place.hook {
        "tc-egress" => ("remote", "local"),
        _ => ("local", "remote"),
    };
    let mut selectors = Vec::new();
    for (server, client) in servers.iter().zip(&clients) {
        let mut port = json!({ "selector": "service" });
        port[format!("{near}_port")] = PORT.into();
        let pair = json!({ "selector": "ip_pair", "op": "or", near: server, far: client });
        selectors.extend([pair, port]);
        if flags.is_object() {
            selectors.push(flags.clone());
        }
    }
    json!({
        "version": 1,
        "chains": [{
            "name": "t",
            "attach": [{ "device": place.device, "hook": place.hook, "mode": place.mode }],
            "selectors": selectors,
            "actions": actions,
        }],
    })
}

/// What a server received that a chain took.
struct Taken {
    segments: Vec<Segment>,
    /// Packets that XDP left alone because their checksum could be complete or partial, as one in
    /// 65,536 can.
    unclear: u64,
}

/// Segments that the kernel makes of one packet, at most.
const SEGMENTS_AT_ONCE: usize = 64;

/// Runs connections past the actions at the place; what the server received on [`PORT`] that the
/// chain took.
fn segments_behind(place: &Place, flags: Value, actions: Value) -> Taken {
    let environment = Environment::routed();
    let file = chain(&environment, place, &flags, actions);
    environment.apply(Role::Router, &file);
    let taken = |segments: Vec<Segment>| -> Vec<Segment> {
        let fits = |segment: &Segment| flags.is_null() || !segment.is_syn();
        segments.into_iter().filter(fits).collect()
    };
    let mut capture = Capture::start(environment.namespace(Role::Server), "path1");
    for address in server_addresses(&environment) {
        Connection::open(&environment, address, PORT).exchange(20);
    }
    // So far every segment was a packet by itself.
    let count = eventually("as many packets counted as captured", || {
        let counted = environment.packets(Role::Router, "t");
        let captured = taken(capture.with_port(PORT)).len() as u64;
        (counted == captured).then_some(counted)
    });
    assert!(count >= 40, "{count}");
    transfer_both(&environment, MEGABYTES);
    let listed = environment.listed(Role::Router, "t");
    assert!(listed["packets"].as_u64() > Some(count), "{listed}");
    assert!(listed["bytes"].as_u64() > Some(2 * MEGABYTES as u64));
    assert_eq!(listed["attach"][0]["device"], place.device);
    assert_eq!(listed["attach"][0]["hook"], place.hook);
    assert_eq!(listed["attach"][0]["mode"], place.mode);
    for role in [Role::Client, Role::Server] {
        assert_eq!(environment.checksum_errors(role), 0, "{role}");
    }
    let segments = capture.with_port(PORT);
    for segment in &segments {
        assert!(segment.checksum_is_right, "{segment:?}");
    }
    assert_eq!(segments.iter().filter(|s| s.is_syn()).count(), 4);
    Taken {
        segments: taken(segments),
        unclear: environment.reason(Role::Router, "t", "checksum_unclear"),
    }
}

impl Taken {
    /// That a change is on every segment, but for those that could not be changed.
    #[track_caller]
    fn all_have(&self, change: impl Fn(&Segment) -> bool) {
        let mut without = self.segments.iter().filter(|segment| !change(segment));
        let most = self.unclear as usize * SEGMENTS_AT_ONCE;
        if let Some(segment) = without.nth(most) {
            panic!("{segment:?}, {} unclear", self.unclear);
        }
    }
}

/// The actions of the shipped demo, and the window it writes.
fn shipped_actions() -> (Value, u16) {
    let shipped = include_str!("../../chains/demo.json");
    let shipped: Value = serde_json::from_str(shipped).unwrap();
    let actions = shipped["chains"][0]["actions"].clone();
    assert_eq!(actions[0]["kind"], "timestamps");
    let window = actions[1]["bytes"].as_u64().unwrap();
    (actions, window.try_into().unwrap())
}

/// The shipped demo at a place: the window rewritten, the timestamps gone.
fn demo_at(place: Place) {
    let (actions, window) = shipped_actions();
    let taken = segments_behind(&place, Value::Null, actions);
    taken.all_have(|segment| segment.option(TIMESTAMPS).is_none());
    taken.all_have(|segment| (segment.window == window) != segment.is_syn());
}

#[test]
fn demo_by_xdp_native() {
    demo_at(place("client1", "xdp", "native"));
}

#[test]
fn demo_by_xdp_generic() {
    demo_at(place("client1", "xdp", "generic"));
}

#[test]
fn demo_by_tc_ingress_tcx() {
    demo_at(place("client1", "tc-ingress", "tcx"));
}

#[test]
fn demo_by_tc_ingress_clsact() {
    demo_at(place("client1", "tc-ingress", "clsact"));
}

#[test]
fn demo_by_tc_egress_tcx() {
    demo_at(place("server1", "tc-egress", "tcx"));
}

#[test]
fn demo_by_tc_egress_clsact() {
    demo_at(place("server1", "tc-egress", "clsact"));
}

/// The shipped file as it is, where the README applies it: the server's kernel then knows no
/// timestamps, and the window that was written.
#[test]
fn demo_as_shipped() {
    let environment = Environment::routed();
    let (_, window) = shipped_actions();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/chains/demo.json");
    environment.ok(Role::Router, &["apply", file]);
    let [address, _] = server_addresses(&environment);
    let mut connection = Connection::open(&environment, address, PORT);
    connection.exchange(10);
    let info = tcp_info(&connection.server);
    assert!(!info.timestamps);
    assert_eq!(info.send_window, u32::from(window) << info.send_scale);
    connection.transfer(MEGABYTES);
    assert!(environment.packets(Role::Router, "demo") > 20);
    let other = Connection::open(&environment, address, PORT + 1);
    assert!(tcp_info(&other.server).timestamps);
}

/// Changes on segments of established connections, which both ends take for ones with timestamps.
fn options_at(place: Place) {
    let established = json!({ "selector": "tcp_flags", "none": ["syn"] });
    let actions = json!([
        { "action": "strip_option", "kind": "timestamps" },
        { "action": "insert_option", "kind": 253, "data": "c0ffee01" },
    ]);
    let taken = segments_behind(&place, established, actions);
    taken.all_have(|segment| segment.option(TIMESTAMPS).is_none());
    // In the room of the timestamps.
    taken.all_have(|segment| segment.option(253) == Some(&[0xc0, 0xff, 0xee, 1]));
}

/// Changes of what a SYN negotiates, the header growing among them.
fn negotiation_at(place: Place) {
    let actions = json!([
        { "action": "set_mss", "bytes": 1000 },
        { "action": "strip_option", "kind": "sack_permitted" },
        { "action": "strip_option", "kind": "timestamps" },
        { "action": "insert_option", "kind": 253, "data": "c0ffee01" },
    ]);
    let taken = segments_behind(&place, Value::Null, actions);
    let on_syns = |change: fn(&Segment) -> bool| {
        taken.all_have(|segment| !segment.is_syn() || change(segment));
    };
    on_syns(|syn| syn.mss() == Some(1000));
    on_syns(|syn| syn.option(SACK_PERMITTED).is_none());
    on_syns(|syn| syn.option(253) == Some(&[0xc0, 0xff, 0xee, 1]));
    // What was not negotiated is not used.
    taken.all_have(|segment| segment.option(TIMESTAMPS).is_none());
}

#[test]
fn negotiation_by_xdp() {
    negotiation_at(place("client1", "xdp", "native"));
}

#[test]
fn negotiation_by_tc_ingress() {
    negotiation_at(place("client1", "tc-ingress", "tcx"));
}

#[test]
fn negotiation_by_tc_egress() {
    negotiation_at(place("server1", "tc-egress", "tcx"));
}

#[test]
fn options_by_xdp() {
    options_at(place("client1", "xdp", "native"));
}

#[test]
fn options_by_xdp_generic() {
    options_at(place("client1", "xdp", "generic"));
}

#[test]
fn options_by_tc_ingress() {
    options_at(place("client1", "tc-ingress", "tcx"));
}

#[test]
fn options_by_tc_egress() {
    options_at(place("server1", "tc-egress", "tcx"));
}

/// Without room, an option goes where there is no payload: the header grows.
#[test]
fn insertion_grows_pure_acks() {
    for place in [
        place("client1", "xdp", "native"),
        place("client1", "tc-ingress", "tcx"),
        place("server1", "tc-egress", "tcx"),
    ] {
        let actions = json!([{ "action": "insert_option", "kind": 253, "data": "c0ff" }]);
        let taken = segments_behind(&place, Value::Null, actions);
        let (grown, left): (Vec<_>, Vec<_>) =
            taken.segments.iter().partition(|s| s.option(253).is_some());
        assert!(grown.iter().any(|s| s.payload == 0 && !s.is_syn()));
        assert!(left.iter().any(|s| s.payload > 0));
    }
}
