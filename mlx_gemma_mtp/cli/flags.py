"""What the flags of a command mean once a pair is there.

What can be said without one stands in ``checks``; what goes to the terminal is the
command's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from .checks import given_settings, penalties, xtc_settings

if TYPE_CHECKING:
    from ..generation.cache_file import SavedPrompt
    from ..sampling.defaults import SamplingDefaults

EMBEDDED_NOTE = (
    "No --model: using the embedded pair, a tiny model that completes Python code."
)
_LABELS = {
    "temp": "temperature",
    "top_k": "top-k",
    "top_p": "top-p",
    "min_p": "min-p",
}


def open_cache_file(args: argparse.Namespace) -> SavedPrompt | None:
    """What --prompt-cache-file names, if anything; its model is that of the flags then.

    Raises:
        RequestError: The flags name another model, or a prompt from the beginning.
    """
    if args.prompt_cache_file is None:
        return None
    if args.system_prompt is not None:
        raise RequestError(
            "--system-prompt and --prompt-cache-file exclude each other: got both. The "
            "prompt begins in the file."
        )
    from ..generation.cache_file import read_cache_file

    saved = read_cache_file(args.prompt_cache_file)
    if args.model is None:
        args.model = saved.model
    saved.check_model(args.model)
    return saved


def check_lengths(args: argparse.Namespace) -> None:
    """Check the numbers of tokens: of the text, of a round's drafts, of a chunk.

    Raises:
        RequestError: One is outside its range.
    """
    from ..generation.settings import (
        check_max_tokens,
        check_num_draft_tokens,
        check_prefill_step_size,
    )

    check_max_tokens(args.max_tokens)
    check_num_draft_tokens(args.num_draft_tokens)
    check_prefill_step_size(args.prefill_step_size)


def load_model(
    args: argparse.Namespace, tokenizer_config: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """Model and tokenizer as the flags name them, the embedded pair without --model."""
    from ..pair.load import embedded_pair_path, load

    return load(
        embedded_pair_path() if args.model is None else args.model,
        speculative_decoding=not args.no_draft,
        draft_model=args.draft_model,
        tokenizer_config=tokenizer_config,
        adapter_path=args.adapter_path,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )


def sampling_settings(
    args: argparse.Namespace, defaults: SamplingDefaults, tokenizer: Any
) -> dict[str, Any]:
    """How to sample: as the flags say, else as the checkpoint says.

    Returns:
        Keywords for ``stream_generate``.
    """
    settings = defaults.settings(**given_settings(args))
    settings |= {"seed": args.seed, "reproducible": not args.no_reproducible}
    if args.xtc_probability:
        # What mlx-lm's own programs keep from XTC: line ends, and the end.
        special = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
        settings |= {**xtc_settings(args), "xtc_special_tokens": special}
    return settings


def describe_sampling(
    args: argparse.Namespace, defaults: SamplingDefaults
) -> list[str]:
    """What to say of the sampling, a few lines; none for greedy text."""
    settings = defaults.settings(**given_settings(args))
    lines = [_describe_settings(args, settings)] if settings["temp"] else []
    if defaults.repetition_penalty and not args.repetition_penalty:
        lines.append(
            "The repetition_penalty in generation_config.json is not applied; "
            "--repetition-penalty sets one."
        )
    return lines


def _describe_settings(args: argparse.Namespace, settings: dict[str, Any]) -> str:
    """The settings that are on, with where they come from."""
    given = given_settings(args)
    is_on = {
        "temp": True,
        "top_k": settings["top_k"] > 0,
        "top_p": 0 < settings["top_p"] < 1,
        "min_p": settings["min_p"] > 0,
    }
    own: list[str] = []
    recommended: list[str] = []
    for name, label in _LABELS.items():
        if is_on[name]:
            place = recommended if given[name] is None else own
            place.append(f"{label} {settings[name]}")
    if args.xtc_probability:
        own.append(f"XTC {args.xtc_probability} above {args.xtc_threshold}")
    parts = [", ".join(own)] if own else []
    if recommended:
        parts.append(f"{', '.join(recommended)} (generation_config.json)")
    if args.temp is None:
        parts.append("--temp 0 for greedy")
    return f"Sampling: {'; '.join(parts)}."


def logits_processors(
    args: argparse.Namespace, logit_bias: dict[int, float], vocab_size: int
) -> list[Any]:
    """What changes logits before a token is chosen, in order; perhaps nothing.

    Raises:
        RequestError: --logit-bias names a token that the model does not have.
    """
    for token in logit_bias:
        if token >= vocab_size:
            raise RequestError(
                f"--logit-bias must name tokens from 0 to {vocab_size - 1}: got "
                f"{token}. Is this the model's own token id?"
            )
    settings = penalties(args)
    if not logit_bias and not settings:
        return []
    from mlx_lm.sample_utils import make_logits_processors

    return list(make_logits_processors(logit_bias or None, **settings))


def add_eos_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Let more tokens end the text, each given by its text or its id.

    Raises:
        RequestError: One is no token of the model.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab() if tokens else {}
    ids = set(vocabulary.values())
    for token in tokens:
        # An unknown text would become the unknown token's id.
        if not (int(token) in ids if token.isdecimal() else token in vocabulary):
            raise RequestError(
                f"--extra-eos-token must be a token of the model: got {token!r}. Give "
                "a token's text or id."
            )
        tokenizer.add_eos_token(token)
