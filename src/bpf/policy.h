/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a policy is made of. One C file in policies/ is one policy, for XDP and TC:
 *
 *	#include "policy.h"
 *
 *	struct params {
 *		__u16 bytes __required __doc("receive window to advertise, as sent");
 *	};
 *	PARAMS;
 *
 *	ACTION(example, "rewrite the TCP receive window")
 *	{
 *		struct segment segment;
 *		enum reason reason = parse_tcp_to_change(ctx, &segment);
 *
 *		if (reason)
 *			return SKIP(reason);
 *		return DONE_OR_SKIP(tcp_store16(ctx, &segment, 14, bpf_htons(PARAM(bytes))));
 *	}
 *
 * The name is the file's. The body sees `ctx` and returns an enum outcome.
 */
#pragma once

#include "cadence.h"

/*
 * What the body of a policy says of a packet. Negative: the negated enum reason for which a
 * selector cannot tell (the packet then matches neither the selector nor its negation) or an
 * action gave up (the packet is untouched, and `on_error` of the chain applies).
 */
enum outcome {
	MISS = 0,
	MATCH = 1,
	DONE = 2,
	OUTCOME_VERDICT = 0x100, /* low byte: the hook's own return value */
	OUTCOME_MIN = -REASON_COUNT,
};

#define SKIP(reason) ((enum outcome)(-(int)(reason)))
#define UNKNOWN(reason) SKIP(reason)
/* Ends the graph with a return value of the hook; only a terminal action does. */
#define VERDICT(value) ((enum outcome)(OUTCOME_VERDICT | ((value) & 0xff)))

static __always_inline enum outcome done_or_skip(enum reason reason)
{
	return reason ? SKIP(reason) : DONE;
}

static __always_inline enum outcome match_if(bool condition)
{
	return condition ? MATCH : MISS;
}

/* Declares the constants of `struct params`. */
#define PARAMS const volatile struct params params

/* The argument of the element that matched; valid in an action that takes one. */
struct argument {
	__u64 value;
};

/*
 * The value of a scalar parameter: the constant of the chain file, or the element's
 * argument where the chain says {"from": "element"}. An action reads its scalars in no other
 * way: user space lets each of them come from an element.
 */
#define PARAM(name)                                                                        \
	((typeof(params.name))(node.argument_at == 1 + offsetof(struct params, name) ?     \
				       argument.value :                                    \
				       params.name))

static __always_inline __u64 argument_swap(__u64 value)
{
	if (node.argument_swap == 2)
		return bpf_htons(value);
	if (node.argument_swap == 4)
		return bpf_htonl(value);
	if (node.argument_swap == 8)
		return bpf_cpu_to_be64(value);
	return value;
}

/* Fetches the argument an action reads, in the byte order of its parameter. */
static __always_inline enum reason argument_load(hook_ctx *ctx, struct argument *argument)
{
	struct chain_ctx context;
	__u64 value;

	if (!node.argument_at)
		return REASON_NONE;
	context = context_read(ctx, node.carrier);
	if (!(context.flags & CHAIN_CTX_ARGUMENT) || context.chain != node.chain)
		return REASON_NO_ELEMENT;
	if (!(context.flags & CHAIN_CTX_CHAIN) != !(node.flags & NODE_ARGUMENT_IS_CHAIN))
		return REASON_BAD_ARGUMENT;
	value = (__u64)context.argument_high << 32 | context.argument_low;
	if (value < node.argument_min || value > node.argument_max)
		return REASON_BAD_ARGUMENT;
	argument->value = argument_swap(value);
	return REASON_NONE;
}

/* What a keyed selector's body returns to its wrapper besides the outcome. */
struct found {
	struct element element;
};

static __always_inline void argument_store(hook_ctx *ctx, const struct found *found)
{
	struct chain_ctx context = context_read(ctx, node.carrier);

	context.argument_low = 0;
	context.argument_high = 0;
	context.flags = 0;
	context.chain = node.chain;
	if (node.flags & NODE_STORE_ARGUMENT && found->element.flags & ELEMENT_ARGUMENT) {
		context.argument_low = found->element.argument;
		context.argument_high = found->element.argument >> 32;
		context.flags = CHAIN_CTX_ARGUMENT;
		if (found->element.flags & ELEMENT_CHAIN)
			context.flags |= CHAIN_CTX_CHAIN;
	}
	context_write(ctx, node.carrier, &context);
}

static __always_inline int selector_finish(hook_ctx *ctx, struct node_stats *stats,
					   enum outcome outcome, const struct found *found)
{
	bool matched = outcome == MATCH;

	if (node.flags & NODE_NEGATE)
		matched = outcome == MISS;
	if (outcome < 0)
		count_reason(stats, -outcome);
	if (!matched)
		return node_otherwise(ctx, stats);
	count_packet(ctx, stats);
	if (node.flags & (NODE_STORE_ARGUMENT | NODE_CLEAR_ARGUMENT))
		argument_store(ctx, found);
	return node_next(ctx, stats);
}

static __always_inline int action_finish(hook_ctx *ctx, struct node_stats *stats,
					 enum outcome outcome, const struct cadence_key *turn)
{
	if (outcome < 0) {
		count_reason(stats, -outcome);
		if (outcome == SKIP(REASON_HALF_DONE))
			return node_end(ctx, HOOK_DROP);
		/* to leave a packet alone whose turn it is not, is no failure */
		if (has_cadence() && outcome == SKIP(REASON_NOT_DUE))
			return node_later(ctx, stats);
		return node_otherwise(ctx, stats);
	}
	cadence_done(turn);
	if (outcome & OUTCOME_VERDICT)
		return node_end(ctx, (__s8)outcome);
	return node_next(ctx, stats);
}

/* Tags of a policy behind its doc: what is not so for most. */
#define TERMINAL __tag("terminal")	   /* an action that decides what becomes of the packet */
#define ONCE __tag("once") /* an action done once per flow unless the chain says otherwise */
#define HOOKS(list) __tag("hooks:" list)   /* "xdp,tc-ingress": the only hooks it works on */

#define SELECTOR(name, text, ...)                                                          \
	static __always_inline enum outcome name##_body(hook_ctx *ctx, struct found *found); \
	__tag("selector") __doc(text) __VA_ARGS__ SEC(HOOK_SECTION)                        \
	int pc_##name(hook_ctx *ctx)                                                       \
	{                                                                                  \
		struct node_stats *stats = node_stats();                                   \
		struct found found = {};                                                   \
                                                                                           \
		if (!stats)                                                                \
			return HOOK_PASS;                                                  \
		stats->seen++;                                                             \
		return selector_finish(ctx, stats, name##_body(ctx, &found), &found);      \
	}                                                                                  \
	static __always_inline enum outcome name##_body(hook_ctx *ctx, struct found *found)

#define ACTION(name, text, ...)                                                            \
	static __always_inline enum outcome name##_body(hook_ctx *ctx,                     \
							struct argument argument,          \
							const struct cadence_key *turn);   \
	__tag("action") __doc(text) __VA_ARGS__ SEC(HOOK_SECTION)                          \
	int pc_##name(hook_ctx *ctx)                                                       \
	{                                                                                  \
		struct node_stats *stats = node_stats();                                   \
		struct argument argument = {};                                             \
		struct cadence_key turn = {};                                              \
		enum reason reason;                                                        \
                                                                                           \
		if (!stats)                                                                \
			return HOOK_PASS;                                                  \
		stats->seen++;                                                             \
		count_packet(ctx, stats);                                                  \
		reason = argument_load(ctx, &argument);                                    \
		if (!reason)                                                               \
			reason = cadence_check(ctx, &turn);                                \
		return action_finish(ctx, stats,                                           \
				     reason ? SKIP(reason) :                               \
					      name##_body(ctx, argument, &turn),           \
				     &turn);                                               \
	}                                                                                  \
	static __always_inline enum outcome name##_body(hook_ctx *ctx,                     \
							struct argument argument,          \
							const struct cadence_key *turn)
