"""The whole engine draws from the target's distribution, drafts accepted or not.

Run: python -m pytest tests/engine/test_distribution.py
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.constants import FULL
from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.models.drafter import DraftOutput
from mlx_gemma_mtp.models.target import Prefilled, TargetOutput
from mlx_gemma_mtp.sampling import graph as graph_module
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.sampling.test_distribution import chi_squared_bound
from tests.scripted import ScriptedTarget

NUM_ROWS, NUM_TOKENS = 120, 60  # 7,200 draws
TARGET_PROBS = np.array([0.35, 0.2, 0.15, 0.1, 0.1, 0.06, 0.03, 0.01])
DRAFT_PROBS = np.array([0.1, 0.3, 0.1, 0.2, 0.05, 0.05, 0.15, 0.05])


class FixedTarget(ScriptedTarget):
    """The same distribution at every position."""

    def __init__(self) -> None:
        super().__init__([[0]])

    def prefill(self, tokens, caches, sizes) -> Prefilled:
        filled = super().prefill(tokens, caches, sizes)
        shape = (len(sizes), 1, TARGET_PROBS.size)
        logits = mx.broadcast_to(mx.log(mx.array(TARGET_PROBS)), shape)
        return Prefilled(logits, filled.hidden, filled.caches)

    def verify(self, tokens, slabs, **kwargs) -> TargetOutput:
        logits = mx.broadcast_to(mx.log(mx.array(TARGET_PROBS)), (*tokens.shape, 8))
        return TargetOutput(logits, mx.zeros((*tokens.shape, 2)), slabs)


class FixedDrafter:
    """Another distribution at every position."""

    layer_types = (FULL,)

    def __call__(self, embedding, hidden, shared_kv, *, position) -> DraftOutput:
        logits = mx.broadcast_to(
            mx.log(mx.array(DRAFT_PROBS)), (*embedding.shape[:2], 8)
        )
        return DraftOutput(logits, None, hidden)


@cache
def draw(num_draft_tokens, **settings):
    """All tokens by row, and the decoder, the same for every test."""
    return draw_beside(num_draft_tokens, None, settings)


@cache
def draw_whole(num_draft_tokens, **settings):
    """The same, where no row draws from a list."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_module, "longest_list", lambda: 0)
        return draw_beside(num_draft_tokens, None, settings)


def draw_beside(num_draft_tokens, beside, settings, *, use_compile=False):
    """The same; ``beside``: settings of every other row."""
    rounds = Rounds(FixedTarget(), FixedDrafter(), use_compile=use_compile)
    requests = [
        Request(
            [3],
            NUM_TOKENS,
            SamplingParams(
                1.0,
                seed=1000 + row,
                **(settings if beside is None or row % 2 else beside),
            ),
        )
        for row in range(NUM_ROWS)
    ]
    decoder = Decoder(rounds, requests, num_draft_tokens=num_draft_tokens)
    rows: list[list[int]] = [[] for _ in range(NUM_ROWS)]
    for emissions in decoder.run():
        for emission in emissions:
            rows[emission.sequence.index] += emission.tokens
    return rows, decoder


def test_draws_follow_the_target():
    """Chi-squared over 8 tokens, false alarm 1e-6; the same text without drafts."""
    rows, decoder = draw(4)
    counts = np.bincount(np.concatenate(rows), minlength=8)
    expected = NUM_ROWS * NUM_TOKENS * TARGET_PROBS
    assert counts.sum() == NUM_ROWS * NUM_TOKENS
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < chi_squared_bound(7, 1e-6)
    # Both outcomes of a draft took part, hundreds of times each.
    assert 0.2 < decoder.stats.acceptance_rate < 0.8
    assert draw(0)[0] == rows


def test_compiled_rounds_draw_the_same():
    rows, _ = draw_beside(1, None, {"reproducible": False}, use_compile=True)
    assert rows == draw(1, reproducible=False)[0]


@pytest.mark.parametrize("num_draft_tokens", [1, 4])
def test_acceptance_is_that_of_coupled_draws(num_draft_tokens):
    """P(equal Gumbel maxima) = sum 1 / sum_j max(p_j / p_i, q_j / q_i).

    Source: Daliri et al. 2024, arXiv 2408.07978, lemma 4. Five standard deviations on
    the rate at position 1: false alarm below 1e-6.
    """
    _, decoder = draw(num_draft_tokens)
    ratios = np.maximum(
        TARGET_PROBS[None] / TARGET_PROBS[:, None],
        DRAFT_PROBS[None] / DRAFT_PROBS[:, None],
    )
    expected = (1 / ratios.sum(axis=1)).sum()
    rate = decoder.stats.acceptance_by_position[0]
    deviation = np.sqrt(expected * (1 - expected) / decoder.stats.rounds)
    assert abs(rate - expected) < 5 * deviation


def filtered(probs, *, top_k=0, top_p=1.0, min_p=0.0):
    """The textbook's filters, one after the other."""
    order = np.argsort(-probs, kind="stable")
    kept = np.zeros(len(probs), dtype=bool)
    mass = np.cumsum(probs[order]) - probs[order]
    kept[order] = mass < top_p - 1e-9
    kept = probs >= probs[kept].min()  # equals stay, as in mlx-lm
    kept &= probs >= min_p * probs.max()
    if top_k:
        kept[order[top_k:]] = False
    return np.where(kept, probs, 0) / probs[kept].sum()


def check_chi_squared(counts, probs):
    expected = counts.sum() * probs
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < chi_squared_bound(len(counts) - 1, 1e-6)


@pytest.mark.parametrize(
    ("is_whole", "num_draft_tokens", "settings"),
    [
        pytest.param(False, 1, {}, marks=pytest.mark.slow),
        (False, 4, {}),
        pytest.param(False, 4, {"top_k": 4}, marks=pytest.mark.slow),
        (False, 4, {"min_p": 0.2}),  # no list is drawn from here either
        (False, 4, {"top_k": 6, "top_p": 0.75}),
        (True, 4, {}),
        pytest.param(True, 4, {"top_k": 4}, marks=pytest.mark.slow),
        (True, 4, {"top_k": 6, "top_p": 0.75}),
    ],
    ids=str,
)
def test_block_verification_draws_from_the_target(is_whole, num_draft_tokens, settings):
    """Chi-squared over tokens and over pairs of neighbours, false alarm 1e-6 each."""
    how = draw_whole if is_whole else draw
    rows, decoder = how(num_draft_tokens, reproducible=False, **settings)
    probs = filtered(TARGET_PROBS, **settings)
    counts = np.bincount(np.concatenate(rows), minlength=8)
    assert not counts[probs == 0].any()
    check_chi_squared(counts[probs > 0], probs[probs > 0])
    # Pairs that do not overlap are independent; rare ones are counted together.
    pairs = np.bincount(np.array(rows).reshape(-1, 2) @ [8, 1], minlength=64)
    both = np.outer(probs, probs).ravel()
    is_rare = both * pairs.sum() < 20
    observed = np.append(pairs[~is_rare], pairs[is_rare].sum())
    expected = np.append(both[~is_rare], both[is_rare].sum())
    check_chi_squared(observed[expected > 0], expected[expected > 0])
    assert 0.1 < decoder.stats.acceptance_rate < 1


@pytest.mark.parametrize(
    ("settings", "beside"),
    [
        ({"top_k": 4}, {"top_p": 0.75}),
        ({"top_k": 6, "top_p": 0.75, "reproducible": True}, {"min_p": 0.2}),
    ],
)
def test_rows_that_draw_in_two_ways_keep_their_laws(settings, beside):
    """Lists and whole rows in one batch; chi-squared, false alarm 1e-6 each."""
    settings, beside = ({"reproducible": False, **s} for s in (settings, beside))
    rows, _ = draw_beside(3, beside, settings)
    for kind, found in ((beside, rows[::2]), (settings, rows[1::2])):
        filters = {k: v for k, v in kind.items() if k != "reproducible"}
        probs = filtered(TARGET_PROBS, **filters)
        counts = np.bincount(np.concatenate(found), minlength=8)
        assert not counts[probs == 0].any()
        check_chi_squared(counts[probs > 0], probs[probs > 0])


def test_block_verification_accepts_what_theory_says():
    """One draft: 1 - TV(p, q). Five standard deviations: false alarm below 1e-6."""
    _, decoder = draw(1, reproducible=False)
    expected = np.minimum(TARGET_PROBS, DRAFT_PROBS).sum()
    rate = decoder.stats.acceptance_by_position[0]
    deviation = np.sqrt(expected * (1 - expected) / decoder.stats.rounds)
    assert abs(rate - expected) < 5 * deviation


@pytest.mark.parametrize("num_draft_tokens", [1, 4])
def test_block_verification_accepts_more_than_coupling(num_draft_tokens):
    _, by_block = draw(num_draft_tokens, reproducible=False)
    _, coupled = draw(num_draft_tokens)
    assert by_block.stats.acceptance_length > coupled.stats.acceptance_length


def test_a_row_is_decided_alone():
    """Neighbours of every kind change nothing: not the rule, not the numbers."""

    def text(*rows):
        rounds = Rounds(FixedTarget(), FixedDrafter(), use_compile=False)
        requests = [Request([3], 20, params) for params in rows]
        found: list[list[int]] = [[] for _ in rows]
        for emissions in Decoder(rounds, requests, num_draft_tokens=3).run():
            for emission in emissions:
                found[emission.sequence.index] += emission.tokens
        return found

    by_block = SamplingParams(1.0, seed=5, reproducible=False)
    coupled, greedy = SamplingParams(0.7, seed=6), SamplingParams(0.0)
    listed = SamplingParams(1.0, top_k=3, seed=7, reproducible=False)
    xtc = replace(by_block, xtc_probability=0.5, xtc_special_tokens=(1, 2, 3))
    for rows in (
        (by_block, coupled, greedy, listed),
        (greedy, listed, by_block),  # nobody of the vocabulary's rows is coupled
        (listed, replace(listed, seed=8, reproducible=True), xtc, greedy),
    ):
        assert text(*rows) == [text(row)[0] for row in rows]


@pytest.mark.parametrize(
    ("num_draft_tokens", "reproducible"),
    [
        (0, True),
        (4, False),
        pytest.param(1, False, marks=pytest.mark.slow),
        pytest.param(4, True, marks=pytest.mark.slow),
    ],
)
def test_xtc_keeps_its_law_under_drafting(num_draft_tokens, reproducible):
    """Chi-squared over tokens and pairs of neighbours, false alarm 1e-6 each.

    A position's coin must be the same in every round: block verification looks at
    later rows before it rejects, and a coin tossed anew would favour some texts.
    """
    settings = {"xtc_probability": 0.5, "xtc_threshold": 0.12}
    rows, _ = draw(num_draft_tokens, reproducible=reproducible, **settings)
    top = TARGET_PROBS > 0.12
    struck = np.where(top & (TARGET_PROBS > TARGET_PROBS[top].min()), 0, TARGET_PROBS)
    probs = 0.5 * TARGET_PROBS + 0.5 * struck / struck.sum()
    check_chi_squared(np.bincount(np.concatenate(rows), minlength=8), probs)
    pairs = np.bincount(np.array(rows).reshape(-1, 2) @ [8, 1], minlength=64)
    both = np.outer(probs, probs).ravel()
    is_rare = both * pairs.sum() < 20
    observed = np.append(pairs[~is_rare], pairs[is_rare].sum())
    expected = np.append(both[~is_rare], both[is_rare].sum())
    check_chi_squared(observed[expected > 0], expected[expected > 0])


@pytest.mark.parametrize("temp", [1e-300, 1e-46, 1e-40, 1e-3])
def test_a_tiny_temperature_is_as_good_as_greedy(temp):
    """Also where float32 has no such number, and drafts are judged by block."""
    rounds = Rounds(FixedTarget(), FixedDrafter(), use_compile=False)
    request = Request([3], 50, SamplingParams(temp, seed=1, reproducible=False))
    decoder = Decoder(rounds, [request], num_draft_tokens=3)
    assert {t for found in decoder.run() for t in found[0].tokens} == {0}
