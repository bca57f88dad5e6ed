"""Drafts from the text itself: what is found, the text, the law, and what runs.

Run: python -m pytest tests/engine/test_lookup.py
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.constants import AUTO, DRAFTER, FORM, LOOKUP
from mlx_gemma_mtp.drafting.policy import DraftPolicy
from mlx_gemma_mtp.engine import known_text
from mlx_gemma_mtp.engine.decoder import Decoder
from mlx_gemma_mtp.engine.known_text import KnownText
from mlx_gemma_mtp.engine.lookup import (
    LONGEST,
    NUM_FOUND,
    UNKNOWN,
    find,
    resized_text,
    searched_places,
    text_row,
    with_tokens,
)
from mlx_gemma_mtp.engine.request import Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.engine.sequence import TokenSequence
from mlx_gemma_mtp.engine.sources import looking_up, sources_of
from mlx_gemma_mtp.sampling.params import SamplingParams
from scripts.benchmarks.graph import counting
from tests.engine.test_distribution import (
    TARGET_PROBS,
    FixedDrafter,
    FixedTarget,
    check_chi_squared,
)
from tests.engine.test_joining import chain_text
from tests.engine.test_masked import Allowing
from tests.scripted import (
    ChainDrafter,
    ChainTarget,
    ScriptedDrafter,
    ScriptedTarget,
)
from tests.tiny import VOCAB_SIZE, reference_pair, uncompiled


def found_by_hand(text: Sequence[int], end: int) -> tuple[int, list[int]]:
    """The longest match and what follows it, by the definition."""
    lengths = []
    for place in range(end):
        length = 0
        while (
            length < min(LONGEST, place + 1)
            and text[place - length] == text[end - length] != UNKNOWN
        ):
            length += 1
        lengths.append((length, place))
    length, place = max(lengths)
    known = [*text[place + 1 : end + 1]]
    tokens = [known[i % len(known)] for i in range(NUM_FOUND)]
    return length, [max(token, 0) for token in tokens]


@st.composite
def texts(draw):
    """Some rows of few letters, so that much repeats, and their ends.

    The first letters may be unknown.
    """
    capacity = draw(st.integers(4, 70))
    letters = st.integers(0, draw(st.integers(0, 4)))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.lists(letters, min_size=capacity, max_size=capacity))
        num_unknown = draw(st.integers(0, 3))
        row[:num_unknown] = [UNKNOWN] * num_unknown
        rows.append((row, draw(st.integers(max(num_unknown, 1), capacity - 1))))
    return rows


class TestFind:
    @settings(max_examples=60)
    @given(texts())
    def test_longest_match_and_what_followed(self, rows):
        text = mx.array([row for row, _ in rows], dtype=mx.int32)
        ends = mx.array([end for _, end in rows], dtype=mx.int32)
        expected = [found_by_hand(row, end) for row, end in rows]
        assert listed(find(text, ends)) == expected

    @settings(max_examples=20)
    @given(texts(), st.integers(0, 99))
    def test_nothing_is_read_behind_the_end_or_in_other_rows(self, rows, other):
        text = mx.array([row for row, _ in rows], dtype=mx.int32)
        ends = mx.array([end for _, end in rows], dtype=mx.int32)
        is_behind = mx.arange(text.shape[1]) > ends[:, None]
        before, after = find(text, ends), find(mx.where(is_behind, other, text), ends)
        assert listed(before) == listed(after)
        alone = [find(text[i : i + 1], ends[i : i + 1]) for i in range(len(rows))]
        assert listed(before) == [match for each in alone for match in listed(each)]

    def test_a_seat_that_nobody_took(self):
        match = find(mx.full((1, 32), UNKNOWN, dtype=mx.int32), mx.array([0]))
        assert listed(match) == [(0, [0] * NUM_FOUND)]

    @settings(max_examples=60)
    @given(texts(), st.sampled_from((1, 5, 4096)), st.data())
    def test_the_host_finds_the_same(self, rows, near, data):
        with mock.patch.object(known_text, "_NEAR", near):
            self.check_host(rows, data)

    def check_host(self, rows, data):
        for row, end in rows:
            known, place = KnownText(row[:1]), 1
            while place <= end:
                count = data.draw(st.integers(1, end + 1 - place))
                known.extend(row[place : place + count])
                place += count
            assert (known.length, known.following) == found_by_hand(row, end)

    def test_the_host_knows_long_texts(self):
        period = random.Random(2).choices(range(64), k=300)
        known = KnownText(period[:7])
        for i in range(7, 3000, 7):
            known.extend((period * 11)[i : i + 7])
        assert (known.length, known.following) == (LONGEST, (period * 11)[3003:3012])
        known = KnownText([2**40, -5, 7, 2**40, -5, 7])
        assert (known.length, known.following[:2]) == (1, [0, 0])


def listed(match: tuple[mx.array, mx.array]) -> list[tuple[int, list[int]]]:
    """The length and the tokens of each row."""
    length, tokens = match
    return list(zip(length.tolist(), tokens.tolist(), strict=True))  # type: ignore[arg-type]


class TestText:
    @pytest.mark.parametrize("end", [2, 5, 9])
    def test_a_row_ends_where_its_tokens_do(self, end):
        """Caches may hold more tokens than are known, or fewer."""
        text = text_row([1, 2, 3, 4, 5], end=end, capacity=12)
        (row,) = cast(list[list[int]], text.tolist())
        known = [1, 2, 3, 4, 5][-end:]
        assert row == [*[UNKNOWN] * (end - len(known)), *known, *[UNKNOWN] * (12 - end)]

    def test_tokens_are_written_where_rows_end(self):
        text = with_tokens(
            mx.zeros((2, 6), dtype=mx.int32), mx.array([1, 4]), mx.array([[7, 8]] * 2)
        )
        assert text.tolist() == [[0, 7, 8, 0, 0, 0], [0, 0, 0, 0, 7, 8]]

    def test_places_before_a_text_have_few_numbers(self):
        found = {needed: searched_places(needed) for needed in range(1, 5000)}
        assert all(needed <= places for needed, places in found.items())
        assert set(found.values()) == {256, 1024, 4096, 16384}

    def test_sizes(self):
        text = mx.array([[1, 2, 3]], dtype=mx.int32)
        assert resized_text(text, 2).tolist() == [[1, 2]]
        assert resized_text(text, 4).tolist() == [[1, 2, 3, UNKNOWN]]


def decode(rounds, requests, num_draft_tokens, **options):
    """The tokens of each row, and the decoder."""
    decoder = Decoder(
        rounds, requests, num_draft_tokens=num_draft_tokens, has_text=True, **options
    )
    rows = [list[int]() for _ in requests]
    for outputs in decoder.run():
        for output in outputs:
            output.check()
            rows[output.sequence.index] += output.tokens
    return rows, decoder


LOOP = [3, 1, 4, 1, 5, 9, 2, 6]


class TestRounds:
    """Scripts tell which drafts stand."""

    def rounds(self, scripts):
        return Rounds(ScriptedTarget(scripts), use_compile=False)

    @pytest.mark.parametrize("look_ahead", [True, False])
    @pytest.mark.parametrize("num_draft_tokens", [1, 4, 8])
    def test_a_text_that_goes_on_as_it_began(self, num_draft_tokens, look_ahead):
        """All drafts stand, in every row; a row that says something new gets none."""
        new = [*range(10, 60)]
        scripts = [LOOP * 8, new, (LOOP * 8)[3:]]
        requests = [Request(script[:10], 40, draft_source=LOOKUP) for script in scripts]
        rows, decoder = decode(
            self.rounds(scripts), requests, num_draft_tokens, look_ahead=look_ahead
        )
        assert rows == [script[10:50] for script in scripts]
        stats = decoder.stats
        assert stats.accepted_from.keys() == {LOOKUP}
        rounds = -(-39 // (num_draft_tokens + 1))
        assert stats.rounds == 2 * rounds + 39

    @pytest.mark.parametrize(("num_known", "rounds"), [(17, 2), (8, 2), (0, 9)])
    def test_known_tokens_of_a_cache_are_found(self, num_known, rounds):
        """Those that nobody names are not, until the text has said them again."""
        script = LOOP * 8
        target = Rounds(ScriptedTarget([script]), use_compile=False)
        first = Request(script[:16], 1, keeps_cache=True)
        decoder = Decoder(target, [first], num_draft_tokens=0)
        caches = [e.prompt_cache for (e,) in decoder.run()][-1]
        known = tuple(script[17 - num_known : 17])
        request = Request(script[17:19], 19, history=known, draft_source=LOOKUP)
        rows, decoder = decode(target, [request], 8, prompt_caches=[caches])
        assert rows == [script[19:38]]
        assert decoder.stats.rounds == rounds

    @pytest.mark.parametrize("kind", ["plain", "host", "masked"])
    def test_a_text_keeps_its_tokens_where_slabs_grow(self, kind):
        """Nothing but the whole text drafts what comes: it repeats itself after 300."""
        kinds: dict[str, dict[str, Any]] = {
            "plain": {},
            "host": {"logits_processors": (lambda tokens, logits: logits,)},
            "masked": {"constraint": Allowing({}, vocab_size=64, fails_at=10**6)},
        }
        period = random.Random(1).choices(range(64), k=300)
        script, num_tokens = period * 6, 1400
        request = Request(script[:310], None, draft_source=LOOKUP, **kinds[kind])
        decoder = Decoder(
            self.rounds([script]), [request], num_draft_tokens=8, has_text=True
        )
        tokens: list[int] = []
        for (output,) in decoder.run():
            output.check()
            tokens += output.tokens
            if len(tokens) >= num_tokens:
                break
        assert tokens[:num_tokens] == script[310 : 310 + num_tokens]
        assert decoder.stats.rounds <= num_tokens // 9 + 3

    def test_ids_that_are_no_tokens_are_never_drafted(self):
        """An index that large would be read from anywhere in memory."""
        script = LOOP * 8
        target = Rounds(ScriptedTarget([script]), use_compile=False)
        first = Request(script[:16], 1, keeps_cache=True)
        decoder = Decoder(target, [first], num_draft_tokens=0)
        caches = [e.prompt_cache for (e,) in decoder.run()][-1]
        for wrong in (target.target.vocab_size, 2**31 - 1, 2**40, -5):
            known = (*script[13:17], wrong, wrong, wrong, *script[13:17])
            request = Request(script[17:19], 19, cached=known, draft_source=LOOKUP)
            seen: list[Any] = []
            verify = target.target.verify

            def watched(tokens, *arrays, verify=verify, seen=seen, **where):
                seen.append(tokens)
                return verify(tokens, *arrays, **where)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(target.target, "verify", watched)
                rows, _ = decode(target, [request], 8, prompt_caches=[caches])
            assert rows == [script[19:38]]
            ids = [i for tokens in seen for row in tokens.tolist() for i in row]
            assert 0 <= min(ids) <= max(ids) < target.target.vocab_size


class TestPrediction:
    """Tokens that are searched beside the text: no model reads them."""

    SCRIPT = (*range(10, 60), *range(1, 10))

    def run(self, *requests, **options):
        rounds = Rounds(
            ScriptedTarget([self.SCRIPT] * len(requests)), use_compile=False
        )
        return decode(rounds, requests, 8, **options)

    @pytest.mark.parametrize("look_ahead", [True, False])
    def test_what_is_predicted_is_drafted_from_its_first_token_on(self, look_ahead):
        script = [*self.SCRIPT]
        request = Request(script[:5], 37, draft_source=LOOKUP)
        foretold = replace(request, prediction=tuple(script[5:42]))
        for each, num_rounds in ((request, 36), (foretold, 4)):
            (row,), decoder = self.run(each, look_ahead=look_ahead)
            assert row == script[5:42]
            assert decoder.stats.rounds == num_rounds

    def test_what_came_of_it_is_counted(self):
        script = [*self.SCRIPT]
        wrong = [*script[5:20], 60, 61, *script[22:42]]
        found = []
        for prediction in (script[5:42], wrong, [60, 61, 62], []):
            request = Request(script[:5], 37, prediction=tuple(prediction))
            outputs = []
            for num_draft_tokens in (0, 4):
                decoder = Decoder(
                    Rounds(ScriptedTarget([script]), use_compile=False),
                    [request],
                    num_draft_tokens=num_draft_tokens,
                    has_text=True,
                )
                outputs.append([e.sequence for (e,) in decoder.run()][-1])
            one, other = [(s.num_predicted, s.num_not_predicted) for s in outputs]
            found.append(one)
            assert one == other
        # Behind what is wrong one token is needed to find it again.
        assert found == [(37, 0), (34, 3), (0, 3), (0, 0)]

    def test_no_match_crosses_the_seam(self):
        """The prediction's last tokens and the prompt's first stand side by side."""
        script = [7, 8, 1, 2, 3, 4, 5, 1, 2, 7, 8, 9, 9, 9]
        sequence = TokenSequence.of(Request(script[:6], 9, prediction=(20, 1, 2)))
        sequence.look_up()
        sequence.take(script[6:11])
        assert sequence.text is not None
        assert sequence.text.length == 2  # 7, 8 as in the prompt: not 1, 2, 7, 8
        assert sequence.text.following[:3] == [1, 2, 3]

    @pytest.mark.parametrize("first", [0, 1])
    def test_rows_that_join_bring_their_own(self, first):
        """Texts grow for it, and go on."""
        script = [*self.SCRIPT]
        plain = Request(script[:5], 50, draft_source=LOOKUP)
        foretold = replace(plain, prediction=tuple(script[5:] * 9))
        rounds = Rounds(ScriptedTarget([script] * 2), use_compile=False)
        decoder = Decoder(rounds, num_draft_tokens=8, has_text=True, max_rows=2)
        requests = [plain, foretold] if first == 0 else [foretold, plain]
        texts = {decoder.add(requests[0]): list[int]()}
        take(decoder, texts)
        take(decoder, texts)
        texts[decoder.add(requests[1])] = []
        while not decoder.is_idle:
            take(decoder, texts)
        assert [text[:40] for text in texts.values()] == [script[5:45]] * 2
        by_prediction = {bool(s.request.prediction): s.stats.rounds for s in texts}
        assert by_prediction[True] < 10 < by_prediction[False]


def reference_requests(draft_source):
    """Rows of all kinds; the tiny pair repeats itself soon."""
    prompts = [[5, 6, 7, 8, 9, 5, 6, 7], [11, 12, 13, 14] * 6, [40, 41], [7] * 9]
    sampling = [
        SamplingParams(),
        SamplingParams(1.0, seed=3),
        SamplingParams(0.2, 0.9, 20, seed=4),
        SamplingParams(0.7, seed=5, top_k=5),
    ]
    return [
        Request(prompt, 30, params, draft_source=source)
        for prompt, params, source in zip(prompts, sampling, draft_source, strict=True)
    ]


class TestSameText:
    """Greedy text and that of seeds is the same whatever the source."""

    @pytest.mark.parametrize(
        ("sources", "num_draft_tokens", "look_ahead"),
        [
            ([LOOKUP] * 4, 8, True),
            ([LOOKUP] * 4, 3, False),
            ([LOOKUP, DRAFTER, LOOKUP, DRAFTER], 4, True),
            ([DRAFTER] * 4, 4, True),
        ],
    )
    def test_reference_pair(self, sources, num_draft_tokens, look_ahead):
        rounds = reference_pair().rounds
        with uncompiled():
            expected, _ = decode(rounds, reference_requests(sources), 0)
            rows, decoder = decode(
                rounds,
                reference_requests(sources),
                num_draft_tokens,
                look_ahead=look_ahead,
            )
        assert rows == expected
        assert decoder.stats.drafted_from.keys() == set(sources)
        assert decoder.stats.accepted_from[sources[0]] > 0

    def test_compiled(self):
        pair = reference_pair()
        requests = reference_requests([LOOKUP, DRAFTER, LOOKUP, DRAFTER])
        with uncompiled():
            expected, _ = decode(pair.rounds, requests, 0)
        assert decode(pair.rounds, requests, 2)[0] == expected

    def test_without_a_drafter(self):
        rounds = reference_pair(has_drafter=False).rounds
        requests = reference_requests([LOOKUP] * 4)
        with uncompiled():
            expected, _ = decode(rounds, requests, 0)
            rows, decoder = decode(rounds, requests, 4)
        assert rows == expected
        assert decoder.stats.accepted_from[LOOKUP] > 0

    @settings(max_examples=5)
    @given(data=st.data())
    def test_rows_that_join_and_leave(self, data):
        """Any arrivals; seats and slots grow and shrink, and texts move with them."""
        rounds = Rounds(ChainTarget(), ChainDrafter(), use_compile=False)
        waiting = [
            Request(
                data.draw(st.lists(st.integers(0, 95), min_size=1, max_size=30)),
                data.draw(st.integers(1, 300)),
                draft_source=data.draw(st.sampled_from([DRAFTER, LOOKUP])),
            )
            for _ in range(data.draw(st.integers(1, 6)))
        ]
        decoder = Decoder(rounds, num_draft_tokens=4, has_text=True, max_rows=4)
        texts = {}
        for request in waiting:
            texts[decoder.add(request)] = list[int]()
            for _ in range(data.draw(st.integers(0, 20))):
                take(decoder, texts)
        while not decoder.is_idle:
            take(decoder, texts)
        for sequence, text in texts.items():
            assert text == chain_text(sequence.request.prompt, len(text))
            assert len(text) == sequence.request.max_tokens

    def test_masks_and_functions_of_the_host(self):
        """Forced tokens go before those that are looked up."""
        rules = Allowing({7: [9], 9: [7]}, {7: [9]}, vocab_size=VOCAB_SIZE)
        requests = [
            Request([7, 9, 7], 20, constraint=rules, draft_source=LOOKUP),
            Request([5, 6, 5, 6, 5], 20, draft_source=LOOKUP),
        ]
        hosted = [
            replace(r, logits_processors=(lambda tokens, logits: logits,))
            for r in requests
        ]
        rounds = reference_pair().rounds
        with uncompiled():
            for each in (requests, hosted):
                expected, _ = decode(rounds, each, 0)
                rows, decoder = decode(rounds, each, 4)
                assert rows == expected
                assert decoder.stats.accepted_from[LOOKUP] > 15

    def test_forced_tokens_go_before_those_that_are_looked_up(self):
        """Else 9 would be drafted behind 7, which may be followed by 8 alone."""
        rules = Allowing({7: [8], 8: [7]}, {7: [8], 8: [7]}, vocab_size=VOCAB_SIZE)
        request = Request([7, 9, 7, 9, 7], 18, constraint=rules, draft_source=LOOKUP)
        with uncompiled():
            (row,), decoder = decode(reference_pair().rounds, [request], 2)
        assert row == [8, 7] * 9
        assert decoder.stats.rounds <= 7
        assert decoder.stats.drafted_from.keys() == {FORM}  # and count as the form's
        assert decoder.stats.drafted_from[FORM] == decoder.stats.drafted
        assert decoder.stats.accepted_from[FORM] == decoder.stats.accepted


class TestSources:
    def test_without_a_drafter_nobody_keeps_others_from_their_drafts(self):
        def of(*asked):
            live = [
                TokenSequence.of(Request([1], 4, draft_source=s), index=0)
                for s in asked
            ]
            return [
                sources_of(live, has_drafter=has_drafter, has_text=True)
                for has_drafter in (False, True)
            ]

        assert of(AUTO, DRAFTER) == [(LOOKUP,), (DRAFTER,)]
        assert of(LOOKUP, DRAFTER) == [(LOOKUP,), (DRAFTER,)]
        assert of(DRAFTER) == [(), (DRAFTER,)]
        assert of(AUTO) == [(LOOKUP,), (DRAFTER, LOOKUP)]
        assert of(LOOKUP) == [(LOOKUP,), (LOOKUP,)]

    @pytest.mark.parametrize("source", [LOOKUP, DRAFTER])
    def test_what_a_form_forces_is_counted_apart(self, source):
        """7 is followed by 9, and that by anything: one forced draft in each block."""
        rules = Allowing({7: [9]}, {7: [9]}, vocab_size=VOCAB_SIZE)
        request = Request([7], 12, constraint=rules, draft_source=source)
        script = [7, 9, 1] * 9
        rounds = Rounds(
            ScriptedTarget([script]), ScriptedDrafter([script]), use_compile=False
        )
        _, decoder = decode(rounds, [request], 1, look_ahead=False)
        stats = decoder.stats
        assert sum(stats.drafted_from.values()) == stats.drafted
        assert sum(stats.accepted_from.values()) == stats.accepted
        assert stats.drafted_from.keys() == {FORM, source}

    def test_a_row_that_has_ended_looks_nothing_up(self):
        sequence = TokenSequence.of(Request([1], 1, draft_source=LOOKUP))
        other = TokenSequence.of(Request([1], 9, draft_source=DRAFTER))
        assert looking_up([sequence, other, None]) == (True, False, False)
        sequence.take([5])
        assert looking_up([sequence, other, None]) == (False, False, False)


class Learner(DraftPolicy):
    """Rounds of a fixed number of drafts; keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(3)
        self.seen: list[tuple[int, int]] = []
        self.chosen: list[list[int]] = []
        self.judged: list[tuple[list[int], list[int]]] = []

    def choose(self, allowed, *, matches=(), **rest):
        self.chosen.append(list(matches))
        return super().choose(allowed, matches=matches, **rest)

    def observe_match(self, length, num_same):
        self.seen.append((length, num_same))

    def observe(self, way, accepted, seconds, *, matches=(), **rest):
        self.judged.append((list(accepted), list(matches)))


class TestLearning:
    """What is told of texts that repeat themselves, or do not."""

    def learn(self, script, num_prompt, *, source=LOOKUP, look_ahead=False):
        policy = Learner()
        request = Request(script[:num_prompt], 20, draft_source=source)
        rounds = Rounds(
            ScriptedTarget([script]), ScriptedDrafter([script]), use_compile=False
        )
        decode(rounds, [request], policy, look_ahead=look_ahead)
        return policy

    @pytest.mark.parametrize("look_ahead", [False, True])
    @pytest.mark.parametrize("source", [LOOKUP, AUTO])
    def test_a_text_that_goes_on(self, source, look_ahead):
        """Wherever its drafts come from."""
        policy = self.learn(LOOP * 8, 12, source=source, look_ahead=look_ahead)
        # 13 tokens, of which 5 stood before; then four more with every round.
        lengths = [5, 9, 13, 16, 16]
        if look_ahead:
            lengths = [5, *lengths]
        assert [each for (each,) in policy.chosen] == lengths[: len(policy.chosen)]
        assert policy.judged == [([3], [n]) for n in lengths[: len(policy.judged)]]
        assert {same for _, same in policy.seen} == {8}
        assert [n for n, _ in policy.seen] == lengths[: len(policy.seen)]

    def test_a_text_that_is_new(self):
        policy = self.learn([*range(60)], 12)
        assert {length for (length,) in policy.chosen} == {0}
        assert set(policy.seen) == {(0, 0)}
        assert len(policy.seen) == 19  # of every round, at once

    def test_nobody_looks_where_a_row_asks_for_the_drafter(self):
        policy = self.learn(LOOP * 8, 12, source=DRAFTER)
        assert {length for (length,) in policy.chosen} == {0}
        assert policy.seen == []


def take(decoder, texts):
    """One step."""
    for output in decoder.step().outputs:
        texts[output.sequence] += output.tokens


class TestLaw:
    """Tokens that are drawn follow the target's distribution."""

    NUM_ROWS, NUM_TOKENS = 120, 60

    @cache  # noqa: B019 (of the module's life)
    def draw(self, sources, top_k=0, look_ahead=True):
        requests = [
            Request(
                [3],
                self.NUM_TOKENS,
                SamplingParams(1.0, seed=row, reproducible=False, top_k=top_k),
                draft_source=sources[row % len(sources)],
            )
            for row in range(self.NUM_ROWS)
        ]
        rounds = Rounds(FixedTarget(), FixedDrafter(), use_compile=False)
        return decode(rounds, requests, 4, look_ahead=look_ahead)

    @pytest.mark.parametrize(
        ("sources", "look_ahead", "top_k"),
        [
            ((LOOKUP,), False, 0),
            ((LOOKUP,), True, 6),
            ((LOOKUP, DRAFTER), True, 0),
            ((LOOKUP, DRAFTER), False, 6),
        ],
    )
    def test_chi_squared(self, sources, look_ahead, top_k):
        """Single tokens, and pairs: false alarm 1e-6."""
        rows, decoder = self.draw(sources, top_k, look_ahead)
        probs = TARGET_PROBS.copy()
        if top_k:
            probs[top_k:] = 0
            probs /= probs.sum()
        size = top_k or len(probs)
        counts = np.bincount(np.concatenate(rows), minlength=size)
        check_chi_squared(counts, probs[:size])
        pairs = np.concatenate([np.array(r[:-1]) * size + r[1:] for r in rows])
        check_chi_squared(
            np.bincount(pairs, minlength=size**2),
            np.outer(probs[:size], probs[:size]).ravel(),
        )
        # Both outcomes of a draft took part, hundreds of times each.
        drafted, accepted = decoder.stats.drafted_from, decoder.stats.accepted_from
        for source in sources:
            assert 0.05 < accepted[source] / drafted[source] < 0.5


class TestGraph:
    def nodes(self, *, has_text, source=DRAFTER, num_draft_tokens=4):
        """Nodes of one round, and how often the host waits for one."""
        request = Request([5, 6, 7, 5, 6], 40, draft_source=source)
        decoder = Decoder(
            reference_pair().rounds,
            [request],
            num_draft_tokens=num_draft_tokens,
            has_text=has_text,
            look_ahead=False,
        )
        run = decoder.run()
        next(run)
        with uncompiled(), counting() as count:
            next(run)
            first = count.nodes, count.evaluations
            next(run)
        run.close()
        return count.nodes - first[0], count.evaluations - first[1]

    def test_a_round_that_looks_up_is_smaller_than_one_that_drafts(self):
        drafting = self.nodes(has_text=False)
        looking = self.nodes(has_text=True, source=LOOKUP)
        plain = self.nodes(has_text=False, num_draft_tokens=0)
        assert plain[0] < looking[0] < drafting[0]
        assert looking[1] == drafting[1]  # the host reads no more often
        assert self.nodes(has_text=True)[0] < drafting[0] + 10  # nothing is searched
        assert self.nodes(has_text=True, num_draft_tokens=0)[0] < plain[0] + 10

    def test_memory(self):
        """Four bytes a slot."""
        sizes = []
        for has_text in (False, True):
            decoder = Decoder(
                Rounds(ScriptedTarget([LOOP * 4]), use_compile=False),
                [Request(LOOP, 4)],
                num_draft_tokens=0,
                has_text=has_text,
            )
            run = decoder.run()
            next(run)
            sizes.append((decoder.kv_bytes, decoder._batch.num_slots))
        (without, _), (with_text, num_slots) = sizes
        assert with_text - without == 4 * num_slots
