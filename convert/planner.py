"""Puts parameters, tensors and formats together: the plan of one checkpoint.

Reads headers only. Finds every tensor that is missing, unknown, of another shape than
the config says or of a type that cannot be converted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import mlx.nn as nn

from mlx_gemma_mtp.checkpoints.checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo
from mlx_gemma_mtp.checkpoints.packing import check_packing, next_step, stored_formats
from mlx_gemma_mtp.checkpoints.quantization import Format
from mlx_gemma_mtp.checkpoints.weights import (
    drafter_skeleton,
    parameter_shapes,
    target_settings,
    target_skeleton,
)
from mlx_gemma_mtp.errors import CheckpointError, RequestError, cut
from mlx_gemma_mtp.models.tensor_names import (
    TOKEN_ORDERING,
    Names,
    Share,
    drafter_names,
    target_names,
    tensor_name,
)

from .output_config import output_config
from .plan import Array, Packing, Parameter, PartPlan, Rows
from .quantize import DRAFTER, TARGET, Choice

_UNPACKED_DTYPE = "BF16"  # of modes whose scales have no type of the weights: MLX's


def plan_target(
    checkpoint: Checkpoint,
    base: Format | None,
    *,
    dtype: str | None,
    is_dequantized: bool = False,
) -> PartPlan:
    """Plan the conversion of a target.

    Args:
        checkpoint: The target.
        base: The format of its matrices, None to leave them as they are. A target
            that is quantized already stays as it is.
        dtype: Type of what is not quantized, a key of ``FLOAT_DTYPES``; None for the
            checkpoint's own.
        is_dequantized: Whether packed matrices are written in full.

    Raises:
        CheckpointError: Its tensors are not those of its config.
    """
    settings = target_settings(checkpoint)
    is_text_only = settings["model_type"] == "gemma4_text"
    text = settings if is_text_only else settings["text_config"]
    names = target_names(checkpoint.tensors, text, is_text_only=is_text_only)
    model = target_skeleton(checkpoint)
    choice = Choice(TARGET, base, is_dequantized)
    return _plan(checkpoint, model, names, text, choice, dtype=dtype)


def plan_drafter(
    checkpoint: Checkpoint,
    base: Format | None,
    *,
    dtype: str | None,
    is_dequantized: bool = False,
) -> PartPlan:
    """Plan the conversion of a drafter.

    Args:
        checkpoint: The drafter.
        base: The format of its matrices, None to leave them as they are. A drafter
            that is quantized already stays as it is.
        dtype: Type of what is not quantized, a key of ``FLOAT_DTYPES``; None for the
            checkpoint's own.
        is_dequantized: Whether packed matrices are written in full.

    Raises:
        CheckpointError: Its tensors are not those of its config.
    """
    model = drafter_skeleton(checkpoint)
    names = drafter_names(checkpoint.tensors)
    text = model.config.text_config
    choice = Choice(DRAFTER, base, is_dequantized)
    return _plan(checkpoint, model, names, text, choice, dtype=dtype)


def _plan(
    checkpoint: Checkpoint,
    model: nn.Module,
    names: Names,
    text: Mapping[str, Any],
    choice: Choice,
    *,
    dtype: str | None,
) -> PartPlan:
    """Go through the model's parameters and find what each is made of."""
    check_packing(checkpoint)
    shapes = parameter_shapes(model)
    packed = stored_formats(checkpoint, names, shapes)
    stored = {} if choice.is_dequantized else packed
    formats = stored or _chosen_formats(model, shapes, choice)
    # What stays packed keeps its types, whatever its config says, unless asked.
    named = dtype if dtype or stored else _named_dtype(checkpoint)
    planner = _Planner(checkpoint, choice.part, names, FLOAT_DTYPES.get(named or ""))
    parameters: list[Parameter] = []
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if path in stored:
            parameters += planner.kept(path, shape, stored[path])
        elif path in packed:
            parameters.append(planner.unpacked(path, shape, packed[path]))
        else:
            parameters.append(planner.parameter(name, shape, formats.get(path)))
    planner.refuse_unknown({part.name for p in parameters for part in (p, *p.beside)})
    return PartPlan(
        choice.part,
        checkpoint,
        tuple(parameters),
        names.unused,
        formats,
        bool(stored),
        output_config(
            checkpoint.config,
            text,
            formats=formats,
            base=_most_common(stored) if stored else choice.base,
            dtype=dtype,
        ),
    )


def _chosen_formats(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], choice: Choice
) -> dict[str, Format]:
    """Return the formats of the modules that will be quantized."""
    formats = {}
    for path, module in model.named_modules():
        if hasattr(module, "to_quantized"):  # as MLX tells them itself
            chosen = choice.format_of(path, shapes[f"{path}.weight"][-1])
            if chosen is not None:
                formats[path] = chosen
    return formats


@dataclass(frozen=True)
class _Planner:
    """Makes parameters out of the tensors of one checkpoint, or says what is wrong."""

    checkpoint: Checkpoint
    part: str
    names: Names
    float_dtype: str | None

    def parameter(
        self, name: str, shape: tuple[int, ...], chosen: Format | None
    ) -> Parameter:
        """Plan a float tensor, or the one of integers."""
        share, source = self.source(name)
        self.check_shape(share, source, shape)
        dtype = self.target_dtype(name, source)
        arrays: tuple[Array, ...] = (Array(name, dtype, shape),)
        if chosen is not None:
            arrays = _packed_arrays(name.removesuffix(".weight"), shape, chosen, dtype)
        num_weights = math.prod(shape)
        rows = _rows(shape, share)
        return Parameter(
            name, share.tensor, source, rows, chosen, dtype, arrays, num_weights
        )

    def kept(
        self, path: str, shape: tuple[int, ...], found: Format
    ) -> Iterator[Parameter]:
        """Plan the arrays of a matrix that is packed already."""
        dtype = "U8"
        if found.has_biases:
            dtype = self.float_dtype or self.source(f"{path}.scales")[1].dtype
        num_weights = math.prod(shape)
        for array in _packed_arrays(path, shape, found, dtype):
            share, source = self.source(array.name)
            self.check_shape(share, source, array.shape)
            rows = _rows(array.shape, share)
            yield Parameter(
                array.name,
                share.tensor,
                source,
                rows,
                None,
                array.dtype,
                (array,),
                num_weights,
            )
            num_weights = 0  # counted once, not again with scales and biases

    def unpacked(self, path: str, shape: tuple[int, ...], found: Format) -> Parameter:
        """Plan a matrix in full that is packed."""
        words, *beside = self.kept(path, shape, found)
        dtype = self.float_dtype or _UNPACKED_DTYPE
        if self.float_dtype is None and found.has_biases:
            dtype = beside[0].source.dtype
        rows = words.rows
        if found.has_global_scale:  # a block must not reach into another expert
            rows = Rows(rows.num_columns, 0, shape[1], shape[1], shape[0])
            single = Rows(1, 0, shape[0], shape[0], 1)
            beside[-1] = replace(beside[-1], rows=single)
        return replace(
            words,
            rows=rows,
            dtype=dtype,
            arrays=(Array(words.name, dtype, shape),),
            packing=Packing(found, tuple(beside)),
        )

    def source(self, name: str) -> tuple[Share, TensorInfo]:
        """Return the tensor of a parameter."""
        share = self.names.parameters.get(name)
        if share is None:
            tensor = tensor_name(name, self.checkpoint.tensors)
            raise CheckpointError(
                f"{cut(tensor)} in {cut(self.checkpoint.folder)} must be there, as "
                f"{self.checkpoint.config_path.name} says: got no such tensor. "
                f"{next_step(self.checkpoint)}"
            )
        return share, self.checkpoint.tensors[share.tensor]

    def check_shape(
        self, share: Share, source: TensorInfo, shape: tuple[int, ...]
    ) -> None:
        """Refuse another shape than the model's."""
        expected = shape
        if share.count > 1:
            expected = (*shape[:-2], shape[-2] * share.count, shape[-1])
        if source.shape != expected:
            found = _shape_text(source.shape)
            self.fail(share.tensor, source, _shape_text(expected), found)

    def target_dtype(self, name: str, source: TensorInfo) -> str:
        """Return the type a tensor is cast to."""
        return "I32" if name == TOKEN_ORDERING else self.float_dtype or source.dtype

    def refuse_unknown(self, known: set[str]) -> None:
        """Refuse tensors that are no parameter of the model."""
        for name, share in self.names.parameters.items():
            if name not in known:
                source = self.checkpoint.tensors[share.tensor]
                raise CheckpointError(
                    f"{cut(share.tensor)} in {cut(source.file)} must be a tensor of "
                    f"the {self.part} that {self.checkpoint.config_path.name} "
                    "describes: got one that it does not have. "
                    f"{next_step(self.checkpoint)}"
                )

    def fail(
        self, tensor: str, source: TensorInfo, expected: str, found: str
    ) -> NoReturn:
        """Raise what a tensor must be and is not."""
        raise CheckpointError(
            f"{cut(tensor)} in {cut(source.file)} must be {expected}, as "
            f"{self.checkpoint.config_path.name} says: got {found}. "
            f"{next_step(self.checkpoint)}"
        )


def _packed_arrays(
    path: str, shape: tuple[int, ...], packed: Format, dtype: str
) -> tuple[Array, ...]:
    """Return the arrays of a packed matrix, in the order of mlx-lm's modules.

    Args:
        path: The module's path.
        shape: The matrix's own shape.
        packed: Its format.
        dtype: Type of scales and biases in affine mode.
    """
    scales_dtype = dtype if packed.has_biases else "U8"
    arrays = [
        Array(f"{path}.weight", "U32", packed.packed_shape(shape)),
        Array(f"{path}.scales", scales_dtype, packed.scales_shape(shape)),
    ]
    if packed.has_biases:
        arrays.append(Array(f"{path}.biases", dtype, packed.scales_shape(shape)))
    if packed.has_global_scale:
        arrays.append(Array(f"{path}.global_scale", "F32", shape[:1]))
    return tuple(arrays)


def _rows(shape: tuple[int, ...], share: Share) -> Rows:
    num_columns = shape[-1] if shape else 1
    if share.count == 1:
        num_rows = math.prod(shape[:-1])
        return Rows(num_columns, 0, num_rows, num_rows, 1)
    length = shape[-2]
    first, stride = share.index * length, share.count * length
    return Rows(num_columns, first, length, stride, math.prod(shape[:-2]))


def _most_common(formats: Mapping[str, Format]) -> Format:
    # A scale of an expert is never what other matrices take by default.
    common = Counter(replace(f, has_global_scale=False) for f in formats.values())
    return common.most_common(1)[0][0]


def _named_dtype(checkpoint: Checkpoint) -> str | None:
    """Return the type that the config names, as ``mlx_lm.convert`` looks for it."""
    text = checkpoint.config.get("text_config")
    for place in (checkpoint.config, text if isinstance(text, Mapping) else {}):
        for key in ("torch_dtype", "dtype"):
            if isinstance(place.get(key), str):
                return str(place[key])
    return None


def check_not_stored(plan: PartPlan, flags: str) -> None:
    """Refuse to quantize what is quantized already.

    Args:
        plan: The part's plan.
        flags: The flags that asked for it.

    Raises:
        RequestError: The checkpoint is quantized.
    """
    if plan.is_stored:
        found = _most_common(plan.formats).name
        raise RequestError(
            f"the {plan.part} must be a float checkpoint for {flags}: got "
            f"{plan.checkpoint.folder}, which is {found} already. Leave the flags out "
            "to keep it as it is, or take the float checkpoint."
        )


def _shape_text(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
