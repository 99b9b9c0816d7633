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
	bool held __doc("empty pcd_held of what is echoed or withdrawn");
	bool openings __doc("fill pcd_openings");
};
PARAMS;

/* What a SYN or SYN-ACK says of its connection. */
static __always_inline void handshake_learn(hook_ctx *ctx)
{
	struct segment segment;
	struct flow_id id = {};
	struct tcphdr *tcp;
	__be32 initial;
	__u32 sender;

	if (parse_tcp(ctx, &segment) || !(segment.flags & TCP_FLAG_SYN) ||
	    flow_identify(ctx, &segment.at, &id, &sender))
		return;
	tcp = pkt_at(ctx, segment.at.transport, sizeof(*tcp));
	if (!tcp)
		return;
	initial = tcp->seq;
	if (params.openings)
		opening_learn(&segment, &id, sender, initial);
	if (params.handshakes)
		flow_learn(ctx, &segment, &id, sender, initial);
}

ACTION(learner, "remember what packets tell of their connections")
{
	if (params.handshakes || params.openings)
		handshake_learn(ctx);
	if (params.subflows)
		subflow_learn(ctx, params.secrets, params.acks, params.held);
	return DONE;
}
