"""Whether tracing rounds that take their drafts from the text pays.

Tracing takes the time of many rounds, and saves nothing if the text soon stops to
repeat itself. It is the ski rental problem: buy, or go on renting while nobody knows
how long? Whoever buys once the rent has come to the price never pays more than twice
what was best in hindsight (Karlin, Manasse, Rudolph, Sleator, "Competitive Snoopy
Caching", 1988, section 2). The rent here is what rounds took more for want of a trace,
over all texts of a process. What such rounds have saved per token of late can say
sooner that it pays.

Numbers in, numbers out: knows nothing of texts or rounds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from ..constants import MAX_DRAFT_TOKENS

_MEMORY = 500.0  # tokens
_UNSEEN = 150.0  # tokens that count as if nothing could have been saved in them
_LEAST_RENT = 0.25  # of the price, before a guess of what is to come counts
_SURPLUS = 3.0  # times the price, that the tokens left must be thought to save


class SkiRental:
    """What was missed, and could be saved, by numbers of drafts K."""

    def __init__(self) -> None:
        self._rent_s = [0.0] * (MAX_DRAFT_TOKENS + 1)
        self._saved_s = [0.0] * (MAX_DRAFT_TOKENS + 1)
        self._num_tokens = _UNSEEN

    def note(self, num_tokens: float, saved_s: Mapping[int, float]) -> None:
        """Count a round.

        Args:
            num_tokens: What it emits.
            saved_s: For each of these tokens, what rounds of a K from the text would
                save over those that need none, seconds; a K that saves nothing may be
                left out.
        """
        kept = math.exp(-num_tokens / _MEMORY)
        self._num_tokens = kept * self._num_tokens + num_tokens
        self._saved_s = [kept * s for s in self._saved_s]
        for k, seconds in saved_s.items():
            self._saved_s[k] += num_tokens * seconds

    def pays(
        self,
        num_draft_tokens: int,
        *,
        ready: Collection[int],
        rent_s: float,
        price_s: float,
        left: int,
    ) -> bool:
        """Whether a K shall be traced now, after one more round without it.

        Args:
            num_draft_tokens: K.
            ready: The K's that are traced.
            rent_s: What that round takes more for want of it, seconds.
            price_s: What tracing takes, seconds.
            left: Tokens that may still come.
        """
        k = num_draft_tokens
        self._rent_s[k] += rent_s
        if self._rent_s[k] < _LEAST_RENT * price_s:
            return False
        others_s = max((self._saved_s[other] for other in ready), default=0.0)
        coming_s = left * (self._saved_s[k] - others_s) / self._num_tokens
        if self._rent_s[k] < price_s and coming_s < _SURPLUS * price_s:
            return False
        self._rent_s[k] = 0.0  # for the next text's trace it is paid anew
        return True
