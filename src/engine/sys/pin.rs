// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pins in bpffs, the file system itself, and the lock on a folder of it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::statfs::{FsType, statfs};

use super::{c_string, check, errno, owned};

const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);

/// How long to sleep between two attempts at a lock.
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Pins a program, map or link. `EEXIST`: the name is taken; `EPERM`: not in bpffs, or a name with
/// a dot; `ENOENT`: no such folder.
pub fn pin(object: impl AsFd, path: &Path) -> io::Result<()> {
    let path = c_string(path.as_os_str().as_bytes())?;
    // SAFETY: a NUL-terminated path and an open descriptor, during the call.
    check(unsafe { libbpf_sys::bpf_obj_pin(object.as_fd().as_raw_fd(), path.as_ptr()) }).map(drop)
}

/// Opens what is pinned at `path`. `ENOENT`: nothing; `EACCES`: not permitted (a link needs write
/// permission), or no pin.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_string(path.as_os_str().as_bytes())?;
    // SAFETY: a NUL-terminated path that outlives the call; the result is a new descriptor.
    unsafe { owned(libbpf_sys::bpf_obj_get(path.as_ptr())) }
}

/// Removes a pin. The object lives on while somebody holds it otherwise. If nobody does, the kernel
/// lets go of it a little later: a link's program may still run on return
/// ([`link_detach`](super::link_detach) first stops it at once).
pub fn unpin(path: &Path) -> io::Result<()> {
    std::fs::remove_file(path)
}

/// Whether `path`, or its nearest ancestor that exists, is in a bpffs.
pub fn is_bpffs(path: &Path) -> io::Result<bool> {
    for ancestor in path.ancestors() {
        let ancestor = match ancestor.as_os_str().is_empty() {
            true => Path::new("."),
            false => ancestor,
        };
        match statfs(ancestor) {
            Ok(found) => return Ok(found.filesystem_type() == BPF_FS_MAGIC),
            Err(nix::errno::Errno::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(errno(libc::ENOENT))
}

/// `EOPNOTSUPP` unless [`is_bpffs`]: nothing can be pinned at `path`.
pub fn ensure_bpffs(path: &Path) -> io::Result<()> {
    match is_bpffs(path)? {
        true => Ok(()),
        false => Err(errno(libc::EOPNOTSUPP)),
    }
}

/// Mounts a new bpffs, mode 0700, on an existing folder, unless that is in a bpffs already. Of
/// several processes that do so at once, one mounts: a second mount would hide what is pinned in
/// the first. `EPERM` without `CAP_SYS_ADMIN`.
pub fn mount_bpffs(path: &Path) -> io::Result<()> {
    const WAIT: Duration = Duration::from_secs(10);
    let _lock = lock_folder(path, WAIT)?;
    match is_bpffs(path)? {
        true => Ok(()),
        false => mount(path),
    }
}

fn mount(path: &Path) -> io::Result<()> {
    let path = c_string(path.as_os_str().as_bytes())?;
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    // SAFETY: NUL-terminated strings that outlive the call.
    let result = unsafe {
        libc::mount(
            c"bpf".as_ptr(),
            path.as_ptr(),
            c"bpf".as_ptr(),
            flags,
            c"mode=0700".as_ptr().cast(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An exclusive lock on a folder, held until dropped or the process ends.
#[derive(Debug)]
pub struct FolderLock {
    /// Open, it holds the lock.
    folder: File,
}

impl FolderLock {
    /// Whether the folder locked is the one at `path`: it may have been removed, and be another's.
    pub fn is_at(&self, path: &Path) -> io::Result<bool> {
        match is_at(&self.folder, path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            result => result,
        }
    }
}

/// Locks a folder against other processes and threads that lock it (`flock`; regular files, and so
/// lock files, cannot exist in bpffs). `EWOULDBLOCK`: still locked after `wait`; `ENOENT`: no such
/// folder; `ENOTDIR`: no folder.
pub fn lock_folder(path: &Path, wait: Duration) -> io::Result<FolderLock> {
    let start = Instant::now();
    loop {
        let folder = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(path)?;
        match try_lock(&folder) {
            // Who held it may have removed the folder, and another one may be there now.
            Ok(()) if is_at(&folder, path)? => return Ok(FolderLock { folder }),
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let left = wait.saturating_sub(start.elapsed());
                if left.is_zero() {
                    return Err(error);
                }
                std::thread::sleep(LOCK_RETRY.min(left));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn try_lock(folder: &File) -> io::Result<()> {
    // SAFETY: an open descriptor; no memory is involved.
    match unsafe { libc::flock(folder.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_at(folder: &File, path: &Path) -> io::Result<bool> {
    let (opened, named) = (folder.metadata()?, std::fs::metadata(path)?);
    Ok((opened.dev(), opened.ino()) == (named.dev(), named.ino()))
}
