"""What one choice of an answer is to be, and what comes back of it.

Choices go from the HTTP side to the engine's thread, pieces the other way. Both are
plain data: no arrays, no HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..constants import AUTO, MAX_DRAFT_TOKENS
from ..sampling.params import SamplingParams
from .errors import AnswerError

if TYPE_CHECKING:
    from ..engine.request import RowConstraint
    from ..sampling.logprobs import TokenLogprobs


@dataclass(frozen=True)
class Place:
    """A place in a prompt whose caches are worth keeping.

    Attributes:
        num_tokens: Tokens before it.
        kind: What they are, in the words of mlx-lm's ``LRUPromptCache``: ``"system"``
            or ``"user"``.
    """

    num_tokens: int
    kind: str


@dataclass(frozen=True)
class Choice:
    """One sequence to decode.

    Attributes:
        prompt: At least one token id.
        max_tokens: Most tokens to emit, 1 or more.
        sampling: How tokens are chosen.
        stop: Strings that end the text.
        num_logprobs: Most likely tokens to report; None for no log-probabilities.
        max_draft_tokens: Most drafts a round.
        draft_source: Where they may come from.
        penalties: Keywords for mlx-lm's ``make_logits_processors``; empty for none.
        places: Where the prompt's caches are kept, in rising order.
        min_tokens: Tokens before which nothing ends the text but ``max_tokens``.
        stop_token_ids: Tokens that end the text beside the model's own.
        ignores_eos: Whether the model's own do not.
        cache_salt: Caches are shared among requests with the same one; None for those
            without.
        constraint: What the text must be; None for anything.
        is_reasoning: Whether the prompt has begun a thought.
        prediction: Token ids that the answer may have.
    """

    prompt: list[int]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    max_draft_tokens: int = MAX_DRAFT_TOKENS
    draft_source: str = AUTO
    penalties: dict[str, Any] = field(default_factory=dict)
    places: tuple[Place, ...] = ()
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignores_eos: bool = False
    cache_salt: str | None = field(default=None, repr=False)
    constraint: RowConstraint | None = field(default=None, repr=False)
    is_reasoning: bool = False
    prediction: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Tally:
    """What a choice took; with its last piece.

    Attributes:
        num_cached: Tokens of the prompt that a kept cache held.
        num_from_draft: Emitted tokens that had been proposed.
        rounds: Its rounds.
        drafted: Tokens proposed for it.
        accepted: Proposals that stood, those past the end included.
        rule: The rule that judged them, in words.
        num_reasoning: Emitted tokens of thoughts, their marks included.
        num_predicted: Tokens of its prediction that it has.
        num_not_predicted: Those that it has not.
    """

    num_cached: int
    num_from_draft: int
    rounds: int
    drafted: int
    accepted: int
    rule: str
    num_reasoning: int = 0
    num_predicted: int = 0
    num_not_predicted: int = 0

    @property
    def acceptance_length(self) -> float:
        """Tokens per round; 0 before the first."""
        return 1 + self.accepted / self.rounds if self.rounds else 0.0


@dataclass
class Piece:
    """The next part of a choice: what one round gave, or several together.

    Attributes:
        text: Text that is certain by now, perhaps empty, as ``TextPieces`` gives it.
        tokens: Token ids, the one that ended the text included.
        logprobs: One entry per token where they were asked for.
        finish_reason: ``"stop"`` or ``"length"`` in the last one.
        stop: The stop string that ended the text, if one did; in the last one.
        tally: In the last one.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop: str | None = None
    tally: Tally | None = None

    def add(self, other: Piece) -> None:
        """Append a later piece."""
        self.text += other.text
        self.tokens += other.tokens
        self.logprobs += other.logprobs
        self.finish_reason = other.finish_reason
        self.stop = other.stop
        self.tally = other.tally


@dataclass(frozen=True)
class Accepted:
    """A choice was checked and waits for its row."""


Event = Accepted | Piece | AnswerError
