/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"

struct params {
	chain_t chain __required __doc("sub-chain to go on with; it does not come back");
};
PARAMS;

ACTION(goto, "go on with a sub-chain, fixed or named by the set element", TERMINAL)
{
	/* There is no coming back to do so. */
	cadence_done(turn);
	JUMP("chain", ctx, &pc_chains, PARAM(chain));
	return SKIP(REASON_NO_CHAIN);
}
