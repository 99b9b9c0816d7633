// SPDX-License-Identifier: MIT OR Apache-2.0
//! A new C file in `policies/` is all that a new policy takes. Builds a copy of the source tree,
//! with nothing from the network. Needs root to run what it built.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{Files, require_root, says, succeeded, text};
use serde_json::{Value, json};

const POLICY: &str = r#"/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "parse.h"

struct params {
	__u8 value __required __range(1, 255) __doc("TTL or hop limit to write");
	bool only_raise __doc("leave packets alone that have a greater one");
};
PARAMS;

ACTION(set_test_ttl, "write the hop limit of IPv6 packets")
{
	struct headers at;
	enum reason reason = parse_ip(ctx, &at);
	struct ipv6hdr *ip;

	if (reason)
		return SKIP(reason);
	if (at.version != IP_VERSION_6)
		return SKIP(REASON_NOT_IP);
	ip = pkt_at(ctx, at.ip, sizeof(*ip));
	if (!ip)
		return SKIP(REASON_TRUNCATED);
	if (PARAM(only_raise) && ip->hop_limit >= PARAM(value))
		return SKIP(REASON_NOT_LOWER);
	ip->hop_limit = PARAM(value);
	return DONE;
}
"#;

/// A copy of the source tree, and where its builds go: kept from one test run to the next, so
/// that dependencies are compiled once.
struct Copy {
    source: PathBuf,
    target: PathBuf,
    files: Files,
}

impl Copy {
    fn new() -> Copy {
        let own = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("new-policy");
        let source = folder.join("source");
        match fs::remove_dir_all(&source) {
            Err(error) if error.kind() != ErrorKind::NotFound => panic!("{error}"),
            _ => fs::create_dir_all(&source).unwrap(),
        }
        for name in [
            "Cargo.toml",
            "Cargo.lock",
            "build.rs",
            "src",
            "policies",
            "tools",
            "chains",
        ] {
            copy(&own.join(name), &source.join(name));
        }
        Copy {
            source,
            target: folder.join("target"),
            files: Files::new(),
        }
    }

    fn add_policy(&self, content: &str) {
        let path = self.source.join("policies/actions/set_test_ttl.bpf.c");
        fs::write(path, content).unwrap();
    }

    fn build(&self) -> Output {
        Command::new(env!("CARGO"))
            .current_dir(&self.source)
            .args(["build", "--offline", "--locked", "--bin", "policy-chain"])
            .env("CARGO_TARGET_DIR", &self.target)
            .env_remove("RUSTFLAGS")
            .output()
            .unwrap()
    }

    fn run(&self, arguments: &[&str]) -> String {
        let program = self.target.join("debug/policy-chain");
        let output = Command::new(program).args(arguments).output().unwrap();
        succeeded(&format!("{arguments:?}"), &output)
    }
}

fn copy(from: &Path, to: &Path) {
    if !from.is_dir() {
        fs::copy(from, to).unwrap();
        return;
    }
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        copy(&entry.path(), &to.join(entry.file_name()));
    }
}

/// A capture of raw IPv6 packets with these hop limits.
fn capture(hop_limits: &[u8]) -> Vec<u8> {
    const RAW_IP: u32 = 101;
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4u32, 4 << 16 | 2, 0, 0, 65_535, RAW_IP] {
        file.extend(word.to_le_bytes());
    }
    for hop_limit in hop_limits {
        let mut packet = Vec::new();
        etherparse::PacketBuilder::ipv6([1; 16], [2; 16], *hop_limit)
            .udp(1, 2)
            .write(&mut packet, b"hello")
            .unwrap();
        let length = packet.len() as u32;
        for word in [0, 0, length, length] {
            file.extend(word.to_le_bytes());
        }
        file.extend(packet);
    }
    file
}

/// Position of the hop limit of the first packet, and what a packet and its header take.
const HOP_LIMIT: usize = 24 + 16 + 7;
const RECORD: usize = 16 + 40 + 8 + 5;

#[test]
fn a_c_file_is_a_policy() {
    require_root();
    let copy = Copy::new();

    // Without words for a parameter there is no build.
    let undocumented = POLICY.replace(
        "bool only_raise __doc(\"leave packets alone that have a greater one\")",
        "bool only_raise",
    );
    assert_ne!(undocumented, POLICY);
    copy.add_policy(&undocumented);
    let output = copy.build();
    assert!(
        !output.status.success(),
        "an undocumented parameter was built"
    );
    says(
        &text(&output.stderr),
        &["set_test_ttl.bpf.c", "only_raise", "__doc"],
    );

    copy.add_policy(POLICY);
    succeeded("cargo build", &copy.build());

    let page = copy.run(&["policies", "set_test_ttl"]);
    says(
        &page,
        &[
            "write the hop limit of IPv6 packets",
            "value       TTL or hop limit to write",
            "only_raise  leave packets alone that have a greater one",
            "from 1 to 255",
        ],
    );
    let schema = copy.run(&["schema"]);
    says(&schema, &["set_test_ttl", "only_raise"]);

    let action = json!({ "action": "set_test_ttl", "value": 77, "only_raise": true });
    let chain = json!({ "version": 1, "chains": [{ "name": "t", "actions": [action] }] });
    let chain = copy.files.write("t.json", chain.to_string());
    let input = copy.files.write("in.pcap", capture(&[3, 200]));
    let output = copy.files.path().join("out.pcap");
    let [chain, from, to] = [&chain, &input, &output].map(|path| path.to_str().unwrap());
    for hook in ["xdp", "tc-ingress", "tc-egress"] {
        let lines = copy.run(&[
            "replay", chain, "--chain", "t", "--in", from, "--out", to, "--hook", hook, "--json",
        ]);
        let lines: Vec<Value> = lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines[0]["path"], json!(["t/0:set_test_ttl"]));
        assert_eq!(lines[0]["changed"], true);
        assert_eq!(lines[1]["changed"], false);
        assert_eq!(lines[1]["reasons"], json!(["not_lower"]));
        let written = fs::read(&output).unwrap();
        assert_eq!(written[HOP_LIMIT], 77);
        assert_eq!(written[HOP_LIMIT + RECORD], 200);
    }
}
