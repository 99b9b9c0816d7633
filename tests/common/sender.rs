// SPDX-License-Identifier: MIT OR Apache-2.0
//! Frames sent as they are, many at a time.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::net::if_::if_nametoindex;
use policy_chain::netns::Namespace;

/// Frames of a batch. A veth pair holds 256 that wait for its XDP program.
pub const BATCH: usize = 64;

/// A packet socket of one device, which receives nothing.
pub struct Sender(OwnedFd);

impl Sender {
    pub fn open(namespace: &Namespace, device: &str) -> Sender {
        Sender(namespace.enter(|| open(device).unwrap()).unwrap())
    }

    /// Sends frames of at least an Ethernet header, at most [`BATCH`]. Those that the device's own
    /// chain drops count as sent.
    pub fn send(&self, frames: &[Vec<u8>]) {
        // SAFETY: all-zero headers and vectors are valid.
        let mut headers: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut vectors: [libc::iovec; BATCH] = unsafe { std::mem::zeroed() };
        for ((header, vector), frame) in headers.iter_mut().zip(&mut vectors).zip(frames) {
            vector.iov_base = frame.as_ptr().cast_mut().cast();
            vector.iov_len = frame.len();
            header.msg_hdr.msg_iov = vector;
            header.msg_hdr.msg_iovlen = 1;
        }
        let mut sent = 0;
        while sent < frames.len() {
            let left = &mut headers[sent..frames.len()];
            // SAFETY: each header points to one vector, and that to a frame, which all outlive the
            // call; the kernel only reads the frames.
            let count = unsafe {
                let socket = self.0.as_raw_fd();
                libc::sendmmsg(socket, left.as_mut_ptr(), left.len() as u32, 0)
            };
            sent += usize::try_from(count).unwrap_or_else(|_| {
                let error = io::Error::last_os_error();
                // Dropped on egress: the frame at which it stopped went through the chain.
                assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS), "send: {error}");
                1
            });
        }
    }
}

fn open(device: &str) -> io::Result<OwnedFd> {
    // SAFETY: plain integers; the result is checked before it is owned.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: an all-zero sockaddr_ll is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = if_nametoindex(device)? as i32;
    // SAFETY: an address of the length stated.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    };
    match bound {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}
