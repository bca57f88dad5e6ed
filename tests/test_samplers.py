"""mlx-lm's samplers: settings read back, everything else refused.

Run: python -m pytest tests/test_samplers.py
"""

import functools
import inspect
import math
import re
import types
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm import sample_utils
from mlx_lm.sample_utils import make_sampler

from mlx_gemma_mtp.config import SamplingParams
from mlx_gemma_mtp.samplers import sampler_params

EVERYTHING: dict[str, Any] = {
    "temp": 0.7,
    "top_p": 0.9,
    "min_p": 0.05,
    "top_k": 40,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.2,
    "xtc_special_tokens": [1, 106],
}


def in_range(maximum):
    return st.floats(0, maximum) | st.sampled_from([0, 0.0, maximum])


@given(
    temp=st.floats(0, 1e30) | st.sampled_from([0, 1, 2]),
    top_p=in_range(1.0),
    min_p=in_range(1.0),
    top_k=st.integers(0, 2**31 - 1),
    xtc_probability=in_range(1.0),
    xtc_threshold=in_range(0.5),
    xtc_special_tokens=st.none() | st.lists(st.integers(0, 2**31 - 1), max_size=5),
)
def test_settings_come_back(**settings):
    if settings["xtc_special_tokens"] is None:  # mlx-lm's default
        del settings["xtc_special_tokens"]
    found = sampler_params(make_sampler(**settings))
    if settings["temp"] == 0:
        assert found == SamplingParams()
        return
    settings["top_p"] = settings["top_p"] or 1.0
    if not settings["xtc_probability"]:
        settings = {k: v for k, v in settings.items() if not k.startswith("xtc")}
    assert found == SamplingParams(**settings)
    assert found.seed is None


def test_by_position():
    found = sampler_params(make_sampler(0.7, 0.9, 0.05, 1, 40, 0.5, 0.2, [1, 106]))
    assert found == SamplingParams(**EVERYTHING)


def test_greedy():
    """By every way that mlx-lm has to say so."""
    for sampler in (make_sampler(), make_sampler(0), make_sampler(temp=0.0, top_k=5)):
        assert sampler_params(sampler) == SamplingParams()


def test_a_tuple_of_special_tokens():
    sampler = make_sampler(**{**EVERYTHING, "xtc_special_tokens": (1, 106)})
    assert sampler_params(sampler) == SamplingParams(**EVERYTHING)


@pytest.mark.parametrize(
    "setting",
    [
        {"temp": -1.0},
        {"temp": math.inf},
        {"temp": math.nan},
        {"temp": True},
        {"temp": mx.array(0.5)},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"min_p": math.nan},
        {"min_tokens_to_keep": 2},
        {"top_k": 2**31},
        {"top_k": 5.0},
        {"top_k": True},
        {"xtc_probability": 1.5},
        {"xtc_threshold": 0.6},
        {"xtc_threshold": "0.1"},
        {"xtc_special_tokens": [-1]},
        {"xtc_special_tokens": ["\n"]},
        {"xtc_special_tokens": mx.array([1])},
        {"xtc_special_tokens": {1}},
        {"xtc_special_tokens": 1},
    ],
    ids=str,
)
def test_settings_that_we_do_not_have(setting):
    assert sampler_params(make_sampler(**{**EVERYTHING, **setting})) is None


def test_an_iterator_is_not_used_up():
    tokens = iter([1, 106])
    sampler = make_sampler(**{**EVERYTHING, "xtc_special_tokens": tokens})
    assert sampler_params(sampler) is None
    assert list(tokens) == [1, 106]


def test_tokens_to_keep_mean_nothing_without_min_p():
    assert sampler_params(make_sampler(0.5, min_tokens_to_keep=3)) == SamplingParams(
        0.5
    )


def my_make_sampler(temp, sampling_methods):
    """A closure with the names of mlx-lm's."""

    def sampler(logprobs):
        for method in sampling_methods:
            logprobs = method(logprobs)
        return sample_utils.categorical_sampling(logprobs, temp)

    return sampler


def closure(sampler: Any) -> Any:
    return sampler.__closure__


def changed_cells(**values):
    """A sampler of mlx-lm's in whose cells something else was put."""
    sampler = make_sampler(**EVERYTHING)
    names = sampler.__code__.co_freevars
    for name, value in values.items():
        closure(sampler)[names.index(name)].cell_contents = value
    return sampler


def emptied():
    sampler = make_sampler(0.5)
    for cell in closure(sampler):
        del cell.cell_contents
    return sampler


def methods_of(**settings):
    sampler = make_sampler(0.5, **settings)
    return list(closure(sampler)[0].cell_contents)


def with_other_globals(sampler):
    module = {**vars(sample_utils), "categorical_sampling": max}
    return types.FunctionType(
        sampler.__code__, module, sampler.__name__, None, sampler.__closure__
    )


class Proxy:
    """Looks like the function that it wraps and does something else."""

    def __init__(self, wrapped):
        self.wrapped = wrapped

    @property  # type: ignore[misc]
    def __class__(self):
        return type(self.wrapped)

    def __getattr__(self, name):
        return getattr(self.wrapped, name)

    def __call__(self, logprobs):
        return mx.array([0])


class Sampler:
    def __call__(self, logprobs):
        return mx.argmax(logprobs, axis=-1)

    def sampler(self, logprobs):
        return mx.argmax(logprobs, axis=-1)


def greedy_sampler(logprobs):
    return mx.argmax(logprobs, axis=-1)


TOP_P, TOP_K = methods_of(top_p=0.5), methods_of(top_k=3)


@pytest.mark.parametrize(
    "sampler",
    [
        None,
        "sampler",
        0.7,
        SamplingParams(),
        make_sampler,
        mx.argmax,
        max,
        greedy_sampler,
        lambda x: mx.argmax(x, axis=-1),
        Sampler(),
        Sampler().sampler,
        mock.MagicMock(),
        mock.MagicMock(spec=make_sampler(0.5)),
        my_make_sampler(0.7, []),
        my_make_sampler(0.7, methods_of(top_p=0.9)),
        functools.partial(make_sampler(0.7)),
        functools.partial(make_sampler(0.0)),
        functools.wraps(make_sampler(0.7))(lambda x: x),
        Proxy(make_sampler(0.7)),
        with_other_globals(make_sampler(0.7)),
        emptied(),
        changed_cells(sampling_methods=None),
        changed_cells(sampling_methods=()),
        changed_cells(sampling_methods=[None]),
        changed_cells(sampling_methods=[lambda x: x]),
        changed_cells(sampling_methods=[*TOP_P, lambda x: x]),
        changed_cells(sampling_methods=[*TOP_K, *TOP_P]),
        changed_cells(sampling_methods=[*TOP_P, *TOP_P]),
        changed_cells(sampling_methods=[make_sampler(0.5)]),
        changed_cells(sampling_methods=[functools.partial(TOP_P[0])]),
        changed_cells(sampling_methods=[Proxy(TOP_P[0])]),
        changed_cells(sampling_methods=[with_other_globals(TOP_P[0])]),
        changed_cells(temp=None),
        changed_cells(temp="0.7"),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_look_alikes_are_refused(sampler):
    assert sampler_params(sampler) is None


def test_cells_count_as_they_are_now():
    sampler = changed_cells(temp=0.25, sampling_methods=[*TOP_P, *TOP_K])
    assert sampler_params(sampler) == SamplingParams(0.25, 0.5, 3)


GREEDY = re.compile(r"return (greedy_sampler|lambda x: mx\.argmax\(x, axis=-1\))\n")
SOURCE = f"""
import mlx.core as mx
{inspect.getsource(greedy_sampler)}
{inspect.getsource(make_sampler)}
"""


@pytest.fixture
def install(monkeypatch):
    """Puts another make_sampler in the place of mlx-lm's."""

    def installed(function):
        monkeypatch.setattr(sample_utils, "make_sampler", function)
        return function

    return installed


def variant(old, new):
    """make_sampler with a change in its source."""
    source = re.sub(old, new, SOURCE)
    assert source != SOURCE
    return compiled(source)


def compiled(source):
    module = dict(vars(sample_utils))
    exec(compile(source, "<another version>", "exec"), module)
    return module["make_sampler"]


@pytest.mark.parametrize(
    "greedy", ["greedy_sampler", "lambda x: mx.argmax(x, axis=-1)"]
)
def test_another_version_of_the_same_shape(install, greedy):
    """The forms that mlx-lm 0.31 and 0.32 have; the installed one is another then."""
    other = install(compiled(GREEDY.sub(f"return {greedy}\n", SOURCE)))
    assert sampler_params(other(**EVERYTHING)) == SamplingParams(**EVERYTHING)
    assert sampler_params(other()) == SamplingParams()
    assert sampler_params(make_sampler(0.7)) is None
    assert sampler_params(make_sampler()) is None


CHANGES = [
    (r"\btop_p\b", "nucleus"),
    (r"min_p != 0\.0", "min_p > 0.3"),
    (r"apply_top_k\(x, top_k\)", "apply_top_k(x, top_k + 1)"),
    (r"apply_top_k\(x, top_k\)", "apply_top_k(x / temp, top_k)"),
    (r"apply_top_p\(x, top_p\)", "apply_nucleus(x, top_p)"),
    (r"(x, min_p), min_tokens_to_keep", r"\1"),
    (r"lambda x: apply_top_p\(x, top_p\)", "partial(apply_top_p, top_p=top_p)"),
    (r"for method in sampling_methods", "for method in sampling_methods[::-1]"),
    (r"categorical_sampling\(logprobs, temp\)", "categorical_sampling(logprobs)"),
    (r"categorical_sampling\(logprobs, temp\)", "logprobs.argmax(axis=temp)"),
    (r"(    )(for method)", r"\1logprobs = logprobs / temp\n        \2"),
    (r"    return sampler\n", "    return mx.compile(sampler)\n"),
    (r"    return sampler\n", "    raise RuntimeError\n"),
    (r"    return sampler\n", "    return None\n"),
    (r"sampling_methods = \[\]", "sampling_methods = [lambda x: x]"),
    (GREEDY.pattern, "return lambda x: mx.argmin(x, axis=-1)\n"),
    (GREEDY.pattern, "return None\n"),
    (r"top_p < 1\.0", "top_p < 0.25"),
]


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_a_changed_shape_switches_recognition_off(install, old, new):
    other = install(variant(old, new))
    for make in (other, make_sampler):
        for settings in ({"temp": 0.0}, {"temp": 0.7}, EVERYTHING):
            try:
                sampler = make(**settings)
            except (RuntimeError, TypeError):  # it makes none at all
                continue
            assert sampler_params(sampler) is None


def test_filters_in_another_order_switch_recognition_off(install):
    def swapped(**settings):
        sampler = make_sampler(**settings)
        if closure(sampler):
            closure(sampler)[0].cell_contents.reverse()
        return sampler

    install(swapped)
    assert sampler_params(make_sampler(0.7)) is None


@pytest.mark.parametrize("other", [None, functools.partial(make_sampler), Sampler()])
def test_no_such_function(install, other):
    install(other)
    assert sampler_params(make_sampler(0.7)) is None


def test_recognition_comes_back(install):
    assert sampler_params(make_sampler(0.7)) == SamplingParams(0.7)
