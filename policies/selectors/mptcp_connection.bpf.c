/* SPDX-License-Identifier: GPL-2.0-only */
#include "keys.h"
#include "subflow.h"

HASH_SET(connection);

SELECTOR(mptcp_connection, "all subflows of MPTCP connections, by the token of either host")
{
	struct mptcp_segment mptcp = {};
	enum reason reason = mptcp_parse(ctx, &mptcp);
	struct connection_key key = {};

	if (reason)
		return reason == REASON_NOT_MPTCP ? MISS : no_match_for(reason);
	key.token = mptcp.subflow->ends[0].token;
	if (key.token && set_match(&set, &key, found))
		return MATCH;
	key.token = mptcp.subflow->ends[1].token;
	return match_if(key.token && set_match(&set, &key, found));
}
