"""Text in, text out: tokenizer, detokenizer, stop strings and timing.

Tokens come from the decoder; this file knows nothing of caches, kernels or files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from typing import Any, Unpack

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..cache.mlx_lm_cache import holds_tokens
from ..cpu_kernels import clock
from ..engine.decoder import Decoder
from ..engine.results import PromptProgress, SequenceOutput
from ..engine.sequence import TokenSequence
from ..engine.stats import RoundStats
from ..errors import RequestError
from ..markup.answer import marks_of, plain
from ..models.compatibility import check_fit
from ..models.drafter import Drafter
from ..pair.pair import Pair, pair_of
from ..structure.constraint import Constraint, asked
from ..structure.masks import BoundConstraint
from .encoding import encode_text
from .figures import describe
from .requests import check_tokens, drafts_of, make_request
from .response import GenerationResponse
from .settings import (
    GenerationSettings,
    Keywords,
    check_max_thinking_tokens,
    check_num_logprobs,
)
from .stop import StopStrings
from .text_pieces import TextPieces
from .tokens import make_decoder

DEFAULT_MAX_TOKENS = 256


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
    schema: Any = None,
    regex: str | None = None,
    grammar: str | None = None,
    max_thinking_tokens: int | None = None,
    cached_tokens: Sequence[int] = (),
    prediction: str | Sequence[int] = (),
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
        schema: A JSON schema that the text follows: an object, its text, or a class of
            pydantic's. What is made has no white space between its parts. A thought
            that the prompt opens or asks for may come first; it is free.
        regex: A regular expression that the text matches as a whole.
        grammar: A grammar that the text follows, in llguidance's form of Lark. At most
            one of the three is given; they take the extra ``structure``.
        max_thinking_tokens: Most tokens of all thoughts, 0 or more; None for any
            number. Marks, a thought's name, and what the prompt holds of one do not
            count. With 0 a thought that the prompt opens is closed at once, and none
            begins.
        cached_tokens: The tokens of ``prompt_cache``, as far as they are known: drafts
            may come from them too, see ``draft_source``.
        prediction: Text or token ids that the text may have, for drafts to come from.
        settings: The other keywords, see ``generation.settings.GenerationSettings``.

    Yields:
        One response per token; the last one has a ``finish_reason``.

    Raises:
        RequestError: A setting or a token id is outside its range, or no text can be
            forced to follow what is given; while tokens are made: a processor or
            sampler returned something of another shape.
        PairingError: ``draft_model`` does not fit the model.
    """
    chosen = GenerationSettings(max_tokens, **settings)
    form = asked(schema=schema, regex=regex, grammar=grammar)
    check_num_logprobs(num_logprobs)
    check_max_thinking_tokens(max_thinking_tokens)
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
        draft_source=chosen.draft_source,
        cached=tuple(check_tokens(pair, cached_tokens)),
        prediction=_predicted(pair, tokenizer, prediction),
        constraint=_bound(form, tokenizer, pair, max_thinking_tokens),
    )
    decoder = make_decoder(
        pair,
        [request],
        num_draft_tokens=drafts_of(pair, chosen.num_draft_tokens, chosen.draft_source),
        draft_source=chosen.draft_source,
        exactness=chosen.exactness,
        prefill_step_size=chosen.prefill_step_size,
        prompt_caches=() if prompt_cache is None else [prompt_cache],
    )
    return _TextStream(
        pair,
        decoder,
        TextPieces(tokenizer.detokenizer, StopStrings(stop), marks_of(tokenizer)),
        len(request.prompt),
        prompt_cache=prompt_cache,
        on_progress=prompt_progress_callback,
    ).responses()


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
        self._sequence: TokenSequence | None = None

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

    def _decode(
        self, rounds: Iterator[list[SequenceOutput]]
    ) -> Iterator[GenerationResponse]:
        """Respond to rounds up to the end; the decoder still has the sequence then."""
        for (output,) in rounds:
            if not self._num_tokens:
                self._prompt_tps = self._prompt_tokens / self._elapsed()
                self._start = clock()
            self._sequence = output.sequence
            output.check()
            yield from self._respond(output)
            if self._pieces.is_stopped or output.finish_reason is not None:
                return

    def _report(self, progress: PromptProgress) -> None:
        """Tell how far the prompt was read."""
        if self._on_progress is not None:
            self._on_progress(progress.num_read, progress.num_tokens)

    def _keep_cache(self) -> None:
        """Let the caller's prompt cache hold the prompt and what was yielded."""
        if self._prompt_cache is None or self._sequence is None or not self._num_tokens:
            return
        with suppress(RequestError):  # a round has failed: the cache stays as it was
            self._decoder.extract(
                self._sequence, num_emitted=self._num_tokens, into=self._prompt_cache
            )

    def _respond(self, output: SequenceOutput) -> Iterator[GenerationResponse]:
        """The responses of one round, up to a stop string."""
        last = len(output.tokens) - 1
        for i, token in enumerate(output.tokens):
            reason = output.finish_reason if i == last else None
            self._num_tokens += 1
            text = self._pieces.add(token, reason)
            logprobs = output.logprobs[i] if output.logprobs else None
            yield GenerationResponse(
                text=plain(text),
                marked_text=text,
                token=token,
                from_draft=i < output.num_from_draft,
                finish_reason="stop" if self._pieces.is_stopped else reason,
                token_logprob=logprobs.token if logprobs else None,
                top_logprobs=logprobs.top if logprobs else None,
                _logits=output.logits,
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
            "_times_plain": self._times_plain,
        }

    def _times_plain(self, stats: RoundStats) -> float | None:
        """See ``GenerationResponse.times_plain``."""
        min_rows = self._decoder.min_rows
        return self._pair.calibration.times_plain(stats, min_rows=min_rows)

    def _elapsed(self) -> float:
        """Seconds since the phase began; never 0, so that rates stay finite."""
        return max(clock() - self._start, 1e-9)


def _bound(
    asked_for: Constraint | None,
    tokenizer: TokenizerWrapper,
    pair: Pair,
    max_thinking_tokens: int | None,
) -> BoundConstraint | None:
    """What holds a text to a form, and its thoughts to a length; None for neither.

    Raises:
        RequestError: No text follows the form, no token ends one, or the model's marks
            of thoughts are no tokens.
    """
    if asked_for is not None and not tokenizer.eos_token_ids:
        raise RequestError(
            "text with a given form must have a token that ends it: got none. Name one "
            "in eos_token_ids."
        )
    if asked_for is None and max_thinking_tokens is None:
        return None
    found = BoundConstraint(asked_for, tokenizer, vocab_size=pair.vocab_size)
    if max_thinking_tokens is None:
        return found
    return found.limited(max_thinking_tokens)


def _predicted(
    pair: Pair, tokenizer: TokenizerWrapper, given: str | Sequence[int]
) -> tuple[int, ...]:
    """Token ids of a text that begins nothing; token ids as they are."""
    if isinstance(given, str):
        given = encode_text(tokenizer, given, continues=True)
    return tuple(check_tokens(pair, given))


def _encode(tokenizer: TokenizerWrapper, prompt: Any, cache: Any) -> Any:
    """Token ids of a text that goes on what a cache holds; token ids as they are."""
    if not isinstance(prompt, str):
        return prompt
    continues = cache is not None and holds_tokens(cache)
    return encode_text(tokenizer, prompt, continues=continues)
