// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel's BPF interface as safe functions: the only place with raw libbpf calls.
//!
//! Thin on purpose: one function, one kernel operation. Errors are [`std::io::Error`] with the
//! errno kept; callers add which chain, device or pin was meant. Everything that names a device or
//! looks one up acts in the network namespace of the calling thread.
//!
//! Buffers are checked against the sizes the kernel reports for the map at hand, so no argument
//! can make the kernel read or write beyond a slice; a wrong size is `EINVAL`.

mod clsact;
mod device;
mod link;
mod map;
mod pin;
mod prog;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

pub use clsact::{clsact_attach, clsact_detach, clsact_query};
pub use device::{
    device_driver, device_index, device_mtu, device_name, device_set_feature, device_type,
};
pub use libbpf_rs::{MapType, ProgramType};
pub use link::{
    Attached, AttachedMode, LinkInfo, LinkKind, TcDirection, XdpMode, link_by_id, link_detach,
    link_info, link_update, links, tcx_link_create, xdp_attached, xdp_link_create,
};
pub use map::{
    BatchError, Entries, FROZEN_BYTES_MAX, MapInfo, MapKeys, MapWalk, PercpuArray, map_by_id,
    map_create, map_create_frozen_bytes, map_create_outer, map_delete, map_dump, map_entries,
    map_info, map_keys, map_lookup, map_read_bytes, map_update, map_update_batch, maps,
    percpu_lookup, percpu_read, percpu_zero, possible_cpus, wait_rcu,
};
pub use pin::{FolderLock, ensure_bpffs, is_bpffs, lock_folder, mount_bpffs, open_pin, pin, unpin};
pub use prog::{
    Ids, ProgInfo, TestRun, prog_by_id, prog_info, programs, receive, receive_packet,
    tc_receive_load, test_run, xdp_pass_load,
};

/// `ENOTSUPP` of the kernel's own headers, which some BPF operations leak to user space.
const ENOTSUPP: i32 = 524;

/// Bytes of libbpf messages kept for one thread; of more, the end is kept, where the verifier says
/// what it refused.
const LOG_MAX: usize = 1 << 20;

/// Now, by CLOCK_MONOTONIC: the clock of all times that programs and maps keep.
pub fn monotonic() -> io::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC)?.into())
}

thread_local! {
    static LOG: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Keeps libbpf from printing: its messages, verifier logs among them, go to a buffer of the
/// thread that caused them, to be had by [`take_log`]. For the whole process, from now on.
pub fn silence_libbpf() {
    libbpf_rs::set_print(Some((libbpf_rs::PrintLevel::Info, |_, message| {
        LOG.with(|log| {
            // A message logged while the buffer is borrowed, or after the thread's end, is lost.
            if let Ok(mut log) = log.try_borrow_mut() {
                append_log(&mut log, &message);
            }
        });
    })));
}

fn append_log(log: &mut String, message: &str) {
    log.push_str(message);
    if log.len() > LOG_MAX {
        let mut cut = log.len() - LOG_MAX;
        while !log.is_char_boundary(cut) {
            cut += 1;
        }
        log.drain(..cut);
    }
}

/// What libbpf had to say on this thread since the last call; empty without [`silence_libbpf`].
pub fn take_log() -> String {
    LOG.with(RefCell::take)
}

/// Runs something that may fail in an expected way: that is `None`, and what libbpf said about it is
/// forgotten.
fn tolerate<T>(
    expected: impl FnOnce(&io::Error) -> bool,
    run: impl FnOnce() -> io::Result<T>,
) -> io::Result<Option<T>> {
    let before = LOG.with(|log| log.borrow().len());
    match run() {
        Ok(value) => Ok(Some(value)),
        Err(error) if expected(&error) => {
            LOG.with(|log| {
                let mut log = log.borrow_mut();
                if log.is_char_boundary(before) {
                    log.truncate(before);
                }
            });
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Lifts this process's limit on locked memory, against which kernels before 5.11 charge BPF
/// objects, as far as permitted. Never fails: newer kernels do not need it, and containers often
/// lack `CAP_SYS_RESOURCE`; where it mattered, creating a map fails with `EPERM`.
pub fn raise_memlock() {
    let limit = |rlim_cur, rlim_max| libc::rlimit { rlim_cur, rlim_max };
    let set = |limit: libc::rlimit| {
        // SAFETY: a valid rlimit that outlives the call.
        unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) == 0 }
    };
    if set(limit(libc::RLIM_INFINITY, libc::RLIM_INFINITY)) {
        return;
    }
    let mut now = limit(0, 0);
    // SAFETY: a valid rlimit to write to.
    if unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut now) } == 0 {
        set(limit(now.rlim_max, now.rlim_max));
    }
}

fn errno(code: c_int) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// The result of a libbpf call, which is negative errno on failure.
fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(errno(-result))
    } else {
        Ok(result)
    }
}

/// The new file descriptor a libbpf call returned.
///
/// # Safety
/// `result` is what such a call just returned, and nobody else owns that descriptor.
unsafe fn owned(result: c_int) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: not negative, so an open descriptor, ours by the caller's contract.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `EINVAL` for a string with a NUL byte in it.
fn c_string(text: impl Into<Vec<u8>>) -> io::Result<CString> {
    CString::new(text).map_err(|_| errno(libc::EINVAL))
}

/// A kernel object's name: NUL-terminated unless it fills the field.
fn object_name(field: &[c_char]) -> String {
    let bytes: Vec<u8> = field
        .iter()
        .map(|&c| c as u8)
        .take_while(|&byte| byte != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The size of a structure or buffer as the kernel's `__u32` length fields take it.
fn len32(len: usize) -> io::Result<u32> {
    u32::try_from(len).map_err(|_| errno(libc::E2BIG))
}

/// An interface index as libbpf's `int` parameters take it; `ENODEV` beyond their range.
fn ifindex_int(ifindex: u32) -> io::Result<c_int> {
    match c_int::try_from(ifindex) {
        Ok(index) if index > 0 => Ok(index),
        _ => Err(errno(libc::ENODEV)),
    }
}

fn c_bytes_to_string(bytes: &[u8]) -> String {
    CStr::from_bytes_until_nul(bytes)
        .map(|text| text.to_string_lossy().into_owned())
        .unwrap_or_else(|_| String::from_utf8_lossy(bytes).into_owned())
}
