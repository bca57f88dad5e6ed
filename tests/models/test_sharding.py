"""What one of several machines holds, and what it says to the others in a round."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from copy import copy
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import gemma4_text

from mlx_gemma_mtp.checkpoints.shard_plan import shard_plans
from mlx_gemma_mtp.checkpoints.weights import load_drafter, load_target
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.engine.state import empty_state, row_settings
from mlx_gemma_mtp.errors import PairingError, RequestError
from mlx_gemma_mtp.models.sharding import (
    _cut_inputs,
    drafted_layers,
    shard,
    shard_of,
)
from mlx_gemma_mtp.models.splits import split
from mlx_gemma_mtp.models.target import Target, text_model
from mlx_gemma_mtp.models.text_config import text_config
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.tiny import FAMILIES, REFERENCE, SHORT, family_folder

LAYERS = dict(zip(FAMILIES, (10, 12, 6, 6, 12), strict=True))
WIDTHS = dict(zip(FAMILIES, (64, 80, 96, 64, 96), strict=True))
GROUP: Any = "all"


def ranks(rank: int, size: int) -> Any:
    """A machine whose others are never asked."""
    return SimpleNamespace(rank=rank, size=size, group=GROUP, is_first=rank == 0)


def part_of(family: str, rank: int = 0, size: int = 2) -> nn.Module:
    """A rank's part of a family's target."""
    target = load_target(family_folder(family) / "target", lazy=True)
    shard(text_model(target), ranks(rank, size))
    return target


@pytest.fixture
def said(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """What is said to others, each with its shape; nobody answers."""
    found: list[tuple[str, tuple[int, ...]]] = []

    def saying(kind: str, answer: Callable[[mx.array], mx.array]) -> Any:
        def say(x: mx.array, *, group: object) -> mx.array:
            assert group is GROUP
            found.append((kind, x.shape))
            return answer(x)

        return say

    monkeypatch.setattr(mx.distributed, "all_sum", saying("sum", lambda x: x))
    twice = saying("gather", lambda x: mx.concatenate([x, x]))
    monkeypatch.setattr(mx.distributed, "all_gather", twice)
    return found


@pytest.mark.parametrize("num_drafts", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_round_says(said, family, num_drafts):
    """Two sums a layer, drafts, the decision with the word, and the logits."""
    target = Target(part_of(family))
    drafter = load_drafter(REFERENCE / family / "drafter")
    rounds = Rounds(target, drafter, use_compile=False, group=GROUP)
    hidden = mx.zeros((1, 1, WIDTHS[family]))
    state = empty_state(target.layout.allocate(1, 256), hidden)
    word = mx.array([1, 0, 0, 0, 0, 7, 0], dtype=mx.int32)
    settings = row_settings([SamplingParams()])
    _, report = rounds.run(
        state, settings, num_draft_tokens=num_drafts, min_rows=1, word=word
    )
    assert report.word is not None
    assert report.word.tolist() == word.tolist()
    row = (1, num_drafts + 1, WIDTHS[family])
    feed = (2, *row) if family == "26b-a4b" else row  # experts beside the dense part
    layer = [("sum", row), ("sum", feed)]
    drafts = [("sum", (1, num_drafts))] if num_drafts else []
    logits = [("gather", (256, *row[:2]))]
    decision = [("sum", (2 + len(word),))]
    assert said == drafts + layer * LAYERS[family] + logits + decision


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_tile_the_whole(family, size):
    """Rank by rank the parts of every matrix are the whole's, each number once."""
    whole = text_model(load_target(family_folder(family) / "target"))
    parts = [text_model(part_of(family, rank, size)) for rank in range(size)]
    for name, matrix in leaves(whole):
        own = [dict(leaves(part))[name] for part in parts]
        if all(each.shape == matrix.shape for each in own):
            assert all(mx.array_equal(each, matrix) for each in own)
            continue
        axis = next(i for i in range(matrix.ndim) if own[0].shape[i] != matrix.shape[i])
        kept = (
            own if sum(x.shape[axis] for x in own) == matrix.shape[axis] else own[::2]
        )
        assert mx.array_equal(mx.concatenate(kept, axis=axis), matrix), name


def leaves(lm: Any) -> list[tuple[str, mx.array]]:
    """All parameters by the whole target's names."""
    flat: Any = nn.utils.tree_flatten(lm.parameters())
    return [(name.replace(".module", ""), array) for name, array in flat]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("width", [160, 192, 256])
def test_a_part_holds_what_was_planned(size, width):
    """Also of 192 columns over four, which are no groups of 64."""
    folder = family_folder(SHORT) / "target"
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = width
    args = gemma4_text.ModelArgs.from_dict(text_config(config, source="a test"))
    for rank, plan in enumerate(shard_plans(config, size)):
        lm = gemma4_text.Model(args)
        shard(lm, ranks(rank, size))
        held = sum(array.nbytes for _, array in leaves(lm))
        assert held == plan.weight_bytes


def test_half_a_group_is_refused():
    """Heads of two of four machines would share the scales of 64 columns."""
    target = load_target(family_folder(SHORT) / "target")
    lm = text_model(target)
    nn.quantize(
        lm,
        group_size=64,
        bits=4,
        class_predicate=lambda path, module: path.endswith("o_proj"),
    )
    with pytest.raises(RequestError, match="whole groups of 64 columns: got 32"):
        shard(lm, ranks(0, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_drafter_reads_is_whole(family):
    whole = Target(load_target(family_folder(family) / "target"))
    part = Target(part_of(family, rank=1))
    drafted = drafted_layers(text_model(load_target(family_folder(family) / "target")))
    for i, (all_of_it, own) in enumerate(
        zip(whole.layout.layers, part.layout.layers, strict=True)
    ):
        if i in drafted:
            assert own == all_of_it
        else:
            assert own.num_kv_heads == max(all_of_it.num_kv_heads // 2, 1)


def test_adapters_and_strange_layers_are_refused():
    target = load_target(family_folder(SHORT) / "target")
    lm = text_model(target)
    lm.layers[1].mlp = nn.Identity()
    with pytest.raises(PairingError, match="own layers: got Identity"):
        shard(lm, ranks(0, 2))
    assert shard_of(lm) is None


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_inputs_of_every_number_of_bits(bits, group_size):
    """Three groups over two ranks: two and one, of packed words too."""
    layer = nn.QuantizedLinear(
        3 * group_size, 8, bias=False, group_size=group_size, bits=bits
    )
    whole = mx.dequantize(
        layer.weight, layer.scales, layer.biases, group_size=group_size, bits=bits
    )
    for part in split(3 * group_size, 2, group_size):
        own = copy(layer)
        _cut_inputs(own, part, hashlib.sha256())
        found = mx.dequantize(
            own.weight, own.scales, own.biases, group_size=group_size, bits=bits
        )
        assert mx.array_equal(found, whole[:, part.start : part.stop])


def test_three_machines_are_refused():
    target = load_target(family_folder(SHORT) / "target")
    with pytest.raises(RequestError, match="1, 2 or 4: got 3"):
        shard(text_model(target), ranks(0, 3))
