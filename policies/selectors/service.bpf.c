/* SPDX-License-Identifier: GPL-2.0-only */
#include "keys.h"

#define MAX_RANGES 8

enum protocol_choice {
	PROTOCOL_CHOICE_ANY,
	PROTOCOL_CHOICE_TCP = IP_PROTOCOL_TCP,
	PROTOCOL_CHOICE_UDP = IP_PROTOCOL_UDP,
};

struct params {
	port_range_t local_port[MAX_RANGES] __doc("ports of the local end; any if absent");
	__u8 local_port_len;
	port_range_t remote_port[MAX_RANGES] __doc("ports of the remote end; any if absent");
	__u8 remote_port_len;
	port_range_t port[MAX_RANGES] __doc("ports, of either end; any if absent");
	__u8 port_len;
	enum protocol_choice protocol __default("any") __doc("transport protocol");
	enum end end __default("local") __doc("port that is looked up in a set");
};
PARAMS;

HASH_SET(port);

/* An empty list accepts every port. */
static __always_inline bool ranges_accept(const volatile port_range_t *ranges, __u32 count,
					  port_t port)
{
	__u16 number = bpf_ntohs(port);
	__u32 i;

	if (!count)
		return true;
#pragma unroll
	for (i = 0; i < MAX_RANGES; i++)
		if (i < count && number >= ranges[i].first && number <= ranges[i].last)
			return true;
	return false;
}

SELECTOR(service, "packets of services, by port")
{
	struct headers at;
	struct endpoints ends = {};
	struct port_key key = {};
	enum reason reason = read_endpoints(ctx, &at, &ends, true);

	if (reason)
		return no_match_for(reason);
	if (!has_ports(&at))
		return MISS;
	if (uses_set()) {
		key.port = end_port(&ends, params.end);
		key.protocol = at.protocol;
		if (!set_match(&set, &key, found))
			return MISS;
	}
	if (params.protocol != PROTOCOL_CHOICE_ANY && params.protocol != at.protocol)
		return MISS;
	return match_if(
		ranges_accept(params.local_port, params.local_port_len,
			      end_port(&ends, END_LOCAL)) &&
		ranges_accept(params.remote_port, params.remote_port_len,
			      end_port(&ends, END_REMOTE)) &&
		(ranges_accept(params.port, params.port_len, ends.source_port) ||
		 ranges_accept(params.port, params.port_len, ends.destination_port)));
}
