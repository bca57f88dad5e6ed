"""Our own forward through layers, against mlx-lm's layers called one by one.

Compared                       with                            tolerance
verify of every family,        mlx-lm's layers over the same   0: every byte
dense, quantized, adapted      slabs, and its norm and head
draft steps of every family    mlx-lm's layers                 0: every byte
a layer that is not mlx-lm's   what it computes                0: every byte

Run: python -m pytest tests/models/test_layers.py
"""

import logging
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4_text
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_gemma_mtp.cache import masks as masks_module
from mlx_gemma_mtp.cache.masks import draft_masks, verify_masks, verify_slots
from mlx_gemma_mtp.cache.slabs import SlabView
from mlx_gemma_mtp.kernels.ways import NORM_ROPE, PACKED, SPLIT
from mlx_gemma_mtp.models import attention
from mlx_gemma_mtp.models import layers as layers_module
from mlx_gemma_mtp.models.attention import SharedKV
from mlx_gemma_mtp.models.target import Target, head_logits, text_model
from tests.tiny import FAMILIES, VOCAB_SIZE, new_pair, reference_pair

CAPACITY = 256
NUM_ROWS = 2
OFFSET = mx.array([40, 7], dtype=mx.int32)
FIRST = mx.array([0, 3], dtype=mx.int32)

by_family = pytest.mark.parametrize("family", FAMILIES)
by_rows = pytest.mark.parametrize("num_tokens", [1, 3, 9])


def random_slabs(layout, dtype=None):
    slabs = layout.allocate(NUM_ROWS, CAPACITY)
    return [
        mx.random.normal(slab.shape, dtype=dtype or slab.dtype, key=mx.random.key(i))
        for i, slab in enumerate(slabs)
    ]


def random_tokens(num_tokens):
    size = (NUM_ROWS, num_tokens)
    return mx.random.randint(0, VOCAB_SIZE, size, key=mx.random.key(5))


def mlx_lm_verify(model, tokens, slabs, layout=None):
    """Logits, hidden states and slabs of mlx-lm's layers."""
    lm, layout = text_model(model), layout or Target(model).layout
    where = {"num_tokens": tokens.shape[1], "capacity": CAPACITY}
    masks = verify_masks(layout, offset=OFFSET, first_position=FIRST, **where)
    slots = verify_slots(layout, offset=OFFSET, **where)
    views = [
        SlabView(*pair, offset=OFFSET, slots=slots[layer.layer_type])
        for layer, *pair in zip(layout.layers, slabs[::2], slabs[1::2], strict=True)
    ]
    embeddings = lm.model.embed_tokens(tokens)
    h = embeddings * lm.model.embed_scale
    inputs: list[Any] = [None] * len(lm.layers)
    if lm.args.hidden_size_per_layer_input:
        given = lm.model._get_per_layer_inputs(tokens, embeddings)
        projected = lm.model._project_per_layer_inputs(h, given)
        inputs = [projected[:, :, i] for i in range(len(lm.layers))]
    seen: list[Any] = []
    for i, layer in enumerate(lm.layers):
        view = views[i] if i < len(views) else None
        kv, offset = (None, None) if view else seen[lm.model.previous_kvs[i]]
        mask = masks[layer.layer_type]
        h, *shared = layer(
            h, mask, view, per_layer_input=inputs[i], shared_kv=kv, offset=offset
        )
        seen.append(shared)
    hidden = lm.model.norm(h)
    written = [array for view in views for array in (view.keys, view.values)]
    return [head_logits(lm, hidden), hidden, *written]


def check_verify(model, num_tokens):
    target, tokens = Target(model), random_tokens(num_tokens)
    slabs = random_slabs(target.layout)
    expected = mlx_lm_verify(model, tokens, slabs)
    found = target.verify(tokens, slabs, offset=OFFSET, first_position=FIRST)
    for a, b in zip((found.logits, found.hidden, *found.slabs), expected, strict=True):
        assert a.dtype == b.dtype
        assert mx.array_equal(a, b)


@by_family
@by_rows
def test_verify_gives_the_bytes_of_mlx_lm(family, num_tokens):
    check_verify(reference_pair(family).target, num_tokens)


def quantized(model):
    """In 4 bits wherever whole groups fill a row."""
    nn.quantize(
        model,
        group_size=32,
        bits=4,
        class_predicate=lambda _, m: (
            hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0
        ),
    )
    return model


@by_family
def test_quantized_with_adapters(family):
    model = quantized(new_pair(family).target)
    check_verify(model, 3)
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    flat: Any = tree_flatten(model.parameters())
    adapters = [
        (name, mx.random.normal(array.shape, array.dtype, key=mx.random.key(1)))
        for name, array in flat
        if "lora_b" in name
    ]
    assert adapters
    model.load_weights(adapters, strict=False)
    check_verify(model, 3)


@by_family
def test_half_precision(family):
    model = new_pair(family).target
    if family == "26b-a4b":  # the CPU has no experts of that type but quantized ones
        quantized(model)
    model.set_dtype(mx.bfloat16)
    check_verify(model, 3)


@by_family
def test_a_draft_step_gives_the_bytes_of_mlx_lm(family):
    pair = reference_pair(family)
    drafter, layout = pair.drafter, Target(pair.target).layout
    assert drafter is not None
    slabs = random_slabs(layout)
    masks = draft_masks(layout, offset=OFFSET, first_position=FIRST, capacity=CAPACITY)
    shared = {
        kind: SharedKV(slabs[2 * i], slabs[2 * i + 1], masks[kind])
        for kind in set(drafter.layer_types)
        for i in [layout.source(kind)]
    }
    width = drafter.config.backbone_hidden_size
    given = mx.random.normal((2, NUM_ROWS, 1, width), key=mx.random.key(9))
    x = drafter.pre_projection(mx.concatenate(list(given), axis=-1))
    for layer in drafter.model.layers:
        kv = shared[layer.layer_type]
        x, *_ = layer(x, kv.mask, None, shared_kv=(kv.keys, kv.values), offset=OFFSET)
    expected = drafter.post_projection(drafter.model.norm(x))
    embedding, hidden = given
    found = drafter(embedding, hidden, shared, position=OFFSET)
    assert mx.array_equal(found.hidden, expected)


class Doubled(gemma4_text.Attention):
    """Somebody's own attention."""

    def __call__(self, *arrays, **options):
        found, *others = super().__call__(*arrays, **options)
        return 2 * found, *others


class Wrapped(nn.Module):
    """A layer inside somebody's own module."""

    def __init__(self, layer):
        super().__init__()
        self.inner = layer
        self.layer_type = layer.layer_type

    def __call__(self, *arrays, **options):
        h, *others = self.inner(*arrays, **options)
        return h + 1, *others


@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize("family", ["e2b", "26b-a4b"])
def test_a_layer_may_be_wrapped(family, place):
    model = new_pair(family).target
    target = Target(model)  # whose layout was read from the layers
    lm = text_model(model)
    lm.model.layers[place] = Wrapped(lm.model.layers[place])
    slabs, tokens = random_slabs(target.layout), random_tokens(3)
    expected = mlx_lm_verify(model, tokens, slabs, layout=target.layout)
    found = target.verify(tokens, slabs, offset=OFFSET, first_position=FIRST)
    assert mx.array_equal(found.logits, expected[0])


def test_a_norm_of_values_with_a_weight_is_followed():
    """By MLX's operations also where heads are turned by the kernel."""
    model = new_pair("e2b").target
    attention_of = text_model(model).layers[0].self_attn
    attention_of.v_norm = nn.RMSNorm(attention_of.head_dim)
    attention_of.v_norm.weight = attention_of.v_norm.weight * 2
    target = Target(model).over(text_model(model), frozenset({NORM_ROPE}))
    slabs, tokens = random_slabs(target.layout), random_tokens(3)
    found = target.verify(tokens, list(slabs), offset=OFFSET, first_position=FIRST)
    expected = mlx_lm_verify(model, tokens, slabs)
    assert mx.allclose(found.logits, expected[0], atol=1e-5)


class Louder(gemma4_text.DecoderLayer):
    """Somebody's own layer."""

    def __call__(self, *arrays, **options):
        h, *others = super().__call__(*arrays, **options)
        return h * 1.5, *others


@pytest.mark.parametrize("family", ["e2b", "26b-a4b"])
@pytest.mark.parametrize("kind", [Doubled, Louder])
def test_a_layer_that_is_not_mlx_lms_is_called_as_it_is(family, kind, caplog):
    layers_module._tell.cache_clear()
    model = new_pair(family).target
    for i in (0, -1):  # one that owns its keys; of E2B one that shares them
        layer = text_model(model).layers[i]
        (layer.self_attn if kind is Doubled else layer).__class__ = kind
    with caplog.at_level(logging.INFO, "mlx_gemma_mtp"):
        check_verify(model, 3)
        check_verify(model, 1)
    (said,) = caplog.messages
    assert said.startswith(f"layers with {kind.__name__} run as they are")


# ------------------------------------------------------------------ ways to attend


@pytest.fixture
def as_metal(monkeypatch):
    """Attention as on Metal: fused for the smaller heads, never for the larger."""

    def set_up(model):
        args = text_model(model).args
        small = (args.head_dim,)
        for module in (masks_module, attention):
            monkeypatch.setattr(module, "gpu", lambda: "metal")
            monkeypatch.setattr(module, "FUSED_HEAD_DIMS", small)
        monkeypatch.setattr(masks_module, "MAX_FUSED_ROWS", 8)
        monkeypatch.setattr(attention, "_PIECE", 8)

    return set_up


@by_family
@pytest.mark.parametrize("way", [PACKED, SPLIT])
def test_a_way_gives_every_row_the_bytes_it_has_alone(family, way, as_metal):
    """Rows of a block, against the same tokens one by one; and near to MLX's own."""
    model = reference_pair(family).target
    as_metal(model)
    lm = text_model(model)
    target, stock = (Target(model).over(lm, w) for w in (frozenset({way}), frozenset()))
    tokens, slabs = random_tokens(9), random_slabs(target.layout)
    where = {"first_position": FIRST}
    block = target.verify(tokens, list(slabs), offset=OFFSET, **where)
    expected = stock.verify(tokens, list(slabs), offset=OFFSET, **where)
    assert mx.allclose(block.logits, expected.logits, rtol=1e-4, atol=1e-4)
    rows = []
    for i in range(9):
        one = target.verify(tokens[:, i : i + 1], slabs, offset=OFFSET + i, **where)
        slabs = one.slabs
        rows.append(one.logits)
    assert mx.array_equal(block.logits, mx.concatenate(rows, axis=1))


@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("shared_by", [2, 8])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_packed_heads_find_what_mlx_finds(num_queries, shared_by, dtype):
    """On the CPU every byte, a row that sees nothing included."""
    keys = [mx.random.key(i) for i in range(3)]
    queries = mx.random.normal((2, 2 * shared_by, num_queries, 16), key=keys[0])
    k, v = (mx.random.normal((2, 2, 40, 16), key=key) for key in keys[1:])
    seen = mx.arange(40) <= (30 + mx.arange(num_queries))[:, None]
    mask = mx.stack([seen, mx.zeros_like(seen)])[:, None]
    queries, k, v = (array.astype(dtype) for array in (queries, k, v))
    expected = mx.fast.scaled_dot_product_attention(queries, k, v, scale=0.5, mask=mask)
    found = attention.packed(queries, SharedKV(k, v, mask), 0.5)
    assert mx.array_equal(found, expected)


def test_packed_rows_are_products_of_one_size(monkeypatch, as_metal):
    """Whatever the number of queries is."""
    seen = set()
    product = attention._product

    def recorded(rows, kv, mask):
        seen.add(rows.shape[2])
        return product(rows, kv, mask)

    monkeypatch.setattr(attention, "_product", recorded)
    model = reference_pair("31b").target
    as_metal(model)
    target = Target(model).over(text_model(model), frozenset({PACKED}))
    for num_tokens in (1, 2, 5, 9):
        where = {"offset": OFFSET, "first_position": FIRST}
        target.verify(random_tokens(num_tokens), random_slabs(target.layout), **where)
    assert seen == {attention._PIECE}
