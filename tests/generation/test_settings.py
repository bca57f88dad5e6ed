"""The settings that text and tokens share: their names, and what reads them.

Run: python -m pytest tests/generation/test_settings.py
"""

from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import pytest

from mlx_gemma_mtp.errors import RequestError
from mlx_gemma_mtp.generation.settings import GenerationSettings, Keywords
from mlx_gemma_mtp.sampling.params import SamplingParams


def test_keywords_are_the_fields_with_a_default():
    hints = get_type_hints(GenerationSettings)
    optional = [f.name for f in fields(GenerationSettings) if f.default is not MISSING]
    assert get_type_hints(Keywords) == {name: hints[name] for name in optional}


def test_a_default_is_the_samplings_own():
    assert GenerationSettings(1).sampling == SamplingParams()


def test_sampling_is_of_the_fields():
    given: dict[str, Any] = {
        "temp": 0.5,
        "top_k": 3,
        "seed": 7,
        "xtc_special_tokens": [1],
    }
    found = GenerationSettings(1, exactness="fast", **given).sampling
    assert found == SamplingParams(**given)


@pytest.mark.parametrize(
    "setting",
    [
        {"max_tokens": 0},
        {"num_draft_tokens": 9},
        {"exactness": "perhaps"},
        {"prefill_step_size": True},
        {"min_p": 2.0},
    ],
)
def test_every_kind_of_setting_is_checked(setting):
    (name,) = setting
    with pytest.raises(RequestError, match=f"^{name} must be "):
        GenerationSettings(**{"max_tokens": 1, **setting})
