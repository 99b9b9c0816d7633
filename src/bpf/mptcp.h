/* SPDX-License-Identifier: GPL-2.0-only */
/* MPTCP options (RFC 8684, 3): finding them, and inserting one. */
#pragma once

#include "tcp_options.h"

/* Lengths of options, in bytes; of those with several, what the named part takes. */
#define MP_CAPABLE_WITH_KEYS 20	/* third packet; longer with data */
#define MP_JOIN_SYN 12
#define MP_JOIN_SYN_ACK 16
#define MP_JOIN_ACK 24
#define DSS_BASE 4
#define ADD_ADDR_V4 16
#define ADD_ADDR_V6 28
#define MP_PRIO_LENGTH 3
#define MP_TCPRST_LENGTH 4

#define MPTCP_VERSION_1 1
#define MP_BACKUP 1	/* low bit behind the subtype of MP_JOIN and MP_PRIO */
#define ADD_ADDR_ECHO 1 /* low bit behind the subtype */

/* Fourth byte of a DSS option. */
enum dss_flag {
	DSS_FLAG_ACK = 1 << 0,
	DSS_FLAG_ACK_64 = 1 << 1,
	DSS_FLAG_MAPPING = 1 << 2,
	DSS_FLAG_SEQUENCE_64 = 1 << 3,
	DSS_FLAG_FIN = 1 << 4,
};

/* Six bits a subtype, as mptcp_at() reads them. */
#define MPTCP_INDEX_BITS 6
#define MPTCP_INDEX_MASK 63
#define MPTCP_SUBTYPES 9
#define MPTCP_INDEX_MALFORMED (1ULL << 63)

/*
 * Finds every MPTCP option among the `length` bytes of options at `offset`. `zero` and the limits
 * are those of tcp_options_find().
 */
__noinline __u64 mptcp_find(hook_ctx *ctx, __u32 offset, __u32 length, __u32 zero)
{
	__u64 index = 0;
	__u32 at = 0;
	int i;

	if (!ctx)
		return MPTCP_INDEX_MALFORMED;
	for (i = 0; i < TCP_MAX_OPTIONS; i++) {
		__u32 size, shift;
		__u8 kind, *option;

		at = (at + zero) & 63;
		index += zero;
		size = option_size(ctx, offset, at, length, &kind);
		if (size == OPTION_END)
			return index;
		if (size == OPTION_BAD)
			return MPTCP_INDEX_MALFORMED;
		if (kind == OPTION_KIND_MPTCP && size > 2) {
			option = pkt_at(ctx, offset + at, 3);
			if (!option)
				return MPTCP_INDEX_MALFORMED;
			shift = (option[2] >> 4) * MPTCP_INDEX_BITS;
			if (shift < MPTCP_SUBTYPES * MPTCP_INDEX_BITS &&
			    !(index >> shift & MPTCP_INDEX_MASK))
				index |= (__u64)(at + 1) << shift;
		}
		at += size;
	}
	return index;
}

/* Where the first MPTCP option of each subtype is; a malformed list has none. */
static __always_inline __u64 mptcp_index(hook_ctx *ctx, const struct segment *segment)
{
	__u64 index = mptcp_find(ctx, segment->at.transport + sizeof(struct tcphdr),
				 segment->header - sizeof(struct tcphdr), 0);

	return index & MPTCP_INDEX_MALFORMED ? 0 : index;
}

/* 1 + the offset of the first option of the subtype among all options; 0: there is none. */
static __always_inline __u32 mptcp_at(__u64 index, enum mptcp_subtype subtype)
{
	return index >> subtype * MPTCP_INDEX_BITS & MPTCP_INDEX_MASK;
}

static __always_inline bool mptcp_has(__u64 index, enum mptcp_subtype subtype)
{
	return mptcp_at(index, subtype);
}

/* Its first `size` bytes, or NULL: absent, or shorter. */
static __always_inline __u8 *mptcp_option(hook_ctx *ctx, const struct segment *segment,
					  __u64 index, enum mptcp_subtype subtype,
					  const __u32 size)
{
	__u32 at = mptcp_at(index, subtype);
	__u8 *option;

	if (!at)
		return (void *)0;
	option = pkt_at(ctx, segment->at.transport + sizeof(struct tcphdr) + at - 1, size);
	return option && option[1] >= size ? option : (void *)0;
}

/* Begins an option to insert; `bits` are those behind its subtype, `size` is in bytes. */
static __always_inline void mptcp_option_begin(struct options_scratch *scratch,
					       enum mptcp_subtype subtype, __u8 bits, __u8 size)
{
	scratch->insert[0] = OPTION_KIND_MPTCP;
	scratch->insert[1] = size;
	scratch->insert[2] = subtype << 4 | bits;
}

/*
 * Whether the DSS option only acknowledges data, so that the next one makes up for it. `mapped`
 * bytes of the connection's stream and its end must arrive.
 */
static __always_inline bool dss_is_ack_only(const __u8 *dss)
{
	return !(dss[3] & (DSS_FLAG_MAPPING | DSS_FLAG_FIN));
}

/*
 * Inserts the MPTCP option of `size` bytes in scratch->insert. Where a segment without payload
 * has no room for it, the option takes the place of a DSS that only acknowledges, if `may_replace`.
 * Retryable, as tcp_options_insert().
 */
static __always_inline enum reason mptcp_insert(hook_ctx *ctx, const struct segment *segment,
						struct options_scratch *scratch, __u64 index,
						__u32 size, bool may_replace)
{
	__u8 *dss = mptcp_option(ctx, segment, index, MPTCP_SUBTYPE_DSS, DSS_BASE);
	__u64 marked = 0;
	__u32 used;

	if (may_replace && dss && dss_is_ack_only(dss) && segment_is_bare(segment)) {
		enum reason reason = tcp_options_load(ctx, segment, scratch);

		if (reason)
			return reason;
		used = tcp_options_squeeze(ctx, segment->header - sizeof(struct tcphdr), 0,
					   SQUEEZE_DROP_NOPS, 0);
		if (used == OPTIONS_REFUSED)
			return REASON_BAD_OPTION;
		if (tcp_options_room(used + size) > TCP_MAX_OPTIONS)
			marked = tcp_options_marked(ctx, segment, OPTION_KIND_MPTCP,
						    MPTCP_SUBTYPE_DSS);
	}
	return tcp_options_exchange(ctx, segment, scratch, marked, size, segment->flags);
}
