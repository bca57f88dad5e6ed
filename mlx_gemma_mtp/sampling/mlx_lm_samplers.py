"""mlx-lm's samplers, read back into the settings they were made with.

``mlx_lm.sample_utils.make_sampler`` returns a closure that hides its parameters, and
mlx-lm's own programs always pass one. A sampler only says which token it draws, not
what it draws from, so drafts could not be judged by it; with the parameters they can.

A sampler is recognised by its code: it must be the code object that the installed
``make_sampler`` uses. That function and all that its samplers call must have the text
that is known to do what ``sampling`` does, and call MLX's own: a program that puts a
function of its own in the place of one of them gets what it asks for, its sampler.
Whatever is not understood to the last cell is no sampler of mlx-lm's: nothing is
guessed.
"""

from __future__ import annotations

import builtins
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import version
from types import CodeType, FunctionType, ModuleType
from typing import Any

from ..errors import RequestError
from .params import SamplingParams

logger = logging.getLogger("mlx_gemma_mtp")

# Beginnings of the SHA-256 of what functions of mlx_lm.sample_utils are written as, in
# 0.31.3 and in 0.32. Another release whose text differs is to be read, and added.
_DIGESTS = {
    "make_sampler": ("7bd4c4229f599a04", "a3e2788d3aeedbdb"),
    "greedy_sampler": ("", "a18fcd23ad66bb00"),  # 0.31 has a lambda in its place
    "apply_top_p": ("8f58e90dd43cf6b1", "d847fdef05eaba31"),
    "apply_min_p": ("3b4c4dfe8ea17db2", "a9b50b2af92fb475"),
    "apply_xtc": ("dee166fe74eee7a7", "88b5cd1eb6b2c4b6"),
    "apply_top_k": ("344bd2d6c8008482", "9060b80998faaedb"),
    "categorical_sampling": ("254d09b26e98ff2d", "c11e97e74a36e4f7"),
}
# The parameter that switches each filter on, in the order in which mlx-lm applies them;
# sampling.py has the same.
_SWITCHES = {
    "top_p": "top_p",
    "min_p": "min_p",
    "xtc": "xtc_probability",
    "top_k": "top_k",
}
_OFF = 0  # the value of any of them that switches it off
# Parameters that switch everything on.
_PROBE: dict[str, Any] = {
    "temp": 0.75,
    "top_p": 0.5,
    "min_p": 0.25,
    "top_k": 7,
    "xtc_probability": 0.625,
}


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
    from mlx_lm import sample_utils

    module = vars(sample_utils)
    functions = tuple(_Same(module.get(name)) for name in _DIGESTS)
    known = _known_samplers(functions, _Same(module))
    if known is None or not _calls_mlx(known):
        return None
    return _read(sampler, known)


@dataclass(frozen=True)
class _Known:
    """The code that the samplers of one make_sampler consist of.

    Attributes:
        module: Globals of make_sampler; a function with others does something else.
        greedy: Code of the greedy sampler.
        sampled: Code of every other one.
        filters: Code of the function that applies each filter.
        names: What the functions that they call look up by name.
    """

    module: dict[str, Any]
    greedy: CodeType
    sampled: CodeType
    filters: dict[str, CodeType]
    names: frozenset[str]


@dataclass(frozen=True, eq=False)
class _Same:
    """An object that equals itself alone; it may have a notion of its own of that."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@lru_cache(maxsize=1)
def _known_samplers(functions: tuple[_Same, ...], module: _Same) -> _Known | None:
    """Learn the code of make_sampler's samplers.

    Args:
        functions: What stands in mlx-lm's module under the names of ``_DIGESTS``.
        module: That module's names.

    Returns:
        None where one of them is not what it is known as.
    """
    found = dict(zip(_DIGESTS, (f.value for f in functions), strict=True))
    strange = [
        name
        for name, function in found.items()
        if _digest(function, module.value) not in _DIGESTS[name]
    ]
    if strange:
        logger.info(
            "samplers of mlx-lm %s are called as they are, one token at a time: %s of "
            "mlx_lm.sample_utils is not the function that is known.",
            version("mlx-lm"),
            strange[0],
        )
        return None
    return _probe(found["make_sampler"], [f for f in found.values() if f is not None])


def _digest(function: Any, module: dict[str, Any]) -> str:
    """What a function of a module is written as; empty for none."""
    import mlx.core as mx

    compiled = type(mx.compile(_digest))  # most of mlx-lm's are
    if function is None:
        return ""
    if type(function) not in (FunctionType, compiled):
        return "no function"
    if function.__globals__ is not module:
        return "of another module"
    try:
        text = inspect.getsource(function.__code__)
    except OSError:
        return "without a source"
    return sha256(text.encode()).hexdigest()[:16]


def _probe(make_sampler: Callable[..., Any], functions: Sequence[Any]) -> _Known:
    """Make one sampler of every kind and keep its code."""
    filters = {}
    for name in _SWITCHES:
        (method,) = _cells(make_sampler(**_settings([name])))["sampling_methods"]
        filters[name] = method.__code__
    return _Known(
        module=make_sampler.__globals__,
        greedy=make_sampler(temp=0.0).__code__,
        sampled=make_sampler(**_settings([])).__code__,
        filters=filters,
        names=frozenset(n for f in functions for n in f.__code__.co_names),
    )


def _settings(filters: Sequence[str]) -> dict[str, Any]:
    """The probe's settings with these filters on and the others off."""
    off = {switch: _OFF for name, switch in _SWITCHES.items() if name not in filters}
    return {**_PROBE, **off}


def _calls_mlx(known: _Known) -> bool:
    """Whether the names that mlx-lm's functions use mean what they always do."""
    import mlx.core as mx

    own = (type(mx.add), type(mx.array), type(mx.float32), ModuleType, float)
    if known.module["mx"] is not mx or known.module["math"] is not math:
        return False
    if any(name in known.module and name in vars(builtins) for name in known.names):
        return False
    return all(
        type(value) in own and getattr(value, "__name__", name).endswith(name)
        for place in (mx, mx.random)
        for name in known.names & vars(place).keys()
        for value in [vars(place)[name]]
    )


def _read(sampler: object, known: _Known) -> SamplingParams | None:
    """The settings in a sampler's cells."""
    if _is(sampler, known.greedy, known):
        return SamplingParams()
    if not _is(sampler, known.sampled, known):
        return None
    cells = _cells(sampler)
    methods = cells.get("sampling_methods")
    if type(methods) is not list or "temp" not in cells:
        return None
    settings: dict[str, Any] = {"temp": cells["temp"]}
    rest = iter(_SWITCHES)
    for method in methods:
        # Each at most once and in order: `rest` goes on where the last one was found.
        name = next((n for n in rest if _is(method, known.filters[n], known)), None)
        if name is None:
            return None
        settings |= _cells(method)
    if settings.pop("min_tokens_to_keep", 1) != 1:
        return None
    if not isinstance(settings.get("xtc_special_tokens", []), (list, tuple)):
        return None  # an iterator would be used up by reading it
    try:
        return SamplingParams(**settings)
    except (RequestError, TypeError):  # TypeError: a cell by another name
        return None


def _is(function: object, code: CodeType, known: _Known) -> bool:
    """Whether an object is a function of mlx-lm's with this code."""
    return (
        type(function) is FunctionType  # a proxy of one may do something else
        and function.__code__ is code
        and function.__globals__ is known.module
    )


def _cells(function: Any) -> dict[str, Any]:
    """The variables that a closure holds, by name; none where one has no value."""
    cells = function.__closure__ or ()
    try:
        values = [cell.cell_contents for cell in cells]
    except ValueError:  # an empty cell
        return {}
    return dict(zip(function.__code__.co_freevars, values, strict=True))
