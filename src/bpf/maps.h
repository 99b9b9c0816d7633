/* SPDX-License-Identifier: GPL-2.0-only */
/* The maps a generation shares. The loader sets their sizes; their names start with pc_. */
#pragma once

#include "chain.h"

/* The nodes of the generation, by index. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} pc_nodes SEC(".maps");

/* The first node of each sub-chain, by chain id. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} pc_chains SEC(".maps");

/* Counters of the nodes, by slot. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct node_stats);
} pc_counters SEC(".maps");

/* The context where a packet cannot carry it. A packet stays on its CPU while in a graph. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct chain_ctx);
} pc_context SEC(".maps");

/* What is known only once the entry program is attached. */
struct attachment {
	__u32 generic;	/* generic XDP: a packet is an skb, and stays one when it is redirected */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct attachment);
} pc_attachment SEC(".maps");
