"""The bytes that a rank will hold, against headers, modules and sums by hand.

Run: python -m pytest tests/checkpoints/test_shard_plan.py
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_gemma_mtp.checkpoints.shard_plan import ShardPlan, shard_plans
from mlx_gemma_mtp.errors import CheckpointError, RequestError
from mlx_gemma_mtp.models.families import FAMILIES
from mlx_gemma_mtp.models.published import text_config
from mlx_gemma_mtp.models.splits import SIZES
from mlx_gemma_mtp.models.tensor_names import unused_in_drafter, unused_in_target
from mlx_gemma_mtp.selftest.random_pair import skeletons
from tests.published import TARGETS, published, tensor_bytes

E2B, E4B, B12, B26, B31 = TARGETS
BITS = (4, 8)


@cache
def plans_of(repo, size, bits=None):
    """A published pair's plans, the target of few bits where they are named."""
    config = published(repo).config
    drafter = published(f"{repo}-assistant").config
    if bits is not None:
        config["quantization"] = {"group_size": 64, "bits": bits}
        drafter["quantization"] = {"group_size": 64, "bits": 4}
    return shard_plans(config, size, drafter_config=drafter)


def used_bytes(repo, unused):
    """Bytes of a published file's tensors that are loaded; ids become int32."""
    total = 0
    for name, (dtype, shape) in published(repo).tensors.items():
        if unused(name) is None:
            size = tensor_bytes(dtype, shape)
            total += size // 2 if dtype == "I64" else size
    return total


@pytest.mark.parametrize("repo", TARGETS)
def test_one_machine_holds_the_published_files(repo):
    text = published(repo).config["text_config"]
    first = text["num_hidden_layers"] - text.get("num_kv_shared_layers", 0)

    def unused(name):
        return unused_in_target(name, first_shared_layer=first, is_tied=True)

    (plan,) = plans_of(repo, 1)
    assert plan.split_bytes + plan.whole_bytes == used_bytes(repo, unused)
    assert plan.drafter_bytes == used_bytes(f"{repo}-assistant", unused_in_drafter)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 32)])
def test_one_machine_holds_the_bytes_of_mlx_modules(family, bits, group_size):
    config: dict[str, Any] = {"model_type": "gemma4_text", "dtype": "float32"}
    target, _ = skeletons(family, num_layers=6)
    quantization: dict[str, Any] = {"bits": bits, "group_size": group_size}

    def predicate(path, module):
        found = hasattr(module, "to_quantized") and target.quant_predicate(path, module)
        if found is not True:
            quantization[path] = found
        return found

    nn.quantize(target, class_predicate=predicate, bits=bits, group_size=group_size)
    config |= {**text_config(family, num_layers=6), "quantization": quantization}
    (plan,) = shard_plans(config, 1)
    leaves: Any = tree_flatten(target.parameters())
    measured = sum(array.nbytes for _, array in leaves)
    assert plan.weight_bytes == measured


@pytest.mark.parametrize("bits", BITS)
def test_two_machines_hold_little_more_than_half_of_31b(bits):
    (one,) = plans_of(B31, 1, bits)
    for two in plans_of(B31, 2, bits):
        assert two.weight_bytes <= 0.60 * one.weight_bytes
        assert two.weight_bytes >= 0.50 * one.weight_bytes


@pytest.mark.parametrize("repo", [E4B, B26, B31])
@pytest.mark.parametrize("bits", [None, 4])
def test_parts_of_two_ranks_are_the_whole(repo, bits):
    """Heads of keys divide in these, so only what is whole is held twice."""
    (one,) = plans_of(repo, 1, bits)
    first, second = plans_of(repo, 2, bits)
    assert first.whole_bytes == second.whole_bytes
    assert first.drafter_bytes == second.drafter_bytes == one.drafter_bytes
    target = first.split_bytes + second.split_bytes + first.whole_bytes
    assert target == one.split_bytes + one.whole_bytes


def test_uneven_groups_of_26b_as_counted_by_hand():
    """6 and 5 of the 11 groups of its experts, 17 and 16 of the 33 of its dense part.

    4.5 bits a weight; a layer has 128 experts, of three matrices each.
    """
    first, second = plans_of(B26, 2, 4)
    wider = 64 * 3 * 2816 * (128 + 1)  # one group more, in experts and in the dense
    assert first.split_bytes - second.split_bytes == 30 * wider * 9 // 16
    ranks = plans_of(B26, 4, 4)
    dense = 30 * 64 * 3 * 2816 * 9 // 16
    assert ranks[0].split_bytes - ranks[1].split_bytes == dense
    assert ranks[1].split_bytes == ranks[2].split_bytes
    assert ranks[2].split_bytes - ranks[3].split_bytes == 128 * dense


def test_the_drafter_finds_all_heads_where_it_reads():
    """31B: 50 sliding layers of 16 heads, 10 full ones of 4; the last two are whole."""
    plan = plans_of(B31, 2, 4)[1]
    assert plan.kv_heads == (8, 8, 8, 8, 8, 2) * 9 + (8, 8, 8, 8, 16, 4)
    assert plan.full_slot_bytes == 2 * 2 * 512 * (9 * 2 + 4)
    assert plan.sliding_slot_bytes == 2 * 2 * 256 * (49 * 8 + 16)
    assert plan.kv_bytes(1000, 10) == 1000 * 45056 + 10 * 417792
    # E4B's last owners of K/V stand before the 18 layers that share theirs.
    assert plans_of(E4B, 2, 4)[0].kv_heads == (1,) * 22 + (2, 2)
    # Of one head there is no half.
    assert set(plans_of(E2B, 2, 4)[1].kv_heads) == {1}
    assert plans_of(B12, 4, 4)[3].kv_heads[-6:] == (2, 2, 2, 2, 8, 1)


@pytest.mark.parametrize("repo", TARGETS)
def test_more_machines_never_hold_more(repo):
    sizes = [
        max(plan.weight_bytes for plan in plans_of(repo, size, 4)) for size in SIZES
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(SIZES)


@pytest.mark.parametrize(
    ("mode", "bits", "group_size", "bits_per_weight"),
    [("affine", 4, 128, 4.25), ("mxfp4", 4, 32, 4.25), ("mxfp8", 8, 32, 8.25)],
)
def test_bytes_of_other_formats(mode, bits, group_size, bits_per_weight):
    config = published(B12).config
    config["quantization"] = {"mode": mode, "bits": bits, "group_size": group_size}
    plan, _ = shard_plans(config, 2)
    weights = plans_of(B12, 2)[0].split_bytes / 2
    assert plan.split_bytes * 8 == weights * bits_per_weight


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_a_map_names_modules_of_its_own(prefix):
    """A matrix that is kept, and one of other bits; paths of a whole model or not."""
    config = text_config("12b", num_layers=2)
    quantization = {"bits": 4, "group_size": 64}
    path = f"{prefix}model.embed_tokens"
    base, kept, wider = (
        shard_plans(config | {"quantization": quantization | more}, 2)[0].whole_bytes
        for more in ({}, {path: False}, {path: {"bits": 8, "group_size": 64}})
    )
    table = 262144 * 3840
    assert kept - base == table * (32 - 9) // 16
    assert wider - base == table // 2


def test_measured_bytes_are_met_to_within_three_percent():
    plan = ShardPlan(600, 300, 100, (1,), 1, 1)
    assert plan.weight_bytes == 1000
    assert plan.is_met(970)
    assert plan.is_met(1030)
    assert not plan.is_met(969)
    assert not plan.is_met(1031)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(RequestError, match="number of machines must be 1, 2 or 4"):
        plans_of(B31, 3)
    with pytest.raises(CheckpointError, match="model_type in a drafter must be"):
        shard_plans(published(f"{B31}-assistant").config, 2, source="a drafter")
    small = text_config("12b", num_layers=2) | {"intermediate_size": 192}
    small["quantization"] = {"bits": 4, "group_size": 64}
    with pytest.raises(RequestError, match="must be at most 3, as a width of 192"):
        shard_plans(small, 4)
    narrow = small | {"intermediate_size": 256, "head_dim": 24}
    with pytest.raises(
        RequestError, match="must be whole groups of 64 columns: got 96"
    ):
        shard_plans(narrow, 4)
