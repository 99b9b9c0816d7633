// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random chains and packets, and what is left of those that fail when they are made small.

use policy_chain::hook::Hook;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::Value;

use crate::differential::{Replayer, Session, TC_MOST, Tally, needs_device, row};
use crate::packet::Packet;
use crate::{generate_chains, generate_packets, layers};

/// Packets that each chain gets: loading one takes as long as many hundred packets.
const PACKETS: usize = 400;
/// The same where there are many.
const PACKETS_OF_MANY: usize = 2000;
const MANY: u64 = 200_000;
/// Of these, at most so many that need a device, on one chain of so many.
const BY_DEVICE: u64 = 4;
const CHAINS_BY_DEVICE: u64 = 20;
/// Attempts to make a failure smaller.
const ATTEMPTS: usize = 400;

type PacketTree = Box<dyn ValueTree<Value = Packet>>;

/// Runs `packets` packets; the same ones for the same seed.
pub fn search(hook: Hook, packets: u64, seed: u64) -> Tally {
    let mut bytes = [0x5a; 16];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8] = hook as u8;
    let random = TestRng::from_seed(RngAlgorithm::XorShift, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), random);
    let files = generate_chains::files(hook);
    let strategy = generate_packets::packet();
    let of_each = if packets < MANY {
        PACKETS
    } else {
        PACKETS_OF_MANY
    };
    let mut tally = Tally::default();
    for sort in files.iter().cycle() {
        if tally.packets >= packets {
            break;
        }
        let file = sort.new_tree(&mut runner).unwrap().current();
        let mut trees: Vec<PacketTree> = (0..of_each)
            .map(|_| strategy.new_tree(&mut runner).unwrap())
            .collect();
        if let Err(ran) = run(hook, &file, &trees, &mut tally) {
            let mut number = 0..;
            trees.retain(|_| ran.contains(&number.next().unwrap_or_default()));
            panic!("{}", smallest(hook, file, trees));
        }
    }
    tally
}

/// Whether TC sees less of a frame on a device than there is in it: before ingress the outer tag is
/// taken out; and of a long packet, headers behind the first ones may be where programs cannot
/// reach them.
fn device_alters(hook: Hook, frame: &[u8]) -> bool {
    let is_tagged = matches!(frame[12..14], [0x81, 0x00] | [0x88, 0xa8]);
    let is_extended = match layers::ip(frame) {
        Ok(ip) => ip.transport > ip.at + 60,
        Err(_) => true,
    };
    (hook == Hook::TcIngress && is_tagged) || (frame.len() > TC_MOST && is_extended)
}

/// Whether a chain redirects: in the namespace of a carrier to whatever has the device's number
/// there.
fn redirects(file: &Value) -> bool {
    let chains = file["chains"].as_array().into_iter().flatten();
    let mut actions = chains.flat_map(|chain| chain["actions"].as_array().into_iter().flatten());
    actions.any(|action| action["action"] == "redirect")
}

/// Runs packets through a chain, up to the first that the model sees another way: then an error
/// with the numbers of those that were run.
fn run(
    hook: Hook,
    file: &Value,
    trees: &[PacketTree],
    tally: &mut Tally,
) -> Result<(), Vec<usize>> {
    let mut session =
        Session::new(file, hook).unwrap_or_else(|error| panic!("{hook}: {error}\n{file}"));
    tally.chains += 1;
    let mut by_device = if tally.chains >= tally.next_by_device && !redirects(file) {
        tally.next_by_device = tally.chains + CHAINS_BY_DEVICE;
        BY_DEVICE
    } else {
        0
    };
    let mut ran = Vec::new();
    for (number, tree) in trees.iter().enumerate() {
        let frame = tree.current().build();
        if needs_device(hook, &frame) {
            if by_device == 0 || device_alters(hook, &frame) {
                tally.skipped += 1;
                continue;
            }
            by_device -= 1;
        }
        ran.push(number);
        let (expected, outcome, compared) = session.run(&frame);
        if compared.is_err() {
            return Err(ran);
        }
        tally.add(&frame, &expected, &outcome);
    }
    Ok(())
}

fn frames(trees: &[PacketTree]) -> Vec<Vec<u8>> {
    trees.iter().map(|tree| tree.current().build()).collect()
}

/// Makes a failing chain and its packets small, and describes what is left.
fn smallest(hook: Hook, mut file: Value, mut trees: Vec<PacketTree>) -> String {
    let mut replayer = Replayer::new(hook);
    let mut fails = |file: &Value, frames: &[Vec<u8>]| replayer.difference(file, frames).is_some();
    let last = trees.split_off(trees.len() - 1);
    // most need nothing of what came before
    if fails(&file, &frames(&last)) {
        trees = last;
    } else {
        trees.extend(last);
        trees = drop_packets(trees, |frames| fails(&file, frames));
    }
    let mut kept = frames(&trees);
    for _ in 0..2 {
        file = prune(file, |file| fails(file, &kept));
        for number in 0..trees.len() {
            let mut others = kept.clone();
            let packet = shrink(&mut *trees[number], |packet| {
                others[number] = packet.build();
                fails(&file, &others)
            });
            if let Some(packet) = packet {
                kept[number] = packet.build();
            }
        }
    }
    let difference = replayer.difference(&file, &kept);
    let difference = difference.unwrap_or_else(|| "it went away".to_owned());
    format!(
        "{hook}: the programs differ from the model:\n{difference}{}",
        row(&file, hook, &kept)
    )
}

/// The smallest value that still fails, as far as proptest finds one.
fn shrink<T>(
    tree: &mut (impl ValueTree<Value = T> + ?Sized),
    mut fails: impl FnMut(&T) -> bool,
) -> Option<T> {
    let mut smallest = None;
    let mut more = tree.simplify();
    for _ in 0..ATTEMPTS {
        if !more {
            break;
        }
        let value = tree.current();
        more = if fails(&value) {
            smallest = Some(value);
            tree.simplify()
        } else {
            tree.complicate()
        };
    }
    smallest
}

/// Where everything in a JSON value is, the outer before the inner.
fn places(value: &Value, at: &str) -> Vec<String> {
    let inner: Vec<(String, &Value)> = match value {
        Value::Object(members) => members
            .iter()
            .map(|(name, value)| (name.clone(), value))
            .collect(),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(number, value)| (number.to_string(), value))
            .collect(),
        _ => Vec::new(),
    };
    let below = inner.into_iter().rev().flat_map(|(name, value)| {
        let place = format!("{at}/{name}");
        let deeper = places(value, &place);
        [vec![place], deeper].concat()
    });
    below.collect()
}

fn without(value: &Value, place: &str) -> Option<Value> {
    let (at, name) = place.rsplit_once('/')?;
    let mut value = value.clone();
    match value.pointer_mut(at)? {
        Value::Object(members) => members.remove(name).map(drop),
        Value::Array(items) => {
            let number = name.parse().ok()?;
            (number < items.len()).then(|| drop(items.remove(number)))
        }
        _ => None,
    }?;
    Some(value)
}

/// Takes out of a chain file what need not be there for it to fail. What cannot be loaded does
/// not.
fn prune(mut file: Value, mut fails: impl FnMut(&Value) -> bool) -> Value {
    for place in places(&file, "") {
        if let Some(smaller) = without(&file, &place).filter(|smaller| fails(smaller)) {
            file = smaller;
        }
    }
    file
}

/// Leaves out what does not matter to the last.
fn drop_packets(
    mut trees: Vec<PacketTree>,
    mut fails: impl FnMut(&[Vec<u8>]) -> bool,
) -> Vec<PacketTree> {
    let mut size = trees.len() / 2;
    while size > 0 {
        let mut at = 0;
        while at + size < trees.len() {
            let mut without = frames(&trees);
            without.drain(at..at + size);
            if fails(&without) {
                trees.drain(at..at + size);
            } else {
                at += size;
            }
        }
        size /= 2;
    }
    trees
}
