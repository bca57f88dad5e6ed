"""Whether the kernels of layers are all run where a way to run layers is tried.

Run: python -m pytest tests/kernels/test_trial.py
"""

import sys

import mlx.core as mx
import pytest

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.kernels import add_norm, common, norm_rope, route
from mlx_gemma_mtp.kernels.layer_trial import LayerSizes, Mixture, is_right
from mlx_gemma_mtp.kernels.matmul import GATHERED, Form, kernel
from mlx_gemma_mtp.kernels.ways import ADD_NORM, EXPERTS, NORM_ROPE, ROUTE
from tests.metal.run import run_on_cpu

FORM = Form(4, 32, mx.bfloat16)
SIZES = LayerSizes(
    widths=((64, mx.bfloat16),),
    head_dims=((32, mx.bfloat16),),
    mixtures=(Mixture(16, 4, FORM),),
)


@pytest.mark.parametrize(
    ("way", "kernels"),
    [
        (ADD_NORM, add_norm.kernels()),
        (NORM_ROPE, norm_rope.kernels()),
        (ROUTE, [route.KERNEL]),
        (EXPERTS, [kernel(FORM, 1, 4, GATHERED, 2)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_trial_launches_each_kernel_of_its_way(way, kernels, monkeypatch):
    names = set()

    def launch(kernel, inputs, **options):
        names.add(kernel.name)
        return run_on_cpu(kernel, inputs, **options)

    monkeypatch.setattr(common, "backend", lambda: "metal")
    monkeypatch.setattr(common, "launch", launch)
    assert is_right(way, SIZES)
    assert names == {kernel.name for kernel in kernels}


@pytest.mark.parametrize("way", [ADD_NORM, ROUTE, EXPERTS])
def test_numbers_of_a_mixture_that_are_wrong_are_seen(way, monkeypatch):
    def launch(kernel, inputs, **options):
        found = run_on_cpu(kernel, inputs, **options)
        is_of_mixture = kernel.name.endswith(("thrice", "experts", "route", "1x4"))
        return [a[::-1] for a in found] if is_of_mixture else found

    monkeypatch.setattr(common, "backend", lambda: "metal")
    monkeypatch.setattr(common, "launch", launch)
    assert not is_right(way, SIZES)
