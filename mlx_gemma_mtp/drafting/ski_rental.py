"""Whether tracing rounds that take their drafts from the text pays.

Tracing takes the time of many rounds, and nobody knows for how long it will serve: the
text may stop to repeat itself, the next one may need rounds of another size. It is the
ski rental problem: buy, or go on renting? Whoever buys once the rent has come to the
price pays at most twice what was best in hindsight (Karlin, Manasse, Rudolph, Sleator,
"Competitive Snoopy Caching", 1988, section 2). The rent here is what rounds took more
for want of a trace, over all texts of a process. Where traces have not saved yet what
they took, such as where each text needs its own, that is a debt, and the next one has
to be missed for so much longer.

Numbers in, numbers out: knows nothing of texts or rounds.
"""

from __future__ import annotations

_INTEREST = 2.0  # times a debt, that must have been missed on top


class SkiRental:
    """What was missed for want of a trace, and what is owed for traces."""

    def __init__(self) -> None:
        self._rent_s = 0.0
        self._debt_s = 0.0

    def repay(self, saved_s: float) -> None:
        """Count a round that a trace has served.

        Args:
            saved_s: What it took less than without, seconds.
        """
        self._debt_s = max(self._debt_s - saved_s, 0.0)

    def pays(self, *, rent_s: float, price_s: float, coming_s: float) -> bool:
        """Whether to trace now, before one more round without a trace.

        Args:
            rent_s: What that round takes more for want of it, seconds.
            price_s: What tracing takes, seconds.
            coming_s: What the tokens that are left would save at best, seconds.
        """
        self._rent_s += rent_s
        if self._rent_s < price_s + _INTEREST * self._debt_s or coming_s < price_s:
            return False
        self._rent_s = 0.0
        self._debt_s += price_s
        return True
