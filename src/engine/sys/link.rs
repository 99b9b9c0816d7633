// SPDX-License-Identifier: MIT OR Apache-2.0
//! BPF links: programs attached to a device by XDP and TCX.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::prog::{Ids, expect_kind, info_by_fd};
use super::{check, device_name, errno, ifindex_int, owned};

/// Where the driver stack runs an XDP program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum XdpMode {
    /// In the driver, before an `skb` exists. `EOPNOTSUPP` where the driver cannot.
    Native,
    /// In the core, on `skb`s of any device.
    Generic,
}

/// The direction of a TC hook, seen from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TcDirection {
    Ingress,
    Egress,
}

/// What a link attaches to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    Xdp,
    Tcx(TcDirection),
    /// Some other `enum bpf_link_type`.
    Other(u32),
}

/// A link as the kernel describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    pub id: u32,
    /// The program the link runs, or ran before it lost its device.
    pub prog_id: u32,
    /// 0 when the device or its namespace is gone, after [`link_detach`], and for other kinds.
    pub ifindex: u32,
    pub kind: LinkKind,
}

/// How a device runs the XDP program it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachedMode {
    Native,
    Generic,
    /// In the network card.
    Offload,
    /// Programs in several modes; the id is that of one of them.
    Several,
}

impl AttachedMode {
    pub fn name(self) -> &'static str {
        match self {
            AttachedMode::Native => "native",
            AttachedMode::Generic => "generic",
            AttachedMode::Offload => "offload",
            AttachedMode::Several => "several modes",
        }
    }
}

/// The XDP program of a device, whoever attached it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    pub prog_id: u32,
    pub mode: AttachedMode,
}

/// Attaches an XDP program by a link. The program stays until the link's last descriptor and pin
/// are gone.
///
/// `EBUSY`: the device runs a program in this mode already; `EEXIST`: it runs one in the other
/// mode; `EOPNOTSUPP`: no native mode; `EINVAL`: no such device in this network namespace.
pub fn xdp_link_create(prog: impl AsFd, ifindex: u32, mode: XdpMode) -> io::Result<OwnedFd> {
    let flags = match mode {
        XdpMode::Native => libbpf_sys::XDP_FLAGS_DRV_MODE,
        XdpMode::Generic => libbpf_sys::XDP_FLAGS_SKB_MODE,
    };
    link_create(prog, ifindex, libbpf_sys::BPF_XDP, flags)
}

/// Attaches a TC program by TCX, behind the programs that are there.
///
/// `EEXIST`: this very program is there already; `ENODEV`: no such device in this network
/// namespace; `EINVAL`: a kernel before 6.6, which has no TCX.
pub fn tcx_link_create(
    prog: impl AsFd,
    ifindex: u32,
    direction: TcDirection,
) -> io::Result<OwnedFd> {
    let attach_type = match direction {
        TcDirection::Ingress => libbpf_sys::BPF_TCX_INGRESS,
        TcDirection::Egress => libbpf_sys::BPF_TCX_EGRESS,
    };
    link_create(prog, ifindex, attach_type, 0)
}

fn link_create(
    prog: impl AsFd,
    ifindex: u32,
    attach_type: libbpf_sys::bpf_attach_type,
    flags: u32,
) -> io::Result<OwnedFd> {
    let opts = libbpf_sys::bpf_link_create_opts {
        sz: size_of::<libbpf_sys::bpf_link_create_opts>() as _,
        flags,
        ..Default::default()
    };
    let device = ifindex_int(ifindex)?;
    let prog = prog.as_fd().as_raw_fd();
    // SAFETY: `opts` outlives the call and the rest of it is zero; the result is a new descriptor.
    unsafe {
        owned(libbpf_sys::bpf_link_create(
            prog,
            device,
            attach_type,
            &opts,
        ))
    }
}

/// Replaces the program of a link: a packet sees the old one or the new one.
///
/// `ENOLINK`: the device is gone; `EINVAL`: a program of another type; `EEXIST` (TCX): the program
/// is there already by another link.
pub fn link_update(link: impl AsFd, prog: impl AsFd) -> io::Result<()> {
    let (link, prog) = (link.as_fd().as_raw_fd(), prog.as_fd().as_raw_fd());
    // SAFETY: both descriptors are open during the call; no options.
    check(unsafe { libbpf_sys::bpf_link_update(link, prog, std::ptr::null()) }).map(drop)
}

/// Detaches a link's program at once, pins and other descriptors notwithstanding.
pub fn link_detach(link: impl AsFd) -> io::Result<()> {
    // SAFETY: the descriptor is open during the call.
    check(unsafe { libbpf_sys::bpf_link_detach(link.as_fd().as_raw_fd()) }).map(drop)
}

/// Describes a link. `EINVAL` for a descriptor that is no link.
pub fn link_info(link: impl AsFd) -> io::Result<LinkInfo> {
    let link = link.as_fd();
    expect_kind(link, "bpf-link")?;
    let mut info = libbpf_sys::bpf_link_info::default();
    // SAFETY: `bpf_link_info` is plain integers, for which any bytes are valid.
    unsafe { info_by_fd(link, &mut info, libbpf_sys::bpf_link_get_info_by_fd)? };
    let (kind, ifindex) = match info.type_ {
        libbpf_sys::BPF_LINK_TYPE_XDP => {
            // SAFETY: the kernel said which member of the union it wrote.
            (LinkKind::Xdp, unsafe { info.__bindgen_anon_1.xdp.ifindex })
        }
        libbpf_sys::BPF_LINK_TYPE_TCX => {
            // SAFETY: as above.
            let tcx = unsafe { info.__bindgen_anon_1.tcx };
            let direction = if tcx.attach_type == libbpf_sys::BPF_TCX_EGRESS {
                TcDirection::Egress
            } else {
                TcDirection::Ingress
            };
            (LinkKind::Tcx(direction), tcx.ifindex)
        }
        other => (LinkKind::Other(other), 0),
    };
    Ok(LinkInfo {
        id: info.id,
        prog_id: info.prog_id,
        ifindex,
        kind,
    })
}

/// Opens a link by id. `ENOENT`: gone; `EPERM` without `CAP_SYS_ADMIN`.
pub fn link_by_id(id: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain integers; the result is a new descriptor.
    unsafe { owned(libbpf_sys::bpf_link_get_fd_by_id(id)) }
}

/// The ids of all links of the system.
pub fn links() -> Ids {
    Ids::new(libbpf_sys::bpf_link_get_next_id)
}

/// The XDP program a device runs. `ENXIO`: no such device in this network namespace.
pub fn xdp_attached(ifindex: u32) -> io::Result<Option<Attached>> {
    // Asked for a device that is not there, libbpf says that it has no program.
    device_name(ifindex)?;
    let mut opts = libbpf_sys::bpf_xdp_query_opts {
        // Without the members about driver features, which cost another request.
        sz: std::mem::offset_of!(libbpf_sys::bpf_xdp_query_opts, feature_flags) as _,
        ..Default::default()
    };
    // SAFETY: `opts` outlives the call, and `sz` is within it.
    check(unsafe { libbpf_sys::bpf_xdp_query(ifindex_int(ifindex)?, 0, &mut opts) })?;
    let first_of = |ids: [u32; 4]| ids.into_iter().find(|&id| id != 0).unwrap_or(0);
    let mode = match u32::from(opts.attach_mode) {
        libbpf_sys::XDP_ATTACHED_NONE => return Ok(None),
        libbpf_sys::XDP_ATTACHED_DRV => AttachedMode::Native,
        libbpf_sys::XDP_ATTACHED_SKB => AttachedMode::Generic,
        libbpf_sys::XDP_ATTACHED_HW => AttachedMode::Offload,
        libbpf_sys::XDP_ATTACHED_MULTI => AttachedMode::Several,
        _ => return Err(errno(libc::EPROTO)),
    };
    let prog_id = first_of([
        opts.prog_id,
        opts.drv_prog_id,
        opts.skb_prog_id,
        opts.hw_prog_id,
    ]);
    Ok(Some(Attached { prog_id, mode }))
}
