// SPDX-License-Identifier: MIT OR Apache-2.0
//! The TCP and MPTCP connections that chains keep count of: behind `connections`.
//!
//! Read from the maps of the running generations; no process needs to have watched. Those that a
//! chain with an MPTCP policy learnt are there, and with the action `record` every TCP connection,
//! with its counters.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::event::hex;
use crate::engine::bpf::types::{self, subflow_flags};
use crate::engine::bpf::{bytes_of, value_of};
use crate::engine::store::Store;
use crate::engine::sys;
use crate::netns;
use crate::policy::btf::SUBFLOWS;

/// An MPTCP connection with its subflows, or a TCP connection as the only one.
#[derive(Clone, Debug, PartialEq)]
pub struct Connection {
    /// Tokens of this side's and the other side's host (RFC 8684, 3.1); none for TCP, or where the
    /// handshake was not seen.
    pub tokens: [Option<u32>; 2],
    pub mptcp: bool,
    /// By device, then addresses.
    pub subflows: Vec<Subflow>,
}

/// One subflow on one device.
#[derive(Clone, Debug, PartialEq)]
pub struct Subflow {
    pub device: String,
    pub state: State,
    /// Joined a connection that another subflow began.
    pub joined: bool,
    /// Whether this side opened it; none where the SYN was not seen.
    pub opened_here: Option<bool>,
    /// This side of the device, as for chains.
    pub local: End,
    pub remote: End,
    /// How long no packet has passed.
    pub idle: Duration,
}

/// How far a subflow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A handshake that is not over, or plain TCP.
    Open,
    Established,
    /// An end has sent FIN.
    Closing,
    /// An end has sent RST.
    Reset,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            State::Open => "open",
            State::Established => "established",
            State::Closing => "closing",
            State::Reset => "reset",
        }
    }

    /// Whether nothing more is to be expected.
    pub fn is_over(self) -> bool {
        matches!(self, State::Closing | State::Reset)
    }
}

/// One end, and what it sent through the device.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    pub address: SocketAddr,
    /// Id of its address (RFC 8684, 3.2); 0 on the first subflow.
    pub address_id: u8,
    /// It asked for the subflow to be used as backup only.
    pub backup: bool,
    /// Segments on the wire; 0 without the action `record`, as the rest.
    pub packets: u64,
    /// Of payload, repeated ones included.
    pub bytes: u64,
    pub retransmissions: u64,
    /// From the device to the other end and back, by timestamps (RFC 7323); none yet, or only one
    /// direction is recorded.
    pub rtt: Option<Rtt>,
    /// Payload in bits per second; none in a single reading.
    pub rate: Option<f64>,
}

/// A round-trip time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rtt {
    pub min: Duration,
    /// Each sample counts for an eighth.
    pub smoothed: Duration,
    pub last: Duration,
}

/// The connections of the current network namespace, as they are.
///
/// # Errors
/// No permission.
pub fn read(store: &Store) -> Result<Vec<Connection>> {
    let now = sys::monotonic().context("read the clock")?;
    let devices = maps(store)?;
    let mut subflows = Vec::new();
    for ((_, device), map) in devices {
        let entries = sys::map_dump(map).context("read the map of subflows")?;
        for (key, value) in entries.iter() {
            let (Some(id), Some(state)) = (value_of(key), value_of(value)) else {
                continue;
            };
            subflows.push(subflow(&device, &id, &state, now));
        }
    }
    Ok(group(subflows))
}

/// The maps of subflows, by index and name of their device.
fn maps(store: &Store) -> Result<BTreeMap<(u32, String), OwnedFd>> {
    /// How often to look again because a command replaced a generation meanwhile.
    const AGAIN: usize = 3;
    let here = netns::current_id()?;
    let mut devices = BTreeMap::new();
    for _ in 0..=AGAIN {
        let mut replaced = false;
        for attachment in store.attachments()? {
            if attachment.netns != here {
                continue;
            }
            let device = (attachment.place.ifindex, attachment.place.device.clone());
            match attachment.kept_if_there(SUBFLOWS)? {
                Some(map) => drop(devices.insert(device, map)),
                None => replaced |= attachment.record.reads.contains(SUBFLOWS),
            }
        }
        if !replaced {
            break;
        }
    }
    Ok(devices)
}

/// The same with rates, from two readings `over` apart.
///
/// # Errors
/// No permission.
pub fn read_with_rates(store: &Store, over: Duration) -> Result<Vec<Connection>> {
    let before = read(store)?;
    let begin = Instant::now();
    std::thread::sleep(over);
    let mut after = read(store)?;
    let seconds = begin.elapsed().as_secs_f64();
    let sent: BTreeMap<_, _> = before.iter().flat_map(Connection::sent).collect();
    for subflow in after
        .iter_mut()
        .flat_map(|connection| &mut connection.subflows)
    {
        let key = subflow.key();
        for (end, side) in [(&mut subflow.local, true), (&mut subflow.remote, false)] {
            let earlier = sent.get(&(key.clone(), side)).copied().unwrap_or(0);
            let bytes = end.bytes.saturating_sub(earlier);
            end.rate = Some(bytes as f64 * 8.0 / seconds);
        }
    }
    Ok(after)
}

type Key = (String, SocketAddr, SocketAddr);

impl Subflow {
    fn key(&self) -> Key {
        (self.device.clone(), self.local.address, self.remote.address)
    }

    fn to_json(&self) -> Value {
        json!({
            "device": self.device,
            "state": self.state.name(),
            "joined": self.joined,
            "opened_here": self.opened_here,
            "idle_ms": self.idle.as_millis() as u64,
            "local": self.local.to_json(),
            "remote": self.remote.to_json(),
        })
    }
}

impl End {
    fn to_json(&self) -> Value {
        let micros = |time: Duration| time.as_nanos() as f64 / 1e3;
        json!({
            "address": self.address.ip(),
            "port": self.address.port(),
            "address_id": self.address_id,
            "backup": self.backup,
            "packets": self.packets,
            "bytes": self.bytes,
            "retransmissions": self.retransmissions,
            "rtt_us": self.rtt.map(|rtt| json!({
                "min": micros(rtt.min),
                "smoothed": micros(rtt.smoothed),
                "last": micros(rtt.last),
            })),
            "bits_per_second": self.rate.map(f64::round),
        })
    }
}

impl Connection {
    fn sent(&self) -> impl Iterator<Item = ((Key, bool), u64)> {
        self.subflows.iter().flat_map(|subflow| {
            [
                ((subflow.key(), true), subflow.local.bytes),
                ((subflow.key(), false), subflow.remote.bytes),
            ]
        })
    }

    /// Whether all its subflows are over.
    pub fn is_over(&self) -> bool {
        self.subflows.iter().all(|subflow| subflow.state.is_over())
    }

    /// An item of `connections --json`.
    pub fn to_json(&self) -> Value {
        let subflows: Vec<Value> = self.subflows.iter().map(Subflow::to_json).collect();
        json!({
            "mptcp": self.mptcp,
            "local_token": self.tokens[0].map(hex),
            "remote_token": self.tokens[1].map(hex),
            "subflows": subflows,
        })
    }
}

/// The table `connections` prints, within 100 columns.
pub fn table(connections: &[Connection]) -> String {
    if connections.is_empty() {
        return "no connections are known here\n".to_owned();
    }
    let mut table = format!(
        "{:<10} {:<44} {:<12} {:>9} {:>10} {:>9}\n",
        "TOKEN", "LOCAL -> REMOTE", "STATE", "RTT ms", "OUT Mbit/s", "IN Mbit/s"
    );
    for connection in connections {
        let mut name = match (connection.mptcp, connection.tokens[0]) {
            (false, _) => "tcp".to_owned(),
            (true, Some(token)) => hex(token),
            (true, None) => "?".to_owned(),
        };
        for subflow in &connection.subflows {
            let ends = format!("{} -> {}", subflow.local.address, subflow.remote.address);
            let backup = subflow.local.backup || subflow.remote.backup;
            let state = match (subflow.state, backup) {
                (State::Established, true) => "backup",
                (state, _) => state.name(),
            };
            let rtt = subflow
                .local
                .rtt
                .map(|rtt| rtt.smoothed.as_secs_f64() * 1e3);
            let number = |value: Option<f64>| {
                value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"))
            };
            let megabits = |end: &End| number(end.rate.map(|rate| rate / 1e6));
            let (out, into) = (megabits(&subflow.local), megabits(&subflow.remote));
            let figures = format!("{:<12} {:>9} {out:>10} {into:>9}", state, number(rtt));
            // Two IPv6 addresses need a line of their own.
            if ends.chars().count() > 44 {
                table.push_str(&format!(
                    "{name:<10} {ends}\n{:<10} {:<44} {figures}\n",
                    "", ""
                ));
            } else {
                table.push_str(&format!("{name:<10} {ends:<44} {figures}\n"));
            }
            name.clear();
        }
    }
    table
}

fn subflow(device: &str, id: &types::flow_id, known: &types::subflow, now: Duration) -> Found {
    let local = usize::from(known.local & 1);
    let flag = |flag: subflow_flags| known.flags & flag.0 != 0;
    let state = match () {
        () if flag(subflow_flags::SUBFLOW_RESET) => State::Reset,
        () if flag(subflow_flags::SUBFLOW_FIN) => State::Closing,
        () if flag(subflow_flags::SUBFLOW_ESTABLISHED) => State::Established,
        () => State::Open,
    };
    let seen = known.ends[0].seen_at.max(known.ends[1].seen_at);
    let token = |at: usize| Some(known.ends[at].token).filter(|token| *token != 0);
    Found {
        tokens: [token(local), token(1 - local)],
        mptcp: flag(subflow_flags::SUBFLOW_ACCEPTED) || flag(subflow_flags::SUBFLOW_ESTABLISHED),
        subflow: Subflow {
            device: device.to_owned(),
            state,
            joined: flag(subflow_flags::SUBFLOW_JOIN),
            opened_here: (known.initiator < 2).then_some(known.initiator == known.local),
            local: end(id, known, local),
            remote: end(id, known, 1 - local),
            idle: now.saturating_sub(Duration::from_nanos(seen)),
        },
    }
}

fn end(id: &types::flow_id, known: &types::subflow, at: usize) -> End {
    let end = &known.ends[at];
    let rtt = Rtt {
        min: Duration::from_nanos(end.rtt_min),
        smoothed: Duration::from_nanos(end.rtt_smoothed),
        last: Duration::from_nanos(end.rtt_last),
    };
    End {
        address: ends(id)[at],
        address_id: end.address_id,
        backup: end.backup != 0,
        packets: end.packets,
        bytes: end.bytes,
        retransmissions: end.retransmissions,
        rtt: (end.rtt_min != 0).then_some(rtt),
        rate: None,
    }
}

/// The two ends of a flow, in its order.
pub(crate) fn ends(id: &types::flow_id) -> [SocketAddr; 2] {
    [0, 1].map(|at| SocketAddr::new(address(id, at), u16::from_be(id.port[at])))
}

/// The address of an end, which a flow begins with in their 128-bit form; IPv4 where it is mapped.
fn address(id: &types::flow_id, at: usize) -> IpAddr {
    let mut octets = [0; 16];
    octets.copy_from_slice(&bytes_of(id)[16 * at..16 * at + 16]);
    Ipv6Addr::from(octets).to_canonical()
}

struct Found {
    tokens: [Option<u32>; 2],
    mptcp: bool,
    subflow: Subflow,
}

/// Joins the subflows that share a token.
fn group(mut found: Vec<Found>) -> Vec<Connection> {
    found.sort_by_cached_key(|it| (it.subflow.joined, it.subflow.key()));
    let mut connections: Vec<Connection> = Vec::new();
    // Tokens to the first connection that has them.
    let mut by_token: HashMap<u32, usize> = HashMap::new();
    for Found {
        tokens,
        mptcp,
        subflow,
    } in found
    {
        let known = tokens.iter().flatten().filter(|_| mptcp);
        let at = known.filter_map(|token| by_token.get(token)).min().copied();
        let at = at.unwrap_or(connections.len());
        match connections.get_mut(at) {
            Some(connection) => {
                for (own, token) in connection.tokens.iter_mut().zip(tokens) {
                    *own = own.or(token);
                }
                connection.subflows.push(subflow);
            }
            None => connections.push(Connection {
                tokens,
                mptcp,
                subflows: vec![subflow],
            }),
        }
        for token in connections[at].tokens.into_iter().flatten() {
            let first = by_token.entry(token).or_insert(at);
            *first = at.min(*first);
        }
    }
    connections
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use nix::time::{ClockId, clock_gettime};

    use super::*;

    fn found(device: &str, tokens: [u32; 2], joined: bool) -> Found {
        let id = types::flow_id::default();
        let mut known = types::subflow {
            flags: subflow_flags::SUBFLOW_ACCEPTED.0,
            ..Default::default()
        };
        if joined {
            known.flags |= subflow_flags::SUBFLOW_JOIN.0;
        }
        known.ends[0].token = tokens[0];
        known.ends[1].token = tokens[1];
        subflow(device, &id, &known, Duration::ZERO)
    }

    #[test]
    fn subflows_are_joined_by_either_token() {
        let connections = group(vec![
            found("path2", [0, 7], true),
            found("path1", [5, 7], false),
            found("path1", [9, 8], false),
            found("path3", [0, 0], false),
            found("path3", [0, 0], false),
        ]);
        let devices: Vec<usize> = connections.iter().map(|it| it.subflows.len()).collect();
        assert_eq!(devices, [2, 1, 1, 1]);
        assert_eq!(connections[0].tokens, [Some(5), Some(7)]);
    }

    /// Each subflow finds its connection at once, however many there are.
    #[test]
    fn many_are_grouped_quickly() {
        const COUNT: u32 = 20_000;
        // Of this thread, whatever else runs.
        let clock = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
        let joined = (1..=COUNT).map(|token| found("path2", [0, 2 * token], true));
        let first = (1..=COUNT).map(|token| found("path1", [2 * token + 1, 2 * token], false));
        let plain = (0..COUNT).map(|_| Found {
            mptcp: false,
            ..found("path1", [0, 0], false)
        });
        let begin = clock();
        let connections = group(joined.chain(first).chain(plain).collect());
        let spent = clock() - begin;
        let of = |mptcp| connections.iter().filter(move |it| it.mptcp == mptcp);
        assert_eq!([true, false].map(|it| of(it).count()), [COUNT as usize; 2]);
        assert!(of(true).all(|it| it.subflows.len() == 2 && !it.subflows[0].joined));
        assert!(spent < Duration::from_secs(5), "{spent:?}");
    }

    #[test]
    fn the_table_is_narrow() {
        let mut connections = group(vec![found("path1", [5, 7], false)]);
        let long = "[2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff]:65535"
            .parse()
            .unwrap();
        connections[0].subflows[0].remote.address = long;
        let table = table(&connections);
        assert!(
            table.lines().all(|line| line.chars().count() <= 100),
            "{table}"
        );
        assert!(table.contains("00000005"), "{table}");
    }
}
