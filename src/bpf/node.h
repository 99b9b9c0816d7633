/* SPDX-License-Identifier: GPL-2.0-only */
/* How a node counts, goes on and ends; shared by the entry programs and the policies. */
#pragma once

#include "pkt.h"

/* Filled in by the loader and frozen. `volatile` keeps clang from folding the zeros. */
const volatile struct node_config node;

char LICENSE[] SEC("license") = "GPL";

/* The counters of this node; never NULL in fact, which the verifier cannot know. */
static __always_inline struct node_stats *node_stats(void)
{
	__u32 slot = node.slot;

	return bpf_map_lookup_elem(&pc_counters, &slot);
}

/*
 * Per-CPU counters need no atomics: a hook runs with softirqs off. The barrier keeps what is
 * compared and what is the index in one register: that they are the same number, verifiers up to
 * Linux 6.12 do not see behind a zero extension.
 */
static __always_inline void count_reason(struct node_stats *stats, enum reason reason)
{
	__u64 index = reason;

	asm volatile("" : "+r"(index));
	if (index < REASON_COUNT)
		stats->reasons[index]++;
}

static __always_inline void count_packet(hook_ctx *ctx, struct node_stats *stats)
{
	stats->packets++;
	stats->bytes += pkt_length(ctx);
}

/* Ends the graph. The packet leaves with the verdict and without a context. */
static __always_inline int node_end(hook_ctx *ctx, int verdict)
{
	if (verdict != HOOK_DROP)
		context_close(ctx, node.carrier);
	return verdict;
}

/* A jump that did not happen: fail open, and say so. */
static __always_inline int node_lost(hook_ctx *ctx, struct node_stats *stats, enum reason reason)
{
	count_reason(stats, reason);
	return node_end(ctx, HOOK_PASS);
}

static __always_inline int node_next(hook_ctx *ctx, struct node_stats *stats)
{
	if (node.next & SUCCESSOR_VERDICT)
		return node_end(ctx, node.next == SUCCESSOR_DROP ? HOOK_DROP : HOOK_PASS);
	JUMP("next", ctx, &pc_nodes, node.next);
	return node_lost(ctx, stats, REASON_TAIL_CALL_MISSED);
}

static __always_inline int node_later(hook_ctx *ctx, struct node_stats *stats)
{
	if (node.later & SUCCESSOR_VERDICT)
		return node_end(ctx, node.later == SUCCESSOR_DROP ? HOOK_DROP : HOOK_PASS);
	JUMP("later", ctx, &pc_nodes, node.later);
	return node_lost(ctx, stats, REASON_TAIL_CALL_MISSED);
}

static __always_inline int node_otherwise(hook_ctx *ctx, struct node_stats *stats)
{
	if (node.otherwise & SUCCESSOR_VERDICT)
		return node_end(ctx, node.otherwise == SUCCESSOR_DROP ? HOOK_DROP : HOOK_PASS);
	JUMP("otherwise", ctx, &pc_nodes, node.otherwise);
	return node_lost(ctx, stats, REASON_TAIL_CALL_MISSED);
}
