"""Rows that join and leave a running decoder: the same text, nobody waits for long.

Run: python -m pytest tests/engine/test_joining.py
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.constants import DRAFTER
from mlx_gemma_mtp.drafting.policy import DraftPolicy
from mlx_gemma_mtp.engine.capacity import seats_for
from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.engine.timing import RoundTimer
from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.generation.tokens import make_batch_decoder
from mlx_gemma_mtp.pair.load import load_pair
from mlx_gemma_mtp.sampling.graph import sampling_graph
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.scripted import ChainDrafter, ChainTarget, successor
from tests.tiny import reference_pair, uncompiled

GOOD, BAD = 2, 3  # first tokens of chains that drafts are right, or wrong, about


class StopSequences:
    """As mlx-lm's, which older ones have not."""

    def __init__(self, sequences):
        self._sequences = sequences

    def matcher(self):
        return Matcher(self._sequences)


class Matcher:
    def __init__(self, sequences):
        self._sequences, self._tokens = sequences, []

    def advance(self, token):
        self._tokens = [*self._tokens, token]
        return any(self._tokens[-len(s) :] == s for s in self._sequences)


@pytest.fixture(scope="module")
def chain():
    return Rounds(ChainTarget(), ChainDrafter(), use_compile=False)


def chain_text(prompt, max_tokens):
    """What the chain says after a prompt."""
    token, tokens = prompt[-1], []
    for position in range(len(prompt) - 1, len(prompt) - 1 + max_tokens):
        token = successor(token, position)
        tokens.append(token)
    return tokens


def drain(decoder):
    """Steps to the end: the tokens of every row, and the steps."""
    found: dict[Any, list[int]] = {}
    steps = []
    while not decoder.is_idle:
        step = decoder.step()
        steps.append(step)
        for emission in step.outputs:
            found.setdefault(emission.sequence, []).extend(emission.tokens)
    return found, steps


class TestText:
    """A row's text is that of the request alone, whoever sits beside it."""

    @settings(max_examples=30)
    @given(data=st.data())
    def test_chains(self, chain, data):
        """Any arrivals, lengths, limits, switches and cancellations."""
        kinds = st.tuples(
            st.integers(0, 8),  # steps before it arrives
            st.lists(st.integers(0, 95), min_size=1, max_size=20),
            st.integers(1, 40),
            st.sampled_from([0, 1, 8]),
            st.one_of(st.none(), st.integers(0, 12)),  # steps until it is cancelled
        )
        check_chains(
            chain,
            data.draw(st.lists(kinds, min_size=1, max_size=9)),
            num_draft_tokens=data.draw(st.integers(0, 8)),
            max_rows=data.draw(st.sampled_from([1, 3, 32])),
            prefill_step_size=data.draw(st.sampled_from([1, 7, 2048])),
        )

    def test_requests_of_the_embedded_pair(self):
        """Greedy and seeded, through rings that wrap, four at a time."""
        pair = load_pair()
        rng = random.Random(3)
        requests = [
            Request(
                [
                    2,
                    *(
                        rng.randrange(8, pair.vocab_size)
                        for _ in range(rng.choice([2, 9, 40]))
                    ),
                ],
                rng.choice([1, 3, 16]),
                SamplingParams(1.0, 0.95, 64, seed=i) if i % 2 else SamplingParams(),
                eos_token_ids=pair.eos_token_ids,
            )
            for i in range(9)
        ]
        with uncompiled():
            check_against_alone(pair, requests, rng, num_draft_tokens=4, max_rows=4)

    def test_all_settings_beside_each_other(self):
        """Processors, penalties, top-k and none, log-probabilities, own switches."""
        rng = random.Random(5)

        def request(i):
            sampling = [
                SamplingParams(),
                SamplingParams(0.8, seed=i),
                SamplingParams(1.2, 0.9, 20, 0.05, seed=i),
                SamplingParams(1.0, 1.0, 5, seed=i, xtc_probability=0.5),
            ][i % 4]
            return Request(
                [rng.randrange(4, 500) for _ in range(rng.choice([1, 5, 30]))],
                rng.choice([1, 6, 14]),
                sampling,
                logits_processors=(less_of_the_last,) if i % 5 == 0 else (),
                num_logprobs=[None, 0, 3][i % 3],
                max_draft_tokens=[8, 0, 2][i % 3],
            )

        pair = reference_pair("e2b")
        with uncompiled():
            check_against_alone(
                pair, [request(i) for i in range(12)], rng, num_draft_tokens=3
            )


def take(decoder, found, to_cancel, cancelled):
    """One step; rows whose time has come are sent away after it."""
    for emission in decoder.step().outputs:
        assert emission.sequence not in cancelled
        found.setdefault(emission.sequence, []).extend(emission.tokens)
    for entry in to_cancel:
        entry[1] -= 1
        if entry[1] < 0 and entry[0].is_live:
            decoder.remove(entry[0])
            cancelled.add(entry[0])


def check_chains(rounds, plans, **options):
    """Chains that arrive and are cancelled by plan: each says what it says alone."""
    decoder = Decoder(rounds, **options)
    found: dict[Any, list[int]] = {}
    expected = {}
    cancelled: set[Any] = set()
    to_cancel: list[list[Any]] = []
    for wait, prompt, limit, most, cancel in plans:
        for _ in range(wait):
            take(decoder, found, to_cancel, cancelled)
        row = decoder.add(Request(prompt, limit, max_draft_tokens=most))
        expected[row] = chain_text(prompt, limit)
        if cancel is not None:
            to_cancel.append([row, cancel])
    while not decoder.is_idle:
        take(decoder, found, to_cancel, cancelled)
    for row, tokens in expected.items():
        got = found.get(row, [])
        assert got == tokens[: len(got)] == row.emitted
        assert row in cancelled or got == tokens
    assert decoder.kv_bytes == 0
    decoder.close()


def less_of_the_last(tokens, logits):
    """A processor that looks at the history."""
    return logits - 3.0 * (mx.arange(logits.shape[-1]) == tokens[-1])


def check_against_alone(pair, requests, rng, *, num_draft_tokens, **options):
    """Rows that arrive at random, some of which are cancelled, and each one alone."""
    decoder = make_batch_decoder(
        pair, num_draft_tokens=num_draft_tokens, prefill_step_size=32, **options
    )
    logprobs: dict[Any, list[Any]] = {}
    cancelled = set()
    waiting = list(requests)
    while waiting or not decoder.is_idle:
        if waiting and rng.random() < 0.5:
            logprobs[decoder.add(waiting.pop(0))] = []
        for emission in decoder.step().outputs:
            logprobs[emission.sequence] += emission.logprobs
        if rng.random() < 0.02 and decoder.num_live > 2:
            row = rng.choice([row for row in logprobs if row.is_live])
            decoder.remove(row)
            cancelled.add(row)
    decoder.close()
    assert len(cancelled) < len(requests) / 2
    for row, request in zip(logprobs, requests, strict=True):
        alone = Decoder(pair.rounds, [request], num_draft_tokens=num_draft_tokens)
        emissions = [e for (e,) in alone.run()]
        tokens = [token for e in emissions for token in e.tokens]
        got = row.emitted
        assert got == tokens if row not in cancelled else got == tokens[: len(got)]
        entries = [p for e in emissions for p in e.logprobs]
        assert len(logprobs[row]) == (0 if request.num_logprobs is None else len(got))
        for one, other in zip(logprobs[row], entries, strict=False):
            assert one.token == pytest.approx(other.token, abs=1e-4)
            assert [t for t, _ in one.top] == [t for t, _ in other.top]


class TestRows:
    """Every row goes its own way."""

    def test_no_row_is_clamped_to_another(self, chain):
        """The good row advances K + 1 tokens a round beside one that advances one."""
        decoder = Decoder(chain, num_draft_tokens=5)
        good, bad = (decoder.add(Request([first], 60)) for first in (GOOD, BAD))
        found, _ = drain(decoder)
        assert found[good] == chain_text([GOOD], 60)
        assert found[bad] == chain_text([BAD], 60)
        assert good.stats.acceptance_length == 6
        assert bad.stats.acceptance_length == 1

    def test_its_own_switch(self, chain):
        decoder = Decoder(chain, num_draft_tokens=6)
        rows = {
            most: decoder.add(Request([GOOD], 43, max_draft_tokens=most))
            for most in (0, 2, 8)
        }
        drain(decoder)
        for most, row in rows.items():
            assert row.emitted == chain_text([GOOD], 43)
            assert row.stats.acceptance_length == min(most, 6) + 1
            assert row.stats.drafted == row.stats.rounds * min(most, 6)

    def test_nobody_drafts_where_nobody_wants_to(self, chain):
        decoder = Decoder(chain, num_draft_tokens=6)
        for _ in range(2):
            decoder.add(Request([GOOD], 9, max_draft_tokens=0))
        drain(decoder)
        assert decoder.stats.num_draft_tokens == {0: 16}

    def test_stop_sequences(self, chain):
        text = chain_text([GOOD], 40)
        place = 17  # inside a block
        stop = StopSequences([text[place : place + 2]])
        first = next(i for i in range(39) if text[i : i + 2] == text[place : place + 2])
        for num_draft_tokens in (0, 4):
            decoder = Decoder(chain, num_draft_tokens=num_draft_tokens)
            request = Request([GOOD], 40, stop_sequences=stop)
            rows = [decoder.add(r) for r in (request, Request([GOOD], 40), request)]
            drain(decoder)
            assert [row.finish_reason for row in rows] == ["stop", "length", "stop"]
            assert rows[0].emitted == rows[2].emitted == text[: first + 2]
            assert rows[1].emitted == text

    def test_a_processor_that_raises_ends_its_own_row_only(self, chain):
        calls = []

        def fails(tokens, logits):
            calls.append(1)
            if len(calls) > 4:
                raise OSError("no more")
            return logits

        decoder = Decoder(chain, num_draft_tokens=2)
        bad = decoder.add(Request([GOOD], 30, logits_processors=(fails,)))
        good = decoder.add(Request([GOOD], 30))
        ends = {}
        while not decoder.is_idle:
            for emission in decoder.step().outputs:
                if emission.finish_reason:
                    ends[emission.sequence] = emission
        assert ends[bad].finish_reason == "error"
        assert str(ends[bad].error) == "no more"
        assert bad.emitted == chain_text([GOOD], 30)[: len(bad.emitted)]
        assert len(bad.emitted) in (3, 4)
        assert good.emitted == chain_text([GOOD], 30)
        assert ends[good].finish_reason == "length"

    def test_a_removed_row_says_nothing_more(self, chain):
        decoder = Decoder(chain, num_draft_tokens=3)
        gone, stays = (decoder.add(Request([GOOD], 50)) for _ in range(2))
        for _ in range(3):
            decoder.step()
        decoder.remove(gone)
        decoder.remove(gone)  # once more does nothing
        num_emitted = gone.num_emitted
        later = decoder.add(Request([BAD], 20))
        found, _ = drain(decoder)
        assert gone not in found
        assert gone.num_emitted == num_emitted
        assert later.emitted == chain_text([BAD], 20)
        assert stays.emitted == chain_text([GOOD], 50)


class TestQueue:
    """Prompts are read between rounds, rows are let in as there is room."""

    def test_a_running_row_waits_for_one_chunk_only(self, chain):
        decoder = Decoder(chain, num_draft_tokens=0, prefill_step_size=300)
        running = decoder.add(Request([GOOD], 50))
        decoder.step()
        decoder.add(Request([BAD] * 1500, 5))
        num_emitted = []
        for num_read in (300, 600, 900, 1200, 1500):
            step = decoder.step()
            assert [p.num_read for p in step.progress] == [num_read]
            assert step.num_read == 300
            num_emitted.append(running.num_emitted)
        assert num_emitted == [2, 3, 4, 5, 6]

    def test_short_prompts_share_a_chunk(self, chain):
        decoder = Decoder(chain, num_draft_tokens=0, prefill_step_size=1024)
        for _ in range(6):
            decoder.add(Request([GOOD] * 3, 5))
        # Each costs what 256 tokens do, as the weights are read for each.
        assert len(decoder.step().outputs) == 4
        assert len(decoder.step().progress) == 2

    def test_first_come_first_served_up_to_the_number_of_rows(self, chain):
        decoder = Decoder(chain, num_draft_tokens=1, max_rows=2)
        rows = [decoder.add(Request([GOOD], 5 + i)) for i in range(5)]
        order = []
        while not decoder.is_idle:
            step = decoder.step()
            order += [p.sequence for p in step.progress]
            assert decoder.num_live <= 2
        assert order == rows

    def test_rows_wait_for_memory(self, chain):
        layout = ChainTarget().layout
        budget = layout.num_bytes(2, 512)
        decoder = Decoder(chain, num_draft_tokens=1, max_kv_bytes=budget)
        rows = [decoder.add(Request([GOOD] * 10, 300)) for _ in range(4)]
        most = 0
        while not decoder.is_idle:
            decoder.step()
            most = max(most, decoder.num_live)
            assert decoder.kv_bytes <= budget
        assert most == 2
        assert all(row.num_emitted == 300 for row in rows)

    @settings(max_examples=10)
    @given(data=st.data())
    def test_memory_is_never_exceeded(self, chain, data):
        """Whoever comes after whom, also while there is always somebody who waits."""
        layout = ChainTarget().layout
        budget = layout.num_bytes(*data.draw(st.sampled_from([(1, 4096), (8, 512)])))
        decoder = Decoder(
            chain,
            num_draft_tokens=data.draw(st.integers(0, 4)),
            max_kv_bytes=budget,
            max_rows=data.draw(st.sampled_from([2, 8, 32])),
        )
        sizes = st.tuples(
            st.sampled_from([3, 40, 300, 1500]), st.sampled_from([1, 9, 60, 300])
        )
        rows = [
            decoder.add(Request([GOOD] * length, limit))
            for length, limit in data.draw(st.lists(sizes, min_size=4, max_size=12))
            if length + limit + 18 <= 2048
        ]
        while not decoder.is_idle:
            decoder.step()
            assert decoder.kv_bytes <= budget
        for row in rows:
            limit = row.request.max_tokens
            assert row.emitted == chain_text(row.request.prompt, limit)

    def test_what_could_never_fit_is_refused(self, chain):
        budget = ChainTarget().layout.num_bytes(1, 512)
        decoder = Decoder(chain, num_draft_tokens=1, max_kv_bytes=budget)
        running = decoder.add(Request([GOOD], 20))
        for limit in (600, None):
            with pytest.raises(RequestError, match="must fit into"):
                decoder.add(Request([GOOD], limit))
        with pytest.raises(RequestError, match="no limit of tokens"):
            decoder.add_all([Request([GOOD], 5), Request([GOOD], None)], [None, None])
        assert decoder.num_waiting == 1
        drain(decoder)
        assert running.emitted == chain_text([GOOD], 20)

    def test_slabs_shrink_once_a_long_row_has_left(self, chain):
        decoder = Decoder(chain, num_draft_tokens=1)
        decoder.add(Request([GOOD] * 3000, 5))
        short = [decoder.add(Request([GOOD], 200)) for _ in range(3)]
        sizes = []
        while not decoder.is_idle:
            decoder.step()
            sizes.append(decoder.kv_bytes)
        layout = ChainTarget().layout
        assert max(sizes) >= layout.num_bytes(4, 3072)
        assert layout.num_bytes(4, 256) in sizes
        assert all(row.emitted == chain_text([GOOD], 200) for row in short)

    def test_a_short_prompt_does_not_wait_for_a_long_one(self, chain):
        decoder = Decoder(chain, num_draft_tokens=0, prefill_step_size=300)
        decoder.add(Request([GOOD] * 3000, 5))
        decoder.step()
        short = decoder.add(Request([BAD] * 3, 5))
        decoder.step()
        decoder.step()
        assert short.num_emitted

    def test_a_row_that_ends_with_its_first_token_needs_no_seat(self, chain):
        decoder = Decoder(chain, num_draft_tokens=1)
        running = decoder.add(Request([GOOD], 30))
        decoder.step()
        before = decoder.kv_bytes
        row = decoder.add(Request([GOOD] * 3000, 1, keeps_cache=True))
        emissions = []
        while row.is_live:
            emissions = decoder.step().outputs
            assert decoder.kv_bytes == before
        caches = next(e.prompt_cache for e in emissions if e.sequence is row)
        assert [cache.offset for cache in caches or ()] == [3001]
        drain(decoder)
        assert running.emitted == chain_text([GOOD], 30)

    def test_a_step_always_gives_something(self, chain):
        """Where a row waits for the seat of one that a stop sequence has ended."""
        text = chain_text([GOOD], 40)
        stop = StopSequences([[text[12]]])
        decoder = Decoder(chain, num_draft_tokens=1, max_rows=1)
        for _ in range(3):
            decoder.add(Request([GOOD], 40, stop_sequences=stop))
        while decoder.num_live or decoder.num_waiting:
            step = decoder.step()
            assert step.outputs or step.progress

    def test_reading_pauses_where_asked(self, chain):
        decoder = Decoder(chain, num_draft_tokens=1)
        row = decoder.add(Request(list(range(9)), 5, pauses=(3, 8)))
        seen = []
        while not decoder.is_idle:
            for progress in decoder.step().progress:
                seen.append((progress.num_read, progress.is_paused))
                if progress.is_paused:
                    (cache,) = decoder.extract(row)
                    assert cache.offset == progress.num_read
                    assert decoder.tokens_of(row) == list(range(progress.num_read))
        assert seen == [(3, True), (8, True), (9, False)]

    def test_a_short_prompt_passes_long_ones(self, chain):
        """Those that are read side by side, and those that wait for that."""
        decoder = Decoder(chain, num_draft_tokens=1, prefill_step_size=512)
        long = [decoder.add(Request([GOOD] * 4000, 1)) for _ in range(12)]
        for _ in range(3):
            decoder.step()
        short = decoder.add(Request([BAD], 1))
        step = decoder.step()
        assert short.finish_reason == "length"
        assert {progress.sequence for progress in step.progress} - {short} <= set(long)
        assert len(step.progress) == 2  # and there was time for one of the others
        found, _ = drain(decoder)
        assert all(found[row] == chain_text([GOOD] * 4000, 1) for row in long)

    def test_a_long_prompt_is_read_however_many_short_ones_come(self, chain):
        decoder = Decoder(chain, num_draft_tokens=1)
        long = decoder.add(Request([GOOD] * 4000, 1))
        num_steps = 0
        while long.is_live:
            for _ in range(8):  # as many as fill a chunk
                decoder.add(Request([BAD], 1))
            decoder.step()
            num_steps += 1
        assert num_steps <= 4  # half of a chunk is for the long one

    def test_no_more_than_eight_long_prompts_hold_memory(self, chain):
        decoder = Decoder(chain, num_draft_tokens=1, prefill_step_size=512)
        rows = [decoder.add(Request([GOOD] * 4000, 1)) for _ in range(12)]
        seen = {p.sequence for _ in range(16) for p in decoder.step().progress}
        assert seen == set(rows[:8])

    def test_seats(self):
        assert [seats_for(n) for n in (1, 2, 5, 7, 32, 33, 41)] == [
            *(1, 2, 6, 8, 32),
            *(40, 48),
        ]

    def test_one_graph_serves_rows_that_come_and_go(self):
        """A rule once asked for stays: no round is traced again and again."""
        pair = reference_pair()
        decoder = make_batch_decoder(
            pair, num_draft_tokens=2, draft_source=DRAFTER, max_rows=4
        )
        kinds = [SamplingParams(), SamplingParams(1.0, top_k=8, seed=1)]
        first = [decoder.add(Request([5, 6], 200, kind)) for kind in kinds]
        with uncompiled():
            for _ in range(4):
                decoder.step()
            traced = decoder.stats.traced
            for kind in (*kinds, *kinds):
                row = decoder.add(Request([7, 8, 9], 4, kind))
                while row.is_live:
                    decoder.step()
                decoder.step()
        assert decoder.stats.traced <= traced + 1  # three seats
        for row in first:
            decoder.remove(row)
        decoder.close()


class TestFailures:
    """What MLX raises, for want of memory for one, ends the rows that it hits."""

    def test_a_prompt_that_cannot_be_read(self, chain):
        class Target(ChainTarget):
            def prefill(self, tokens, caches, sizes):
                if max(sizes) > 20:
                    raise RuntimeError("no memory")
                return super().prefill(tokens, caches, sizes)

        decoder = Decoder(
            Rounds(Target(), ChainDrafter(), use_compile=False), num_draft_tokens=1
        )
        running = decoder.add(Request([GOOD], 30))
        decoder.step()
        bad = decoder.add(Request([GOOD] * 25, 5))
        later = decoder.add(Request([BAD], 5))
        ends = {}
        found: dict[Any, list[int]] = {running: [*running.emitted], later: []}
        while not decoder.is_idle:
            for emission in decoder.step().outputs:
                found.setdefault(emission.sequence, []).extend(emission.tokens)
                ends[emission.sequence] = emission
        assert ends[bad].finish_reason == "error"
        assert str(ends[bad].error) == "no memory"
        assert found[running] == chain_text([GOOD], 30)
        assert found[later] == chain_text([BAD], 5)

    def test_a_round_that_fails(self, chain, caplog):
        chain = Rounds(ChainTarget(), ChainDrafter(), use_compile=False)
        decoder = Decoder(chain, num_draft_tokens=1)
        rounds = decoder._rounds
        rows = [decoder.add(Request([GOOD], 30)) for _ in range(2)]
        decoder.step()
        run, rounds.run = rounds.run, fails  # type: ignore[method-assign]
        waits = decoder.add(Request([GOOD], 5))
        emissions = decoder.step().outputs
        assert {e.sequence for e in emissions if e.finish_reason == "error"} == set(
            rows
        )
        assert "have failed" in caplog.text
        assert decoder.kv_bytes == 0
        rounds.run = run  # type: ignore[method-assign]
        drain(decoder)
        assert waits.emitted == chain_text([GOOD], 5)

    def test_a_seat_that_cannot_be_made(self, chain, monkeypatch):
        decoder = Decoder(chain, num_draft_tokens=1)
        running = decoder.add(Request([GOOD], 30))
        decoder.step()
        row = decoder.add(Request([GOOD], 30))
        with monkeypatch.context() as patched:
            patched.setattr(decoder._batch, "insert", fails)
            emissions = decoder.step().outputs
        ends = {e.sequence: e.finish_reason for e in emissions if e.finish_reason}
        assert ends == {running: "error", row: "error"}
        assert decoder.is_idle
        assert decoder.kv_bytes == 0
        later = decoder.add(Request([GOOD], 30))
        drain(decoder)
        assert later.emitted == chain_text([GOOD], 30)

    def test_caches_that_cannot_be_kept(self, chain, monkeypatch):
        """They end their own row; who ended with it, and who goes on, do not notice."""
        decoder = Decoder(chain, num_draft_tokens=1)
        bad, good = (decoder.add(Request([GOOD], 5, keeps_cache=True)) for _ in "ab")
        runs = decoder.add(Request([GOOD], 30))
        take = decoder._batch.extract

        def taken(row, num_tokens):
            return fails() if row is bad else take(row, num_tokens)

        monkeypatch.setattr(decoder._batch, "extract", taken)
        ends = {}
        while not decoder.is_idle:
            for emission in decoder.step().outputs:
                if emission.finish_reason:
                    ends[emission.sequence] = emission
        assert ends[bad].finish_reason == bad.finish_reason == "error"
        assert str(ends[bad].error) == "no memory"
        assert bad.emitted == chain_text([GOOD], 5)
        assert ends[good].finish_reason == ends[runs].finish_reason == "length"
        assert ends[good].prompt_cache is not None
        assert runs.emitted == chain_text([GOOD], 30)

    @pytest.mark.parametrize("how", ["removed", "ended"])
    def test_a_round_that_nobody_waits_for(self, chain, monkeypatch, caplog, how):
        """It was queued before the last row left: that it fails is no one's error."""
        decoder = Decoder(chain, num_draft_tokens=1)
        limit = 30 if how == "removed" else 4
        row = decoder.add(Request([GOOD], limit, eos_token_ids=frozenset()))
        while row.num_emitted < 4:
            decoder.step()
        waits = decoder.add(Request([GOOD], 5))
        with monkeypatch.context() as patched:
            patched.setattr(decoder._pipeline, "rest", rest_that_fails(decoder))
            if how == "removed":
                decoder.remove(row)
            decoder.step()
        assert "not needed has failed" in caplog.text
        drain(decoder)
        assert waits.emitted == chain_text([GOOD], 5)

    def test_a_row_that_is_removed_while_the_device_fails(self, chain, monkeypatch):
        """Whoever removes it hears nothing; the others end with the next step."""
        decoder = Decoder(chain, num_draft_tokens=1)
        gone, other = (decoder.add(Request([GOOD], 30)) for _ in "ab")
        decoder.step()
        monkeypatch.setattr(decoder._batch, "free", fails)
        decoder.remove(gone)
        (emission,) = decoder.step().outputs
        assert (emission.sequence, emission.finish_reason) == (other, "error")
        assert decoder.is_idle

    def test_what_was_emitted_before_a_failure_is_not_lost(self, chain, monkeypatch):
        """A row that ends in the round before a seat cannot be made."""
        decoder = Decoder(chain, num_draft_tokens=0)
        ends_now, runs = (decoder.add(Request([GOOD], n)) for n in (2, 30))
        decoder.step()
        decoder.add(Request([GOOD], 30))
        monkeypatch.setattr(decoder._batch, "insert", fails)
        emissions = decoder.step().outputs
        assert [e.finish_reason for e in emissions if e.sequence is ends_now] == [
            "length"
        ]
        assert [e.finish_reason for e in emissions if e.sequence is runs] == [
            None,
            "error",
        ]


def rest_that_fails(decoder):
    """Lets go of everything, as a rest does, and then raises what a round raised."""
    rest = decoder._pipeline.rest

    def failing():
        rest()
        fails()

    return failing


def fails(*args, **kwargs):
    raise RuntimeError("no memory")


class Told(DraftPolicy):
    """Always one draft; says for how many seats a round was that it is told of."""

    def __init__(self, tell, num_seats=0):
        super().__init__(1)
        self._tell, self._num_seats = tell, num_seats

    def for_batch(self, num_seats, *, rule, context):
        return Told(self._tell, num_seats)

    def observe(self, way, accepted, seconds, *, context=0, **rest):
        self._tell(self._num_seats)


class Lengths(DraftPolicy):
    """Always one draft; notes the lengths of context that it is told, and tokens."""

    def __init__(self):
        super().__init__(1)
        self.chosen: list[int] = []
        self.observed: list[int] = []
        self.emitted: list[int] = []

    def choose(self, allowed, *, context=0, **rest):
        self.chosen.append(context)
        return super().choose(allowed, **rest)

    def observe(self, way, accepted, seconds, *, context=0, **rest):
        self.observed.append(context)
        self.emitted += [count + 1 for count in accepted]


class TestController:
    """Rounds are credited to who chose them, and the caller's time to nobody."""

    def test_rounds_go_to_their_chooser(self, chain):
        told: list[tuple[int, int]] = []
        num_computed: list[int] = []
        rounds = Rounds(ChainTarget(), ChainDrafter(), use_compile=False)
        run = rounds.run

        def counted(state, *args, **kwargs):
            num_computed.append(state.offset.shape[0])
            return run(state, *args, **kwargs)

        rounds.run = counted  # type: ignore[method-assign]
        policy = Told(lambda seats: told.append((seats, num_computed.pop(0))))
        decoder = Decoder(rounds, num_draft_tokens=policy)
        for limit in (30, 4, 16):
            decoder.add(Request([GOOD], limit))
            for _ in range(3):
                decoder.step()
        while num_computed and not decoder.is_idle:
            decoder.step()
        assert len({n for n, _ in told}) > 1
        assert all(one == other for one, other in told)

    @pytest.mark.parametrize("look_ahead", [False, True])
    def test_rounds_are_told_with_the_context_they_had(self, chain, look_ahead):
        policy = Lengths()
        rounds = Rounds(ChainTarget(), ChainDrafter(), use_compile=False)
        decoder = Decoder(
            rounds,
            [Request([GOOD] * 5, 30)],
            num_draft_tokens=policy,
            look_ahead=look_ahead,
        )
        while not decoder.is_idle:
            decoder.step()
        assert policy.observed == policy.chosen[: len(policy.observed)]
        first, steps = policy.chosen[0], list(pairwise(policy.chosen))
        assert first in (4, 5)  # the newest token is read by the round
        if not look_ahead:
            assert [b - a for a, b in steps] == policy.emitted[: len(steps)]
        assert policy.chosen[-1] >= 25

    def test_the_callers_time_is_not_the_rounds(self, chain, monkeypatch):
        """The clock stands still but for the caller: rounds have no time at all."""
        now = [0.0]
        monkeypatch.setattr("time.perf_counter", lambda: now[0])
        timer = RoundTimer(clock=lambda: now[0])
        monkeypatch.setattr("mlx_gemma_mtp.engine.decoder.RoundTimer", lambda: timer)
        decoder = Decoder(chain, num_draft_tokens=1)
        decoder.add(Request([GOOD], 40))
        decoder.add(Request([BAD], 40))
        while not decoder.is_idle:
            decoder.step()
            now[0] += 1.0
        assert timer.phases.rounds_s == timer.phases.prefill_s == 0
        assert timer.phases.host_s > 10

    def test_an_expensive_rule_goes_with_its_row(self):
        """Kernels, short lists and nobody's log-probabilities come back at once."""
        lists = sampling_graph([SamplingParams(1.0, 0.9, 64, seed=1)])
        for other in (
            SamplingParams(1.0, seed=1),
            SamplingParams(1.0, top_k=2000, seed=1),
            SamplingParams(1.0, top_k=64, seed=1, xtc_probability=0.5),
            SamplingParams(),
        ):
            graph = sampling_graph([other], num_logprobs=64)
            assert lists.joined(graph) == lists
            assert graph.joined(lists) == graph
        block = sampling_graph([SamplingParams(1.0, top_k=5, reproducible=False)])
        (both,) = lists.joined(block).groups
        assert both.has_block
        assert both.has_coupled
        assert both.has_top_p


def test_pauses_change_no_text(chain):
    """Chunks end at pauses; the text is the same."""
    request = Request([4, 8, 15, 16, 23, 42], 12)
    texts = set()
    for pauses in ((), (1,), (1, 2, 3, 4, 5), (5,)):
        decoder = Decoder(chain, num_draft_tokens=3)
        row = decoder.add(replace(request, pauses=pauses))
        drain(decoder)
        texts.add(tuple(row.emitted))
    assert texts == {tuple(chain_text(request.prompt, 12))}
