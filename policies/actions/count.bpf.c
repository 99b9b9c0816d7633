/* SPDX-License-Identifier: GPL-2.0-only */
#include "policy.h"

ACTION(count, "count packets and bytes, nothing else")
{
	return DONE;
}
