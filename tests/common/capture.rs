// SPDX-License-Identifier: MIT OR Apache-2.0
//! Captures of what a device receives: after XDP, before TC ingress.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::net::if_::if_nametoindex;
use policy_chain::netns::Namespace;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

pub const MSS: u8 = 2;
pub const SACK_PERMITTED: u8 = 4;
pub const TIMESTAMPS: u8 = 8;

const ETHERNET: usize = 14;
/// Room for the frames of a test, in bytes of kernel memory.
static BUFFER: libc::c_int = 512 << 20;

/// A TCP segment as it was on the wire.
#[derive(Clone, Debug)]
pub struct Segment {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub source_port: u16,
    pub destination_port: u16,
    pub flags: u8,
    pub window: u16,
    /// Kind and data, without NOPs; up to the end of the list.
    pub options: Vec<(u8, Vec<u8>)>,
    pub payload: usize,
    pub checksum_is_right: bool,
    pub ttl: u8,
    pub destination_mac: [u8; 6],
}

impl Segment {
    pub fn is_syn(&self) -> bool {
        self.flags & SYN != 0
    }

    pub fn option(&self, kind: u8) -> Option<&[u8]> {
        let mut options = self.options.iter();
        options
            .find(|(other, _)| *other == kind)
            .map(|(_, data)| data.as_slice())
    }

    pub fn mss(&self) -> Option<u16> {
        let data = self.option(MSS)?;
        Some(u16::from_be_bytes(data.try_into().ok()?))
    }
}

/// Holds all that a device has received since the start.
pub struct Capture {
    socket: OwnedFd,
    segments: Vec<Segment>,
    frames: Vec<Vec<u8>>,
}

impl Capture {
    pub fn start(namespace: &Namespace, device: &str) -> Capture {
        let socket = namespace.enter(|| open(device).unwrap()).unwrap();
        Capture {
            socket,
            segments: Vec::new(),
            frames: Vec::new(),
        }
    }

    /// The TCP segments received so far.
    pub fn segments(&mut self) -> &[Segment] {
        self.drain();
        &self.segments
    }

    /// Those to a port.
    pub fn with_port(&mut self, port: u16) -> Vec<Segment> {
        let segments = self.segments().iter();
        segments
            .filter(|segment| segment.destination_port == port)
            .cloned()
            .collect()
    }

    /// All frames received and sent so far, as they are.
    pub fn frames(&mut self) -> &[Vec<u8>] {
        self.drain();
        &self.frames
    }

    fn drain(&mut self) {
        let mut buffer = vec![0u8; 128 << 10];
        loop {
            // SAFETY: an all-zero sockaddr_ll is valid.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut from_length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            // SAFETY: buffer and address have the lengths stated.
            let length = unsafe {
                libc::recvfrom(
                    self.socket.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    libc::MSG_DONTWAIT,
                    (&raw mut from).cast(),
                    &mut from_length,
                )
            };
            let Ok(length) = usize::try_from(length) else {
                let error = io::Error::last_os_error();
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
                break;
            };
            if from.sll_pkttype != libc::PACKET_OUTGOING {
                self.segments.extend(parse(&buffer[..length]));
            }
            self.frames.push(buffer[..length].to_vec());
        }
        assert_eq!(self.dropped(), 0, "frames lost by the capture");
    }

    fn dropped(&self) -> u32 {
        let mut statistics = [0u32; 2];
        let mut length = size_of_val(&statistics) as libc::socklen_t;
        // SAFETY: tpacket_stats is two 32-bit integers.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                statistics.as_mut_ptr().cast(),
                &mut length,
            )
        };
        assert_eq!(result, 0);
        statistics[1]
    }
}

fn open(device: &str) -> io::Result<OwnedFd> {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: plain integers; the result is checked before it is owned.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: an integer of the length stated.
    let sized = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const BUFFER).cast(),
            size_of_val(&BUFFER) as libc::socklen_t,
        )
    };
    // SAFETY: an all-zero sockaddr_ll is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = if_nametoindex(device)? as i32;
    // SAFETY: an address of the length stated.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    };
    match (sized, bound) {
        (0, 0) => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// The TCP segment of a frame, if it is one.
pub fn parse(frame: &[u8]) -> Option<Segment> {
    let packet = frame.get(ETHERNET..)?;
    let (source, destination, ttl, tcp): (IpAddr, IpAddr, u8, &[u8]) = match word(frame, 12) {
        0x0800 if packet.get(9) == Some(&6) => {
            let header = usize::from(packet[0] & 0xf) * 4;
            let source: [u8; 4] = packet[12..16].try_into().ok()?;
            let destination: [u8; 4] = packet[16..20].try_into().ok()?;
            let tcp = packet.get(header..usize::from(word(packet, 2)))?;
            (
                Ipv4Addr::from(source).into(),
                Ipv4Addr::from(destination).into(),
                packet[8],
                tcp,
            )
        }
        0x86dd if packet.get(6) == Some(&6) => {
            let source: [u8; 16] = packet[8..24].try_into().ok()?;
            let destination: [u8; 16] = packet[24..40].try_into().ok()?;
            let tcp = packet.get(40..40 + usize::from(word(packet, 4)))?;
            (
                Ipv6Addr::from(source).into(),
                Ipv6Addr::from(destination).into(),
                packet[7],
                tcp,
            )
        }
        _ => return None,
    };
    let header = usize::from(tcp.get(12)? >> 4) * 4;
    Some(Segment {
        source,
        destination,
        source_port: word(tcp, 0),
        destination_port: word(tcp, 2),
        flags: tcp[13],
        window: word(tcp, 14),
        options: options(tcp.get(20..header)?),
        payload: tcp.len() - header,
        checksum_is_right: checksum(source, destination, tcp) == 0xffff,
        ttl,
        destination_mac: frame[..6].try_into().ok()?,
    })
}

fn options(mut list: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut found = Vec::new();
    while let Some(&kind) = list.first() {
        match kind {
            0 => break,
            1 => list = &list[1..],
            _ => {
                let length = usize::from(*list.get(1).unwrap_or(&0));
                assert!((2..=list.len()).contains(&length), "bad option: {list:x?}");
                found.push((kind, list[2..length].to_vec()));
                list = &list[length..];
            }
        }
    }
    found
}

/// The one's complement sum of the segment and its pseudo-header.
fn checksum(source: IpAddr, destination: IpAddr, tcp: &[u8]) -> u16 {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let sum = |bytes: &[u8]| -> u64 {
        bytes
            .chunks(2)
            .map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0)))
            .sum()
    };
    let mut total =
        sum(&octets(source)) + sum(&octets(destination)) + 6 + tcp.len() as u64 + sum(tcp);
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}
