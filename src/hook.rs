// SPDX-License-Identifier: MIT OR Apache-2.0
//! The three places in the kernel where a chain can run.

use std::fmt;
use std::str::FromStr;

/// A hook of a network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hook {
    /// Before the kernel allocates an `skb`; sees received packets only.
    Xdp,
    /// After reassembly by GRO, before the IP layer.
    TcIngress,
    /// After the IP layer, before segmentation and the driver.
    TcEgress,
}

/// The program type a hook runs; every policy is compiled once for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    Xdp,
    Tc,
}

impl Hook {
    pub const ALL: [Hook; 3] = [Hook::Xdp, Hook::TcIngress, Hook::TcEgress];

    pub fn family(self) -> Family {
        match self {
            Hook::Xdp => Family::Xdp,
            Hook::TcIngress | Hook::TcEgress => Family::Tc,
        }
    }

    /// Whether packets at this hook travel towards this host: their destination is then `local`.
    pub fn is_ingress(self) -> bool {
        self != Hook::TcEgress
    }

    pub fn name(self) -> &'static str {
        match self {
            Hook::Xdp => "xdp",
            Hook::TcIngress => "tc-ingress",
            Hook::TcEgress => "tc-egress",
        }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Hook {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Hook::ALL
            .into_iter()
            .find(|hook| hook.name() == text)
            .ok_or(())
    }
}
