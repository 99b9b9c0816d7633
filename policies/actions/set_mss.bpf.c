/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "tcp_options.h"

enum mss_mode {
	MSS_MODE_CLAMP,
	MSS_MODE_SET,
};

struct params {
	__u16 bytes __required __range(1, 65535) __doc("maximum segment size in bytes");
	enum mss_mode mode __default("clamp")
		__doc("clamp: only ever lower it; set: write it whatever it was");
};
PARAMS;

#define MSS_OPTION_LENGTH 4

ACTION(set_mss, "rewrite the MSS option of SYN segments")
{
	struct segment segment;
	enum reason reason = parse_tcp_to_change(ctx, &segment);
	__u16 wanted = PARAM(bytes);
	__u32 offset;
	__be16 present;
	__u64 marked;
	__u8 *field;

	if (reason)
		return SKIP(reason);
	if (!(segment.flags & TCP_FLAG_SYN))
		return SKIP(REASON_NOT_SYN);
	marked = tcp_options_marked(ctx, &segment, OPTION_KIND_MSS, MPTCP_SUBTYPE_ANY);
	if (!marked)
		return SKIP(REASON_OPTION_ABSENT);
	offset = tcp_option_offset(marked, MSS_OPTION_LENGTH);
	if (!offset)
		return SKIP(REASON_BAD_OPTION);
	offset += 2;
	field = pkt_at(ctx, segment.at.transport + offset, sizeof(present));
	if (!field)
		return SKIP(REASON_TRUNCATED);
	__builtin_memcpy(&present, field, sizeof(present));
	if (PARAM(mode) == MSS_MODE_CLAMP && bpf_ntohs(present) <= wanted)
		return SKIP(REASON_NOT_LOWER);
	return done_or_skip(tcp_store16(ctx, &segment, offset, bpf_htons(wanted)));
}
