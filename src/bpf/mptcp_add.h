/* SPDX-License-Identifier: GPL-2.0-only */
/* Adding MPTCP options to segments of subflows. */
#pragma once

#include "mptcp_acks.h"

/*
 * As mptcp_parse(), for who adds an MPTCP option to the segment: its receiver must take MPTCP for
 * established by now, or would fall back to TCP, and must not have got what stands behind the
 * segment: TCP looks at no options of what it finds old.
 */
static __always_inline enum reason mptcp_parse_to_add(hook_ctx *ctx, struct mptcp_segment *mptcp)
{
	enum reason reason = mptcp_parse(ctx, mptcp);

	if (reason)
		return reason;
	if (mptcp->segment.at.authenticated)
		return REASON_AUTHENTICATED;
	if (mptcp->segment.flags & TCP_FLAG_SYN)
		return REASON_SYN;
	/* The last words of an end are not the place to announce anything. */
	if (mptcp->segment.flags & (TCP_FLAG_FIN | TCP_FLAG_RST))
		return REASON_NOT_MPTCP;
	if (!subflow_end(mptcp->subflow, mptcp->from.end)->data_seen)
		return REASON_NOT_MPTCP;
	return ack_is_behind(ctx, mptcp) ? REASON_OLD_SEGMENT : REASON_NONE;
}

/*
 * Begins to add an option of the subtype, of which a segment has only one, and gives the scratch
 * to build it in.
 */
static __always_inline enum reason mptcp_open(hook_ctx *ctx, struct mptcp_segment *mptcp,
					      enum mptcp_subtype subtype,
					      struct options_scratch **scratch)
{
	enum reason reason = mptcp_parse_to_add(ctx, mptcp);

	if (reason)
		return reason;
	if (mptcp_has(mptcp->index, subtype))
		return REASON_OPTION_PRESENT;
	*scratch = tcp_options_scratch();
	return *scratch ? REASON_NONE : REASON_HELPER_FAILED;
}

/*
 * A receiver that is still busy with an announcement drops the next one, which nobody would repeat:
 * so they come apart by `apart` nanoseconds.
 */
#define APART_DOC                                                                          \
	"least time between two addresses told on a subflow: Linux drops one that comes while " \
	"it is busy with another"

static __always_inline bool announced_lately(const struct subflow_end *own, __u64 apart)
{
	return own->announced_at && bpf_ktime_get_ns() - own->announced_at < apart;
}

/* As mptcp_insert(), on a segment from mptcp_open(). */
static __always_inline enum reason mptcp_add(hook_ctx *ctx, const struct mptcp_segment *mptcp,
					     struct options_scratch *scratch, __u32 size)
{
	bool may_replace = subflow_end(mptcp->subflow, mptcp->from.end)->data_seen > 1;

	return mptcp_insert(ctx, &mptcp->segment, scratch, mptcp->index, size, may_replace);
}

/* The same for an address. */
static __always_inline enum reason mptcp_announce(hook_ctx *ctx, const struct mptcp_segment *mptcp,
						  struct options_scratch *scratch, __u32 size)
{
	enum reason reason = mptcp_add(ctx, mptcp, scratch, size);

	if (!reason)
		subflow_end(mptcp->subflow, mptcp->from.end)->announced_at = bpf_ktime_get_ns();
	return reason;
}
