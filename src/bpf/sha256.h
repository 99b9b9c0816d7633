/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * SHA-256 (FIPS 180-4) and what MPTCP makes of it: tokens (RFC 8684, 3.1) and the HMAC of
 * ADD_ADDR (3.4.1). Two to eight microseconds, at a handshake or an announcement.
 */
#pragma once

#include "pkt.h"

#define SHA256_WORDS 8
#define SHA256_BLOCK_WORDS 16
#define SHA256_ROUNDS 64

/* Words in host order. */
struct sha256 {
	__u32 state[SHA256_WORDS];
	__u32 block[SHA256_BLOCK_WORDS];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct sha256);
} pc_sha256 SEC(".maps");

static const __u32 sha256_constants[SHA256_ROUNDS] = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
	0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
	0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
	0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
	0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
	0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static __always_inline struct sha256 *sha256_scratch(void)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&pc_sha256, &key);
}

static __always_inline __u32 rotate_right(__u32 word, const __u32 by)
{
	return word >> by | word << (32 - by);
}

/* Takes the block of the scratch into its state. The verifier walks the loop once. */
__noinline int sha256_compress(void)
{
	struct sha256 *hash = sha256_scratch();
	__u32 a, b, c, d, e, f, g, h, round;

	if (!hash)
		return -1;
	a = hash->state[0], b = hash->state[1], c = hash->state[2], d = hash->state[3];
	e = hash->state[4], f = hash->state[5], g = hash->state[6], h = hash->state[7];
#pragma clang loop unroll(disable)
	for (round = 0; round < SHA256_ROUNDS; round++) {
		__u32 *word = &hash->block[round & 15], one, two;

		if (round >= SHA256_BLOCK_WORDS) {
			__u32 behind = hash->block[(round + 1) & 15];
			__u32 before = hash->block[(round + 14) & 15];

			*word += hash->block[(round + 9) & 15] +
				 (rotate_right(behind, 7) ^ rotate_right(behind, 18) ^
				  behind >> 3) +
				 (rotate_right(before, 17) ^ rotate_right(before, 19) ^
				  before >> 10);
		}
		one = h + (rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25)) +
		      ((e & f) ^ (~e & g)) + sha256_constants[round] + *word;
		two = (rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22)) +
		      ((a & b) ^ (a & c) ^ (b & c));
		h = g, g = f, f = e, e = d + one;
		d = c, c = b, b = a, a = one + two;
	}
	hash->state[0] += a, hash->state[1] += b, hash->state[2] += c, hash->state[3] += d;
	hash->state[4] += e, hash->state[5] += f, hash->state[6] += g, hash->state[7] += h;
	return 0;
}

/* No table: clang puts one of 32 bytes where its BTF does not say. */
static __always_inline void sha256_begin(struct sha256 *hash)
{
	hash->state[0] = 0x6a09e667;
	hash->state[1] = 0xbb67ae85;
	hash->state[2] = 0x3c6ef372;
	hash->state[3] = 0xa54ff53a;
	hash->state[4] = 0x510e527f;
	hash->state[5] = 0x9b05688c;
	hash->state[6] = 0x1f83d9ab;
	hash->state[7] = 0x5be0cd19;
}

/* The token that stands for `key` on the wire: the first word of its hash. 0 on failure. */
static __always_inline __u32 mptcp_token(__be64 key)
{
	struct sha256 *hash = sha256_scratch();
	__u64 value = bpf_be64_to_cpu(key);

	if (!hash)
		return 0;
	sha256_begin(hash);
	__builtin_memset(hash->block, 0, sizeof(hash->block));
	hash->block[0] = value >> 32;
	hash->block[1] = value;
	hash->block[2] = 0x80000000;
	hash->block[15] = 64; /* bits */
	return sha256_compress() ? 0 : hash->state[0];
}

/* Begins one of the two hashes of an HMAC (RFC 2104) under both keys of a connection. */
static __always_inline int hmac_begin(struct sha256 *hash, __be64 own_key, __be64 peer_key,
				      const __u32 pad)
{
	__u64 own = bpf_be64_to_cpu(own_key), peer = bpf_be64_to_cpu(peer_key);
	int i;

	sha256_begin(hash);
#pragma unroll
	for (i = 4; i < SHA256_BLOCK_WORDS; i++)
		hash->block[i] = pad;
	hash->block[0] = own >> 32 ^ pad;
	hash->block[1] = own ^ pad;
	hash->block[2] = peer >> 32 ^ pad;
	hash->block[3] = peer ^ pad;
	return sha256_compress();
}

#define HMAC_MESSAGE_MAX 24 /* bytes; an ADD_ADDR has 7 or 19 */

/* The last 8 bytes of the HMAC of `length` bytes of `message`, which is zero behind them. */
static __always_inline int mptcp_hmac(__be64 own_key, __be64 peer_key, const __u8 *message,
				      const __u32 length, __be64 *result)
{
	struct sha256 *hash = sha256_scratch();
	__u32 i;

	if (!hash || hmac_begin(hash, own_key, peer_key, 0x36363636))
		return -1;
	__builtin_memset(hash->block, 0, sizeof(hash->block));
#pragma unroll
	for (i = 0; i < HMAC_MESSAGE_MAX / 4; i++)
		hash->block[i] = (__u32)message[4 * i] << 24 | message[4 * i + 1] << 16 |
				 message[4 * i + 2] << 8 | message[4 * i + 3];
	hash->block[length / 4] |= 0x80000000u >> 8 * (length % 4);
	hash->block[15] = (64 + length) * 8;
	if (sha256_compress())
		return -1;
	{
		__u32 inner[SHA256_WORDS];

		__builtin_memcpy(inner, hash->state, sizeof(inner));
		if (hmac_begin(hash, own_key, peer_key, 0x5c5c5c5c))
			return -1;
		__builtin_memset(hash->block, 0, sizeof(hash->block));
		__builtin_memcpy(hash->block, inner, sizeof(inner));
	}
	hash->block[SHA256_WORDS] = 0x80000000;
	hash->block[15] = (64 + 32) * 8;
	if (sha256_compress())
		return -1;
	*result = bpf_cpu_to_be64((__u64)hash->state[6] << 32 | hash->state[7]);
	return 0;
}
