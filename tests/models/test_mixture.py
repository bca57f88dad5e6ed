"""The mixture of experts of a layer, and what of it is left to mlx-lm.

Compared                        with                       tolerance
layers in the mixture's ways    mlx-lm's layers            0: every byte
parts that are not mlx-lm's     what they compute          0: every byte

Run: python -m pytest tests/models/test_mixture.py
"""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import gemma4_text
from mlx_lm.models.switch_layers import SwiGLU
from mlx_lm.tuner.lora import LoRASwitchLinear

from mlx_gemma_mtp.kernels.layer_trial import Mixture
from mlx_gemma_mtp.kernels.matmul import Form
from mlx_gemma_mtp.kernels.ways import ADD_NORM, EXPERTS, ROUTE
from mlx_gemma_mtp.models.mixture import mixture_of
from mlx_gemma_mtp.models.target import Target, text_model
from tests.models.test_layers import (
    FIRST,
    OFFSET,
    mlx_lm_verify,
    random_slabs,
    random_tokens,
)
from tests.tiny import new_pair

WAYS = frozenset({ADD_NORM, ROUTE, EXPERTS})
NUM_EXPERTS, NUM_CHOSEN = 16, 4


class Louder(gemma4_text.Router):
    """Somebody's own router."""

    def __call__(self, x):
        experts, shares = super().__call__(x)
        return experts, shares * 2


class Doubled(gemma4_text.Experts):
    """Somebody's own experts."""

    def __call__(self, x, experts, shares):
        return 2 * super().__call__(x, experts, shares)


def become(kind, name):
    """A change of a layer: one of its parts gets another class."""

    def change(layer):
        layer[name].__class__ = kind

    return change


def bend(layer):
    layer.experts.switch_glu.activation = SwiGLU()


CHANGES = {
    "none": lambda _: None,
    "router": become(Louder, "router"),
    "experts": become(Doubled, "experts"),
    "activation": bend,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ways", [WAYS, frozenset()], ids=["ways", "stock"])
def test_a_mixture_gives_the_bytes_of_mlx_lm(change, ways):
    """On the CPU, where the ways are plain operations."""
    model = new_pair("26b-a4b").target
    CHANGES[change](text_model(model).layers[1])
    slabs = random_slabs(Target(model).layout)
    expected = mlx_lm_verify(model, random_tokens(3), slabs)
    found = (
        Target(model)
        .over(text_model(model), ways)
        .verify(random_tokens(3), slabs, offset=OFFSET, first_position=FIRST)
    )
    assert mx.array_equal(found.logits, expected[0])


# ------------------------------------------------------------------- what it has


def layer_of(*, dtype=mx.bfloat16, **quantization):
    """A layer with a mixture."""
    layer = text_model(new_pair("26b-a4b", has_drafter=False).target).layers[0]
    layer.set_dtype(dtype)
    if quantization:
        nn.quantize(layer, **quantization)
    return layer


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"group_size": 32, "bits": 4}, Form(4, 32, mx.bfloat16)),
        ({"group_size": 32, "bits": 8}, Form(8, 32, mx.bfloat16)),
        ({}, Form(16, 0, mx.bfloat16)),
        ({"dtype": mx.float32}, None),
        ({"group_size": 32, "bits": 3}, None),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, None),
    ],
    ids=str,
)
def test_how_experts_are_stored(settings, form):
    expected = Mixture(NUM_EXPERTS, NUM_CHOSEN, form)
    assert mixture_of(layer_of(**settings)) == expected


@pytest.mark.parametrize("name", ["gate_proj", "up_proj"])
def test_experts_with_adapters_are_left_to_mlx(name):
    layer = layer_of(group_size=32, bits=4)
    glu = layer.experts.switch_glu
    glu[name] = LoRASwitchLinear.from_base(glu[name], r=2)
    assert mixture_of(layer) == Mixture(NUM_EXPERTS, NUM_CHOSEN, None)


def test_experts_of_two_forms_are_left_to_mlx():
    layer = layer_of()
    glu = layer.experts.switch_glu
    glu.up_proj = glu.up_proj.to_quantized(group_size=32, bits=4)
    assert mixture_of(layer) == Mixture(NUM_EXPERTS, NUM_CHOSEN, None)


def test_a_layer_without_experts_has_no_mixture():
    layer = text_model(new_pair("e2b", has_drafter=False).target).layers[0]
    assert mixture_of(layer) is None


@pytest.mark.parametrize("is_quantized", [False, True])
def test_ways_that_make_a_difference(is_quantized):
    model = new_pair("26b-a4b", has_drafter=False).target
    if is_quantized:
        model.set_dtype(mx.bfloat16)
        nn.quantize(model, group_size=32, bits=4)
    ways = Target(model).ways
    assert ROUTE in ways
    assert (EXPERTS in ways) == is_quantized  # the kernel has no float32
    assert ROUTE not in Target(new_pair("31b", has_drafter=False).target).ways
