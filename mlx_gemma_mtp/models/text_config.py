"""Settings of a checkpoint's text model, which targets and drafters both have.

A Gemma 4 ``config.json`` comes in two layouts: the published one
(``global_head_dim``, ``num_global_key_value_heads``) and the one that recent
transformers writes when it saves a checkpoint again (``per_layer_config``).
``text_config`` reads both into the one dictionary that mlx-lm's
``gemma4_text.ModelArgs`` takes. Knows nothing of files or of MLX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..constants import DRAFTER_MODEL_TYPES, TARGET_MODEL_TYPES
from ..errors import CheckpointError, cut, shorten
from .config_keys import DAMAGED, UNSUPPORTED, KeyReader, either
from .families import PUBLISHED_DRAFTERS, PUBLISHED_TARGETS

_TEXT_ONLY = ("gemma4_text", "gemma4_unified_text")
UNIFIED = ("gemma4_unified", "gemma4_unified_text", "gemma4_unified_assistant")
# Where Gemma4UnifiedTextConfig (12B) differs; it has no per-layer embeddings.
_UNIFIED_DEFAULTS = {
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
    "vocab_size_per_layer_input": 0,
    "hidden_size_per_layer_input": 0,
}
# A drafter has no per-layer embeddings either, whatever its family.
_DRAFTER_DEFAULTS = {
    "vocab_size_per_layer_input": 0,
    "hidden_size_per_layer_input": 0,
}


def check_model_type(
    config: Mapping[str, Any], expected: Sequence[str], *, source: str
) -> str:
    """Return the checkpoint's ``model_type`` if it is one of ``expected``.

    Args:
        config: A parsed ``config.json``.
        expected: ``TARGET_MODEL_TYPES``, ``DRAFTER_MODEL_TYPES`` or both.
        source: Where the config came from, for the message.

    Raises:
        CheckpointError: It is another one.
    """
    found = config.get("model_type")
    if isinstance(found, str) and found in expected:
        return found
    note = ""
    if found in DRAFTER_MODEL_TYPES:
        note = " (an MTP drafter, which goes with a target and is no model by itself)"
    elif found in TARGET_MODEL_TYPES:
        note = " (a Gemma 4 target, which is no drafter)"
    ids = PUBLISHED_TARGETS if set(expected) & {"gemma4"} else PUBLISHED_DRAFTERS
    raise CheckpointError(
        f"model_type in {cut(source)} must be {either(expected)}: got "
        f"{shorten(found, nothing='None')}{note}. Take one of {', '.join(ids)}."
    )


def text_config(config: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """Return the text model's settings as mlx-lm's ``gemma4_text`` takes them.

    Args:
        config: A target's or a drafter's parsed ``config.json``, either layout.
        source: Where the config came from, for messages.

    Returns:
        A new dictionary for ``gemma4_text.ModelArgs.from_dict``. It always has
        the same keys, so two layouts of one model give equal dictionaries.

    Raises:
        CheckpointError: A wrong ``model_type``, or a setting that is missing its
            sense or that Gemma 4 in mlx-lm does not have.
    """
    kind = check_model_type(
        config, TARGET_MODEL_TYPES + DRAFTER_MODEL_TYPES, source=source
    )
    raw = config if kind in _TEXT_ONLY else config.get("text_config")
    if not isinstance(raw, Mapping):
        raise CheckpointError(
            f"text_config in {cut(source)} must be an object: got "
            f"{shorten(raw)}, expected the text model's settings. {DAMAGED}"
        )
    reader = KeyReader(raw, _defaults(kind, config, raw), source)
    reader.refuse_unsupported()
    text = reader.scalars()
    text["model_type"] = "gemma4_text"
    text["layer_types"] = reader.layer_types(text["num_hidden_layers"])
    text["rope_parameters"] = reader.rope_parameters()
    text["tie_word_embeddings"] = _tied(config, raw)
    text.update(reader.full_layer_settings(text))
    if kind in DRAFTER_MODEL_TYPES and not text["num_kv_shared_layers"]:
        text["num_kv_shared_layers"] = text["num_hidden_layers"]
    _check_text(text, source)
    return text


def _defaults(
    kind: str, config: Mapping[str, Any], raw: Mapping[str, Any]
) -> dict[str, Any]:
    # Some conversions keep the vocabulary beside the text model's settings. Where
    # both have one, the text model's counts: the outer one can be a left-over.
    defaults: dict[str, Any] = {}
    if config.get("vocab_size") is not None:
        defaults["vocab_size"] = config["vocab_size"]
    if kind in UNIFIED or raw.get("model_type") in UNIFIED:
        defaults.update(_UNIFIED_DEFAULTS)
    if kind in DRAFTER_MODEL_TYPES:
        defaults.update(_DRAFTER_DEFAULTS)
    return defaults


def _tied(config: Mapping[str, Any], raw: Mapping[str, Any]) -> bool:
    # transformers ties by the outer config; the text model's copy of the key only
    # counts where there is no outer one.
    for place in (config, raw):
        if isinstance(place.get("tie_word_embeddings"), bool):
            return bool(place["tie_word_embeddings"])
    return True


def _check_text(text: dict[str, Any], source: str) -> None:
    """Check settings against each other."""
    reader = KeyReader({}, {}, source)
    num_layers, num_heads = text["num_hidden_layers"], text["num_attention_heads"]
    if text["num_kv_shared_layers"] > num_layers:
        reader.fail(
            "num_kv_shared_layers",
            f"at most num_hidden_layers ({num_layers})",
            text["num_kv_shared_layers"],
        )
    for key in ("num_key_value_heads", "num_global_key_value_heads"):
        if text[key] is not None and num_heads % text[key]:
            reader.fail(key, f"a divisor of the {num_heads} attention heads", text[key])
    if text["enable_moe_block"] and text["top_k_experts"] > text["num_experts"]:
        constraint = f"at most num_experts ({text['num_experts']})"
        reader.fail("top_k_experts", constraint, text["top_k_experts"])


def check_target(text: Mapping[str, Any], *, source: str) -> None:
    """Check what a target needs beyond a text model: its own K/V of each layer type.

    Args:
        text: Settings as from ``text_config()``.
        source: Where they came from, for messages.

    Raises:
        CheckpointError: A layer shares K/V that no layer makes.
    """
    num_own = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    own, shared = text["layer_types"][:num_own], text["layer_types"][num_own:]
    if not own or set(shared) - set(own):
        KeyReader({}, {}, source).fail(
            "num_kv_shared_layers",
            "small enough that every layer type has a layer with its own K/V",
            text["num_kv_shared_layers"],
            next_step=UNSUPPORTED,
        )
