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
	struct flow_id flow;
	__u32 sender;	/* end */
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
	reason = flow_identify(ctx, &mptcp->segment.at, &mptcp->flow, &mptcp->sender);
	if (reason)
		return reason;
	mptcp->index = mptcp_index(ctx, &mptcp->segment);
	mptcp->subflow = bpf_map_lookup_elem(&pcd_subflows, &mptcp->flow);
	return mptcp->subflow && mptcp->subflow->flags & SUBFLOW_IS_MPTCP ? REASON_NONE :
									    REASON_NOT_MPTCP;
}

/*
 * The same, for who adds an MPTCP option to the segment: its receiver must take MPTCP for
 * established by now, or would fall back to TCP.
 */
static __always_inline enum reason mptcp_parse_to_add(hook_ctx *ctx, struct mptcp_segment *mptcp)
{
	enum reason reason = mptcp_parse(ctx, mptcp);

	if (reason)
		return reason;
	if (mptcp->segment.at.authenticated)
		return REASON_AUTHENTICATED;
	if (mptcp->segment.flags & TCP_FLAG_SYN)
		return REASON_SYN;
	/* The last words of an end are not the place to announce anything. */
	if (mptcp->segment.flags & (TCP_FLAG_FIN | TCP_FLAG_RST))
		return REASON_NOT_MPTCP;
	return subflow_end(mptcp->subflow, mptcp->sender)->data_seen ? REASON_NONE :
								       REASON_NOT_MPTCP;
}

/*
 * Begins to add an option of the subtype, of which a segment has only one, and gives the scratch
 * to build it in.
 */
static __always_inline enum reason mptcp_open(hook_ctx *ctx, struct mptcp_segment *mptcp,
					      enum mptcp_subtype subtype,
					      struct options_scratch **scratch)
{
	enum reason reason = mptcp_parse_to_add(ctx, mptcp);

	if (reason)
		return reason;
	if (mptcp_has(mptcp->index, subtype))
		return REASON_OPTION_PRESENT;
	*scratch = tcp_options_scratch();
	return *scratch ? REASON_NONE : REASON_HELPER_FAILED;
}

/*
 * A receiver that is still busy with an announcement drops the next one, which nobody would repeat:
 * so they come apart by `apart` nanoseconds.
 */
#define APART_DOC                                                                          \
	"least time between two addresses told on a subflow: Linux drops one that comes while " \
	"it is busy with another"

static __always_inline bool announced_lately(const struct subflow_end *own, __u64 apart)
{
	return own->announced_at && bpf_ktime_get_ns() - own->announced_at < apart;
}

/* As mptcp_insert(), on a segment from mptcp_open(). */
static __always_inline enum reason mptcp_add(hook_ctx *ctx, const struct mptcp_segment *mptcp,
					     struct options_scratch *scratch, __u32 size)
{
	bool may_replace = subflow_end(mptcp->subflow, mptcp->sender)->data_seen > 1;

	return mptcp_insert(ctx, &mptcp->segment, scratch, mptcp->index, size, may_replace);
}

/* The same for an address. */
static __always_inline enum reason mptcp_announce(hook_ctx *ctx, const struct mptcp_segment *mptcp,
						  struct options_scratch *scratch, __u32 size)
{
	enum reason reason = mptcp_add(ctx, mptcp, scratch, size);

	if (!reason)
		subflow_end(mptcp->subflow, mptcp->sender)->announced_at = bpf_ktime_get_ns();
	return reason;
}
