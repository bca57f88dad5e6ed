"""Names and bounds that several packages agree on."""

from __future__ import annotations

SLIDING = "sliding_attention"
FULL = "full_attention"
LAYER_TYPES = (SLIDING, FULL)
MAX_DRAFT_TOKENS = 8  # of a round
TARGET_MODEL_TYPES = ("gemma4", "gemma4_unified", "gemma4_text", "gemma4_unified_text")
DRAFTER_MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
PUBLISHED_TARGETS = (
    "google/gemma-4-E2B-it",
    "google/gemma-4-E4B-it",
    "google/gemma-4-12B-it",
    "google/gemma-4-26B-A4B-it",
    "google/gemma-4-31B-it",
)
PUBLISHED_DRAFTERS = tuple(f"{target}-assistant" for target in PUBLISHED_TARGETS)
AUTO = "auto"  # of K: the controller's choice; of exactness: what was proved
MODES = (AUTO, "exact", "fast")
ALL_DRAFTS = tuple(range(MAX_DRAFT_TOKENS + 1))
