"""Requests: a prompt and its settings, checked against a pair."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx

from ..constants import AUTO
from ..engine.request import Request, RowConstraint
from ..errors import RequestError
from ..pair.pair import Pair
from ..sampling.host import LogitsProcessor, Sampler
from ..sampling.mlx_lm_samplers import sampler_params
from ..sampling.params import SamplingParams, plain
from .settings import NO_LIMIT, is_whole


def make_request(
    pair: Pair,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: SamplingParams,
    eos: frozenset[int],
    logits_processors: Sequence[LogitsProcessor] | None = None,
    sampler: Sampler | None = None,
    constraint: RowConstraint | None = None,
    **options: Any,
) -> Request:
    """Check a prompt and make a request of it and of checked settings.

    Args:
        pair: Target and drafter.
        prompt: Token ids.
        max_tokens: See ``GenerationSettings``; checked.
        sampling: Checked settings.
        eos: Tokens that end the sequence.
        logits_processors: See ``GenerationSettings``.
        sampler: See ``GenerationSettings``.
        constraint: What the text must be; None for anything.
        options: Further fields of ``Request``, checked.

    Raises:
        RequestError: The prompt is empty or holds an id that the target does not know;
            processors or sampler are no functions; a sampler beside other settings.
    """
    if sampler is not None:
        sampling, sampler = _resolve_sampler(sampler, sampling)
    return Request(
        prompt=check_prompt(pair, prompt),
        max_tokens=None if max_tokens == NO_LIMIT else max_tokens,
        sampling=sampling,
        eos_token_ids=eos,
        logits_processors=_check_processors(logits_processors),
        sampler=sampler,
        constraint=constraint,
        **options,
    )


def _resolve_sampler(
    sampler: Sampler, sampling: SamplingParams
) -> tuple[SamplingParams, Sampler | None]:
    """The settings that a sampler stands for, or the sampler where they are unknown.

    Raises:
        RequestError: It is no function, or a setting that it would override is given.
    """
    if not callable(sampler):
        raise RequestError(
            f"sampler must be a function: got {sampler!r}. mlx-lm's make_sampler makes "
            "one."
        )
    params = sampler_params(sampler)
    # A seed still has a meaning for known settings, and so has how it is used.
    free = set() if params is None else {"seed", "reproducible"}
    defaults = asdict(SamplingParams())
    given = [
        f"{name}={value!r}"
        for name, value in asdict(sampling).items()
        if value != defaults[name] and name not in free
    ]
    if given:
        raise RequestError(
            f"settings of sampling must not stand beside a sampler: got "
            f"{', '.join(given)}, expected the sampler alone. Leave out one of them."
        )
    if params is None:
        return sampling, sampler
    seed, reproducible = sampling.seed, sampling.reproducible
    return replace(params, seed=seed, reproducible=reproducible), None


def _check_processors(
    processors: Sequence[LogitsProcessor] | None,
) -> tuple[LogitsProcessor, ...]:
    """The processors of a request.

    Raises:
        RequestError: They are not a list of functions.
    """
    found = () if processors is None else processors
    if isinstance(found, Iterable):
        found = tuple(found)
        if all(callable(processor) for processor in found):
            return found
    raise RequestError(
        f"logits_processors must be a list of functions: got {processors!r}. For one "
        "write [function]."
    )


def check_prompt(pair: Pair, prompt: Sequence[int] | mx.array) -> list[int]:
    """A prompt's token ids as a list of ints.

    Raises:
        RequestError: The prompt is empty or holds an id that the target does not know.
    """
    tokens = check_tokens(pair, prompt)
    if not tokens:
        raise RequestError(
            "prompt must hold at least one token: got none. Give some text, or a "
            "begin-of-sequence token."
        )
    return tokens


def check_tokens(pair: Pair, given: Sequence[int] | mx.array) -> list[int]:
    """Token ids as a list of ints, maybe of none.

    Raises:
        RequestError: One of them is not the target's.
    """
    tokens = [plain(token) for token in listed(given)]
    for token in tokens:
        if not is_whole(token):
            raise RequestError(
                f"token ids must be whole numbers: got {token!r}. Encode text with "
                "the target's tokenizer first."
            )
        if not 0 <= token < pair.vocab_size:
            raise RequestError(
                "token ids must be below the vocabulary's size: got "
                f"{token}, expected 0 to {pair.vocab_size - 1}. Is this the target's "
                "own tokenizer?"
            )
    return tokens


def drafts_of(
    pair: Pair,
    num_draft_tokens: int | str | None,
    draft_source: str = AUTO,
) -> int | None:
    """The K of a request, of what ``check_num_draft_tokens`` has let through.

    Args:
        pair: Target and drafter.
        num_draft_tokens: What the caller asks for.
        draft_source: Where drafts may come from.

    Returns:
        K; None for the controller's choice.

    Raises:
        RequestError: Drafts are asked for without a drafter.
    """
    if num_draft_tokens is None or isinstance(num_draft_tokens, str):
        return None
    if num_draft_tokens and not pair.draft_sources(draft_source):
        raise RequestError(
            f"num_draft_tokens must be 0 without a drafter: got {num_draft_tokens}. "
            "Load the pair with a drafter, or set draft_source to lookup."
        )
    return int(num_draft_tokens)


def listed(prompt: Any) -> list[Any]:
    """The entries of a prompt, or of a batch of them.

    Raises:
        RequestError: It is a text, or no sequence.
    """
    prompt = plain(prompt)
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Iterable):
        raise RequestError(
            f"a prompt must be a sequence of token ids: got {prompt!r}. Encode text "
            "with the target's tokenizer first."
        )
    return list(prompt)


def eos_set(eos_token_ids: Iterable[int]) -> frozenset[int]:
    """Tokens that end a sequence.

    Raises:
        RequestError: They are no token ids.
    """
    ids = plain(eos_token_ids)
    ids = list(ids) if isinstance(ids, Iterable) else [None]
    if not all(is_whole(token) for token in ids):
        raise RequestError(
            f"eos_token_ids must be token ids: got {eos_token_ids!r}. For one write "
            "(1,), for none ()."
        )
    return frozenset(ids)
