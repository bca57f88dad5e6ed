"""Constrained rows in the engine: beside others, in batches, made by any thread.

Run: python -m pytest tests/structure/test_rows.py
"""

from __future__ import annotations

import re
from threading import Thread
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_gemma_mtp.engine.decoder import Decoder
from mlx_gemma_mtp.engine.request import Request
from mlx_gemma_mtp.generation.requests import make_request
from mlx_gemma_mtp.sampling.params import SamplingParams
from mlx_gemma_mtp.structure.constraint import regex
from mlx_gemma_mtp.structure.masks import BoundConstraint
from tests.tiny import END_OF_TURN, EOS, reference_pair, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("plain_graphs")

ENDS = frozenset({EOS, END_OF_TURN})
FORMS = {"one": "[a-f]{2,6}!", "two": "(yes|no)( maybe)?"}


@pytest.fixture(scope="module")
def pair():
    return reference_pair("12b")


@pytest.fixture(scope="module")
def tokenizer():
    return TokenizerWrapper(tiny_tokenizer(), eos_token_ids=sorted(ENDS))


@pytest.fixture(scope="module")
def requests(tokenizer):
    """Rows of different forms between free ones: greedy, with a seed, without one."""
    seeded, free = SamplingParams(temp=2.0, seed=3), SamplingParams(temp=2.0)
    one, two = (BoundConstraint(regex(form), tokenizer) for form in FORMS.values())
    return [
        Request([2, 40, 41], 9, seeded),
        Request([2, 42], 20, seeded, ENDS, constraint=one),
        Request([2, 50, 51, 52], 9),
        Request([2, 43], 20, free, ENDS, constraint=two),
        Request([2, 44], 20, SamplingParams(), ENDS, constraint=one, num_logprobs=2),
    ]


def decoded(pair, requests, num_draft_tokens):
    """The tokens of each row, and all of its outputs."""
    decoder = Decoder(pair.rounds, requests, num_draft_tokens=num_draft_tokens)
    tokens = [list[int]() for _ in requests]
    outputs: list[list[Any]] = [[] for _ in requests]
    for emitted in decoder.run():
        for output in emitted:
            output.check()
            tokens[output.sequence.index] += output.tokens
            outputs[output.sequence.index].append(output)
    return tokens, outputs


@pytest.mark.parametrize("num_draft_tokens", [0, 4])
def test_rows_do_not_change_each_other(pair, tokenizer, requests, num_draft_tokens):
    tokens, outputs = decoded(pair, requests, num_draft_tokens)
    for i, request in enumerate(requests):
        if i != 3:  # which draws a seed of its own
            assert tokens[i] == decoded(pair, [request], 0)[0][0]
    for i, form in ((1, FORMS["one"]), (3, FORMS["two"]), (4, FORMS["one"])):
        assert tokens[i][-1] in ENDS
        assert re.fullmatch(form, tokenizer.decode(tokens[i][:-1]))
        assert outputs[i][-1].finish_reason == "stop"
    listed = [entry for output in outputs[4] for entry in output.logprobs]
    assert len(listed) == len(tokens[4])


def test_a_request_serves_again(pair, requests):
    """Its constraint keeps no place."""
    assert decoded(pair, requests[1:2], 4)[0] == decoded(pair, requests[1:2], 4)[0]


def test_a_constraint_may_come_of_another_thread(pair, tokenizer):
    made = []

    def make():
        made.append(BoundConstraint(regex("[xy]{3}"), tokenizer))

    thread = Thread(target=make)
    thread.start()
    thread.join()
    request = make_request(
        pair,
        [2, 40],
        max_tokens=8,
        sampling=SamplingParams(),
        eos=ENDS,
        constraint=made[0],
    )
    ((tokens,), _) = decoded(pair, [request], 2)
    assert re.fullmatch("[xy]{3}", tokenizer.decode(tokens[:-1]))
