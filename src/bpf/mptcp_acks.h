/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The last packet of each end of a subflow that can be sent again. Who declares this map changes
 * the next packet of a subflow: on an idle one there is none, so user space sends this one through
 * the hook once more.
 */
#pragma once

#include "subflow.h"

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct ack_key);
	__type(value, struct saved_ack);
} pcd_acks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct saved_ack);
} pc_ack SEC(".maps");

static __always_inline void ack_save(hook_ctx *ctx, const struct mptcp_segment *mptcp)
{
	struct ack_key key = { .flow = mptcp->flow, .sender = mptcp->sender };
	const struct headers *at = &mptcp->segment.at;
	struct saved_ack *ack;
	__u32 zero = 0, length = at->end;

	if (!segment_is_bare(&mptcp->segment) || at->fragmented || length > SAVED_ACK_MAX ||
	    mptcp->segment.flags & (TCP_FLAG_SYN | TCP_FLAG_FIN | TCP_FLAG_RST))
		return;
	ack = bpf_map_lookup_elem(&pc_ack, &zero);
	if (!ack)
		return;
	ack->at = bpf_ktime_get_ns();
	ack->ip = at->ip;
	ack->transport = at->transport;
	ack->version = at->version;
	ack->ingress = !!(node.flags & NODE_INGRESS);
	length = bounded(length - 1, SAVED_ACK_MAX - 1) + 1;
	ack->length = length;
	if (pkt_load(ctx, 0, ack->frame, length))
		return;
	bpf_map_update_elem(&pcd_acks, &key, ack, 0);
}
