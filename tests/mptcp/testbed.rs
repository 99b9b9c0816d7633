// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the testbed promises: connections join all paths, and paths are as slow as asked for.

use policy_chain::testbed::{Announce, Options, Role};

use crate::common::Environment;
use crate::common::mptcp::{MptcpConnection, exact, mptcp_options};
use crate::common::traffic::server_addresses;

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
