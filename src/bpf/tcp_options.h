/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * TCP options (RFC 9293, 3.2): finding, removing, inserting.
 *
 * The loops stand in global functions, which the verifier looks at once, whatever was
 * known at the call; their arguments are plain numbers, so they check every access.
 */
#pragma once

#include "tcp.h"

/* IANA, "TCP Option Kind Numbers". */
enum option_kind {
	OPTION_KIND_EOL = 0,
	OPTION_KIND_NOP = 1,
	OPTION_KIND_MSS = 2,
	OPTION_KIND_WINDOW_SCALE = 3,
	OPTION_KIND_SACK_PERMITTED = 4,
	OPTION_KIND_SACK = 5,
	OPTION_KIND_TIMESTAMPS = 8,
	OPTION_KIND_MD5 = 19,
	OPTION_KIND_USER_TIMEOUT = 28,
	OPTION_KIND_AO = 29,
	OPTION_KIND_MPTCP = 30,
	OPTION_KIND_FAST_OPEN = 34,
} __attribute__((packed));

/* RFC 8684, section 8. */
enum mptcp_subtype {
	MPTCP_SUBTYPE_MP_CAPABLE = 0,
	MPTCP_SUBTYPE_MP_JOIN = 1,
	MPTCP_SUBTYPE_DSS = 2,
	MPTCP_SUBTYPE_ADD_ADDR = 3,
	MPTCP_SUBTYPE_REMOVE_ADDR = 4,
	MPTCP_SUBTYPE_MP_PRIO = 5,
	MPTCP_SUBTYPE_MP_FAIL = 6,
	MPTCP_SUBTYPE_MP_FASTCLOSE = 7,
	MPTCP_SUBTYPE_MP_TCPRST = 8,
	MPTCP_SUBTYPE_ANY = 0xff,
} __attribute__((packed));

/* Options by byte: bit i stands for byte i of the option space. */
#define OPTIONS_MALFORMED (1ULL << 63)

/* What option_size() says where there is none. */
#define OPTION_END 0
#define OPTION_BAD (~0u)

/*
 * One step of a walk: the size and the kind of the option at `at` among the `length` bytes of
 * options at `offset`. OPTION_END: no more of them; OPTION_BAD: it is shorter than 2 bytes or ends
 * behind the header. All of its bytes up to the second were seen to be in the packet.
 */
static __always_inline __u32 option_size(hook_ctx *ctx, __u32 offset, __u32 at, __u32 length,
					 __u8 *kind)
{
	__u8 *option;

	if (at >= length)
		return OPTION_END;
	option = pkt_at(ctx, offset + at, 1);
	if (!option)
		return OPTION_BAD;
	*kind = option[0];
	if (*kind == OPTION_KIND_EOL)
		return OPTION_END;
	if (*kind == OPTION_KIND_NOP)
		return 1;
	option = pkt_at(ctx, offset + at, 2);
	if (!option || option[1] < 2 || at + option[1] > length)
		return OPTION_BAD;
	return option[1];
}

/*
 * What to look for: every option of `kind`, or of one MPTCP subtype, and of those with bits `mask`
 * of the four behind the subtype only the ones where they are `value`.
 */
static __always_inline __u32 option_wanted(__u8 kind, __u8 subtype, __u8 mask, __u8 value)
{
	return (mask & 15) << 20 | (value & 15) << 16 | kind << 8 | subtype;
}

/*
 * The bytes of every wanted option among the `length` bytes of options at `offset`. The walk
 * ends at EOL. OPTIONS_MALFORMED: an option is shorter than 2 bytes or ends behind the
 * header; nothing may be changed then.
 *
 * `zero` is as for ipv6_skip_extensions(); without it a million instructions do not suffice.
 */
__noinline __u64 tcp_options_find(hook_ctx *ctx, __u32 offset, __u32 length, __u32 wanted,
				  __u32 zero)
{
	__u64 found = 0;
	__u32 at = 0;
	int i;

	if (!ctx)
		return OPTIONS_MALFORMED;
	for (i = 0; i < TCP_MAX_OPTIONS; i++) {
		__u32 size, subtype, bits;
		__u8 kind, *option;

		at = (at + zero) & 63;
		size = option_size(ctx, offset, at, length, &kind);
		if (size == OPTION_END)
			return found;
		if (size == OPTION_BAD)
			return OPTIONS_MALFORMED;
		if (kind == (wanted >> 8 & 0xff)) {
			subtype = MPTCP_SUBTYPE_ANY;
			bits = 0;
			if (size > 2) {
				option = pkt_at(ctx, offset + at, 3);
				if (!option)
					return OPTIONS_MALFORMED;
				subtype = option[2] >> 4;
				bits = option[2] & 15;
			}
			if (((wanted & 0xff) == MPTCP_SUBTYPE_ANY ||
			     (wanted & 0xff) == subtype) &&
			    (bits & wanted >> 20) == (wanted >> 16 & 15))
				found |= ((1ULL << (size & 63)) - 1) << at;
		}
		at += size;
	}
	return found;
}

static __always_inline __u64 tcp_options_marked(hook_ctx *ctx, const struct segment *segment,
						__u8 kind, __u8 subtype)
{
	return tcp_options_find(ctx, segment->at.transport + sizeof(struct tcphdr),
				segment->header - sizeof(struct tcphdr),
				option_wanted(kind, subtype, 0, 0), 0);
}

/* Where the first of the marked bytes is; there must be one. */
static __always_inline __u32 lowest_bit(__u64 marked)
{
	return __builtin_popcountll((marked & -marked) - 1) & 63;
}

/*
 * Where the only option that is marked stands, from the TCP header on; 0 if it has another
 * length, or there are more of them.
 */
static __always_inline __u32 tcp_option_offset(__u64 marked, const __u32 length)
{
	__u32 i;

#pragma unroll
	for (i = 0; i <= TCP_MAX_OPTIONS - length; i++)
		if (marked == ((1ULL << length) - 1) << i)
			return sizeof(struct tcphdr) + i;
	return 0;
}

/*
 * The difference to the checksum of the segment when the marked bytes of the options at
 * `offset` become NOP; they do so at once if `write` is set. All of them are in the packet:
 * tcp_options_find() has seen them.
 */
__noinline __u32 tcp_options_erase(hook_ctx *ctx, __u32 offset, __u64 marked, __u32 write)
{
	__u64 difference = 0;
	int i;

	if (!ctx)
		return 0;
	for (i = 0; i < TCP_MAX_OPTIONS / 2; i++) {
		__u32 pair = marked >> (2 * i) & 3;
		__be16 mask = bpf_htons((pair & 1) * 0xff00 | (pair >> 1) * 0x00ff);
		__u8 *bytes = pkt_at(ctx, offset + 2 * i, 2);
		__be16 old, new;

		if (!bytes)
			break;
		__builtin_memcpy(&old, bytes, sizeof(old));
		new = (old & ~mask) | (bpf_htons(OPTION_KIND_NOP << 8 | OPTION_KIND_NOP) & mask);
		difference += csum_diff16(old, new);
		if (write)
			__builtin_memcpy(bytes, &new, sizeof(new));
	}
	return csum_fold(difference);
}

/*
 * Overwrites the options that are marked with NOPs. REASON_OPTION_ABSENT, _BAD_OPTION: nothing
 * done. REASON_HALF_DONE: the packet must not leave.
 */
static __always_inline enum reason tcp_options_blank(hook_ctx *ctx, const struct segment *segment,
						     __u64 marked)
{
	__u32 offset = segment->at.transport + sizeof(struct tcphdr);
	enum reason reason;

	if (marked & OPTIONS_MALFORMED)
		return REASON_BAD_OPTION;
	if (!marked)
		return REASON_OPTION_ABSENT;
	reason = tcp_csum_update(ctx, &segment->at, tcp_checksum(ctx, &segment->at),
				 tcp_options_erase(ctx, offset, marked, 0), 0);
	if (reason)
		return reason;
	tcp_options_erase(ctx, offset, marked, 1);
	return REASON_NONE;
}

/* The same for every option of the kind. */
static __always_inline enum reason tcp_options_strip(hook_ctx *ctx, const struct segment *segment,
						     __u32 kind, __u32 subtype)
{
	return tcp_options_blank(ctx, segment,
				 tcp_options_marked(ctx, segment, kind, subtype));
}

/* Room to rebuild the options in; a power of two, so that a mask keeps offsets inside. */
#define OPTIONS_BUFFER 64

struct options_scratch {
	__u8 old[OPTIONS_BUFFER];    /* the options of the segment */
	__u8 new[OPTIONS_BUFFER];    /* what they become */
	__u8 insert[OPTIONS_BUFFER]; /* the option to add */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct options_scratch);
} pc_options SEC(".maps");

static __always_inline struct options_scratch *tcp_options_scratch(void)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&pc_options, &key);
}

#define OPTIONS_REFUSED (~0u)

enum squeeze {
	SQUEEZE_KEEP_NOPS,
	SQUEEZE_DROP_NOPS,
};

/*
 * Copies the `length` bytes of options in pc_options.old to .new, without the marked ones,
 * without NOPs at the end, or all of them if told so (enum squeeze), and without what EOL
 * ends. Returns the bytes used, or OPTIONS_REFUSED for malformed options. `zero` is as for
 * ipv6_skip_extensions().
 */
__noinline __u32 tcp_options_squeeze(hook_ctx *ctx, __u32 length, __u64 marked, __u32 squeeze,
				     __u32 zero)
{
	struct options_scratch *scratch = tcp_options_scratch();
	__u32 from, used = 0, copied = 0, left = 0;

	if (!ctx || !scratch)
		return OPTIONS_REFUSED;
	for (from = 0; from < TCP_MAX_OPTIONS; from++) {
		__u8 byte = scratch->old[from];
		bool is_nop = false;

		used = (used + zero) & (OPTIONS_BUFFER - 1);
		copied = (copied + zero) & (OPTIONS_BUFFER - 1);
		left = (left + zero) & 0xff;
		if (from >= length)
			break;
		if (!left) {
			if (byte == OPTION_KIND_EOL)
				break;
			is_nop = byte == OPTION_KIND_NOP;
			left = is_nop ? 1 : scratch->old[from + 1];
			if ((!is_nop && left < 2) || from + left > length)
				return OPTIONS_REFUSED;
		}
		left--;
		if (marked >> from & 1 || (is_nop && squeeze == SQUEEZE_DROP_NOPS))
			continue;
		scratch->new[copied] = byte;
		copied++;
		if (!is_nop)
			used = copied;
	}
	return used;
}

/*
 * Appends the `size` bytes in pc_options.insert to the `used` bytes in .new, then NOPs up to
 * `total`, and clears the rest. A global function, for the loop's sake; `zero` is as for
 * ipv6_skip_extensions().
 */
__noinline int tcp_options_append(__u32 used, __u32 size, __u32 total, __u32 zero)
{
	struct options_scratch *scratch = tcp_options_scratch();
	__u32 i;

	if (!scratch)
		return -1;
	for (i = 0; i < TCP_MAX_OPTIONS; i++) {
		used += zero;
		size += zero;
		total += zero;
		if (i < used)
			continue;
		if (i >= total)
			scratch->new[i] = 0;
		else if (i - used < size)
			scratch->new[i] = scratch->insert[(i - used) & (OPTIONS_BUFFER - 1)];
		else
			scratch->new[i] = OPTION_KIND_NOP;
	}
	return 0;
}

/* Bytes the options take, a multiple of 4. */
static __always_inline __u32 tcp_options_room(__u32 used)
{
	return (used + 3) & ~3u;
}

/* Fetches the options into scratch->old. */
static __always_inline enum reason tcp_options_load(hook_ctx *ctx, const struct segment *segment,
						    struct options_scratch *scratch)
{
	__u32 length = segment->header - sizeof(struct tcphdr);

	if (length > TCP_MAX_OPTIONS)
		return REASON_BAD_HEADER;
	__builtin_memset(scratch->old, 0, sizeof(scratch->old));
	__builtin_memset(scratch->new, 0, sizeof(scratch->new));
	/* Linux 6.1 forgets that it is not 0, and lets no helper read nothing. */
	if (length && pkt_load(ctx, segment->at.transport + sizeof(struct tcphdr), scratch->old,
			       bounded(length - 1, OPTIONS_BUFFER - 1) + 1))
		return REASON_TRUNCATED;
	return REASON_NONE;
}

/* Sets the lengths in the IP header for a packet that became `by` bytes longer. */
static __always_inline enum reason ip_resize(hook_ctx *ctx, const struct headers *at, int by)
{
	struct iphdr *v4;
	struct ipv6hdr *v6;

	if (at->version == IP_VERSION_4) {
		v4 = pkt_at(ctx, at->ip, sizeof(*v4));
		if (!v4)
			return REASON_TRUNCATED;
		ipv4_store16(v4, &v4->tot_len, bpf_htons(bpf_ntohs(v4->tot_len) + by));
		return REASON_NONE;
	}
	v6 = pkt_at(ctx, at->ip, sizeof(*v6));
	if (!v6)
		return REASON_TRUNCATED;
	v6->payload_len = bpf_htons(bpf_ntohs(v6->payload_len) + by);
	return REASON_NONE;
}

/*
 * Writes the first `total` bytes of pc_options.new, a multiple of 4, over the options, and `flags`
 * (enum tcp_flag) in the place of those of the segment. The packet must have its new length already,
 * and its payload stand where it will. Everything fallible that can be done before the first change
 * is.
 */
static __always_inline enum reason tcp_options_write(hook_ctx *ctx, const struct segment *segment,
						     struct options_scratch *scratch,
						     enum checksum checksum, __u32 total,
						     __u32 flags)
{
	__u32 options = segment->at.transport + sizeof(struct tcphdr);
	__u32 header = sizeof(struct tcphdr) + total;
	int by = (int)header - (int)segment->header;
	__u8 *doff = pkt_at(ctx, segment->at.transport + 12, 2);
	enum reason reason;
	__be16 old, new;
	__u64 difference;

	if (!doff)
		return REASON_TRUNCATED;
	if (total > TCP_MAX_OPTIONS)
		return REASON_NO_ROOM;
	__builtin_memcpy(&old, doff, sizeof(old));
	new = bpf_htons((bpf_ntohs(old) & 0x0fff & ~TCP_FLAGS) | flags | header / 4 << 12);
	difference = csum_diff16(old, new);
	/* both buffers are zero behind the options they hold */
	difference += bpf_csum_diff((__be32 *)scratch->old, TCP_MAX_OPTIONS,
				    (__be32 *)scratch->new, TCP_MAX_OPTIONS, 0);
	reason = tcp_csum_update(ctx, &segment->at, checksum, csum_fold(difference),
				 by ? csum_diff16(bpf_htons(segment->header), bpf_htons(header)) :
				      0);
	if (reason)
		return reason;
	if (by && ip_resize(ctx, &segment->at, by))
		return REASON_HALF_DONE;
	doff = pkt_at(ctx, segment->at.transport + 12, 2);
	if (!doff)
		return REASON_HALF_DONE;
	__builtin_memcpy(doff, &new, sizeof(new));
	if (total &&
	    pkt_store(ctx, options, scratch->new, bounded(total - 1, OPTIONS_BUFFER - 1) + 1))
		return REASON_HALF_DONE;
	return REASON_NONE;
}

static __always_inline bool segment_is_bare(const struct segment *segment)
{
	return segment->at.end == segment->at.transport + segment->header;
}

/*
 * Whether options of `total` bytes may make the segment longer: it must have no payload, which
 * would have to move, be whole, and stay within the MTU of the hook's device.
 */
static __always_inline bool tcp_options_may_grow(hook_ctx *ctx, const struct segment *segment,
						 __u32 total)
{
	__u32 length = segment->at.transport - segment->at.ip + sizeof(struct tcphdr) + total;

	return segment_is_bare(segment) && !segment->at.fragmented &&
	       total <= TCP_MAX_OPTIONS && bpf_check_mtu(ctx, 0, &length, 0, 0) == 0;
}

/*
 * Inserts the option of `size` bytes that stands in scratch->insert, and leaves out those whose
 * bytes are marked: at the end of a segment without payload, which grows, up to 60 bytes of
 * header; elsewhere in the place of NOPs, the length staying what it is. Its flags become `flags`
 * (enum tcp_flag). Retryable: on REASON_NO_ROOM the next packet may have room.
 */
static __always_inline enum reason tcp_options_exchange(hook_ctx *ctx,
							const struct segment *segment,
							struct options_scratch *scratch,
							__u64 marked, __u32 size, __u32 flags)
{
	__u32 length = segment->header - sizeof(struct tcphdr);
	enum squeeze squeeze = segment_is_bare(segment) && !segment->at.fragmented ?
				       SQUEEZE_KEEP_NOPS :
				       SQUEEZE_DROP_NOPS;
	enum reason reason = tcp_options_load(ctx, segment, scratch);
	enum checksum checksum;
	__u32 used, total;

	if (reason)
		return reason;
	used = tcp_options_squeeze(ctx, length, marked, squeeze, 0);
	if (used == OPTIONS_REFUSED)
		return REASON_BAD_OPTION;
	total = tcp_options_room(used + size);
	if (total > length && squeeze == SQUEEZE_KEEP_NOPS &&
	    !tcp_options_may_grow(ctx, segment, total)) {
		used = tcp_options_squeeze(ctx, length, marked, SQUEEZE_DROP_NOPS, 0);
		total = tcp_options_room(used + size);
	}
	if (total > length && !tcp_options_may_grow(ctx, segment, total))
		return REASON_NO_ROOM;
	if (total < length)
		total = length;
	if (tcp_options_append(used, size, total, 0))
		return REASON_HELPER_FAILED;
	checksum = tcp_checksum(ctx, &segment->at);
	if (checksum == CHECKSUM_UNCLEAR)
		return REASON_CHECKSUM_UNCLEAR;
	/* one that grows has no payload, so it is here whole */
	if (total > length &&
	    pkt_grow(ctx, segment->at.end, segment->at.end + total - length))
		return REASON_HELPER_FAILED;
	return tcp_options_write(ctx, segment, scratch, checksum, total, flags);
}

static __always_inline enum reason tcp_options_insert(hook_ctx *ctx, const struct segment *segment,
						      struct options_scratch *scratch, __u32 size)
{
	return tcp_options_exchange(ctx, segment, scratch, 0, size, segment->flags);
}

#if defined(HOOK_XDP)

/*
 * Takes `by` bytes out of the frame behind its first `keep`, which move. On a reason but
 * REASON_HALF_DONE nothing was done.
 */
static __always_inline enum reason pkt_cut(hook_ctx *ctx, __u32 keep, __u32 by)
{
	struct bytes_scratch *scratch = bytes_scratch();

	if (!scratch)
		return REASON_HELPER_FAILED;
	keep = bounded(keep - 1, sizeof(scratch->bytes) - 1) + 1;
	if (pkt_load(ctx, 0, scratch->bytes, keep))
		return REASON_TRUNCATED;
	if (bpf_xdp_adjust_head(ctx, by))
		return REASON_HELPER_FAILED;
	return pkt_store(ctx, 0, scratch->bytes, keep) ? REASON_HALF_DONE : REASON_NONE;
}

/*
 * Makes a frame shorter whose TCP header, at its end, becomes `by` bytes shorter. What the
 * header leaves behind in the shortest of frames becomes 0: a device that completes a partial
 * checksum adds up all of the frame.
 */
static __always_inline enum reason pkt_shrink(hook_ctx *ctx, const struct segment *segment,
					      __u32 by)
{
	__u32 have = pkt_length(ctx), end = segment->at.end - by, length = end;
	__u8 zeros[8] = {}; /* headers take at least 54 bytes of the 60 */
	__u32 left;

	if (length < ETH_ZLEN)
		length = have < ETH_ZLEN ? have : ETH_ZLEN;
	if (length < have && pkt_set_length(ctx, have, length))
		return REASON_HELPER_FAILED;
	left = length < segment->at.end ? length - end : by;
	if (left && pkt_store(ctx, end, zeros, bounded(left - 1, 7) + 1))
		return REASON_HALF_DONE;
	return REASON_NONE;
}

/*
 * Takes every option of the kind out, the header shrinking by what they leave free. Headers
 * in front of a payload have to move; where a device still has to complete the checksum it
 * would do so at the old place, so such a segment stays as it is: REASON_CHECKSUM_PARTIAL.
 */
static __always_inline enum reason tcp_options_remove(hook_ctx *ctx, const struct segment *segment,
						      __u32 kind, __u32 subtype)
{
	struct options_scratch *scratch = tcp_options_scratch();
	__u32 length = segment->header - sizeof(struct tcphdr);
	__u64 marked = tcp_options_marked(ctx, segment, kind, subtype);
	enum checksum checksum;
	enum reason reason;
	__u32 used, total;

	if (!scratch)
		return REASON_HELPER_FAILED;
	if (marked & OPTIONS_MALFORMED)
		return REASON_BAD_OPTION;
	if (!marked)
		return REASON_OPTION_ABSENT;
	reason = tcp_options_load(ctx, segment, scratch);
	if (reason)
		return reason;
	used = tcp_options_squeeze(ctx, length, marked, SQUEEZE_KEEP_NOPS, 0);
	if (used == OPTIONS_REFUSED)
		return REASON_BAD_OPTION;
	total = tcp_options_room(used);
	if (tcp_options_append(used, 0, total, 0))
		return REASON_HELPER_FAILED;
	checksum = tcp_checksum(ctx, &segment->at);
	if (checksum == CHECKSUM_UNCLEAR)
		return REASON_CHECKSUM_UNCLEAR;
	if (total < length) {
		if (segment->at.fragmented)
			return REASON_FRAGMENT;
		if (segment_is_bare(segment))
			reason = pkt_shrink(ctx, segment, length - total);
		else if (checksum == CHECKSUM_PARTIAL)
			reason = REASON_CHECKSUM_PARTIAL;
		else
			reason = pkt_cut(ctx,
					 segment->at.transport + sizeof(struct tcphdr) + total,
					 length - total);
		if (reason)
			return reason;
	}
	return tcp_options_write(ctx, segment, scratch, checksum, total, segment->flags);
}

#else

/* Not to be had: `mode` of strip_option is refused when the chain is planned. */
static __always_inline enum reason tcp_options_remove(hook_ctx *ctx, const struct segment *segment,
						      __u32 kind, __u32 subtype)
{
	return REASON_HELPER_FAILED;
}

#endif
