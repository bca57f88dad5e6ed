"""What drafts from the text add, side by side: the kinds of text, and the turns.

Run: python -m pytest tests/scripts/test_sources.py
"""

from __future__ import annotations

from mlx_gemma_mtp.checkpoints.tokenizer import load_tokenizer
from mlx_gemma_mtp.pair.load import embedded_pair_path
from scripts.benchmarks.sources import side_by_side, source_pairs, source_prompts
from tests.tiny import reference_pair, uncompiled


def test_kinds():
    kinds = source_prompts(load_tokenizer(embedded_pair_path()))
    assert len(kinds) == 6
    for prompts, settings in kinds.values():
        assert len(prompts) > 1
        assert len({tuple(prompt) for prompt in prompts}) == len(prompts)
        assert settings in ({}, {"temp": 1.0, "top_k": 64, "top_p": 0.95})


def test_all_take_turns():
    pairs = source_pairs(reference_pair())
    with uncompiled():
        seconds = side_by_side(pairs, [5, 6, 7, 5, 6], 20)
    assert seconds.keys() == pairs.keys()
    assert min(seconds.values()) > 0
