"""Which tensors of a checkpoint text has no use for, and why.

The loader skips them and the converter leaves them out. Knows names only: nothing of
files, of arrays or of models.
"""

from __future__ import annotations

import re

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
_HEAD = re.compile(r"(language_model\.)?lm_head\.")

_TIED_HEAD = "a copy of the tied token embedding"
_ROPE_TABLE = "a table that is computed"


def unused_in_target(
    name: str, *, first_shared_layer: int, is_tied: bool
) -> str | None:
    """Return why text does not use a target's tensor, None if it does.

    Args:
        name: The tensor's name, as transformers or as mlx-lm writes it.
        first_shared_layer: Layers from this one on use other layers' K/V.
        is_tied: Whether the head is the token embedding.
    """
    bare = name.removeprefix("model.")
    if bare.startswith(_TOWERS):
        return "image and audio input, which text does not use"
    if is_tied and _HEAD.match(bare):
        return _TIED_HEAD
    match = _KV_PARTS.search(name)
    if match and _is_from(match[1], first_shared_layer):
        # Some exports keep projections that these layers never use.
        return "K/V projections of layers that use other layers' K/V"
    return _ROPE_TABLE if "rotary_emb" in name else None


def unused_in_drafter(name: str) -> str | None:
    """Return why a drafter's tensor is not used, None if it is.

    Args:
        name: The tensor's name.
    """
    if name.startswith("lm_head."):
        return _TIED_HEAD
    return _ROPE_TABLE if "rotary_emb" in name else None


def _is_from(digits: str, layer: int) -> bool:
    # Not int(): a damaged header can name a layer with thousands of digits.
    return len(digits) > 9 or int(digits) >= layer
