/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * When TCP connections began: a later one may have the addresses and ports of one before. Learners
 * write it, each at the hook whose actions ask: an end sends one SYN or SYN-ACK, and always by the
 * same hook.
 */
#pragma once

#include "tcp.h"
#include "flow_id.h"

struct opening {
	__u64 at;	   /* nanoseconds of CLOCK_MONOTONIC */
	__be32 initial[2]; /* sequence number of the SYN or SYN-ACK of each end */
	__u8 seen[2];	   /* it was */
	__u8 pad[6];
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct flow_id);
	__type(value, struct opening);
} pcd_openings SEC(".maps");

/*
 * Takes note of a SYN or SYN-ACK. One sent again has the same sequence number, and a SYN-ACK that
 * answers the SYN is of the same connection. `initial` is its sequence number.
 */
static __always_inline void opening_learn(const struct segment *segment, const struct flow_id *id,
					  __u32 sender, __be32 initial)
{
	struct opening new = {}, *known;

	known = bpf_map_lookup_elem(&pcd_openings, id);
	if (known) {
		__u8 seen = sender ? known->seen[1] : known->seen[0];
		__be32 before = sender ? known->initial[1] : known->initial[0];

		if (seen && before == initial)
			return;
		new = *known;
		if (seen || !(segment->flags & TCP_FLAG_ACK))
			new = (struct opening){};
	}
	if (!new.at)
		new.at = bpf_ktime_get_ns();
	if (sender) {
		new.initial[1] = initial;
		new.seen[1] = true;
	} else {
		new.initial[0] = initial;
		new.seen[0] = true;
	}
	bpf_map_update_elem(&pcd_openings, id, &new, 0 /* BPF_ANY */);
}
