// SPDX-License-Identifier: MIT OR Apache-2.0
//! The examples, run in this process, as schedulers of real connections.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use policy_chain::testbed::{Announce, Options, Role};

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

/// Payload that the client sent, by path.
fn sent(environment: &Environment) -> BTreeMap<String, u64> {
    let list = environment.json(Role::Client, &["connections", "--json", "--over", "1ms"]);
    let connections = list.as_array().unwrap().iter();
    let subflows = connections.flat_map(|it| it["subflows"].as_array().unwrap());
    let mut sent = BTreeMap::new();
    for subflow in subflows {
        let device = subflow["device"].as_str().unwrap().to_owned();
        *sent.entry(device).or_default() += subflow["local"]["bytes"].as_u64().unwrap();
    }
    sent
}

/// The share of a path in what the client sends during a moment.
fn share(environment: &Environment, device: &str) -> f64 {
    let before = sent(environment);
    thread::sleep(MOMENT);
    let after = sent(environment);
    let moved = |name: &str| (after[name] - before.get(name).copied().unwrap_or(0)) as f64;
    moved(device) / after.keys().map(|name| moved(name)).sum::<f64>()
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
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
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
            let done = AtomicBool::new(false);
            thread::scope(|scope| {
                // 10 Mbit/s
                scope.spawn(|| {
                    let begin = Instant::now();
                    let mut rounds = 0;
                    while !done.load(Ordering::Relaxed) {
                        // Whether the bytes are right is for other tests to say.
                        drop(connection.transfer(12_500));
                        rounds += 1;
                        let due = begin + rounds * Duration::from_millis(10);
                        thread::sleep(due.saturating_duration_since(Instant::now()));
                    }
                });
                let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(check));
                done.store(true, Ordering::Relaxed);
                checked
            })
            .unwrap_or_else(|cause| std::panic::resume_unwind(cause));
        }));
        stop.store(true, Ordering::Relaxed);
        example.join().unwrap().unwrap();
        checked.unwrap_or_else(|cause| std::panic::resume_unwind(cause));
    });
    let left = environment.json(Role::Client, &["list", "--json"]);
    assert_eq!(
        left,
        serde_json::json!([]),
        "chains of the example are left"
    );
}

/// The path of lower round-trip time carries the data. When they change places, which the active
/// path shows within a round trip or two, data moves within a second.
fn follows_the_faster_path(version: usize) {
    let environment = Environment::with(&Options {
        delay: vec![FAST, SLOW],
        ..mptcp_options(2, Announce::Subflow)
    });
    let devices = ["path1", "path2"].map(str::to_owned);
    let run = |stop: &AtomicBool| path_scheduler::run(environment.folder(), &devices, stop);
    let address = server_addresses(&environment)[version];
    beside(&environment, address, run, "path-scheduler-ask", || {
        // It tries both first.
        let settled = || {
            (0..6)
                .all(|_| share(&environment, "path1") > 0.9)
                .then_some(())
        };
        eventually("it settles on path 1", settled);
        environment.testbed.set_delay(1, SLOW).unwrap();
        environment.testbed.set_delay(2, FAST).unwrap();
        let begin = Instant::now();
        eventually("the data moves", || {
            (share(&environment, "path2") > 0.9).then_some(())
        });
        // To be seen the change takes the slow path's round trip; and it is measured for a while.
        let limit = Duration::from_secs(1) + SLOW + MOMENT * 2;
        let taken = begin.elapsed();
        assert!(taken < limit, "moved after {taken:?}");
        let stays = (0..4).map(|_| share(&environment, "path2"));
        let stays: Vec<f64> = stays.collect();
        assert!(stays.iter().all(|share| *share > 0.9), "{stays:?}");
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
