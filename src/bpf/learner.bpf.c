/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The node in front of a graph whose device has policies that need to know connections. It is
 * put there by the planner, and is no policy of chain files.
 */
#include "policy.h"
#include "flow_state.h"
#include "subflow_learn.h"

struct params {
	bool handshakes __doc("fill pcd_flows");
	bool subflows __doc("fill pcd_subflows and pcn_connections");
	bool secrets __doc("fill pcn_keys");
	bool acks __doc("fill pcd_acks");
	bool openings __doc("fill pcd_openings");
};
PARAMS;

ACTION(learner, "remember what packets tell of their connections")
{
	struct segment segment;

	if ((params.handshakes || params.openings) && !parse_tcp(ctx, &segment) &&
	    segment.flags & TCP_FLAG_SYN) {
		if (params.openings)
			opening_learn(ctx, &segment);
		if (params.handshakes)
			flow_learn(ctx, &segment);
	}
	if (params.subflows)
		subflow_learn(ctx, params.secrets, params.acks);
	return DONE;
}
