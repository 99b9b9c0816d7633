/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What is remembered of Multipath TCP (RFC 8684), and what is told of it. User space takes these
 * types from BTF.
 */
#pragma once

#include "flow_types.h"

/* The host of one end of a subflow, as far as this device saw it. Numbers in host order. */
struct subflow_end {
	__u64 packets;		/* that it sent */
	__u64 bytes;		/* of payload, repeated ones included */
	__u64 retransmissions;	/* segments that begin before what it had sent already */
	__u64 seen_at;		/* its last packet; nanoseconds of CLOCK_MONOTONIC, as all times here */
	__u64 stamped_at;	/* the segment with the timestamp `stamp`; 0: none is waited for */
	__u64 announced_at;	/* an address, by its host or by a chain; 0: never */
	__u64 rtt_min;		/* from this device to the other end and back, nanoseconds; 0: unknown */
	__u64 rtt_smoothed;	/* RFC 6298, 2: each sample counts for an eighth */
	__u64 rtt_last;
	__u32 stamp;
	__u32 latest;		/* its newest timestamp */
	__u32 sequence_end;	/* behind the last byte it has sent */
	__u32 token;		/* its token of the connection (RFC 8684, 3.1); 0: unknown */
	__u8 counted;		/* sequence_end is known */
	__u8 backup;		/* it asked for the subflow to be used as backup only */
	__u8 address_id;	/* of its address, as it joined with; 0 on the first subflow */
	__u8 data_seen;		/* segments with DSS that it has sent, counted up to 2: with one, the
				   other end takes MPTCP for established */
	__u8 data_counter;	/* which learner counts these, of several that see its packets */
	__u8 stamps;		/* `latest` is known */
	__u8 pad[2];
};

enum subflow_flags {
	SUBFLOW_OFFERED = 1 << 0,	/* its SYN had MP_CAPABLE */
	SUBFLOW_JOIN = 1 << 1,		/* its SYN had MP_JOIN */
	SUBFLOW_ACCEPTED = 1 << 2,	/* and the SYN-ACK answered that */
	SUBFLOW_ESTABLISHED = 1 << 3,	/* and so did the third packet: keys or HMAC were seen */
	SUBFLOW_FIN = 1 << 4,		/* an end has sent FIN */
	SUBFLOW_RESET = 1 << 5,		/* an end has sent RST */
	SUBFLOW_REFUSED = 1 << 6,	/* its SYN offered MPTCP, and the SYN-ACK did not answer that */
};

/* Without any of these it is plain TCP. */
#define SUBFLOW_IS_MPTCP (SUBFLOW_OFFERED | SUBFLOW_JOIN | SUBFLOW_ACCEPTED | SUBFLOW_ESTABLISHED)

/* A TCP connection by itself, or a subflow of an MPTCP connection. Key: struct flow_id. */
struct subflow {
	__u32 flags;		/* enum subflow_flags */
	__u8 initiator;		/* end that sent the SYN: 0 or 1; 2: not seen */
	__u8 local;		/* end on this host's side of the device, as for chains: 0 or 1 */
	__u8 pad[2];
	__u64 opened_at;
	__u32 syn;		/* sequence number of the SYN, host order, if that was seen */
	__u32 pad2;
	struct subflow_end ends[2]; /* as in struct flow_id */
};

/* A connection as one of its hosts sees it. Key: that host's token, __u32 in host order. */
struct connection {
	__u32 peer_token;
};

/* What its hosts prove themselves by. Same key; kept only while a chain needs it. */
struct connection_keys {
	__be64 own;
	__be64 peer;
};

/* Who sent a segment. */
struct sender {
	struct flow_id flow;
	__u32 end;
};

#define SAVED_ACK_MAX 256 /* bytes of headers; longer ones are not saved */

/*
 * The headers of the last segment of an end, without SYN, FIN and RST: what an acknowledgement
 * can be made of.
 */
struct saved_ack {
	__u32 length;		/* bytes, from the link header on */
	__u32 ip;		/* offset of the IP header */
	__u32 transport;	/* offset of the TCP header */
	__u32 sequence_end;	/* behind its payload, host order */
	__u8 version;		/* of IP */
	__u8 ingress;		/* the packet came in */
	__u8 pad[2];
	__u8 headers[SAVED_ACK_MAX];
};

#define HELD_SLOTS 4	/* addresses an end can have held at a time, by the low bits of their ids */
#define HELD_MAX 30	/* bytes of an ADD_ADDR: IPv6, with a port */

#define HELD_GIVEN_MAX 4 /* as often as Linux announces an address that nobody echoes */

struct held_option {
	__u64 since;	/* it was first taken out, or last given */
	__u8 option[32]; /* zeros behind its end */
	__u8 length;	/* bytes; 0: none */
	__u8 given;	/* so often, without an echo since */
	__u8 pad[6];
};

struct held_options {
	struct held_option ends[2][HELD_SLOTS];
};

/* One segment that is reported. User space makes events of it. */
struct report {
	__u64 at;		/* nanoseconds of CLOCK_MONOTONIC */
	ip_t source;
	ip_t destination;
	port_t source_port;
	port_t destination_port;
	__u32 ifindex;
	__u32 chain;		/* id */
	__u32 sequence;		/* host order, as the next */
	__u32 acknowledgment;
	__u32 payload;		/* bytes */
	__u32 source_token;	/* of the source's host; 0: unknown */
	__u32 destination_token;
	__u16 tcp_flags;	/* enum tcp_flag */
	__u8 ingress;		/* the packet came in */
	__u8 options_length;
	__u8 options[64];	/* all TCP options, as they stand; so long for the verifier's sake */
	__u32 pad;
};
