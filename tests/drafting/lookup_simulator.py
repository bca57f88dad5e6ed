"""Rounds of a made-up machine on a text that repeats itself: who drafts, and how many.

A text goes on in turns with something new and with a copy of what was said before. For
each position it is fixed how many drafts of the drafter would stand, how long the match
is, and how many of the tokens that follow it are right. Time is in plain rounds; what
is observed is noisy and one round late.

Edits are real ones: Python files of mlx-lm's history (up to d78bf58), each behind its
former self, in Gemma's tokens. ``edits.json`` is by ``scripts/studies/real_edits.py``.
"""

import json
import math
import random
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from mlx_gemma_mtp.drafting.controller import DraftLengthController
from mlx_gemma_mtp.drafting.prior import Prior
from tests.drafting.simulator import CURVES, DEPTH, PLAIN_S

_DRAFT_STEP = {"m1": 0.04, "m3": 0.04, "m5": 0.05, "mixture": 0.24 / 2.14}
_SHORTEST = 3  # tokens of a match that leads into a copy


@dataclass(frozen=True)
class Kind:
    """How a text repeats itself.

    Attributes:
        copied: Tokens of a copy, on average; 0 for none.
        new: Tokens between two copies, on average.
        follows: P(a token of a copy is that of the original).
        drafted: P(a draft of the drafter is accepted) in a copy.
        drafted_new: The same in what is new.
    """

    copied: int
    new: int
    follows: float = 1.0
    drafted: float = 0.9
    drafted_new: float = 0.6


KINDS = {
    "new": Kind(0, 100),
    "prose": Kind(4, 80, 0.6, 0.6, 0.5),
    "quote": Kind(25, 60, 0.96, 0.8),
    "rewrite": Kind(60, 12, 0.985, 0.75),
    "re-emission": Kind(150, 15, 0.99, 0.8),
    "well drafted": Kind(150, 15, 0.99, 0.92),
}


# P(a draft of the drafter is accepted) in edits, where what follows stood before.
EDITS = {"edit": 0.75, "well drafted edit": 0.85}
ALL_KINDS = (*KINDS, *EDITS)


@lru_cache(maxsize=256)
def repeating_text(kind, length, seed):
    """For each position: drafts that stand, length of the match, tokens that follow."""
    if kind in EDITS:
        return _edited_text(EDITS[kind], length, seed)
    parameters, rng = KINDS[kind], random.Random(f"{kind} {length} {seed}")
    is_copied: list[bool] = []
    while len(is_copied) < length + DEPTH + 1:
        is_copied += [False] * math.ceil(rng.expovariate(1 / parameters.new))
        if parameters.copied:
            is_copied += [True] * math.ceil(rng.expovariate(1 / parameters.copied))
    is_same = [c and rng.random() < parameters.follows for c in is_copied]
    places, run = [], 0
    for i in range(length):
        rate = parameters.drafted if is_copied[i] else parameters.drafted_new
        drafted = _run(rng, rate, DEPTH)
        if run >= _SHORTEST:
            same = is_same[i : i + DEPTH + 1]
            place = (drafted, min(run, 16), [*same, False].index(False))
        else:
            match = rng.choice([0, 1, 1, 2, 2, 3, 4])
            rate = 0.3 if match >= _SHORTEST else 0.15
            place = (drafted, match, _run(rng, rate, DEPTH + 1))
        places.append(place)
        run = run + 1 if is_same[i] else 0
    return places


@cache
def _edits():
    """The matches, and the tokens that follow, of each place of each edit."""
    found = json.loads(Path(__file__).with_name("edits.json").read_text())
    return [
        [(match, same) for match, same, count in edit for _ in range(count)]
        for edit in found
    ]


def _edited_text(drafted, length, seed):
    """Edits behind each other, from somewhere in one of them on."""
    edits, rng = _edits(), random.Random(f"edit {drafted} {length} {seed}")
    number = rng.randrange(len(edits))
    found = edits[number][rng.randrange(len(edits[number])) :]
    while len(found) < length:
        number = (number + 1) % len(edits)
        found = found + edits[number]
    return [
        (_run(rng, drafted if same else 0.6, DEPTH), match, same)
        for match, same in found[:length]
    ]


def _run(rng, rate, most):
    run = 0
    while run < most and rng.random() < rate:
        run += 1
    return run


class RepeatingMachine:
    """A machine on which one controller drafts.

    Args:
        curve: Round times by K with a drafter; without, they are shorter by its steps.
        tracing: Plain rounds that the first round of a way takes on top.
        has_lookup: Whether drafts may come from the text.
        has_drafter: Whether they may come from a drafter.
        loses_traces: Whether each text needs rounds of another size.
    """

    def __init__(
        self,
        curve,
        *,
        tracing=0.0,
        has_lookup=True,
        has_drafter=True,
        loses_traces=False,
    ):
        step = _DRAFT_STEP[curve]
        self.costs = {False: CURVES[curve]}
        self.costs[True] = [c - step * k for k, c in enumerate(CURVES[curve])]
        prior = Prior(tuple(CURVES[curve]), 0.6, tuple(self.costs[True]))
        self.controller = DraftLengthController(prior)
        self.has_lookup, self.has_drafter = has_lookup, has_drafter
        self.tracing, self.loses_traces = tracing, loses_traces
        self.setup_s = PLAIN_S * max(tracing, 1.0)
        self.traced: set[tuple[bool, int]] = set()
        self.num_rounds = {False: 0, True: 0}

    def run(self, kind, length, seed):
        """Emit a text of a kind; the time that it took."""
        return self.emit(repeating_text(kind, length, seed), seed)

    def emit(self, places, seed):
        """Emit a text; the time that it took."""
        length, rng = len(places), random.Random(f"{seed}")
        controller = self.controller
        if self.loses_traces:
            self.traced.clear()
        controller.start()
        self._late: list[tuple[int, int, bool, float | None, int]] = []
        self._open: list[tuple[int, int]] = []
        self._known, self._match = 0, places[0][1]
        position, time = 0, 0.0
        while position < length:
            k, is_lookup = self._choose(length - self._known)
            took = self.costs[is_lookup][k]
            seconds = PLAIN_S * took * math.exp(rng.gauss(0, 0.03))
            if self.tracing and (is_lookup, k) not in self.traced:
                self.traced.add((is_lookup, k))
                took, seconds = took + self.tracing, None
            time += took
            self.num_rounds[is_lookup] += 1
            self._late.append((position, k, is_lookup, seconds, self._match))
            self._open.append((position, self._match))
            position += 1 + min(k, places[position][2 if is_lookup else 0])
            self._tell(places)
        return time

    def _choose(self, left):
        setups = {
            is_lookup: {
                k: self.setup_s
                for k in range(is_lookup, DEPTH + 1)
                if self.tracing and (is_lookup, k) not in self.traced
            }
            for is_lookup in (False, True)
        }
        allowed = range(DEPTH + 1) if self.has_drafter else (0,)
        if self.has_lookup:
            k = self.controller.choose_lookup(
                [self._match],
                drafter_allowed=allowed,
                setup_s=setups[True],
                drafter_setup_s=setups[False],
                tokens_left=left,
            )
            if k:
                return k, True
        k = self.controller.choose(
            allowed=allowed, setup_s=setups[False], tokens_left=left
        )
        return k, False

    def _tell(self, places):
        """Tell the controller of all rounds but the last."""
        while len(self._late) > 1:
            position, k, is_lookup, seconds, match = self._late.pop(0)
            drafted, _, same = places[position]
            accepted = min(k, same if is_lookup else drafted)
            if is_lookup:
                self.controller.observe_lookup(k, seconds)
            else:
                self.controller.observe(k, [accepted], seconds, matches=[match])
            self._known = position + 1 + accepted
            if self._known < len(places):
                self._match = places[self._known][1]
        while self._open and self._open[0][0] + DEPTH < self._known:
            position, match = self._open.pop(0)
            self.controller.lookup.observe(match, min(places[position][2], DEPTH))


def gain(curve, kind, *, tracing=0.0, num_seeds=8, length=600, num_before=1):
    """Time with the drafter alone over that with both sources, all texts together.

    Args:
        num_before: Texts of the kind that the process has emitted before.
    """
    times = {}
    for has_lookup in (False, True):
        times[has_lookup] = 0.0
        for seed in range(num_seeds):
            machine = RepeatingMachine(curve, tracing=tracing, has_lookup=has_lookup)
            for i in range(num_before):
                machine.run(kind, length, f"before {i} {seed}")
            times[has_lookup] += machine.run(kind, length, seed)
    return times[False] / times[True]
