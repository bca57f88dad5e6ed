"""Who chooses the number of drafts: one policy for each kind of batch.

Run: python -m pytest tests/drafting/test_policy.py
"""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext

from mlx_gemma_mtp.drafting.controller import DraftLengthController
from mlx_gemma_mtp.drafting.policy import DraftPolicy, Learning, Way


class Observed(DraftLengthController):
    """Notes what it is told."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.contexts = []
        self.matches = []

    def choose(self, *, context=0, **rest):
        self.contexts.append(context)
        return super().choose(context=context, **rest)

    def observe(self, num_draft_tokens, accepted, seconds, *, context=0, **rest):
        self.seen.append((num_draft_tokens, list(accepted), seconds, context))
        self.matches = rest["matches"]


def learnt(kinds, kept):
    def controller(num_seats, rule, context):
        kinds.append((num_seats, rule, context))
        return Observed()

    return Learning(
        controller, deque(), nullcontext(), keep=lambda: kept.append("kept")
    )


def test_a_fixed_number_is_the_next_smaller_one_that_is_allowed():
    policy = DraftPolicy(4)
    assert policy.for_batch(3, rule="greedy", context=9) is policy
    for allowed, expected in (((0, 2, 4), 4), ((0, 2, 8), 2), ((0,), 0)):
        way = policy.choose(allowed, not_ready=(), tokens_left=None)
        assert way == Way(expected)
    policy.observe(Way(4), [2], 0.1)  # nobody learns
    policy.observe_shadow(4, [2])
    policy.observe_setup(0.1)
    policy.finish()


def test_a_kind_of_batch_keeps_its_controller():
    kinds: list[tuple[int, str, int]] = []
    kept: list[str] = []
    policy = DraftPolicy(None, learning=learnt(kinds, kept))
    one = policy.for_batch(1, rule="greedy", context=5)
    two = policy.for_batch(2, rule="greedy", context=5)
    assert policy.for_batch(1, rule="greedy", context=700) is one
    assert policy.for_batch(1, rule="coupled", context=5) not in (one, two)
    assert kinds == [(1, "greedy", 5), (2, "greedy", 5), (1, "coupled", 5)]
    policy.finish()
    assert kept == ["kept"]


def test_rounds_of_a_fixed_number_teach_the_controller():
    controller = Observed()
    learning = Learning(
        lambda *kind: controller, deque(), nullcontext(), keep=lambda: None
    )
    policy = DraftPolicy(3, learning=learning).for_batch(1, rule="greedy", context=0)
    assert policy.choose((0, 3, 5), not_ready=(), tokens_left=None) == Way(3)
    policy.observe(Way(3), [1], 0.5, matches=[16], context=700)
    assert controller.seen == [(3, [1], 0.5, 700)]
    assert controller.matches == [16]


def test_a_controller_is_told_the_length_of_context():
    controller = Observed()
    learning = Learning(
        lambda *kind: controller, deque(), nullcontext(), keep=lambda: None
    )
    policy = DraftPolicy(None, learning=learning)
    policy = policy.for_batch(1, rule="greedy", context=300)
    for context in 300, 31_000:
        way = policy.choose((0, 4), not_ready=(), tokens_left=None, context=context)
        policy.observe(way, [0], 0.5, context=context)
    assert controller.contexts == [300, 31_000]
    assert [context for *_, context in controller.seen] == [300, 31_000]
