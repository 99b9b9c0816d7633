/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "tcp.h"

struct params {
	__u16 bytes __required __doc("receive window to advertise; the 16-bit field itself, as \"raw\" says");
	bool raw __required __range(1, 1)
		__doc("must be true: the value is the field as it stands on the wire");
};
PARAMS;

ACTION(set_window, "rewrite the TCP receive window; not on a SYN, whose window is unscaled")
{
	struct segment segment;
	enum reason reason = parse_tcp(ctx, &segment);

	if (reason)
		return SKIP(reason);
	if (segment.flags & TCP_FLAG_SYN)
		return SKIP(REASON_SYN);
	return done_or_skip(tcp_store16(ctx, &segment, offsetof(struct tcphdr, window),
					bpf_htons(PARAM(bytes))));
}
