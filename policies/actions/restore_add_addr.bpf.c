/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "held.h"
#include "mptcp_add.h"

struct params {
	duration_t after __doc("how long it is held, from when it was first taken out");
	duration_t apart __default("100ms") __doc(APART_DOC);
	duration_t repeat __default("1s")
		__doc("how long the receiver's echo is waited for before an address is given again, "
		      "three times at most; 0s: it is given once");
};
PARAMS;

/* Whether it is its time: the first, or again. */
static __always_inline bool is_due(const struct held_option *slot, __u64 now)
{
	return now - slot->since >= (slot->given ? params.repeat : params.after);
}

/* It was given. */
static __always_inline void held_given(struct held_option *slot)
{
	slot->since = bpf_ktime_get_ns();
	slot->given++;
	if (!params.repeat || slot->given >= HELD_GIVEN_MAX)
		slot->length = 0;
}

/* The sender's option to give next, first those that never were; NULL: none is due. */
static __always_inline struct held_option *held_due(const struct mptcp_segment *mptcp)
{
	struct held_options *held = bpf_map_lookup_elem(&pcd_held, &mptcp->from.flow);
	struct held_option *slot, *due = (void *)0;
	__u64 now = bpf_ktime_get_ns();
	__u32 i;

	if (!held)
		return (void *)0;
#pragma unroll
	for (i = 0; i < HELD_SLOTS; i++) {
		slot = mptcp->from.end ? &held->ends[1][i] : &held->ends[0][i];
		if (slot->given && !params.repeat)
			slot->length = 0; /* by a chain that would have given it again */
		if (held_is_of(slot, mptcp->subflow) && is_due(slot, now) &&
		    (!due || slot->given < due->given))
			due = slot;
	}
	return due;
}

ACTION(restore_add_addr, "give back what hold_add_addr holds, one address on a packet with room")
{
	struct options_scratch *scratch;
	struct mptcp_segment mptcp = {};
	enum reason reason = mptcp_open(ctx, &mptcp, MPTCP_SUBTYPE_ADD_ADDR, &scratch);
	struct held_option *held;
	__u32 size;

	if (reason)
		return SKIP(reason);
	held = held_due(&mptcp);
	if (!held)
		return SKIP(REASON_NOT_HELD);
	if (announced_lately(subflow_end(mptcp.subflow, mptcp.from.end), params.apart))
		return SKIP(REASON_NOT_DUE);
	size = held->length;
	if (!size || size > HELD_MAX) /* echoed by now; the verifier cannot know the other */
		return SKIP(REASON_NOT_HELD);
	__builtin_memcpy(scratch->insert, held->option, HELD_MAX);
	reason = mptcp_announce(ctx, &mptcp, scratch, size);
	if (!reason)
		held_given(held);
	return done_or_skip(reason);
}
