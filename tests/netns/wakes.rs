// SPDX-License-Identifier: MIT OR Apache-2.0
//! The agent wakes subflows, whatever their devices are and whether they are up. What is known of
//! them is put into the maps by hand, so that it takes no connections.

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;
use nix::sys::signal::Signal;
use policy_chain::agent::inject::Injector;
use policy_chain::engine::bpf::bytes_of;
use policy_chain::engine::bpf::types::{saved_ack, subflow, subflow_flags};
use policy_chain::engine::store::Store;
use policy_chain::engine::sys;
use policy_chain::hook::Hook;
use policy_chain::monitor::connections;
use policy_chain::testbed::Role;
use serde_json::{Value, json};

use super::devices::open_tun;
use crate::common::agent::Agent;
use crate::common::capture::{Capture, Segment, parse};
use crate::common::{Environment, eventually};

const REMOTE_PORT: u16 = 443;
const MPTCP: u8 = 30;
/// Of a segment that adds the option.
const MP_PRIO: u8 = 0x50;
/// How often a subflow is woken.
const TRIES: usize = 3;

/// Chain `t`, which waits for a packet of each subflow.
fn chain(devices: &[&str], hooks: &[&str]) -> Value {
    let places = devices
        .iter()
        .flat_map(|device| hooks.iter().map(move |hook| (device, hook)));
    let attach: Vec<Value> = places
        .map(|(device, hook)| json!({ "device": device, "hook": hook }))
        .collect();
    json!({ "version": 1, "chains": [{
        "name": "t",
        "attach": attach,
        "actions": [{ "action": "mp_prio", "backup": true }],
    }] })
}

/// A subflow of this host's 10.9.0.1 (fd09::1) with 10.9.0.2 (fd09::2).
struct Flow {
    port: u16,
    v6: bool,
    flags: u32,
}

impl Flow {
    fn new(port: u16) -> Flow {
        Flow {
            port,
            v6: false,
            flags: subflow_flags::SUBFLOW_ACCEPTED.0 | subflow_flags::SUBFLOW_ESTABLISHED.0,
        }
    }

    fn addresses(&self) -> [Ipv6Addr; 2] {
        [1, 2].map(|host| match self.v6 {
            true => Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, host),
            false => std::net::Ipv4Addr::new(10, 9, 0, host as u8).to_ipv6_mapped(),
        })
    }

    /// Its name in the maps. The first address sorts before the second.
    fn id(&self) -> Vec<u8> {
        let addresses = self.addresses().map(|address| address.octets());
        let ports = [self.port, REMOTE_PORT].map(u16::to_be_bytes);
        [addresses.concat(), ports.concat()].concat()
    }

    /// The name of the headers that an end sent.
    fn ack(&self, sender: u32) -> Vec<u8> {
        [self.id(), sender.to_ne_bytes().to_vec()].concat()
    }

    /// A segment of an end, without a link header.
    fn packet(&self, sender: usize) -> Vec<u8> {
        let addresses = self.addresses();
        let (from, to) = (addresses[sender], addresses[1 - sender]);
        let mut ports = [self.port, REMOTE_PORT];
        ports.rotate_left(sender);
        let builder = match (from.to_canonical(), to.to_canonical()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                PacketBuilder::ipv4(from.octets(), to.octets(), 64)
            }
            _ => PacketBuilder::ipv6(from.octets(), to.octets(), 64),
        };
        let mut packet = Vec::new();
        let tcp = builder.tcp(ports[0], ports[1], 1000, 100).ack(2000);
        tcp.write(&mut packet, &[]).unwrap();
        packet
    }

    /// Puts it into the maps of a device, with what an end has last sent behind a link header.
    fn put(&self, environment: &Environment, device: &str, sender: u32, link: &[u8]) {
        let mut known = subflow {
            flags: self.flags,
            ..Default::default()
        };
        known.ends.iter_mut().for_each(|end| end.data_seen = 2);
        let bytes = [link, &self.packet(sender as usize)].concat();
        let mut ack = saved_ack {
            length: bytes.len() as u32,
            ip: link.len() as u32,
            transport: bytes.len() as u32 - 20,
            sequence_end: 1000,
            version: if self.v6 { 6 } else { 4 },
            ingress: u8::from(sender == 1),
            ..Default::default()
        };
        ack.headers[..bytes.len()].copy_from_slice(&bytes);
        let update = |name: &str, key: &[u8], value: &[u8]| {
            sys::map_update(kept(environment, device, name), key, value, 0).unwrap();
        };
        update("pcd_subflows", &self.id(), bytes_of(&known));
        update("pcd_acks", &self.ack(sender), bytes_of(&ack));
    }
}

/// A map of a device with an egress chain in the server's namespace.
fn kept(environment: &Environment, device: &str, name: &str) -> std::os::fd::OwnedFd {
    let find = || {
        let store = Store::open(environment.folder()).unwrap();
        let attachments = store.attachments().unwrap();
        let found = attachments
            .iter()
            .find(|it| it.place.device == device && it.place.hook == Hook::TcEgress);
        found.unwrap().kept(name).unwrap()
    };
    environment.namespace(Role::Server).enter(find).unwrap()
}

/// Devices with a peer each; only the second is up.
fn one_is_down() -> Environment {
    let environment = Environment::direct();
    let script = "link add a1 type veth peer name peer-a1\n\
                  link add b2 type veth peer name peer-b2\n\
                  link set peer-a1 up\nlink set peer-b2 up\nlink set b2 up\n";
    let server = environment.namespace(Role::Server);
    server.ip_batch(script).unwrap();
    environment.apply(Role::Server, &chain(&["a1", "b2"], &["tc-egress"]));
    let link = [&[0x02; 12][..], &[8, 0]].concat();
    for device in ["a1", "b2"] {
        Flow::new(1).put(&environment, device, 0, &link);
    }
    environment
}

fn woken(capture: &mut Capture) -> usize {
    capture.with_port(REMOTE_PORT).len()
}

fn is_asked(segment: &Segment) -> bool {
    segment
        .option(MPTCP)
        .is_some_and(|option| option[0] & 0xf0 == MP_PRIO)
}

/// What cannot be sent by one device is sent later, and keeps the other one not waiting.
#[test]
fn a_device_that_is_down_wakes_later() {
    let environment = one_is_down();
    let server = environment.namespace(Role::Server);
    let [mut down, mut up] = ["peer-a1", "peer-b2"].map(|it| Capture::start(server, it));
    let agent = Agent::start(&environment, Role::Server, "agent");
    eventually("the other one is woken", || {
        (woken(&mut up) == TRIES).then_some(())
    });
    assert!(is_asked(&up.with_port(REMOTE_PORT)[0]));
    // More often than it would be tried if tries were spent.
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!((woken(&mut down), woken(&mut up)), (0, TRIES));
    server.ip_batch("link set a1 up\n").unwrap();
    let begin = Instant::now();
    eventually("it is woken once it is up", || {
        (woken(&mut down) == TRIES).then_some(())
    });
    assert!(begin.elapsed() < Duration::from_secs(5));
    assert!(is_asked(&down.with_port(REMOTE_PORT)[0]));
    assert!(!agent.said().contains("cannot"), "{}", agent.said());
    agent.stop(Signal::SIGTERM);
}

/// Who wakes by the library is told of failures that are some, after all else was done.
#[test]
fn one_failure_leaves_the_rest() {
    let environment = one_is_down();
    let server = environment.namespace(Role::Server);
    server
        .ip_batch("link set a1 up\nlink set a1 mtu 68\n")
        .unwrap();
    // Longer than the device sends.
    let long = Flow::new(2);
    long.put(&environment, "a1", 0, &[&[0x02; 12][..], &[8, 0]].concat());
    let acks = kept(&environment, "a1", "pcd_acks");
    let key = long.ack(0);
    let saved = sys::map_lookup(&acks, &key, size_of::<saved_ack>());
    let mut saved = saved.unwrap().unwrap();
    let length = std::mem::offset_of!(saved_ack, length);
    saved[length..length + 4].copy_from_slice(&250u32.to_ne_bytes());
    sys::map_update(&acks, &key, &saved, 0).unwrap();
    let [mut first, mut second] = ["peer-a1", "peer-b2"].map(|it| Capture::start(server, it));
    let look = || {
        let store = Store::open(environment.folder()).unwrap();
        Injector::new(environment.folder()).look(&store)
    };
    let error = server.enter(look).unwrap().unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("tc-egress of a1"), "{error}");
    assert!(error.contains("Message too long"), "{error}");
    eventually("the others are woken", || {
        (woken(&mut first) == 1 && woken(&mut second) == 1).then_some(())
    });
}

/// Saved headers go with their subflows.
#[test]
fn what_is_over_is_forgotten() {
    let environment = one_is_down();
    let link = [&[0x02; 12][..], &[8, 0]].concat();
    let over = Flow {
        flags: subflow_flags::SUBFLOW_ACCEPTED.0 | subflow_flags::SUBFLOW_FIN.0,
        ..Flow::new(2)
    };
    over.put(&environment, "b2", 0, &link);
    // Of the direction that no chain waits in.
    over.put(&environment, "b2", 1, &link);
    let gone = Flow::new(3);
    gone.put(&environment, "b2", 0, &link);
    let subflows = kept(&environment, "b2", "pcd_subflows");
    assert!(sys::map_delete(&subflows, &gone.id()).unwrap());
    let acks = kept(&environment, "b2", "pcd_acks");
    assert_eq!(sys::map_dump(&acks).unwrap().len(), 4);
    let agent = Agent::start(&environment, Role::Server, "agent");
    eventually("only what lives is left", || {
        (sys::map_dump(&acks).unwrap().keys == Flow::new(1).ack(0)).then_some(())
    });
    // Later, too.
    std::thread::sleep(Duration::from_secs(1));
    over.put(&environment, "b2", 0, &link);
    eventually("the agent looks again", || {
        (sys::map_dump(&acks).unwrap().len() == 1).then_some(())
    });
    agent.stop(Signal::SIGTERM);
}

/// Packets of a device without a link header, in both directions.
#[test]
fn without_a_link_header() {
    let environment = Environment::direct();
    let namespace = environment.namespace(Role::Server);
    let mut tun = match namespace.enter(|| open_tun(0)).unwrap() {
        Ok(tun) => tun,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Unsupported) => {
            eprintln!("not tested: this kernel has no tun devices ({error})");
            return;
        }
        Err(error) => panic!("tun: {error}"),
    };
    let script = "address add 10.9.0.1/24 dev tun0\n\
                  address add fd09::1/64 dev tun0 nodad\n\
                  link set tun0 up\n";
    namespace.ip_batch(script).unwrap();
    environment.apply(
        Role::Server,
        &chain(&["tun0"], &["tc-ingress", "tc-egress"]),
    );
    for v6 in [false, true] {
        let flow = |port| Flow {
            v6,
            ..Flow::new(port)
        };
        flow(1).put(&environment, "tun0", 0, &[]);
        flow(2).put(&environment, "tun0", 1, &[]);
    }
    let agent = Agent::start(&environment, Role::Server, "agent");
    let mut packet = [0; 2000];
    // By version, what is sent, and the answer to what comes in for a connection nobody has.
    let mut seen = [None, None, None, None];
    eventually("packets leave by tun0", || {
        let length = tun.read(&mut packet).ok()?;
        // Flags, protocol.
        let frame = [&[0; 12][..], &packet[2..length]].concat();
        let segment = parse(&frame)?;
        let at = usize::from(segment.source.is_ipv6()) * 2 + usize::from(segment.source_port - 1);
        assert!(segment.checksum_is_right, "{segment:?}");
        seen[at].get_or_insert(segment);
        seen.iter().all(Option::is_some).then_some(())
    });
    for (segment, number) in seen.iter().flatten().zip(0..) {
        let is_answer = number % 2 == 1;
        assert_eq!(is_asked(segment), !is_answer, "{segment:?}");
        assert_eq!(segment.flags, if is_answer { 4 } else { 16 }, "{segment:?}");
    }
    let shown = environment.json(Role::Server, &["show", "t", "--json"]);
    for place in shown["nodes"].as_array().unwrap() {
        assert!(place["nodes"][0]["packets"].as_u64() >= Some(2), "{shown}");
    }
    assert!(!agent.said().contains("cannot"), "{}", agent.said());
    agent.stop(Signal::SIGTERM);
}

/// Whoever looks has no lock: generations are replaced under its eyes, and devices go.
#[test]
fn looking_while_chains_are_replaced() {
    let environment = one_is_down();
    let server = environment.namespace(Role::Server);
    server.ip_batch("link set a1 up\n").unwrap();
    let done = AtomicBool::new(false);
    let looks = std::thread::scope(|scope| {
        let looking = scope.spawn(|| {
            let look = || {
                let mut injector = Injector::new(environment.folder());
                let mut looks = 0;
                while !done.load(Ordering::Relaxed) {
                    let store = Store::open(environment.folder()).unwrap();
                    injector.look(&store).unwrap();
                    let found = connections::read(&store).unwrap();
                    assert_eq!(found.len(), 2, "{found:#?}");
                    looks += 1;
                }
                looks
            };
            server.enter(look).unwrap()
        });
        for round in 0..6 {
            let mut file = chain(&["a1", "b2"], &["tc-egress"]);
            file["chains"][0]["actions"][0]["backup"] = (round % 2 == 1).into();
            environment.apply(Role::Server, &file);
        }
        done.store(true, Ordering::Relaxed);
        looking.join().unwrap()
    });
    assert!(looks > 6, "{looks}");
}

/// A set that cannot be read is said once, and the others are looked at.
#[test]
fn each_set_expires_by_itself() {
    let environment = Environment::direct();
    let set = json!({ "kind": "port", "size": 20_000 });
    let goto = |set: &str| json!({ "selector": "service", "set": set });
    environment.apply(
        Role::Server,
        &json!({
            "version": 1,
            "sets": { "a": set, "b": set },
            "chains": [{
                "name": "t",
                "attach": [{ "device": "path1", "hook": "tc-ingress" }],
                "selectors": [goto("a"), goto("b")],
            }],
        }),
    );
    let elements: Vec<String> = (1..=10_000)
        .map(|port| format!("port={port},expire={}", if port > 3 { "1s" } else { "1h" }))
        .collect();
    let elements = environment.files.write("ports", elements.join("\n"));
    for set in ["a", "b"] {
        environment.ok(
            Role::Server,
            &["set", "load", set, elements.to_str().unwrap()],
        );
    }
    std::fs::remove_file(environment.folder().join("sets/a")).unwrap();
    std::thread::sleep(Duration::from_millis(2100));
    let agent = Agent::start(&environment, Role::Server, "agent");
    eventually("the set is emptied", || {
        let said = agent.said();
        said.contains("removed 9997 expired from the set b")
            .then_some(())
    });
    let left = environment.json(Role::Server, &["set", "list", "b", "--json"]);
    assert_eq!(left.as_array().map(Vec::len), Some(3), "{left}");
    std::thread::sleep(Duration::from_secs(6));
    let said = agent.said();
    assert_eq!(said.matches("expired from a").count(), 1, "{said}");
    agent.stop(Signal::SIGTERM);
}
