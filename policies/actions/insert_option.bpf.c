/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "tcp_options.h"

#define MAX_DATA 38

struct params {
	enum option_kind kind __range(2, 255) __required
		__doc("kind of the option, by name or number");
	bytes_t data[MAX_DATA] __doc("what follows kind and length, as hex digits");
	__u8 data_len;
	bool again __doc("insert it also where the segment already has one of the kind");
};
PARAMS;

ACTION(insert_option,
       "add a TCP option: to a segment without payload, or in place of NOPs")
{
	struct segment segment;
	enum reason reason = parse_tcp_to_change(ctx, &segment);
	struct options_scratch *scratch = tcp_options_scratch();
	__u64 present;
	int i;

	if (reason)
		return SKIP(reason);
	if (!scratch)
		return SKIP(REASON_HELPER_FAILED);
	present = tcp_options_marked(ctx, &segment, PARAM(kind), MPTCP_SUBTYPE_ANY);
	if (present & OPTIONS_MALFORMED)
		return SKIP(REASON_BAD_OPTION);
	if (present && !PARAM(again))
		return SKIP(REASON_OPTION_PRESENT);
	scratch->insert[0] = PARAM(kind);
	scratch->insert[1] = 2 + params.data_len;
#pragma unroll
	for (i = 0; i < MAX_DATA; i++)
		scratch->insert[2 + i] = params.data[i];
	return done_or_skip(tcp_options_insert(ctx, &segment, scratch, 2 + params.data_len));
}
