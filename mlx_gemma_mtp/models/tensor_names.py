"""Which parameter of the model each tensor of a checkpoint becomes: one table.

A tensor becomes one parameter, or two where transformers fuses what mlx-lm keeps apart,
or none where text has no use for it. Loader and converter read names here alone. Knows
nothing of files, of arrays or of models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, cut

# What programs put in front of a model's names, in any order and number: transformers
# and mlx-lm the models around it, others what they wrapped it in.
_WRAPPERS = re.compile(r"(?:(?:module|base_model|model|language_model|text_model)\.)*")
# And in front of any part's.
_PART_WRAPPERS = re.compile(
    r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Parts of multimodal checkpoints. mlx-lm drops most of them by itself, which ones
# depends on its version.
_TOWERS = (
    "vision_tower.",
    "vision_embedder.",
    "audio_tower.",
    "embed_vision.",
    "embed_audio.",
    "multi_modal_projector.",
)
_KV_PARTS = re.compile(r"layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")
_ACTIVATIONS = re.compile(
    r"\.(?:(?:input|output)_(?:min|max|scale)|(?:[qkv]|prob|prob_output)_scale)$"
)
_HEAD = "lm_head."
TOKEN_ORDERING = "masked_embedding.token_ordering"
# What a drafter has beside its layers.
_BESIDE_LAYERS = (_HEAD, "masked_embedding.", "pre_projection.", "post_projection.")

_TIED_HEAD = "a copy of the tied token embedding"
_ROPE_TABLE = "a table that is computed"
_INPUTS = "image and audio input, which text does not use"


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

    Raises:
        CheckpointError: Two tensors are the same parameter.
    """
    prefix = "" if is_text_only else "language_model."
    first_shared = text["num_hidden_layers"] - text["num_kv_shared_layers"]

    def unused(tensor: str) -> str | None:
        return unused_in_target(
            tensor,
            first_shared_layer=first_shared,
            is_tied=text["tie_word_embeddings"],
        )

    return _names(tensors, unused, lambda tensor: _target_shares(tensor, prefix))


def drafter_names(tensors: Iterable[str]) -> Names:
    """Map a drafter's tensors to its parameters.

    Args:
        tensors: The tensors' names.

    Raises:
        CheckpointError: Two tensors are the same parameter.
    """

    def shares(tensor: str) -> dict[str, Share]:
        bare = _bare(tensor)
        name = bare if bare.startswith(_BESIDE_LAYERS) else f"model.{bare}"
        return {name: Share(tensor)}

    return _names(tensors, unused_in_drafter, shares)


def head_copies(tensors: Iterable[str]) -> dict[str, str]:
    """Return the parts of a head and those of the embedding that they may repeat.

    Args:
        tensors: The names of a drafter's tensors.

    Returns:
        Tensor of the head to that of the embedding, ``""`` where there is none.
    """
    bare = {_bare(tensor): tensor for tensor in tensors}
    return {
        tensor: bare.get(name.replace(_HEAD, "embed_tokens.", 1), "")
        for name, tensor in bare.items()
        if name.startswith(_HEAD)
    }


def tensor_name(parameter: str, like: Iterable[str]) -> str:
    """Return the name a parameter would have in a checkpoint, for messages.

    Args:
        parameter: A parameter of a target in mlx-lm's names.
        like: Tensors that are in the checkpoint, whose manner of naming counts.
    """
    if any(name.startswith("model.language_model.") for name in like):
        return parameter.replace("language_model.model.", "model.language_model.", 1)
    return parameter


def unused_in_target(
    name: str, *, first_shared_layer: int, is_tied: bool
) -> str | None:
    """Return why text does not use a target's tensor, None if it does.

    Args:
        name: The tensor's name, whoever wrote it.
        first_shared_layer: Layers from this one on use other layers' K/V.
        is_tied: Whether the head is the token embedding.
    """
    bare = _bare(name)
    if is_input(name):
        return _INPUTS
    if is_tied and bare.startswith(_HEAD):
        return _TIED_HEAD
    match = _KV_PARTS.match(bare)
    if match and _is_from(match[1], first_shared_layer):
        # Some exports keep projections that these layers never use.
        return "K/V projections of layers that use other layers' K/V"
    return _unused_anywhere(bare)


def unused_in_drafter(name: str) -> str | None:
    """Return why a drafter's tensor is not used, None if it is.

    Args:
        name: The tensor's name.
    """
    bare = _bare(name)
    return _TIED_HEAD if bare.startswith(_HEAD) else _unused_anywhere(bare)


def is_input(name: str) -> bool:
    """Tell whether a tensor serves image and audio input only.

    Args:
        name: The tensor's name, whoever wrote it.
    """
    return _bare(name).startswith(_TOWERS)


def _unused_anywhere(bare: str) -> str | None:
    if _ACTIVATIONS.search(bare):
        return "ranges or scales of activations, which nothing here quantizes"
    return _ROPE_TABLE if "rotary_emb" in bare else None


def _bare(name: str) -> str:
    """A name without what programs put around the model and its parts."""
    name = _PART_WRAPPERS.sub("", name)
    match = _WRAPPERS.match(name)
    return name[match.end() :] if match else name


def _names(
    tensors: Iterable[str],
    unused: Callable[[str], str | None],
    shares: Callable[[str], dict[str, Share]],
) -> Names:
    names = Names({}, {})
    for tensor in tensors:
        reason = unused(tensor)
        if reason is not None:
            names.unused[tensor] = reason
            continue
        for parameter, share in shares(tensor).items():
            if other := names.parameters.get(parameter):
                raise CheckpointError(
                    f"{cut(tensor)} must be the only tensor of its parameter: got "
                    f"{cut(other.tensor)} beside it. Delete the one that is left over "
                    "from another save."
                )
            names.parameters[parameter] = share
    return names


def _target_shares(tensor: str, prefix: str) -> dict[str, Share]:
    bare = _bare(tensor)
    name = f"{prefix}{bare}" if bare.startswith(_HEAD) else f"{prefix}model.{bare}"
    base, _, last = name.rpartition(".")
    if base.endswith(".experts") and last == "gate_up_proj":
        return {
            f"{base}.switch_glu.gate_proj.weight": Share(tensor, 0, 2),
            f"{base}.switch_glu.up_proj.weight": Share(tensor, 1, 2),
        }
    if base.endswith(".experts") and last == "down_proj":
        return {f"{base}.switch_glu.down_proj.weight": Share(tensor)}
    return {name: Share(tensor)}


def _is_from(digits: str, layer: int) -> bool:
    # Not int(): a damaged header can name a layer with thousands of digits.
    return len(digits) > 9 or int(digits) >= layer
