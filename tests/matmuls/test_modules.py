"""Layers that give a few rows to the kernel, run in the harness.

Run: python -m pytest tests/matmuls/test_modules.py
"""

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

from mlx_gemma_mtp.kernels import common
from mlx_gemma_mtp.kernels.matmul import Form
from mlx_gemma_mtp.matmuls.choices import Choice, Choices, Shape
from mlx_gemma_mtp.matmuls.modules import few_rows, shape_of, shapes_of
from tests.metal.run import run_on_cpu

if sys.platform == "darwin":
    pytest.skip("MLX's own Metal runs here", allow_module_level=True)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Kernels run in the harness; their names as they are launched."""
    names = []

    def launch(kernel, inputs, **settings):
        names.append(kernel.name)
        return run_on_cpu(kernel, inputs, **settings)

    monkeypatch.setattr(common, "launch", launch)
    return names


class Model(nn.Module):
    """Layers of every kind."""

    def __init__(self):
        super().__init__()
        mx.random.seed(3)
        self.embed_tokens = nn.Embedding(40, 64)
        self.per_layer = nn.Embedding(40, 64)
        self.dense = nn.Linear(64, 24)
        self.packed = nn.QuantizedLinear(64, 24, group_size=32, bits=4)
        inner: Any = nn.QuantizedLinear(64, 24, bias=False, group_size=64, bits=8)
        self.adapted = LoRALinear.from_base(inner)
        self.adapted.lora_b = mx.random.normal(self.adapted.lora_b.shape) / 50
        self.other_mode = nn.QuantizedLinear(64, 24, mode="mxfp4")
        self.set_dtype(mx.bfloat16)
        self.head = nn.QuantizedEmbedding(40, 64, 64, 4)
        self.head.set_dtype(mx.bfloat16)
        self.eval()


CALLS = {
    "embed_tokens": lambda model, x: model.embed_tokens.as_linear(x),
    "head": lambda model, x: model.head.as_linear(x),
    "dense": lambda model, x: model.dense(x),
    "packed": lambda model, x: model.packed(x),
    "adapted": lambda model, x: model.adapted(x),
}


def rows(*shape, dtype=mx.bfloat16):
    return mx.random.normal((*shape, 64), key=mx.random.key(1)).astype(dtype)


def taking(model, first_row=1):
    """The model with the kernel for all that it has."""
    layers = [layer for _, layer in model.named_modules() if "weight" in layer]
    shapes = {shape for layer in layers if (shape := shape_of(layer)).is_known}
    choices = Choices({shape: Choice(first_row) for shape in shapes})
    for layer in layers:
        few_rows(layer, choices)
    return model


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", [(1,), (1, 5), (2, 3)])
def test_few_rows_are_those_of_mlx(name, shape, launches):
    x = rows(*shape)
    exact = Model()
    exact.set_dtype(mx.float32)  # MLX's sums on the CPU are then float32 as well
    want = CALLS[name](exact, x.astype(mx.float32))
    found = CALLS[name](taking(Model()), x)
    assert len(launches) == 1
    assert (found.dtype, found.shape) == (mx.bfloat16, want.shape)
    # Sums of an adapter are rounded one by one.
    assert mx.allclose(found.astype(mx.float32), want, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("name", CALLS)
def test_all_else_is_mlx(name, launches):
    for x in (rows(10), rows(2, 5), rows(3, dtype=mx.float32)):
        by_mlx = CALLS[name](Model(), x)
        assert mx.array_equal(CALLS[name](taking(Model()), x), by_mlx)
    x = rows(1)
    assert mx.array_equal(CALLS[name](taking(Model(), 2), x), CALLS[name](Model(), x))
    assert not launches


def test_head_still_embeds():
    tokens = mx.array([3, 39])
    for name in ("embed_tokens", "head"):
        table, taken = Model()[name], taking(Model())[name]
        assert mx.array_equal(taken(tokens), table(tokens))


def test_layers_of_other_kinds_are_left_alone(launches):
    class Own(nn.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = taking(Model())
    assert type(model.other_mode) is nn.QuantizedLinear
    own = Own(64, 24)
    own.set_dtype(mx.bfloat16)
    few_rows(own, Choices({shape_of(own): Choice(1)}))
    assert type(own) is Own
    norm = nn.RMSNorm(64)
    few_rows(norm, Choices({Shape(24, 64, Form(16, 0, mx.bfloat16)): Choice(1)}))
    assert type(norm) is nn.RMSNorm
    odd = nn.Linear(63, 24)
    assert not shape_of(odd).is_known
    assert not launches


def test_shapes_are_counted():
    bfloat16 = mx.bfloat16
    model = Model()
    assert shapes_of([model, None]) == {
        Shape(40, 64, Form(16, 0, bfloat16)): 1,  # one table of two is the head
        Shape(24, 64, Form(16, 0, bfloat16)): 1,
        Shape(24, 64, Form(4, 32, bfloat16)): 1,
        Shape(24, 64, Form(8, 64, bfloat16)): 1,
    }
    assert shapes_of([taking(model)]) == {}


def test_table_with_another_head_is_no_matrix():
    model = Model()
    before = shapes_of([model])
    model.lm_head = nn.Linear(64, 40)
    model.lm_head.set_dtype(mx.bfloat16)
    assert shapes_of([model]) == before  # one in place of the other
    model.embed_tokens = LoRAEmbedding.from_base(model.embed_tokens)
    del model["lm_head"]
    assert shapes_of([model]) == before


def test_biases_of_another_type_than_scales_are_mlxs(launches):
    packed = Model().packed
    packed["biases"] = packed["biases"].astype(mx.float32)
    assert not shape_of(packed).is_known
