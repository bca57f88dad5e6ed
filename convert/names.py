"""Which parameter of the model each tensor of a checkpoint becomes.

transformers' names in, mlx-lm's names out; names that are mlx-lm's already stay. A
tensor becomes one parameter, or two where transformers fuses what mlx-lm keeps apart,
or none where text has no use for it. Knows names only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_gemma_mtp.tensor_names import unused_in_drafter, unused_in_target


@dataclass(frozen=True)
class Share:
    """The share of a checkpoint tensor that one parameter takes.

    Attributes:
        tensor: The tensor's name.
        index: Which of ``count`` equal shares of the second last axis, from 0.
        count: 1 for the whole tensor.
    """

    tensor: str
    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Names:
    """Where every tensor of a checkpoint goes.

    Attributes:
        parameters: Parameter name to its share of a tensor.
        unused: Tensor name to the reason why it is left out.
    """

    parameters: dict[str, Share]
    unused: dict[str, str]


def target_names(
    tensors: Iterable[str], text: Mapping[str, Any], *, is_text_only: bool
) -> Names:
    """Map a target's tensors to the parameters of mlx-lm's model.

    Args:
        tensors: The tensors' names.
        text: The target's settings, as from ``config.text_config()``.
        is_text_only: Whether the checkpoint holds the text model alone, whose
            parameters have no ``language_model.`` in front.
    """
    first_shared_layer = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    names = Names({}, {})
    for tensor in tensors:
        reason = unused_in_target(
            tensor,
            first_shared_layer=first_shared_layer,
            is_tied=text["tie_word_embeddings"],
        )
        if reason is None:
            names.parameters.update(_target_shares(tensor, is_text_only=is_text_only))
        else:
            names.unused[tensor] = reason
    return names


def drafter_names(tensors: Iterable[str]) -> Names:
    """Map a drafter's tensors to its parameters, which have the same names.

    Args:
        tensors: The tensors' names.
    """
    names = Names({}, {})
    for tensor in tensors:
        reason = unused_in_drafter(tensor)
        if reason is None:
            names.parameters[tensor] = Share(tensor)
        else:
            names.unused[tensor] = reason
    return names


def tensor_name(parameter: str, like: Iterable[str]) -> str:
    """Return the name a parameter would have in a checkpoint, for messages.

    Args:
        parameter: A parameter of a target in mlx-lm's names.
        like: Tensors that are in the checkpoint, whose manner of naming counts.
    """
    if any(name.startswith("model.language_model.") for name in like):
        return parameter.replace("language_model.model.", "model.language_model.", 1)
    return parameter


def _target_shares(tensor: str, *, is_text_only: bool) -> dict[str, Share]:
    name = tensor
    if not is_text_only and name == "lm_head.weight":
        name = f"language_model.{name}"  # a head of its own, as transformers names it
    if not is_text_only and name.startswith("model.language_model."):
        rest = name.removeprefix("model.language_model.")
        name = f"language_model.model.{rest}"
    base, _, last = name.rpartition(".")
    if base.endswith(".experts") and last == "gate_up_proj":
        return {
            f"{base}.switch_glu.gate_proj.weight": Share(tensor, 0, 2),
            f"{base}.switch_glu.up_proj.weight": Share(tensor, 1, 2),
        }
    if base.endswith(".experts") and last == "down_proj":
        return {f"{base}.switch_glu.down_proj.weight": Share(tensor)}
    return {name: Share(tensor)}
