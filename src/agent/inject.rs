// SPDX-License-Identifier: MIT OR Apache-2.0
//! Wakes subflows. An action that adds an option waits for the next packet of a subflow with room
//! for it. On an idle one there is none, and an end that only sends data has no room; so an
//! acknowledgement that says what the last segment said is sent through the hook. To TCP it is a
//! duplicate; what the chain makes of it is up to the chain.
//!
//! Frames that come in are run through the attached XDP program, or through one that lets them
//! pass, as if the device had received them (`BPF_F_TEST_XDP_LIVE_FRAMES`). Frames that go out
//! are sent from the device.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_gettime};

use super::{Duty, log};
use crate::engine::bpf::types::{ack_key, held_options, saved_ack, subflow, subflow_flags};
use crate::engine::bpf::{bytes_of, value_of};
use crate::engine::store::{Attachment, Store};
use crate::engine::sys;
use crate::hook::Hook;
use crate::monitor::connections;
use crate::netns;
use crate::policy::btf::{ACKS, HELD, SUBFLOWS};
use crate::spec::Mode;

/// The action that waits for its time.
const RESTORE: &str = "restore_add_addr";

/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(150);
/// A subflow without packets for so long is idle.
const IDLE: Duration = Duration::from_millis(100);
/// How often a subflow is woken for a generation that is new, and at least how far apart.
const TRIES: u32 = 3;
const APART: Duration = Duration::from_millis(300);
const TCP: u8 = 6;
const ACK: u8 = 0x10;
/// What is remembered of what was woken; beyond, it is forgotten, and some are woken again.
const MEMORY: usize = 1 << 16;

/// What was done for one end's packets at one generation.
struct Woken {
    times: u32,
    last: Instant,
}

/// The duty to wake what is idle; see the module.
pub struct Injector {
    folder: PathBuf,
    woken: HashMap<(u64, u32, Hook, u64, Vec<u8>), Woken>,
    /// Flows to wake in any case, by both ends.
    asked: HashSet<[SocketAddr; 2]>,
    /// Lets every frame pass; loaded when it is needed.
    pass: Option<OwnedFd>,
    /// What went wrong at the last look, to be said once.
    failed: Option<String>,
}

impl Duty for Injector {
    fn run(&mut self) -> Duration {
        let looked = Store::open(&self.folder).and_then(|store| self.look(&store));
        let failed = looked
            .err()
            .map(|error| format!("cannot wake subflows: {error:#}"));
        if failed != self.failed {
            failed.iter().for_each(|why| log(why));
            self.failed = failed;
        }
        INTERVAL
    }
}

impl Injector {
    pub fn new(folder: &Path) -> Injector {
        Injector {
            folder: folder.to_owned(),
            woken: HashMap::new(),
            asked: HashSet::new(),
            pass: None,
            failed: None,
        }
    }

    /// Wakes these flows, in whichever direction a chain here waits for a packet:
    /// for who has changed what chains do to them, by a set. The order of the ends does not matter.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wake(
        &mut self,
        store: &Store,
        flows: impl IntoIterator<Item = [SocketAddr; 2]>,
    ) -> Result<usize> {
        self.asked = flows
            .into_iter()
            .flat_map(|[a, b]| [[a, b], [b, a]])
            .collect();
        let sent = self.look(store);
        self.asked.clear();
        sent
    }

    /// Looks at the chains of the current network namespace once. Returns how many frames were
    /// sent.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn look(&mut self, store: &Store) -> Result<usize> {
        let here = netns::current_id()?;
        let mut sent = 0;
        if self.woken.len() > MEMORY {
            self.woken.clear();
        }
        for attachment in store.attachments()? {
            if attachment.netns == here && attachment.record.reads.contains(ACKS) {
                sent += self.attachment(&attachment)?;
            }
        }
        Ok(sent)
    }

    fn attachment(&mut self, attachment: &Attachment) -> Result<usize> {
        let acks = attachment.kept(ACKS)?;
        let subflows = attachment.kept(SUBFLOWS)?;
        let mut nodes = attachment.record.nodes.iter();
        let restores = nodes.any(|node| node.policy == RESTORE);
        let held = match restores && attachment.keeps(HELD) {
            true => Some(attachment.kept(HELD)?),
            false => None,
        };
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("read the clock")?;
        let now = Duration::from(now);
        let mut sent = 0;
        let entries = sys::map_dump(acks).context("read the saved acknowledgements")?;
        for (key, value) in entries.iter() {
            let (Some(name), Some(ack)) = (value_of::<ack_key>(key), value_of::<saved_ack>(value))
            else {
                continue;
            };
            if (ack.ingress != 0) != attachment.place.hook.is_ingress() {
                continue;
            }
            let flow = bytes_of(&name.flow);
            let known = sys::map_lookup(&subflows, flow, size_of::<subflow>())?;
            let known = known.and_then(|known| value_of::<subflow>(&known));
            let Some(known) = known.filter(|known| is_open(known, name.sender)) else {
                continue;
            };
            let waits = match &held {
                Some(held) => {
                    let kept = sys::map_lookup(held, flow, size_of::<held_options>())?;
                    let kept = kept.and_then(|kept| value_of::<held_options>(&kept));
                    kept.is_some_and(|kept| has_held(&kept, name.sender))
                }
                None => false,
            };
            let asked = self.asked.contains(&connections::ends(&name.flow));
            let idle = is_idle(&known, name.sender, now);
            if asked || self.is_due(attachment, key, idle, waits) {
                self.send(attachment, &ack)?;
                sent += 1;
            }
        }
        Ok(sent)
    }

    /// Whether to wake the end whose acknowledgement `key` names, and takes note of it: a few times
    /// for each generation, and as long as something `waits` for its time. One that is not idle is
    /// given a moment to send a packet that has room.
    fn is_due(&mut self, attachment: &Attachment, key: &[u8], idle: bool, waits: bool) -> bool {
        let place = &attachment.place;
        let name = (
            attachment.netns,
            place.ifindex,
            place.hook,
            attachment.number,
            key.to_vec(),
        );
        let now = Instant::now();
        match self.woken.get_mut(&name) {
            None => {
                let times = u32::from(idle);
                self.woken.insert(name, Woken { times, last: now });
                idle
            }
            Some(woken) if now - woken.last < APART => false,
            Some(woken) if woken.times < TRIES || waits => {
                woken.times += 1;
                woken.last = now;
                true
            }
            Some(_) => false,
        }
    }

    fn send(&mut self, attachment: &Attachment, ack: &saved_ack) -> Result<()> {
        let Some(frame) = acknowledgement(ack) else {
            return Ok(());
        };
        let place = &attachment.place;
        let what = || {
            format!(
                "send a saved packet through {} of {}",
                place.hook, place.device
            )
        };
        if place.hook == Hook::TcEgress {
            return sys::packet_send(place.ifindex, &frame).with_context(what);
        }
        if place.hook == Hook::Xdp && attachment.record.mode == Mode::Native {
            let entry = sys::open_pin(&attachment.generation().join("entry")).with_context(what)?;
            return sys::receive(entry, &frame, place.ifindex).with_context(what);
        }
        let pass = match self.pass.take() {
            Some(pass) => pass,
            None => sys::xdp_pass_load().context("load a program that lets frames pass")?,
        };
        sys::receive(self.pass.insert(pass), &frame, place.ifindex).with_context(what)
    }
}

/// Whether anything can be added to what the end sends.
fn is_open(known: &subflow, sender: u32) -> bool {
    let over = subflow_flags::SUBFLOW_FIN.0 | subflow_flags::SUBFLOW_RESET.0;
    known.flags & over == 0 && known.ends[(sender & 1) as usize].data_seen > 0
}

fn is_idle(known: &subflow, sender: u32, now: Duration) -> bool {
    let seen = Duration::from_nanos(known.ends[(sender & 1) as usize].seen_at);
    now.saturating_sub(seen) > IDLE
}

fn has_held(held: &held_options, sender: u32) -> bool {
    let slots = &held.ends[(sender & 1) as usize];
    slots.iter().any(|slot| slot.length != 0)
}

/// The acknowledgement that says what a saved segment said: without its payload, behind which it
/// stands in the stream, without its options of MPTCP, which say more than that, and with complete
/// checksums. None if the headers are not what they were saved as.
fn acknowledgement(saved: &saved_ack) -> Option<Vec<u8>> {
    let mut frame = saved.headers.get(..saved.length as usize)?.to_vec();
    let (ip, transport) = (saved.ip as usize, saved.transport as usize);
    let length = frame.len().checked_sub(transport)?;
    let tcp = frame.get_mut(transport..)?;
    tcp.get_mut(4..8)?
        .copy_from_slice(&saved.sequence_end.to_be_bytes());
    *tcp.get_mut(13)? = ACK;
    tcp.get_mut(16..20)?.fill(0);
    blank_mptcp(&mut tcp[20..]);
    let size = (frame.len() - ip) as u16;
    let header = frame.get_mut(ip..transport)?;
    let addresses = match saved.version {
        4 => {
            header.get_mut(2..4)?.copy_from_slice(&size.to_be_bytes());
            header.get_mut(10..12)?.fill(0);
            let sum = !fold(sum_of(header));
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            12..20
        }
        _ => {
            let size = size.checked_sub(40)?;
            header.get_mut(4..6)?.copy_from_slice(&size.to_be_bytes());
            8..40
        }
    };
    let sum = u32::from(TCP) + length as u32 + sum_of(header.get(addresses)?);
    let sum = !fold(sum + sum_of(&frame[transport..]));
    frame[transport + 16..transport + 18].copy_from_slice(&sum.to_be_bytes());
    Some(frame)
}

/// Overwrites options of MPTCP with NOPs, up to the first that is malformed.
fn blank_mptcp(mut options: &mut [u8]) {
    const NOP: u8 = 1;
    const MPTCP: u8 = 30;
    loop {
        let size = match options {
            [0, ..] | [] => return,
            [NOP, ..] => 1,
            [_, size, ..] => usize::from(*size),
            [_] => return,
        };
        if size == 0 || size > options.len() || (size < 2 && options[0] != NOP) {
            return;
        }
        if options[0] == MPTCP {
            options[..size].fill(NOP);
        }
        options = &mut options[size..];
    }
}

/// The sum of 16-bit words (RFC 1071) of a few hundred bytes at most.
fn sum_of(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2).map(|pair| {
        let low = pair.get(1).copied().unwrap_or(0);
        u32::from(u16::from_be_bytes([pair[0], low]))
    });
    words.sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn saved(version: u8, ip: &[u8], tcp: &[u8], payload: u32) -> saved_ack {
        let bytes = [&[0u8; 14], ip, tcp].concat();
        let mut saved = saved_ack {
            length: bytes.len() as u32,
            ip: 14,
            transport: 14 + ip.len() as u32,
            sequence_end: 0x1000 + payload,
            version,
            ..Default::default()
        };
        saved.headers[..bytes.len()].copy_from_slice(&bytes);
        saved
    }

    /// With timestamps and a DSS that maps data.
    fn tcp() -> Vec<u8> {
        let mut tcp = vec![0; 20];
        tcp[4..8].copy_from_slice(&0x1000u32.to_be_bytes());
        tcp[12] = 13 << 4;
        tcp[13] = ACK | 8;
        tcp.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        tcp.extend([
            30, 20, 0x20, 5, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 100, 9, 9,
        ]);
        tcp
    }

    #[test]
    fn an_acknowledgement_is_made_of_data() {
        let mut ip = vec![0x45, 0, 5, 0xdc, 0, 1, 0x40, 0, 64, 6, 0xff, 0xff];
        ip.extend([10, 0, 0, 1, 10, 0, 0, 2]);
        let frame = acknowledgement(&saved(4, &ip, &tcp(), 100)).unwrap();
        let (ip, tcp) = (&frame[14..34], &frame[34..]);
        assert_eq!(ip[2..4], 72u16.to_be_bytes());
        assert_eq!(fold(sum_of(ip)), 0xffff);
        assert_eq!(fold(6 + 52 + sum_of(&ip[12..20]) + sum_of(tcp)), 0xffff);
        assert_eq!(tcp[4..8], 0x1064u32.to_be_bytes());
        assert_eq!(tcp[13], ACK);
        assert_eq!(tcp[20..32], [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        assert_eq!(tcp[32..], [1; 20]);
    }

    #[test]
    fn ipv6_says_its_length() {
        let mut ip = vec![0; 40];
        ip[0] = 0x60;
        ip[8..40].fill(7);
        let frame = acknowledgement(&saved(6, &ip, &tcp(), 0)).unwrap();
        assert_eq!(frame[18..20], 52u16.to_be_bytes());
        assert_eq!(
            fold(6 + 52 + sum_of(&frame[22..54]) + sum_of(&frame[54..])),
            0xffff
        );
    }

    #[test]
    fn malformed_options_stay() {
        for options in [
            vec![30, 0],
            vec![30, 9, 1],
            vec![30],
            vec![1, 1, 8, 1, 30, 2],
        ] {
            let mut blanked = options.clone();
            blank_mptcp(&mut blanked);
            assert_eq!(blanked, options);
        }
    }
}
