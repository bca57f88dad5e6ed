"""The five families of Gemma 4, as they are published: the one table of their shapes.

Keys are those of ``config.json``. What every family has in common is no part of the
table: readers of a configuration fill it in. Knows no library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..constants import FULL, SLIDING

VOCAB_SIZE = 262144
HEAD_DIM = 256
GLOBAL_HEAD_DIM = 512
DRAFTER_LAYERS = (SLIDING, SLIDING, SLIDING, FULL)
NUM_CENTROIDS = 2048

# Settings that a drafter has from its target.
_SHARED = (
    "num_key_value_heads",
    "num_global_key_value_heads",
    "attention_k_eq_v",
    "sliding_window",
    "max_position_embeddings",
)
# What families have whose entry does not name them.
_OFF: dict[str, Any] = {
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "num_global_key_value_heads": None,
    "use_double_wide_mlp": False,
    "enable_moe_block": False,
    "num_experts": 0,
    "top_k_experts": 0,
    "moe_intermediate_size": 0,
}


@dataclass(frozen=True, eq=False)  # one object each: what is counted of it is kept
class Family:
    """A published pair: the keys in which it differs from the others.

    Attributes:
        size: As repository ids have it, such as "E2B".
        period: Layers up to and with each full one.
        target: Keys of the target's ``text_config``.
        drafter: Keys of the drafter's ``text_config`` that are not the target's.
        num_assistant_tokens: Drafts per round that the drafter names.
        acceptance: Probability that a draft is accepted if those before it were.
        is_unified: Whether it is of the unified kind.
        has_centroid_head: Whether the drafter has one.
    """

    size: str
    period: int
    target: Mapping[str, Any]
    drafter: Mapping[str, Any]
    num_assistant_tokens: int
    acceptance: float
    is_unified: bool = False
    has_centroid_head: bool = False

    @property
    def name(self) -> str:
        """The family's name in ``FAMILIES``."""
        return self.size.lower()

    @property
    def kind(self) -> str:
        """The target's published ``model_type``."""
        return "gemma4_unified" if self.is_unified else "gemma4"

    @property
    def target_id(self) -> str:
        """The target's repository on the Hub."""
        return f"google/gemma-4-{self.size}-it"

    @property
    def drafter_id(self) -> str:
        """The drafter's repository on the Hub."""
        return f"{self.target_id}-assistant"

    @cached_property
    def layer_types(self) -> tuple[str, ...]:
        """Of the target's layers."""
        return tuple(
            SLIDING if (i + 1) % self.period else FULL
            for i in range(self.target["num_hidden_layers"])
        )

    @cached_property
    def target_text(self) -> dict[str, Any]:
        """The keys of the target's ``text_config``, also those that are off."""
        return {**_OFF, **self.target, "layer_types": list(self.layer_types)}

    @cached_property
    def drafter_text(self) -> dict[str, Any]:
        """The keys of the drafter's ``text_config``, with those of its target."""
        return {
            **{key: self.target[key] for key in _SHARED if key in self.target},
            **self.drafter,
            "num_hidden_layers": len(DRAFTER_LAYERS),
            "num_kv_shared_layers": len(DRAFTER_LAYERS),
            "layer_types": list(DRAFTER_LAYERS),
        }


# Keys: the config.json files of google/gemma-4-<size>-it and its -assistant.
# Acceptance on prose; published as accepted / drafted, here the chance per draft that
# gives it. 31B: 0.656 at 3 drafts (mlxcel, M3 Ultra), so 0.80. 12B: 0.49 to 0.54 at 3
# drafts (mlxcel), so 0.70. 26B-A4B: 0.71, 0.61, 0.51 at 1, 2, 3 drafts (oMLX #1909), so
# 0.71. E2B and E4B: no figure states chip, drafts and text; between 0.35 on generic
# prompts (gemma-4-swift-mlx) and 0.66 in code (a user of mlx-vlm) 0.60 is assumed.
_FAMILIES = (
    Family(
        size="E2B",
        period=5,
        target={
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "num_hidden_layers": 35,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 20,
            "hidden_size_per_layer_input": 256,
            "attention_k_eq_v": False,
            "sliding_window": 512,
            "max_position_embeddings": 131072,
            "use_double_wide_mlp": True,
        },
        drafter={
            "hidden_size": 256,
            "intermediate_size": 2048,
            "num_attention_heads": 4,
        },
        num_assistant_tokens=2,
        acceptance=0.60,
        has_centroid_head=True,
    ),
    Family(
        size="E4B",
        period=6,
        target={
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 42,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 18,
            "hidden_size_per_layer_input": 256,
            "attention_k_eq_v": False,
            "sliding_window": 512,
            "max_position_embeddings": 131072,
        },
        drafter={
            "hidden_size": 256,
            "intermediate_size": 2048,
            "num_attention_heads": 4,
        },
        num_assistant_tokens=4,
        acceptance=0.60,
        has_centroid_head=True,
    ),
    Family(
        size="12B",
        period=6,
        target={
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": 1024,
            "max_position_embeddings": 262144,
        },
        drafter={
            "hidden_size": 1024,
            "intermediate_size": 8192,
            "num_attention_heads": 16,
        },
        num_assistant_tokens=4,
        acceptance=0.70,
        is_unified=True,
    ),
    Family(
        size="26B-A4B",
        period=6,
        target={
            "hidden_size": 2816,
            "intermediate_size": 2112,
            "num_hidden_layers": 30,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "sliding_window": 1024,
            "max_position_embeddings": 262144,
            "enable_moe_block": True,
            "num_experts": 128,
            "top_k_experts": 8,
            "moe_intermediate_size": 704,
        },
        drafter={
            "hidden_size": 1024,
            "intermediate_size": 8192,
            "num_attention_heads": 16,
        },
        num_assistant_tokens=4,
        acceptance=0.71,
    ),
    Family(
        size="31B",
        period=6,
        target={
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 60,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "num_global_key_value_heads": 4,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "sliding_window": 1024,
            "max_position_embeddings": 262144,
        },
        drafter={
            "hidden_size": 1024,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
        },
        num_assistant_tokens=4,
        acceptance=0.80,
    ),
)
FAMILIES = {family.name: family for family in _FAMILIES}
PUBLISHED_TARGETS = tuple(family.target_id for family in _FAMILIES)
PUBLISHED_DRAFTERS = tuple(family.drafter_id for family in _FAMILIES)


def family_of(text_config: Mapping[str, Any]) -> str | None:
    """Tell the family from the numbers of a target's text model, None if it is none.

    Args:
        text_config: Its configuration, by the names that the checkpoint uses.
    """
    for family in _FAMILIES:
        own = family.target_text
        is_mixture = bool(text_config.get("enable_moe_block"))
        if is_mixture == own["enable_moe_block"] and all(
            text_config.get(name) == own[name]
            for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
        ):
            return family.name
    return None


def published_drafter(hidden_size: int) -> str | None:
    """Return the published drafter of the target with this hidden size, if any.

    Args:
        hidden_size: The target's H.
    """
    for family in _FAMILIES:
        if hidden_size == family.target["hidden_size"]:
            return family.drafter_id
    return None
