/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "held.h"
#include "mptcp_acks.h" /* for when a chain is to give it back */
#include "mptcp_strip.h"

static const struct held_options nothing_held;

static __always_inline struct held_options *held_of(const struct flow_id *flow)
{
	struct held_options *held = bpf_map_lookup_elem(&pcd_held, flow);

	if (held)
		return held;
	if (bpf_map_update_elem(&pcd_held, flow, &nothing_held, 0 /* BPF_ANY */))
		return (void *)0;
	return bpf_map_lookup_elem(&pcd_held, flow);
}

/* Whether the slot holds this option. */
static __always_inline bool holds(const struct held_option *slot,
				  const struct options_scratch *scratch)
{
	const __u64 *held = (const __u64 *)slot->option;
	const __u64 *option = (const __u64 *)scratch->insert;

	return held[0] == option[0] && held[1] == option[1] && held[2] == option[2] &&
	       held[3] == option[3];
}

/* Keeps the first of the marked announcements in the slot of its id. */
static __always_inline enum reason hold(hook_ctx *ctx, const struct mptcp_segment *mptcp,
					__u64 marked, struct held_option **kept)
{
	__u32 at = mptcp->segment.at.transport + sizeof(struct tcphdr) + lowest_bit(marked);
	struct held_options *held = held_of(&mptcp->from.flow);
	struct options_scratch *scratch = tcp_options_scratch();
	struct held_option *slot;
	__u8 *option = pkt_at(ctx, at, 4);
	__u32 length;

	if (!held || !scratch)
		return REASON_HELPER_FAILED;
	if (!option)
		return REASON_TRUNCATED;
	length = option[1];
	slot = held_slot(held, mptcp->from.end, option[3]);
	if (!slot || length < 4 || length > HELD_MAX)
		return REASON_BAD_OPTION;
	length = bounded(length - 1, sizeof(slot->option) - 1) + 1;
	__builtin_memset(scratch->insert, 0, sizeof(slot->option));
	if (pkt_load(ctx, at, scratch->insert, length))
		return REASON_TRUNCATED;
	/* sent again, it is still the one held */
	if (!held_is_of(slot, mptcp->subflow) || !holds(slot, scratch)) {
		slot->since = bpf_ktime_get_ns();
		slot->given = 0;
		__builtin_memcpy(slot->option, scratch->insert, sizeof(slot->option));
		slot->length = length;
	}
	*kept = slot;
	return REASON_NONE;
}

/*
 * A segment has one announcement. Should some host put more into one, the others are taken out
 * too: what is not echoed is announced again.
 */
ACTION(hold_add_addr,
       "take ADD_ADDR options out and keep them, for restore_add_addr to give them later")
{
	struct mptcp_segment mptcp = {};
	enum reason reason = mptcp_parse(ctx, &mptcp);
	struct held_option *kept;
	enum outcome outcome;
	__u64 marked;

	if (reason)
		return SKIP(reason);
	if (mptcp.segment.at.authenticated)
		return SKIP(REASON_AUTHENTICATED);
	marked = announcements_marked(ctx, &mptcp.segment);
	if (marked & OPTIONS_MALFORMED)
		return SKIP(REASON_BAD_OPTION);
	if (!marked)
		return SKIP(REASON_OPTION_ABSENT);
	reason = hold(ctx, &mptcp, marked, &kept);
	if (reason)
		return SKIP(reason);
	outcome = strip_add_addr(ctx, &mptcp, marked);
	/* it goes out now, so it is not to be given again */
	if (outcome < 0)
		kept->length = 0;
	return outcome;
}
