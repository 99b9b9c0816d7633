// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the selector `mptcp` asks of one option (RFC 8684).

use serde_json::Value;

use crate::layers::Reason;
use crate::options::{EOL, MPTCP, NOP};
use crate::subflows::{self, ADD_ADDR, DSS, MP_CAPABLE, MP_JOIN, MP_PRIO, REMOVE_ADDR};

/// Ids of a REMOVE_ADDR that are looked at.
const MOST_REMOVED: usize = 8;

#[derive(Default)]
pub struct Wanted {
    pub subtypes: Vec<u8>,
    pub versions: Vec<u8>,
    pub flags: u8,
    pub backup: Option<bool>,
    pub echo: Option<bool>,
    pub ids: Vec<u8>,
}

/// A number, or a list of some.
pub fn numbers(value: Option<&Value>, one: impl Fn(&Value) -> u8) -> Vec<u8> {
    match value {
        None => Vec::new(),
        Some(Value::Array(items)) => items.iter().map(one).collect(),
        Some(item) => vec![one(item)],
    }
}

/// `set`, `clear` or `any`.
pub fn bit(name: Option<&str>) -> Option<bool> {
    match name {
        None | Some("any") => None,
        Some("set") => Some(true),
        Some("clear") => Some(false),
        Some(other) => panic!("the model does not know {other} of a bit"),
    }
}

fn within(list: &[u8], value: u8) -> bool {
    list.is_empty() || list.contains(&value)
}

impl Wanted {
    /// Whether an option fits before the list ends or is malformed.
    pub fn is_in(&self, mut options: &[u8], syn: bool) -> Result<bool, Reason> {
        loop {
            let length = match options {
                [] | [EOL, ..] => return Ok(false),
                [NOP, ..] => 1,
                [_, length, ..] if (2..=options.len()).contains(&usize::from(*length)) => {
                    usize::from(*length)
                }
                _ => return Err("bad_option"),
            };
            if options[0] == MPTCP && self.fits(&options[..length], syn) {
                return Ok(true);
            }
            options = &options[length..];
        }
    }

    fn fits(&self, option: &[u8], syn: bool) -> bool {
        let Some(subtype) = subflows::subtype(option) else {
            return false;
        };
        let (low, fourth) = (option[2] & 0xf, option.get(3).copied());
        let request = subtype == MP_JOIN && syn;
        let single = match subtype {
            ADD_ADDR => true,
            MP_JOIN => syn,
            MP_PRIO => option.len() == 4,
            _ => false,
        };
        let ids = match subtype {
            REMOVE_ADDR => &option[3..option.len().min(3 + MOST_REMOVED)],
            _ if single => &option[3..option.len().min(4)],
            _ => &[],
        };
        let has = |wanted: Option<bool>, there: bool| {
            wanted.is_none_or(|wanted| there && wanted == (low & 1 == 1))
        };
        within(&self.subtypes, subtype)
            && (self.versions.is_empty() || (subtype == MP_CAPABLE && within(&self.versions, low)))
            && (self.flags == 0
                || ([MP_CAPABLE, DSS].contains(&subtype)
                    && fourth.is_some_and(|bits| bits & self.flags == self.flags)))
            && has(self.backup, subtype == MP_PRIO || request)
            && has(self.echo, subtype == ADD_ADDR)
            && (self.ids.is_empty() || ids.iter().any(|id| self.ids.contains(id)))
    }
}
