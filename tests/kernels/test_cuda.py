"""The kernels' bodies in CUDA: NVIDIA's compiler takes every one, no GPU needed.

Runs where ``nvidia-cuda-nvrtc-cu12`` and ``nvidia-cuda-runtime-cu12`` are installed:
`make test-cuda`. What the bodies compute is tested in Metal's words, in the harness.

Run: make test-cuda
"""

from __future__ import annotations

import ctypes
import re
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.kernels import (
    add_norm,
    common,
    matmul,
    matmul_fused,
    norm_rope,
    route,
)
from mlx_gemma_mtp.sampling import fused
from mlx_gemma_mtp.sampling.graph import sampling_arrays, sampling_graph
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.kernels import test_add_norm
from tests.kernels.norms import Heads, Sum
from tests.kernels.products import FORMS, random_product
from tests.metal.run import run_on_cpu

pytestmark = pytest.mark.cuda

STACK_OF_COSINES = 32  # bytes, of NVIDIA's own function for large angles
TYPES_OF_ROWS = [mx.float32, mx.float16, mx.bfloat16]
MAX_REGISTERS = 128  # of a lane, on Apple's GPUs
TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.int32: "int",
    mx.uint32: "unsigned int",
    mx.bool_: "bool",
}


def folder(package):
    """Where a part of NVIDIA's toolkit lies."""
    spec = find_spec(f"nvidia.{package}")
    assert spec is not None, f"nvidia.{package} must be installed: use make test-cuda"
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def cuda_text(kernel, inputs, template, output_dtypes):
    """The text as ``mx.fast.cuda_kernel`` makes it, without MLX's own helpers."""
    parameters = [
        f"const {TYPES[array.dtype]}* {name}"
        for name, array in zip(kernel.input_names, inputs, strict=True)
    ] + [
        f"{TYPES[dtype]}* {name}"
        for name, dtype in zip(kernel.output_names, output_dtypes, strict=True)
    ]
    # MLX passes shapes by value; what counts here is that they can be indexed.
    parameters += [
        f"const int* {name}_shape"
        for name in kernel.input_names
        if f"{name}_shape" in kernel.source
    ]
    names = []
    for name, value in template:
        if isinstance(value, bool):
            names.append(f"constexpr bool {name} = {str(value).lower()};")
        elif isinstance(value, int):
            names.append(f"constexpr int {name} = {value};")
        else:
            names.append(f"using {name} = {TYPES[value]};")
    return "\n".join(
        [
            "#include <cuda_bf16.h>",
            "#include <cuda_fp16.h>",
            kernel.cuda_header,
            f"__global__ void {kernel.name}({', '.join(parameters)}) {{",
            *names,
            kernel.source,
            "}",
        ]
    )


def compiled(text):
    """What NVRTC says, and whether it takes the text."""
    library = ctypes.CDLL(str(folder("cuda_nvrtc") / "lib" / "libnvrtc.so.12"))
    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(
        ctypes.byref(program), text.encode("ascii"), b"kernel.cu", 0, None, None
    )
    assert created == 0
    include = f"--include-path={folder('cuda_runtime') / 'include'}"
    options = [
        b"--gpu-architecture=sm_90",
        b"--std=c++17",
        b"--ptxas-options=-v",
        include.encode(),
    ]
    failed = library.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*options)
    )
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode(), not failed


@pytest.mark.skipif(sys.platform == "darwin", reason="the harness is not for Macs")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("reproducible", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 64, "top_p": 0.95}, {"top_p": 0.9, "min_p": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("has_ids", [False, True])
def test_nvidias_compiler_takes_every_body(
    settings, reproducible, dtype, has_ids, monkeypatch
):
    texts = {}

    def launch(kernel, inputs, *, template, output_dtypes, **rest):
        texts[kernel.name, str(template)] = cuda_text(
            kernel, inputs, template, output_dtypes
        )
        return run_on_cpu(
            kernel, inputs, template=template, output_dtypes=output_dtypes, **rest
        )

    monkeypatch.setattr(common, "backend", lambda: "cuda")
    monkeypatch.setattr(common, "launch", launch)
    params = [SamplingParams(1.0, seed=1, reproducible=reproducible, **settings)]
    graph, rows = sampling_graph(params), sampling_arrays(params)
    chance, offset = np.random.default_rng(0), mx.array([5])
    logits = mx.array(chance.normal(size=(1, 2, 9000)).astype(np.float32)).astype(dtype)
    ids = mx.arange(9000)[None, None] if has_ids else None
    (group,) = graph.groups
    draft = fused.propose_one(
        logits[:, :1], rows, group=graph.of_drafts, offset=offset, step=1, token_ids=ids
    )
    accepted = fused.decide_all(draft, logits, rows, group=group, offset=offset)
    mx.eval(accepted.num_accepted)
    assert len(texts) > 3
    for text in texts.values():
        said, is_taken = compiled(text)
        assert is_taken, said


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_nvidias_compiler_takes_every_matmul(form, monkeypatch):
    """And finds registers for it: as many as Apple's GPUs have, without spills."""
    texts = []

    def launch(kernel, inputs, *, template, output_shapes, output_dtypes, **_):
        texts.append(cuda_text(kernel, inputs, template, output_dtypes))
        return [mx.zeros(output_shapes[0], dtype=output_dtypes[0])]

    monkeypatch.setattr(common, "launch", launch)
    for num_rows in range(1, matmul.MAX_ROWS + 1):
        random_product(form, num_rows, 8, 128).run()
    for text in texts:
        said, is_taken = compiled(text)
        assert is_taken, said
        assert " 0 bytes spill stores" in said
        (registers,) = re.findall(r"Used (\d+) registers", said)
        assert int(registers) <= MAX_REGISTERS


def texts_of(run, monkeypatch):
    """The texts that a call launches; their outputs are zeros."""
    texts = []

    def launch(kernel, inputs, *, template, output_shapes, output_dtypes, **_):
        texts.append(cuda_text(kernel, inputs, template, output_dtypes))
        pairs = zip(output_shapes, output_dtypes, strict=True)
        return [mx.zeros(shape, dtype=dtype) for shape, dtype in pairs]

    monkeypatch.setattr(common, "backend", lambda: "cuda")
    monkeypatch.setattr(common, "launch", launch)
    run()
    return texts


def check_taken(text, *, stack=0):
    """NVIDIA's compiler takes a text, and keeps all arrays of it in registers."""
    said, is_taken = compiled(text)
    assert is_taken, said
    assert " 0 bytes spill stores" in said
    frames = [int(size) for size in re.findall(r"(\d+) bytes stack frame", said)]
    assert frames
    assert max(frames) <= stack
    (registers,) = re.findall(r"Used (\d+) registers", said)
    assert int(registers) <= MAX_REGISTERS


@pytest.mark.parametrize("dtype", TYPES_OF_ROWS)
@pytest.mark.parametrize("H", [1536, add_norm.MAX_WIDTH])
def test_nvidias_compiler_takes_every_sum(H, dtype, monkeypatch):
    for options in [*test_add_norm.OPTIONS, *test_add_norm.OTHERS]:
        case = Sum.random(2, H, dtype, **options)
        for text in texts_of(case.run, monkeypatch):
            check_taken(text)


@pytest.mark.parametrize("dtype", TYPES_OF_ROWS)
@pytest.mark.parametrize("num_experts", [128, route.MAX_EXPERTS])
def test_nvidias_compiler_takes_every_choice(num_experts, dtype, monkeypatch):
    scores, scales = (
        mx.zeros(shape, dtype=dtype) for shape in ((2, num_experts), (num_experts,))
    )

    def run():
        route.route(scores, scales, num_chosen=8)

    for text in texts_of(run, monkeypatch):
        check_taken(text)


@pytest.mark.parametrize("dtype", TYPES_OF_ROWS)
@pytest.mark.parametrize("is_proportional", [False, True])
def test_nvidias_compiler_takes_every_rotation(is_proportional, dtype, monkeypatch):
    kinds = (norm_rope.QUERIES, norm_rope.SHARED, norm_rope.SEPARATE)
    for kind, D in product(kinds, (64, 256, 512)):
        case = Heads.random(
            1, 2, 4, 2, D, dtype, kind=kind, is_proportional=is_proportional
        )
        for text in texts_of(case.run, monkeypatch):
            check_taken(text, stack=STACK_OF_COSINES)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_nvidias_compiler_takes_every_fused_matmul(form, monkeypatch):
    for num_rows in range(1, matmul.MAX_ROWS + 1):
        product = random_product(form, num_rows, 8, 128)
        x, matrix = mx.array(product.x).astype(form.dtype), tuple(product.matrix)

        def run(x=x, matrix=matrix):
            matmul_fused.gate_up(x, matrix, matrix, form=form)
            values = mx.zeros((len(x), 8), dtype=form.dtype)
            matmul_fused.gate_by(x, matrix, values, form=form)
            for count in (2, 3):
                matmul_fused.qkv(x, [matrix] * count, form=form)
            experts = tuple(array[None] for array in matrix)
            chosen = mx.zeros((len(x), 8), dtype=mx.uint32)
            matmul_fused.gather_gate_up(x, experts, experts, chosen, form=form)

        for text in texts_of(run, monkeypatch):
            check_taken(text)
