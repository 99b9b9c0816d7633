/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What is attached to a device: opens the context, if the graph has one, and jumps to the
 * first node. Its counters are those of the attachment.
 */
#include "node.h"

/* Never read: it brings the types user space shares with nodes into this object's BTF. */
struct shared_types {
	enum reason reason;
	enum successor successor;
	enum carrier carrier;
	enum node_flags node_flags;
	enum element_flags element_flags;
	struct element element;
	struct node_stats node_stats;
};

const volatile struct shared_types shared_types;

SEC(HOOK_SECTION)
int pc_entry(hook_ctx *ctx)
{
	struct node_stats *stats = node_stats();
	enum reason reason;

	if (!stats)
		return HOOK_PASS;
	stats->seen++;
	count_packet(ctx, stats);
	reason = context_open(ctx, node.carrier);
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
