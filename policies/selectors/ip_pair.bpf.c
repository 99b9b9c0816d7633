/* SPDX-License-Identifier: GPL-2.0-only */
#include "keys.h"

struct params {
	ip_t local __doc("address of the local end; any if absent");
	ip_t remote __doc("address of the remote end; any if absent");
	ip_t src __doc("source address; any if absent");
	ip_t dst __doc("destination address; any if absent");
	bool reverse __doc("look keys up with local and remote exchanged");
};
PARAMS;

HASH_SET(ip_pair);

SELECTOR(ip_pair, "packets between two addresses")
{
	struct headers at;
	struct endpoints ends = {};
	struct ip_pair_key key;
	enum reason reason = read_endpoints(ctx, &at, &ends, false);

	if (reason)
		return no_match_for(reason);
	if (uses_set()) {
		key.local = *end_address(&ends, params.reverse ? END_REMOTE : END_LOCAL);
		key.remote = *end_address(&ends, params.reverse ? END_LOCAL : END_REMOTE);
		if (!set_match(&set, &key, found))
			return MISS;
	}
	return match_if(ip_accepts(&params.local, end_address(&ends, END_LOCAL)) &&
			ip_accepts(&params.remote, end_address(&ends, END_REMOTE)) &&
			ip_accepts(&params.src, &ends.source) &&
			ip_accepts(&params.dst, &ends.destination));
}
