/* SPDX-License-Identifier: GPL-2.0-only */
/* Taking ADD_ADDR out of a connection without its falling back to TCP. */
#pragma once

#include "policy.h"
#include "subflow.h"

/* The bytes of a segment's announcements, which are ADD_ADDR options that are no echo. */
static __always_inline __u64 announcements_marked(hook_ctx *ctx, const struct segment *segment)
{
	return tcp_options_find(ctx, segment->at.transport + sizeof(struct tcphdr),
				segment->header - sizeof(struct tcphdr),
				option_wanted(OPTION_KIND_MPTCP, MPTCP_SUBTYPE_ADD_ADDR,
					      ADD_ADDR_ECHO, 0),
				0);
}

/*
 * Overwrites the marked announcements by NOPs. One that comes on a bare ACK right after the
 * handshake is all that makes this ACK one of MPTCP: without it the receiver would fall back, so
 * the packet goes as a whole. TCP does without one pure ACK. The sender's first DSS does not end
 * that: it may be lost yet.
 */
static __always_inline enum outcome strip_add_addr(hook_ctx *ctx, const struct mptcp_segment *mptcp,
						   __u64 marked)
{
	const struct segment *segment = &mptcp->segment;

	if (marked && !(marked & OPTIONS_MALFORMED) && segment_is_bare(segment) &&
	    !mptcp_has(mptcp->index, MPTCP_SUBTYPE_DSS) &&
	    !(segment->flags & (TCP_FLAG_SYN | TCP_FLAG_FIN | TCP_FLAG_RST)) &&
	    !(mptcp->subflow && subflow_end(mptcp->subflow, mptcp->from.end)->data_seen > 1))
		return VERDICT(HOOK_DROP);
	return done_or_skip(tcp_options_blank(ctx, segment, marked));
}
