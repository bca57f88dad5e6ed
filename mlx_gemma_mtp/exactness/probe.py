"""The exactness probe: do blocks give the bytes of plain decoding on this machine?

The same few tokens are decoded by plain rounds and by blocks of every size, over slabs
filled at random (so no long prompt is needed), at three places: near the start, where a
sliding layer's ring wraps inside the block, and at the end of slabs of some thousand
slots. Logits and hidden states of every row are compared byte by byte.
Which kernel runs depends on shapes alone, so what is found for random keys holds for a
text's.

What it has compared is kept apart (compared.py): a probe whose time is over goes on
from there another time, and gives its verdict when nothing is left to compare. It runs
rounds, those that decode, over tokens of its own, and knows nothing of drafters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median

import mlx.core as mx

from ..cache.slabs import CAPACITY_BLOCK, SlabLayout, next_capacity
from ..constants import ALL_DRAFTS, MAX_DRAFT_TOKENS
from ..engine.given_rounds import GivenRounds
from ..engine.rounds import Rounds
from .compared import Compared, Decoded
from .verdict import PLAIN_ROWS, Verdict

_MARGIN = MAX_DRAFT_TOKENS + 1  # slots of the longest block
_NUM_STEPS = _MARGIN  # plain steps at each place: every row of every block is compared
_NUM_BLOCK_TOKENS = 3  # blocks of fewer tokens are repeated: later ones read their keys
# Slots of the last place. Metal's attention over many keys goes in two passes, from
# 1,024 on, and its softmax in a loop, from 4,096 on.
_MANY_SLOTS = 4352
_KEY_SCALE = 0.125  # scores of a few units, as a text's: no key takes all the weight
# A probe that has done no more than these has seen that it would take too long.
TIMING_PASSES = 2
# What one comparison at least may take, in budgets; else a slow machine never has one.
_MOST_BUDGETS = 2


@dataclass(frozen=True)
class _Place:
    """Where blocks are compared: the first row's offset, and the slabs' capacity."""

    offset: int
    capacity: int

    def __str__(self) -> str:
        """Its name."""
        return f"{self.offset} of {self.capacity}"


@dataclass(frozen=True)
class _Comparison:
    """Blocks of one size that are compared with plain rounds.

    Attributes:
        place: Where.
        num_drafts: Drafts of their rounds.
    """

    place: _Place
    num_drafts: int

    @property
    def name(self) -> str:
        """What it is called where it is kept."""
        return f"{self.place}, K = {self.num_drafts}"

    @property
    def num_passes(self) -> int:
        """Forward passes that it takes."""
        return -(-_NUM_BLOCK_TOKENS // (self.num_drafts + 1))


def probe(
    rounds: Rounds,
    *,
    num_rows: int = 1,
    budget_s: float | None = None,
    compared: Compared | None = None,
    is_whole: bool = False,
    waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Verdict | None:
    """Compare plain rounds with blocks of every size.

    Args:
        rounds: The engine whose target decodes.
        num_rows: Rows B of the batch.
        budget_s: Stop where forwards would take longer, seconds; None for never. What
            tracing and compiling takes does not count. The first comparison may take
            twice as long.
        compared: What was compared before; what is compared now is added to it.
        is_whole: Whether to begin only where all of it looks as if it fits the budget.
        waiting: Around each forward, which may wait for other machines.

    Returns:
        What was found; None where something is still to be compared.
    """
    so_far = Compared() if compared is None else compared
    return _Probe(rounds, num_rows, budget_s, so_far, is_whole, waiting).verdict()


def places(layout: SlabLayout) -> list[_Place]:
    """Near the start, across the ring's end, and at the end of many slots."""
    wrap = layout.ring - 2
    capacity = next_capacity(wrap + 3 * _MARGIN)
    many = max(_MANY_SLOTS, next_capacity(capacity + 1, capacity))
    return [
        _Place(5, CAPACITY_BLOCK),
        _Place(wrap, capacity),
        _Place(many - 3 * _MARGIN, many),
    ]


def random_slabs(layout: SlabLayout, num_rows: int, place: _Place) -> list[mx.array]:
    """Slabs as if a text had filled them, the same ones whenever they are made."""
    slabs = layout.allocate(num_rows, place.capacity)
    key = mx.random.key(place.offset)
    for i, slab in enumerate(slabs):
        key, own = mx.random.split(key)
        scale = _KEY_SCALE if i % 2 == 0 else 1.0
        slabs[i] = mx.random.normal(slab.shape, slab.dtype, scale=scale, key=own)
        mx.eval(slabs[i])  # one by one: their making needs room too
    return slabs


class _Probe:
    """One run of the probe."""

    def __init__(
        self,
        rounds: Rounds,
        num_rows: int,
        budget_s: float | None,
        compared: Compared,
        is_whole: bool,
        waiting: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._waiting = waiting
        self._layout = rounds.target.layout
        self._rounds = GivenRounds(rounds, num_rows)
        self._num_rows = num_rows
        self._budget_s = math.inf if budget_s is None else budget_s
        self._compared = compared
        self._is_whole = is_whole
        self._comparisons = list(_comparisons(self._layout))
        self._missing = [c for c in self._comparisons if c.name not in compared.equal]
        self._has_compared = False
        self._spent_s = 0.0  # without tracing and compiling
        self._traced: set[tuple[int, int]] = set()
        self._row_s: float | None = None  # of a pass of one row, when it is traced
        size = (num_rows, 2 * _MARGIN)
        key = mx.random.key(0)
        self._tokens = mx.random.randint(0, rounds.target.vocab_size, size, key=key)

    def verdict(self) -> Verdict | None:
        """Compare what is missing; None where there was no time for all of it."""
        start = time.perf_counter()
        try:
            for place in places(self._layout):
                if not self._compare(place):
                    return None
        finally:
            self._compared.seconds += time.perf_counter() - start
            mx.clear_cache()
        return self._concluded()

    def _concluded(self) -> Verdict:
        """What all comparisons together say."""
        found, plain_s = self._compared, self._compared.plain_s
        differing = {
            rows: {
                c.num_drafts
                for c in self._comparisons
                if rows not in found.equal[c.name]
            }
            for rows in PLAIN_ROWS
        }
        return Verdict(
            equal={
                rows: tuple(k for k in ALL_DRAFTS[1:] if k not in differing[rows])
                for rows in PLAIN_ROWS
            },
            max_difference=found.max_difference,
            fill_cost=max(1.0, median(plain_s[2]) / median(plain_s[1])),
            num_passes=found.num_passes,
            seconds=found.seconds,
        )

    def _compare(self, place: _Place) -> bool:
        """Compare what is missing at one place; whether there was time for it."""
        missing = [c for c in self._missing if c.place == place]
        if not missing:
            return True
        slabs = random_slabs(self._layout, self._num_rows, place)
        if self._row_s is None and not self._begin(slabs, place):
            return False
        if not self._has_plain(slabs, place):
            return False
        for comparison in missing:
            if not self._has_time(comparison.num_passes):
                return False
            found = self._decode(slabs, place, comparison.num_drafts, 1)
            self._compared.add(comparison.name, found)
            self._has_compared = True
        self._compared.plain.clear()
        mx.clear_cache()
        return True

    def _begin(self, slabs: list[mx.array], place: _Place) -> bool:
        """Time one pass; whether there is time to compare anything."""
        held = self._compared.plain
        if self._compared.place != str(place):
            held.clear()
        if math.isinf(self._budget_s) and not held:
            return True
        for _ in range(TIMING_PASSES):  # the first is traced and compiled
            first, _ = self._block(slabs, place, 0, 1, 0)
        if held and not held[PLAIN_ROWS[0]].has_bytes_of(first):
            held.clear()  # weights were changed in place
        plain = (len(PLAIN_ROWS) - len(held)) * _NUM_STEPS
        if not self._is_whole:
            return self._has_time(plain + self._missing[0].num_passes)
        plain *= len({c.place for c in self._missing})
        num_passes = plain + sum(c.num_passes for c in self._missing)
        return self._pass_s * num_passes <= self._budget_s

    def _has_time(self, num_passes: int) -> bool:
        """Whether so many passes more fit into the time there is."""
        is_first = self._is_whole or not self._has_compared
        most_s = self._budget_s * (_MOST_BUDGETS if is_first else 1)
        return self._spent_s + num_passes * self._pass_s <= most_s

    @property
    def _pass_s(self) -> float:
        """What a pass of one row takes, seconds."""
        return self._row_s or 0.0

    def _has_plain(self, slabs: list[mx.array], place: _Place) -> bool:
        """Decode plainly, where that is not there yet; whether there was time."""
        found = self._compared
        found.place = str(place)
        for rows in PLAIN_ROWS:
            if rows in found.plain:
                continue
            if not self._has_time(_NUM_STEPS):
                return False
            found.plain[rows] = self._decode(slabs, place, 0, rows)
        return True

    def _decode(
        self, slabs: list[mx.array], place: _Place, num_drafts: int, min_rows: int
    ) -> Decoded:
        """Decode the tokens in rounds of K drafts that are all accepted."""
        logits, hidden = [], []
        num_tokens = _NUM_BLOCK_TOKENS if num_drafts else _NUM_STEPS
        for done in range(0, num_tokens, num_drafts + 1):
            start = time.perf_counter()
            block, slabs = self._block(slabs, place, num_drafts, min_rows, done)
            if not num_drafts:
                passed = time.perf_counter() - start
                self._compared.plain_s[min_rows].append(passed)
            logits.append(block.logits)
            hidden.append(block.hidden)
        found = Decoded(mx.concatenate(logits, axis=1), mx.concatenate(hidden, axis=1))
        mx.eval(found.logits, found.hidden)  # or it would hold every pass's rows
        return found

    def _block(
        self,
        slabs: list[mx.array],
        place: _Place,
        num_drafts: int,
        min_rows: int,
        done: int,
    ) -> tuple[Decoded, list[mx.array]]:
        """One verify forward over the tokens from number ``done`` on."""
        tokens = self._tokens[:, done : done + num_drafts + 1]
        # Rows of a batch stand at different places.
        offset = place.offset + done + mx.arange(self._num_rows)
        start = time.perf_counter()
        with self._waiting():
            found = self._rounds.run(tokens, slabs, offset=offset, min_rows=min_rows)
            mx.eval(found.logits, found.hidden, found.slabs)
        passed = time.perf_counter() - start
        self._count(passed, max(num_drafts + 1, min_rows), place.capacity)
        return Decoded(found.logits, found.hidden), found.slabs

    def _count(self, passed: float, num_rows: int, capacity: int) -> None:
        """Count a forward pass that took so many seconds."""
        self._compared.num_passes += 1
        shape = (num_rows, capacity)
        if shape not in self._traced:
            # Tracing and compiling are in it. Rows cost no more than each by itself.
            self._traced.add(shape)
            passed = min(passed, num_rows * self._pass_s)
        elif num_rows == 1:
            self._row_s = passed
        self._spent_s += passed


def _comparisons(layout: SlabLayout) -> Iterator[_Comparison]:
    """All of them: blocks of every size at every place."""
    for place in places(layout):
        for k in ALL_DRAFTS[1:]:
            yield _Comparison(place, k)
