// SPDX-License-Identifier: MIT OR Apache-2.0
//! The examples, run in this process, as schedulers of real connections.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use policy_chain::engine::store::Store;
use policy_chain::monitor::connections;
use policy_chain::testbed::{Announce, Options, Role};

use crate::common::load::{SetWhenDropped, while_sending};
use crate::common::mptcp::{MptcpConnection, mptcp_options};
use crate::common::traffic::server_addresses;
use crate::common::{Environment, eventually};

#[path = "../../examples/path_scheduler.rs"]
mod path_scheduler;
#[path = "../../examples/service_paths.rs"]
mod service_paths;

const FAST: Duration = Duration::from_millis(5);
const SLOW: Duration = Duration::from_millis(40);
/// What a share is taken of.
const MOMENT: Duration = Duration::from_millis(200);

/// What the client's subflows were at one time, by path.
struct Look {
    at: Instant,
    /// Payload that the client sent.
    sent: BTreeMap<String, u64>,
    /// The last round-trip time seen.
    rtt: BTreeMap<String, Duration>,
}

impl Look {
    fn now(environment: &Environment) -> Look {
        let read = || connections::read(&Store::open(environment.folder())?);
        let found = environment.namespace(Role::Client).enter(read);
        let mut look = Look {
            at: Instant::now(),
            sent: BTreeMap::new(),
            rtt: BTreeMap::new(),
        };
        for subflow in found.unwrap().unwrap().iter().flat_map(|it| &it.subflows) {
            let device = subflow.device.clone();
            *look.sent.entry(device.clone()).or_default() += subflow.local.bytes;
            look.rtt
                .extend(subflow.local.rtt.map(|it| (device, it.last)));
        }
        look
    }

    /// The share of a path in what was sent since an earlier look; NaN if that is nothing.
    fn share(&self, device: &str, earlier: &Look) -> f64 {
        let moved = |name: &str| {
            let before = earlier.sent.get(name).copied().unwrap_or(0);
            self.sent
                .get(name)
                .copied()
                .unwrap_or(0)
                .saturating_sub(before) as f64
        };
        moved(device) / self.sent.keys().map(|name| moved(name)).sum::<f64>()
    }
}

/// The share of a path in what the client sends during a moment.
fn share(environment: &Environment, device: &str) -> f64 {
    let before = Look::now(environment);
    thread::sleep(MOMENT);
    Look::now(environment).share(device, &before)
}

/// Runs an example in the client's namespace, and `check` beside it with steady traffic from the
/// client to the server.
fn beside(
    environment: &Environment,
    address: IpAddr,
    example: impl FnOnce(&AtomicBool) -> anyhow::Result<()> + Send,
    chain: &str,
    check: impl FnOnce(),
) {
    let stop = AtomicBool::new(false);
    let client = environment.namespace(Role::Client);
    thread::scope(|scope| {
        let example = scope.spawn(|| client.enter(|| example(&stop)).unwrap());
        let stopped = SetWhenDropped(&stop);
        eventually("the chains run", || {
            let list = environment.json(Role::Client, &["list", "--json"]);
            // On both hooks of both paths.
            let everywhere = |it: &serde_json::Value| {
                it["name"] == chain && it["attach"].as_array().unwrap().len() == 4
            };
            list.as_array()
                .unwrap()
                .iter()
                .any(everywhere)
                .then_some(())
        });
        let connection = MptcpConnection::joined(environment, address);
        // 10 Mbit/s
        while_sending(&connection, 12_500, Duration::from_millis(10), check);
        drop(stopped);
        example.join().unwrap().unwrap();
    });
    let left = environment.json(Role::Client, &["list", "--json"]);
    assert_eq!(
        left,
        serde_json::json!([]),
        "chains of the example are left"
    );
}

/// Waits until a path carries the data, and stays so for a while.
fn settles_on(environment: &Environment, device: &str) {
    eventually(&format!("it settles on {device}"), || {
        (0..6)
            .all(|_| share(environment, device) > 0.9)
            .then_some(())
    });
}

/// Watches until the data is on the path `to`: how long that took since a slow round trip was
/// first seen on `from`.
fn moves(environment: &Environment, from: &str, to: &str) -> Duration {
    let mut looks: Vec<Look> = Vec::new();
    eventually(&format!("the data moves to {to}"), || {
        thread::sleep(Duration::from_millis(15));
        let look = Look::now(environment);
        let seen = looks.iter().find(|it| it.rtt[from] > (FAST + SLOW) / 2);
        // The share of a moment is that of its beginning.
        let begin = looks.iter().rfind(|it| look.at - it.at >= MOMENT);
        let taken = seen.zip(begin).and_then(|(seen, begin)| {
            let moved = look.share(to, begin) > 0.9 && begin.at >= seen.at;
            moved.then_some(begin.at - seen.at)
        });
        looks.push(look);
        taken
    })
}

/// The path of lower round-trip time carries the data. When the two change places, data moves
/// within a second of a slow round trip being seen: in most cases, for another program can keep
/// this one from running.
fn follows_the_faster_path(version: usize) {
    let environment = Environment::with(&Options {
        delay: vec![FAST, SLOW],
        ..mptcp_options(2, Announce::Subflow)
    });
    let devices = ["path1", "path2"].map(str::to_owned);
    let run = |stop: &AtomicBool| path_scheduler::run(environment.folder(), &devices, stop);
    let address = server_addresses(&environment)[version];
    beside(&environment, address, run, "path-scheduler-ask", || {
        settles_on(&environment, "path1");
        let swaps = [(1, 2), (2, 1), (1, 2)].map(|(from, to)| {
            environment.testbed.set_delay(from, SLOW).unwrap();
            environment.testbed.set_delay(to, FAST).unwrap();
            let [from, to] = [from, to].map(|number| format!("path{number}"));
            let taken = moves(&environment, &from, &to);
            settles_on(&environment, &to);
            taken
        });
        eprintln!("data moved after {swaps:.0?}");
        let in_time = |taken: &&Duration| **taken <= Duration::from_secs(1);
        assert!(swaps.iter().filter(in_time).count() >= 2, "{swaps:?}");
    });
}

#[test]
fn scheduler_follows_the_faster_path() {
    follows_the_faster_path(0);
}

#[test]
fn scheduler_follows_the_faster_path_on_ipv6() {
    follows_the_faster_path(1);
}

/// A service has its path, though the other is the one the connection began on.
#[test]
fn services_keep_their_paths() {
    let environment = Environment::with(&mptcp_options(2, Announce::Subflow));
    for (address, device) in server_addresses(&environment)
        .into_iter()
        .zip(["path2", "path1"])
    {
        let paths = ["path1", "path2"].map(str::to_owned);
        // Every port: the connection's is free only until it is opened.
        let services = BTreeMap::from([("1-65535".to_owned(), device.to_owned())]);
        let run =
            |stop: &AtomicBool| service_paths::run(environment.folder(), &paths, &services, stop);
        beside(&environment, address, run, "service-paths", || {
            eventually("the data is where it belongs", || {
                (share(&environment, device) > 0.95).then_some(())
            });
            let list = environment.json(Role::Client, &["connections", "--json", "--over", "1ms"]);
            let subflows = list[0]["subflows"].as_array().unwrap();
            let other = subflows.iter().find(|it| it["device"] != device).unwrap();
            assert_eq!(other["remote"]["backup"], true, "{list:#}");
        });
    }
}
