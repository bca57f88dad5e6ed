"""How long answers may think: from a body's fields to a constraint.

Knows nothing of HTTP, of prompts, or of how a thought is ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..structure.masks import BoundConstraint
from .errors import bad_request
from .schema import NO_LIMIT, ChatBody, CompletionBody

NO_THINKING = "none"
# Most tokens of thoughts by reasoning_effort; others are no limit. The numbers are in
# wide use: those of low and medium are Google's own where it speaks OpenAI's API.
EFFORTS: Mapping[str, int] = {"minimal": 512, "low": 1024, "medium": 8192}
# The fields that state a limit; the first that says something counts.
LIMITS = ("max_thinking_tokens", "thinking_token_budget")


class ThinkingLimits:
    """Limits the thoughts of answers, for one model.

    Args:
        tokenizer: mlx-lm's.
        vocab_size: Number of token ids.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._any_form = BoundConstraint(None, tokenizer, vocab_size=vocab_size)

    @property
    def are_possible(self) -> bool:
        """Whether the marks of thoughts are tokens."""
        return self._any_form.can_be_limited

    def check(self, body: ChatBody | CompletionBody) -> None:
        """Refuse a limit that cannot be kept.

        Raises:
            AnswerError: One is asked for, and the marks of thoughts are no tokens.
        """
        for name, asked in _asked(body).items():
            if asked not in (None, NO_LIMIT) and not self.are_possible:
                raise bad_request(
                    f"{name} must be left out for this model: got {asked}. Its marks "
                    "of thoughts are no tokens.",
                    name,
                )

    def constraint_of(
        self,
        body: ChatBody | CompletionBody,
        form: BoundConstraint | None,
        *,
        is_thinking: bool,
        max_tokens: int,
    ) -> BoundConstraint | None:
        """What an answer must be, its thoughts limited where a body says so.

        Args:
            body: The request.
            form: The form of the answer; None for any.
            is_thinking: Whether thoughts are asked for, as far as is known.
            max_tokens: Most tokens of the answer.
        """
        limit = _limit_of(body, is_thinking=is_thinking)
        # Masks for one that is never reached would only cost time.
        if limit is None or limit > max_tokens or not self.are_possible:
            return form
        return (form or self._any_form).limited(limit)


def _asked(body: ChatBody | CompletionBody) -> dict[str, int | None]:
    """The limits that a body states, by the names of the fields."""
    given = (body.max_thinking_tokens, body.thinking_token_budget)
    return dict(zip(LIMITS, given, strict=True))


def _limit_of(body: ChatBody | CompletionBody, *, is_thinking: bool) -> int | None:
    """Most tokens of thoughts that a body asks for; None for any number."""
    for asked in _asked(body).values():
        if asked is not None:
            return None if asked == NO_LIMIT else asked
    if isinstance(body, CompletionBody) or body.reasoning_effort is None:
        return None
    return EFFORTS.get(body.reasoning_effort.lower()) if is_thinking else None
