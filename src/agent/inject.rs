// SPDX-License-Identifier: MIT OR Apache-2.0
//! Wakes idle subflows. An action that adds an option waits for the next packet of a subflow; where
//! none comes, the last acknowledgement that passed is sent through the hook once more. To TCP it
//! is a duplicate; what the chain makes of it is up to the chain.
//!
//! Frames that came in are run through the attached XDP program, or through one that lets them
//! pass, as if the device had received them (`BPF_F_TEST_XDP_LIVE_FRAMES`). Frames that went out
//! are sent from the device again.

use std::collections::HashMap;
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
use crate::monitor::connections::SUBFLOWS;
use crate::netns;
use crate::spec::Mode;

const ACKS: &str = "pcd_acks";
const HELD: &str = "pcd_held";

/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(150);
/// A subflow without packets for so long is idle.
const IDLE: Duration = Duration::from_millis(100);
/// How often a subflow is woken for a generation that is new, and at least how far apart.
const TRIES: u32 = 3;
const APART: Duration = Duration::from_millis(300);
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
            pass: None,
            failed: None,
        }
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
        let held = match attachment.keeps(HELD) {
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
            if !known.is_some_and(|known| is_idle(&known, name.sender, now)) {
                continue;
            }
            let waits = match &held {
                Some(held) => {
                    let kept = sys::map_lookup(held, flow, size_of::<held_options>())?;
                    let kept = kept.and_then(|kept| value_of::<held_options>(&kept));
                    kept.is_some_and(|kept| has_held(&kept, name.sender))
                }
                None => false,
            };
            if self.is_due(attachment, key, waits) {
                self.send(attachment, &ack)?;
                sent += 1;
            }
        }
        Ok(sent)
    }

    /// Whether to wake the end whose acknowledgement `key` names, and takes note of it: a few times
    /// for each generation, and as long as something `waits` for its time.
    fn is_due(&mut self, attachment: &Attachment, key: &[u8], waits: bool) -> bool {
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
                self.woken.insert(
                    name,
                    Woken {
                        times: 1,
                        last: now,
                    },
                );
                true
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
        let Some(frame) = complete(ack) else {
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

fn is_idle(known: &subflow, sender: u32, now: Duration) -> bool {
    let over = subflow_flags::SUBFLOW_FIN.0 | subflow_flags::SUBFLOW_RESET.0;
    let end = &known.ends[(sender & 1) as usize];
    let seen = Duration::from_nanos(end.seen_at);
    known.flags & over == 0 && end.data_seen > 0 && now.saturating_sub(seen) > IDLE
}

fn has_held(held: &held_options, sender: u32) -> bool {
    let slots = &held.ends[(sender & 1) as usize];
    slots.iter().any(|slot| slot.length != 0)
}

/// The frame with a complete TCP checksum, whatever it was saved with. None if it is not what it
/// was saved as.
fn complete(ack: &saved_ack) -> Option<Vec<u8>> {
    let mut frame = ack.frame.get(..ack.length as usize)?.to_vec();
    let (ip, transport) = (ack.ip as usize, ack.transport as usize);
    let addresses = match ack.version {
        4 => frame.get(ip + 12..ip + 20)?,
        _ => frame.get(ip + 8..ip + 40)?,
    };
    let length = frame.len().checked_sub(transport)?;
    let mut sum = 6 + length as u32 + sum_of(addresses);
    frame.get_mut(transport + 16..transport + 18)?.fill(0);
    sum += sum_of(&frame[transport..]);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    frame[transport + 16..transport + 18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    Some(frame)
}

/// The sum of 16-bit words (RFC 1071) of a few hundred bytes at most.
fn sum_of(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2).map(|pair| {
        let low = pair.get(1).copied().unwrap_or(0);
        u32::from(u16::from_be_bytes([pair[0], low]))
    });
    words.sum()
}
