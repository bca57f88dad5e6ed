"""How to generate: the settings that text and tokens share, and a check for each.

Knows nothing of prompts, models or tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, TypedDict

from ..constants import AUTO, DRAFT_SOURCES, MAX_DRAFT_TOKENS, MAX_LOGPROBS
from ..engine.prefill import DEFAULT_PREFILL_STEP_SIZE
from ..engine.route import check_mode
from ..errors import RequestError
from ..sampling.host import LogitsProcessor, Sampler
from ..sampling.params import SamplingParams

NO_LIMIT = -1  # mlx-lm's word for an endless generation


class Keywords(TypedDict, total=False):
    """The fields of ``GenerationSettings`` that have a default, for type checkers."""

    num_draft_tokens: int | str | None
    draft_source: str
    exactness: str
    temp: float
    top_p: float
    top_k: int
    min_p: float
    xtc_probability: float
    xtc_threshold: float
    xtc_special_tokens: Sequence[int]
    seed: int | None
    reproducible: bool
    logits_processors: Sequence[LogitsProcessor] | None
    sampler: Sampler | None
    prefill_step_size: int


@dataclass(frozen=True)
class GenerationSettings:
    """The keywords of ``stream_generate``, ``generate`` and ``generate_tokens``.

    Greedy text does not depend on ``num_draft_tokens``: it is the target's own; for a
    seed it is a function of seed and target. Text that is sampled without a seed
    follows the target's distribution and accepts more drafts.

    Attributes:
        max_tokens: Tokens to generate for each prompt, 1 or more; -1 for no limit.
        num_draft_tokens: Drafts per round, 0 (plain decoding) to 8; ``"auto"`` or
            None for as many in each round as are expected to be fastest.
        draft_source: Where drafts come from: ``"drafter"``; ``"lookup"``, the text
            itself, where its newest tokens stood before, which needs no drafter;
            ``"auto"``, in each round the one that is expected to be faster, and
            nothing without a drafter.
        exactness: ``"auto"``: the bytes of plain decoding, where a short probe (once
            per machine and pair) proves that drafting gives them; elsewhere drafts are
            judged all the same, and the statistics say so. ``"exact"``: only what was
            proved, without drafts if need be; plain decoding goes through the same
            kernels. ``"fast"``: nothing is proved.
        temp: Temperature; 0 is greedy.
        top_p: Probability mass to keep, 0 to 1; 0 and 1 switch it off.
        top_k: Number of tokens to keep; 0 switches it off.
        min_p: Smallest share of the best token's probability to keep; 0 is off.
        xtc_probability: How often XTC excludes all top choices but the least likely of
            them, 0 to 1; 0 is off.
        xtc_threshold: Probability above which a token is a top choice, 0 to 0.5.
        xtc_special_tokens: Token ids that XTC never excludes.
        seed: 0 to 2**64 - 1, the same for all prompts: the text is then a function of
            seed and target alone. None draws a fresh one.
        reproducible: False accepts more drafts in spite of a seed, as without one: the
            text then depends on the number of drafts and their source too.
        logits_processors: Functions ``(tokens [n], logits [1, V]) -> logits [1, V]``
            as mlx-lm calls them, the same for all prompts. They see exactly the
            histories of plain decoding, each once and in order; drafts are then
            accepted as with a seed, whatever ``reproducible`` says: lossless, and a
            seed's text does not depend on ``num_draft_tokens``. Only a stop string is
            found after the round: they may have seen the rest of its tokens then.
        sampler: A function ``(log-probabilities [1, V]) -> token [1]`` that chooses
            every token, in place of ``temp``, ``seed`` and filters. One whose settings
            are known (of mlx-lm's make_sampler) stands for those settings; any other
            is called once for each token, in order, and a draft stands if it is the
            token that it chooses.
        prefill_step_size: Most prompt tokens in one forward.
        sampling: How tokens are chosen, of the fields above.

    Raises:
        RequestError: A setting is outside its range.
    """

    max_tokens: int
    num_draft_tokens: int | str | None = None
    draft_source: str = AUTO
    exactness: str = AUTO
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: Sequence[int] = ()
    seed: int | None = None
    reproducible: bool = True
    logits_processors: Sequence[LogitsProcessor] | None = None
    sampler: Sampler | None = None
    prefill_step_size: int = DEFAULT_PREFILL_STEP_SIZE
    sampling: SamplingParams = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check every field; processors and sampler are checked with the request."""
        check_max_tokens(self.max_tokens)
        check_num_draft_tokens(self.num_draft_tokens)
        check_draft_source(self.draft_source)
        check_mode(self.exactness)
        check_prefill_step_size(self.prefill_step_size)
        names = [each.name for each in fields(SamplingParams)]
        sampling = SamplingParams(**{name: getattr(self, name) for name in names})
        object.__setattr__(self, "sampling", sampling)


def check_max_tokens(value: Any) -> None:
    """Check how many tokens are asked for.

    Raises:
        RequestError: Not 1 or more, and not ``NO_LIMIT``.
    """
    if not is_whole(value) or (value < 1 and value != NO_LIMIT):
        raise RequestError(
            "max_tokens must be 1 or more, or -1 for no limit: got "
            f"{value!r}. Ask for at least one token."
        )


def check_num_draft_tokens(value: Any) -> None:
    """Check a number of drafts, or what stands for the controller's choice.

    Raises:
        RequestError: Not 0 to 8, auto or None.
    """
    if value is None or value == AUTO:
        return
    if not is_whole(value) or not 0 <= value <= MAX_DRAFT_TOKENS:
        raise RequestError(
            f"num_draft_tokens must be from 0 to {MAX_DRAFT_TOKENS}, or auto: got "
            f"{value!r}. auto suits most pairs."
        )


def check_draft_source(value: Any) -> None:
    """Check where drafts come from.

    Raises:
        RequestError: Not one of ``DRAFT_SOURCES``.
    """
    if not isinstance(value, str) or value not in DRAFT_SOURCES:
        raise RequestError(
            f"draft_source must be {', '.join(DRAFT_SOURCES[:-1])} or "
            f"{DRAFT_SOURCES[-1]}: got {value!r}. auto takes the faster one."
        )


def check_prefill_step_size(value: Any) -> None:
    """Check how many prompt tokens a forward reads.

    Raises:
        RequestError: Not 1 or more.
    """
    if not is_whole(value) or value < 1:
        raise RequestError(
            f"prefill_step_size must be 1 or more: got {value!r}. "
            f"{DEFAULT_PREFILL_STEP_SIZE} suits most machines."
        )


def check_num_logprobs(value: Any) -> None:
    """Check how many log-probabilities are asked for.

    Raises:
        RequestError: Not 0 to 64, and not None.
    """
    if value is not None and (not is_whole(value) or not 0 <= value <= MAX_LOGPROBS):
        raise RequestError(
            f"num_logprobs must be from 0 to {MAX_LOGPROBS}, or None: got "
            f"{value!r}. 0 gives the token's own log-probability."
        )


def check_max_thinking_tokens(value: Any) -> None:
    """Check how many tokens of thoughts are asked for.

    Raises:
        RequestError: Not 0 or more, and not None.
    """
    if value is not None and (not is_whole(value) or value < 0):
        raise RequestError(
            f"max_thinking_tokens must be 0 or more: got {value!r}. Leave it out for "
            "no limit."
        )


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, as which no bool counts."""
    return isinstance(value, Integral) and not isinstance(value, bool)
