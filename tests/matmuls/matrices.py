"""Shapes for tests, and a kernel that MLX's own operations stand for."""

from __future__ import annotations

import mlx.core as mx

from mlx_gemma_mtp.kernels.matmul import DENSE, Form
from mlx_gemma_mtp.matmuls.choices import Shape

BFLOAT, HALF = mx.bfloat16, mx.float16
FOUR_BIT = Form(4, 64, BFLOAT)
SMALL = Shape(35, 128, FOUR_BIT)
LARGE = Shape(300, 128, FOUR_BIT)
EIGHT_BIT = Shape(64, 64, Form(8, 32, HALF))
PLAIN = Shape(70, 192, Form(DENSE, 0, BFLOAT))


class StandIn:
    """What takes the place of ``kernels.matmul.multiply``: float32, rounded at last.

    Attributes:
        calls: The (form, M, R) of every call.
        fails: Called with these before anything is computed.
        change: What becomes of the numbers, with these.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Form, int, int]] = []
        self.fails = lambda *pipeline: None
        self.change = lambda y, *pipeline: y

    def __call__(
        self,
        x: mx.array,
        weight: mx.array,
        scales: mx.array | None = None,
        biases: mx.array | None = None,
        *,
        form: Form,
        num_columns: int | None = None,
    ) -> mx.array:
        assert num_columns is not None
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        pipeline = form, len(x), num_columns
        self.calls.append(pipeline)
        self.fails(*pipeline)
        if scales is not None and biases is not None:
            weight = mx.dequantize(
                weight,
                scales.astype(mx.float32),
                biases.astype(mx.float32),
                group_size=form.group_size,
                bits=form.bits,
            )
        weight = weight.astype(mx.float32)
        # Row by row: the CPU's sums depend on how many there are.
        rows = [row[None] @ weight.T for row in x.astype(mx.float32)]
        y = mx.concatenate(rows).astype(form.dtype)
        return self.change(y, *pipeline).reshape(*shape[:-1], -1)
