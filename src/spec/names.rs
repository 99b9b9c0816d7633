// SPDX-License-Identifier: MIT OR Apache-2.0
//! What names may look like, and how they resolve where nothing is loaded yet.

use std::cell::RefCell;

use crate::policy::{Names, ServicesFile};

/// Most characters of a chain's or set's name.
pub const NAME_MAX: usize = 32;

/// Whether a chain or a set may be called so: 1 to [`NAME_MAX`] of `A-Z a-z 0-9 _ -`.
pub fn is_name(text: &str) -> bool {
    (1..=NAME_MAX).contains(&text.len())
        && text
            .bytes()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'-'))
}

/// Whether the kernel would let an interface be called so: 1 to 15 bytes, not `.` or `..`, without
/// `/`, `:` and blanks. Control characters, which it allows, are refused too.
pub fn is_device_name(text: &str) -> bool {
    (1..=15).contains(&text.len())
        && text != "."
        && text != ".."
        && !text
            .chars()
            .any(|c| matches!(c, '/' | ':') || c.is_whitespace() || c.is_control())
}

/// Whether a device's name stands for every device whose name matches: it has `*` or `?`.
pub fn is_pattern(device: &str) -> bool {
    device.contains(['*', '?'])
}

/// Whether a name matches a pattern, as in shells: `*` is any text, `?` one character.
pub fn matches_pattern(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    let (mut at, mut in_name) = (0, 0);
    // Where to go on if what follows the last `*` does not fit: one character further.
    let mut retry = None;
    while in_name < name.len() {
        match pattern.get(at) {
            Some('*') => {
                retry = Some((at + 1, in_name + 1));
                at += 1;
            }
            Some(c) if *c == '?' || *c == name[in_name] => {
                at += 1;
                in_name += 1;
            }
            _ => {
                let Some((after_star, next)) = retry else {
                    return false;
                };
                retry = Some((after_star, next + 1));
                (at, in_name) = (after_star, next);
            }
        }
    }
    pattern[at..].iter().all(|c| *c == '*')
}

/// Takes every device and chain that could exist, and remembers the chains.
#[derive(Default)]
pub(super) struct Permissive {
    chains: RefCell<Vec<String>>,
}

impl Permissive {
    /// The chains asked for, in order.
    pub(super) fn into_chains(self) -> Vec<String> {
        self.chains.into_inner()
    }
}

impl Names for Permissive {
    fn device(&self, name: &str) -> Result<u32, String> {
        if is_device_name(name) {
            Ok(1)
        } else {
            Err("no interface can be called so".to_owned())
        }
    }

    fn chain(&self, name: &str) -> Result<u32, String> {
        if is_name(name) {
            self.chains.borrow_mut().push(name.to_owned());
            Ok(1)
        } else {
            Err("no chain can be called so".to_owned())
        }
    }

    fn service(&self, name: &str) -> Option<u16> {
        ServicesFile::system().port(name)
    }
}
