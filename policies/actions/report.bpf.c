/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "subflow.h"

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} pcn_events SEC(".maps");

/* The subtypes that are reported whenever they are seen, as parts of an index. */
#define INDEX_OF(subtype) ((__u64)MPTCP_INDEX_MASK << (subtype) * MPTCP_INDEX_BITS)
#define INDEX_REPORTED                                                                     \
	(((1ULL << MPTCP_SUBTYPES * MPTCP_INDEX_BITS) - 1) & ~INDEX_OF(MPTCP_SUBTYPE_DSS))

/* Whether a mapping is the infinite one, by which an end falls back to TCP (RFC 8684, 3.7). */
static __always_inline bool dss_is_infinite(hook_ctx *ctx, const struct mptcp_segment *mptcp,
					    const __u8 *dss)
{
	__u32 at = DSS_BASE + 4; /* data sequence number; behind it 4 of the subflow's */
	__u16 *length;

	if (!(dss[3] & DSS_FLAG_MAPPING))
		return false;
	if (dss[3] & DSS_FLAG_ACK)
		at += dss[3] & DSS_FLAG_ACK_64 ? 8 : 4;
	if (dss[3] & DSS_FLAG_SEQUENCE_64)
		at += 4;
	at += 4;
	if (at + 2 > dss[1])
		return false;
	at += mptcp->segment.at.transport + sizeof(struct tcphdr) - 1 +
	      mptcp_at(mptcp->index, MPTCP_SUBTYPE_DSS);
	length = pkt_at(ctx, at, sizeof(*length));
	return length && !*length;
}

static __always_inline bool is_worth(hook_ctx *ctx, const struct mptcp_segment *mptcp)
{
	__u8 *dss;

	if (mptcp->index & INDEX_REPORTED)
		return true;
	/* of one that became plain TCP, too: who was told of its SYN is told of its end */
	if (mptcp->subflow && mptcp->subflow->flags & (SUBFLOW_IS_MPTCP | SUBFLOW_REFUSED) &&
	    mptcp->segment.flags & (TCP_FLAG_SYN | TCP_FLAG_FIN | TCP_FLAG_RST))
		return true;
	dss = mptcp_option(ctx, &mptcp->segment, mptcp->index, MPTCP_SUBTYPE_DSS, DSS_BASE);
	return dss && (dss[3] & DSS_FLAG_FIN || dss_is_infinite(ctx, mptcp, dss));
}

/*
 * Keys of the connection are no matter of who follows events: what is told has zeros there. Where
 * they cannot be found, since the list is malformed or has several such options, it is all zeros.
 */
static __always_inline void blank_keys(hook_ctx *ctx, const struct mptcp_segment *mptcp,
				       struct report *report, enum mptcp_subtype subtype)
{
	const __u32 key = 8, with_key = 4 + key;
	__u64 marked = tcp_options_marked(ctx, &mptcp->segment, OPTION_KIND_MPTCP, subtype);
	__u32 behind = mptcp_at(mptcp->index, subtype);
	__u32 length = report->options[bounded(behind, sizeof(report->options) - 1)];
	__u8 *option;

	if (!marked)
		return;
	if (marked & OPTIONS_MALFORMED ||
	    marked != ((1ULL << (length & 63)) - 1) << ((behind - 1) & 63)) {
		__builtin_memset(report->options, 0, sizeof(report->options));
		return;
	}
	if (behind - 1 + with_key > TCP_MAX_OPTIONS)
		return;
	option = report->options + bounded(behind - 1, 31);
	if (option[1] >= with_key)
		__builtin_memset(option + 4, 0, key);
	if (option[1] >= with_key + key)
		__builtin_memset(option + with_key, 0, key);
}

static __always_inline enum reason report_fill(hook_ctx *ctx, const struct mptcp_segment *mptcp,
					       struct report *report)
{
	const struct segment *segment = &mptcp->segment;
	__u32 length = segment->header - sizeof(struct tcphdr);
	struct tcphdr *tcp = pkt_at(ctx, segment->at.transport, sizeof(*tcp));

	if (!tcp || length > TCP_MAX_OPTIONS)
		return REASON_TRUNCATED;
	report->at = bpf_ktime_get_ns();
	report->source = mptcp->from.flow.address[mptcp->from.end & 1];
	report->destination = mptcp->from.flow.address[!mptcp->from.end];
	report->source_port = tcp->source;
	report->destination_port = tcp->dest;
	report->ifindex = pkt_ifindex(ctx);
	report->chain = node.chain;
	report->sequence = bpf_ntohl(tcp->seq);
	report->acknowledgment = bpf_ntohl(tcp->ack_seq);
	report->payload = segment->at.end - segment->at.transport - segment->header;
	report->source_token = 0;
	report->destination_token = 0;
	if (mptcp->subflow) {
		report->source_token = subflow_end(mptcp->subflow, mptcp->from.end)->token;
		report->destination_token = subflow_end(mptcp->subflow, !mptcp->from.end)->token;
	}
	report->tcp_flags = segment->flags;
	report->ingress = !!(node.flags & NODE_INGRESS);
	report->options_length = length;
	report->pad = 0;
	__builtin_memset(report->options, 0, sizeof(report->options));
	if (length) {
		length = bounded(length - 1, sizeof(report->options) - 1) + 1;
		if (pkt_load(ctx, segment->at.transport + sizeof(struct tcphdr), report->options,
			     length))
			return REASON_TRUNCATED;
		blank_keys(ctx, mptcp, report, MPTCP_SUBTYPE_MP_CAPABLE);
		blank_keys(ctx, mptcp, report, MPTCP_SUBTYPE_MP_FASTCLOSE);
	}
	return REASON_NONE;
}

ACTION(report,
       "tell `policy-chain events` of MPTCP's signals: handshakes, addresses, priorities, resets, "
       "fallback, and ends")
{
	struct mptcp_segment mptcp = {};
	enum reason reason = mptcp_parse(ctx, &mptcp);
	struct report *report;

	if (reason && reason != REASON_NOT_MPTCP)
		return SKIP(reason);
	if (!is_worth(ctx, &mptcp))
		return SKIP(REASON_NOT_REPORTED);
	report = bpf_ringbuf_reserve(&pcn_events, sizeof(*report), 0);
	if (!report)
		return SKIP(REASON_EVENT_LOST);
	reason = report_fill(ctx, &mptcp, report);
	if (reason)
		bpf_ringbuf_discard(report, 0);
	else
		bpf_ringbuf_submit(report, 0);
	return done_or_skip(reason);
}
