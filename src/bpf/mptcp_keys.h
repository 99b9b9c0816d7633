/* SPDX-License-Identifier: GPL-2.0-only */
/* The keys of MPTCP connections. Who declares this map has learners fill it, and nobody else. */
#pragma once

#include "subflow.h"

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_SUBFLOWS);
	__type(key, __u32); /* token of the host whose view it is, host order */
	__type(value, struct connection_keys);
} pcn_keys SEC(".maps");
