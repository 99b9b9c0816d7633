/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "flow_state.h"

struct params {
	__u32 bytes __required __range(0, 1073725440) __limit("raw", 0, 65535)
		__doc("receive window to advertise, in bytes; rounded down to what the field "
		      "can say, but to 0 only if it is 0");
	bool raw __stateless __doc("bytes is the field itself, whatever the window scale");
	bool max __doc("only ever lower the window");
};
PARAMS;

/* The field that advertises `bytes`. */
static __always_inline enum reason window_field(hook_ctx *ctx, const struct segment *segment,
						__u32 bytes, __u32 *field)
{
	struct flow_id id = {};
	struct flow_state *state;
	enum reason reason;
	__u32 sender;
	int scale;

	reason = flow_identify(ctx, &segment->at, &id, &sender);
	if (reason)
		return reason;
	state = bpf_map_lookup_elem(&pcd_flows, &id);
	if (!state)
		return REASON_UNKNOWN_SCALE;
	scale = flow_window_scale(state, sender);
	if (scale < 0)
		return REASON_UNKNOWN_SCALE;
	*field = bytes >> (scale & 15);
	if (!*field && bytes)
		*field = 1;
	if (*field > 0xffff)
		*field = 0xffff;
	return REASON_NONE;
}

ACTION(set_window, "rewrite the TCP receive window; not on a SYN, whose window is unscaled")
{
	const __u32 offset = offsetof(struct tcphdr, window);
	struct segment segment;
	enum reason reason = parse_tcp_to_change(ctx, &segment);
	__u32 field = PARAM(bytes);
	__be16 *present;

	if (reason)
		return SKIP(reason);
	if (segment.flags & TCP_FLAG_SYN)
		return SKIP(REASON_SYN);
	if (!PARAM(raw))
		reason = window_field(ctx, &segment, PARAM(bytes), &field);
	if (reason)
		return SKIP(reason);
	present = pkt_at(ctx, segment.at.transport + offset, sizeof(*present));
	if (!present)
		return SKIP(REASON_TRUNCATED);
	if (PARAM(max) && bpf_ntohs(*present) <= field)
		return SKIP(REASON_NOT_LOWER);
	return done_or_skip(tcp_store16(ctx, &segment, offset, bpf_htons(field)));
}
