/* SPDX-License-Identifier: GPL-2.0-only */
/* The TCP header (RFC 9293, 3.1) and changes of it. */
#pragma once

#include "csum.h"
#include "tcp_flags.h"

#define TCP_MAX_HEADER 60
#define TCP_MAX_OPTIONS 40

/* A TCP segment whose whole header is linear. */
struct segment {
	struct headers at;
	__u32 header;	/* bytes, options included: 20 to 60 */
	__u32 flags;	/* enum tcp_flag */
};

static __always_inline enum reason parse_tcp(hook_ctx *ctx, struct segment *segment)
{
	enum reason reason = parse_ip(ctx, &segment->at);
	struct tcphdr *tcp;

	if (reason)
		return reason;
	if (segment->at.protocol != IP_PROTOCOL_TCP)
		return REASON_NOT_TCP;
	if (segment->at.later_fragment)
		return REASON_FRAGMENT;
	tcp = pkt_at(ctx, segment->at.transport, sizeof(*tcp));
	if (!tcp)
		return REASON_TRUNCATED;
	segment->header = tcp->doff * 4;
	if (segment->header < sizeof(*tcp))
		return REASON_BAD_HEADER;
	if (segment->at.transport + segment->header > segment->at.end)
		return REASON_BAD_HEADER;
	if (segment->at.transport + segment->header > pkt_linear_length(ctx))
		return REASON_TRUNCATED;
	segment->flags = bpf_ntohs(*((__be16 *)tcp + 6)) & TCP_FLAGS;
	return REASON_NONE;
}

/* As parse_tcp(), for who changes the segment. */
static __always_inline enum reason parse_tcp_to_change(hook_ctx *ctx, struct segment *segment)
{
	enum reason reason = parse_tcp(ctx, segment);

	if (!reason && segment->at.authenticated)
		return REASON_AUTHENTICATED;
	return reason;
}

/*
 * Writes a 16-bit field at `offset` from the TCP header on, odd or even, and keeps the
 * checksum right. On REASON_HALF_DONE the packet must not leave; on any other reason it is
 * untouched.
 */
static __always_inline enum reason tcp_store16(hook_ctx *ctx, const struct segment *segment,
					       __u32 offset, __be16 value)
{
	__u8 *field = pkt_at(ctx, segment->at.transport + offset, 2);
	enum reason reason;
	__be16 old;

	if (!field)
		return REASON_TRUNCATED;
	__builtin_memcpy(&old, field, sizeof(old));
	reason = tcp_csum_update(ctx, &segment->at, tcp_checksum(ctx, &segment->at),
				 csum_at_parity(csum_diff16(old, value), offset), 0);
	if (reason)
		return reason;
	field = pkt_at(ctx, segment->at.transport + offset, 2);
	if (!field)
		return REASON_HALF_DONE;
	__builtin_memcpy(field, &value, sizeof(value));
	return REASON_NONE;
}
