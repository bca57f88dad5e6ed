"""Block verification loses nothing: exact laws, edges by injected coins, and rules that
are wrong.

Exact means: every sequence of drafts is enumerated, and what the rule computes of each
(the chance of each prefix, the weights of the token behind it) is added up.

Run: python -m pytest tests/test_block_verification.py
"""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.sampling.acceptance import (
    Accepted,
    Draft,
    _chances,
    _Probabilities,
    _verdict,
    accept_block,
    accept_one_by_one,
    cut,
    expected_lengths,
)
from mlx_gemma_mtp.sampling.distribution import Distribution
from tests.sampling.test_distribution import chi_squared_bound

VOCAB = 3


def random_tree(chance, depth, sharpness):
    """The next token's distributions by prefix: for each length k, [V] * (k + 1)."""
    return [
        chance.dirichlet(np.full(VOCAB, sharpness), size=(VOCAB,) * length)
        for length in range(depth)
    ]


def followed(weights, tree):
    """Weights of prefixes, [V] * k, of all texts as long as a tree is deep."""
    for rows in tree[weights.ndim :]:
        weights = weights[..., None] * rows
    return weights


def spread(rows, *, is_whole, order=None):
    """Probabilities [B, L, V] as a distribution, whole or as a list in some order."""
    order = np.arange(VOCAB) if order is None else order
    ids = np.broadcast_to(order, rows.shape).astype(np.int32)
    probs = np.take_along_axis(rows, ids.astype(np.int64), axis=-1)
    with np.errstate(divide="ignore"):
        scores = np.log(probs).astype(np.float32)
    return Distribution(mx.array(scores), mx.array(ids), is_whole)


def law_of(verdict):
    """The law of the token behind the prefix, [B, V]."""
    ids = np.array(verdict.token_ids)[:, 0]
    weights = np.array(verdict.weights, dtype=np.float64)[:, 0]
    law = np.zeros((len(ids), VOCAB))
    np.put_along_axis(law, ids, weights, axis=1)
    return law / law.sum(axis=1, keepdims=True)


class Instance:
    """All sequences of K drafts as one batch, for a target and a drafter."""

    def __init__(
        self, seed, num_drafts, sharpness=0.7, *, is_whole=True, is_near=False
    ):
        chance = np.random.default_rng(seed)
        self.num_drafts = num_drafts
        self.target_tree = random_tree(chance, num_drafts + 1, sharpness)
        self.draft_tree = random_tree(chance, num_drafts, sharpness)
        if is_near:
            self.draft_tree = [
                0.9 * near + 0.1 * row
                for near, row in zip(self.target_tree, self.draft_tree, strict=False)
            ]
        self.drafts = list(product(range(VOCAB), repeat=num_drafts))
        lengths = range(num_drafts + 1)
        target = [[self.target_tree[i][x[:i]] for i in lengths] for x in self.drafts]
        draft = [[self.draft_tree[i][x[:i]] for i in lengths[:-1]] for x in self.drafts]
        order = None if is_whole else chance.permutation(VOCAB)
        self.target = spread(np.array(target), is_whole=is_whole, order=order)
        source = spread(
            np.array(draft), is_whole=False, order=chance.permutation(VOCAB)
        )
        self.draft = Draft(mx.array(self.drafts, dtype=mx.int32), source)
        self.draft_chances = followed(np.ones(()), self.draft_tree).ravel()

    def outcomes(self):
        """For every draft and length: its chance, and the law of what follows."""
        rows = _Probabilities.of(self.draft, self.target)
        reaches, chances = _chances(rows)
        won = np.array(chances, dtype=np.float64)
        for i in range(self.num_drafts + 1):
            chance = np.prod(1 - won[:, i:], axis=1) * (won[:, i - 1] if i else 1)
            accepted = mx.full((len(self.drafts),), i, dtype=mx.int32)
            verdict = _verdict(rows, accepted, reaches[:, i, None])
            yield i, chance, law_of(verdict)

    def outcomes_one_by_one(self):
        """The same of the textbook's rule."""
        rows = _Probabilities.of(self.draft, self.target)
        won = np.array(rows.target_of_drafts / rows.draft_of_drafts, dtype=np.float64)
        won = np.minimum(won, 1)
        for i in range(self.num_drafts + 1):
            lost = 1 - won[:, i] if i < self.num_drafts else 1
            accepted = mx.full((len(self.drafts),), i, dtype=mx.int32)
            verdict = _verdict(rows, accepted, mx.ones((len(self.drafts), 1)))
            yield i, np.prod(won[:, :i], axis=1) * lost, law_of(verdict)

    def law(self, outcomes):
        """The chance of every text of K + 1 tokens, [V] * (K + 1)."""
        K = self.num_drafts
        total = np.zeros((VOCAB,) * (K + 1))
        for i, chances, laws in outcomes:
            weights = (self.draft_chances * chances)[:, None] * laws
            by_draft = weights.reshape((VOCAB,) * (K + 1))
            # What follows the accepted prefix is not the draft's.
            total += followed(by_draft.sum(axis=tuple(range(i, K))), self.target_tree)
        return total

    def expected(self):
        """What it must be: the target's own."""
        return followed(np.ones(()), self.target_tree)

    def num_accepted(self):
        """The mean number of accepted drafts."""
        return sum(
            i * chances @ self.draft_chances for i, chances, _ in self.outcomes()
        )

    def num_accepted_one_by_one(self):
        """The same of token-by-token rejection, Leviathan et al. 2023."""
        mean, reached = 0.0, np.ones(())
        for target, draft in zip(self.target_tree, self.draft_tree, strict=False):
            reached = reached[..., None] * np.minimum(target, draft)
            mean += reached.sum()
        return mean


@pytest.mark.parametrize("is_near", [False, True])
@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("num_drafts", [1, 2, 3, 4])
def test_the_law_is_the_targets(num_drafts, is_whole, is_near):
    for seed in range(3):
        check_law(Instance(seed, num_drafts, is_whole=is_whole, is_near=is_near))


def test_the_law_is_the_targets_for_five_drafts():
    check_law(Instance(0, 5))


def check_law(instance):
    expected = instance.expected()
    for outcomes in (instance.outcomes(), instance.outcomes_one_by_one()):
        law = instance.law(outcomes)
        assert abs(law.sum() - 1) < 1e-5
        assert np.abs(law - expected).max() < 1e-6


@pytest.mark.parametrize("rule", [accept_block, accept_one_by_one])
def test_coins_decide_as_the_chances_say(rule):
    """What the laws above are made of is what the rules do, coin by coin."""
    instance = Instance(4, 3, is_near=True)
    chance = np.random.default_rng(0)
    coins = chance.random((len(instance.drafts), 3)).astype(np.float32)
    verdict = rule(instance.draft, instance.target, mx.array(coins))
    rows = _Probabilities.of(instance.draft, instance.target)
    ratio = np.array(rows.target_of_drafts) / np.array(rows.draft_of_drafts)
    won = coins < (np.array(_chances(rows)[1]) if rule is accept_block else ratio)
    lengths = [
        max([0, *(np.flatnonzero(row) + 1)])
        if rule is accept_block
        else np.cumprod(row).sum()
        for row in won
    ]
    assert verdict.num_accepted.tolist() == lengths
    assert 0 < np.mean(lengths) < 3


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_drafts=st.integers(1, 4),
    sharpness=st.sampled_from([0.1, 0.7, 3.0]),
    is_near=st.booleans(),
)
def test_never_fewer_than_one_by_one(seed, num_drafts, sharpness, is_near):
    instance = Instance(seed, num_drafts, sharpness, is_near=is_near)
    assert instance.num_accepted() >= instance.num_accepted_one_by_one() - 1e-5
    # The rule's own means of every draft, weighed by how often it is drawn.
    means = expected_lengths(instance.draft, instance.target)
    by_block, one_by_one = (np.array(m) @ instance.draft_chances for m in means)
    assert by_block == pytest.approx(instance.num_accepted(), abs=1e-4)
    assert one_by_one == pytest.approx(instance.num_accepted_one_by_one(), abs=1e-4)


def test_more_than_one_by_one_on_average():
    instances = [Instance(seed, 4, is_near=True) for seed in range(20)]
    gain = [i.num_accepted() / i.num_accepted_one_by_one() for i in instances]
    assert np.mean(gain) > 1.005


def of(rows):
    return spread(np.array(rows, dtype=np.float64)[None], is_whole=True)


def decide(tokens, draft, target, coins):
    """The accepted length, and what the token behind may be."""
    verdict = accept_block(
        Draft(mx.array([tokens]), of(draft)), of(target), mx.array([coins])
    )
    return verdict.num_accepted.item(), np.round(law_of(verdict)[0], 5).tolist()


HALF = [0.5, 0.5, 0.0]


class TestEdges:
    def test_equal_distributions_accept_everything(self):
        coins = [1 - 2.0**-24] * 2
        assert decide([0, 1], [HALF] * 2, [HALF] * 3, coins) == (2, HALF)

    def test_a_coin_at_its_chance_loses(self):
        """P_1 = 0.25 / 0.5, and h_1 is P_1 where one draft is all."""
        target = [[0.25, 0.75, 0.0], HALF]
        rows = _Probabilities.of(Draft(mx.array([[0]]), of([HALF])), of(target))
        chance = float(np.array(_chances(rows)[1])[0, 0])
        assert abs(chance - 0.5) < 1e-6
        below = float(np.nextafter(np.float32(chance), np.float32(0)))
        assert decide([0], [HALF], target, [chance]) == (0, [0.0, 1.0, 0.0])
        assert decide([0], [HALF], target, [below]) == (1, HALF)

    def test_what_the_target_cannot_say_is_never_accepted(self):
        target = [[0.0, 1.0, 0.0], HALF]
        assert decide([0], [HALF], target, [0.0]) == (0, [0.0, 1.0, 0.0])

    def test_a_later_draft_can_save_an_earlier_one(self):
        """The prefix counts, not the first draft that is lost."""
        target = [[0.5, 0.5, 0.0], [0.9, 0.1, 0.0], HALF]
        assert decide([0, 0], [HALF] * 2, target, [0.999, 0.0]) == (2, HALF)

    def test_an_empty_residual_is_the_targets_own(self):
        """No coin of a generator is 1; the token must be one the target can say."""
        target = [[0.0, 0.3, 0.7], HALF]
        assert decide([1], [[0.0, 0.3, 0.7]], target, [1.0]) == (0, target[0])

    def test_the_residual_leaves_out_what_was_proposed_enough(self):
        target = [[0.2, 0.5, 0.3], HALF]
        assert decide([0], [[0.6, 0.2, 0.2]], target, [0.9]) == (0, [0.0, 0.75, 0.25])


def sampled(num_rows, *, propose, rule=accept_block, is_shared=False):
    """Texts of two tokens by one draft, many times; the share of each first token."""
    chance = np.random.default_rng(1)
    target, draft = np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.2, 0.5])
    noise = chance.gumbel(size=(num_rows, 3)).astype(np.float32)
    tokens = propose(np.log(draft), noise)
    other = chance.gumbel(size=(num_rows, 3)).astype(np.float32)
    verdict = rule(
        Draft(
            mx.array(tokens[:, None].astype(np.int32)),
            spread(np.broadcast_to(draft, (num_rows, 1, 3)), is_whole=True),
        ),
        spread(np.broadcast_to(target, (num_rows, 2, 3)), is_whole=True),
        mx.array(chance.random((num_rows, 1)).astype(np.float32)),
    )
    with np.errstate(divide="ignore"):
        scores = np.log(np.array(verdict.weights)[:, 0])
    behind = np.argmax(scores + (noise if is_shared else other), axis=-1)
    first = np.where(np.array(verdict.num_accepted) == 1, tokens, behind)
    shares = np.bincount(first, minlength=3) / num_rows
    deviation = np.sqrt(target * (1 - target) / num_rows)
    return np.abs(shares - target) / deviation


def by_gumbel(logits, noise):
    return np.argmax(logits + noise, axis=-1)


class TestWrongRules:
    """Each is caught; the right one passes the same test (false alarm below 1e-5)."""

    NUM_ROWS = 200_000

    @pytest.mark.parametrize("rule", [accept_block, accept_one_by_one])
    def test_the_right_rules(self, rule):
        assert sampled(self.NUM_ROWS, propose=by_gumbel, rule=rule).max() < 5

    def test_the_most_likely_draft_under_the_softmax(self):
        def propose(logits, noise):
            return np.full(len(noise), np.argmax(logits))

        assert sampled(self.NUM_ROWS, propose=propose).max() > 50

    def test_the_proposals_noise_for_the_token_behind(self):
        found = sampled(self.NUM_ROWS, propose=by_gumbel, is_shared=True)
        assert found.max() > 6


def test_cut_blocks_follow_the_target():
    """Rows that accept one draft of three: 40,000 texts of a Markov chain's tokens.

    Chi-squared over the texts of 4 tokens, false alarm 1e-6.
    """
    rng = np.random.default_rng(0)
    num_texts, num_drafts, vocab_size, length = 40_000, 3, 3, 4
    target, drafter = rng.dirichlet(np.ones(vocab_size), size=(2, vocab_size))
    ids = np.arange(vocab_size, dtype=np.int32)
    last = np.zeros(num_texts, dtype=np.int64)
    texts: list[list[int]] = [[] for _ in range(num_texts)]

    def one_of(rows, size):
        given = mx.array(np.log(np.stack(rows, axis=1)).astype(np.float32))
        shape = (num_texts, size, vocab_size)
        return Distribution(given, mx.broadcast_to(mx.array(ids), shape), False)

    def choose(probs):
        sums = probs.cumsum(axis=1)
        return (sums < rng.random((num_texts, 1)) * sums[:, -1:]).sum(axis=1)

    most = mx.array(np.where(np.arange(num_texts) % 2, 1, num_drafts), mx.int32)
    while min(map(len, texts)) < length:
        before, drafts, sources = last, [], []
        for _ in range(num_drafts):
            sources.append(drafter[before])
            before = choose(drafter[before])
            drafts.append(before)
        block = mx.array(np.stack(drafts, axis=1).astype(np.int32))
        rows = [target[token] for token in (last, *drafts)]
        coins = mx.array(rng.random((num_texts, num_drafts)).astype(np.float32))
        verdict = accept_block(
            Draft(block, one_of(sources, num_drafts)),
            one_of(rows, num_drafts + 1),
            coins,
        )
        following = mx.array(
            choose(np.array(verdict.weights, dtype=np.float64)[:, 0])[:, None], mx.int32
        )
        accepted = cut(block, Accepted(verdict.num_accepted, following), most)
        counts = np.array(accepted.num_accepted)
        last = np.array(accepted.next_token)[:, 0].astype(np.int64)
        for row, text in enumerate(texts):
            text += [int(draft[row]) for draft in drafts[: counts[row]]]
            text.append(int(last[row]))
        assert (counts <= np.array(most)).all()
    for half in (0, 1):  # those of whole blocks, and those of cut ones
        found = np.zeros((vocab_size,) * length)
        for text in texts[half::2]:
            found[tuple(text[:length])] += 1
        expected = np.einsum("a,ab,bc,cd->abcd", target[0], target, target, target)
        expected *= found.sum()
        chi_squared = ((found - expected) ** 2 / expected).sum()
        assert chi_squared < chi_squared_bound(vocab_size**length - 1, 5e-7)
