"""One token of a generation, with its text and the figures so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..engine.stats import RoundStats
from ..sampling.logprobs import whole_logprobs


@dataclass(frozen=True)
class GenerationResponse:
    """One token of a generation: mlx-lm's fields, and what drafting did.

    Attributes:
        text: The next piece of text, perhaps empty.
        marked_text: The same with control tokens told from text that spells them, for
            ``AnswerReader``.
        token: The token id.
        from_draft: Whether the token had been proposed before the target chose it.
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
    stats: RoundStats = field(repr=False)
    marked_text: str = field(repr=False)
    _logits: mx.array = field(repr=False)  # of the whole round, [1, K + 1, V]
    _index: int = field(repr=False)
    _times_plain: Callable[[RoundStats], float | None] = field(repr=False)

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
    def times_plain(self) -> float | None:
        """How many times as fast as plain decoding the rounds were.

        By what was measured on this machine, when it is asked for; None where that does
        not tell, as without drafts.
        """
        return self._times_plain(self.stats) if self.stats.engaged else None

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
