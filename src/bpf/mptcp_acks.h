/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The last segment of each end of a subflow. Who declares this map changes the next packet of a
 * subflow: on an idle one there is none, so user space sends an acknowledgement through the hook
 * that says what this segment said.
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

/* Forgets what an earlier subflow of this name has sent. */
static __always_inline void acks_forget(const struct mptcp_segment *mptcp)
{
	struct ack_key key = { .flow = mptcp->flow };

	bpf_map_delete_elem(&pcd_acks, &key);
	key.sender = 1;
	bpf_map_delete_elem(&pcd_acks, &key);
}

/*
 * Saves the headers of a segment, unless it is older than what is saved. Those with keys of the
 * connection are not: keys are kept by pcn_keys alone.
 */
static __always_inline void ack_save(hook_ctx *ctx, const struct mptcp_segment *mptcp)
{
	struct ack_key key = { .flow = mptcp->flow, .sender = mptcp->sender };
	const struct segment *segment = &mptcp->segment;
	struct saved_ack *ack, *known;
	struct tcphdr *tcp = pkt_at(ctx, segment->at.transport, sizeof(*tcp));
	__u32 zero = 0, length = segment->at.transport + segment->header;

	if (!tcp || segment->at.fragmented || length > SAVED_ACK_MAX ||
	    segment->flags & (TCP_FLAG_SYN | TCP_FLAG_FIN | TCP_FLAG_RST) ||
	    mptcp_has(mptcp->index, MPTCP_SUBTYPE_MP_CAPABLE) ||
	    mptcp_has(mptcp->index, MPTCP_SUBTYPE_MP_FASTCLOSE))
		return;
	ack = bpf_map_lookup_elem(&pc_ack, &zero);
	if (!ack)
		return;
	ack->sequence_end = bpf_ntohl(tcp->seq) + segment->at.end - length;
	known = bpf_map_lookup_elem(&pcd_acks, &key);
	if (known && (__s32)(ack->sequence_end - known->sequence_end) < 0)
		return;
	ack->ip = segment->at.ip;
	ack->transport = segment->at.transport;
	ack->version = segment->at.version;
	ack->ingress = !!(node.flags & NODE_INGRESS);
	ack->length = length;
	length = bounded(length - 1, SAVED_ACK_MAX - 1) + 1;
	if (!pkt_load(ctx, 0, ack->headers, length))
		bpf_map_update_elem(&pcd_acks, &key, ack, 0);
}
