"""How a checkpoint's matrices are packed: by MLX, and how, or by another tool.

The tensors tell, never a key of the config alone: configs name a regime that float
weights were trained in, keep a key from before, and lose one. The method that a config
names only says which of the tools it was. Reads headers; knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ..errors import CheckpointError, cut, shorten
from ..models.tensor_names import TOKEN_ORDERING, Names, is_input
from .checkpoint import FLOAT_DTYPES, MERGE, SAME_CHECKPOINT, Checkpoint, TensorInfo
from .quantization import Format, stored_format

_QUANTIZE = (
    "Take the float checkpoint of this model, which mlx_gemma_mtp.convert quantizes, "
    "or one in MLX's format (mlx-community)."
)
_FUSE = "Fuse them into their model with mlx_lm.fuse."
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
    Kind("PEFT's adapters", r"\.lora_(A|B|embedding_[AB])\b|\.base_layer\.", MERGE),
    Kind("PEFT's adapters", r"\.(hada_w|hada_t|lokr_|ia3_l|oft_|boft_|vera_)", MERGE),
    Kind("mlx-lm's adapters", r"\.lora_(a|b)$", _FUSE),
    Kind("bitsandbytes", r"\.(absmax|quant_map|quant_state\.\S+|SCB|weight_format)$"),
    Kind("HQQ", r"\.W_q$"),
    Kind("quanto", r"\.weight\._(data|scale|shift)$"),
    Kind("torchao", r"\._?weight_qdata$|_weight_(scale|zero_point)$|:tensor_impl"),
    Kind("AQLM", r"\.codebooks$"),
    Kind("EETQ", r"\.weight_scales$"),
    Kind("ExLlamaV2", r"\.q_weight$"),
    Kind("ExLlamaV3", r"\.trellis$"),
    Kind("FP-Quant", r"_hadamard_matrix$"),
    Kind("HIGGS", r"\.tables2$"),
    Kind("MXFP4 of OpenAI's", r"_blocks$"),
    Kind("QuIP#", r"\.Qidxs$"),
    Kind("SpQR", r"\.dense_weights$"),
    Kind("VPTQ", r"\.indices$"),
    Kind("GPTQ", r"\.g_idx$"),
    Kind("GPTQ or AWQ", r"\.(qweight|qzeros)$"),
    Kind(
        "compressed-tensors",
        r"\.(weight_packed|weight_shape|weight_global_scale|input_global_scale)$",
    ),
    Kind("ModelOpt", r"\.(weight_scale_2|pre_quant_scale|\w+_quantizer\.\S+)$"),
    Kind("FP8", r"\.weight_scale_inv$"),
)
_MODELOPT_CONFIG = "hf_quant_config.json"  # beside config.json, read by mlx-lm
_UNSTACKED = Kind("one tensor per expert", r"\.experts\.\d+\.", _STACK)
_EXPERT_AXES = 3  # of a matrix for each expert
# What MLX reads as weights that are not packed.
_FLOAT = tuple(FLOAT_DTYPES.values())
_INTEGERS = ("I32", "I64")
# What configs call their method, and users the tool, where these differ.
_METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
    "fbgemm_fp8": "FP8",
    "fp8": "FP8",
    "fp_quant": "FP-Quant",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "quanto": "quanto",
    "quip": "QuIP#",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
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
    if found is not None:
        _fail(checkpoint, *found)


def next_step(checkpoint: Checkpoint) -> str:
    """Return what to do where tensors are not those that a config describes.

    Args:
        checkpoint: A target or a drafter.
    """
    method = _named_method(checkpoint.config)
    if method is None:
        return SAME_CHECKPOINT
    take = f"{_QUANTIZE[0].lower()}{_QUANTIZE[1:]}"
    return f"config.json names {method}: if that packed the weights, {take}"


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

    Args:
        checkpoint: A target or a drafter.
        names: Where its tensors go.
        shapes: The shapes of the float model's parameters.

    Returns:
        Module path to format.

    Raises:
        CheckpointError: A matrix has scales and is not packed as MLX packs, or a
            tensor is of a type that its parameter cannot have.
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
                f"by MLX: got {_type(packed)} with scales {_type(scales)}. "
                f"{next_step(checkpoint)}"
            )
        stored[path] = found
    _check_types(checkpoint, names, shapes, stored)
    return stored


def _check_types(
    checkpoint: Checkpoint,
    names: Names,
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Format],
) -> None:
    """Refuse what would be read in silence, such as integers for floats."""
    for name, share in names.parameters.items():
        path, _, part = name.rpartition(".")
        dtype = checkpoint.tensors[share.tensor].dtype
        if name not in shapes and path not in stored:
            continue  # no parameter, which is told where it is read
        if name == TOKEN_ORDERING:
            if dtype not in _INTEGERS:
                raise CheckpointError(
                    f"{cut(share.tensor)} in {cut(checkpoint.folder)} must be "
                    f"{' or '.join(_INTEGERS)}: got {dtype}. {SAME_CHECKPOINT}"
                )
        elif dtype not in _allowed(part, stored.get(path)):
            _fail(checkpoint, Kind(f"weights of type {dtype}", ""), share.tensor)


def _allowed(part: str, packed: Format | None) -> tuple[str, ...]:
    """The types that a part of a matrix may have."""
    if packed is not None and part == "weight":
        return ("U32",)
    if packed is not None and part == "scales" and not packed.has_biases:
        return ("U8",)
    return _FLOAT


def _fail(checkpoint: Checkpoint, kind: Kind, tensor: str) -> NoReturn:
    name, method = kind.name, _named_method(checkpoint.config)
    if kind.next_step == _QUANTIZE and method is not None:
        name = f"{method}, {name}" if name.startswith("weights") else method
    raise CheckpointError(
        f"the weights in {cut(checkpoint.folder)} must be float or packed by "
        f"MLX: got {name} ({tensor[-80:]}). {kind.next_step}"
    )


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
    is_scaled = name.endswith((".weight_scale", ".weight_zero_point"))
    return "weights with scales of their own" if is_scaled else None


def _named_method(config: Mapping[str, Any]) -> str | None:
    """Return the tool that a config names, None if it names none."""
    for found in _entries(config):
        method = found
        if isinstance(found, Mapping):
            method = found.get("quant_method")
        elif not isinstance(found, str) or found.lower() not in _METHODS:
            continue  # such as q4_0, a regime of training
        if isinstance(method, str) and method:
            return _METHODS.get(method.lower(), method[:40])
    return None


def _entries(config: Mapping[str, Any]) -> Iterator[Any]:
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "quantization", "compression_config"):
            yield place.get(key)


def _type(tensor: TensorInfo) -> str:
    return f"{tensor.dtype} {shorten(list(tensor.shape))}"
