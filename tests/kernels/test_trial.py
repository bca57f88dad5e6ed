"""Whether the kernels of layers are all run where a way to run layers is tried.

Run: python -m pytest tests/kernels/test_trial.py
"""

import sys

import mlx.core as mx
import pytest

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.kernels import add_norm, common, norm_rope
from mlx_gemma_mtp.kernels.layer_trial import LayerSizes, is_right
from mlx_gemma_mtp.kernels.ways import ADD_NORM, NORM_ROPE
from tests.metal.run import run_on_cpu

SIZES = LayerSizes(widths=((64, mx.bfloat16),), head_dims=((32, mx.bfloat16),))


@pytest.mark.parametrize(
    ("way", "module"), [(ADD_NORM, add_norm), (NORM_ROPE, norm_rope)]
)
def test_a_trial_launches_each_kernel_of_its_way(way, module, monkeypatch):
    names = set()

    def launch(kernel, inputs, **options):
        names.add(kernel.name)
        return run_on_cpu(kernel, inputs, **options)

    monkeypatch.setattr(common, "backend", lambda: "metal")
    monkeypatch.setattr(common, "launch", launch)
    assert is_right(way, SIZES)
    assert names == {kernel.name for kernel in module.kernels()}
