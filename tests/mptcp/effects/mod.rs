// SPDX-License-Identifier: MIT OR Apache-2.0
//! What chains do to MPTCP connections, as the kernels of both hosts count it: over IPv4 and IPv6,
//! at the end hosts by every hook and mode, and on a router whose checksums must be right.

mod addresses;
mod handshakes;
mod measured;
mod priorities;
mod resets;

use std::net::IpAddr;
use std::ops::RangeInclusive;

use policy_chain::testbed::{Announce, Options, Role};
use serde_json::{Value, json};

use crate::common::mptcp::{Differs, MptcpConnection, exact};
use crate::common::traffic::server_addresses;
use crate::common::{Environment, eventually};

const MEGABYTE: usize = 1 << 20;

/// A hook that what one host sends to the other passes.
#[derive(Clone, Copy, Debug)]
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

/// Where chain `t` is tried, and with what.
struct Scene<'a> {
    environment: &'a Environment,
    announce: Announce,
    place: Place,
    /// Whose packets it sees.
    sender: Role,
    /// Address of the connection.
    server: IpAddr,
}

/// Tries something at each of the places, over IPv4 and IPv6.
fn everywhere(
    options: &Options,
    places: &[Place],
    sender: Role,
    check: impl Fn(&Scene) -> Result<(), Differs>,
) {
    for router in [false, true] {
        let mut places = places.iter().filter(|it| it.router == router).peekable();
        if places.peek().is_none() {
            continue;
        }
        let environment = Environment::with(&Options {
            router,
            ..options.clone()
        });
        for place in places {
            for server in server_addresses(&environment) {
                let scene = Scene {
                    environment: &environment,
                    announce: options.mptcp.unwrap(),
                    place: *place,
                    sender,
                    server,
                };
                scene.run(&check);
            }
        }
    }
}

impl Scene<'_> {
    fn run(&self, check: impl Fn(&Scene) -> Result<(), Differs>) {
        eprintln!(
            "{:?}, from the {} to {}",
            self.place, self.sender, self.server
        );
        exact(|| {
            let done = check(self);
            self.environment.ok(self.role(), &["delete", "--all"]);
            if done.is_err() {
                self.control();
            }
            done
        });
        for role in [Role::Client, Role::Server] {
            assert_eq!(self.environment.checksum_errors(role), 0, "{role}");
        }
    }

    /// Tells whether connections without any chain deliver wrong bytes, too.
    fn control(&self) {
        const CONNECTIONS: usize = 50;
        let wrong = (0..CONNECTIONS).filter(|_| {
            let connection = MptcpConnection::open(self.environment, self.server, 0);
            connection.transfer(4 * MEGABYTE).is_err()
        });
        let wrong = wrong.count();
        eprintln!("control: without BPF, wrong bytes in {wrong} of {CONNECTIONS} connections");
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
        let of_sender = match self.announce {
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
        let own = match self.announce {
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
