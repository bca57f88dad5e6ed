"""Rows that may not choose every token: their text, their law, what is forced.

Run: python -m pytest tests/engine/test_masked.py
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.drafting.policy import DraftPolicy, Way
from mlx_gemma_mtp.engine import runner as runner_module
from mlx_gemma_mtp.engine.decoder import Decoder
from mlx_gemma_mtp.engine.masked import proposed_tokens
from mlx_gemma_mtp.engine.request import Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.engine.sequence import TokenSequence
from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.sampling.masks import BlockMasks
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.engine.test_distribution import (
    TARGET_PROBS,
    FixedDrafter,
    FixedTarget,
    check_chi_squared,
)
from tests.tiny import VOCAB_SIZE, reference_pair

LATE = 999  # a place that no text reaches


class Allowing:
    """Lets a row choose some tokens, by the one before: a constraint and its masks.

    Args:
        allowed: For each token those that may follow it; all others follow the rest.
        forced: What follows a token for certain, or perhaps.
        vocab_size: Ids that masks have.
        fails_at: How many tokens of a row can be followed.
    """

    def __init__(
        self,
        allowed: Mapping[int, Sequence[int]],
        forced: Mapping[int, Sequence[int]] | None = None,
        *,
        vocab_size: int = 8,
        fails_at: int = LATE,
    ) -> None:
        self.allowed, self.forced = allowed, forced or {}
        self.vocab_size, self.fails_at = vocab_size, fails_at
        self._masks: dict[int, np.ndarray] = {}

    def row(self, prompt: Sequence[int], ends: Collection[int]) -> _Row:
        return _Row(self, prompt[-1])

    def processor(self, prompt: Sequence[int], ends: Collection[int]) -> Any:
        return self.banned

    def mask(self, last: int) -> np.ndarray:
        """Which ids may follow a token, bool [V]."""
        if last not in self._masks:
            ids = np.arange(self.vocab_size)
            allowed = self.allowed.get(last)
            self._masks[last] = ids >= 0 if allowed is None else np.isin(ids, allowed)
        return self._masks[last]

    def banned(self, history: mx.array, logits: mx.array) -> mx.array:
        """As a logits processor: the textbook's way."""
        (last,) = cast(list[int], history[-1:].tolist())
        return mx.where(mx.array(self.mask(last)), logits, -mx.inf)


class _Row:
    def __init__(self, rules: Allowing, last: int) -> None:
        self.rules, self.last, self.num_seen = rules, last, 0

    def advance(self, token: int) -> None:
        assert self.rules.mask(self.last)[token], "a token that is not allowed"
        self.last, self.num_seen = token, self.num_seen + 1
        if self.num_seen >= self.rules.fails_at:
            raise RequestError("the row must end here: got more.")

    def block(self, drafts: Sequence[int]) -> BlockMasks:
        rules, last, words, forced = self.rules, self.last, [], []
        for token in [*drafts, -1]:
            bits = np.packbits(rules.mask(last), bitorder="little")
            room = -bits.size % 4
            words.append(np.pad(bits, (0, room)).view(np.uint32))
            forced.append(list(rules.forced.get(last, ())))
            if token < 0 or not rules.mask(last)[token]:
                break
            last = token
        num_free = len(drafts) + 1 - len(words)
        words += [np.full_like(words[0], 0xFFFFFFFF)] * num_free
        return BlockMasks(np.stack(words), [*forced, *[[]] * num_free])


def decode(rounds, requests, num_draft_tokens, **settings):
    """The tokens of each row, and the decoder."""
    decoder = Decoder(rounds, requests, num_draft_tokens=num_draft_tokens, **settings)
    rows = [list[int]() for _ in requests]
    for emissions in decoder.run():
        for emission in emissions:
            emission.check()
            rows[emission.sequence.index] += emission.tokens
    return rows, decoder


# What may follow; after 1 comes 2 alone, after 2 comes 3 alone.
CHAIN = {0: [0, 1, 4], 1: [2], 2: [3], 3: [0, 1, 5, 6], 4: [0, 7], 7: [1, 6]}
KNOWN = {1: [2, 3], 2: [3]}
# Some of what is said to be forced may be something else.
GUESSED = {
    0: [0, 1, 1, 1],
    1: [2, 3, 0, 0],
    2: [3, 0, 0, 1],
    3: [0, 1, 4, 4],
    4: [0, 0, 1, 2],
    5: [0, 1, 2, 3],
    6: [0, 0, 0, 0],
    7: [1, 2, 3, 5],
}


class ListingDrafter:
    """A drafter that scores few tokens: proposals of others are not among them."""

    layer_types = FixedDrafter.layer_types

    def __call__(self, embedding, hidden, shared_kv, *, position):
        output = FixedDrafter()(embedding, hidden, shared_kv, position=position)
        ids = mx.broadcast_to(mx.array([3, 6, 1]), (*embedding.shape[:2], 3))
        logits = mx.take_along_axis(output.logits, ids, axis=-1)
        return replace(output, logits=logits, token_ids=ids.astype(mx.int32))


NUM_ROWS, NUM_TOKENS = 80, 50


@cache
def draw(
    num_draft_tokens,
    reproducible,
    top_k=0,
    *,
    with_guesses=True,
    look_ahead=True,
    drafter=FixedDrafter,
):
    """All tokens by row, and the decoder, the same for every test."""
    constraint = Allowing(CHAIN, GUESSED if with_guesses else KNOWN)
    requests = [
        Request(
            [3],
            NUM_TOKENS,
            SamplingParams(1.0, seed=row, reproducible=reproducible, top_k=top_k),
            constraint=constraint,
        )
        for row in range(NUM_ROWS)
    ]
    rounds = Rounds(FixedTarget(), drafter(), use_compile=False)
    return decode(rounds, requests, num_draft_tokens, look_ahead=look_ahead)


class TestLaw:
    """What is drawn follows the masked target, given the token before."""

    @pytest.mark.parametrize(
        ("num_draft_tokens", "top_k", "settings"),
        [
            (0, 0, {}),
            (1, 0, {}),
            (4, 7, {}),
            (4, 0, {"look_ahead": False}),  # whole guesses are proposed
            (4, 0, {"drafter": ListingDrafter}),
        ],
    )
    def test_is_that_of_the_masked_target(self, num_draft_tokens, top_k, settings):
        """Chi-squared behind each token, false alarm 1e-6 each."""
        rows, _ = draw(num_draft_tokens, not num_draft_tokens, top_k, **settings)
        rules = Allowing(CHAIN)
        pairs = np.zeros((8, 8))
        for row in rows:
            np.add.at(pairs, (np.array([3, *row[:-1]]), np.array(row)), 1)
        assert pairs.sum() == NUM_ROWS * NUM_TOKENS
        for last in range(8):
            probs = np.where(rules.mask(last), TARGET_PROBS, 0)
            kept = np.argsort(-probs)[: top_k or 8]
            probs = np.where(np.isin(np.arange(8), kept), probs, 0)
            assert not pairs[last][probs == 0].any()
            probs = probs / probs.sum()
            is_rare = probs * pairs[last].sum() < 8
            if is_rare.all() or (probs == 1).any():
                continue
            check_chi_squared(
                np.append(pairs[last][~is_rare], pairs[last][is_rare].sum()),
                np.append(probs[~is_rare], probs[is_rare].sum() or 1e-9),
            )

    def test_drafts_change_no_text_of_a_seed(self):
        assert draw(4, True)[0] == draw(0, True)[0]

    def test_what_is_forced_stands(self):
        """The drafter alone would guess some of it: proposals that are sure do more."""
        _, with_proposals = draw(4, False, with_guesses=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                runner_module,
                "proposed_tokens",
                lambda rows, count, **_: mx.full((len(rows), 9, 1 + count), -1),
            )
            _, without = draw.__wrapped__(4, False, with_guesses=False)
        gain = with_proposals.stats.acceptance_length / without.stats.acceptance_length
        assert gain > 1.05


@pytest.fixture(scope="module")
def pair():
    return reference_pair()


# Rules over a vocabulary, made once: a third of it behind most tokens, one token behind
# some.
@cache
def rules():
    chance = np.random.default_rng(5)
    allowed = {
        token: chance.choice(VOCAB_SIZE, VOCAB_SIZE // 3, replace=False).tolist()
        for token in range(VOCAB_SIZE)
        if token % 4
    }
    single = range(1, VOCAB_SIZE, 3)
    allowed |= {t: [int(chance.integers(VOCAB_SIZE))] for t in single}
    forced = {}
    for token in single:
        run = [allowed[token][0]]
        while run[-1] in single and len(run) < 12:
            run.append(allowed[run[-1]][0])
        forced[token] = run
    return Allowing(allowed, forced, vocab_size=VOCAB_SIZE)


GREEDY, SEEDED = SamplingParams(), SamplingParams(temp=1.5, seed=4)
LISTED = SamplingParams(temp=1.5, seed=5, top_k=40, top_p=0.9)


def masked(sampling=SEEDED, prompt=(2, 40, 41), max_tokens=16, **settings):
    settings = {"constraint": rules(), **settings}
    return Request(list(prompt), max_tokens, sampling, **settings)


def kinds():
    """Rows of all kinds; a caller's function decides the last one."""
    return [
        masked(prompt=(2, 50)),
        Request([2, 51], 9, SEEDED),
        masked(GREEDY, num_logprobs=2, max_draft_tokens=1),
        Request([2, 52], 16, LISTED),
        masked(LISTED, prompt=(2, 53), max_tokens=20),
        masked(prompt=(2, 54), logits_processors=(lambda _, logits: logits,)),
    ]


@cache
def kinds_alone():
    """The text of each of them alone."""
    rounds = reference_pair().rounds
    return [decode(rounds, [request], 0)[0][0] for request in kinds()]


@pytest.mark.usefixtures("plain_graphs")
class TestText:
    """Greedy or with a seed a text is that of plain decoding behind a ban."""

    @pytest.mark.parametrize("sampling", [GREEDY, SEEDED, LISTED], ids=str)
    def test_is_that_of_a_processor(self, pair, sampling):
        request = masked(sampling)
        textbook = replace(
            request, constraint=None, logits_processors=(rules().banned,)
        )
        (expected,), _ = decode(pair.rounds, [textbook], 0)
        for num_draft_tokens, look_ahead in (
            (0, True),
            (1, True),
            (4, False),
            (8, True),
        ):
            (text,), decoder = decode(
                pair.rounds, [request], num_draft_tokens, look_ahead=look_ahead
            )
            assert text == expected
        assert decoder.stats.accepted > 0

    @pytest.mark.parametrize("num_draft_tokens", [0, 3])
    def test_rows_of_all_kinds_stand_beside_each_other(self, pair, num_draft_tokens):
        """Also where a caller's function decides one of them."""
        for places in ((0, 1, 2, 3, 4), (0, 1, 2, 5, 4)):
            batch = [kinds()[place] for place in places]
            texts, _ = decode(pair.rounds, batch, num_draft_tokens)
            assert texts == [kinds_alone()[place] for place in places]

    def test_log_probabilities_are_behind_the_mask(self, pair):
        request = masked(num_logprobs=3)
        textbook = replace(
            request, constraint=None, logits_processors=(rules().banned,)
        )

        def reported(request, num_draft_tokens):
            decoder = Decoder(pair.rounds, [request], num_draft_tokens=num_draft_tokens)
            return [
                entry
                for emissions in decoder.run()
                for emission in emissions
                for entry in emission.logprobs
            ]

        expected = reported(textbook, 0)
        for found in (reported(request, 0), reported(request, 4)):
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                assert one.token == pytest.approx(other.token, abs=1e-4)
                assert [t for t, _ in one.top] == [t for t, _ in other.top]

    def test_compiled_rounds_write_the_same(self, pair):
        request = masked(LISTED)
        (plain,), _ = decode(pair.rounds, [request], 2)
        target, drafter = pair.rounds.target, pair.rounds.drafter
        compiled = Rounds(target, drafter, use_compile=True)
        assert decode(compiled, [request], 2)[0] == [plain]


@pytest.mark.usefixtures("plain_graphs")
class TestComingAndGoing:
    def test_rows_join_and_leave(self, pair):
        """Masked ones among free ones, while others decode."""
        requests = [
            Request([2, 60], 30, SEEDED),
            masked(prompt=(2, 61), max_tokens=12),
            masked(LISTED, prompt=(2, 62), max_tokens=25),
            Request([2, 63], 8),
            masked(GREEDY, prompt=(2, 64), max_tokens=16),
        ]
        alone = [decode(pair.rounds, [request], 0)[0][0] for request in requests]
        decoder = Decoder(pair.rounds, num_draft_tokens=3, max_rows=3)
        texts, waiting = [list[int]() for _ in requests], list(requests)
        for step in range(200):
            if waiting and step % 2 == 0:
                decoder.add(waiting.pop(0))
            for output in decoder.step().outputs:
                output.check()
                texts[output.sequence.index] += output.tokens
            if decoder.is_idle and not waiting:
                break
        assert texts == alone

    def test_its_caches_go_on(self, pair):
        """What a masked row leaves holds its text: as a free row's does."""
        request = masked(max_tokens=11, keeps_cache=True)
        decoder = Decoder(pair.rounds, [request], num_draft_tokens=3)
        outputs = [o for emissions in decoder.run() for o in emissions]
        tokens = [t for output in outputs for t in output.tokens]
        caches = outputs[-1].prompt_cache
        assert caches is not None
        assert caches[0].offset == len(request.prompt) + len(tokens)
        behind = Request([7], 6, GREEDY)
        whole = Request([*request.prompt, *tokens, 7], 6, GREEDY)
        (text,), _ = decode(pair.rounds, [behind], 0, prompt_caches=[caches])
        assert [text] == decode(pair.rounds, [whole], 0)[0]

    @pytest.mark.parametrize("num_draft_tokens", [0, 3])
    @pytest.mark.parametrize("fails_at", [1, 5])
    def test_one_that_cannot_go_on_ends_alone(self, pair, num_draft_tokens, fails_at):
        failing = Allowing(
            rules().allowed, rules().forced, vocab_size=VOCAB_SIZE, fails_at=fails_at
        )
        requests = [
            Request([2, 60], 12, SEEDED),
            masked(constraint=failing),
            masked(prompt=(2, 61), max_tokens=12),
        ]
        alone = {i: decode(pair.rounds, [requests[i]], 0)[0][0] for i in (0, 2)}
        decoder = Decoder(pair.rounds, requests, num_draft_tokens=num_draft_tokens)
        texts, errors = [list[int]() for _ in requests], []
        for emissions in decoder.run():
            for emission in emissions:
                index = emission.sequence.index
                texts[index] += emission.tokens
                if emission.error is not None:
                    errors.append((index, emission.finish_reason, emission.error))
        ((index, reason, error),) = errors
        assert (index, reason) == (1, "error")
        assert "must end here" in str(error)
        assert len(texts[1]) >= fails_at
        assert {i: texts[i] for i in alone} == alone


class Straight:
    """A drafter's place, taken by one that never guesses right."""

    layer_types = FixedDrafter.layer_types

    def __call__(self, embedding, hidden, shared_kv, *, position):
        output = FixedDrafter()(embedding, hidden, shared_kv, position=position)
        return replace(output, logits=mx.arange(8) + 0 * output.logits)


# Tokens that follow each other in a circle, each for certain.
ORDER = [3, 0, 1, 2, 4, 5, 6]
FOLLOWING = dict(zip(ORDER, [*ORDER[1:], ORDER[0]], strict=True))


def circle():
    """Lets a row write the circle alone."""
    forced = {}
    for token in ORDER:
        run = [FOLLOWING[token]]
        while len(run) < 9:
            run.append(FOLLOWING[run[-1]])
        forced[token] = run
    return Allowing({t: [n] for t, n in FOLLOWING.items()}, forced)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(1.0)], ids=["greedy", ""])
def test_a_forced_text_takes_the_fewest_rounds(sampling):
    """K + 1 tokens a round, whatever the drafter says; the first is the prompt's."""
    rounds = Rounds(FixedTarget(), Straight(), use_compile=False)
    for num_draft_tokens in (1, 4, 8):
        request = Request([3], 46, sampling, constraint=circle())
        (text,), decoder = decode(rounds, [request], num_draft_tokens)
        assert text == (ORDER * 7)[1:47]
        assert decoder.stats.rounds == -(-45 // (num_draft_tokens + 1))


class Listening(DraftPolicy):
    """Plain rounds with shadows of four drafts, whose acceptance is kept."""

    def __init__(self) -> None:
        super().__init__(0)
        self.accepted: list[int] = []

    def choose(self, allowed, *, can_shadow=False, **_):
        self.num_shadow_drafts = 4 if can_shadow else 0
        return Way(0)

    def observe_shadow(self, num_draft_tokens, accepted):
        self.accepted += accepted


def test_shadows_are_what_rounds_would_propose():
    policy = Listening()
    rounds = Rounds(FixedTarget(), Straight(), use_compile=False)
    decode(rounds, [Request([3], 20, constraint=circle())], policy)
    assert policy.accepted[:12] == [4] * 12


def test_a_failure_is_met_once():
    """The tokens before it were followed, and are not followed again."""
    seen = []

    class Masks(_Row):
        def advance(self, token):
            seen.append(token)
            if token == 6:
                raise RequestError("the row must end here: got more.")

    sequence = TokenSequence.of(Request([1], 9, constraint=Allowing({})))
    sequence.masks = Masks(Allowing({}), 1)
    sequence.emitted = [4, 5, 6]
    with pytest.raises(RequestError, match="must end here"):
        sequence.block_masks(())
    sequence.block_masks(())
    assert seen == [4, 5, 6]


def test_runs_end_before_ids_that_the_model_has_not():
    sequence = TokenSequence.of(Request([1], 9, constraint=Allowing({})))
    runs = [[7, 8, 1], [8], [], [3, 1]]
    table = proposed_tokens(
        [sequence], 2, vocab_size=8, before=[sequence], forced={sequence: runs}
    )
    assert table[0, :4].tolist() == [[7, -1, -1], [-1] * 3, [-1] * 3, [3, 1, -1]]
    assert table.dtype == mx.int32
