"""When rounds are started: measured, and of no influence on the text.

Run: python -m pytest tests/engine/test_early_start.py
"""

from __future__ import annotations

import random

import mlx.core as mx
import pytest

from mlx_gemma_mtp.constants import DRAFTER, LOOKUP
from mlx_gemma_mtp.drafting.policy import Way
from mlx_gemma_mtp.engine.decoder import Decoder
from mlx_gemma_mtp.engine.early_start import EarlyStart
from mlx_gemma_mtp.engine.request import Request
from mlx_gemma_mtp.pair.load import load_pair
from tests.tiny import reference_pair, uncompiled


def observed(early_start, *, early_s, late_s, count, noise=0.02):
    """Let rounds pass; how many were started early."""
    rng, num_early = random.Random(1), 0
    for _ in range(count):
        is_early = early_start.is_early
        num_early += is_early
        seconds = (early_s if is_early else late_s) * rng.gauss(1, noise)
        early_start.observe(4, seconds, is_early=is_early)
    return num_early


@pytest.mark.parametrize(
    ("early_s", "late_s", "is_early"),
    [(1.0, 1.1, True), (1.0, 1.0, False), (1.2, 1.0, False)],
)
def test_early_only_where_rounds_are_shorter(early_s, late_s, is_early):
    early_start = EarlyStart()
    assert early_start.is_early
    assert 0 < observed(early_start, early_s=early_s, late_s=late_s, count=48) < 48
    assert early_start.is_early == is_early
    later = observed(early_start, early_s=late_s, late_s=early_s, count=100)
    assert later == (100 if is_early else 0)  # decided


def test_numbers_of_drafts_are_not_compared_with_each_other():
    early_start = EarlyStart()
    for i in range(200):
        k = 0 if early_start.is_early else 4
        early_start.observe(k, 1.0 + k, is_early=early_start.is_early)
        assert early_start.is_early == (((i + 1) // 8) % 2 == 0)


def test_sources_of_drafts_are_not_compared_with_each_other():
    """Copies between other text, for as many rounds as rounds are started alike."""
    early_start = EarlyStart()
    for i in range(600):
        way = Way(2, LOOKUP if i // 20 % 2 else DRAFTER)
        seconds = (0.016 if way.source == LOOKUP else 0.022) * 1.1
        if early_start.is_early:
            seconds /= 1.1
        early_start.observe(way, seconds, is_early=early_start.is_early)
    assert early_start.is_early
    assert early_start._has_decided


class Late(EarlyStart):
    """Never early."""

    def __init__(self):
        super().__init__()
        self.is_early = False
        self.seen = []

    def observe(self, way, seconds, *, is_early):
        self.seen.append(is_early)


def decoded(decoder):
    """Each row's tokens, and the caches that it keeps."""
    texts: dict[int, list[int]] = {}
    caches = {}
    for emissions in decoder.run():
        for emission in emissions:
            texts.setdefault(emission.sequence.index, []).extend(emission.tokens)
            if emission.finish_reason:
                caches[emission.sequence.index] = emission.prompt_cache
    return texts, caches


def test_the_order_changes_no_text_and_no_cache():
    """With rounds as they are compiled, of a pair whose kernels others need too."""
    check_the_order(reference_pair(), [2, 5, 9, 11], [2, 434, 17])


def test_the_order_changes_nothing_where_drafts_are_accepted():
    with uncompiled():
        check_the_order(load_pair(), [2, 5, 9, 11], [2, 534, 17])


def check_the_order(pair, *prompts):
    """Decode early and late: the same texts and caches."""
    lengths = (34, 17)
    requests = [
        Request(prompt, length, keeps_cache=True)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    late = Late()
    (texts, caches), (others, other_caches) = (
        decoded(
            Decoder(pair.rounds, requests, num_draft_tokens=3, early_start=early_start)
        )
        for early_start in (EarlyStart(), late)
    )
    assert late.seen
    assert not any(late.seen)
    assert texts == others
    assert set(caches) == set(other_caches) == {0, 1}
    for index, cache in caches.items():
        assert cache
        for layer, other in zip(cache, other_caches[index] or (), strict=True):
            assert layer.offset == other.offset
            for one, two in zip(layer.state, other.state, strict=True):
                assert mx.array_equal(one, two)


def test_a_round_that_nobody_wants_is_never_started(monkeypatch):
    """Built before the last report was read, and dropped with it."""
    pair = reference_pair()
    started = []
    decoder = Decoder(
        pair.rounds,
        [Request([2, 5, 9, 11], 12, eos_token_ids=frozenset())],
        num_draft_tokens=0,
        early_start=Late(),
    )
    start = decoder._pipeline._start

    def counted(*, is_early):
        if (
            decoder._pipeline._in_flight
            and decoder._pipeline._in_flight[-1].queued.waiting
        ):
            started.append(is_early)
        start(is_early=is_early)

    monkeypatch.setattr(decoder._pipeline, "_start", counted)
    texts, _ = decoded(decoder)
    assert len(texts[0]) == 12
    assert len(started) == 11  # one a token behind the prompt's
