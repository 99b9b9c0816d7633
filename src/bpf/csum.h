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
#define UDP_CHECK_OFFSET 6

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

/* Never leaves 0xffff, the other zero: a sum that is not of zeros alone is not 0. */
static __always_inline void csum_apply(__sum16 *check, __u32 difference)
{
	__u16 sum = csum_fold((__u64)(__u16)~*check + difference);

	*check = sum ? ~sum : 0;
}

/* Changes a 16-bit word of the IPv4 header. */
static __always_inline void ipv4_store16(struct iphdr *ip, __be16 *field, __be16 value)
{
	csum_apply(&ip->check, csum_diff16(*field, value));
	*field = value;
}

#if defined(HOOK_XDP)

/* Bytes added up at a time: as many as bpf_csum_diff() takes; and of them as many as IP has. */
#define SUM_CHUNK 512
#define SUM_CHUNKS (0x10000 / SUM_CHUNK)
#define SUM_REFUSED (1u << 16)

/* Bytes of a packet, out of it. Longer than the headers of any that parsing accepts. */
struct bytes_scratch {
	__u8 bytes[1024];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct bytes_scratch);
} pc_bytes SEC(".maps");

static __always_inline struct bytes_scratch *bytes_scratch(void)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&pc_bytes, &key);
}

/*
 * The folded sum of `length` bytes at `offset`, in whichever parts of the packet they are.
 * SUM_REFUSED where they are not all there, or more than an IP packet has. `zero` is as for
 * ipv6_skip_extensions().
 */
__noinline __u32 pkt_sum(hook_ctx *ctx, __u32 offset, __u32 length, __u32 zero)
{
	struct bytes_scratch *scratch = bytes_scratch();
	__s64 sum = 0;
	int i;

	if (!ctx || !scratch)
		return SUM_REFUSED;
	for (i = 0; i < SUM_CHUNKS; i++) {
		__u32 size = length < SUM_CHUNK ? length : SUM_CHUNK;

		offset += zero;
		length += zero;
		sum = (__u32)sum + zero;
		if (!length)
			return csum_fold(sum);
		size = bounded(size - 1, SUM_CHUNK - 1) + 1;
		if (pkt_load(ctx, offset, scratch->bytes, size))
			return SUM_REFUSED;
		__builtin_memset(scratch->bytes + size, 0, sizeof(__u32));
		sum = bpf_csum_diff(0, 0, (__be32 *)scratch->bytes, (size + 3) & ~3u, sum);
		if (sum < 0)
			return SUM_REFUSED;
		offset += size;
		length -= size;
	}
	return length ? SUM_REFUSED : csum_fold(sum);
}

/* The sum of the pseudo-header (RFC 9293, 3.1; RFC 8200, 8.1), not folded. */
static __always_inline enum reason pseudo_header_sum(hook_ctx *ctx, const struct headers *at,
						     __u64 *sum)
{
	struct iphdr *v4;
	struct ipv6hdr *v6;
	__u32 *words;
	int i;

	*sum = bpf_htonl(at->protocol + at->end - at->transport);
	if (at->version == IP_VERSION_4) {
		v4 = pkt_at(ctx, at->ip, sizeof(*v4));
		if (!v4)
			return REASON_TRUNCATED;
		*sum += (__u64)v4->saddr + v4->daddr;
		return REASON_NONE;
	}
	v6 = pkt_at(ctx, at->ip, sizeof(*v6));
	if (!v6)
		return REASON_TRUNCATED;
	words = (__u32 *)&v6->saddr;
#pragma unroll
	for (i = 0; i < 8; i++)
		*sum += words[i];
	return REASON_NONE;
}

/*
 * XDP is not told which packets are partial. One whose field is not the folded pseudo-header
 * sum is complete. One whose field is that sum is partial, unless the whole segment adds up
 * too, as happens by chance once in 65,536 packets of either sort: then nobody can tell.
 *
 * A fragment is complete: the kernel sees to that before it fragments. Behind a routing
 * header the pseudo-header has another destination, so there it is unclear as well.
 */
static __always_inline enum checksum checksum_of(hook_ctx *ctx, const struct headers *at,
						 __sum16 check)
{
	__u64 pseudo;
	__u32 sum;

	if (node.checksum != CHECKSUM_AUTO)
		return node.checksum;
	if (at->fragmented)
		return CHECKSUM_COMPLETE;
	if (at->routed || pseudo_header_sum(ctx, at, &pseudo))
		return CHECKSUM_UNCLEAR;
	if (csum_fold(pseudo) != check)
		return CHECKSUM_COMPLETE;
	sum = pkt_sum(ctx, at->transport, at->end - at->transport, 0);
	if (sum != SUM_REFUSED && csum_fold(pseudo + sum) == 0xffff)
		return CHECKSUM_UNCLEAR;
	return CHECKSUM_PARTIAL;
}

#else

/* TC is told, by the entry program. */
static __always_inline enum checksum checksum_of(hook_ctx *ctx, const struct headers *at,
						 __sum16 check)
{
	if (node.carrier == CARRIER_NONE)
		return CHECKSUM_AUTO;
	return context_read(ctx, node.carrier).checksum;
}

/*
 * Where the kernel does not tell which packets are partial, its helper knows. The flag says
 * that a difference is one of the pseudo-header, and so of a partial checksum too.
 */
static __always_inline enum reason tcp_csum_replace(hook_ctx *ctx, __u32 offset, __u32 bytes,
						    __u32 length)
{
	if (bytes && bpf_l4_csum_replace(ctx, offset, 0, bytes, 0))
		return REASON_HELPER_FAILED;
	if (length && bpf_l4_csum_replace(ctx, offset, 0, length, 1 << 4 /* BPF_F_PSEUDO_HDR */))
		return bytes ? REASON_HALF_DONE : REASON_HELPER_FAILED;
	return REASON_NONE;
}

#endif

/* How far the TCP checksum is done; UNCLEAR also for a packet without one. */
static __always_inline enum checksum tcp_checksum(hook_ctx *ctx, const struct headers *at)
{
	__sum16 *check = pkt_at(ctx, at->transport + TCP_CHECK_OFFSET, sizeof(*check));

	return check ? checksum_of(ctx, at, *check) : CHECKSUM_UNCLEAR;
}

/*
 * Accounts in the TCP checksum for changed bytes, whose difference is `bytes`, and for a
 * changed length of the segment, whose difference is `length`. Call it before the change.
 * On a reason but REASON_HALF_DONE nothing was done. Invalidates packet pointers.
 */
static __always_inline enum reason tcp_csum_update(hook_ctx *ctx, const struct headers *at,
						   enum checksum checksum, __u32 bytes,
						   __u32 length)
{
	__u32 offset = at->transport + TCP_CHECK_OFFSET;
	__sum16 *check;

	if (checksum == CHECKSUM_UNCLEAR)
		return REASON_CHECKSUM_UNCLEAR;
#if defined(HOOK_TC)
	if (checksum == CHECKSUM_AUTO)
		return tcp_csum_replace(ctx, offset, bytes, length);
#endif
	check = pkt_at(ctx, offset, sizeof(*check));
	if (!check)
		return REASON_TRUNCATED;
	if (checksum == CHECKSUM_COMPLETE)
		csum_apply(check, csum_fold((__u64)bytes + length));
	else if (length)
		*check = csum_fold((__u64)*check + length);
	return REASON_NONE;
}
