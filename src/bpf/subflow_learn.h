/* SPDX-License-Identifier: GPL-2.0-only */
/* How learners fill what subflow.h, mptcp_keys.h and mptcp_acks.h declare, and heed held.h. */
#pragma once

#include "subflow.h"
#include "mptcp_keys.h"
#include "mptcp_acks.h"
#include "held.h"

/* Both hosts' tokens, from the third packet of a handshake (RFC 8684, 3.1), which has both keys. */
static __always_inline void subflow_learn_keys(hook_ctx *ctx, struct mptcp_segment *mptcp,
					       bool keep_keys)
{
	struct connection_keys keys; /* turned round in place: the stack is tight */
	struct connection connection;
	__be64 first;
	__u32 own, peer;
	__u8 *capable = mptcp_option(ctx, &mptcp->segment, mptcp->index,
				     MPTCP_SUBTYPE_MP_CAPABLE, MP_CAPABLE_WITH_KEYS);

	if (!capable || (capable[2] & 15) != MPTCP_VERSION_1 ||
	    subflow_end(mptcp->subflow, mptcp->from.end)->token)
		return;
	__builtin_memcpy(&keys.own, capable + 4, sizeof(keys.own));
	__builtin_memcpy(&keys.peer, capable + 12, sizeof(keys.peer));
	own = mptcp_token(keys.own);
	peer = mptcp_token(keys.peer);
	if (!own || !peer)
		return;
	connection.peer_token = peer;
	bpf_map_update_elem(&pcn_connections, &own, &connection, 0);
	connection.peer_token = own;
	bpf_map_update_elem(&pcn_connections, &peer, &connection, 0);
	if (keep_keys) {
		bpf_map_update_elem(&pcn_keys, &own, &keys, 0);
		first = keys.own;
		keys.own = keys.peer;
		keys.peer = first;
		bpf_map_update_elem(&pcn_keys, &peer, &keys, 0);
	}
	subflow_end(mptcp->subflow, mptcp->from.end)->token = own;
	subflow_end(mptcp->subflow, !mptcp->from.end)->token = peer;
	mptcp->subflow->flags |= SUBFLOW_ESTABLISHED;
}

/* A SYN begins a subflow, or a TCP connection that is none; one sent again says nothing new. */
static __always_inline void subflow_learn_syn(hook_ctx *ctx, struct mptcp_segment *mptcp,
					      bool keep_acks)
{
	const __u32 offered = SUBFLOW_OFFERED | SUBFLOW_JOIN | SUBFLOW_REFUSED;
	struct subflow *known = mptcp->subflow;
	struct tcphdr *tcp = pkt_at(ctx, mptcp->segment.at.transport, sizeof(*tcp));
	struct connection *connection;
	struct subflow_end *own;
	bool offers, again;
	__u32 token, syn;
	__u8 *join;

	if (!tcp)
		return;
	syn = bpf_ntohl(tcp->seq);
	join = mptcp_option(ctx, &mptcp->segment, mptcp->index, MPTCP_SUBTYPE_MP_JOIN,
			    MP_JOIN_SYN);
	offers = join || mptcp_has(mptcp->index, MPTCP_SUBTYPE_MP_CAPABLE);
	again = known && known->initiator == mptcp->from.end && known->syn == syn;
	/* a host that nobody answers asks again without MPTCP */
	if (again && known->flags & offered)
		return;
	if (again && !offers && !(known->flags & SUBFLOW_IS_MPTCP))
		return;
	if (keep_acks)
		acks_forget(mptcp);
	if (!offers) {
		if (known)
			bpf_map_delete_elem(&pcd_subflows, &mptcp->from.flow);
		return;
	}
	known = subflow_begin(&mptcp->from.flow, mptcp->from.end, mptcp->from.end, syn);
	if (!known)
		return;
	own = subflow_end(known, mptcp->from.end);
	own->seen_at = known->opened_at;
	if (!join) {
		known->flags = SUBFLOW_OFFERED;
		return;
	}
	own->backup = join[2] & MP_BACKUP;
	own->address_id = join[3];
	__builtin_memcpy(&token, join + 4, sizeof(token));
	token = bpf_ntohl(token);
	subflow_end(known, !mptcp->from.end)->token = token;
	connection = bpf_map_lookup_elem(&pcn_connections, &token);
	if (connection)
		own->token = connection->peer_token;
	known->flags = SUBFLOW_JOIN;
}

/*
 * What the answer says. Without MPTCP the connection is plain TCP from here on, unless both ends
 * have shown MPTCP already: then it was sent again.
 */
static __always_inline void subflow_learn_syn_ack(hook_ctx *ctx, struct mptcp_segment *mptcp)
{
	struct subflow_end *own = subflow_end(mptcp->subflow, mptcp->from.end);
	__u8 *join = mptcp_option(ctx, &mptcp->segment, mptcp->index, MPTCP_SUBTYPE_MP_JOIN,
				  MP_JOIN_SYN_ACK);

	if (join) {
		own->backup = join[2] & MP_BACKUP;
		own->address_id = join[3];
	}
	if (join || mptcp_has(mptcp->index, MPTCP_SUBTYPE_MP_CAPABLE))
		mptcp->subflow->flags |= SUBFLOW_ACCEPTED;
	else if (!subflow_is_agreed(mptcp->subflow))
		mptcp->subflow->flags = (mptcp->subflow->flags & ~SUBFLOW_IS_MPTCP) |
					SUBFLOW_REFUSED;
}

/* A subflow whose handshake was not seen shows itself by the options on its data. */
static __always_inline struct subflow *subflow_learn_late(struct mptcp_segment *mptcp,
							  bool keep_acks)
{
	struct subflow *subflow = mptcp->subflow;

	if (!subflow) {
		if (keep_acks)
			acks_forget(mptcp);
		subflow = subflow_begin(&mptcp->from.flow, mptcp->from.end, INITIATOR_UNKNOWN, 0);
	}
	if (subflow)
		subflow->flags = SUBFLOW_ACCEPTED | SUBFLOW_ESTABLISHED;
	return subflow;
}

/*
 * Counts a segment with DSS. Where a device has learners at XDP and at TC ingress, both see it: the
 * one that saw the end's first counts.
 */
static __always_inline void subflow_count_data(struct subflow_end *own)
{
#if defined(HOOK_XDP)
	const __u8 learner = 1;
#else
	const __u8 learner = node.flags & NODE_INGRESS ? 2 : 3;
#endif

	if (!own->data_seen)
		own->data_counter = learner;
	if (own->data_seen < 2 && own->data_counter == learner)
		own->data_seen++;
}

static __always_inline void subflow_learn(hook_ctx *ctx, bool keep_keys, bool keep_acks, bool held)
{
	struct mptcp_segment mptcp = {};
	enum reason reason = mptcp_parse(ctx, &mptcp);
	struct subflow_end *own;
	__u8 *option;

	if (reason && reason != REASON_NOT_MPTCP)
		return;
	if ((mptcp.segment.flags & (TCP_FLAG_SYN | TCP_FLAG_ACK)) == TCP_FLAG_SYN)
		return subflow_learn_syn(ctx, &mptcp, keep_acks);
	if (reason && mptcp_has(mptcp.index, MPTCP_SUBTYPE_DSS)) {
		mptcp.subflow = subflow_learn_late(&mptcp, keep_acks);
		reason = REASON_NONE;
	}
	if (!mptcp.subflow)
		return;
	own = subflow_end(mptcp.subflow, mptcp.from.end);
	own->seen_at = bpf_ktime_get_ns();
	if (mptcp.segment.flags & TCP_FLAG_FIN)
		mptcp.subflow->flags |= SUBFLOW_FIN;
	if (mptcp.segment.flags & TCP_FLAG_RST)
		mptcp.subflow->flags |= SUBFLOW_RESET;
	if (reason)
		return;
	if (mptcp.segment.flags & TCP_FLAG_SYN)
		return subflow_learn_syn_ack(ctx, &mptcp);
	if (mptcp_has(mptcp.index, MPTCP_SUBTYPE_MP_CAPABLE))
		subflow_learn_keys(ctx, &mptcp, keep_keys);
	if (mptcp_option(ctx, &mptcp.segment, mptcp.index, MPTCP_SUBTYPE_MP_JOIN, MP_JOIN_ACK))
		mptcp.subflow->flags |= SUBFLOW_ESTABLISHED;
	if (mptcp_has(mptcp.index, MPTCP_SUBTYPE_DSS))
		subflow_count_data(own);
	option = mptcp_option(ctx, &mptcp.segment, mptcp.index, MPTCP_SUBTYPE_ADD_ADDR, 3);
	if (option && !(option[2] & ADD_ADDR_ECHO))
		own->announced_at = own->seen_at;
	if (held)
		held_learn(ctx, &mptcp);
	option = mptcp_option(ctx, &mptcp.segment, mptcp.index, MPTCP_SUBTYPE_MP_PRIO,
			      MP_PRIO_LENGTH);
	if (option)
		own->backup = option[2] & MP_BACKUP;
	if (keep_acks)
		ack_save(ctx, &mptcp);
}
