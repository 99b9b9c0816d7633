// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sockets that send and receive whole frames.

use std::io::{self, ErrorKind};
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::error::Refused;

const VLAN_TAG: usize = 4;

/// A frame that a device received.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub bytes: Vec<u8>,
    /// When it arrived, by the clock of the day; if the socket has `SO_TIMESTAMPNS`.
    pub stamp: Option<Duration>,
}

/// The result of a call that is negative on errors and sets `errno`.
pub(crate) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Receives nothing before it is bound to a device and a protocol.
pub(crate) fn open() -> Result<OwnedFd> {
    raw().map_err(|error| match error {
        nix::Error::EPERM => {
            let advice = "run as root, or with CAP_NET_RAW and CAP_NET_ADMIN";
            Refused::denied("a packet socket cannot be opened", error, advice).into()
        }
        _ => anyhow!(error).context("opening a packet socket"),
    })
}

fn raw() -> nix::Result<OwnedFd> {
    let (family, flags) = (AddressFamily::Packet, SockFlag::SOCK_CLOEXEC);
    socket(family, SockType::Raw, flags, None)
}

/// What a socket is bound to, or sends to. The protocol is `ETH_P_*`.
fn address(index: u32, protocol: u16) -> libc::sockaddr_ll {
    // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index as libc::c_int;
    address
}

/// Sends one frame from a device, link header first where the device has one. The protocol is what
/// stands behind that.
///
/// `ENETDOWN`: the device is down; `ENOBUFS`: it was dropped, by a full queue or a TC program;
/// `ENXIO`: no such device.
pub(crate) fn send(index: u32, protocol: u16, frame: &[u8]) -> io::Result<()> {
    let socket = raw()?;
    let address = address(index, protocol);
    // SAFETY: both buffers are live, and their lengths are given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const address).cast(),
            mem::size_of_val(&address) as libc::socklen_t,
        )
    };
    match sent < 0 {
        true => Err(io::Error::last_os_error()),
        false => Ok(()),
    }
}

pub(crate) fn set_option<T>(
    socket: &OwnedFd,
    level: libc::c_int,
    name: libc::c_int,
    value: T,
) -> Result<()> {
    // SAFETY: the value outlives the call, which reads as many bytes as it has.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            mem::size_of::<T>() as libc::socklen_t,
        )
    };
    check(result).with_context(|| format!("setting option {name} of a socket"))?;
    Ok(())
}

pub(crate) fn bind(socket: &OwnedFd, index: u32, protocol: u16) -> Result<()> {
    let address = address(index, protocol);
    // SAFETY: the address outlives the call, and the length is its own.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            mem::size_of_val(&address) as libc::socklen_t,
        )
    };
    check(result).context("binding a packet socket")?;
    Ok(())
}

/// The next frame that has arrived, if one has.
pub(crate) fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Result<Option<Frame>> {
    // Aligned as a `cmsghdr` is; room for a `struct tpacket_auxdata` and a `struct timespec`.
    let mut control = [0u64; 16];
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all-zero bytes are a valid `msghdr`.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = mem::size_of_val(&control) as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
    // SAFETY: the message describes buffers with their sizes, which outlive the call.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags) };
    let Ok(len) = usize::try_from(received) else {
        let error = io::Error::last_os_error();
        return match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(None),
            _ => Err(error).context("receiving a frame"),
        };
    };
    let Some(received) = buffer.get(..len) else {
        bail!("a frame of {len} bytes arrived, more than can be received");
    };
    let mut frame = Frame {
        bytes: received.to_vec(),
        stamp: None,
    };
    // SAFETY: `recvmsg` has filled the message; its control buffer is still there.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&message).as_ref() };
    while let Some(header) = next {
        match (header.cmsg_level, header.cmsg_type) {
            (libc::SOL_PACKET, libc::PACKET_AUXDATA) => {
                // SAFETY: a control message of this type carries this structure.
                if let Some(tag) = vlan_tag(&unsafe { data(header) }) {
                    frame.bytes.splice(12..12, tag);
                }
            }
            (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS) => {
                // SAFETY: as above.
                let time: libc::timespec = unsafe { data(header) };
                let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
                let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or_default();
                frame.stamp = Some(Duration::new(seconds, nanoseconds));
            }
            _ => {}
        }
        // SAFETY: the header is one of the message's.
        next = unsafe { libc::CMSG_NXTHDR(&message, header).as_ref() };
    }
    Ok(Some(frame))
}

/// What a control message carries.
///
/// # Safety
/// The header stands in a control buffer, and a `T` behind it, maybe not aligned.
unsafe fn data<T>(header: &libc::cmsghdr) -> T {
    // SAFETY: as the caller promises.
    unsafe { libc::CMSG_DATA(header).cast::<T>().read_unaligned() }
}

/// The VLAN tag that the kernel took out of a received frame, as it was on the wire.
fn vlan_tag(data: &libc::tpacket_auxdata) -> Option<[u8; VLAN_TAG]> {
    if data.tp_status & libc::TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let tpid = match data.tp_status & libc::TP_STATUS_VLAN_TPID_VALID {
        0 => libc::ETH_P_8021Q as u16,
        _ => data.tp_vlan_tpid,
    };
    let [a, b] = tpid.to_be_bytes();
    let [c, d] = data.tp_vlan_tci.to_be_bytes();
    Some([a, b, c, d])
}
