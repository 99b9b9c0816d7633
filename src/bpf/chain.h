/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What nodes of a chain and the controller agree on. User space takes every type of this
 * header from BTF, so it stands nowhere else.
 */
#pragma once

#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include "reasons.h"

/* bool has no literals in BTF */
enum {
	false = 0,
	true = 1,
};

/* Where a node goes on: the index of a node, or one of these. */
enum successor {
	SUCCESSOR_VERDICT = 1u << 31,	/* set in every verdict */
	SUCCESSOR_PASS = SUCCESSOR_VERDICT,
	SUCCESSOR_DROP,
};

/* Where the context of a packet lives while it is in a graph. */
enum carrier {
	CARRIER_NONE,		/* no node of the graph reads one */
	CARRIER_PACKET,		/* XDP: data_meta, per CPU where the device has none; TC: skb->cb[] */
	CARRIER_PERCPU,
};

enum node_flags {
	NODE_NEGATE = 1 << 0,		/* selector: "not" */
	NODE_INGRESS = 1 << 1,		/* the packet's destination is the local end */
	NODE_NO_LINK = 1 << 2,		/* the device has no link header: IP starts at byte 0 */
	NODE_SET = 1 << 3,		/* keyed selector: look the key up in `set` */
	NODE_STORE_ARGUMENT = 1 << 4,	/* on match: the element's argument goes to the context */
	NODE_CLEAR_ARGUMENT = 1 << 5,	/* on match: forget the argument an earlier alternative left */
	NODE_ARGUMENT_IS_CHAIN = 1 << 6, /* action: the argument must be the id of a chain */
};

/* How far the checksum of a packet's TCP or UDP header is done. */
enum checksum {
	CHECKSUM_AUTO,		/* not told: the hook finds out, per packet */
	CHECKSUM_COMPLETE,	/* the field holds the checksum */
	CHECKSUM_PARTIAL,	/* the folded pseudo-header sum; a device or a later hop adds the rest */
	CHECKSUM_UNCLEAR,	/* it could be either */
};

/*
 * The constants of one node, in its frozen .rodata: the verifier knows them, so a jump to a
 * successor is direct and what they exclude is deleted.
 */
struct node_config {
	__u32 slot;		/* index into pc_counters */
	__u32 next;		/* successor of a selector that matched, an action that was done */
	__u32 otherwise;	/* successor of a selector that missed, an action that gave up */
	__u32 chain;		/* id of the chain */
	__u32 flags;		/* enum node_flags */
	__u32 carrier;		/* enum carrier */
	__u32 checksum;		/* enum checksum: of every packet, if the chain file says so */
	__u32 argument_at;	/* action: 1 + offset of the parameter the argument replaces; 0: none */
	__u32 argument_swap;	/* bytes of that parameter if in network order, else 0 */
	__u32 cadence_first;	/* action: packets of a flow it is done to; 0: not limited so */
	__u64 cadence_every;	/* action: nanoseconds between two of a flow it is done to; 0: none */
	__u32 cadence_id;	/* action: which it is among those with one of the two */
	__u32 pad;
	__u64 argument_min;
	__u64 argument_max;
};

/* The context of a packet. All in u32, as skb->cb[] is. */
struct chain_ctx {
	__u32 argument_low;	/* argument of the set element that matched, host order */
	__u32 argument_high;
	__u32 flags;		/* enum chain_ctx_flags */
	__u32 chain;		/* id of the chain whose selector stored the argument */
	__u32 checksum;		/* TC: enum checksum, as the kernel has it; _AUTO where it does not tell */
};

enum chain_ctx_flags {
	CHAIN_CTX_ARGUMENT = 1 << 0,	/* the argument is valid */
	CHAIN_CTX_CHAIN = 1 << 1,	/* and is the id of a chain */
};

/* What one CPU saw at one node. */
struct node_stats {
	__u64 seen;		/* packets that reached the node */
	__u64 packets;		/* selector: those that matched; action: all of them */
	__u64 bytes;		/* length of `packets` on arrival, from the link header on */
	__u64 reasons[REASON_COUNT];
};

/* The value of every set. */
struct element {
	__u64 argument;
	__u32 flags;		/* enum element_flags */
	__u32 expires;		/* second of CLOCK_MONOTONIC at which it counts no more; 0: never */
};

enum element_flags {
	ELEMENT_ARGUMENT = 1 << 0,	/* the argument is given */
	ELEMENT_CHAIN = 1 << 1,		/* and is the id of a chain */
};

/*
 * The one way from a node to another: a tail call to a constant index, which the JIT turns
 * into a direct jump. It is inline asm because clang merges two bpf_tail_call() sites into
 * one with a computed index, an indirect jump. `site` keeps two asm blocks different, so
 * that they are not merged either. Falls through if the slot is empty or 33 are used up.
 */
#define JUMP(site, ctx, map, index)                                                        \
	asm volatile("# " site "\n"                                                        \
		     "r1 = %[context]\n"                                                   \
		     "r2 = %[array]\n"                                                     \
		     "r3 = %[slot]\n"                                                      \
		     "call 12\n"                                                           \
		     :                                                                     \
		     : [context] "r"(ctx), [array] "r"(map), [slot] "r"((__u64)(index))    \
		     : "r0", "r1", "r2", "r3", "r4", "r5", "memory")
