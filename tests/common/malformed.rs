// SPDX-License-Identifier: MIT OR Apache-2.0
//! Frames that no sane sender sends, the same in every run.

use super::frames::*;
use super::traffic::Noise;

/// Valid packets that the damaged ones are made from.
const TEMPLATES: usize = 4096;
/// What random frames are cut from.
const RANDOM_BYTES: usize = 1 << 20;
const MAX_RANDOM: usize = 1514;
const ETHERNET: usize = 14;
const MACS: usize = 12;

/// An endless source of frames, about a tenth of them valid.
pub struct Malformed {
    noise: Noise,
    templates: Vec<Vec<u8>>,
    random: Vec<u8>,
}

impl Malformed {
    /// Frames for the device with the address `mac`.
    pub fn new(seed: u64, mac: [u8; 6]) -> Malformed {
        let mut noise = Noise::new(seed);
        let mut template = || {
            let mut frame = valid(&mut noise);
            frame.dst_mac = mac;
            frame.build()
        };
        let templates = (0..TEMPLATES).map(|_| template()).collect();
        let random = noise.bytes(RANDOM_BYTES);
        Malformed {
            noise,
            templates,
            random,
        }
    }

    /// Writes the next frame over `frame`; never shorter than an Ethernet header.
    pub fn next(&mut self, frame: &mut Vec<u8>) {
        frame.clear();
        let template = self.noise.below(TEMPLATES);
        frame.extend_from_slice(&self.templates[template]);
        match self.noise.below(10) {
            0 => {}
            1 => frame.truncate(ETHERNET + self.noise.below(100)),
            2 => self.only_random(frame, MACS),
            3 => self.only_random(frame, ETHERNET),
            4 => self.random_options(frame),
            _ => {
                for _ in 0..=self.noise.below(4) {
                    let at = MACS + self.noise.below(frame.len() - MACS);
                    frame[at] = self.noise.next_number() as u8;
                }
            }
        }
    }

    /// Keeps the first bytes of a frame and replaces the rest.
    fn only_random(&mut self, frame: &mut Vec<u8>, keep: usize) {
        let longest = match self.noise.below(20) {
            0 => MAX_RANDOM,
            _ => 200,
        };
        let length = ETHERNET - keep + self.noise.below(longest - ETHERNET);
        let start = self.noise.below(RANDOM_BYTES - length);
        frame.truncate(keep);
        frame.extend_from_slice(&self.random[start..start + length]);
    }

    /// Replaces what follows the headers of a plain TCP segment, the options first.
    fn random_options(&mut self, frame: &mut [u8]) {
        let ip = if frame[MACS] == 8 { 20 } else { 40 };
        let Some(rest) = frame.get_mut(ETHERNET + ip + 20..) else {
            return;
        };
        let start = self.noise.below(RANDOM_BYTES - rest.len());
        rest.copy_from_slice(&self.random[start..start + rest.len()]);
    }
}

/// A packet of any of the forms that policies look into.
fn valid(noise: &mut Noise) -> Frame {
    let mut frame = if noise.one_in(2) { v4() } else { v6() };
    frame.tags = noise.choose(&[vec![], vec![], vec![0x8100], vec![0x88a8, 0x8100]]);
    frame.options = valid_options(noise);
    frame.flags = noise.choose(&[ACK, ACK, PSH | ACK, SYN, SYN | ACK, FIN | ACK, RST]);
    frame.window = noise.next_number() as u16;
    // Few, so that segments belong together.
    frame.src_port = noise.choose(&[1000, 1001]);
    frame.dst_port = noise.choose(&[2000, 2001]);
    let payload = noise.below(60);
    frame.payload = noise.bytes(payload);
    if noise.one_in(3) {
        frame.payload.clear();
    }
    if frame.src.is_ipv4() {
        frame.ip_options = vec![1; noise.choose(&[0, 0, 4, 40])];
        frame.fragment = noise.choose(&[0, 0, 0, 0, 0, 0, MORE_FRAGMENTS, 7]);
    } else if noise.one_in(2) {
        let kind = noise.choose(&[HOP_BY_HOP, DESTINATION, ROUTING, FRAGMENT, AUTHENTICATION]);
        let mut header = vec![0; 8 * (2 + noise.below(4))];
        header[1] = match kind {
            AUTHENTICATION => header.len() / 4 - 2,
            FRAGMENT => 0,
            _ => header.len() / 8 - 1,
        } as u8;
        header.truncate(if kind == FRAGMENT { 8 } else { header.len() });
        frame.extensions = vec![(kind, header)];
    }
    if noise.one_in(8) {
        frame.check = Check::Seed;
    }
    if noise.one_in(20) {
        frame.protocol = UDP;
    }
    if noise.one_in(4) {
        frame = frame.padded();
    }
    frame
}

/// Up to 40 bytes of well-formed options.
fn valid_options(noise: &mut Noise) -> Vec<u8> {
    let mut all = Vec::new();
    while !noise.one_in(4) {
        let more = match noise.choose(&[1, 1, 2, 3, 4, 5, 8, 30, 30, 253]) {
            1 => vec![1],
            2 => option(2, 4, 5),
            3 => option(3, 3, noise.below(20) as u8),
            4 => vec![4, 2],
            8 => option(8, 10, 0),
            kind => option(kind, 3 + noise.below(14) as u8, noise.next_number() as u8),
        };
        if all.len() + more.len() <= 40 {
            all.extend(more);
        }
    }
    words(&[&all])
}
