"""Which tokens may come next in a row, and what it does to logits.

A row's matcher follows its tokens; text of any form has none. Knows nothing of rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..errors import RequestError
from ..sampling.host import LogitsProcessor
from ..sampling.masks import ALL, WORD, BlockMasks, Words, allow
from .constraint import Constraint, reason_of, refusal
from .library import limits, llguidance
from .thoughts import Phase, Place, Thoughts
from .tokenizer import control_tokens, grammar_tokenizer

_LIMIT = "max_thinking_tokens"
_NO_WAY = "NoExtension"  # what llguidance says where no token fits


class BoundConstraint:
    """A constraint with a tokenizer, for any number of rows.

    Args:
        constraint: The constraint; None for text of any form, whose thoughts alone can
            be limited. llguidance is not needed then.
        tokenizer: mlx-lm's.
        vocab_size: Number of the model's token ids, for text of any form.

    Raises:
        RequestError: The constraint cannot be compiled for the tokenizer's tokens, or
            no text of them follows it.
    """

    def __init__(
        self, constraint: Constraint | None, tokenizer: Any, *, vocab_size: int = 0
    ) -> None:
        self.constraint = constraint
        self._thoughts = Thoughts.of(tokenizer)
        self._num_words = -(-vocab_size // WORD)
        if constraint is None:
            self._thoughts = replace(self._thoughts, may_recur=True)
            self._eos = frozenset[int]()
            return
        self._tokenizer = grammar_tokenizer(tokenizer)
        self._grammar = constraint.numbered(control_tokens(tokenizer)).grammar
        self._eos = frozenset(self._tokenizer.eos_tokens)
        # Also shows what cannot be seen of the grammar alone.
        self._num_words = self.row((), self._eos).block(()).words.shape[1]

    @property
    def can_be_limited(self) -> bool:
        """Whether tokens tell thoughts from the rest."""
        return self._thoughts.are_told

    def limited(self, max_thinking_tokens: int) -> BoundConstraint:
        """The same, with thoughts of limited length.

        Args:
            max_thinking_tokens: Most tokens of a row's thoughts; the marks around them,
                their name, and what the prompt holds of one do not count. With 0 a
                thought that the prompt opens is closed at once, and none begins.

        Raises:
            RequestError: The model's marks of thoughts are no tokens.
        """
        if not self.can_be_limited:
            raise RequestError(
                f"{_LIMIT} must be left out for this model: got {max_thinking_tokens}. "
                "Its marks of thoughts are no tokens."
            )
        found = copy(self)
        found._thoughts = replace(self._thoughts, limit=max_thinking_tokens)
        return found

    def _matcher(self) -> Any:
        """A new matcher; None for text of any form.

        One matcher's copies share its lexer: where one row reaches the lexer's limits,
        the others would fail too.

        Raises:
            RequestError: The constraint cannot be compiled.
        """
        if self.constraint is None:
            return None
        matcher = llguidance().LLMatcher(
            self._tokenizer, self._grammar, limits=limits(), log_level=0
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
            self._matcher,
            what=_LIMIT if self.constraint is None else self.constraint.what,
            place=self._thoughts.behind(prompt),
            thoughts=self._thoughts,
            ends=ends,
            foreign_ends=self._eos.difference(ends),
            num_words=self._num_words,
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
        make_matcher: Makes a matcher of llguidance's, at the beginning of the answer;
            None where the answer has any form.
        what: What messages call the constraint.
        place: Where the first token stands.
        thoughts: Tells thoughts from the answer.
        ends: The tokens that end the row, allowed once the text is complete.
        foreign_ends: Those that llguidance allows then and that do not end the row.
        num_words: Of a mask.
    """

    def __init__(
        self,
        make_matcher: Callable[[], Any],
        *,
        what: str,
        place: Place,
        thoughts: Thoughts,
        ends: Collection[int],
        foreign_ends: Collection[int],
        num_words: int = 0,
    ) -> None:
        self._make_matcher = make_matcher
        self._matcher = make_matcher()
        self._what = what
        self._place = place
        self._thoughts = thoughts
        self._ends = frozenset(ends)
        self._foreign_ends = foreign_ends
        self._num_words = num_words
        self._consumed: list[int] = []  # tokens of the answer

    @property
    def is_complete(self) -> bool:
        """Whether the row must end now."""
        if self._matcher is None or self._place.phase is not Phase.ANSWER:
            return False
        return bool(self._matcher.is_stopped())

    def advance(self, token: int) -> None:
        """Follow a token that the mask has allowed and that does not end the row.

        Raises:
            RequestError: The mask does not allow it, or the matcher has reached its
                limits.
        """
        if not self._follow(token):
            self._first_mask()  # perhaps there is none, which says more
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
            is not allowed, or ends the row, every token is. Behind one where the
            matcher fails, all are that do not end the row: the next one is refused.

        Raises:
            RequestError: The matcher has reached its limits, or no token of the
                vocabulary goes on.
        """
        place, num_consumed = self._place, len(self._consumed)
        masks, forced = [self._first_mask()], [self._forced()]
        free = np.full_like(masks[0], ALL)
        try:
            for token in drafts:
                is_end = token in self._ends
                if is_end or not _has_bit(masks[-1], token) or not self._follow(token):
                    break
                masks.append(self._mask())
                forced.append(self._forced())
        except RequestError:  # behind a draft, which need not stand
            del self._consumed[num_consumed:]
            self._renew()
            _set_bits(free, self._ends, value=False)
        num_ahead = len(self._consumed) - num_consumed
        if num_ahead:
            self._matcher.rollback(num_ahead)
            del self._consumed[num_consumed:]
        self._place = place
        num_free = len(drafts) + 1 - len(masks)
        masks += [free] * num_free
        return BlockMasks(np.stack(masks), [*forced, *[[]] * num_free])

    def _first_mask(self) -> Words:
        """The mask of the next token of the row itself, [words].

        What a matcher may cost is counted over all that it has looked at, drafts that
        do not stand included. So only a new one's failure is the row's.
        """
        try:
            return self._mask()
        except RequestError:
            self._renew()
            return self._mask()

    def _renew(self) -> None:
        """Take a new matcher to where the row stands.

        Raises:
            RequestError: It does not get there within its limits.
        """
        self._matcher = self._make_matcher()
        num_followed = self._matcher.try_consume_tokens(self._consumed)
        if num_followed < len(self._consumed):
            raise self._failure()

    def _follow(self, token: int) -> bool:
        """Go on by a token; False, and nothing has changed, if it is not allowed.

        Raises:
            RequestError: The matcher has reached its limits.
        """
        if not self._thoughts.allow(self._place, token):
            return False
        after = self._thoughts.behind_token(self._place, token)
        is_answer = Phase.THOUGHT not in (self._place.phase, after.phase)
        if is_answer and self._matcher is not None:
            if not self._matcher.try_consume_tokens([token]):
                if self._matcher.is_error():
                    raise self._failure()
                return False
            self._consumed.append(token)
        self._place = after
        return True

    def _mask(self) -> Words:
        """The mask of the next token, [words]."""
        if self._place.phase is Phase.THOUGHT:
            return self._thought_mask()
        if self._matcher is None:
            words = self._full()
        else:
            words = self._answer_mask()
        if self._place.phase is Phase.OPEN and self._thoughts.start is not None:
            may_begin = self._thoughts.may_begin(self._place)
            _set_bits(words, (self._thoughts.start,), value=may_begin)
        return words

    def _thought_mask(self) -> Words:
        """That of a token in a thought."""
        words = self._full()
        closing = self._thoughts.closing(self._place)
        if closing:
            words[:] = 0
            _set_bits(words, closing, value=True)
        elif self._matcher is not None:
            _set_bits(words, self._ends, value=False)  # an answer comes first
        return words

    def _answer_mask(self) -> Words:
        """That of a token in an answer that has a form."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32).copy()
        self._check(words)
        if self._matcher.is_accepting():
            _set_bits(words, self._foreign_ends, value=False)
            _set_bits(words, self._ends, value=True)
        else:
            self._check_ends(words)
        return words

    def _check_ends(self, words: Words) -> None:
        """Raise where an end would be a token of a text that is not complete."""
        for token in (*self._ends, *self._foreign_ends):
            if _has_bit(words, token):
                raise RequestError(
                    f"{self._what} must have no token that ends the turn: got {token} "
                    f"behind {len(self._consumed)} tokens of the answer. Leave it out, "
                    "the end follows by itself."
                )

    def _full(self) -> Words:
        """A mask that allows everything."""
        return np.full(self._num_words, ALL, np.uint32)

    def _forced(self) -> list[int]:
        """The tokens that come next, as far as grammar and limit alone say."""
        if self._place.phase is Phase.THOUGHT:
            closing = self._thoughts.closing(self._place)
            return list(closing) if len(closing) == 1 else []
        if self._matcher is None or self._place.phase is not Phase.ANSWER:
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
        count = len(self._consumed)
        return RequestError(
            f"{self._what} must leave a token that goes on: got none behind "
            f"{count} tokens of the answer{reason or ''}. Make it simpler."
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


def _has_bit(words: Words, token: int) -> bool:
    """Whether a mask allows a token."""
    place, bit = divmod(token, WORD)
    return place < words.size and bool(words[place] >> np.uint32(bit) & np.uint32(1))


def _set_bits(words: Words, tokens: Collection[int], *, value: bool) -> None:
    """Let tokens be allowed in a mask, or not."""
    for token in tokens:
        place, bit = divmod(token, WORD)
        if place < words.size:
            one = np.uint32(1 << bit)
            words[place] = words[place] | one if value else words[place] & ~one
