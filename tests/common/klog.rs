// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the kernel logs while a test runs.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU32, Ordering};

/// What a healthy kernel does not say.
const COMPLAINTS: [&str; 9] = [
    "WARNING:",
    "BUG:",
    "kernel BUG",
    "Oops",
    "Call Trace",
    "general protection",
    "csum failure",
    "soft lockup",
    "KASAN",
];

/// The kernel's log from a moment on.
pub struct KernelLog {
    log: File,
    /// A line of ours: what comes behind it is seen.
    mark: String,
    marked: bool,
}

impl KernelLog {
    pub fn from_now() -> KernelLog {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let mut log = options.open("/dev/kmsg").unwrap();
        log.seek(SeekFrom::End(0)).unwrap();
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let mark = format!("policy-chain test {}-{number}", std::process::id());
        // One write is one record, which ends with its line.
        fs::write("/dev/kmsg", format!("{mark}\n")).unwrap();
        KernelLog {
            log,
            mark,
            marked: false,
        }
    }

    /// That the kernel has complained of nothing since.
    pub fn assert_clean(&mut self) {
        // A read gives one record, which is not longer.
        let mut record = [0; 8192];
        loop {
            match self.log.read(&mut record) {
                Ok(length) => {
                    let text = String::from_utf8_lossy(&record[..length]);
                    let complains = COMPLAINTS.iter().any(|it| text.contains(it));
                    assert!(!complains, "the kernel says: {text}");
                    self.marked |= text.contains(&self.mark);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("the kernel's log was overwritten: {error}"),
            }
        }
        assert!(self.marked, "the kernel's log cannot be read");
    }
}
