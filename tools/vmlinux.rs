// SPDX-License-Identifier: MIT OR Apache-2.0
//! Prints `src/bpf/vmlinux.h`: the kernel types the BPF code uses, and what they depend on, from
//! the BTF of the running kernel. Run by `make vmlinux`.

use std::ffi::{CString, c_char, c_void};
use std::io::Write;
use std::process::exit;
use std::ptr;

use libbpf_sys as sys;

/// The types `src/bpf/` and `policies/` name. Add to this list, then `make vmlinux`.
const ROOTS: &[(u32, &[&str])] = &[
    (
        sys::BTF_KIND_TYPEDEF,
        &[
            "__u8", "__u16", "__u32", "__u64", "__s8", "__s16", "__s32", "__s64", "__be16",
            "__be32", "__be64", "__sum16", "__wsum", "bool",
        ],
    ),
    (sys::BTF_KIND_ENUM, &["xdp_action", "bpf_map_type"]),
    (
        sys::BTF_KIND_STRUCT,
        &[
            "xdp_md",
            "__sk_buff",
            "ethhdr",
            "iphdr",
            "ipv6hdr",
            "tcphdr",
            "udphdr",
            "bpf_fib_lookup",
        ],
    ),
];

unsafe extern "C" fn print(context: *mut c_void, format: *const c_char, args: VaList) {
    let mut line = [0u8; 4096];
    // SAFETY: libbpf passes a format with its arguments; the buffer's length is given.
    let length = unsafe { vsnprintf(line.as_mut_ptr().cast(), line.len(), format, args) };
    let length = usize::try_from(length).unwrap_or(0).min(line.len() - 1);
    // SAFETY: `context` is the `String` that `main` handed to btf_dump__new.
    let out = unsafe { &mut *context.cast::<String>() };
    out.push_str(&String::from_utf8_lossy(&line[..length]));
}

type VaList = *mut sys::__va_list_tag;

unsafe extern "C" {
    fn vsnprintf(to: *mut c_char, size: usize, format: *const c_char, args: VaList) -> i32;
}

fn main() {
    let mut out = String::new();
    // SAFETY: the pointers are checked, `out` outlives the dump, names are NUL-terminated.
    unsafe {
        let btf = sys::btf__load_vmlinux_btf();
        if btf.is_null() {
            eprintln!(
                "this kernel has no BTF (/sys/kernel/btf/vmlinux): build it with CONFIG_DEBUG_INFO_BTF"
            );
            exit(3);
        }
        let dump = sys::btf_dump__new(btf, Some(print), ptr::addr_of_mut!(out).cast(), ptr::null());
        for (kind, names) in ROOTS {
            for name in *names {
                let Ok(c_name) = CString::new(*name) else {
                    continue;
                };
                let id = sys::btf__find_by_name_kind(btf, c_name.as_ptr(), *kind);
                if id < 0 || sys::btf_dump__dump_type(dump, id as u32) != 0 {
                    eprintln!("this kernel's BTF has no type {name}");
                    exit(1);
                }
            }
        }
        sys::btf_dump__free(dump);
        sys::btf__free(btf);
    }
    let header = "/* SPDX-License-Identifier: GPL-2.0-only */\n\
        /* Kernel types in use, from BTF. Made by `make vmlinux`; do not edit. */\n#pragma once\n\n";
    if std::io::stdout()
        .write_all(format!("{header}{out}").as_bytes())
        .is_err()
    {
        exit(1);
    }
}
