"""What MLX's attention over whole contexts costs: how often it reads keys and values.

Layers whose heads are 512 wide are not fused with a mask that is an array: their
attention is two matrix products and a softmax. All queries of a head of keys and values
go into one product only where the batch has just one such head; else each query head
fetches the keys again, and rows are padded. So a pass takes several times as long as
reading keys and values once does, and longer with every row. The figures are estimates
from MLX's source; nobody measured them.

Knows neither families nor bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_ROWS = 5  # of the second estimate; the first is of one row
_M3 = 15  # the generation from which on more rows cost less


@dataclass(frozen=True)
class _Estimate:
    """Times that reading once takes, of one row and of five: since M3, and before."""

    first: float
    fifth: float
    fifth_before_m3: float


_ONE_PRODUCT = _Estimate(1.4, 2.8, 3.5)
# By query heads that share a head of keys and values, at least.
_MANY_PRODUCTS: Mapping[int, _Estimate] = {
    8: _Estimate(3.0, 5.3, 8.5),
    1: _Estimate(2.2, 3.6, 5.0),
}


def reads(rows: int, *, sharing: int, kv_heads: int, generation: int) -> float:
    """Time of a full layer's attention over that of reading its keys and values once.

    Args:
        rows: Rows of every sequence.
        sharing: Query heads that share a head of keys and values.
        kv_heads: Heads of keys and values of all sequences together.
        generation: Of the GPU, see ``Chip``.
    """
    found = _MANY_PRODUCTS[max(few for few in _MANY_PRODUCTS if few <= sharing)]
    if kv_heads == 1:
        found = _ONE_PRODUCT
    fifth = found.fifth if generation >= _M3 else found.fifth_before_m3
    return found.first + (fifth - found.first) * (rows - 1) / (_ROWS - 1)
