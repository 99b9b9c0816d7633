/* SPDX-License-Identifier: GPL-2.0-only */
/* How learners fill what subflow.h, mptcp_keys.h and mptcp_acks.h declare. */
#pragma once

#include "subflow.h"
#include "mptcp_keys.h"
#include "mptcp_acks.h"

/* Both hosts' tokens, from the third packet of a handshake (RFC 8684, 3.1), which has both keys. */
static __always_inline void subflow_learn_keys(hook_ctx *ctx, struct mptcp_segment *mptcp,
					       bool keep_keys)
{
	struct connection_keys keys, back;
	struct connection connection;
	__u32 own, peer;
	__u8 *capable = mptcp_option(ctx, &mptcp->segment, mptcp->index,
				     MPTCP_SUBTYPE_MP_CAPABLE, MP_CAPABLE_WITH_KEYS);

	if (!capable || (capable[2] & 15) != MPTCP_VERSION_1 ||
	    subflow_end(mptcp->subflow, mptcp->sender)->token)
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
		back.own = keys.peer;
		back.peer = keys.own;
		bpf_map_update_elem(&pcn_keys, &own, &keys, 0);
		bpf_map_update_elem(&pcn_keys, &peer, &back, 0);
	}
	subflow_end(mptcp->subflow, mptcp->sender)->token = own;
	subflow_end(mptcp->subflow, !mptcp->sender)->token = peer;
	mptcp->subflow->flags |= SUBFLOW_ESTABLISHED;
}

/* A SYN begins a subflow, or a TCP connection that is none; one sent again says nothing new. */
static __always_inline void subflow_learn_syn(hook_ctx *ctx, struct mptcp_segment *mptcp)
{
	const __u32 fresh = SUBFLOW_OFFERED | SUBFLOW_JOIN;
	struct subflow *known = mptcp->subflow;
	struct connection *connection;
	struct subflow_end *own;
	__u8 *join;
	__u32 token;

	if (known && known->flags && !(known->flags & ~fresh) &&
	    known->initiator == mptcp->sender)
		return;
	join = mptcp_option(ctx, &mptcp->segment, mptcp->index, MPTCP_SUBTYPE_MP_JOIN,
			    MP_JOIN_SYN);
	if (!join && !mptcp_has(mptcp->index, MPTCP_SUBTYPE_MP_CAPABLE)) {
		if (known)
			bpf_map_delete_elem(&pcd_subflows, &mptcp->flow);
		return;
	}
	known = subflow_begin(&mptcp->flow, mptcp->sender, mptcp->sender);
	if (!known)
		return;
	own = subflow_end(known, mptcp->sender);
	own->seen_at = known->opened_at;
	if (!join) {
		known->flags = SUBFLOW_OFFERED;
		return;
	}
	own->backup = join[2] & MP_BACKUP;
	own->address_id = join[3];
	__builtin_memcpy(&token, join + 4, sizeof(token));
	token = bpf_ntohl(token);
	subflow_end(known, !mptcp->sender)->token = token;
	connection = bpf_map_lookup_elem(&pcn_connections, &token);
	if (connection)
		own->token = connection->peer_token;
	known->flags = SUBFLOW_JOIN;
}

static __always_inline void subflow_learn_syn_ack(hook_ctx *ctx, struct mptcp_segment *mptcp)
{
	struct subflow_end *own = subflow_end(mptcp->subflow, mptcp->sender);
	__u8 *join = mptcp_option(ctx, &mptcp->segment, mptcp->index, MPTCP_SUBTYPE_MP_JOIN,
				  MP_JOIN_SYN_ACK);

	if (join) {
		own->backup = join[2] & MP_BACKUP;
		own->address_id = join[3];
	}
	if (join || mptcp_has(mptcp->index, MPTCP_SUBTYPE_MP_CAPABLE))
		mptcp->subflow->flags |= SUBFLOW_ACCEPTED;
}

/* A subflow whose handshake was not seen shows itself by the options on its data. */
static __always_inline struct subflow *subflow_learn_late(const struct mptcp_segment *mptcp)
{
	struct subflow *subflow = mptcp->subflow;

	if (!subflow)
		subflow = subflow_begin(&mptcp->flow, mptcp->sender, INITIATOR_UNKNOWN);
	if (subflow)
		subflow->flags = SUBFLOW_ACCEPTED | SUBFLOW_ESTABLISHED;
	return subflow;
}

static __always_inline void subflow_learn(hook_ctx *ctx, bool keep_keys, bool keep_acks)
{
	struct mptcp_segment mptcp = {};
	enum reason reason = mptcp_parse(ctx, &mptcp);
	struct subflow_end *own;
	__u8 *option;

	if (reason && reason != REASON_NOT_MPTCP)
		return;
	if ((mptcp.segment.flags & (TCP_FLAG_SYN | TCP_FLAG_ACK)) == TCP_FLAG_SYN)
		return subflow_learn_syn(ctx, &mptcp);
	if (reason && mptcp_has(mptcp.index, MPTCP_SUBTYPE_DSS))
		mptcp.subflow = subflow_learn_late(&mptcp);
	else if (reason)
		return;
	if (!mptcp.subflow)
		return;
	own = subflow_end(mptcp.subflow, mptcp.sender);
	own->seen_at = bpf_ktime_get_ns();
	if (mptcp.segment.flags & TCP_FLAG_SYN)
		return subflow_learn_syn_ack(ctx, &mptcp);
	if (mptcp_has(mptcp.index, MPTCP_SUBTYPE_MP_CAPABLE))
		subflow_learn_keys(ctx, &mptcp, keep_keys);
	if (mptcp_option(ctx, &mptcp.segment, mptcp.index, MPTCP_SUBTYPE_MP_JOIN, MP_JOIN_ACK))
		mptcp.subflow->flags |= SUBFLOW_ESTABLISHED;
	if (own->data_seen < 2 && mptcp_has(mptcp.index, MPTCP_SUBTYPE_DSS))
		own->data_seen++;
	option = mptcp_option(ctx, &mptcp.segment, mptcp.index, MPTCP_SUBTYPE_ADD_ADDR, 3);
	if (option && !(option[2] & ADD_ADDR_ECHO))
		own->announced_at = own->seen_at;
	option = mptcp_option(ctx, &mptcp.segment, mptcp.index, MPTCP_SUBTYPE_MP_PRIO,
			      MP_PRIO_LENGTH);
	if (option)
		own->backup = option[2] & MP_BACKUP;
	if (mptcp.segment.flags & TCP_FLAG_FIN)
		mptcp.subflow->flags |= SUBFLOW_FIN;
	if (mptcp.segment.flags & TCP_FLAG_RST)
		mptcp.subflow->flags |= SUBFLOW_RESET;
	if (keep_acks)
		ack_save(ctx, &mptcp);
}
