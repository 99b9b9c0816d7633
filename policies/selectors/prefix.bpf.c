/* SPDX-License-Identifier: GPL-2.0-only */
#include "keys.h"

struct params {
	prefix_t local __doc("network of the local end; any if absent");
	prefix_t remote __doc("network of the remote end; any if absent");
	prefix_t src __doc("network of the source; any if absent");
	prefix_t dst __doc("network of the destination; any if absent");
	enum end end __default("remote") __doc("address that is looked up in a set");
};
PARAMS;

LPM_SET(prefix);

SELECTOR(prefix, "packets of networks, the longest prefix of a set counting")
{
	struct headers at;
	struct endpoints ends = {};
	struct prefix_key key;
	enum reason reason = read_endpoints(ctx, &at, &ends, false);

	if (reason)
		return no_match_for(reason);
	if (uses_set()) {
		const ip_t *address = end_address(&ends, params.end);

		key.prefix.length = 128;
		__builtin_memcpy(key.prefix.addr, address, sizeof(*address));
		if (!set_match(&set, &key, found))
			return MISS;
	}
	return match_if(prefix_accepts(&params.local, end_address(&ends, END_LOCAL)) &&
			prefix_accepts(&params.remote, end_address(&ends, END_REMOTE)) &&
			prefix_accepts(&params.src, &ends.source) &&
			prefix_accepts(&params.dst, &ends.destination));
}
