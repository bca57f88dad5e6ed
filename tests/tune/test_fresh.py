"""Drafters that have learnt nothing yet: their shape, their weights, that they run.

Run: python -m pytest tests/tune/test_fresh.py
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4_text

from mlx_gemma_mtp.checkpoints.weights import load_target
from mlx_gemma_mtp.constants import FULL, SLIDING
from mlx_gemma_mtp.engine.decoder import Decoder
from mlx_gemma_mtp.engine.request import Request
from mlx_gemma_mtp.errors import PairingError
from mlx_gemma_mtp.models.compatibility import check_fit
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.models.drafter_config import DrafterConfig
from mlx_gemma_mtp.models.published import drafter_config, text_config
from mlx_gemma_mtp.models.target import Target, text_model
from mlx_gemma_mtp.pair.load import embedded_pair_path, load_pair
from mlx_gemma_mtp.pair.pair import Pair
from mlx_gemma_mtp.selftest import random_pair
from mlx_gemma_mtp.tune.clusters import cluster_order
from mlx_gemma_mtp.tune.fresh import fresh_config, fresh_drafter
from tests.tiny import FAMILIES, REFERENCE, families, reference_pair, uncompiled

EMBEDDED = embedded_pair_path()
PROMPT = [2, 17, 40, 99, 7, 23, 300, 41]


def parameters(module: nn.Module) -> dict[str, mx.array]:
    leaves: Any = tree_flatten(module.parameters())
    return dict(leaves)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = parameters(one), parameters(other)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        assert mx.array_equal(array, theirs[name]), name


def deviation(array: mx.array) -> float:
    return float(np.array(mx.std(array.astype(mx.float32))))


def decode(pair: Pair, num_draft_tokens: int) -> list[int]:
    """12 tokens, greedy."""
    request = Request(PROMPT, 12)
    decoder = Decoder(pair.rounds, [request], num_draft_tokens=num_draft_tokens)
    with uncompiled():
        tokens = [token for part in decoder.run() for e in part for token in e.tokens]
    assert (decoder.stats.drafted > 0) == (num_draft_tokens > 0)
    return tokens


@pytest.fixture(scope="module")
def embedded() -> Pair:
    return load_pair(EMBEDDED, EMBEDDED / "drafter")


@pytest.fixture(scope="module")
def clustered() -> tuple[nn.Module, Drafter]:
    """A target in the shape of E2B, of which only the embeddings are ever made."""
    target, _ = random_pair.skeletons("e2b", vocab_size=4096)
    return target, fresh_drafter(target, seed=1)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_targets_drafter_has_the_published_shape(family):
    target, drafter = random_pair.skeletons(family)
    found = DrafterConfig.from_dict(fresh_config(target))
    published = drafter.config
    assert vars(found) | {"num_assistant_tokens": None} == vars(published) | {
        "num_assistant_tokens": None
    }
    assert published.num_assistant_tokens is not None
    check_fit(target, Drafter(found))


def test_the_embedded_targets_drafter_has_the_shipped_shape(embedded):
    drafter, config = fresh_drafter(embedded.target, seed=0)
    assert vars(drafter.config) == vars(embedded.drafter.config)
    read = DrafterConfig.from_dict(config)
    assert vars(read) == vars(drafter.config) | {"num_assistant_tokens": None}
    ours, theirs = parameters(drafter), parameters(embedded.drafter)
    assert {n: (a.shape, a.dtype) for n, a in ours.items()} == {
        n: (a.shape, a.dtype) for n, a in theirs.items()
    }
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"


def test_a_wide_target_of_no_family_gets_the_published_width():
    whole = text_config("31b", vocab_size=512) | {
        "num_hidden_layers": 2,
        "layer_types": [SLIDING, FULL],
    }
    target = gemma4_text.Model(gemma4_text.ModelArgs.from_dict(whole))
    text = DrafterConfig.from_dict(fresh_config(target)).text_config
    published = drafter_config("31b", vocab_size=512).text_config
    assert text == published


def test_a_target_without_a_window_gets_full_layers_only():
    args = text_model(reference_pair("12b").target).args
    whole = vars(args) | {"layer_types": [FULL] * args.num_hidden_layers}
    target = gemma4_text.Model(gemma4_text.ModelArgs(**whole))
    drafter, _ = fresh_drafter(target, seed=0)
    assert drafter.layer_types == (FULL, FULL)


@pytest.mark.parametrize("family", families("e2b", "26b-a4b"))
@pytest.mark.parametrize("num_centroids", [None, 32])
def test_a_tiny_pair_decodes(family, num_centroids):
    target = reference_pair(family).target
    config = fresh_config(target)
    if num_centroids is not None:
        config |= {
            "use_ordered_embeddings": True,
            "num_centroids": num_centroids,
            "centroid_intermediate_top_k": 4,
        }
    drafter, _ = fresh_drafter(target, seed=3, config=config)
    pair = Pair(target, drafter)
    assert pair.num_draft_tokens == 4
    for name, array in parameters(drafter).items():
        assert mx.all(mx.isfinite(array)), name
    assert decode(pair, 3) == decode(reference_pair(family), 0)


def test_the_embedded_pair_decodes(embedded):
    drafter, _ = fresh_drafter(embedded.target, seed=3)
    assert decode(Pair(embedded.target, drafter), 4) == decode(embedded, 0)


def test_weights_are_the_seeds(embedded):
    mx.random.seed(1)
    first, _ = fresh_drafter(embedded.target, seed=5)
    mx.random.seed(2)
    assert_same(first, fresh_drafter(embedded.target, seed=5)[0])
    other = parameters(fresh_drafter(embedded.target, seed=6)[0])
    for name, array in parameters(first).items():
        assert mx.array_equal(array, other[name]) == (array.ndim < 2), name


def test_sizes_are_those_that_training_starts_well_from(embedded):
    found = parameters(fresh_drafter(embedded.target, seed=0)[0])
    assert deviation(found["pre_projection.weight"]) == pytest.approx(
        (2 * 96) ** -0.5, rel=0.05
    )
    layer = "model.layers.1"
    assert deviation(found[f"{layer}.mlp.down_proj.weight"]) == pytest.approx(
        256**-0.5, rel=0.05
    )
    assert found[f"{layer}.post_attention_layernorm.weight"][0].item() == 0.5
    assert found[f"{layer}.input_layernorm.weight"][0].item() == 1
    assert found[f"{layer}.layer_scalar"].item() == 1
    # Scores of normed queries against the target's keys, of the layer that is read.
    keys = text_model(embedded.target).layers[29].self_attn.k_norm.weight
    queries = found[f"{layer}.self_attn.q_norm.weight"].astype(mx.float32)
    scores = queries.size**0.5 * queries[0] * mx.sqrt(mx.mean(keys * keys))
    assert scores.item() == pytest.approx(2, rel=0.01)


def test_the_head_knows_which_tokens_resemble_each_other(embedded):
    head = parameters(fresh_drafter(embedded.target, seed=0)[0])[
        "model.embed_tokens.weight"
    ].astype(mx.float32)
    there = text_model(embedded.target).model.embed_tokens.weight.astype(mx.float32)
    scale = mx.sum(head[:, :96] * there) / mx.sum(there * there)
    assert mx.allclose(head[:, :96], scale * there, atol=2e-3)
    hidden = mx.random.normal((200, 128), key=mx.random.key(0))  # as after a norm
    assert deviation(hidden @ head.T) == pytest.approx(1, rel=0.1)
    for columns in (head[:, :96], head[:, 96:]):
        assert deviation(columns) == pytest.approx(128**-0.5, rel=0.1)


def test_a_narrower_head_takes_the_first_columns(clustered):
    target, drafter = clustered
    head = drafter.model.embed_tokens.weight
    there = Target(target).embed(mx.arange(4096))[:, :256]
    ratio = head.astype(mx.float32) / there.astype(mx.float32)
    assert mx.allclose(ratio, mx.median(ratio), rtol=1e-3)
    assert deviation(head) == pytest.approx(256**-0.5, rel=0.01)


def test_a_quantized_target_gives_what_its_embeddings_say():
    folder = REFERENCE / "12b" / "target"
    plain, packed = load_target(folder), load_target(folder)
    nn.quantize(packed, group_size=32, bits=8)
    ours, theirs = (
        parameters(fresh_drafter(target, seed=0)[0])["model.embed_tokens.weight"]
        for target in (plain, packed)
    )
    assert not mx.array_equal(ours, theirs)
    assert mx.allclose(ours, theirs, atol=5e-3)


def test_a_centroid_head_is_sorted_and_centred(clustered):
    target, drafter = clustered
    masked = drafter.masked_embedding
    assert masked.num_centroids == 2048
    order = masked.token_ordering
    assert order.dtype == mx.int32
    assert mx.array_equal(mx.sort(order), mx.arange(4096))
    pairs = drafter.model.embed_tokens.weight[order].reshape(2048, 2, 256)
    middle = mx.mean(pairs.astype(mx.float32), axis=1)
    assert mx.allclose(masked.centroids.weight.astype(mx.float32), middle, atol=1e-3)
    assert_same(drafter, fresh_drafter(target, seed=1)[0])


def test_a_vocabulary_that_centroids_do_not_divide_gets_a_dense_head():
    target, _ = random_pair.skeletons("e2b", vocab_size=4096)
    target.args.vocab_size = 4097
    assert fresh_config(target)["use_ordered_embeddings"] is False


def test_clusters_hold_similar_tokens():
    """512 points about 32 middles, ids shuffled; seeds are fixed."""
    middles = mx.random.normal((32, 1, 64), key=mx.random.key(0))
    noise = mx.random.normal((32, 16, 64), key=mx.random.key(1))
    shuffled = mx.random.permutation(512, key=mx.random.key(2))
    blob_of = shuffled // 16
    found = {}
    for size in (1e-3, 0.3):
        points = (middles + size * noise).reshape(512, 64)[shuffled]
        order = cluster_order(points, num_clusters=32, key=mx.random.key(3))
        assert mx.array_equal(mx.sort(order), mx.arange(512))
        clusters = blob_of[order].reshape(32, 16)
        found[size] = sum(np.unique(row).size for row in np.array(clusters)) / 32
        again = cluster_order(points, num_clusters=32, key=mx.random.key(3))
        assert mx.array_equal(order, again)
    assert found[1e-3] == 1  # a cluster is a blob
    assert found[0.3] < 4  # of 16; at random 12.7


def test_equal_points_are_sorted_too():
    order = cluster_order(mx.ones((64, 8)), num_clusters=16, key=mx.random.key(0))
    assert mx.array_equal(mx.sort(order), mx.arange(64))


def test_a_config_that_does_not_fit_is_refused(embedded):
    config = fresh_config(reference_pair("12b").target)
    with pytest.raises(PairingError, match="hidden size must be the target's"):
        fresh_drafter(reference_pair("e2b").target, seed=0, config=config)
    with pytest.raises(PairingError, match="must be a Gemma 4 model"):
        fresh_drafter(nn.Linear(2, 2), seed=0)
