/* SPDX-License-Identifier: GPL-2.0-only */
#include "keys.h"

#define E2BIG 7
#define EEXIST 17

struct params {
	duration_t expire __range(1000000000, 31536000000000000)
		__doc("how long the flow stays in the set, from its last packet here, rounded "
		      "up to whole seconds; for good if absent");
};
PARAMS;

HASH_SET(flow);

ACTION(learn, "add the packet's flow to a set, or keep it there for longer")
{
	struct headers at;
	struct endpoints ends = {};
	struct flow_key key = {};
	struct element new = {}, *known;
	enum reason reason = read_endpoints(ctx, &at, &ends, true);
	long failed;

	if (reason)
		return SKIP(reason);
	key.local = *end_address(&ends, END_LOCAL);
	key.remote = *end_address(&ends, END_REMOTE);
	key.local_port = end_port(&ends, END_LOCAL);
	key.remote_port = end_port(&ends, END_REMOTE);
	key.protocol = at.protocol;
	if (params.expire)
		new.expires = (bpf_ktime_get_ns() + params.expire + NANOSECONDS - 1) / NANOSECONDS;
	known = bpf_map_lookup_elem(&set, &key);
	if (!known) {
		failed = bpf_map_update_elem(&set, &key, &new, 1 /* BPF_NOEXIST */);
		if (failed == -E2BIG)
			return SKIP(REASON_SET_FULL);
		/* of a packet that another CPU has at the same moment */
		return failed && failed != -EEXIST ? SKIP(REASON_HELPER_FAILED) : DONE;
	}
	/* What is there for good, or was stored with an argument, is somebody else's. */
	if (known->expires && !known->flags && (!new.expires || new.expires > known->expires))
		known->expires = new.expires;
	return DONE;
}
