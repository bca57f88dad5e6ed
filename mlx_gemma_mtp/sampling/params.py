"""How tokens are chosen: the settings of a request, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ..errors import RequestError, shorten


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn from the target's logits; names and order as in mlx-lm.

    Attributes:
        temp: Temperature >= 0; 0 is greedy.
        top_p: Keep the smallest set with this probability, 0..1; 0 and 1 are off.
        top_k: Keep this many tokens; 0 is off.
        min_p: Keep tokens at least this share of the best one's probability, 0..1.
        seed: 0..2**64 - 1, or None for a fresh one.
        reproducible: Whether the text of a seed is a function of seed and target alone
            (Gumbel coupling), or drafts are accepted as often as any lossless rule
            allows (block verification). Without a seed it is the latter.
        xtc_probability: How often XTC strikes (excludes all top choices but the
            least likely of them), 0..1; 0 is off.
        xtc_threshold: Probability above which a token is a top choice, 0..0.5.
        xtc_special_tokens: Token ids that XTC never excludes; any sequence, kept as a
            tuple.
    """

    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    reproducible: bool = True
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            RequestError: A value outside its range.
        """
        _check_number("temp", self.temp, "0 or more", lambda v: v >= 0)
        _check_number("top_p", self.top_p, "from 0 to 1", lambda v: 0 <= v <= 1)
        _check_number("min_p", self.min_p, "from 0 to 1", lambda v: 0 <= v <= 1)
        _check_number(
            "xtc_probability",
            self.xtc_probability,
            "from 0 to 1",
            lambda v: 0 <= v <= 1,
        )
        _check_number(
            "xtc_threshold",
            self.xtc_threshold,
            "from 0 to 0.5",
            lambda v: 0 <= v <= 0.5,
        )
        special = _token_ids("xtc_special_tokens", self.xtc_special_tokens)
        object.__setattr__(self, "xtc_special_tokens", special)  # a list has no hash
        _check_count("top_k", self.top_k, "a whole number from 0 to 2**31-1", 2**31)
        if self.seed is not None:
            _check_count("seed", self.seed, "a whole number from 0 to 2**64-1", 2**64)


def _check_number(name: str, value: Any, constraint: str, is_valid: Any) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    try:
        is_finite = is_number and math.isfinite(value)
    except OverflowError:  # a whole number that no float reaches
        is_finite = False
    if not is_finite or not is_valid(value):
        raise RequestError(_out_of_range(name, constraint, value))


def _check_count(name: str, value: Any, constraint: str, limit: int) -> None:
    is_count = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_count or not 0 <= value < limit:
        raise RequestError(_out_of_range(name, constraint, value))


def plain(value: Any) -> Any:
    """The value itself; arrays, also those of one number, as Python's own objects."""
    return value.tolist() if hasattr(value, "tolist") else value


def _token_ids(name: str, values: Any) -> tuple[int, ...]:
    values = plain(values)
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise RequestError(_out_of_range(name, "a sequence of token ids", values))
    tokens = tuple(values)
    for token in tokens:
        _check_count(name, token, "token ids, from 0 to 2**31-1", 2**31)
    return tuple(int(token) for token in tokens)


def _out_of_range(name: str, constraint: str, value: Any) -> str:
    found = shorten(value, nothing="None")
    return f"{name} must be {constraint}: got {found}. Leave it out for the default."
