"""mlx-lm's samplers, read back into the settings they were made with.

``mlx_lm.sample_utils.make_sampler`` returns a closure that hides its parameters, and
mlx-lm's own programs always pass one. A sampler only says which token it draws, not
what it draws from, so drafts could not be judged by it; with the parameters they can.

A sampler is recognised by its code: it must be the code object that the installed
``make_sampler`` uses, and that code must do what the references below do. Whatever is
not understood to the last cell is no sampler of mlx-lm's: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from .config import SamplingParams
from .errors import RequestError

if TYPE_CHECKING:
    # Names of the references below. Python compiles a call on an imported name, such as
    # mx.argmax, in a way of its own, so that these lines count although none is run.
    import mlx.core as mx
    from mlx_lm.sample_utils import (
        apply_min_p,
        apply_top_k,
        apply_top_p,
        apply_xtc,
        categorical_sampling,
    )

# The parameter that switches each filter on, in the order in which mlx-lm applies them;
# sampling.py has the same.
_SWITCHES = {
    "top_p": "top_p",
    "min_p": "min_p",
    "xtc": "xtc_probability",
    "top_k": "top_k",
}
_OFF = 0  # the value of any of them that switches it off
# Parameters that make_sampler must give back, in the self-check. No two are equal, so
# that none can be taken for another.
_PROBE: dict[str, Any] = {
    "temp": 0.75,
    "top_p": 0.5,
    "min_p": 0.25,
    "min_tokens_to_keep": 1,
    "top_k": 7,
    "xtc_probability": 0.625,
    "xtc_threshold": 0.125,
    "xtc_special_tokens": [3, 5],
}


def sampler_params(sampler: object) -> SamplingParams | None:
    """The settings of a sampler that mlx-lm made.

    Args:
        sampler: What a caller passes as ``sampler``.

    Returns:
        Its settings, without a seed; None where it is anything else than a sampler of
        the installed mlx-lm's ``make_sampler``, or one with settings that
        ``SamplingParams`` does not have.
    """
    from mlx_lm import sample_utils

    make_sampler = vars(sample_utils).get("make_sampler")
    if type(make_sampler) is not FunctionType:
        return None
    known = _known_samplers(make_sampler)
    return None if known is None else _read(sampler, known)


@dataclass(frozen=True)
class _Known:
    """The code that the samplers of one make_sampler consist of.

    Attributes:
        module: Globals of make_sampler; a function with others does something else.
        greedy: Code of the greedy sampler.
        sampled: Code of every other one.
        filters: Code of the function that applies each filter.
    """

    module: dict[str, Any]
    greedy: CodeType
    sampled: CodeType
    filters: dict[str, CodeType]


@lru_cache(maxsize=1)
def _known_samplers(make_sampler: Callable[..., Any]) -> _Known | None:
    """Learn the code of make_sampler's samplers and check that they can be read back.

    Returns:
        None where they have another shape than this module knows.
    """
    try:
        known = _probe(make_sampler)
        if known is None or not _reads_back(make_sampler, known):
            return None
    except Exception:  # noqa: BLE001 - another version may fail in any way
        return None
    return known


def _probe(make_sampler: Callable[..., Any]) -> _Known | None:
    """Make one sampler of every kind and keep its code, if it is like the reference."""
    filters = {}
    for name in _SWITCHES:
        (method,) = _cells(make_sampler(**_settings([name])))["sampling_methods"]
        filters[name] = method.__code__
    known = _Known(
        module=make_sampler.__globals__,
        greedy=make_sampler(temp=0.0).__code__,
        sampled=make_sampler(**_settings([])).__code__,
        filters=filters,
    )
    references = _references(**dict.fromkeys([*_PROBE, "sampling_methods"]))
    found = {"greedy": known.greedy, "sampled": known.sampled, **filters}
    for name, code in found.items():
        if _meaning(code) not in [_meaning(f.__code__) for f in references[name]]:
            return None
    return known


def _settings(filters: Sequence[str]) -> dict[str, Any]:
    """The probe's settings with these filters on and the others off."""
    off = {switch: _OFF for name, switch in _SWITCHES.items() if name not in filters}
    return {**_PROBE, **off}


def _reads_back(make_sampler: Callable[..., Any], known: _Known) -> bool:
    """Whether samplers with any of the filters give back what was put in."""
    for count in range(len(_SWITCHES) + 1):
        for filters in combinations(_SWITCHES, count):
            given = _settings(filters)
            sampler = make_sampler(**given)
            del given["min_tokens_to_keep"]
            if "xtc" not in filters:
                given = {k: v for k, v in given.items() if not k.startswith("xtc")}
            given["top_p"] = given["top_p"] or 1.0  # off, in SamplingParams' words
            if _read(sampler, known) != SamplingParams(**given):
                return False
    return _read(make_sampler(temp=0), known) == SamplingParams()


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


def _meaning(code: CodeType) -> tuple[Any, ...]:
    """What a function does, and nothing of where it stands or how it is called."""
    return (
        code.co_code,
        code.co_consts,
        code.co_names,
        code.co_freevars,
        code.co_argcount,
        code.co_kwonlyargcount,
    )


def _references(
    sampling_methods: Any,
    temp: Any,
    top_p: Any,
    min_p: Any,
    min_tokens_to_keep: Any,
    top_k: Any,
    xtc_probability: Any,
    xtc_threshold: Any,
    xtc_special_tokens: Any,
) -> dict[str, list[Any]]:
    """The samplers of mlx-lm 0.31 and 0.32, to compare with; none is ever called.

    The names that they use are mlx-lm's and have no value here.
    """

    def greedy_sampler(logprobs: mx.array) -> mx.array:
        return mx.argmax(logprobs, axis=-1)

    def sampler(logprobs: mx.array) -> mx.array:
        for method in sampling_methods:
            logprobs = method(logprobs)
        return categorical_sampling(logprobs, temp)

    return {
        "greedy": [greedy_sampler, lambda x: mx.argmax(x, axis=-1)],
        "sampled": [sampler],
        "top_p": [lambda x: apply_top_p(x, top_p)],
        "min_p": [lambda x: apply_min_p(x, min_p, min_tokens_to_keep)],
        "xtc": [
            lambda x: apply_xtc(x, xtc_probability, xtc_threshold, xtc_special_tokens)
        ],
        "top_k": [lambda x: apply_top_k(x, top_k)],
    }
