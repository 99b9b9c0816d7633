/* SPDX-License-Identifier: GPL-2.0-only */
/* Addresses whose announcement is held back, to be given later. */
#pragma once

#include "subflow.h"

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct flow_id);
	__type(value, struct held_options);
} pcd_held SEC(".maps");

static __always_inline struct held_option *held_slot(struct held_options *held, __u32 sender,
						     __u32 slot)
{
	slot &= HELD_SLOTS - 1;
	asm volatile("" : "+r"(slot)); /* the verifier must see one number compared and used */
	if (slot >= HELD_SLOTS)
		return (void *)0;
	return sender ? &held->ends[1][slot] : &held->ends[0][slot];
}

/* Whether the slot holds an address of this subflow: an older one is of another with its ports. */
static __always_inline bool held_is_of(const struct held_option *slot,
				       const struct subflow *subflow)
{
	return slot->length && slot->since >= subflow->opened_at;
}

#define REMOVED_MAX 8 /* ids of a REMOVE_ADDR that are looked at */

static __always_inline void held_forget(struct held_options *held, __u32 end, __u8 id, bool given)
{
	struct held_option *slot = held_slot(held, end, id);

	if (slot && slot->option[3] == id && (slot->given || !given))
		slot->length = 0;
}

/*
 * Forgets what need not be given again, for its receiver echoes it, and what the host that announced
 * it withdraws.
 */
static __always_inline void held_learn(hook_ctx *ctx, const struct mptcp_segment *mptcp)
{
	const struct segment *segment = &mptcp->segment;
	__u8 *echo = mptcp_option(ctx, segment, mptcp->index, MPTCP_SUBTYPE_ADD_ADDR, 4);
	__u8 *removed = mptcp_option(ctx, segment, mptcp->index, MPTCP_SUBTYPE_REMOVE_ADDR, 4);
	struct held_options *held;
	__u32 i, at, length;
	__u8 *id;

	if (!echo && !removed)
		return;
	held = bpf_map_lookup_elem(&pcd_held, &mptcp->from.flow);
	if (!held)
		return;
	if (echo && echo[2] & ADD_ADDR_ECHO)
		held_forget(held, !mptcp->from.end, echo[3], true);
	if (!removed)
		return;
	length = removed[1] - 3;
	at = segment->at.transport + sizeof(struct tcphdr) - 1 + 3 +
	     mptcp_at(mptcp->index, MPTCP_SUBTYPE_REMOVE_ADDR);
#pragma unroll
	for (i = 0; i < REMOVED_MAX; i++) {
		id = i < length ? pkt_at(ctx, at + i, 1) : (void *)0;
		if (id)
			held_forget(held, mptcp->from.end, *id, false);
	}
}
