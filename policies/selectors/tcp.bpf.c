/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"

SELECTOR(tcp, "TCP segments")
{
	struct headers at;
	enum reason reason = parse_ip(ctx, &at);

	if (reason == REASON_NOT_IP)
		return MISS;
	if (reason)
		return UNKNOWN(reason);
	return match_if(at.protocol == IP_PROTOCOL_TCP);
}
