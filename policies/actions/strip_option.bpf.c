/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "tcp_options.h"

enum strip_mode {
	STRIP_MODE_NOP,
	STRIP_MODE_REMOVE,
};

struct params {
	enum option_kind kind __range(2, 255) __required
		__doc("kind of the option, by name or number");
	enum mptcp_subtype subtype __range(0, 255) __default("any")
		__doc("with kind mptcp: the subtype (RFC 8684), by name or number");
	enum strip_mode mode __default("nop")
		__only("remove", "xdp", "the kernel has no right way to shrink a header there")
		__doc("nop: overwrite it with NOPs; remove: take it out, the header shrinks");
};
PARAMS;

ACTION(strip_option, "overwrite or take out a TCP option, every one of its kind in the segment")
{
	struct segment segment;
	enum reason reason = parse_tcp_to_change(ctx, &segment);

	if (reason)
		return SKIP(reason);
	if (PARAM(kind) != OPTION_KIND_MPTCP && PARAM(subtype) != MPTCP_SUBTYPE_ANY)
		return SKIP(REASON_OPTION_ABSENT);
	if (PARAM(mode) == STRIP_MODE_REMOVE)
		return done_or_skip(
			tcp_options_remove(ctx, &segment, PARAM(kind), PARAM(subtype)));
	return done_or_skip(
		tcp_options_strip(ctx, &segment, PARAM(kind), PARAM(subtype)));
}
