"""How answers are made, and what of it can be changed while a chat goes on.

Knows nothing of sessions or of the terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import RequestError
from ..generation.settings import check_max_tokens
from ..sampling.defaults import SamplingDefaults
from ..sampling.host import LogitsProcessor
from ..sampling.params import SamplingParams

_MAX_TOKENS = "max_tokens"
_TYPES: dict[str, type] = {
    "temp": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "seed": int,
    _MAX_TOKENS: int,
}
NAMES = tuple(_TYPES)
_OFF = "off"  # of a seed


@dataclass(frozen=True)
class Settings:
    """How answers are made.

    Attributes:
        max_tokens: Most tokens of an answer, 1 or more; -1 for no limit but the
            model's longest context.
        prefill_step_size: Most prompt tokens in one forward.
        exactness: As ``stream_generate`` has it.
        stop: Strings that end an answer.
        sampling: The sampling settings of ``stream_generate``.
        logits_processors: What changes logits, as ``stream_generate`` takes it.
        defaults: What the checkpoint recommends where nothing is given.
        given: The sampling settings that are, by name; None counts as not given.
    """

    max_tokens: int
    prefill_step_size: int
    exactness: str
    stop: Sequence[str]
    sampling: dict[str, Any]
    logits_processors: Sequence[LogitsProcessor] = ()
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gives_one_answer(self) -> bool:
        """Whether the same prompt gets the same answer again."""
        sampling = SamplingParams(**self.sampling)
        return not sampling.temp or sampling.seed is not None

    def value(self, name: str) -> Any:
        """One of ``NAMES``."""
        if name == _MAX_TOKENS:
            return self.max_tokens
        return getattr(SamplingParams(**self.sampling), name)

    def changed(self, name: str, text: str) -> Settings:
        """The settings with another value of one.

        Args:
            name: One of ``NAMES``.
            text: The value; of a seed also off.

        Raises:
            RequestError: It is no number, or outside its range.
        """
        is_off = (name, text) == ("seed", _OFF)
        value: Any = None if is_off else _number(name, text)
        if name == _MAX_TOKENS:
            check_max_tokens(value)
            return replace(self, max_tokens=value)
        SamplingParams(**self.sampling | {name: value})  # checks it
        if name not in self.given:  # a seed
            return replace(self, sampling=self.sampling | {name: value})
        given = {**self.given, name: value}
        # Whoever leaves greedy text gets the checkpoint's filters, as at the start.
        sampling = self.sampling | self.defaults.settings(**given)
        return replace(self, sampling=sampling, given=given)


def _number(name: str, text: str) -> Any:
    """A setting's value."""
    kind = _TYPES[name]
    try:
        return kind(text)
    except ValueError:
        what = "a number" if kind is float else "a whole number"
        raise RequestError(
            f"{name} must be {what}{', or off' * (name == 'seed')}: got "
            f"{text[:40]!r}. Without a value it is shown."
        ) from None
