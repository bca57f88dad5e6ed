"""What stands in for mlx-lm's functions while the hook is installed.

Each replacement asks one question, whether the call is about a model that decodes with
a drafter of this package, and leaves every other call to mlx-lm's own function, with
the same objects. Knows nothing of how names are replaced.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoints.checkpoint import open_checkpoint, read_json
from ..checkpoints.hub import fetch, fetch_config
from ..checkpoints.packing import without_stale_keys
from ..checkpoints.tokenizer import model_kind
from ..constants import AUTO, DRAFTER_MODEL_TYPES, TARGET_MODEL_TYPES
from ..distributed.alone import check_alone
from ..engine.stats import DraftTally
from ..errors import CheckpointError, PairingError, RequestError
from ..generation.response import GenerationResponse
from ..generation.settings import check_draft_source, check_num_draft_tokens
from ..generation.text import stream_generate
from ..models.drafter import Drafter
from ..models.target import text_model
from ..pair.load import attach_drafter
from ..pair.pair import carries_drafter, why_no_drafter
from ..sampling.mlx_lm_samplers import sampler_params
from .batch_generator import BatchGenerator as DraftingBatchGenerator

logger = logging.getLogger("mlx_gemma_mtp")

_SEED_BITS = 31  # of one number of mx.random.randint
_EMBEDDINGS = "input_embeddings (images) are mlx-lm's own"
_WHY_NO_QUANTIZED_CACHE = (
    "mlx-lm cannot quantize the rotating caches of Gemma 4's sliding layers (it says "
    "'RotatingKVCache Quantization NYI')"
)


@dataclass(frozen=True)
class Settings:
    """What a call of mlx-lm's does not say.

    Attributes:
        speculative_decoding: Whether ``load`` looks for a drafter.
        draft_model: The drafter that ``load`` takes, a folder or a Hub id; None for
            the one that it finds.
        num_draft_tokens: Drafts per round, ``"auto"``, or None for the same.
        draft_source: Where drafts come from, see ``GenerationSettings``.

    Raises:
        RequestError: ``num_draft_tokens`` or ``draft_source`` is outside its range.
    """

    speculative_decoding: bool = True
    draft_model: str | Path | None = None
    num_draft_tokens: int | str | None = None
    draft_source: str = AUTO

    def __post_init__(self) -> None:
        check_num_draft_tokens(self.num_draft_tokens)
        check_draft_source(self.draft_source)


@dataclass(frozen=True)
class Own:
    """mlx-lm's own functions, as they were found."""

    load: Callable[..., tuple[Any, ...]]
    stream_generate: Callable[..., Generator[Any, None, None]]
    BatchGenerator: type
    seed: Callable[..., None]


class _Thread(threading.local):
    """What a thread has done; ``mx.random`` has a state per thread too."""

    is_seeded = False


@dataclass(eq=False)
class Hook:
    """mlx-lm's own functions, their replacements, and whether these are in force.

    Attributes:
        own: mlx-lm's own functions.
        is_on: Whether replacements do more than call mlx-lm's own. A copy that
            somebody took of one is switched by it too.
        settings: What calls do not say.
        tally: What drafts have given since the replacements are in force.
        replacements: The functions that stand in, by name.
    """

    own: Own
    is_on: bool = field(default=False, init=False)
    settings: Settings = field(default_factory=Settings, init=False)
    tally: DraftTally = field(default_factory=DraftTally, init=False)
    replacements: dict[str, Any] = field(init=False)
    _thread: _Thread = field(init=False)

    def __post_init__(self) -> None:
        self.replacements = {
            "load": _load(self),
            "stream_generate": _stream_generate(self),
            "BatchGenerator": _batch_generator(self),
            "seed": _seed(self),
        }

    def switch_on(self) -> None:
        """Put the replacements in force; seeds of before do not count."""
        self._thread = _Thread()
        self.tally = DraftTally()
        self.is_on = True

    def note_seed(self) -> None:
        """Remember that this thread has seeded MLX."""
        self._thread.is_seeded = True

    def draw_seed(self, sampler: object) -> int | None:
        """A generation's seed, from MLX's random numbers where they were seeded.

        Args:
            sampler: What chooses the tokens. Only one of mlx-lm's that draws has use
                for a seed: any other is called itself, in mlx-lm's order.
        """
        params = sampler_params(sampler) if sampler is not None else None
        if not self._thread.is_seeded or params is None or params.temp <= 0:
            return None
        numbers = mx.random.randint(0, 2**_SEED_BITS - 1, (2,))
        high, low = cast(list[int], numbers.tolist())
        return high << _SEED_BITS | low


def refuse_quantized_cache(kv_bits: object) -> None:
    """Refuse mlx-lm's quantized K/V cache for Gemma 4.

    Raises:
        RequestError: ``kv_bits`` is given.
    """
    if kv_bits is not None:
        raise RequestError(
            f"kv_bits (--kv-bits) must not be given for Gemma 4: got {kv_bits}. "
            f"{_WHY_NO_QUANTIZED_CACHE}. Leave it out."
        )


def _load(hook: Hook) -> Callable[..., tuple[Any, ...]]:
    own = hook.own.load
    signature = inspect.signature(own)

    @wraps(own)
    def load(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if not hook.is_on:
            return own(*args, **kwargs)
        is_wanted = kwargs.pop("speculative_decoding", None)
        if is_wanted is None:
            is_wanted = hook.settings.speculative_decoding
        named = kwargs.pop("draft_model", None)
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        path, revision = call.arguments["path_or_hf_repo"], call.arguments["revision"]
        if settings := _float_settings(path, revision):
            for name, ours in settings.items():
                call.arguments[name] = {**ours, **(call.arguments[name] or {})}
            args, kwargs = call.args, call.kwargs
        try:
            loaded = own(*args, **kwargs)
        except ValueError as error:
            _explain_drafter(path, error)
            raise
        model = loaded[0]
        if is_wanted and named is not None:
            text_model(model)  # a drafter for another model is a mistake
        if is_wanted and _is_target(model):
            check_alone("mlx-lm with the hook")
            drafter = hook.settings.draft_model if named is None else named
            attach_drafter(model, path, revision=revision, draft_model=drafter)
        return loaded

    own_parameters = signature.parameters.values()
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("speculative_decoding", "draft_model")
    ]
    load.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own_parameters, *extra]
    )
    return load


def _is_target(model: nn.Module) -> bool:
    """Whether a model is a Gemma 4."""
    try:
        text_model(model)
    except PairingError:
        return False
    return True


def _float_settings(path: str | Path, revision: str | None) -> dict[str, Any]:
    """Arguments for mlx-lm where the config of float weights names a quantization.

    Quantization-aware trained ones do, and what was merged. Empty for everything else,
    of which nothing but the config is fetched here.
    """
    try:
        config = read_json(fetch_config(path, revision))
        if config.get("model_type") not in TARGET_MODEL_TYPES:
            return {}
        checkpoint = open_checkpoint(fetch(path, revision))
    except CheckpointError:
        return {}  # mlx-lm says it in its own words
    stale = without_stale_keys(checkpoint)
    if stale is None:
        return {}
    return {"model_config": stale, "tokenizer_config": model_kind(checkpoint.folder)}


def _explain_drafter(path: str | Path, error: Exception) -> None:
    """Say where a drafter is named, if that is what mlx-lm refused to load.

    Raises:
        PairingError: It is.
    """
    if any(kind in str(error) for kind in DRAFTER_MODEL_TYPES):
        raise PairingError(
            f"the model must be a target: got {path}, a drafter. Name it where its "
            "target is loaded: load(target, draft_model=drafter), or mlx_gemma_mtp.run "
            "--draft-model drafter before the program."
        ) from error


def _stream_generate(hook: Hook) -> Callable[..., Generator[Any, None, None]]:
    own = hook.own.stream_generate

    @wraps(own)
    def hooked(
        model: nn.Module,
        tokenizer: Any,
        prompt: Any,
        max_tokens: int = 256,
        draft_model: Any = None,
        *stream: Any,
        **kwargs: Any,
    ) -> Generator[Any, None, None]:
        call = (model, tokenizer, prompt, max_tokens, draft_model)
        why_own = _why_own(model, draft_model, kwargs) if hook.is_on else ""
        if hook.is_on and not why_own:
            kwargs.pop("stream", None)  # a round runs on the thread's own
            return _decode(hook, *call, **kwargs)
        hook.tally.why_none = why_own
        return own(*call, *stream, **kwargs)

    return hooked


def _why_own(model: nn.Module, draft_model: object, kwargs: dict[str, Any]) -> str:
    """Why mlx-lm decodes, in words; empty where this package does."""
    if draft_model is not None:
        is_ours = isinstance(draft_model, Drafter)
        return "" if is_ours else "the draft model was another one, of mlx-lm's"
    if not carries_drafter(model):
        return _why_no_drafter(model)
    if kwargs.get("input_embeddings") is None:
        return ""
    _note_embeddings()
    return _EMBEDDINGS


def _why_no_drafter(model: nn.Module) -> str:
    return why_no_drafter(model) if _is_target(model) else "the model is no Gemma 4"


@cache
def _note_embeddings() -> None:
    """Say once that images switch drafting off."""
    logger.warning("%s", f"decoding without a drafter: {_EMBEDDINGS}")


def _decode(
    hook: Hook,
    model: nn.Module,
    tokenizer: Any,
    prompt: Any,
    max_tokens: int,
    draft_model: Drafter | None,
    *,
    sampler: Any = None,
    logits_processors: Any = None,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    num_draft_tokens: int | None = None,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 0,
    input_embeddings: None = None,
) -> Generator[GenerationResponse, None, None]:
    """``mlx_lm.generate.stream_generate`` with a drafter; nothing runs before ``next``.

    Of mlx-lm's keywords ``max_kv_size`` has no effect, as there: Gemma 4 makes its own
    caches. ``num_draft_tokens`` counts together with ``draft_model`` only, as there:
    mlx-lm's programs always pass it.
    """
    if max_tokens == 0:
        raise ValueError(  # mlx-lm's
            "Maximum number of tokens must be non-zero (use -1 for no limit)."
        )
    refuse_quantized_cache(kv_bits)
    if input_embeddings is not None:
        raise ValueError("Speculative decoding does not support input embeddings.")
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)  # with the ends that mlx-lm gives it
    num_drafts = hook.settings.num_draft_tokens
    if draft_model is not None and num_draft_tokens is not None:
        num_drafts = num_draft_tokens
    responses = stream_generate(
        model,
        tokenizer,
        _encode(tokenizer, prompt) if isinstance(prompt, str) else prompt,
        max_tokens=max_tokens,
        draft_model=draft_model,
        num_draft_tokens=num_drafts,
        draft_source=hook.settings.draft_source,
        seed=hook.draw_seed(sampler),
        sampler=sampler,
        logits_processors=logits_processors,
        prefill_step_size=prefill_step_size,
        prompt_cache=prompt_cache,
        prompt_progress_callback=prompt_progress_callback,
    )
    with closing(responses):
        for response in responses:
            hook.tally.add(1, response.from_draft)
            hook.tally.why_none = response.stats.why_not_engaged
            yield response


def _encode(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """The token ids that mlx-lm makes of a text, which count here."""
    bos = tokenizer.bos_token
    adds_special = bos is None or not text.startswith(bos)
    return list(tokenizer.encode(text, add_special_tokens=adds_special))


def _batch_generator(hook: Hook) -> type:
    """A subclass of mlx-lm's: programs make one, subclass it and ask for its type.

    Only ``__new__`` can give another object to who calls a class.
    """
    own: Any = hook.own.BatchGenerator

    @wraps(own, updated=())
    class BatchGenerator(own):  # type: ignore[misc]
        def __new__(cls, *args: Any, **settings: Any) -> Any:
            is_ours = hook.is_on and cls is BatchGenerator
            batch = _drafting_batch(hook, *args, **settings) if is_ours else None
            return super().__new__(cls) if batch is None else batch

    return BatchGenerator


def _drafting_batch(
    hook: Hook, *args: Any, **settings: Any
) -> DraftingBatchGenerator | None:
    """This package's in place of mlx-lm's; None where the model has no drafter."""
    signature = inspect.signature(hook.own.BatchGenerator)
    call = signature.bind(*args, **settings).arguments
    if not carries_drafter(call["model"]):
        hook.tally.why_none = _why_no_drafter(call["model"])
        return None
    return DraftingBatchGenerator(
        **call,
        num_draft_tokens=hook.settings.num_draft_tokens,
        draft_source=hook.settings.draft_source,
        draw_seed=hook.draw_seed,
        tally=hook.tally,
    )


def _seed(hook: Hook) -> Callable[..., None]:
    own = hook.own.seed

    @wraps(own)
    def seed(*args: Any, **kwargs: Any) -> None:
        own(*args, **kwargs)
        hook.note_seed()

    return seed
