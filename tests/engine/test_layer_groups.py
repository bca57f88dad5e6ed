"""A chunk of a prompt is evaluated a few layers at a time.

Run: python -m pytest tests/engine/test_layer_groups.py
"""

from __future__ import annotations

import signal

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.cache.mlx_lm_cache import make_prompt_cache
from mlx_gemma_mtp.cache.prompt import prefill_caches
from mlx_gemma_mtp.generation.text import stream_generate
from mlx_gemma_mtp.models import target as target_module
from mlx_gemma_mtp.models.target import Target
from tests.tiny import FAMILIES, reference_pair, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("plain_graphs")

PROMPT = list(range(7, 47))


def evaluated(monkeypatch, target, tokens_of_layers):
    """What reading gives, and how often layers were evaluated on the way."""
    count, begin = 0, mx.async_eval

    def counting(*arrays):
        nonlocal count
        count += 1
        begin(*arrays)

    with monkeypatch.context() as patch:
        patch.setattr(target_module, "_TOKENS_OF_LAYERS", tokens_of_layers)
        patch.setattr(mx, "async_eval", counting)
        caches = prefill_caches(target.layout)
        filled = target.prefill(mx.array([PROMPT]), caches, [len(PROMPT)])
    arrays = [filled.logits, filled.hidden, *(a for c in caches for a in c.state)]
    return [np.array(array) for array in arrays], count


@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_of_the_groups_changes_no_byte(monkeypatch, family):
    target = Target(reference_pair(family).target)
    num_layers = len(target_module.text_model(reference_pair(family).target).layers)
    whole, count = evaluated(monkeypatch, target, num_layers * len(PROMPT) + 1000)
    assert count == 0
    for size in (1, 2, 3):
        found, count = evaluated(monkeypatch, target, size * len(PROMPT))
        assert count == num_layers // size
        for array, expected in zip(found, whole, strict=True):
            np.testing.assert_array_equal(array, expected)


def test_a_few_tokens_are_evaluated_at_once(monkeypatch):
    target = Target(reference_pair("12b").target)
    _, count = evaluated(monkeypatch, target, target_module._TOKENS_OF_LAYERS)
    assert count == 0  # 40 tokens: 51 layers


@pytest.mark.parametrize("has_begun", [False, True])
def test_an_interrupt_in_a_chunk_leaves_the_callers_cache_as_it_was(
    monkeypatch, has_begun
):
    """Some layers have read the chunk by then, and others have not."""
    pair = reference_pair("e2b")
    cache = make_prompt_cache(Target(pair.target).layout)

    def text(tokens):
        responses = stream_generate(
            pair.target,
            tiny_tokenizer(has_eos=False),
            tokens,
            draft_model=pair.drafter,
            max_tokens=8,
            prompt_cache=cache,
            num_draft_tokens=3,
        )
        return [response.token for response in responses]

    start = text(PROMPT[:9]) if has_begun else []
    before = {c.offset for c in cache}
    evaluate = mx.eval

    def control_c(*arrays):
        evaluate(*arrays)
        signal.raise_signal(signal.SIGINT)

    # A process in the background may have been told to ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(target_module, "_TOKENS_OF_LAYERS", len(PROMPT))
            patch.setattr(mx, "eval", control_c)
            with pytest.raises(KeyboardInterrupt):
                text(PROMPT)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert {c.offset for c in cache} == before
    found = text(PROMPT)
    cache = make_prompt_cache(Target(pair.target).layout)
    assert found == text([*PROMPT[:9], *start, *PROMPT] if has_begun else PROMPT)
