"""Names of ways to run a layer, each chosen only where a machine has found it faster.

This file knows nothing of what they do, nor of how they are measured.
"""

from __future__ import annotations

PACKED = "packed"  # unfused attention reads K and V once for each head of theirs
SPLIT = "split"  # as many queries at a time as fused attention takes
ADD_NORM = "add_norm"  # a residual sum in one kernel with the norms around it
NORM_ROPE = "norm_rope"  # norm and rotation of queries and keys in one kernel
GATE_UP = "gate_up"  # gate, activation and values of the dense part in one kernel
QKV = "qkv"  # queries, keys and values from one kernel
ROUTE = "route"  # the choice of experts in one kernel
EXPERTS = "experts"  # gate, activation and values of a row's experts in one kernel
# In the order in which they are tried.
WAYS = (ADD_NORM, NORM_ROPE, GATE_UP, QKV, ROUTE, EXPERTS, SPLIT, PACKED)
MATRIX_WAYS = frozenset((GATE_UP, QKV))  # where the kernel of few rows multiplies
LONG_WAYS = frozenset((PACKED,))  # those that are worth something in long texts

Ways = frozenset[str]

STOCK_WAYS: Ways = frozenset()
