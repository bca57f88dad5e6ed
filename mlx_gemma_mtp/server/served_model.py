"""The model behind the server: loaded, and made ready to decode for many."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors

from ..cache.kept import KeptCaches
from ..cache.rungs import rung_interval
from ..cache.slabs import SlabLayout, stepped_capacity
from ..checkpoints.template_files import missing_template_note
from ..constants import AUTO
from ..engine.capacity import longest_text, seats_for, slots_for
from ..engine.request import Request
from ..errors import RequestError
from ..generation.prompt_folder import prompt_folder
from ..generation.requests import make_request
from ..generation.tokens import make_batch_decoder
from ..markup.answer import marks_of
from ..models.target import text_model
from ..pair.load import embedded_pair_path, load
from ..pair.pair import Pair, pair_of
from ..sampling.defaults import SamplingDefaults
from ..sampling.host import without_early_end
from .choice import Choice
from .prompts import MIN_TOKENS
from .settings import Settings
from .transcript import Transcript
from .worker import Means

logger = logging.getLogger("mlx_gemma_mtp.server")

_NUM_SHARES = 4  # requests without a limit that fit into memory together
_NO_TEMPLATE = "messages are refused, /v1/completions works (--chat-template names one)"


@dataclass(frozen=True)
class ServedModel:
    """A model that is ready.

    Attributes:
        settings: The command's.
        means: What the worker decodes with.
        tokenizer: mlx-lm's.
        sampling: ``temp``, ``top_p``, ``top_k``, ``min_p`` of requests that do not say.
        model_len: Most tokens of prompt and answer together.
        vocab_size: Number of token ids.
        max_kv_bytes: The budget of running requests' caches.
        longest_alone: Tokens of one request that fit into it.
        longest_shared: Tokens of each of several requests that fit into it together.
        drafter_name: What the drafter is called; empty without one.
        wired: Keeps the weights in memory while something is decoded.
    """

    settings: Settings
    means: Means
    tokenizer: Any
    sampling: dict[str, Any]
    model_len: int
    vocab_size: int
    max_kv_bytes: int
    longest_alone: int
    longest_shared: int
    drafter_name: str
    wired: Callable[[], AbstractContextManager[None]]


def load_served_model(settings: Settings) -> ServedModel:
    """Load the model that the settings name.

    Raises:
        MTPError: It cannot be loaded, or a setting does not fit it.
    """
    template = {} if settings.chat_template is None else _template(settings)
    model, tokenizer = load(
        embedded_pair_path() if settings.model is None else settings.model,
        speculative_decoding=settings.is_drafting,
        draft_model=settings.draft_model,
        tokenizer_config=template,
        adapter_path=settings.adapter_path,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )
    if not tokenizer.has_chat_template:
        logger.warning("%s", missing_template_note(tokenizer, _NO_TEMPLATE))
    return make_engine(settings, pair_of(model), tokenizer)


def make_engine(settings: Settings, pair: Pair, tokenizer: Any) -> ServedModel:
    """Make a loaded model ready.

    Raises:
        MTPError: A setting does not fit it.
    """
    limits = settings.limits
    max_kv_bytes = limits.kv_bytes or pair.default_kv_bytes
    check_memory(settings, pair.rounds.target.layout)
    logger.info("%.1f GB for keys and values", max_kv_bytes / 1e9)
    decoder = make_batch_decoder(
        pair,
        num_draft_tokens=settings.num_draft_tokens,
        draft_source=settings.draft_source,
        max_rows=limits.rows,
        max_kv_bytes=max_kv_bytes,
        prefill_step_size=settings.prefill_step_size,
    )
    layout = pair.rounds.target.layout
    eos = frozenset(tokenizer.eos_token_ids)
    marks = marks_of(tokenizer)
    return ServedModel(
        settings=settings,
        means=Means(
            decoder=decoder,
            make_request=lambda choice: request_of(
                pair, choice, eos, settings.draft_source
            ),
            make_transcript=lambda choice: Transcript(
                tokenizer.detokenizer, choice, marks
            ),
            kept=_kept(settings, pair),
            max_rows=limits.rows,
            leaves_room=lambda choices: leaves_room(layout, max_kv_bytes, choices),
            window=layout.window,
            rung_interval=rung_interval(settings.prefill_step_size),
            memory=lambda: (mx.get_active_memory(), mx.get_peak_memory()),
        ),
        tokenizer=tokenizer,
        sampling=_sampling(settings, pair.sampling_defaults),
        model_len=_model_len(pair, limits.model_len),
        vocab_size=pair.vocab_size,
        max_kv_bytes=max_kv_bytes,
        longest_alone=longest_text(layout, max_kv_bytes),
        longest_shared=longest_text(layout, max_kv_bytes // _NUM_SHARES),
        drafter_name=_drafter_name(pair),
        wired=pair.wired,
    )


def leaves_room(
    layout: SlabLayout, max_kv_bytes: int, choices: Sequence[Choice]
) -> bool:
    """Whether one more row fits into memory beside those of some choices.

    A batch's rows all have the slots of the longest one.
    """
    longest = max(len(choice.prompt) + choice.max_tokens for choice in choices)
    num_bytes = layout.num_bytes(seats_for(len(choices) + 1), slots_for(longest))
    return num_bytes <= max_kv_bytes


def check_memory(settings: Settings, layout: SlabLayout) -> None:
    """Check what memory was stated for caches.

    Args:
        settings: The command's.
        layout: The shapes of the model's caches.

    Raises:
        RequestError: It never holds one.
    """
    asked = settings.limits.kv_bytes
    least = layout.num_bytes(1, stepped_capacity(1))
    if asked is not None and asked < least:
        raise RequestError(
            f"--max-kv-bytes must hold a request, which takes {least} bytes or more of "
            f"this model: got {asked}. Leave it out for what the machine has."
        )
    asked, least = settings.prompt_cache_bytes, layout.num_bytes(1, MIN_TOKENS)
    if 0 < asked < least:
        raise RequestError(
            f"--prompt-cache-bytes must hold {MIN_TOKENS} tokens, which take {least} "
            f"bytes of this model, or be 0 for none: got {asked}. State more."
        )


def request_of(
    pair: Pair, choice: Choice, eos: frozenset[int], draft_source: str = AUTO
) -> Request:
    """What the decoder is asked for; called in its thread.

    Raises:
        RequestError: The choice cannot be decoded.
    """
    source = choice.draft_source if draft_source == AUTO else draft_source
    sources = pair.draft_sources(source)
    is_there = sources and choice.draft_source in (AUTO, source)
    processors = make_logits_processors(**choice.penalties)
    ends = eos | choice.stop_token_ids
    if choice.min_tokens and ends:
        length = len(choice.prompt)
        processors.append(without_early_end(length, choice.min_tokens, ends))
    return make_request(
        pair,
        choice.prompt,
        max_tokens=choice.max_tokens,
        sampling=choice.sampling,
        eos=choice.stop_token_ids if choice.ignores_eos else ends,
        logits_processors=processors,
        constraint=choice.constraint,
        num_logprobs=choice.num_logprobs,
        max_draft_tokens=choice.max_draft_tokens if is_there else 0,
        draft_source=source,
        prediction=choice.prediction,
    )


def _template(settings: Settings) -> dict[str, Any]:
    return {"chat_template": settings.chat_template}


def _kept(settings: Settings, pair: Pair) -> KeptCaches | None:
    if not (settings.prompt_cache_size and settings.prompt_cache_bytes):
        return None
    return KeptCaches(
        max_size=settings.prompt_cache_size,
        max_bytes=settings.prompt_cache_bytes,
        min_tokens=MIN_TOKENS,
        folder=prompt_folder(
            pair,
            settings.prompt_cache_dir,
            max_pending=settings.prompt_cache_bytes,
            max_bytes=settings.prompt_cache_disk_bytes,
        ),
    )


def _sampling(settings: Settings, defaults: SamplingDefaults) -> dict[str, Any]:
    """How to sample where a request does not say: as the flags say, else the file.

    The filters are those of sampled text, which a request may ask for.

    Raises:
        CheckpointError: A setting in the file is none.
    """
    given = settings.given_sampling
    temp = defaults.settings(**given)["temp"]
    return {**defaults.settings(**{**given, "temp": temp or 1.0}), "temp": temp}


def _model_len(pair: Pair, asked: int | None) -> int:
    """Tokens that a prompt and its answer may have.

    Raises:
        RequestError: More are asked for than the model was made for.
    """
    most = int(text_model(pair.target).args.max_position_embeddings)
    if asked is not None and asked > most:
        raise RequestError(
            f"--max-model-len must be at most the model's {most}: got {asked}. Leave "
            "it out for the model's."
        )
    return asked or most


def _drafter_name(pair: Pair) -> str:
    """The drafter as people call it: its Hub id, or the last part of its path."""
    if pair.drafter is None:
        return ""
    name = pair.drafter_source.removeprefix("drafter ").partition(": ")[0]
    return Path(name).name if Path(name).exists() else name
