// SPDX-License-Identifier: MIT OR Apache-2.0
//! The options of a TCP header as a list (RFC 9293, 3.1).

use crate::layers::Reason;

pub const EOL: u8 = 0;
pub const NOP: u8 = 1;
pub const MSS: u8 = 2;
pub const WINDOW_SCALE: u8 = 3;
pub const MPTCP: u8 = 30;

/// Most bytes of options a header has room for.
pub const ROOM: usize = 40;

/// One option as it stands: a lone NOP, or kind, length and data.
pub type Bytes = Vec<u8>;

/// What stands in the option space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    pub list: Vec<Bytes>,
    /// EOL and what follows it.
    pub rest: Bytes,
}

impl Options {
    pub fn parse(mut bytes: &[u8]) -> Result<Options, Reason> {
        let mut list = Vec::new();
        loop {
            let length = match bytes {
                [] | [EOL, ..] => {
                    let rest = bytes.to_vec();
                    return Ok(Options { list, rest });
                }
                [NOP, ..] => 1,
                [_, length, ..] if (2..=bytes.len()).contains(&usize::from(*length)) => {
                    usize::from(*length)
                }
                _ => return Err("bad_option"),
            };
            let (option, behind) = bytes.split_at(length);
            list.push(option.to_vec());
            bytes = behind;
        }
    }

    pub fn of_kind(&self, kind: u8) -> impl Iterator<Item = &Bytes> {
        self.list.iter().filter(move |option| option[0] == kind)
    }

    pub fn of_other_kinds(&self, kind: u8) -> Vec<Bytes> {
        let others = self.list.iter().filter(|option| option[0] != kind);
        others.cloned().collect()
    }

    /// Without the NOPs at the end.
    pub fn trimmed(&self) -> Vec<Bytes> {
        let mut list = self.list.clone();
        while list.last().is_some_and(|option| option[0] == NOP) {
            list.pop();
        }
        list
    }

    /// All bytes, with what EOL ended.
    pub fn bytes(&self) -> Bytes {
        [self.list.concat(), self.rest.clone()].concat()
    }
}

/// An option list filled up with NOPs to whole words, and to `least` bytes.
pub fn fill(list: &[Bytes], least: usize) -> Bytes {
    let mut bytes = list.concat();
    let length = bytes.len().next_multiple_of(4).max(least);
    bytes.resize(length, NOP);
    bytes
}
