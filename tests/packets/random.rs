// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random packets through every action: nothing may break, whatever comes.

use policy_chain::engine::generation::CarrierChoice;
use policy_chain::hook::Hook;
use policy_chain::replay::Verdict;
use serde_json::{Value, json};

use crate::bench::{Bench, with_chains};
use crate::frames::*;

const FRAMES: usize = 2000;

/// Marsaglia's xorshift64: the same packets in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Less than `bound`.
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }

    fn choose<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    /// Up to 40 bytes of options, mostly well-formed.
    fn options(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while !self.one_in(4) {
            let kind = self.choose(&[1, 1, 1, 2, 3, 4, 5, 8, 30, 30, 30, 253, 0]);
            match kind {
                0 if self.one_in(4) => all.push(0),
                0 | 1 => all.push(1),
                2 if !self.one_in(8) => {
                    all.extend([2, 4]);
                    all.extend(self.bytes(2));
                }
                _ => {
                    let length = 2 + self.below(14);
                    all.extend([kind, length as u8]);
                    all.extend(self.bytes(length - 2));
                }
            }
        }
        if self.one_in(20) {
            let count = self.below(40);
            all = self.bytes(count);
        }
        all.truncate(40);
        words(&[&all])
    }

    fn frame(&mut self) -> Frame {
        let mut frame = if self.one_in(2) { v4() } else { v6() };
        frame.tags = self.choose(&[vec![], vec![], vec![0x8100], vec![0x88a8, 0x8100]]);
        frame.options = self.options();
        frame.flags = self.choose(&[ACK, ACK, PSH | ACK, SYN, SYN | ACK, FIN | ACK]);
        frame.window = self.next() as u16;
        (frame.src_port, frame.dst_port) = (self.next() as u16, self.next() as u16);
        if self.one_in(2) {
            let count = self.below(60);
            frame.payload = self.bytes(count);
        }
        if frame.src == V4_SRC {
            let count = self.choose(&[0, 0, 4, 40]);
            frame.ip_options = vec![1; count];
            frame.fragment = self.choose(&[0, 0, 0, 0, 0, 0, 0, MORE_FRAGMENTS, 7]);
        } else if self.one_in(3) {
            let kind = self.choose(&[HOP_BY_HOP, DESTINATION, ROUTING]);
            let mut header = vec![0; 8 * (1 + self.below(8))];
            header[1] = (header.len() / 8 - 1) as u8;
            frame.extensions = vec![(kind, header)];
        }
        if self.one_in(8) {
            frame.check = Check::Seed;
        }
        if self.one_in(20) {
            frame.protocol = UDP;
        }
        if self.one_in(4) {
            frame = frame.padded();
        }
        frame
    }

    /// A packet, often damaged, at times nothing but noise behind an Ethernet header.
    fn packet(&mut self) -> Vec<u8> {
        let mut bytes = self.frame().build();
        match self.below(8) {
            0 => {
                let count = self.below(120);
                bytes.truncate(14);
                let noise = self.bytes(count);
                bytes.extend(noise);
            }
            1 => bytes.truncate(14 + self.below(100)),
            2..=4 => {
                for _ in 0..=self.below(3) {
                    let at = 12 + self.below(bytes.len() - 12);
                    bytes[at] = self.next() as u8;
                }
            }
            _ => {}
        }
        bytes
    }
}

/// Whether the kernel's test run takes the frame on TC.
fn runs_on_tc(frame: &[u8]) -> bool {
    let least = match frame[12..14] {
        [8, 0] => 34,
        [0x86, 0xdd] => 54,
        _ => 14,
    };
    frame.len() >= least
}

fn changes_only_headers(what: &str, before: &[u8], after: &[u8]) {
    assert_eq!(before[..12], after[..12], "{what}");
    let grown = after.len() as i64 - before.len() as i64;
    assert!((0..=40).contains(&grown), "{what}: grew by {grown}");
    if let (Sums::Right | Sums::Seed, Some(sent)) = (sums(before), payload(before)) {
        assert_eq!(Some(sent), payload(after), "{what}");
    }
}

fn fuzz(action: Value, seed: u64) {
    let redirects = action["action"] == "redirect";
    let sub = json!([{ "name": "sub", "selectors": [{ "selector": "tcp" }],
                       "actions": [{ "action": "count" }] }]);
    let chain = with_chains(json!({ "actions": [action] }), sub, json!({}));
    for hook in Hook::ALL {
        let mut bench = Bench::load(&chain, hook, CarrierChoice::Auto);
        let mut random = Random(seed);
        for number in 0..FRAMES {
            let frame = random.packet();
            if hook != Hook::Xdp && !runs_on_tc(&frame) {
                continue;
            }
            let what = format!("{action}, frame {number}");
            let outcome = bench.run(&what, &frame);
            if !redirects && outcome.verdict != Verdict::Drop {
                changes_only_headers(&what, &frame, &outcome.frame);
            }
            if !outcome.reasons.is_empty() {
                assert_eq!(outcome.frame, frame, "{what}: {:?}", outcome.reasons);
            }
        }
    }
}

#[test]
fn verdicts_of_random_packets() {
    for action in [
        json!({ "action": "count" }),
        json!({ "action": "pass" }),
        json!({ "action": "drop" }),
        json!({ "action": "goto", "chain": "sub" }),
        json!({ "action": "redirect", "device": "lo", "src_mac": "02:00:00:00:00:aa" }),
        json!({ "action": "redirect", "device": "lo", "neighbour": true }),
    ] {
        fuzz(action, 0x2545_f491_4f6c_dd1d);
    }
}

#[test]
fn fields_of_random_packets() {
    for action in [
        json!({ "action": "set_window", "raw": true, "bytes": 9 }),
        json!({ "action": "set_mss", "bytes": 536 }),
        json!({ "action": "set_mss", "bytes": 536, "mode": "set" }),
    ] {
        fuzz(action, 0x9e37_79b9_7f4a_7c15);
    }
}

#[test]
fn options_of_random_packets() {
    for action in [
        json!({ "action": "strip_option", "kind": "mptcp" }),
        json!({ "action": "strip_option", "kind": "mptcp", "subtype": "add_addr" }),
        json!({ "action": "strip_option", "kind": "timestamps" }),
        json!({ "action": "insert_option", "kind": 253, "data": "aabb" }),
        json!({ "action": "insert_option", "kind": 253, "data": "aabbccddee", "again": true }),
        json!({ "action": "strip_option", "kind": "mptcp", "unsafe": true }),
        json!({ "action": "mp_prio", "backup": true, "once": false }),
        json!({ "action": "remove_addr", "id": 3, "every": "1ns" }),
        json!({ "action": "add_subflow", "address": "10.0.0.9", "id": 1, "first": 9 }),
        json!({ "action": "hold_add_addr" }),
        json!({ "action": "restore_add_addr" }),
        json!({ "action": "reset_subflow", "first": 1000 }),
        json!({ "action": "record" }),
        json!({ "action": "report" }),
    ] {
        fuzz(action, 0xd1b5_4a32_d192_ed03);
    }
}

#[test]
fn random_packets_through_selectors() {
    for selector in [
        json!({ "selector": "tcp" }),
        json!({ "selector": "ip_pair", "src": "10.0.0.1" }),
        json!({ "selector": "prefix", "end": "src", "keys": [{ "prefix": "10.0.0.0/8" }] }),
        json!({ "selector": "flow", "src": "2001:db8::1", "dst_port": 80 }),
        json!({ "selector": "service", "port": ["1-30000"] }),
        json!({ "selector": "tcp_flags", "any": ["syn"] }),
        json!({ "selector": "mptcp" }),
        json!({ "selector": "mptcp", "subtype": ["dss", "add_addr"], "flags": 1 }),
        json!({ "selector": "mptcp", "address_id": [1, 2], "backup": "set" }),
        json!({ "selector": "mptcp_connection", "keys": [{ "token": "1" }] }),
    ] {
        let mut not = selector.clone();
        not["not"] = true.into();
        let chain = |selector: &Value| {
            with_chains(
                json!({ "selectors": [selector], "then": "drop" }),
                json!([]),
                json!({}),
            )
        };
        for hook in Hook::ALL {
            let mut bench = Bench::load(&chain(&selector), hook, CarrierChoice::Auto);
            let mut negated = Bench::load(&chain(&not), hook, CarrierChoice::Auto);
            let mut random = Random(0x5851_f42d_4c95_7f2d);
            for number in 0..FRAMES {
                let frame = random.packet();
                if hook != Hook::Xdp && !runs_on_tc(&frame) {
                    continue;
                }
                let what = format!("{selector}, frame {number}");
                let (one, other) = (bench.run(&what, &frame), negated.run(&what, &frame));
                assert_eq!((&one.frame, &other.frame), (&frame, &frame), "{what}");
                assert_eq!(one.reasons, other.reasons, "{what}");
                // either matches or its negation does, unless the packet does not say
                let matches = u8::from(one.matched) + u8::from(other.matched);
                assert_eq!(matches, u8::from(one.reasons.is_empty()), "{what}");
            }
        }
    }
}
