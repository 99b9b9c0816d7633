// SPDX-License-Identifier: MIT OR Apache-2.0
//! A carrier for frames that `BPF_PROG_TEST_RUN` refuses: a veth pair in a network namespace of its
//! own, through which one frame at a time is sent past the programs attached to it.
//!
//! The namespace is silent: no addresses (so no routes and no replies), no IPv6, no ARP. Whatever
//! its devices receive is therefore the frame, changed or not, or a marker (below).
//!
//! **How "not passed" is told.** After the frame follows a marker: a frame of EtherType
//! [`MARKER_ETHERTYPE`] that holds a random nonce. The kernel keeps their order, because both are
//! sent from one CPU and each device has one queue; when the marker has arrived, the frame's
//! fate is known. A second marker goes back the other way, so that a frame on its way back has
//! arrived too. Programs see the first marker: **they count one packet more** for each frame. A
//! chain that drops the marker as well costs [`MARKER_TIMEOUT`] for each frame it drops at ingress.

use std::ffi::CStr;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, Context, Result};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sched::{
    sched_getaffinity, sched_getcpu, sched_setaffinity, setns, unshare, CloneFlags, CpuSet,
};
use nix::unistd::Pid;

use crate::error::Refused;
use crate::hook::Hook;

/// EtherType of a marker: IEEE's "local experimental 1".
pub const MARKER_ETHERTYPE: u16 = 0x88b5;
/// How long a marker is waited for.
pub const MARKER_TIMEOUT: Duration = Duration::from_millis(200);
/// MTU of the devices, the most a veth takes, in bytes.
pub const MTU: usize = 65_535;
/// The longest frame that can be sent, in bytes: [`MTU`] and an Ethernet header. A frame with an
/// 802.1Q tag may be four bytes longer.
pub const MAX_FRAME: usize = MTU + ETHERNET_HEADER;

const ETHERNET_HEADER: usize = 14;
const VLAN_TAG: usize = 4;
/// Room for a frame that programs made longer.
const RECEIVE_BUFFER: usize = 2 * MAX_FRAME;
/// Room in a socket for frames that a program multiplied.
const SOCKET_BUFFER: libc::c_int = 8 << 20;
/// Bytes of a frame that are sent as its linear part, as the headers of real packets are. Programs
/// that read packets directly see no further.
const LINEAR: usize = 256;
/// The last to run among the filters of `clsact`, which runs after all TCX programs.
const LAST_PRIORITY: u32 = 65_535;

const LOOPBACK: &CStr = c"lo";
const SET_UP: &str = "link add pc-in mtu 65535 type veth peer name pc-out mtu 65535
link set dev pc-in arp off addrgenmode none up
link set dev pc-out arp off addrgenmode none up
link set dev lo up
address flush dev lo
";

/// An end of the veth pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// `pc-in`, where programs are attached.
    In,
    /// `pc-out`, which stands for the wire.
    Out,
}

impl Side {
    fn name(self) -> &'static CStr {
        match self {
            Side::In => c"pc-in",
            Side::Out => c"pc-out",
        }
    }

    fn other(self) -> Self {
        match self {
            Side::In => Side::Out,
            Side::Out => Side::In,
        }
    }
}

/// Which hook of `pc-in` a frame is sent past.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Out of `pc-out` into `pc-in`, and seen there after XDP but before TC ingress.
    Ingress,
    /// The same, but seen after TC ingress: a filter behind all others sends what they let
    /// pass (`TC_ACT_UNSPEC`) to the loopback device. `TC_ACT_OK` would go round that filter.
    TcIngress,
    /// Out of `pc-in` past its TC egress, and seen at `pc-out`.
    Egress,
}

impl Direction {
    fn sender(self) -> Side {
        match self {
            Direction::Ingress | Direction::TcIngress => Side::Out,
            Direction::Egress => Side::In,
        }
    }
}

impl From<Hook> for Direction {
    fn from(hook: Hook) -> Self {
        match hook {
            Hook::Xdp => Direction::Ingress,
            Hook::TcIngress => Direction::TcIngress,
            Hook::TcEgress => Direction::Egress,
        }
    }
}

/// What became of a frame. A VLAN tag the kernel took out of it is back in its place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// The frame as it came past the hook; none if it was dropped, or sent elsewhere.
    pub passed: Option<Vec<u8>>,
    /// The frame as it came back to the end it was sent from (`XDP_TX`, or a TC redirect).
    pub returned: Option<Vec<u8>>,
    /// Frames seen beyond those two: copies that a program made.
    pub copies: usize,
}

/// A veth pair in a network namespace without a name. Dropping it removes everything, unless
/// something else keeps the namespace (a process left in it, or an open socket).
#[derive(Debug)]
pub struct VethCarrier {
    namespace: OwnedFd,
    inner: End,
    outer: End,
    /// Sees what the filter after TC ingress sends to the loopback device.
    loopback: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug)]
struct End {
    index: u32,
    sender: OwnedFd,
    receiver: OwnedFd,
}

/// What one send at a time may use.
#[derive(Debug)]
struct State {
    nonce: [u8; 8],
    markers: u64,
    buffer: Vec<u8>,
}

/// Whether the kernel took a frame; at egress a program that drops it is seen at once.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sent {
    Taken,
    Dropped,
}

/// Frames seen while waiting.
#[derive(Default)]
struct Seen {
    passed: Vec<Vec<u8>>,
    returned: Vec<Vec<u8>>,
}

impl Seen {
    fn is_empty(&self) -> bool {
        self.passed.is_empty() && self.returned.is_empty()
    }
}

/// The two sockets a frame can appear at.
struct Watched<'a> {
    passed: &'a OwnedFd,
    returned: &'a OwnedFd,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Passed,
    Returned,
}

impl VethCarrier {
    /// Makes the namespace and its devices. Needs `CAP_SYS_ADMIN`, `CAP_NET_ADMIN`, `CAP_NET_RAW`,
    /// `CAP_BPF` and the `ip` command.
    ///
    /// # Errors
    /// [`Refused`] (denied) if a permission or `ip` is missing; else what the system said.
    pub fn new() -> Result<Self> {
        thread::scope(|scope| {
            let made = thread::Builder::new()
                .name("veth carrier".into())
                .spawn_scoped(scope, build)
                .context("starting a thread")?;
            join(made)
        })
    }

    /// Runs `f` inside the namespace, on a thread of its own: its devices exist for `f` only, for
    /// example to attach a program by [`VethCarrier::device`]. A panic of `f` goes on in the caller.
    ///
    /// # Errors
    /// The thread cannot be started or may not enter the namespace; `f` has not run then.
    pub fn in_namespace<R: Send>(&self, f: impl FnOnce() -> R + Send) -> Result<R> {
        thread::scope(|scope| {
            let entered = thread::Builder::new()
                .name("veth carrier".into())
                .spawn_scoped(scope, || {
                    setns(&self.namespace, CloneFlags::CLONE_NEWNET)
                        .context("entering the namespace of the veth carrier")?;
                    Ok(f())
                })
                .context("starting a thread")?;
            join(entered)
        })
    }

    /// Interface index of an end, valid inside the namespace.
    pub fn device(&self, side: Side) -> u32 {
        self.end(side).index
    }

    fn end(&self, side: Side) -> &End {
        match side {
            Side::In => &self.inner,
            Side::Out => &self.outer,
        }
    }

    /// Sends one frame past a hook of `pc-in` and tells what became of it. One caller at a time is
    /// served; its thread stays on one CPU meanwhile.
    ///
    /// # Errors
    /// [`Refused`] (state) if the frame is shorter than an Ethernet header or longer than
    /// [`MAX_FRAME`]: no device of the kernel would carry it.
    pub fn send(&self, direction: Direction, frame: &[u8]) -> Result<Observation> {
        check_len(frame)?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let _pinned = Pinned::new()?;
        let watched = Watched {
            passed: match direction {
                Direction::TcIngress => &self.loopback,
                _ => &self.end(direction.sender().other()).receiver,
            },
            returned: &self.end(direction.sender()).receiver,
        };
        state.collect(&watched, &mut Seen::default())?;

        let mut seen = Seen::default();
        self.transmit(direction.sender(), frame)?;
        self.mark(
            &mut state,
            direction.sender(),
            At::Passed,
            &watched,
            &mut seen,
        )?;
        let back = direction.sender().other();
        self.mark(&mut state, back, At::Returned, &watched, &mut seen)?;
        Ok(observation(seen))
    }

    /// Sends a marker and collects frames until it arrives. The marker of the frame's own way is
    /// not waited for once the frame has been seen.
    fn mark(
        &self,
        state: &mut State,
        sender: Side,
        at: At,
        watched: &Watched,
        seen: &mut Seen,
    ) -> Result<()> {
        let marker = state.next_marker();
        let sent = self.transmit(sender, &marker)?;
        let deadline = Instant::now() + MARKER_TIMEOUT;
        loop {
            let arrived = state.collect(watched, seen)?;
            let known = at == At::Passed && !seen.is_empty();
            if arrived.contains(&at) || known || sent == Sent::Dropped {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            wait(watched, left)?;
        }
    }

    fn transmit(&self, side: Side, frame: &[u8]) -> Result<Sent> {
        // `struct virtio_net_hdr`: only `hdr_len` is set, to say how much is to be linear.
        let mut header = [0u8; 10];
        let linear = frame.len().min(LINEAR) as u16;
        header[2..4].copy_from_slice(&linear.to_ne_bytes());
        let parts = [io::IoSlice::new(&header), io::IoSlice::new(frame)];
        let socket = self.end(side).sender.as_raw_fd();
        // SAFETY: an `IoSlice` has the layout of an `iovec`; both outlive the call, which reads them.
        let sent = unsafe { libc::writev(socket, parts.as_ptr().cast(), 2) };
        if sent >= 0 {
            return Ok(Sent::Taken);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // What the kernel makes of a drop at TC egress.
            Some(libc::ENOBUFS) if side == Side::In => Ok(Sent::Dropped),
            Some(libc::EMSGSIZE) => Err(too_long(frame).into()),
            _ => Err(anyhow!(error).context(format!("sending a frame of {} bytes", frame.len()))),
        }
    }
}

fn check_len(frame: &[u8]) -> Result<()> {
    if frame.len() < ETHERNET_HEADER {
        return Err(Refused::state(
            format!("a frame of {} bytes cannot be sent", frame.len()),
            "it is shorter than an Ethernet header (14 bytes), and no device carries such a frame",
            "leave it out, or replay a capture that holds whole headers",
        )
        .into());
    }
    if frame.len() > MAX_FRAME + VLAN_TAG {
        return Err(too_long(frame).into());
    }
    Ok(())
}

fn too_long(frame: &[u8]) -> Refused {
    Refused::state(
        format!("a frame of {} bytes cannot be sent", frame.len()),
        format!("a virtual device carries at most {MAX_FRAME} bytes"),
        "leave it out of the capture",
    )
}

fn observation(seen: Seen) -> Observation {
    let copies = seen.passed.len().saturating_sub(1) + seen.returned.len().saturating_sub(1);
    Observation {
        passed: seen.passed.into_iter().next(),
        returned: seen.returned.into_iter().next(),
        copies,
    }
}

impl State {
    /// A frame that nothing but this send can have made: nonce and number follow its header.
    fn next_marker(&mut self) -> Vec<u8> {
        self.markers += 1;
        let mut marker = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        marker.extend(MARKER_ETHERTYPE.to_be_bytes());
        marker.extend(self.nonce);
        marker.extend(self.markers.to_be_bytes());
        marker.resize(60, 0);
        marker
    }

    /// The number of a marker, wherever a program has moved it to.
    fn marker_number(&self, frame: &[u8]) -> Option<u64> {
        let start = &frame[..frame.len().min(LINEAR)];
        let at = start.windows(8).position(|bytes| bytes == self.nonce)?;
        let number = start.get(at + 8..at + 16)?;
        Some(u64::from_be_bytes(number.try_into().ok()?))
    }

    /// Takes what has arrived, and tells where the latest marker has.
    fn collect(&mut self, watched: &Watched, seen: &mut Seen) -> Result<Vec<At>> {
        let mut arrived = Vec::new();
        for (socket, at) in [
            (watched.passed, At::Passed),
            (watched.returned, At::Returned),
        ] {
            while let Some(frame) = receive(socket, &mut self.buffer)? {
                match (self.marker_number(&frame), at) {
                    (Some(number), _) if number == self.markers => arrived.push(at),
                    (Some(_), _) => {}
                    (None, At::Passed) => seen.passed.push(frame),
                    (None, At::Returned) => seen.returned.push(frame),
                }
            }
        }
        Ok(arrived)
    }
}

fn wait(watched: &Watched, left: Duration) -> Result<()> {
    let mut sockets =
        [watched.passed, watched.returned].map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
    // Rounded up, or the last millisecond would be spent in a loop.
    let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or_default();
    match poll(&mut sockets, timeout) {
        Ok(_) | Err(nix::Error::EINTR) => Ok(()),
        Err(error) => Err(error).context("waiting for a frame"),
    }
}

fn join<T>(thread: thread::ScopedJoinHandle<Result<T>>) -> Result<T> {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Makes the carrier on a thread that may leave its namespace for good.
fn build() -> Result<VethCarrier> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(|error| match error {
        nix::Error::EPERM => denied("a network namespace cannot be made", error),
        _ => anyhow!(error).context("making a network namespace"),
    })?;
    let namespace = fs::File::open("/proc/thread-self/ns/net")
        .context("opening the new network namespace")?
        .into();
    disable_ipv6()?;
    set_up_devices()?;
    let index = |name| nix::net::if_::if_nametoindex(name).context("finding a device just made");
    let (inner, outer) = (index(Side::In.name())?, index(Side::Out.name())?);
    // A frame sent back by XDP_TX is dropped unless the end that is to receive it polls, which GRO
    // turns on. Frames go that way, too, and so in order, only where their sender has no TSO.
    set_feature(Side::Out.name(), ETHTOOL_SGRO, true)?;
    set_feature(Side::In.name(), ETHTOOL_STSO, false)?;
    let loopback = index(LOOPBACK)?;
    redirect_after_tc_ingress(inner, loopback)?;
    let mut nonce = [0; 8];
    fs::File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut nonce))
        .context("reading /dev/urandom")?;
    Ok(VethCarrier {
        namespace,
        inner: End::open(inner)?,
        outer: End::open(outer)?,
        loopback: receiver(loopback, Packets::Outgoing)?,
        state: Mutex::new(State {
            nonce,
            markers: 0,
            buffer: vec![0; RECEIVE_BUFFER],
        }),
    })
}

fn denied(what: &str, why: impl std::fmt::Display) -> anyhow::Error {
    Refused::denied(
        what,
        why,
        "run as root, or with CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF",
    )
    .into()
}

/// For devices made from now on. A kernel without IPv6 has nothing to disable.
fn disable_ipv6() -> Result<()> {
    for device in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6");
        match fs::write(&path, "1") {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("writing {path}"));
            }
            _ => {}
        }
    }
    Ok(())
}

fn set_up_devices() -> Result<()> {
    let mut ip = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| {
            Refused::denied(
                "the command `ip` cannot be run",
                error,
                "install iproute2, and have its folder in PATH",
            )
        })?;
    let written = match ip.stdin.take() {
        Some(mut stdin) => stdin.write_all(SET_UP.as_bytes()),
        None => Ok(()),
    };
    // What `ip` has to say comes before an error of writing to it, which would follow from it.
    let output = ip.wait_with_output().context("waiting for `ip`")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("making a pair of veth devices: `ip`: {}", said.trim());
    }
    written.context("writing to `ip`")
}

const ETHTOOL_STSO: u32 = 0x1f;
const ETHTOOL_SGRO: u32 = 0x2c;

/// `struct ethtool_value` of `linux/ethtool.h`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    value: u32,
}

/// Turns an offload of a device of this namespace on or off.
fn set_feature(device: &CStr, command: u32, on: bool) -> Result<()> {
    let socket = new_socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    let mut value = EthtoolValue {
        command,
        value: on.into(),
    };
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(device.to_bytes()) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request names a device and points to the structure this command takes; both
    // outlive the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &request) };
    check(result).with_context(|| format!("setting an offload of {}", device.to_string_lossy()))?;
    Ok(())
}

fn instruction(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> libbpf_sys::bpf_insn {
    libbpf_sys::bpf_insn {
        code,
        _bitfield_align_1: [],
        _bitfield_1: libbpf_sys::bpf_insn::new_bitfield_1(dst, src),
        off,
        imm,
    }
}

/// Attaches `return bpf_redirect(target, 0)` behind everything else at a device's TC ingress.
fn redirect_after_tc_ingress(device: u32, target: u32) -> Result<()> {
    const MOV64_IMMEDIATE: u8 = 0xb7;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    let program = [
        instruction(MOV64_IMMEDIATE, 1, 0, 0, target as i32),
        instruction(MOV64_IMMEDIATE, 2, 0, 0, 0),
        instruction(CALL, 0, 0, 0, libbpf_sys::BPF_FUNC_redirect as i32),
        instruction(EXIT, 0, 0, 0, 0),
    ];
    let program = load(libbpf_sys::BPF_PROG_TYPE_SCHED_CLS, &program)?;
    let mut hook = libbpf_sys::bpf_tc_hook {
        sz: mem::size_of::<libbpf_sys::bpf_tc_hook>() as _,
        ifindex: device as libc::c_int,
        attach_point: libbpf_sys::BPF_TC_INGRESS,
        ..Default::default()
    };
    let mut opts = libbpf_sys::bpf_tc_opts {
        sz: mem::size_of::<libbpf_sys::bpf_tc_opts>() as _,
        prog_fd: program.as_raw_fd(),
        handle: 1,
        priority: LAST_PRIORITY,
        ..Default::default()
    };
    // SAFETY: a valid structure that outlives the call.
    check(unsafe { libbpf_sys::bpf_tc_hook_create(&mut hook) }).context("making a TC hook")?;
    // SAFETY: valid structures that outlive the call; the program is open during it.
    check(unsafe { libbpf_sys::bpf_tc_attach(&hook, &mut opts) })
        .context("attaching a TC program")?;
    Ok(())
}

fn load(kind: u32, program: &[libbpf_sys::bpf_insn]) -> Result<OwnedFd> {
    // SAFETY: the name, licence and instructions outlive the call; no options.
    let result = unsafe {
        libbpf_sys::bpf_prog_load(
            kind,
            c"pc_carrier".as_ptr(),
            c"Dual MIT/GPL".as_ptr(),
            program.as_ptr(),
            program.len() as _,
            std::ptr::null_mut(),
        )
    };
    let fd = check(result).map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => denied("a BPF program cannot be loaded", error),
        _ => anyhow!(error).context("loading a BPF program"),
    })?;
    // SAFETY: a descriptor just opened, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The result of a call that is negative on errors and sets `errno`.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

impl End {
    fn open(index: u32) -> Result<Self> {
        let sender = packet_socket()?;
        set_option(&sender, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
        // Protocol 0: it receives nothing.
        bind(&sender, index, 0)?;
        Ok(End {
            index,
            sender,
            receiver: receiver(index, Packets::Incoming)?,
        })
    }
}

/// Packets of a device to receive.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Packets {
    Incoming,
    Outgoing,
}

fn receiver(index: u32, packets: Packets) -> Result<OwnedFd> {
    let socket = packet_socket()?;
    set_option(&socket, libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;
    set_option(
        &socket,
        libc::SOL_SOCKET,
        libc::SO_RCVBUFFORCE,
        SOCKET_BUFFER,
    )?;
    match packets {
        Packets::Incoming => {
            set_option(&socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
        }
        Packets::Outgoing => keep_outgoing(&socket)?,
    }
    bind(&socket, index, libc::ETH_P_ALL as u16)?;
    Ok(socket)
}

/// A socket filter that keeps only packets on their way out.
fn keep_outgoing(socket: &OwnedFd) -> Result<()> {
    const LOAD_ABSOLUTE_BYTE: u16 = 0x30;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    /// `SKF_AD_OFF + SKF_AD_PKTTYPE`
    const PACKET_TYPE: u32 = (-0x1000i32 + 4) as u32;
    let step = |code, jf, k| libc::sock_filter { code, jt: 0, jf, k };
    let mut filter = [
        step(LOAD_ABSOLUTE_BYTE, 0, PACKET_TYPE),
        step(JUMP_IF_EQUAL, 1, libc::PACKET_OUTGOING.into()),
        step(RETURN, 0, u32::MAX),
        step(RETURN, 0, 0),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    set_option(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, program)
}

fn new_socket(family: libc::c_int, kind: libc::c_int) -> Result<OwnedFd> {
    // SAFETY: no pointers.
    let result = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, 0) };
    let fd = check(result).map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => denied("a packet socket cannot be opened", error),
        _ => anyhow!(error).context("opening a socket"),
    })?;
    // SAFETY: a descriptor just opened, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Receives nothing before it is bound to a device and a protocol.
fn packet_socket() -> Result<OwnedFd> {
    new_socket(libc::AF_PACKET, libc::SOCK_RAW)
}

fn set_option<T>(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: T) -> Result<()> {
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

fn bind(socket: &OwnedFd, index: u32, protocol: u16) -> Result<()> {
    // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index as libc::c_int;
    // SAFETY: the address outlives the call, and the length is its own.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    check(result).context("binding a packet socket")?;
    Ok(())
}

/// The next frame that has arrived, if one has.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Result<Option<Vec<u8>>> {
    // Aligned as a `cmsghdr` is; room for one with `struct tpacket_auxdata`.
    let mut control = [0u64; 8];
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
    let mut frame = received.to_vec();
    if let Some(tag) = vlan_tag(&message) {
        frame.splice(12..12, tag);
    }
    Ok(Some(frame))
}

/// The VLAN tag that the kernel took out of a received frame, as it was on the wire.
fn vlan_tag(message: &libc::msghdr) -> Option<[u8; VLAN_TAG]> {
    // SAFETY: `recvmsg` has filled the message; its control buffer is still there.
    let header = unsafe { libc::CMSG_FIRSTHDR(message).as_ref() }?;
    let is_auxdata =
        header.cmsg_level == libc::SOL_PACKET && header.cmsg_type == libc::PACKET_AUXDATA;
    if !is_auxdata {
        return None;
    }
    // SAFETY: a control message of this type carries a `tpacket_auxdata`, maybe not aligned.
    let data: libc::tpacket_auxdata = unsafe { libc::CMSG_DATA(header).cast().read_unaligned() };
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

/// Keeps the calling thread on its CPU: frames sent from one CPU stay in order.
struct Pinned {
    before: CpuSet,
}

impl Pinned {
    fn new() -> Result<Self> {
        let this_thread = Pid::from_raw(0);
        let pinned = || -> nix::Result<Self> {
            let before = sched_getaffinity(this_thread)?;
            let mut one = CpuSet::new();
            one.set(sched_getcpu()?)?;
            sched_setaffinity(this_thread, &one)?;
            Ok(Pinned { before })
        };
        pinned().context("keeping a thread on its CPU")
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // The CPUs may have gone meanwhile; the kernel has moved the thread then.
        let _ = sched_setaffinity(Pid::from_raw(0), &self.before);
    }
}
