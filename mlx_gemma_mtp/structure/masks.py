"""Which tokens may come next in a row, and what it does to logits.

A row's matcher follows its tokens. Knows nothing of rounds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..errors import RequestError
from ..sampling.host import LogitsProcessor
from ..sampling.masks import ALL, WORD, BlockMasks, Words, allow
from .constraint import Constraint, reason_of, refusal
from .library import limits, llguidance
from .thoughts import Phase, Thoughts
from .tokenizer import grammar_tokenizer

_NO_WAY = "NoExtension"  # what llguidance says where no token fits


class BoundConstraint:
    """A constraint with a tokenizer, for any number of rows.

    Args:
        constraint: The constraint.
        tokenizer: mlx-lm's.

    Raises:
        RequestError: The constraint cannot be compiled for the tokenizer's tokens, or
            no text of them follows it.
    """

    def __init__(self, constraint: Constraint, tokenizer: Any) -> None:
        made = grammar_tokenizer(tokenizer)
        self.constraint = constraint
        self._eos = frozenset(made.eos_tokens)
        self._thoughts = Thoughts.of(tokenizer)
        self._tokenizer = made
        # Also shows what cannot be seen of the grammar alone.
        self.row((), self._eos).block(())

    def _matcher(self) -> Any:
        """A new matcher.

        One matcher's copies share its lexer: where one row reaches the lexer's limits,
        the others would fail too.

        Raises:
            RequestError: The constraint cannot be compiled.
        """
        matcher = llguidance().LLMatcher(
            self._tokenizer, self.constraint.grammar, limits=limits(), log_level=0
        )
        if matcher.is_error():
            raise refusal(self.constraint.what, matcher.get_error())
        return matcher

    def row(self, prompt: Sequence[int], ends: Collection[int]) -> RowMasks:
        """The masks of a row, before its first token.

        Args:
            prompt: All tokens before it.
            ends: The tokens that end it.
        """
        return RowMasks(
            self._matcher(),
            what=self.constraint.what,
            phase=self._thoughts.behind(prompt),
            thoughts=self._thoughts,
            ends=ends,
            foreign_ends=self._eos.difference(ends),
        )

    def processor(
        self, prompt: Sequence[int], ends: Collection[int]
    ) -> LogitsProcessor:
        """What bans tokens from a row's logits, called for one token after the other.

        Args:
            prompt: All tokens that the first call sees as its history.
            ends: The tokens that end the row.
        """
        return _Processor(self.row(prompt, ends), len(prompt))


class RowMasks:
    """The masks of one row, which follow its tokens.

    Args:
        matcher: llguidance's, at the beginning of the answer; the row's own.
        what: What messages call the constraint.
        phase: What the first token belongs to.
        thoughts: Tells thoughts from the answer.
        ends: The tokens that end the row, allowed once the text is complete.
        foreign_ends: Those that llguidance allows then and that do not end the row.
    """

    def __init__(
        self,
        matcher: Any,
        *,
        what: str,
        phase: Phase,
        thoughts: Thoughts,
        ends: Collection[int],
        foreign_ends: Collection[int],
    ) -> None:
        self._matcher = matcher
        self._what = what
        self._phase = phase
        self._thoughts = thoughts
        self._ends = frozenset(ends)
        self._foreign_ends = foreign_ends
        self._num_consumed = 0  # tokens of the answer

    @property
    def is_complete(self) -> bool:
        """Whether the row must end now."""
        return self._phase is Phase.ANSWER and bool(self._matcher.is_stopped())

    def advance(self, token: int) -> None:
        """Follow a token that the mask has allowed and that does not end the row.

        Raises:
            RequestError: The mask does not allow it, or the matcher has reached its
                limits.
        """
        if not self._follow(token):
            raise RequestError(
                f"{self._what} must allow every token of the row: got {token}, which "
                "it does not. Let no sampler choose banned tokens."
            )

    def block(self, drafts: Sequence[int]) -> BlockMasks:
        """The masks of a round's rows; the row itself does not go on.

        Args:
            drafts: K token ids, proposed to follow each other.

        Returns:
            Masks of the tokens in front of and behind each draft. Behind a draft that
            is not allowed, or ends the row, every token is.

        Raises:
            RequestError: The matcher has reached its limits, or no token of the
                vocabulary goes on.
        """
        phase, num_consumed = self._phase, self._num_consumed
        masks, forced = [self._mask()], [self._forced()]
        for token in drafts:
            if token in self._ends or not self._follow(token):
                break
            masks.append(self._mask())
            forced.append(self._forced())
        if self._num_consumed > num_consumed:
            self._matcher.rollback(self._num_consumed - num_consumed)
        self._phase, self._num_consumed = phase, num_consumed
        num_free = len(drafts) + 1 - len(masks)
        masks += [np.full_like(masks[0], ALL)] * num_free
        return BlockMasks(np.stack(masks), [*forced, *[[]] * num_free])

    def _follow(self, token: int) -> bool:
        """Go on by a token; False, and nothing has changed, if it is not allowed.

        Raises:
            RequestError: The matcher has reached its limits.
        """
        before, after = self._phase, self._thoughts.behind_token(self._phase, token)
        is_answer = before is not Phase.THOUGHT and after is Phase.ANSWER
        if is_answer and not self._matcher.try_consume_tokens([token]):
            if self._matcher.is_error():
                raise self._failure()
            return False
        self._num_consumed += is_answer
        self._phase = after
        return True

    def _mask(self) -> Words:
        """The mask of the next token, [words]."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32).copy()
        if self._phase is Phase.THOUGHT:
            words[:] = ALL
            _set_bits(words, self._ends, value=False)  # an answer comes first
            return words
        self._check(words)
        _set_bits(words, self._foreign_ends, value=False)
        if self._matcher.is_accepting():
            _set_bits(words, self._ends, value=True)
        if self._phase is Phase.OPEN and self._thoughts.start is not None:
            _set_bits(words, (self._thoughts.start,), value=True)
        return words

    def _forced(self) -> list[int]:
        """The tokens that come next, as far as the grammar alone says."""
        if self._phase is not Phase.ANSWER:
            return []
        return cast(list[int], self._matcher.compute_ff_tokens())

    def _check(self, words: Words) -> None:
        """Raise where the matcher has failed, or leaves nothing to choose."""
        if not words.any() or self._matcher.is_error():
            raise self._failure()

    def _failure(self) -> RequestError:
        """What says that nothing goes on, and why."""
        error = self._matcher.get_error()
        reason = error and not error.startswith(_NO_WAY) and f", {reason_of(error)}"
        return RequestError(
            f"{self._what} must leave a token that goes on: got none behind "
            f"{self._num_consumed} tokens of the answer{reason or ''}. Make it simpler."
        )


class _Processor:
    """Bans what masks do not allow; mlx-lm's signature.

    Args:
        masks: The row's.
        num_seen: Tokens that the first call sees as its history.
    """

    def __init__(self, masks: RowMasks, num_seen: int) -> None:
        self._masks = masks
        self._num_seen = num_seen

    def __call__(self, history: mx.array, logits: mx.array) -> mx.array:
        for token in cast(list[int], history[self._num_seen :].tolist()):
            self._masks.advance(token)
        self._num_seen = history.size
        if self._masks.is_complete:  # no ban of others keeps the end away
            logits = mx.maximum(logits, mx.finfo(logits.dtype).min)
        return allow(logits, mx.array(self._masks.block(()).words))


def _set_bits(words: Words, tokens: Collection[int], *, value: bool) -> None:
    """Let tokens be allowed in a mask, or not."""
    for token in tokens:
        place, bit = divmod(token, WORD)
        if place < words.size:
            one = np.uint32(1 << bit)
            words[place] = words[place] | one if value else words[place] & ~one
