"""The drafter that training begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.find_drafter import find_drafter
from ..checkpoints.hub import fetch, hub_id
from ..checkpoints.weights import load_drafter
from ..errors import CheckpointError, PairingError
from ..models.compatibility import check_fit
from ..models.drafter import Drafter
from ..pair.pair import Pair
from .fresh import fresh_drafter
from .request import TuneRequest


@dataclass(frozen=True)
class Origin:
    """The drafter that training begins with.

    Attributes:
        drafter: As decoding has it, maybe quantized.
        config: Its ``config.json``.
        generation_config: Its ``generation_config.json``; empty where it has none.
        name: Its Hub id or its folder's name; None for random weights.
        dtype: The type of the new drafter's weights.
    """

    drafter: Drafter
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    name: str | None
    dtype: mx.Dtype = mx.bfloat16


def begin_with(request: TuneRequest, plain: Pair, folder: Path) -> Origin:
    """The drafter to begin with.

    Raises:
        PairingError: There is none, or it does not fit.
    """
    if request.is_from_scratch:
        drafter, config = fresh_drafter(plain.target, seed=request.training.seed)
        return Origin(drafter, config, {}, None)
    if request.draft_model is not None:
        return _given(request.draft_model, plain)
    try:
        choice = find_drafter(request.model, folder)
        if choice.path_or_id is None:
            raise PairingError(choice.reason)
        return _given(choice.path_or_id, plain)
    except (CheckpointError, PairingError) as error:
        # Nobody asked for the one that was found.
        raise type(error)(f"{error} Or begin --from-scratch.") from error


def _given(named: str | Path, plain: Pair) -> Origin:
    """A drafter that there is, to begin with."""
    place = fetch(named)
    drafter = load_drafter(place)
    check_fit(plain.target, drafter)
    checkpoint = open_checkpoint(place)
    return Origin(
        drafter,
        checkpoint.config,
        checkpoint.generation_config,
        hub_id(named, place) or place.resolve().name,
        drafter.model.norm.weight.dtype,
    )
