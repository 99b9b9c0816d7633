// SPDX-License-Identifier: MIT OR Apache-2.0
//! What chains report is what tshark reads in captures of the same devices; and everyone who
//! follows gets all of it, whoever reads the ring buffer.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::net::{IpAddr, Shutdown, SocketAddr};

use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt::Linger};
use policy_chain::testbed::{Announce, Role};
use serde_json::{Value, json};

use crate::common::agent::Agent;
use crate::common::mptcp::{MptcpConnection, connect};
use crate::common::spawned::Spawned;
use crate::common::traffic::{Connection, listen, server_addresses};
use crate::common::{DEADLINE, Environment, eventually, failed, says, text};
use crate::follower::{Follower, followers};
use crate::tshark::{Captures, comparable};

/// A chain on both paths, at these hooks.
fn chain(name: &str, hooks: &[&str], actions: Value) -> Value {
    let devices = ["path1", "path2"].into_iter();
    let attach = devices.flat_map(|device| {
        let places = hooks.iter();
        places.map(move |hook| json!({ "device": device, "hook": hook }))
    });
    json!({
        "version": 1,
        "chains": [{
            "name": name,
            "attach": attach.collect::<Vec<_>>(),
            "actions": actions,
        }],
    })
}

fn watch(hooks: &[&str]) -> Value {
    chain("watch", hooks, json!([{ "action": "report" }]))
}

/// The server's endpoint of the family; of those on path 2, IPv4 is the first.
fn endpoint(environment: &Environment, address: IpAddr, change: &[&str]) {
    let number = if address.is_ipv4() { "1" } else { "2" };
    let second = &environment.testbed.path(2).unwrap().server;
    let announced = match address {
        IpAddr::V4(_) => second.ipv4.to_string(),
        IpAddr::V6(_) => second.ipv6.to_string(),
    };
    let arguments = match change {
        ["add"] => vec!["add", &announced, "id", number, "dev", "path2", "signal"],
        ["delete"] => vec!["delete", "id", number],
        flags => [&["change", "id", number], flags].concat(),
    };
    let all = [&["mptcp", "endpoint"][..], &arguments].concat();
    environment.run(Role::Server, "ip", &all);
}

/// Waits until a host has counted one more than before.
fn one_more(environment: &Environment, role: Role, counter: &str, cause: impl FnOnce()) {
    let before = environment.counter(role, "MPTcpExt", counter);
    cause();
    environment.wait_counter(role, "MPTcpExt", counter, before + 1);
}

fn close_orderly(environment: &Environment, connection: &MptcpConnection) {
    for (from, mut to) in [
        (&connection.client, &connection.server),
        (&connection.server, &connection.client),
    ] {
        from.shutdown(Shutdown::Write).unwrap();
        assert_eq!(to.read(&mut [0; 1]).unwrap(), 0);
    }
    for role in [Role::Client, Role::Server] {
        environment.wait_subflows(role, 0);
    }
}

/// Connections that say everything there is to say.
fn script(environment: &Environment, address: IpAddr) {
    let change = |flags: &[&str]| endpoint(environment, address, flags);

    let connection = MptcpConnection::joined(environment, address);
    one_more(environment, Role::Client, "MPPrioRx", || {
        change(&["backup"])
    });
    one_more(environment, Role::Client, "MPPrioRx", || {
        change(&["nobackup"])
    });
    connection.exchange(3).unwrap();
    one_more(environment, Role::Client, "RmAddr", || change(&["delete"]));
    connection.wait_subflows(environment, Role::Client, 1);
    connection.exchange(1).unwrap();
    close_orderly(environment, &connection);
    change(&["add"]);

    // Joins as backup; the next thing that the server says on path 2 is the last.
    change(&["backup"]);
    let connection = MptcpConnection::joined(environment, address);
    let reset = json!([{ "action": "reset_subflow", "reason": "middlebox", "transient": true }]);
    let mut reset = chain("reset", &["tc-egress"], reset);
    let attach = reset["chains"][0]["attach"].as_array_mut().unwrap();
    attach.remove(0);
    environment.apply(Role::Server, &reset);
    one_more(environment, Role::Client, "MPRstRx", || {
        change(&["nobackup"])
    });
    environment.ok(Role::Server, &["delete", "reset"]);
    connection.exchange(1).unwrap();
    // Without another word.
    one_more(environment, Role::Server, "MPFastcloseRx", || {
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        setsockopt(&connection.client, Linger, &linger).unwrap();
        drop(connection);
    });

    let listener = listen(environment, SocketAddr::new(address, 0));
    let client = connect(environment, listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    let connection = Connection { client, server };
    connection.exchange(1);
    drop(connection.client);
    assert_eq!((&connection.server).read(&mut [0; 1]).unwrap(), 0);
}

type Sequences = BTreeMap<String, Vec<Value>>;

/// By device, direction and flow: between those there is no order.
fn sequences(events: &[Value]) -> Sequences {
    let mut sequences = Sequences::new();
    for event in events {
        let members = [
            "device",
            "direction",
            "source",
            "source_port",
            "destination_port",
        ];
        let name = members.map(|member| event[member].to_string()).join(" ");
        sequences.entry(name).or_default().push(comparable(event));
    }
    sequences
}

fn expect_equal(reported: &Sequences, captured: &Sequences) {
    let names = |of: &Sequences| of.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(reported), names(captured));
    for (name, reported) in reported {
        let captured = &captured[name];
        let pairs = reported.iter().zip(captured).enumerate();
        for (at, (one, other)) in pairs {
            assert_eq!(one, other, "{name}, event {at}: reported, and captured");
        }
        assert_eq!(
            reported.len(),
            captured.len(),
            "{name}: {reported:#?} {captured:#?}"
        );
    }
}

/// What was reported, once that is as much as was captured.
fn reported_and_captured(follower: &Follower, captures: &mut Captures) -> (Vec<Value>, Vec<Value>) {
    let limit = std::time::Instant::now() + DEADLINE / 2;
    loop {
        let captured = captures.events();
        let reported = follower.events();
        let late = std::time::Instant::now() > limit;
        if late || sequences(&reported) == sequences(&captured) {
            return (reported, captured);
        }
    }
}

fn as_captured(hooks: &[&str]) {
    let environment = Environment::mptcp(2, Announce::Signal);
    environment.apply(Role::Client, &watch(hooks));
    let mut captures = Captures::start(&environment, Role::Client);
    let follower = Follower::start(&environment, Role::Client, &[]);
    for address in server_addresses(&environment) {
        script(&environment, address);
    }
    let (reported, captured) = reported_and_captured(&follower, &mut captures);
    expect_equal(&sequences(&reported), &sequences(&captured));
    assert!(reported.iter().all(|it| it["chain"] == "watch"));
    // All there is was said, in both families.
    for version in [4, 6] {
        let of = |it: &&Value| {
            let source = it["source"].as_str().unwrap();
            source.contains(':') == (version == 6)
        };
        let said: BTreeSet<String> = reported
            .iter()
            .filter(of)
            .map(|it| {
                let members = [
                    "event",
                    "direction",
                    "stage",
                    "how",
                    "echo",
                    "backup",
                    "cause",
                    "reason",
                ];
                let words = members.iter().filter_map(|member| match &it[member] {
                    Value::Null => None,
                    Value::String(word) => Some(word.clone()),
                    other => Some(format!("{member}:{other}")),
                });
                words.collect::<Vec<_>>().join(" ")
            })
            .collect();
        for wanted in [
            "mp_capable out syn",
            "mp_capable in syn_ack",
            "mp_capable out ack",
            "mp_join out syn backup:false",
            "mp_join in syn_ack backup:false",
            "mp_join in syn_ack backup:true",
            "mp_join out ack",
            "add_addr in echo:false",
            "add_addr out echo:true",
            "mp_prio in backup:true",
            "mp_prio in backup:false",
            "remove_addr in",
            "mp_tcprst in reason:6",
            "mp_fastclose out",
            "data_fin in",
            "data_fin out",
            "fallback in syn_ack",
            "close in fin",
            "close out fin",
            "close in rst",
            "close out rst",
        ] {
            assert!(said.contains(wanted), "IPv{version}: {wanted}: {said:#?}");
        }
    }
}

#[test]
fn xdp_reports_what_is_captured() {
    as_captured(&["xdp", "tc-egress"]);
}

#[test]
fn tc_reports_what_is_captured() {
    as_captured(&["tc-ingress", "tc-egress"]);
}

/// A connection that says a few things.
fn talk(environment: &Environment) {
    let connection = MptcpConnection::joined(environment, server_addresses(environment)[0]);
    connection.exchange(1).unwrap();
    close_orderly(environment, &connection);
}

/// The reader of the ring buffer may be anyone, and end at any time.
#[test]
fn all_followers_get_all() {
    let environment = Environment::mptcp(2, Announce::Subflow);
    environment.apply(Role::Client, &watch(&["xdp", "tc-egress"]));
    let mut captures = Captures::start(&environment, Role::Client);
    // It reads.
    let agent = Agent::start(&environment, Role::Client, "agent");
    let mut all: Vec<Follower> = (0..3)
        .map(|_| Follower::start(&environment, Role::Client, &[]))
        .collect();
    assert_eq!(
        followers(&environment, Role::Client),
        3,
        "the agent does not follow"
    );
    let mut agent = Some(agent);
    for _ in 0..3 {
        talk(&environment);
        eventually("all have the same", || {
            let lines = all[0].lines();
            let same = all.iter().all(|follower| follower.lines() == lines);
            (same && sequences(&all[0].events()) == sequences(&captures.events())).then_some(())
        });
        // Of what it has read and not told, nobody would hear: all of it is told.
        match agent.take() {
            Some(agent) => agent.kill(),
            None => all.remove(0).kill(),
        }
    }
    // With another agent, whom the last one still serves.
    let agent = Agent::start(&environment, Role::Client, "another");
    talk(&environment);
    let (reported, captured) = reported_and_captured(&all[0], &mut captures);
    expect_equal(&sequences(&reported), &sequences(&captured));
    let times: Vec<&str> = reported
        .iter()
        .map(|it| it["time"].as_str().unwrap())
        .collect();
    assert!(
        times.iter().collect::<BTreeSet<_>>().len() > 20,
        "{times:?}"
    );
    agent.stop(Signal::SIGINT);
}

/// The ring buffer stays as long as one chain reports; then there is another one.
#[test]
fn chains_change_while_followed() {
    let environment = Environment::mptcp(2, Announce::Subflow);
    let message = environment.fails(Role::Client, 1, &["events"]);
    says(
        &message,
        &["there are no events", "the action `report`", "--wait"],
    );
    let follower = Follower::start(&environment, Role::Client, &["--wait"]);
    environment.apply(Role::Client, &watch(&["xdp", "tc-egress"]));
    let mut captures = Captures::start(&environment, Role::Client);
    for round in 1..4 {
        talk(&environment);
        let mut changed = watch(&["xdp", "tc-egress"]);
        changed["chains"][0]["priority"] = round.into();
        environment.apply(Role::Client, &changed);
    }
    talk(&environment);
    let (reported, captured) = reported_and_captured(&follower, &mut captures);
    expect_equal(&sequences(&reported), &sequences(&captured));
    assert_eq!(environment.reason(Role::Client, "watch", "event_lost"), 0);
    // Another ring buffer, and what it had before it was found.
    environment.ok(Role::Client, &["delete", "watch"]);
    environment.apply(Role::Client, &watch(&["tc-ingress", "tc-egress"]));
    talk(&environment);
    let (reported, captured) = reported_and_captured(&follower, &mut captures);
    expect_equal(&sequences(&reported), &sequences(&captured));
}

/// `--count`, `--timeout`, and lines for people.
/// By this process, and so by those that it starts.
fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|it| it.strip_prefix("SigIgn:"));
    let ignored = u64::from_str_radix(ignored.unwrap().trim(), 16).unwrap();
    ignored >> (Signal::SIGHUP as u64 - 1) & 1 == 1
}

#[test]
fn following_ends() {
    let environment = Environment::mptcp(2, Announce::Subflow);
    environment.apply(Role::Client, &watch(&["tc-ingress", "tc-egress"]));
    let quiet = |arguments: &[&str]| {
        let output = environment.cli(Role::Client, &[&["events"], arguments].concat());
        assert_eq!(text(&output.stdout) + &text(&output.stderr), "");
        output.status.code()
    };
    assert_eq!(quiet(&["--timeout", "50ms"]), Some(0));
    let few = ["events", "--timeout", "50ms", "--count", "2"];
    let message = environment.fails(Role::Client, 1, &few);
    says(
        &message,
        &["0 of 2 events came", "--timeout", "allow more time"],
    );
    // `nohup make test` has it ignored, and that stays so.
    let hangup = (!hangup_is_ignored()).then_some(Signal::SIGHUP);
    for signal in [Signal::SIGINT, Signal::SIGTERM].into_iter().chain(hangup) {
        let follower = Follower::start(&environment, Role::Client, &[]);
        assert_eq!(follower.end(signal), Some(0), "{signal}");
    }
    let mut command = environment.command(Role::Client, &["events", "--count", "7"]);
    let printed = environment.files.path().join("people");
    let mut people = Spawned::printing(&mut command, printed);
    eventually("it follows", || {
        (followers(&environment, Role::Client) == 1).then_some(())
    });
    let connection = MptcpConnection::joined(&environment, server_addresses(&environment)[0]);
    close_orderly(&environment, &connection);
    assert_eq!(people.wait().code(), Some(0));
    let lines = people.said();
    assert_eq!(lines.lines().count(), 7, "{lines}");
    assert!(
        lines.lines().all(|line| line.chars().count() <= 100),
        "{lines}"
    );
    says(
        &lines,
        &["mp_capable syn v1", "mp_join syn id 1 token", "path2"],
    );
    // In the server's namespace nothing reports.
    let server = environment.cli(Role::Server, &["events", "--timeout", "50ms"]);
    says(&failed("events", 1, &server), &["there are no events"]);
}
