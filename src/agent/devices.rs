// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tells that network devices came, went or changed: rtnetlink's multicast group of links.
//!
//! Which ones is not told; whoever wants to know looks, and so never misses what was lost because
//! nobody read in time.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// Bytes read at once: of a message that is longer, the beginning is enough.
const BUFFER: usize = 16 << 10;
/// Of `struct nlmsghdr`: length, type, flags, sequence, sender.
const HEADER: usize = 16;

/// A subscription to the devices of the network namespace it was made in.
///
/// It can be polled; after that, [`DeviceWatch::drain`] it.
#[derive(Debug)]
pub struct DeviceWatch {
    socket: OwnedFd,
}

impl DeviceWatch {
    /// Subscribes. From here on nothing is missed.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new() -> io::Result<DeviceWatch> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkRoute,
        )?;
        let group = libc::RTMGRP_LINK as u32;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, group))?;
        Ok(DeviceWatch { socket })
    }

    /// Reads all there is to read. Whether anything changed.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn drain(&mut self) -> io::Result<bool> {
        let mut changed = false;
        let mut buffer = [0; BUFFER];
        loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => changed |= tells_of_devices(&buffer[..length]),
                // Messages were lost.
                Err(Errno::ENOBUFS) => changed = true,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(changed),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for DeviceWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whether one of the messages is about a device.
fn tells_of_devices(mut messages: &[u8]) -> bool {
    while let Some((length, kind)) = header(messages) {
        if [libc::RTM_NEWLINK, libc::RTM_DELLINK].contains(&kind) {
            return true;
        }
        let next = length.max(HEADER).next_multiple_of(4);
        messages = messages.get(next..).unwrap_or_default();
    }
    false
}

/// Length and type of the first message.
fn header(messages: &[u8]) -> Option<(usize, u16)> {
    let header = messages.first_chunk::<HEADER>()?;
    let [l0, l1, l2, l3, t0, t1, ..] = *header;
    let length = u32::from_ne_bytes([l0, l1, l2, l3]);
    Some((usize::try_from(length).ok()?, u16::from_ne_bytes([t0, t1])))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::netns::Namespace;

    fn message(kind: u16, body: usize) -> Vec<u8> {
        let mut message = ((HEADER + body) as u32).to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.resize((HEADER + body).next_multiple_of(4), 0);
        message
    }

    #[test]
    fn messages_are_told_apart() {
        let [new, gone, address] =
            [libc::RTM_NEWLINK, libc::RTM_DELLINK, libc::RTM_NEWADDR].map(|kind| message(kind, 5));
        assert!(tells_of_devices(&new));
        assert!(tells_of_devices(&gone));
        assert!(!tells_of_devices(&address));
        assert!(tells_of_devices(&[&address[..], &new].concat()));
        assert!(tells_of_devices(&new[..HEADER]), "cut off");
        assert!(!tells_of_devices(&new[..HEADER - 1]));
        assert!(!tells_of_devices(&[]));
        // Lengths that contradict themselves end, too.
        assert!(!tells_of_devices(&[0; 64]));
        assert!(!tells_of_devices(&[0xff; 64]));
    }

    #[test]
    fn devices_come_and_go() {
        let namespace = Namespace::unnamed("watched").unwrap();
        let mut watch = namespace.enter(DeviceWatch::new).unwrap().unwrap();
        assert!(!watch.drain().unwrap());
        namespace
            .ip_batch("link add d0 type veth peer name d1\n")
            .unwrap();
        assert!(watch.drain().unwrap());
        assert!(!watch.drain().unwrap());
        namespace
            .ip_batch("address add 10.0.0.1/24 dev d0\n")
            .unwrap();
        assert!(!watch.drain().unwrap());
        // More than fits: what was lost counts as a change.
        let flaps = "link set d0 up\nlink set d0 down\n".repeat(2000);
        namespace.ip_batch(&flaps).unwrap();
        assert!(watch.drain().unwrap());
        assert!(!watch.drain().unwrap());
        namespace.ip_batch("link del d0\n").unwrap();
        assert!(watch.drain().unwrap());
    }
}
