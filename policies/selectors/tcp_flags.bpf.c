/* SPDX-License-Identifier: GPL-2.0-only */
#include "keys.h"
#include "tcp.h"

struct params {
	enum tcp_flag all __flags __doc("flags that must all be set");
	enum tcp_flag any __flags __doc("flags of which one must be set");
	enum tcp_flag none __flags __doc("flags that must not be set");
};
PARAMS;

SELECTOR(tcp_flags, "TCP segments by their flags")
{
	struct segment segment;
	enum reason reason = parse_tcp(ctx, &segment);

	if (reason)
		return no_match_for(reason);
	return match_if((segment.flags & params.all) == params.all &&
			(!params.any || segment.flags & params.any) &&
			!(segment.flags & params.none));
}
