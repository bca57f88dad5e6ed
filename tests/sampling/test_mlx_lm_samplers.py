"""mlx-lm's samplers: settings read back, everything else refused.

Run: python -m pytest tests/sampling/test_mlx_lm_samplers.py
"""

import functools
import inspect
import math
import types
from importlib.metadata import version
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm import sample_utils
from mlx_lm.sample_utils import make_sampler

from mlx_gemma_mtp.sampling import mlx_lm_samplers as samplers
from mlx_gemma_mtp.sampling.mlx_lm_samplers import sampler_params
from mlx_gemma_mtp.sampling.params import SamplingParams

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


@pytest.fixture
def install(monkeypatch):
    """Puts another make_sampler in the place of mlx-lm's."""

    def installed(function):
        monkeypatch.setattr(sample_utils, "make_sampler", function)
        return function

    return installed


def rewritten(name, old, new):
    """A function of mlx-lm's with a change in its source, in mlx-lm's own module."""
    function = getattr(sample_utils, name)
    source = inspect.getsource(function.__code__)
    assert old in source
    code = compile(source.replace(old, new), "<a program>", "exec")
    names: dict[str, Any] = {}
    exec(code, vars(sample_utils), names)
    return names[name]


def banning(logprobs, *settings):
    """What a program puts in the place of one of mlx-lm's functions."""
    return mx.where(mx.arange(logprobs.shape[-1]) < 100, -mx.inf, logprobs)


CALLED = (
    *("apply_top_p", "apply_min_p", "apply_xtc", "apply_top_k"),
    *("categorical_sampling", "greedy_sampler"),
)
REPLACED = [
    *[(sample_utils, name, banning) for name in CALLED],
    *[(sample_utils, name, mx.compile(banning)) for name in CALLED],
    *[(sample_utils, name, Proxy(getattr(sample_utils, name))) for name in CALLED],
    (sample_utils, "make_sampler", rewritten("make_sampler", "top_k > 0", "top_k > 9")),
    (
        sample_utils,
        "apply_min_p",
        rewritten("apply_min_p", "logprobs < scaled", "logprobs <= scaled"),
    ),
    (sample_utils, "apply_top_k", mx.compile(with_other_globals(greedy_sampler))),
    (sample_utils, "mx", types.SimpleNamespace(**vars(mx))),
    (sample_utils, "math", types.SimpleNamespace(log=math.log2)),
    (sample_utils, "isinstance", lambda *settings: True),
    (mx, "argpartition", banning),
    (mx, "argpartition", mx.argsort),
    (mx.random, "categorical", banning),
]


@pytest.mark.parametrize(("place", "name", "other"), REPLACED)
def test_a_program_that_replaced_a_function_gets_its_own_sampler(
    place, name, other, monkeypatch
):
    """Before the first sampler is seen, and after."""
    for has_seen in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, other, raising=False)
            if not has_seen:
                samplers._digest.cache_clear()
            sampler = sample_utils.make_sampler(**EVERYTHING)
            assert sampler_params(sampler) is None
        own = make_sampler(**EVERYTHING)
        assert sampler_params(own) == SamplingParams(**EVERYTHING)


def test_an_unknown_text_is_named_once(caplog, monkeypatch):
    samplers._note_unknown.cache_clear()
    caplog.set_level("INFO", "mlx_gemma_mtp")
    monkeypatch.setattr(sample_utils, "apply_top_p", banning)
    for _ in range(3):
        assert sampler_params(make_sampler(0.7)) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"samplers of mlx-lm {version('mlx-lm')} are called as they are, one token at "
        "a time: apply_top_p of mlx_lm.sample_utils is not the function that is known."
    ]


@pytest.mark.parametrize("other", [None, functools.partial(make_sampler), Sampler()])
def test_no_such_function(install, other):
    install(other)
    assert sampler_params(make_sampler(0.7)) is None


def test_recognition_comes_back(install):
    assert sampler_params(make_sampler(0.7)) == SamplingParams(0.7)
