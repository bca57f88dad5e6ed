"""Drafts from the text itself: what is found, the text, the law, and what runs.

Run: python -m pytest tests/engine/test_lookup.py
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.constants import AUTO, DRAFTER, LOOKUP
from mlx_gemma_mtp.drafting.lookup_model import BROKEN
from mlx_gemma_mtp.drafting.policy import DraftPolicy
from mlx_gemma_mtp.engine.decoder import Decoder
from mlx_gemma_mtp.engine.lookup import (
    LONGEST,
    NUM_FOUND,
    UNKNOWN,
    find,
    resized_text,
    text_row,
    with_tokens,
)
from mlx_gemma_mtp.engine.request import Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.engine.sequence import TokenSequence
from mlx_gemma_mtp.engine.sources import sources_of
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
        match = find(text, ends)
        expected = [found_by_hand(row, end) for row, end in rows]
        assert match.length.tolist() == [length for length, _ in expected]
        assert match.tokens.tolist() == [tokens for _, tokens in expected]

    @settings(max_examples=20)
    @given(texts(), st.integers(0, 99))
    def test_nothing_is_read_behind_the_end_or_in_other_rows(self, rows, other):
        text = mx.array([row for row, _ in rows], dtype=mx.int32)
        ends = mx.array([end for _, end in rows], dtype=mx.int32)
        is_behind = mx.arange(text.shape[1]) > ends[:, None]
        before, after = find(text, ends), find(mx.where(is_behind, other, text), ends)
        assert before.packed.tolist() == after.packed.tolist()
        alone = [find(text[i : i + 1], ends[i : i + 1]) for i in range(len(rows))]
        assert before.packed.tolist() == [match.packed[0].tolist() for match in alone]

    def test_a_seat_that_nobody_took(self):
        match = find(mx.full((1, 32), UNKNOWN, dtype=mx.int32), mx.array([0]))
        assert match.packed.tolist() == [[0] * (1 + NUM_FOUND)]


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

    def test_reports_say_the_match(self):
        """Of the state before the round, and 0 where nobody looks."""
        script = LOOP * 8
        for has_text in (True, False):
            decoder = Decoder(
                self.rounds([script]),
                [Request(script[:11], 20)],
                num_draft_tokens=0,
                has_text=has_text,
            )
            seen: list[tuple[int, list[int]]] = []
            read = decoder._pipeline._runner.read

            def watched(*args, read=read, seen=seen):
                decisions = read(*args)
                seen.append((decisions[0].match_length, decisions[0].followed))
                return decisions

            decoder._pipeline._runner.read = watched  # type: ignore[method-assign]
            tokens = [token for (e,) in decoder.run() for token in e.tokens]
            assert tokens == script[11:31]
            texts = [script[: 12 + i] for i in range(19)]
            expected = [found_by_hand(text, len(text) - 1) for text in texts]
            assert seen == (expected if has_text else [(0, [])] * 19)

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

    @settings(max_examples=8)
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


class Learner(DraftPolicy):
    """Rounds of a fixed number of drafts; keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(3)
        self.seen: list[tuple[int, int]] = []
        self.matches: list[list[int]] = []
        self.drafted: list[tuple[int, int, int]] = []

    def choose(self, allowed, *, matches=(), **rest):
        self.matches.append(list(matches))
        return super().choose(allowed, matches=matches, **rest)

    def observe_match(self, length, num_same):
        self.seen.append((length, num_same))

    def observe_drafted(self, length, num_draft_tokens, num_accepted):
        self.drafted.append((length, num_draft_tokens, num_accepted))


class TestLearning:
    """What is told of texts that repeat themselves, or do not."""

    def learn(self, script, num_prompt, *, look_ahead=False):
        policy = Learner()
        request = Request(script[:num_prompt], 20, draft_source=LOOKUP)
        rounds = Rounds(ScriptedTarget([script]), use_compile=False)
        decode(rounds, [request], policy, look_ahead=look_ahead)
        return policy

    @pytest.mark.parametrize("look_ahead", [False, True])
    def test_a_text_that_goes_on(self, look_ahead):
        policy = self.learn(LOOP * 8, 12, look_ahead=look_ahead)
        # 13 tokens, of which 5 stood before; then four more with every round.
        lengths = [BROKEN, 9, 13, 17, 20]
        if look_ahead:
            lengths = [BROKEN, *lengths]
        assert [lengths for (lengths,) in policy.matches] == lengths[
            : len(policy.matches)
        ]
        assert {same for _, same in policy.seen} == {8}
        assert policy.seen[0] == (BROKEN, 8)

    def test_a_text_that_is_new(self):
        policy = self.learn([*range(60)], 12)
        assert {length for (length,) in policy.matches} == {BROKEN}
        assert set(policy.seen) == {(BROKEN, 0)}
        assert len(policy.seen) == 19  # of every round, at once
        assert policy.drafted == []

    def test_rounds_of_the_drafter(self):
        """They teach the same of the text, and what the drafter is worth in it."""
        policy, script = Learner(), LOOP * 8
        rounds = Rounds(
            ScriptedTarget([script]), ScriptedDrafter([script]), use_compile=False
        )
        request = Request(script[:12], 20, draft_source=DRAFTER)
        decode(rounds, [request], policy, look_ahead=False)
        assert policy.drafted == [(n, 3, 3) for n in (BROKEN, 9, 13, 17, 20)]
        assert {same for _, same in policy.seen} == {8}


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
        assert self.nodes(has_text=True)[0] < drafting[0] + 80

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
