"""Log-probabilities against numpy and the target run plainly.

Run: python -m pytest tests/sampling/test_logprobs.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_logits_processors

from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.state import Report
from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.generation.text import stream_generate
from mlx_gemma_mtp.pair.load import load
from mlx_gemma_mtp.sampling.logprobs import log_probabilities
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.tiny import VOCAB_SIZE, model_folder, reference_pair

pytestmark = pytest.mark.usefixtures("plain_graphs")

PROMPT = [2, 17, 300, 45, 99]
SAMPLING = {
    "greedy": SamplingParams(),
    "coupled": SamplingParams(2.0, seed=3),
    "block": SamplingParams(1.5, 0.9, 40, seed=3, reproducible=False),
}
BIAS = {40: 3.0, 41: -5.0}


@pytest.fixture(scope="module")
def pair():
    return reference_pair()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(model_folder(tmp_path_factory.mktemp("logprobs") / "pair"))


def emissions_of(pair, requests, num_draft_tokens, num_logprobs):
    requests = [replace(request, num_logprobs=num_logprobs) for request in requests]
    decoder = Decoder(pair.rounds, requests, num_draft_tokens=num_draft_tokens)
    rows: list[list[Any]] = [[] for _ in requests]
    for emissions in decoder.run():
        for emission in emissions:
            rows[emission.sequence.index].append(emission)
    return rows


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def plain_logprobs(pair, prompt, tokens, bias=None):
    """Of the target run once over the whole text, [T, V]."""
    logits = pair.target(mx.array([[*prompt, *tokens]]))
    rows = np.array(logits.astype(mx.float32))[0, len(prompt) - 1 : -1].astype(float)
    for token, value in (bias or {}).items():
        rows[:, token] += value
    return log_softmax(rows)


def check(pair, request, emissions, num_logprobs, bias=None):
    tokens = [t for e in emissions for t in e.tokens]
    found = [entry for e in emissions for entry in e.logprobs]
    assert len(found) == len(tokens) == request.max_tokens
    expected = plain_logprobs(pair, request.prompt, tokens, bias)
    for row, token, entry in zip(expected, tokens, found, strict=True):
        assert entry.token == pytest.approx(row[token], abs=2e-4)
        assert len(entry.top) == num_logprobs
        ids, values = [i for i, _ in entry.top], [v for _, v in entry.top]
        assert all(type(i) is int for i in ids)
        assert len(set(ids)) == num_logprobs
        assert values == sorted(values, reverse=True)
        best = np.sort(row)[::-1][:num_logprobs]
        np.testing.assert_allclose(values, best, atol=2e-4)
        np.testing.assert_allclose(values, row[ids], atol=2e-4)


@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize(
    ("num_draft_tokens", "num_logprobs"), [(0, 5), (3, 0), (3, 1), (3, 5)]
)
def test_are_the_targets(pair, kind, num_draft_tokens, num_logprobs):
    request = Request(PROMPT, 9, SAMPLING[kind])
    (emissions,) = emissions_of(pair, [request], num_draft_tokens, num_logprobs)
    check(pair, request, emissions, num_logprobs)


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_after_processors(pair, num_draft_tokens):
    processors = tuple(make_logits_processors(logit_bias=BIAS))
    request = Request(PROMPT, 9, SAMPLING["coupled"], frozenset(), processors)
    (emissions,) = emissions_of(pair, [request], num_draft_tokens, 4)
    check(pair, request, emissions, 4, BIAS)


@pytest.mark.parametrize("has_host", [False, True])
def test_of_a_mixed_batch(pair, has_host):
    requests = [
        Request([*PROMPT, i], 5 + i, sampling)
        for i, sampling in enumerate(SAMPLING.values())
    ]
    if has_host:
        processors = tuple(make_logits_processors(logit_bias=BIAS))
        requests.append(Request(PROMPT, 9, SamplingParams(), frozenset(), processors))
    rows = emissions_of(pair, requests, 3, 2)
    for request, emissions in zip(requests, rows, strict=True):
        bias = BIAS if request.logits_processors else None
        check(pair, request, emissions, 2, bias)


def test_the_text_stays_the_same(pair):
    for sampling in SAMPLING.values():
        texts = []
        for num_logprobs in (None, 3):
            requests = [Request(PROMPT, 9, sampling)]
            (emissions,) = emissions_of(pair, requests, 3, num_logprobs)
            texts.append([e.tokens for e in emissions])
            assert num_logprobs or not any(e.logprobs for e in emissions)
        assert texts[0] == texts[1]


def test_rounds_still_look_ahead_and_read_once(pair, monkeypatch):
    reads = []
    read = Report.read

    def counted_read(report):
        reads.append(report)
        return read(report)

    monkeypatch.setattr(Report, "read", counted_read)
    decoder = Decoder(
        pair.rounds, [Request(PROMPT, 20, num_logprobs=5)], num_draft_tokens=3
    )
    in_flight, sizes = [], set()
    for _ in decoder.run():
        in_flight.append(len(decoder._pipeline._in_flight))
        for flight in decoder._pipeline._in_flight:
            report = flight.queued.report
            assert report is not None
            assert report.logprobs is not None
            sizes.add(tuple(a.shape for a in report.arrays))
    assert len(reads) == len(in_flight)
    assert set(in_flight[1:-2]) == {1}
    # Nothing of the vocabulary's size: 1 + 4 tokens, and 1 + 5 numbers for each.
    assert sizes == {((1, 5), (1, 4, 6), (1, 4, 5))}


def test_compiled_rounds_report_the_same(pair):
    mx.enable_compile()
    try:
        rows = emissions_of(pair, [Request(PROMPT, 12)], 3, 2)
    finally:
        mx.disable_compile()
    check(pair, Request(PROMPT, 12), rows[0], 2)


@given(
    rows=st.lists(
        st.lists(st.sampled_from([-3.0, 0.0, 1.5, 2.0]), min_size=6, max_size=6),
        min_size=1,
        max_size=3,
    ),
    num_logprobs=st.integers(0, 9),
    token=st.integers(0, 5),
)
def test_against_numpy(rows, num_logprobs, token):
    """Equal scores are listed by id; a list is no longer than the vocabulary."""
    tokens = mx.full((1, len(rows)), token, dtype=mx.int32)
    (found,) = log_probabilities(
        mx.array([rows]), tokens, num_logprobs=num_logprobs
    ).listed()
    for row, entry in zip(log_softmax(np.array(rows)), found, strict=True):
        order = np.argsort(-row, kind="stable")[:num_logprobs]
        assert [i for i, _ in entry.top] == order.tolist()
        np.testing.assert_allclose([v for _, v in entry.top], row[order], atol=1e-5)
        assert entry.token == pytest.approx(row[token], abs=1e-5)


def test_of_masked_tokens():
    logits = mx.array([[[0.0, -mx.inf, 1.0, -mx.inf]]])
    tokens = mx.array([[1]], dtype=mx.int32)
    ((entry,),) = log_probabilities(logits, tokens, num_logprobs=4).listed()
    assert entry.token == -np.inf
    assert [i for i, _ in entry.top] == [2, 0, 1, 3]
    assert [v for _, v in entry.top][2:] == [-np.inf, -np.inf]


class TestText:
    def responses(self, loaded, **settings):
        model, tokenizer = loaded
        return list(stream_generate(model, tokenizer, "the rain", **settings))

    @pytest.mark.parametrize("num_draft_tokens", [0, 4])
    def test_fields(self, loaded, num_draft_tokens):
        found = self.responses(
            loaded, max_tokens=12, num_draft_tokens=num_draft_tokens, num_logprobs=3
        )
        for response in found:
            row = np.array(response.logprobs)
            assert response.token_logprob == pytest.approx(
                row[response.token], abs=1e-4
            )
            assert response.top_logprobs[0][0] == response.token
            assert len(response.top_logprobs) == 3

    def test_only_where_asked(self, loaded):
        for response in self.responses(loaded, max_tokens=3):
            assert response.token_logprob is None
            assert response.top_logprobs is None
        for response in self.responses(loaded, max_tokens=3, num_logprobs=0):
            assert response.token_logprob < 0
            assert response.top_logprobs == []

    @pytest.mark.parametrize("num_logprobs", [-1, 65, 2.0, True, "3"])
    def test_mistakes(self, loaded, num_logprobs):
        with pytest.raises(RequestError, match="num_logprobs must be from 0 to 64"):
            self.responses(loaded, num_logprobs=num_logprobs)

    def test_the_most(self, loaded):
        (response,) = self.responses(loaded, max_tokens=1, num_logprobs=64)
        assert len(response.top_logprobs) == 64 < VOCAB_SIZE
