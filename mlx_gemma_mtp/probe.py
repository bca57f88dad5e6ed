"""The exactness probe: do blocks give the bytes of plain decoding on this machine?

The same few tokens are decoded by plain rounds and by blocks of every size, over slabs
filled at random (so no long prompt is needed), at three places: near the start, where a
sliding layer's ring wraps inside the block, and at the end of slabs that have grown to
some thousand slots. Logits and hidden states of every row are compared byte by byte.
Which kernel runs depends on shapes alone, so what is found for random keys holds for a
text's.

It runs the target's own forward as rounds do, and knows nothing of drafters.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import cast

import mlx.core as mx

from .cache import CAPACITY_BLOCK, SlabLayout, next_capacity, resize
from .config import MAX_DRAFT_TOKENS
from .rounds import TargetLike
from .route import ALL_DRAFTS, PLAIN_ROWS, Verdict

_MARGIN = MAX_DRAFT_TOKENS + 1  # slots of the longest block
_NUM_STEPS = _MARGIN  # plain steps at each place: every row of every block is compared
_NUM_BLOCK_TOKENS = 3  # blocks of fewer tokens are repeated: later ones read their keys
# Slots of the last place. Metal's attention over many keys goes in two passes, from
# 1,024 on, and its softmax in a loop, from 4,096 on.
_MANY_SLOTS = 4352
_KEY_SCALE = 0.125  # scores of a few units, as a text's: no key takes all the weight

_Forward = Callable[
    [mx.array, list[mx.array], mx.array], tuple[mx.array, mx.array, list[mx.array]]
]


@dataclass(frozen=True)
class _Place:
    """Where blocks are compared: the first row's offset, and the slabs' capacity."""

    offset: int
    capacity: int


@dataclass(frozen=True)
class _Decoded:
    """Logits and hidden states behind consecutive tokens, [B, n, V] and [B, n, H]."""

    logits: mx.array
    hidden: mx.array


def probe(
    target: TargetLike,
    *,
    num_rows: int = 1,
    use_compile: bool = True,
    budget_s: float | None = None,
) -> Verdict | None:
    """Compare plain rounds with blocks of every size.

    Args:
        target: The target.
        num_rows: Rows B of the batch.
        use_compile: Whether forwards go through ``mx.compile``, as rounds do.
        budget_s: Give up where it would take longer, seconds; None for never.

    Returns:
        What was found; None where it was given up.
    """
    return _Probe(target, num_rows, use_compile, budget_s).verdict()


def places(layout: SlabLayout) -> list[_Place]:
    """Near the start, across the ring's end, and at the end of grown slabs.

    Each one's slabs are those of the place before, grown: first the rings too, where
    the window is not short, then only the full layers'.
    """
    wrap = layout.ring - 2
    capacity = next_capacity(wrap + 3 * _MARGIN)
    grown = max(_MANY_SLOTS, next_capacity(capacity + 1, capacity))
    return [
        _Place(5, CAPACITY_BLOCK),
        _Place(wrap, capacity),
        _Place(grown - 3 * _MARGIN, grown),
    ]


class _Probe:
    """One run of the probe."""

    def __init__(
        self,
        target: TargetLike,
        num_rows: int,
        use_compile: bool,
        budget_s: float | None,
    ) -> None:
        self._target = target
        self._num_rows = num_rows
        self._budget_s = budget_s
        self._num_passes = 0
        self._plain_s: dict[int, list[float]] = {rows: [] for rows in PLAIN_ROWS}
        self._start = time.perf_counter()
        forward = _forward_of(target)
        self._forward: _Forward = mx.compile(forward) if use_compile else forward
        self._equal = {rows: set(ALL_DRAFTS[1:]) for rows in PLAIN_ROWS}
        self._difference = 0.0
        self._depends_on_capacity = False
        self._key = mx.random.key(0)
        size = (num_rows, 2 * _MARGIN)
        self._tokens = mx.random.randint(0, target.vocab_size, size, key=self._next())

    def verdict(self) -> Verdict | None:
        """Decode at every place; None where it would take too long."""
        if not self._is_affordable():
            return None
        for place in places(self._target.layout):
            self._compare(place)
            mx.clear_cache()
            if self._is_late():
                return None
        return Verdict(
            equal={rows: tuple(sorted(drafts)) for rows, drafts in self._equal.items()},
            max_difference=self._difference,
            depends_on_capacity=self._depends_on_capacity,
            fill_cost=max(1.0, median(self._plain_s[2]) / median(self._plain_s[1])),
            num_passes=self._num_passes,
            seconds=time.perf_counter() - self._start,
        )

    def _compare(self, place: _Place) -> None:
        """Compare plain rounds with blocks of every size at one place."""
        slabs = self._random_slabs(place.capacity)
        plain = {rows: self._decode(slabs, place, 0, rows) for rows in PLAIN_ROWS}
        for k in ALL_DRAFTS[1:]:
            if self._is_late():  # which verdict() finds too
                return
            block = self._decode(slabs, place, k, 1)
            self._difference = max(self._difference, _difference(plain[1], block))
            for rows in PLAIN_ROWS:
                if not _is_equal(plain[rows], block):
                    self._equal[rows].discard(k)
        capacity = self._next_capacity(place)
        if capacity is not None:
            slabs = self._grown(slabs, capacity)
            later = self._decode(slabs, place, 0, 1)
            self._difference = max(self._difference, _difference(plain[1], later))
            self._depends_on_capacity |= not _is_equal(plain[1], later)

    def _next_capacity(self, place: _Place) -> int | None:
        """Slots to grow to behind a place; None where another place tells as much."""
        layout = self._target.layout
        start, wrap, grown = places(layout)
        if place == wrap:
            return grown.capacity
        has_short_ring = layout.ring > start.capacity
        return wrap.capacity if place == start and has_short_ring else None

    def _is_late(self) -> bool:
        """Whether tracing has taken what no estimate could know."""
        passed = time.perf_counter() - self._start
        return self._budget_s is not None and passed > 2 * self._budget_s

    def _is_affordable(self) -> bool:
        """Whether the whole fits the budget, by the time of one pass."""
        if self._budget_s is None:
            return True
        place = places(self._target.layout)[0]
        slabs = self._random_slabs(place.capacity)
        self._block(slabs, place, 0, 1, 1)  # traced and compiled here
        start = time.perf_counter()
        self._block(slabs, place, 0, 1, 1)
        num_blocks = sum(-(-_NUM_BLOCK_TOKENS // (k + 1)) for k in ALL_DRAFTS[1:])
        num_passes = 3 * (2 * _NUM_STEPS + num_blocks) + 2 * _NUM_STEPS
        return (time.perf_counter() - start) * num_passes <= self._budget_s

    def _grown(self, slabs: list[mx.array], capacity: int) -> list[mx.array]:
        """The same slabs with more slots behind."""
        grown = list(slabs)
        resize(grown, self._target.layout, capacity)
        return grown

    def _decode(
        self, slabs: list[mx.array], place: _Place, num_drafts: int, min_rows: int
    ) -> _Decoded:
        """Decode the tokens in rounds of K drafts that are all accepted."""
        logits, hidden = [], []
        num_tokens = _NUM_BLOCK_TOKENS if num_drafts else _NUM_STEPS
        for done in range(0, num_tokens, num_drafts + 1):
            start = time.perf_counter()
            block, slabs = self._block(slabs, place, num_drafts, min_rows, done)
            if not num_drafts:
                self._plain_s[min_rows].append(time.perf_counter() - start)
            logits.append(block.logits)
            hidden.append(block.hidden)
        return _Decoded(mx.concatenate(logits, axis=1), mx.concatenate(hidden, axis=1))

    def _block(
        self,
        slabs: list[mx.array],
        place: _Place,
        num_drafts: int,
        min_rows: int,
        done: int,
    ) -> tuple[_Decoded, list[mx.array]]:
        """One verify forward over the tokens from number ``done`` on."""
        num_tokens = num_drafts + 1
        tokens = self._tokens[:, done : done + num_tokens]
        if num_tokens < min_rows:
            filling = mx.repeat(tokens[:, -1:], min_rows - num_tokens, axis=1)
            tokens = mx.concatenate([tokens, filling], axis=1)
        # Rows of a batch stand at different places.
        offset = place.offset + done + mx.arange(self._num_rows)
        logits, hidden, slabs = self._forward(tokens, slabs, offset)
        self._num_passes += 1
        block = _Decoded(logits[:, :num_tokens], hidden[:, :num_tokens])
        mx.eval(block.logits, block.hidden, slabs)
        return block, slabs

    def _random_slabs(self, capacity: int) -> list[mx.array]:
        """Slabs as if a text had filled them."""
        slabs = self._target.layout.allocate(self._num_rows, capacity)
        for i, slab in enumerate(slabs):
            scale = _KEY_SCALE if i % 2 == 0 else 1.0
            slabs[i] = mx.random.normal(
                slab.shape, slab.dtype, scale=scale, key=self._next()
            )
            mx.eval(slabs[i])  # one by one: their making needs room too
        return slabs

    def _next(self) -> mx.array:
        self._key, key = mx.random.split(self._key)
        return key


def _forward_of(target: TargetLike) -> _Forward:
    """The target's forward on plain arrays."""

    def forward(
        tokens: mx.array, slabs: list[mx.array], offset: mx.array
    ) -> tuple[mx.array, mx.array, list[mx.array]]:
        output = target.verify(
            tokens, slabs, offset=offset, first_position=mx.zeros_like(offset)
        )
        return output.logits, output.hidden, output.slabs

    return forward


def _is_equal(plain: _Decoded, block: _Decoded) -> bool:
    """Whether both have the same bytes behind the tokens that both have."""
    pairs = ((plain.logits, block.logits), (plain.hidden, block.hidden))
    return all(_same_bytes(*_shared(a, b)) for a, b in pairs)


def _shared(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """What stands behind the tokens that both have."""
    num_tokens = min(a.shape[1], b.shape[1])
    return a[:, :num_tokens], b[:, :num_tokens]


def _same_bytes(a: mx.array, b: mx.array) -> bool:
    words = {2: mx.uint16, 4: mx.uint32}[a.dtype.size]
    a, b = (mx.contiguous(array).view(words) for array in (a, b))
    return cast(bool, mx.array_equal(a, b).item())


def _difference(plain: _Decoded, block: _Decoded) -> float:
    """Largest difference of a logit."""
    a, b = _shared(plain.logits, block.logits)
    difference = mx.abs(a.astype(mx.float32) - b.astype(mx.float32))
    return cast(float, difference.max().item())
