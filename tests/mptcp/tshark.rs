// SPDX-License-Identifier: MIT OR Apache-2.0
//! What tshark makes of captured frames, told in the terms of `events --json`.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::process::Command;

use policy_chain::testbed::Role;
use serde_json::{Map, Value, json};

use crate::common::capture::Capture;
use crate::common::{Environment, Files, succeeded};

/// What can be of interest.
const FILTER: &str = "tcp.flags.syn == 1 || tcp.flags.fin == 1 || tcp.flags.reset == 1 || \
                      tcp.options.mptcp.subtype";
/// RFC 8684, 3.6.
const REASONS: [&str; 7] = [
    "unspecified",
    "mptcp_specific",
    "lack_of_resources",
    "administratively_prohibited",
    "too_much_outstanding_data",
    "unacceptable_performance",
    "middlebox_interference",
];

/// Captures on all devices of a host.
pub struct Captures {
    devices: Vec<Device>,
    files: Files,
}

struct Device {
    name: String,
    /// That of what it sends.
    mac: [u8; 6],
    capture: Capture,
}

impl Captures {
    pub fn start(environment: &Environment, role: Role) -> Captures {
        let paths = environment.testbed.describe().paths.iter();
        let ends = paths.map(|path| match role {
            Role::Client => &path.client,
            _ => &path.server,
        });
        let devices = ends.map(|end| Device {
            name: end.device.clone(),
            mac: end.mac,
            capture: Capture::start(environment.namespace(role), &end.device),
        });
        Captures {
            devices: devices.collect(),
            files: Files::new(),
        }
    }

    /// All events so far, those of one device after the other's, without time and chain.
    pub fn events(&mut self) -> Vec<Value> {
        let mut packets = Vec::new();
        for device in &mut self.devices {
            let frames = device.capture.frames();
            let file = self.files.write("capture.pcap", pcap(frames));
            for packet in tshark(file.to_str().unwrap()) {
                let number: usize = text(&packet["frame"]["frame.number"]).parse().unwrap();
                let direction = match frames[number - 1][6..12] == device.mac {
                    true => "out",
                    false => "in",
                };
                packets.push(Packet::new(&device.name, direction, packet));
            }
        }
        let mut known = Known::default();
        let events = packets.iter().flat_map(|packet| packet.events(&mut known));
        events.collect()
    }

    /// The frames of all devices.
    pub fn frames(&mut self) -> impl Iterator<Item = &[u8]> {
        let devices = self.devices.iter_mut();
        devices.flat_map(|device| device.capture.frames().iter().map(Vec::as_slice))
    }
}

/// A capture file of Ethernet frames.
fn pcap(frames: &[Vec<u8>]) -> Vec<u8> {
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4u32, 4 << 16 | 2, 0, 0, 262_144, 1] {
        file.extend(word.to_le_bytes());
    }
    for frame in frames {
        let length = frame.len() as u32;
        for word in [0, 0, length, length] {
            file.extend(word.to_le_bytes());
        }
        file.extend(frame);
    }
    file
}

/// The layers of each packet of interest.
fn tshark(file: &str) -> Vec<Value> {
    let output = Command::new("tshark")
        .args(["-n", "-r", file, "-T", "json", "--no-duplicate-keys"])
        .args(["-Y", FILTER])
        .output()
        .unwrap_or_else(|error| panic!("tshark: {error}"));
    let printed: Value = serde_json::from_str(&succeeded("tshark", &output)).unwrap();
    let packets = printed.as_array().unwrap().iter();
    packets
        .map(|packet| packet["_source"]["layers"].clone())
        .collect()
}

/// Device, source and destination.
type Flow = (String, SocketAddr, SocketAddr);

/// What the packets before told.
#[derive(Default)]
struct Known {
    /// What `connection` is.
    tokens: HashMap<Flow, u64>,
    /// That of a SYN-ACK with MP_CAPABLE. It is not told before the third packet, which has both.
    offered: HashMap<Flow, u64>,
    /// The tokens of both hosts of a connection, by either.
    peers: HashMap<u64, u64>,
    /// Flows of which a SYN had an option of MPTCP.
    asked: HashSet<Flow>,
    /// Those whose SYN had MP_CAPABLE, and is not answered.
    waiting: HashSet<Flow>,
}

struct Packet {
    device: String,
    direction: &'static str,
    source: SocketAddr,
    destination: SocketAddr,
    tcp: Value,
}

impl Packet {
    fn new(device: &str, direction: &'static str, layers: Value) -> Packet {
        let tcp = &layers["tcp"];
        let end = |which: &str| {
            let address = match layers.get("ip") {
                Some(ip) => text(&ip[format!("ip.{which}")]),
                None => text(&layers["ipv6"][format!("ipv6.{which}")]),
            };
            let port = text(&tcp[format!("tcp.{which}port")]);
            SocketAddr::new(address.parse().unwrap(), port.parse().unwrap())
        };
        Packet {
            device: device.to_owned(),
            direction,
            source: end("src"),
            destination: end("dst"),
            tcp: tcp.clone(),
        }
    }

    fn flag(&self, name: &str) -> bool {
        text(&self.tcp["tcp.flags_tree"][format!("tcp.flags.{name}")]) == "1"
    }

    fn sender(&self) -> Flow {
        (self.device.clone(), self.source, self.destination)
    }

    fn receiver(&self) -> Flow {
        (self.device.clone(), self.destination, self.source)
    }

    fn events(&self, known: &mut Known) -> Vec<Value> {
        let options = self.tcp["tcp.options_tree"]
            .get("mptcp")
            .map_or_else(Vec::new, list);
        let stage = match (self.flag("syn"), self.flag("ack")) {
            (true, false) => "syn",
            (true, true) => "syn_ack",
            (false, _) => "ack",
        };
        let mut told: Vec<Value> = Vec::new();
        for option in &options {
            self.learn(stage, option, known);
            told.extend(event(stage, option));
        }
        let capable = told.iter().any(|it| it["event"] == "mp_capable");
        match stage {
            "syn" if !told.is_empty() => {
                known.asked.extend([self.sender(), self.receiver()]);
                if capable {
                    known.waiting.insert(self.sender());
                }
            }
            "syn_ack" if known.waiting.remove(&self.receiver()) && !capable => {
                told.push(json!({ "event": "fallback", "cause": "syn_ack" }));
            }
            _ => {}
        }
        let ends = [("reset", "rst"), ("fin", "fin")].into_iter();
        let end = ends.clone().find(|(flag, _)| self.flag(flag));
        if let Some((_, how)) = end.filter(|_| known.asked.contains(&self.sender())) {
            told.push(json!({ "event": "close", "how": how }));
        }
        let token = known.tokens.get(&self.sender());
        for event in &mut told {
            let whole = event.as_object_mut().unwrap();
            let more = json!({
                "device": self.device,
                "direction": self.direction,
                "source": self.source.ip().to_string(),
                "source_port": self.source.port(),
                "destination": self.destination.ip().to_string(),
                "destination_port": self.destination.port(),
                "connection": token.map(|token| hex(*token)),
            });
            whole.extend(more.as_object().unwrap().clone());
        }
        told
    }

    /// Whose connection it is: of keys, tshark tells the token.
    fn learn(&self, stage: &str, option: &Value, known: &mut Known) {
        let token = |name: &str| option.get(name).map(number);
        match (text(&option["tcp.options.mptcp.subtype"]), stage) {
            ("0", "syn_ack") => {
                let own = token("mptcp.expected_token").unwrap();
                known.offered.insert(self.sender(), own);
            }
            ("0", "ack") => {
                let own = token("mptcp.expected_token").unwrap();
                let peer = known.offered[&self.receiver()];
                known.peers.extend([(own, peer), (peer, own)]);
                known.tokens.insert(self.sender(), own);
                known.tokens.insert(self.receiver(), peer);
            }
            ("1", "syn") => {
                let peer = token("tcp.options.mptcp.recvtok").unwrap();
                known.tokens.insert(self.receiver(), peer);
                if let Some(own) = known.peers.get(&peer) {
                    known.tokens.insert(self.sender(), *own);
                }
            }
            _ => {}
        }
    }
}

/// The event that an option is, if it is one: kind and members.
fn event(stage: &str, option: &Value) -> Option<Value> {
    let has = |name: &str| option.get(format!("tcp.options.mptcp.{name}"));
    let get = |name: &str| number(has(name).unwrap_or_else(|| panic!("no {name}: {option}")));
    let flag = |name: &str| {
        number(&option["tcp.options.mptcp.flags_tree"][format!("tcp.options.mptcp.{name}.flag")])
            == 1
    };
    let length = number(&option["tcp.option_len"]);
    Some(match get("subtype") {
        0 => json!({
            "event": "mp_capable",
            "stage": stage,
            "version": get("version"),
            "flags": get("flags"),
            "checksum_required": get("flags") & 0x80 != 0,
        }),
        1 if stage == "ack" => json!({
            "event": "mp_join",
            "stage": stage,
            "address_id": null,
            "backup": null,
            "token": null,
            "nonce": null,
        }),
        1 => json!({
            "event": "mp_join",
            "stage": stage,
            "address_id": get("addrid"),
            "backup": flag("backup"),
            "token": has("recvtok").map(|token| hex(number(token))),
            "nonce": hex(get("sendrand")),
        }),
        2 if flag("dseqnpresent") && get("datalvllen") == 0 => {
            json!({ "event": "fallback", "cause": "infinite_mapping" })
        }
        2 if !flag("datafin") => return None,
        2 => json!({ "event": "data_fin", "data_sequence": data_sequence(option) }),
        3 => json!({
            "event": "add_addr",
            "address_id": get("addrid"),
            "address": text(has("ipv4").or(has("ipv6")).unwrap()),
            "port": has("port").map(number),
            "echo": get("echo") == 1,
            "hmac": has("addaddrtrunchmac").is_some(),
            "length": length,
        }),
        4 => json!({
            "event": "remove_addr",
            "address_ids": list(has("addrid").unwrap()).iter().map(number).collect::<Vec<_>>(),
        }),
        5 => json!({
            "event": "mp_prio",
            "backup": flag("backup"),
            "address_id": has("addrid").map(number),
        }),
        7 => json!({ "event": "mp_fastclose" }),
        8 => {
            let names = ["flag_U", "flag_V", "flag_W", "flag_T"];
            let flags = names
                .iter()
                .fold(0, |all, name| all << 1 | u64::from(flag(name)));
            let reason = get("rst_reason");
            json!({
                "event": "mp_tcprst",
                "flags": flags,
                "transient": flags & 1 == 1,
                "reason": reason,
                "reason_name": REASONS.get(reason as usize).unwrap_or(&"unassigned"),
            })
        }
        other => panic!("subtype {other}: {option}"),
    })
}

/// That of the DATA_FIN itself, which takes one number behind the data. The relative numbers that
/// tshark shows elsewhere count from the connection's key.
fn data_sequence(option: &Value) -> Option<String> {
    let flags = &option["tcp.options.mptcp.flags_tree"];
    let first = number(option.get("tcp.options.mptcp.rawdataseqno")?);
    let last = first.wrapping_add(number(&option["tcp.options.mptcp.datalvllen"]) - 1);
    Some(match text(&flags["tcp.options.mptcp.dseqn8.flag"]) {
        "1" => format!("{last:016x}"),
        _ => hex(last & 0xffff_ffff),
    })
}

fn hex(number: u64) -> String {
    format!("{number:08x}")
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

/// Decimal, or hexadecimal with `0x`.
fn number(value: &Value) -> u64 {
    let text = text(value);
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
    .unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// What is there once, or several times.
fn list(value: &Value) -> Vec<Value> {
    match value {
        Value::Array(items) => items.clone(),
        one => vec![one.clone()],
    }
}

/// An event without what a capture does not tell.
pub fn comparable(event: &Value) -> Value {
    let members = event.as_object().unwrap().iter();
    let kept = members.filter(|(name, _)| !["time", "chain"].contains(&name.as_str()));
    Value::Object(
        kept.map(|(name, value)| (name.clone(), value.clone()))
            .collect::<Map<_, _>>(),
    )
}
