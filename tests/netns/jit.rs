// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the kernel compiled the nodes to: a successor known at load time is a direct jump.

use policy_chain::engine::sys::{self, ProgInfo};
use policy_chain::testbed::Role;
use serde_json::json;

use crate::common::Environment;
use crate::common::kernel::programs_of;

/// A tail call enters its target behind the prologue, which its own frame has served.
const PROLOGUE: u64 = 64;
/// `jmp rel32`
const JUMP: u8 = 0xe9;
const JUMP_LENGTH: u64 = 5;

/// Where the direct jumps of the program lead to.
fn jumps(program: &ProgInfo) -> Vec<u64> {
    assert!(
        !program.jited.is_empty() && !program.jited_ksyms.is_empty(),
        "the kernel does not show compiled programs: set kernel.kptr_restrict to 0 or 1 and \
         net.core.bpf_jit_harden to 0, and run with CAP_SYSLOG"
    );
    let start = program.jited_ksyms[0];
    (0u64..)
        .zip(program.jited.windows(JUMP_LENGTH as usize))
        .filter(|(_, code)| code[0] == JUMP)
        .map(|(at, code)| {
            let distance = i32::from_le_bytes([code[1], code[2], code[3], code[4]]);
            (start + at + JUMP_LENGTH).wrapping_add_signed(distance.into())
        })
        .collect()
}

fn jumps_to(from: &ProgInfo, to: &ProgInfo) -> bool {
    let entry = to.jited_ksyms[0];
    jumps(from)
        .iter()
        .any(|target| (entry..entry + PROLOGUE).contains(target))
}

fn pinned(environment: &Environment, name: &str) -> std::os::fd::OwnedFd {
    let [generation] = &environment.generations()[..] else {
        panic!("one generation expected");
    };
    sys::open_pin(&environment.folder().join(generation).join(name)).unwrap()
}

fn direct_jumps_at(hook: &str, with_context: bool) {
    let hardened = std::fs::read_to_string("/proc/sys/net/core/bpf_jit_harden").unwrap();
    assert_ne!(
        hardened.trim(),
        "2",
        "net.core.bpf_jit_harden=2 makes all jumps between nodes indirect: set it to 0 or 1"
    );
    let environment = Environment::direct();
    let window = match with_context {
        true => json!({ "from": "element" }),
        false => json!(5),
    };
    let key = json!({ "port": 5, "arg": 1 });
    environment.apply(
        Role::Server,
        &json!({
            "version": 1,
            "chains": [{
                "name": "t",
                "attach": [{ "device": "path1", "hook": hook }],
                "selectors": [
                    { "selector": "tcp" },
                    { "selector": "ip_pair", "local": "10.0.1.2", "op": "or" },
                    { "selector": "service", "keys": [key] },
                ],
                "actions": [
                    { "action": "count" },
                    { "action": "strip_option", "kind": "timestamps" },
                    { "action": "set_window", "raw": true, "bytes": window },
                    { "action": "set_mss", "bytes": 1000 },
                    { "action": "insert_option", "kind": 253 },
                    { "action": "count" },
                ],
            }],
        }),
    );
    // From the last node of the chain to the first, as the planner makes them.
    let mut order: Vec<ProgInfo> = programs_of(&pinned(&environment, "nodes"))
        .into_iter()
        .map(|(_, id)| sys::prog_info(sys::prog_by_id(id).unwrap()).unwrap())
        .collect();
    order.reverse();
    let names: Vec<&str> = order.iter().map(|p| p.name.as_str()).collect();
    let entry = sys::prog_info(pinned(&environment, "entry")).unwrap();
    assert_eq!(names.len(), 9, "{names:?}");
    // tcp: to the first action, or to ip_pair; service: to the first action; then in order.
    let mut edges = vec![(&entry, &order[0])];
    for (from, to) in [
        (0, 3),
        (0, 1),
        (1, 2),
        (2, 3),
        (3, 4),
        (4, 5),
        (5, 6),
        (6, 7),
        (7, 8),
    ] {
        edges.push((&order[from], &order[to]));
    }
    for (from, to) in edges {
        assert!(
            jumps_to(from, to),
            "on {hook} {} does not jump to {} directly ({names:?})",
            from.name,
            to.name
        );
    }
    assert!(
        !jumps_to(&order[0], &order[8]),
        "the test sees jumps that are not there"
    );
    assert!(
        !jumps_to(&order[8], &order[0]),
        "the test sees jumps that are not there"
    );
}

#[test]
fn direct_jumps_by_xdp() {
    direct_jumps_at("xdp", false);
    direct_jumps_at("xdp", true);
}

#[test]
fn direct_jumps_by_tc() {
    direct_jumps_at("tc-ingress", false);
    direct_jumps_at("tc-egress", true);
}
