"""What the study of the drafter's own probabilities computes, against hand and brute.

Run: python -m pytest tests/scripts/test_confidence.py
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from mlx_gemma_mtp.constants import MAX_DRAFT_TOKENS
from mlx_gemma_mtp.generation.encoding import encode_text
from mlx_gemma_mtp.generation.tokens import draft_block
from mlx_gemma_mtp.pair.load import embedded_pair_path, load
from mlx_gemma_mtp.pair.pair import pair_of
from mlx_gemma_mtp.sampling.params import SamplingParams
from scripts.benchmarks.speed import own_tokens
from scripts.studies.confidence import made_up
from scripts.studies.confidence_blocks import Block, record
from scripts.studies.confidence_rules import (
    ChanceModel,
    Confident,
    Costs,
    auc,
    best_fixed,
    by_both,
    fitted,
    log_loss,
    play_fixed,
)
from tests.tiny import uncompiled

STEEP = Costs(0.0, tuple(map(float, range(2, 11))))


def told_all(seed):
    """A text whose drafter knows what stands."""
    rng = random.Random(seed)
    runs = [rng.choice([0, 1, 2, 4, 8]) for _ in range(300)]
    sure = [tuple(0.9999 if i < n else 0.0001 for i in range(8)) for n in runs]
    return [Block(*each) for each in zip(runs, sure, strict=True)]


def test_blocks_are_those_of_the_pair():
    """One behind every token, as others draft and decode there."""
    model, tokenizer = load(embedded_pair_path())
    pair, prompt = pair_of(model), encode_text(tokenizer, "1, 2, 3, 4, 5, 6, 7, ")
    with uncompiled():
        first, second = record(pair, [prompt, prompt[:-4]], SamplingParams(), 5)
        text = [int(token) for token in own_tokens(pair, prompt, 13, 0)]
        assert len(first) == len(second) == 4
        for place, block in enumerate(first, 1):
            drafts = draft_block(pair, [*prompt, *text[:place]], MAX_DRAFT_TOKENS)
            pairs = zip(drafts, text[place:], strict=False)
            stands = [*(one == other for one, other in pairs), False]
            assert block.num_accepted == stands.index(False)
            assert all(0 < prob <= 1 for prob in block.probs)
    assert len({block.num_accepted for block in first}) > 1


def test_auc_and_log_loss_by_hand():
    assert auc([0.1, 0.4, 0.4, 0.8], [False, True, False, True]) == 3.5 / 4
    assert auc([0.1, 0.2], [True, True]) == 0.5
    assert log_loss([0.5, 0.75], [True, False]) == pytest.approx(math.log(8) / 2)


def test_a_fit_gives_the_odds_that_were_counted():
    features = np.array([[1.0, x] for x in (0, 1) for _ in range(100_000)])
    hits = np.array([i % 10 < share for share in (3, 8) for i in range(100_000)])
    first, step = fitted(features, hits.astype(float))
    assert first == pytest.approx(math.log(3 / 7), abs=1e-3)
    assert first + step == pytest.approx(math.log(8 / 2), abs=1e-3)


def test_fixed_rounds_by_hand():
    text = [Block(n, (0.5,) * 8) for n in (2, 0, 8, 1)]
    played = play_fixed([text], Costs(0.1, (1.0, 1.5, 2.0, *[3.0] * 6)), 2)
    assert (played.tokens, played.rounds, played.verified) == (5, 2, 4)
    assert played.seconds == pytest.approx(2 * (2.0 + 0.2))


def test_who_knows_all_verifies_what_stands():
    """Every draft that stands is worth its row here, no other one is."""
    model = ChanceModel([told_all(1)], by_both)
    text = told_all(2)
    place, seconds, rounds = 0, 0.0, 0
    while place < len(text):
        seconds += STEEP.pass_s[text[place].num_accepted]
        rounds += 1
        place += 1 + text[place].num_accepted
    played = Confident(model).best_play([text], STEEP)
    assert played.rounds == rounds
    assert played.seconds == pytest.approx(seconds)
    dear = Confident(model, price_s=0.5).best_play([text], STEEP)
    assert dear.seconds == pytest.approx(seconds + 0.5 * rounds)


def test_where_verifying_is_flat_all_drafts_are_verified():
    flat = Costs(0.01, (1.0,) * 9)
    texts = [made_up(0.75, 1.5, 0.5, seed=seed) for seed in range(2)]
    played = Confident(ChanceModel(texts, by_both), 4).best_play(texts, flat)
    fixed = play_fixed(texts, flat, 4)
    assert played.verified == fixed.verified == 4 * fixed.rounds
    assert played.rate == pytest.approx(fixed.rate)


def test_made_up_texts_are_what_is_asked_for():
    """And who reads probabilities that say much gains where a row is dear."""
    texts = [made_up(0.75, 3.0, 0.1, seed=seed) for seed in range(6)]
    first = [block.num_accepted > 0 for text in texts for block in text]
    assert sum(first) / len(first) == pytest.approx(0.75, abs=0.05)
    probs = [block.probs[0] for text in texts for block in text]
    assert auc(probs, first) > 0.9
    model = ChanceModel(texts[:3], by_both)
    played = Confident(model, 4).best_play(texts[3:], STEEP)
    assert played.rate > 1.05 * best_fixed(texts[3:], STEEP).rate
