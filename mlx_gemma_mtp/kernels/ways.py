"""Names of ways to run a layer, each chosen only where a machine has found it faster.

This file knows nothing of what they do, nor of how they are measured.
"""

from __future__ import annotations

PACKED = "packed"  # unfused attention reads K and V once for each head of theirs
SPLIT = "split"  # as many queries at a time as fused attention takes
ADD_NORM = "add_norm"  # a residual sum in one kernel with the norms around it
NORM_ROPE = "norm_rope"  # norm and rotation of queries and keys in one kernel
WAYS = (PACKED, SPLIT, ADD_NORM, NORM_ROPE)
LONG_WAYS = frozenset((PACKED,))  # those that are worth something in long texts

Ways = frozenset[str]

STOCK_WAYS: Ways = frozenset()
