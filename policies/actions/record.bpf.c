/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "subflow.h"

#define TIMESTAMPS_LENGTH 10
/* What was not answered by then is waited for no more. */
#define STAMP_LIFETIME 10000000000ULL

/* Timestamps of a segment (RFC 7323, 3), host order. */
struct stamps {
	__u32 value;
	__u32 echo;
};

static __always_inline bool stamps_read(hook_ctx *ctx, const struct segment *segment,
					struct stamps *stamps)
{
	__u64 marked = tcp_options_marked(ctx, segment, OPTION_KIND_TIMESTAMPS, MPTCP_SUBTYPE_ANY);
	__u32 offset = marked ? tcp_option_offset(marked, TIMESTAMPS_LENGTH) : 0;
	__u8 *option = pkt_at(ctx, segment->at.transport + offset, TIMESTAMPS_LENGTH);

	if (!offset || !option)
		return false;
	__builtin_memcpy(&stamps->value, option + 2, 4);
	__builtin_memcpy(&stamps->echo, option + 6, 4);
	stamps->value = bpf_ntohl(stamps->value);
	stamps->echo = bpf_ntohl(stamps->echo);
	return true;
}

static __always_inline void rtt_sample(struct subflow_end *end, __u64 rtt)
{
	end->rtt_last = rtt;
	if (!end->rtt_min || rtt < end->rtt_min)
		end->rtt_min = rtt;
	end->rtt_smoothed = end->rtt_smoothed ? end->rtt_smoothed - end->rtt_smoothed / 8 + rtt / 8 :
						rtt;
}

/*
 * Passive round-trip times: a segment that has to be acknowledged is waited for by its timestamp,
 * one at a time, and the first echo of it is the answer. Only the first segment with a timestamp
 * will do: clocks tick slowly, and the echo may be of any that has it. So one that is not newer than
 * all before is of no use, nor is the first that was seen, unless it is the SYN.
 */
static __always_inline void rtt_follow(struct subflow_end *own, struct subflow_end *peer,
				       const struct stamps *stamps, bool to_acknowledge, __u32 flags,
				       __u64 now)
{
	bool newer = own->stamps ? (__s32)(stamps->value - own->latest) > 0 :
				   !!(flags & TCP_FLAG_SYN);

	if (flags & TCP_FLAG_ACK && peer->stamped_at) {
		__s32 past = stamps->echo - peer->stamp;

		if (!past)
			rtt_sample(peer, now - peer->stamped_at);
		if (past >= 0)
			peer->stamped_at = 0;
	}
	if (to_acknowledge && newer &&
	    now - own->stamped_at > (own->stamped_at ? STAMP_LIFETIME : 0)) {
		own->stamp = stamps->value;
		own->stamped_at = now;
	}
	if (newer || !own->stamps)
		own->latest = stamps->value;
	own->stamps = true;
}

static __always_inline void count_segment(hook_ctx *ctx, struct subflow_end *own,
					  const struct segment *segment, __u32 sequence)
{
	__u32 payload = segment->at.end - segment->at.transport - segment->header;
	__u32 taken = payload + !!(segment->flags & TCP_FLAG_SYN) +
		      !!(segment->flags & TCP_FLAG_FIN);
	__u32 end = sequence + taken;

	own->packets += pkt_segments(ctx);
	own->bytes += payload;
	if (own->counted && taken && (__s32)(sequence - own->sequence_end) < 0)
		own->retransmissions++;
	if (!own->counted || (__s32)(end - own->sequence_end) > 0)
		own->sequence_end = end;
	own->counted = true;
}

ACTION(record,
       "keep count of each TCP connection or subflow, for `policy-chain connections`: packets, "
       "bytes, retransmissions, and on both directions of a device the round-trip time")
{
	struct mptcp_segment mptcp = {};
	enum reason reason = mptcp_parse(ctx, &mptcp);
	__u64 now = bpf_ktime_get_ns();
	struct subflow_end *own, *peer;
	struct stamps stamps;
	struct tcphdr *tcp;
	__u32 sequence;
	bool takes, opens;

	if (reason && reason != REASON_NOT_MPTCP)
		return SKIP(reason);
	tcp = pkt_at(ctx, mptcp.segment.at.transport, sizeof(*tcp));
	if (!tcp)
		return SKIP(REASON_TRUNCATED);
	sequence = bpf_ntohl(tcp->seq);
	if (!mptcp.subflow) {
		opens = (mptcp.segment.flags & (TCP_FLAG_SYN | TCP_FLAG_ACK)) == TCP_FLAG_SYN;
		mptcp.subflow = subflow_begin(&mptcp.from.flow, mptcp.from.end,
					      opens ? mptcp.from.end : INITIATOR_UNKNOWN, sequence);
		if (!mptcp.subflow)
			return SKIP(REASON_HELPER_FAILED);
	}
	own = subflow_end(mptcp.subflow, mptcp.from.end);
	peer = subflow_end(mptcp.subflow, !mptcp.from.end);
	own->seen_at = now;
	/* Of those it knew, the learner has taken note. */
	if (mptcp.segment.flags & TCP_FLAG_FIN)
		mptcp.subflow->flags |= SUBFLOW_FIN;
	if (mptcp.segment.flags & TCP_FLAG_RST)
		mptcp.subflow->flags |= SUBFLOW_RESET;
	takes = !segment_is_bare(&mptcp.segment) ||
		mptcp.segment.flags & (TCP_FLAG_SYN | TCP_FLAG_FIN);
	count_segment(ctx, own, &mptcp.segment, sequence);
	if (stamps_read(ctx, &mptcp.segment, &stamps))
		rtt_follow(own, peer, &stamps, takes, mptcp.segment.flags, now);
	return DONE;
}
