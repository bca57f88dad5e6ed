"""Text in, text out: tokenizer, detokenizer, stop strings and timing.

Tokens come from the decoder; this file knows nothing of caches, kernels or files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, Unpack

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..cache.mlx_lm_cache import holds_tokens
from ..cpu_kernels import clock
from ..engine.decoder import Decoder
from ..engine.results import Emission, Progress
from ..engine.sequence import Row
from ..engine.stats import RoundStats
from ..errors import RequestError
from ..markup.answer import marks_of, plain
from ..models.compatibility import check_fit
from ..models.drafter import Drafter
from ..pair.pair import Pair, pair_of
from ..sampling.logprobs import whole_logprobs
from .encoding import encode_text
from .requests import drafts_of, make_request
from .settings import GenerationSettings, Keywords, check_num_logprobs
from .stop import StopStrings
from .text_pieces import TextPieces
from .tokens import make_decoder

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class GenerationResponse:
    """One token of a generation: mlx-lm's fields, and what drafting did.

    Attributes:
        text: The next piece of text, perhaps empty.
        marked_text: The same with control tokens told from text that spells them, for
            ``AnswerReader``.
        token: The token id.
        from_draft: Whether the drafter had proposed the token.
        prompt_tokens: Tokens in the prompt.
        prompt_tps: Prompt tokens per second.
        generation_tokens: Tokens generated so far.
        generation_tps: Generated tokens per second, from the first token on.
        peak_memory: Peak memory of MLX so far, in GB (10**9 bytes).
        finish_reason: ``"stop"`` (end-of-sequence token or stop string),
            ``"length"`` or None.
        rounds: Rounds so far.
        acceptance_length: Tokens per round so far, 1 + accepted / rounds.
        acceptance_rate: Accepted over drafted so far, 0 to 1.
        rule: The rule that judges the drafts, in words.
        token_logprob: The token's log-probability; None where ``num_logprobs`` is.
        top_logprobs: The ``num_logprobs`` most likely tokens with theirs, best first,
            of equal ones the lowest id first; None where ``num_logprobs`` is.
        drafter_memory: The drafter's weights among it, in GB.
        times_plain: How many times as fast as plain decoding the rounds were, by what
            was measured on this machine; None where that does not tell.
        stats: All counts so far and where the time went; shared by the responses of a
            generation.
    """

    text: str
    token: int
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None
    rounds: int
    acceptance_length: float
    acceptance_rate: float
    rule: str
    token_logprob: float | None
    top_logprobs: list[tuple[int, float]] | None
    drafter_memory: float
    times_plain: float | None
    stats: RoundStats = field(repr=False)
    marked_text: str = field(repr=False)
    _logits: mx.array = field(repr=False)  # of the whole round, [1, K + 1, V]
    _index: int = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The figures of the generation so far, as JSON takes them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "prompt_tps": self.prompt_tps,
            "generation_tokens": self.generation_tokens,
            "generation_tps": self.generation_tps,
            "times_plain": self.times_plain,
            "finish_reason": self.finish_reason,
            "peak_memory_gb": self.peak_memory,
            "drafter_memory_gb": self.drafter_memory,
            "drafter_memory_share": self._drafter_share,
            **self.stats.to_dict(),
        }

    @property
    def _drafter_share(self) -> float:
        """The drafter's share of the peak memory, 0 to 1."""
        return self.drafter_memory / self.peak_memory if self.peak_memory else 0.0

    @property
    def logprobs(self) -> mx.array:
        """Log-probabilities of the target behind the token, [V].

        After logits processors, before the temperature and filters, as mlx-lm's.
        Computed when asked for, on a stream of their own: on the stream of the round
        in flight the reader would wait for that round. A response that is kept keeps
        the logits of its round, K + 1 rows.
        """
        return whole_logprobs(self._logits, 0, self._index)


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    draft_model: Drafter | None = None,
    num_logprobs: int | None = None,
    stop: str | Sequence[str] | None = (),
    prompt_cache: Sequence[Any] | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    **settings: Unpack[Keywords],
) -> Generator[GenerationResponse, None, None]:
    """Generate text from a prompt, a token at a time.

    Args:
        model: The model that ``load`` returned (it carries its drafter), or any
            Gemma 4 of mlx-lm.
        tokenizer: Its tokenizer.
        prompt: Text, or token ids. A text gets the begin-of-sequence token unless it
            begins with it or goes on a prompt cache; token ids stay as they are.
        max_tokens: Tokens to generate, 1 or more; -1 for no limit.
        draft_model: A drafter to use in place of the model's own.
        num_logprobs: How many of the most likely tokens to report with each token's
            log-probability, 0 to 64; None for neither.
        stop: A string, or several, that end the text; they are not part of it.
        prompt_cache: mlx-lm's prompt cache of what comes before the prompt, empty or
            not. It is updated in place once the generator ends, is closed or raises:
            then it holds the prompt and all yielded tokens, the last one included.
            Before the first token it is left as it was.
        prompt_progress_callback: Called with the prompt's tokens that were read so far
            and all of them, 0 of them first.
        settings: The other fields of ``GenerationSettings``.

    Yields:
        One response per token; the last one has a ``finish_reason``.

    Raises:
        RequestError: A setting or a token id is outside its range; while tokens are
            made: a processor or sampler returned something of another shape.
        PairingError: ``draft_model`` does not fit the model.
    """
    chosen = GenerationSettings(max_tokens, **settings)
    check_num_logprobs(num_logprobs)
    if draft_model is not None:
        check_fit(model, draft_model)
    pair = pair_of(model, draft_model)
    if not isinstance(tokenizer, TokenizerWrapper):
        # A bare tokenizer names one end-of-sequence token; the checkpoint knows all.
        tokenizer = TokenizerWrapper(tokenizer, eos_token_ids=pair.eos_token_ids)
    request = make_request(
        pair,
        _encode(tokenizer, prompt, prompt_cache),
        max_tokens=max_tokens,
        sampling=chosen.sampling,
        eos=frozenset(tokenizer.eos_token_ids),
        logits_processors=chosen.logits_processors,
        sampler=chosen.sampler,
        num_logprobs=num_logprobs,
    )
    decoder = make_decoder(
        pair,
        [request],
        num_draft_tokens=drafts_of(pair, chosen.num_draft_tokens),
        exactness=chosen.exactness,
        prefill_step_size=chosen.prefill_step_size,
        prompt_caches=() if prompt_cache is None else [prompt_cache],
    )
    stream = _TextStream(
        pair,
        decoder,
        TextPieces(tokenizer.detokenizer, StopStrings(stop), marks_of(tokenizer)),
        len(request.prompt),
        prompt_cache=prompt_cache,
        on_progress=prompt_progress_callback,
    )
    return stream.responses()


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    verbose: bool = False,
    **settings: Any,
) -> str:
    """Generate a complete text.

    Args:
        model: The model that ``load`` returned, or any Gemma 4 of mlx-lm.
        tokenizer: Its tokenizer.
        prompt: Text, or token ids.
        max_tokens: Tokens to generate, 1 or more; -1 for no limit.
        verbose: Also print the text as it comes and, on standard error, the figures.
        settings: The other settings of ``stream_generate``.

    Returns:
        The generated text, without the prompt.

    Raises:
        RequestError: A setting or a token id is outside its range.
        PairingError: The drafter does not fit the model.
    """
    pieces = []
    response = None
    for response in stream_generate(
        model, tokenizer, prompt, max_tokens=max_tokens, **settings
    ):
        pieces.append(response.text)
        if verbose:
            sys.stdout.write(response.text)
            sys.stdout.flush()
    if verbose and response is not None:
        sys.stdout.write("\n")
        sys.stderr.write(describe(response) + "\n")
    return "".join(pieces)


def describe(response: GenerationResponse) -> str:
    """The closing figures of a generation, a few lines of text."""
    stats = response.stats
    phases = stats.phases
    lines = [
        f"Prompt: {response.prompt_tokens} tokens, "
        f"{response.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {response.generation_tokens} tokens, "
        f"{response.generation_tps:.3f} tokens-per-sec",
        *describe_rounds(stats),
        f"Time: prefill {phases.prefill_s:.2f} s, rounds {phases.rounds_s:.2f} s, host "
        f"{phases.host_s:.2f} s",
        f"Peak memory: {response.peak_memory:.3f} GB, the drafter's weights "
        f"{response.drafter_memory:.3f} GB",
    ]
    return "\n".join(lines)


def describe_rounds(stats: RoundStats) -> list[str]:
    """What rounds did, of one generation or of several: lines of text."""
    return [
        f"Rounds: {stats.rounds}, acceptance length {stats.acceptance_length:.2f} "
        f"tokens per round, acceptance rate {stats.acceptance_rate:.1%} of "
        f"{stats.drafted} drafted, rule: {stats.rule}",
        _describe_drafts(stats),
        f"Exactness: {stats.exactness}{_describe_difference(stats)}",
    ]


def _describe_drafts(stats: RoundStats) -> str:
    """How many drafts rounds had and how far they came, or why there were none."""
    if not stats.engaged:
        return f"Drafts: none, {stats.why_not_engaged}"
    rounds = ", ".join(
        f"{count} with K = {k}" for k, count in sorted(stats.num_draft_tokens.items())
    )
    rates = ", ".join(f"{rate:.2f}" for rate in stats.acceptance_by_position)
    return f"Drafts: rounds {rounds}; accepted by position {rates}"


def _describe_difference(stats: RoundStats) -> str:
    if not stats.max_difference:
        return ""
    return f"; largest difference that the probe saw: {stats.max_difference:.2g}"


class _TextStream:
    """One generation on its way from tokens to responses."""

    def __init__(
        self,
        pair: Pair,
        decoder: Decoder,
        pieces: TextPieces,
        prompt_tokens: int,
        *,
        prompt_cache: Sequence[Any] | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._pair = pair
        self._decoder = decoder
        self._pieces = pieces
        self._prompt_tokens = prompt_tokens
        self._prompt_tps = 0.0
        self._start = 0.0
        self._num_tokens = 0
        self._drafter_memory = pair.drafter_bytes / 1e9
        self._prompt_cache = prompt_cache
        self._on_progress = on_progress
        self._row: Row | None = None

    def responses(self) -> Generator[GenerationResponse, None, None]:
        """Decode to the end: one response per token."""
        self._start = clock()
        if self._on_progress is not None:
            self._on_progress(0, self._prompt_tokens)
        run = self._decoder.run(self._report)
        with self._pair.wired(), closing(self._decoder), closing(run) as rounds:
            try:
                yield from self._decode(rounds)
            finally:
                self._keep_cache()

    def _decode(self, rounds: Iterator[list[Emission]]) -> Iterator[GenerationResponse]:
        """Respond to rounds up to the end; the decoder still has the row then."""
        for (emission,) in rounds:
            if not self._num_tokens:
                self._prompt_tps = self._prompt_tokens / self._elapsed()
                self._start = clock()
            self._row = emission.row
            emission.check()
            yield from self._respond(emission)
            if self._pieces.is_stopped or emission.finish_reason is not None:
                return

    def _report(self, progress: Progress) -> None:
        """Tell how far the prompt was read."""
        if self._on_progress is not None:
            self._on_progress(progress.num_read, progress.num_tokens)

    def _keep_cache(self) -> None:
        """Let the caller's prompt cache hold the prompt and what was yielded."""
        if self._prompt_cache is None or self._row is None or not self._num_tokens:
            return
        with suppress(RequestError):  # a round has failed: the cache stays as it was
            self._decoder.extract(
                self._row, num_emitted=self._num_tokens, into=self._prompt_cache
            )

    def _respond(self, emission: Emission) -> Iterator[GenerationResponse]:
        """The responses of one round, up to a stop string."""
        last = len(emission.tokens) - 1
        for i, token in enumerate(emission.tokens):
            reason = emission.finish_reason if i == last else None
            self._num_tokens += 1
            text = self._pieces.add(token, reason)
            logprobs = emission.logprobs[i] if emission.logprobs else None
            yield GenerationResponse(
                text=plain(text),
                marked_text=text,
                token=token,
                from_draft=i < emission.num_from_draft,
                finish_reason="stop" if self._pieces.is_stopped else reason,
                token_logprob=logprobs.token if logprobs else None,
                top_logprobs=logprobs.top if logprobs else None,
                _logits=emission.logits,
                _index=i,
                **self._figures(),
            )
            if self._pieces.is_stopped:
                return

    def _figures(self) -> dict[str, Any]:
        stats = self._decoder.stats
        return {
            "prompt_tokens": self._prompt_tokens,
            "prompt_tps": self._prompt_tps,
            "generation_tokens": self._num_tokens,
            "generation_tps": self._num_tokens / self._elapsed(),
            "peak_memory": mx.get_peak_memory() / 1e9,
            "rounds": stats.rounds,
            "acceptance_length": stats.acceptance_length,
            "acceptance_rate": stats.acceptance_rate,
            "rule": stats.rule,
            "stats": stats,
            "drafter_memory": self._drafter_memory,
            "times_plain": self._pair.calibration.times_plain(stats),
        }

    def _elapsed(self) -> float:
        """Seconds since the phase began; never 0, so that rates stay finite."""
        return max(clock() - self._start, 1e-9)


def _encode(tokenizer: TokenizerWrapper, prompt: Any, cache: Any) -> Any:
    """Token ids of a text that goes on what a cache holds; token ids as they are."""
    if not isinstance(prompt, str):
        return prompt
    continues = cache is not None and holds_tokens(cache)
    return encode_text(tokenizer, prompt, continues=continues)
