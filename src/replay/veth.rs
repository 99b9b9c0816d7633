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
//! arrived too. Programs see the markers: **they count one packet more** for each frame, and so do
//! programs at the hooks of the other direction. A chain that drops the marker as well costs
//! [`MARKER_TIMEOUT`] for each frame it drops at ingress.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;

use crate::engine::sys::{self, TcDirection, XdpMode};
use crate::error::Refused;
use crate::hook::Hook;
use crate::netns::Namespace;
use crate::packet_socket::{self, bind, check, receive, set_option};

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
    fn name(self) -> &'static str {
        match self {
            Side::In => "pc-in",
            Side::Out => "pc-out",
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
    namespace: Namespace,
    inner: End,
    outer: End,
    /// Sees what the filter after TC ingress sends to the loopback device.
    loopback: OwnedFd,
    /// Keeps [`pass_xdp`]'s program attached.
    _pass: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug)]
struct End {
    index: u32,
    sender: fs::File,
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
    /// [`Refused`] (denied) if a permission is missing, (state) if `ip` is; else what the system
    /// said.
    pub fn new() -> Result<Self> {
        let namespace = Namespace::unnamed("of the veth carrier")?;
        namespace.enter(disable_ipv6)??;
        namespace.ip_batch(SET_UP)?;
        let inside = namespace.clone();
        namespace.enter(|| build(inside))?
    }

    /// Runs `f` inside the namespace, on a thread of its own: its devices exist for `f` only, for
    /// example to attach a program by [`VethCarrier::device`]. A panic of `f` goes on in the caller.
    ///
    /// # Errors
    /// The thread cannot be started or may not enter the namespace; `f` has not run then.
    pub fn in_namespace<R: Send>(&self, f: impl FnOnce() -> R + Send) -> Result<R> {
        self.namespace.enter(f)
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
        let mut socket = &self.end(side).sender;
        let Err(error) = socket.write_vectored(&parts) else {
            return Ok(Sent::Taken);
        };
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
                let frame = frame.bytes;
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
    let timeout =
        PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::ZERO);
    match poll(&mut sockets, timeout) {
        Ok(_) | Err(nix::Error::EINTR) => Ok(()),
        Err(error) => Err(error).context("waiting for a frame"),
    }
}

/// Makes the rest, inside the namespace.
fn build(namespace: Namespace) -> Result<VethCarrier> {
    let index = |name| sys::device_index(name).context("finding a device just made");
    let (inner, outer) = (index(Side::In.name())?, index(Side::Out.name())?);
    let loopback = index("lo")?;
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
        _pass: pass_xdp(outer)?,
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

fn instruction(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> libbpf_sys::bpf_insn {
    libbpf_sys::bpf_insn {
        code,
        _bitfield_align_1: [],
        _bitfield_1: libbpf_sys::bpf_insn::new_bitfield_1(dst, src),
        off,
        imm,
    }
}

const MOV64_IMMEDIATE: u8 = 0xb7;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// Attaches an XDP program that passes everything. A frame that the peer sends back by `XDP_TX`
/// arrives only where one is; and all other frames then take the same queue, in order.
fn pass_xdp(device: u32) -> Result<OwnedFd> {
    const XDP_PASS: i32 = 2;
    let program = [
        instruction(MOV64_IMMEDIATE, 0, 0, 0, XDP_PASS),
        instruction(EXIT, 0, 0, 0, 0),
    ];
    // Without fragments the MTU would be too large.
    let flags = libbpf_sys::BPF_F_XDP_HAS_FRAGS;
    let program = load(libbpf_sys::BPF_PROG_TYPE_XDP, &program, flags)?;
    sys::xdp_link_create(&program, device, XdpMode::Native).context("attaching an XDP program")
}

/// Attaches `return bpf_redirect(target, 0)` behind everything else at a device's TC ingress.
fn redirect_after_tc_ingress(device: u32, target: u32) -> Result<()> {
    let program = [
        instruction(MOV64_IMMEDIATE, 1, 0, 0, target as i32),
        instruction(MOV64_IMMEDIATE, 2, 0, 0, 0),
        instruction(CALL, 0, 0, 0, libbpf_sys::BPF_FUNC_redirect as i32),
        instruction(EXIT, 0, 0, 0, 0),
    ];
    let program = load(libbpf_sys::BPF_PROG_TYPE_SCHED_CLS, &program, 0)?;
    sys::clsact_attach(
        &program,
        device,
        TcDirection::Ingress,
        1,
        LAST_PRIORITY,
        false,
    )
    .context("attaching a TC program")?;
    Ok(())
}

fn load(kind: u32, program: &[libbpf_sys::bpf_insn], flags: u32) -> Result<OwnedFd> {
    let mut opts = libbpf_sys::bpf_prog_load_opts {
        sz: mem::size_of::<libbpf_sys::bpf_prog_load_opts>() as _,
        prog_flags: flags,
        ..Default::default()
    };
    // SAFETY: name, licence, instructions and options outlive the call.
    let result = unsafe {
        libbpf_sys::bpf_prog_load(
            kind,
            c"pc_carrier".as_ptr(),
            c"Dual MIT/GPL".as_ptr(),
            program.as_ptr(),
            program.len() as _,
            &mut opts,
        )
    };
    let fd = check(result).map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => denied("a BPF program cannot be loaded", error),
        _ => anyhow!(error).context("loading a BPF program"),
    })?;
    // SAFETY: a descriptor just opened, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl End {
    fn open(index: u32) -> Result<Self> {
        let sender = packet_socket::open()?;
        set_option(&sender, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
        // Protocol 0: it receives nothing.
        bind(&sender, index, 0)?;
        Ok(End {
            index,
            sender: sender.into(),
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
    let socket = packet_socket::open()?;
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::thread;

    use super::*;
    use crate::error::exit_code;

    const XDP_DROP: i32 = 1;
    const XDP_PASS: i32 = 2;
    const XDP_TX: i32 = 3;
    const TC_ACT_UNSPEC: i32 = -1;
    const TC_ACT_SHOT: i32 = 2;
    /// In host order, as a program loads it.
    const IPV4: i32 = 0x0800u16.to_be() as i32;
    const FREE_RUN: Duration = Duration::from_millis(150);

    /// A carrier, or nothing (with a message) without root.
    fn carrier() -> Option<VethCarrier> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        Some(VethCarrier::new().unwrap())
    }

    type Program = Vec<libbpf_sys::bpf_insn>;

    fn always(verdict: i32) -> Program {
        vec![
            instruction(0xb7, 0, 0, 0, verdict),
            instruction(0x95, 0, 0, 0, 0),
        ]
    }

    /// `verdict` for EtherType `ethertype` (host order), else `other`. `data` and `data_end` stand
    /// at `context` and the word after it.
    fn if_ethertype(context: i16, ethertype: i32, verdict: i32, other: i32) -> Program {
        vec![
            instruction(0x61, 2, 1, context, 0),
            instruction(0x61, 3, 1, context + 4, 0),
            instruction(0xb7, 0, 0, 0, other),
            instruction(0xbf, 4, 2, 0, 0),
            instruction(0x07, 4, 0, 0, 14),
            instruction(0x2d, 4, 3, 3, 0),
            instruction(0x69, 5, 2, 12, 0),
            instruction(0x55, 5, 0, 1, ethertype),
            instruction(0xb7, 0, 0, 0, verdict),
            instruction(0x95, 0, 0, 0, 0),
        ]
    }

    /// XDP: drop IPv4, pass the rest.
    fn xdp_drop_ipv4() -> Program {
        if_ethertype(0, IPV4, XDP_DROP, XDP_PASS)
    }

    fn tc_drop_ipv4() -> Program {
        if_ethertype(76, IPV4, TC_ACT_SHOT, TC_ACT_UNSPEC)
    }

    /// TC: call a helper with up to three arguments, then go on.
    fn tc_call(helper: u32, arguments: &[i32], verdict: i32) -> Program {
        let mut program: Program = arguments
            .iter()
            .enumerate()
            .map(|(number, value)| instruction(0xb7, 2 + number as u8, 0, 0, *value))
            .collect();
        program.push(instruction(0x85, 0, 0, 0, helper as i32));
        program.extend(always(verdict));
        program
    }

    fn attach(carrier: &VethCarrier, program: &OwnedFd, kind: u32) -> OwnedFd {
        let device = carrier.device(Side::In) as libc::c_int;
        let link = carrier.in_namespace(|| {
            let program = program.as_raw_fd();
            // SAFETY: no options.
            check(unsafe {
                libbpf_sys::bpf_link_create(program, device, kind, std::ptr::null_mut())
            })
        });
        // SAFETY: just opened.
        unsafe { OwnedFd::from_raw_fd(link.unwrap().unwrap()) }
    }

    fn attach_xdp(carrier: &VethCarrier, program: &[libbpf_sys::bpf_insn]) -> OwnedFd {
        let flags = libbpf_sys::BPF_F_XDP_HAS_FRAGS;
        let program = load(libbpf_sys::BPF_PROG_TYPE_XDP, program, flags).unwrap();
        attach(carrier, &program, libbpf_sys::BPF_XDP)
    }

    fn attach_tc(
        carrier: &VethCarrier,
        program: &[libbpf_sys::bpf_insn],
        direction: Direction,
    ) -> OwnedFd {
        let program = load(libbpf_sys::BPF_PROG_TYPE_SCHED_CLS, program, 0).unwrap();
        let kind = match direction {
            Direction::Egress => libbpf_sys::BPF_TCX_EGRESS,
            _ => libbpf_sys::BPF_TCX_INGRESS,
        };
        attach(carrier, &program, kind)
    }

    const DIRECTIONS: [Direction; 3] =
        [Direction::Ingress, Direction::TcIngress, Direction::Egress];

    fn frame(ethertype: u16, len: usize) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8];
        frame.extend(ethertype.to_be_bytes());
        frame.extend((0..len - 14).map(|at| (at * 7) as u8));
        frame
    }

    fn passed(frame: &[u8]) -> Observation {
        Observation {
            passed: Some(frame.to_vec()),
            ..Observation::default()
        }
    }

    fn returned(frame: &[u8]) -> Observation {
        Observation {
            returned: Some(frame.to_vec()),
            ..Observation::default()
        }
    }

    /// Real-looking TCP, which GRO would hold back; its checksums are right.
    fn tcp(payload: usize) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 8, 0];
        let mut ip = vec![0x45, 0];
        ip.extend(((40 + payload) as u16).to_be_bytes());
        ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let mut segment = vec![0x30, 0x39, 0, 80, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0];
        segment.extend([0; 4]);
        segment.extend((0..payload).map(|at| at as u8));
        let sum = |bytes: &[u8], start: u32| {
            let words = bytes
                .chunks(2)
                .map(|word| u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0)));
            let mut sum = start + words.sum::<u32>();
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            (!(sum as u16)).to_be_bytes()
        };
        let header = sum(&ip, 0);
        ip[10..12].copy_from_slice(&header);
        let pseudo = 0x0a00 + 1 + 0x0a00 + 2 + 6 + segment.len() as u32;
        let whole = sum(&segment, pseudo);
        segment[16..18].copy_from_slice(&whole);
        frame.extend(ip);
        frame.extend(segment);
        frame
    }

    #[test]
    fn frames_of_every_length_arrive_unchanged() {
        let Some(carrier) = carrier() else { return };
        let lengths = [
            14, 15, 20, 33, 34, 53, 54, 60, 255, 256, 257, 1514, 3712, 3713, 4096, 9014, 65_000,
            65_535, 65_548, MAX_FRAME,
        ];
        for direction in DIRECTIONS {
            for ethertype in [
                0x0800, 0x86dd, 0x0806, 0x88b5, 0x88cc, 0x0004, 0xffff, 0x05dc,
            ] {
                for len in lengths {
                    let frame = frame(ethertype, len);
                    let seen = carrier.send(direction, &frame).unwrap();
                    assert!(
                        seen == passed(&frame),
                        "{direction:?} {ethertype:#x} {len}: {:?} {:?}",
                        seen.passed.map(|frame| frame.len()),
                        seen.returned.map(|frame| frame.len())
                    );
                }
            }
            for payload in [0, 1, 100, 1460, 60_000] {
                let frame = tcp(payload);
                assert_eq!(carrier.send(direction, &frame).unwrap(), passed(&frame));
            }
        }
    }

    #[test]
    fn frames_of_every_length_pass_a_native_xdp_program() {
        let Some(carrier) = carrier() else { return };
        let _link = attach_xdp(&carrier, &always(XDP_PASS));
        for len in [
            14, 15, 33, 34, 60, 1514, 3713, 4096, 9014, 65_000, MAX_FRAME,
        ] {
            let frame = frame(0x0800, len);
            let seen = carrier.send(Direction::Ingress, &frame).unwrap();
            assert!(
                seen == passed(&frame),
                "{len}: {:?}",
                seen.passed.map(|f| f.len())
            );
        }
        for payload in [0, 1, 100, 1460, 60_000] {
            let frame = tcp(payload);
            assert_eq!(
                carrier.send(Direction::Ingress, &frame).unwrap(),
                passed(&frame)
            );
        }
    }

    #[test]
    fn frames_no_device_carries_are_refused() {
        let Some(carrier) = carrier() else { return };
        for direction in DIRECTIONS {
            for len in [
                0,
                1,
                13,
                MAX_FRAME + 1,
                MAX_FRAME + 4,
                MAX_FRAME + 5,
                200_000,
            ] {
                let error = carrier.send(direction, &vec![0; len]).unwrap_err();
                assert_eq!(exit_code(&error), 1);
                let refused: Refused = error.downcast().unwrap();
                let why = if len < 14 {
                    "shorter than an Ethernet header"
                } else {
                    "at most 65549"
                };
                assert!(refused.why.contains(why), "{len}: {refused}");
            }
        }
    }

    #[test]
    fn vlan_tags_are_back_in_their_place() {
        let Some(carrier) = carrier() else { return };
        let link = attach_xdp(&carrier, &always(XDP_PASS));
        for native in [true, false] {
            for tags in [
                &[0x81, 0, 0x60, 5][..],
                &[0x81, 0, 0, 0],
                &[0x88, 0xa8, 0, 6, 0x81, 0, 0, 5],
                &[0x81, 0, 0xff, 0xff, 0x81, 0, 0, 5],
            ] {
                let mut frame = tcp(100);
                frame.splice(12..12, tags.iter().copied());
                for direction in DIRECTIONS {
                    assert_eq!(
                        carrier.send(direction, &frame).unwrap(),
                        passed(&frame),
                        "{direction:?} {tags:x?} native: {native}"
                    );
                }
            }
            if native {
                carrier.in_namespace(|| detach(&link)).unwrap();
            }
        }
        let mut longest = frame(0x8100, MAX_FRAME + 4);
        longest[14..18].copy_from_slice(&[0, 5, 8, 0]);
        for direction in DIRECTIONS {
            let seen = carrier.send(direction, &longest).unwrap();
            assert!(seen == passed(&longest), "{direction:?}");
        }
    }

    fn detach(link: &OwnedFd) {
        // SAFETY: no pointers.
        check(unsafe { libbpf_sys::bpf_link_detach(link.as_raw_fd()) }).unwrap();
    }

    #[test]
    fn drops_are_told_by_the_marker_without_waiting() {
        let Some(carrier) = carrier() else { return };
        let _links = [
            attach_xdp(&carrier, &xdp_drop_ipv4()),
            attach_tc(&carrier, &tc_drop_ipv4(), Direction::Egress),
        ];
        for direction in [Direction::Ingress, Direction::Egress] {
            let start = Instant::now();
            for round in 0..20 {
                let dropped = carrier.send(direction, &tcp(5000)).unwrap();
                assert_eq!(dropped, Observation::default(), "{direction:?} {round}");
                let other = frame(0x86dd, 5000);
                assert_eq!(carrier.send(direction, &other).unwrap(), passed(&other));
            }
            assert!(start.elapsed() < FREE_RUN * 10, "{direction:?}");
        }
    }

    #[test]
    fn tc_ingress_drops_are_seen_behind_the_program() {
        let Some(carrier) = carrier() else { return };
        let _link = attach_tc(&carrier, &tc_drop_ipv4(), Direction::TcIngress);
        let dropped = tcp(5000);
        let other = frame(0x86dd, 5000);
        for _ in 0..20 {
            let seen = carrier.send(Direction::TcIngress, &dropped).unwrap();
            assert_eq!(seen, Observation::default());
            let seen = carrier.send(Direction::TcIngress, &other).unwrap();
            assert_eq!(seen, passed(&other));
            let seen = carrier.send(Direction::Ingress, &dropped).unwrap();
            assert_eq!(seen, passed(&dropped));
        }
    }

    #[test]
    fn a_program_that_drops_everything_costs_the_timeout_at_ingress_only() {
        let Some(carrier) = carrier() else { return };
        let link = attach_xdp(&carrier, &always(XDP_DROP));
        let start = Instant::now();
        let seen = carrier.send(Direction::Ingress, &tcp(1)).unwrap();
        assert_eq!(seen, Observation::default());
        assert!(start.elapsed() >= MARKER_TIMEOUT);
        assert!(start.elapsed() < MARKER_TIMEOUT * 2);
        carrier.in_namespace(|| detach(&link)).unwrap();
        let seen = carrier.send(Direction::Ingress, &tcp(1)).unwrap();
        assert_eq!(seen, passed(&tcp(1)));

        let program = always(TC_ACT_SHOT);
        let _link = attach_tc(&carrier, &program, Direction::Egress);
        let start = Instant::now();
        let seen = carrier.send(Direction::Egress, &tcp(1)).unwrap();
        assert_eq!(seen, Observation::default());
        assert!(start.elapsed() < FREE_RUN);
    }

    #[test]
    fn frames_sent_back_are_seen_at_the_sender() {
        let Some(carrier) = carrier() else { return };
        for program in [
            if_ethertype(0, IPV4, XDP_TX, XDP_PASS),
            always(XDP_TX),
            if_ethertype(0, IPV4, XDP_TX, XDP_DROP),
        ] {
            let link = attach_xdp(&carrier, &program);
            let start = Instant::now();
            for round in 0..50 {
                for frame in [tcp(100), frame(0x0800, 1514), frame(0x0800, 3000)] {
                    let seen = carrier.send(Direction::Ingress, &frame).unwrap();
                    assert_eq!(seen, returned(&frame), "{round}");
                }
            }
            assert!(start.elapsed() < FREE_RUN * 10);
            carrier.in_namespace(|| detach(&link)).unwrap();
        }
    }

    #[test]
    fn tc_redirects_to_the_sender_and_copies_are_seen() {
        let Some(carrier) = carrier() else { return };
        let device = carrier.device(Side::In) as i32;
        let redirect = |flags| {
            // `return bpf_redirect(device, flags)`: its argument stands in r1.
            vec![
                instruction(0xb7, 1, 0, 0, device),
                instruction(0xb7, 2, 0, 0, flags),
                instruction(0x85, 0, 0, 0, libbpf_sys::BPF_FUNC_redirect as i32),
                instruction(0x95, 0, 0, 0, 0),
            ]
        };
        let copy = libbpf_sys::BPF_FUNC_clone_redirect;
        for (direction, flags) in [(Direction::TcIngress, 0), (Direction::Egress, 1)] {
            let link = attach_tc(&carrier, &redirect(flags), direction);
            let frame = tcp(5000);
            let seen = carrier.send(direction, &frame).unwrap();
            assert_eq!(seen, returned(&frame), "{direction:?}");
            carrier.in_namespace(|| detach(&link)).unwrap();

            let program = tc_call(copy, &[device, flags], TC_ACT_UNSPEC);
            let link = attach_tc(&carrier, &program, direction);
            let seen = carrier.send(direction, &frame).unwrap();
            assert_eq!(seen.passed.as_ref(), Some(&frame));
            assert_eq!(seen.returned.as_ref(), Some(&frame));
            assert_eq!(seen.copies, 0);
            carrier.in_namespace(|| detach(&link)).unwrap();
        }
    }

    #[test]
    fn changes_are_seen() {
        let Some(carrier) = carrier() else { return };
        let push = libbpf_sys::BPF_FUNC_skb_vlan_push;
        let protocol = 0x8100u16.to_be().into();
        for direction in [Direction::TcIngress, Direction::Egress] {
            let program = tc_call(push, &[protocol, 77], TC_ACT_UNSPEC);
            let link = attach_tc(&carrier, &program, direction);
            let frame = tcp(5000);
            let mut tagged = frame.clone();
            tagged.splice(12..12, [0x81, 0, 0, 77]);
            let start = Instant::now();
            let seen = carrier.send(direction, &frame).unwrap();
            assert_eq!(seen, passed(&tagged), "{direction:?}");
            assert!(start.elapsed() < FREE_RUN);
            carrier.in_namespace(|| detach(&link)).unwrap();
        }
    }

    #[test]
    fn programs_see_the_headers_of_long_frames() {
        let Some(carrier) = carrier() else { return };
        for (direction, context) in [(Direction::TcIngress, 76), (Direction::Egress, 76)] {
            // Drops what has 256 linear bytes.
            let mut program = if_ethertype(context, IPV4, TC_ACT_SHOT, TC_ACT_UNSPEC);
            program[4].imm = LINEAR as i32;
            let link = attach_tc(&carrier, &program, direction);
            let seen = carrier.send(direction, &tcp(60_000)).unwrap();
            assert_eq!(seen, Observation::default(), "{direction:?}");
            carrier.in_namespace(|| detach(&link)).unwrap();
        }
    }

    #[test]
    fn the_namespace_is_private_silent_and_vanishes() {
        let Some(carrier) = carrier() else { return };
        let own = fs::read_link("/proc/thread-self/ns/net").unwrap();
        let (private, devices, routes) = carrier
            .in_namespace(|| {
                let name = fs::read_link("/proc/thread-self/ns/net").unwrap();
                let devices = nix::net::if_::if_nameindex().unwrap().iter().count();
                let routes = fs::read_to_string("/proc/thread-self/net/fib_trie").unwrap();
                (name, devices, routes)
            })
            .unwrap();
        assert_ne!(own, private);
        assert_eq!(devices, 3);
        assert_eq!(routes, "");
        assert_eq!(own, fs::read_link("/proc/thread-self/ns/net").unwrap());
        assert_ne!(carrier.device(Side::In), carrier.device(Side::Out));

        // Nothing is said unasked, and nothing is answered.
        thread::sleep(FREE_RUN);
        let mut buffer = vec![0; RECEIVE_BUFFER];
        for socket in [
            &carrier.inner.receiver,
            &carrier.outer.receiver,
            &carrier.loopback,
        ] {
            assert_eq!(receive(socket, &mut buffer).unwrap(), None);
        }
        let in_use = || {
            fs::read_dir("/proc/self/fd")
                .unwrap()
                .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
                .any(|target| target == private)
        };
        assert!(in_use());
        drop(carrier);
        assert!(!in_use());
    }

    #[test]
    fn a_panic_goes_on_in_the_caller_and_the_carrier_lives() {
        let Some(carrier) = carrier() else { return };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            carrier.in_namespace(|| std::panic::resume_unwind(Box::new("on purpose")))
        }));
        let panic = result
            .map(|result: Result<()>| result.unwrap())
            .unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"on purpose"));
        assert_eq!(
            carrier.send(Direction::Egress, &tcp(1)).unwrap(),
            passed(&tcp(1))
        );
    }

    #[test]
    fn many_callers_get_their_own_frames_and_keep_their_cpus() {
        let Some(carrier) = carrier() else { return };
        let before = sched_getaffinity(Pid::from_raw(0)).unwrap();
        thread::scope(|scope| {
            for caller in 0..4 {
                let carrier = &carrier;
                scope.spawn(move || {
                    for round in 0..200 {
                        let direction = DIRECTIONS[(caller + round) % 3];
                        let frame = frame(0x0800, 100 + 300 * caller + round);
                        assert_eq!(carrier.send(direction, &frame).unwrap(), passed(&frame));
                    }
                });
            }
        });
        carrier.send(Direction::Ingress, &tcp(1)).unwrap();
        assert_eq!(sched_getaffinity(Pid::from_raw(0)).unwrap(), before);
    }
}
