"""Logits processors and samplers: called as in plain decoding, drafts or not.

Run: python -m pytest tests/sampling/test_host.py
"""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_gemma_mtp.engine.capacity import Capacity
from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.engine.state import Report
from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.generation import tokens as tokens_module
from mlx_gemma_mtp.generation.figures import describe
from mlx_gemma_mtp.generation.text import stream_generate
from mlx_gemma_mtp.generation.tokens import generate_tokens
from mlx_gemma_mtp.pair.load import load
from mlx_gemma_mtp.sampling.host import HostRow
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.scripted import VOCAB_SIZE as SCRIPTED_SIZE
from tests.scripted import ScriptedDrafter, ScriptedTarget
from tests.tiny import (
    VOCAB_SIZE,
    model_folder,
    record_decoders,
    reference_pair,
)

pytestmark = pytest.mark.usefixtures("plain_graphs")

PROMPT = [2, 17, 300, 45, 99]
# Noise outweighs the logits of a random pair, so that its drafts are accepted.
SEEDED: dict[str, Any] = {"temp": 2.0, "seed": 3}
FILTERS = {"top_k": 40, "top_p": 0.9, "min_p": 0.01}
PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"presence_penalty": 2.0},
    {"frequency_penalty": 1.5, "frequency_context_size": 5},
    {"logit_bias": {40: 3.0, 41: -5.0, 300: 2.5}},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {7: 2.0}},
]


@pytest.fixture(scope="module")
def pair():
    return reference_pair()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(model_folder(tmp_path_factory.mktemp("processing") / "pair"))


class Recorder:
    """Keeps the histories it is called with, their types and the logits' shapes."""

    def __init__(self):
        self.histories, self.types = [], []

    def __call__(self, tokens, logits):
        assert logits.ndim == 2
        assert logits.shape[0] == 1
        self.histories.append(tokens.tolist())
        self.types.append((tokens.dtype, logits.dtype))
        return logits


def run(pair, prompt=PROMPT, num_draft_tokens=0, max_tokens=14, **settings):
    settings = {"eos_token_ids": (), "max_tokens": max_tokens, **settings}
    return list(
        generate_tokens(pair, prompt, num_draft_tokens=num_draft_tokens, **settings)
    )


def histories_of(prompt, tokens):
    """What plain decoding passes to a processor: one call for each token."""
    return [[*prompt, *tokens[:i]] for i in range(len(tokens))]


def raising(*_):
    raise AssertionError("must not be called")


class TestHistories:
    @pytest.mark.parametrize(
        ("num_draft_tokens", "sampling"), [(0, {}), (1, SEEDED), (4, {}), (8, SEEDED)]
    )
    def test_are_those_of_plain_decoding(self, pair, num_draft_tokens, sampling):
        seen = Recorder()
        tokens = run(
            pair, PROMPT, num_draft_tokens, logits_processors=[seen], **sampling
        )
        assert tokens == run(pair, **sampling)
        assert seen.histories == histories_of(PROMPT, tokens)

    def test_are_those_of_mlx_lm(self, pair):
        """It looks one token further than it yields."""
        theirs, ours = Recorder(), Recorder()
        steps = generate_step(
            mx.array(PROMPT), pair.target, max_tokens=16, logits_processors=[theirs]
        )
        expected = [token for token, _ in steps]
        tokens = run(pair, PROMPT, 4, 16, logits_processors=[ours])
        assert tokens == expected
        assert ours.histories == theirs.histories[:16]
        assert ours.types == theirs.types[:16]

    @pytest.mark.parametrize(
        ("num_draft_tokens", "place"),
        [(0, 3), (1, 0), (1, 1), *((4, place) for place in range(6)), (8, 0), (8, 7)],
    )
    def test_end_with_the_text(self, place, num_draft_tokens):
        """No call past an end of sequence, nor past the budget; drafts are right."""
        text = list(range(10, 40))
        script = [5, 6, *text[:place], 1, *text[place:]]
        for eos, max_tokens in (({1}, 30), (set(), place + 1)):
            seen = Recorder()
            rounds = Rounds(
                ScriptedTarget([script]), ScriptedDrafter([script]), use_compile=False
            )
            request = Request(
                [5, 6],
                max_tokens,
                eos_token_ids=frozenset(eos),
                logits_processors=(seen,),
            )
            decoder = Decoder(rounds, [request], num_draft_tokens=num_draft_tokens)
            emissions = [e for (e,) in decoder.run()]
            tokens = [t for e in emissions for t in e.tokens]
            assert tokens == script[2 : place + 3]
            assert seen.histories == histories_of([5, 6], tokens)
            assert emissions[-1].finish_reason == ("stop" if eos else "length")
            if place and num_draft_tokens:
                assert decoder.stats.accepted == sum(
                    e.num_from_draft for e in emissions
                )

    @given(data=st.data())
    def test_of_any_script_and_any_drafts(self, data):
        small = st.integers(min_value=0, max_value=3)
        text, drafts = (
            data.draw(st.lists(small, min_size=12, max_size=12)) for _ in "ab"
        )
        num_draft_tokens, max_tokens = (
            data.draw(st.integers(*bounds)) for bounds in ((0, 5), (1, 12))
        )
        seen = Recorder()
        rounds = Rounds(
            ScriptedTarget([[5, 6, *text]]),
            ScriptedDrafter([[5, 6, *drafts]]),
            use_compile=False,
        )
        request = Request(
            [5, 6],
            max_tokens,
            eos_token_ids=frozenset({1}),
            logits_processors=(seen,),
        )
        decoder = Decoder(rounds, [request], num_draft_tokens=num_draft_tokens)
        tokens = [t for (e,) in decoder.run() for t in e.tokens]
        expected = text[:max_tokens]
        if 1 in expected:
            expected = expected[: expected.index(1) + 1]
        assert tokens == expected
        assert seen.histories == histories_of([5, 6], tokens)

    def test_of_each_row_are_its_own(self, pair):
        prompts = [PROMPT, [7, 300, 8], [2, 5]]
        seen = Recorder()
        rows = run(pair, prompts, 3, 8, logits_processors=[seen], **SEEDED)
        for i, prompt in enumerate(prompts):
            tokens = [row[i] for row in rows]
            assert tokens == run(pair, prompt, max_tokens=8, **SEEDED)
            own = [h for h in seen.histories if h[: len(prompt)] == prompt]
            assert own == histories_of(prompt, tokens)

    def test_cannot_be_written(self, pair):
        def vandal(tokens, logits):
            tokens[:] = 0
            return logits

        seen = Recorder()
        processors = [vandal, vandal]
        assert run(pair, PROMPT, 4, logits_processors=processors) == run(pair)
        tokens = run(pair, PROMPT, 4, logits_processors=[seen, *processors])
        assert seen.histories == histories_of(PROMPT, tokens)


class TestPenalties:
    @pytest.mark.parametrize("penalty", PENALTIES)
    def test_greedy_text_is_that_of_mlx_lm(self, pair, penalty):
        steps = generate_step(
            mx.array(PROMPT),
            pair.target,
            max_tokens=14,
            logits_processors=make_logits_processors(**penalty),
        )
        expected = [token for token, _ in steps]
        assert expected != run(pair)
        for num_draft_tokens in (0, 4):
            processors = make_logits_processors(**penalty)
            tokens = run(pair, PROMPT, num_draft_tokens, logits_processors=processors)
            assert tokens == expected

    @pytest.mark.parametrize(
        ("penalty", "more"),
        [
            (PENALTIES[0], {}),
            (PENALTIES[1], {"reproducible": False}),
            (PENALTIES[2], FILTERS),
            (PENALTIES[3], {**FILTERS, "reproducible": False}),
            (PENALTIES[4], FILTERS),
        ],
    )
    def test_seeded_text_does_not_depend_on_drafts(self, pair, penalty, more):
        sampling = {**SEEDED, **more}
        texts = [
            run(
                pair,
                PROMPT,
                num_draft_tokens,
                logits_processors=make_logits_processors(**penalty),
                **sampling,
            )
            for num_draft_tokens in (0, 3)
        ]
        assert texts[0] == texts[1]

    @pytest.mark.parametrize(
        "sampling",
        [
            {"temp": 1.0, "top_k": 3, "seed": 2},
            pytest.param({}, marks=pytest.mark.slow),
        ],
    )
    def test_as_many_drafts_stand_as_on_the_device(self, monkeypatch, sampling):
        pair = reference_pair("12b")  # which has some drafts accepted
        decoders = record_decoders(monkeypatch, tokens_module)
        for processors in ([], [Recorder()]):
            run(pair, PROMPT, 4, 41, logits_processors=processors, **sampling)
        device, host = (decoder.stats for decoder in decoders)
        assert host.rounds == device.rounds
        # Of the last round the host judges only what the budget leaves.
        assert device.accepted - 4 <= host.accepted <= device.accepted
        assert host.accepted > 0

    def test_without_a_seed(self, pair):
        settings = {"temp": 2.0, "logits_processors": [Recorder()]}
        assert run(pair, PROMPT, 3, **settings) != run(pair, PROMPT, 3, **settings)


class TestSamplers:
    @pytest.mark.parametrize(
        ("num_draft_tokens", "processors"), [(1, None), (4, [Recorder()])]
    )
    def test_text_of_the_global_state(self, pair, num_draft_tokens, processors):
        def sample(logprobs):
            assert logprobs.shape == (1, VOCAB_SIZE)
            assert mx.exp(logprobs).sum().item() == pytest.approx(1, abs=1e-4)
            return mx.random.categorical(logprobs * 0.3)

        texts = []
        for k in (0, num_draft_tokens):
            mx.random.seed(11)
            texts.append(
                run(pair, PROMPT, k, sampler=sample, logits_processors=processors)
            )
        assert texts[0] == texts[1]
        mx.random.seed(11)
        steps = generate_step(
            mx.array(PROMPT), pair.target, max_tokens=14, sampler=sample
        )
        assert [token for token, _ in steps] == texts[0]

    def test_is_called_once_for_each_token(self, pair):
        calls = []

        def sample(logprobs):
            calls.append(logprobs)
            return mx.argmax(logprobs, axis=-1)

        assert run(pair, PROMPT, 4, sampler=sample) == run(pair)
        assert len(calls) == 14

    def test_one_that_is_known_is_not_called(self, pair, monkeypatch):
        decoders = record_decoders(monkeypatch, tokens_module)
        monkeypatch.setattr(
            "mlx_gemma_mtp.generation.requests.sampler_params",
            lambda _: SamplingParams(2.0, top_k=50),
        )
        tokens = run(pair, PROMPT, 4, sampler=raising, seed=5)
        assert tokens == run(pair, PROMPT, 4, temp=2.0, top_k=50, seed=5)
        assert decoders[0].stats.rule == "coupled (seed)"

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"temp": 0.5, "top_k": 3}, r"got temp=0.5, top_k=3, expected the sampler"),
            ({"seed": 7}, "got seed=7"),
            ({"min_p": 0.1}, "got min_p=0.1"),
            ({"sampler": 5}, "sampler must be a function: got 5"),
        ],
    )
    def test_beside_other_settings(self, pair, settings, message):
        with pytest.raises(RequestError, match=message) as caught:
            generate_tokens(
                pair, PROMPT, max_tokens=4, **{"sampler": raising, **settings}
            )
        assert "\n" not in str(caught.value)


class TestMistakes:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"logits_processors": [lambda _, logits: logits[0]]},
                r"logits as mlx-lm's do: got shape \[512\], expected an mx.array of "
                r"shape \[1, 512\]",
            ),
            ({"logits_processors": [lambda *_: None]}, "got NoneType"),
            ({"logits_processors": [lambda _, x: x - mx.inf]}, "got -inf as"),
            ({"logits_processors": [lambda _, x: x * mx.nan], "temp": 1}, "got nan"),
            ({"logits_processors": [lambda _, x: x + mx.inf], "temp": 1}, "got inf"),
            ({"logits_processors": [lambda _, x: np.array(x)]}, "got ndarray"),
            ({"sampler": lambda x: x}, r"one token .* got shape \[1, 512\]"),
            ({"sampler": lambda x: 5}, r"got int, expected an mx.array of shape \[1\]"),
            ({"sampler": lambda x: mx.array([512])}, "got 512, expected 0 to 511"),
            ({"sampler": lambda x: mx.array([0.5])}, "token id: got 0.5"),
        ],
    )
    def test_of_a_function(self, pair, settings, message):
        for num_draft_tokens in (0, 4):
            with pytest.raises(RequestError, match=message) as caught:
                run(pair, PROMPT, num_draft_tokens, **settings)
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("processors", [5, [5], raising, "ab"])
    def test_of_the_list(self, pair, processors):
        with pytest.raises(RequestError, match="must be a list of functions: got"):
            generate_tokens(pair, PROMPT, max_tokens=4, logits_processors=processors)

    @pytest.mark.parametrize(
        ("num_draft_tokens", "call"), [(0, 1), (4, 0), (4, 1), (4, 7)]
    )
    def test_exceptions_come_through(self, pair, monkeypatch, call, num_draft_tokens):
        decoders = record_decoders(monkeypatch, tokens_module)
        calls = []

        def fail(tokens, logits):
            calls.append(tokens)
            if len(calls) == call + 1:
                raise ZeroDivisionError("mine")
            return logits

        stream = generate_tokens(
            pair,
            PROMPT,
            max_tokens=20,
            num_draft_tokens=num_draft_tokens,
            logits_processors=[fail],
        )
        with pytest.raises(ZeroDivisionError, match="mine"):
            list(stream)
        stream.close()
        decoder = decoders[-1]
        assert not decoder._pipeline._in_flight
        assert decoder._batch.state is None
        assert decoder._pipeline._runner._verified is None
        assert len(calls) == call + 1


def emissions_by_row(rounds, requests, num_draft_tokens=3, **options):
    decoder = Decoder(rounds, requests, num_draft_tokens=num_draft_tokens, **options)
    rows: list[list[Any]] = [[] for _ in requests]
    for emissions in decoder.run():
        for emission in emissions:
            rows[emission.sequence.index].append(emission)
    return rows, decoder


def tokens_of(emissions):
    return [token for emission in emissions for token in emission.tokens]


class TestBatches:
    def requests(self):
        """One row of every kind, with budgets that end at different rounds."""
        penalty = tuple(make_logits_processors(repetition_penalty=1.4))
        return [
            Request(PROMPT, 10),
            Request([7, 300, 8], 5, logits_processors=penalty),
            Request([9, 8], 12, SamplingParams(2.0, seed=4)),
            Request([2, 50], 7, SamplingParams(2.0, seed=9), frozenset(), penalty),
            Request([2, 60], 11, SamplingParams(2.0, seed=6, reproducible=False)),
            Request([2, 70], 6, sampler=lambda x: mx.argmax(x, axis=-1)),
        ]

    @pytest.mark.parametrize("num_draft_tokens", [0, 3])
    def test_rows_do_not_depend_on_their_neighbours(self, pair, num_draft_tokens):
        requests = self.requests()
        rows, decoder = emissions_by_row(pair.rounds, requests, num_draft_tokens)
        for request, emissions in zip(requests, rows, strict=True):
            ((alone,), _) = emissions_by_row(pair.rounds, [request], num_draft_tokens)
            assert tokens_of(emissions) == tokens_of(alone)
            assert [len(e.tokens) for e in emissions] == [len(e.tokens) for e in alone]
            for one, other in zip(emissions, alone, strict=True):
                count = len(one.tokens)
                ours, theirs = one.logits[one.place, :count], other.logits[0, :count]
                assert mx.allclose(ours, theirs, atol=1e-4)
        assert decoder.stats.rule == (
            "greedy; accept-if-equal: processors; coupled (seed); block verification; "
            "accept-if-equal: custom sampler"
        )

    def test_look_ahead_comes_back_with_the_last_host_row(self, pair):
        requests = [*self.requests()[:2], Request([3, 4], 14)]
        decoder = Decoder(pair.rounds, requests, num_draft_tokens=0)
        in_flight = [len(decoder._pipeline._in_flight) for _ in decoder.run()]
        # Row 1 has its 5 tokens after round 4; the next round queues two.
        assert in_flight[:5] == [0] * 5
        assert in_flight[5:-2] == [1] * len(in_flight[5:-2])
        assert len(in_flight) == 14

    def test_a_row_that_ends_early_keeps_the_others_going(self):
        scripts = [[5, 6, *range(10, 40)], [5, 6, 10, 1, *range(12, 40)]]
        rounds = Rounds(
            ScriptedTarget(scripts), ScriptedDrafter(scripts), use_compile=False
        )
        seen = Recorder()
        requests = [
            Request([5, 6], 20, SamplingParams(), frozenset({1}), (seen,))
            for _ in scripts
        ]
        (first, second), _ = emissions_by_row(rounds, requests)
        assert tokens_of(first) == scripts[0][2:22]
        assert tokens_of(second) == [10, 1]
        assert len(seen.histories) == 22


class TestEngine:
    def test_one_read_per_round_and_no_look_ahead(self, pair, monkeypatch):
        reads = []
        read = Report.read

        def counted_read(report):
            reads.append(report)
            return read(report)

        monkeypatch.setattr(Report, "read", counted_read)
        request = Request(PROMPT, 10, logits_processors=(Recorder(),))
        decoder = Decoder(pair.rounds, [request], num_draft_tokens=3)
        num_rounds = 0
        for _ in decoder.run():
            assert not decoder._pipeline._in_flight
            num_rounds += 1
        assert len(reads) == num_rounds  # the prefill is one of them
        assert decoder._pipeline._num_queued == num_rounds - 1

    @pytest.mark.parametrize("num_draft_tokens", [0, 1])
    def test_slabs_are_written_in_place(self, monkeypatch, num_draft_tokens):
        """Memory beyond the slabs stays below the size of one slab."""
        pair = reference_pair("31b")
        monkeypatch.setattr(Capacity, "initial", lambda self: 32768)
        request = Request(PROMPT, 40, logits_processors=(Recorder(),))
        decoder = Decoder(pair.rounds, [request], num_draft_tokens=num_draft_tokens)
        rounds = decoder.run()
        for _ in range(3):
            next(rounds)
        assert decoder._batch.state is not None
        largest = max(slab.nbytes for slab in decoder._batch.state.slabs)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        for _ in range(4):
            next(rounds)
        rounds.close()
        assert mx.get_peak_memory() - before < largest

    @pytest.mark.parametrize("num_draft_tokens", [0, 3])
    def test_logits_are_the_processed_ones(self, pair, num_draft_tokens):
        def only(tokens, logits):
            allowed = mx.arange(VOCAB_SIZE) % 7 == len(tokens) % 7
            return mx.where(allowed, logits, -mx.inf)

        request = Request(PROMPT, 10, logits_processors=(only,))
        ((emissions,), _) = emissions_by_row(pair.rounds, [request], num_draft_tokens)
        length = len(PROMPT)
        for emission in emissions:
            for i, token in enumerate(emission.tokens):
                row = np.array(emission.logits[0, i])
                assert token == row.argmax()
                is_kept = np.arange(VOCAB_SIZE) % 7 == length % 7
                assert (np.isfinite(row) == is_kept).all()
                length += 1

    def test_compiled_rounds_agree(self, pair):
        """Rounds that end before their commit go through mx.compile as well."""
        processors = make_logits_processors(presence_penalty=0.5)
        texts = []
        for use_compile in (False, True):
            rounds = Rounds(pair.rounds.target, pair.drafter, use_compile=use_compile)
            request = Request(PROMPT, 10, logits_processors=tuple(processors))
            ((emissions,), _) = emissions_by_row(rounds, [request])
            texts.append(tokens_of(emissions))
        assert texts[0] == texts[1]

    def test_processors_may_write_into_the_logits(self):
        def spoil(tokens, logits):
            logits[:, 3] = 100.0
            logits[:] = logits * 2
            return logits

        block = mx.array(np.random.default_rng(0).normal(size=(4, SCRIPTED_SIZE)))
        before = np.array(block)
        row = HostRow(
            [1, 2], processors=[spoil], sampler=None, sampling=SamplingParams()
        )
        judged = row.judge(block, [3, 3, 4], is_end=lambda _: False)
        assert (judged.num_accepted, judged.tokens) == (2, [3, 3, 3])
        assert judged.logits.shape == (1, 3, SCRIPTED_SIZE)
        assert np.array_equal(np.array(block), before)

    @hypothesis_settings(max_examples=40)
    @given(data=st.data())
    def test_a_block_is_the_steps_one_by_one(self, data):
        """Any drafts, any end: what plain decoding of the same rows decides."""
        tokens = st.integers(0, 3)
        drafts = data.draw(st.lists(tokens, max_size=6))
        end = data.draw(tokens)
        seed = data.draw(st.integers(0, 99))
        rng = np.random.default_rng(seed)
        block = mx.array(rng.normal(size=(len(drafts) + 1, 4)).astype(np.float32))
        sampling = SamplingParams(1.0, seed=seed)

        def row():
            return HostRow([1], processors=[], sampler=None, sampling=sampling)

        judged = row().judge(block, drafts, is_end=lambda token: token == end)
        single, expected = row(), []
        for i, draft in enumerate([*drafts, None]):
            step = single.judge(block[i, None], [], is_end=lambda _: False)
            expected += step.tokens
            if step.tokens[0] != draft or draft == end:
                break
        assert judged.tokens == expected
        equal = [a == b for a, b in zip(judged.tokens, drafts, strict=False)]
        assert judged.num_accepted == sum(equal)


class ListGrammar:
    """Allows a JSON list of whole numbers, ``[1,23,4]``, and then the end.

    It keeps its state between the calls, as compiled grammars do, and counts on every
    token's coming exactly once.

    Args:
        vocabulary: Token ids by piece.
        eos_token_id: What follows the closing bracket.
    """

    NEXT = {  # noqa: RUF012
        "start": {"[": "number"},
        "number": dict.fromkeys("123456789", "digits"),
        "digits": {**dict.fromkeys("0123456789", "digits"), ",": "number", "]": "end"},
    }

    def __init__(self, vocabulary, eos_token_id):
        self._pieces = {i: piece for piece, i in vocabulary.items()}
        self._ids = vocabulary
        self._eos = eos_token_id
        self._state = "start"
        self._num_seen = None
        self.text = ""

    def __call__(self, tokens, logits):
        if self._num_seen is not None:
            assert tokens.size == self._num_seen + 1
            piece = self._pieces[tokens[-1].item()]
            self._state = self.NEXT[self._state][piece]
            self.text += piece
        self._num_seen = tokens.size
        pieces = self.NEXT.get(self._state)
        ids = [self._eos] if pieces is None else [self._ids[p] for p in pieces]
        allowed = mx.zeros(logits.shape, dtype=mx.bool_)
        allowed[:, mx.array(ids)] = True
        return mx.where(allowed, logits, -mx.inf)


class TestText:
    PROMPT = "the rain"

    def responses(self, loaded, **settings):
        model, tokenizer = loaded
        return list(stream_generate(model, tokenizer, self.PROMPT, **settings))

    @pytest.mark.parametrize(
        ("num_draft_tokens", "sampling"),
        [(1, {}), (4, SEEDED), (4, {"temp": 1.5, "top_k": 5})],
    )
    def test_a_grammar(self, loaded, num_draft_tokens, sampling):
        tokenizer = loaded[1]
        assert isinstance(tokenizer, TokenizerWrapper)
        grammar = ListGrammar(tokenizer.get_vocab(), tokenizer.eos_token_id)
        found = self.responses(
            loaded,
            max_tokens=20,
            num_draft_tokens=num_draft_tokens,
            logits_processors=[grammar],
            **sampling,
        )
        text = "".join(r.text for r in found)
        assert text.startswith("[")
        if found[-1].finish_reason == "stop":
            assert isinstance(json.loads(text), list)
        assert grammar.text in text
        if sampling.get("seed") or not sampling:
            grammar = ListGrammar(tokenizer.get_vocab(), tokenizer.eos_token_id)
            plain = self.responses(
                loaded,
                max_tokens=20,
                num_draft_tokens=0,
                logits_processors=[grammar],
                **sampling,
            )
            assert [r.token for r in plain] == [r.token for r in found]

    def test_logprobs_are_the_processed_ones(self, loaded):
        bias = make_logits_processors(logit_bias={50: 4.0})
        settings: dict[str, Any] = {"max_tokens": 12, "logits_processors": bias}
        found, plain = (
            self.responses(loaded, num_draft_tokens=k, **settings) for k in (4, 0)
        )
        for one, other in zip(found, plain, strict=True):
            assert one.token == other.token == mx.argmax(one.logprobs).item()
            assert mx.allclose(one.logprobs, other.logprobs, atol=1e-4)

    def test_stop_strings(self, loaded):
        settings: dict[str, Any] = {"max_tokens": 16, "num_draft_tokens": 4}
        penalty = make_logits_processors(repetition_penalty=1.2)
        settings["logits_processors"] = penalty
        whole = "".join(r.text for r in self.responses(loaded, **settings))
        stop = whole[9:12]
        found = self.responses(loaded, stop=stop, **settings)
        assert "".join(r.text for r in found) == whole[: whole.index(stop)]
        assert found[-1].finish_reason == "stop"

    def test_closed_early(self, loaded):
        model, tokenizer = loaded
        seen = Recorder()
        settings: dict[str, Any] = {"logits_processors": [seen], "num_draft_tokens": 4}
        stream = stream_generate(model, tokenizer, self.PROMPT, **settings)
        found = list(islice(stream, 5))
        stream.close()
        prompt = seen.histories[0]
        tokens = [r.token for r in found]
        assert seen.histories[: len(tokens)] == histories_of(prompt, tokens)
        assert len(seen.histories) <= len(tokens) + 4
        assert [r.token for r in self.responses(loaded, max_tokens=5)] == tokens

    @pytest.mark.parametrize(
        ("settings", "rule"),
        [
            ({}, "greedy"),
            (SEEDED, "coupled (seed)"),
            ({"temp": 1.0}, "block verification"),
            ({**SEEDED, "reproducible": False}, "block verification"),
            ({"logits_processors": []}, "greedy"),
            ({"logits_processors": [Recorder()]}, "accept-if-equal: processors"),
            (
                {"sampler": lambda x: mx.argmax(x, axis=-1)},
                "accept-if-equal: custom sampler",
            ),
            (
                {
                    "sampler": lambda x: mx.argmax(x, axis=-1),
                    "logits_processors": [Recorder()],
                },
                "accept-if-equal: processors, custom sampler",
            ),
        ],
    )
    def test_the_rule_is_named(self, loaded, settings, rule):
        found = self.responses(loaded, max_tokens=3, **settings)
        assert {r.rule for r in found} == {rule}
        assert describe(found[-1]).splitlines()[2].endswith(f"drafted, rule: {rule}")
