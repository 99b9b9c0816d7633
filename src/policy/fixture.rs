// SPDX-License-Identifier: MIT OR Apache-2.0
//! Small policies compiled by the tests, with the conventions of `policy.h` in short.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::Write as _;
use std::process::{Command, Stdio};

const HEADER: &str = r#"
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u64 __be64;
typedef _Bool bool;
typedef struct { __u8 addr[16]; } ip_t;
typedef struct { __u32 length; __u8 addr[16]; } prefix_t;
typedef struct { __u8 addr[6]; } mac_t;
typedef __u32 device_t;
typedef __u32 chain_t;
typedef __u32 token_t;
typedef __be16 port_t;
typedef struct { __u16 first, last; } port_range_t;
typedef __u64 duration_t;
typedef __u8 bytes_t;
#define SEC(name) __attribute__((section(name), used))
#define TAG(text) __attribute__((btf_decl_tag(text)))
#define DOC(text) TAG("doc:" text)
#define SELECTOR(name, text) TAG("selector") DOC(text) SEC("xdp") int pc_##name(void *ctx)
#define ACTION(name, text) TAG("action") DOC(text) SEC("xdp") int pc_##name(void *ctx)
#define TERMINAL(name, text) TAG("terminal") ACTION(name, text)
#define PARAMS const volatile struct params params SEC(".rodata")
#define SET(kind) struct { int (*type)[1]; struct kind##_key *key; struct element *value; \
        int (*max_entries)[1]; } set SEC(".maps")
struct element { __u64 arg; __u32 flags; __u32 pad; };
struct node_config { __u32 next; __u32 slot; };
const volatile struct node_config node SEC(".rodata");
"#;

/// Compiles C against [`HEADER`].
pub fn compile(source: &str) -> Vec<u8> {
    compile_alone(&format!("{HEADER}{source}"))
}

/// Compiles C that stands alone.
pub fn compile_alone(source: &str) -> Vec<u8> {
    let mut clang = Command::new("clang")
        .args([
            "-g", "-O2", "-target", "bpf", "-x", "c", "-c", "-o", "-", "-",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("clang is needed for the tests");
    let mut input = clang.stdin.take().unwrap();
    input.write_all(source.as_bytes()).unwrap();
    drop(input);
    let output = clang.wait_with_output().unwrap();
    assert!(output.status.success(), "clang refused the test's source");
    output.stdout
}

/// A policy with every type of the vocabulary.
pub const EVERYTHING: &str = r#"
enum option_kind { OPTION_KIND_NONE = 0, OPTION_KIND_MSS = 2, OPTION_KIND_MPTCP = 30,
        __OPTION_KIND_MAX };
enum tcp_flag { TCP_FLAG_FIN = 1, TCP_FLAG_SYN = 2, TCP_FLAG_RST = 4, TCP_FLAG_ACK = 16 }
        __attribute__((packed));
enum mode { MODE_FAST, MODE_SLOW } __attribute__((packed));

struct params {
        __be16 window DOC("receive window") TAG("required");
        __u8 ttl DOC("hops left") TAG("range:1..64") TAG("default:32");
        bool fast DOC("take the short way");
        bool sure DOC("must be sure") TAG("range:1..1");
        __u32 mark DOC("packet mark");
        __u64 big DOC("a big number");
        __be32 token DOC("a token");
        __be64 key64 DOC("a key");
        enum option_kind kind DOC("option to look for") TAG("range:0..255");
        enum tcp_flag flags_set DOC("flags that must be set") TAG("flags");
        enum mode mode DOC("pace");
        __u16 port_count DOC("a number");
        ip_t local DOC("local address");
        prefix_t net DOC("remote network");
        mac_t mac DOC("next hop");
        device_t device DOC("where to send");
        chain_t target DOC("chain to enter");
        port_t port DOC("local port");
        port_range_t ports DOC("remote ports");
        duration_t wait DOC("time to wait") TAG("range:1000..60000000000");
        bytes_t raw[8] DOC("bytes to add");
        __u8 raw_len;
        __u8 pad;
        port_t some[3] DOC("several ports");
        __u16 some_len;
        __u8 header_len DOC("not a companion");
};
PARAMS;
TERMINAL(everything, "has every type") { return params.window + node.next; }
"#;

/// Guards, and maps that are kept from one generation to the next.
pub const GUARDED: &str = r#"
enum option_kind { OPTION_KIND_NONE = 0, OPTION_KIND_MSS = 2, OPTION_KIND_MPTCP = 30 };
struct params {
        __u8 id DOC("an id") TAG("guard:0:sure:it ends all");
        enum option_kind kind DOC("option to look for") TAG("range:0..255")
                TAG("guard:mptcp:sure:it breaks") TAG("stateful:mss");
        bool sure DOC("do it all the same");
        bool blind DOC("look nothing up") TAG("stateless");
        token_t token DOC("a connection");
};
PARAMS;
#define MAP(name) struct { int (*type)[1]; __u32 *key; __u32 *value; int (*max_entries)[1]; } \
        name SEC(".maps")
MAP(pcd_seen);
MAP(pcn_all);
MAP(pc_scratch);
TAG("once") ACTION(guarded, "has guards") { return params.id + node.next; }
"#;

/// A selector that takes sets of kind `flow`.
pub const FLOW: &str = r#"
struct params {
        bool any_port DOC("ignore the ports of the key");
};
PARAMS;
struct flow_key {
        ip_t local DOC("local address") TAG("required");
        ip_t remote DOC("remote address") TAG("required");
        port_t local_port DOC("local port");
        port_t remote_port DOC("remote port");
};
SET(flow);
static void *(*lookup)(void *, const void *) = (void *)1;
TAG("hooks:tc-egress,xdp") SELECTOR(flow, "matches a flow of a set") {
        struct flow_key key = {};
        key.local_port = params.any_port + node.next;
        return !!lookup(&set, &key);
}
"#;

/// A selector that takes sets of kind `prefix` and has no parameters.
pub const PREFIX: &str = r#"
struct prefix_key { prefix_t prefix DOC("remote network") TAG("required"); };
SET(prefix);
static void *(*lookup)(void *, const void *) = (void *)1;
SELECTOR(prefix, "matches a network of a set") {
        struct prefix_key key = {};
        key.prefix.length = node.next;
        return !!lookup(&set, &key);
}
"#;
