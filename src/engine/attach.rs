// SPDX-License-Identifier: MIT OR Apache-2.0
//! What ties an entry program to a hook of a device, and moves from one program to the next in
//! one step: an XDP link, a TCX link, or a filter of the clsact qdisc where there is no TCX.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use nix::net::if_::if_nameindex;

use super::generation::kernel_error;
use super::sys::{self, TcDirection, XdpMode};
use crate::error::Refused;
use crate::hook::Hook;
use crate::spec::{Attach, Mode};

/// Where our filter stands in a clsact qdisc.
const CLSACT_HANDLE: u32 = 1;
const CLSACT_PRIORITY: u32 = 0xbc00;

/// ARPHRD_* of devices whose frames begin with an Ethernet header (loopback's is all zero).
const ETHERNET_LIKE: [u16; 2] = [libc::ARPHRD_ETHER, libc::ARPHRD_LOOPBACK];
/// ARPHRD_* of devices whose packets begin with IP: tun, WireGuard; wwan.
const NO_LINK_HEADER: [u16; 2] = [libc::ARPHRD_NONE, ARPHRD_RAWIP];
const ARPHRD_RAWIP: u16 = 519;

/// A hook of a device of the current network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub device: String,
    pub ifindex: u32,
    pub hook: Hook,
    /// Packets begin with IP.
    pub no_link: bool,
}

/// What holds an entry program at its place.
pub enum Hold {
    Link(OwnedFd),
    /// A filter; whether we created the qdisc.
    Clsact {
        qdisc_is_ours: bool,
    },
}

impl Place {
    /// Looks the device up.
    ///
    /// # Errors
    /// [`Refused`] for a device that is missing, or whose link layer we do not know.
    pub fn find(device: &str, hook: Hook) -> Result<Place> {
        let ifindex = sys::device_index(device).map_err(|error| {
            Refused::state(
                format!("no device {device} in this network namespace"),
                error,
                "see `ip -br link`; a device of another namespace needs `nsenter --net=...`",
            )
        })?;
        let kind = sys::device_type(device).with_context(|| format!("look at {device}"))?;
        let no_link = NO_LINK_HEADER.contains(&kind);
        if !no_link && !ETHERNET_LIKE.contains(&kind) {
            return Err(Refused::state(
                format!("{device} has a link layer this program does not parse"),
                format!("its type is {kind} (ARPHRD_*, linux/if_arp.h)"),
                "attach to an Ethernet, tun, WireGuard or wwan device; for a tunnel or PPPoE, to \
                 the device below it, where packets are still wrapped",
            )
            .into());
        }
        if no_link && hook == Hook::Xdp {
            return Err(Refused::state(
                format!("{device} has no link header, which XDP needs"),
                format!("its type is {kind} (ARPHRD_*, linux/if_arp.h)"),
                "use the hooks tc-ingress and tc-egress there",
            )
            .into());
        }
        Ok(Place {
            device: device.to_owned(),
            ifindex,
            hook,
            no_link,
        })
    }

    /// What an item of a chain's `attach` means now: of a pattern, the devices that can be attached
    /// to; of a name, the device if there is one.
    pub fn covered(attach: &Attach) -> Vec<Place> {
        if !attach.is_pattern() {
            return Place::find(&attach.device, attach.hook)
                .into_iter()
                .collect();
        }
        let Ok(devices) = if_nameindex() else {
            return Vec::new();
        };
        devices
            .iter()
            .filter_map(|device| device.name().to_str().ok())
            .filter(|device| attach.covers(device))
            .filter_map(|device| Place::find(device, attach.hook).ok())
            .collect()
    }

    /// Attaches a program for the first time, and tells the mode it got.
    ///
    /// `before` runs before the program can, with the mode that is tried. A link goes with this
    /// process until it is pinned, a filter stays: what tells that it is ours must be kept by then.
    ///
    /// # Errors
    /// [`Refused`] where somebody else's program is there, or the mode is not to be had.
    pub fn attach(
        &self,
        program: impl AsFd,
        mode: Mode,
        before: impl FnMut(Mode) -> Result<()>,
    ) -> Result<(Hold, Mode)> {
        match self.hook {
            Hook::Xdp => self.attach_xdp(program, mode, before),
            Hook::TcIngress | Hook::TcEgress => self.attach_tc(program, mode, before),
        }
    }

    fn attach_xdp(
        &self,
        program: impl AsFd,
        mode: Mode,
        mut before: impl FnMut(Mode) -> Result<()>,
    ) -> Result<(Hold, Mode)> {
        if let Ok(Some(other)) = sys::xdp_attached(self.ifindex) {
            return Err(self.taken(other).into());
        }
        let mut attach = |mode| -> Result<io::Result<OwnedFd>> {
            before(mode)?;
            let kernel_mode = match mode {
                Mode::Generic => XdpMode::Generic,
                _ => XdpMode::Native,
            };
            Ok(sys::xdp_link_create(&program, self.ifindex, kernel_mode))
        };
        let (link, mode) = match mode {
            Mode::Generic => (attach(Mode::Generic)?, Mode::Generic),
            Mode::Auto => match attach(Mode::Native)? {
                Err(error) if !is_busy(&error) => (attach(Mode::Generic)?, Mode::Generic),
                link => (link, Mode::Native),
            },
            _ => (attach(Mode::Native)?, Mode::Native),
        };
        match link {
            Ok(link) => Ok((Hold::Link(link), mode)),
            Err(error) => Err(self.no_xdp(mode, &error)),
        }
    }

    fn taken(&self, other: sys::Attached) -> Refused {
        let name = sys::prog_by_id(other.prog_id)
            .and_then(sys::prog_info)
            .map_or_else(|_| String::new(), |info| format!(" \"{}\"", info.name));
        Refused::state(
            format!("{} runs another XDP program", self.device),
            format!(
                "program {}{name}, mode {}",
                other.prog_id,
                other.mode.name()
            ),
            format!(
                "stop the tool that attached it (`ip link set {} xdp off` removes one without a \
                 link), or use the hook tc-ingress, which programs share",
                self.device
            ),
        )
    }

    fn no_xdp(&self, mode: Mode, error: &io::Error) -> anyhow::Error {
        if is_busy(error) {
            if let Ok(Some(other)) = sys::xdp_attached(self.ifindex) {
                return self.taken(other).into();
            }
        }
        let what = format!("attach to {} by XDP, mode {mode}", self.device);
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => kernel_error(what, error),
            _ if mode == Mode::Native => Refused::state(
                what,
                error,
                "its driver may have no XDP, or not with this MTU or these offloads: use \"mode\": \
                 \"generic\", or the hook tc-ingress",
            )
            .into(),
            _ => Refused::state(what, error, "use the hook tc-ingress").into(),
        }
    }

    fn attach_tc(
        &self,
        program: impl AsFd,
        mode: Mode,
        mut before: impl FnMut(Mode) -> Result<()>,
    ) -> Result<(Hold, Mode)> {
        if mode != Mode::Clsact {
            before(Mode::Tcx)?;
            match sys::tcx_link_create(&program, self.ifindex, self.direction()) {
                Ok(link) => return Ok((Hold::Link(link), Mode::Tcx)),
                Err(error) if mode == Mode::Auto && lacks_tcx(&error) => {}
                Err(error) => return Err(self.no_tcx(&error)),
            }
        }
        before(Mode::Clsact)?;
        let attached = sys::clsact_attach(
            program,
            self.ifindex,
            self.direction(),
            CLSACT_HANDLE,
            CLSACT_PRIORITY,
            false,
        );
        match attached {
            Ok(qdisc_is_ours) => Ok((Hold::Clsact { qdisc_is_ours }, Mode::Clsact)),
            Err(error) => Err(self.no_clsact(&error)),
        }
    }

    fn no_tcx(&self, error: &io::Error) -> anyhow::Error {
        let what = format!("attach to {} by TCX, {}", self.device, self.hook);
        if lacks_tcx(error) {
            return Refused::denied(
                what,
                "this kernel has no TCX, which came with Linux 6.6",
                "use \"mode\": \"auto\" or \"clsact\"",
            )
            .into();
        }
        kernel_error(what, error)
    }

    fn no_clsact(&self, error: &io::Error) -> anyhow::Error {
        let what = format!("attach to {} by clsact, {}", self.device, self.hook);
        match error.raw_os_error() {
            Some(libc::EEXIST) => Refused::state(
                what,
                format!("another filter has handle 1, priority {CLSACT_PRIORITY}"),
                format!("see `tc filter show dev {} ingress`", self.device),
            )
            .into(),
            Some(libc::EBUSY) => Refused::state(
                what,
                "the device has the older ingress qdisc",
                format!("replace it: `tc qdisc del dev {} ingress`", self.device),
            )
            .into(),
            _ => kernel_error(what, error),
        }
    }

    /// The id of the program that runs.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn running(&self, hold: &Hold) -> Result<Option<u32>> {
        match hold {
            Hold::Link(link) => {
                let info = sys::link_info(link).context("look at the link")?;
                Ok((info.ifindex != 0).then_some(info.prog_id))
            }
            Hold::Clsact { .. } => {
                let found = sys::clsact_query(
                    self.ifindex,
                    self.direction(),
                    CLSACT_HANDLE,
                    CLSACT_PRIORITY,
                );
                match found {
                    // The device is gone, and its filters with it.
                    Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
                    found => found.context("look at the clsact filter"),
                }
            }
        }
    }

    /// Replaces the program in one step: a packet runs through the old one or the new one.
    ///
    /// # Errors
    /// What the kernel says; the old program then still runs.
    pub fn switch(&self, hold: &Hold, program: impl AsFd) -> Result<()> {
        let switched = match hold {
            Hold::Link(link) => sys::link_update(link, program),
            Hold::Clsact { .. } => sys::clsact_attach(
                program,
                self.ifindex,
                self.direction(),
                CLSACT_HANDLE,
                CLSACT_PRIORITY,
                true,
            )
            .map(drop),
        };
        switched.map_err(|error| {
            kernel_error(
                format!("switch {} of {} to its new chains", self.hook, self.device),
                &error,
            )
        })
    }

    /// Takes the program off the device.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn detach(&self, hold: &Hold) -> Result<()> {
        let detached = match hold {
            Hold::Link(link) => sys::link_detach(link),
            Hold::Clsact { qdisc_is_ours } => sys::clsact_detach(
                self.ifindex,
                self.direction(),
                CLSACT_HANDLE,
                CLSACT_PRIORITY,
                *qdisc_is_ours,
            )
            .map(drop),
        };
        detached.map_err(|error| anyhow!("detach from {} of {}: {error}", self.hook, self.device))
    }

    fn direction(&self) -> TcDirection {
        match self.hook {
            Hook::TcEgress => TcDirection::Egress,
            Hook::TcIngress | Hook::Xdp => TcDirection::Ingress,
        }
    }
}

impl Hold {
    /// Pins the link; a filter needs no pin.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn pin(&self, path: &Path) -> Result<()> {
        match self {
            Hold::Link(link) => sys::pin(link, path).context("pin the link"),
            Hold::Clsact { .. } => Ok(()),
        }
    }
}

fn is_busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST))
}

/// `bpf_link_create` does not know the attach type before Linux 6.6.
fn lacks_tcx(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS)
    )
}
