/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "mptcp_acks.h"

/* RFC 8684, 3.6: "MP_TCPRST Reason Codes". */
enum reset_reason {
	RESET_REASON_UNSPECIFIED,
	RESET_REASON_MPTCP_ERROR,
	RESET_REASON_LACK_OF_RESOURCES,
	RESET_REASON_ADMINISTRATIVE,
	RESET_REASON_TOO_MUCH_DATA,
	RESET_REASON_UNACCEPTABLE_PERFORMANCE,
	RESET_REASON_MIDDLEBOX,
} __attribute__((packed));

struct params {
	enum reset_reason reason __range(0, 255) __default("administrative")
		__doc("why, by name or number (RFC 8684, 3.6)");
	bool transient __doc("tell the receiver that it may try again");
};
PARAMS;

#define TCPRST_TRANSIENT 1

ACTION(reset_subflow,
       "end the subflow for the receiver: each packet becomes a RST with MP_TCPRST, or one in a while "
       "with `every`; the connection goes on by its other subflows")
{
	struct options_scratch *scratch = tcp_options_scratch();
	struct mptcp_segment mptcp = {};
	enum reason reason = mptcp_parse(ctx, &mptcp);
	__u64 marked;
	__u32 flags;

	if (reason)
		return SKIP(reason);
	if (mptcp.segment.at.authenticated)
		return SKIP(REASON_AUTHENTICATED);
	if (mptcp.segment.flags & TCP_FLAG_SYN)
		return SKIP(REASON_SYN);
	/* offered, and who knows what was answered: it may be plain TCP */
	if (mptcp.segment.flags & TCP_FLAG_RST || !subflow_is_agreed(mptcp.subflow))
		return SKIP(REASON_NOT_MPTCP);
	if (!scratch)
		return SKIP(REASON_HELPER_FAILED);
	marked = tcp_options_marked(ctx, &mptcp.segment, OPTION_KIND_MPTCP, MPTCP_SUBTYPE_ANY);
	mptcp_option_begin(scratch, MPTCP_SUBTYPE_MP_TCPRST,
			   PARAM(transient) ? TCPRST_TRANSIENT : 0, MP_TCPRST_LENGTH);
	scratch->insert[3] = PARAM(reason);
	flags = mptcp.segment.flags & ~(TCP_FLAG_FIN | TCP_FLAG_PSH | TCP_FLAG_URG);
	return done_or_skip(tcp_options_exchange(ctx, &mptcp.segment, scratch, marked,
						 MP_TCPRST_LENGTH, flags | TCP_FLAG_RST));
}
