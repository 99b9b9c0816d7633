/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A packet, whichever hook it is at: the one place where XDP and TC differ.
 *
 * A packet is addressed by offsets from its first byte, never by kept pointers: helpers
 * invalidate pointers.
 */
#pragma once

#include "chain.h"
#include "maps.h"
#include <bpf/bpf_endian.h>

#define ETH_HLEN 14
#define ETH_ZLEN 60 /* shortest frame, without its checksum */
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88a8

/* Bounds every variable offset, for the verifier: parsing stops well before it. */
#define PKT_MAX_OFFSET 0x3ff
/* Link, two tags, IP and TCP headers at their longest. */
#define PKT_MAX_HEADERS (ETH_HLEN + 8 + 60 + 60)

#if defined(HOOK_XDP)

#define HOOK_SECTION "xdp.frags"
#define HOOK_PASS XDP_PASS
#define HOOK_DROP XDP_DROP
typedef struct xdp_md hook_ctx;

#elif defined(HOOK_TC)

#define HOOK_SECTION "tc"
/* Not TC_ACT_OK: programs behind ours still run. */
#define HOOK_PASS (-1) /* TC_ACT_UNSPEC */
#define HOOK_DROP 2 /* TC_ACT_SHOT */
typedef struct __sk_buff hook_ctx;

#else
#error "compile with -DHOOK_XDP or -DHOOK_TC"
#endif

/*
 * The verifier wants data and data_end read from the context by plain 32-bit loads; clang
 * is free to do otherwise with a C expression, so the loads are spelt out.
 */
static __always_inline void *pkt_data(hook_ctx *ctx)
{
	void *data;

	asm volatile("%0 = *(u32 *)(%1 + %2)"
		     : "=r"(data)
		     : "r"(ctx), "i"(offsetof(hook_ctx, data)));
	return data;
}

static __always_inline void *pkt_data_end(hook_ctx *ctx)
{
	void *end;

	asm volatile("%0 = *(u32 *)(%1 + %2)"
		     : "=r"(end)
		     : "r"(ctx), "i"(offsetof(hook_ctx, data_end)));
	return end;
}

/* `size` bytes at `offset`, or NULL if they are not all in the linear part. */
static __always_inline void *pkt_at(hook_ctx *ctx, __u32 offset, __u32 size)
{
	void *at = pkt_data(ctx) + (offset & PKT_MAX_OFFSET);

	return at + size > pkt_data_end(ctx) ? (void *)0 : at;
}

static __always_inline __u32 pkt_linear_length(hook_ctx *ctx)
{
	return pkt_data_end(ctx) - pkt_data(ctx);
}

/*
 * Bytes of the packet from the link header on, in all its fragments. On XDP only a helper
 * knows of fragments; it is asked where IP speaks of more than the linear part holds, or
 * where there is no plain IP to tell.
 */
static __always_inline __u32 pkt_length(hook_ctx *ctx)
{
#if defined(HOOK_XDP)
	__u32 linear = pkt_linear_length(ctx);
	struct {
		struct ethhdr eth;
		union {
			struct {
				__u8 version_tos[2];
				__be16 tot_len;
				__u8 pad[2];
			} v4;
			struct {
				__u8 version_flow[4];
				__be16 payload_len;
			} v6;
		};
	} __attribute__((packed)) *head = pkt_at(ctx, 0, sizeof(*head));

	if (head && head->eth.h_proto == bpf_htons(ETH_P_IP) &&
	    ETH_HLEN + bpf_ntohs(head->v4.tot_len) <= linear)
		return linear;
	if (head && head->eth.h_proto == bpf_htons(ETH_P_IPV6) && head->v6.payload_len &&
	    ETH_HLEN + sizeof(struct ipv6hdr) + bpf_ntohs(head->v6.payload_len) <= linear)
		return linear;
	return bpf_xdp_get_buff_len(ctx);
#else
	return ctx->len;
#endif
}

/* Index of the device whose hook this is. */
static __always_inline __u32 pkt_ifindex(hook_ctx *ctx)
{
#if defined(HOOK_XDP)
	return ctx->ingress_ifindex;
#else
	return ctx->ifindex;
#endif
}

/* Segments on the wire that the packet is. */
static __always_inline __u32 pkt_segments(hook_ctx *ctx)
{
#if defined(HOOK_TC)
	return ctx->gso_segs ? ctx->gso_segs : 1;
#else
	return 1;
#endif
}

/* Makes the headers linear where they are not. Offsets stay valid, pointers do not. */
static __always_inline void pkt_pull_headers(hook_ctx *ctx)
{
#if defined(HOOK_TC)
	__u32 length = ctx->len;

	if (length > PKT_MAX_HEADERS)
		length = PKT_MAX_HEADERS;
	if (pkt_linear_length(ctx) < length)
		bpf_skb_pull_data(ctx, length);
#endif
}

/*
 * Sets the length of the packet, from the link header on, by moving its tail. Headers stay
 * where they are. Returns 0, or a negative errno and the packet is untouched.
 */
static __always_inline long pkt_set_length(hook_ctx *ctx, __u32 from, __u32 to)
{
#if defined(HOOK_XDP)
	return bpf_xdp_adjust_tail(ctx, (int)to - (int)from);
#else
	return bpf_skb_change_tail(ctx, to, 0);
#endif
}

/*
 * Makes room at the end of a packet whose IP part ends at `end`, for it to end at `to`. What
 * follows it on the link, padding, makes room first. Returns 0, or a negative errno and the
 * IP part is untouched.
 */
static __always_inline long pkt_grow(hook_ctx *ctx, __u32 end, __u32 to)
{
	__u32 have = pkt_length(ctx);

#if defined(HOOK_TC)
	/* A sum the device took over all of the packet counts padding; it is dropped with that. */
	if (have > end && bpf_skb_change_tail(ctx, end, 0))
		return -1;
	return bpf_skb_change_tail(ctx, have > to ? have : to, 0);
#else
	return have < to ? pkt_set_length(ctx, have, to) : 0;
#endif
}

/*
 * `value`, known to the verifier to be at most `mask`. Clang, which can tell so without the
 * mask, would drop a plain one; the verifier cannot follow it there.
 */
static __always_inline __u32 bounded(__u32 value, __u32 mask)
{
	asm volatile("%0 &= %1" : "+r"(value) : "i"(mask));
	return value;
}

static __always_inline long pkt_load(hook_ctx *ctx, __u32 offset, void *to, __u32 size)
{
#if defined(HOOK_XDP)
	return bpf_xdp_load_bytes(ctx, offset, to, size);
#else
	return bpf_skb_load_bytes(ctx, offset, to, size);
#endif
}

/* Writes without touching any checksum. 0, or a negative errno and nothing was written. */
static __always_inline long pkt_store(hook_ctx *ctx, __u32 offset, void *from, __u32 size)
{
#if defined(HOOK_XDP)
	return bpf_xdp_store_bytes(ctx, offset, from, size);
#else
	return bpf_skb_store_bytes(ctx, offset, from, size, 0);
#endif
}

/* The per-packet context. */

static __always_inline struct chain_ctx *context_percpu(void)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&pc_context, &key);
}

#if defined(HOOK_XDP)

static __always_inline void *pkt_metadata(hook_ctx *ctx)
{
	void *meta;

	asm volatile("%0 = *(u32 *)(%1 + %2)"
		     : "=r"(meta)
		     : "r"(ctx), "i"(offsetof(hook_ctx, data_meta)));
	return meta;
}

/* NULL where the device has no data_meta. */
static __always_inline struct chain_ctx *context_metadata(hook_ctx *ctx)
{
	struct chain_ctx *context = pkt_metadata(ctx);

	return (void *)(context + 1) > pkt_data(ctx) ? (void *)0 : context;
}

#endif

#if defined(HOOK_TC)

/* Like data, cb[] may be accessed at constant offsets of the context only. */
static __always_inline __u32 context_word(hook_ctx *ctx, const int index)
{
	__u32 word;

	asm volatile("%0 = *(u32 *)(%1 + %2)"
		     : "=r"(word)
		     : "r"(ctx), "i"(offsetof(hook_ctx, cb) + index * sizeof(__u32)));
	return word;
}

static __always_inline void context_set_word(hook_ctx *ctx, const int index, __u32 word)
{
	asm volatile("*(u32 *)(%0 + %1) = %2"
		     :
		     : "r"(ctx), "i"(offsetof(hook_ctx, cb) + index * sizeof(__u32)), "r"(word)
		     : "memory");
}

#endif

static __always_inline void context_write(hook_ctx *ctx, enum carrier carrier,
					  const struct chain_ctx *value)
{
	struct chain_ctx *context;

	if (carrier == CARRIER_PACKET) {
#if defined(HOOK_XDP)
		context = context_metadata(ctx);
		if (context) {
			*context = *value;
			return;
		}
#else
		context_set_word(ctx, 0, value->argument_low);
		context_set_word(ctx, 1, value->argument_high);
		context_set_word(ctx, 2, value->flags);
		context_set_word(ctx, 3, value->chain);
		context_set_word(ctx, 4, value->checksum);
		return;
#endif
	}
	context = context_percpu();
	if (context)
		*context = *value;
}

static __always_inline struct chain_ctx context_read(hook_ctx *ctx, enum carrier carrier)
{
	struct chain_ctx *context, none = {};

	if (carrier == CARRIER_PACKET) {
#if defined(HOOK_XDP)
		context = context_metadata(ctx);
		if (context)
			return *context;
#else
		return (struct chain_ctx){
			.argument_low = context_word(ctx, 0),
			.argument_high = context_word(ctx, 1),
			.flags = context_word(ctx, 2),
			.chain = context_word(ctx, 3),
			.checksum = context_word(ctx, 4),
		};
#endif
	}
	context = context_percpu();
	return context ? *context : none;
}

/* Allocates the context, once a packet, without an argument. */
static __always_inline enum reason context_open(hook_ctx *ctx, enum carrier carrier,
						enum checksum checksum)
{
	struct chain_ctx empty = { .checksum = checksum };
	enum reason reason = REASON_NONE;

#if defined(HOOK_XDP)
	if (carrier == CARRIER_PACKET &&
	    bpf_xdp_adjust_meta(ctx, -(int)sizeof(struct chain_ctx)))
		reason = REASON_NO_METADATA;
#endif
	context_write(ctx, carrier, &empty);
	return reason;
}

/* Gives the context back: GRO does not merge packets whose metadata differs. */
static __always_inline void context_close(hook_ctx *ctx, enum carrier carrier)
{
#if defined(HOOK_XDP)
	if (carrier == CARRIER_PACKET && context_metadata(ctx))
		bpf_xdp_adjust_meta(ctx, (int)sizeof(struct chain_ctx));
#endif
}
