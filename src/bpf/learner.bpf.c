/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The node in front of a graph whose device has policies that need to know connections. It is
 * put there by the planner, and is no policy of chain files.
 */
#include "policy.h"
#include "flow_state.h"

ACTION(learner, "remember what the ends of a connection agree on in its handshake")
{
	struct segment segment;

	if (!parse_tcp(ctx, &segment) && segment.flags & TCP_FLAG_SYN)
		flow_learn(ctx, &segment);
	return DONE;
}
