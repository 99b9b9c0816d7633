// SPDX-License-Identifier: MIT OR Apache-2.0
//! TCP connections from the client to the server whose content is checked byte by byte.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{self, Backlog, SockaddrStorage};
use nix::sys::time::{TimeVal, TimeValLike};
use policy_chain::testbed::Role;

use super::Environment;

const TIMEOUT: Duration = Duration::from_secs(20);
const CHUNK: usize = 64 << 10;

/// The service the chains of these tests know.
pub const PORT: u16 = 5201;

/// Content that repeats nowhere (xorshift64*).
pub struct Noise(u64);

impl Noise {
    pub fn new(seed: u64) -> Noise {
        Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next_number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Less than `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next_number() % bound as u64) as usize
    }

    pub fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    pub fn choose<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    /// The next `length` bytes; of a length that eight divides, if more are to follow.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend(self.next_number().to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}

/// Both ends of an established connection.
pub struct Connection {
    pub client: TcpStream,
    pub server: TcpStream,
}

/// The server's addresses on path 1: IPv4, IPv6.
pub fn server_addresses(environment: &Environment) -> [IpAddr; 2] {
    let server = &environment.testbed.path(1).unwrap().server;
    [server.ipv4.into(), server.ipv6.into()]
}

/// The client's addresses on path 1: IPv4, IPv6.
pub fn client_addresses(environment: &Environment) -> [IpAddr; 2] {
    let client = &environment.testbed.path(1).unwrap().client;
    [client.ipv4.into(), client.ipv6.into()]
}

pub fn listen(environment: &Environment, address: SocketAddr) -> TcpListener {
    environment
        .namespace(Role::Server)
        .enter(|| TcpListener::bind(address).unwrap())
        .unwrap()
}

impl Connection {
    /// Connects the client to a port of the server.
    pub fn open(environment: &Environment, server: IpAddr, port: u16) -> Connection {
        let listener = listen(environment, SocketAddr::new(server, port));
        Connection::open_to(environment, &listener)
    }

    pub fn open_to(environment: &Environment, listener: &TcpListener) -> Connection {
        let address = listener.local_addr().unwrap();
        let client = environment
            .namespace(Role::Client)
            .enter(|| TcpStream::connect_timeout(&address, TIMEOUT))
            .unwrap()
            .unwrap_or_else(|error| panic!("connect to {address}: {error}"));
        let server = accept(listener);
        Connection { client, server }.prepared()
    }

    /// Opens an MPTCP connection.
    pub fn open_mptcp(environment: &Environment, server: SocketAddr) -> Connection {
        let listener = environment
            .namespace(Role::Server)
            .enter(|| {
                let socket = mptcp_socket(&server);
                socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(server)).unwrap();
                socket::listen(&socket, Backlog::MAXCONN).unwrap();
                TcpListener::from(socket)
            })
            .unwrap();
        let client = environment
            .namespace(Role::Client)
            .enter(|| {
                let socket = mptcp_socket(&server);
                socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(server)).unwrap();
                TcpStream::from(socket)
            })
            .unwrap();
        let server = accept(&listener);
        Connection { client, server }.prepared()
    }

    /// With time limits, and without waiting for more to send.
    fn prepared(self) -> Connection {
        for stream in [&self.client, &self.server] {
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
            stream.set_write_timeout(Some(TIMEOUT)).unwrap();
            stream.set_nodelay(true).unwrap();
        }
        self
    }

    pub fn client_port(&self) -> u16 {
        self.client.local_addr().unwrap().port()
    }

    /// Small messages there and back, one at a time: each is a packet by itself.
    pub fn exchange(&self, rounds: usize) {
        let mut noise = Noise::new(7);
        for round in 0..rounds {
            let message = noise.bytes(100);
            // `&TcpStream` reads and writes.
            let (client, server) = (&self.client, &self.server);
            for (mut from, mut to) in [(client, server), (server, client)] {
                from.write_all(&message).unwrap();
                let mut seen = vec![0; message.len()];
                to.read_exact(&mut seen).unwrap();
                assert_eq!(seen, message, "round {round}");
            }
        }
    }

    /// Sends `length` bytes to the server and as many back, and compares them.
    pub fn transfer(&mut self, length: usize) {
        send(&self.client, &self.server, length);
        send(&self.server, &self.client, length);
    }
}

/// The next connection: a client takes for one what the server may not, if its last ACK is lost.
fn accept(listener: &TcpListener) -> TcpStream {
    let limit = TimeVal::seconds(TIMEOUT.as_secs() as i64);
    socket::setsockopt(listener, ReceiveTimeout, &limit).unwrap();
    let accepted = listener.accept();
    accepted.unwrap_or_else(|error| panic!("accept: {error}")).0
}

fn mptcp_socket(address: &SocketAddr) -> OwnedFd {
    let family = match address {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    };
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: plain integers; the result is checked before it is owned.
    let socket = unsafe { libc::socket(family, kind, libc::IPPROTO_MPTCP) };
    assert!(socket >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: a new descriptor that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(socket) }
}

/// Sends within [`TIMEOUT`]: a transfer that goes on, one retransmission after the other, is none.
fn send(from: &TcpStream, mut to: &TcpStream, length: usize) {
    let content = Noise::new(length as u64).bytes(length);
    let mut seen: Vec<u8> = Vec::with_capacity(length);
    let limit = Instant::now() + TIMEOUT;
    thread::scope(|scope| {
        // `&TcpStream` reads and writes.
        let mut end = from;
        let content = &content;
        let writer = scope.spawn(move || end.write_all(content));
        let mut chunk = vec![0; CHUNK];
        while seen.len() < length {
            match to.read(&mut chunk) {
                Ok(count @ 1..) if Instant::now() < limit => seen.extend(&chunk[..count]),
                // Where a socket has a time limit, stopping a process for a while ends its calls.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                stalled => {
                    // Lets go of the writer.
                    let _ = from.shutdown(Shutdown::Both);
                    let seen = seen.len();
                    panic!("transfer: {seen} of {length} bytes in {TIMEOUT:?}: {stalled:?}");
                }
            }
        }
        writer.join().unwrap().unwrap();
    });
    assert!(seen == content, "the content of {length} bytes differs");
}

/// Transfers both ways over new connections, IPv4 and IPv6.
pub fn transfer_both(environment: &Environment, length: usize) {
    for address in server_addresses(environment) {
        Connection::open(environment, address, PORT).transfer(length);
    }
}

/// A transfer that goes on until it is stopped.
pub struct Flow {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Flow {
    pub fn start(connection: Connection) -> Flow {
        let stop = Arc::new(AtomicBool::new(false));
        let received = Arc::new(AtomicU64::new(0));
        let Connection { client, server } = connection;
        let writer = {
            let stop = Arc::clone(&stop);
            thread::spawn(move || write_until(client, &stop))
        };
        let reader = {
            let received = Arc::clone(&received);
            thread::spawn(move || read_all(server, &received))
        };
        Flow {
            stop,
            received,
            threads: vec![writer, reader],
        }
    }

    /// Bytes received so far, all of them right.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Waits until more has arrived: the connection is alive.
    pub fn expect_progress(&self) {
        let before = self.received();
        super::eventually("the transfer goes on", || {
            (self.received() > before).then_some(())
        });
    }

    /// Ends the transfer; everything sent must have arrived.
    pub fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
        self.received.load(Ordering::Relaxed)
    }
}

fn write_until(mut client: TcpStream, stop: &AtomicBool) {
    let mut noise = Noise::new(3);
    let mut sent = 0u64;
    while !stop.load(Ordering::Relaxed) {
        client.write_all(&noise.bytes(CHUNK)).unwrap();
        sent += CHUNK as u64;
        // Enough to keep the path busy, little enough to leave the processor to others.
        thread::sleep(Duration::from_millis(1));
    }
    client.shutdown(Shutdown::Write).unwrap();
    let mut total = [0; 8];
    client.read_exact(&mut total).unwrap();
    assert_eq!(u64::from_le_bytes(total), sent, "bytes that arrived");
}

fn read_all(mut server: TcpStream, received: &AtomicU64) {
    let mut noise = Noise::new(3);
    let mut chunk = vec![0; CHUNK];
    loop {
        match server.read_exact(&mut chunk) {
            Ok(()) => assert!(chunk == noise.bytes(CHUNK), "the content differs"),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
            Err(error) => panic!("transfer: {error}"),
        }
        received.fetch_add(CHUNK as u64, Ordering::Relaxed);
    }
    let total = received.load(Ordering::Relaxed);
    server.write_all(&total.to_le_bytes()).unwrap();
}

/// What the kernel knows of a connection (`struct tcp_info`).
pub struct TcpInfo {
    pub timestamps: bool,
    pub send_scale: u8,
    /// Window the peer advertised, in bytes.
    pub send_window: u32,
    pub send_mss: u32,
}

pub fn tcp_info(stream: &TcpStream) -> TcpInfo {
    const OPTIONS: usize = 5;
    const OPTION_TIMESTAMPS: u8 = 1;
    const SCALES: usize = 6;
    const SEND_MSS: usize = 16;
    const SEND_WINDOW: usize = 228;
    let mut info = [0u8; 256];
    let mut length = info.len() as libc::socklen_t;
    // SAFETY: a buffer of the length stated, and an open socket.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &mut length,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    assert!(length as usize >= SEND_WINDOW + 4, "an older kernel");
    let word = |at: usize| u32::from_ne_bytes(info[at..at + 4].try_into().unwrap());
    TcpInfo {
        timestamps: info[OPTIONS] & OPTION_TIMESTAMPS != 0,
        send_scale: info[SCALES] & 0xf,
        send_window: word(SEND_WINDOW),
        send_mss: word(SEND_MSS),
    }
}
