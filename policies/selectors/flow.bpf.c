/* SPDX-License-Identifier: GPL-2.0-only */
#include "keys.h"

struct params {
	ip_t local __doc("address of the local end; any if absent");
	ip_t remote __doc("address of the remote end; any if absent");
	ip_t src __doc("source address; any if absent");
	ip_t dst __doc("destination address; any if absent");
	port_t local_port __doc("port of the local end; any if absent");
	port_t remote_port __doc("port of the remote end; any if absent");
	port_t src_port __doc("source port; any if absent");
	port_t dst_port __doc("destination port; any if absent");
	enum ip_protocol protocol __range(1, 255) __doc("transport protocol; any if absent");
	bool reverse __doc("look keys up with local and remote exchanged");
};
PARAMS;

HASH_SET(flow);

SELECTOR(flow, "packets of a flow, by addresses, ports and protocol")
{
	struct headers at;
	struct endpoints ends = {};
	struct flow_key key = {};
	enum reason reason = read_endpoints(ctx, &at, &ends, true);

	if (reason)
		return no_match_for(reason);
	if (uses_set()) {
		enum end local = params.reverse ? END_REMOTE : END_LOCAL;
		enum end remote = params.reverse ? END_LOCAL : END_REMOTE;

		key.local = *end_address(&ends, local);
		key.remote = *end_address(&ends, remote);
		key.local_port = end_port(&ends, local);
		key.remote_port = end_port(&ends, remote);
		key.protocol = at.protocol;
		if (!set_match(&set, &key, found))
			return MISS;
	}
	return match_if((!params.protocol || at.protocol == params.protocol) &&
			ip_accepts(&params.local, end_address(&ends, END_LOCAL)) &&
			ip_accepts(&params.remote, end_address(&ends, END_REMOTE)) &&
			ip_accepts(&params.src, &ends.source) &&
			ip_accepts(&params.dst, &ends.destination) &&
			port_accepts(params.local_port, end_port(&ends, END_LOCAL)) &&
			port_accepts(params.remote_port, end_port(&ends, END_REMOTE)) &&
			port_accepts(params.src_port, ends.source_port) &&
			port_accepts(params.dst_port, ends.destination_port));
}
