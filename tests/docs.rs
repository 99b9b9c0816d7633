// SPDX-License-Identifier: MIT OR Apache-2.0
//! The documents say what the program does: generated ones are current, chain files in them are
//! right, commands exist, links lead somewhere.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use policy_chain::engine::bpf::REASONS;
use policy_chain::plan;
use policy_chain::policy::{self, Registry};
use policy_chain::spec::Spec;

/// Those that people write.
const WRITTEN: [&str; 8] = [
    "README.md",
    "chains/README.md",
    "docs/architecture.md",
    "docs/chain-file.md",
    "docs/example.md",
    "docs/mptcp.md",
    "docs/output.md",
    "docs/packets.md",
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap()
}

/// Compares `docs/policies.md` with what it is to hold, or writes it if `make docs` asks for that.
#[test]
fn policies_are_current() {
    let registry = Registry::embedded().unwrap();
    let mut text = "# Policies\n\nMade by `make docs` from the policies themselves; \
         `policy-chain policies NAME` prints the same.\n"
        .to_owned();
    for (title, kind) in [("Selectors", "selector"), ("Actions", "action")] {
        text += &format!("\n## {title}\n");
        let mut policies = registry.policies().iter();
        for policy in policies.by_ref().filter(|p| p.kind.name() == kind) {
            let page = policy::policy_page(policy);
            text += &format!("\n### {}\n\n```text\n{page}```\n", policy.name);
        }
    }
    let path = root().join("docs/policies.md");
    if env::var_os("WRITE_DOCS").is_some() {
        fs::write(path, text).unwrap();
        return;
    }
    let found = fs::read_to_string(path).unwrap_or_default();
    assert!(
        found == text,
        "docs/policies.md is not current: run `make docs`"
    );
}

/// The blocks of code of a document: language, and lines.
fn blocks(text: &str) -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    let mut open: Option<(String, String)> = None;
    for line in text.lines() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(language), None) => open = Some((language.to_owned(), String::new())),
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (None, Some((_, code))) => *code += &format!("{line}\n"),
            (None, None) => {}
        }
    }
    blocks
}

#[test]
fn chain_files_in_documents_are_right() {
    let registry = Registry::embedded().unwrap();
    let mut count = 0;
    for name in WRITTEN {
        for (language, code) in blocks(&read(name)) {
            if language != "json" {
                continue;
            }
            let spec = Spec::parse(&code, Path::new(name), registry).unwrap();
            spec.validate_references(&BTreeMap::new(), &Default::default())
                .unwrap();
            plan::check(&spec, registry).unwrap();
            count += 1;
        }
    }
    assert!(count > 2, "{count}");
}

/// What `policy-chain WORDS --help` prints, if it has such a command.
fn help(words: &[&str]) -> Option<String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_policy-chain"));
    let output = command.args(words).arg("--help").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    output.status.success().then_some(text)
}

#[test]
fn commands_in_documents_exist() {
    let mut count = 0;
    for name in WRITTEN {
        for line in read(name).lines() {
            let line = line.trim_start().trim_start_matches(['$', '#', ' ']);
            let Some(arguments) = line.strip_prefix("policy-chain ") else {
                continue;
            };
            let words: Vec<&str> = arguments
                .split_whitespace()
                .take_while(|word| *word != "--" && *word != "#")
                .collect();
            // Running text that begins so has no command in it.
            if help(&words[..1]).is_none() {
                assert!(words.contains(&"composes"), "{name}: {line}");
                continue;
            }
            let nested = ["set", "testbed"].contains(&words[0]);
            let command = &words[..if nested { 2 } else { 1 }];
            let help = help(command).unwrap_or_else(|| panic!("{name}: {line}"));
            for word in words.iter().filter(|word| word.starts_with("--")) {
                assert!(help.contains(word), "{name}: {line}: {word}");
            }
            count += 1;
        }
    }
    assert!(count > 10, "{count}");
}

#[test]
fn every_reason_is_explained() {
    let text = read("docs/output.md");
    for reason in REASONS.iter().filter(|reason| **reason != "none") {
        assert!(text.contains(&format!("\n| `{reason}` |")), "{reason}");
    }
}

#[test]
fn links_lead_somewhere() {
    for name in WRITTEN {
        let folder = root().join(name).parent().unwrap().to_owned();
        let text = read(name);
        for link in text.split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap();
            if target.is_empty() || target.starts_with("https://") {
                continue;
            }
            assert!(folder.join(target).exists(), "{name}: {target}");
        }
    }
}
