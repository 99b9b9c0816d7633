/* SPDX-License-Identifier: GPL-2.0-only */
/* Sending a packet out of another device. */
#pragma once

#include "csum.h"

#define AF_INET 2
#define AF_INET6 10

enum fib_result {
	FIB_SUCCESS = 0,
	FIB_NO_NEIGHBOUR = 7,
	FIB_LOOKUP_OUTPUT = 1 << 1,	/* flag: the packet leaves by the device given */
};

/* Link-layer addresses; all zero: leave the packet's own. */
struct link_addresses {
	mac_t source;
	mac_t destination;
};

#if defined(HOOK_XDP)
/* Filled by the loader with the devices a node's parameters name, by interface index. */
struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP_HASH);
	__uint(max_entries, 8);
	__type(key, __u32);
	__type(value, __u32);
} pc_devices SEC(".maps");
#endif

static __always_inline bool mac_is_given(const mac_t *mac)
{
	return mac->addr[0] | mac->addr[1] | mac->addr[2] | mac->addr[3] | mac->addr[4] |
	       mac->addr[5];
}

/* The hook's verdict that sends the packet out of `device`, or a negative number. */
static __always_inline int redirect_verdict(hook_ctx *ctx, __u32 device)
{
	long verdict;

#if defined(HOOK_XDP)
	verdict = bpf_redirect_map(&pc_devices, device, 0);
	if (verdict != XDP_REDIRECT)
		verdict = bpf_redirect(device, 0);
	return verdict == XDP_REDIRECT ? XDP_REDIRECT : -1;
#else
	verdict = bpf_redirect(device, 0);
	return verdict == 7 /* TC_ACT_REDIRECT */ ? 7 : -1;
#endif
}

static __always_inline void fib_query(hook_ctx *ctx, const struct headers *at,
				      struct bpf_fib_lookup *query)
{
	struct iphdr *v4;
	struct ipv6hdr *v6;

	query->l4_protocol = at->protocol;
	if (at->version == IP_VERSION_4) {
		v4 = pkt_at(ctx, at->ip, sizeof(*v4));
		if (!v4)
			return;
		query->family = AF_INET;
		query->tos = v4->tos;
		query->ipv4_src = v4->saddr;
		query->ipv4_dst = v4->daddr;
		return;
	}
	v6 = pkt_at(ctx, at->ip, sizeof(*v6));
	if (!v6)
		return;
	query->family = AF_INET6;
	query->flowinfo = *(__be32 *)v6 & bpf_htonl(0x0fffffff);
	__builtin_memcpy(query->ipv6_src, &v6->saddr, sizeof(ip_t));
	__builtin_memcpy(query->ipv6_dst, &v6->daddr, sizeof(ip_t));
}

/*
 * Asks the routing table for the next hop of the packet, which must be behind `device`.
 * Does not touch the packet.
 */
static __always_inline enum reason neighbour_find(hook_ctx *ctx, const struct headers *at,
						  __u32 device, struct link_addresses *link)
{
	struct bpf_fib_lookup query = {};
	__u32 flags = 0;
	long result;

	fib_query(ctx, at, &query);
#if defined(HOOK_XDP)
	query.ifindex = ctx->ingress_ifindex;
#else
	query.ifindex = ctx->ifindex;
#endif
	if (!(node.flags & NODE_INGRESS)) {
		query.ifindex = device;
		flags = FIB_LOOKUP_OUTPUT;
	}
	result = bpf_fib_lookup(ctx, &query, sizeof(query), flags);
	if (result == FIB_NO_NEIGHBOUR)
		return REASON_NO_NEIGHBOUR;
	if (result != FIB_SUCCESS || query.ifindex != device)
		return REASON_NO_ROUTE;
	__builtin_memcpy(link->source.addr, query.smac, sizeof(mac_t));
	__builtin_memcpy(link->destination.addr, query.dmac, sizeof(mac_t));
	return REASON_NONE;
}

#if defined(HOOK_XDP)

static __always_inline bool xdp_is_generic(void)
{
	__u32 key = 0;
	struct attachment *attachment = bpf_map_lookup_elem(&pc_attachment, &key);

	return attachment && attachment->generic;
}

/*
 * Completes a partial checksum: what native XDP sends on is a bare frame, which nobody
 * completes any more. Generic XDP sends an skb that still says it is partial, but past the
 * code that completes it for a device that cannot: whatever stood in the field would be wrong
 * on one device or the other. REASON_CHECKSUM_*: it cannot be done, and the packet is
 * untouched.
 */
static __always_inline enum reason checksum_finish(hook_ctx *ctx, const struct headers *at)
{
	__u32 offset = at->transport;
	enum reason reason;
	__sum16 *check;
	__u64 pseudo;
	__u32 sum;

	if (at->protocol == IP_PROTOCOL_TCP)
		offset += TCP_CHECK_OFFSET;
	else if (at->protocol == IP_PROTOCOL_UDP)
		offset += UDP_CHECK_OFFSET;
	else
		return REASON_NONE;
	if (at->fragmented || node.checksum == CHECKSUM_COMPLETE)
		return REASON_NONE;
	if (at->routed)
		return REASON_CHECKSUM_UNCLEAR;
	reason = pseudo_header_sum(ctx, at, &pseudo);
	if (reason)
		return reason;
	check = pkt_at(ctx, offset, sizeof(*check));
	if (!check || csum_fold(pseudo) != *check)
		return REASON_NONE;
	sum = pkt_sum(ctx, at->transport, at->end - at->transport, 0);
	if (sum == SUM_REFUSED)
		return REASON_CHECKSUM_PARTIAL;
	/* by chance it is the same, complete or partial */
	if (csum_fold(pseudo + sum) == 0xffff)
		return REASON_NONE;
	if (xdp_is_generic())
		return REASON_CHECKSUM_PARTIAL;
	check = pkt_at(ctx, offset, sizeof(*check));
	if (!check)
		return REASON_TRUNCATED;
	/* the sum has the pseudo-header in it: the field was that */
	*check = ~sum;
	if (at->protocol == IP_PROTOCOL_UDP && !*check)
		*check = 0xffff; /* 0 means none (RFC 768) */
	return REASON_NONE;
}

#else

/* On TC the packet keeps the kernel's note of what its checksum is. */
static __always_inline enum reason checksum_finish(hook_ctx *ctx, const struct headers *at)
{
	return REASON_NONE;
}

#endif

/* Whether a router may send the packet on. */
static __always_inline enum reason ttl_check(hook_ctx *ctx, const struct headers *at)
{
	struct iphdr *v4;
	struct ipv6hdr *v6;

	if (at->version == IP_VERSION_4) {
		v4 = pkt_at(ctx, at->ip, sizeof(*v4));
		if (!v4)
			return REASON_TRUNCATED;
		return v4->ttl <= 1 ? REASON_TTL_EXPIRED : REASON_NONE;
	}
	v6 = pkt_at(ctx, at->ip, sizeof(*v6));
	if (!v6)
		return REASON_TRUNCATED;
	return v6->hop_limit <= 1 ? REASON_TTL_EXPIRED : REASON_NONE;
}

static __always_inline enum reason ttl_decrement(hook_ctx *ctx, const struct headers *at)
{
	struct iphdr *v4;
	struct ipv6hdr *v6;
	__be16 *word;

	if (at->version == IP_VERSION_4) {
		v4 = pkt_at(ctx, at->ip, sizeof(*v4));
		if (!v4)
			return REASON_TRUNCATED;
		word = (__be16 *)&v4->ttl;
		ipv4_store16(v4, word, *word - bpf_htons(0x0100));
		return REASON_NONE;
	}
	v6 = pkt_at(ctx, at->ip, sizeof(*v6));
	if (!v6)
		return REASON_TRUNCATED;
	v6->hop_limit--;
	return REASON_NONE;
}

static __always_inline enum reason link_write(hook_ctx *ctx, const struct link_addresses *link)
{
	struct ethhdr *eth = pkt_at(ctx, 0, sizeof(*eth));

	if (!eth)
		return REASON_TRUNCATED;
	if (mac_is_given(&link->destination))
		__builtin_memcpy(eth->h_dest, link->destination.addr, sizeof(mac_t));
	if (mac_is_given(&link->source))
		__builtin_memcpy(eth->h_source, link->source.addr, sizeof(mac_t));
	return REASON_NONE;
}
