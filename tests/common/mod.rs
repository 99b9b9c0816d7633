// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the end-to-end tests share: a testbed and a bpffs folder of one test, the program under
//! test run inside them, TCP connections whose content is checked, and captures.
//!
//! Everything is called after the process, so that tests run side by side, and is gone when its
//! owner is dropped; what a killed test left behind goes when the next one starts.

#![allow(dead_code)]

pub mod agent;
pub mod capture;
#[path = "../packets/frames.rs"]
pub mod frames;
pub mod kernel;
pub mod klog;
pub mod load;
pub mod malformed;
pub mod mptcp;
pub mod sender;
pub mod spawned;
pub mod traffic;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use policy_chain::netns::Namespace;
use policy_chain::testbed::{Options, Role, ScopedTestbed};
use serde_json::Value;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_policy-chain");
/// How long anything is waited for that must happen.
pub const DEADLINE: Duration = Duration::from_secs(30);

const BPFFS: &str = "/sys/fs/bpf";
const PREFIX: &str = "pct-";

/// Fails the test where it cannot run.
pub fn require_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "these tests make network namespaces and load BPF programs: run them as root"
    );
}

/// Tries until `attempt` gives something, up to [`DEADLINE`].
pub fn eventually<T>(what: &str, attempt: impl FnMut() -> Option<T>) -> T {
    eventually_or(|| what.to_owned(), attempt)
}

/// The same, for a message that says how things are when it is late.
pub fn eventually_or<T>(
    what: impl FnOnce() -> String,
    mut attempt: impl FnMut() -> Option<T>,
) -> T {
    let limit = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = attempt() {
            return found;
        }
        if Instant::now() >= limit {
            panic!("not within {DEADLINE:?}: {}", what());
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// A folder in bpffs of one test, not yet made.
pub struct BpfFolder(PathBuf);

impl BpfFolder {
    pub fn new() -> BpfFolder {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        require_root();
        SWEEP.call_once(|| {
            for folder in stale_folders(Path::new(BPFFS)) {
                remove_folder(&folder);
            }
        });
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        BpfFolder(Path::new(BPFFS).join(name))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for BpfFolder {
    fn drop(&mut self) {
        remove_folder(&self.0);
    }
}

/// Lets go of everything pinned below `folder`: links of namespaces that are gone are dead.
fn remove_folder(folder: &Path) {
    if !folder.exists() {
        return;
    }
    // What it cannot reach goes with its pins.
    let _ = Command::new(PROGRAM)
        .arg("--bpffs")
        .arg(folder)
        .args(["delete", "--all", "--all-netns"])
        .output();
    let _ = fs::remove_dir_all(folder);
}

/// Those in `parent` that are called after processes that are gone.
fn stale_folders(parent: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let stale = entries.filter(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        let rest = name.strip_prefix(PREFIX).and_then(|it| it.split_once('-'));
        rest.is_some_and(|(pid, _)| {
            pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()
        })
    });
    stale.map(|entry| entry.path()).collect()
}

/// A folder for files, removed with its contents.
pub struct Files(PathBuf);

impl Files {
    pub fn new() -> Files {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        SWEEP.call_once(|| {
            for folder in stale_folders(&std::env::temp_dir()) {
                let _ = fs::remove_dir_all(folder);
            }
        });
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        Files(folder)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A testbed, a bpffs folder, and a folder for chain files.
pub struct Environment {
    // In this order they are dropped: first the chains, while their namespaces are there.
    guard: Guard,
    pub files: Files,
    pub testbed: ScopedTestbed,
}

/// Deletes all chains in every namespace of the testbed.
struct Guard {
    folder: BpfFolder,
    namespaces: Vec<Namespace>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        for namespace in &self.namespaces {
            if self.folder.path().exists() {
                let _ = namespace
                    .command(PROGRAM)
                    .arg("--bpffs")
                    .arg(self.folder.path())
                    .args(["delete", "--all"])
                    .output();
            }
        }
    }
}

impl Environment {
    /// Client and server, joined directly.
    pub fn direct() -> Environment {
        Environment::new(1, false)
    }

    pub fn direct_paths(paths: u8) -> Environment {
        Environment::new(paths, false)
    }

    /// Client, router and server. What the router sends to the server has complete checksums, so
    /// that the server sees a wrong one.
    pub fn routed() -> Environment {
        Environment::routed_paths(1)
    }

    pub fn routed_paths(paths: u8) -> Environment {
        Environment::new(paths, true)
    }

    fn new(paths: u8, router: bool) -> Environment {
        Environment::with(&Options {
            paths,
            router,
            ..Options::default()
        })
    }

    /// On any testbed. What a router sends has complete checksums.
    pub fn with(options: &Options) -> Environment {
        let folder = BpfFolder::new();
        let testbed = ScopedTestbed::up(options).unwrap();
        let namespaces = testbed.describe().namespaces.iter();
        let namespaces = namespaces
            .map(|(role, _)| testbed.namespace(*role).unwrap().clone())
            .collect();
        let environment = Environment {
            guard: Guard { folder, namespaces },
            files: Files::new(),
            testbed,
        };
        for path in &environment.testbed.describe().paths {
            for router in path.router.iter() {
                environment.tx_off(Role::Router, &router.server.device);
                environment.tx_off(Role::Router, &router.client.device);
            }
        }
        environment
    }

    pub fn folder(&self) -> &Path {
        self.guard.folder.path()
    }

    pub fn namespace(&self, role: Role) -> &Namespace {
        self.testbed.namespace(role).unwrap()
    }

    /// Has a device send complete checksums, as one without offloads does.
    pub fn tx_off(&self, role: Role, device: &str) {
        self.run(role, "ethtool", &["-K", device, "tx", "off"]);
    }

    /// Runs a program that must succeed.
    pub fn run(&self, role: Role, program: &str, arguments: &[&str]) -> String {
        let output = self
            .namespace(role)
            .command(program)
            .args(arguments)
            .output()
            .unwrap_or_else(|error| panic!("{program}: {error}"));
        succeeded(&format!("{program} {arguments:?}"), &output)
    }

    pub fn command(&self, role: Role, arguments: &[&str]) -> Command {
        let mut command = self.namespace(role).command(PROGRAM);
        command.arg("--bpffs").arg(self.folder()).args(arguments);
        command
    }

    /// Runs the program under test.
    pub fn cli(&self, role: Role, arguments: &[&str]) -> Output {
        self.command(role, arguments).output().unwrap()
    }

    /// Runs the program under test, which must succeed.
    pub fn ok(&self, role: Role, arguments: &[&str]) -> String {
        succeeded(&format!("{arguments:?}"), &self.cli(role, arguments))
    }

    /// Runs the program under test, which must succeed and print JSON.
    pub fn json(&self, role: Role, arguments: &[&str]) -> Value {
        let text = self.ok(role, arguments);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Runs the program under test, which must fail with this code; what it said.
    pub fn fails(&self, role: Role, code: i32, arguments: &[&str]) -> String {
        let output = self.cli(role, arguments);
        failed(&format!("{arguments:?}"), code, &output)
    }

    pub fn file(&self, name: &str, content: &Value) -> String {
        let path = self.files.write(name, content.to_string());
        path.to_str().unwrap().to_owned()
    }

    /// Applies a chain file.
    pub fn apply(&self, role: Role, content: &Value) {
        let file = self.file("chains.json", content);
        self.ok(role, &["apply", &file]);
    }

    /// The chain as `list --json` has it.
    pub fn listed(&self, role: Role, chain: &str) -> Value {
        let list = self.json(role, &["list", "--json"]);
        let mut items = list.as_array().unwrap().iter();
        let found = items.find(|item| item["name"] == chain);
        found
            .unwrap_or_else(|| panic!("no {chain} in {list}"))
            .clone()
    }

    /// Packets that the chain took.
    pub fn packets(&self, role: Role, chain: &str) -> u64 {
        self.listed(role, chain)["packets"].as_u64().unwrap()
    }

    /// Packets that nodes of the chain left alone for a reason.
    pub fn reason(&self, role: Role, chain: &str, reason: &str) -> u64 {
        let shown = self.json(role, &["show", chain, "--json"]);
        let places = shown["nodes"].as_array().unwrap().iter();
        let nodes = places.flat_map(|place| place["nodes"].as_array().unwrap());
        nodes
            .map(|node| node["reasons"][reason].as_u64().unwrap_or(0))
            .sum()
    }

    /// Segments with a wrong checksum that a host received.
    pub fn checksum_errors(&self, role: Role) -> u64 {
        self.statistic(role, "Tcp", "InCsumErrors")
    }

    /// What a host's kernel counted, by the names that `/proc/net/snmp`, `snmp6` and `netstat`
    /// (`TcpExt`, `MPTcpExt`) have for it.
    pub fn statistic(&self, role: Role, protocol: &str, name: &str) -> u64 {
        let read = |file| fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap();
        let namespace = self.namespace(role);
        let tables = namespace
            .enter(|| ["snmp", "snmp6", "netstat"].map(read))
            .unwrap();
        let found = match protocol {
            "Ip6" => single_value(&tables[1], &format!("{protocol}{name}")),
            _ if protocol.ends_with("Ext") => row_value(&tables[2], protocol, name),
            _ => row_value(&tables[0], protocol, name),
        };
        found.unwrap_or_else(|| panic!("no {protocol} {name}: {tables:?}"))
    }

    /// Attachment folders and their generations, `FOLDER/gN`, in order.
    pub fn generations(&self) -> Vec<String> {
        let mut found = Vec::new();
        for attachment in fs::read_dir(self.folder()).into_iter().flatten().flatten() {
            let name = attachment.file_name().to_string_lossy().into_owned();
            if !attachment.path().is_dir() || name == "sets" {
                continue;
            }
            for entry in fs::read_dir(attachment.path()).unwrap().flatten() {
                if entry.path().is_dir() {
                    found.push(format!("{name}/{}", entry.file_name().to_string_lossy()));
                }
            }
        }
        found.sort();
        found
    }
}

/// From a table whose lines are a name and a value.
fn single_value(table: &str, name: &str) -> Option<u64> {
    let mut rows = table.lines().map(str::split_whitespace);
    let mut row = rows.find(|row| row.clone().next() == Some(name))?;
    row.nth(1)?.parse().ok()
}

/// From a table of pairs of lines, names and values, which begin with the protocol's name.
fn row_value(table: &str, protocol: &str, name: &str) -> Option<u64> {
    let start = format!("{protocol}:");
    let mut lines = table.lines().filter(|line| line.starts_with(&start));
    let names = lines.next()?.split_whitespace();
    let values = lines.next()?.split_whitespace();
    let (_, value) = names.zip(values).find(|(other, _)| *other == name)?;
    value.parse().ok()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
pub fn succeeded(what: &str, output: &Output) -> String {
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(
        output.status.success(),
        "{what}: {}\n{out}{err}",
        output.status
    );
    out
}

/// The message of a command that must have failed with `code`: it fits a screen.
#[track_caller]
pub fn failed(what: &str, code: i32, output: &Output) -> String {
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{what}:\n{out}{err}");
    assert!(err.starts_with("error: "), "{what}:\n{err}");
    assert!(err.lines().count() <= 24, "{what}: too many lines:\n{err}");
    let widest = err.lines().map(|line| line.chars().count()).max();
    assert!(widest <= Some(200), "{what}: too wide:\n{err}");
    err
}

/// That a message has all of these in it.
#[track_caller]
pub fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "expected \"{part}\" in:\n{message}");
    }
}
