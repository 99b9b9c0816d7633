// SPDX-License-Identifier: MIT OR Apache-2.0
//! The chains for MPTCP, on a client with two paths: what they do to real connections, as the
//! kernels of both hosts tell it.

use std::net::IpAddr;
use std::time::Duration;

use policy_chain::testbed::{Announce, Options, Role};
use serde_json::{Value, json};

use super::common::load::expect_rate;
use super::common::mptcp::{Differs, MptcpConnection, Subflow, exact, mptcp_options};
use super::common::{Environment, eventually};
use super::example;

const MEGABYTE: usize = 1 << 20;
/// Announced by the server, and known to no one else.
const BEHIND_NAT: &str = "192.168.7.1";

/// How the examples are applied: as they stand, or with another hook for what comes in and another
/// mode for TC.
const VARIANTS: [(&str, &str, &str); 4] = [
    ("tc-ingress", "auto", "auto"),
    ("tc-ingress", "clsact", "clsact"),
    ("xdp", "native", "auto"),
    ("xdp", "generic", "clsact"),
];

/// The example at its devices, with the hooks of a variant.
fn variant(name: &str, devices: &[(&str, &str)], variant: (&str, &str, &str)) -> Value {
    let mut text = example(name).to_string();
    for (from, to) in devices {
        text = text.replace(&format!("\"{from}\""), &format!("\"{to}\""));
    }
    let mut chains: Value = serde_json::from_str(&text).unwrap();
    let (ingress, ingress_mode, egress_mode) = variant;
    for chain in chains["chains"].as_array_mut().unwrap() {
        let places = chain["attach"].as_array_mut().into_iter().flatten();
        for place in places {
            let (hook, mode) = match place["hook"].as_str() {
                Some("tc-ingress") => (ingress, ingress_mode),
                _ => ("tc-egress", egress_mode),
            };
            place["hook"] = json!(hook);
            place["mode"] = json!(mode);
        }
    }
    chains
}

/// Two paths, so slow that a transfer needs both.
fn slow(announce: Announce) -> Options {
    Options {
        rate: vec![200],
        ..mptcp_options(2, announce)
    }
}

const PATHS: [(&str, &str); 2] = [("wlan0", "path1"), ("wwan0", "path2")];

/// Applies the example on the client in each variant, and has it checked.
fn on_client(
    options: &Options,
    name: &str,
    devices: &[(&str, &str)],
    check: impl Fn(&Environment),
) {
    let environment = Environment::with(options);
    let mut done = Vec::new();
    for how in VARIANTS {
        let chains = variant(name, devices, how);
        // Of a chain for one direction, two are the same.
        if done.contains(&chains) {
            continue;
        }
        eprintln!("{name}: {how:?}");
        environment.apply(Role::Client, &chains);
        check(&environment);
        environment.ok(Role::Client, &["delete", "--all"]);
        done.push(chains);
    }
}

fn server(environment: &Environment) -> IpAddr {
    environment.testbed.path(1).unwrap().server.ipv4.into()
}

/// Has the server announce an address that the client cannot reach.
fn announce_unreachable(environment: &Environment) {
    let address = format!("{BEHIND_NAT}/32");
    let add = ["address", "add", &address, "dev", "lo"];
    environment.run(Role::Server, "ip", &add);
    let limits = ["mptcp", "limits", "set", "add_addr_accepted", "4"];
    environment.run(Role::Client, "ip", &limits);
    let endpoint = ["mptcp", "endpoint", "add", BEHIND_NAT, "signal"];
    environment.run(Role::Server, "ip", &endpoint);
}

fn mptcp_counter(environment: &Environment, role: Role, name: &str) -> u64 {
    environment.counter(role, "MPTcpExt", name)
}

/// Payload that the client got by a path.
fn received(environment: &Environment, connection: &MptcpConnection, path: u8) -> u64 {
    let subflows = connection.subflows(environment, Role::Client);
    let mut of_path = subflows.iter().filter(|it| it.path() == path);
    of_path.next().map_or(0, |it| it.bytes_received)
}

/// Payload that the client sent by a path.
fn sent(environment: &Environment, connection: &MptcpConnection, path: u8) -> u64 {
    let subflows = connection.subflows(environment, Role::Client);
    let mut of_path = subflows.iter().filter(|it| it.path() == path);
    of_path.next().map_or(0, |it| it.bytes_sent)
}

/// What of 8 MB each way takes path 2 once its MP_PRIO is through; `backup` whether that comes.
fn share_of_path_2(
    environment: &Environment,
    connection: &MptcpConnection,
    backup: bool,
) -> Result<f64, Differs> {
    let told = |role| {
        let subflows = connection.subflows(environment, role);
        subflows.iter().any(Subflow::is_backup_by_peer)
    };
    // Packets of the subflow carry it, so there must be some.
    for _ in 0..50 {
        connection.fetch(MEGABYTE / 4)?;
        connection.transfer(MEGABYTE / 4)?;
        if told(Role::Client) && told(Role::Server) {
            break;
        }
    }
    assert_eq!([Role::Client, Role::Server].map(told), [backup; 2]);
    let took = || received(environment, connection, 2) + sent(environment, connection, 2);
    let before = took();
    connection.fetch(8 * MEGABYTE)?;
    connection.transfer(8 * MEGABYTE)?;
    Ok((took() - before) as f64 / (16 * MEGABYTE) as f64)
}

fn connect(environment: &Environment) -> MptcpConnection {
    let connection = MptcpConnection::joined(environment, server(environment));
    assert!(connection.is_mptcp());
    connection
}

#[test]
fn without_chains() {
    let environment = Environment::with(&slow(Announce::Subflow));
    announce_unreachable(&environment);
    exact(|| {
        let connection = connect(&environment);
        environment.wait_counter(Role::Client, "MPTcpExt", "AddAddr", 1);
        let share = share_of_path_2(&environment, &connection, false)?;
        assert!(share > 0.2, "{share}");
        for role in [Role::Client, Role::Server] {
            assert_eq!(with_timestamps(&environment, &connection, role), [true; 2]);
        }
        Ok(())
    });
}

/// Whether the subflows of a host use timestamps, by path.
fn with_timestamps(
    environment: &Environment,
    connection: &MptcpConnection,
    role: Role,
) -> Vec<bool> {
    let table = environment.run(role, "ss", &["-tnioHO"]);
    let has = |subflow: Subflow| {
        let ends = [subflow.local, subflow.peer].map(|end| format!(":{} ", end.port()));
        let mut lines = table.lines();
        let line = lines.find(|line| ends.iter().all(|end| line.contains(end)));
        line.unwrap().contains(" ts ")
    };
    let subflows = connection.subflows(environment, role);
    subflows.into_iter().map(has).collect()
}

#[test]
fn mptcp() {
    let environment = Environment::with(&slow(Announce::Subflow));
    announce_unreachable(&environment);
    for how in VARIANTS {
        eprintln!("{how:?}");
        environment.apply(Role::Client, &variant("mptcp.json", &PATHS, how));
        let announced = mptcp_counter(&environment, Role::Client, "AddAddr");
        exact(|| {
            let connection = connect(&environment);
            let share = share_of_path_2(&environment, &connection, true)?;
            assert!(share < 0.02, "{share}");
            assert!(environment.packets(Role::Client, "filter-add-addr") > 0);
            let after = mptcp_counter(&environment, Role::Client, "AddAddr");
            assert_eq!(after, announced, "{how:?}");
            observed(&environment, &connection, true);
            Ok(())
        });
        environment.ok(Role::Client, &["delete", "--all"]);
    }
}

/// That the chain `observe` knows the connection as the kernel does.
fn observed(environment: &Environment, connection: &MptcpConnection, backup: bool) {
    let token = format!("{:08x}", connection.token(Role::Client));
    let list = environment.json(Role::Client, &["connections", "--json", "--over", "10ms"]);
    let mut found = list.as_array().unwrap().iter();
    let found = found.find(|it| it["local_token"] == token);
    let found = found.unwrap_or_else(|| panic!("no {token} in {list:#}"));
    let subflows = found["subflows"].as_array().unwrap();
    assert_eq!(subflows.len(), 2, "{found:#}");
    for (seen, known) in subflows
        .iter()
        .zip(connection.subflows(environment, Role::Client))
    {
        assert_eq!(seen["state"], "established");
        assert_eq!(seen["device"], format!("path{}", known.path()));
        // Repeated ones are in it.
        let ends = [
            ("local", known.bytes_sent),
            ("remote", known.bytes_received),
        ];
        for (end, bytes) in ends {
            let counted = seen[end]["bytes"].as_u64().unwrap();
            let repeated = seen[end]["retransmissions"].as_u64().unwrap() * 65536;
            let right = bytes..=bytes + repeated;
            assert!(right.contains(&counted), "{end} {counted} of {right:?}");
        }
        let is_second = known.path() == 2;
        assert_eq!(seen["joined"], is_second);
        assert_eq!(seen["local"]["backup"], backup && is_second);
        assert_eq!(seen["remote"]["backup"], backup && is_second);
        assert!(seen["local"]["rtt_us"]["min"].is_number(), "{seen:#}");
    }
    assert!(environment.packets(Role::Client, "observe") > 0);
}

#[test]
fn observe() {
    on_client(
        &slow(Announce::Subflow),
        "observe.json",
        &[],
        |environment| {
            exact(|| {
                let connection = connect(environment);
                let share = share_of_path_2(environment, &connection, false)?;
                assert!(share > 0.2, "{share}");
                observed(environment, &connection, false);
                Ok(())
            });
        },
    );
}

#[test]
fn metered_backup() {
    let options = slow(Announce::Subflow);
    on_client(&options, "metered-backup.json", &PATHS, |environment| {
        exact(|| {
            let connection = connect(environment);
            let share = share_of_path_2(environment, &connection, true)?;
            assert!(share < 0.02, "{share}");
            // It is used where nothing else works.
            let path = environment.testbed.path(1).unwrap();
            let device = &path.client.device;
            let link = |state| environment.run(Role::Client, "ip", &["link", "set", device, state]);
            let before = received(environment, &connection, 2);
            link("down");
            let fetched = connection.fetch(MEGABYTE);
            link("up");
            fetched?;
            let by_backup = received(environment, &connection, 2) - before;
            assert!(by_backup > MEGABYTE as u64 / 2, "{by_backup}");
            Ok(())
        });
    });
}

#[test]
fn filter_add_addr() {
    let devices = [("eth0", "path1")];
    let options = mptcp_options(2, Announce::Signal);
    let environment = Environment::with(&options);
    // The client joins what is announced.
    connect(&environment);
    // Filtered where it comes in, and where it leaves.
    for (role, how) in [Role::Client, Role::Server]
        .iter()
        .flat_map(|role| VARIANTS.map(|how| (*role, how)))
    {
        eprintln!("{role}: {how:?}");
        environment.apply(role, &variant("filter-add-addr.json", &devices, how));
        let announced = mptcp_counter(&environment, Role::Client, "AddAddr");
        let address = server(&environment);
        exact(|| {
            let filtered = environment.packets(role, "filter-add-addr");
            let connection = MptcpConnection::open(&environment, address, 0);
            connection.exchange(20)?;
            eventually("the announcement is filtered", || {
                let exchanged = connection.exchange(1);
                let now = environment.packets(role, "filter-add-addr");
                (exchanged.is_err() || now > filtered).then_some(exchanged)
            })?;
            connection.exchange(20)?;
            assert!(connection.is_mptcp());
            assert_eq!(connection.subflows(&environment, Role::Client).len(), 1);
            Ok(())
        });
        let after = mptcp_counter(&environment, Role::Client, "AddAddr");
        assert_eq!(after, announced);
        environment.ok(role, &["delete", "--all"]);
    }
}

#[test]
fn hide_mptcp() {
    let options = mptcp_options(2, Announce::Subflow);
    let exchange = |connection: &MptcpConnection| {
        connection.exchange(20)?;
        connection.fetch(MEGABYTE)
    };
    // On the path of the first subflow: the connection is plain TCP.
    on_client(
        &options,
        "hide-mptcp.json",
        &[("eth0", "path1")],
        |environment| {
            let address = server(environment);
            exact(|| {
                let connection = MptcpConnection::open(environment, address, 0);
                exchange(&connection)?;
                assert!(!connection.is_mptcp());
                assert!(environment.subflows(Role::Server).is_empty());
                Ok(())
            });
        },
    );
    // On the other one: nothing joins.
    on_client(
        &options,
        "hide-mptcp.json",
        &[("eth0", "path2")],
        |environment| {
            let joined = mptcp_counter(environment, Role::Client, "MPJoinSynAckRx");
            let address = server(environment);
            exact(|| {
                let tried = mptcp_counter(environment, Role::Client, "MPJoinSynTx");
                let connection = MptcpConnection::open(environment, address, 0);
                exchange(&connection)?;
                environment.wait_counter(Role::Client, "MPTcpExt", "MPJoinSynTx", tried + 1);
                exchange(&connection)?;
                assert!(connection.is_mptcp());
                connection.wait_subflows(environment, Role::Client, 1);
                let now = mptcp_counter(environment, Role::Client, "MPJoinSynAckRx");
                assert_eq!(now, joined);
                Ok(())
            });
        },
    );
}

#[test]
fn steer_service() {
    let options = slow(Announce::Subflow);
    on_client(&options, "steer-service.json", &PATHS, |environment| {
        let address = server(environment);
        for (port, steered) in [(443, true), (8443, false)] {
            exact(|| {
                let connection = MptcpConnection::open(environment, address, port);
                connection.exchange(1)?;
                connection.wait_subflows(environment, Role::Client, 2);
                let share = share_of_path_2(environment, &connection, steered)?;
                assert_eq!(share < 0.02, steered, "{port}: {share}");
                assert!(connection.is_mptcp());
                Ok(())
            });
        }
    });
}

/// Milliseconds of round trip, so that a window is a rate.
const DELAY: u64 = 20;
const WINDOW: u32 = 15_000;

#[test]
fn throttle_connection() {
    let options = Options {
        delay: vec![Duration::from_millis(DELAY)],
        ..mptcp_options(2, Announce::Subflow)
    };
    let name = "throttle-connection.json";
    on_client(&options, name, &PATHS, |environment| {
        exact(|| {
            let [free, throttled] = [connect(environment), connect(environment)];
            let token = throttled.token(Role::Client);
            let element = format!("token={token:08x},arg={WINDOW}");
            let change = |what| environment.ok(Role::Client, &["set", what, "throttled", &element]);
            change("add");
            // What was granted before still holds.
            throttled.fetch(MEGABYTE / 4)?;
            // Of a window a round trip, over both paths.
            let limit = f64::from(WINDOW) * 8.0 / 1e3 / DELAY as f64;
            let wanted = limit * 0.3..limit * 1.2;
            let rate = expect_rate(wanted, || throttled.fetch(MEGABYTE / 2))?;
            let unlimited = 2.0 * rate..f64::INFINITY;
            free.fetch(3 * MEGABYTE)?;
            expect_rate(unlimited.clone(), || free.fetch(3 * MEGABYTE))?;
            change("del");
            throttled.fetch(3 * MEGABYTE)?;
            expect_rate(unlimited, || throttled.fetch(3 * MEGABYTE))?;
            assert!([free, throttled].iter().all(MptcpConnection::is_mptcp));
            Ok(())
        });
    });
}

#[test]
fn timestamps_are_not_used() {
    let options = mptcp_options(2, Announce::Subflow);
    let devices = [("eth0", "path2")];
    on_client(&options, "strip-timestamps.json", &devices, |environment| {
        exact(|| {
            let connection = connect(environment);
            connection.exchange(20)?;
            for role in [Role::Client, Role::Server] {
                let has = with_timestamps(environment, &connection, role);
                assert_eq!(has, [true, false], "{role}");
            }
            Ok(())
        });
    });
}

#[test]
fn mss_is_clamped() {
    let options = mptcp_options(2, Announce::Subflow);
    on_client(
        &options,
        "clamp-mss.json",
        &[("eth0", "path2")],
        |environment| {
            exact(|| {
                let connection = connect(environment);
                connection.exchange(20)?;
                for role in [Role::Client, Role::Server] {
                    for subflow in connection.subflows(environment, role) {
                        let is_clamped = subflow.mss <= 1300;
                        assert_eq!(is_clamped, subflow.path() == 2, "{}", subflow.line);
                    }
                }
                Ok(())
            });
        },
    );
}
