/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"
#include "mptcp_add.h"
#include "mptcp_keys.h"

struct params {
	ip_t address __required __doc("address of the sender to announce");
	__u8 id __required __range(1, 255)
		__doc("id of the address; one that the sender does not use for another");
	port_t port __doc("port to connect to; that of the connection if absent");
	duration_t apart __default("100ms") __doc(APART_DOC);
};
PARAMS;

/* What the HMAC is of (RFC 8684, 3.4.1): id, address, port. */
static __always_inline void announcement(__u8 *message, __u8 id, bool is_v4)
{
	const __u32 address = is_v4 ? 4 : 16;
	__u32 i;

	message[0] = id;
#pragma unroll
	for (i = 0; i < 16; i++)
		if (i < address)
			message[1 + i] = params.address.addr[16 - address + i];
	message[1 + address] = params.port & 0xff;
	message[2 + address] = params.port >> 8;
}

/* Writes the ADD_ADDR option, but for its first bytes; returns its length. */
static __always_inline __u32 add_addr_write(__u8 *option, const __u8 *message, __be64 hmac,
					    bool is_v4)
{
	const __u32 address = is_v4 ? 4 : 16;
	__u32 i, at = 4 + address;

	option[3] = message[0];
#pragma unroll
	for (i = 0; i < 16; i++)
		if (i < address)
			option[4 + i] = message[1 + i];
	if (params.port) {
		option[at] = message[1 + address];
		option[at + 1] = message[2 + address];
		at += 2;
	}
	__builtin_memcpy(option + at, &hmac, sizeof(hmac));
	return at + sizeof(hmac);
}

ACTION(add_subflow,
       "have the receiver open a subflow to an address, by an ADD_ADDR option on the next packet "
       "with room; the connection's handshake must have passed this network namespace", ONCE)
{
	const bool is_v4 = !params.address.words[0] && !params.address.words[1] &&
			   params.address.words[2] == bpf_htonl(0xffff);
	struct options_scratch *scratch;
	struct mptcp_segment mptcp = {};
	enum reason reason = mptcp_open(ctx, &mptcp, MPTCP_SUBTYPE_ADD_ADDR, &scratch);
	__u8 message[HMAC_MESSAGE_MAX] = {};
	struct connection_keys *keys;
	__be64 hmac;
	struct subflow_end *own;
	__u32 size, failed;

	if (reason)
		return SKIP(reason);
	own = subflow_end(mptcp.subflow, mptcp.from.end);
	if (announced_lately(own, params.apart))
		return SKIP(REASON_NOT_DUE);
	keys = bpf_map_lookup_elem(&pcn_keys, &own->token);
	if (!keys)
		return SKIP(REASON_NO_KEYS);
	announcement(message, PARAM(id), is_v4);
	if (is_v4)
		failed = mptcp_hmac(keys->own, keys->peer, message, 7, &hmac);
	else
		failed = mptcp_hmac(keys->own, keys->peer, message, 19, &hmac);
	if (failed)
		return SKIP(REASON_HELPER_FAILED);
	size = add_addr_write(scratch->insert, message, hmac, is_v4);
	mptcp_option_begin(scratch, MPTCP_SUBTYPE_ADD_ADDR, 0, size);
	return done_or_skip(mptcp_announce(ctx, &mptcp, scratch, size));
}
