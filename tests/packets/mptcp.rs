// SPDX-License-Identifier: MIT OR Apache-2.0
//! Policies that know Multipath TCP (RFC 8684): connections from their handshake on, as learners
//! see them. Options, tokens and HMACs are made here, without the code under test.

mod adding;
mod announcements;
mod cadences;
mod connections;
mod reports;
mod resets;
mod selector;

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use policy_chain::engine::generation::CarrierChoice;
use policy_chain::engine::sys;
use policy_chain::hook::Hook;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::bench::{Bench, Row, check_rows, file, leaves};
use crate::frames::*;

/// Subtypes in the upper half of an option's third byte.
const MP_JOIN: u8 = 0x10;
const DSS: u8 = 0x20;
const ADD_ADDR: u8 = 0x30;
const REMOVE_ADDR: u8 = 0x40;
const MP_PRIO: u8 = 0x50;
const MP_FASTCLOSE: u8 = 0x70;
const MP_TCPRST: u8 = 0x80;

/// Bits of the fourth byte of a DSS option.
const DATA_ACK: u8 = 1;
const MAPPING: u8 = 4;
const DATA_FIN: u8 = 0x10;

const CLIENT_KEY: u64 = 0x0123_4567_89ab_cdef;
const SERVER_KEY: u64 = 0xf0e1_d2c3_b4a5_9687;

/// An MPTCP option.
fn mp(bytes: &[&[u8]]) -> Vec<u8> {
    let body = bytes.concat();
    [&[30, 2 + body.len() as u8], &body[..]].concat()
}

/// What stands for a key on the wire (RFC 8684, 3.1).
fn token(key: u64) -> u32 {
    let hash = Sha256::digest(key.to_be_bytes());
    u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]])
}

fn hex(token: u32) -> String {
    format!("{token:08x}")
}

fn timestamps(value: u32, echo: u32) -> Vec<u8> {
    [&[8, 10][..], &value.to_be_bytes(), &echo.to_be_bytes()].concat()
}

/// A DSS option that acknowledges.
fn data_ack() -> Vec<u8> {
    mp(&[&[DSS, DATA_ACK], &[0, 0, 0, 9]])
}

/// One with a mapping, and no checksum.
fn mapping() -> Vec<u8> {
    mp(&[&[DSS, DATA_ACK | MAPPING], &[0, 0, 0, 9], &[7; 10]])
}

pub fn announcement(id: u8, length: usize) -> Vec<u8> {
    let rest: Vec<u8> = (4..length).map(|at| (at * 7) as u8 ^ id).collect();
    mp(&[&[ADD_ADDR, id], &rest])
}

/// A connection, or a subflow of one; `frame` is a bare ACK of its client.
#[derive(Clone)]
struct Connection {
    frame: Frame,
    client: u64,
    server: u64,
}

impl Connection {
    fn new(frame: Frame) -> Connection {
        Connection {
            frame,
            client: CLIENT_KEY,
            server: SERVER_KEY,
        }
    }

    /// Of both versions of IP, and with either end sorted first.
    fn all() -> [Connection; 4] {
        [v4(), v6(), v4().back(), v6().back()].map(Connection::new)
    }

    /// Another subflow of it.
    fn beside(&self) -> Connection {
        let mut other = self.clone();
        other.frame = self.frame.clone().ports(41_111, 82);
        other
    }

    fn client(&self) -> Frame {
        self.frame.clone()
    }

    fn server(&self) -> Frame {
        self.frame.clone().back()
    }

    fn client_with(&self, options: &[&[u8]]) -> Frame {
        self.client().options(&words(options))
    }

    fn server_with(&self, options: &[&[u8]]) -> Frame {
        self.server().options(&words(options))
    }

    fn syn(&self) -> Frame {
        let capable = mp(&[&[1, 1]]);
        self.client_with(&[&[2, 4, 5, 0xb4], &capable]).flags(SYN)
    }

    fn syn_ack(&self) -> Frame {
        let capable = mp(&[&[1, 1], &self.server.to_be_bytes()]);
        self.server_with(&[&[2, 4, 5, 0xb4], &capable])
            .flags(SYN | ACK)
    }

    /// The third packet, with both keys.
    fn third(&self) -> Frame {
        let keys = [self.client.to_be_bytes(), self.server.to_be_bytes()].concat();
        self.client_with(&[&mp(&[&[1, 1], &keys])])
    }

    fn opening(&self) -> [Frame; 3] {
        [self.syn(), self.syn_ack(), self.third()]
    }

    /// The handshake of a subflow that joins: the token is the server's.
    fn joining(&self) -> [Frame; 3] {
        let request = mp(&[
            &[MP_JOIN | 1, 5],
            &token(self.server).to_be_bytes(),
            &[1; 4],
        ]);
        let answer = mp(&[&[MP_JOIN, 6], &[2; 12]]);
        let proof = mp(&[&[MP_JOIN, 0], &[3; 20]]);
        [
            self.client_with(&[&request]).flags(SYN),
            self.server_with(&[&answer]).flags(SYN | ACK),
            self.client_with(&[&proof]),
        ]
    }

    /// Data of both ends with their first DSS.
    fn talk(&self) -> [Frame; 2] {
        [
            self.client_with(&[&mapping(), &timestamps(1, 2)])
                .payload_before(b"ping"),
            self.server_with(&[&mapping(), &timestamps(1, 2)])
                .payload_before(b"pong"),
        ]
    }
}

/// The connection of a client's packet, from its SYN to the second DSS of each end. Another
/// `initial` sequence number is another connection.
pub fn established(packet: &Frame, initial: u32) -> Vec<Frame> {
    let base = if packet.src.is_ipv4() { v4() } else { v6() };
    let connection = Connection::new(
        base.between(packet.src, packet.dst)
            .ports(packet.src_port, packet.dst_port),
    );
    let talk = [connection.talk(), connection.talk()].concat();
    let [syn, syn_ack, third] = connection.opening();
    let opening = [syn.sequence(initial), syn_ack, third];
    opening.into_iter().chain(talk).collect()
}

/// An ADD_ADDR by the client of such a connection.
pub fn add_addr_of_client(id: u8, address: IpAddr) -> Vec<u8> {
    adding::add_addr(CLIENT_KEY, SERVER_KEY, id, address, None)
}

fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// The name of a connection in maps, if the source of the packet is the first end.
fn flow_id(frame: &Frame) -> Vec<u8> {
    let ports = [frame.src_port.to_be_bytes(), frame.dst_port.to_be_bytes()];
    [
        &mapped(frame.src)[..],
        &mapped(frame.dst),
        &ports[0],
        &ports[1],
    ]
    .concat()
}

/// Puts an option where `hold_add_addr` would, for both ends (`struct held_options` of
/// src/bpf/mptcp_types.h).
pub fn hold(held: &OwnedFd, frame: &Frame, option: &[u8]) {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap());
    let mut slot = vec![0; 48];
    slot[..8].copy_from_slice(&(now.as_nanos() as u64).to_ne_bytes());
    slot[8..8 + option.len()].copy_from_slice(option);
    slot[40] = option.len() as u8;
    let end = [slot, vec![0; 3 * 48]].concat();
    let value = [&end[..], &end].concat();
    for frame in [frame.clone(), frame.clone().back()] {
        sys::map_update(held, &flow_id(&frame), &value, 0).unwrap();
    }
}

/// A handshake that says nothing to an action that adds options to established subflows.
fn opening_rows(connection: &Connection) -> Vec<Row> {
    shake(&connection.opening(), ["syn", "syn", "not_mptcp"])
}

fn shake(handshake: &[Frame; 3], reasons: [&'static str; 3]) -> Vec<Row> {
    let names = ["SYN", "SYN-ACK", "third packet"];
    let rows = names.into_iter().zip(handshake).zip(reasons);
    rows.map(|((what, frame), reason)| leaves(what, frame, reason))
        .collect()
}

/// Packets one after the other through a chain of one action, on every hook; all its memory is
/// fresh.
#[track_caller]
fn sequence(action: &Value, rows: &[Row]) {
    sequence_in(&file(json!({ "actions": [action] })), rows);
}

#[track_caller]
fn sequence_in(chain: &Value, rows: &[Row]) {
    for hook in Hook::ALL {
        let mut bench = Bench::load(chain, hook, CarrierChoice::Auto);
        check_rows(&mut bench, &chain["chains"][0]["actions"].to_string(), rows);
    }
}

/// Runs frames that a bench is to learn from, whatever becomes of them.
fn feed<'a>(bench: &mut Bench, frames: impl IntoIterator<Item = &'a Frame>) {
    for frame in frames {
        bench.run("to learn from", &frame.build());
    }
}

/// Against `printf ... | sha256sum`.
#[test]
fn tokens_are_of_sha_256() {
    assert_eq!(token(CLIENT_KEY), 0x55c5_3f5d);
    assert_eq!(token(1), 0xcd26_6215);
}
