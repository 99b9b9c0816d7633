// SPDX-License-Identifier: MIT OR Apache-2.0
//! `connections` says what the sockets of the host say; and keys of connections are nowhere but
//! where a chain needs them.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use policy_chain::engine::sys;
use policy_chain::testbed::{Announce, Options, Role};
use serde_json::{Value, json};

use crate::common::kernel::Objects;
use crate::common::load::while_sending;
use crate::common::mptcp::{MptcpConnection, Subflow, exact, mptcp_options};
use crate::common::traffic::{Connection, server_addresses};
use crate::common::{Environment, eventually, succeeded};
use crate::follower::Follower;
use crate::tshark::Captures;

fn chain(devices: &[&str], hooks: &[&str], actions: Value) -> Value {
    let attach = devices.iter().flat_map(|device| {
        let places = hooks.iter();
        places.map(move |hook| json!({ "device": device, "hook": hook }))
    });
    json!({
        "version": 1,
        "chains": [{
            "name": format!("watch-{}", devices.join("-")),
            "attach": attach.collect::<Vec<_>>(),
            "actions": actions,
        }],
    })
}

const TC: [&str; 2] = ["tc-ingress", "tc-egress"];

fn record(devices: &[&str]) -> Value {
    chain(devices, &TC, json!([{ "action": "record" }]))
}

/// What `connections --json` has, without waiting for rates.
fn listed(environment: &Environment, role: Role, more: &[&str]) -> Vec<Value> {
    let arguments = [&["connections", "--json", "--over", "1ms"], more].concat();
    let list = environment.json(role, &arguments);
    list.as_array().unwrap().clone()
}

/// The connection that one host knows by this token.
#[track_caller]
fn of_token(environment: &Environment, role: Role, token: u32) -> Value {
    let list = listed(environment, role, &[]);
    let found = list.iter().find(|it| it["local_token"] == hex(token));
    found
        .unwrap_or_else(|| panic!("no {} in {list:#?}", hex(token)))
        .clone()
}

fn hex(token: u32) -> String {
    format!("{token:08x}")
}

fn socket_address(end: &Value) -> SocketAddr {
    let address: IpAddr = end["address"].as_str().unwrap().parse().unwrap();
    SocketAddr::new(address, end["port"].as_u64().unwrap() as u16)
}

/// Tokens of the sockets of a host's MPTCP connections, as `ss -M` has them.
fn tokens(environment: &Environment, role: Role) -> BTreeSet<u32> {
    let table = environment.run(role, "ss", &["-niHOM"]);
    let words = table.split_whitespace();
    let tokens = words.filter_map(|word| word.strip_prefix("token:"));
    tokens
        .map(|token| u32::from_str_radix(token, 16).unwrap())
        .collect()
}

/// Address ids, local and remote, that a subflow's socket has: `token:RT(id:R)/LT(id:L)`.
fn address_ids(subflow: &Subflow) -> (u64, u64) {
    let ids = subflow.line.split("(id:").skip(1);
    let ids: Vec<u64> = ids
        .map(|rest| rest.split(')').next().unwrap().parse().unwrap())
        .collect();
    (ids[1], ids[0])
}

/// Compares what is listed of a connection with its sockets.
#[track_caller]
fn expect_as_sockets(environment: &Environment, connection: &MptcpConnection, role: Role) {
    let (own, other) = match role {
        Role::Client => (Role::Client, Role::Server),
        _ => (Role::Server, Role::Client),
    };
    assert!(tokens(environment, own).contains(&connection.token(own)));
    let listed = of_token(environment, own, connection.token(own));
    assert_eq!(listed["remote_token"], hex(connection.token(other)));
    assert_eq!(listed["mptcp"], true);
    let sockets = connection.subflows(environment, own);
    let subflows = listed["subflows"].as_array().unwrap();
    assert_eq!(subflows.len(), sockets.len(), "{listed:#} {sockets:#?}");
    for (subflow, socket) in subflows.iter().zip(&sockets) {
        let (local, remote) = (&subflow["local"], &subflow["remote"]);
        assert_eq!(socket_address(local), socket.local);
        assert_eq!(socket_address(remote), socket.peer);
        assert_eq!(subflow["device"], format!("path{}", socket.path()));
        assert_eq!(subflow["state"], "established");
        assert_eq!(subflow["joined"], socket.is_joined());
        assert_eq!(subflow["opened_here"], own == Role::Client);
        let ids = [local, remote].map(|end| end["address_id"].as_u64().unwrap());
        assert_eq!((ids[0], ids[1]), address_ids(socket), "{socket:#?}");
        assert_eq!(local["backup"], socket.is_backup_by_self(), "{socket:#?}");
        assert_eq!(remote["backup"], socket.is_backup_by_peer(), "{socket:#?}");
    }
}

/// Both hosts list the same from their sides, one folder or not.
fn as_the_sockets(announce: Announce) {
    let environment = Environment::mptcp(2, announce);
    let both = ["path1", "path2"];
    environment.apply(Role::Client, &record(&both));
    let mut other = record(&both);
    other["chains"][0]["name"] = "other".into();
    environment.apply(Role::Server, &other);
    let teller = match announce {
        Announce::Signal => Role::Server,
        Announce::Subflow => Role::Client,
    };
    let receiver = match announce {
        Announce::Signal => Role::Client,
        Announce::Subflow => Role::Server,
    };
    for (address, id) in server_addresses(&environment).into_iter().zip(["1", "2"]) {
        let change = |flag: &str| {
            let arguments = ["mptcp", "endpoint", "change", "id", id, flag];
            environment.run(teller, "ip", &arguments);
        };
        let compare = |connection: &MptcpConnection| {
            for role in [Role::Client, Role::Server] {
                connection.wait_subflows(&environment, role, 2);
                expect_as_sockets(&environment, connection, role);
            }
        };
        let connection = MptcpConnection::joined(&environment, address);
        compare(&connection);
        let told = || environment.counter(receiver, "MPTcpExt", "MPPrioRx");
        for flag in ["backup", "nobackup"] {
            let before = told();
            change(flag);
            environment.wait_counter(receiver, "MPTcpExt", "MPPrioRx", before + 1);
            compare(&connection);
        }
        // From the start.
        change("backup");
        let second = MptcpConnection::joined(&environment, address);
        compare(&second);
        change("nobackup");

        let token = hex(connection.token(Role::Client));
        connection.client.shutdown(Shutdown::Write).unwrap();
        drop(connection);
        environment.wait_subflows(Role::Client, 2);
        let with = |more: &[&str]| {
            let list = listed(&environment, Role::Client, more);
            list.into_iter().find(|it| it["local_token"] == token)
        };
        eventually("it is over", || with(&[]).is_none().then_some(()));
        let over = with(&["--all"]).unwrap();
        let states = over["subflows"].as_array().unwrap().iter();
        for state in states.map(|it| it["state"].as_str().unwrap()) {
            assert!(["closing", "reset"].contains(&state), "{over:#}");
        }
        // The last ACK of a subflow that is closed already may leave by another device, and then
        // seems to be a TCP connection there.
        let mut left = listed(&environment, Role::Client, &[]);
        left.retain(|it| it["mptcp"] == true);
        assert_eq!(left.len(), 1, "{left:#?}");
        drop(second);
        environment.wait_subflows(Role::Client, 0);
    }
}

#[test]
fn as_the_sockets_when_the_client_joins() {
    as_the_sockets(Announce::Subflow);
}

#[test]
fn as_the_sockets_when_the_server_announces() {
    as_the_sockets(Announce::Signal);
}

/// The token of a subflow that joins is that of the first one, on whichever device that was.
#[test]
fn tokens_across_devices() {
    let environment = Environment::mptcp(2, Announce::Subflow);
    let address = server_addresses(&environment)[0];
    let joined = |connection: &MptcpConnection| {
        let port = connection.client_port();
        let list = listed(&environment, Role::Client, &[]);
        let of = |it: &Value| {
            let subflows = it["subflows"].as_array().unwrap();
            let known = |it: &Value| it["device"] == "path2" && it["local"]["port"] != port;
            subflows.iter().any(known)
        };
        let found = list.iter().find(|it| of(it));
        found.unwrap_or_else(|| panic!("{list:#?}")).clone()
    };
    // Where nothing saw the first handshake, only the other host's token is told.
    environment.apply(Role::Client, &record(&["path2"]));
    let connection = MptcpConnection::joined(&environment, address);
    let found = joined(&connection);
    assert_eq!(found["local_token"], Value::Null);
    assert_eq!(found["remote_token"], hex(connection.token(Role::Server)));
    assert_eq!(found["subflows"].as_array().unwrap().len(), 1);
    drop(connection);
    environment.wait_subflows(Role::Client, 0);
    // Another chain on another device, another action.
    let report = chain(
        &["path1"],
        &["xdp", "tc-egress"],
        json!([{ "action": "report" }]),
    );
    environment.apply(Role::Client, &report);
    let connection = MptcpConnection::joined(&environment, address);
    expect_as_sockets(&environment, &connection, Role::Client);
    // And it selects: all subflows, by either token.
    let packets = |token: u32| {
        let mut one = chain(&["path2"], &TC, json!([{ "action": "count" }]));
        one["chains"][0]["name"] = "one".into();
        one["chains"][0]["priority"] = (-1).into();
        one["chains"][0]["then"] = "continue".into();
        one["chains"][0]["selectors"] =
            json!([{ "selector": "mptcp_connection", "keys": [{ "token": hex(token) }] }]);
        environment.apply(Role::Client, &one);
        // Has the client send something on path 2.
        for flag in ["backup", "nobackup"] {
            let arguments = ["mptcp", "endpoint", "change", "id", "1", flag];
            environment.run(Role::Client, "ip", &arguments);
        }
        environment.packets(Role::Client, "one")
    };
    assert!(packets(connection.token(Role::Client)) > 0);
    environment.ok(Role::Client, &["delete", "one"]);
    assert!(packets(connection.token(Role::Server)) > 0);
    environment.ok(Role::Client, &["delete", "one"]);
    assert_eq!(packets(connection.token(Role::Server) ^ 1), 0);
}

/// What `ss` counts as sent by a socket, repeated bytes included.
fn bytes_sent(environment: &Environment, role: Role, local: SocketAddr) -> u64 {
    let table = environment.run(role, "ss", &["-tniHO"]);
    let line = table
        .lines()
        .find(|line| line.contains(&format!(" {local} ")))
        .unwrap_or_else(|| panic!("no {local} in {table}"));
    let mut words = line.split_whitespace();
    let found = words.find_map(|word| word.strip_prefix("bytes_sent:"));
    found.map_or(0, |number| number.parse().unwrap())
}

#[test]
fn plain_tcp() {
    const LENGTH: usize = 1 << 20;
    let environment = Environment::direct();
    for address in server_addresses(&environment) {
        // Without `record`, only MPTCP is known.
        environment.apply(
            Role::Client,
            &chain(&["path1"], &TC, json!([{ "action": "report" }])),
        );
        let unknown = Connection::open(&environment, address, 0);
        unknown.exchange(1);
        assert_eq!(
            listed(&environment, Role::Client, &["--all"]),
            [Value::Null; 0]
        );
        environment.apply(Role::Client, &record(&["path1"]));
        let mut connection = Connection::open(&environment, address, 0);
        connection.transfer(LENGTH);
        let local = connection.client.local_addr().unwrap();
        let remote = connection.client.peer_addr().unwrap();
        let found = eventually("all is counted", || {
            let list = listed(&environment, Role::Client, &[]);
            let [found] = list.as_slice() else {
                panic!("{list:#?}");
            };
            let subflow = &found["subflows"][0];
            let bytes = ["local", "remote"].map(|end| subflow[end]["bytes"].as_u64().unwrap());
            let sockets = [
                bytes_sent(&environment, Role::Client, local),
                bytes_sent(&environment, Role::Server, remote),
            ];
            (bytes == sockets).then(|| found.clone())
        });
        assert_eq!(found["mptcp"], false);
        assert_eq!(
            (&found["local_token"], &found["remote_token"]),
            (&Value::Null, &Value::Null)
        );
        let subflow = &found["subflows"][0];
        assert_eq!(socket_address(&subflow["local"]), local);
        assert_eq!(socket_address(&subflow["remote"]), remote);
        assert_eq!(
            (&subflow["state"], &subflow["joined"]),
            (&json!("open"), &json!(false))
        );
        for end in ["local", "remote"] {
            let end = &subflow[end];
            let packets = end["packets"].as_u64().unwrap();
            // Counted as on the wire, though they came in larger pieces.
            assert!(packets > LENGTH as u64 / 1460, "{subflow:#}");
            assert!(end["rtt_us"]["min"].as_f64().unwrap() > 0.0, "{subflow:#}");
        }
        let Connection { client, server } = connection;
        drop(client);
        assert_eq!((&server).read(&mut [0; 1]).unwrap(), 0);
        drop(server);
        assert_eq!(listed(&environment, Role::Client, &[]), [Value::Null; 0]);
        let over = listed(&environment, Role::Client, &["--all"]);
        assert_eq!(over[0]["subflows"][0]["state"], "closing", "{over:#?}");
        drop(unknown);
        environment.ok(Role::Client, &["delete", "--all"]);
    }
}

/// Rates and round-trip times of two paths, as the kernel's sockets have them.
#[test]
fn rates_and_round_trips() {
    let rates = [20.0, 10.0];
    let delays = [20.0, 5.0];
    let environment = Environment::with(&Options {
        rate: rates.map(|rate| rate as u32).to_vec(),
        delay: delays
            .map(|delay| Duration::from_secs_f64(delay / 1e3))
            .to_vec(),
        ..mptcp_options(2, Announce::Subflow)
    });
    environment.apply(Role::Client, &record(&["path1", "path2"]));
    let connection = MptcpConnection::joined(&environment, server_addresses(&environment)[1]);
    connection.exchange(10).unwrap();
    let token = connection.token(Role::Client);
    while_sending(&connection, 1 << 20, Duration::ZERO, || {
        eventually("rates and round trips are close", || {
            let sent = || connection.subflows(&environment, Role::Client);
            let (before, begin) = (sent(), Instant::now());
            let list = environment.json(Role::Client, &["connections", "--json", "--over", "1s"]);
            let (after, seconds) = (sent(), begin.elapsed().as_secs_f64());
            let mut list = list.as_array().unwrap().iter();
            let found = list.find(|it| it["local_token"] == hex(token)).unwrap();
            let of = |at: usize, member: &str| found["subflows"][at]["local"][member].clone();
            let close = (0..2).map(|at| {
                let rate = of(at, "bits_per_second").as_f64().unwrap() / 1e6;
                let bytes = after[at].bytes_sent - before[at].bytes_sent;
                let own_rate = bytes as f64 * 8.0 / 1e6 / seconds;
                let rtt = of(at, "rtt_us")["min"].as_f64().unwrap_or(0.0) / 1e3;
                let own_rtt = after[at].min_rtt.as_secs_f64() * 1e3;
                eprintln!("{rate} and {own_rate} Mbit/s, {rtt} and {own_rtt} ms");
                (own_rate * 0.6..own_rate * 1.6).contains(&rate)
                    && (rates[at] * 0.2..rates[at] * 1.2).contains(&rate)
                    && (delays[at]..delays[at] * 1.5).contains(&rtt)
                    && (own_rtt * 0.8..own_rtt * 1.25).contains(&rtt)
            });
            close.fold(true, |all, one| all & one).then_some(())
        });
    });
}

// ---- keys ------------------------------------------------------------------------------------

/// Both keys of each connection that was captured: the third packet has them.
fn keys(captures: &mut Captures) -> Vec<[u8; 8]> {
    let mut keys = Vec::new();
    for frame in captures.frames() {
        let start = frame.windows(4).position(|it| it == [30, 20, 0x01, 0x01]);
        if let Some(at) = start {
            keys.push(frame[at + 4..at + 12].try_into().unwrap());
            keys.push(frame[at + 12..at + 20].try_into().unwrap());
        }
    }
    keys
}

fn pins(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.path().is_dir() {
            true => found.extend(pins(&entry.path())),
            false => found.push(entry.path()),
        }
    }
    found
}

/// The names of the pinned maps that hold any of the keys.
fn holders(folder: &Path, keys: &[[u8; 8]]) -> BTreeSet<String> {
    let has = |bytes: &[u8]| keys.iter().any(|key| bytes.windows(8).any(|it| it == key));
    let mut holders = BTreeSet::new();
    for pin in pins(folder) {
        let Ok(map) = sys::open_pin(&pin) else {
            continue;
        };
        let Ok(info) = sys::map_info(&map) else {
            continue;
        };
        let holds = match info.kind {
            sys::MapType::RingBuf => has(&ring(&map, info.max_entries)),
            sys::MapType::ProgArray => false,
            _ => {
                let entries = sys::map_dump(&map).unwrap();
                entries.iter().any(|(key, value)| has(key) || has(value))
            }
        };
        if holds {
            holders.insert(pin.file_name().unwrap().to_string_lossy().into_owned());
        }
    }
    holders
}

/// All of a ring buffer, read or not.
fn ring(map: &OwnedFd, size: u32) -> Vec<u8> {
    const PAGE: i64 = 4096;
    let size = size as usize;
    // Behind the consumer's page and the producer's.
    // SAFETY: a new mapping of what the kernel lets be read.
    let begin = unsafe {
        let (read, shared) = (libc::PROT_READ, libc::MAP_SHARED);
        libc::mmap(
            std::ptr::null_mut(),
            size,
            read,
            shared,
            map.as_raw_fd(),
            2 * PAGE,
        )
    };
    assert_ne!(begin, libc::MAP_FAILED);
    // SAFETY: so many bytes are mapped, until they have been copied.
    unsafe {
        let bytes = std::slice::from_raw_parts(begin.cast::<u8>(), size).to_vec();
        libc::munmap(begin, size);
        bytes
    }
}

/// What any command tells.
fn outputs(environment: &Environment, follower: &Follower) -> String {
    let mut all = follower.lines().join("\n");
    for arguments in [
        &["connections", "--all", "--over", "1ms"][..],
        &["connections", "--all", "--json", "--over", "1ms"],
        &["list", "--json"],
        &["list"],
    ] {
        let output = environment.cli(Role::Client, arguments);
        all += &succeeded("a command", &output);
    }
    for chain in environment
        .json(Role::Client, &["list", "--json"])
        .as_array()
        .unwrap()
    {
        let name = chain["name"].as_str().unwrap();
        all += &environment.ok(Role::Client, &["show", name]);
        all += &environment.ok(Role::Client, &["show", name, "--json"]);
    }
    all.to_lowercase()
}

#[test]
fn keys_are_kept_only_while_needed() {
    let environment = Environment::mptcp(2, Announce::Subflow);
    let address = server_addresses(&environment)[0];
    let both = ["path1", "path2"];
    let mut captures = Captures::start(&environment, Role::Client);
    // All that looks at connections and saves of their packets, but for what needs keys.
    let hooks = ["xdp", "tc-egress"];
    let actions = json!([
        { "action": "record" },
        { "action": "report" },
        { "action": "hold_add_addr" },
        { "action": "restore_add_addr" },
        { "action": "mp_prio", "backup": false },
        { "action": "remove_addr", "id": 77 },
    ]);
    environment.apply(Role::Client, &chain(&both, &hooks, actions));
    let follower = Follower::start(&environment, Role::Client, &[]);
    let talk = || {
        exact(|| {
            // Nothing follows the handshake of the first: its third packet is the last.
            drop(MptcpConnection::open(&environment, address, 0));
            let connection = MptcpConnection::joined(&environment, address);
            connection.exchange(2)?;
            Ok(connection)
        })
    };
    let connection = talk();
    let silent = MptcpConnection::open(&environment, address, 0);
    follower.wait("mp_capable", 9);
    let known = keys(&mut captures);
    assert!(known.len() >= 6, "{known:?}");
    let nobody = BTreeSet::new();
    assert_eq!(holders(environment.folder(), &known), nobody);
    let told = outputs(&environment, &follower);
    let forms = |key: &[u8; 8]| {
        let numbers = [u64::from_be_bytes(*key), u64::from_le_bytes(*key)];
        numbers
            .map(|number| [format!("{number:x}"), number.to_string()])
            .concat()
    };
    for form in known.iter().flat_map(forms) {
        assert!(!told.contains(&form), "{form}: {told}");
    }
    drop((connection, silent));

    let add = json!([{ "action": "add_subflow", "address": "10.0.2.1", "id": 9 }]);
    let mut add = chain(&both, &["tc-egress"], add);
    add["chains"][0]["name"] = "add".into();
    environment.apply(Role::Client, &add);
    let connection = talk();
    let known = keys(&mut captures);
    let only = BTreeSet::from(["pcn_keys".to_owned()]);
    assert_eq!(holders(environment.folder(), &known), only);
    for pin in pins(environment.folder())
        .iter()
        .filter(|it| it.ends_with("pcn_keys"))
    {
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(pin), mode(pin.parent().unwrap())), (0o600, 0o700));
        assert_eq!(mode(environment.folder()), 0o700);
    }
    let told = outputs(&environment, &follower);
    for form in known.iter().flat_map(forms) {
        assert!(!told.contains(&form), "{form}: {told}");
    }
    // The other chain stays: keys do not.
    let objects = Objects::below(environment.folder());
    environment.ok(Role::Client, &["delete", "add"]);
    assert_eq!(holders(environment.folder(), &known), nobody);
    assert!(
        pins(environment.folder())
            .iter()
            .all(|it| !it.ends_with("pcn_keys"))
    );
    eventually("the map of keys is gone", || {
        let maps = objects.alive().maps.into_iter();
        let mut maps = maps.filter_map(|id| sys::map_by_id(id).and_then(sys::map_info).ok());
        maps.all(|info| !info.name.contains("keys")).then_some(())
    });
    environment.ok(Role::Client, &["delete", "--all"]);
    assert!(!environment.folder().exists());
    drop(connection);
}
