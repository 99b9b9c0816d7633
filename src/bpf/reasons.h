/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Why a node left a packet as it was. Each reason is a counter of the node.
 *
 * The names are part of the command line's output: "REASON_NOT_TCP" is printed as "not_tcp".
 * Append only; user space takes names and numbers from BTF.
 */
#pragma once

enum reason {
	REASON_NONE = 0,
	/* The packet is not what the policy works on. */
	REASON_NOT_IP,
	REASON_NOT_TCP,
	REASON_NOT_SYN,
	REASON_FRAGMENT,	/* not the first fragment: no transport header */
	REASON_SYN,		/* the field means something else on a SYN */
	REASON_NO_LINK_HEADER,	/* none, and the action writes one, or the device has them */
	/* The packet is not what it claims to be. */
	REASON_TRUNCATED,	/* a header ends behind the packet, or in its non-linear part */
	REASON_BAD_HEADER,	/* a length field contradicts another */
	REASON_BAD_OPTION,	/* a TCP option shorter than 2 bytes or longer than the header */
	REASON_EXTENSION_HEADERS, /* IPv6: too many, or one without a transport header */
	/* The packet is fine, the policy found nothing to do. */
	REASON_OPTION_ABSENT,
	REASON_OPTION_PRESENT,	/* it is there already */
	REASON_NOT_LOWER,	/* clamp: the value there is not above the limit */
	REASON_NO_ROOM,		/* the TCP header would pass 60 bytes, or the payload would have to move */
	/* The chain or its set gives no answer. */
	REASON_NO_ELEMENT,	/* the packet matched without a set element, or that has no argument */
	REASON_BAD_ARGUMENT,	/* the element's argument is not of the parameter's kind or range */
	REASON_NO_CHAIN,	/* the chain an element names is gone */
	REASON_NO_ROUTE,
	REASON_NO_NEIGHBOUR,
	REASON_NO_DEVICE,	/* the device to redirect to is gone */
	REASON_TTL_EXPIRED,
	/* The kernel did not do its part. */
	REASON_NO_METADATA,	/* device without data_meta: the context went per CPU */
	REASON_TAIL_CALL_MISSED,
	REASON_HELPER_FAILED,	/* nothing was changed */
	REASON_HALF_DONE,	/* failed after a first change: the packet is dropped */
	/* Checksums and window scales, which the packet alone may not tell. */
	REASON_CHECKSUM_UNCLEAR, /* complete or partial, it could be either */
	REASON_CHECKSUM_PARTIAL, /* a device completes it at a place that would move */
	REASON_UNKNOWN_SCALE,	/* the handshake was not seen, or only half of it */
	REASON_AUTHENTICATED,	/* the receiver would find it changed */
	/* An action with a cadence. */
	REASON_NOT_DUE,		/* it was done to the flow often, or lately */
	/* Multipath TCP. */
	REASON_NOT_MPTCP,	/* not a segment of a subflow that both ends take for established */
	REASON_UNSAFE,		/* it would break the connection, and the chain does not insist */
	REASON_NO_KEYS,		/* the handshake with the connection's keys was not seen */
	REASON_NOT_HELD,	/* no option of the subflow is held, or not for long enough */
	REASON_NOT_REPORTED,	/* nothing to report */
	REASON_EVENT_LOST,	/* nobody has read the last ones yet: the ring buffer is full */
	REASON_SET_FULL,
	REASON_OLD_SEGMENT,	/* of MPTCP: its receiver may have it, and would not look at its options */
	REASON_COUNT,
};
