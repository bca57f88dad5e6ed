"""What comparisons of kernels come to. Knows nothing of kernels but their names."""

from __future__ import annotations

from dataclasses import dataclass, field

MATMUL = "matmul"
DECIDING = ("select", "propose", "decide", "threshold", "judge", "resample")
NAMES = (MATMUL, *DECIDING)

MAX_CLOSE = 0.05  # share of a kernel's rows that may be close calls
_MAX_MESSAGE = 160


@dataclass
class Tally:
    """What was compared for one kernel.

    Attributes:
        rows: Rows compared.
        close: Rows that rounding decides.
        wrong: Rows with another answer.
        max_error: Largest error of a sum, relative.
        first_wrong: Where the first wrong row was met.
        error: Why it could not be run, the first time; empty where it could.
    """

    rows: int = 0
    close: int = 0
    wrong: int = 0
    max_error: float = 0.0
    first_wrong: str = ""
    error: str = ""

    def add(
        self, place: str, *, is_wrong: bool, is_close: bool = False, num_rows: int = 1
    ) -> None:
        """Count a row, or several that are judged as one."""
        self.rows += num_rows
        self.close += num_rows * is_close
        self.wrong += num_rows * is_wrong
        if is_wrong and not self.first_wrong:
            self.first_wrong = place

    @property
    def is_right(self) -> bool:
        """Whether no row was wrong, and few were close; a lone one says nothing."""
        if self.error:
            return False
        return not self.wrong and self.close <= max(2, MAX_CLOSE * self.rows)

    def __str__(self) -> str:
        """All of it on one line."""
        parts = [f"{self.rows:>5} rows, {self.close} close calls"]
        if self.max_error:
            parts.append(f"sums within {self.max_error:.0e}")
        if self.wrong:
            parts.append(f"{self.wrong} wrong, first in {self.first_wrong}")
        if self.error:
            parts.append(self.error)
        return ", ".join(parts)


@dataclass
class Tallies:
    """The tallies of the kernels that are compared, and where the comparison stands."""

    of: dict[str, Tally] = field(
        default_factory=lambda: {name: Tally() for name in NAMES}
    )
    place: str = ""

    def add(
        self, name: str, *, is_wrong: bool, is_close: bool = False, num_rows: int = 1
    ) -> None:
        """Count a row of a kernel, or several that are judged as one."""
        self.of[name].add(
            self.place, is_wrong=is_wrong, is_close=is_close, num_rows=num_rows
        )

    def fail(self, name: str, error: Exception) -> None:
        """Note that a kernel could not be run."""
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if not self.of[name].error:
            self.of[name].error = f"{message[:_MAX_MESSAGE]} in {self.place}"
