"""Questions in, answers out: one conversation with a model, token by token.

Each turn's prompt is the whole conversation. What of it the caches of earlier turns
hold is not read again. Knows nothing of the terminal.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..cache.kept import KeptCaches
from ..cache.mlx_lm_cache import read_prompt_cache
from ..cache.rungs import RUNG, rung_interval, rungs_between
from ..constants import AUTO, LAST_WRITES_S
from ..engine.extract import filled
from ..engine.prefill import Prefill
from ..engine.stats import RoundStats
from ..errors import RequestError
from ..generation.prompt_folder import prompt_folder as open_folder
from ..generation.response import GenerationResponse
from ..generation.settings import NO_LIMIT
from ..generation.text import stream_generate
from ..markup.answer import CONTENT, REASONING, AnswerReader, Part, marks_of
from ..models.target import Target, text_model
from ..pair.pair import pair_of
from ..sampling.host import LogitsProcessor
from .conversation import Conversation
from .prompts import Prompts, num_stable
from .settings import Settings

OnProgress = Callable[[int, int], None]

# Of the caches of earlier turns; the newest two are kept whatever memory they take.
_MAX_KEPT = 16
_MAX_KEPT_BYTES = 2 * 10**9
_NUM_SURE = 2


@dataclass
class Turn:
    """One answer's figures.

    Attributes:
        num_prompt: Tokens of the prompt, the whole conversation.
        num_cached: How many of them a kept cache held.
        prompt_s: What it took to the first token, seconds.
        response: The last token's response; None before the first one.
        start: When the turn began.
    """

    num_prompt: int
    num_cached: int = 0
    prompt_s: float = 0.0
    response: GenerationResponse | None = None
    start: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def num_read(self) -> int:
        """How many tokens of the prompt were read."""
        return self.num_prompt - self.num_cached


@dataclass
class Totals:
    """The figures of all answers so far.

    Attributes:
        answers: Answers that have at least one token.
        tokens: Tokens of all answers.
        seconds: What they took, from each one's first token on.
        num_prompt: Tokens of all prompts.
        num_cached: How many of them kept caches held.
        stats: The rounds of all answers.
    """

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0
    num_prompt: int = 0
    num_cached: int = 0
    stats: RoundStats = field(default_factory=RoundStats)

    def add(self, turn: Turn) -> None:
        """Add an answer that has ended."""
        response = turn.response
        if response is None:
            return
        self.answers += 1
        self.tokens += response.generation_tokens
        self.seconds += response.generation_tokens / response.generation_tps
        self.num_prompt += turn.num_prompt
        self.num_cached += turn.num_cached
        self.stats.merge(response.stats)


@dataclass(frozen=True)
class Said:
    """What one token adds to an answer.

    Attributes:
        parts: What is certain with it.
        response: The token, and the figures up to it.
    """

    parts: list[Part]
    response: GenerationResponse


class Session:
    """A conversation with a model.

    Args:
        model: The model that ``load`` returned.
        tokenizer: Its tokenizer.
        prompts: What makes prompts of conversations.
        settings: How answers are made.
        num_draft_tokens: Drafts per round, 0 to 8, or ``"auto"``.
        draft_source: Where they come from, see ``GenerationSettings``.
        system: The system prompt; None for none.
        prompt_folder: Where caches are also kept, for later sessions; None for nowhere.

    Attributes:
        prompts: What makes prompts of conversations.
        settings: How answers are made from here on.
        max_context: Most tokens of prompt and answer that the model can look at.
        has_drafts: Whether anything drafts: a drafter, or the text itself.
        conversation: What was said; may be replaced by another one.
        num_draft_tokens: Drafts per round of the answers from here on.
        draft_source: Where they come from.
        kept: Caches of earlier turns.
        last: The last answer's figures; None before the first one.
        totals: The figures of all answers.
        unsaid: What of the last answer became certain when it was stopped.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Prompts,
        settings: Settings,
        *,
        num_draft_tokens: int | str,
        draft_source: str = AUTO,
        system: str | None = None,
        prompt_folder: str | None = None,
    ) -> None:
        self._model = model
        self._target = Target(model)
        self._tokenizer = tokenizer
        self._marks = marks_of(tokenizer)
        self.prompts = prompts
        self.settings = settings
        self.max_context: int = text_model(model).args.max_position_embeddings
        pair = pair_of(model)
        self.has_drafts = bool(pair.draft_sources(draft_source))
        self.conversation = Conversation(system)
        self.num_draft_tokens = num_draft_tokens
        self.draft_source = draft_source
        self.kept = KeptCaches(
            max_size=_MAX_KEPT,
            max_bytes=_MAX_KEPT_BYTES,
            num_sure=_NUM_SURE,
            folder=open_folder(pair, prompt_folder, max_pending=_MAX_KEPT_BYTES),
        )
        self.last: Turn | None = None
        self.totals = Totals()
        self.unsaid: list[Part] = []

    @property
    def is_full(self) -> bool:
        """Whether the last answer ended where the model's longest context does."""
        if self.last is None or self.last.response is None:
            return False
        num_tokens = self.last.num_prompt + self.last.response.generation_tokens
        return num_tokens >= self.max_context

    def close(self) -> None:
        """Write what waits for its folder; no answers follow."""
        self.kept.close(LAST_WRITES_S)

    def reset(self) -> None:
        """Begin a new conversation with the same system prompt."""
        self.conversation = Conversation(self.conversation.system)
        self.kept.clear()

    def answer(
        self, question: str, on_progress: OnProgress = lambda num_read, num_tokens: None
    ) -> Generator[Said, None, None]:
        """Answer a question; the exchange joins the conversation.

        Closed early, what was said so far is the answer; a question of whose answer
        nothing was said is dropped.

        Args:
            question: What the user says.
            on_progress: Called while a part of the prompt is read, with its tokens that
                were read so far and all of them.

        Yields:
            What each token adds.

        Raises:
            RequestError: The conversation is longer than the model's longest context,
                or its chat template does not take it.
        """
        asked = self.prompts.prompt(self.conversation, question)
        prompt, opening = asked.tokens, asked.opening
        max_tokens = self._max_tokens(len(prompt))
        turn = Turn(len(prompt))
        caches, num_held = self._read_beginning(question, prompt, turn, on_progress)
        settings = self.settings
        before = mx.array(prompt[:num_held], dtype=mx.int32)
        responses = stream_generate(
            self._model,
            self._tokenizer,
            prompt[num_held:],
            max_tokens=max_tokens,
            num_draft_tokens=self.num_draft_tokens,
            draft_source=self.draft_source,
            cached_tokens=prompt[:num_held],
            exactness=settings.exactness,
            **settings.sampling,
            logits_processors=[_after(before, p) for p in settings.logits_processors]
            or None,
            stop=settings.stop,
            prefill_step_size=settings.prefill_step_size,
            prompt_cache=caches,
            prompt_progress_callback=on_progress,
        )
        reader = AnswerReader(self._marks, opening=opening)
        yield from self._follow(responses, reader, question, prompt, caches, turn)

    def _follow(
        self,
        responses: Generator[GenerationResponse, None, None],
        reader: AnswerReader,
        question: str,
        prompt: list[int],
        caches: list[Any],
        turn: Turn,
    ) -> Generator[Said, None, None]:
        """Pass an answer on; then conversation and caches have grown."""
        said: list[Part] = []
        tokens: list[int] = []
        is_whole = False
        self.unsaid = []
        try:
            for response in responses:
                if turn.response is None:
                    turn.prompt_s = time.perf_counter() - turn.start
                turn.response = response
                tokens.append(response.token)
                is_last = response.finish_reason is not None
                parts = reader.read(response.marked_text, is_last=is_last)
                said += parts
                yield Said(parts, response)
            is_whole = True
        except GeneratorExit:
            is_whole = True
            raise
        finally:
            responses.close()
            self.unsaid = reader.read("", is_last=True)
            if tokens:
                self._add(question, said + self.unsaid)
                self.last = turn
                self.totals.add(turn)
            if tokens and is_whole:  # no error came out of the middle of a round
                self.kept.keep([*prompt, *tokens], caches)

    def _add(self, question: str, said: list[Part]) -> None:
        """Let an exchange join the conversation."""
        content, thought = (
            "".join(part.text for part in said if part.kind == kind)
            for kind in (CONTENT, REASONING)
        )
        self.conversation.add(question, content, thought)

    def _max_tokens(self, num_prompt: int) -> int:
        """Most tokens of an answer to a prompt: as set, or what has room."""
        room = self.max_context - num_prompt
        if room < 1:
            raise RequestError(
                f"the conversation must be shorter than {self.max_context} tokens, the "
                f"model's longest context: got {num_prompt} with this message. Take "
                "something back (/undo), begin anew (/reset), or say less."
            )
        limit = self.settings.max_tokens
        return room if limit == NO_LIMIT else min(limit, room)

    def _read_beginning(
        self,
        question: str,
        prompt: list[int],
        turn: Turn,
        on_progress: OnProgress,
    ) -> tuple[list[Any], int]:
        """Read as much of a prompt as later ones will begin with too, and keep it.

        Returns:
            Caches of the prompt's beginning, and how many of its tokens they hold.
        """
        stable = num_stable(self.prompts, self.conversation, question, prompt)
        found, turn.num_cached = self.kept.find(prompt)
        caches = make_prompt_cache(self._model) if found is None else found
        if stable <= turn.num_cached:
            return caches, turn.num_cached
        self._read(prompt[:stable], turn.num_cached, caches, on_progress)
        self.kept.keep(prompt[:stable], caches)
        return copy.deepcopy(caches), stable

    def _read(
        self,
        tokens: list[int],
        num_held: int,
        caches: list[Any],
        on_progress: OnProgress,
    ) -> None:
        """Let the target read the tokens that caches do not hold, and keep rungs."""
        step_size = self.settings.prefill_step_size
        rungs = rungs_between(num_held, len(tokens), rung_interval(step_size))
        stops = [rung - num_held for rung in rungs]
        prefill = Prefill(self._target, tokens[num_held:], caches=caches, stops=stops)
        while not prefill.is_done:
            on_progress(prefill.num_read, prefill.num_tokens)
            prefill.read(step_size)
            if prefill.num_read in stops:
                self._keep_rung(tokens[: num_held + prefill.num_read], caches)
        on_progress(prefill.num_read, prefill.num_tokens)

    def _keep_rung(self, tokens: list[int], caches: list[Any]) -> None:
        """Keep what caches hold now; they are read into further."""
        held = read_prompt_cache(self._target.layout, caches)
        if held is not None:
            self.kept.keep(tokens, filled(self._target, held), kind=RUNG)


def _after(before: mx.array, processor: LogitsProcessor) -> LogitsProcessor:
    """A processor that sees the tokens in the caches before those that are read."""

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        history = mx.concatenate([before.astype(tokens.dtype), tokens])
        return processor(history, logits)

    return process
