"""Names of ways to run a layer, each chosen only where a machine has found it faster.

This file knows nothing of what they do, nor of how they are measured.
"""

from __future__ import annotations

PACKED = "packed"  # unfused attention reads K and V once for each head of theirs
SPLIT = "split"  # as many queries at a time as fused attention takes
WAYS = (PACKED, SPLIT)

Ways = frozenset[str]

STOCK_WAYS: Ways = frozenset()
