"""The ``config.json`` of what is written.

As ``mlx_lm.convert`` writes it, with one thing more: every setting that mlx-lm reads is
written out in the published layout. mlx-lm does not know the layout that newer
transformers save, and takes another model's defaults for what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_gemma_mtp.checkpoints.quantization import Format

# What mlx_lm.convert leaves out, too; and the layout that mlx-lm does not know.
_DROPPED = (
    "_name_or_path",
    "vision_config",
    "quantization",
    "quantization_config",
    "compression_config",
    "per_layer_config",
    # Code of the checkpoint: some loaders would run it, and nothing here needs it.
    "model_file",
    "auto_map",
)


def output_config(
    config: Mapping[str, Any],
    text: Mapping[str, Any],
    *,
    formats: Mapping[str, Format],
    base: Format | None,
    dtype: str | None,
) -> dict[str, Any]:
    """Return a converted part's ``config.json``.

    Args:
        config: The checkpoint's own.
        text: The text model's settings, as from ``config.text_config()``.
        formats: Module path to format, of quantized modules.
        base: The format of most of them.
        dtype: The type that was asked for, None for the checkpoint's own.
    """
    changed = {key: value for key, value in config.items() if key not in _DROPPED}
    changed["vocab_size"] = text["vocab_size"]
    if "tie_word_embeddings" in changed:
        changed["tie_word_embeddings"] = text["tie_word_embeddings"]
    raw = config.get("text_config")
    if isinstance(raw, Mapping):
        changed["text_config"] = {
            **{key: value for key, value in raw.items() if key not in _DROPPED},
            **text,
            "model_type": raw.get("model_type", text["model_type"]),
        }
    else:  # the text model alone, which mlx-lm knows by this name only
        changed.pop("text_config", None)
        changed.update(text)
    if dtype is not None:
        _name_dtype(changed, dtype)
        _name_dtype(changed.get("text_config", {}), dtype)
    if formats and base is not None:
        others = {path: f.as_config() for path, f in formats.items() if f != base}
        changed["quantization"] = {**base.as_config(), **others}
        changed["quantization_config"] = changed["quantization"]
    return changed


def _name_dtype(config: dict[str, Any], dtype: str) -> None:
    """Name another type wherever one is named."""
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = dtype
