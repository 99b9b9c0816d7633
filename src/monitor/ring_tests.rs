// SPDX-License-Identifier: MIT OR Apache-2.0
//! The real ring buffer, filled by a program of five lines. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libbpf_sys::bpf_insn;

use super::super::event::{How, Kind};
use super::*;
use crate::engine::bpf::types::tcp_flag;

const REPORT: i32 = size_of::<report>() as i32;
const FRAME: [u8; 64] = [0; 64];

fn instruction(code: u8, registers: (u8, u8), off: i16, imm: i32) -> bpf_insn {
    let mut instruction = bpf_insn {
        code,
        off,
        imm,
        ..Default::default()
    };
    instruction.set_dst_reg(registers.0);
    instruction.set_src_reg(registers.1);
    instruction
}

/// A program that reports a FIN at `at`, as `length` bytes.
fn reporter(map: &OwnedFd, at: i32, length: i32) -> OwnedFd {
    let stack = |offset: usize| i16::try_from(offset).unwrap() - REPORT as i16;
    let store = |code, offset, value| instruction(code, (10, 0), stack(offset), value);
    let flags = tcp_flag::TCP_FLAG_FIN.0 as i32;
    let mut program: Vec<bpf_insn> = (0..size_of::<report>() / 8)
        .map(|word| store(0x7a, 8 * word, 0))
        .collect();
    program.extend([
        store(0x7a, offset_of!(report, at), at),
        store(0x6a, offset_of!(report, tcp_flags), flags),
        instruction(0x18, (1, 1), 0, map.as_raw_fd()),
        instruction(0, (0, 0), 0, 0),
        instruction(0xbf, (2, 10), 0, 0),
        instruction(0x07, (2, 0), 0, -REPORT),
        instruction(0xb7, (3, 0), 0, length),
        instruction(0xb7, (4, 0), 0, 0),
        instruction(0x85, (0, 0), 0, libbpf_sys::BPF_FUNC_ringbuf_output as i32),
        instruction(0xb7, (0, 0), 0, 2),
        instruction(0x95, (0, 0), 0, 0),
    ]);
    // SAFETY: strings and instructions outlive the call.
    let program = unsafe {
        libbpf_sys::bpf_prog_load(
            libbpf_sys::BPF_PROG_TYPE_XDP,
            c"pc_test".as_ptr(),
            c"GPL".as_ptr(),
            program.as_ptr(),
            program.len() as _,
            std::ptr::null_mut(),
        )
    };
    assert!(program >= 0, "{program}");
    // SAFETY: a new descriptor of nobody else.
    unsafe { OwnedFd::from_raw_fd(program) }
}

/// A folder in bpffs that goes with the test.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        for pin in fs::read_dir(&self.0).unwrap() {
            fs::remove_file(pin.unwrap().path()).unwrap();
        }
        fs::remove_dir(&self.0).unwrap();
    }
}

/// A ring buffer for more than one batch, pinned; `None` without root.
fn pinned() -> Option<(Folder, OwnedFd)> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return None;
    }
    let bpffs = Path::new("/sys/fs/bpf");
    sys::mount_bpffs(bpffs).unwrap();
    let thread = nix::unistd::gettid();
    let folder = Folder(bpffs.join(format!("pc-ring-test-{thread}")));
    fs::create_dir(&folder.0).unwrap();
    let map = sys::map_create(sys::MapType::RingBuf, PIN, 0, 0, 1 << 20, 0).unwrap();
    sys::pin(&map, &folder.0.join(PIN)).unwrap();
    Some((folder, map))
}

fn run(program: &OwnedFd, times: usize) {
    (0..times).for_each(|_| assert_eq!(sys::test_run(program, &FRAME, None).unwrap().verdict, 2));
}

#[test]
fn reports_are_taken_once_and_in_batches() {
    let Some((folder, map)) = pinned() else {
        return;
    };
    let open = Open::new(folder.0.join(PIN)).unwrap();
    assert!(open.is_current());
    assert!(open.take(Duration::ZERO).unwrap().is_empty());
    run(&reporter(&map, 7, REPORT), 2 * BATCH + 1);
    let counts = [(); 4].map(|()| open.take(Duration::from_millis(10)).unwrap().len());
    assert_eq!(counts, [BATCH, BATCH, 1, 0]);
    // What is too short is none.
    run(&reporter(&map, 7, REPORT - 8), 3);
    run(&reporter(&map, 8, REPORT), 1);
    let taken = open.take(Duration::ZERO).unwrap();
    assert_eq!(
        taken.iter().map(|report| report.at).collect::<Vec<_>>(),
        [8]
    );
    // Of the next consumer nothing is new that this one had.
    run(&reporter(&map, 9, REPORT), 1);
    drop(open);
    let open = Open::new(folder.0.join(PIN)).unwrap();
    let taken = open.take(Duration::ZERO).unwrap();
    assert_eq!(
        taken.iter().map(|report| report.at).collect::<Vec<_>>(),
        [9]
    );
    fs::remove_file(folder.0.join(PIN)).unwrap();
    assert!(!open.is_current());
}

#[test]
fn all_that_was_reported_is_read() {
    let Some((folder, map)) = pinned() else {
        return;
    };
    let mut ring = Ring::open(&folder.0).unwrap();
    ring.open = Some(Open::new(folder.0.join(PIN)).unwrap());
    run(&reporter(&map, 99, REPORT), 1);
    run(&reporter(&map, 100, REPORT), 1);
    let mut events = Vec::new();
    let all = Duration::from_millis(10);
    ring.poll(all, &mut |at, event| events.push((at, event)))
        .unwrap();
    assert_eq!(events.len(), 2);
    for ((at, event), expected) in events.iter().zip([99, 100]) {
        assert_eq!(*at, expected);
        assert_eq!(event.kind, Kind::Close { how: How::Fin });
        assert_eq!((event.device.as_str(), &event.chain), ("0", &None));
    }
}

#[test]
fn a_folder_without_chains_has_no_ring_buffer() {
    assert_eq!(find(Path::new("/nowhere")).unwrap(), None);
    let mut ring = Ring::open(Path::new("/nowhere")).unwrap();
    ring.poll(Duration::ZERO, &mut |_, event| panic!("{event}"))
        .unwrap();
}
