/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The last segment of each end of a subflow. Who declares this map changes the next packet of a
 * subflow: on an idle one there is none, so user space sends an acknowledgement through the hook
 * that says what this segment said. What stands before it in the stream is old.
 */
#pragma once

#include "subflow.h"

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct sender);
	__type(value, struct saved_ack);
} pcd_acks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct saved_ack);
} pc_ack SEC(".maps");

/* Forgets what an earlier subflow of this name has sent. The stack has no room for a second key. */
static __always_inline void acks_forget(struct mptcp_segment *mptcp)
{
	__u32 sender = mptcp->from.end;

	bpf_map_delete_elem(&pcd_acks, &mptcp->from);
	mptcp->from.end = !sender;
	bpf_map_delete_elem(&pcd_acks, &mptcp->from);
	mptcp->from.end = sender;
}

/* Behind the last byte of a segment's payload, host order. */
static __always_inline __u32 segment_sequence_end(const struct segment *segment,
						  const struct tcphdr *tcp)
{
	return bpf_ntohl(tcp->seq) + segment->at.end - segment->at.transport - segment->header;
}

/*
 * What is further behind than this, in bytes, is not old: the segment that was ahead was taken by no
 * receiver, or came by another device with all in between.
 */
#define BEHIND_MAX (1 << 24)

static __always_inline bool is_behind(__u32 sequence_end, __u32 latest)
{
	return latest - sequence_end - 1 < BEHIND_MAX;
}

/*
 * Whether its end has sent more than a segment says: it is sent again, a probe of a window or of an
 * idle connection, or an acknowledgement by user space that the end's next segment overtook.
 */
static __always_inline bool ack_is_behind(hook_ctx *ctx, const struct mptcp_segment *mptcp)
{
	struct tcphdr *tcp = pkt_at(ctx, mptcp->segment.at.transport, sizeof(*tcp));
	struct saved_ack *known = bpf_map_lookup_elem(&pcd_acks, &mptcp->from);

	return known && tcp &&
	       is_behind(segment_sequence_end(&mptcp->segment, tcp), known->sequence_end);
}

/*
 * Saves the headers of a segment, unless it is older than what is saved. Those with keys of the
 * connection are not: keys are kept by pcn_keys alone.
 */
static __always_inline void ack_save(hook_ctx *ctx, const struct mptcp_segment *mptcp)
{
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
	ack->sequence_end = segment_sequence_end(segment, tcp);
	known = bpf_map_lookup_elem(&pcd_acks, &mptcp->from);
	if (known && is_behind(ack->sequence_end, known->sequence_end))
		return;
	ack->ip = segment->at.ip;
	ack->transport = segment->at.transport;
	ack->version = segment->at.version;
	ack->ingress = !!(node.flags & NODE_INGRESS);
	ack->length = length;
	length = bounded(length - 1, SAVED_ACK_MAX - 1) + 1;
	if (!pkt_load(ctx, 0, ack->headers, length))
		bpf_map_update_elem(&pcd_acks, &mptcp->from, ack, 0);
}
