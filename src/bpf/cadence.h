/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * How often an action is done to the packets of a flow: to the first so many, or once in a while.
 * A new TCP connection is a new flow, whether or not this action sees its SYN: the learner in front
 * of the graph does. Other flows are the same for as long as they are remembered. Two CPUs that see
 * packets of one flow at the same moment can each do it.
 */
#pragma once

#include "openings.h"

struct cadence_key {
	struct flow_id flow;
	__u32 action; /* node.cadence_id */
	__u8 protocol;
	__u8 pad[3];
};

struct cadence {
	__u64 done_at; /* nanoseconds of CLOCK_MONOTONIC */
	__u64 done;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct cadence_key);
	__type(value, struct cadence);
} pcd_cadence SEC(".maps");

static __always_inline bool has_cadence(void)
{
	return node.cadence_first || node.cadence_every;
}

/* Whether the connection began after an action was last done to it. */
static __always_inline bool cadence_is_stale(const struct cadence_key *key,
					     const struct cadence *known)
{
	struct opening *opening;

	if (key->protocol != IP_PROTOCOL_TCP)
		return false;
	opening = bpf_map_lookup_elem(&pcd_openings, &key->flow);
	return opening && opening->at > known->done_at;
}

/* REASON_NOT_DUE: not to this packet. Any other reason: there is no telling whose it is. */
static __always_inline enum reason cadence_check(hook_ctx *ctx, struct cadence_key *key)
{
	struct headers at = {};
	struct cadence *known;
	enum reason reason;
	__u32 sender;

	if (!has_cadence())
		return REASON_NONE;
	reason = parse_ip(ctx, &at);
	if (!reason)
		reason = flow_identify(ctx, &at, &key->flow, &sender);
	if (reason)
		return reason;
	key->action = node.cadence_id;
	key->protocol = at.protocol;
	known = bpf_map_lookup_elem(&pcd_cadence, key);
	if (!known)
		return REASON_NONE;
	if (cadence_is_stale(key, known)) {
		bpf_map_delete_elem(&pcd_cadence, key);
		return REASON_NONE;
	}
	if (node.cadence_first)
		return known->done < node.cadence_first ? REASON_NONE : REASON_NOT_DUE;
	return bpf_ktime_get_ns() - known->done_at >= node.cadence_every ? REASON_NONE :
									   REASON_NOT_DUE;
}

/* Takes note that the action was done. */
static __always_inline void cadence_done(const struct cadence_key *key)
{
	struct cadence new = {}, *known;

	if (!has_cadence())
		return;
	known = bpf_map_lookup_elem(&pcd_cadence, key);
	new.done_at = bpf_ktime_get_ns();
	new.done = known ? known->done + 1 : 1;
	bpf_map_update_elem(&pcd_cadence, key, &new, 0 /* BPF_ANY */);
}
