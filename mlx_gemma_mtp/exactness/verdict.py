"""What a probe has found, and which routes follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..constants import ALL_DRAFTS
from ..drafting.saved_numbers import numbers
from ..engine.route import Route

# Rows of a plain round: as it is, and filled up to take the kernels of several rows.
PLAIN_ROWS = (1, 2)
_FORM = 3  # of a verdict's dictionary
_MOST = 1e9  # of any of its numbers; more is damage


@dataclass(frozen=True)
class Verdict:
    """What the probe found on one machine, for one pair and number of rows.

    Attributes:
        equal: For each entry of ``PLAIN_ROWS`` the numbers of drafts, 1 to 8, whose
            rounds gave the same bytes as plain rounds of so many rows.
        max_difference: Largest difference of a logit between plain rounds of one row
            and any other round; 0.0 where all bytes are equal.
        fill_cost: Time of a plain round of the target filled up to two rows over that
            of one as it is, 1.0 or more.
        num_passes: Forward passes of the target that it took.
        seconds: What they took, compilation included.
    """

    equal: Mapping[int, tuple[int, ...]]
    max_difference: float
    fill_cost: float
    num_passes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "form": _FORM,
            "equal": {str(rows): list(drafts) for rows, drafts in self.equal.items()},
            "max_difference": self.max_difference,
            "fill_cost": self.fill_cost,
            "num_passes": self.num_passes,
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Verdict:
        """What ``to_dict`` gave.

        Raises:
            ValueError: It gave something else.
        """
        numbers(values, "form", 1, low=_FORM, high=_FORM)
        equal = values.get("equal")
        if not isinstance(equal, Mapping):
            raise ValueError(f"equal must be drafts by rows: got {equal!r:.80}")
        (max_difference,) = numbers(values, "max_difference", 1, low=0, high=_MOST)
        (fill_cost,) = numbers(values, "fill_cost", 1, low=1, high=_MOST)
        (num_passes,) = numbers(values, "num_passes", 1, low=0, high=_MOST)
        (seconds,) = numbers(values, "seconds", 1, low=0, high=_MOST)
        return cls(
            {rows: _drafts(equal.get(str(rows))) for rows in PLAIN_ROWS},
            max_difference,
            fill_cost,
            int(num_passes),
            seconds,
        )


def exact_routes(verdict: Verdict) -> list[Route]:
    """The routes whose text equals plain decoding's, the one with most drafts first.

    Without a number of drafts that was proved only plain decoding is left.
    """
    routes = [
        Route(
            min_rows=rows,
            allowed=(0, *verdict.equal[rows]),
            is_exact=True,
            max_difference=verdict.max_difference,
            state=_proved(rows, verdict.equal[rows]),
        )
        for rows in PLAIN_ROWS
    ]
    # Of two with as many drafts the one without filling is the faster.
    return sorted(routes, key=lambda route: (-len(route.allowed), route.min_rows))


def _proved(rows: int, drafts: tuple[int, ...]) -> str:
    filled = ", plain rounds filled up to 2 rows" if rows > 1 else ""
    if not drafts:
        return "exact: plain decoding"
    return f"exact: logits proved byte-equal for K = {_ranges((0, *drafts))}{filled}"


def _drafts(values: object) -> tuple[int, ...]:
    """Numbers of drafts as a verdict keeps them.

    Raises:
        ValueError: They are something else.
    """
    if not isinstance(values, list) or not all(
        type(v) is int and v in ALL_DRAFTS[1:] for v in values
    ):
        raise ValueError(f"equal must be numbers of drafts: got {values!r:.80}")
    return tuple(sorted(set(map(int, values))))


def _ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers in words: 0 to 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(
        str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs
    )
