/* SPDX-License-Identifier: GPL-2.0-only */
/* The flags of a TCP header (RFC 9293, 3.1). */
#pragma once

/* Bits of the 13th and 14th byte, as one 16-bit word in host order. */
enum tcp_flag {
	TCP_FLAG_FIN = 1 << 0,
	TCP_FLAG_SYN = 1 << 1,
	TCP_FLAG_RST = 1 << 2,
	TCP_FLAG_PSH = 1 << 3,
	TCP_FLAG_ACK = 1 << 4,
	TCP_FLAG_URG = 1 << 5,
	TCP_FLAG_ECE = 1 << 6,
	TCP_FLAG_CWR = 1 << 7,
	TCP_FLAG_AE = 1 << 8,	/* accurate ECN, formerly NS */
};

#define TCP_FLAGS 0x1ff /* all of them */
