"""mlx-lm's samplers, read back into the settings they were made with.

``mlx_lm.sample_utils.make_sampler`` returns a closure that hides its parameters, and
mlx-lm's own programs always pass one. A sampler only says which token it draws, not
what it draws from, so drafts could not be judged by it; with the parameters they can.

``make_sampler`` and every function that it calls must have a text that is known to do
what ``sampling`` does, and must call MLX's own functions. Then a function that
``make_sampler`` defines is a sampler of mlx-lm's, and its cells hold its settings.
Everything else is called as it is, one token at a time: nothing is guessed.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from functools import cache, lru_cache
from hashlib import sha256
from importlib.metadata import version
from types import FunctionType
from typing import Any

import mlx.core as mx
from mlx_lm import sample_utils

from ..errors import RequestError
from .params import SamplingParams

logger = logging.getLogger("mlx_gemma_mtp")

# Beginnings of the SHA-256 of the source of functions of mlx_lm.sample_utils, in 0.32.0
# to 0.32.2. Another release whose text differs is to be read, and added.
_DIGESTS = {
    "make_sampler": ("a3e2788d3aeedbdb",),
    "greedy_sampler": ("a18fcd23ad66bb00",),
    "apply_top_p": ("d847fdef05eaba31",),
    "apply_min_p": ("a9b50b2af92fb475",),
    "apply_xtc": ("88b5cd1eb6b2c4b6",),
    "apply_top_k": ("9060b80998faaedb",),
    "categorical_sampling": ("c11e97e74a36e4f7",),
}
_FUNCTIONS = (FunctionType, type(mx.compile(mx.exp)))
# What these functions call by name.
_OF_MLX = (
    *("argmax", "argpartition", "array", "cumsum", "exp", "max", "put_along_axis"),
    *("softmax", "sort", "take_along_axis", "where"),
)
_OF_MLX_RANDOM = ("categorical", "uniform")
_BUILTINS = ("float", "int", "isinstance")
_NATIVE = (type(mx.compile), type(mx.Dtype))  # a function of MLX's, a class
# The cells of a sampler, and of its filters in the order in which mlx-lm applies them;
# distribution.py has the same.
_SAMPLER = ("sampling_methods", "temp")
_FILTERS: tuple[tuple[str, ...], ...] = (
    ("top_p",),
    ("min_p", "min_tokens_to_keep"),
    ("xtc_probability", "xtc_special_tokens", "xtc_threshold"),
    ("top_k",),
)


def sampler_params(sampler: object) -> SamplingParams | None:
    """The settings of a sampler that mlx-lm made.

    Args:
        sampler: What a caller passes as ``sampler``.

    Returns:
        Its settings, without a seed; None where it is anything else than a sampler of
        the installed mlx-lm's ``make_sampler``, where something that it calls is
        another function than mlx-lm's or MLX's, or with settings that
        ``SamplingParams`` does not have.
    """
    if not _is_mlx_lm_known() or not _calls_mlx():
        return None
    if sampler is sample_utils.greedy_sampler:
        return SamplingParams()
    return _read(sampler)


def _is_mlx_lm_known() -> bool:
    """Whether mlx-lm's functions are those whose text is known."""
    for name in _DIGESTS:
        if not _is_known(name, vars(sample_utils).get(name)):
            _note_unknown(name)
            return False
    return True


def _is_known(name: str, function: Any) -> bool:
    return (
        type(function) in _FUNCTIONS
        and function.__globals__ is vars(sample_utils)
        and _digest(function) in _DIGESTS[name]
    )


@lru_cache(maxsize=2 * len(_DIGESTS))
def _digest(function: Callable[..., Any]) -> str:
    """What a function is written as; empty where that cannot be read."""
    try:
        source = inspect.getsource(function.__code__)
    except OSError:
        return ""
    return sha256(source.encode()).hexdigest()[:16]


@cache
def _note_unknown(name: str) -> None:
    """Say once that samplers are not understood."""
    logger.info(
        "samplers of mlx-lm %s are called as they are, one token at a time: %s of "
        "mlx_lm.sample_utils is not the function that is known.",
        version("mlx-lm"),
        name,
    )


def _calls_mlx() -> bool:
    """Whether the names that mlx-lm's functions call mean what they always do."""
    module = vars(sample_utils)
    if module["mx"] is not mx or module["math"] is not math:
        return False
    if any(name in module for name in _BUILTINS):
        return False
    return all(
        type(value := vars(place)[name]) in _NATIVE and value.__name__ == name
        for place, names in ((mx, _OF_MLX), (mx.random, _OF_MLX_RANDOM))
        for name in names
    )


def _read(sampler: object) -> SamplingParams | None:
    """The settings in a sampler's cells."""
    cells = _cells(sampler)
    if tuple(cells) != _SAMPLER or type(cells["sampling_methods"]) is not list:
        return None
    settings: dict[str, Any] = {"temp": cells["temp"]}
    rest = iter(_FILTERS)
    for method in cells["sampling_methods"]:
        found = _cells(method)
        # Each at most once and in order: `in` goes on where the last one was found.
        if tuple(found) not in rest:
            return None
        settings |= found
    if settings.pop("min_tokens_to_keep", 1) != 1:
        return None
    if not isinstance(settings.get("xtc_special_tokens", []), (list, tuple)):
        return None  # an iterator would be used up by reading it
    try:
        return SamplingParams(**settings)
    except RequestError:
        return None


def _cells(function: Any) -> dict[str, Any]:
    """The variables of a function that make_sampler defined; none of any other."""
    if (
        type(function) is not FunctionType  # a proxy of one may do something else
        or function.__globals__ is not vars(sample_utils)
        or not any(function.__code__ is own for own in _defined_by_make_sampler())
    ):
        return {}
    try:
        values = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # an empty cell
        return {}
    return dict(zip(function.__code__.co_freevars, values, strict=True))


def _defined_by_make_sampler() -> tuple[Any, ...]:
    """What make_sampler makes its functions of, among its other constants."""
    return sample_utils.make_sampler.__code__.co_consts
