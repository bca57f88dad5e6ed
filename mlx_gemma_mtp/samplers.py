"""Samplers of mlx-lm's whose settings are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_lm.sample_utils import greedy_sampler

from .config import SamplingParams


def sampler_params(sampler: Callable[..., Any]) -> SamplingParams | None:
    """The settings that a sampler stands for; None where they are not known."""
    return SamplingParams() if sampler is greedy_sampler else None
