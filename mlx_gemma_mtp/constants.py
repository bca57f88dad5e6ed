"""Names and bounds that several packages agree on."""

from __future__ import annotations

SLIDING = "sliding_attention"
FULL = "full_attention"
LAYER_TYPES = (SLIDING, FULL)
MAX_DRAFT_TOKENS = 8  # of a round
TARGET_MODEL_TYPES = ("gemma4", "gemma4_unified", "gemma4_text", "gemma4_unified_text")
DRAFTER_MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
AUTO = "auto"  # of K: the controller's choice; of exactness: what was proved
DRAFTER = "drafter"  # where drafts come from
LOOKUP = "lookup"  # from the text itself
FORM = "form"  # forced tokens in place of either
MIXED = "mixed"  # of a batch's round: from either, row by row
DRAFT_SOURCES = (AUTO, DRAFTER, LOOKUP)
MODES = (AUTO, "exact", "fast")
MAX_INTEGER = 2**31 - 1  # that C's int can count, as some libraries below do
MAX_LOGPROBS = 64  # most tokens listed beside the chosen one
# Of the folder that prompts are kept in.
PROMPT_FOLDER_BYTES = 20 * 10**9
LAST_WRITES_S = 10.0  # how long the end waits for caches to be written
ALL_DRAFTS = tuple(range(MAX_DRAFT_TOKENS + 1))
