// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs as filters of the `clsact` qdisc: TC without TCX, for kernels before 6.6.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

use super::link::TcDirection;
use super::{c_bytes_to_string, check, errno, ifindex_int, len32, tolerate};

/// `TC_H_CLSACT`: the parent of both `clsact` and the older `ingress` qdisc.
const PARENT_QDISC: u32 = 0xffff_fff1;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)` and `..._EGRESS`: the parents of filters.
const PARENT_FILTERS: [u32; 2] = [0xffff_fff2, 0xffff_fff3];

const NLMSG_HEADER: usize = 16;
const TCMSG: usize = 20;
const TCMSG_IFINDEX: usize = 4;
const TCMSG_PARENT: usize = 12;
const TCA_KIND: u16 = 1;

/// Attaches a TC program as a direct-action filter of all protocols. Creates the qdisc where it is
/// missing, and tells whether it did; a qdisc it created does not survive its own failure.
///
/// `handle` is not 0; `priority` is 1..65535, lower first. With `replace`, what stands at that
/// handle and priority is replaced in one step: a packet sees the old program or the new one.
///
/// `EEXIST`: the place is taken (without `replace`); `EINVAL`: the priority belongs to another kind
/// of filter; `EBUSY`: the device has the older `ingress` qdisc, which would run an egress filter
/// on received packets; `ENODEV`: no such device in this network namespace.
pub fn clsact_attach(
    prog: impl AsFd,
    ifindex: u32,
    direction: TcDirection,
    handle: u32,
    priority: u32,
    replace: bool,
) -> io::Result<bool> {
    let hook = hook(ifindex, direction)?;
    let mut opts = opts(handle, priority)?;
    opts.prog_fd = prog.as_fd().as_raw_fd();
    opts.flags = if replace {
        libbpf_sys::BPF_TC_F_REPLACE
    } else {
        0
    };
    let created = create_qdisc(hook)?;
    if !created && direction == TcDirection::Egress && qdisc_kind(ifindex)? != "clsact" {
        return Err(errno(libc::EBUSY));
    }
    // SAFETY: both structures are valid and outlive the call; the program is open during it.
    let attached = check(unsafe { libbpf_sys::bpf_tc_attach(&hook, &mut opts) });
    if attached.is_err() && created {
        // The failure to attach is the one to report.
        drop(remove_unused_qdisc(ifindex));
    }
    attached.map(|_| created)
}

/// The program at this place, if one is; `None` too if the device has no `clsact` qdisc.
pub fn clsact_query(
    ifindex: u32,
    direction: TcDirection,
    handle: u32,
    priority: u32,
) -> io::Result<Option<u32>> {
    let hook = hook(ifindex, direction)?;
    let mut opts = opts(handle, priority)?;
    let found = tolerate(is_absence, || {
        // SAFETY: both structures are valid and outlive the call.
        check(unsafe { libbpf_sys::bpf_tc_query(&hook, &mut opts) })
    })?;
    Ok(found.map(|_| opts.prog_id))
}

/// Removes the filter at this place; one that is gone already is no error. With `remove_qdisc` (its
/// creation was ours) removes the qdisc too unless it has filters left, in either direction,
/// whosever they are. Tells whether it removed the qdisc: if not, whoever removes the last filter
/// has to.
pub fn clsact_detach(
    ifindex: u32,
    direction: TcDirection,
    handle: u32,
    priority: u32,
    remove_qdisc: bool,
) -> io::Result<bool> {
    let hook = hook(ifindex, direction)?;
    let opts = opts(handle, priority)?;
    tolerate(is_absence, || {
        // SAFETY: both structures are valid and outlive the call.
        check(unsafe { libbpf_sys::bpf_tc_detach(&hook, &opts) })
    })?;
    if remove_qdisc {
        remove_unused_qdisc(ifindex)
    } else {
        Ok(false)
    }
}

/// `ENOENT`: no such filter; `EINVAL`: no qdisc, or another kind of filter at that priority.
fn is_absence(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL))
}

fn hook(ifindex: u32, direction: TcDirection) -> io::Result<libbpf_sys::bpf_tc_hook> {
    Ok(libbpf_sys::bpf_tc_hook {
        sz: size_of::<libbpf_sys::bpf_tc_hook>() as _,
        ifindex: ifindex_int(ifindex)?,
        attach_point: match direction {
            TcDirection::Ingress => libbpf_sys::BPF_TC_INGRESS,
            TcDirection::Egress => libbpf_sys::BPF_TC_EGRESS,
        },
        ..Default::default()
    })
}

fn opts(handle: u32, priority: u32) -> io::Result<libbpf_sys::bpf_tc_opts> {
    if handle == 0 || priority == 0 || priority > u32::from(u16::MAX) {
        return Err(errno(libc::EINVAL));
    }
    Ok(libbpf_sys::bpf_tc_opts {
        sz: size_of::<libbpf_sys::bpf_tc_opts>() as _,
        handle,
        priority,
        ..Default::default()
    })
}

/// Whether the qdisc had to be created.
fn create_qdisc(mut hook: libbpf_sys::bpf_tc_hook) -> io::Result<bool> {
    let exists = |error: &io::Error| error.raw_os_error() == Some(libc::EEXIST);
    let created = tolerate(exists, || {
        // SAFETY: the structure is valid and outlives the call.
        check(unsafe { libbpf_sys::bpf_tc_hook_create(&mut hook) })
    })?;
    Ok(created.is_some())
}

/// Whether it was there and could be removed. A filter added between look and removal is lost:
/// the kernel has no conditional removal.
fn remove_unused_qdisc(ifindex: u32) -> io::Result<bool> {
    if qdisc_kind(ifindex)? != "clsact" {
        return Ok(false);
    }
    for parent in PARENT_FILTERS {
        if !dump(libc::RTM_GETTFILTER, ifindex, parent)?.is_empty() {
            return Ok(false);
        }
    }
    let mut hook = hook(ifindex, TcDirection::Ingress)?;
    hook.attach_point = libbpf_sys::BPF_TC_INGRESS | libbpf_sys::BPF_TC_EGRESS;
    // SAFETY: the structure is valid and outlives the call.
    check(unsafe { libbpf_sys::bpf_tc_hook_destroy(&mut hook) })?;
    Ok(true)
}

/// `clsact`, `ingress`, or empty if the device has neither.
fn qdisc_kind(ifindex: u32) -> io::Result<String> {
    // Kernels answer this by a dump of all devices only, whatever the device asked for.
    for message in dump(libc::RTM_GETQDISC, ifindex, 0)? {
        if word(&message, TCMSG_IFINDEX)? == ifindex
            && word(&message, TCMSG_PARENT)? == PARENT_QDISC
        {
            let kind = message
                .get(TCMSG..)
                .and_then(|rest| attribute(rest, TCA_KIND));
            return Ok(kind.map(c_bytes_to_string).unwrap_or_default());
        }
    }
    Ok(String::new())
}

/// All that the kernel tells about filters or qdiscs: messages that begin with a tcmsg.
fn dump(kind: u16, ifindex: u32, parent: u32) -> io::Result<Vec<Vec<u8>>> {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let mut message = Vec::with_capacity(NLMSG_HEADER + TCMSG);
    message.extend(len32(NLMSG_HEADER + TCMSG)?.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    // Sequence number, port; then tcmsg: family and padding, device, handle, parent, info.
    for word in [1, 0, 0, ifindex, 0, parent, 0] {
        message.extend(word.to_ne_bytes());
    }
    send(netlink.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answers = Vec::new();
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        let len = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if read_answers(&buffer[..len], &mut answers)? {
            return Ok(answers);
        }
    }
}

/// Whether these were the last messages of the answer.
fn read_answers(mut messages: &[u8], answers: &mut Vec<Vec<u8>>) -> io::Result<bool> {
    while messages.len() >= NLMSG_HEADER {
        let len = word(messages, 0)? as usize;
        let payload = messages
            .get(NLMSG_HEADER..len)
            .ok_or_else(|| errno(libc::EPROTO))?;
        match i32::from(u16::from_ne_bytes([messages[4], messages[5]])) {
            libc::NLMSG_DONE | libc::NLMSG_ERROR => {
                return match word(payload, 0)? as i32 {
                    0 => Ok(true),
                    code => Err(errno(code.wrapping_neg())),
                };
            }
            _ => answers.push(payload.to_vec()),
        }
        messages = messages.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

fn attribute(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let header = attributes.get(..4)?;
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let value = attributes.get(4..len)?;
        if u16::from_ne_bytes([header[2], header[3]]) == kind {
            return Some(value);
        }
        attributes = attributes.get(len.next_multiple_of(4)..)?;
    }
}

fn word(bytes: &[u8], at: usize) -> io::Result<u32> {
    bytes
        .get(at..at + 4)
        .and_then(|word| word.try_into().ok())
        .map(u32::from_ne_bytes)
        .ok_or_else(|| errno(libc::EPROTO))
}
