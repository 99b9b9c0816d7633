/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What is remembered of MPTCP connections and their subflows. Learners write it, at the hooks of
 * both directions of a device.
 */
#pragma once

#include "mptcp.h"
#include "mptcp_types.h"
#include "sha256.h"
#include "flow_id.h"

#define MAX_SUBFLOWS 65536

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_SUBFLOWS);
	__type(key, struct flow_id);
	__type(value, struct subflow);
} pcd_subflows SEC(".maps");

/* By either token. A connection's subflows may use several devices, so this is not of one. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_SUBFLOWS);
	__type(key, __u32);
	__type(value, struct connection);
} pcn_connections SEC(".maps");

/* The end of a subflow that sent a segment, and the other one. */
static __always_inline struct subflow_end *subflow_end(struct subflow *subflow, __u32 end)
{
	return end ? &subflow->ends[1] : &subflow->ends[0];
}

/* Constant, and not on the stack, where there is no room for it. */
static const struct subflow fresh_subflow;

#define INITIATOR_UNKNOWN 2

/*
 * Begins to remember a subflow, forgetting what was known by its name. `syn` is the sequence number
 * of the initiator's SYN. NULL on failure.
 */
static __always_inline struct subflow *subflow_begin(const struct flow_id *flow, __u32 sender,
						     __u32 initiator, __u32 syn)
{
	struct subflow *subflow;

	if (bpf_map_update_elem(&pcd_subflows, flow, &fresh_subflow, 0 /* BPF_ANY */))
		return (void *)0;
	subflow = bpf_map_lookup_elem(&pcd_subflows, flow);
	if (subflow) {
		subflow->initiator = initiator;
		subflow->local = node.flags & NODE_INGRESS ? !sender : !!sender;
		subflow->opened_at = bpf_ktime_get_ns();
		subflow->syn = syn;
	}
	return subflow;
}

/* Whether its handshake, or data of it, showed that both ends speak MPTCP. */
static __always_inline bool subflow_is_agreed(const struct subflow *subflow)
{
	return subflow->flags & (SUBFLOW_ACCEPTED | SUBFLOW_ESTABLISHED) ||
	       subflow->ends[0].data_seen || subflow->ends[1].data_seen;
}

/* A segment of a subflow, and what is known of that. */
struct mptcp_segment {
	struct segment segment;
	struct sender from;
	__u64 index;	/* of its MPTCP options */
	struct subflow *subflow;
};

/*
 * Looks a segment's subflow up. REASON_NOT_MPTCP where none is known; `subflow` is NULL then, and
 * all else valid.
 */
static __always_inline enum reason mptcp_parse(hook_ctx *ctx, struct mptcp_segment *mptcp)
{
	enum reason reason = parse_tcp(ctx, &mptcp->segment);

	mptcp->subflow = (void *)0;
	if (reason)
		return reason;
	reason = flow_identify(ctx, &mptcp->segment.at, &mptcp->from.flow, &mptcp->from.end);
	if (reason)
		return reason;
	mptcp->index = mptcp_index(ctx, &mptcp->segment);
	mptcp->subflow = bpf_map_lookup_elem(&pcd_subflows, &mptcp->from.flow);
	return mptcp->subflow && mptcp->subflow->flags & SUBFLOW_IS_MPTCP ? REASON_NONE :
									    REASON_NOT_MPTCP;
}
