// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the testbed promises: connections join all paths, and paths are as slow as asked for.

use std::time::Duration;

use policy_chain::testbed::{Announce, Options, Role};

use crate::common::mptcp::{MptcpConnection, exact, mptcp_options};
use crate::common::traffic::server_addresses;
use crate::common::{Environment, eventually};

/// Over IPv4 and IPv6, every path has a subflow that carries something.
fn joins(options: &Options) {
    let environment = Environment::with(options);
    let paths = options.paths.into();
    for address in server_addresses(&environment) {
        exact(|| {
            let connection = MptcpConnection::joined(&environment, address);
            assert!(connection.is_mptcp());
            let subflows = connection.wait_subflows(&environment, Role::Server, paths);
            for (subflow, number) in subflows.iter().zip(1..) {
                assert_eq!(subflow.path(), number, "{subflows:#?}");
                assert_eq!(subflow.is_joined(), number > 1, "{subflows:#?}");
                assert!(!subflow.is_backup_by_peer(), "{subflows:#?}");
            }
            let info = connection.info(Role::Client).unwrap();
            assert_eq!(usize::from(info.subflows) + 1, paths);
            assert_ne!(
                connection.token(Role::Client),
                connection.token(Role::Server)
            );
            connection.exchange(10)?;
            connection.transfer(1 << 20)?;
            connection.fetch(1 << 20)
        });
    }
    let joined = environment.counter(Role::Server, "MPTcpExt", "MPJoinAckRx");
    assert!(joined >= 2 * (u64::from(options.paths) - 1), "{joined}");
    let announced = environment.counter(Role::Client, "MPTcpExt", "AddAddr");
    assert_eq!(
        announced > 0,
        options.mptcp == Some(Announce::Signal),
        "{announced}"
    );
}

#[test]
fn two_paths_announced_by_the_server() {
    joins(&mptcp_options(2, Announce::Signal));
}

#[test]
fn three_paths_announced_by_the_server() {
    joins(&mptcp_options(3, Announce::Signal));
}

#[test]
fn two_paths_joined_by_the_client() {
    joins(&mptcp_options(2, Announce::Subflow));
}

#[test]
fn three_paths_joined_by_the_client() {
    joins(&mptcp_options(3, Announce::Subflow));
}

#[test]
fn through_a_router() {
    for announce in Announce::ALL {
        joins(&Options {
            router: true,
            ..mptcp_options(2, announce)
        });
    }
}

#[test]
fn five_paths() {
    for announce in Announce::ALL {
        joins(&mptcp_options(5, announce));
    }
}

/// Paths of different rates add up.
#[test]
fn rates() {
    let options = Options {
        rate: vec![40, 20],
        ..mptcp_options(2, Announce::Subflow)
    };
    let environment = Environment::with(&options);
    for address in server_addresses(&environment) {
        exact(|| {
            let connection = MptcpConnection::joined(&environment, address);
            for rate in [connection.transfer(8 << 20)?, connection.fetch(8 << 20)?] {
                assert!((36.0..72.0).contains(&rate), "{rate} Mbit/s");
            }
            Ok(())
        });
    }
}

/// That the subflow's least round trip time is the delay, to 2 %.
#[track_caller]
fn close(seen: Duration, delay: Duration) {
    let ratio = seen.as_secs_f64() / delay.as_secs_f64();
    assert!((0.98..1.02).contains(&ratio), "{seen:?} for {delay:?}");
}

fn delayed(delay: &[u64], rate: &[u32]) -> Environment {
    Environment::with(&Options {
        delay: delay.iter().copied().map(Duration::from_millis).collect(),
        rate: rate.to_vec(),
        ..mptcp_options(2, Announce::Subflow)
    })
}

#[test]
fn delays() {
    let environment = delayed(&[20, 5], &[]);
    for address in server_addresses(&environment) {
        let connection = MptcpConnection::joined(&environment, address);
        exact(|| {
            connection.exchange(10)?;
            connection.transfer(256 << 10)?;
            connection.fetch(256 << 10)
        });
        for role in [Role::Client, Role::Server] {
            let subflows = connection.wait_subflows(&environment, role, 2);
            eprintln!(
                "{role} {:?}",
                subflows.iter().map(|s| s.min_rtt).collect::<Vec<_>>()
            );
            for (subflow, delay) in subflows.iter().zip([20, 5]) {
                close(subflow.min_rtt, Duration::from_millis(delay));
            }
        }
    }
}

#[test]
fn dbg_tp() {
    for rate in [300, 600, 2000] {
        for mp in [false, true] {
            let environment = delayed(&[20, 5], &[rate]);
            let address = server_addresses(&environment)[0];
            let connection = if mp {
                MptcpConnection::joined(&environment, address)
            } else {
                MptcpConnection::open(&environment, address, 0)
            };
            if !mp {
                environment.run(Role::Client, "true", &[]);
            }
            std::thread::scope(|scope| {
                let work = scope.spawn(|| {
                    let a = connection.transfer(100 << 20);
                    let b = connection.fetch(100 << 20);
                    eprintln!("{mp} {rate}: {a:?} {b:?}");
                });
                for n in 0..16 {
                    std::thread::sleep(Duration::from_secs(1));
                    if work.is_finished() {
                        break;
                    }
                    if n > 12 {
                        for s in connection.subflows(&environment, Role::Client) {
                            eprintln!("C {}", s.line);
                        }
                        for s in connection.subflows(&environment, Role::Server) {
                            eprintln!("S {}", s.line);
                        }
                        eprintln!("{}", environment.run(Role::Client, "ss", &["-MniHO"]));
                        eprintln!("{}", environment.run(Role::Client, "tc", &["-s", "qdisc"]));
                        eprintln!("{}", environment.run(Role::Relay, "ip", &["-s", "link"]));
                        eprintln!("{}", environment.run(Role::Server, "nstat", &["-s"]));
                    }
                }
            });
        }
    }
}
