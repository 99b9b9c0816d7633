// SPDX-License-Identifier: MIT OR Apache-2.0
//! Wakes subflows. An action that adds an option waits for the next packet of a subflow with room
//! for it. On an idle one there is none, and an end that only sends data has no room; so an
//! acknowledgement that says what the last segment said is sent through the hook. To TCP it is a
//! duplicate; what the chain makes of it is up to the chain.
//!
//! Frames that come in are run through the attached XDP program, or through one that lets them
//! pass, as if the device had received them (`BPF_F_TEST_XDP_LIVE_FRAMES`). Where packets have no
//! link header, a TC program has the device receive them. Frames that go out are sent from the
//! device.
//!
//! What a device that is down does not take is lost, as on a wire, and tried again. No frame keeps
//! another one waiting.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result};

use super::{Duty, Failures};
use crate::engine::bpf::types::{held_options, saved_ack, sender, subflow, subflow_flags};
use crate::engine::bpf::{bytes_of, value_of};
use crate::engine::store::{Attachment, Stamp, Store};
use crate::engine::sys;
use crate::hook::Hook;
use crate::monitor::connections;
use crate::netns;
use crate::packet_socket;
use crate::policy::btf::{ACKS, HELD, SUBFLOWS};
use crate::spec::Mode;

/// The action that waits for its time.
const RESTORE: &str = "restore_add_addr";

/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(150);
/// Between two searches for chains to look at, while none seem to come or go, and for saved headers
/// of subflows that are over.
const SEARCH: Duration = Duration::from_secs(5);
/// A subflow without packets for so long is idle.
const IDLE: Duration = Duration::from_millis(100);
/// How often a subflow is woken for a generation that is new, and at least how far apart.
const TRIES: u32 = 3;
const APART: Duration = Duration::from_millis(300);
/// How often that time doubles while frames are lost.
const DOUBLINGS: u32 = 3;
const TCP: u8 = 6;
const ACK: u8 = 0x10;
/// What is remembered of what was woken; beyond, it is forgotten, and some are woken again.
const MEMORY: usize = 1 << 16;

/// One end's packets at one generation: network namespace, interface index, hook, number of the
/// generation, key of the saved headers.
type End = (u64, u32, Hook, u64, Vec<u8>);

/// What was done for an [`End`].
struct Woken {
    times: u32,
    /// Frames lost since one was sent.
    lost: u32,
    last: Instant,
}

impl Woken {
    /// When it may be woken again.
    fn next(&self) -> Instant {
        self.last + APART * (1 << self.lost.min(DOUBLINGS))
    }
}

/// The chains of a network namespace that wait for packets, as they were found.
struct Found {
    netns: u64,
    /// None if they may have changed since.
    stamp: Option<Stamp>,
    at: Instant,
    waiting: Vec<Waiting>,
}

/// A hook whose chains wait for packets.
struct Waiting {
    netns: u64,
    ifindex: u32,
    hook: Hook,
    number: u64,
    /// For messages.
    device: String,
    /// The entry program, where frames are run through it.
    entry: Option<PathBuf>,
    acks: OwnedFd,
    subflows: OwnedFd,
    /// If something waits for its time.
    held: Option<OwnedFd>,
}

/// What came of a look.
#[derive(Default)]
struct Outcome {
    sent: usize,
    /// The first failure.
    failed: Option<Error>,
}

impl Outcome {
    fn fail(&mut self, error: Error) {
        self.failed.get_or_insert(error);
    }
}

/// The duty to wake what is idle; see the module.
pub struct Injector {
    folder: PathBuf,
    woken: HashMap<End, Woken>,
    /// Flows to wake in any case, by both ends.
    asked: HashSet<[SocketAddr; 2]>,
    found: Option<Found>,
    /// Lets every frame pass; loaded when it is needed.
    pass: Option<OwnedFd>,
    /// Has a device receive; likewise.
    receive: Option<OwnedFd>,
    failures: Failures,
}

impl Duty for Injector {
    fn run(&mut self) -> Duration {
        let looked = Store::open(&self.folder).and_then(|store| self.look(&store));
        if let Err(error) = looked {
            self.failures
                .say(&format!("cannot wake subflows: {error:#}"));
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
            found: None,
            pass: None,
            receive: None,
            failures: Failures::default(),
        }
    }

    /// Wakes these flows, in whichever direction a chain here waits for a packet:
    /// for who has changed what chains do to them, by a set. The order of the ends does not matter.
    ///
    /// # Errors
    /// As [`Injector::look`].
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
    /// sent. What is lost, for a device is down or a queue is full, is no error.
    ///
    /// # Errors
    /// What the kernel says. Of several failures it is the first, and none keeps the rest from being
    /// done.
    pub fn look(&mut self, store: &Store) -> Result<usize> {
        if self.woken.len() > MEMORY {
            self.woken.clear();
        }
        let mut outcome = Outcome::default();
        let (found, anew) = self.find(store, &mut outcome)?;
        for waiting in &found.waiting {
            if let Err(error) = self.wake_at(waiting, anew, &mut outcome) {
                outcome.fail(error);
            }
        }
        self.found = Some(found);
        outcome.failed.map_or(Ok(outcome.sent), Err)
    }

    /// The chains of the current network namespace that wait for packets, and whether they were
    /// searched for anew.
    fn find(&mut self, store: &Store, outcome: &mut Outcome) -> Result<(Found, bool)> {
        let netns = netns::current_id()?;
        let stamp = store.stamp()?;
        let is_current = |found: &Found| {
            found.netns == netns
                && found.stamp.is_some()
                && found.stamp == stamp
                && found.at.elapsed() < SEARCH
        };
        if let Some(found) = self.found.take().filter(is_current) {
            return Ok((found, false));
        }
        let mut found = Found {
            netns,
            stamp,
            at: Instant::now(),
            waiting: Vec::new(),
        };
        for attachment in store.attachments()? {
            if attachment.netns != netns || !attachment.record.reads.contains(ACKS) {
                continue;
            }
            match Waiting::at(&attachment) {
                Ok(Some(waiting)) => found.waiting.push(waiting),
                // Replaced meanwhile: the next look finds what is there then.
                Ok(None) => found.stamp = None,
                Err(error) => outcome.fail(error),
            }
        }
        Ok((found, true))
    }

    /// Wakes what is to be woken at one hook. With `tidy` it also forgets what was saved of subflows
    /// that are over.
    fn wake_at(&mut self, at: &Waiting, tidy: bool, outcome: &mut Outcome) -> Result<()> {
        let now = sys::monotonic().context("read the clock")?;
        let entries = sys::map_dump(&at.acks).context("read the saved acknowledgements")?;
        for (key, value) in entries.iter() {
            let (Some(name), Some(ack)) = (value_of::<sender>(key), value_of::<saved_ack>(value))
            else {
                continue;
            };
            let end = (at.netns, at.ifindex, at.hook, at.number, key.to_vec());
            let is_here = (ack.ingress != 0) == at.hook.is_ingress();
            let asked = self.asked.contains(&connections::ends(&name.flow));
            let may_be_due = is_here && (asked || at.held.is_some() || !self.is_done(&end));
            if !may_be_due && !tidy {
                continue;
            }
            let known = at.known(&name).context("read what is known of a subflow")?;
            let Some(known) = known.filter(|known| !is_over(known)) else {
                // If a new one has just begun by this name, its next segment is saved.
                sys::map_delete(&at.acks, key).context("forget a saved acknowledgement")?;
                continue;
            };
            if !may_be_due || !has_shown_data(&known, name.end) {
                continue;
            }
            let waits = at.waits(&name, &known).context("read what is held")?;
            let is_due = self.is_due(&end, is_idle(&known, name.end, now), waits);
            if !asked && !is_due {
                continue;
            }
            let sent = self.send_latest(at, key, outcome);
            if is_due {
                self.note(&end, matches!(sent, Ok(true)));
            }
            match sent {
                Ok(_) => {}
                Err(error) if is_lost(&error) => {}
                Err(error) => {
                    let what = format!("send a saved packet through {} of {}", at.hook, at.device);
                    outcome.fail(Error::new(error).context(what));
                }
            }
        }
        Ok(())
    }

    /// Whether an end was woken as often as a generation is worth.
    fn is_done(&self, end: &End) -> bool {
        self.woken.get(end).is_some_and(|it| it.times >= TRIES)
    }

    /// Whether to wake an end, and takes note of it: a few times for each generation, and as long as
    /// something `waits` for its time. One that is not idle is given a moment to send a packet that
    /// has room.
    fn is_due(&mut self, end: &End, idle: bool, waits: bool) -> bool {
        let now = Instant::now();
        match self.woken.get_mut(end) {
            None => {
                let woken = Woken {
                    times: u32::from(idle),
                    lost: 0,
                    last: now,
                };
                self.woken.insert(end.clone(), woken);
                idle
            }
            Some(woken) if now < woken.next() => false,
            Some(woken) if woken.times < TRIES || waits => {
                woken.times += 1;
                woken.last = now;
                true
            }
            Some(_) => false,
        }
    }

    /// Takes note of what came of waking an end: where nothing was `sent`, or nothing that could be
    /// of use, it is owed another try, later each time.
    fn note(&mut self, end: &End, sent: bool) {
        match (self.woken.get_mut(end), sent) {
            (Some(woken), true) => woken.lost = 0,
            (Some(woken), false) => {
                woken.times = woken.times.saturating_sub(1);
                woken.lost = woken.lost.saturating_add(1);
            }
            (None, _) => {}
        }
    }

    /// Sends what an end has said last. Returns whether the end said nothing more meanwhile: chains
    /// add nothing to what is old, for its receiver would not look at it. An end that sends all the
    /// time may overtake each of a few.
    fn send_latest(&mut self, at: &Waiting, key: &[u8], outcome: &mut Outcome) -> io::Result<bool> {
        let Some(mut ack) = at.saved(key)? else {
            return Ok(false);
        };
        for _ in 0..TRIES {
            self.send(at, &ack)?;
            outcome.sent += 1;
            let Some(latest) = at.saved(key)? else {
                return Ok(false);
            };
            if latest.sequence_end == ack.sequence_end {
                return Ok(true);
            }
            ack = latest;
        }
        Ok(false)
    }

    fn send(&mut self, at: &Waiting, ack: &saved_ack) -> io::Result<()> {
        let Some(frame) = acknowledgement(ack) else {
            return Ok(());
        };
        if at.hook == Hook::TcEgress {
            return packet_socket::send(at.ifindex, protocol(ack), &frame);
        }
        if has_no_link_header(ack) {
            let receive = match self.receive.take() {
                Some(receive) => receive,
                None => sys::tc_receive_load()?,
            };
            return sys::receive_packet(self.receive.insert(receive), &frame, at.ifindex);
        }
        if let Some(entry) = &at.entry {
            return sys::receive(sys::open_pin(entry)?, &frame, at.ifindex);
        }
        let pass = match self.pass.take() {
            Some(pass) => pass,
            None => sys::xdp_pass_load()?,
        };
        sys::receive(self.pass.insert(pass), &frame, at.ifindex)
    }
}

impl Waiting {
    /// None if the generation was replaced meanwhile.
    fn at(attachment: &Attachment) -> Result<Option<Waiting>> {
        let (Some(acks), Some(subflows)) = (
            attachment.kept_if_there(ACKS)?,
            attachment.kept_if_there(SUBFLOWS)?,
        ) else {
            return Ok(None);
        };
        let mut nodes = attachment.record.nodes.iter();
        let held = match nodes.any(|node| node.policy == RESTORE) {
            true => attachment.kept_if_there(HELD)?,
            false => None,
        };
        let place = &attachment.place;
        let is_run = place.hook == Hook::Xdp && attachment.record.mode == Mode::Native;
        Ok(Some(Waiting {
            netns: attachment.netns,
            ifindex: place.ifindex,
            hook: place.hook,
            number: attachment.number,
            device: place.device.clone(),
            entry: is_run.then(|| attachment.generation().join("entry")),
            acks,
            subflows,
            held,
        }))
    }

    /// What is saved by a key of the saved headers.
    fn saved(&self, key: &[u8]) -> io::Result<Option<saved_ack>> {
        let saved = sys::map_lookup(&self.acks, key, size_of::<saved_ack>())?;
        Ok(saved.and_then(|saved| value_of(&saved)))
    }

    fn known(&self, name: &sender) -> io::Result<Option<subflow>> {
        let known = sys::map_lookup(&self.subflows, bytes_of(&name.flow), size_of::<subflow>())?;
        Ok(known.and_then(|known| value_of(&known)))
    }

    /// Whether something that is held waits for its time.
    fn waits(&self, name: &sender, known: &subflow) -> io::Result<bool> {
        let Some(held) = &self.held else {
            return Ok(false);
        };
        let kept = sys::map_lookup(held, bytes_of(&name.flow), size_of::<held_options>())?;
        let kept = kept.and_then(|kept| value_of(&kept));
        Ok(kept.is_some_and(|kept| has_held(&kept, known, name.end)))
    }
}

/// Whether an error says that a frame got lost, and the next one may not: the device is down, or
/// gone; the queue is full, or a chain dropped it; the generation was replaced meanwhile.
fn is_lost(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ENETDOWN
                | libc::ENOBUFS
                | libc::ENODEV
                | libc::ENXIO
                | libc::ENOENT
                | libc::EINTR
        )
    )
}

/// Whether a packet was saved from a device whose packets begin with IP.
fn has_no_link_header(ack: &saved_ack) -> bool {
    ack.ip == 0
}

/// What stands behind the link header, as `ETH_P_*`: maybe a VLAN tag.
fn protocol(ack: &saved_ack) -> u16 {
    match (has_no_link_header(ack), ack.version) {
        (false, _) => u16::from_be_bytes([ack.headers[12], ack.headers[13]]),
        (true, 4) => libc::ETH_P_IP as u16,
        (true, _) => libc::ETH_P_IPV6 as u16,
    }
}

fn is_over(known: &subflow) -> bool {
    let over = subflow_flags::SUBFLOW_FIN.0 | subflow_flags::SUBFLOW_RESET.0;
    known.flags & over != 0
}

/// Whether anything can be added to what the end sends.
fn has_shown_data(known: &subflow, sender: u32) -> bool {
    known.ends[(sender & 1) as usize].data_seen > 0
}

fn is_idle(known: &subflow, sender: u32, now: Duration) -> bool {
    let seen = Duration::from_nanos(known.ends[(sender & 1) as usize].seen_at);
    now.saturating_sub(seen) > IDLE
}

/// What is older than the subflow is of another one with its ports.
fn has_held(held: &held_options, known: &subflow, sender: u32) -> bool {
    let mut slots = held.ends[(sender & 1) as usize].iter();
    slots.any(|slot| slot.length != 0 && slot.since >= known.opened_at)
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
