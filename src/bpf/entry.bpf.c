/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What is attached to a device: opens the context, if the graph has one, and jumps to the
 * first node. Its counters are those of the attachment.
 */
#include "node.h"
#include "mptcp_types.h"
#include "tcp_flags.h"

/* Never read: it brings the types user space shares with nodes into this object's BTF. */
struct shared_types {
	enum reason reason;
	enum successor successor;
	enum carrier carrier;
	enum node_flags node_flags;
	enum element_flags element_flags;
	enum checksum checksum;
	struct element element;
	struct node_stats node_stats;
	struct attachment attachment;
	struct flow_id flow_id;
	struct flow_state flow_state;
	enum tcp_flag tcp_flag;
	struct report report;
	struct subflow subflow;
	struct connection connection;
	enum subflow_flags subflow_flags;
	struct sender sender;
	struct saved_ack saved_ack;
	struct held_options held_options;
};

const volatile struct shared_types shared_types;

#if defined(HOOK_TC)

#include <bpf/bpf_core_read.h>

/* Since Linux 6.2. Before, the helpers that update checksums have to find out. */
extern void *bpf_cast_to_kern_ctx(void *ctx) __ksym __weak;

/* What is read of the kernel's struct sk_buff. Where it is comes from the kernel's BTF. */
struct sk_buff___entry {
	unsigned char *head;
	unsigned char *data;
	__u16 network_header; /* counts from `head` */
	__u8 ip_summed : 2;
} __attribute__((preserve_access_index));

#define SKB_CHECKSUM_PARTIAL 3 /* CHECKSUM_PARTIAL of linux/skbuff.h */

static __always_inline enum checksum packet_checksum(hook_ctx *ctx)
{
	struct sk_buff___entry *skb;

	if (!bpf_cast_to_kern_ctx)
		return CHECKSUM_AUTO;
	skb = bpf_cast_to_kern_ctx(ctx);
	return BPF_CORE_READ_BITFIELD(skb, ip_summed) == SKB_CHECKSUM_PARTIAL ?
		       CHECKSUM_PARTIAL :
		       CHECKSUM_COMPLETE;
}

/*
 * Whether the packet begins with IP although its device has link headers: what generic XDP
 * copied has lost the length of its own (Linux 6.8 and later), so TC begins behind it.
 */
static __always_inline bool packet_lost_link(hook_ctx *ctx)
{
	struct sk_buff___entry *skb;

	if (node.flags & NODE_NO_LINK || !(node.flags & NODE_INGRESS) || !bpf_cast_to_kern_ctx)
		return false;
	skb = bpf_cast_to_kern_ctx(ctx);
	return skb->data - skb->head == skb->network_header;
}

#else

/* Only a policy that changes a checksum has to know, and finds out. */
static __always_inline enum checksum packet_checksum(hook_ctx *ctx)
{
	return CHECKSUM_AUTO;
}

static __always_inline bool packet_lost_link(hook_ctx *ctx)
{
	return false;
}

#endif

SEC(HOOK_SECTION)
int pc_entry(hook_ctx *ctx)
{
	struct node_stats *stats = node_stats();
	enum reason reason = REASON_NONE;

	if (!stats)
		return HOOK_PASS;
	stats->seen++;
	count_packet(ctx, stats);
	if (packet_lost_link(ctx)) {
		count_reason(stats, REASON_NO_LINK_HEADER);
		return HOOK_PASS;
	}
	if (node.carrier != CARRIER_NONE)
		reason = context_open(ctx, node.carrier, packet_checksum(ctx));
	if (reason)
		count_reason(stats, reason);
	return node_next(ctx, stats);
}

/*
 * What every slot of a generation that has been replaced is overwritten with: releasing a
 * PROG_ARRAY full of distinct programs takes the kernel milliseconds a slot.
 */
SEC(HOOK_SECTION)
int pc_stub(hook_ctx *ctx)
{
	return HOOK_PASS;
}
