// SPDX-License-Identifier: MIT OR Apache-2.0
//! Network devices of the current network namespace, by ioctl: `/sys` may show another namespace's.

use std::ffi::{CStr, c_char};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::{c_bytes_to_string, c_string, errno};

const ETHTOOL_GDRVINFO: u32 = 3;

/// `struct ethtool_drvinfo`.
#[repr(C)]
pub(super) struct DriverInfo {
    cmd: u32,
    driver: [u8; 32],
    /// Versions, bus, reserved bytes and five counts, which nothing here reads.
    rest: [u8; 160],
}

/// The index of a device. `ENODEV`: no such device.
pub fn device_index(name: &str) -> io::Result<u32> {
    let name = c_string(name)?;
    // SAFETY: a NUL-terminated string that outlives the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// The name of a device. `ENXIO`: no such device.
pub fn device_name(index: u32) -> io::Result<String> {
    let mut name = [0 as c_char; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the IF_NAMESIZE bytes that the call may write.
    if unsafe { libc::if_indextoname(index, name.as_mut_ptr()) }.is_null() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it wrote a NUL-terminated name.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) };
    Ok(name.to_string_lossy().into_owned())
}

/// The link layer of a device as `ARPHRD_*`: 1 Ethernet, 772 loopback, 65534 none (tun).
/// `ENODEV`: no such device.
pub fn device_type(name: &str) -> io::Result<u16> {
    let mut request = request(name)?;
    device_ioctl(libc::SIOCGIFHWADDR as _, &mut request)?;
    // SAFETY: SIOCGIFHWADDR writes this member of the union.
    Ok(unsafe { request.ifr_ifru.ifru_hwaddr.sa_family })
}

/// The MTU of a device in bytes, link layer excluded. `ENODEV`: no such device.
pub fn device_mtu(name: &str) -> io::Result<u32> {
    let mut request = request(name)?;
    device_ioctl(libc::SIOCGIFMTU as _, &mut request)?;
    // SAFETY: SIOCGIFMTU writes this member of the union.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    u32::try_from(mtu).map_err(|_| errno(libc::ERANGE))
}

/// The driver of a device (`veth`, `ixgbe`). `EOPNOTSUPP`: it has none, as the loopback;
/// `ENODEV`: no such device.
pub fn device_driver(name: &str) -> io::Result<String> {
    let mut info = DriverInfo {
        cmd: ETHTOOL_GDRVINFO,
        driver: [0; 32],
        rest: [0; 160],
    };
    let mut request = request(name)?;
    request.ifr_ifru.ifru_data = (&raw mut info).cast();
    device_ioctl(libc::SIOCETHTOOL as _, &mut request)?;
    Ok(c_bytes_to_string(&info.driver))
}

/// `struct ethtool_value`.
#[repr(C)]
struct FeatureValue {
    cmd: u32,
    data: u32,
}

/// Turns a feature of a device on or off by its ethtool command (`ETHTOOL_STSO`). `EOPNOTSUPP`: it
/// cannot be changed; `ENODEV`: no such device.
pub fn device_set_feature(name: &str, command: u32, on: bool) -> io::Result<()> {
    let mut value = FeatureValue {
        cmd: command,
        data: on.into(),
    };
    let mut request = request(name)?;
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    device_ioctl(libc::SIOCETHTOOL as _, &mut request)
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    let name = c_string(name)?;
    let name = name.as_bytes_with_nul();
    // SAFETY: all zero is a valid ifreq: integers, and a null pointer.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() > request.ifr_name.len() {
        return Err(errno(libc::ENODEV));
    }
    for (to, &from) in request.ifr_name.iter_mut().zip(name) {
        *to = from as c_char;
    }
    Ok(request)
}

fn device_ioctl(operation: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    let socket: OwnedFd = socket(
        AddressFamily::Unix,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: the operations above take an ifreq; a pointer in it leads to the structure that the
    // operation fills.
    match unsafe { libc::ioctl(socket.as_raw_fd(), operation, request as *mut libc::ifreq) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
