// SPDX-License-Identifier: MIT OR Apache-2.0
//! One TCP transfer, checked byte by byte, and what its packets looked like on arrival. Used by
//! `make demo`; needs root, for the packet socket.
//!
//! ```text
//! transfer send PORT MEGABYTES      waits for one receiver, sends to it, watches what it sent back
//! transfer receive ADDRESS PORT     connects, receives to the end, compares
//! ```
//!
//! Both print lines of `name=value` and end 0 only if all went well.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn};

/// Longest wait for the other side, at any point.
const PATIENCE: Duration = Duration::from_secs(30);
const BLOCK: usize = 64 * 1024;
/// The receiver's window, in bytes: its scale is then 5.
const WINDOW: libc::c_int = 1 << 20;
/// Mebibyte.
const MEGABYTE: u64 = 1 << 20;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["send", port, megabytes] => send(port, megabytes),
        ["receive", address, port] => receive(address, port),
        _ => {
            eprintln!("usage: transfer send PORT MEGABYTES | transfer receive ADDRESS PORT");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn send(port: &str, megabytes: &str) -> Result<()> {
    let port: u16 = port.parse().context("PORT")?;
    let total = megabytes.parse::<u64>().context("MEGABYTES")? * MEGABYTE;
    let errors = checksum_errors()?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).context("listen")?;
    let watcher = Watcher::start(port)?;
    println!("ready");
    let mut stream = accept(&listener)?;
    let begin = Instant::now();
    let mut pattern = Pattern::default();
    let mut block = vec![0; BLOCK];
    let mut left = total;
    while left > 0 {
        let length = usize::try_from(left.min(BLOCK as u64))?;
        pattern.fill(&mut block[..length]);
        stream.write_all(&block[..length]).context("send")?;
        left -= length as u64;
    }
    stream.shutdown(Shutdown::Write).context("send the end")?;
    // The receiver closes when it has everything.
    let rest = stream.read(&mut block).context("wait for the receiver")?;
    if rest > 0 {
        bail!("the receiver sent data");
    }
    let elapsed = begin.elapsed();
    let seen = watcher.stop()?;
    println!("mbit_s={:.0}", megabits(total, elapsed));
    seen.print();
    println!("checksum_errors={}", checksum_errors()? - errors);
    Ok(())
}

fn receive(address: &str, port: &str) -> Result<()> {
    let address: Ipv4Addr = address.parse().context("ADDRESS")?;
    let address = SocketAddrV4::new(address, port.parse().context("PORT")?);
    let mut stream = connect(address)?;
    let mut pattern = Pattern::default();
    let (mut got, mut expected) = (vec![0; BLOCK], vec![0; BLOCK]);
    let mut total = 0u64;
    loop {
        let length = stream.read(&mut got).context("receive")?;
        if length == 0 {
            break;
        }
        pattern.fill(&mut expected[..length]);
        if got[..length] != expected[..length] {
            bail!("bytes {total} to {} differ", total + length as u64);
        }
        total += length as u64;
    }
    println!("bytes={total}");
    Ok(())
}

/// Connects with a window of at most [`WINDOW`] bytes, so that its scale does not depend on the
/// machine.
fn connect(address: SocketAddrV4) -> Result<TcpStream> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket::socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    set_option(&socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, &WINDOW)?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    socket::connect(stream.as_raw_fd(), &SockaddrIn::from(address)).context("connect")?;
    Ok(stream)
}

fn accept(listener: &TcpListener) -> Result<TcpStream> {
    let begin = Instant::now();
    listener.set_nonblocking(true)?;
    let stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => {
                return Err(error).context("accept");
            }
            Err(_) if begin.elapsed() > PATIENCE => bail!("nobody connected"),
            Err(_) => thread::sleep(Duration::from_millis(2)),
        }
    };
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn megabits(bytes: u64, elapsed: Duration) -> f64 {
    bytes as f64 * 8.0 / 1e6 / elapsed.as_secs_f64()
}

/// `TcpInCsumErrors` of this network namespace.
fn checksum_errors() -> Result<u64> {
    let text = fs::read_to_string("/proc/thread-self/net/snmp").context("read the counters")?;
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp: "));
    let (names, values) = (lines.next().unwrap_or(""), lines.next().unwrap_or(""));
    let mut pairs = names.split(' ').zip(values.split(' '));
    let value = pairs.find(|(name, _)| *name == "InCsumErrors");
    let (_, value) = value.context("no InCsumErrors in /proc/net/snmp")?;
    value.parse().context("InCsumErrors")
}

/// A stream of bytes both sides know, in which no piece repeats (xorshift64*).
struct Pattern {
    state: u64,
    word: [u8; 8],
    used: usize,
}

impl Default for Pattern {
    fn default() -> Self {
        Pattern {
            state: 0x9e37_79b9_7f4a_7c15,
            word: [0; 8],
            used: 8,
        }
    }
}

impl Pattern {
    fn fill(&mut self, to: &mut [u8]) {
        for byte in to {
            if self.used == self.word.len() {
                self.state ^= self.state >> 12;
                self.state ^= self.state << 25;
                self.state ^= self.state >> 27;
                self.word = self.state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
                self.used = 0;
            }
            *byte = self.word[self.used];
            self.used += 1;
        }
    }
}

/// What the segments to one port looked like when they arrived.
#[derive(Default)]
struct Seen {
    segments: u64,
    with_timestamps: u64,
    /// The window field of segments without SYN.
    windows: BTreeSet<u16>,
    /// Of the SYN.
    window_scale: Option<u8>,
    syn_options: Vec<u8>,
}

impl Seen {
    /// Takes in an IPv4 packet; what is no TCP segment to `port` does not count.
    fn add(&mut self, packet: &[u8], port: u16) -> Option<()> {
        const TCP: u8 = 6;
        const SYN: u8 = 2;
        let header = usize::from(packet.first()? & 15) * 4;
        if packet.get(9) != Some(&TCP) {
            return None;
        }
        let tcp = packet.get(header..)?;
        if tcp.get(2..4)? != port.to_be_bytes() {
            return None;
        }
        let end = usize::from(tcp.get(12)? >> 4) * 4;
        let options = Options(tcp.get(20..end)?);
        let syn = tcp.get(13)? & SYN != 0;
        self.segments += 1;
        for (kind, value) in options {
            const WINDOW_SCALE: u8 = 3;
            const TIMESTAMPS: u8 = 8;
            self.with_timestamps += u64::from(kind == TIMESTAMPS);
            if syn {
                self.syn_options.push(kind);
            }
            if syn && kind == WINDOW_SCALE {
                self.window_scale = value.first().copied();
            }
        }
        if !syn {
            let window = tcp.get(14..16)?;
            self.windows
                .insert(u16::from_be_bytes([window[0], window[1]]));
        }
        Some(())
    }

    fn print(&self) {
        let first = self.windows.first().copied().unwrap_or_default();
        let last = self.windows.last().copied().unwrap_or_default();
        let kinds: Vec<String> = self
            .syn_options
            .iter()
            .map(|kind| match kind {
                2 => "mss".to_owned(),
                3 => "wscale".to_owned(),
                4 => "sack".to_owned(),
                8 => "timestamps".to_owned(),
                other => other.to_string(),
            })
            .collect();
        println!("segments={}", self.segments);
        println!("with_timestamps={}", self.with_timestamps);
        println!("window_min={first}");
        println!("window_max={last}");
        println!("window_scale={}", self.window_scale.unwrap_or_default());
        println!("syn_options={}", kinds.join(","));
    }
}

/// TCP options but NOP: kind and value.
struct Options<'a>(&'a [u8]);

impl<'a> Iterator for Options<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        const NOP: u8 = 1;
        while let Some((&NOP, rest)) = self.0.split_first() {
            self.0 = rest;
        }
        // A list that ends early, by EOL or a wrong length, has no more options.
        let (&kind, _) = self.0.split_first()?;
        let length = usize::from(*self.0.get(1)?);
        let value = self.0.get(2..length)?;
        self.0 = self.0.get(length..)?;
        Some((kind, value))
    }
}

/// A thread that looks at all IPv4 packets that arrive.
struct Watcher {
    thread: thread::JoinHandle<Result<Seen>>,
    stop: Arc<AtomicBool>,
}

impl Watcher {
    fn start(port: u16) -> Result<Watcher> {
        let socket = packet_socket().context("open a packet socket (are you root?)")?;
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let watch = move || {
            let mut seen = Seen::default();
            let mut packet = [0u8; 256];
            loop {
                // SAFETY: the buffer is ours and its length given; the socket is open.
                let length = unsafe {
                    libc::recv(
                        socket.as_raw_fd(),
                        packet.as_mut_ptr().cast(),
                        packet.len(),
                        0,
                    )
                };
                match usize::try_from(length) {
                    Ok(length) => drop(seen.add(&packet[..length], port)),
                    // Nothing came for a while.
                    Err(_) if flag.load(Ordering::Relaxed) => return Ok(seen),
                    Err(_) => {}
                }
            }
        };
        Ok(Watcher {
            thread: thread::spawn(watch),
            stop,
        })
    }

    fn stop(self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(seen) => seen,
            Err(_) => bail!("the watcher failed"),
        }
    }
}

/// A socket that gets a copy of each IPv4 packet that arrives, from the IP header on.
fn packet_socket() -> std::io::Result<OwnedFd> {
    let protocol = i32::from((libc::ETH_P_IP as u16).to_be());
    // SAFETY: no pointers.
    let socket = unsafe {
        libc::socket(
            libc::AF_PACKET,
            libc::SOCK_DGRAM | libc::SOCK_CLOEXEC,
            protocol,
        )
    };
    if socket < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: just made, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let room: libc::c_int = 64 << 20;
    let wait = libc::timeval {
        tv_sec: 0,
        tv_usec: 100_000,
    };
    set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &room)?;
    set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &wait)?;
    Ok(socket)
}

fn set_option<T>(
    socket: &OwnedFd,
    level: libc::c_int,
    option: libc::c_int,
    value: &T,
) -> std::io::Result<()> {
    // SAFETY: a C value behind a pointer, with its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}
