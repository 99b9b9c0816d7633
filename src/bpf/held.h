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

/* The receiver of an announcement has heard it, and echoes its id: it need not be given again. */
static __always_inline void held_echoed(const struct mptcp_segment *mptcp, __u8 id)
{
	struct held_options *held = bpf_map_lookup_elem(&pcd_held, &mptcp->from.flow);
	struct held_option *slot;

	if (!held)
		return;
	slot = held_slot(held, !mptcp->from.end, id);
	if (slot && slot->option[3] == id)
		slot->length = 0;
}

/* Whether the slot holds an address of this subflow: an older one is of another with its ports. */
static __always_inline bool held_is_of(const struct held_option *slot,
				       const struct subflow *subflow)
{
	return slot->length && slot->since >= subflow->opened_at;
}
