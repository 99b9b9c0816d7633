/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"

ACTION(drop, "discard the packet", TERMINAL)
{
	return VERDICT(HOOK_DROP);
}
