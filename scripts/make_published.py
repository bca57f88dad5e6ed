"""List the tensors of the ten published Gemma 4 repositories, without their weights.

    python scripts/make_published.py --output tests/data/published

Needs torch and transformers 5.22.2; the package never imports this. Nothing is
downloaded: every model is built on the meta device from the table of families and the
settings below, and what `save_pretrained` would write of it becomes one
`<name>.json.gz` with these keys:

    repo               the repository's id
    notes              what of it is not documented and stands here by choice
    config             config.json in the published layout (`global_head_dim`)
    generation_config  generation_config.json
    tensors            [name, dtype, shape] of each tensor, in order of names

Before it writes anything, the script saves a tiny model of each class and compares
the names in that file with those it would list.
"""

import argparse
import gzip
import json
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion

from mlx_gemma_mtp.constants import FULL, SLIDING
from mlx_gemma_mtp.models.families import FAMILIES, NUM_CENTROIDS, VOCAB_SIZE, Family

# Its classes come by name, and which ones there are depends on its version.
classes: Any = transformers

DTYPES = {torch.bfloat16: "BF16", torch.int64: "I64"}
SHARED_KV = ("k_proj.weight", "v_proj.weight", "k_norm.weight")

# What all text models have in common, targets and drafters.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "head_dim": 256,
    "global_head_dim": 512,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        FULL: {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000000.0,
        },
    },
}
# The vision tower of the two small models is transformers' default, with clipping.
SMALL_VISION: dict[str, Any] = {"use_clipped_linears": True}
# Documented: 27 layers, 1152 wide. The rest is that of the vision encoder this width
# is known from, and gives the parameter counts that the Hub reports, to the last one.
LARGE_VISION: dict[str, Any] = {
    "num_hidden_layers": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "standardize": True,
}

NOTE_TOWERS = (
    "The towers are transformers' defaults where their settings are not documented; "
    "the totals are the published ones."
)
NOTE_CONTEXT = "max_position_embeddings: copies of this config differ; the class's own."
NOTE_DRAFTS = (
    "num_assistant_tokens is the recommended number of drafts; "
    "the published value is not known."
)
NOTE_SHARED_KV = (
    "Holds k_proj, v_proj and k_norm of the KV-shared layers: the published totals "
    "include them, though transformers itself neither makes nor saves them."
)


@dataclass(frozen=True)
class Others:
    """What of a family the table of shapes does not have.

    Attributes:
        vision: Settings of the vision tower.
        notes: What is not documented.
    """

    vision: dict[str, Any]
    notes: tuple[str, ...] = (NOTE_TOWERS,)


OTHERS = {
    "e2b": Others(SMALL_VISION, (NOTE_TOWERS, NOTE_SHARED_KV)),
    "e4b": Others(SMALL_VISION, (NOTE_TOWERS, NOTE_SHARED_KV)),
    "12b": Others({}, (NOTE_TOWERS, NOTE_CONTEXT)),
    "26b-a4b": Others(LARGE_VISION),
    "31b": Others(LARGE_VISION),
}

# Small enough to save, with every kind of tensor that the real one has.
TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "head_dim": 8,
    "global_head_dim": 16,
}
TINY_EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}
TINY_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "position_embedding_size": 8,
}
TINY_UNIFIED_VISION = {"mm_embed_dim": 16, "mm_posemb_size": 8, "output_proj_dims": 16}
TINY_AUDIO = {"hidden_size": 16, "num_hidden_layers": 1, "output_proj_dims": 16}


def is_small(family: Family) -> bool:
    """Whether it is of the E-series: audio tower, centroid head."""
    return family.has_centroid_head


def shared_settings(family: Family) -> dict[str, Any]:
    """Return what the text settings of a target and its drafter begin with."""
    return {
        **COMMON,
        "use_bidirectional_attention": None if is_small(family) else "vision",
        "num_global_key_value_heads": None,
    }


def target_settings(family: Family) -> dict[str, Any]:
    """Return the target's text settings in the published layout."""
    return {
        **shared_settings(family),
        "final_logit_softcapping": 30.0,
        "num_kv_shared_layers": 0,
        **family.target,
        "layer_types": list(family.layer_types),
    }


def drafter_settings(family: Family) -> dict[str, Any]:
    """Return the drafter's text settings in the published layout."""
    settings = {
        **shared_settings(family),
        "final_logit_softcapping": None,
        **family.drafter_text,
    }
    if not family.is_unified:
        settings |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    return settings


def build_target(
    family: Family, text: dict[str, Any], vision: dict[str, Any], audio: dict[str, Any]
) -> Any:
    """Return the target's model of transformers."""
    if family.is_unified:
        config = classes.Gemma4UnifiedConfig(
            text_config=text, vision_config=vision, audio_config=audio
        )
        return classes.Gemma4UnifiedForConditionalGeneration(config)
    config = classes.Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=audio if is_small(family) else None,
    )
    return classes.Gemma4ForConditionalGeneration(config)


def build_drafter(
    family: Family, text: dict[str, Any], hidden_size: int, num_centroids: int
) -> Any:
    """Return the drafter's model of transformers."""
    settings: dict[str, Any] = {
        "text_config": text,
        "backbone_hidden_size": hidden_size,
        "use_ordered_embeddings": family.has_centroid_head,
        "num_centroids": num_centroids,
    }
    # The text settings stay a dictionary: the outer class picks the inner one.
    if family.is_unified:
        text["model_type"] = "gemma4_unified_text"
        config = classes.Gemma4UnifiedAssistantConfig(**settings)
        return classes.Gemma4UnifiedAssistantForCausalLM(config)
    text["model_type"] = "gemma4_text"
    config = classes.Gemma4AssistantConfig(**settings)
    return classes.Gemma4AssistantForCausalLM(config)


def saved_tensors(model: Any) -> dict[str, Any]:
    """Return the tensors that `save_pretrained` would write, by their names there."""
    state = dict(model.state_dict())
    for tied in model.all_tied_weights_keys:
        state.pop(tied, None)
    return dict(revert_weight_conversion(model, state))


def published_config(model: Any, text: dict[str, Any]) -> dict[str, Any]:
    """Return config.json as published: one key for all full layers, not one a layer."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "bfloat16"
    config["text_config"].pop("per_layer_config", None)
    for key in ("global_head_dim", "num_global_key_value_heads"):
        config["text_config"][key] = text[key]
    config["text_config"]["num_kv_shared_layers"] = text["num_kv_shared_layers"]
    return dict(config)


def shared_kv(text: dict[str, Any]) -> Iterable[tuple[str, list[int]]]:
    """Yield (name, shape) of the unused K/V tensors of a target's KV-shared layers."""
    num_layers = text["num_hidden_layers"]
    for i in range(num_layers - text["num_kv_shared_layers"], num_layers):
        is_full = text["layer_types"][i] == FULL
        head_dim = text["global_head_dim" if is_full else "head_dim"]
        rows = text["num_key_value_heads"] * head_dim
        for name in SHARED_KV:
            shape = [head_dim] if "norm" in name else [rows, text["hidden_size"]]
            yield f"model.language_model.layers.{i}.self_attn.{name}", shape


def describe(model: Any, extra: Iterable[tuple[str, list[int]]] = ()) -> list[Any]:
    """Return [name, dtype, shape] of a model's tensors, as saved in bfloat16."""
    listed = [
        [
            name,
            DTYPES[torch.bfloat16 if t.is_floating_point() else t.dtype],
            list(t.shape),
        ]
        for name, t in saved_tensors(model).items()
    ]
    listed += [[name, "BF16", shape] for name, shape in extra]
    names = [name for name, _, _ in listed]
    assert len(set(names)) == len(names), "a tensor is listed twice"
    return sorted(listed)


def check_names(family: Family) -> None:
    """Save a tiny pair of a family and compare its files with what is listed.

    Args:
        family: The size.

    Raises:
        AssertionError: A tensor is missing, too many, or has another name or shape.
    """
    text, draft = target_settings(family) | TINY, drafter_settings(family) | TINY
    if text.get("enable_moe_block"):
        text |= TINY_EXPERTS
    if is_small(family):
        text |= {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
    tower = OTHERS[family.name].vision
    vision = TINY_UNIFIED_VISION if family.is_unified else tower | TINY_TOWER
    audio = {} if family.is_unified else TINY_AUDIO
    models = [
        build_target(family, text, dict(vision), dict(audio)),
        build_drafter(family, draft, 16, 8),
    ]
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            path = Path(folder) / "model.safetensors"
            with safe_open(path, "pt") as file:
                saved = {key: file.get_slice(key).get_shape() for key in file.keys()}
        listed = {name: list(t.shape) for name, t in saved_tensors(model).items()}
        assert saved == listed, (
            f"{family.size}: {sorted(set(saved) ^ set(listed))[:8]} differ"
        )


def write(folder: Path, data: dict[str, Any]) -> None:
    """Write one repository's file; the same data always give the same bytes."""
    name = data["repo"].split("/")[1]
    raw = json.dumps(data, separators=(",", ":")).encode()
    path = folder / f"{name}.json.gz"
    path.write_bytes(gzip.compress(raw, 9, mtime=0))
    num_parameters = sum(math.prod(shape) for _, _, shape in data["tensors"])
    print(
        f"{name}: {len(data['tensors'])} tensors, {num_parameters:,} numbers, "
        f"{path.stat().st_size:,} bytes"
    )


def make(family: Family, folder: Path) -> None:
    """Write both repositories of a size."""
    text, draft = target_settings(family), drafter_settings(family)
    others = OTHERS[family.name]
    with torch.device("meta"):
        target = build_target(family, text, dict(others.vision), {})
        drafter = build_drafter(family, draft, text["hidden_size"], NUM_CENTROIDS)
    generation = {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0}
    write(
        folder,
        {
            "repo": family.target_id,
            "notes": list(others.notes),
            "config": published_config(target, text),
            "generation_config": generation,
            "tensors": describe(target, shared_kv(text)),
        },
    )
    write(
        folder,
        {
            "repo": family.drafter_id,
            "notes": [NOTE_DRAFTS],
            "config": published_config(drafter, draft),
            "generation_config": generation
            | {"num_assistant_tokens": family.num_assistant_tokens},
            "tensors": describe(drafter),
        },
    )


def main() -> None:
    """Check the names, then write the ten files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    for family in FAMILIES.values():
        check_names(family)
    for family in FAMILIES.values():
        make(family, folder)


if __name__ == "__main__":
    main()
