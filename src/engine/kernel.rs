// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the running kernel must have.

use crate::error::Refused;

/// What came with which release and cannot be done without, oldest first.
const NEEDED: [((u32, u32), &str); 2] = [
    ((5, 18), "XDP programs for multi-buffer frames (xdp.frags)"),
    ((6, 1), "the verifier that the programs are tested with"),
];

/// Refuses a kernel that lacks something.
///
/// # Errors
/// [`Refused`], with the missing feature's name.
pub fn require() -> Result<(), Refused> {
    match nix::sys::utsname::uname() {
        Ok(name) => require_in(&name.release().to_string_lossy()),
        // The loader will say what is missing.
        Err(_) => Ok(()),
    }
}

fn require_in(release: &str) -> Result<(), Refused> {
    let Some(version) = version(release) else {
        return Ok(());
    };
    match NEEDED.iter().find(|(since, _)| version < *since) {
        None => Ok(()),
        Some(((major, minor), feature)) => Err(Refused::denied(
            format!("this kernel, Linux {release}, is too old"),
            format!("it lacks {feature}, from Linux {major}.{minor} on"),
            "use a kernel from 6.1 on",
        )),
    }
}

/// Major and minor number at the beginning of a release's name.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_are_refused_by_the_feature_they_lack() {
        let refused = require_in("5.10.0-32-amd64").unwrap_err();
        assert!(refused.denied);
        assert!(refused.why.contains("xdp.frags"), "{refused}");
        let refused = require_in("5.19.17").unwrap_err();
        assert!(refused.why.contains("6.1"), "{refused}");
    }

    #[test]
    fn newer_and_unknown_releases_are_not() {
        for release in ["6.1.0-18-amd64", "6.18.44-fc", "7.2.0", "custom"] {
            assert_eq!(require_in(release), Ok(()), "{release}");
        }
    }
}
