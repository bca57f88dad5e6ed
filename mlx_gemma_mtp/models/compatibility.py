"""Whether a drafter fits a target: what both must agree on, compared.

Knows nothing of files or of decoding.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.nn as nn
from mlx_lm.models import gemma4_text

from ..constants import FULL, SLIDING
from ..errors import PairingError
from .drafter import Drafter
from .drafter_config import DrafterConfig
from .families import published_drafter
from .target import text_model


def check_fit(target_model: nn.Module, drafter: Drafter) -> None:
    """Check that a drafter can read a target's hidden states and K/V.

    Args:
        target_model: A target as from ``load_target()`` or ``mlx_lm.load()``.
        drafter: The drafter.

    Raises:
        PairingError: It cannot: what differs, and which drafter to take.
    """
    args = text_model(target_model).args
    for what, theirs, ours in _shared_settings(args, drafter.config):
        if theirs != ours:
            raise PairingError(_misfit(what, theirs, ours, args.hidden_size))


def _shared_settings(
    target: gemma4_text.ModelArgs, config: DrafterConfig
) -> Iterator[tuple[str, object, object]]:
    """Yield (what, the target's, the drafter's) of all that must be equal."""
    own = gemma4_text.ModelArgs.from_dict(dict(config.text_config))
    yield "hidden size", target.hidden_size, config.backbone_hidden_size
    yield "vocabulary", target.vocab_size, own.vocab_size
    num_own_kv = target.num_hidden_layers - target.num_kv_shared_layers
    layers_with_kv = (target.layer_types or [])[:num_own_kv]
    layer_types = set(own.layer_types or [])
    for layer_type in sorted(layer_types):
        if layer_type not in layers_with_kv:
            yield f"K/V source for {layer_type}", "none", "one"
        theirs, ours = _kv_shape(target, layer_type), _kv_shape(own, layer_type)
        yield f"number of K/V heads in {layer_type}", theirs[0], ours[0]
        yield f"head width in {layer_type}", theirs[1], ours[1]
    if SLIDING in layer_types:
        yield "sliding window", target.sliding_window, own.sliding_window


def _kv_shape(args: gemma4_text.ModelArgs, layer_type: str) -> tuple[int, int]:
    """Return (K/V heads G, head width D) of a layer type."""
    if layer_type != FULL:
        return args.num_key_value_heads, args.head_dim
    heads = args.num_key_value_heads
    if args.attention_k_eq_v and args.num_global_key_value_heads is not None:
        heads = args.num_global_key_value_heads
    return heads, args.global_head_dim or args.head_dim


def _misfit(what: str, theirs: object, ours: object, hidden_size: int) -> str:
    # Every published width is one model's: a drafter of the right width that does not
    # fit may be the published one itself.
    published = published_drafter(hidden_size) if what == "hidden size" else None
    take = f"Take {published}" if published else "Take the drafter made for this target"
    return (
        f"the drafter's {what} must be the target's: got {ours} in the drafter, "
        f"expected {theirs} as in the target. {take}."
    )
