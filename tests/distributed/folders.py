"""Folders of pairs whose weights are random: for ranks that load what was quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4_text

from convert.pipeline import convert, plan_conversion
from convert.progress import silent
from convert.request import PartRequest, Request
from mlx_gemma_mtp.checkpoints.quantization import Format
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.models.drafter_config import DrafterConfig
from mlx_gemma_mtp.models.families import FAMILIES
from mlx_gemma_mtp.models.published import text_config as published_text
from mlx_gemma_mtp.models.text_config import text_config
from mlx_gemma_mtp.selftest.random_pair import random_pair
from tests.tiny import model_folder

# Widths of two and of four parts, of whole groups of 64, some of uneven numbers.
_HEADS = {"hidden_size": 128, "head_dim": 32, "global_head_dim": 64}
_TARGET = {**_HEADS, "intermediate_size": 320}
_EXPERTS = {"moe_intermediate_size": 320, "num_experts": 4, "top_k_experts": 2}
_DRAFTER = {**_HEADS, "intermediate_size": 128}


def converted(folder: Path, family: str, bits: int, group_size: int) -> Path:
    """A pair of two layers in a family's manner, as the converter quantizes it.

    Args:
        folder: Where it and what it is made of go.
        family: One of ``FAMILIES``.
        bits: Of a weight.
        group_size: Weights with one scale.

    Returns:
        Its folder, in which the drafter's stands.
    """
    source, place = folder / "source", folder / "converted"
    model_folder(source, family)
    _fill(source, has_experts=bool(FAMILIES[family].target_text["num_experts"]))
    part = PartRequest(format=Format(bits, group_size))
    request = Request(source, place, target=part, drafter=part, has_check=False)
    convert(plan_conversion(request), progress=silent)
    return place


def published(
    folder: Path, family: str, *, num_layers: int, vocab_size: int | None, bits: int
) -> Path:
    """A pair of a family's published widths and of fewer layers, in groups of 64.

    Args:
        folder: Where it goes.
        family: One of ``FAMILIES``.
        num_layers: Of the target.
        vocab_size: Tokens to keep; None for all.
        bits: Of a weight. Scales and activations are float32.

    Returns:
        The folder, in which the drafter's stands.
    """
    found = FAMILIES[family]
    cut: dict[str, Any] = {"num_layers": num_layers, "vocab_size": vocab_size}
    pair = random_pair(family, **cut, bits=bits, dtype=mx.float32)
    text = published_text(family, **cut)
    target = {"model_type": "gemma4_text", **text}
    drafter = {
        "model_type": f"{found.kind}_assistant",
        "backbone_hidden_size": found.target["hidden_size"],
        "use_ordered_embeddings": found.has_centroid_head,
        "text_config": {**found.drafter_text, "vocab_size": text["vocab_size"]},
    }
    assert pair.drafter is not None
    parts: list[tuple[Path, dict[str, Any], nn.Module]] = [
        (folder, target, pair.target),
        (folder / "drafter", drafter, pair.drafter),
    ]
    for place, config, module in parts:
        place.mkdir(parents=True)
        packed = {"bits": bits, "group_size": 64, **_formats(module)}
        config |= {"dtype": "float32", "quantization": packed}
        (place / "config.json").write_text(json.dumps(config))
        weights: Any = dict(tree_flatten(module.parameters()))
        file = str(place / "model.safetensors")
        mx.save_safetensors(file, weights, metadata={"format": "mlx"})
    return folder


def _formats(model: Any) -> dict[str, Any]:
    """What each matrix is packed in, as config.json names it; False for none."""
    return {
        path: {"bits": module.bits, "group_size": module.group_size}
        if "bits" in vars(module)
        else False
        for path, module in model.named_modules()
        if "bits" in vars(module) or isinstance(module, nn.Linear | nn.Embedding)
    }


def _fill(folder: Path, *, has_experts: bool) -> None:
    """Give a folder of a pair other widths, two layers, and random weights."""
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text |= _TARGET | (_EXPERTS if has_experts else {})
    text |= {"layer_types": text["layer_types"][-2:], "num_hidden_layers": 2}
    read = text_config(config, source="a test")
    target = gemma4_text.Model(gemma4_text.ModelArgs.from_dict(read))
    _save(folder, config, target, "model.language_model.")
    config = json.loads((folder / "drafter" / "config.json").read_text())
    config["backbone_hidden_size"] = _TARGET["hidden_size"]
    config["text_config"] |= _DRAFTER
    _save(
        folder / "drafter", config, Drafter(DrafterConfig.from_dict(config)), "model."
    )


def _save(folder: Path, config: Any, model: nn.Module, prefix: str) -> None:
    """Write a part of a pair in the published layout."""
    mx.random.seed(0)
    leaves: Any = tree_flatten(model.parameters())
    found = {
        name.replace("model.", prefix, 1): mx.ones(like.shape)
        if like.ndim < 2
        else mx.random.normal(like.shape, scale=like.shape[-1] ** -0.5)
        for name, like in leaves
    }
    for name in [name for name in found if "switch_glu.gate_proj" in name]:
        base = name.partition("switch_glu.")[0]
        gate, up, down = (
            found.pop(f"{base}switch_glu.{part}_proj.weight")
            for part in ("gate", "up", "down")
        )
        found[f"{base}gate_up_proj"] = mx.concatenate([gate, up], axis=1)
        found[f"{base}down_proj"] = down
    (folder / "config.json").write_text(json.dumps(config))
    file = str(folder / "model.safetensors")
    mx.save_safetensors(file, found, metadata={"format": "pt"})
