/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What is remembered of a connection: the window scales its ends agreed on (RFC 7323, 2).
 * Learners write it, at every hook of a device that half of a handshake may pass.
 */
#pragma once

#include "tcp_options.h"
#include "flow_id.h"

/* Filled by learners of one device, and read by the policies on it. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536); /* the kernel forgets those not looked up for longest */
	__type(key, struct flow_id);
	__type(value, struct flow_state);
} pcd_flows SEC(".maps");

#define WINDOW_SCALE_LENGTH 3
#define WINDOW_SCALE_MAX 14 /* a greater one counts as this (RFC 7323, 2.3) */

/* The bits the sender's window is shifted by, or a negative number if that is not known. */
static __always_inline int flow_window_scale(const struct flow_state *state, __u32 sender)
{
	const struct flow_end *own = sender ? &state->ends[1] : &state->ends[0];
	const struct flow_end *other = sender ? &state->ends[0] : &state->ends[1];

	/* both offer to scale, or nobody does */
	if ((own->seen && !own->scales) || (other->seen && !other->scales))
		return 0;
	/* who answers scales only if it was offered, so the answer alone tells */
	if (own->seen && (other->seen || state->initiator != sender))
		return own->scale;
	return -1;
}

/* What the SYN of an end says. REASON_BAD_OPTION: nothing that can be relied on. */
static __always_inline enum reason flow_end_read(hook_ctx *ctx, const struct segment *segment,
						 struct flow_end *end)
{
	__u64 marked = tcp_options_marked(ctx, segment, OPTION_KIND_WINDOW_SCALE,
					  MPTCP_SUBTYPE_ANY);
	__u32 offset;
	__u8 *scale;

	end->seen = true;
	if (!marked)
		return REASON_NONE;
	offset = tcp_option_offset(marked, WINDOW_SCALE_LENGTH);
	if (!offset)
		return REASON_BAD_OPTION;
	scale = pkt_at(ctx, segment->at.transport + offset + 2, 1);
	if (!scale)
		return REASON_TRUNCATED;
	end->scales = true;
	end->scale = *scale > WINDOW_SCALE_MAX ? WINDOW_SCALE_MAX : *scale;
	return REASON_NONE;
}

/*
 * Takes note of a SYN or SYN-ACK. A SYN begins a connection, unless it is the one that did
 * so, sent again; one that cannot be read leaves the connection unknown. `initial` is its sequence
 * number.
 */
static __always_inline void flow_learn(hook_ctx *ctx, const struct segment *segment,
				       const struct flow_id *id, __u32 sender, __be32 initial)
{
	struct flow_state state = { .syn = initial, .initiator = sender }, *known;
	struct flow_end end = {};

	known = bpf_map_lookup_elem(&pcd_flows, id);
	if (segment->flags & TCP_FLAG_ACK) {
		state.syn = 0;
		state.initiator = !sender;
		if (known)
			state = *known;
	} else if (known && known->syn_seen && known->syn == state.syn &&
		   known->initiator == sender) {
		return;
	} else {
		state.syn_seen = true;
	}
	if (flow_end_read(ctx, segment, &end)) {
		bpf_map_delete_elem(&pcd_flows, id);
		return;
	}
	if (sender)
		state.ends[1] = end;
	else
		state.ends[0] = end;
	bpf_map_update_elem(&pcd_flows, id, &state, 0 /* BPF_ANY */);
}
