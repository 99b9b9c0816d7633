// SPDX-License-Identifier: MIT OR Apache-2.0
//! Packet captures, read and written as a stream.
//!
//! Containers: pcap (either byte order, microseconds or nanoseconds) and pcapng (sections of either
//! byte order, interfaces with a link type and timestamp resolution each; Enhanced, Simple and
//! obsolete Packet blocks). Both are decoded here, because timestamp units, truncated packets
//! and damaged lengths must be exact: a file's lengths are never trusted beyond [`MAX_CAPTURED`].
//!
//! A policy needs Ethernet. A packet of another link layer gets a **synthetic Ethernet header**:
//!
//! | link type | destination | source | EtherType |
//! |---|---|---|---|
//! | raw IP (101, 12, 14) | [`SYNTHETIC_DESTINATION`] | [`SYNTHETIC_SOURCE`] | IPv4 or IPv6 by the version field, else [`ETHERTYPE_NONE`] |
//! | IPv4 (228), IPv6 (229) | the same | the same | IPv4, IPv6 |
//! | Linux cooked v1 (113), v2 (276) | the same | the cooked address if it has six bytes, else the same | the cooked protocol |
//!
//! [`Packet::restore`] goes the other way and says what becomes of a changed header.

use std::fs::{File, Metadata};
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::error::{Invalid, Refused};

/// The most bytes one packet of a capture may hold (the limit of libpcap and Wireshark).
pub const MAX_CAPTURED: u32 = 262_144;
/// Destination of a synthetic Ethernet header.
pub const SYNTHETIC_DESTINATION: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Source of a synthetic Ethernet header.
pub const SYNTHETIC_SOURCE: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// EtherType of a raw IP packet that is neither IPv4 nor IPv6 (a value IEEE reserves).
pub const ETHERTYPE_NONE: u16 = 0xffff;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;
const ETHERNET_HEADER: usize = 14;
const VLAN_TAG: usize = 4;

/// Bytes of a pcapng block that is decoded; room for a packet and its options.
const MAX_BLOCK: u32 = 2 * MAX_CAPTURED;
/// Interfaces of a file, and bytes of options kept of each: they stay in memory.
const MAX_INTERFACES: usize = 16_384;
const MAX_OPTIONS: usize = 4_096;

const SUPPORTED: &str = "Ethernet (1), raw IP (101, 12, 14), IPv4 (228), IPv6 (229), \
                         Linux cooked v1 (113) or Linux cooked v2 (276)";

/// One captured packet.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Time of capture since the epoch, rounded down to nanoseconds; zero where the capture has
    /// none (pcapng Simple Packet) or one before the epoch. [`Writer`] writes the stamp as read.
    pub timestamp: Duration,
    /// An Ethernet frame, with a synthetic header where the capture had none.
    pub frame: Vec<u8>,
    /// Bytes the packet had on the wire, in the link layer of the capture.
    pub original_len: u32,
    /// The capture holds fewer bytes than the packet had.
    pub truncated: bool,
    captured_len: u32,
    link: Link,
    stamp: Stamp,
    /// Number of the pcapng interface, counted through all sections of the file.
    interface: u32,
    options: PacketOptions,
}

/// How a frame becomes a packet of the capture's link layer again.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Link {
    Ethernet,
    Raw,
    Cooked {
        layout: &'static Cooked,
        header: Vec<u8>,
    },
}

/// Where the fields stand in a Linux cooked header; all are in network byte order.
#[derive(Debug, PartialEq, Eq)]
struct Cooked {
    len: usize,
    protocol: usize,
    /// The low byte of the address length.
    address_len: usize,
    address: usize,
}

static COOKED_V1: Cooked = Cooked {
    len: 16,
    protocol: 14,
    address_len: 5,
    address: 6,
};
static COOKED_V2: Cooked = Cooked {
    len: 20,
    protocol: 0,
    address_len: 11,
    address: 12,
};

impl Cooked {
    fn has_mac(&self, header: &[u8]) -> bool {
        header[self.address_len] == 6
    }

    fn mac(&self) -> std::ops::Range<usize> {
        self.address..self.address + 6
    }

    fn protocol(&self) -> std::ops::Range<usize> {
        self.protocol..self.protocol + 2
    }
}

/// A timestamp in the units of the file, so that it is written exactly as read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stamp {
    Pcap { seconds: u32, fraction: u32 },
    Pcapng { ticks: u64 },
}

/// What is kept of a pcapng packet's options. A hash or drop count would not hold for the output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct PacketOptions {
    comments: Vec<Vec<u8>>,
    flags: Option<u32>,
}

impl Packet {
    /// The packet of the capture's own link layer that `frame` stands for.
    ///
    /// - Ethernet: the frame itself.
    /// - Raw IP: what follows the Ethernet header and its VLAN tags. A changed address, EtherType or
    ///   tag has no place in such a capture and is lost.
    /// - Linux cooked: the header as read, with the frame's EtherType as protocol (a VLAN tag stays:
    ///   cooked captures hold it as protocol 0x8100), and the frame's source as address if the
    ///   capture had a six-byte address there. The destination is lost.
    ///
    /// A frame shorter than an Ethernet header has no payload.
    pub fn restore(&self, frame: &[u8]) -> Vec<u8> {
        match &self.link {
            Link::Ethernet => frame.to_vec(),
            Link::Raw => frame.get(payload_offset(frame)..).unwrap_or(&[]).to_vec(),
            Link::Cooked { layout, header } => restore_cooked(layout, header, frame),
        }
    }
}

fn restore_cooked(layout: &Cooked, header: &[u8], frame: &[u8]) -> Vec<u8> {
    let mut packet = header.to_vec();
    if let Some((ethernet, payload)) = frame.split_at_checked(ETHERNET_HEADER) {
        packet[layout.protocol()].copy_from_slice(&ethernet[12..14]);
        if layout.has_mac(header) {
            packet[layout.mac()].copy_from_slice(&ethernet[6..12]);
        }
        packet.extend_from_slice(payload);
    }
    packet
}

/// Offset of what follows the Ethernet header and the VLAN tags; past the end if they are cut.
fn payload_offset(frame: &[u8]) -> usize {
    let mut offset = ETHERNET_HEADER;
    while let Some(ethertype) = frame.get(offset - 2..offset) {
        match u16::from_be_bytes([ethertype[0], ethertype[1]]) {
            ETHERTYPE_VLAN | ETHERTYPE_QINQ => offset += VLAN_TAG,
            _ => break,
        }
    }
    offset
}

fn ethernet(source: &[u8], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(ETHERNET_HEADER + payload.len());
    frame.extend_from_slice(&SYNTHETIC_DESTINATION);
    frame.extend_from_slice(source);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// The supported link types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LinkType {
    Ethernet,
    Raw,
    Ip(u16),
    Cooked(&'static Cooked),
}

impl LinkType {
    fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => LinkType::Ethernet,
            12 | 14 | 101 => LinkType::Raw,
            113 => LinkType::Cooked(&COOKED_V1),
            228 => LinkType::Ip(ETHERTYPE_IPV4),
            229 => LinkType::Ip(ETHERTYPE_IPV6),
            276 => LinkType::Cooked(&COOKED_V2),
            _ => return None,
        })
    }

    /// The frame for a captured packet; `Err` is the length of the link header that `data` lacks.
    fn decode(self, data: Vec<u8>) -> std::result::Result<(Vec<u8>, Link), usize> {
        match self {
            LinkType::Ethernet => Ok((data, Link::Ethernet)),
            LinkType::Raw => {
                let ethertype = match data.first().map(|byte| byte >> 4) {
                    Some(4) => ETHERTYPE_IPV4,
                    Some(6) => ETHERTYPE_IPV6,
                    _ => ETHERTYPE_NONE,
                };
                Ok((ethernet(&SYNTHETIC_SOURCE, ethertype, &data), Link::Raw))
            }
            LinkType::Ip(ethertype) => {
                Ok((ethernet(&SYNTHETIC_SOURCE, ethertype, &data), Link::Raw))
            }
            LinkType::Cooked(layout) => decode_cooked(layout, &data),
        }
    }
}

fn decode_cooked(
    layout: &'static Cooked,
    data: &[u8],
) -> std::result::Result<(Vec<u8>, Link), usize> {
    let (header, payload) = data.split_at_checked(layout.len).ok_or(layout.len)?;
    let protocol = &header[layout.protocol()];
    let source = if layout.has_mac(header) {
        &header[layout.mac()]
    } else {
        &SYNTHETIC_SOURCE[..]
    };
    let frame = ethernet(
        source,
        u16::from_be_bytes([protocol[0], protocol[1]]),
        payload,
    );
    let header = header.to_vec();
    Ok((frame, Link::Cooked { layout, header }))
}

/// Name of a link type that is not supported, as tcpdump.org lists it.
fn link_type_name(number: u32) -> &'static str {
    match number {
        0 => "NULL, BSD loopback",
        6 => "IEEE802_5, token ring",
        8 => "SLIP",
        9 => "PPP",
        50 => "PPP_HDLC",
        51 => "PPP_ETHER",
        104 => "C_HDLC",
        105 => "IEEE802_11",
        107 => "FRELAY",
        108 => "LOOP, OpenBSD loopback",
        117 => "PFLOG",
        119 => "IEEE802_11_PRISM",
        127 => "IEEE802_11_RADIOTAP",
        147..=162 => "USER, private use",
        187 => "BLUETOOTH_HCI_H4",
        189 => "USB_LINUX",
        192 => "PPI",
        195 => "IEEE802_15_4_WITHFCS",
        201 => "BLUETOOTH_HCI_H4_WITH_PHDR",
        220 => "USB_LINUX_MMAPPED",
        227 => "CAN_SOCKETCAN",
        239 => "NFLOG",
        247 => "INFINIBAND",
        249 => "USBPCAP",
        253 => "NETLINK",
        271 => "VSOCK",
        _ => "not known here",
    }
}

/// Byte order of a file or section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Big,
    Little,
}

impl Order {
    fn u16(self, bytes: [u8; 2]) -> u16 {
        match self {
            Order::Big => u16::from_be_bytes(bytes),
            Order::Little => u16::from_le_bytes(bytes),
        }
    }

    fn u32(self, bytes: [u8; 4]) -> u32 {
        match self {
            Order::Big => u32::from_be_bytes(bytes),
            Order::Little => u32::from_le_bytes(bytes),
        }
    }

    fn u64(self, bytes: [u8; 8]) -> u64 {
        match self {
            Order::Big => u64::from_be_bytes(bytes),
            Order::Little => u64::from_le_bytes(bytes),
        }
    }

    fn put_u16(self, value: u16) -> [u8; 2] {
        match self {
            Order::Big => value.to_be_bytes(),
            Order::Little => value.to_le_bytes(),
        }
    }

    fn put_u32(self, value: u32) -> [u8; 4] {
        match self {
            Order::Big => value.to_be_bytes(),
            Order::Little => value.to_le_bytes(),
        }
    }

    fn put_u64(self, value: u64) -> [u8; 8] {
        match self {
            Order::Big => value.to_be_bytes(),
            Order::Little => value.to_le_bytes(),
        }
    }
}

/// A reader of fixed-size fields over a byte slice; `None` past the end.
struct Fields<'a> {
    order: Order,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        Some(*head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(|bytes| self.order.u16(bytes))
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(|bytes| self.order.u32(bytes))
    }

    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(len)?;
        self.rest = rest;
        Some(head)
    }

    /// The next pcapng option, code and value; `None` at the end or at the first damaged one.
    fn option(&mut self) -> Option<(u16, &'a [u8])> {
        let code = self.u16()?;
        let len = usize::from(self.u16()?);
        if code == 0 {
            return None;
        }
        let value = self.bytes(len)?;
        let padding = len.next_multiple_of(4) - len;
        self.rest = self.rest.get(padding..).unwrap_or(&[]);
        Some((code, value))
    }
}

mod block {
    pub const SECTION_HEADER: u32 = 0x0a0d_0d0a;
    pub const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;
    pub const INTERFACE: u32 = 1;
    pub const OBSOLETE_PACKET: u32 = 2;
    pub const SIMPLE_PACKET: u32 = 3;
    pub const ENHANCED_PACKET: u32 = 6;
    /// Type, length and the length again.
    pub const OVERHEAD: u32 = 12;
}

mod option {
    pub const COMMENT: u16 = 1;
    pub const PACKET_FLAGS: u16 = 2;
    pub const SPEED: u16 = 8;
    pub const TIMESTAMP_RESOLUTION: u16 = 9;
    pub const TIMESTAMP_OFFSET: u16 = 14;
    /// Interface options that are plain bytes, the same in both byte orders: comment, name,
    /// description, addresses, resolution, filter, system, FCS length, hardware.
    pub const PLAIN: [u16; 12] = [1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 15];
}

/// A pcapng interface.
#[derive(Clone, Debug)]
struct Interface {
    link_type: u16,
    snap_len: u32,
    /// `if_tsresol`: a power of ten, or of two with the top bit set; microseconds if absent.
    resolution: u8,
    /// `if_tsoffset`: seconds to add to every stamp.
    offset: i64,
    /// Byte-order independent options as (code, value), and the speed in bits per second.
    options: Vec<(u16, Vec<u8>)>,
    speed: Option<u64>,
}

impl Interface {
    fn parse(mut fields: Fields) -> Option<Self> {
        let link_type = fields.u16()?;
        let _reserved = fields.u16()?;
        let snap_len = fields.u32()?;
        let mut interface = Interface {
            link_type,
            snap_len,
            resolution: 6,
            offset: 0,
            options: Vec::new(),
            speed: None,
        };
        let mut room = MAX_OPTIONS;
        while let Some((code, value)) = fields.option() {
            interface.take_option(fields.order, code, value, &mut room);
        }
        Some(interface)
    }

    /// Options past `room` bytes are not kept, but still understood.
    fn take_option(&mut self, order: Order, code: u16, value: &[u8], room: &mut usize) {
        let number = <[u8; 8]>::try_from(value).map(|bytes| order.u64(bytes));
        match (code, value, number) {
            (option::TIMESTAMP_RESOLUTION, [resolution], _) => self.resolution = *resolution,
            (option::TIMESTAMP_OFFSET, _, Ok(seconds)) => self.offset = seconds as i64,
            (option::SPEED, _, Ok(speed)) => self.speed = Some(speed),
            _ if option::PLAIN.contains(&code) => {
                if let Some(left) = room.checked_sub(value.len() + 4) {
                    *room = left;
                    self.options.push((code, value.to_vec()));
                }
            }
            _ => {}
        }
    }

    fn timestamp(&self, ticks: u64) -> Duration {
        let exponent = u32::from(self.resolution & 0x7f);
        let base: u128 = if self.resolution & 0x80 == 0 { 10 } else { 2 };
        // A unit too small for 128 bits leaves nothing of 64 bits of ticks.
        let per_second = base.checked_pow(exponent).unwrap_or(u128::MAX);
        let ticks = u128::from(ticks);
        let seconds = (ticks / per_second) as i128 + i128::from(self.offset);
        let nanoseconds = (ticks % per_second) * 1_000_000_000 / per_second;
        match u64::try_from(seconds) {
            Ok(seconds) => Duration::new(seconds, nanoseconds as u32),
            Err(_) => Duration::ZERO,
        }
    }

    fn block(&self, order: Order) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend(order.put_u16(self.link_type));
        body.extend([0; 2]);
        // Zero means no limit.
        let snap_len = match self.snap_len {
            0 => 0,
            limit => limit.max(MAX_CAPTURED),
        };
        body.extend(order.put_u32(snap_len));
        for (code, value) in &self.options {
            put_option(&mut body, order, *code, value);
        }
        if let Some(speed) = self.speed {
            put_option(&mut body, order, option::SPEED, &order.put_u64(speed));
        }
        if self.resolution != 6 {
            let code = option::TIMESTAMP_RESOLUTION;
            put_option(&mut body, order, code, &[self.resolution]);
        }
        if self.offset != 0 {
            let seconds = order.put_u64(self.offset as u64);
            put_option(&mut body, order, option::TIMESTAMP_OFFSET, &seconds);
        }
        if body.len() > 8 {
            body.extend([0; 4]);
        }
        enclose(order, block::INTERFACE, &body)
    }
}

fn put_option(body: &mut Vec<u8>, order: Order, code: u16, value: &[u8]) {
    body.extend(order.put_u16(code));
    body.extend(order.put_u16(value.len() as u16));
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// A pcapng block around `body`, whose length is a multiple of four.
fn enclose(order: Order, kind: u32, body: &[u8]) -> Vec<u8> {
    let len = order.put_u32(body.len() as u32 + block::OVERHEAD);
    let mut block = Vec::with_capacity(body.len() + block::OVERHEAD as usize);
    block.extend(order.put_u32(kind));
    block.extend(len);
    block.extend_from_slice(body);
    block.extend(len);
    block
}

/// Container format of a capture; made by [`Reader::format`] and followed by [`Writer`].
#[derive(Clone, Debug)]
pub struct Format(Container);

#[derive(Clone, Debug)]
enum Container {
    Pcap(PcapHeader),
    Pcapng {
        /// Byte order of the first section; the output is one section.
        order: Order,
        /// Every interface read so far, through all sections; the writer copies them from here.
        interfaces: Arc<Mutex<Vec<Interface>>>,
    },
}

impl Format {
    /// `pcap` or `pcapng`.
    pub fn name(&self) -> &'static str {
        match self.0 {
            Container::Pcap(_) => "pcap",
            Container::Pcapng { .. } => "pcapng",
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct PcapHeader {
    order: Order,
    nanoseconds: bool,
    snap_len: u32,
    /// Link type in the low 26 bits, FCS length above.
    link: u32,
}

const PCAP_MICROSECONDS: u32 = 0xa1b2_c3d4;
const PCAP_NANOSECONDS: u32 = 0xa1b2_3c4d;
const PCAP_LINK_MASK: u32 = 0x03ff_ffff;
const PCAP_VERSION: (u16, u16) = (2, 4);

/// Byte order and whether stamps are in nanoseconds, by the first four bytes of a pcap file.
fn pcap_magic(magic: [u8; 4]) -> Option<(Order, bool)> {
    [Order::Big, Order::Little]
        .into_iter()
        .find_map(|order| match order.u32(magic) {
            PCAP_MICROSECONDS => Some((order, false)),
            PCAP_NANOSECONDS => Some((order, true)),
            _ => None,
        })
}

/// What a file that is no supported capture seems to be, and what to do about it.
fn foreign_magic(magic: [u8; 4]) -> (String, &'static str) {
    const CONVERT: &str = "convert it with `editcap -F pcap`";
    const UNPACK: &str = "decompress it first";
    match magic {
        [0x1f, 0x8b, ..] => ("a gzip file".into(), UNPACK),
        [0x28, 0xb5, 0x2f, 0xfd] => ("a zstd file".into(), UNPACK),
        [0xfd, b'7', b'z', b'X'] => ("an xz file".into(), UNPACK),
        [b's', b'n', b'o', b'o'] => ("a snoop capture".into(), CONVERT),
        [0xa1, 0xb2, 0xcd, 0x34] | [0x34, 0xcd, 0xb2, 0xa1] => {
            ("a pcap file with modified record headers".into(), CONVERT)
        }
        [a, b, c, d] => (
            format!("a file that begins with {a:02x} {b:02x} {c:02x} {d:02x}"),
            "",
        ),
    }
}

/// The bytes of a capture, with the position an error names.
struct Input {
    source: BufReader<Box<dyn Read + Send>>,
    file: Option<PathBuf>,
    /// Packets read so far.
    packets: u64,
    /// Bytes read so far.
    offset: u64,
}

impl Input {
    fn invalid_at(&self, path: String, found: String, expected: &str) -> Invalid {
        Invalid {
            file: self.file.clone(),
            ..Invalid::new(path, found, expected)
        }
    }

    /// The packet about to be read cannot be used.
    fn invalid(&self, found: impl ToString, expected: &str) -> Invalid {
        let path = format!("packet {}", self.packets + 1);
        self.invalid_at(path, found.to_string(), expected)
    }

    /// The beginning of the file cannot be used.
    fn invalid_file(&self, found: impl ToString, expected: &str) -> Invalid {
        self.invalid_at("capture".into(), found.to_string(), expected)
    }

    fn cut(&self) -> anyhow::Error {
        let found = format!(
            "the file ends in the middle, at byte {} after {} whole packets",
            self.offset, self.packets
        );
        self.invalid(found, "a whole capture")
            .advice("capture again, or keep the whole packets with `editcap` or `tcpdump -r`")
            .into()
    }

    fn failure(&self, error: io::Error) -> anyhow::Error {
        let name = self.file.as_deref().unwrap_or(Path::new("the capture"));
        anyhow::Error::new(error).context(format!(
            "reading {} at packet {}",
            name.display(),
            self.packets + 1
        ))
    }

    /// Up to `len` bytes: fewer only at the end of the file. Memory grows with what is there.
    fn up_to(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let result = (&mut self.source).take(len as u64).read_to_end(&mut bytes);
        self.offset += bytes.len() as u64;
        match result {
            Ok(_) => Ok(bytes),
            Err(error) => Err(self.failure(error)),
        }
    }

    fn bytes(&mut self, len: usize) -> Result<Vec<u8>> {
        let bytes = self.up_to(len)?;
        if bytes.len() < len {
            return Err(self.cut());
        }
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.array_or_end()?.ok_or_else(|| self.cut())
    }

    /// `None` if the file ends here.
    fn array_or_end<const N: usize>(&mut self) -> Result<Option<[u8; N]>> {
        let mut bytes = [0; N];
        let mut filled = 0;
        while filled < N {
            match self.source.read(&mut bytes[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(self.cut()),
                Ok(len) => {
                    filled += len;
                    self.offset += len as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failure(error)),
            }
        }
        Ok(Some(bytes))
    }

    fn skip(&mut self, len: u64) -> Result<()> {
        let skipped = io::copy(&mut (&mut self.source).take(len), &mut io::sink())
            .map_err(|error| self.failure(error))?;
        self.offset += skipped;
        if skipped < len {
            return Err(self.cut());
        }
        Ok(())
    }
}

/// Reads the packets of a capture one after the other.
///
/// Iterating gives [`Invalid`] for a link type that is not supported, and for a damaged or cut
/// file, naming the packet (counted from 1); nothing follows an error.
pub struct Reader {
    input: Input,
    format: Format,
    /// The section being read (pcapng).
    section: Section,
    /// Device and inode of the file, so that it is not overwritten while being read.
    identity: Option<(u64, u64)>,
    done: bool,
}

#[derive(Clone, Copy, Debug)]
struct Section {
    order: Order,
    /// Number of its first interface in the file.
    first_interface: usize,
}

impl Reader {
    /// Opens a capture file.
    ///
    /// # Errors
    /// [`Invalid`] if there is no such file or it is not a capture, [`Refused`] (denied) if it may
    /// not be read.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| unusable("read", path, error))?;
        let metadata = file
            .metadata()
            .map_err(|error| unusable("read", path, error))?;
        if metadata.is_dir() {
            let error = io::Error::from(ErrorKind::IsADirectory);
            return Err(unusable("read", path, error));
        }
        let mut reader = Reader::start(Box::new(file), Some(path.to_owned()))?;
        reader.identity = Some(identity(&metadata));
        Ok(reader)
    }

    /// Reads a capture from anything readable; it is buffered here.
    ///
    /// # Errors
    /// [`Invalid`] if it is not a capture.
    pub fn new(source: impl Read + Send + 'static) -> Result<Self> {
        Reader::start(Box::new(source), None)
    }

    fn start(source: Box<dyn Read + Send>, file: Option<PathBuf>) -> Result<Self> {
        let mut input = Input {
            source: BufReader::with_capacity(1 << 16, source),
            file,
            packets: 0,
            offset: 0,
        };
        let (format, order) = read_format(&mut input)?;
        Ok(Reader {
            input,
            format,
            section: Section {
                order,
                first_interface: 0,
            },
            identity: None,
            done: false,
        })
    }

    /// The format to write the packets of this capture in.
    pub fn format(&self) -> Format {
        self.format.clone()
    }

    /// The next packet; `None` at the end of the capture.
    ///
    /// # Errors
    /// As the iterator.
    pub fn next_packet(&mut self) -> Result<Option<Packet>> {
        let packet = match &self.format.0 {
            Container::Pcap(header) => next_record(&mut self.input, *header),
            Container::Pcapng { interfaces, .. } => {
                let interfaces = Arc::clone(interfaces);
                self.next_in_blocks(&interfaces)
            }
        }?;
        if packet.is_some() {
            self.input.packets += 1;
        }
        Ok(packet)
    }

    fn next_in_blocks(&mut self, interfaces: &Mutex<Vec<Interface>>) -> Result<Option<Packet>> {
        loop {
            let Some(kind) = self.input.array_or_end()? else {
                return Ok(None);
            };
            match self.section.order.u32(kind) {
                block::SECTION_HEADER => self.start_section(interfaces)?,
                block::INTERFACE => self.add_interface(interfaces)?,
                kind @ (block::ENHANCED_PACKET | block::SIMPLE_PACKET | block::OBSOLETE_PACKET) => {
                    let body = read_block(&mut self.input, self.section.order)?;
                    return self.packet(kind, &body, interfaces).map(Some);
                }
                _ => skip_block(&mut self.input, self.section.order)?,
            }
        }
    }

    fn start_section(&mut self, interfaces: &Mutex<Vec<Interface>>) -> Result<()> {
        self.section = Section {
            order: read_section(&mut self.input)?,
            first_interface: locked(interfaces).len(),
        };
        Ok(())
    }

    fn add_interface(&mut self, interfaces: &Mutex<Vec<Interface>>) -> Result<()> {
        let order = self.section.order;
        let body = read_block(&mut self.input, order)?;
        let fields = Fields { order, rest: &body };
        let interface = Interface::parse(fields).ok_or_else(|| {
            let found = format!("an interface block of {} bytes before it", body.len());
            self.input.invalid(found, "at least 8 bytes")
        })?;
        let mut interfaces = locked(interfaces);
        if interfaces.len() == MAX_INTERFACES {
            let expected = format!("at most {MAX_INTERFACES} interfaces");
            return Err(self.input.invalid("more interfaces", &expected).into());
        }
        interfaces.push(interface);
        Ok(())
    }

    fn packet(&self, kind: u32, body: &[u8], interfaces: &Mutex<Vec<Interface>>) -> Result<Packet> {
        let fields = Fields {
            order: self.section.order,
            rest: body,
        };
        let interfaces = locked(interfaces);
        let known = &interfaces[self.section.first_interface..];
        let parsed = match kind {
            block::SIMPLE_PACKET => ParsedBlock::simple(fields, known),
            _ => ParsedBlock::enhanced(fields, kind),
        };
        let parsed = parsed.ok_or_else(|| {
            let found = format!("a packet block of {} bytes", body.len());
            self.input
                .invalid(found, "a block that holds its header and its data")
        })?;
        let interface = known.get(parsed.interface as usize).ok_or_else(|| {
            let found = format!("interface {}", parsed.interface);
            let expected = format!("one of the {} interfaces of the section", known.len());
            self.input.invalid(found, &expected)
        })?;
        check_captured(&self.input, parsed.data.len())?;
        let ticks = parsed.ticks;
        let mut packet = decode(
            &self.input,
            u32::from(interface.link_type),
            parsed.data.to_vec(),
            parsed.original_len,
        )?;
        packet.timestamp = ticks.map_or(Duration::ZERO, |ticks| interface.timestamp(ticks));
        packet.stamp = Stamp::Pcapng {
            ticks: ticks.unwrap_or(0),
        };
        packet.interface = self.section.first_interface as u32 + parsed.interface;
        packet.options = parsed.options;
        Ok(packet)
    }
}

impl Iterator for Reader {
    type Item = Result<Packet>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let next = self.next_packet().transpose();
        self.done = !matches!(next, Some(Ok(_)));
        next
    }
}

fn locked(interfaces: &Mutex<Vec<Interface>>) -> std::sync::MutexGuard<'_, Vec<Interface>> {
    interfaces.lock().unwrap_or_else(PoisonError::into_inner)
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// The error for a file that cannot be opened to `verb` it.
fn unusable(verb: &str, path: &Path, error: io::Error) -> anyhow::Error {
    let missing = "an existing file in an existing folder";
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::IsADirectory | ErrorKind::NotADirectory => {
            Invalid::new("capture", error, missing).in_file(path).into()
        }
        ErrorKind::PermissionDenied => Refused::denied(
            format!("cannot {verb} {}", path.display()),
            error,
            "check the permissions of the file and its folder",
        )
        .into(),
        _ => anyhow::Error::new(error).context(format!("cannot {verb} {}", path.display())),
    }
}

fn read_format(input: &mut Input) -> Result<(Format, Order)> {
    const EXPECTED: &str = "a pcap or pcapng capture";
    let magic = input.up_to(4)?;
    let Ok(magic) = <[u8; 4]>::try_from(&magic[..]) else {
        let found = format!("a file of {} bytes", magic.len());
        return Err(input.invalid_file(found, EXPECTED).into());
    };
    if u32::from_be_bytes(magic) == block::SECTION_HEADER {
        let order = read_section(input)?;
        let interfaces = Arc::default();
        return Ok((Format(Container::Pcapng { order, interfaces }), order));
    }
    let Some((order, nanoseconds)) = pcap_magic(magic) else {
        let (found, advice) = foreign_magic(magic);
        return Err(input.invalid_file(found, EXPECTED).advice(advice).into());
    };
    let rest: [u8; 20] = input.array()?;
    let mut fields = Fields { order, rest: &rest };
    let version = (fields.u16(), fields.u16());
    let (Some(_zone), Some(_accuracy), Some(snap_len), Some(link)) =
        (fields.u32(), fields.u32(), fields.u32(), fields.u32())
    else {
        return Err(input.cut());
    };
    if version != (Some(PCAP_VERSION.0), Some(PCAP_VERSION.1)) {
        let (major, minor) = (version.0.unwrap_or(0), version.1.unwrap_or(0));
        return Err(input
            .invalid_file(format!("pcap version {major}.{minor}"), "version 2.4")
            .advice("convert it with `editcap -F pcap`")
            .into());
    }
    let header = PcapHeader {
        order,
        nanoseconds,
        snap_len,
        link,
    };
    Ok((Format(Container::Pcap(header)), order))
}

fn next_record(input: &mut Input, header: PcapHeader) -> Result<Option<Packet>> {
    let Some(record) = input.array_or_end::<16>()? else {
        return Ok(None);
    };
    let mut fields = Fields {
        order: header.order,
        rest: &record,
    };
    let (Some(seconds), Some(fraction), Some(captured), Some(original)) =
        (fields.u32(), fields.u32(), fields.u32(), fields.u32())
    else {
        return Err(input.cut());
    };
    check_captured(input, captured as usize)?;
    let data = input.bytes(captured as usize)?;
    let mut packet = decode(input, header.link & PCAP_LINK_MASK, data, original)?;
    let unit = if header.nanoseconds { 1 } else { 1_000 };
    packet.timestamp =
        Duration::from_secs(seconds.into()) + Duration::from_nanos(u64::from(fraction) * unit);
    packet.stamp = Stamp::Pcap { seconds, fraction };
    Ok(Some(packet))
}

fn check_captured(input: &Input, captured: usize) -> Result<()> {
    if captured > MAX_CAPTURED as usize {
        let expected = format!("at most {MAX_CAPTURED} bytes");
        return Err(input
            .invalid(format!("a packet of {captured} bytes"), &expected)
            .advice("the file is damaged, or not a capture")
            .into());
    }
    Ok(())
}

/// A packet without its stamp, interface and options.
fn decode(input: &Input, link_type: u32, data: Vec<u8>, original_len: u32) -> Result<Packet> {
    let supported = LinkType::from_number(link_type).ok_or_else(|| {
        let found = format!("link type {link_type} ({})", link_type_name(link_type));
        input.invalid(found, SUPPORTED)
    })?;
    let captured_len = data.len() as u32;
    let (frame, link) = supported.decode(data).map_err(|header| {
        let found = format!("{captured_len} bytes of link type {link_type}");
        let expected = format!("at least its header of {header} bytes");
        input.invalid(found, &expected)
    })?;
    Ok(Packet {
        timestamp: Duration::ZERO,
        frame,
        original_len,
        truncated: captured_len < original_len,
        captured_len,
        link,
        stamp: Stamp::Pcapng { ticks: 0 },
        interface: 0,
        options: PacketOptions::default(),
    })
}

/// The rest of a section header block, after its type.
fn read_section(input: &mut Input) -> Result<Order> {
    let len: [u8; 4] = input.array()?;
    let magic: [u8; 4] = input.array()?;
    let order = [Order::Big, Order::Little]
        .into_iter()
        .find(|order| order.u32(magic) == block::BYTE_ORDER_MAGIC)
        .ok_or_else(|| input.invalid("a section without byte order", "a pcapng section"))?;
    let version: [u8; 2] = input.array()?;
    let major = order.u16(version);
    if major != 1 {
        let found = format!("pcapng version {major}");
        return Err(input.invalid(found, "version 1").into());
    }
    let len = order.u32(len);
    // Read so far: type, length, magic and half the version.
    skip_rest(input, order, len, 14)?;
    Ok(order)
}

/// Skips what is left of a block of `len` bytes, `read` of which have been read.
fn skip_rest(input: &mut Input, order: Order, len: u32, read: u32) -> Result<()> {
    let rest = check_block_len(input, len)?
        .checked_sub(read + 4)
        .ok_or_else(|| block_len_error(input, len))?;
    input.skip(rest.into())?;
    read_trailer(input, order, len)
}

fn skip_block(input: &mut Input, order: Order) -> Result<()> {
    let len = order.u32(input.array()?);
    skip_rest(input, order, len, 8)
}

/// The body of a block, after its type.
fn read_block(input: &mut Input, order: Order) -> Result<Vec<u8>> {
    let len = order.u32(input.array()?);
    check_block_len(input, len)?;
    if len > MAX_BLOCK {
        let expected = format!("at most {MAX_BLOCK} bytes");
        return Err(input
            .invalid(format!("a block of {len} bytes"), &expected)
            .advice("the file is damaged, or not a capture")
            .into());
    }
    let body = input.bytes((len - block::OVERHEAD) as usize)?;
    read_trailer(input, order, len)?;
    Ok(body)
}

fn check_block_len(input: &Input, len: u32) -> Result<u32> {
    if len < block::OVERHEAD || len % 4 != 0 {
        return Err(block_len_error(input, len).into());
    }
    Ok(len)
}

fn block_len_error(input: &Input, len: u32) -> Invalid {
    input
        .invalid(
            format!("a block of {len} bytes"),
            "a multiple of four that holds the block's header",
        )
        .advice("the file is damaged, or not a capture")
}

fn read_trailer(input: &mut Input, order: Order, len: u32) -> Result<()> {
    let trailer = order.u32(input.array()?);
    if trailer != len {
        let found = format!("a block of {len} bytes whose end says {trailer}");
        return Err(input
            .invalid(found, "the same length twice")
            .advice("the file is damaged")
            .into());
    }
    Ok(())
}

/// A packet block of any kind.
struct ParsedBlock<'a> {
    /// Within the section.
    interface: u32,
    ticks: Option<u64>,
    original_len: u32,
    data: &'a [u8],
    options: PacketOptions,
}

impl<'a> ParsedBlock<'a> {
    /// Enhanced and obsolete packet blocks: they differ in the first word only, and the obsolete
    /// one's options have the same codes.
    fn enhanced(mut fields: Fields<'a>, kind: u32) -> Option<Self> {
        let interface = if kind == block::OBSOLETE_PACKET {
            let interface = fields.u16()?;
            let _drops = fields.u16()?;
            u32::from(interface)
        } else {
            fields.u32()?
        };
        let high = fields.u32()?;
        let low = fields.u32()?;
        let captured = fields.u32()? as usize;
        let original_len = fields.u32()?;
        let data = fields.bytes(captured)?;
        fields.bytes(captured.checked_next_multiple_of(4)? - captured)?;
        Some(ParsedBlock {
            interface,
            ticks: Some(u64::from(high) << 32 | u64::from(low)),
            original_len,
            data,
            options: PacketOptions::parse(fields),
        })
    }

    /// A simple packet belongs to the first interface, whose snap length cuts it.
    fn simple(mut fields: Fields<'a>, interfaces: &[Interface]) -> Option<Self> {
        let original_len = fields.u32()?;
        let limit = match interfaces.first() {
            Some(interface) if interface.snap_len != 0 => interface.snap_len,
            _ => u32::MAX,
        };
        Some(ParsedBlock {
            interface: 0,
            ticks: None,
            original_len,
            data: fields.bytes(original_len.min(limit) as usize)?,
            options: PacketOptions::default(),
        })
    }
}

impl PacketOptions {
    fn parse(mut fields: Fields) -> Self {
        let mut options = PacketOptions::default();
        while let Some((code, value)) = fields.option() {
            match (code, <[u8; 4]>::try_from(value)) {
                (option::COMMENT, _) => options.comments.push(value.to_vec()),
                (option::PACKET_FLAGS, Ok(flags)) => {
                    options.flags = Some(fields.order.u32(flags));
                }
                _ => {}
            }
        }
        options
    }

    fn put(&self, body: &mut Vec<u8>, order: Order) {
        for comment in &self.comments {
            put_option(body, order, option::COMMENT, comment);
        }
        if let Some(flags) = self.flags {
            let flags = order.put_u32(flags);
            put_option(body, order, option::PACKET_FLAGS, &flags);
        }
        if *self != PacketOptions::default() {
            body.extend([0; 4]);
        }
    }
}

/// Writes packets in the format they were read in: the same container, byte order, link types,
/// timestamp units and stamps, and a snap length of at least [`MAX_CAPTURED`].
///
/// A pcapng file becomes one section with all interfaces, names included; every packet becomes an
/// Enhanced Packet (a Simple Packet, which has no stamp, with stamp 0), its comments and flags kept.
/// Statistics, name resolution and other blocks are not copied. A frame check sequence of the
/// capture counts as payload and is not recomputed.
pub struct Writer {
    output: BufWriter<Box<dyn Write + Send>>,
    name: PathBuf,
    format: Format,
    /// Interfaces written so far (pcapng).
    interfaces: usize,
}

impl Writer {
    /// Creates a capture file for the packets of `reader`, replacing one that is there.
    ///
    /// # Errors
    /// [`Invalid`] if `path` is the file being read or its folder does not exist, [`Refused`]
    /// (denied) if it may not be written.
    pub fn create(path: &Path, reader: &Reader) -> Result<Self> {
        if let (Some(input), Ok(metadata)) = (reader.identity, path.metadata()) {
            if metadata.is_file() && identity(&metadata) == input {
                let found = "the capture that is being read";
                return Err(Invalid::new("capture", found, "another file")
                    .in_file(path)
                    .into());
            }
        }
        let file = File::create(path).map_err(|error| unusable("write", path, error))?;
        Writer::start(Box::new(file), path.to_owned(), reader.format())
    }

    /// Writes to anything writable; it is buffered here.
    ///
    /// # Errors
    /// Those of the output.
    pub fn new(output: impl Write + Send + 'static, format: Format) -> Result<Self> {
        Writer::start(Box::new(output), "the output".into(), format)
    }

    fn start(output: Box<dyn Write + Send>, name: PathBuf, format: Format) -> Result<Self> {
        let header = match &format.0 {
            Container::Pcap(header) => header.file_header(),
            Container::Pcapng { order, .. } => section_header(*order),
        };
        let mut writer = Writer {
            output: BufWriter::with_capacity(1 << 16, output),
            name,
            format,
            interfaces: 0,
        };
        writer.put(&header)?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.output
            .write_all(bytes)
            .with_context(|| format!("writing {}", self.name.display()))
    }

    /// Writes `frame`, which came from `packet`, with its stamp.
    ///
    /// The original length follows: it changes by as many bytes as the packet did, so that a
    /// truncated packet stays truncated.
    ///
    /// # Errors
    /// Those of the output; a packet of more than [`MAX_CAPTURED`] bytes, or of another capture.
    pub fn write(&mut self, packet: &Packet, frame: &[u8]) -> Result<()> {
        let data = packet.restore(frame);
        ensure!(
            data.len() <= MAX_CAPTURED as usize,
            "a packet of {} bytes does not fit into a capture",
            data.len()
        );
        let original = i64::from(packet.original_len) - i64::from(packet.captured_len);
        let original = (original.max(0) + data.len() as i64).min(u32::MAX.into()) as u32;
        match (&self.format.0, packet.stamp) {
            (Container::Pcap(header), Stamp::Pcap { seconds, fraction }) => {
                let order = header.order;
                let fields = [seconds, fraction, data.len() as u32, original];
                self.put(&fields.map(|field| order.put_u32(field)).concat())?;
                self.put(&data)
            }
            (Container::Pcapng { order, .. }, Stamp::Pcapng { ticks }) => {
                let order = *order;
                self.put_interfaces()?;
                let body = enhanced_body(order, packet, ticks, &data, original);
                self.put(&enclose(order, block::ENHANCED_PACKET, &body))
            }
            _ => Err(anyhow!(
                "the packet comes from a capture of another format than {}",
                self.format.name()
            )),
        }
    }

    /// Writes the interfaces the reader has seen since the last call.
    fn put_interfaces(&mut self) -> Result<()> {
        let Container::Pcapng { order, interfaces } = &self.format.0 else {
            return Ok(());
        };
        let mut blocks = Vec::new();
        for interface in locked(interfaces).iter().skip(self.interfaces) {
            blocks.extend(interface.block(*order));
            self.interfaces += 1;
        }
        self.put(&blocks)
    }

    /// Writes what is buffered.
    ///
    /// # Errors
    /// Those of the output. Without this call errors of the last writes are lost.
    pub fn finish(mut self) -> Result<()> {
        self.put_interfaces()?;
        self.output
            .flush()
            .with_context(|| format!("writing {}", self.name.display()))
    }
}

impl PcapHeader {
    fn file_header(&self) -> Vec<u8> {
        let magic = if self.nanoseconds {
            PCAP_NANOSECONDS
        } else {
            PCAP_MICROSECONDS
        };
        let order = self.order;
        let mut header = order.put_u32(magic).to_vec();
        header.extend(order.put_u16(PCAP_VERSION.0));
        header.extend(order.put_u16(PCAP_VERSION.1));
        for field in [0, 0, self.snap_len.max(MAX_CAPTURED), self.link] {
            header.extend(order.put_u32(field));
        }
        header
    }
}

fn section_header(order: Order) -> Vec<u8> {
    let mut body = order.put_u32(block::BYTE_ORDER_MAGIC).to_vec();
    body.extend(order.put_u16(1));
    body.extend(order.put_u16(0));
    // Length of the section: not known.
    body.extend(order.put_u64(u64::MAX));
    enclose(order, block::SECTION_HEADER, &body)
}

fn enhanced_body(order: Order, packet: &Packet, ticks: u64, data: &[u8], original: u32) -> Vec<u8> {
    let fields = [
        packet.interface,
        (ticks >> 32) as u32,
        ticks as u32,
        data.len() as u32,
        original,
    ];
    let mut body = fields.map(|field| order.put_u32(field)).concat();
    body.extend_from_slice(data);
    body.resize(body.len().next_multiple_of(4), 0);
    packet.options.put(&mut body, order);
    body
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    const ORDERS: [Order; 2] = [Order::Big, Order::Little];
    const IPV4: &[u8] = &[
        0x45, 0, 0, 20, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ];
    const IPV6_START: &[u8] = &[0x60, 0, 0, 0, 0, 0, 59, 64];
    const MAC: [u8; 6] = [0xaa, 1, 2, 3, 4, 5];

    /// A writer's output that outlives it.
    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn reader(bytes: &[u8]) -> Result<Reader> {
        Reader::new(io::Cursor::new(bytes.to_vec()))
    }

    fn read(bytes: &[u8]) -> Vec<Packet> {
        reader(bytes).unwrap().collect::<Result<_>>().unwrap()
    }

    /// Reads and writes back with every frame changed by `change`.
    fn rewrite(bytes: &[u8], change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
        let shared = Shared::default();
        let reader = reader(bytes).unwrap();
        let mut writer = Writer::new(shared.clone(), reader.format()).unwrap();
        for packet in reader {
            let packet = packet.unwrap();
            let mut frame = packet.frame.clone();
            change(&mut frame);
            writer.write(&packet, &frame).unwrap();
        }
        writer.finish().unwrap();
        shared.0.lock().unwrap().clone()
    }

    fn invalid(result: Result<impl std::fmt::Debug>) -> Invalid {
        result.unwrap_err().downcast().unwrap()
    }

    fn words(order: Order, words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| order.put_u32(*word)).collect()
    }

    fn pcap_header(order: Order, nanoseconds: bool, link: u32) -> Vec<u8> {
        let magic = if nanoseconds {
            0xa1b2_3c4d
        } else {
            0xa1b2_c3d4
        };
        let mut file = words(order, &[magic]);
        file.extend(order.put_u16(2));
        file.extend(order.put_u16(4));
        file.extend(words(order, &[0, 0, 262_144, link]));
        file
    }

    /// Each packet is data and original length; stamps are 1700000000.000123, ...124.
    fn pcap(order: Order, nanoseconds: bool, link: u32, packets: &[(Vec<u8>, u32)]) -> Vec<u8> {
        let mut file = pcap_header(order, nanoseconds, link);
        for (number, (data, original)) in packets.iter().enumerate() {
            let fraction = 123 + number as u32;
            let len = data.len() as u32;
            file.extend(words(order, &[1_700_000_000, fraction, len, *original]));
            file.extend(data);
        }
        file
    }

    fn ng_section(order: Order) -> Vec<u8> {
        let magic = words(order, &[0x0a0d_0d0a, 28, 0x1a2b_3c4d]);
        let version = [order.put_u16(1), order.put_u16(0)].concat();
        [magic, version, vec![0xff; 8], words(order, &[28])].concat()
    }

    fn ng_block(order: Order, kind: u32, body: &[u8]) -> Vec<u8> {
        let len = body.len() as u32 + 12;
        [
            words(order, &[kind, len]),
            body.to_vec(),
            words(order, &[len]),
        ]
        .concat()
    }

    fn ng_option(order: Order, code: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = [order.put_u16(code), order.put_u16(value.len() as u16)].concat();
        bytes.extend(value);
        while bytes.len() % 4 != 0 {
            bytes.push(0);
        }
        bytes
    }

    fn ng_interface(order: Order, link: u16, snap_len: u32, options: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = [order.put_u16(link), [0; 2]].concat();
        body.extend(words(order, &[snap_len]));
        for (code, value) in options {
            body.extend(ng_option(order, *code, value));
        }
        if !options.is_empty() {
            body.extend([0; 4]);
        }
        ng_block(order, 1, &body)
    }

    fn ng_enhanced(
        order: Order,
        interface: u32,
        ticks: u64,
        data: &[u8],
        original: u32,
    ) -> Vec<u8> {
        let (high, low) = ((ticks >> 32) as u32, ticks as u32);
        let len = data.len() as u32;
        let mut body = words(order, &[interface, high, low, len, original]);
        body.extend(data);
        while body.len() % 4 != 0 {
            body.push(0);
        }
        ng_block(order, 6, &body)
    }

    fn cooked(link: u32, protocol: u16, address_len: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = match link {
            113 => vec![0, 4, 0, 1, 0, address_len],
            _ => {
                let mut header = protocol.to_be_bytes().to_vec();
                header.extend([0, 0, 0, 0, 0, 7, 0, 1, 4, address_len]);
                header
            }
        };
        packet.extend(MAC);
        packet.extend([0xee, 0xff]);
        if link == 113 {
            packet.extend(protocol.to_be_bytes());
        }
        packet.extend(payload);
        packet
    }

    fn expected_frame(source: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
        let ethertype = ethertype.to_be_bytes();
        [&[2, 0, 0, 0, 0, 1][..], &source, &ethertype, payload].concat()
    }

    /// A captured packet and the frame it must become.
    fn sample(link: u32) -> Vec<(Vec<u8>, Vec<u8>)> {
        let synthetic = [2, 0, 0, 0, 0, 2];
        let raw = |packet: &[u8], ethertype| {
            (
                packet.to_vec(),
                expected_frame(synthetic, ethertype, packet),
            )
        };
        match link {
            1 => [0, 1, 13, 14, 15, 60, 1514, 65_535]
                .map(|len| (vec![0x5a; len], vec![0x5a; len]))
                .to_vec(),
            12 | 14 | 101 => vec![
                raw(IPV4, 0x0800),
                raw(IPV6_START, 0x86dd),
                raw(&[0x10, 2, 3], 0xffff),
                raw(&[], 0xffff),
            ],
            228 => vec![raw(IPV4, 0x0800), raw(&[0xff], 0x0800)],
            229 => vec![raw(IPV6_START, 0x86dd), raw(&[], 0x86dd)],
            _ => vec![
                (
                    cooked(link, 0x0800, 6, IPV4),
                    expected_frame(MAC, 0x0800, IPV4),
                ),
                (
                    cooked(link, 0x86dd, 6, IPV6_START),
                    expected_frame(MAC, 0x86dd, IPV6_START),
                ),
                (
                    cooked(link, 0x0800, 0, IPV4),
                    expected_frame(synthetic, 0x0800, IPV4),
                ),
                (cooked(link, 4, 6, &[]), expected_frame(MAC, 4, &[])),
            ],
        }
    }

    const LINKS: [u32; 8] = [1, 12, 14, 101, 113, 228, 229, 276];

    #[test]
    fn pcap_round_trips_for_every_link_type_order_and_unit() {
        for link in LINKS {
            for order in ORDERS {
                for nanoseconds in [false, true] {
                    let sample = sample(link);
                    let packets: Vec<_> = sample
                        .iter()
                        .enumerate()
                        .map(|(number, (data, _))| {
                            // Every other packet is truncated.
                            let missing = if number % 2 == 1 { 1000 } else { 0 };
                            (data.clone(), data.len() as u32 + missing)
                        })
                        .collect();
                    let file = pcap(order, nanoseconds, link, &packets);
                    let read = read(&file);
                    assert_eq!(read.len(), sample.len());
                    for (number, packet) in read.iter().enumerate() {
                        let unit = if nanoseconds { 1 } else { 1000 };
                        let fraction = (123 + number as u32) * unit;
                        assert_eq!(packet.timestamp, Duration::new(1_700_000_000, fraction));
                        assert_eq!(packet.frame, sample[number].1, "link type {link}");
                        assert_eq!(packet.original_len, packets[number].1);
                        assert_eq!(packet.truncated, number % 2 == 1);
                        assert_eq!(packet.restore(&packet.frame), sample[number].0);
                    }
                    assert_eq!(rewrite(&file, |_| {}), file, "link type {link}");
                }
            }
        }
    }

    #[test]
    fn pcapng_round_trips_for_every_link_type_order_and_unit() {
        for link in LINKS {
            for order in ORDERS {
                for resolution in [6, 9, 3, 0x80 | 20] {
                    let mut file = ng_section(order);
                    let options: &[(u16, &[u8])] = &[(2, b"eth0"), (9, &[resolution])];
                    let options = &options[..if resolution == 6 { 1 } else { 2 }];
                    file.extend(ng_interface(order, link as u16, 262_144, options));
                    let sample = sample(link);
                    for (number, (data, _)) in sample.iter().enumerate() {
                        let ticks = 1_700_000_000_123_456_789 + number as u64;
                        let original = data.len() as u32 + 7 * number as u32;
                        file.extend(ng_enhanced(order, 0, ticks, data, original));
                    }
                    for (packet, (_, frame)) in read(&file).iter().zip(&sample) {
                        assert_eq!(packet.frame, *frame, "link type {link}");
                    }
                    assert_eq!(rewrite(&file, |_| {}), file, "link type {link}");
                }
            }
        }
    }

    #[test]
    fn pcapng_timestamps_follow_resolution_and_offset() {
        let order = Order::Little;
        let ticks: u64 = 1_700_000_000_123_456_789;
        let offset = |seconds: i64| seconds.to_le_bytes().to_vec();
        type Case = (Option<u8>, Option<Vec<u8>>, u64, Duration);
        let cases: [Case; 9] = [
            (None, None, 1_500_000, Duration::from_millis(1500)),
            (Some(9), None, ticks, Duration::from_nanos(ticks)),
            (Some(12), None, 1_999, Duration::from_nanos(1)),
            (Some(0), None, 7, Duration::from_secs(7)),
            (Some(0x80 | 1), None, 7, Duration::from_millis(3500)),
            (Some(0xff), None, u64::MAX, Duration::ZERO),
            (Some(0x7f), None, u64::MAX, Duration::ZERO),
            (None, Some(offset(100)), 2_000_000, Duration::from_secs(102)),
            (None, Some(offset(-100)), 2_000_000, Duration::ZERO),
        ];
        for (resolution, offset, ticks, expected) in cases {
            let resolution = resolution.map(|value| [value]);
            let mut options: Vec<(u16, &[u8])> = Vec::new();
            options.extend(resolution.iter().map(|value| (9, &value[..])));
            options.extend(offset.iter().map(|value| (14, &value[..])));
            let file = [
                ng_section(order),
                ng_interface(order, 1, 262_144, &options),
                ng_enhanced(order, 0, ticks, &[1; 60], 60),
            ]
            .concat();
            assert_eq!(read(&file)[0].timestamp, expected);
            assert_eq!(rewrite(&file, |_| {}), file);
        }
    }

    #[test]
    fn pcapng_interfaces_sections_and_old_blocks() {
        let (little, big) = (Order::Little, Order::Big);
        let mut obsolete = [big.put_u16(1), big.put_u16(9)].concat();
        obsolete.extend(words(big, &[0, 5_000_000, 3, 8]));
        obsolete.extend([1, 2, 3, 0]);
        let mut simple = words(little, &[90]);
        simple.extend([7; 32]);
        let comment = ng_option(little, 1, b"hello");
        let mut commented = words(little, &[0, 0, 9, 4, 4]);
        commented.extend([4; 4]);
        commented.extend([comment, ng_option(little, 2, &1u32.to_le_bytes())].concat());
        commented.extend([0; 4]);
        let file = [
            ng_section(little),
            ng_interface(little, 1, 32, &[]),
            ng_block(little, 0x0bad, &[0; 400]),
            ng_block(little, 3, &simple),
            ng_interface(little, 101, 0, &[(9, &[9])]),
            ng_enhanced(little, 1, 42, IPV4, 20),
            ng_block(little, 6, &commented),
            ng_section(big),
            ng_interface(big, 113, 262_144, &[]),
            ng_interface(big, 1, 262_144, &[(8, &1_000_000u64.to_be_bytes())]),
            ng_block(big, 2, &obsolete),
            ng_enhanced(big, 0, 6, &cooked(113, 0x0800, 6, IPV4), 36),
        ]
        .concat();
        let packets = read(&file);
        assert_eq!(packets.len(), 5);
        assert_eq!(packets[0].frame, [7; 32]);
        assert_eq!((packets[0].original_len, packets[0].truncated), (90, true));
        assert_eq!(packets[0].timestamp, Duration::ZERO);
        assert_eq!(packets[1].timestamp, Duration::from_nanos(42));
        assert_eq!(packets[2].timestamp, Duration::from_micros(9));
        assert_eq!(packets[3].frame, [1, 2, 3]);
        assert_eq!((packets[3].original_len, packets[3].truncated), (8, true));
        assert_eq!(packets[3].timestamp, Duration::from_secs(5));
        assert_eq!(packets[4].frame[6..12], MAC);

        let written = rewrite(&file, |_| {});
        let again = read(&written);
        for (before, after) in packets.iter().zip(&again) {
            assert_eq!(before.frame, after.frame);
            assert_eq!(before.timestamp, after.timestamp);
            assert_eq!(before.original_len, after.original_len);
            assert_eq!(before.link, after.link);
            assert_eq!(before.interface, after.interface);
            assert_eq!(before.options, after.options);
        }
        assert_eq!(again.len(), 5);
        assert_eq!(packets[2].options.comments, [b"hello"]);
        assert_eq!(packets[2].options.flags, Some(1));
        // The output is canonical: writing it again changes nothing.
        assert_eq!(rewrite(&written, |_| {}), written);
        let speed = Order::Little.put_u64(1_000_000);
        assert!(written.windows(8).any(|bytes| bytes == speed));
    }

    #[test]
    fn a_capture_without_packets_keeps_its_interfaces() {
        let file = [
            ng_section(Order::Big),
            ng_interface(Order::Big, 113, 262_144, &[]),
        ]
        .concat();
        assert_eq!(rewrite(&file, |_| {}), file);
        let file = pcap(Order::Big, true, 276, &[]);
        assert_eq!(rewrite(&file, |_| {}), file);
    }

    #[test]
    fn snap_length_is_raised_and_fcs_kept() {
        let mut file = pcap(Order::Little, false, 0x2400_0000 | 1, &[]);
        file[16..20].copy_from_slice(&96u32.to_le_bytes());
        let written = rewrite(&file, |_| {});
        assert_eq!(written[16..20], 262_144u32.to_le_bytes());
        assert_eq!(written[20..24], file[20..24]);
    }

    #[test]
    fn changed_frames_are_restored() {
        let change = |link: u32, packet: Vec<u8>, change: &dyn Fn(&mut Vec<u8>)| {
            let len = packet.len() as u32;
            let file = pcap(Order::Little, false, link, &[(packet, len + 5)]);
            let written = rewrite(&file, change);
            let original = u32::from_le_bytes(written[36..40].try_into().unwrap());
            (written[40..].to_vec(), original)
        };
        let tag = |frame: &mut Vec<u8>| drop(frame.splice(12..12, [0x81, 0, 0, 5]));
        let tag_twice = |frame: &mut Vec<u8>| {
            tag(frame);
            drop(frame.splice(12..12, [0x88, 0xa8, 0, 6]));
        };
        let grow = |frame: &mut Vec<u8>| frame.extend([9; 4]);
        let cut = |frame: &mut Vec<u8>| frame.truncate(13);
        let cut_in_tag = |frame: &mut Vec<u8>| {
            tag(frame);
            frame.truncate(15);
        };
        let redirect = |frame: &mut Vec<u8>| {
            frame[..14].copy_from_slice(&[3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 0x86, 0xdd]);
        };

        assert_eq!(
            change(1, vec![1; 60], &grow),
            ([vec![1; 60], vec![9; 4]].concat(), 69)
        );
        assert_eq!(change(1, vec![1; 60], &cut), (vec![1; 13], 18));
        let raw = IPV4.to_vec();
        assert_eq!(change(101, raw.clone(), &tag), (raw.clone(), 25));
        assert_eq!(change(101, raw.clone(), &tag_twice), (raw.clone(), 25));
        assert_eq!(change(228, raw.clone(), &redirect), (raw.clone(), 25));
        assert_eq!(change(101, raw.clone(), &cut), (vec![], 5));
        assert_eq!(change(101, raw, &cut_in_tag), (vec![], 5));
        for link in [113, 276] {
            let (packet, _) = change(link, cooked(link, 0x0800, 6, IPV4), &redirect);
            let mut expected = cooked(link, 0x86dd, 6, IPV4);
            let address = if link == 113 { 6 } else { 12 };
            expected[address..address + 6].fill(4);
            assert_eq!(packet, expected);
            let (packet, _) = change(link, cooked(link, 0x0800, 0, IPV4), &redirect);
            assert_eq!(packet, cooked(link, 0x86dd, 0, IPV4));
            let (packet, _) = change(link, cooked(link, 0x0800, 6, IPV4), &tag);
            let tagged = [&[0, 5, 8, 0][..], IPV4].concat();
            assert_eq!(packet, cooked(link, 0x8100, 6, &tagged));
            let (packet, _) = change(link, cooked(link, 0x0800, 6, IPV4), &cut);
            assert_eq!(packet, cooked(link, 0x0800, 6, &[]));
        }
    }

    #[test]
    fn every_prefix_gives_whole_packets_and_names_the_next() {
        let packets: Vec<_> = (0..3).map(|_| (vec![8; 30], 30)).collect();
        let plain = pcap(Order::Big, false, 1, &packets);
        let mut ng = ng_section(Order::Little);
        ng.extend(ng_interface(Order::Little, 1, 0, &[(2, b"x")]));
        for _ in 0..3 {
            ng.extend(ng_enhanced(Order::Little, 0, 1, &[8; 30], 30));
        }
        for (file, header, step) in [(plain, 24, 46), (ng, 28 + 32, 64)] {
            assert_eq!(file.len(), header + 3 * step);
            for len in 0..file.len() {
                let Ok(mut reader) = reader(&file[..len]) else {
                    assert!(len < header);
                    continue;
                };
                let results: Vec<_> = reader.by_ref().collect();
                let whole = len.saturating_sub(header) / step;
                let clean = len == header + whole * step || len == 28 && header == 60;
                assert_eq!(results.len(), whole + usize::from(!clean), "{len} bytes");
                assert!(results[..whole].iter().all(Result::is_ok));
                if let Some(Err(error)) = results.into_iter().nth(whole) {
                    let invalid = error.downcast_ref::<Invalid>().unwrap();
                    assert_eq!(invalid.path, format!("packet {}", whole + 1));
                    assert!(invalid.found.contains("ends in the middle"));
                }
                assert!(reader.next().is_none());
            }
        }
    }

    #[test]
    fn link_types_that_are_not_supported_are_named() {
        let file = pcap(Order::Little, false, 105, &[(vec![1; 60], 60)]);
        let error = invalid(reader(&file).unwrap().next().unwrap());
        assert_eq!(error.path, "packet 1");
        assert_eq!(error.found, "link type 105 (IEEE802_11)");
        assert!(error.expected.contains("Linux cooked v2 (276)"));
        let order = Order::Little;
        let file = [
            ng_section(order),
            ng_interface(order, 1, 0, &[]),
            ng_interface(order, 249, 0, &[]),
            ng_enhanced(order, 0, 0, &[1], 1),
            ng_enhanced(order, 1, 0, &[1], 1),
        ]
        .concat();
        let mut reader = reader(&file).unwrap();
        assert!(reader.next().unwrap().is_ok());
        let error = invalid(reader.next().unwrap());
        assert_eq!(
            (&*error.path, &*error.found),
            ("packet 2", "link type 249 (USBPCAP)")
        );
        assert!(reader.next().is_none());
    }

    #[test]
    fn what_is_no_capture_is_refused() {
        let file = |bytes: &[u8]| invalid(reader(bytes).map(|_| ())).found;
        assert_eq!(file(b""), "a file of 0 bytes");
        assert_eq!(file(b"abc"), "a file of 3 bytes");
        assert_eq!(file(b"#!/bin/sh"), "a file that begins with 23 21 2f 62");
        assert_eq!(file(&[0x1f, 0x8b, 8, 0]), "a gzip file");
        let mut old = pcap_header(Order::Big, false, 1);
        old[7] = 3;
        assert_eq!(file(&old), "pcap version 2.3");
        assert!(file(&[0x0a, 0x0d, 0x0d, 0x0a, 0, 0, 0, 28, 1, 2, 3, 4]).contains("byte order"));
    }

    #[test]
    fn damaged_lengths_are_refused_without_allocation() {
        for order in ORDERS {
            let first = |file: &[u8]| invalid(reader(file).unwrap().next().unwrap()).found;
            let mut file = pcap_header(order, false, 1);
            file.extend(words(order, &[0, 0, u32::MAX, u32::MAX]));
            assert_eq!(first(&file), "a packet of 4294967295 bytes");
            let ng = |block: &[u8]| {
                let interface = ng_interface(order, 1, 0, &[]);
                [&ng_section(order)[..], &interface, block].concat()
            };
            let huge = words(order, &[6, 0xffff_fffc, 0, 0]);
            assert_eq!(first(&ng(&huge)), "a block of 4294967292 bytes");
            let unknown = words(order, &[77, 0xffff_fffc, 0, 0]);
            assert!(first(&ng(&unknown)).contains("ends in the middle"));
            for len in [0, 4, 11, 13, 33] {
                let found = first(&ng(&words(order, &[77, len, 0, 0])));
                assert_eq!(found, format!("a block of {len} bytes"));
            }
            let mut wrong = ng_enhanced(order, 0, 0, &[1; 4], 4);
            let end = wrong.len() - 4;
            wrong[end..].copy_from_slice(&order.put_u32(40));
            assert_eq!(first(&ng(&wrong)), "a block of 36 bytes whose end says 40");
            let captured = ng_block(order, 6, &words(order, &[0, 0, 0, 5, 5, 0]));
            assert_eq!(first(&ng(&captured)), "a packet block of 24 bytes");
            let captured = ng_block(order, 6, &words(order, &[0, 0, 0, u32::MAX, 5, 0]));
            assert_eq!(first(&ng(&captured)), "a packet block of 24 bytes");
            let simple = ng_block(order, 3, &words(order, &[100, 1, 2]));
            assert_eq!(first(&ng(&simple)), "a packet block of 12 bytes");
            let stray = ng_enhanced(order, 3, 0, &[1; 4], 4);
            assert_eq!(first(&ng(&stray)), "interface 3");
            let short = pcap(order, false, 276, &[(vec![0; 19], 19)]);
            assert_eq!(first(&short), "19 bytes of link type 276");
        }
    }

    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        fn below(&mut self, limit: usize) -> usize {
            (self.next() % limit as u64) as usize
        }
    }

    /// Reads to the first error and writes what was read; nothing may panic.
    fn exercise(bytes: &[u8]) -> usize {
        let Ok(reader) = reader(bytes) else {
            return 0;
        };
        let mut writer = Writer::new(io::sink(), reader.format()).unwrap();
        let mut count = 0;
        for packet in reader.map_while(Result::ok) {
            assert!(packet.restore(&packet.frame).len() <= MAX_CAPTURED as usize);
            for len in [0, 5, 13, 14, packet.frame.len()] {
                let frame = &packet.frame[..len.min(packet.frame.len())];
                writer.write(&packet, frame).unwrap();
            }
            count += 1;
        }
        writer.finish().unwrap();
        count
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let starts: [&[u8]; 4] = [
            &[],
            &pcap_header(Order::Little, false, 1),
            &ng_section(Order::Big),
            &[0x0a, 0x0d, 0x0d, 0x0a],
        ];
        for round in 0..20_000 {
            let mut bytes = starts[round % 4].to_vec();
            for _ in 0..random.below(200) {
                // Small numbers make plausible lengths.
                let byte = random.next() as u8;
                bytes.push(if byte < 160 { byte % 8 } else { byte });
            }
            exercise(&bytes);
        }
    }

    #[test]
    fn damaged_captures_never_panic() {
        let mut random = Random(42);
        let mut files = Vec::new();
        for link in LINKS {
            for order in ORDERS {
                let small: Vec<_> = sample(link)
                    .into_iter()
                    .filter(|(data, _)| data.len() < 100)
                    .map(|(data, _)| (data, 100))
                    .collect();
                files.push(pcap(order, true, link, &small));
                let mut ng = ng_section(order);
                ng.extend(ng_interface(order, link as u16, 0, &[(9, &[9]), (2, b"a")]));
                for (data, original) in &small {
                    ng.extend(ng_enhanced(order, 0, 77, data, *original));
                    let body = [words(order, &[data.len() as u32]), data.clone()].concat();
                    let len = body.len().next_multiple_of(4);
                    let body = [&body[..], &[0; 3]].concat();
                    ng.extend(ng_block(order, 3, &body[..len]));
                }
                files.push(ng);
            }
        }
        let mut read = 0;
        for round in 0..20_000 {
            let mut bytes = files[round % files.len()].clone();
            for _ in 0..=random.below(4) {
                let at = random.below(bytes.len());
                bytes[at] = random.next() as u8;
            }
            bytes.truncate(bytes.len() - random.below(8));
            read += exercise(&bytes);
        }
        assert!(read > 10_000, "{read}");
    }

    #[test]
    fn files_are_opened_created_and_never_overwritten_while_read() {
        let folder = std::env::temp_dir().join(format!("pc-capture-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let (input, output) = (folder.join("a.pcap"), folder.join("b.pcap"));
        let bytes = pcap(Order::Little, false, 1, &[(vec![1; 60], 60)]);
        std::fs::write(&input, &bytes).unwrap();

        let missing = invalid(Reader::open(&output).map(|_| ()));
        assert_eq!(missing.file.as_deref(), Some(&*output));
        invalid(Reader::open(&folder).map(|_| ()));
        let mut reader = Reader::open(&input).unwrap();
        invalid(Writer::create(&input, &reader).map(|_| ()));
        std::fs::hard_link(&input, folder.join("c.pcap")).unwrap();
        invalid(Writer::create(&folder.join("c.pcap"), &reader).map(|_| ()));
        invalid(Writer::create(&folder.join("no/b.pcap"), &reader).map(|_| ()));
        let mut writer = Writer::create(&output, &reader).unwrap();
        let packet = reader.next_packet().unwrap().unwrap();
        writer.write(&packet, &packet.frame).unwrap();
        writer.finish().unwrap();
        assert_eq!(std::fs::read(&output).unwrap(), bytes);
        std::fs::write(&output, &bytes[..bytes.len() - 1]).unwrap();
        let cut = invalid(Reader::open(&output).unwrap().next().unwrap());
        assert_eq!(cut.file.as_deref(), Some(&*output));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn write_errors_are_reported() {
        let bytes = pcap(Order::Little, false, 1, &[(vec![1; 60], 60)]);
        let mut reader = reader(&bytes).unwrap();
        let full = Path::new("/dev/full");
        let mut writer = Writer::create(full, &reader).unwrap();
        let packet = reader.next_packet().unwrap().unwrap();
        writer.write(&packet, &packet.frame).unwrap();
        assert!(writer.finish().is_err());
        let mut writer = Writer::new(io::sink(), reader.format()).unwrap();
        assert!(writer.write(&packet, &vec![0; 262_145]).is_err());
        let ng = super::Reader::new(io::Cursor::new(ng_section(Order::Big))).unwrap();
        let mut writer = Writer::new(io::sink(), ng.format()).unwrap();
        assert!(writer.write(&packet, &packet.frame).is_err());
    }
}
