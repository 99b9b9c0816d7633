// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every call on the running kernel. Skipped, with a message, without root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use libbpf_sys::{BPF_NOEXIST, bpf_insn};

use super::*;

const XDP_PASS: i32 = 2;
const TC_ACT_UNSPEC: i32 = -1;

fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

/// Runs in a thread with a network namespace of its own, which ends with it.
fn in_netns(test: fn()) {
    if !root() {
        return;
    }
    let thread = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// A new veth pair; the index of its first end, `va`.
fn veth() -> u32 {
    ip("link add va type veth peer name vb");
    device_index("va").unwrap()
}

fn code<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.expect_err("should fail").raw_os_error().unwrap()
}

fn load(kind: ProgramType, instructions: &[bpf_insn]) -> OwnedFd {
    raise_memlock();
    // SAFETY: the strings and instructions outlive the call; the result is a new descriptor.
    unsafe {
        owned(libbpf_sys::bpf_prog_load(
            kind as _,
            c"pc_test".as_ptr(),
            c"GPL".as_ptr(),
            instructions.as_ptr(),
            instructions.len() as _,
            std::ptr::null_mut(),
        ))
    }
    .unwrap()
}

fn exit() -> bpf_insn {
    bpf_insn {
        code: 0x95,
        ..Default::default()
    }
}

/// `r0 = verdict; exit`
fn constant(kind: ProgramType, verdict: i32) -> OwnedFd {
    let set = bpf_insn {
        code: 0xb7,
        imm: verdict,
        ..Default::default()
    };
    load(kind, &[set, exit()])
}

/// `r0 = *(u32 *)(ctx + offset); exit`
fn context_word(kind: ProgramType, offset: i16) -> OwnedFd {
    let mut get = bpf_insn {
        code: 0x61,
        off: offset,
        ..Default::default()
    };
    get.set_src_reg(1);
    load(kind, &[get, exit()])
}

fn id(prog: &OwnedFd) -> u32 {
    prog_info(prog).unwrap().id
}

/// A folder of bpffs of this test alone.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        mount_bpffs(Path::new("/sys/fs/bpf")).unwrap();
        let path = format!("/sys/fs/bpf/pc-sys-{name}-{}", std::process::id());
        fs::create_dir(&path).unwrap();
        Scratch(path.into())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for entry in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            drop(fs::remove_file(entry.path()));
        }
        drop(fs::remove_dir(&self.0));
    }
}

#[test]
fn xdp_link() {
    in_netns(|| {
        let device = veth();
        let (first, second) = (
            constant(ProgramType::Xdp, XDP_PASS),
            constant(ProgramType::Xdp, 1),
        );
        assert_eq!(xdp_attached(device).unwrap(), None);
        let link = xdp_link_create(&first, device, XdpMode::Native).unwrap();
        let info = link_info(&link).unwrap();
        assert_eq!(
            (info.prog_id, info.ifindex, info.kind),
            (id(&first), device, LinkKind::Xdp)
        );
        let native = |prog| {
            Some(Attached {
                prog_id: id(prog),
                mode: AttachedMode::Native,
            })
        };
        assert_eq!(xdp_attached(device).unwrap(), native(&first));

        let again = xdp_link_create(&second, device, XdpMode::Native);
        assert_eq!(code(again), libc::EBUSY);
        let generic = xdp_link_create(&second, device, XdpMode::Generic);
        assert_eq!(code(generic), libc::EEXIST);

        link_update(&link, &second).unwrap();
        assert_eq!(xdp_attached(device).unwrap(), native(&second));
        assert_eq!(link_info(&link).unwrap().prog_id, id(&second));
        let tc = constant(ProgramType::SchedCls, TC_ACT_UNSPEC);
        assert_eq!(code(link_update(&link, &tc)), libc::EINVAL);

        let ids: io::Result<Vec<u32>> = links().collect();
        assert!(ids.unwrap().contains(&info.id));
        let same = link_by_id(info.id).unwrap();
        assert_eq!(link_info(&same).unwrap().id, info.id);

        link_detach(&link).unwrap();
        assert_eq!(xdp_attached(device).unwrap(), None);
        assert_eq!(link_info(&link).unwrap().ifindex, 0);
        assert_eq!(code(link_info(&first)), libc::EINVAL);

        let generic = xdp_link_create(&first, device, XdpMode::Generic).unwrap();
        let mode = xdp_attached(device).unwrap().unwrap().mode;
        assert_eq!(mode, AttachedMode::Generic);
        drop(generic);
        // A child that another test starts has the descriptor too, until it is another program.
        let limit = std::time::Instant::now() + Duration::from_secs(10);
        while xdp_attached(device).unwrap().is_some() {
            assert!(std::time::Instant::now() < limit, "still attached");
            std::thread::sleep(Duration::from_millis(5));
        }
    });
}

#[test]
fn xdp_link_outlives_device() {
    in_netns(|| {
        let device = veth();
        let prog = constant(ProgramType::Xdp, XDP_PASS);
        let link = xdp_link_create(&prog, device, XdpMode::Native).unwrap();
        ip("link del va");
        assert_eq!(link_info(&link).unwrap().ifindex, 0);
        assert_eq!(code(link_update(&link, &prog)), libc::ENOLINK);
        assert_eq!(code(xdp_attached(device)), libc::ENXIO);
        let gone = xdp_link_create(&prog, device, XdpMode::Native);
        assert_eq!(code(gone), libc::EINVAL);
    });
}

#[test]
fn foreign_xdp_is_kept() {
    in_netns(|| {
        let device = veth();
        let (foreign, ours) = (
            constant(ProgramType::Xdp, XDP_PASS),
            constant(ProgramType::Xdp, 1),
        );
        // SAFETY: an open program and no options.
        check(unsafe {
            libbpf_sys::bpf_xdp_attach(
                device as i32,
                foreign.as_raw_fd(),
                libbpf_sys::XDP_FLAGS_DRV_MODE,
                std::ptr::null(),
            )
        })
        .unwrap();
        let refused = xdp_link_create(&ours, device, XdpMode::Native);
        assert_eq!(code(refused), libc::EBUSY);
        let attached = xdp_attached(device).unwrap().unwrap();
        assert_eq!(attached.prog_id, id(&foreign));
    });
}

#[test]
fn tcx_link() {
    in_netns(|| {
        let device = veth();
        let (first, second) = (
            constant(ProgramType::SchedCls, TC_ACT_UNSPEC),
            constant(ProgramType::SchedCls, 2),
        );
        let other = constant(ProgramType::SchedCls, 2);
        for direction in [TcDirection::Ingress, TcDirection::Egress] {
            let link = tcx_link_create(&first, device, direction).unwrap();
            let neighbour = tcx_link_create(&other, device, direction).unwrap();
            assert_eq!(
                code(tcx_link_create(&other, device, direction)),
                libc::EEXIST
            );
            let info = link_info(&link).unwrap();
            assert_eq!(
                (info.prog_id, info.ifindex, info.kind),
                (id(&first), device, LinkKind::Tcx(direction))
            );
            link_update(&link, &second).unwrap();
            assert_eq!(link_info(&link).unwrap().prog_id, id(&second));
            link_detach(&link).unwrap();
            assert_eq!(link_info(&link).unwrap().ifindex, 0);
            assert_eq!(link_info(&neighbour).unwrap().ifindex, device);
        }
        let link = tcx_link_create(&first, device, TcDirection::Egress).unwrap();
        ip("link del va");
        assert_eq!(link_info(&link).unwrap().ifindex, 0);
        assert_eq!(code(link_update(&link, &second)), libc::ENOLINK);
        let gone = tcx_link_create(&second, device, TcDirection::Egress);
        assert_eq!(code(gone), libc::ENODEV);
    });
}

#[test]
fn clsact_filter() {
    in_netns(|| {
        silence_libbpf();
        let device = veth();
        let (first, second) = (
            constant(ProgramType::SchedCls, TC_ACT_UNSPEC),
            constant(ProgramType::SchedCls, 2),
        );
        use TcDirection::{Egress, Ingress};
        take_log();
        assert_eq!(clsact_query(device, Egress, 1, 10).unwrap(), None);
        assert!(!clsact_detach(device, Egress, 1, 10, true).unwrap());
        assert_eq!(take_log(), "");

        assert!(clsact_attach(&first, device, Egress, 1, 10, false).unwrap());
        assert!(!clsact_attach(&first, device, Ingress, 1, 10, false).unwrap());
        assert_eq!(take_log(), "");
        let found = clsact_query(device, Egress, 1, 10).unwrap();
        assert_eq!(found, Some(id(&first)));
        assert_eq!(clsact_query(device, Egress, 2, 10).unwrap(), None);
        assert_eq!(clsact_query(device, Egress, 1, 11).unwrap(), None);
        assert_eq!(take_log(), "");

        let taken = clsact_attach(&second, device, Egress, 1, 10, false);
        assert_eq!(code(taken), libc::EEXIST);
        assert!(take_log().contains("already exists"));
        assert!(!clsact_attach(&second, device, Egress, 1, 10, true).unwrap());
        let found = clsact_query(device, Egress, 1, 10).unwrap();
        assert_eq!(found, Some(id(&second)));

        assert!(!clsact_detach(device, Egress, 1, 10, true).unwrap());
        assert_eq!(clsact_query(device, Egress, 1, 10).unwrap(), None);
        let other = clsact_query(device, Ingress, 1, 10).unwrap();
        assert_eq!(other, Some(id(&first)));
        assert!(!clsact_detach(device, Egress, 1, 10, true).unwrap());
        assert!(clsact_detach(device, Ingress, 1, 10, true).unwrap());

        assert!(clsact_attach(&first, device, Egress, 1, 10, false).unwrap());
        assert!(!clsact_detach(device, Egress, 1, 10, false).unwrap());
        assert!(!clsact_attach(&first, device, Egress, 1, 10, false).unwrap());
    });
}

#[test]
fn clsact_failure_leaves_no_qdisc() {
    in_netns(|| {
        silence_libbpf();
        let device = veth();
        let xdp = constant(ProgramType::Xdp, XDP_PASS);
        let tc = constant(ProgramType::SchedCls, TC_ACT_UNSPEC);
        let wrong = clsact_attach(&xdp, device, TcDirection::Egress, 1, 10, false);
        assert_eq!(code(wrong), libc::EINVAL);
        assert!(clsact_attach(&tc, device, TcDirection::Egress, 1, 10, false).unwrap());
        let nowhere = clsact_attach(&tc, 4_000_000, TcDirection::Egress, 1, 10, false);
        assert_eq!(code(nowhere), libc::ENODEV);
        let unplaced = clsact_attach(&tc, device, TcDirection::Egress, 0, 10, false);
        assert_eq!(code(unplaced), libc::EINVAL);
    });
}

#[test]
fn clsact_beside_ingress_qdisc() {
    in_netns(|| {
        silence_libbpf();
        let device = veth();
        let tc = constant(ProgramType::SchedCls, TC_ACT_UNSPEC);
        let status = Command::new("tc")
            .args("qdisc add dev va ingress".split(' '))
            .status()
            .unwrap();
        assert!(status.success());
        let egress = clsact_attach(&tc, device, TcDirection::Egress, 1, 10, false);
        assert_eq!(code(egress), libc::EBUSY);
        assert!(!clsact_attach(&tc, device, TcDirection::Ingress, 1, 10, false).unwrap());
        assert!(!clsact_detach(device, TcDirection::Ingress, 1, 10, true).unwrap());
    });
}

#[test]
fn programs_described() {
    if !root() {
        return;
    }
    let prog = constant(ProgramType::Xdp, XDP_PASS);
    let info = prog_info(&prog).unwrap();
    assert_eq!(
        (info.kind, info.name.as_str()),
        (ProgramType::Xdp, "pc_test")
    );
    assert_ne!(info.tag, [0; 8]);
    assert!(!info.jited.is_empty());
    assert_eq!(info.jited_ksyms.len(), 1);
    assert!(info.loaded_at > Duration::ZERO);
    assert_eq!((info.map_ids.len(), info.verified_insns), (0, 2));
    let ids: io::Result<Vec<u32>> = programs().collect();
    assert!(ids.unwrap().contains(&info.id));
    assert_eq!(prog_info(prog_by_id(info.id).unwrap()).unwrap(), info);
    assert_eq!(code(prog_by_id(u32::MAX)), libc::ENOENT);
    assert_eq!(code(map_info(&prog)), libc::EINVAL);
    assert_eq!(code(map_lookup(&prog, &[0; 4], 4)), libc::EINVAL);
}

#[test]
fn program_names_its_maps() {
    if !root() {
        return;
    }
    let map = map_create(MapType::Array, "pc_used", 4, 8, 1, 0).unwrap();
    // r1 = map (two slots); r0 = 0; exit
    let mut map_ref = bpf_insn {
        code: 0x18,
        imm: map.as_raw_fd(),
        ..Default::default()
    };
    map_ref.set_dst_reg(1);
    map_ref.set_src_reg(1);
    let zero = bpf_insn {
        code: 0xb7,
        ..Default::default()
    };
    let prog = load(
        ProgramType::SchedCls,
        &[map_ref, bpf_insn::default(), zero, exit()],
    );
    let maps = prog_info(&prog).unwrap().map_ids;
    assert_eq!(maps, [map_info(&map).unwrap().id]);
}

#[test]
fn test_runs() {
    in_netns(|| {
        let device = veth();
        let frame: Vec<u8> = (0..64).collect();
        let prog = constant(ProgramType::Xdp, 3);
        let run = test_run(&prog, &frame, None).unwrap();
        assert_eq!((run.verdict, &run.frame), (3, &frame));
        let run = test_run(constant(ProgramType::SchedCls, TC_ACT_UNSPEC), &frame, None).unwrap();
        assert_eq!((run.verdict, &run.frame), (u32::MAX, &frame));
        assert_eq!(code(test_run(&prog, &frame[..13], None)), libc::EINVAL);

        let xdp = context_word(ProgramType::Xdp, 12);
        let run = test_run(&xdp, &frame, Some(device)).unwrap();
        assert_eq!((run.verdict, &run.frame), (device, &frame));
        let tc = context_word(ProgramType::SchedCls, 40);
        assert_eq!(test_run(&tc, &frame, Some(device)).unwrap().verdict, device);
        assert_eq!(test_run(&tc, &frame, None).unwrap().verdict, 1);
        let nowhere = test_run(&xdp, &frame, Some(4_000_000));
        assert_eq!(code(nowhere), libc::ENODEV);
    });
}

#[test]
fn single_elements() {
    if !root() {
        return;
    }
    let map = map_create(MapType::Hash, "pc_hash", 4, 8, 2, 0).unwrap();
    let info = map_info(&map).unwrap();
    assert_eq!(
        (
            info.kind,
            info.name.as_str(),
            info.key_size,
            info.value_size
        ),
        (MapType::Hash, "pc_hash", 4, 8)
    );
    assert_eq!((info.max_entries, info.flags), (2, 0));
    let ids: io::Result<Vec<u32>> = maps().collect();
    assert!(ids.unwrap().contains(&info.id));
    assert_eq!(map_info(map_by_id(info.id).unwrap()).unwrap(), info);

    assert_eq!(map_lookup(&map, b"aaaa", 8).unwrap(), None);
    map_update(&map, b"aaaa", b"11111111", 0).unwrap();
    let found = map_lookup(&map, b"aaaa", 8).unwrap();
    assert_eq!(found.as_deref(), Some(&b"11111111"[..]));
    let exists = map_update(&map, b"aaaa", b"22222222", u64::from(BPF_NOEXIST));
    assert_eq!(code(exists), libc::EEXIST);
    map_update(&map, b"bbbb", b"22222222", 0).unwrap();
    assert_eq!(
        code(map_update(&map, b"cccc", b"3333333\0", 0)),
        libc::E2BIG
    );

    let mut keys: Vec<Vec<u8>> = map_keys(map.as_fd())
        .unwrap()
        .collect::<io::Result<_>>()
        .unwrap();
    keys.sort();
    assert_eq!(keys, [b"aaaa", b"bbbb"]);
    assert!(map_delete(&map, b"aaaa").unwrap());
    assert!(!map_delete(&map, b"aaaa").unwrap());

    assert_eq!(code(map_update(&map, b"aaa", b"11111111", 0)), libc::EINVAL);
    assert_eq!(code(map_update(&map, b"aaaa", b"1111", 0)), libc::EINVAL);
    assert_eq!(code(map_lookup(&map, b"aaaa", 4)), libc::EINVAL);
    assert_eq!(code(map_delete(&map, b"")), libc::EINVAL);
    let long = map_create(MapType::Hash, "a_name_too_long_", 4, 8, 2, 0);
    assert_eq!(code(long), libc::EINVAL);
}

/// Keys and values of `count` elements: 16-byte keys, 8-byte values.
fn elements(count: usize) -> (Vec<u8>, Vec<u8>) {
    let keys = (0..count as u128).flat_map(|n| (n * 7 + 1).to_ne_bytes());
    let values = (0..count as u64).flat_map(u64::to_ne_bytes);
    (keys.collect(), values.collect())
}

#[test]
fn large_batch() {
    if !root() {
        return;
    }
    const COUNT: usize = 100_000;
    let map = map_create(MapType::Hash, "pc_batch", 16, 8, COUNT as u32, 0).unwrap();
    let (keys, values) = elements(COUNT);
    let start = Instant::now();
    map_update_batch(&map, &keys, &values, COUNT).unwrap();
    let stored = start.elapsed();
    let start = Instant::now();
    let mut entries = map_entries(&map, 16, 8).unwrap();
    println!(
        "{COUNT} elements: stored in {stored:?}, read in {:?}",
        start.elapsed()
    );
    entries.sort_by_key(|(_, value)| u64::from_ne_bytes(value.as_slice().try_into().unwrap()));
    assert_eq!(entries.len(), COUNT);
    let flat: Vec<u8> = entries.iter().flat_map(|(key, _)| key.clone()).collect();
    assert_eq!(flat, keys);

    let (more, values) = elements(COUNT + 5);
    let full = map_update_batch(&map, &more, &values, COUNT + 5).unwrap_err();
    assert_eq!((full.stored, full.of), (COUNT, COUNT + 5));
    assert!(full.is_full() && full.to_string().starts_with("stored 100000 of 100005"));
    let uneven = map_update_batch(&map, &more[1..], &values, COUNT + 5).unwrap_err();
    assert_eq!(uneven.source.raw_os_error(), Some(libc::EINVAL));
    map_update_batch(&map, &[], &[], 0).unwrap();
}

/// Small rooms make the kernel refuse whole buckets.
#[test]
fn crowded_buckets_are_read_whole() {
    if !root() {
        return;
    }
    for size in [1, 2, 3, 5, 64, 1000] {
        let map = map_create(MapType::Hash, "pc_crowded", 16, 8, size, 1).unwrap();
        let (keys, values) = elements(size as usize);
        map_update_batch(&map, &keys, &values, size as usize).unwrap();
        assert_eq!(map_dump(&map).unwrap().len(), size as usize);
    }
    let large = map_create(MapType::Hash, "pc_large", 16, 400_000, 32, 1).unwrap();
    let (keys, _) = elements(32);
    map_update_batch(&large, &keys, &vec![7; 32 * 400_000], 32).unwrap();
    assert_eq!(map_dump(&large).unwrap().len(), 32);
    let empty = map_create(MapType::Hash, "pc_empty", 16, 8, 10, 0).unwrap();
    assert!(map_dump(&empty).unwrap().is_empty());
}

#[test]
fn prefixes_in_batches() {
    if !root() {
        return;
    }
    const NO_PREALLOC: u32 = libbpf_sys::BPF_F_NO_PREALLOC;
    let map = map_create(MapType::LpmTrie, "pc_lpm", 8, 8, 100, NO_PREALLOC).unwrap();
    let key = |n: u8, length: u32| [length.to_ne_bytes(), [10, n, 0, 0]].concat();
    let keys: Vec<u8> = (0..120).flat_map(|n| key(n, 16)).collect();
    map_update_batch(&map, &keys[..8 * 50], &[1; 8 * 50], 50).unwrap();
    let entries = map_entries(&map, 8, 8).unwrap();
    assert_eq!(entries.len(), 50);
    let full = map_update_batch(&map, &keys, &[2; 8 * 120], 120).unwrap_err();
    assert!(full.is_full());
    assert_eq!(full.stored, 100);

    let mut wrong = keys[..8 * 5].to_vec();
    wrong[8 * 3..8 * 4].copy_from_slice(&key(3, 33));
    let refused = map_update_batch(&map, &wrong, &[3; 8 * 5], 5).unwrap_err();
    assert_eq!(refused.source.raw_os_error(), Some(libc::EINVAL));
    assert_eq!(refused.stored, 3);
}

/// A map of programs has no batch update, and its values are not what they were stored as.
#[test]
fn maps_without_batches() {
    if !root() {
        return;
    }
    let prog = constant(ProgramType::Xdp, XDP_PASS);
    let map = map_create(MapType::ProgArray, "pc_slots", 4, 4, 3, 0).unwrap();
    let fd = prog.as_raw_fd().to_ne_bytes();
    let keys: Vec<u8> = (0..2u32).flat_map(u32::to_ne_bytes).collect();
    map_update_batch(&map, &keys, &fd.repeat(2), 2).unwrap();
    let entries = map_dump(&map).unwrap();
    assert_eq!(entries.keys, keys);
    assert_eq!(entries.values, id(&prog).to_ne_bytes().repeat(2));
    let beyond = 3u32.to_ne_bytes();
    let refused = map_update_batch(&map, &beyond, &fd, 1).unwrap_err();
    assert_eq!((refused.stored, refused.is_full()), (0, true));
}

#[test]
fn percpu_values() {
    if !root() {
        return;
    }
    let cpus = possible_cpus().unwrap();
    let map = map_create(MapType::PercpuArray, "pc_percpu", 4, 12, 300, 0).unwrap();
    let one: Vec<u8> = (0..cpus)
        .flat_map(|cpu| [vec![cpu as u8 + 1; 12], vec![0; 4]].concat())
        .collect();
    for index in [0u32, 299] {
        map_update(&map, &index.to_ne_bytes(), &one, 0).unwrap();
    }
    let expected: Vec<Vec<u8>> = (0..cpus).map(|cpu| vec![cpu as u8 + 1; 12]).collect();
    assert_eq!(percpu_lookup(&map, 299, 12).unwrap(), expected);
    assert_eq!(code(percpu_lookup(&map, 300, 12)), libc::ENOENT);
    assert_eq!(code(percpu_lookup(&map, 0, 16)), libc::EINVAL);

    let all = percpu_read(&map).unwrap();
    assert_eq!(all.len(), 300);
    assert!(all.values(299).eq(expected.iter().map(Vec::as_slice)));
    assert!(all.values(298).all(|value| value == [0; 12]));
    assert_eq!(all.values(298).count(), cpus);
    assert_eq!(all.values(300).count(), 0);

    percpu_zero(&map, 299, 12).unwrap();
    let all = percpu_read(&map).unwrap();
    assert!(all.values(0).all(|value| value == [0; 12]));
    assert_eq!(all.values(299).count(), cpus);
    assert!(all.values(299).all(|value| value != [0; 12]));
    assert_eq!(code(percpu_zero(&map, 301, 12)), libc::E2BIG);

    let plain = map_create(MapType::Array, "pc_plain", 4, 12, 1, 0).unwrap();
    assert_eq!(code(percpu_read(&plain)), libc::EINVAL);
}

#[test]
fn frozen_bytes() {
    if !root() {
        return;
    }
    let large = vec![0xa5; FROZEN_BYTES_MAX];
    for bytes in [&b""[..], b"x", b"12345678", b"123456789", &large] {
        let map = map_create_frozen_bytes("pc_spec", bytes).unwrap();
        assert_eq!(map_read_bytes(&map).unwrap(), bytes);
        let size = map_info(&map).unwrap().value_size as usize;
        assert_eq!(size, 8 + bytes.len().next_multiple_of(8));
        let change = map_update(&map, &[0; 4], &vec![0; size], 0);
        assert_eq!(code(change), libc::EPERM);
    }
    let too_large = map_create_frozen_bytes("pc_spec", &vec![0; FROZEN_BYTES_MAX + 1]);
    assert_eq!(code(too_large), libc::E2BIG);
    let other = map_create(MapType::Array, "pc_other", 4, 4, 1, 0).unwrap();
    assert_eq!(code(map_read_bytes(&other)), libc::EPROTO);
}

#[test]
fn pins() {
    if !root() {
        return;
    }
    let scratch = Scratch::new("pins");
    let path = scratch.0.join("map");
    let map = map_create_frozen_bytes("pc_pinned", b"spec").unwrap();
    pin(&map, &path).unwrap();
    assert_eq!(code(pin(&map, &path)), libc::EEXIST);
    drop(map);
    assert_eq!(map_read_bytes(open_pin(&path).unwrap()).unwrap(), b"spec");
    unpin(&path).unwrap();
    assert_eq!(code(open_pin(&path)), libc::ENOENT);
    assert_eq!(code(unpin(&path)), libc::ENOENT);

    let prog = constant(ProgramType::Xdp, XDP_PASS);
    assert_eq!(code(pin(&prog, &scratch.0.join("eth0.100"))), libc::EPERM);
    assert_eq!(code(pin(&prog, &scratch.0.join("no/where"))), libc::ENOENT);
    let outside = std::env::temp_dir().join("pc-sys-no-bpffs");
    assert_eq!(code(pin(&prog, &outside)), libc::EPERM);
    assert!(c_string("a\0b").is_err());
}

#[test]
fn pinned_link_survives() {
    in_netns(|| {
        let scratch = Scratch::new("link");
        let path = scratch.0.join("link");
        let device = veth();
        let (first, second) = (
            constant(ProgramType::Xdp, XDP_PASS),
            constant(ProgramType::Xdp, 1),
        );
        let link = xdp_link_create(&first, device, XdpMode::Native).unwrap();
        pin(&link, &path).unwrap();
        drop(link);
        let link = open_pin(&path).unwrap();
        assert_eq!(link_info(&link).unwrap().prog_id, id(&first));
        link_update(&link, &second).unwrap();
        drop(link);
        assert_eq!(xdp_attached(device).unwrap().unwrap().prog_id, id(&second));
        unpin(&path).unwrap();
        // The kernel lets go of an unpinned link from a work queue.
        let start = Instant::now();
        while xdp_attached(device).unwrap().is_some() {
            assert!(start.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(5));
        }
    });
}

#[test]
fn bpffs() {
    if !root() {
        return;
    }
    mount_bpffs(Path::new("/sys/fs/bpf")).unwrap();
    ensure_bpffs(Path::new("/sys/fs/bpf")).unwrap();
    ensure_bpffs(Path::new("/sys/fs/bpf/not/there/yet")).unwrap();
    assert_eq!(
        code(ensure_bpffs(Path::new("/not/there"))),
        libc::EOPNOTSUPP
    );
    assert!(!is_bpffs(Path::new("not-there")).unwrap());

    let folder = std::env::temp_dir().join(format!("pc-sys-mount-{}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    let mounted = folder.clone();
    let thread = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let (root, private) = (c"/".as_ptr(), libc::MS_REC | libc::MS_PRIVATE);
        let none = std::ptr::null();
        // SAFETY: a NUL-terminated path; the others may be null for a change of propagation.
        let result = unsafe { libc::mount(none, root, none, private, none.cast()) };
        assert_eq!(result, 0);
        // All at once, they mount it once.
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| mount_bpffs(&mounted).unwrap());
            }
        });
        ensure_bpffs(&mounted).unwrap();
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        assert_eq!(mounts.matches(mounted.to_str().unwrap()).count(), 1);
        let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(&mounted).unwrap());
        assert_eq!(mode & 0o777, 0o700);
        let map = map_create_frozen_bytes("pc_mounted", b"x").unwrap();
        pin(&map, &mounted.join("map")).unwrap();
    });
    let result = thread.join();
    assert!(!is_bpffs(&folder).unwrap());
    fs::remove_dir(&folder).unwrap();
    result.unwrap();
}

#[test]
fn folder_lock() {
    if !root() {
        return;
    }
    let scratch = Scratch::new("lock");
    let path = scratch.0.clone();
    let lock = lock_folder(&path, Duration::ZERO).unwrap();
    let start = Instant::now();
    let wait = Duration::from_millis(100);
    assert_eq!(code(lock_folder(&path, wait)), libc::EWOULDBLOCK);
    assert!(start.elapsed() >= wait);

    let waiter = {
        let path = path.clone();
        std::thread::spawn(move || lock_folder(&path, Duration::from_secs(20)).map(drop))
    };
    std::thread::sleep(wait);
    drop(lock);
    waiter.join().unwrap().unwrap();
    let nowhere = lock_folder(&path.join("none"), Duration::ZERO);
    assert_eq!(code(nowhere), libc::ENOENT);
    let file = lock_folder(Path::new("/proc/version"), Duration::ZERO);
    assert_eq!(code(file), libc::ENOTDIR);
}

/// A lock on a folder that was removed while waiting must not be taken for one on its successor.
#[test]
fn folder_lock_follows_the_path() {
    if !root() {
        return;
    }
    let scratch = Scratch::new("relock");
    let path = scratch.0.clone();
    let old = lock_folder(&path, Duration::ZERO).unwrap();
    let waiter = {
        let path = path.clone();
        std::thread::spawn(move || lock_folder(&path, Duration::from_secs(20)))
    };
    std::thread::sleep(Duration::from_millis(100));
    fs::remove_dir(&path).unwrap();
    fs::create_dir(&path).unwrap();
    drop(old);
    let lock = waiter.join().unwrap().unwrap();
    assert_eq!(code(lock_folder(&path, Duration::ZERO)), libc::EWOULDBLOCK);
    drop(lock);
}

#[test]
fn grace_period() {
    if !root() {
        return;
    }
    let start = Instant::now();
    wait_rcu().unwrap();
    println!("one RCU grace period: {:?}", start.elapsed());
}

#[test]
fn devices() {
    in_netns(|| {
        let device = veth();
        assert_eq!(device_name(device).unwrap(), "va");
        assert_eq!(code(device_index("none")), libc::ENODEV);
        assert_eq!(code(device_name(4_000_000)), libc::ENXIO);
        assert_eq!(device_type("va").unwrap(), libc::ARPHRD_ETHER);
        assert_eq!(device_type("lo").unwrap(), libc::ARPHRD_LOOPBACK);
        assert_eq!(code(device_type("none")), libc::ENODEV);
        assert_eq!(code(device_type("a-name-far-too-long")), libc::ENODEV);
        ip("link set va mtu 1400");
        assert_eq!(device_mtu("va").unwrap(), 1400);
        assert_eq!(device_driver("va").unwrap(), "veth");
        assert_eq!(code(device_driver("lo")), libc::EOPNOTSUPP);
        assert_eq!(size_of::<device::DriverInfo>(), 196);
    });
}

#[test]
fn log_keeps_the_end() {
    let mut log = String::new();
    for _ in 0..3 {
        append_log(&mut log, &"é".repeat(LOG_MAX / 4));
    }
    append_log(&mut log, "!");
    assert!(log.len() <= LOG_MAX && log.ends_with("é!"));
}

/// A walk sees every element that stays, whatever is deleted behind it.
#[test]
fn walks_in_batches() {
    if !root() {
        return;
    }
    const COUNT: usize = 3000;
    let hash = map_create(MapType::Hash, "pc_walk", 16, 8, COUNT as u32, 1).unwrap();
    let (keys, values) = elements(COUNT);
    map_update_batch(&hash, &keys, &values, COUNT).unwrap();
    let mut walk = MapWalk::new(64);
    let mut seen = HashSet::new();
    let mut batches = 0;
    while let Some(batch) = walk.next(&hash).unwrap() {
        batches += 1;
        assert!(batch.len() <= 128, "{}", batch.len());
        for (key, _) in batch.iter() {
            assert!(seen.insert(key.to_vec()));
            assert!(map_delete(&hash, key).unwrap());
        }
    }
    assert_eq!(seen.len(), COUNT);
    assert!(batches >= COUNT / 128);
    assert!(walk.next(&hash).unwrap().is_none());

    let trie = map_create(MapType::LpmTrie, "pc_walk_lpm", 8, 8, 300, 1).unwrap();
    let key = |n: u8| [32u32.to_ne_bytes(), [10, 0, 0, n]].concat();
    let keys: Vec<u8> = (0..200).flat_map(key).collect();
    map_update_batch(&trie, &keys, &[1; 8 * 200], 200).unwrap();
    let mut walk = MapWalk::new(7);
    let mut seen = HashSet::new();
    while let Some(batch) = walk.next(&trie).unwrap() {
        for (key, _) in batch.iter() {
            seen.insert(key[7]);
            // The last of a batch, at times, where the walk goes on.
            if key[7] % 3 == 0 {
                assert!(map_delete(&trie, key).unwrap());
            }
        }
    }
    assert_eq!(seen.len(), 200);
    assert_eq!(map_dump(&trie).unwrap().len(), 133);
}
