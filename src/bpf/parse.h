/* SPDX-License-Identifier: GPL-2.0-only */
/* From the first byte of a packet to its transport header. */
#pragma once

#include "node.h"
#include "types.h"

#define IP_VERSION_4 4
#define IP_VERSION_6 6
#define IP_OFFSET 0x1fff
#define IP_MORE_FRAGMENTS 0x2000
#define PARSE_MAX_TAGS 2
#define PARSE_MAX_EXTENSIONS 8
/* Farthest transport header; with its options it ends before PKT_MAX_OFFSET. */
#define PARSE_MAX_TRANSPORT 0x1ff

enum ip_protocol {
	IP_PROTOCOL_ICMP = 1,
	IP_PROTOCOL_TCP = 6,
	IP_PROTOCOL_UDP = 17,
	IP_PROTOCOL_ICMPV6 = 58,
	IP_PROTOCOL_SCTP = 132,
} __attribute__((packed));

/* IANA, "IPv6 Extension Header Types". */
enum ipv6_extension {
	IPV6_HOP_BY_HOP = 0,
	IPV6_ROUTING = 43,
	IPV6_FRAGMENT = 44,
	IPV6_AUTHENTICATION = 51,
	IPV6_NO_NEXT = 59,
	IPV6_DESTINATION = 60,
};

/* Where the headers of a packet are; offsets count from its first byte. */
struct headers {
	__u32 ip;
	__u32 transport;
	__u32 end;		/* of the IP packet; behind it is link padding */
	__u8 version;
	__u8 protocol;		/* of the transport header */
	bool later_fragment;	/* there is no transport header here */
	bool fragmented;	/* this is a piece of a packet, the first one included */
	bool authenticated;	/* IPv6: signed as a whole (RFC 4302) */
	bool routed;		/* IPv6: a routing header names the destination (RFC 8200, 4.4) */
};

enum ipv6_transport_flags {
	IPV6_TRANSPORT_FRAGMENTED = 1 << 0,
	IPV6_TRANSPORT_LATER_FRAGMENT = 1 << 1,
	IPV6_TRANSPORT_TRUNCATED = 1 << 2,
	IPV6_TRANSPORT_TOO_MANY = 1 << 3,
	IPV6_TRANSPORT_ROUTED = 1 << 4,
	IPV6_TRANSPORT_AUTHENTICATED = 1 << 5,
	IPV6_TRANSPORT_FLAGS = 0x3f,
};

static __always_inline __u32 ipv6_transport_pack(__u32 offset, __u32 protocol, __u32 flags)
{
	return offset << 16 | (protocol & 0xff) << 8 | flags;
}

/*
 * Walks extension headers from `offset`, where a header of type `protocol` stands. Returns
 * offset << 16 | protocol << 8 | enum ipv6_transport_flags.
 *
 * A global function: the verifier looks at the loop once, not once a path to it. `zero` is 0,
 * which the verifier does not know: added in, it makes one state of the many values a
 * variable can have in a round.
 */
__noinline __u32 ipv6_skip_extensions(hook_ctx *ctx, __u32 offset, __u32 protocol, __u32 zero)
{
	__u32 flags = 0;
	int i;

	if (!ctx)
		return 0;
	/* one round more than there may be: it sees the header behind the last */
	for (i = 0; i <= PARSE_MAX_EXTENSIONS; i++) {
		__u8 *header;
		__u32 length;

		offset = (offset + zero) & PKT_MAX_OFFSET;
		protocol = (protocol + zero) & 0xff;
		flags = (flags + zero) & IPV6_TRANSPORT_FLAGS;
		if (protocol != IPV6_HOP_BY_HOP && protocol != IPV6_ROUTING &&
		    protocol != IPV6_FRAGMENT && protocol != IPV6_AUTHENTICATION &&
		    protocol != IPV6_DESTINATION)
			return ipv6_transport_pack(offset, protocol, flags);
		header = pkt_at(ctx, offset, 8);
		if (!header)
			return ipv6_transport_pack(offset, protocol, IPV6_TRANSPORT_TRUNCATED);
		length = (header[1] + 1) * 8;
		if (protocol == IPV6_FRAGMENT) {
			__u32 position = header[2] << 8 | header[3];

			length = 8;
			if (position & ~0x7u)
				flags |= IPV6_TRANSPORT_LATER_FRAGMENT;
			if (position & ~0x6u)
				flags |= IPV6_TRANSPORT_FRAGMENTED;
		} else if (protocol == IPV6_AUTHENTICATION) {
			length = (header[1] + 2) * 4;
			flags |= IPV6_TRANSPORT_AUTHENTICATED;
		} else if (protocol == IPV6_ROUTING && header[3]) {
			flags |= IPV6_TRANSPORT_ROUTED;
		}
		protocol = header[0];
		offset += length;
		if (offset > PARSE_MAX_TRANSPORT)
			return ipv6_transport_pack(0, protocol, IPV6_TRANSPORT_TOO_MANY);
		if (flags & IPV6_TRANSPORT_LATER_FRAGMENT)
			return ipv6_transport_pack(offset, protocol, flags);
	}
	return ipv6_transport_pack(0, protocol, IPV6_TRANSPORT_TOO_MANY);
}

/* What a length field of 0 stands for: BIG TCP, a super-packet over 64 KiB, or just 0. */
static __always_inline __u32 length_beyond_field(__u32 length)
{
	return length > 0xffff ? length : 0;
}

static __always_inline enum reason parse_ipv4(hook_ctx *ctx, struct headers *at)
{
	struct iphdr *ip = pkt_at(ctx, at->ip, sizeof(*ip));
	__u32 total, header;

	if (!ip)
		return REASON_TRUNCATED;
	if (ip->version != IP_VERSION_4 || ip->ihl < 5)
		return REASON_BAD_HEADER;
	header = ip->ihl * 4;
	total = bpf_ntohs(ip->tot_len);
	if (!total)
		total = length_beyond_field(pkt_length(ctx) - at->ip);
	if (total < header)
		return REASON_BAD_HEADER;
	at->version = IP_VERSION_4;
	at->protocol = ip->protocol;
	at->transport = at->ip + header;
	at->end = at->ip + total;
	at->later_fragment = ip->frag_off & bpf_htons(IP_OFFSET);
	at->fragmented = ip->frag_off & bpf_htons(IP_OFFSET | IP_MORE_FRAGMENTS);
	at->authenticated = false;
	at->routed = false;
	return REASON_NONE;
}

static __always_inline enum reason parse_ipv6(hook_ctx *ctx, struct headers *at)
{
	struct ipv6hdr *ip = pkt_at(ctx, at->ip, sizeof(*ip));
	__u32 payload, found;

	if (!ip)
		return REASON_TRUNCATED;
	if (ip->version != IP_VERSION_6)
		return REASON_BAD_HEADER;
	payload = bpf_ntohs(ip->payload_len);
	if (!payload)
		payload = length_beyond_field(pkt_length(ctx) - at->ip - (__u32)sizeof(*ip));
	at->end = at->ip + (__u32)sizeof(*ip) + payload;
	at->version = IP_VERSION_6;
	at->protocol = ip->nexthdr;
	at->transport = at->ip + sizeof(*ip);
	at->later_fragment = false;
	at->fragmented = false;
	at->authenticated = false;
	at->routed = false;
	if (at->protocol == IP_PROTOCOL_TCP || at->protocol == IP_PROTOCOL_UDP)
		return REASON_NONE;
	found = ipv6_skip_extensions(ctx, at->transport, at->protocol, 0);
	if (found & IPV6_TRANSPORT_TRUNCATED)
		return REASON_TRUNCATED;
	if (found & IPV6_TRANSPORT_TOO_MANY)
		return REASON_EXTENSION_HEADERS;
	at->transport = found >> 16 & PARSE_MAX_TRANSPORT;
	at->protocol = found >> 8 & 0xff;
	at->later_fragment = found & IPV6_TRANSPORT_LATER_FRAGMENT;
	at->fragmented = found & IPV6_TRANSPORT_FRAGMENTED;
	at->authenticated = found & IPV6_TRANSPORT_AUTHENTICATED;
	at->routed = found & IPV6_TRANSPORT_ROUTED;
	return REASON_NONE;
}

/* Without a link header the version of IP is all there is to tell what it is. */
static __always_inline enum reason parse_without_link(hook_ctx *ctx, struct headers *at)
{
	__u8 *version = pkt_at(ctx, 0, 1);

	if (!version)
		return REASON_TRUNCATED;
	at->ip = 0;
	if (*version >> 4 == IP_VERSION_4)
		return parse_ipv4(ctx, at);
	if (*version >> 4 == IP_VERSION_6)
		return parse_ipv6(ctx, at);
	return REASON_NOT_IP;
}

/* Finds the IP and the transport header. */
static __always_inline enum reason parse_ip(hook_ctx *ctx, struct headers *at)
{
	struct ethhdr *eth;
	__be16 protocol;
	int i;

	pkt_pull_headers(ctx);
	if (node.flags & NODE_NO_LINK)
		return parse_without_link(ctx, at);
	eth = pkt_at(ctx, 0, sizeof(*eth));
	if (!eth)
		return REASON_TRUNCATED;
	protocol = eth->h_proto;
	at->ip = ETH_HLEN;
#pragma unroll
	for (i = 0; i < PARSE_MAX_TAGS; i++) {
		__be16 *inner;

		if (protocol != bpf_htons(ETH_P_8021Q) && protocol != bpf_htons(ETH_P_8021AD))
			break;
		inner = pkt_at(ctx, at->ip + 2, sizeof(*inner));
		if (!inner)
			return REASON_TRUNCATED;
		protocol = *inner;
		at->ip += 4;
	}
	if (protocol == bpf_htons(ETH_P_IP))
		return parse_ipv4(ctx, at);
	if (protocol == bpf_htons(ETH_P_IPV6))
		return parse_ipv6(ctx, at);
	return REASON_NOT_IP;
}

/* The two ends of a packet, as its headers name them. Ports are 0 where it has none. */
struct endpoints {
	ip_t source;
	ip_t destination;
	port_t source_port;
	port_t destination_port;
};

static __always_inline ip_t ip_from_v4(__be32 address)
{
	return (ip_t){ .words = { 0, 0, bpf_htonl(0xffff), address } };
}

static __always_inline enum reason read_addresses(hook_ctx *ctx, const struct headers *at,
						  struct endpoints *ends)
{
	struct iphdr *v4;
	struct ipv6hdr *v6;

	if (at->version == IP_VERSION_4) {
		v4 = pkt_at(ctx, at->ip, sizeof(*v4));
		if (!v4)
			return REASON_TRUNCATED;
		ends->source = ip_from_v4(v4->saddr);
		ends->destination = ip_from_v4(v4->daddr);
		return REASON_NONE;
	}
	v6 = pkt_at(ctx, at->ip, sizeof(*v6));
	if (!v6)
		return REASON_TRUNCATED;
	__builtin_memcpy(&ends->source, &v6->saddr, sizeof(ip_t));
	__builtin_memcpy(&ends->destination, &v6->daddr, sizeof(ip_t));
	return REASON_NONE;
}

static __always_inline bool has_ports(const struct headers *at)
{
	return at->protocol == IP_PROTOCOL_TCP || at->protocol == IP_PROTOCOL_UDP ||
	       at->protocol == IP_PROTOCOL_SCTP;
}

/* REASON_FRAGMENT where the ports are in another fragment. */
static __always_inline enum reason read_ports(hook_ctx *ctx, const struct headers *at,
					      struct endpoints *ends)
{
	__be16 *ports;

	if (!has_ports(at))
		return REASON_NONE;
	if (at->later_fragment)
		return REASON_FRAGMENT;
	ports = pkt_at(ctx, at->transport, 4);
	if (!ports || at->transport + 4 > at->end)
		return REASON_TRUNCATED;
	ends->source_port = ports[0];
	ends->destination_port = ports[1];
	return REASON_NONE;
}
