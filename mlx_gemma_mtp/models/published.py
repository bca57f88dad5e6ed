"""Settings of the published families, whole or cut, as a checkpoint's are read.

Knows nothing of files or of MLX.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import RequestError
from . import text_config as reading
from .drafter_config import DrafterConfig
from .families import FAMILIES, NUM_CENTROIDS, VOCAB_SIZE, Family

_SOURCE = "the table of published shapes"


def text_config(
    family: str, *, num_layers: int | None = None, vocab_size: int | None = None
) -> dict[str, Any]:
    """A target's settings, as ``text_config.text_config`` reads them of a checkpoint.

    Args:
        family: One of ``FAMILIES``, upper or lower case.
        num_layers: How many layers to keep, 2 or more; None for all. Layers with K/V
            of their own and layers that share them keep their shares, and each part
            ends as the published one does, with its last sliding and full layers.
        vocab_size: Tokens to keep; None for all.

    Raises:
        RequestError: No such family, or a number outside its range.
    """
    found = _family(family)
    raw = {
        **found.target_text,
        "final_logit_softcapping": 30.0,
        **_vocabulary(vocab_size, has_tables=not found.is_unified),
    }
    if num_layers is not None:
        raw |= _cut(raw, num_layers)
    whole = {"model_type": found.kind, "text_config": raw}
    return reading.text_config(whole, source=_SOURCE)


def drafter_config(family: str, *, vocab_size: int | None = None) -> DrafterConfig:
    """A drafter's settings, as those of a checkpoint.

    Args:
        family: One of ``FAMILIES``, upper or lower case.
        vocab_size: Tokens to keep, a multiple of 2048 where the drafter has a centroid
            head; None for all.

    Raises:
        RequestError: No such family, or a number outside its range.
    """
    found = _family(family)
    if (
        found.has_centroid_head
        and vocab_size is not None
        and vocab_size % NUM_CENTROIDS
    ):
        raise RequestError(
            f"vocab_size must be a multiple of {NUM_CENTROIDS} for {family}: got "
            f"{vocab_size}. Its drafter has {NUM_CENTROIDS} centroids."
        )
    whole = {
        "model_type": f"{found.kind}_assistant",
        "backbone_hidden_size": found.target["hidden_size"],
        "use_ordered_embeddings": found.has_centroid_head,
        "text_config": {
            **found.drafter_text,
            **_vocabulary(vocab_size, has_tables=False),
        },
    }
    read = DrafterConfig.from_dict(whole, source=_SOURCE)
    return replace(read, num_assistant_tokens=found.num_assistant_tokens)


def _family(name: str) -> Family:
    found = FAMILIES.get(name.lower())
    if found is None:
        raise RequestError(
            f"the family must be one of {', '.join(FAMILIES)}: got {name!r}. 12b is "
            "the plainest of them."
        )
    return found


def _vocabulary(size: int | None, *, has_tables: bool) -> dict[str, int]:
    """The sizes of the tables of tokens; those of 12B and drafters are one."""
    size = VOCAB_SIZE if size is None else size
    if not 256 <= size <= VOCAB_SIZE:
        raise RequestError(
            f"vocab_size must be from 256 to {VOCAB_SIZE}: got {size}. 8192 is enough "
            "to look at layers."
        )
    tables = {"vocab_size_per_layer_input": size} if has_tables else {}
    return {"vocab_size": size, **tables}


def _cut(raw: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """The layers that stay when a target is cut."""
    total, types = raw["num_hidden_layers"], raw["layer_types"]
    if not 2 <= num_layers <= total:
        raise RequestError(
            f"num_layers must be from 2 to {total}: got {num_layers}. A pair needs one "
            "layer of each type."
        )
    num_own = total - raw["num_kv_shared_layers"]
    # At least one layer of each type has K/V of its own: the drafter reads them.
    kept_own = max(2, round(num_layers * num_own / total))
    kept_shared = num_layers - kept_own
    own, shared = types[:num_own], types[num_own:]
    return {
        "num_hidden_layers": num_layers,
        "num_kv_shared_layers": kept_shared,
        "layer_types": own[num_own - kept_own :] + shared[len(shared) - kept_shared :],
    }
