/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "mptcp_add.h"

struct params {
	__u8 id __required
		__guard("0", "unsafe", "the address of the first subflow, and the receiver may end all")
		__doc("address id that the sender is said to have lost");
	bool unsafe __doc("allow the id 0");
};
PARAMS;

#define REMOVE_ADDR_LENGTH 4

ACTION(remove_addr,
       "have the receiver give up the subflows of an address, by a REMOVE_ADDR option on the next "
       "packet with room", ONCE)
{
	struct options_scratch *scratch;
	struct mptcp_segment mptcp = {};
	enum reason reason = mptcp_open(ctx, &mptcp, MPTCP_SUBTYPE_REMOVE_ADDR, &scratch);

	if (reason)
		return SKIP(reason);
	if (!PARAM(id) && !PARAM(unsafe))
		return SKIP(REASON_UNSAFE);
	mptcp_option_begin(scratch, MPTCP_SUBTYPE_REMOVE_ADDR, 0, REMOVE_ADDR_LENGTH);
	scratch->insert[3] = PARAM(id);
	return done_or_skip(mptcp_add(ctx, &mptcp, scratch, REMOVE_ADDR_LENGTH));
}
