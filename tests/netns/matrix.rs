// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every action of the catalogue under real TCP, on a router whose egress has checksum offload off,
//! so that what leaves it wrong is refused by its receiver: every hook, segmentation and receive
//! offloads on and off, MTU 1500 and 9000, IPv4 and IPv6, both directions.
//!
//! A row that is wrong shows as content that differs, a counted checksum error, a packet that did
//! not fit the MTU, a transfer that crawls from one retransmission to the next, or an action that
//! left every packet alone.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use policy_chain::hook::Hook;
use policy_chain::policy::{Registry, policy_json};
use policy_chain::testbed::Role;
use serde_json::{Value, json};

use crate::common::Environment;
use crate::common::traffic::{Connection, PORT, server_addresses, tcp_info};

const LENGTH: usize = 1 << 20;
/// A service that nobody reaches.
const CUT_OFF: u16 = PORT + 1;
/// Less than receive buffers hold with any scale, so that a sender that heeds it overruns none.
const WINDOW_FIELD: u16 = 60;
/// The same, of the window itself.
const WINDOW: u32 = 40_000;
const MSS: u16 = 1000;

/// Where the chains of a test run, always on both of the router's devices of path 1.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    hook: Hook,
    mode: &'static str,
}

impl Place {
    fn is_generic(self) -> bool {
        self.mode == "generic"
    }

    fn attach(self, devices: &[&str]) -> Value {
        let item =
            |device| json!({ "device": device, "hook": self.hook.name(), "mode": self.mode });
        devices.iter().map(item).collect()
    }
}

/// What the packets look like that a chain sees.
#[derive(Clone, Copy)]
struct Wire {
    mtu: u16,
    /// Super-packets with partial checksums, or else single segments with complete ones.
    offloads: bool,
}

const WIRES: [Wire; 4] = [
    Wire {
        mtu: 1500,
        offloads: true,
    },
    Wire {
        mtu: 1500,
        offloads: false,
    },
    Wire {
        mtu: 9000,
        offloads: true,
    },
    Wire {
        mtu: 9000,
        offloads: false,
    },
];

/// Chains that are applied together. Every action in them must do its work on some packets of each
/// IP version.
struct Row {
    /// Of the first chain: unique, as counters outlive a chain that is replaced.
    name: &'static str,
    chains: Vec<Value>,
    /// What must hold at both ends of a connection that went through.
    effect: fn(&Connection),
    /// Carries no packets over the MTU, and none whose checksum is partial.
    plain_packets: bool,
}

/// A set of flows that is there for every row.
const SET: &str = "matrix";

/// Actions on what MPTCP adds to TCP: they have their rows in tests/mptcp, where it is spoken.
const OF_MPTCP: [&str; 7] = [
    "add_subflow",
    "hold_add_addr",
    "mp_prio",
    "remove_addr",
    "report",
    "reset_subflow",
    "restore_add_addr",
];

fn no_effect(_: &Connection) {}

impl Row {
    fn new(name: &'static str, place: Place, selector: Value, actions: Value) -> Row {
        let chain = json!({
            "name": name,
            "attach": place.attach(&["client1", "server1"]),
            "selectors": [selector],
            "actions": actions,
        });
        Row {
            name,
            chains: vec![chain],
            effect: no_effect,
            plain_packets: false,
        }
    }

    /// Actions on every segment.
    fn all(name: &'static str, place: Place, actions: Value) -> Row {
        Row::new(name, place, json!({ "selector": "tcp" }), actions)
    }

    /// Actions on the segments of connections that have agreed on their options.
    fn established(name: &'static str, place: Place, actions: Value) -> Row {
        let selector = json!({ "selector": "tcp_flags", "none": ["syn"] });
        Row::new(name, place, selector, actions)
    }

    fn and(mut self, chain: Value) -> Row {
        self.chains.push(chain);
        self
    }

    fn effect(mut self, effect: fn(&Connection)) -> Row {
        self.effect = effect;
        self
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.chains.iter().map(|it| it["name"].as_str().unwrap())
    }

    fn actions(&self) -> impl Iterator<Item = &Value> {
        let chains = self.chains.iter();
        chains.flat_map(|chain| chain["actions"].as_array().unwrap())
    }
}

fn rows(place: Place) -> Vec<Row> {
    let insert = json!({ "action": "insert_option", "kind": 253, "data": "c0ffee01" });
    let strip = json!({ "action": "strip_option", "kind": "timestamps" });
    let strip_nop = json!({ "action": "strip_option", "kind": "timestamps", "mode": "nop" });
    let mut rows = vec![
        Row::all("count", place, json!([{ "action": "count" }])),
        Row::all("pass", place, json!([{ "action": "pass" }])),
        Row::all(
            "goto",
            place,
            json!([{ "action": "goto", "chain": "goal" }]),
        )
        .and(json!({ "name": "goal", "actions": [{ "action": "count" }] })),
        Row::new(
            "drop",
            place,
            json!({ "selector": "service", "port": CUT_OFF }),
            json!([{ "action": "drop" }]),
        ),
        Row::all(
            "window_field",
            place,
            json!([{ "action": "set_window", "raw": true, "bytes": WINDOW_FIELD }]),
        )
        .effect(has_window_field),
        Row::established(
            "window",
            place,
            json!([{ "action": "set_window", "bytes": WINDOW }]),
        )
        .effect(has_window),
        Row::established(
            "window_max",
            place,
            json!([{ "action": "set_window", "bytes": WINDOW, "max": true }]),
        )
        .effect(has_window_at_most),
        Row::all(
            "mss_clamp",
            place,
            json!([{ "action": "set_mss", "bytes": MSS }]),
        )
        .effect(has_small_segments),
        Row::all(
            "mss_set",
            place,
            json!([{ "action": "set_mss", "bytes": MSS, "mode": "set" }]),
        )
        .effect(has_small_segments),
        Row::established("strip_nop", place, json!([strip_nop])),
        Row::established("strip", place, json!([strip])),
        Row::all("record", place, json!([{ "action": "record" }])),
        Row::all("learn", place, json!([{ "action": "learn", "set": SET }])),
        Row::established("insert_in_room", place, json!([strip, insert])),
        // There is no room but in segments without payload, which grow.
        Row::all("insert_growing", place, json!([insert])),
        redirect(place),
    ];
    if place.hook == Hook::Xdp {
        let remove = json!({ "action": "strip_option", "kind": "timestamps", "mode": "remove" });
        rows.push(Row::established("strip_remove", place, json!([remove])));
    }
    rows
}

/// Out of the other side, as a router does. On egress, where the packet is about to leave by the
/// right side already, by the second path.
fn redirect(place: Place) -> Row {
    let selector = json!({ "selector": "tcp" });
    let chain = |name: &str, from: &str, action: Value| {
        json!({
            "name": name,
            "attach": place.attach(&[from]),
            "selectors": [selector],
            "actions": [action],
        })
    };
    let chains = if place.hook.is_ingress() {
        let to = |device| json!({ "action": "redirect", "device": device, "neighbour": true });
        vec![
            chain("redirect", "client1", to("server1")),
            chain("redirect_back", "server1", to("client1")),
        ]
    } else {
        let to = |device: &str, source: &str, destination: &str| {
            json!({
                "action": "redirect",
                "device": device,
                "src_mac": source,
                "dst_mac": destination,
            })
        };
        let to_server = to("server2", "02:70:63:00:04:02", "02:70:63:00:02:02");
        let to_client = to("client2", "02:70:63:00:03:02", "02:70:63:00:01:02");
        vec![
            chain("redirect", "server1", to_server),
            chain("redirect_back", "client1", to_client),
        ]
    };
    Row {
        name: "redirect",
        chains,
        effect: no_effect,
        // In generic mode the kernel drops what is over the MTU, and the action gives up where the
        // checksum is partial.
        plain_packets: place.is_generic(),
    }
}

fn has_window_field(connection: &Connection) {
    for end in [&connection.client, &connection.server] {
        let info = tcp_info(end);
        let field = info.send_window >> info.send_scale;
        assert_eq!(field, u32::from(WINDOW_FIELD), "the peer's window");
    }
}

fn has_window(connection: &Connection) {
    for end in [&connection.client, &connection.server] {
        let info = tcp_info(end);
        let window = WINDOW >> info.send_scale << info.send_scale;
        assert_eq!(info.send_window, window, "the peer's window");
    }
}

fn has_window_at_most(connection: &Connection) {
    for end in [&connection.client, &connection.server] {
        let window = tcp_info(end).send_window;
        assert!(
            (1..=WINDOW).contains(&window),
            "the peer's window: {window}"
        );
    }
}

fn has_small_segments(connection: &Connection) {
    for end in [&connection.client, &connection.server] {
        let mss = tcp_info(end).send_mss;
        assert!((1..=u32::from(MSS)).contains(&mss), "MSS {mss}");
    }
}

/// What must not happen, and what may, by name; of all hosts together.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Trouble {
    checksum_errors: u64,
    fragmentation_failures: u64,
    retransmissions: u64,
}

impl Trouble {
    fn of(environment: &Environment) -> Trouble {
        let sum = |protocol, name| -> u64 {
            let roles = [Role::Client, Role::Router, Role::Server].into_iter();
            roles
                .map(|role| environment.statistic(role, protocol, name))
                .sum()
        };
        Trouble {
            checksum_errors: sum("Tcp", "InCsumErrors"),
            fragmentation_failures: sum("Ip", "FragFails") + sum("Ip6", "FragFails"),
            retransmissions: sum("Tcp", "RetransSegs"),
        }
    }
}

/// How often each action of the chains did its work.
type Work = BTreeMap<String, u64>;

fn work(environment: &Environment, row: &Row) -> Work {
    let mut work = Work::new();
    for name in row.names() {
        let shown = environment.json(Role::Router, &["show", name, "--json"]);
        let places = shown["nodes"].as_array().unwrap().iter();
        for node in places.flat_map(|place| place["nodes"].as_array().unwrap()) {
            if node["kind"] != "action" {
                continue;
            }
            let reasons = node["reasons"].as_object().unwrap().values();
            let given_up: u64 = reasons.map(|count| count.as_u64().unwrap()).sum();
            let name = node["node"].as_str().unwrap().to_owned();
            *work.entry(name).or_default() += node["packets"].as_u64().unwrap() - given_up;
        }
    }
    work
}

/// Says which row it was that failed somewhere below.
struct NamedInPanic<'a>(&'a str);

impl Drop for NamedInPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            println!("failed: {}", self.0);
        }
    }
}

/// One test's testbed and where its chains run.
struct Bed {
    environment: Environment,
    place: Place,
}

impl Bed {
    fn set_wire(&self, wire: Wire) {
        let mtu = wire.mtu.to_string();
        for (role, device) in DEVICES {
            let arguments = ["link", "set", "dev", device, "mtu", &mtu];
            self.environment.run(role, "ip", &arguments);
        }
        self.set_senders(wire.offloads);
        let gro = if wire.offloads { "on" } else { "off" };
        for device in ["client1", "server1"] {
            let arguments = ["-K", device, "gro", gro];
            self.environment.run(Role::Router, "ethtool", &arguments);
        }
    }

    /// What the two hosts leave to their devices. Their GRO stays on: a veth gets no redirected
    /// XDP frame without it.
    fn set_senders(&self, offloads: bool) {
        let state = if offloads { "on" } else { "off" };
        for (role, device) in DEVICES {
            if role != Role::Router {
                let mut arguments = vec!["-K", device, "gro", "on"];
                for feature in ["tx", "tso", "gso"] {
                    arguments.extend([feature, state]);
                }
                self.environment.run(role, "ethtool", &arguments);
            }
        }
    }

    fn apply(&self, row: &Row) {
        let sets = json!({ SET: { "kind": "flow", "size": 1000 } });
        let content = json!({ "version": 1, "sets": sets, "chains": row.chains });
        let file = self.environment.file("matrix.json", &content);
        let arguments = ["apply", &file, "--prune"];
        self.environment.ok(Role::Router, &arguments);
    }

    /// A row on a wire; the segments that were sent more than once.
    fn run(&self, row: &Row, wire: Wire) -> u64 {
        let what = format!(
            "{} on {} {}, MTU {}, offloads {}",
            row.name, self.place.hook, self.place.mode, wire.mtu, wire.offloads
        );
        let _named = NamedInPanic(&what);
        let plain = row.plain_packets && wire.offloads;
        if plain {
            self.set_senders(false);
        }
        let before = Trouble::of(&self.environment);
        self.apply(row);
        for address in server_addresses(&self.environment) {
            let idle = work(&self.environment, row);
            if row.name == "drop" {
                self.expect_cut_off((address, CUT_OFF).into());
            }
            let mut connection = Connection::open(&self.environment, address, PORT);
            connection.transfer(LENGTH);
            (row.effect)(&connection);
            let done = work(&self.environment, row);
            for (node, count) in &done {
                assert!(*count > idle[node], "{what}, {address}: {node} did nothing");
            }
        }
        let after = Trouble::of(&self.environment);
        let (sums, fragments) = (after.checksum_errors, after.fragmentation_failures);
        assert_eq!(sums, before.checksum_errors, "{what}: checksum errors");
        assert_eq!(
            fragments, before.fragmentation_failures,
            "{what}: packets over the MTU"
        );
        if plain {
            self.set_senders(wire.offloads);
        }
        after.retransmissions - before.retransmissions
    }

    /// That a SYN to the address gets no answer, not even a refusal.
    fn expect_cut_off(&self, address: SocketAddr) {
        let client = self.environment.namespace(Role::Client);
        let patience = Duration::from_millis(50);
        let connected = client
            .enter(|| TcpStream::connect_timeout(&address, patience))
            .unwrap();
        assert_eq!(connected.unwrap_err().kind(), ErrorKind::TimedOut);
    }
}

const DEVICES: [(Role, &str); 8] = [
    (Role::Client, "path1"),
    (Role::Client, "path2"),
    (Role::Router, "client1"),
    (Role::Router, "client2"),
    (Role::Router, "server1"),
    (Role::Router, "server2"),
    (Role::Server, "path1"),
    (Role::Server, "path2"),
];

/// All rows on all wires. Retransmissions are reported: a loaded machine may lose packets.
fn all_at(hook: Hook, mode: &'static str) {
    let place = Place { hook, mode };
    let bed = Bed {
        environment: Environment::routed_paths(2),
        place,
    };
    println!("{hook} {mode}: segments sent again");
    println!("{:<16}1500 on     off  9000 on     off", "");
    let mut table: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for wire in WIRES {
        bed.environment.ok(Role::Router, &["delete", "--all"]);
        bed.set_wire(wire);
        for row in rows(place) {
            let again = bed.run(&row, wire);
            table.entry(row.name).or_default().push(again);
        }
    }
    for (name, cells) in table {
        let cells: Vec<String> = cells.iter().map(|count| format!("{count:>7}")).collect();
        println!("{name:<16}{}", cells.join(" "));
    }
}

#[test]
fn every_action_on_tc_ingress() {
    all_at(Hook::TcIngress, "auto");
}

#[test]
fn every_action_on_tc_egress() {
    all_at(Hook::TcEgress, "auto");
}

#[test]
fn every_action_on_native_xdp() {
    all_at(Hook::Xdp, "native");
}

#[test]
fn every_action_on_generic_xdp() {
    all_at(Hook::Xdp, "generic");
}

/// An action without a row is one that nobody has seen under real TCP.
#[test]
fn every_action_has_a_row() {
    let registry = Registry::embedded().unwrap();
    for hook in Hook::ALL {
        let rows = rows(Place { hook, mode: "auto" });
        let tried: BTreeSet<&str> = rows
            .iter()
            .flat_map(Row::actions)
            .map(|action| action["action"].as_str().unwrap())
            .collect();
        let there_are: BTreeSet<&str> = registry
            .actions()
            .filter(|policy| policy.runs_at(hook))
            .map(|policy| policy.name.as_str())
            .filter(|name| !OF_MPTCP.contains(name))
            .collect();
        assert_eq!(tried, there_are, "{hook}: rows and actions");
    }
}

/// All files in a folder and those below it.
fn texts_in(folder: &Path) -> String {
    let paths = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let texts = paths.map(|path| match path.is_dir() {
        true => texts_in(&path),
        false => std::fs::read_to_string(&path).unwrap(),
    });
    texts.collect()
}

#[test]
fn every_action_of_mptcp_is_tried_where_it_is_spoken() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/mptcp");
    let text = texts_in(Path::new(folder));
    for name in OF_MPTCP {
        let used = text.contains(&format!("\"action\": \"{name}\""));
        assert!(used, "no test in tests/mptcp has the action {name}");
    }
}

#[test]
fn every_mode_of_an_action_has_a_row() {
    let registry = Registry::embedded().unwrap();
    let rows = rows(Place {
        hook: Hook::Xdp,
        mode: "auto",
    });
    let mut count = 0;
    for policy in registry.actions() {
        let described = policy_json(policy);
        let parameters = described["parameters"].as_array().unwrap().iter();
        for mode in parameters.filter(|parameter| parameter["name"] == "mode") {
            let default = &mode["default"];
            for value in mode["names"].as_array().unwrap() {
                let is_tried = |action: &Value| {
                    let given = action.get("mode").unwrap_or(default);
                    action["action"] == policy.name.as_str() && given == value
                };
                let tried = rows.iter().flat_map(Row::actions).any(is_tried);
                assert!(tried, "{} with mode {value}", policy.name);
                count += 1;
            }
        }
    }
    assert!(count > 0);
}
