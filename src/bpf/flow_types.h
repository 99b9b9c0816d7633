/* SPDX-License-Identifier: GPL-2.0-only */
/* Keys and values of the map of connections, whose size user space takes from BTF. */
#pragma once

#include "types.h"

/* A connection, whichever end sent a packet: end 0 is the one that sorts first. */
struct flow_id {
	ip_t address[2];
	port_t port[2];
};

/* One end, as its SYN or SYN-ACK describes it. */
struct flow_end {
	__u8 seen;
	__u8 scales;	/* it had a window scale option */
	__u8 scale;	/* bits; at most 14 */
	__u8 pad;
};

struct flow_state {
	__be32 syn;	/* sequence number of the SYN */
	__u8 syn_seen;
	__u8 initiator;	/* the end that opened the connection */
	__u8 pad[2];
	struct flow_end ends[2];
};
