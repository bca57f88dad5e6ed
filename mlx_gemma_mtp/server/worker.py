"""The engine's thread: choices in, steps of the decoder, pieces out.

Between two steps messages are read, so a request that is let go of has no further
round. Requests take seats in turn, however many choices they have. Nothing runs while
there is nothing to decode. A request that fails fails alone; where the decoder itself
fails, every request ends with an error and no new one is taken.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from ..cache.rungs import RUNG, rungs_between
from ..constants import LAST_WRITES_S
from ..errors import RequestError
from .bridge import Bridge, Cancel, Drain, Mailbox, Message, Submit
from .choice import Accepted, Choice, Event, Tally
from .errors import BROKEN, SHUTTING_DOWN, AnswerError, engine_failed
from .metrics import StepReport
from .reply import Job
from .transcript import Transcript
from .turns import Turns, largest_share

if TYPE_CHECKING:
    from ..cache.kept import KeptCaches
    from ..engine.request import Request
    from ..engine.results import PromptProgress, SequenceOutput, StepOutput
    from ..engine.sequence import TokenSequence
    from ..engine.stats import RoundStats

logger = logging.getLogger("mlx_gemma_mtp.server")

# Choices that the decoder holds beyond its seats, so that another follows at once where
# one ends. The others wait here: what the caches know is looked up as late as possible.
_AHEAD = 2
# Prompts of one request that the decoder holds unread: half of those that one chunk may
# have, so that another request's is read in the same one.
_MAX_UNREAD = 4


class DecoderLike(Protocol):
    """What is used of a ``Decoder``."""

    stats: RoundStats

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""

    @property
    def num_live(self) -> int:
        """Rows that decode or read."""

    @property
    def num_waiting(self) -> int:
        """Rows that wait."""

    @property
    def kv_bytes(self) -> int:
        """Memory of the sequences' caches."""

    def add(
        self, request: Request, prompt_cache: Sequence[Any] | None = None
    ) -> TokenSequence:
        """Let a request wait for its seat."""

    def step(self) -> StepOutput:
        """Run at most one round, and read at most one chunk of prompts."""

    def remove(self, sequence: TokenSequence) -> None:
        """Let go of a sequence."""

    def extract(
        self, sequence: TokenSequence, *, num_emitted: int | None = None
    ) -> Sequence[Any]:
        """A sequence's caches as mlx-lm's."""

    def close(self) -> None:
        """Let go of everything."""


@dataclass(frozen=True)
class Means:
    """What the worker decodes with.

    Attributes:
        decoder: The sequences.
        make_request: Checks a choice and makes a request of it.
        make_transcript: Begins a choice's text.
        kept: Caches of earlier prompts; None where none are kept.
        max_rows: Rows of the decoder.
        leaves_room: Whether memory is left for one more beside so many choices'.
        window: Tokens that sliding layers see; caches of fewer can be cut shorter.
        rung_interval: Tokens between two places inside a prompt whose caches are kept.
        memory: Bytes that MLX uses, and the most it used.
    """

    decoder: DecoderLike
    make_request: Callable[[Choice], Request]
    make_transcript: Callable[[Choice], Transcript]
    kept: KeptCaches | None
    max_rows: int
    leaves_room: Callable[[Sequence[Choice]], bool]
    window: int
    rung_interval: int
    memory: Callable[[], tuple[int, int]]


@dataclass(eq=False)
class _Task:
    """A job in the engine's hands.

    Attributes:
        job: What is to be done.
        request: The same for the decoder, with the whole prompt.
        transcript: Its text so far.
        sequence: Its sequence, once it has one.
        num_cached: Tokens of the prompt that came in caches.
        last_at: When its last tokens came, seconds.
    """

    job: Job
    request: Request
    transcript: Transcript
    sequence: TokenSequence | None = None
    num_cached: int = 0
    last_at: float | None = None


class Worker:
    """Decodes for everybody.

    Args:
        means: What it decodes with.
        mailbox: Where its messages are.
        bridge: Where what it has to say goes.
    """

    def __init__(self, means: Means, mailbox: Mailbox, bridge: Bridge) -> None:
        self._means = means
        self._decoder = means.decoder
        self._kept = means.kept
        self._mailbox = mailbox
        self._bridge = bridge
        self._messages: deque[Message] = deque()
        self._waiting: Turns[_Task] = Turns(
            largest_share(means.max_rows),
            most_new=_MAX_UNREAD,
            leaves_room=lambda tasks: means.leaves_room([t.job.choice for t in tasks]),
        )
        self._tasks: dict[Job, _Task] = {}
        self._by_sequence: dict[TokenSequence, _Task] = {}
        self._events: list[tuple[Job, Event]] = []
        self._has_news = False
        self._report = StepReport()
        self._deadline: float | None = None
        self._is_broken = False

    def run(self) -> None:
        """Work until a ``Drain`` was obeyed."""
        while not self._is_done():
            try:
                self._work()
            except Exception:
                logger.exception("the engine has failed")
                self._break()
        self._has_news = True
        self._fail_all(AnswerError(503, SHUTTING_DOWN))
        self._read_messages()  # what came in between is refused
        self._post()
        if not self._is_broken:
            self._decoder.close()
        if self._kept is not None:
            self._kept.close(LAST_WRITES_S)

    def _work(self) -> None:
        """Do what messages say, and run a step."""
        self._read_messages()
        self._feed()
        self._post()  # who is accepted need not wait for a step to know
        if not self._is_broken and not self._decoder.is_idle:
            self._step()
            self._post()

    def _is_done(self) -> bool:
        if self._deadline is None:
            return False
        return not self._tasks or time.monotonic() >= self._deadline

    def _read_messages(self) -> None:
        """Do what the messages say; sleep until there is one where nothing else is."""
        is_idle = not (self._tasks or self._messages or self._events)
        self._messages += self._mailbox.take(wait=is_idle and self._deadline is None)
        while self._messages:
            message = self._messages.popleft()
            self._has_news = True
            if isinstance(message, Submit):
                self._submit(message.job)
            elif isinstance(message, Cancel):
                self._cancel(message.job)
            else:
                self._drain(message)

    def _drain(self, message: Drain) -> None:
        self._deadline = time.monotonic() + message.timeout_s

    def _submit(self, job: Job) -> None:
        """Check a choice and let it wait."""
        if self._is_broken:
            return self._tell(job, engine_failed())
        if self._deadline is not None:
            return self._tell(job, AnswerError(503, SHUTTING_DOWN))
        try:
            request = self._means.make_request(job.choice)
            transcript = self._means.make_transcript(job.choice)
        except Exception as error:  # noqa: BLE001 - one choice must not end the others
            return self._tell(job, _failure_of(job, error))
        task = _Task(job, request, transcript)
        self._tasks[job] = task
        self._waiting.append(job.reply, task)
        self._tell(job, Accepted())

    def _cancel(self, job: Job) -> None:
        """Let go of a job, wherever it is."""
        task = self._tasks.get(job)
        if task is not None:
            self._drop(task)

    def _feed(self) -> None:
        """Give waiting choices to the decoder, as many as it soon has seats for."""
        most = self._means.max_rows + _AHEAD
        while len(self._by_sequence) < most and (task := self._waiting.take()):
            try:
                self._begin(task)
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(task, _failure_of(task.job, error))

    def _begin(self, task: _Task) -> None:
        """Add a request to the decoder, with what the caches know of its prompt."""
        prompt, caches = task.request.prompt, None
        if self._kept is not None:
            salt = task.job.choice.cache_salt
            caches, task.num_cached = self._kept.find(prompt, salt=salt)
        read = task.num_cached
        request = replace(
            task.request,
            prompt=prompt[read:],
            history=tuple(prompt[:read]),
            pauses=tuple(place - read for place in self._places(task)),
        )
        task.sequence = self._decoder.add(request, caches)
        self._by_sequence[task.sequence] = task
        self._report.num_prompt_tokens += len(prompt)
        self._report.num_cached_tokens += read

    def _places(self, task: _Task) -> list[int]:
        """Numbers of the prompt's tokens after which its caches are kept.

        Nowhere if the answer's own can be cut down to any beginning later.
        """
        choice = task.job.choice
        is_short = len(choice.prompt) + choice.max_tokens <= self._means.window
        if self._kept is None or is_short:
            return []
        read, places = task.num_cached, {place.num_tokens for place in choice.places}
        last = max(places, default=0)
        places.update(rungs_between(read, last, self._means.rung_interval))
        return sorted(place for place in places if place > read)

    def _step(self) -> None:
        """Run one step and take what it gave."""
        self._has_news = True
        step = self._decoder.step()
        now = time.perf_counter()
        for progress in step.progress:
            task = self._by_sequence[progress.sequence]
            task.job.num_read = task.num_cached + progress.num_read
            if progress.is_paused:
                self._keep_prompt(progress)
        for output in step.outputs:
            task = self._by_sequence[output.sequence]
            try:
                self._take(task, output, now)
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(task, _failure_of(task.job, error))

    def _take(self, task: _Task, output: SequenceOutput, now: float) -> None:
        """Tell a job what its sequence emitted."""
        if output.error is not None:
            raise output.error
        piece = task.transcript.take(output)
        self._note_times(task, len(piece.tokens), now)
        if piece.finish_reason is not None:
            assert task.sequence is not None
            self._report.finished[piece.finish_reason] += 1
            piece.tally = _tally(task, task.sequence)
            self._keep_answer(task)
            self._drop(task, is_ended=output.finish_reason is not None)
        self._tell(task.job, piece)

    def _note_times(self, task: _Task, num_tokens: int, now: float) -> None:
        self._report.num_tokens += num_tokens
        if task.last_at is None:
            self._waiting.begin(task.job.reply, task)
            self._report.first_token_s.append(now - task.job.arrived)
        else:
            self._report.gaps.append((now - task.last_at, num_tokens))
        task.last_at = now

    def _keep_prompt(self, progress: PromptProgress) -> None:
        """Keep the caches of a prompt's beginning that was just read."""
        task = self._by_sequence[progress.sequence]
        num_tokens = task.num_cached + progress.num_read
        kinds = {place.num_tokens: place.kind for place in task.job.choice.places}
        self._keep(task, task.request.prompt[:num_tokens], kinds.get(num_tokens, RUNG))

    def _keep_answer(self, task: _Task) -> None:
        """Keep the caches of a prompt and its answer, but for the last token.

        That one's keys are not there yet, and whoever goes on reads more anyway.
        """
        answer = task.transcript.tokens[:-1]
        tokens = [*task.request.prompt, *answer]
        self._keep(task, tokens, "assistant", num_emitted=len(answer))

    def _keep(self, task: _Task, tokens: list[int], kind: str, **how: int) -> None:
        """Keep caches; a request does not fail because of them."""
        if self._kept is None or not self._kept.is_worth(len(tokens)):
            return
        assert task.sequence is not None
        try:
            caches = self._decoder.extract(task.sequence, **how)
            salt = task.job.choice.cache_salt
            self._kept.keep(tokens, list(caches), kind=kind, salt=salt)
        except RequestError:  # another sequence has its seat already
            logger.debug("%d tokens were not kept", len(tokens))
        except Exception as error:  # noqa: BLE001 - whatever it is
            text = "the caches of %d tokens could not be kept"
            task.job.context.run(logger.error, text, len(tokens), exc_info=error)

    def _drop(self, task: _Task, *, is_ended: bool = False) -> None:
        """Forget a task; its sequence, if it has not ended, has no further round."""
        if self._tasks.pop(task.job, None) is None:
            return
        self._waiting.drop(task.job.reply, task)
        if task.sequence is None:
            return
        was_decoding = self._by_sequence.pop(task.sequence, None) is not None
        if was_decoding and not is_ended and not self._is_broken:
            self._decoder.remove(task.sequence)

    def _fail(self, task: _Task, failure: AnswerError) -> None:
        """End a task with an error."""
        self._drop(task)
        self._tell(task.job, failure)

    def _fail_all(self, failure: AnswerError) -> None:
        for task in list(self._tasks.values()):
            self._fail(task, failure)

    def _break(self) -> None:
        """The decoder cannot go on: end everything."""
        self._is_broken = self._bridge.is_broken = True
        self._has_news = True
        self._fail_all(AnswerError(500, BROKEN))

    def _tell(self, job: Job, event: Event) -> None:
        self._events.append((job, event))

    def _post(self) -> None:
        """Send what has gathered, and how things stand."""
        if not self._has_news:
            return
        self._has_news = False
        events, self._events = self._events, []
        report, self._report = self._report, StepReport()
        report.at = time.perf_counter()
        report.num_waiting = len(self._waiting)
        if not self._is_broken:
            self._describe(report)
        self._bridge.post(events, report)

    def _describe(self, report: StepReport) -> None:
        decoder, stats = self._decoder, self._decoder.stats
        report.num_live = decoder.num_live
        report.num_waiting += decoder.num_waiting
        report.kv_bytes = decoder.kv_bytes
        report.memory_bytes, report.peak_memory_bytes = self._means.memory()
        if self._kept is not None:
            report.prompt_cache_bytes = self._kept.num_bytes
            report.prompt_cache_size = len(self._kept)
        report.drafting = stats.snapshot()


def _tally(task: _Task, sequence: TokenSequence) -> Tally:
    stats = sequence.stats
    return Tally(
        num_cached=task.num_cached,
        num_from_draft=task.transcript.num_from_draft,
        rounds=stats.rounds,
        drafted=stats.drafted,
        accepted=stats.accepted,
        rule=stats.rule,
        num_reasoning=task.transcript.num_reasoning,
        num_predicted=sequence.num_predicted,
        num_not_predicted=sequence.num_not_predicted,
    )


def _failure_of(job: Job, error: Exception) -> AnswerError:
    """What a client is told of an exception in its request."""
    if isinstance(error, RequestError):
        return AnswerError(400, str(error))
    job.context.run(logger.error, "a request has failed", exc_info=error)
    return AnswerError(500, "the request has failed; the server's log says why.")
