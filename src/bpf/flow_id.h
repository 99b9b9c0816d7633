/* SPDX-License-Identifier: GPL-2.0-only */
/* Which connection a packet belongs to. */
#pragma once

#include "parse.h"
#include "flow_types.h"

static __always_inline bool ip_sorts_before(const ip_t *a, const ip_t *b)
{
	int i;

#pragma unroll
	for (i = 0; i < 4; i++)
		if (a->words[i] != b->words[i])
			return a->words[i] < b->words[i];
	return false;
}

/* Names the connection of a packet, and tells which end of it sent the packet: 0 or 1. */
static __always_inline enum reason flow_identify(hook_ctx *ctx, const struct headers *at,
						 struct flow_id *id, __u32 *sender)
{
	struct endpoints ends = {};
	enum reason reason = read_addresses(ctx, at, &ends);

	if (!reason)
		reason = read_ports(ctx, at, &ends);
	if (reason)
		return reason;
	*sender = ip_sorts_before(&ends.destination, &ends.source);
	if (!*sender && !ip_sorts_before(&ends.source, &ends.destination))
		*sender = ends.destination_port < ends.source_port;
	id->address[0] = *sender ? ends.destination : ends.source;
	id->address[1] = *sender ? ends.source : ends.destination;
	id->port[0] = *sender ? ends.destination_port : ends.source_port;
	id->port[1] = *sender ? ends.source_port : ends.destination_port;
	return REASON_NONE;
}
