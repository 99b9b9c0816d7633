// SPDX-License-Identifier: MIT OR Apache-2.0
//! Devices for packets that a test run cannot make: super-packets, checksums that the kernel notes
//! as partial, headers outside the linear part, tags in metadata, data that another packet shares.
//!
//! ```text
//! out ---- in -> to ---- far
//! ```
//!
//! What `in` receives and the programs at its XDP and TC ingress let pass goes out of `to`, past
//! its TC egress. `to` and `in` have no offloads, so the kernel completes checksums and cuts
//! super-packets after the last program: what `far` and `out` receive is what a wire would carry.

use std::io::{self, Write};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;
use policy_chain::engine::sys::{self, TcDirection};
use policy_chain::netns::Namespace;

/// What `to` has as its link address.
pub const OWN_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x70];
/// The link address of the neighbours behind `to`: 10.0.0.2 and 2001:db8::2.
pub const NEIGHBOUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x71];

/// How many markers are sent at a time.
pub const MARKERS: u64 = 2;

const DEADLINE: Duration = Duration::from_secs(30);
/// IEEE's "local experimental 1", which nothing else here sends.
const MARKER: [u8; 2] = [0x88, 0xb5];
const MARKER_END: &[u8] = b"the end is near";
const LARGEST: usize = 1 << 17;
const VIRTIO_HEADER: usize = 10;
const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

const SET_UP: &str = "link set dev lo up
link add in mtu 65535 type veth peer name out mtu 65535
link add to mtu 65535 address 02:00:00:00:00:70 type veth peer name far mtu 65535
link set dev in arp off addrgenmode none up
link set dev out arp off addrgenmode none up
link set dev far arp off addrgenmode none up
";
const TURN_ON: &str = "link set dev to addrgenmode none up
address add 10.0.0.254/24 dev to
address add 2001:db8::fe/64 dev to nodad
neighbour add 10.0.0.2 lladdr 02:00:00:00:00:71 dev to nud permanent
neighbour add 2001:db8::2 lladdr 02:00:00:00:00:71 dev to nud permanent
";

/// What the kernel is told of a packet besides its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Note {
    /// The checksum is partial: where its sum begins, and where it stands from there on.
    pub partial: Option<(u16, u16)>,
    /// A super-packet: payload of each segment in bytes.
    pub segment: Option<u16>,
    /// Bytes in the linear part, if the frame is longer than a page.
    pub linear: u16,
}

/// A frame as a device received it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrived {
    /// A tag that the kernel took out of it is back in its place.
    pub frame: Vec<u8>,
    pub note: Note,
    /// There was such a tag.
    pub tag_in_metadata: bool,
}

/// What became of one packet.
#[derive(Clone, Debug, Default)]
pub struct Passage {
    /// What `in` received, after XDP and before TC ingress, read when the packet had passed.
    pub received: Vec<Arrived>,
    /// What came out, at `out` or `far`.
    pub left: Vec<Arrived>,
}

/// A device to send from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// Into `in`.
    Out,
    /// Out of `in`.
    In,
}

pub struct Wire {
    out: Socket,
    inner: Socket,
    far: Socket,
    count: u64,
}

/// Runs `f` with devices in a network namespace of their own, on a thread that stays on one CPU:
/// so packets stay in order. All is gone when it returns.
pub fn with_wire<R: Send>(f: impl FnOnce(Wire) -> R + Send) -> R {
    let namespace = Namespace::unnamed("of the wire").unwrap();
    let set = |name: &'static str, value: &'static str| {
        let path = format!("/proc/sys/net/{name}");
        namespace
            .enter(|| std::fs::write(path, value).unwrap())
            .unwrap();
    };
    set("ipv4/conf/all/forwarding", "1");
    set("ipv6/conf/all/forwarding", "1");
    // only where there are neighbours: the kernel sends packets of its own otherwise
    set("ipv6/conf/default/disable_ipv6", "1");
    namespace.ip_batch(SET_UP).unwrap();
    set("ipv6/conf/to/disable_ipv6", "0");
    namespace.ip_batch(TURN_ON).unwrap();
    for device in ["in", "to"] {
        let off = ["-K", device, "tx", "off", "tso", "off"];
        let output = namespace.command("ethtool").args(off).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    namespace
        .enter(|| {
            let mut cpu = CpuSet::new();
            cpu.set(sched_getcpu().unwrap()).unwrap();
            sched_setaffinity(Pid::from_raw(0), &cpu).unwrap();
            let index = |name| sys::device_index(name).unwrap();
            forward(index("in"), index("to"));
            f(Wire {
                out: Socket::open(index("out")),
                inner: Socket::open(index("in")),
                far: Socket::open(index("far")),
                count: 0,
            })
        })
        .unwrap()
}

/// Has a device send all that its TC ingress lets pass out of another one. The program writes to
/// no packet, so the kernel does not give it a copy of its own of data that others share.
///
/// Not for packets behind generic XDP: where the kernel copies one for that (`skb_pp_cow_data()`),
/// it forgets how long its link header is, and TC ingress takes it for none.
fn forward(from: u32, to: u32) {
    let instruction = |code, dst, imm| libbpf_sys::bpf_insn {
        code,
        _bitfield_align_1: [],
        _bitfield_1: libbpf_sys::bpf_insn::new_bitfield_1(dst, 0),
        off: 0,
        imm,
    };
    let redirect = libbpf_sys::BPF_FUNC_redirect as i32;
    let program = [
        instruction(0xb7, 1, to as i32), // r1 = to
        instruction(0xb7, 2, 0),         // r2 = 0
        instruction(0x85, 0, redirect),  // call
        instruction(0x95, 0, 0),         // exit
    ];
    // SAFETY: name, licence and instructions outlive the call.
    let result = unsafe {
        libbpf_sys::bpf_prog_load(
            libbpf_sys::BPF_PROG_TYPE_SCHED_CLS,
            c"wire".as_ptr(),
            c"Dual MIT/GPL".as_ptr(),
            program.as_ptr(),
            program.len() as _,
            std::ptr::null_mut(),
        )
    };
    assert!(result >= 0, "{}", io::Error::last_os_error());
    // SAFETY: a descriptor just opened, which nothing else owns.
    let program = unsafe { OwnedFd::from_raw_fd(result) };
    // the last of clsact's filters, which runs after TCX
    sys::clsact_attach(&program, from, TcDirection::Ingress, 1, 65_535, false).unwrap();
}

impl Wire {
    /// Sends a frame, and markers behind it, and waits until all that becomes of them has
    /// arrived.
    pub fn pass(&mut self, from: From, frame: &[u8], note: &Note) -> Passage {
        self.sender(from).send(frame, note);
        self.mark(from)
    }

    /// Sends two markers, which are no IP packets, one when the other has arrived anywhere. What
    /// the frame before them had become by then stands before the second in the CPU's queue.
    pub fn mark(&mut self, from: From) -> Passage {
        let mut passage = Passage::default();
        for _ in 0..MARKERS {
            self.mark_once(from, &mut passage);
        }
        passage
    }

    fn mark_once(&mut self, from: From, passage: &mut Passage) {
        self.count += 1;
        let mut marker = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        marker.extend(MARKER);
        marker.extend([0; 24]);
        marker.extend(self.count.to_be_bytes());
        marker.extend(MARKER_END);
        self.sender(from).send(&marker, &Note::default());
        let limit = Instant::now() + DEADLINE;
        while !self.collect(&marker[12..], passage) {
            assert!(Instant::now() < limit, "no marker: {passage:?}");
            thread::sleep(Duration::from_micros(200));
        }
    }

    fn sender(&self, from: From) -> &Socket {
        match from {
            From::Out => &self.out,
            From::In => &self.inner,
        }
    }

    /// Takes what has arrived; tells whether the marker has.
    fn collect(&self, marker: &[u8], passage: &mut Passage) -> bool {
        let mut seen = false;
        let Passage { received, left } = passage;
        for (sockets, frames) in [
            (&[&self.inner][..], received),
            (&[&self.out, &self.far][..], left),
        ] {
            for arrived in sockets.iter().flat_map(|socket| socket.all()) {
                seen |= arrived.frame.get(12..) == Some(marker);
                if is_ours(&arrived.frame) {
                    frames.push(arrived);
                }
            }
        }
        seen
    }
}

/// Whether the test sent it: the kernel asks for neighbours and listeners on its own.
fn is_ours(frame: &[u8]) -> bool {
    let kind = frame.get(12..14).unwrap_or(&[]);
    let icmpv6 = kind == [0x86, 0xdd]
        && (frame.get(20) == Some(&58)
            || (frame.get(20) == Some(&0) && frame.get(54) == Some(&58)));
    let marker = frame.ends_with(MARKER_END);
    !marker && kind != [0x08, 0x06] && !icmpv6
}

struct Socket(OwnedFd);

impl Socket {
    fn open(index: u32) -> Socket {
        // SAFETY: takes plain numbers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: a descriptor just opened, which nothing else owns.
        let socket = Socket(unsafe { OwnedFd::from_raw_fd(fd) });
        socket.set(libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1);
        socket.set(libc::SOL_PACKET, libc::PACKET_AUXDATA, 1);
        socket.set(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1);
        socket.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 16 << 20);
        // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index as libc::c_int;
        let length = mem::size_of_val(&address) as libc::socklen_t;
        // SAFETY: the address outlives the call, and the length is its own.
        let result =
            unsafe { libc::bind(socket.0.as_raw_fd(), (&raw const address).cast(), length) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        socket
    }

    fn set(&self, level: libc::c_int, name: libc::c_int, value: libc::c_int) {
        let length = mem::size_of_val(&value) as libc::socklen_t;
        let fd = self.0.as_raw_fd();
        // SAFETY: the value outlives the call, which reads as many bytes as it has.
        let result =
            unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), length) };
        assert_eq!(result, 0, "option {name}: {}", io::Error::last_os_error());
    }

    fn send(&self, frame: &[u8], note: &Note) {
        let ip = if frame[12..14] == [0x81, 0] { 18 } else { 14 };
        let kind = match note.segment.map(|_| frame[ip] >> 4) {
            None => 0,
            Some(4) => GSO_TCPV4,
            Some(_) => GSO_TCPV6,
        };
        let (start, offset) = note.partial.unwrap_or_default();
        let mut message = vec![
            if note.partial.is_some() {
                NEEDS_CSUM
            } else {
                0
            },
            kind,
        ];
        for field in [note.linear, note.segment.unwrap_or(0), start, offset] {
            message.extend(field.to_ne_bytes());
        }
        message.extend(frame);
        let mut socket = std::fs::File::from(self.0.try_clone().unwrap());
        let sent = socket.write(&message);
        assert_eq!(sent.ok(), Some(message.len()), "{note:?}");
    }

    /// The frames that have arrived.
    fn all(&self) -> impl Iterator<Item = Arrived> {
        std::iter::from_fn(|| self.receive())
    }

    /// The next frame that has arrived, if one has.
    fn receive(&self) -> Option<Arrived> {
        let mut buffer = vec![0; LARGEST];
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
        let fd = self.0.as_raw_fd();
        // SAFETY: the message describes buffers with their sizes, which outlive the call.
        let length = unsafe { libc::recvmsg(fd, &mut message, libc::MSG_DONTWAIT) };
        let Ok(length) = usize::try_from(length) else {
            let error = io::Error::last_os_error();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
            return None;
        };
        let field = |at: usize| u16::from_ne_bytes([buffer[at], buffer[at + 1]]);
        let tag = tag_of(&message);
        let start = field(6) + if tag.is_some() { 4 } else { 0 };
        let note = Note {
            partial: (buffer[0] & NEEDS_CSUM != 0).then(|| (start, field(8))),
            segment: (buffer[1] != 0).then(|| field(4)),
            linear: 0,
        };
        let mut frame = buffer[VIRTIO_HEADER..length].to_vec();
        if let Some(tag) = tag {
            frame.splice(12..12, tag);
        }
        Some(Arrived {
            frame,
            note,
            tag_in_metadata: tag.is_some(),
        })
    }
}

/// The tag that the kernel took out of a received frame, as it was on the wire.
fn tag_of(message: &libc::msghdr) -> Option<[u8; 4]> {
    // SAFETY: `recvmsg` has filled the message; its control buffer is still there.
    let header = unsafe { libc::CMSG_FIRSTHDR(message).as_ref() }?;
    if (header.cmsg_level, header.cmsg_type) != (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
        return None;
    }
    // SAFETY: a control message of this type carries this structure, maybe not aligned.
    let data = unsafe {
        libc::CMSG_DATA(header)
            .cast::<libc::tpacket_auxdata>()
            .read_unaligned()
    };
    if data.tp_status & libc::TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let [a, b] = data.tp_vlan_tpid.to_be_bytes();
    let [c, d] = data.tp_vlan_tci.to_be_bytes();
    Some([a, b, c, d])
}
