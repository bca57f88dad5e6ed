"""What of a drafter trains: everything, adapters, and what was quantized before.

Run: python -m pytest tests/tune/test_adapters.py
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4_text

from mlx_gemma_mtp.checkpoints.weights import load_drafter
from mlx_gemma_mtp.constants import FULL
from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.models.attention import SharedKV
from mlx_gemma_mtp.models.drafter import Drafter, DraftOutput
from mlx_gemma_mtp.pair.load import embedded_pair_path
from mlx_gemma_mtp.tune.training.adapters import (
    add_adapters,
    dequantized,
    fuse_adapters,
    trainable,
)
from tests.tiny import FAMILIES, REFERENCE

FOLDERS = {family: REFERENCE / family / "drafter" for family in FAMILIES}
FOLDERS["embedded"] = embedded_pair_path() / "drafter"
# float32, and layers of bfloat16 that round twice as often on one side.
TOLERANCE = {**dict.fromkeys(FAMILIES, 1e-5), "embedded": 0.05}
ORDERING = "masked_embedding.token_ordering"


def parameters(module: nn.Module) -> dict[str, mx.array]:
    leaves: Any = tree_flatten(module.parameters())
    return dict(leaves)


def training(module: nn.Module) -> set[str]:
    leaves: Any = tree_flatten(module.trainable_parameters())
    return {name for name, _ in leaves}


def matrices(drafter: Drafter) -> set[str]:
    """Paths of the drafter's matrices."""
    names = (
        name.rpartition(".")[0]
        for name, a in parameters(drafter).items()
        if a.ndim == 2
    )
    return {path for path in names if path != "model.embed_tokens"}


def step(drafter: Drafter) -> DraftOutput:
    """A draft step of two rows over 9 keys, the same for every drafter of a shape."""
    config = drafter.config
    args = gemma4_text.ModelArgs.from_dict(dict(config.text_config))
    dtype = drafter.model.norm.weight.dtype
    seeds = iter(mx.random.split(mx.random.key(0), 8))

    def random(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=next(seeds)).astype(dtype)

    shared = {}
    for layer in drafter.model.layers:
        if layer.layer_type not in shared:
            heads, width = args.num_key_value_heads, args.head_dim
            if layer.layer_type == FULL:
                heads, width = layer.self_attn.n_kv_heads, args.global_head_dim
            keys, values = random(2, heads, 9, width), random(2, heads, 9, width)
            mask = mx.ones((2, 1, 1, 9), dtype=mx.bool_)
            shared[layer.layer_type] = SharedKV(keys, values, mask)
    embedding = random(2, 1, config.backbone_hidden_size)
    hidden = random(2, 1, config.backbone_hidden_size)
    return drafter(embedding, hidden, shared, position=mx.array([8, 5]))


def assert_same(one: DraftOutput, other: DraftOutput) -> None:
    assert mx.array_equal(one.logits, other.logits)
    assert mx.array_equal(one.hidden, other.hidden)


def wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Size of the difference as a share of the size; NaN stands in the same places."""
    assert np.array_equal(np.isnan(one), np.isnan(other))
    difference = np.nanmean((one - other) ** 2) / np.nanmean(other**2)
    return float(np.sqrt(difference))


def scatter(output: DraftOutput) -> np.ndarray:
    """Logits by token id, nothing where a token is no candidate."""
    logits = wide(output.logits)
    if output.token_ids is None:
        return logits
    by_id = np.full((*logits.shape[:2], 512), np.nan, dtype=np.float32)
    np.put_along_axis(by_id, np.array(output.token_ids), logits, axis=-1)
    return by_id


def randomise(drafter: Drafter) -> None:
    """Give adapters what training might have."""
    names = sorted(training(drafter))
    keys = mx.random.split(mx.random.key(7), len(names))
    values = [
        (name, 0.05 * mx.random.normal(parameters(drafter)[name].shape, key=key))
        for name, key in zip(names, keys, strict=True)
    ]
    drafter.load_weights(values, strict=False)


@pytest.mark.parametrize("name", FOLDERS)
def test_adapters_start_as_nothing_and_fuse_into_what_they_are(name):
    drafter = load_drafter(FOLDERS[name])
    before, names = step(drafter), set(parameters(drafter))
    plain = matrices(drafter)
    add_adapters(drafter, rank=3, scale=2.0, seed=1)
    assert_same(step(drafter), before)
    assert training(drafter) == {
        f"{path}.{leaf}" for path in plain for leaf in ("lora_a", "lora_b")
    }
    assert ("masked_embedding.centroids" in plain) == (ORDERING in names)
    randomise(drafter)
    adapted = step(drafter)
    assert not mx.allclose(adapted.hidden, before.hidden, rtol=0.01)
    fuse_adapters(drafter)
    assert set(parameters(drafter)) == names
    assert training(drafter) == set()
    fused = step(drafter)
    assert distance(wide(fused.hidden), wide(adapted.hidden)) < TOLERANCE[name]
    assert distance(scatter(fused), scatter(adapted)) < TOLERANCE[name]
    again = parameters(drafter)
    fuse_adapters(drafter)
    assert all(mx.array_equal(a, again[n]) for n, a in parameters(drafter).items())


def test_a_fused_matrix_is_rounded_once():
    drafter = load_drafter(FOLDERS["embedded"])
    before = np.array(drafter.pre_projection.weight.astype(mx.float32), np.float64)
    add_adapters(drafter, rank=4, scale=0.5, seed=1)
    randomise(drafter)
    a, b = drafter.pre_projection.lora_a, drafter.pre_projection.lora_b
    expected = before + 0.5 * (np.array(a, np.float64) @ np.array(b, np.float64)).T
    fuse_adapters(drafter)
    found = drafter.pre_projection.weight
    assert found.dtype == mx.bfloat16
    # Half a step of bfloat16, and what float32 rounds before.
    error = np.abs(np.array(found.astype(mx.float32), np.float64) - expected)
    assert np.all(error <= np.abs(expected) * (2**-8 + 1e-5) + 1e-7)


def test_adapters_are_the_seeds():
    found = []
    for process_seed, seed in ((1, 5), (2, 5), (3, 6)):
        mx.random.seed(process_seed)
        drafter = load_drafter(FOLDERS["e2b"])
        add_adapters(drafter, rank=2, scale=1.0, seed=seed)
        found.append({n: parameters(drafter)[n] for n in training(drafter)})
    first, same, other = found
    for name, array in first.items():
        assert array.dtype == mx.float32
        assert mx.array_equal(array, same[name])
        assert mx.array_equal(array, other[name]) == name.endswith("lora_b")


def test_a_rank_of_nothing_is_refused():
    drafter = load_drafter(FOLDERS["12b"])
    with pytest.raises(RequestError, match="rank must be 1 or more: got 0"):
        add_adapters(drafter, rank=0, scale=1.0, seed=0)


@pytest.mark.parametrize("name", ["e2b", "12b"])
@pytest.mark.parametrize("has_adapters", [False, True])
def test_gradients_reach_what_trains(name, has_adapters):
    drafter = load_drafter(FOLDERS[name])
    everything = set(parameters(drafter))
    if has_adapters:
        add_adapters(drafter, rank=2, scale=1.0, seed=0)
        randomise(drafter)
    else:
        drafter.freeze()
        trainable(drafter)
        assert training(drafter) == everything - {ORDERING}

    def loss() -> mx.array:
        output = step(drafter)
        chosen = mx.logsumexp(output.logits, axis=-1) - output.logits[..., 0]
        return mx.mean(chosen) + mx.mean(mx.square(output.hidden))

    _, gradients = nn.value_and_grad(drafter, loss)()
    leaves: Any = tree_flatten(gradients)
    assert {path for path, _ in leaves} == training(drafter)
    for path, gradient in leaves:
        # A choice of clusters has no slope; who trains the centroids looks at scores.
        is_choice = path.startswith("masked_embedding.centroids")
        assert mx.any(gradient != 0).item() != is_choice, path
        assert mx.all(mx.isfinite(gradient)), path


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
@pytest.mark.parametrize("name", ["e2b", "12b", "embedded"])
def test_a_quantized_drafter_becomes_a_plain_one(name, mode):
    drafter = load_drafter(FOLDERS[name])
    names, dtype = set(parameters(drafter)), drafter.model.norm.weight.dtype
    nn.quantize(
        drafter,
        group_size=32,
        bits=4,
        mode=mode,
        class_predicate=lambda path, module: (
            hasattr(module, "to_quantized") and "centroids" not in path
        ),
    )
    before = parameters(drafter)
    plain = dequantized(drafter)
    assert set(parameters(plain)) == names
    assert not any(hasattr(module, "bits") for _, module in plain.named_modules())
    assert {a.dtype for n, a in parameters(plain).items() if n != ORDERING} == {dtype}
    assert all(mx.array_equal(a, before[n]) for n, a in parameters(drafter).items())
    ours, theirs = step(plain), step(drafter)
    assert distance(wide(ours.hidden), wide(theirs.hidden)) < TOLERANCE[name]
    assert distance(scatter(ours), scatter(theirs)) < TOLERANCE[name]
    trainable(plain)  # it is one that can train


def test_a_plain_drafter_is_copied():
    drafter = load_drafter(FOLDERS["12b"])
    copy = dequantized(drafter)
    assert_same(step(copy), step(drafter))
    add_adapters(copy, rank=2, scale=1.0, seed=0)
    assert training(drafter)
    assert not any("lora" in name for name in parameters(drafter))
