// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every file in `chains/` is applied, on every hook and in every mode, and seen to match real
//! TCP. The files name devices and addresses that no machine has; a copy of each gets those of a
//! testbed, where the server is the local end. Those that are for MPTCP are in [`mptcp`].

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{self, Output};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn};
use policy_chain::testbed::{Options, Role, ScopedTestbed};
use serde_json::{Value, json};

#[path = "../common/mod.rs"]
mod common;
mod mptcp;

const TIMEOUT: Duration = Duration::from_secs(10);

/// The hooks and modes every example is applied with.
const PLACES: [(&str, &str); 5] = [
    ("xdp", "native"),
    ("xdp", "generic"),
    ("tc-ingress", "auto"),
    ("tc-egress", "auto"),
    ("tc-egress", "clsact"),
];

/// A server with policy-chain on it, and a client.
struct Bed {
    testbed: ScopedTestbed,
    bpffs: String,
    file: PathBuf,
    /// Of the client; each connection has another.
    port: Cell<u16>,
}

impl Bed {
    fn up(name: &str) -> Bed {
        let options = Options {
            paths: 2,
            ..Options::default()
        };
        let id = format!("pc-test-chains-{name}-{}", process::id());
        Bed {
            testbed: ScopedTestbed::up(&options).unwrap(),
            bpffs: format!("/sys/fs/bpf/{id}"),
            file: Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{id}.json")),
            port: Cell::new(50000),
        }
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let server = self.testbed.namespace(Role::Server).unwrap();
        let mut command = server.command(env!("CARGO_BIN_EXE_policy-chain"));
        command.args(["--bpffs", &self.bpffs]).args(arguments);
        command.output().unwrap()
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {text}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Puts the testbed's names into a chain file, and writes it.
    fn adapt(&self, chains: &Value) {
        let path = |number| self.testbed.path(number).unwrap();
        let names = [
            ("client1", path(1).server.device.clone()),
            ("eth0", path(1).server.device.clone()),
            ("eth1", path(2).server.device.clone()),
            ("192.0.2.1", path(1).server.ipv4.to_string()),
            ("10.2.1.1", path(1).server.ipv4.to_string()),
            ("198.51.100.7", path(1).client.ipv4.to_string()),
            ("10.1.1.1", path(1).client.ipv4.to_string()),
            ("02:00:00:00:00:01", path(2).client.mac_text()),
        ];
        let mut text = chains.to_string();
        for (from, to) in names {
            text = text.replace(&format!("\"{from}\""), &format!("\"{to}\""));
        }
        let text = text.replace("50000", &self.port.get().to_string());
        fs::write(&self.file, text).unwrap();
    }

    fn apply(&self, more: &[&str]) -> Value {
        let file = self.file.to_str().unwrap();
        let arguments = [&["apply", file, "--json"], more].concat();
        serde_json::from_str(&self.ok(&arguments)).unwrap()
    }

    /// Packets each chain took.
    fn packets(&self) -> BTreeMap<String, u64> {
        let list: Value = serde_json::from_str(&self.ok(&["list", "--json"])).unwrap();
        let chains = list.as_array().unwrap().iter();
        chains
            .map(|chain| {
                let name = chain["name"].as_str().unwrap().to_owned();
                (name, chain["packets"].as_u64().unwrap())
            })
            .collect()
    }

    /// One connection from the client, in which the server sends back what it gets.
    fn talk(&self, port: u16) {
        let path = self.testbed.path(1).unwrap();
        let server = SocketAddrV4::new(path.server.ipv4, port);
        let client = SocketAddrV4::new(path.client.ipv4, self.port.get());
        let namespace = |role| self.testbed.namespace(role).unwrap();
        let listener = namespace(Role::Server)
            .enter(|| TcpListener::bind(server).unwrap())
            .unwrap();
        let echo = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            stream.write_all(&got).unwrap();
        });
        let mut stream = namespace(Role::Client)
            .enter(|| connect(client, server))
            .unwrap();
        let sent: Vec<u8> = (0..100_000u32).map(|at| (at % 251) as u8).collect();
        stream.write_all(&sent).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        echo.join().unwrap();
        assert!(got == sent, "the bytes differ");
        self.port.set(self.port.get() + 1);
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.run(&["delete", "--all"]);
        let _ = fs::remove_file(&self.file);
    }
}

fn connect(from: SocketAddrV4, to: SocketAddrV4) -> TcpStream {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket::socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
    socket::bind(socket.as_raw_fd(), &SockaddrIn::from(from)).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream.set_write_timeout(Some(TIMEOUT)).unwrap();
    socket::connect(stream.as_raw_fd(), &SockaddrIn::from(to)).unwrap();
    stream
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("chains")
}

fn example(name: &str) -> Value {
    let text = fs::read_to_string(folder().join(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The example with its attached chains at one hook instead of where it has them.
fn at_hook(mut chains: Value, hook: &str, mode: &str) -> Value {
    for chain in chains["chains"].as_array_mut().unwrap() {
        if let Some(attach) = chain.get_mut("attach") {
            *attach = json!([{ "device": "eth0", "hook": hook, "mode": mode }]);
        }
    }
    chains
}

/// Applies an example everywhere and runs a connection through it; `counts` are the chains that
/// must have seen packets of it, `prepare` what is to be done after it is applied.
fn everywhere(name: &str, port: u16, counts: &[&str], prepare: impl Fn(&Bed)) {
    let bed = Bed::up(name.trim_end_matches(".json"));
    bed.ok(&["check", folder().join(name).to_str().unwrap()]);
    // as it stands, then everywhere
    bed.adapt(&example(name));
    bed.apply(&["--dry-run"]);
    assert_eq!(bed.packets(), BTreeMap::new(), "--dry-run");
    bed.apply(&[]);
    bed.ok(&["delete", "--all"]);
    for (hook, mode) in PLACES {
        bed.adapt(&at_hook(example(name), hook, mode));
        bed.apply(&["--dry-run"]);
        bed.apply(&[]);
        prepare(&bed);
        bed.talk(port);
        let packets = bed.packets();
        for chain in counts {
            assert!(packets[*chain] > 0, "{chain} on {hook} {mode}: {packets:?}");
        }
        bed.ok(&["delete", "--all"]);
        assert_eq!(bed.packets(), BTreeMap::new(), "delete --all");
    }
}

#[test]
fn demo() {
    everywhere("demo.json", 5201, &["demo"], |_| {});
}

#[test]
fn window_per_flow() {
    // Twice on the same flow: by its key in the file, and by an element of the set.
    everywhere("window-per-flow.json", 443, &["window-per-flow"], |_| {});
    everywhere("window-per-flow.json", 8443, &["window-per-flow"], |bed| {
        let path = bed.testbed.path(1).unwrap();
        let (local, remote) = (path.server.ipv4, path.client.ipv4);
        let port = bed.port.get();
        let element =
            format!("local={local},remote={remote},local_port=8443,remote_port={port},arg=131072");
        bed.ok(&["set", "add", "windows", &element]);
    });
}

#[test]
fn dispatch() {
    let add = |bed: &Bed, chain: &str| {
        let remote: Ipv4Addr = bed.testbed.path(1).unwrap().client.ipv4;
        let element = format!("prefix={remote}/32,chain={chain}");
        bed.ok(&["set", "add", "networks", &element]);
    };
    everywhere("dispatch.json", 443, &["dispatch", "slow"], |bed| {
        add(bed, "slow");
    });
    everywhere("dispatch.json", 443, &["dispatch", "watched"], |bed| {
        add(bed, "watched");
    });
}

#[test]
fn clamp_mss() {
    everywhere("clamp-mss.json", 443, &["clamp-mss"], |_| {});
}

#[test]
fn hide_mptcp_from_tcp() {
    everywhere("hide-mptcp.json", 443, &["hide-mptcp"], |_| {});
}

#[test]
fn strip_timestamps() {
    everywhere("strip-timestamps.json", 443, &["strip-timestamps"], |_| {});
}

#[test]
fn steer() {
    let bed = Bed::up("steer");
    bed.adapt(&example("steer.json"));
    bed.apply(&["--dry-run"]);
    bed.apply(&[]);
    bed.talk(443);
    assert!(bed.packets()["steer"] > 0);
    let show: Value = serde_json::from_str(&bed.ok(&["show", "steer", "--json"])).unwrap();
    let nodes = show["nodes"][0]["nodes"].as_array().unwrap();
    assert_eq!(nodes.last().unwrap()["reasons"], json!({}), "{show:#}");
    bed.ok(&["delete", "--all"]);
    // On ingress what is for this host would leave it: no traffic there.
    for (hook, mode) in PLACES {
        bed.adapt(&at_hook(example("steer.json"), hook, mode));
        bed.apply(&[]);
        bed.ok(&["delete", "--all"]);
    }
}

#[test]
fn every_example_is_tested_and_explained() {
    let source = [include_str!("main.rs"), include_str!("mptcp.rs")].concat();
    let text = fs::read_to_string(folder().join("README.md")).unwrap();
    for entry in fs::read_dir(folder()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".json") {
            assert!(source.contains(&format!("\"{name}\"")), "no test of {name}");
            assert!(text.contains(&format!("]({name})")), "no word on {name}");
        }
    }
}
