// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sets that chains fill, and elements that expire.

use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use policy_chain::testbed::Role;
use serde_json::{Value, json};

use crate::common::agent::Agent;
use crate::common::{Environment, Files, PROGRAM, eventually, failed, says};

const PORT: u16 = 9999;
/// When an element of two seconds has expired: times are whole seconds, and rounded.
const GONE: Duration = Duration::from_millis(3300);

/// What comes to a port is learnt; what is in the set, is counted before.
fn chains(hook: &str, expire: Option<&str>, size: u32) -> Value {
    let attach = json!([{ "device": "path1", "hook": hook }]);
    let mut learn = json!({ "action": "learn", "set": "seen" });
    if let Some(expire) = expire {
        learn["expire"] = expire.into();
    }
    json!({
        "version": 1,
        "sets": { "seen": { "kind": "flow", "size": size } },
        "chains": [
            {
                "name": "known",
                "attach": attach,
                "priority": 1,
                "selectors": [{ "selector": "flow", "set": "seen" }],
                "actions": [{ "action": "count" }],
                "then": "continue",
            },
            {
                "name": "learn",
                "attach": attach,
                "priority": 2,
                "selectors": [{ "selector": "service", "port": PORT, "protocol": "udp" }],
                "actions": [learn],
            },
        ],
    })
}

/// A socket of the client that sends to the server, and one of the server that takes it.
struct Talk {
    client: UdpSocket,
    server: UdpSocket,
}

impl Talk {
    fn new(environment: &Environment, ipv6: bool) -> Talk {
        let path = environment.testbed.path(1).unwrap();
        let addresses = match ipv6 {
            false => [path.client.ipv4.into(), path.server.ipv4.into()],
            true => [path.client.ipv6.into(), path.server.ipv6.into()],
        };
        let bind = |role, port| {
            let at = addresses[usize::from(role == Role::Server)];
            let bind = || UdpSocket::bind(SocketAddr::new(at, port)).unwrap();
            environment.namespace(role).enter(bind).unwrap()
        };
        let client = bind(Role::Client, 0);
        let server = bind(Role::Server, PORT);
        client.connect(server.local_addr().unwrap()).unwrap();
        Talk { client, server }
    }

    fn say(&self, times: usize) {
        for _ in 0..times {
            self.client.send(b"word").unwrap();
            assert_eq!(self.server.recv(&mut [0; 10]).unwrap(), 4);
        }
    }

    /// Its element, of a set at the server.
    fn element(&self) -> Value {
        let (local, remote) = (
            self.server.local_addr().unwrap(),
            self.client.local_addr().unwrap(),
        );
        json!({
            "local": local.ip(),
            "remote": remote.ip(),
            "local_port": local.port(),
            "remote_port": remote.port(),
            "protocol": "udp",
        })
    }
}

fn listed(environment: &Environment) -> Vec<Value> {
    let set = environment.json(Role::Server, &["set", "list", "seen", "--json"]);
    set.as_array().unwrap().clone()
}

fn add(environment: &Environment, element: &Value) {
    let text = element.to_string();
    environment.ok(Role::Server, &["set", "add", "seen", &text]);
}

/// The whole seconds that an element has left.
fn seconds(element: &Value) -> u64 {
    let left = element["expire"].as_str().unwrap();
    left.strip_suffix('s').unwrap().parse().unwrap()
}

fn known(environment: &Environment) -> u64 {
    environment.packets(Role::Server, "known")
}

#[test]
fn flows_are_known_until_they_expire() {
    let environment = Environment::direct();
    for hook in ["xdp", "tc-ingress"] {
        environment.apply(Role::Server, &chains(hook, Some("2s"), 10));
        let talks = [false, true].map(|ipv6| Talk::new(&environment, ipv6));
        for (talk, before) in talks.iter().zip([0, 2]) {
            assert_eq!(known(&environment), before);
            talk.say(3);
            // All but the first.
            assert_eq!(known(&environment), before + 2, "{hook}");
        }
        let last = Instant::now();
        let with_expiry = |talk: &Talk| {
            let mut element = talk.element();
            element["expire"] = "2s".into();
            element
        };
        let wanted = talks.each_ref().map(with_expiry);
        let mut set = listed(&environment);
        for element in &mut set {
            assert!((1..=3).contains(&seconds(element)), "{element}");
            element["expire"] = "2s".into();
        }
        assert_eq!(set.len(), 2);
        assert!(wanted.iter().all(|it| set.contains(it)), "{set:?}");
        // Its packets keep it there, as long as this machine does not keep them back.
        let before = known(&environment);
        let (mut said, mut spoke, mut longest) = (0, last, Duration::ZERO);
        while last.elapsed() < GONE {
            talks[0].say(1);
            said += 1;
            longest = longest.max(spoke.elapsed());
            spoke = Instant::now();
            thread::sleep(Duration::from_millis(100));
        }
        let missed = before + said - known(&environment);
        let kept_back = longest > Duration::from_millis(900);
        assert!(missed == 0 || kept_back, "{hook}: {missed}, {longest:?}");
        let before = known(&environment);
        // No agent removes it, but nobody knows it any more.
        assert_eq!(listed(&environment).len(), 1);
        talks[1].say(1);
        assert_eq!(known(&environment), before, "{hook}");
        // And from then on it is known again.
        talks[1].say(1);
        assert_eq!(known(&environment), before + 1, "{hook}");
        environment.ok(Role::Server, &["delete", "--all"]);
    }
}

/// What users store is theirs, whatever passes, as long as it is for good or has an argument.
#[test]
fn elements_of_users_are_left_alone() {
    let environment = Environment::direct();
    environment.apply(Role::Server, &chains("tc-ingress", Some("5s"), 2));
    let talks = [false, true].map(|ipv6| Talk::new(&environment, ipv6));
    let mut elements = talks.each_ref().map(Talk::element);
    elements[1]["arg"] = 7.into();
    elements[1]["expire"] = "1h".into();
    elements.iter().for_each(|it| add(&environment, it));
    talks.iter().for_each(|talk| talk.say(2));
    let mut set = listed(&environment);
    for element in &mut set {
        if element.get("expire").is_some() {
            assert!((3540..=3601).contains(&seconds(element)), "{element}");
        }
        if let Some(left) = element.get_mut("expire") {
            *left = "1h".into();
        }
    }
    assert_eq!(set.len(), 2);
    assert!(elements.iter().all(|it| set.contains(it)), "{set:?}");
    assert_eq!(known(&environment), 4);
    // There is no room for another.
    let path = environment.testbed.path(1).unwrap();
    let third = {
        let bind = || UdpSocket::bind((path.client.ipv4, 0)).unwrap();
        environment.namespace(Role::Client).enter(bind).unwrap()
    };
    for _ in 0..3 {
        third.send_to(b"word", (path.server.ipv4, PORT)).unwrap();
        talks[0].server.recv(&mut [0; 10]).unwrap();
    }
    assert_eq!(environment.reason(Role::Server, "learn", "set_full"), 3);
    assert_eq!((known(&environment), listed(&environment).len()), (4, 2));
}

#[test]
fn the_agent_removes_what_has_expired() {
    let environment = Environment::direct();
    environment.apply(Role::Server, &chains("xdp", Some("1s"), 10));
    let talk = Talk::new(&environment, false);
    talk.say(1);
    let other = |port: u16, expire: Option<&str>| {
        let mut element = talk.element();
        element["remote_port"] = port.into();
        if let Some(expire) = expire {
            element["expire"] = expire.into();
        }
        add(&environment, &element);
    };
    other(1, Some("1s"));
    other(2, Some("1h"));
    other(3, None);
    let compact = "local=10.0.1.2,remote=10.0.1.1,local_port=1,remote_port=4,expire=2s";
    environment.ok(Role::Server, &["set", "add", "seen", compact]);
    assert_eq!(listed(&environment).len(), 5);
    thread::sleep(GONE);
    // What has expired and is still there is not told, so that what is told can be stored again.
    let list = environment.ok(Role::Server, &["set", "list", "seen"]);
    assert_eq!(list.lines().count(), 2, "{list}");
    let list = environment.files.write("seen.list", list);
    let list = list.to_str().unwrap();
    environment.ok(Role::Server, &["set", "load", "seen", list]);
    // It looks every few seconds, at first at once.
    let agent = Agent::start(&environment, Role::Server, "agent");
    let ports = || {
        let set = listed(&environment);
        let mut ports: Vec<u64> = set
            .iter()
            .map(|it| it["remote_port"].as_u64().unwrap())
            .collect();
        ports.sort();
        ports
    };
    eventually("only what lasts is left", || {
        (ports() == [2, 3]).then_some(())
    });
    eventually("the agent says so", || {
        agent
            .said()
            .contains("removed 3 expired from the set seen")
            .then_some(())
    });
    agent.stop(Signal::SIGTERM);
}

/// For good, where the chain does not say how long.
#[test]
fn flows_stay_without_expiry() {
    let environment = Environment::direct();
    environment.apply(Role::Server, &chains("tc-ingress", None, 10));
    let talk = Talk::new(&environment, true);
    talk.say(2);
    assert_eq!(listed(&environment), [talk.element()]);
    assert_eq!(known(&environment), 1);
    for wrong in ["0s", "500ms", "soon", "-1s"] {
        let mut element = talk.element();
        element["expire"] = wrong.into();
        let text = element.to_string();
        let message = environment.fails(Role::Server, 2, &["set", "add", "seen", &text]);
        says(
            &message,
            &["expire", wrong, "a duration of at least \"1s\""],
        );
    }
}

#[test]
fn mistakes() {
    for (change, words) in [
        (
            json!({ "expire": "500ms" }),
            &["actions[0].expire", "500ms", "1s"][..],
        ),
        (
            json!({ "expire": "9000h" }),
            &["actions[0].expire", "9000h", "8760h"],
        ),
        (
            json!({ "expire": 5 }),
            &["actions[0].expire", "5", "a duration"],
        ),
        (
            json!({ "set": "sen" }),
            &["actions[0].set", "no such set", "did you mean \"seen\"?"],
        ),
        (json!({ "set": null }), &["actions[0]", "set"]),
        (
            json!({ "set": "ports" }),
            &["actions[0].set", "\"ports\"", "flow"],
        ),
        (json!({ "keys": [] }), &["actions[0].keys"]),
    ] {
        let mut file = chains("xdp", None, 1);
        file["sets"]["ports"] = json!({ "kind": "port", "size": 1 });
        let action = &mut file["chains"][1]["actions"][0];
        for (name, value) in change.as_object().unwrap() {
            match value {
                Value::Null => drop(action.as_object_mut().unwrap().remove(name)),
                value => action[name] = value.clone(),
            }
        }
        let files = Files::new();
        let path = files.write("bad.json", file.to_string());
        let output = Command::new(PROGRAM)
            .arg("check")
            .arg(path)
            .output()
            .unwrap();
        says(&failed(&change.to_string(), 2, &output), words);
    }
    // An inline list is for good.
    let mut file = chains("xdp", None, 1);
    file["chains"][0]["selectors"] = json!([{
        "selector": "flow",
        "keys": [{
            "local": "10.0.0.1", "remote": "10.0.0.2", "local_port": 1, "remote_port": 2,
            "expire": "5s",
        }],
    }]);
    let files = Files::new();
    let path = files.write("bad.json", file.to_string());
    let output = Command::new(PROGRAM)
        .arg("check")
        .arg(path)
        .output()
        .unwrap();
    says(
        &failed("keys", 2, &output),
        &["selectors[0].keys[0].expire", "\"expire\""],
    );
}
