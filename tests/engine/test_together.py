"""Short prompts that are read in one forward: each is as if it was read alone.

Run: python -m pytest tests/engine/test_together.py
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.prefill import Prefill, read_together
from mlx_gemma_mtp.engine.queue import MAX_PASSING, SHORT
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.engine.route import ANY_ROUTE, PLAIN, Route
from mlx_gemma_mtp.engine.together import PASS_TOKENS, companions
from mlx_gemma_mtp.models.target import Target
from mlx_gemma_mtp.pair.planning import make_batch_plan, make_plan
from tests.scripted import ChainDrafter, ChainTarget, successor
from tests.tiny import SHORT as SHORT_PAIR
from tests.tiny import families, reference_pair

pytestmark = pytest.mark.usefixtures("plain_graphs")

BAD = 13  # a token that no prompt with it can be read


class Counting(ChainTarget):
    """Chains that note the shape of each forward over prompts."""

    def __init__(self, *, most_rows=32):
        super().__init__()
        self.shapes = []
        self._most_rows = most_rows

    def prefill(self, tokens, caches, sizes):
        self.shapes.append(tokens.shape)
        if tokens.shape[0] > self._most_rows:
            raise RuntimeError("no memory")
        if (tokens == BAD).any().item():
            raise RuntimeError("bad")
        return super().prefill(tokens, caches, sizes)


def chain_decoder(target, *, pads=True, **options):
    rounds = Rounds(target, ChainDrafter(), use_compile=False)
    route = Route(pads_prompts=pads)
    return Decoder(rounds, num_draft_tokens=1, route=route, **options)


def chain_text(prompt, num_tokens):
    token, tokens = prompt[-1], []
    for position in range(len(prompt) - 1, len(prompt) - 1 + num_tokens):
        token = successor(token, position)
        tokens.append(token)
    return tokens


def prompts_of(lengths, *, vocab_size=512, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, vocab_size, n).tolist() for n in lengths]


def arrays_of(prefill):
    """All that reading gives, and where each layer's keys begin and end."""
    arrays = [a for cache in prefill.caches for a in cache.state]
    if prefill.is_done:
        arrays += [prefill.filled.logits, prefill.filled.hidden]
    return prefill.places, [np.array(array) for array in arrays]


def check_alone_and_together(target, prompts, num_held, stops=()):
    """The bytes of prompts read in one forward are those of each alone.

    Their first tokens, as many as are held, were read before.
    """

    def begun():
        made = [Prefill(target, p, stops=[num_held, *stops]) for p in prompts]
        for prefill in made if num_held else ():
            prefill.read(num_held)
        return made

    alone, together = begun(), begun()
    for prefill in alone:
        prefill.read(SHORT)
    read_together(target, together, SHORT)
    for one, other in zip(alone, together, strict=True):
        assert one.num_read == other.num_read
        (places, expected), (found_places, found) = arrays_of(one), arrays_of(other)
        assert found_places == places
        for array, as_expected in zip(found, expected, strict=True):
            assert array.shape == as_expected.shape
            np.testing.assert_array_equal(array, as_expected)


class TestBytes:
    """MLX's CPU kernels round a row alike, whatever is beside it."""

    @pytest.mark.parametrize("num_held", [0, 9, 40])
    @pytest.mark.parametrize("family", families("e2b", "12b", "26b-a4b"))
    def test_every_family(self, family, num_held):
        """Nothing before them, a part of the window, and more than the window."""
        target = Target(reference_pair(family).target)
        assert 9 < target.layout.window < 40
        prompts = prompts_of([num_held + n for n in (1, 30, 17, 30)])
        check_alone_and_together(target, prompts, num_held)

    @settings(max_examples=15)
    @given(
        lengths=st.lists(st.integers(1, 45), min_size=2, max_size=6),
        num_held=st.integers(0, 40),
        seed=st.integers(0, 99),
    )
    def test_any_lengths(self, lengths, num_held, seed):
        target = Target(reference_pair(SHORT_PAIR).target)
        prompts = prompts_of([num_held + n for n in lengths], seed=seed)
        check_alone_and_together(target, prompts, num_held)

    def test_chunks_that_end_at_a_stop(self):
        """Some go on behind it and some end there: nobody has read further."""
        target = Target(reference_pair(SHORT_PAIR).target)
        prompts = prompts_of([12, 25, 7])
        check_alone_and_together(target, prompts, 0, stops=[12])
        check_alone_and_together(target, prompts, 5, stops=[12])

    def test_a_failure_leaves_all_as_they_were(self):
        target = Counting()
        prefills = [Prefill(target, p) for p in ([5, 6], [BAD], [7])]
        prefills[1].caches = before = list(prefills[1].caches)
        with pytest.raises(RuntimeError, match="bad"):
            read_together(target, prefills, SHORT)
        assert [prefill.num_read for prefill in prefills] == [0, 0, 0]
        assert prefills[1].caches == before
        assert {cache.offset for p in prefills for cache in p.caches} == {0}


def cost(lengths):
    """What reading takes, in tokens: a forward's own, and each row's."""
    return PASS_TOKENS + len(lengths) * max(lengths)


class TestChoice:
    @given(
        first=st.integers(1, 60),
        others=st.lists(st.integers(1, 60), max_size=7),
        most=st.integers(0, 7),
    )
    def test_no_other_choice_saves_more(self, first, others, most):
        def saved(numbers):
            chosen = [first, *(others[i] for i in numbers)]
            return sum(cost([length]) for length in chosen) - cost(chosen)

        found = companions(first, others, most=most)
        assert len(found) <= most
        assert found == sorted(set(found))
        best = max(
            saved(numbers)
            for count in range(min(most, len(others)) + 1)
            for numbers in combinations(range(len(others)), count)
        )
        assert saved(found) == best

    def test_a_prompt_that_is_much_longer_is_read_alone(self):
        assert companions(5, [200, 5, 250, 6], most=7) == [1, 3]
        assert companions(200, [5, 6], most=7) == []


class TestDecoder:
    @pytest.mark.parametrize("pads", [True, False])
    def test_as_many_as_between_two_rounds_before(self, pads):
        """In one forward or eight: who decodes waits for no more prompts."""
        target = Counting()
        decoder = chain_decoder(target, pads=pads)
        prompts = prompts_of([20] * 16, vocab_size=BAD)
        rows = [decoder.add(Request(prompt, 5)) for prompt in prompts]
        step = decoder.step()
        assert [output.sequence for output in step.outputs] == rows[:8]
        assert step.num_read == 160
        assert target.shapes == ([(8, 20)] if pads else [(1, 20)] * 8)
        while not decoder.is_idle:
            decoder.step()
        assert len(target.shapes) == (2 if pads else 16)
        for row, prompt in zip(rows, prompts, strict=True):
            assert row.emitted == chain_text(prompt, 5)

    def test_one_comes_while_others_decode(self):
        target = Counting()
        decoder = chain_decoder(target)
        prompts = prompts_of([9, 12, 20, 25, 11], vocab_size=BAD)
        rows = [decoder.add(Request(prompt, 30)) for prompt in prompts[:2]]
        decoder.step()
        rows += [decoder.add(Request(prompt, 30)) for prompt in prompts[2:]]
        decoder.step()
        assert target.shapes == [(2, 12), (3, 25)]
        while not decoder.is_idle:
            decoder.step()
        for row, prompt in zip(rows, prompts, strict=True):
            assert row.emitted == chain_text(prompt, 30)

    def test_one_that_cannot_be_read(self):
        target = Counting()
        decoder = chain_decoder(target)
        prompts = [[4, 5], [6, BAD], [7, 8, 9]]
        rows = [decoder.add(Request(prompt, 5)) for prompt in prompts]
        step = decoder.step()
        assert target.shapes == [(3, 3), (1, 2), (1, 2), (1, 3)]
        assert [p.sequence for p in step.progress] == [rows[0], rows[2]]
        errors = {o.sequence: str(o.error) for o in step.outputs if o.error}
        assert errors == {rows[1]: "bad"}
        while not decoder.is_idle:
            decoder.step()
        for row, prompt in zip(rows, prompts, strict=True):
            assert row.emitted == ([] if BAD in prompt else chain_text(prompt, 5))

    def test_all_that_cannot_be_read_together(self):
        target = Counting(most_rows=1)
        decoder = chain_decoder(target)
        rows = [decoder.add(Request([4, 5 + i], 5)) for i in range(3)]
        step = decoder.step()
        assert [output.error for output in step.outputs] == [None] * 3
        assert target.shapes == [(3, 2), (1, 2), (1, 2), (1, 2)]
        while not decoder.is_idle:
            decoder.step()
        assert [row.emitted for row in rows] == [
            chain_text([4, 5 + i], 5) for i in range(3)
        ]

    def test_a_choice_that_fails_among_others(self):
        """Each has its own processors: one that raises ends its own request."""

        def fails(tokens, logits):
            raise ValueError("mine")

        decoder = chain_decoder(Counting())
        plain = [decoder.add(Request([4, 5], 5)) for _ in "ab"]
        bad = decoder.add(Request([4, 5], 5, logits_processors=(fails,)))
        outputs = decoder.step().outputs
        assert {o.sequence: str(o.error) for o in outputs if o.error} == {bad: "mine"}
        while not decoder.is_idle:
            decoder.step()
        assert [row.emitted for row in plain] == [chain_text([4, 5], 5)] * 2

    def test_pauses_are_each_prompts_own(self):
        target = Counting()
        decoder = chain_decoder(target)
        rows = [
            decoder.add(Request([5] * 20, 3, pauses=(12,))),
            decoder.add(Request([5] * 14, 3)),
            decoder.add(Request([5] * 21, 3, pauses=(12, 18))),
        ]
        told = [(p.sequence, p.num_read, p.is_paused) for p in decoder.step().progress]
        assert told == [(rows[0], 12, True), (rows[1], 14, False), (rows[2], 12, True)]
        assert [cache.offset for cache in decoder.extract(rows[0])] == [12]
        told = [(p.sequence, p.num_read, p.is_paused) for p in decoder.step().progress]
        assert told == [(rows[0], 20, False), (rows[2], 18, True)]
        assert target.shapes == [(3, 14), (2, 8)]
        while not decoder.is_idle:
            decoder.step()
        assert [row.emitted for row in rows] == [
            chain_text([5] * n, 3) for n in (20, 14, 21)
        ]

    def test_a_long_prompt_is_passed_by_no_more_than_before(self):
        target = Counting()
        decoder = chain_decoder(target, prefill_step_size=2048)
        decoder.add(Request([5] * 6000, 1))
        for _ in range(12):
            decoder.add(Request([6, 7], 1))
        decoder.step()
        assert target.shapes[:2] == [(MAX_PASSING, 2), (1, 1024)]

    def test_only_what_follows_as_much_is_read_together(self):
        """Caches of other lengths would have to be padded on the left."""
        pair = reference_pair(SHORT_PAIR)
        rounds = Rounds(pair.rounds.target, None, use_compile=False)

        def cache_of(prompt):
            decoder = Decoder(rounds, num_draft_tokens=0)
            row = decoder.add(Request(prompt, 1, keeps_cache=True))
            (output,) = decoder.step().outputs
            assert row.num_emitted == 1
            return output.prompt_cache

        shapes = []
        decoder = Decoder(rounds, num_draft_tokens=0)
        read = decoder._rounds.target.prefill

        def noting(tokens, caches, sizes):
            shapes.append(tokens.shape)
            return read(tokens, caches, sizes)

        begun = {n: cache_of(list(range(5, 5 + n))) for n in (10, 30)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder._rounds.target, "prefill", noting)
            rows = [
                decoder.add(Request([40, 41, 42 + i], 6), begun.get(n))
                for i, n in enumerate((10, 0, 30, 10, 30, 0, 10))
            ]
            while not decoder.is_idle:
                decoder.step()
        assert shapes == [(3, 3), (2, 3), (2, 3)]
        for i, (row, n) in enumerate(
            zip(rows, (10, 0, 30, 10, 30, 0, 10), strict=True)
        ):
            alone = Decoder(rounds, num_draft_tokens=0)
            other = alone.add(Request([40, 41, 42 + i], 6), begun.get(n))
            while not alone.is_idle:
                alone.step()
            assert row.emitted == other.emitted


class TestRoutes:
    """Where bytes are promised, prompts are read alone."""

    def test_rounds_that_nothing_was_proved_of(self):
        pair = reference_pair(SHORT_PAIR)
        assert ANY_ROUTE.pads_prompts
        assert not PLAIN.pads_prompts
        for count in (0, 3, None):
            assert make_batch_plan(pair, num_draft_tokens=count).route.pads_prompts

    @pytest.mark.parametrize(("mode", "pads"), [("exact", False), ("fast", True)])
    def test_a_request_says_so(self, mode, pads):
        pair = reference_pair(SHORT_PAIR)
        request = Request([5, 6], 4)
        plan = make_plan(pair, [request, request], num_draft_tokens=3, exactness=mode)
        assert plan.route.pads_prompts is pads
        assert plan.route.is_exact is not pads
