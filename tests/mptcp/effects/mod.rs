// SPDX-License-Identifier: MIT OR Apache-2.0
//! What chains do to MPTCP connections, as the kernels of both hosts count it: over IPv4 and IPv6,
//! at the end hosts by every hook and mode, and on a router whose checksums must be right.

mod addresses;
mod handshakes;
mod measured;
mod priorities;
mod resets;

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::Path;

use policy_chain::hook::Hook;
use policy_chain::policy::Registry;
use policy_chain::testbed::{Announce, Options, Role};
use serde_json::{Value, json};

use crate::common::mptcp::{Differs, MptcpConnection, exact_on};
use crate::common::traffic::server_addresses;
use crate::common::{Environment, eventually};

const MEGABYTE: usize = 1 << 20;

/// A hook that what one host sends to the other passes.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Place {
    /// On the router; else at the sender's egress, or the receiver's ingress.
    router: bool,
    hook: &'static str,
    mode: &'static str,
}

const fn place(router: bool, hook: &'static str, mode: &'static str) -> Place {
    Place { router, hook, mode }
}

const EGRESS: Place = place(false, "tc-egress", "auto");
const INGRESS: Place = place(false, "tc-ingress", "auto");
const XDP: Place = place(false, "xdp", "native");
const GENERIC: Place = place(false, "xdp", "generic");
const ROUTER_EGRESS: Place = place(true, "tc-egress", "auto");
const ROUTER_INGRESS: Place = place(true, "tc-ingress", "auto");
const ROUTER_XDP: Place = place(true, "xdp", "native");
const ROUTER_GENERIC: Place = place(true, "xdp", "generic");

/// Where an effect of some actions is tried.
struct Row {
    actions: &'static [&'static str],
    /// Whose packets the chains see.
    sender: Role,
    announce: Announce,
    paths: u8,
    places: &'static [Place],
}

/// What the tests of this folder go through.
const ROWS: [&[Row]; 17] = [
    addresses::FILTERED,
    addresses::MADE_UP,
    addresses::MADE_UP_WHILE_IDLE,
    addresses::TAKEN_AWAY,
    addresses::HELD_FOR_A_WHILE,
    addresses::HELD_UNTIL_TOLD,
    handshakes::MP_CAPABLE,
    handshakes::MP_JOIN,
    handshakes::DATA,
    measured::THROTTLED,
    measured::ON_A_ROUTER,
    priorities::BACKUP,
    priorities::SO_MANY_TIMES,
    priorities::ONCE_IN_A_WHILE,
    priorities::FIRST_ONES,
    resets::SECOND,
    resets::FIRST,
];

/// Where chain `t` is tried, and with what.
struct Scene<'a> {
    environment: &'a Environment,
    options: &'a Options,
    row: &'a Row,
    place: Place,
    /// Whose packets it sees.
    sender: Role,
    /// Address of the connection.
    server: IpAddr,
}

/// Tries something at each of the places of the rows, over IPv4 and IPv6, with the delays and rates
/// of `shape`.
fn everywhere(rows: &[Row], shape: &Options, check: impl Fn(&Scene) -> Result<(), Differs>) {
    for row in rows {
        for router in [false, true] {
            let mut places = row.places.iter().filter(|it| it.router == router);
            let options = row.options(router, shape);
            let Some(first) = places.next() else {
                continue;
            };
            let environment = Environment::with(&options);
            for place in [first].into_iter().chain(places) {
                for server in server_addresses(&environment) {
                    let scene = Scene {
                        environment: &environment,
                        options: &options,
                        row,
                        place: *place,
                        sender: row.sender,
                        server,
                    };
                    scene.run(&check);
                }
            }
        }
    }
}

impl Row {
    fn options(&self, router: bool, shape: &Options) -> Options {
        Options {
            paths: self.paths,
            mptcp: Some(self.announce),
            router,
            ..shape.clone()
        }
    }
}

impl Scene<'_> {
    fn run(&self, check: impl Fn(&Scene) -> Result<(), Differs>) {
        self.begins();
        exact_on(self.options, || {
            let done = check(self);
            self.environment.ok(self.role(), &["delete", "--all"]);
            done
        });
        self.checksums_are_right();
    }

    fn begins(&self) {
        let (place, server, row) = (self.place, self.server, self.row);
        eprintln!(
            "{:?} at {place:?}, {} paths, from the {} to {server}",
            row.actions, row.paths, self.sender
        );
    }

    fn checksums_are_right(&self) {
        for role in [Role::Client, Role::Server] {
            assert_eq!(self.environment.checksum_errors(role), 0, "{role}");
        }
    }

    fn receiver(&self) -> Role {
        match self.sender {
            Role::Client => Role::Server,
            _ => Role::Client,
        }
    }

    /// Of the host where chains run.
    fn role(&self) -> Role {
        match (self.place.router, self.place.hook) {
            (true, _) => Role::Router,
            (false, "tc-egress") => self.sender,
            (false, _) => self.receiver(),
        }
    }

    fn paths(&self) -> u8 {
        self.environment.testbed.describe().paths.len() as u8
    }

    fn device(&self, path: u8) -> String {
        match (self.place.router, self.place.hook) {
            (true, "tc-egress") => format!("{}{path}", self.receiver()),
            (true, _) => format!("{}{path}", self.sender),
            (false, _) => format!("path{path}"),
        }
    }

    /// A chain at the place.
    fn chain(&self, paths: RangeInclusive<u8>, selectors: Value, actions: Value) -> Value {
        for action in actions.as_array().unwrap() {
            let name = action["action"].as_str().unwrap();
            assert!(self.row.actions.contains(&name), "{name} is in no row");
        }
        let Place { hook, mode, .. } = self.place;
        let attach =
            paths.map(|path| json!({ "device": self.device(path), "hook": hook, "mode": mode }));
        json!({
            "name": "t",
            "attach": attach.collect::<Vec<_>>(),
            "selectors": selectors,
            "actions": actions,
        })
    }

    /// Has the actions done to what is sent on all paths.
    fn apply(&self, selectors: Value, actions: Value) {
        let chain = self.chain(1..=self.paths(), selectors, actions);
        let content = json!({ "version": 1, "chains": [chain] });
        self.environment.apply(self.role(), &content);
    }

    /// Has the actions done to what is sent on one subflow. On a router its two directions can take
    /// different devices.
    fn apply_to_subflow(&self, path: u8, actions: Value) {
        let of_sender = match self.row.announce {
            Announce::Signal => self.sender == Role::Server,
            Announce::Subflow => self.sender == Role::Client,
        };
        let key = if of_sender { "src" } else { "dst" };
        let selector = json!({ "selector": "ip_pair", key: self.address(path) });
        let paths = match self.place.router {
            true => 1..=self.paths(),
            false => path..=path,
        };
        let chain = self.chain(paths, json!([selector]), actions);
        let content = json!({ "version": 1, "chains": [chain] });
        self.environment.apply(self.role(), &content);
    }

    /// The address on a path of the server or client that tells subflows apart.
    fn address(&self, path: u8) -> IpAddr {
        let path = self.environment.testbed.path(path).unwrap();
        let own = match self.row.announce {
            Announce::Signal => &path.server,
            Announce::Subflow => &path.client,
        };
        match self.server {
            IpAddr::V4(_) => own.ipv4.into(),
            IpAddr::V6(_) => own.ipv6.into(),
        }
    }

    /// Packets that the chain's only action was done to.
    fn done(&self) -> u64 {
        let shown = self.environment.json(self.role(), &["show", "t", "--json"]);
        let places = shown["nodes"].as_array().unwrap().iter();
        let nodes = places.flat_map(|place| place["nodes"].as_array().unwrap());
        let actions = nodes.filter(|node| node["kind"] == "action");
        let done = actions.map(|node| {
            let reasons = node["reasons"].as_object().unwrap().values();
            let left: u64 = reasons.map(|count| count.as_u64().unwrap()).sum();
            node["packets"].as_u64().unwrap() - left
        });
        done.sum()
    }

    /// A counter of MPTCP from now on.
    fn counter(&self, role: Role, name: &'static str) -> Counter<'_> {
        let environment = self.environment;
        Counter {
            environment,
            role,
            name,
            before: environment.counter(role, "MPTcpExt", name),
        }
    }
}

/// How much a counter has grown.
struct Counter<'a> {
    environment: &'a Environment,
    role: Role,
    name: &'static str,
    before: u64,
}

impl Counter<'_> {
    fn grown(&self) -> u64 {
        self.environment.counter(self.role, "MPTcpExt", self.name) - self.before
    }

    /// Waits until it has grown by so much, and that it is no more.
    #[track_caller]
    fn becomes(&self, count: u64) {
        let least = self.before + count;
        self.environment
            .wait_counter(self.role, "MPTcpExt", self.name, least);
        self.is(count);
    }

    /// Has packets sent until it has grown by so much.
    #[track_caller]
    fn driven(&self, count: u64, send: impl Fn() -> Result<(), Differs>) -> Result<(), Differs> {
        eventually(self.name, || {
            let sent = (self.grown() < count).then(&send);
            match sent {
                Some(Ok(())) => None,
                Some(Err(differs)) => Some(Err(differs)),
                None => Some(Ok(())),
            }
        })
    }

    #[track_caller]
    fn is(&self, count: u64) {
        assert_eq!(self.grown(), count, "{} {}", self.role, self.name);
    }
}

/// A measurement that will do, or the last of five: other work on this machine spoils some.
fn of_five<T>(
    measure: impl Fn() -> Result<T, Differs>,
    will_do: impl Fn(&T) -> bool,
) -> Result<T, Differs> {
    for _ in 1..5 {
        let measured = measure()?;
        if will_do(&measured) {
            return Ok(measured);
        }
    }
    measure()
}

/// Sends a little each way.
fn both_ways(connection: &MptcpConnection) -> Result<(), Differs> {
    connection.transfer(MEGABYTE / 4)?;
    connection.fetch(MEGABYTE / 4).map(drop)
}

/// That both hosts speak MPTCP on a connection, which carries what it should.
#[track_caller]
fn goes_on(connection: &MptcpConnection) -> Result<(), Differs> {
    connection.exchange(3)?;
    connection.transfer(MEGABYTE)?;
    connection.fetch(MEGABYTE)?;
    for role in [Role::Client, Role::Server] {
        let info = connection.info(role);
        assert!(info.is_some_and(|it| !it.fallback), "{role}: {info:?}");
    }
    Ok(())
}

/// Actions that know MPTCP's options, by what they include, and one that heeds its connections.
fn actions_of_mptcp() -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies/actions");
    let files = fs::read_dir(folder).unwrap().map(|it| it.unwrap().path());
    let of_mptcp = files.filter(|file| {
        let text = fs::read_to_string(file).unwrap();
        text.contains("#include \"mptcp")
    });
    let name = |file: &Path| {
        let name = file.file_name().unwrap().to_str().unwrap();
        name.strip_suffix(".bpf.c").unwrap().to_owned()
    };
    let names = of_mptcp.map(|file| name(&file));
    names.chain(["set_window".to_owned()]).collect()
}

/// Each action is seen on end hosts by every hook that it runs at, on a router by TC and by native
/// XDP, and on two and three paths.
#[test]
fn every_action_is_tried_at_every_place() {
    let registry = Registry::embedded().unwrap();
    let actions = actions_of_mptcp();
    assert!(actions.contains("mp_prio"), "{actions:?}");
    for action in actions {
        let rows = ROWS.iter().copied().flatten();
        let rows = rows.filter(|row| row.actions.contains(&action.as_str()));
        let rows: Vec<&Row> = rows.collect();
        let tried = |will_do: &dyn Fn(&Place) -> bool| {
            rows.iter().any(|row| row.places.iter().any(will_do))
        };
        for hook in Hook::ALL {
            if !registry.action(&action).unwrap().runs_at(hook) {
                continue;
            }
            let at_end = |it: &Place| !it.router && it.hook == hook.name() && it.mode != "generic";
            assert!(tried(&at_end), "{action} at {hook} of an end host");
        }
        assert!(
            tried(&|it| *it == ROUTER_XDP),
            "{action} at XDP of a router"
        );
        let by_tc = |it: &Place| it.router && it.hook != "xdp";
        assert!(tried(&by_tc), "{action} at TC of a router");
        for paths in [2, 3] {
            let some = rows.iter().any(|row| row.paths == paths);
            assert!(some, "{action} on {paths} paths");
        }
    }
}
