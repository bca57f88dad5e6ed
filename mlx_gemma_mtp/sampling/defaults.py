"""What a checkpoint says about sampling: the settings that its makers recommend.

``generation_config.json`` is transformers' file and its words are meant as there, with
one exception: where ``top_k`` is missing it is off. transformers' own code fills in 50,
a default of the library and no word of the checkpoint's makers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..errors import CheckpointError, RequestError, shorten
from .params import SamplingParams


@dataclass(frozen=True)
class _Key:
    """How the file calls a setting, what it may be, and what it is where missing."""

    name: str
    constraint: str
    default: float


_KEYS = {
    "temp": _Key("temperature", "a number, 0 or more", 1.0),
    "top_p": _Key("top_p", "a number from 0 to 1", 1.0),
    "top_k": _Key("top_k", "a whole number from 0 to 2**31-1", 0),
    "min_p": _Key("min_p", "a number from 0 to 1", 0.0),
}
# What somebody may give in place of the checkpoint's: temperature and filters.
GIVEN = tuple(_KEYS)


@dataclass(frozen=True)
class SamplingDefaults:
    """The sampling settings of a checkpoint, each checked when it is asked for.

    A mistake in the file is no reason to refuse the checkpoint: who gives a setting, or
    decodes greedily, never needs the file's.

    Args:
        config: The parsed ``generation_config.json``; empty where there is none.
        source: Where it came from, for messages.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = "generation_config.json"

    @property
    def temp(self) -> float:
        """Temperature; 0 (greedy) where the checkpoint does not ask for sampling."""
        is_sampled = self.config.get("do_sample")
        if is_sampled is None:
            # transformers would be greedy here too, but nobody writes a temperature
            # for that.
            is_sampled = self.config.get("temperature") is not None
        if not isinstance(is_sampled, bool):
            self._fail("do_sample", "true or false", is_sampled, "temp")
        return self._value("temp") if is_sampled else 0.0

    @property
    def top_p(self) -> float:
        """Probability mass to keep; 1 is off."""
        return self._value("top_p")

    @property
    def top_k(self) -> int:
        """Number of tokens to keep; 0 is off."""
        return self._value("top_k")

    @property
    def min_p(self) -> float:
        """Smallest share of the best token's probability to keep; 0 is off."""
        return self._value("min_p")

    @property
    def repetition_penalty(self) -> Any:
        """The file's penalty where it is more than nothing, else None; never applied.

        transformers' looks at the whole text, and mlx-lm's at the last 20 tokens: one
        number does not serve both.
        """
        penalty = self.config.get("repetition_penalty")
        return None if penalty == 1 else penalty

    def settings(self, **given: Any) -> dict[str, Any]:
        """The settings to sample with: each one given, else the checkpoint's.

        Args:
            given: Some of ``GIVEN``; None counts as not given.

        Returns:
            All four, as keywords for ``stream_generate`` and ``generate_tokens``. At a
            temperature of 0 filters mean nothing, and the checkpoint's stay out.

        Raises:
            CheckpointError: A setting that is needed is none in the file.
        """
        given = {name: value for name, value in given.items() if value is not None}
        temp = given["temp"] if "temp" in given else self.temp
        settings = {"temp": temp}
        for name in GIVEN[1:]:
            if name in given:
                settings[name] = given[name]
            else:
                settings[name] = self._value(name) if temp else _KEYS[name].default
        return settings

    def _value(self, name: str) -> Any:
        """One setting, checked."""
        key = _KEYS[name]
        value = self.config.get(key.name)
        setting: dict[str, Any] = {name: key.default if value is None else value}
        try:
            SamplingParams(**setting)
        except RequestError:
            self._fail(key.name, key.constraint, value, name)
        return setting[name]

    def _fail(self, key: str, constraint: str, value: Any, name: str) -> NoReturn:
        flag = name.replace("_", "-")
        raise CheckpointError(
            f"{key} in {self.source} must be {constraint}: got {shorten(value)}. "
            f"Correct the file, or give the setting yourself ({name}=, --{flag})."
        )
