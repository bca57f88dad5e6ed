"""One sequence to decode: what was asked for, and how far it has come.

It knows token ids and logits: nothing of models, caches or rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import mlx.core as mx

from ..sampling.host import HostRow, Judged, LogitsProcessor
from ..sampling.masks import BlockMasks
from .known_text import KnownText
from .lookup import LONGEST, UNKNOWN
from .request import Matcher, Request, RowMasks, settled
from .stats import RoundStats


@dataclass(eq=False)
class TokenSequence:
    """The host's knowledge of one sequence.

    Attributes:
        request: What was asked for, its sampling settled.
        index: How many sequences the decoder was given before.
        num_cached: Tokens that came in caches, before the prompt.
        offset: Tokens in the slabs, as of the last report read.
        host: Decides it, where the host does.
        emitted: The tokens emitted so far.
        finish_reason: Why it has ended; None while it is live.
        stats: Counts of its rounds.
        masks: What it may choose, as far as it was followed; None for anything.
        searched: Tokens that are searched before its own.
        text: These and all its tokens, where drafts may come from them.
        num_predicted: Tokens of the request's prediction that it has emitted.
    """

    request: Request
    index: int
    num_cached: int
    offset: int
    host: HostRow | None
    emitted: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stats: RoundStats = field(default_factory=RoundStats)
    masks: RowMasks | None = None
    searched: tuple[int, ...] = ()
    text: KnownText | None = None
    num_predicted: int = 0
    _matcher: Matcher | None = None
    _num_followed: int = 0  # of the emitted tokens, by the masks

    @classmethod
    def of(
        cls, request: Request, *, index: int = 0, num_cached: int = 0
    ) -> TokenSequence:
        """The sequence of a request."""
        request = settled(request)
        host, prompt = None, [*request.history, *request.prompt]
        if request.is_host:
            host = HostRow(
                prompt,
                processors=_processors(request, prompt),
                sampler=request.sampler,
                sampling=request.sampling,
                num_unseen=num_cached - len(request.history),
            )
        sequence = cls(
            request, index, num_cached, num_cached + len(request.prompt), host
        )
        sequence.stats.rule = request.accept_rule
        if request.constraint is not None and request.is_masked:
            sequence.masks = request.constraint.row(prompt, request.eos_token_ids)
        if request.stop_sequences is not None:
            sequence._matcher = request.stop_sequences.matcher()
        return sequence

    @property
    def known(self) -> list[int]:
        """The tokens before those emitted, as far as anybody said what they are."""
        request = self.request
        return [*(request.history or request.cached), *request.prompt]

    @property
    def match_length(self) -> int:
        """How many of its newest tokens stood in the text before, 0 to 16."""
        return 0 if self.text is None else self.text.length

    @property
    def num_emitted(self) -> int:
        """Tokens emitted so far."""
        return len(self.emitted)

    @property
    def last_position(self) -> int | None:
        """The position behind the longest text it may have; None for no limit."""
        limit = self.request.max_tokens
        start = self.num_cached + len(self.request.prompt)
        return None if limit is None else start + limit

    @property
    def is_live(self) -> bool:
        """Whether it has not ended yet."""
        return self.finish_reason is None

    @property
    def num_left(self) -> int | None:
        """Tokens that may still be emitted; None for no limit."""
        limit = self.request.max_tokens
        return None if limit is None else limit - self.num_emitted

    def wants_more_than(self, num_tokens: int) -> bool:
        """Whether the sequence is live and its budget exceeds ``num_tokens`` more."""
        left = self.num_left
        return self.is_live and (left is None or left > num_tokens)

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Cut a round's tokens at the request's end and count them."""
        taken = []
        ends = _Ends(self, self._matcher)
        for token in tokens:
            taken.append(token)
            self.finish_reason = ends.reason(token)
            if not self.is_live:
                break
        self.emitted += taken
        self._follow(taken)
        return taken

    def look_up(self) -> None:
        """From now on its drafts may come from its text."""
        known, prediction = self.known, self.request.prediction
        if prediction:
            # Behind what stands before the answer: it is found from its first token on.
            self.searched = (*known[-LONGEST:], *prediction, UNKNOWN)
        self.text = KnownText([*self.searched, *known])
        self._follow(self.emitted)

    @property
    def num_not_predicted(self) -> int:
        """Tokens of the prediction that it has not emitted; 0 where nobody looks."""
        if self.text is None:
            return 0
        return len(self.request.prediction) - self.num_predicted

    def block_masks(self, drafts: Sequence[int]) -> BlockMasks | None:
        """What it may choose in a block of drafts; None for anything.

        Raises:
            RequestError: It cannot go on.
        """
        if self.masks is None or not self.is_live:
            return None
        for token in self.emitted[self._num_followed :]:
            self._num_followed += 1
            self.masks.advance(token)
        return self.masks.block(drafts)

    def _follow(self, tokens: Sequence[int]) -> None:
        """Let its text grow, and count tokens that go on as the prediction does."""
        if self.text is None or not tokens:
            return
        if not self.searched:
            self.text.extend(tokens)
            return
        most = len(self.request.prediction)
        for token in tokens:  # one by one: the count does not depend on rounds
            is_next = self.text.goes_on(token, end=len(self.searched) - 1)
            self.num_predicted = min(self.num_predicted + is_next, most)
            self.text.extend([token])

    def judge(self, logits: mx.array, drafts: Sequence[int]) -> Judged:
        """Decide a block on the host; see ``HostRow.judge``."""
        assert self.host is not None
        ends = _Ends(self, copy(self._matcher))  # take() goes over the same tokens
        return self.host.judge(
            logits,
            drafts[: self.request.max_draft_tokens],
            is_end=lambda token: ends.reason(token) is not None,
        )


def _processors(request: Request, prompt: Sequence[int]) -> list[LogitsProcessor]:
    """What changes the logits of a row, in order."""
    found = list(request.logits_processors)
    if request.constraint is not None:
        found.append(request.constraint.processor(prompt, request.eos_token_ids))
    return found


class _Ends:
    """Where a sequence ends, asked of one token after the other.

    Args:
        sequence: The sequence, as it is before the first of them.
        matcher: Its place among its stop sequences; goes on with the tokens.
    """

    def __init__(self, sequence: TokenSequence, matcher: Matcher | None) -> None:
        self._request = sequence.request
        self._left = sequence.num_left
        self._matcher = matcher

    def reason(self, token: int) -> str | None:
        """Why the sequence ends with the next token; None where it does not."""
        if self._left is not None:
            self._left -= 1
        is_stop = self._matcher is not None and self._matcher.advance(token)
        if is_stop or token in self._request.eos_token_ids:
            return "stop"
        return "length" if self._left == 0 else None
