/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Keys of sets, and what a packet has to compare with them. `local` and `remote` are the
 * ends of a packet as its hook sees them: on ingress the destination is local.
 */
#pragma once

#include "policy.h"

struct ip_pair_key {
	ip_t local __required __doc("address of the local end");
	ip_t remote __required __doc("address of the remote end");
};

struct flow_key {
	ip_t local __required __doc("address of the local end");
	ip_t remote __required __doc("address of the remote end");
	port_t local_port __required __doc("port of the local end");
	port_t remote_port __required __doc("port of the remote end");
	enum ip_protocol protocol __range(1, 255) __default("tcp")
		__doc("transport protocol");
	__u8 pad[3];
};

struct prefix_key {
	prefix_t prefix __required __doc("network, such as 10.0.0.0/8; the longest one counts");
};

struct port_key {
	port_t port __required __doc("port");
	enum ip_protocol protocol __range(1, 255) __default("tcp")
		__doc("transport protocol");
	__u8 pad;
};

struct connection_key {
	token_t token __required __doc("token of either host");
};

/* Declares `set`, the map a keyed selector looks its key up in. */
#define HASH_SET(kind)                                                                     \
	struct {                                                                           \
		__uint(type, BPF_MAP_TYPE_HASH);                                           \
		__uint(max_entries, 1);                                                    \
		__type(key, struct kind##_key);                                            \
		__type(value, struct element);                                             \
	} set SEC(".maps")

#define LPM_SET(kind)                                                                      \
	struct {                                                                           \
		__uint(type, BPF_MAP_TYPE_LPM_TRIE);                                       \
		__uint(map_flags, 1 /* BPF_F_NO_PREALLOC */);                              \
		__uint(max_entries, 1);                                                    \
		__type(key, struct kind##_key);                                            \
		__type(value, struct element);                                             \
	} set SEC(".maps")

/* Whether the chain gives this selector a set, or a list of keys. Its parameters count too. */
static __always_inline bool uses_set(void)
{
	return node.flags & NODE_SET;
}

#define NANOSECONDS 1000000000ULL

static __always_inline __u32 seconds_now(void)
{
	return bpf_ktime_get_ns() / NANOSECONDS;
}

/* Looks the key up; where it is there and has not expired, `found` has its element. */
static __always_inline bool set_match(void *set, const void *key, struct found *found)
{
	struct element *element = bpf_map_lookup_elem(set, key);

	if (!element || (element->expires && element->expires <= seconds_now()))
		return false;
	found->element = *element;
	return true;
}

/* Which end of a packet a key is compared with. */
enum end {
	END_LOCAL,
	END_REMOTE,
	END_SRC,
	END_DST,
};

/* Whether `end` is the source of a packet at this hook. */
static __always_inline bool end_is_source(enum end end)
{
	if (end == END_LOCAL)
		return !(node.flags & NODE_INGRESS);
	if (end == END_REMOTE)
		return node.flags & NODE_INGRESS;
	return end == END_SRC;
}

static __always_inline const ip_t *end_address(const struct endpoints *ends, enum end end)
{
	return end_is_source(end) ? &ends->source : &ends->destination;
}

static __always_inline port_t end_port(const struct endpoints *ends, enum end end)
{
	return end_is_source(end) ? ends->source_port : ends->destination_port;
}

/* Reads the parts of a packet keys are made of. */
static __always_inline enum reason read_endpoints(hook_ctx *ctx, struct headers *at,
						  struct endpoints *ends, bool ports)
{
	enum reason reason = parse_ip(ctx, at);

	if (reason)
		return reason;
	reason = read_addresses(ctx, at, ends);
	if (reason || !ports)
		return reason;
	return read_ports(ctx, at, ends);
}

/* What a packet without the headers a selector looks at is to it. */
static __always_inline enum outcome no_match_for(enum reason reason)
{
	return reason == REASON_NOT_IP || reason == REASON_NOT_TCP ? MISS : UNKNOWN(reason);
}

/* Parameters that are absent accept everything. */

static __always_inline bool ip_accepts(const volatile ip_t *wanted, const ip_t *address)
{
	if (!(wanted->words[0] | wanted->words[1] | wanted->words[2] | wanted->words[3]))
		return true;
	return wanted->words[0] == address->words[0] && wanted->words[1] == address->words[1] &&
	       wanted->words[2] == address->words[2] && wanted->words[3] == address->words[3];
}

static __always_inline bool port_accepts(port_t wanted, port_t port)
{
	return !wanted || wanted == port;
}

/* The mask of word `index` of a prefix of `length` bits. */
static __always_inline __be32 prefix_mask(__u32 length, __u32 index)
{
	__u32 before = index * 32;

	if (length <= before)
		return 0;
	if (length >= before + 32)
		return 0xffffffff;
	return bpf_htonl(~0u << (32 - (length - before)));
}

static __always_inline bool prefix_accepts(const volatile prefix_t *wanted, const ip_t *address)
{
	__u32 i, length = wanted->length;

#pragma unroll
	for (i = 0; i < 4; i++)
		if ((address->words[i] ^ wanted->words[i]) & prefix_mask(length, i))
			return false;
	return true;
}
