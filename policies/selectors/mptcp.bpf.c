/* SPDX-License-Identifier: GPL-2.0-only */
#include "keys.h"
#include "mptcp.h"

#define MAX_IDS 4

enum mptcp_bit {
	MPTCP_BIT_ANY,
	MPTCP_BIT_SET,
	MPTCP_BIT_CLEAR,
};

/* RFC 8684, section 8. */
struct params {
	enum mptcp_subtype subtype[MPTCP_SUBTYPES] __range(0, 15)
		__doc("subtypes of which the option has one (RFC 8684), by name or number; "
		      "any if absent");
	__u8 subtype_len;
	__u8 version[2] __range(0, 15) __doc("versions of MP_CAPABLE of which it has one");
	__u8 version_len;
	__u8 flags __doc("bits that must be set in the fourth byte of MP_CAPABLE or DSS");
	enum mptcp_bit backup __default("any")
		__doc("backup bit of MP_PRIO, and of MP_JOIN on a SYN");
	enum mptcp_bit echo __default("any") __doc("echo bit of ADD_ADDR");
	__u8 address_id[MAX_IDS]
		__doc("address ids of which ADD_ADDR, REMOVE_ADDR, MP_PRIO or the MP_JOIN of a SYN "
		      "has one");
	__u8 address_id_len;
};
PARAMS;

/* 1 if `byte` is 0, without a branch: the verifier would follow both. */
static __always_inline __u32 is_zero(__u32 byte)
{
	return (byte - 1) >> 31;
}

static __always_inline bool bit_accepts(enum mptcp_bit wanted, bool bit)
{
	return wanted == MPTCP_BIT_ANY || (wanted == MPTCP_BIT_SET) == bit;
}

static __always_inline bool subtype_accepted(__u32 subtype)
{
	__u32 i, hit = !params.subtype_len;

#pragma unroll
	for (i = 0; i < MPTCP_SUBTYPES; i++)
		if (i < params.subtype_len)
			hit |= is_zero(params.subtype[i] ^ subtype);
	return hit;
}

static __always_inline __u32 id_hit(__u32 id)
{
	__u32 i, hit = 0;

#pragma unroll
	for (i = 0; i < MAX_IDS; i++)
		if (i < params.address_id_len)
			hit |= is_zero(params.address_id[i] ^ id);
	return hit;
}

/* REMOVE_ADDR has a list of ids, of which the first so many are looked at. */
#define REMOVED_IDS 8

static __always_inline bool ids_accepted(hook_ctx *ctx, __u32 offset, __u32 size, __u32 subtype,
					 bool syn)
{
	bool single = subtype == MPTCP_SUBTYPE_ADD_ADDR ||
		      (subtype == MPTCP_SUBTYPE_MP_JOIN && syn) ||
		      (subtype == MPTCP_SUBTYPE_MP_PRIO && size == MP_PRIO_LENGTH + 1);
	__u32 i, hit = 0;
	__u8 *byte;

	if (!params.address_id_len)
		return true;
	if (!single && subtype != MPTCP_SUBTYPE_REMOVE_ADDR)
		return false;
#pragma unroll
	for (i = 0; i < REMOVED_IDS; i++) {
		byte = pkt_at(ctx, offset + 3 + i, 1);
		if (byte && 3 + i < size && !(single && i))
			hit |= id_hit(*byte);
	}
	return hit;
}

/* Whether the option of kind 30 and `size` bytes at `offset` is one that the parameters name. */
static __always_inline bool option_accepted(hook_ctx *ctx, __u32 offset, __u32 size, bool syn)
{
	__u8 *option = pkt_at(ctx, offset, 4);
	__u32 subtype, bits, fourth;

	if (size < 3)
		return false;
	if (!option) {
		option = pkt_at(ctx, offset, 3);
		if (!option)
			return false;
		fourth = 0;
	} else {
		fourth = size > 3 ? option[3] : 0;
	}
	subtype = option[2] >> 4;
	bits = option[2] & 15;
	if (!subtype_accepted(subtype))
		return false;
	if (params.version_len &&
	    (subtype != MPTCP_SUBTYPE_MP_CAPABLE ||
	     !(is_zero(params.version[0] ^ bits) |
	       (params.version_len > 1 ? is_zero(params.version[1] ^ bits) : 0))))
		return false;
	if (params.flags &&
	    ((subtype != MPTCP_SUBTYPE_MP_CAPABLE && subtype != MPTCP_SUBTYPE_DSS) ||
	     (fourth & params.flags) != params.flags))
		return false;
	if (params.backup != MPTCP_BIT_ANY &&
	    (!(subtype == MPTCP_SUBTYPE_MP_PRIO || (subtype == MPTCP_SUBTYPE_MP_JOIN && syn)) ||
	     !bit_accepts(params.backup, bits & MP_BACKUP)))
		return false;
	if (params.echo != MPTCP_BIT_ANY &&
	    (subtype != MPTCP_SUBTYPE_ADD_ADDR || !bit_accepts(params.echo, bits & ADD_ADDR_ECHO)))
		return false;
	return ids_accepted(ctx, offset, size, subtype, syn);
}

/* 1: an option fits; 0: none does; 2: the list is malformed. `zero` as in tcp_options_find(). */
__noinline __u32 mptcp_options_match(hook_ctx *ctx, __u32 offset, __u32 length, __u32 syn,
				     __u32 zero)
{
	__u32 at = 0;
	int i;

	if (!ctx)
		return 2;
	for (i = 0; i < TCP_MAX_OPTIONS; i++) {
		__u32 size;
		__u8 kind;

		at = (at + zero) & 63;
		size = option_size(ctx, offset, at, length, &kind);
		if (size == OPTION_END)
			return 0;
		if (size == OPTION_BAD)
			return 2;
		if (kind == OPTION_KIND_MPTCP && option_accepted(ctx, offset + at, size, syn))
			return 1;
		at += size;
	}
	return 0;
}

SELECTOR(mptcp, "TCP segments with an MPTCP option of which all that is given holds")
{
	struct segment segment;
	enum reason reason = parse_tcp(ctx, &segment);
	__u32 match;

	if (reason)
		return no_match_for(reason);
	match = mptcp_options_match(ctx, segment.at.transport + sizeof(struct tcphdr),
				    segment.header - sizeof(struct tcphdr),
				    !!(segment.flags & TCP_FLAG_SYN), 0);
	if (match == 2)
		return UNKNOWN(REASON_BAD_OPTION);
	return match_if(match);
}
