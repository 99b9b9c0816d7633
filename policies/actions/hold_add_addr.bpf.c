/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "held.h"
#include "mptcp_acks.h" /* for when a chain is to give it back */
#include "mptcp_strip.h"

static const struct held_options nothing_held;

/* Keeps the announcement, in the slot of its id. */
static __always_inline enum reason hold(hook_ctx *ctx, const struct mptcp_segment *mptcp)
{
	struct held_options *held = bpf_map_lookup_elem(&pcd_held, &mptcp->flow);
	struct held_option *slot;
	__u8 *option = mptcp_option(ctx, &mptcp->segment, mptcp->index, MPTCP_SUBTYPE_ADD_ADDR, 4);
	__u32 at, length;
	bool same;

	if (!option || option[2] & ADD_ADDR_ECHO)
		return REASON_OPTION_ABSENT;
	if (!held) {
		if (bpf_map_update_elem(&pcd_held, &mptcp->flow, &nothing_held, 0))
			return REASON_HELPER_FAILED;
		held = bpf_map_lookup_elem(&pcd_held, &mptcp->flow);
		if (!held)
			return REASON_HELPER_FAILED;
		option = mptcp_option(ctx, &mptcp->segment, mptcp->index, MPTCP_SUBTYPE_ADD_ADDR,
				      4);
		if (!option)
			return REASON_TRUNCATED;
	}
	slot = held_slot(held, mptcp->sender, option[3]);
	length = option[1];
	if (!slot || length > HELD_MAX)
		return REASON_BAD_OPTION;
	/* what is older than the subflow is of another one with its ports */
	same = slot->length && slot->option[3] == option[3] &&
	       slot->since >= mptcp->subflow->opened_at;
	at = mptcp->segment.at.transport + sizeof(struct tcphdr) - 1 +
	     (mptcp->index >> MPTCP_SUBTYPE_ADD_ADDR * MPTCP_INDEX_BITS & MPTCP_INDEX_MASK);
	length = bounded(length - 1, sizeof(slot->option) - 1) + 1;
	if (pkt_load(ctx, at, slot->option, length))
		return REASON_TRUNCATED;
	/* sent again, it is still the one held */
	if (!same)
		slot->since = bpf_ktime_get_ns();
	slot->length = length;
	return REASON_NONE;
}

ACTION(hold_add_addr,
       "take ADD_ADDR options out and keep them, for restore_add_addr to give them later")
{
	struct mptcp_segment mptcp = {};
	enum reason reason = mptcp_parse(ctx, &mptcp);

	if (reason)
		return SKIP(reason);
	if (mptcp.segment.at.authenticated)
		return SKIP(REASON_AUTHENTICATED);
	reason = hold(ctx, &mptcp);
	if (reason)
		return SKIP(reason);
	return strip_add_addr(ctx, &mptcp);
}
