"""Settings of a drafter's checkpoint, read and checked.

Knows nothing of files or of MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..constants import DRAFTER_MODEL_TYPES
from .config_keys import UNSUPPORTED, KeyReader
from .text_config import UNIFIED, check_model_type, text_config


@dataclass(frozen=True)
class DrafterConfig:
    """An MTP drafter's settings; the fields are the checkpoint's keys.

    Attributes:
        model_type: One of ``DRAFTER_MODEL_TYPES``.
        backbone_hidden_size: The target's hidden size H.
        use_ordered_embeddings: Whether the drafter has the centroid head. Configs
            without a centroid head list ``num_centroids`` too; only this tells.
        num_centroids: C, the token clusters of the centroid head.
        centroid_intermediate_top_k: How many clusters a step looks into, 1..C.
        text_config: Settings of its layers, as from ``text_config()``.
        num_assistant_tokens: Drafts per round that ``generation_config.json`` names,
            or None.
    """

    model_type: str
    backbone_hidden_size: int
    use_ordered_embeddings: bool
    num_centroids: int
    centroid_intermediate_top_k: int
    text_config: dict[str, Any]
    num_assistant_tokens: int | None = None

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], *, source: str = "config.json"
    ) -> DrafterConfig:
        """Read a drafter's parsed ``config.json``, either layout.

        Args:
            config: The parsed file.
            source: Where it came from, for messages.

        Raises:
            CheckpointError: No drafter, or one with settings no drafter can have.
        """
        kind = check_model_type(config, DRAFTER_MODEL_TYPES, source=source)
        text = text_config(config, source=source)
        hidden_size = 3840 if kind in UNIFIED else 1536
        reader = KeyReader(config, {}, source)
        drafter = cls(
            model_type=kind,
            backbone_hidden_size=reader.integer(
                "backbone_hidden_size", hidden_size, minimum=1
            ),
            use_ordered_embeddings=reader.flag("use_ordered_embeddings", False),
            num_centroids=reader.integer("num_centroids", 2048, minimum=1),
            centroid_intermediate_top_k=reader.integer(
                "centroid_intermediate_top_k", 32, minimum=1
            ),
            text_config=text,
        )
        _check_drafter(drafter, source)
        return drafter


def _check_drafter(drafter: DrafterConfig, source: str) -> None:
    """Check what every Gemma 4 drafter has in common."""
    text, reader = drafter.text_config, KeyReader({}, {}, source)
    expected = {
        "num_kv_shared_layers": text["num_hidden_layers"],
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "tie_word_embeddings": True,
    }
    for key, value in expected.items():
        if text[key] != value:
            constraint = f"{value} in a drafter"
            where = f"text_config.{key}"
            reader.fail(where, constraint, text[key], next_step=UNSUPPORTED)
    if not drafter.use_ordered_embeddings:
        return  # the centroid settings stand in the file but mean nothing
    if text["vocab_size"] % drafter.num_centroids:
        constraint = f"a divisor of the vocabulary ({text['vocab_size']})"
        reader.fail("num_centroids", constraint, drafter.num_centroids)
    if drafter.centroid_intermediate_top_k > drafter.num_centroids:
        reader.fail(
            "centroid_intermediate_top_k",
            f"at most num_centroids ({drafter.num_centroids})",
            drafter.centroid_intermediate_top_k,
        )
