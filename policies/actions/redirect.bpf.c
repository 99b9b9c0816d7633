/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "redirect.h"

struct params {
	device_t device __required __doc("device to send from");
	bool neighbour __doc("write the MAC addresses of the next hop, from the routing table, "
			     "and lower the TTL, as a router does; the route must use the device");
	mac_t src_mac __doc("source MAC address to write; left alone if absent");
	mac_t dst_mac __doc("destination MAC address to write; left alone if absent");
};
PARAMS;

ACTION(redirect, "send the packet out of another device; not from one without a link header",
       TERMINAL)
{
	struct link_addresses link = { .source = params.src_mac, .destination = params.dst_mac };
	struct headers at = {};
	enum reason reason;
	int verdict;

	if (node.flags & NODE_NO_LINK)
		return SKIP(REASON_NO_LINK_HEADER);
	reason = parse_ip(ctx, &at);
	if (reason)
		at.protocol = 0;
	if (PARAM(neighbour)) {
		if (!reason)
			reason = ttl_check(ctx, &at);
		if (!reason)
			reason = neighbour_find(ctx, &at, PARAM(device), &link);
		if (reason)
			return SKIP(reason);
	}
	if (!pkt_at(ctx, 0, ETH_HLEN))
		return SKIP(REASON_TRUNCATED);
	verdict = redirect_verdict(ctx, PARAM(device));
	if (verdict < 0)
		return SKIP(REASON_NO_DEVICE);
	reason = checksum_finish(ctx, &at);
	if (reason)
		return SKIP(reason);
	if (link_write(ctx, &link) || (PARAM(neighbour) && ttl_decrement(ctx, &at)))
		return SKIP(REASON_HALF_DONE);
	return VERDICT(verdict);
}
