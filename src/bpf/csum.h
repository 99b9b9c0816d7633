/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Internet checksums (RFC 1071), updated by difference (RFC 1624).
 *
 * Locally sent packets are often CHECKSUM_PARTIAL: the TCP checksum field then holds the
 * folded sum of the pseudo-header, and the device or a later hop adds the rest. Changed
 * bytes must not be added to such a field; a changed length must.
 */
#pragma once

#include "parse.h"

#define TCP_CHECK_OFFSET 16

static __always_inline __u16 csum_fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* What to add to a sum when the 16-bit word `from` becomes `to`. */
static __always_inline __u32 csum_diff16(__be16 from, __be16 to)
{
	return (__u16)~from + to;
}

/*
 * The same for bytes that begin at an odd offset: each sits in the other half of its
 * 16-bit word (RFC 1071, 2B: the sum is the swapped one).
 */
static __always_inline __u32 csum_at_parity(__u32 difference, __u32 offset)
{
	__u16 folded = csum_fold(difference);

	return offset & 1 ? __builtin_bswap16(folded) : folded;
}

static __always_inline void csum_apply(__sum16 *check, __u32 difference)
{
	*check = ~csum_fold((__u64)(__u16)~*check + difference);
}

/* Changes a 16-bit word of the IPv4 header. */
static __always_inline void ipv4_store16(struct iphdr *ip, __be16 *field, __be16 value)
{
	csum_apply(&ip->check, csum_diff16(*field, value));
	*field = value;
}

#if defined(HOOK_XDP)

/*
 * Whether the TCP checksum is only a seed. XDP is not told; a field that equals the folded
 * pseudo-header sum is taken for one. A complete checksum does so by chance once in 65,536
 * packets; such a packet then leaves with a checksum its receiver refuses.
 */
static __always_inline bool tcp_csum_is_partial(hook_ctx *ctx, const struct headers *at,
						__sum16 check)
{
	__u64 sum = bpf_htonl(IP_PROTOCOL_TCP + at->end - at->transport);
	struct iphdr *v4;
	struct ipv6hdr *v6;
	__u32 *words;
	int i;

	if (at->version == IP_VERSION_4) {
		v4 = pkt_at(ctx, at->ip, sizeof(*v4));
		if (!v4)
			return false;
		sum += (__u64)v4->saddr + v4->daddr;
	} else {
		v6 = pkt_at(ctx, at->ip, sizeof(*v6));
		if (!v6)
			return false;
		words = (__u32 *)&v6->saddr;
#pragma unroll
		for (i = 0; i < 8; i++)
			sum += words[i];
	}
	return csum_fold(sum) == check;
}

#endif

/*
 * Accounts in the TCP checksum for changed bytes, whose difference is `bytes`, and for a
 * changed length of the segment, whose difference is `length`. Call it before the change.
 * On a reason nothing was done. Invalidates packet pointers.
 */
static __always_inline enum reason tcp_csum_update(hook_ctx *ctx, const struct headers *at,
						   __u32 bytes, __u32 length)
{
	__u32 offset = at->transport + TCP_CHECK_OFFSET;
#if defined(HOOK_XDP)
	__sum16 *check = pkt_at(ctx, offset, sizeof(*check));
	__sum16 value;

	if (!check)
		return REASON_TRUNCATED;
	value = *check;
	if (tcp_csum_is_partial(ctx, at, value))
		value = csum_fold((__u64)value + length);
	else
		csum_apply(&value, csum_fold((__u64)bytes + length));
	check = pkt_at(ctx, offset, sizeof(*check));
	if (!check)
		return REASON_TRUNCATED;
	*check = value;
#else
	/* The kernel knows which packets are partial, and leaves those alone. */
	if (bytes && bpf_l4_csum_replace(ctx, offset, 0, bytes, 0))
		return REASON_HELPER_FAILED;
	if (length && bpf_l4_csum_replace(ctx, offset, 0, length, 1 << 4 /* BPF_F_PSEUDO_HDR */))
		return bytes ? REASON_HALF_DONE : REASON_HELPER_FAILED;
#endif
	return REASON_NONE;
}
