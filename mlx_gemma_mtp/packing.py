"""How a checkpoint's matrices are packed: by MLX, and how, or by another tool.

The tensors tell, never a key of the config alone: configs name a regime that float
weights were trained in, keep a key from before, and lose one. The method that a config
names only says which of the tools it was. Reads headers; knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo
from .config import cut, shorten
from .errors import CheckpointError
from .quantization import Format, stored_format
from .tensor_names import Names, is_input

_QUANTIZE = (
    "Take the float checkpoint of this model, which mlx_gemma_mtp.convert quantizes, "
    "or one in MLX's format (mlx-community)."
)
_MERGE = (
    "Merge them into their model with peft's merge_and_unload and save that, or train "
    "with mlx_lm.lora."
)
_STACK = (
    "Take a checkpoint with stacked experts (experts.gate_up_proj), as "
    "google/gemma-4-26B-A4B-it has them."
)


@dataclass(frozen=True)
class Kind:
    """What another tool leaves in a checkpoint.

    Attributes:
        name: What users know it by.
        pattern: Found in the names of its tensors.
        next_step: What to do.
    """

    name: str
    pattern: str
    next_step: str = _QUANTIZE


# The first whose pattern is found in any tensor's name counts.
_KINDS = (
    Kind("PEFT's adapters", r"\.lora_(A|B|embedding_[AB])\b|\.base_layer\.", _MERGE),
    Kind("bitsandbytes", r"\.(absmax|quant_map|quant_state\.\S+|SCB|weight_format)$"),
    Kind("HQQ", r"\.W_q$"),
    Kind("quanto", r"\.weight\._(data|scale|shift)$"),
    Kind("torchao", r"\._?weight_qdata$|_weight_(scale|zero_point)$|:tensor_impl"),
    Kind("GPTQ", r"\.g_idx$"),
    Kind("GPTQ or AWQ", r"\.(qweight|qzeros)$"),
    Kind(
        "compressed-tensors",
        r"\.(weight_packed|weight_shape|weight_global_scale|input_global_scale)$",
    ),
    Kind("ModelOpt", r"\.(weight_scale_2|[kv]_bmm_quantizer\.\S+)$"),
    Kind("FP8", r"\.weight_scale_inv$"),
)
_MODELOPT_CONFIG = "hf_quant_config.json"  # beside config.json, read by mlx-lm
_UNSTACKED = Kind("one tensor per expert", r"\.experts\.\d+\.", _STACK)
_EXPERT_AXES = 3  # of a matrix for each expert
_PACKED = ("U8", "I8", "I32", "F4", "F6_E2M3", "F6_E3M2")  # what tools pack in
# What configs call their method, and users the tool; what is not here is none.
_METHODS = {
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "FP8",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "quanto": "quanto",
    "torchao": "torchao",
}


def check_packing(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that another tool than MLX has packed.

    Args:
        checkpoint: A target or a drafter.

    Raises:
        CheckpointError: Its weights are neither float nor packed by MLX; one line says
            by what tool, and what to do.
    """
    # What serves other input than text is not read, however it is packed.
    tensors = {n: t for n, t in checkpoint.tensors.items() if not is_input(n)}
    found = next(_found(tensors), None)
    if found is None:
        return
    kind, tensor = found
    name = kind.name
    if kind.next_step == _QUANTIZE:
        name = _named_method(checkpoint.config) or name
    raise CheckpointError(
        f"the weights in {cut(checkpoint.folder)} must be float or packed by "
        f"MLX: got {name} ({tensor[-80:]}). {kind.next_step}"
    )


def is_packed(checkpoint: Checkpoint) -> bool:
    """Tell whether MLX has packed a matrix of a checkpoint.

    Args:
        checkpoint: A target or a drafter that ``check_packing()`` took.
    """
    return any(name.endswith(".scales") for name in checkpoint.tensors)


def without_stale_keys(checkpoint: Checkpoint) -> dict[str, None] | None:
    """Return what mlx-lm must read instead of what a config says of float weights.

    Args:
        checkpoint: A target or a drafter.

    Returns:
        Keys and values to put over those of ``config.json``; None where it is right,
        or where the weights are not float.
    """
    said = [*_entries(checkpoint.config)]
    has_file = (checkpoint.folder / _MODELOPT_CONFIG).is_file()
    if is_packed(checkpoint) or not (has_file or any(e is not None for e in said)):
        return None
    try:
        check_packing(checkpoint)
    except CheckpointError:
        return None
    return {"quantization": None, "quantization_config": None}


def stored_formats(
    checkpoint: Checkpoint, names: Names, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Format]:
    """Return the formats of the matrices that MLX has packed.

    The map in ``config.json`` says the same where it is right, and has been seen wrong
    or incomplete in published checkpoints; so the tensors decide.

    Args:
        checkpoint: A target or a drafter.
        names: Where its tensors go.
        shapes: The shapes of the float model's parameters.

    Returns:
        Module path to format.

    Raises:
        CheckpointError: A matrix has scales and is not packed as MLX packs.
    """
    stored = {}
    for name, share in names.parameters.items():
        path = name.removesuffix(".scales")
        weight = names.parameters.get(f"{path}.weight")
        shape = shapes.get(f"{path}.weight")
        if path == name or weight is None or not shape:
            continue
        scales = checkpoint.tensors[share.tensor]
        packed = checkpoint.tensors[weight.tensor]
        found = None
        if scales.shape and packed.shape and packed.dtype == "U32":
            found = stored_format(
                shape[-1],
                num_words=packed.shape[-1],
                num_scales=scales.shape[-1],
                has_byte_scales=scales.dtype == "U8",
            )
        if f"{path}.global_scale" in names.parameters:
            found = _with_global_scale(found, checkpoint, path, shape)
        if found is None:
            raise CheckpointError(
                f"{weight.tensor[-80:]} in {cut(packed.file)} must be packed "
                f"by MLX: got {_type(packed)} with scales {_type(scales)}. Take "
                "config.json and weights from the same checkpoint."
            )
        stored[path] = found
    return stored


def _with_global_scale(
    found: Format | None, checkpoint: Checkpoint, path: str, shape: tuple[int, ...]
) -> Format | None:
    """Return the format with a scale for each expert, which experts only can have."""
    if found is not None and len(shape) != _EXPERT_AXES:
        raise CheckpointError(
            f"nvfp4 in {cut(checkpoint.folder)} must be without global_scale "
            f"but for experts, as mlx-lm reads it: got {path[-80:]}.global_scale. "
            f"{_QUANTIZE}"
        )
    return found if found is None else replace(found, has_global_scale=True)


def _found(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[Kind, str]]:
    """Yield what other tools have left and a tensor that shows it, the surest first."""
    for kind in _KINDS:
        pattern = re.compile(kind.pattern)
        yield from ((kind, name) for name in tensors if pattern.search(name))
    for name, tensor in tensors.items():
        if (what := _foreign_type(name, tensor.dtype)) is not None:
            yield Kind(what, ""), name
    pattern = re.compile(_UNSTACKED.pattern)
    yield from ((_UNSTACKED, name) for name in tensors if pattern.search(name))


def _foreign_type(name: str, dtype: str) -> str | None:
    """Return what a tensor's type says of the tool, None if it may be MLX's."""
    if dtype.startswith("F8_"):
        return f"FP8 weights of type {dtype}"
    if name.endswith((".weight_scale", ".weight_zero_point")):
        return "weights with scales of their own"
    is_float = dtype in FLOAT_DTYPES.values()
    # What MLX packs is U32; a type that no tool packs in is told where it is read.
    if is_float or dtype not in _PACKED or not name.endswith((".weight", "_proj")):
        return None
    return f"weights of type {dtype}"


def _named_method(config: Mapping[str, Any]) -> str | None:
    """Return the tool that a config names, None if it names none that is known."""
    for found in _entries(config):
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        if isinstance(method, str) and method.lower() in _METHODS:
            return _METHODS[method.lower()]
    return None


def _entries(config: Mapping[str, Any]) -> Iterator[Any]:
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "quantization", "compression_config"):
            yield place.get(key)


def _type(tensor: TensorInfo) -> str:
    return f"{tensor.dtype} {shorten(list(tensor.shape))}"
