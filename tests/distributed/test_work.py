"""Work and rest: what is over is let go.

Run: python -m pytest tests/distributed/test_work.py
"""

from typing import Any

import pytest

from mlx_gemma_mtp.distributed.work import begin_work, end_work, working
from mlx_gemma_mtp.errors import RanksError, RequestError


class Other:
    """Another rank; rank 0 has work, has ended, or is lost."""

    rank = 1
    is_first = is_lost = False

    def __init__(self, *, has_work: bool | None) -> None:
        self._has_work = has_work

    def check(self) -> None:
        if self.is_lost:
            raise RanksError("Rank 1 is lost.")

    def rest(self) -> None:
        pass

    def wake(self) -> bool:
        if self._has_work is None:
            self.is_lost = True
            raise RanksError("Rank 0 is lost.")
        return self._has_work


@pytest.mark.parametrize("has_work", [False, None])
def test_behind_rank_0s_end_nothing_is_at_work(has_work):
    ranks: Any = Other(has_work=has_work)
    begin_work(ranks)
    end_work(ranks)
    with pytest.raises(RanksError, match="Rank 0"):
        begin_work(ranks)
    with pytest.raises(RanksError, match=r"Rank 1 is lost\."):
        begin_work(ranks)


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [(RequestError("no"), False), (KeyError("a"), True), (KeyboardInterrupt(), False)],
)
def test_who_fails_by_itself_has_lost_the_others(error, is_lost):
    """What the package refuses, or a user ends, all ranks hear of alike."""
    ranks: Any = Other(has_work=True)
    with pytest.raises(type(error)), working(ranks):
        raise error
    assert ranks.is_lost == is_lost
    if not is_lost:
        with working(ranks):
            pass
    ranks.is_lost = True


def test_one_text_at_a_time():
    ranks: Any = Other(has_work=True)
    begin_work(ranks)
    for _ in range(2):
        with pytest.raises(RequestError, match="one text at a time"):
            begin_work(ranks)
    end_work(ranks)
    begin_work(ranks)
    end_work(ranks)
    ranks.is_lost = True  # no rank 0 to wait for at the end of this program
