"""What was learnt holds for the weights and settings it was learnt of, and no others.

Run: python -m pytest tests/pair/test_fingerprint.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.checkpoints.weights import load_target
from mlx_gemma_mtp.machine import MLX_SETTINGS
from mlx_gemma_mtp.pair.fingerprint import fingerprint, learnt_key
from mlx_gemma_mtp.pair.load import load_pair
from mlx_gemma_mtp.pair.pair import Pair, named_arrays
from tests.tiny import REFERENCE

# Of MLX's variables, those that change no number and no speed of a text's.
WITHOUT_EFFECT = {
    "MLX_CONV_UNFOLD_TILE_ROWS",  # nothing here is convolved
    "MLX_CONV_WINOGRAD_TILE_BATCH",
    "MLX_CONV_WINOGRAD_WORKING_SET",
    "MLX_CUDA_CONV_CACHE_SIZE",
    "MLX_CUDA_FFT_CACHE_SIZE",
    "MLX_CUDA_SDPA_BACKWARD_CACHE_SIZE",
    "MLX_ENABLE_CACHE_THRASHING_CHECK",
    "MLX_HOSTFILE",
    "MLX_IBV_DEVICES",
    "MLX_JACCL_COORDINATOR",
    "MLX_JACCL_RING",
    "MLX_MPI_LIBNAME",
    "MLX_NCCL_TIMEOUT",
    "MLX_PTX_CACHE_DIR",
    "MLX_RANK",
    "MLX_RESIDENCY_DEBUG",
    "MLX_RING_VERBOSE",
    "MLX_SAVE_CUDA_GRAPHS_DOT_FILE",
    "MLX_WORLD_SIZE",
}
DTYPES = [
    mx.bool_,
    mx.uint8,
    mx.uint16,
    mx.uint32,
    mx.int64,
    mx.float16,
    mx.bfloat16,
    mx.float32,
    mx.complex64,
]


def load_reference(family):
    folder = REFERENCE / family
    return load_pair(folder / "target", folder / "drafter")


def _fits(_, module):
    """Whether a layer's weight can be quantized in groups of 32."""
    is_matrix = isinstance(module, nn.Linear | nn.Embedding)
    return is_matrix and module.weight.shape[-1] % 32 == 0


def other_values(array):
    """An array of the same shape and type, each element another one."""
    return ~array if array.dtype == mx.bool_ else array + mx.ones_like(array)


@given(
    st.lists(st.integers(0, 70), max_size=4).filter(lambda s: len(s) < 4 or max(s) < 9),
    st.sampled_from(DTYPES),
)
def test_arrays_of_every_kind(shape, dtype):
    array = mx.random.randint(0, 2, shape).astype(dtype)
    found = fingerprint([("a", array)])
    assert fingerprint([("a", mx.array(array))]) == found
    assert fingerprint([("b", array)]) != found
    if array.size:
        assert fingerprint([("a", other_values(array))]) != found
    # How the elements lie in memory is no matter, and no reason to copy them.
    turned = mx.contiguous(array.transpose()).transpose()
    assert fingerprint([("a", turned)]) == found


@pytest.mark.parametrize("family", ["e2b", "26b-a4b"])
@pytest.mark.parametrize("bits", [None, 4])
def test_every_array_counts(family, bits):
    pair = load_reference(family)
    assert pair.drafter is not None
    modules = [pair.target, pair.drafter]
    if bits is not None:
        for module in modules:
            nn.quantize(module, 32, bits, class_predicate=_fits)
    arrays = named_arrays(modules)
    for name, array in arrays:
        if array.size:
            other = fingerprint([(name, other_values(array))])
            assert fingerprint([(name, array)]) != other, name
    halves = [[*arrays[:1]], [*arrays[1:]], arrays, [*reversed(arrays)]]
    assert len({fingerprint(part) for part in halves}) == len(halves)


def test_adapters_of_one_matrix_count():
    """Fused in bfloat16, where most of a small change is rounded away."""
    weight = mx.random.normal((512, 384)).astype(mx.bfloat16)
    factors = mx.random.normal((512, 4)), mx.random.normal((4, 384))
    fused = (weight + 1e-3 * factors[0] @ factors[1]).astype(mx.bfloat16)
    assert fingerprint([("a", fused)]) != fingerprint([("a", weight)])


@pytest.mark.parametrize("part", [slice(0, 128), slice(3 * 128, None)])
def test_places_are_spread(part):
    """The first rows of an embedding may never have been trained."""
    weight = mx.zeros((512, 512))
    rows, columns = mx.array(weight), mx.array(weight)
    rows[part] = 1
    columns[:, part] = 1
    assert len({fingerprint([("a", a)]) for a in (weight, rows, columns)}) == 3


@pytest.mark.parametrize(
    "view", [lambda a: a, lambda a: a.T, lambda a: a[:, ::2], lambda a: a[None, 7:]]
)
def test_large_arrays_are_not_copied(view):
    array = view(mx.random.normal((1024, 1024)))
    mx.eval(array)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    fingerprint([("a", array)])
    assert mx.get_peak_memory() - before < 10_000


def test_lazy_weights_are_read_once():
    folder = REFERENCE / "12b" / "target"
    eager, lazy = load_target(folder), load_target(folder, lazy=True)
    before = mx.get_active_memory()
    found = fingerprint(named_arrays(lazy))
    size = mx.get_active_memory() - before
    assert size > 0
    mx.eval(lazy.parameters())
    assert mx.get_active_memory() - before == size
    assert found == fingerprint(named_arrays(eager))


def test_another_drafter_in_the_same_place_starts_afresh(monkeypatch, tmp_path):
    """Its shapes and its final norm are those of the one before."""
    monkeypatch.setenv("MLX_GEMMA_MTP_CACHE", str(tmp_path))
    for _ in range(2):
        pair = load_reference("12b")
        pair.calibration.controller("greedy", num_rows=1, min_rows=1).observe(1, [1], 1)
        pair.calibration.save()
    assert len(list(tmp_path.iterdir())) == 1
    pair = load_reference("12b")
    assert pair.drafter is not None
    layer = pair.drafter.model.layers[0].mlp.down_proj
    layer.weight = layer.weight * 1.5
    again = Pair(pair.target, pair.drafter)
    again.calibration.save()
    assert len(list(tmp_path.iterdir())) == 2


def test_settings_of_mlx_are_in_the_key_and_no_other_variable(monkeypatch):
    arrays = [("a", mx.ones(3))]
    for name in ("MLX_GEMMA_MTP_API_KEY", "MLX_RANK", "MLX_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, "sesame")
    before = learnt_key(arrays)
    assert "sesame" not in json.dumps(before)
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    assert learnt_key(arrays) != before
    monkeypatch.delenv("MLX_ENABLE_TF32")
    assert learnt_key(arrays) == before


def test_every_variable_of_the_installed_mlx_is_known():
    folder = Path(mx.__file__).parent / "lib"
    (library,) = folder.glob("libmlx.[sd][oy]*")
    found = re.findall(rb"\0(MLX_[A-Z0-9_]+)(?=\0)", library.read_bytes())
    names = {name.decode() for name in found}
    assert "MLX_BFS_MAX_WIDTH" in names
    assert names <= set(MLX_SETTINGS) | WITHOUT_EFFECT
