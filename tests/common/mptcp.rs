// SPDX-License-Identifier: MIT OR Apache-2.0
//! MPTCP connections from the client to the server, what their sockets tell of them, and the
//! counters and subflows of both hosts.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::panic::Location;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::sockopt::{Ipv6V6Only, ReceiveTimeout, ReuseAddr, SendTimeout};
use nix::sys::socket::{self, Backlog, SockaddrStorage};
use nix::sys::time::{TimeVal, TimeValLike};
use policy_chain::testbed::{Announce, Options, Role};

use super::traffic::{Noise, server_addresses};
use super::{Environment, eventually, eventually_or};

const TIMEOUT: Duration = Duration::from_secs(20);
const CHUNK: usize = 256 << 10;
/// How often [`exact_on`] tries.
const ATTEMPTS: u32 = 3;

impl Environment {
    /// Client and server that speak MPTCP over `paths` paths, joined directly. For more, a router,
    /// a delay or a rate, see [`Environment::with`].
    pub fn mptcp(paths: u8, announce: Announce) -> Environment {
        Environment::with(&mptcp_options(paths, announce))
    }

    /// What a host's kernel counted: table `MPTcpExt`, `TcpExt`, `Tcp` and so on.
    pub fn counter(&self, role: Role, table: &str, name: &str) -> u64 {
        self.statistic(role, table, name)
    }

    /// Waits until a counter is at least so much, and gives it.
    #[track_caller]
    pub fn wait_counter(&self, role: Role, table: &str, name: &str, least: u64) -> u64 {
        eventually(&format!("{role} {table} {name} is {least}"), || {
            let value = self.counter(role, table, name);
            (value >= least).then_some(value)
        })
    }

    /// Sockets and counters of both hosts, for messages.
    fn mptcp_state(&self) -> String {
        let of = |role| {
            let sockets = self.run(role, "ss", &["-tnaiHO"]);
            let counters = self.run(role, "nstat", &["-as"]);
            format!("{role}:\n{sockets}{counters}")
        };
        [Role::Client, Role::Server].map(of).concat()
    }

    /// The subflows of a host's MPTCP connections that are established.
    pub fn subflows(&self, role: Role) -> Vec<Subflow> {
        let table = self.run(role, "ss", &["-tniHO"]);
        table.lines().filter_map(Subflow::parse).collect()
    }

    /// Waits until a host has so many subflows, and gives them.
    #[track_caller]
    pub fn wait_subflows(&self, role: Role, count: usize) -> Vec<Subflow> {
        eventually(&format!("{count} subflows of the {role}"), || {
            let subflows = self.subflows(role);
            (subflows.len() == count).then_some(subflows)
        })
    }
}

/// Of a testbed with MPTCP: `Options { router: true, ..mptcp_options(2, Announce::Signal) }`.
pub fn mptcp_options(paths: u8, announce: Announce) -> Options {
    Options {
        paths,
        mptcp: Some(announce),
        ..Options::default()
    }
}

/// An established subflow as `ss -tniHO` has it.
#[derive(Clone, Debug)]
pub struct Subflow {
    pub local: SocketAddr,
    pub peer: SocketAddr,
    /// Of those that this host connected from an address of its own: `path2`.
    pub device: Option<String>,
    pub rtt: Duration,
    pub min_rtt: Duration,
    pub mss: u32,
    pub bytes_sent: u64,
    pub bytes_acked: u64,
    pub bytes_received: u64,
    /// `M`, `m`: first subflow; `J`, `j`: joined; `e`: established; `b`: backup by this host, `B`:
    /// by its peer.
    pub flags: String,
    /// The whole line.
    pub line: String,
}

impl Subflow {
    fn parse(line: &str) -> Option<Subflow> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let after = |key: &str| words.iter().find_map(|word| word.strip_prefix(key));
        let number = |key| after(key).and_then(|it| it.parse().ok()).unwrap_or(0);
        let time = |key| {
            let text = after(key).and_then(|it| it.split('/').next());
            let milliseconds: f64 = text.and_then(|it| it.parse().ok()).unwrap_or(0.0);
            Duration::from_secs_f64(milliseconds / 1e3)
        };
        words.iter().position(|word| *word == "tcp-ulp-mptcp")?;
        // One that its peer has closed may wait for room to send its FIN, and the peer give none.
        if words[0] != "ESTAB" {
            return None;
        }
        let (local, device) = address(words.get(3)?)?;
        let (peer, _) = address(words.get(4)?)?;
        Some(Subflow {
            local,
            peer,
            device,
            rtt: time("rtt:"),
            min_rtt: time("minrtt:"),
            mss: number("mss:") as u32,
            bytes_sent: number("bytes_sent:"),
            bytes_acked: number("bytes_acked:"),
            bytes_received: number("bytes_received:"),
            flags: after("flags:").unwrap_or_default().to_owned(),
            line: line.trim().to_owned(),
        })
    }

    /// Number of the path that the subflow's packets take: of the address that is not the first
    /// subflow's. With [`Announce::Subflow`] that is the client's, with `Signal` the server's.
    pub fn path(&self) -> u8 {
        let of = |address: IpAddr| match address {
            IpAddr::V4(address) => address.octets()[2],
            IpAddr::V6(address) => address.segments()[3] as u8,
        };
        of(self.local.ip()).max(of(self.peer.ip()))
    }

    pub fn is_joined(&self) -> bool {
        self.flags.contains(['J', 'j'])
    }

    /// Whether the peer made it a backup (MP_PRIO, or MP_JOIN).
    pub fn is_backup_by_peer(&self) -> bool {
        self.flags.contains('B')
    }

    pub fn is_backup_by_self(&self) -> bool {
        self.flags.contains('b')
    }
}

/// `10.0.2.1%path2:53851`, `[fd00::1]%path2:5`, with or without device.
fn address(text: &str) -> Option<(SocketAddr, Option<String>)> {
    let (host, port) = text.rsplit_once(':')?;
    let (host, device) = match host.split_once('%') {
        Some((host, device)) => (host, Some(device.trim_end_matches(']').to_owned())),
        None => (host, None),
    };
    let host: IpAddr = host.trim_matches(['[', ']']).parse().ok()?;
    // A listener for both shows IPv4 so.
    Some((
        SocketAddr::new(host.to_canonical(), port.parse().ok()?),
        device,
    ))
}

/// What arrived is not what was sent.
#[derive(Debug)]
pub enum Differs {
    /// Other bytes.
    Bytes(String),
    /// Not all of them: nothing came any more, or an end.
    Stalled(String),
}

impl fmt::Display for Differs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Differs::Bytes(what) | Differs::Stalled(what)) = self;
        f.write_str(what)
    }
}

/// What must be seen of a test that passes, too: its other output is kept from view.
pub fn say(message: fmt::Arguments) {
    // Nobody to tell it to is no reason to fail.
    let _ = writeln!(io::stderr().lock(), "{message}");
}

/// As [`exact_on`], for connections over two paths.
#[track_caller]
pub fn exact<T>(attempt: impl FnMut() -> Result<T, Differs>) -> T {
    exact_on(&mptcp_options(2, Announce::Signal), attempt)
}

/// Does something that compares bytes, and again if they differ: without any BPF program, kernels
/// have been seen to deliver wrong bytes in one of a thousand connections of two subflows. A
/// connection that delivers no more has no such excuse. Either way the same is tried on a testbed of
/// these options without any chain, and what came of it said. Make a new connection each time.
#[track_caller]
pub fn exact_on<T>(options: &Options, attempt: impl FnMut() -> Result<T, Differs>) -> T {
    exact_beside(|| Control::run(options), attempt)
}

/// As [`exact_on`], with another control.
#[track_caller]
pub fn exact_beside<T>(
    control: impl Fn() -> Control,
    mut attempt: impl FnMut() -> Result<T, Differs>,
) -> T {
    let caller = Location::caller();
    for number in 1.. {
        let differs = match attempt() {
            Ok(done) => return done,
            Err(differs) => differs,
        };
        let control = control();
        say(format_args!(
            "{caller}: attempt {number} of {ATTEMPTS}: {differs}; {control}"
        ));
        match differs {
            Differs::Stalled(what) => panic!("{what}; {control}"),
            Differs::Bytes(what) if number == ATTEMPTS => {
                panic!("wrong bytes in {ATTEMPTS} attempts: {what}; {control}")
            }
            Differs::Bytes(_) => {}
        }
    }
    unreachable!()
}

/// What the kernel does by itself.
pub struct Control {
    pub connections: usize,
    pub wrong: usize,
    pub stalled: usize,
}

impl fmt::Display for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Control {
            connections,
            wrong,
            stalled,
        } = self;
        write!(
            f,
            "control: of {connections} connections without BPF, {wrong} had wrong bytes, \
             {stalled} stalled"
        )
    }
}

impl Control {
    /// Most connections, and for how long new ones are made.
    const CONNECTIONS: usize = 50;
    const TIME: Duration = Duration::from_secs(30);

    fn run(options: &Options) -> Control {
        Control::of(options, Control::CONNECTIONS, Control::TIME)
    }

    /// Connections that have joined all paths of a new testbed, IPv4 and IPv6.
    pub fn of(options: &Options, connections: usize, time: Duration) -> Control {
        let environment = Environment::with(options);
        let addresses = server_addresses(&environment);
        let limit = Instant::now() + time;
        let mut control = Control {
            connections: 0,
            wrong: 0,
            stalled: 0,
        };
        while control.connections < connections && Instant::now() < limit {
            let address = addresses[control.connections % addresses.len()];
            let connection = MptcpConnection::joined(&environment, address);
            let carried = connection.transfer(4 << 20);
            let carried = carried.and_then(|_| connection.fetch(4 << 20));
            control.connections += 1;
            match carried {
                Ok(_) => {}
                Err(Differs::Bytes(_)) => control.wrong += 1,
                Err(Differs::Stalled(_)) => control.stalled += 1,
            }
        }
        control
    }
}

/// Both ends of an established connection that was opened as MPTCP.
pub struct MptcpConnection {
    pub client: TcpStream,
    pub server: TcpStream,
    // Joins need it.
    _listener: TcpListener,
}

impl MptcpConnection {
    /// Connects the client to a port of the server; 0 takes a free one.
    pub fn open(environment: &Environment, server: IpAddr, port: u16) -> MptcpConnection {
        MptcpConnection::try_open(environment, server, port)
            .unwrap_or_else(|error| panic!("connect to {server}: {error}"))
    }

    pub fn try_open(
        environment: &Environment,
        server: IpAddr,
        port: u16,
    ) -> io::Result<MptcpConnection> {
        let listener = listen(environment, server, port);
        let goal = SocketAddr::new(server, listener.local_addr()?.port());
        let client = connect(environment, goal)?;
        let (server, _) = listener.accept()?;
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(TIMEOUT))?;
            stream.set_write_timeout(Some(TIMEOUT))?;
            stream.set_nodelay(true)?;
        }
        Ok(MptcpConnection {
            client,
            server,
            _listener: listener,
        })
    }

    /// Opens a connection to the server's address on path 1, exchanges a message, and waits until
    /// the client has a subflow a path.
    pub fn joined(environment: &Environment, server: IpAddr) -> MptcpConnection {
        let connection = MptcpConnection::open(environment, server, 0);
        connection.exchange(1).unwrap();
        let paths = environment.testbed.describe().paths.len();
        connection.wait_subflows(environment, Role::Client, paths);
        connection
    }

    fn end(&self, role: Role) -> &TcpStream {
        match role {
            Role::Client => &self.client,
            Role::Server => &self.server,
            other => panic!("the {other} has no end of a connection"),
        }
    }

    pub fn client_port(&self) -> u16 {
        self.client.local_addr().unwrap().port()
    }

    pub fn server_port(&self) -> u16 {
        self.server.local_addr().unwrap().port()
    }

    /// Small messages there and back, one at a time.
    pub fn exchange(&self, rounds: usize) -> Result<(), Differs> {
        let mut noise = Noise::new(7);
        for round in 0..rounds {
            let message = noise.bytes(100);
            for (mut from, mut to) in [(&self.client, &self.server), (&self.server, &self.client)] {
                let mut seen = vec![0; message.len()];
                let carried = from
                    .write_all(&message)
                    .and_then(|()| to.read_exact(&mut seen));
                carried.map_err(|error| Differs::Stalled(format!("message {round}: {error}")))?;
                compare(&message, &seen, &format!("message {round}"))?;
            }
        }
        Ok(())
    }

    /// Sends to the server, and gives the Mbit/s.
    pub fn transfer(&self, length: usize) -> Result<f64, Differs> {
        send(&self.client, &self.server, length)
    }

    /// Sends to the client, and gives the Mbit/s.
    pub fn fetch(&self, length: usize) -> Result<f64, Differs> {
        send(&self.server, &self.client, length)
    }

    /// Whether the connection speaks MPTCP, and did not fall back to TCP; as the client sees it.
    pub fn is_mptcp(&self) -> bool {
        self.info(Role::Client).is_some_and(|info| !info.fallback)
    }

    /// What a host's kernel knows of the connection (`MPTCP_INFO`): nothing once it is plain TCP.
    pub fn info(&self, role: Role) -> Option<MptcpInfo> {
        MptcpInfo::of(self.end(role))
    }

    /// The token by which `role` knows the connection; its peer names it in MP_JOIN.
    pub fn token(&self, role: Role) -> u32 {
        let info = self.info(role).expect("the connection is plain TCP");
        info.token
    }

    /// A host's subflows of this connection, the first one first.
    pub fn subflows(&self, environment: &Environment, role: Role) -> Vec<Subflow> {
        let port = self.server_port();
        let mut subflows = environment.subflows(role);
        subflows.retain(|it| [it.local.port(), it.peer.port()].contains(&port));
        subflows.sort_by_key(Subflow::path);
        subflows
    }

    /// Waits until a host has so many subflows of this connection, and gives them.
    #[track_caller]
    pub fn wait_subflows(
        &self,
        environment: &Environment,
        role: Role,
        count: usize,
    ) -> Vec<Subflow> {
        let what = || {
            format!(
                "{count} subflows of the {role}: {}",
                environment.mptcp_state()
            )
        };
        eventually_or(what, || {
            let subflows = self.subflows(environment, role);
            (subflows.len() == count).then_some(subflows)
        })
    }
}

/// A part of `struct mptcp_info`.
#[derive(Clone, Copy, Debug)]
pub struct MptcpInfo {
    /// Beside the first.
    pub subflows: u8,
    /// Addresses announced to the peer, and taken from it.
    pub announced: u8,
    pub accepted: u8,
    pub fallback: bool,
    /// The local one.
    pub token: u32,
}

impl MptcpInfo {
    fn of(stream: &TcpStream) -> Option<MptcpInfo> {
        const SOL_MPTCP: i32 = 284;
        const MPTCP_INFO: i32 = 1;
        const FALLBACK: u32 = 1;
        let mut info = [0u8; 256];
        let mut length = info.len() as libc::socklen_t;
        // SAFETY: a buffer of the length stated, and an open socket.
        let result = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                SOL_MPTCP,
                MPTCP_INFO,
                info.as_mut_ptr().cast(),
                &mut length,
            )
        };
        if result != 0 {
            return None;
        }
        assert!(length >= 16, "{length} bytes of MPTCP_INFO");
        let word = |at: usize| u32::from_ne_bytes(info[at..at + 4].try_into().unwrap());
        Some(MptcpInfo {
            subflows: info[0],
            announced: info[1],
            accepted: info[2],
            fallback: word(8) & FALLBACK != 0,
            token: word(12),
        })
    }
}

/// On all of the server's addresses of the family: joins go to those it announced, too.
fn listen(environment: &Environment, server: IpAddr, port: u16) -> TcpListener {
    let all = match server {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let address = SocketAddr::new(all, port);
    let open = || -> io::Result<TcpListener> {
        let socket = mptcp_socket(&address)?;
        socket::setsockopt(&socket, ReuseAddr, &true)?;
        if address.is_ipv6() {
            socket::setsockopt(&socket, Ipv6V6Only, &true)?;
        }
        socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
        socket::listen(&socket, Backlog::MAXCONN)?;
        Ok(socket.into())
    };
    let listener = environment.namespace(Role::Server).enter(open).unwrap();
    listener.unwrap_or_else(|error| panic!("listen on {address}: {error}"))
}

/// Connects the client by an MPTCP socket; whether the other side speaks MPTCP is open.
pub fn connect(environment: &Environment, goal: SocketAddr) -> io::Result<TcpStream> {
    let connect = || -> io::Result<TcpStream> {
        let socket = mptcp_socket(&goal)?;
        socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(goal))?;
        Ok(socket.into())
    };
    environment.namespace(Role::Client).enter(connect).unwrap()
}

/// A socket that gives up connecting, and accepting, after [`TIMEOUT`].
fn mptcp_socket(address: &SocketAddr) -> io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    };
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: plain integers; the result is checked before it is owned.
    let socket = unsafe { libc::socket(family, kind, libc::IPPROTO_MPTCP) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let limit = TimeVal::seconds(TIMEOUT.as_secs() as i64);
    socket::setsockopt(&socket, ReceiveTimeout, &limit)?;
    socket::setsockopt(&socket, SendTimeout, &limit)?;
    Ok(socket)
}

fn compare(sent: &[u8], seen: &[u8], what: &str) -> Result<(), Differs> {
    match sent.iter().zip(seen).position(|(one, other)| one != other) {
        None => Ok(()),
        Some(at) => {
            let length = sent.len();
            Err(Differs::Bytes(format!(
                "{what}: {length} bytes differ from byte {at} on"
            )))
        }
    }
}

/// Sends within [`TIMEOUT`]: Mbit/s.
fn send(from: &TcpStream, mut to: &TcpStream, length: usize) -> Result<f64, Differs> {
    let content = Noise::new(length as u64).bytes(length);
    let mut seen: Vec<u8> = Vec::with_capacity(length);
    let start = Instant::now();
    let complete = thread::scope(|scope| {
        // `&TcpStream` reads and writes.
        let mut end = from;
        let content = &content;
        let writer = scope.spawn(move || end.write_all(content));
        let mut chunk = vec![0; CHUNK];
        while seen.len() < length {
            match to.read(&mut chunk) {
                Ok(count @ 1..) if start.elapsed() < TIMEOUT => seen.extend(&chunk[..count]),
                // Where a socket has a time limit, stopping a process for a while ends its calls.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                stalled => {
                    // Lets go of the writer.
                    let _ = from.shutdown(Shutdown::Both);
                    let _ = writer.join();
                    let seen = seen.len();
                    let what = format!("transfer: {seen} of {length} bytes: {stalled:?}");
                    return Err(Differs::Stalled(what));
                }
            }
        }
        writer.join().unwrap().unwrap();
        Ok(())
    });
    let seconds = start.elapsed().as_secs_f64();
    complete?;
    compare(&content, &seen, "transfer")?;
    Ok(length as f64 * 8.0 / 1e6 / seconds)
}
