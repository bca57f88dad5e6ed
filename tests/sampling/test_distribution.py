"""Filters, noise and draws, against known answers, mlx-lm and exact probabilities.

Run: python -m pytest tests/sampling/test_distribution.py
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, apply_xtc

from mlx_gemma_mtp.engine.traces import Traces
from mlx_gemma_mtp.generation.tokens import generate_tokens
from mlx_gemma_mtp.sampling import graph as graph_module
from mlx_gemma_mtp.sampling.candidates import most_likely
from mlx_gemma_mtp.sampling.distribution import (
    choose_tokens,
    couple,
    distribution,
    draw,
    proposal,
)
from mlx_gemma_mtp.sampling.graph import sampling_arrays, sampling_graph
from mlx_gemma_mtp.sampling.noise import gumbel_noise, gumbel_of_bits, philox
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.tiny import SHORT, reference_pair, uncompiled

# Known answers of Random123 1.14, examples/kat_vectors, "philox4x32 10".
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


MLX_LM = tuple(int(part) for part in version("mlx-lm").split(".")[:2])


def choose(logits, params, *, positions=None):
    """choose_tokens for logits [B, L, M] as nested lists or an array."""
    logits = mx.array(logits)
    if positions is None:
        positions = mx.broadcast_to(mx.arange(logits.shape[1]), logits.shape[:2])
    return choose_tokens(
        logits,
        sampling_arrays(params),
        graph=sampling_graph(params),
        positions=positions,
    )


@pytest.mark.parametrize("use_compile", [False, True])
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected, use_compile):
    function = mx.compile(philox) if use_compile else philox
    words = function(
        tuple(mx.array([c], dtype=mx.uint32) for c in counter),
        tuple(mx.array([k], dtype=mx.uint32) for k in key),
    )
    assert [word.item() for word in words] == expected


def test_noise_depends_on_seed_position_and_token_alone():
    seed = mx.array([[7, 0], [7, 0], [8, 0], [7, 1]], dtype=mx.uint32)
    positions = mx.array([[3, 4], [4, 3], [3, 4], [3, 4]])
    ids = mx.broadcast_to(mx.arange(40), (4, 2, 40))
    noise = np.array(gumbel_noise(seed, positions, ids))
    np.testing.assert_array_equal(noise[0, 0], noise[1, 1])
    np.testing.assert_array_equal(noise[0, 1], noise[1, 0])
    for row, other in ((0, 2), (0, 3), (2, 3)):
        assert (noise[row] != noise[other]).all()
    assert (noise[0, 0] != noise[0, 1]).all()
    some = mx.array([[[39, 2, 17]]])
    alone = gumbel_noise(seed[:1], positions[:1, :1], some)
    np.testing.assert_array_equal(np.array(alone)[0, 0], noise[0, 0][[39, 2, 17]])


def test_noise_is_gumbel():
    """Kolmogorov-Smirnov at 2^18 draws; false alarm 1e-6 (bound 2.69 / sqrt(n))."""
    num_draws = 2**18
    ids = mx.broadcast_to(mx.arange(num_draws // 4), (1, 4, num_draws // 4))
    seed = mx.array([[12345, 6789]], dtype=mx.uint32)
    noise = np.sort(np.array(gumbel_noise(seed, mx.arange(4)[None], ids)).ravel())
    assert np.isfinite(noise).all()
    expected = np.exp(-np.exp(-noise.astype(np.float64)))
    ranks = np.arange(1, num_draws + 1) / num_draws
    distance = max(
        np.abs(ranks - expected).max(), np.abs(ranks - 1 / num_draws - expected).max()
    )
    # P(distance > d) <= 2 exp(-2 n d^2) (Dvoretzky-Kiefer-Wolfowitz, Massart).
    assert distance < np.sqrt(np.log(2 / 1e-6) / 2 / num_draws)


def test_noise_is_finite_for_every_word():
    """The extremes and their neighbours: an infinite noise would beat any logit."""
    words = [0, 1, 0x1FF, 0x200, 2**31, 0xFFFFFDFF, 0xFFFFFE00, 0xFFFFFF00, 0xFFFFFFFF]
    noise = np.array(gumbel_of_bits(mx.array(words, dtype=mx.uint32)))
    assert np.isfinite(noise).all()
    assert (np.diff(noise) >= 0).all()
    # The least and the most likely 2^-24 of a Gumbel variable.
    np.testing.assert_allclose(noise[0], -np.log(24 * np.log(2)), rtol=1e-3)
    np.testing.assert_allclose(noise[-1], 24 * np.log(2), rtol=1e-3)


@pytest.mark.parametrize("temp", [1e-40, 1e-20, 1e-6, 1e-3])
def test_a_tiny_temperature_is_greedy_among_equals(temp):
    """Equal logits share the draws, whatever their size; all others get none."""
    logits = mx.broadcast_to(mx.array([20.0, 30.0, 30.0, 29.0]), (1, 2000, 4))
    counts = np.bincount(
        np.array(choose(logits, [SamplingParams(temp, seed=1)]))[0], minlength=4
    )
    assert counts[0] == counts[3] == 0
    # 1,000 expected of 2,000 fair draws; five standard deviations, 6e-7.
    assert temp < 1e-30 or abs(counts[1] - 1000) < 5 * np.sqrt(500)


@pytest.mark.parametrize(
    "settings",
    [
        {"temp": np.float32(0.5), "seed": np.int64(5)},
        {"temp": Fraction(1, 2), "top_p": np.float64(0.9), "top_k": np.int32(3)},
    ],
)
def test_numbers_of_other_libraries(settings):
    params = SamplingParams(**settings)
    assert choose([[[0.0, 1.0, 2.0, 3.0]]], [params]).shape == (1, 1)


def filtered_by_mlx_lm(logits, params):
    """mlx-lm's own filters in its order; the kept tokens."""
    logprobs = mx.array(logits) - mx.logsumexp(mx.array(logits), axis=-1, keepdims=True)
    with uncompiled():  # else g++ compiles them for every number
        if 0 < params.top_p < 1:
            logprobs = apply_top_p(logprobs, params.top_p)
        if params.min_p:
            logprobs = apply_min_p(logprobs, params.min_p)
        if params.xtc_probability:
            special = list(params.xtc_special_tokens)
            logprobs = apply_xtc(logprobs, 1.0, params.xtc_threshold, special)
        if 0 < params.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, params.top_k)
    return set(np.flatnonzero(np.isfinite(np.array(logprobs)[0])).tolist())


@given(
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.5, 2.0, 8.0]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 63, 64, 1000]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    has_ties=st.booleans(),
)
def test_filters_keep_what_mlx_lm_keeps(seed, scale, top_p, top_k, min_p, has_ties):
    """Many draws at a high temperature reach every kept token and no other.

    A kept token of 64 stays unseen in 2,048 near-uniform draws with probability below
    64 exp(-2048 / 64 * 0.9) < 1e-10.
    """
    logits = np.random.default_rng(seed).normal(size=64).astype(np.float32) * scale
    # bfloat16 has many equals; only top-k cuts through them. mlx-lm's top-p did so
    # too before 0.32, which this package does not follow.
    if has_ties and MLX_LM >= (0, 32):
        logits = np.round(logits * 2) / 2 if not top_k else logits
    params = SamplingParams(1e4, top_p, top_k, min_p, seed=seed)
    drawn = choose(mx.broadcast_to(mx.array(logits), (1, 2048, 64)), [params])
    assert set(drawn[0].tolist()) == filtered_by_mlx_lm(logits[None], params)


@given(
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.5, 2.0, 8.0]),
    top_p=st.sampled_from([1.0, 0.5, 0.9]),
    top_k=st.sampled_from([0, 1, 5, 64]),
    min_p=st.sampled_from([0.0, 0.1]),
    threshold=st.sampled_from([0.0, 0.02, 0.1, 0.5]),
    special=st.sampled_from([(), (3,), (0, 1, 2, 3, 4, 5, 6, 7, 8)]),
)
def test_xtc_excludes_what_mlx_lm_excludes(
    seed, scale, top_p, top_k, min_p, threshold, special
):
    """As above; XTC strikes at every position."""
    logits = np.random.default_rng(seed).normal(size=16).astype(np.float32) * scale
    params = SamplingParams(
        1e4,
        top_p,
        top_k,
        min_p,
        seed=seed,
        xtc_probability=1.0,
        xtc_threshold=threshold,
        xtc_special_tokens=special,
    )
    drawn = choose(mx.broadcast_to(mx.array(logits), (1, 1024, 16)), [params])
    assert set(drawn[0].tolist()) == filtered_by_mlx_lm(logits[None], params)


@pytest.mark.parametrize("probability", [0.2, 0.5])
def test_xtc_strikes_as_often_as_asked(probability):
    """Five standard deviations over 20,000 positions: false alarm below 1e-6."""
    logits = mx.broadcast_to(mx.log(mx.array([0.6, 0.4])), (1, 20_000, 2))
    params = SamplingParams(
        1.0, seed=9, top_k=1, xtc_probability=probability, xtc_threshold=0.1
    )
    share = np.mean(np.array(choose(logits, [params])))
    deviation = np.sqrt(probability * (1 - probability) / 20_000)
    assert abs(share - probability) < 5 * deviation


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1.0, seed=5),
        SamplingParams(0.6, seed=6),
        SamplingParams(1.5, 0.9, seed=7),
        SamplingParams(1.0, 0.95, 8, seed=8),
        SamplingParams(0.8, 1.0, 0, 0.1, seed=9),
    ],
)
def test_draws_follow_softmax(params):
    """Chi-squared over 20,000 draws from 16 tokens; false alarm 1e-6 for each case."""
    logits = np.random.default_rng(0).normal(size=16) * 1.5
    kept = sorted(filtered_by_mlx_lm(logits.astype(np.float32)[None], params))
    weights = np.exp(logits[kept] / params.temp)
    expected = 20_000 * weights / weights.sum()
    drawn = choose(
        mx.broadcast_to(mx.array(logits.astype(np.float32)), (1, 20_000, 16)), [params]
    )
    counts = np.bincount(np.array(drawn)[0], minlength=16)
    assert counts.sum() == counts[kept].sum()
    statistic = ((counts[kept] - expected) ** 2 / expected).sum()
    assert statistic < chi_squared_bound(len(kept) - 1, 1e-6)


def chi_squared_bound(freedom, false_alarm):
    """A value exceeded with at most this probability (Laurent and Massart 2000)."""
    x = np.log(1 / false_alarm)
    return freedom + 2 * np.sqrt(freedom * x) + 2 * x


def test_successive_draws_are_independent():
    """Pairs of neighbours among 20,000 draws, chi-squared, false alarm 1e-6."""
    logits = mx.log(mx.array([0.1, 0.2, 0.3, 0.4]))
    params = [SamplingParams(1.0, seed=77)]
    drawn = choose(mx.broadcast_to(logits, (1, 20_000, 4)), params)[0].tolist()
    counts = np.zeros((4, 4))
    for pair in pairwise(drawn):
        counts[pair] += 1
    probs = np.array([0.1, 0.2, 0.3, 0.4])
    expected = 19_999 * np.outer(probs, probs)
    assert ((counts - expected) ** 2 / expected).sum() < chi_squared_bound(15, 1e-6)


@pytest.mark.parametrize("reproducible", [True, False])
@pytest.mark.parametrize("vocab_size", [64, 5000])
def test_a_tiny_top_p_keeps_the_best(vocab_size, reproducible):
    """Also where float32 has no such number; the vocabulary may be too long to list."""
    logits = np.random.default_rng(2).normal(size=(1, 2, vocab_size))
    params = SamplingParams(1.0, 1e-50, seed=1, reproducible=reproducible)
    chosen = choose(logits.astype(np.float32), [params])
    assert chosen.tolist() == logits.argmax(axis=-1).tolist()


def test_few_rounds_are_traced_for_many_settings():
    graphs = {sampling_graph([SamplingParams(1.0, top_k=k)]) for k in range(1, 513)}
    assert len(graphs) == 4


@given(
    values=st.lists(
        st.integers(-6, 6) | st.just(float("-inf")), min_size=2, max_size=40
    ).filter(lambda values: max(values) > -6),
    dtype=st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
    top_p=st.sampled_from([1.0, 0.371, 0.913]),
    top_k=st.sampled_from([0, 1, 2, 7, 39]),
    min_p=st.sampled_from([0.0, 0.02]),
    xtc=st.sampled_from([0.0, 1.0]),
    special=st.sampled_from([(), (0,), (1, 5, 5, 70)]),
)
def test_whole_rows_keep_what_lists_keep(
    values, dtype, top_p, top_k, min_p, xtc, special
):
    """Many equal ones too, through which only a top-k cuts."""
    logits = mx.array([[values, values[::-1]]]).astype(dtype) / 3
    params = SamplingParams(
        1.0,
        top_p,
        top_k,
        min_p,
        seed=1,
        xtc_probability=xtc,
        xtc_threshold=0.0377,
        xtc_special_tokens=special,
    )
    group = replace(sampling_graph([params]).groups[0], list_size=None)
    settings: dict[str, Any] = {
        "sampling": sampling_arrays([params]),
        "positions": mx.array([[3, 4]]),
    }
    whole = distribution(logits, group=group, **settings)
    listed = distribution(logits, group=replace(group, list_size=64), **settings)
    assert whole.is_whole
    assert not listed.is_whole
    kept = np.isfinite(np.array(listed.scores))
    wanted = np.zeros_like(kept)
    np.put_along_axis(wanted, np.array(listed.token_ids), kept, axis=-1)
    np.testing.assert_array_equal(np.isfinite(np.array(whole.scores)), wanted)


def test_a_graph_says_the_shapes_of_its_rows():
    """A trace is looked up by the graph: other shapes must be another graph."""
    shapes: dict[Any, Any] = {}
    xtc: dict[str, Any] = {"xtc_probability": 0.5, "seed": 1}
    for count in (0, 1, 2, 3, 4, 9, 16):
        params = [SamplingParams(1.0, xtc_special_tokens=range(count), **xtc)] * 2
        arrays = vars(sampling_arrays(params))
        found = {name: array.shape for name, array in arrays.items()}
        assert found["xtc_special_tokens"][-1] >= count
        assert shapes.setdefault(sampling_graph(params), found) == found
    assert len(shapes) == 4
    off = [SamplingParams(1.0, seed=1, xtc_special_tokens=range(9))]
    assert sampling_graph(off) == sampling_graph([SamplingParams(1.0, seed=1)])


@pytest.mark.parametrize("temp", [1e39, 1e300])
def test_a_temperature_beyond_float32_draws_evenly(temp):
    """And never what has no probability. Five standard deviations, 6e-7."""
    logits = mx.broadcast_to(mx.array([-mx.inf, 30.0, 0.0, -mx.inf]), (1, 2000, 4))
    cases: list[dict[str, Any]] = [
        {},
        {"top_k": 3},
        {"top_p": 0.5, "xtc_probability": 1.0},
    ]
    for settings in cases:
        params = SamplingParams(temp, seed=1, **settings)
        counts = np.bincount(np.array(choose(logits, [params]))[0], minlength=4)
        assert counts[0] == counts[3] == 0
        if "top_p" in settings:
            assert counts[1] == 2000
        else:
            assert abs(counts[1] - 1000) < 5 * np.sqrt(500)


def test_greedy_takes_the_first_of_equals():
    assert choose([[[0.0, 2.0, 2.0, 1.0]]], [SamplingParams()]).tolist() == [[1]]


def propose(logits, params, *, token_ids=None):
    """proposal() for logits [B, L, M], one position after the other."""
    logits = mx.array(logits)
    positions = mx.broadcast_to(mx.arange(logits.shape[1]), logits.shape[:2])
    rows = sampling_arrays(params)
    source = proposal(
        logits,
        rows,
        group=sampling_graph(params).of_drafts,
        positions=positions,
        token_ids=token_ids,
    )
    return source, couple(source, rows, positions=positions)


def test_a_draw_depends_on_ids_not_on_their_order():
    """The drafter's candidate list and the target's vocabulary get the same noise."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(1, 500, 64)).astype(np.float32)
    order = np.stack([rng.permutation(64) for _ in range(500)])[None]
    params = [SamplingParams(1.0, seed=4)]
    dense = choose(logits, params)
    listed = np.take_along_axis(logits, order, -1)
    _, drafts = propose(listed, params, token_ids=mx.array(order))
    assert dense.tolist() == drafts.tolist()


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_k": 500}, {"top_p": 0.6}])
def test_a_proposal_is_a_short_list(filters):
    logits = np.random.default_rng(3).normal(size=(1, 20, 300)).astype(np.float32) * 3
    source, drafts = propose(logits, [SamplingParams(1.0, seed=4, **filters)])
    assert source.token_ids.shape[-1] == 64
    best = np.argsort(-logits, axis=-1, kind="stable")
    ids = np.array(source.token_ids)
    assert (ids == best[..., : ids.shape[-1]]).all()
    probs = np.array(source.probs)
    np.testing.assert_allclose(probs.sum(axis=-1), 1, rtol=1e-6)
    kept = probs > 0
    assert (kept.sum(axis=-1) <= filters.get("top_k", 64)).all()
    if "top_p" in filters:
        assert (kept.sum(axis=-1) < 64).any()
    where = ids == np.array(drafts)[..., None]
    assert (where.sum(axis=-1) == 1).all()
    assert kept[where].all()


@given(
    values=st.lists(
        st.floats(-50, 50, width=16) | st.just(float("-inf")), min_size=1, max_size=40
    ),
    count=st.integers(1, 40),
    dtype=st.sampled_from([mx.float32, mx.float16, mx.bfloat16]),
)
def test_the_most_likely_tokens(values, count, dtype):
    """By the logit, equal ones by the id; zeros of both signs are two numbers."""
    logits = mx.array(values).astype(dtype)[None, None]
    count = min(count, len(values))
    found = most_likely(logits, count)
    exact = np.array(logits.astype(mx.float32))[0, 0]
    order = sorted(
        range(len(exact)), key=lambda i: (-exact[i], not np.signbit(-exact[i]), i)
    )
    assert found.token_ids[0, 0].tolist() == order[:count]
    np.testing.assert_array_equal(np.array(found.logits)[0, 0], exact[order[:count]])


def test_equal_logits_at_the_border_of_top_k_go_by_id():
    logits = mx.array([[[0.0, 1.0, 1.0, 1.0, 2.0, 1.0]]])
    assert most_likely(logits, 3).token_ids.tolist() == [[[4, 1, 2]]]


@pytest.mark.parametrize(
    ("uniform", "expected"),
    [(2.0**-24, 1), (0.25, 1), (0.5, 3), (0.4999999, 1), (1 - 2.0**-24, 3)],
)
def test_draws_at_the_edges(uniform, expected):
    """Candidates without weight are never drawn, whatever the number."""
    weights = mx.array([[[0.0, 0.3, 0.0, 0.3, 0.0]]])
    assert draw(weights, mx.array([[uniform]])).item() == expected


@pytest.mark.parametrize("longest", [64, 1024])
def test_rows_keep_their_own_settings(longest, monkeypatch):
    """A mixed batch draws for each row what the row draws alone."""
    monkeypatch.setattr(graph_module, "longest_list", lambda: longest)
    xtc: dict[str, Any] = {"xtc_probability": 0.7, "xtc_threshold": 0.02}
    params = [
        SamplingParams(),
        SamplingParams(1.0, seed=1),
        SamplingParams(0.7, top_k=5, seed=2),
        SamplingParams(1.3, top_p=0.8, seed=1),
        SamplingParams(1.0, 0.9, 20, 0.05, seed=3),
        SamplingParams(1.0, 0.99, 80, seed=4),
        SamplingParams(1.0, seed=5, **xtc),
        SamplingParams(1.2, 0.9, 3, seed=6, xtc_special_tokens=(1, 2, 3), **xtc),
    ]
    logits = np.random.default_rng(1).normal(size=(len(params), 100, 90)) * 2
    logits = logits.astype(np.float32)
    together = choose(logits, params)
    for i, row in enumerate(params):
        assert choose(logits[i : i + 1], [row]).tolist()[0] == together[i].tolist()


SETTINGS = [
    {"temp": 1.0},
    {"temp": 1.0, "top_k": 64, "top_p": 0.95},  # Gemma's own
    {"temp": 0.7, "min_p": 0.05},
]
PROMPTS = [[2, 17, 300, 45], list(range(40, 70)), [9]]


@pytest.mark.parametrize(
    ("family", "settings", "lengths"),
    [
        (SHORT, SETTINGS[1], [1, 4, 8]),
        pytest.param(SHORT, SETTINGS[1], range(1, 9), marks=pytest.mark.slow),
        ("26b-a4b", SETTINGS[1], [4]),
        *(
            pytest.param(family, SETTINGS[1], [4], marks=pytest.mark.slow)
            for family in ("e2b", "e4b", "12b", "31b")
        ),
        (SHORT, SETTINGS[0], [8]),
        ("e2b", SETTINGS[2], [3]),
    ],
)
def test_text_of_a_seed_does_not_depend_on_drafting(
    family, settings, lengths, monkeypatch
):
    """Identical for every K, alone and in a batch."""
    pair = reference_pair(family)
    monkeypatch.setattr(pair.rounds, "use_compile", False)
    monkeypatch.setattr(pair.rounds, "_traces", Traces())

    def decode(prompt, num_draft_tokens):
        return list(
            generate_tokens(
                pair,
                prompt,
                max_tokens=10,
                num_draft_tokens=num_draft_tokens,
                seed=11,
                eos_token_ids=(),
                **settings,
            )
        )

    alone = [decode(prompt, 0) for prompt in PROMPTS]
    assert len(set(alone[0])) > 4  # sampled, not stuck
    for num_draft_tokens in lengths:
        assert decode(PROMPTS[0], num_draft_tokens) == alone[0]
    rows = zip(*decode(PROMPTS, 5), strict=True)
    assert [list(row) for row in rows] == alone


@pytest.mark.parametrize(
    "settings",
    [
        {"temp": 1e300},
        {"top_p": 1e-300, "top_k": 2**31 - 1},
        {"xtc_probability": 1.0, "xtc_threshold": 0.0},
        {
            "xtc_probability": 0.5,
            "xtc_threshold": 0.0,
            "xtc_special_tokens": range(0, 600, 2),
            "top_k": 70,
        },
    ],
    ids=str,
)
def test_settings_at_the_edge_draw_the_same_with_drafts(settings, monkeypatch):
    pair = reference_pair()
    monkeypatch.setattr(pair.rounds, "use_compile", False)
    settings = {"temp": 1.0, "seed": 2**64 - 1, "eos_token_ids": (), **settings}
    plain, drafted = (
        list(
            generate_tokens(
                pair, PROMPTS[0], max_tokens=8, num_draft_tokens=k, **settings
            )
        )
        for k in (0, 3)
    )
    assert plain == drafted


def test_seeds_differ_and_fresh_ones_are_drawn(monkeypatch):
    pair = reference_pair()
    monkeypatch.setattr(pair.rounds, "use_compile", False)
    monkeypatch.setattr(pair.rounds, "_traces", Traces())

    def decode(seed):
        return list(
            generate_tokens(
                pair, PROMPTS[0], max_tokens=12, temp=1.0, seed=seed, eos_token_ids=()
            )
        )

    assert decode(1) == decode(1)
    # Two texts of 12 nearly uniform tokens of 512 agree with probability < 1e-30.
    assert decode(1) != decode(2)
    assert decode(None) != decode(None)
    assert decode(2**64 - 1) != decode(2**32 - 1)
