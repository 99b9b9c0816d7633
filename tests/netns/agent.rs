// SPDX-License-Identifier: MIT OR Apache-2.0
//! Devices that go and come: chains outlive them, and an agent attaches them again.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use policy_chain::engine::apply;
use policy_chain::engine::store::Store;
use policy_chain::engine::{sys, wanted};
use policy_chain::netns::Namespace;
use policy_chain::testbed::Role;
use serde_json::{Value, json};

use crate::common::agent::Agent;
use crate::common::{BpfFolder, Environment, PROGRAM, eventually, says, succeeded, text};

const PORT: u16 = 9999;
/// An agent that is told of a device is faster, one that only looks every five seconds is not: most
/// of the time, for other work on this machine delays some.
const SOON: Duration = Duration::from_secs(2);

/// A chain that counts the datagrams of [`send`].
fn chain(name: &str, devices: &[&str], hook: &str, mode: &str) -> Value {
    let attach: Vec<Value> = devices
        .iter()
        .map(|device| json!({ "device": device, "hook": hook, "mode": mode }))
        .collect();
    json!({
        "name": name,
        "attach": attach,
        "selectors": [{ "selector": "service", "local_port": PORT, "protocol": "udp" }],
    })
}

fn file(chains: &[Value]) -> Value {
    json!({ "version": 1, "chains": chains })
}

/// Makes a device with a peer, called after it, in the server's namespace.
fn make(environment: &Environment, number: u8, name: &str) {
    let script = format!(
        "link add {name} address 02:00:00:00:99:{number:02x} type veth peer name peer-{name}\n\
         link set {name} up\n\
         link set peer-{name} up\n\
         address add 10.99.{number}.1/24 dev peer-{name}\n\
         neighbour add 10.99.{number}.2 lladdr 02:00:00:00:99:{number:02x} dev peer-{name} \
         nud permanent\n"
    );
    environment
        .namespace(Role::Server)
        .ip_batch(&script)
        .unwrap();
}

fn remove(environment: &Environment, name: &str) {
    let script = format!("link del {name}\n");
    environment
        .namespace(Role::Server)
        .ip_batch(&script)
        .unwrap();
}

/// Has a device receive datagrams.
fn send(environment: &Environment, number: u8, count: usize) {
    let server = environment.namespace(Role::Server);
    let send = || {
        let socket = UdpSocket::bind((format!("10.99.{number}.1"), 0)).unwrap();
        for _ in 0..count {
            let to = (format!("10.99.{number}.2"), PORT);
            socket.send_to(b"count me", to).unwrap();
        }
    };
    server.enter(send).unwrap();
}

/// The devices that a chain runs on, in order.
fn devices(environment: &Environment, chain: &str) -> Vec<String> {
    let listed = environment.listed(Role::Server, chain);
    let places = listed["attach"].as_array().unwrap().iter();
    places
        .map(|place| place["device"].as_str().unwrap().to_owned())
        .collect()
}

/// Waits until a chain runs on these devices; how long that took.
fn expect_on(environment: &Environment, chain: &str, expected: &[&str]) -> Duration {
    let start = Instant::now();
    eventually(&format!("{chain} on {expected:?}"), || {
        (devices(environment, chain) == expected).then_some(start.elapsed())
    })
}

fn expect_counted(environment: &Environment, chain: &str, count: u64) {
    eventually(&format!("{chain} counts {count}"), || {
        (environment.packets(Role::Server, chain) == count).then_some(())
    });
}

/// A chain on a named device, and one on a pattern; their devices go and come.
fn devices_come_and_go(hook: &str, mode: &str) {
    let environment = Environment::direct();
    make(&environment, 1, "d1");
    let chains = environment.file(
        "chains.json",
        &file(&[
            chain("named", &["d1"], hook, mode),
            chain("pattern", &["e?", "f*"], hook, mode),
        ]),
    );
    let output = environment.cli(Role::Server, &["apply", &chains]);
    succeeded("apply", &output);
    let warnings = text(&output.stderr);
    for pattern in ["e?", "f*"] {
        let warning = format!(
            "no device matches \"{pattern}\" yet; `policy-chain agent` attaches as they come"
        );
        says(&warnings, &[&warning]);
    }
    let listed = environment.listed(Role::Server, "pattern");
    let absent = json!([{ "device": "e?", "hook": hook }, { "device": "f*", "hook": hook }]);
    assert_eq!(listed["absent"], absent);

    let agent = Agent::start(&environment, Role::Server, "agent");
    let mut waits = Vec::new();
    for round in 0..2 {
        send(&environment, 1, 5);
        expect_counted(&environment, "named", 5);
        remove(&environment, "d1");
        let listed = environment.listed(Role::Server, "named");
        let absent = json!([{ "device": "d1", "hook": hook }]);
        assert_eq!(
            (&listed["attach"], &listed["absent"]),
            (&json!([]), &absent)
        );
        make(&environment, 1, "d1");
        waits.push(expect_on(&environment, "named", &["d1"]));
        let listed = environment.listed(Role::Server, "named");
        assert_eq!(listed["absent"], json!([]));
        let told = format!("attached named to d1 {hook}\n");
        eventually("the agent tells", || {
            (agent.said().matches(&told).count() == round + 1).then_some(())
        });
    }
    make(&environment, 2, "e2");
    waits.push(expect_on(&environment, "pattern", &["e2"]));
    make(&environment, 3, "e3");
    waits.push(expect_on(&environment, "pattern", &["e2", "e3"]));
    send(&environment, 2, 3);
    send(&environment, 3, 4);
    expect_counted(&environment, "pattern", 7);
    // Renamed to what matches.
    make(&environment, 4, "x4");
    let rename = "link set x4 down\nlink set x4 name e4\nlink set e4 up\n";
    environment
        .namespace(Role::Server)
        .ip_batch(rename)
        .unwrap();
    waits.push(expect_on(&environment, "pattern", &["e2", "e3", "e4"]));
    waits.sort();
    assert!(waits[waits.len() / 2] < SOON, "{waits:?}");
    remove(&environment, "e2");
    expect_on(&environment, "pattern", &["e3", "e4"]);
    // Without the pattern it leaves what only that matched.
    environment.apply(
        Role::Server,
        &file(&[chain("pattern", &["e3"], hook, mode)]),
    );
    assert_eq!(devices(&environment, "pattern"), ["e3"]);
    assert_eq!(devices(&environment, "named"), ["d1"]);
    // Forgotten is forgotten.
    remove(&environment, "d1");
    environment.ok(Role::Server, &["delete", "named", "pattern"]);
    make(&environment, 1, "d1");
    assert!(!environment.folder().exists());
    agent.stop(Signal::SIGTERM);
    assert!(!environment.folder().exists());
}

#[test]
fn devices_come_and_go_under_xdp() {
    devices_come_and_go("xdp", "native");
}

#[test]
fn devices_come_and_go_under_tcx() {
    devices_come_and_go("tc-ingress", "tcx");
}

#[test]
fn devices_come_and_go_under_clsact() {
    devices_come_and_go("tc-ingress", "clsact");
}

/// Chains do not depend on it, and it takes up what happened without it.
#[test]
fn agents_end_and_start() {
    let environment = Environment::direct();
    make(&environment, 1, "d1");
    environment.apply(Role::Server, &file(&[chain("t", &["d*"], "xdp", "auto")]));
    let agent = Agent::start(&environment, Role::Server, "first");
    let message = environment.fails(Role::Server, 1, &["agent"]);
    says(
        &message,
        &["cannot be the agent", "another one is there", "ss -xap"],
    );
    // By another name it is the same folder.
    let detour = environment.folder().join("..").join(environment.folder());
    let output = environment
        .namespace(Role::Server)
        .command(PROGRAM)
        .args(["agent", "--bpffs"])
        .arg(detour)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    // In another namespace it is another one.
    Agent::start(&environment, Role::Client, "client").stop(Signal::SIGINT);
    agent.kill();
    send(&environment, 1, 5);
    expect_counted(&environment, "t", 5);
    make(&environment, 2, "d2");
    remove(&environment, "d1");
    let listed = environment.listed(Role::Server, "t");
    assert_eq!(listed["absent"], json!([{ "device": "d2", "hook": "xdp" }]));
    let agent = Agent::start(&environment, Role::Server, "second");
    expect_on(&environment, "t", &["d2"]);
    send(&environment, 2, 5);
    expect_counted(&environment, "t", 5);
    agent.stop(Signal::SIGTERM);
    send(&environment, 2, 5);
    expect_counted(&environment, "t", 10);
}

/// One device that cannot be had keeps none of the others waiting, and is had later.
#[test]
fn a_taken_device_is_attached_when_it_is_free() {
    let environment = Environment::direct();
    let other = BpfFolder::new();
    let other_cli = |arguments: &[&str]| {
        let mut command = environment.namespace(Role::Server).command(PROGRAM);
        let output = command
            .arg("--bpffs")
            .arg(other.path())
            .args(arguments)
            .output();
        succeeded(&format!("{arguments:?}"), &output.unwrap());
    };
    environment.apply(Role::Server, &file(&[chain("t", &["d*"], "xdp", "auto")]));
    make(&environment, 1, "d1");
    let foreign = file(&[chain("foreign", &["d1"], "xdp", "auto")]);
    other_cli(&["apply", &environment.file("foreign.json", &foreign)]);
    let agent = Agent::start(&environment, Role::Server, "agent");
    make(&environment, 2, "d2");
    expect_on(&environment, "t", &["d2"]);
    eventually("the agent says what is wrong", || {
        agent
            .said()
            .contains("d1 runs another XDP program")
            .then_some(())
    });
    let listed = environment.listed(Role::Server, "t");
    assert_eq!(listed["absent"], json!([{ "device": "d1", "hook": "xdp" }]));
    other_cli(&["delete", "--all"]);
    eventually("the device is taken", || {
        (devices(&environment, "t") == ["d1", "d2"]).then_some(())
    });
    assert_eq!(agent.said().matches("another XDP program").count(), 1);
}

/// The library's side of it: nothing to do is cheap, and seen as such.
#[test]
fn reattaching_is_idempotent() {
    let environment = Environment::direct();
    let server = environment.namespace(Role::Server);
    let within = |work: &(dyn Fn() + Sync)| server.enter(work).unwrap();
    let needs = || {
        let store = Store::open(environment.folder()).unwrap();
        !wanted::missing(&store).unwrap().is_empty()
    };
    within(&|| assert!(!needs(), "without anything applied"));
    make(&environment, 1, "d1");
    let both = [
        chain("a", &["d1"], "xdp", "auto"),
        chain("b", &["d*", "lo"], "tc-ingress", "auto"),
    ];
    environment.apply(Role::Server, &file(&both));
    within(&|| assert!(!needs(), "all is attached"));
    let generations = environment.generations();
    within(&|| {
        let store = Store::lock(environment.folder()).unwrap();
        assert_eq!(apply::reattach(&store).unwrap(), apply::Report::default());
    });
    assert_eq!(environment.generations(), generations);
    remove(&environment, "d1");
    within(&|| assert!(!needs(), "no device"));
    make(&environment, 1, "d1");
    within(&|| {
        assert!(needs());
        let store = Store::lock(environment.folder()).unwrap();
        let report = apply::reattach(&store).unwrap();
        let mut attached: Vec<(&str, &str)> = report
            .attached
            .iter()
            .map(|(chain, device, _)| (chain.as_str(), device.as_str()))
            .collect();
        attached.sort();
        assert_eq!(attached, [("a", "d1"), ("b", "d1")]);
        assert_eq!(report.failures, []);
        assert!(!needs());
    });
    assert_eq!(devices(&environment, "b"), ["d1", "lo"]);
}

/// Has an attachment look as if another build had made it.
fn disguise(store: &Store) {
    for attachment in store.attachments().unwrap() {
        let record = sys::open_pin(&attachment.generation().join("record")).unwrap();
        let record = sys::map_read_bytes(&record).unwrap();
        let mut record: Value = serde_json::from_slice(&record).unwrap();
        record["made_from"]["program"] = "another".into();
        store
            .replace_record(&attachment.folder, attachment.number, &record)
            .unwrap();
    }
}

/// What another build of the program attached stays when a device comes; `apply` replaces it.
#[test]
fn an_agent_leaves_the_programs_of_another_build() {
    let environment = Environment::direct();
    let server = environment.namespace(Role::Server);
    make(&environment, 1, "d1");
    let chains = file(&[chain("t", &["d*"], "xdp", "auto")]);
    environment.apply(Role::Server, &chains);
    server
        .enter(|| disguise(&Store::lock(environment.folder()).unwrap()))
        .unwrap();
    make(&environment, 2, "d2");
    let generation = |device: &str| {
        let listed = environment.listed(Role::Server, "t");
        let places = listed["attach"].as_array().unwrap().clone();
        let place = places.into_iter().find(|place| place["device"] == device);
        place.unwrap()["generation"].clone()
    };
    server
        .enter(|| {
            let store = Store::lock(environment.folder()).unwrap();
            let report = apply::reattach(&store).unwrap();
            assert_eq!((report.attached.len(), report.attachments.len()), (1, 1));
        })
        .unwrap();
    assert_eq!((generation("d1"), generation("d2")), (json!(1), json!(1)));
    environment.apply(Role::Server, &chains);
    assert_eq!((generation("d1"), generation("d2")), (json!(2), json!(1)));
}

/// The folder goes with the last chain, whoever waits for its lock.
#[test]
fn a_folder_may_go_while_commands_wait_for_it() {
    let environment = Environment::direct();
    let chains = environment.file("t.json", &file(&[chain("t", &["path1"], "xdp", "auto")]));
    let repeat = |arguments: &[&str]| {
        for _ in 0..10 {
            environment.ok(Role::Server, arguments);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| repeat(&["apply", &chains]));
            scope.spawn(|| repeat(&["delete", "--all"]));
        }
    });
    environment.ok(Role::Server, &["delete", "--all"]);
    assert!(!environment.folder().exists());
}

/// One change for all, though one of them cannot be had.
#[test]
fn many_devices_come_at_once() {
    const COUNT: u8 = 20;
    let environment = Environment::direct();
    let server = environment.namespace(Role::Server);
    environment.apply(Role::Server, &file(&[chain("t", &["d*"], "xdp", "auto")]));
    for number in 1..=COUNT {
        make(&environment, number, &format!("d{number}"));
    }
    let reattach = || {
        let store = Store::lock(environment.folder()).unwrap();
        let start = Instant::now();
        (apply::reattach(&store).unwrap(), start.elapsed())
    };
    let (report, took) = server.enter(reattach).unwrap();
    assert_eq!(report.attached.len(), usize::from(COUNT), "{report:?}");
    assert_eq!(report.attachments.len(), usize::from(COUNT), "{report:?}");
    assert_eq!(devices(&environment, "t").len(), usize::from(COUNT));
    // One more, with all the others there.
    remove(&environment, "d1");
    make(&environment, 1, "d1");
    let (report, one) = server.enter(reattach).unwrap();
    assert_eq!(report.attached.len(), 1, "{report:?}");
    assert!(took < 8 * one, "{took:?}, {one:?}");
    // One of several is taken.
    let other = BpfFolder::new();
    for number in [3, 4, 5] {
        remove(&environment, &format!("d{number}"));
        make(&environment, number, &format!("d{number}"));
    }
    let foreign = file(&[chain("foreign", &["d4"], "xdp", "auto")]);
    let mut command = server.command(PROGRAM);
    command.arg("--bpffs").arg(other.path()).arg("apply");
    command.arg(environment.file("foreign.json", &foreign));
    succeeded("apply", &command.output().unwrap());
    let (report, _) = server.enter(reattach).unwrap();
    let mut attached: Vec<&str> = report.attached.iter().map(|it| it.1.as_str()).collect();
    attached.sort();
    assert_eq!(attached, ["d3", "d5"]);
    let failed: Vec<&str> = report
        .failures
        .iter()
        .map(|it| it.device.as_str())
        .collect();
    assert_eq!(failed, ["d4"]);
}

/// What waits for a device counts as there: by names, for what it uses, and for `--prune`.
#[test]
fn absent_chains_are_chains() {
    let environment = Environment::direct();
    let mut waiting = chain("waiting", &["no*"], "xdp", "auto");
    waiting["selectors"] = json!([{ "selector": "service", "set": "ports" }]);
    waiting["actions"] = json!([{ "action": "learn", "set": "seen" }]);
    waiting["then"] = json!({ "goto": "sub" });
    let sub = json!({ "name": "sub", "then": "drop" });
    let content = json!({
        "version": 1,
        "sets": {
            "ports": { "kind": "port", "size": 5 },
            "seen": { "kind": "flow", "size": 5 },
        },
        "chains": [waiting, sub],
    });
    environment.apply(Role::Server, &content);
    environment.ok(Role::Server, &["show", "waiting"]);
    let message = environment.fails(Role::Server, 1, &["delete", "sub"]);
    says(&message, &["sub is in use", "waiting goes to it"]);
    let message = environment.fails(Role::Server, 1, &["set", "delete", "ports"]);
    says(&message, &["ports is in use", "waiting"]);
    // From another namespace, too.
    let nothing = environment.file("nothing.json", &file(&[]));
    let message = environment.fails(Role::Client, 1, &["apply", "--prune", &nothing]);
    says(&message, &["is in use", "waiting", "waits for a device"]);
    for kept in ["ports", "seen"] {
        let mut rest = content.clone();
        rest["sets"] = json!({ kept: content["sets"][kept] });
        rest["chains"] = json!([content["chains"][1]]);
        let rest = environment.file("rest.json", &rest);
        let message = environment.fails(Role::Client, 1, &["apply", "--prune", &rest]);
        let gone = if kept == "seen" { "ports" } else { "seen" };
        says(&message, &["the set", gone, "waits for a device"]);
    }
    environment.ok(Role::Client, &["delete", "--all"]);
    assert_eq!(
        environment.listed(Role::Server, "waiting")["attach"],
        json!([])
    );
    let everywhere = environment.json(Role::Client, &["list", "--all-netns", "--json"]);
    let waits = everywhere
        .as_array()
        .unwrap()
        .iter()
        .find(|chain| chain["name"] == "waiting");
    assert_eq!(
        waits.unwrap()["absent"],
        json!([{ "device": "no*", "hook": "xdp" }])
    );
    let report = environment.json(Role::Server, &["apply", "--prune", "--json", &nothing]);
    let removed = json!([
        { "name": "sub", "change": "remove" },
        { "name": "waiting", "change": "remove" },
    ]);
    assert_eq!(report["chains"], removed);
    assert!(!environment.folder().exists());

    environment.apply(
        Role::Server,
        &file(&[chain("waiting", &["no*"], "xdp", "auto")]),
    );
    let said = environment.ok(Role::Server, &["delete", "waiting"]);
    assert_eq!(said, "remove     chain  waiting\n");
    assert!(!environment.folder().exists());
}

/// What waits in a namespace that is gone is forgotten; in one that is there it is not.
#[test]
fn namespaces_go_while_chains_wait() {
    let environment = Environment::direct();
    // Called as the router that the testbed does not have, it goes with the testbed.
    let name = format!("pc-{}-router", environment.testbed.name());
    let namespace = Namespace::create(&name).unwrap();
    let waiting = environment.file("w.json", &file(&[chain("waits", &["no*"], "xdp", "auto")]));
    let apply = namespace
        .command(PROGRAM)
        .arg("--bpffs")
        .arg(environment.folder())
        .args(["apply", &waiting])
        .output()
        .unwrap();
    succeeded("apply", &apply);
    let state = || Store::open(environment.folder()).unwrap().state().unwrap();
    let waits = || state().attached.keys().any(|id| id.inode == namespace.id());
    assert!(waits());
    environment.apply(
        Role::Server,
        &file(&[chain("t", &["path1"], "xdp", "auto")]),
    );
    assert!(waits());
    let id = namespace.id();
    Namespace::remove(&name).unwrap();
    let list = environment.json(Role::Server, &["list", "--all-netns", "--json"]);
    assert_eq!(list.as_array().unwrap().len(), 1, "{list}");
    environment.apply(
        Role::Server,
        &file(&[chain("t", &["path1"], "xdp", "auto")]),
    );
    assert!(!state().attached.keys().any(|other| other.inode == id));
    environment.ok(Role::Server, &["delete", "--all"]);
    assert!(!environment.folder().exists());
}
