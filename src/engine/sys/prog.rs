// SPDX-License-Identifier: MIT OR Apache-2.0
//! Loaded programs: what the kernel says about them, and test runs.

use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use super::{ProgramType, check, errno, len32, object_name, owned};

/// Room for what a test run may add to a frame, in bytes.
const FRAME_GROWTH: usize = 512;
/// The smallest output buffer of a test run, in bytes.
const FRAME_MIN: usize = 4096;
/// Words of `struct __sk_buff` up to and including `ifindex`, the last one.
const SK_BUFF_WORDS: usize = 11;

/// A loaded program as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgInfo {
    pub id: u32,
    pub kind: ProgramType,
    /// At most 15 bytes: the kernel keeps no more.
    pub name: String,
    /// Hash of the instructions, equal for equal programs.
    pub tag: [u8; 8],
    /// Machine code of all subprograms; empty without the permission to see it (`CAP_SYSLOG`, or
    /// `kernel.kptr_restrict`), or without a JIT.
    pub jited: Vec<u8>,
    /// Kernel addresses of the subprograms; empty as `jited`.
    pub jited_ksyms: Vec<u64>,
    /// Since boot (`CLOCK_BOOTTIME`).
    pub loaded_at: Duration,
    pub uid: u32,
    /// Maps the program refers to, in no particular order.
    pub map_ids: Vec<u32>,
    /// Instructions the verifier walked through; 0 before kernel 5.16.
    pub verified_insns: u32,
}

/// What a program did to one frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestRun {
    /// What the program returned: `XDP_*` or `TC_ACT_*` as `u32`.
    pub verdict: u32,
    /// The frame as the program left it.
    pub frame: Vec<u8>,
    /// Time the program took.
    pub duration: Duration,
}

/// The ids of one kind of BPF object, ascending. An error ends it: `EPERM` without
/// `CAP_SYS_ADMIN`.
#[derive(Debug)]
pub struct Ids {
    after: Option<u32>,
    next: unsafe extern "C" fn(u32, *mut u32) -> c_int,
}

impl Ids {
    /// `next` is one of libbpf's `bpf_*_get_next_id`.
    pub(super) fn new(next: unsafe extern "C" fn(u32, *mut u32) -> c_int) -> Self {
        Ids {
            after: Some(0),
            next,
        }
    }
}

impl Iterator for Ids {
    type Item = io::Result<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        let after = self.after.take()?;
        let mut id = 0;
        // SAFETY: a `bpf_*_get_next_id`, which writes one integer through a valid pointer.
        match check(unsafe { (self.next)(after, &mut id) }) {
            Ok(_) => {
                self.after = Some(id);
                Some(Ok(id))
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => None,
            Err(error) => Some(Err(error)),
        }
    }
}

/// The ids of all programs of the system.
pub fn programs() -> Ids {
    Ids::new(libbpf_sys::bpf_prog_get_next_id)
}

/// Opens a program by id. `ENOENT`: gone; `EPERM` without `CAP_SYS_ADMIN`.
pub fn prog_by_id(id: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain integers; the result is a new descriptor.
    unsafe { owned(libbpf_sys::bpf_prog_get_fd_by_id(id)) }
}

/// Describes a program. `EINVAL` for a descriptor that is no program.
pub fn prog_info(prog: impl AsFd) -> io::Result<ProgInfo> {
    let prog = prog.as_fd();
    expect_kind(prog, "bpf-prog")?;
    let sizes = raw_info(prog, libbpf_sys::bpf_prog_info::default())?;
    let mut jited = vec![0u8; sizes.jited_prog_len as usize];
    let mut jited_ksyms = vec![0u64; sizes.nr_jited_ksyms as usize];
    let mut map_ids = vec![0u32; sizes.nr_map_ids as usize];
    let info = raw_info(
        prog,
        libbpf_sys::bpf_prog_info {
            jited_prog_len: sizes.jited_prog_len,
            jited_prog_insns: jited.as_mut_ptr() as u64,
            nr_jited_ksyms: sizes.nr_jited_ksyms,
            jited_ksyms: jited_ksyms.as_mut_ptr() as u64,
            nr_map_ids: sizes.nr_map_ids,
            map_ids: map_ids.as_mut_ptr() as u64,
            ..Default::default()
        },
    )?;
    // What the caller may not see, the kernel answers by a null pointer, or by a length of zero.
    if info.jited_prog_insns == 0 || info.jited_prog_len == 0 {
        jited.clear();
    }
    if info.jited_ksyms == 0 || info.nr_jited_ksyms == 0 {
        jited_ksyms.clear();
    }
    map_ids.truncate(info.nr_map_ids as usize);
    Ok(ProgInfo {
        id: info.id,
        kind: info.type_.into(),
        name: object_name(&info.name),
        tag: info.tag,
        jited,
        jited_ksyms,
        loaded_at: Duration::from_nanos(info.load_time),
        uid: info.created_by_uid,
        map_ids,
        verified_insns: info.verified_insns,
    })
}

fn raw_info(
    prog: BorrowedFd<'_>,
    mut info: libbpf_sys::bpf_prog_info,
) -> io::Result<libbpf_sys::bpf_prog_info> {
    // SAFETY: plain integers; the pointers among them are null or lead to buffers of the lengths
    // beside them, and outlive the call.
    unsafe { info_by_fd(prog, &mut info, libbpf_sys::bpf_prog_get_info_by_fd)? };
    Ok(info)
}

/// `EINVAL` unless the descriptor is of this kind (`bpf-prog`, `bpf-map`, `bpf-link`). The kernel
/// describes whatever it is given, in that object's own structure.
pub(super) fn expect_kind(object: BorrowedFd<'_>, kind: &str) -> io::Result<()> {
    let target = std::fs::read_link(format!("/proc/self/fd/{}", object.as_raw_fd()))?;
    match target.to_str().and_then(|target| target.split_once(':')) {
        // A link is `bpf_link` where it was created, and `bpf-link` opened again.
        Some(("anon_inode", found)) if found.replace('_', "-") == kind => Ok(()),
        _ => Err(errno(libc::EINVAL)),
    }
}

/// Fills `info` by one of libbpf's `bpf_*_get_info_by_fd`.
///
/// # Safety
/// `T` is the structure that `get` fills, any bytes are a valid `T`, and pointers in it are null or
/// lead to buffers of the lengths it states; they are all null unless [`expect_kind`] held.
pub(super) unsafe fn info_by_fd<T>(
    object: BorrowedFd<'_>,
    info: &mut T,
    get: unsafe extern "C" fn(c_int, *mut T, *mut u32) -> c_int,
) -> io::Result<()> {
    let mut len = len32(size_of::<T>())?;
    // SAFETY: `len` is the size of `info`; the rest is the caller's contract.
    check(unsafe { get(object.as_raw_fd(), info, &mut len) }).map(drop)
}

/// Runs a program once on a frame, link layer included, outside any device.
///
/// With `ifindex_ctx` the frame seems received on that device of the current network namespace:
/// `xdp_md.ingress_ifindex`, or `__sk_buff.ifindex` for a TC program. Without, on the loopback.
///
/// `EINVAL`: a frame the kernel takes for too short or too long, or no such device; `ENOSPC`: the
/// program added more than 512 bytes to a frame over 3,584.
pub fn test_run(prog: impl AsFd, frame: &[u8], ifindex_ctx: Option<u32>) -> io::Result<TestRun> {
    let prog = prog.as_fd();
    let context = match ifindex_ctx {
        Some(ifindex) => context(prog, len32(frame.len())?, ifindex)?,
        None => Vec::new(),
    };
    let mut out = vec![0u8; (frame.len() + FRAME_GROWTH).max(FRAME_MIN)];
    let mut opts = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as _,
        data_in: frame.as_ptr().cast(),
        data_size_in: len32(frame.len())?,
        data_out: out.as_mut_ptr().cast(),
        data_size_out: len32(out.len())?,
        repeat: 1,
        ..Default::default()
    };
    if !context.is_empty() {
        opts.ctx_in = context.as_ptr().cast();
        opts.ctx_size_in = len32(size_of_val(context.as_slice()))?;
    }
    // SAFETY: every pointer leads to a live buffer of the size stated beside it.
    check(unsafe { libbpf_sys::bpf_prog_test_run_opts(prog.as_raw_fd(), &mut opts) })?;
    out.truncate(opts.data_size_out as usize);
    Ok(TestRun {
        verdict: opts.retval,
        frame: out,
        duration: Duration::from_nanos(opts.duration.into()),
    })
}

/// `struct xdp_md`, or the beginning of `struct __sk_buff`, by the type of the program.
fn context(prog: BorrowedFd<'_>, frame_len: u32, ifindex: u32) -> io::Result<Vec<u32>> {
    let info = raw_info(prog, libbpf_sys::bpf_prog_info::default())?;
    if ProgramType::from(info.type_) == ProgramType::Xdp {
        // data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
        return Ok(vec![0, frame_len, 0, ifindex, 0, 0]);
    }
    let mut context = vec![0; SK_BUFF_WORDS];
    context[SK_BUFF_WORDS - 1] = ifindex;
    Ok(context)
}

/// Runs an XDP program on a frame as if the device had received it: what it lets pass goes up the
/// stack, what it redirects is sent (`BPF_F_TEST_XDP_LIVE_FRAMES`, Linux 5.18).
pub fn receive(prog: impl AsFd, frame: &[u8], ifindex: u32) -> io::Result<()> {
    let prog = prog.as_fd();
    let context = context(prog, len32(frame.len())?, ifindex)?;
    let mut opts = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as _,
        data_in: frame.as_ptr().cast(),
        data_size_in: len32(frame.len())?,
        ctx_in: context.as_ptr().cast(),
        ctx_size_in: len32(size_of_val(context.as_slice()))?,
        repeat: 1,
        flags: libbpf_sys::BPF_F_TEST_XDP_LIVE_FRAMES,
        ..Default::default()
    };
    // SAFETY: every pointer leads to a live buffer of the size stated beside it.
    check(unsafe { libbpf_sys::bpf_prog_test_run_opts(prog.as_raw_fd(), &mut opts) }).map(drop)
}

/// Has a device without a link header receive a packet that begins with IP: the packet goes through
/// TC and up the stack. `program` is of [`tc_receive_load`].
///
/// Live frames of XDP cannot do that: they lose 14 bytes on their way up, and TC gets those back in
/// front of IP. A packet redirected to such a device has no link header.
///
/// `ENOBUFS`: the device is down, or the packet too long; `ENODEV`: no such device.
pub fn receive_packet(program: impl AsFd, packet: &[u8], ifindex: u32) -> io::Result<()> {
    const NET_RX_DROP: i32 = 1;
    let protocol: u16 = match packet.first().map(|byte| byte >> 4) {
        Some(4) => libc::ETH_P_IP as u16,
        Some(6) => libc::ETH_P_IPV6 as u16,
        _ => return Err(errno(libc::EINVAL)),
    };
    // The test run wants a link header, which tells it the protocol.
    let frame = [&[0; 12][..], &protocol.to_be_bytes(), packet].concat();
    match test_run(program, &frame, Some(ifindex))?.verdict as i32 {
        0 => Ok(()),
        NET_RX_DROP => Err(errno(libc::ENOBUFS)),
        error => Err(errno(-error)),
    }
}

/// Loads a TC program that has the device of a packet receive a copy of it, and returns what came of
/// that.
pub fn tc_receive_load() -> io::Result<OwnedFd> {
    const IFINDEX: i16 = 4 * (SK_BUFF_WORDS as i16 - 1);
    let load = libbpf_sys::BPF_LDX | libbpf_sys::BPF_W | libbpf_sys::BPF_MEM;
    let set = libbpf_sys::BPF_ALU64 | libbpf_sys::BPF_MOV | libbpf_sys::BPF_K;
    let call = libbpf_sys::BPF_JMP | libbpf_sys::BPF_CALL;
    let mut ifindex = instruction(load, 2, 0);
    ifindex.set_src_reg(1);
    ifindex.off = IFINDEX;
    load_program(
        libbpf_sys::BPF_PROG_TYPE_SCHED_CLS,
        c"pc_receive",
        &[
            ifindex,
            instruction(set, 3, libbpf_sys::BPF_F_INGRESS as i32),
            instruction(call, 0, libbpf_sys::BPF_FUNC_clone_redirect as i32),
            instruction(libbpf_sys::BPF_JMP | libbpf_sys::BPF_EXIT, 0, 0),
        ],
    )
}

/// Loads an XDP program that lets every frame pass.
pub fn xdp_pass_load() -> io::Result<OwnedFd> {
    const XDP_PASS: i32 = 2;
    let set = libbpf_sys::BPF_ALU64 | libbpf_sys::BPF_MOV | libbpf_sys::BPF_K;
    load_program(
        libbpf_sys::BPF_PROG_TYPE_XDP,
        c"pc_pass",
        &[
            instruction(set, 0, XDP_PASS),
            instruction(libbpf_sys::BPF_JMP | libbpf_sys::BPF_EXIT, 0, 0),
        ],
    )
}

fn instruction(code: u32, register: u8, imm: i32) -> libbpf_sys::bpf_insn {
    let mut instruction = libbpf_sys::bpf_insn {
        code: code as u8,
        imm,
        ..Default::default()
    };
    instruction.set_dst_reg(register);
    instruction
}

fn load_program(
    kind: libbpf_sys::bpf_prog_type,
    name: &CStr,
    instructions: &[libbpf_sys::bpf_insn],
) -> io::Result<OwnedFd> {
    // SAFETY: literals and a live array with its length; the result is a new descriptor.
    unsafe {
        owned(libbpf_sys::bpf_prog_load(
            kind,
            name.as_ptr(),
            c"GPL".as_ptr(),
            instructions.as_ptr(),
            instructions.len() as _,
            std::ptr::null_mut(),
        ))
    }
}
