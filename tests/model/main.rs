// SPDX-License-Identifier: MIT OR Apache-2.0
//! The real programs against a model of every policy that was written from the documents: random
//! chains, random packets, and the same verdict and bytes from both.
//!
//! `MODEL_PACKETS` and `MODEL_SEED` set how many packets run and which; `make soak` does so.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod chain;
mod differential;
mod flows;
mod generate_chains;
mod generate_packets;
mod judge;
mod layers;
mod options;
mod packet;
mod rows;
mod search;
mod signals;
mod subflows;
mod sums;
mod world;

use std::time::Instant;

use policy_chain::hook::Hook;
use policy_chain::policy::{Policy, Registry};

/// Over all hooks, if nothing else is said.
const PACKETS: u64 = 138_000;
const SEED: u64 = 1;

fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name} is {text}, and no number")),
        Err(_) => default,
    }
}

fn differ_nowhere(hook: Hook) {
    let started = Instant::now();
    world::enter();
    let packets = setting("MODEL_PACKETS", PACKETS).div_ceil(3);
    let seed = setting("MODEL_SEED", SEED);
    let tally = search::search(hook, packets, seed);
    tally.print(hook);
    println!("  seed {seed}, {} s", started.elapsed().as_secs());
    tally.check(hook);
}

#[test]
fn xdp() {
    differ_nowhere(Hook::Xdp);
}

#[test]
fn tc_ingress() {
    differ_nowhere(Hook::TcIngress);
}

#[test]
fn tc_egress() {
    differ_nowhere(Hook::TcEgress);
}

#[test]
fn rows_of_old() {
    world::enter();
    let mut wrong = String::new();
    for row in rows::ROWS {
        let file = serde_json::from_str(row.file).unwrap();
        let frames: Vec<Vec<u8>> = row.frames.iter().map(|hex| chain::unhex(hex)).collect();
        let mut session = differential::Session::new(&file, row.hook).unwrap();
        for frame in &frames {
            if let (.., Err(difference)) = session.run(frame) {
                wrong += &format!("{} on {}:\n{difference}", row.what, row.hook);
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// A policy or parameter that is new is one that the model has yet to learn.
#[test]
fn the_model_knows_the_catalogue() {
    let registry = Registry::embedded().unwrap();
    let known = |policies: &[(&str, &[&str])]| -> Vec<(String, Vec<String>)> {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        policies
            .iter()
            .map(|(name, parameters)| ((*name).to_owned(), owned(parameters)))
            .collect()
    };
    let described = |policy: &Policy| {
        let parameters = policy.params.iter().flat_map(|layout| &layout.fields);
        let parameters = parameters.map(|parameter| parameter.name.clone());
        (policy.name.clone(), parameters.collect::<Vec<_>>())
    };
    let selectors: Vec<_> = registry.selectors().map(described).collect();
    let actions: Vec<_> = registry.actions().map(described).collect();
    assert_eq!(selectors, known(&chain::SELECTORS));
    assert_eq!(actions, known(&chain::ACTIONS));
}
