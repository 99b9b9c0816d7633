// SPDX-License-Identifier: MIT OR Apache-2.0
//! Packet captures, read and written as a stream.
//!
//! Containers: pcap (either byte order, microseconds or nanoseconds) and pcapng (sections of either
//! byte order, interfaces with a link type and timestamp resolution each; Enhanced, Simple and
//! obsolete Packet blocks). `pcap-parser` decodes them; its own reader is not used, as it drops the
//! input's errors and reads the file header only if one read gives it. Memory does not depend on
//! the lengths a file claims: see [`MAX_BLOCK`]. Link layers: see [`super::link`].

use std::fs::{File, Metadata};
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pcap_parser::nom::{self, IResult};
use pcap_parser::traits::PcapNGPacketBlock;
use pcap_parser::{
    Block, EPB_MAGIC, IDB_MAGIC, InterfaceDescriptionBlock, LegacyPcapBlock, OptionCode, PcapError,
    PcapHeader, SHB_MAGIC, SPB_MAGIC, parse_block_be, parse_block_le, parse_pcap_frame,
    parse_pcap_frame_be, parse_pcap_header, parse_sectionheaderblock, parse_unknownblock_be,
    parse_unknownblock_le,
};

use super::link::{LinkType, SUPPORTED};
use crate::error::{Invalid, Refused};

/// The most bytes one packet of a capture may hold (the limit of libpcap and Wireshark).
pub const MAX_CAPTURED: u32 = 262_144;
/// The longest pcapng block or pcap record, and the most section headers and interfaces of a file,
/// that are read, in bytes.
pub const MAX_BLOCK: usize = 1 << 22;
/// Bytes read at a time.
const CHUNK: u64 = 1 << 18;
const PCAP_LINK_MASK: u32 = 0x03ff_ffff;
/// Block type of the obsolete Packet Block.
const OBSOLETE_PACKET: u32 = 2;

const DAMAGED: &str = "the file is damaged, or not a capture";

/// One captured packet.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Time of capture since the epoch, rounded down to nanoseconds; zero if it is before the
    /// epoch. A pcapng Simple Packet has none: its stamp is taken as 0. [`Writer`] writes the
    /// stamp as read.
    pub timestamp: Duration,
    /// An Ethernet frame, with a synthetic header where the capture had none.
    pub frame: Vec<u8>,
    /// Bytes the packet had on the wire, in the link layer of the capture.
    pub original_len: u32,
    /// The capture holds fewer bytes than the packet had.
    pub truncated: bool,
    captured_len: u32,
    link: LinkType,
    /// The Linux cooked header.
    header: Vec<u8>,
    order: Order,
    /// The two words of the timestamp, as in the file.
    stamp: [u32; 2],
    /// Number of the pcapng interface in its section; none in a pcap.
    interface: Option<u32>,
    /// Bytes of the format's headers that stand before it.
    headers: usize,
}

impl Packet {
    /// The packet of the capture's own link layer that `frame` stands for; of a frame shorter than
    /// an Ethernet header, one without payload.
    pub fn restore(&self, frame: &[u8]) -> Vec<u8> {
        self.link.restore(&self.header, frame)
    }
}

/// Byte order of a file or section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Big,
    Little,
}

impl Order {
    fn of(big: bool) -> Self {
        if big { Order::Big } else { Order::Little }
    }

    /// Big-endian bytes in this order, and the other way round.
    fn swap<const N: usize>(self, mut bytes: [u8; N]) -> [u8; N] {
        if self == Order::Little {
            bytes.reverse();
        }
        bytes
    }

    fn u32(self, bytes: [u8; 4]) -> u32 {
        u32::from_be_bytes(self.swap(bytes))
    }

    fn words(self, words: &[u32]) -> Vec<u8> {
        words
            .iter()
            .flat_map(|word| self.swap(word.to_be_bytes()))
            .collect()
    }
}

/// A packet that cannot be used; [`Reader`] adds its number and the file.
fn invalid(found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Invalid {
    Invalid::new("packet", found, expected)
}

/// A file that is no capture; [`Reader`] adds its name.
fn no_capture(found: impl std::fmt::Display) -> Invalid {
    Invalid::new("capture", found, "a pcap or pcapng capture")
}

/// What a file that is no capture seems to be.
fn foreign(bytes: &[u8]) -> Invalid {
    let packed = |kind: &str| no_capture(kind).advice("decompress it first");
    match bytes {
        [0x1f, 0x8b, ..] => packed("a gzip file"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => packed("a zstd file"),
        [0xfd, b'7', b'z', b'X', ..] => packed("an xz file"),
        [0x0a, 0x0d, 0x0d, 0x0a, ..] => {
            no_capture("a pcapng section that is cut off, or without byte order")
        }
        _ => {
            let start: Vec<_> = bytes.iter().take(4).map(|b| format!("{b:02x}")).collect();
            no_capture(format!("a file that begins with {}", start.join(" ")))
        }
    }
}

/// Container format of a capture; made by [`Reader::format`] and followed by [`Writer`].
#[derive(Clone, Debug)]
pub struct Format {
    pcapng: bool,
    /// The file header, or all section headers and interface descriptions read so far, fit for the
    /// output: what will not hold there is changed.
    headers: Arc<Mutex<Vec<u8>>>,
}

impl Format {
    /// `pcap` or `pcapng`.
    pub fn name(&self) -> &'static str {
        if self.pcapng { "pcapng" } else { "pcap" }
    }

    fn headers(&self) -> MutexGuard<'_, Vec<u8>> {
        self.headers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_header(&self, header: &[u8]) -> Result<(), Invalid> {
        let mut headers = self.headers();
        if headers.len() + header.len() > MAX_BLOCK {
            let expected = format!("at most {MAX_BLOCK} bytes of them");
            return Err(invalid("more sections and interfaces", expected));
        }
        headers.extend_from_slice(header);
        Ok(())
    }
}

/// The header with the snap length, which stands at `offset`, raised to what is written. Zero
/// means no limit.
fn raise_snap_len(header: &[u8], offset: usize, snap_len: u32, order: Order) -> Vec<u8> {
    let mut header = header.to_vec();
    if snap_len != 0 {
        let raised = order.words(&[snap_len.max(MAX_CAPTURED)]);
        header[offset..offset + 4].copy_from_slice(&raised);
    }
    header
}

/// A packet as its container holds it.
struct Record<'a> {
    order: Order,
    /// Of a pcapng: its number in the section.
    interface: Option<u32>,
    stamp: [u32; 2],
    original_len: u32,
    data: &'a [u8],
}

impl Record<'_> {
    fn decode(self, link_type: u32, timestamp: Duration) -> Result<Packet, Invalid> {
        let len = self.data.len();
        if len > MAX_CAPTURED as usize {
            let expected = format!("at most {MAX_CAPTURED} bytes");
            return Err(invalid(format!("a packet of {len} bytes"), expected).advice(DAMAGED));
        }
        let link = LinkType::from_number(link_type).ok_or_else(|| {
            invalid(format!("link type {link_type}"), SUPPORTED)
                .advice("see what it is: https://www.tcpdump.org/linktypes.html")
        })?;
        let header_len = link.header_len();
        let (header, payload) = self.data.split_at_checked(header_len).ok_or_else(|| {
            let expected = format!("at least its header of {header_len} bytes");
            invalid(format!("{len} bytes of link type {link_type}"), expected)
        })?;
        Ok(Packet {
            timestamp,
            frame: link.frame(header, payload),
            original_len: self.original_len,
            truncated: len < self.original_len as usize,
            captured_len: len as u32,
            link,
            header: header.to_vec(),
            order: self.order,
            stamp: self.stamp,
            interface: self.interface,
            headers: 0,
        })
    }
}

type Parsed<'a, T> = IResult<&'a [u8], T, PcapError<&'a [u8]>>;

/// What says how to read on.
enum Container {
    Pcap(PcapHeader),
    Pcapng(Section),
}

impl Container {
    /// By the beginning of a file; with the length of the header that is used up.
    fn detect(bytes: &[u8], headers: &mut Vec<u8>) -> Result<(Self, usize), Invalid> {
        if parse_sectionheaderblock(bytes).is_ok() {
            // The section header says the order; its type is the same in both.
            let section = Section {
                order: Order::Big,
                interfaces: Vec::new(),
            };
            return Ok((Container::Pcapng(section), 0));
        }
        let header = match parse_pcap_header(bytes) {
            Ok((_, header)) => header,
            Err(nom::Err::Incomplete(_)) => {
                return Err(no_capture(format!("a file of {} bytes", bytes.len())));
            }
            Err(_) => return Err(foreign(bytes)),
        };
        let (major, minor) = (header.version_major, header.version_minor);
        if (major, minor) != (2, 4) || header.is_modified_format() {
            let modified = if header.is_modified_format() {
                ", modified"
            } else {
                ""
            };
            let found = format!("pcap version {major}.{minor}{modified}");
            return Err(Invalid::new("capture", found, "version 2.4")
                .advice("convert it with `editcap -F pcap`"));
        }
        let len = header.size();
        let order = Order::of(header.is_bigendian());
        *headers = raise_snap_len(&bytes[..len], 16, header.snaplen, order);
        Ok((Container::Pcap(header), len))
    }

    /// Takes in the next block or record; gives its length, and its packet if it holds one. `None`
    /// if it is not read whole.
    fn next(
        &mut self,
        bytes: &[u8],
        format: &Format,
    ) -> Result<Option<(usize, Option<Packet>)>, Invalid> {
        match self {
            Container::Pcap(header) => {
                let parsed = match header.is_bigendian() {
                    true => parse_pcap_frame_be(bytes),
                    false => parse_pcap_frame(bytes),
                };
                let Some((len, record)) = whole(bytes, parsed)? else {
                    return Ok(None);
                };
                Ok(Some((len, Some(legacy_packet(header, &record)?))))
            }
            Container::Pcapng(section) => {
                let Some((len, block)) = whole(bytes, section.parse(bytes))? else {
                    return Ok(None);
                };
                Ok(Some((len, section.take(&block, &bytes[..len], format)?)))
            }
        }
    }
}

/// What was parsed, with its length; `None` if it is not read whole.
fn whole<'a, T>(bytes: &'a [u8], parsed: Parsed<'a, T>) -> Result<Option<(usize, T)>, Invalid> {
    match parsed {
        Ok((rest, parsed)) => Ok(Some((bytes.len() - rest.len(), parsed))),
        Err(nom::Err::Incomplete(_)) => Ok(None),
        Err(_) => Err(invalid("a damaged block", "a whole block").advice(DAMAGED)),
    }
}

fn legacy_packet(header: &PcapHeader, record: &LegacyPcapBlock) -> Result<Packet, Invalid> {
    let seconds = Duration::from_secs(record.ts_sec.into());
    let unit = [1_000, 1][usize::from(header.is_nanosecond_precision())];
    let fraction = Duration::from_nanos(u64::from(record.ts_usec) * unit);
    let packet = Record {
        order: Order::of(header.is_bigendian()),
        interface: None,
        stamp: [record.ts_sec, record.ts_usec],
        original_len: record.origlen,
        data: record.data,
    };
    packet.decode(header.network.0 as u32 & PCAP_LINK_MASK, seconds + fraction)
}

/// A pcapng interface.
#[derive(Debug)]
struct Interface {
    link_type: u16,
    snap_len: u32,
    /// `if_tsresol`: a power of ten, or of two with the top bit set.
    resolution: u8,
    /// `if_tsoffset`: seconds to add to every stamp.
    offset: i64,
}

impl Interface {
    fn new(block: &InterfaceDescriptionBlock, order: Order) -> Self {
        let mut options = block.options.iter();
        let offset = options.find(|option| option.code == OptionCode::IfTsoffset);
        Interface {
            link_type: block.linktype.0 as u16,
            snap_len: block.snaplen,
            resolution: block.if_tsresol,
            // Not `block.if_tsoffset`, which is wrong in big-endian sections.
            offset: offset
                .and_then(|option| option.as_bytes().ok()?.try_into().ok())
                .map_or(0, |seconds| i64::from_be_bytes(order.swap(seconds))),
        }
    }

    /// The parser's own conversion knows neither powers of two nor seconds beyond 32 bits.
    fn timestamp(&self, stamp: [u32; 2]) -> Duration {
        let exponent = u32::from(self.resolution & 0x7f);
        let base: u128 = if self.resolution & 0x80 == 0 { 10 } else { 2 };
        // A unit too small for 128 bits leaves nothing of 64 bits of ticks.
        let per_second = base.checked_pow(exponent).unwrap_or(u128::MAX);
        let ticks = u128::from(stamp[0]) << 32 | u128::from(stamp[1]);
        let seconds = (ticks / per_second) as i128 + i128::from(self.offset);
        let nanoseconds = (ticks % per_second) * 1_000_000_000 / per_second;
        match u64::try_from(seconds) {
            Ok(seconds) => Duration::new(seconds, nanoseconds as u32),
            Err(_) => Duration::ZERO,
        }
    }
}

/// The pcapng section being read.
struct Section {
    order: Order,
    interfaces: Vec<Interface>,
}

impl Section {
    /// The next block. Those not used are not looked into, damaged or not.
    fn parse<'a>(&self, bytes: &'a [u8]) -> Parsed<'a, Block<'a>> {
        let kind = bytes.first_chunk().map(|kind| self.order.u32(*kind));
        let used = matches!(kind, Some(SHB_MAGIC | IDB_MAGIC | SPB_MAGIC | EPB_MAGIC));
        let unused = |(rest, block)| (rest, Block::Unknown(block));
        match (self.order, used) {
            (Order::Big, true) => parse_block_be(bytes),
            (Order::Little, true) => parse_block_le(bytes),
            (Order::Big, false) => parse_unknownblock_be(bytes).map(unused),
            (Order::Little, false) => parse_unknownblock_le(bytes).map(unused),
        }
    }

    /// Takes in a block, whose bytes are `raw`; gives its packet, if it holds one.
    fn take(
        &mut self,
        block: &Block,
        raw: &[u8],
        format: &Format,
    ) -> Result<Option<Packet>, Invalid> {
        match block {
            Block::SectionHeader(block) => {
                if block.major_version != 1 {
                    let found = format!("pcapng version {}", block.major_version);
                    return Err(invalid(found, "version 1"));
                }
                self.order = Order::of(block.big_endian());
                self.interfaces.clear();
                // The length of the section becomes unknown.
                format.add_header(&[&raw[..16], &[0xff; 8], &raw[24..]].concat())?;
                Ok(None)
            }
            Block::InterfaceDescription(block) => {
                let header = raise_snap_len(raw, 12, block.snaplen, self.order);
                format.add_header(&header)?;
                self.interfaces.push(Interface::new(block, self.order));
                Ok(None)
            }
            Block::EnhancedPacket(packet) => {
                let stamp = [packet.ts_high, packet.ts_low];
                self.packet(packet.if_id, stamp, packet.origlen, packet.packet_data())
            }
            Block::SimplePacket(packet) => {
                let data = packet.packet_data();
                let limit = self.interfaces.first().map(|first| first.snap_len as usize);
                let cut = limit.filter(|limit| (1..data.len()).contains(limit));
                let data = &data[..cut.unwrap_or(data.len())];
                self.packet(0, [0, 0], packet.origlen, data)
            }
            Block::Unknown(block)
                if self.order.u32(block.block_type.to_le_bytes()) == OBSOLETE_PACKET =>
            {
                self.obsolete_packet(block.data)
            }
            _ => Ok(None),
        }
    }

    fn packet(
        &self,
        number: u32,
        stamp: [u32; 2],
        original_len: u32,
        data: &[u8],
    ) -> Result<Option<Packet>, Invalid> {
        let interface = self.interfaces.get(number as usize).ok_or_else(|| {
            let there_are = self.interfaces.len();
            let expected = format!("one of the {there_are} interfaces of the section");
            invalid(format!("interface {number}"), expected)
        })?;
        let record = Record {
            order: self.order,
            interface: Some(number),
            stamp,
            original_len,
            data,
        };
        let packet = record.decode(interface.link_type.into(), interface.timestamp(stamp));
        packet.map(Some)
    }

    /// The obsolete Packet Block, which `pcap-parser` does not know: as an Enhanced Packet Block,
    /// but the first word is a shorter interface number and a count of drops.
    fn obsolete_packet(&self, body: &[u8]) -> Result<Option<Packet>, Invalid> {
        let word = |number: usize| {
            let bytes = body.get(number * 4..)?.first_chunk()?;
            Some(self.order.u32(*bytes))
        };
        let fields = || {
            let number = u16::from_be_bytes(self.order.swap(*body.first_chunk()?));
            let data = body.get(20..)?.get(..word(3)? as usize)?;
            Some((number, [word(1)?, word(2)?], word(4)?, data))
        };
        let (number, stamp, original_len, data) = fields().ok_or_else(|| {
            let found = format!("a packet block of {} bytes", body.len());
            invalid(found, "a block that holds its header and its data")
        })?;
        self.packet(number.into(), stamp, original_len, data)
    }
}

/// Reads the packets of a capture one after the other.
///
/// Iterating gives [`Invalid`] for a link type that is not supported, and for a damaged or cut
/// file, naming the packet (counted from 1); nothing follows an error.
pub struct Reader {
    source: Box<dyn Read + Send>,
    file: Option<PathBuf>,
    /// What has been read; used up to `start`.
    buffer: Vec<u8>,
    start: usize,
    container: Container,
    format: Format,
    /// Packets read so far.
    packets: u64,
    /// Device and inode of the file, so that it is not overwritten while being read.
    identity: Option<(u64, u64)>,
    done: bool,
}

impl Reader {
    /// Opens a capture file.
    ///
    /// # Errors
    /// [`Invalid`] if there is no such file or it is not a capture, [`Refused`] (denied) if it may
    /// not be read.
    pub fn open(path: &Path) -> Result<Self> {
        let opened = File::open(path).and_then(|file| match file.metadata()? {
            metadata if metadata.is_dir() => Err(ErrorKind::IsADirectory.into()),
            metadata => Ok((file, metadata)),
        });
        let (file, metadata) = opened.map_err(|error| unusable("read", path, error))?;
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

    fn start(mut source: Box<dyn Read + Send>, file: Option<PathBuf>) -> Result<Self> {
        let mut buffer = Vec::new();
        fill(&mut source, &mut buffer).with_context(|| reading(file.as_deref()))?;
        let mut headers = Vec::new();
        let (container, start) =
            Container::detect(&buffer, &mut headers).map_err(|invalid| Invalid {
                file: file.clone(),
                ..invalid
            })?;
        let format = Format {
            pcapng: matches!(container, Container::Pcapng(_)),
            headers: Arc::new(Mutex::new(headers)),
        };
        Ok(Reader {
            source,
            file,
            buffer,
            start,
            container,
            format,
            packets: 0,
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
        loop {
            let bytes = &self.buffer[self.start..];
            let next = self.container.next(bytes, &self.format);
            let Some((len, packet)) = next.map_err(|invalid| self.located(invalid))? else {
                if !self.refill()? {
                    return Ok(None);
                }
                continue;
            };
            self.start += len;
            if let Some(mut packet) = packet {
                packet.headers = self.format.headers().len();
                self.packets += 1;
                return Ok(Some(packet));
            }
        }
    }

    /// Reads on; false if the capture ends here.
    fn refill(&mut self) -> Result<bool> {
        self.buffer.drain(..self.start);
        self.start = 0;
        let left = self.buffer.len();
        if left >= MAX_BLOCK {
            let expected = format!("at most {MAX_BLOCK} bytes");
            return Err(self.located(invalid("a longer block", expected).advice(DAMAGED)));
        }
        let more = fill(&mut self.source, &mut self.buffer)
            .with_context(|| format!("at packet {}", self.packets + 1))
            .with_context(|| reading(self.file.as_deref()))?;
        if !more && left > 0 {
            let found = format!(
                "the file ends in the middle, or is damaged, after {} whole packets",
                self.packets
            );
            let cut = invalid(found, "a whole capture")
                .advice("capture again, or keep the whole packets with `editcap` or `tcpdump -r`");
            return Err(self.located(cut));
        }
        Ok(more)
    }

    /// With the file, and the number of the packet about to be read.
    fn located(&self, invalid: Invalid) -> anyhow::Error {
        let located = Invalid {
            file: self.file.clone(),
            path: format!("packet {}", self.packets + 1),
            ..invalid
        };
        located.into()
    }
}

/// Appends the next [`CHUNK`] or what is left; false at the end.
fn fill(source: &mut impl Read, buffer: &mut Vec<u8>) -> io::Result<bool> {
    Ok(source.take(CHUNK).read_to_end(buffer)? > 0)
}

fn reading(file: Option<&Path>) -> String {
    format!(
        "reading {}",
        file.unwrap_or(Path::new("the capture")).display()
    )
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

/// Writes packets in the format they were read in: the same container, sections, byte order,
/// interfaces with their options, timestamp units and stamps, and a snap length of at least
/// [`MAX_CAPTURED`].
///
/// Every packet of a pcapng becomes an Enhanced Packet without options (a Simple Packet, which has
/// no stamp, with stamp 0); blocks other than packets, sections and interfaces are not copied. A
/// frame check sequence of the capture counts as payload and is not recomputed.
pub struct Writer {
    output: BufWriter<Box<dyn Write + Send>>,
    name: PathBuf,
    format: Format,
    /// Bytes of the format's headers written so far.
    headers: usize,
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
        let mut writer = Writer::new(file, reader.format());
        writer.name = path.to_owned();
        Ok(writer)
    }

    /// Writes to anything writable; it is buffered here.
    pub fn new(output: impl Write + Send + 'static, format: Format) -> Self {
        Writer {
            output: BufWriter::with_capacity(1 << 16, Box::new(output)),
            name: "the output".into(),
            format,
            headers: 0,
        }
    }

    /// Writes `frame`, which came from `packet`, with its stamp. Packets are written in the order
    /// they were read in.
    ///
    /// The original length follows: it changes by as many bytes as the packet did, so that a
    /// truncated packet stays truncated.
    ///
    /// # Errors
    /// Those of the output; a packet of more than [`MAX_CAPTURED`] bytes, of another capture or
    /// out of order.
    pub fn write(&mut self, packet: &Packet, frame: &[u8]) -> Result<()> {
        let mut data = packet.restore(frame);
        ensure!(
            data.len() <= MAX_CAPTURED as usize,
            "a packet of {} bytes does not fit into a capture",
            data.len()
        );
        ensure!(
            packet.interface.is_some() == self.format.pcapng,
            "the packet comes from a capture of another format than {}",
            self.format.name()
        );
        self.put_headers(packet.headers)?;
        let order = packet.order;
        let [high, low] = packet.stamp;
        let len = data.len() as u32;
        let missing = packet.original_len.saturating_sub(packet.captured_len);
        let original = missing.saturating_add(len);
        let Some(interface) = packet.interface else {
            self.put(&order.words(&[high, low, len, original]))?;
            return self.put(&data);
        };
        data.resize(data.len().next_multiple_of(4), 0);
        let block = data.len() as u32 + 32;
        let header = [EPB_MAGIC, block, interface, high, low, len, original];
        self.put(&order.words(&header))?;
        self.put(&data)?;
        self.put(&order.words(&[block]))
    }

    /// Writes the headers that stand before `end` and are not written yet.
    fn put_headers(&mut self, end: usize) -> Result<()> {
        let format = self.format.clone();
        let headers = format.headers();
        let headers = headers
            .get(self.headers..end)
            .context("the packet comes from another capture, or before the last one written")?;
        self.put(headers)?;
        self.headers = end;
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.output
            .write_all(bytes)
            .with_context(|| format!("writing {}", self.name.display()))
    }

    /// Writes what is buffered.
    ///
    /// # Errors
    /// Those of the output. Without this call errors of the last writes are lost.
    pub fn finish(mut self) -> Result<()> {
        let end = self.format.headers().len();
        self.put_headers(end)?;
        self.output
            .flush()
            .with_context(|| format!("writing {}", self.name.display()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    impl Order {
        fn put_u16(self, value: u16) -> [u8; 2] {
            self.swap(value.to_be_bytes())
        }

        fn put_u32(self, value: u32) -> [u8; 4] {
            self.swap(value.to_be_bytes())
        }
    }

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
        let mut writer = Writer::new(shared.clone(), reader.format());
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
        for order in ORDERS {
            timestamps_follow_resolution_and_offset(order);
        }
    }

    fn timestamps_follow_resolution_and_offset(order: Order) {
        let ticks: u64 = 1_700_000_000_123_456_789;
        let offset = |seconds: i64| order.swap(seconds.to_be_bytes()).to_vec();
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
        }
        assert_eq!(again.len(), 5);
        let shared = Shared::default();
        let mut writer = Writer::new(shared.clone(), reader(&file).unwrap().format());
        assert!(writer.write(&packets[4], &packets[4].frame).is_err());
        let source = reader(&file).unwrap();
        let mut writer = Writer::new(shared.clone(), source.format());
        let late: Vec<_> = source.map(Result::unwrap).collect();
        for packet in &late {
            writer.write(packet, &packet.frame).unwrap();
        }
        assert!(writer.write(&late[0], &late[0].frame).is_err());
        writer.finish().unwrap();
        assert_eq!(*shared.0.lock().unwrap(), written);
        // The output is canonical: writing it again changes nothing.
        assert_eq!(rewrite(&written, |_| {}), written);
        let speed = 1_000_000u64.to_be_bytes();
        assert!(written.windows(8).any(|bytes| bytes == speed));
    }

    /// Gives one byte a read, then fails.
    struct Slow(Vec<u8>);

    impl Read for Slow {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            buffer[0] = self.0.remove(0);
            Ok(1)
        }
    }

    #[test]
    fn read_errors_are_reported_and_short_reads_are_not_the_end() {
        let file = pcap(Order::Little, false, 1, &[(vec![1; 60], 60)]);
        let error = Reader::new(Slow(file.clone())).map(|_| ()).unwrap_err();
        assert!(format!("{error:#}").contains("os error 5"), "{error:#}");
        let len = file.len() as u64;
        let packets: Vec<_> = Reader::new(Slow(file).take(len)).unwrap().collect();
        assert_eq!(packets.len(), 1);
        assert!(packets[0].is_ok());
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
        assert_eq!(error.found, "link type 105");
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
        assert_eq!((&*error.path, &*error.found), ("packet 2", "link type 249"));
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
            assert!(first(&file).contains("ends in the middle"));
            file.extend(vec![0; MAX_BLOCK]);
            assert_eq!(first(&file), "a longer block");
            let large = pcap(order, false, 1, &[(vec![0; 262_145], 262_145)]);
            assert_eq!(first(&large), "a packet of 262145 bytes");
            let ng = |block: &[u8]| {
                let interface = ng_interface(order, 1, 0, &[]);
                [&ng_section(order)[..], &interface, block].concat()
            };
            let huge = words(order, &[6, 0xffff_fffc, 0, 0]);
            assert!(first(&ng(&huge)).contains("ends in the middle"));
            let unknown = words(order, &[77, 0xffff_fffc, 0, 0]);
            assert!(first(&ng(&unknown)).contains("ends in the middle"));
            for len in [0, 4, 11] {
                let found = first(&ng(&words(order, &[77, len, 0, 0])));
                assert_eq!(found, "a damaged block");
            }
            let mut wrong = ng_enhanced(order, 0, 0, &[1; 4], 4);
            let end = wrong.len() - 4;
            wrong[end..].copy_from_slice(&order.put_u32(40));
            assert_eq!(first(&ng(&wrong)), "a damaged block");
            let captured = ng_block(order, 6, &words(order, &[0, 0, 0, 5, 5, 0]));
            assert!(first(&ng(&captured)).contains("damaged"));
            let captured = ng_block(order, 6, &words(order, &[0, 0, 0, u32::MAX, 5, 0]));
            assert_eq!(first(&ng(&captured)), "a damaged block");
            let obsolete = ng_block(order, 2, &words(order, &[0, 0, 0, 5, 5, 0]));
            assert_eq!(first(&ng(&obsolete)), "a packet block of 24 bytes");
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
        let mut writer = Writer::new(io::sink(), reader.format());
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
        let mut writer = Writer::new(io::sink(), reader.format());
        assert!(writer.write(&packet, &vec![0; 262_145]).is_err());
        let ng = super::Reader::new(io::Cursor::new(ng_section(Order::Big))).unwrap();
        let mut writer = Writer::new(io::sink(), ng.format());
        assert!(writer.write(&packet, &packet.frame).is_err());
    }
}
