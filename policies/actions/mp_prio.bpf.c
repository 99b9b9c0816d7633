/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "mptcp_add.h"

struct params {
	bool backup __required
		__doc("true: only use the subflow while no other works; false: use it again");
};
PARAMS;

/*
 * The form with an address id (RFC 8684, 3.3.8), which could name another subflow, is ignored by
 * Linux, so there is none here.
 */
ACTION(mp_prio,
       "ask the receiver to use the subflow as backup or not, by an MP_PRIO option on the next "
       "packet with room", ONCE)
{
	struct options_scratch *scratch;
	struct mptcp_segment mptcp = {};
	enum reason reason = mptcp_open(ctx, &mptcp, MPTCP_SUBTYPE_MP_PRIO, &scratch);

	if (reason)
		return SKIP(reason);
	mptcp_option_begin(scratch, MPTCP_SUBTYPE_MP_PRIO, PARAM(backup) ? MP_BACKUP : 0,
			   MP_PRIO_LENGTH);
	reason = mptcp_add(ctx, &mptcp, scratch, MP_PRIO_LENGTH);
	if (!reason)
		subflow_end(mptcp.subflow, mptcp.from.end)->backup = PARAM(backup);
	return done_or_skip(reason);
}
