/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"

ACTION(pass, "let the packet go on, without looking at later chains", TERMINAL)
{
	return VERDICT(HOOK_PASS);
}
