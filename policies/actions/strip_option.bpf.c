/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "mptcp_strip.h"

enum strip_mode {
	STRIP_MODE_AUTO,
	STRIP_MODE_NOP,
	STRIP_MODE_REMOVE,
};

struct params {
	enum option_kind kind __range(2, 255) __required
		__doc("kind of the option, by name or number");
	enum mptcp_subtype subtype __range(0, 255) __default("any") __stateful("add_addr")
		__guard("dss", "unsafe",
			"without it the receiver resets the subflow, or loses data on the only one")
		__doc("with kind mptcp: the subtype (RFC 8684), by name or number");
	enum strip_mode mode __default("auto")
		__only("remove", "xdp", "the kernel has no right way to shrink a header there")
		__doc("nop: overwrite it with NOPs; remove: take it out, the header shrinks; auto: "
		      "nop, but where that made a receiver fall back from MPTCP, drop the packet: "
		      "an add_addr on a bare ACK right after the handshake");
	bool unsafe __doc("allow to strip dss from MPTCP");
};
PARAMS;

/* An announcement without its echo, which needs to know how far the connection is. */
static __always_inline enum outcome strip_announcements(hook_ctx *ctx)
{
	struct mptcp_segment mptcp = {};
	enum reason reason = mptcp_parse(ctx, &mptcp);

	if (reason && reason != REASON_NOT_MPTCP)
		return SKIP(reason);
	if (mptcp.segment.at.authenticated)
		return SKIP(REASON_AUTHENTICATED);
	return strip_add_addr(ctx, &mptcp, announcements_marked(ctx, &mptcp.segment));
}

ACTION(strip_option, "overwrite or take out a TCP option, every one of its kind in the segment")
{
	struct segment segment;
	enum reason reason;

	if (PARAM(kind) == OPTION_KIND_MPTCP && PARAM(subtype) == MPTCP_SUBTYPE_ADD_ADDR &&
	    PARAM(mode) == STRIP_MODE_AUTO)
		return strip_announcements(ctx);
	reason = parse_tcp_to_change(ctx, &segment);
	if (reason)
		return SKIP(reason);
	if (PARAM(kind) != OPTION_KIND_MPTCP && PARAM(subtype) != MPTCP_SUBTYPE_ANY)
		return SKIP(REASON_OPTION_ABSENT);
	if (PARAM(kind) == OPTION_KIND_MPTCP && !PARAM(unsafe) &&
	    (PARAM(subtype) == MPTCP_SUBTYPE_ANY || PARAM(subtype) == MPTCP_SUBTYPE_DSS) &&
	    mptcp_has(mptcp_index(ctx, &segment), MPTCP_SUBTYPE_DSS))
		return SKIP(REASON_UNSAFE);
	if (PARAM(mode) == STRIP_MODE_REMOVE)
		return done_or_skip(
			tcp_options_remove(ctx, &segment, PARAM(kind), PARAM(subtype)));
	return done_or_skip(
		tcp_options_strip(ctx, &segment, PARAM(kind), PARAM(subtype)));
}
