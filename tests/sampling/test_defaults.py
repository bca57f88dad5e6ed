"""Sampling settings of checkpoints: what the file means, and what it must not say.

Run: python -m pytest tests/sampling/test_defaults.py
"""

import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp import generate_tokens, load, load_pair
from mlx_gemma_mtp.checkpoints.weights import load_drafter
from mlx_gemma_mtp.errors import CheckpointError
from mlx_gemma_mtp.pair.pair import pair_of
from mlx_gemma_mtp.sampling.defaults import SamplingDefaults
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.tiny import model_folder, uncompiled

GREEDY = {"temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
RECOMMENDED = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"eos_token_id": [1, 106]}, {}),
        ({"do_sample": False}, {}),
        ({"do_sample": False, "temperature": 0.7, "top_k": 64}, {}),
        ({"do_sample": None, "temperature": None}, {}),
        ({"top_k": 64, "top_p": 0.9}, {}),
        ({"temperature": 0.7}, {"temp": 0.7}),
        ({"temperature": 0}, {}),
        ({"do_sample": True, "temperature": 0, "top_k": 64}, {}),
        ({"do_sample": True}, {"temp": 1.0}),
        ({"do_sample": True, "top_k": None, "temperature": None}, {"temp": 1.0}),
        (RECOMMENDED, {"temp": 1.0, "top_k": 64, "top_p": 0.95}),
        ({"do_sample": True, "min_p": 0.1}, {"temp": 1.0, "min_p": 0.1}),
    ],
)
def test_what_the_file_means(config, expected):
    assert SamplingDefaults(config).settings() == GREEDY | expected


def test_what_is_given_counts_first():
    defaults = SamplingDefaults(RECOMMENDED)
    found = defaults.settings(temp=0.5, top_p=None, top_k=0, min_p=0.2)
    assert found == {"temp": 0.5, "top_p": 0.95, "top_k": 0, "min_p": 0.2}
    assert defaults.settings(temp=0.0) == GREEDY
    assert defaults.settings(temp=0.0, top_k=3) == GREEDY | {"top_k": 3}


def test_filters_of_a_greedy_checkpoint_serve_a_temperature():
    defaults = SamplingDefaults({"do_sample": False, "top_k": 64})
    assert defaults.settings(temp=1.0) == GREEDY | {"temp": 1.0, "top_k": 64}


def test_single_settings():
    defaults = SamplingDefaults(RECOMMENDED)
    found = (defaults.temp, defaults.top_p, defaults.top_k, defaults.min_p)
    assert found == (1.0, 0.95, 64, 0.0)


@pytest.mark.parametrize(
    ("key", "value", "name", "words"),
    [
        ("do_sample", "yes", "temp", "must be true or false: got 'yes'"),
        ("do_sample", 1, "temp", "must be true or false: got 1"),
        ("temperature", -1, "temp", "must be a number, 0 or more: got -1"),
        ("temperature", True, "temp", "must be a number, 0 or more: got True"),
        ("temperature", math.nan, "temp", "must be a number, 0 or more: got nan"),
        ("temperature", math.inf, "temp", "must be a number, 0 or more: got inf"),
        ("top_p", 2, "top_p", "must be a number from 0 to 1: got 2"),
        ("top_p", {}, "top_p", "must be a number from 0 to 1: got {}"),
        ("top_k", 1.0, "top_k", "must be a whole number from 0 to 2**31-1: got 1.0"),
        ("top_k", -1, "top_k", "must be a whole number from 0 to 2**31-1: got -1"),
        ("min_p", "x" * 999, "min_p", "xxx..."),
    ],
)
def test_a_mistake_is_told_where_it_matters(key, value, name, words):
    defaults = SamplingDefaults({**RECOMMENDED, key: value}, "here/its.json")
    with pytest.raises(CheckpointError) as caught:
        defaults.settings()
    message = str(caught.value)
    assert message.startswith(f"{key} in here/its.json must be ")
    assert words in message
    assert f"({name}=, --{name.replace('_', '-')})" in message
    assert len(message) < 300
    assert defaults.settings(temp=0) == GREEDY | {"temp": 0}
    assert defaults.settings(**{name: 1})[name] == 1


JSON = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=2)
)


@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(("do_sample", "temperature", "top_p", "top_k"), JSON),
    )
)
def test_any_value_gives_good_settings_or_one_line(config):
    with contextlib.suppress(CheckpointError):  # an error of its own is one line
        SamplingParams(**SamplingDefaults(config).settings())


@pytest.mark.parametrize(
    ("value", "expected"), [(None, None), (1, None), (1.0, None), (1.1, 1.1)]
)
def test_repetition_penalty(value, expected):
    assert SamplingDefaults({"repetition_penalty": value}).repetition_penalty == (
        expected
    )


def test_the_embedded_pair_is_greedy():
    assert load_pair().sampling_defaults.settings() == GREEDY


class TestPairs:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = model_folder(tmp_path / "pair")
        (folder / "generation_config.json").write_text(json.dumps(RECOMMENDED))
        return folder

    def test_carry_them(self, folder):
        expected = SamplingDefaults(RECOMMENDED, str(folder / "generation_config.json"))
        model, _ = load(folder)
        assert pair_of(model).sampling_defaults == expected
        other = pair_of(model, load_drafter(folder / "drafter"))
        assert other.sampling_defaults == expected
        pair = load_pair(folder)
        assert pair.sampling_defaults == expected

    def test_do_not_use_them_by_themselves(self, folder):
        pair = load_pair(folder, folder / "drafter")
        settings = pair.sampling_defaults.settings()
        with uncompiled():
            own, plain, greedy = (
                list(generate_tokens(pair, [2, 40], max_tokens=20, seed=3, **given))
                for given in (settings, {}, {"temp": 0.0})
            )
        assert own != plain
        assert plain == greedy

    def test_a_model_without_a_checkpoint(self, folder):
        model, _ = load(folder)
        del model._mtp_attached
        assert pair_of(model).sampling_defaults == SamplingDefaults()

    def test_a_missing_file(self, folder):
        (folder / "generation_config.json").unlink()
        assert load_pair(folder).sampling_defaults.settings() == GREEDY
