/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The vocabulary of parameters and keys: how JSON becomes bytes.
 *
 * User space knows a member by the name of its type, so a new policy needs no Rust. Besides
 * these: __u8 to __u64 (host order), __be16 to __be64 (network order), bool, `enum x`.
 * An enum that fills one byte is declared packed.
 * `T x[N]` with an integer `x_len` behind it is a list of up to N.
 */
#pragma once

#include "vmlinux.h"

#define __tag(text) __attribute__((btf_decl_tag(text)))
/* What the member means, with its unit. Every member needs one. */
#define __doc(text) __tag("doc:" text)
#define __required __tag("required")
/* Value when the chain file gives none, written as in the chain file. Otherwise zero. */
#define __default(text) __tag("default:" text)
/* Smallest and largest value. An enum with a range takes numbers too. */
#define __range(low, high) __tag("range:" #low ".." #high)
/* Smallest and largest value where the bool member `when` is true. */
#define __limit(when, low, high) __tag("limit:" when ":" #low ".." #high)
/* A value that only these hooks have ("xdp,tc-egress"), and why. */
#define __only(value, hooks, why) __tag("only:" value ":" hooks ":" why)
/* A bool: where it is true, the policy needs nothing that learners know of connections. */
#define __stateless __tag("stateless")
/* The one value with which the policy needs what is kept of connections. */
#define __stateful(value) __tag("stateful:" value)
/* A value that is refused unless the bool `by` is true, and what it would do. */
#define __guard(value, by, why) __tag("guard:" value ":" by ":" why)
/* The OR of enumerators, given as a list. */
#define __flags __tag("flags")

/* An address; IPv4 as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2). All zero: none given. */
typedef struct {
	union {
		__u8 addr[16];
		__be32 words[4];
	};
} ip_t;

/* A network, laid out as the key of an LPM trie; `length` counts in the 128-bit form. */
typedef struct {
	__u32 length;
	union {
		__u8 addr[16];
		__be32 words[4];
	};
} prefix_t;

typedef struct {
	__u8 addr[6];
} mac_t;

typedef __u32 device_t;	 /* interface index; JSON: a device's name */
typedef __u32 chain_t;	 /* chain id; JSON: a chain's name */
typedef __u32 token_t;	 /* of an MPTCP connection, host order; JSON: hex digits */
typedef __be16 port_t;	 /* JSON: a number, or a name of the services database */
typedef __u64 duration_t; /* nanoseconds; JSON: "200ms", "5s" */
typedef __u8 bytes_t;	 /* bytes_t x[N]: JSON a string of hex digits */

/* Ports, host order, both ends included; JSON: 80, "1000-2000", "https". All zero: none. */
typedef struct {
	__u16 first;
	__u16 last;
} port_range_t;
