"""Who is next: requests take rows in turn, whatever the number of their choices.

Knows nothing of what waits, nor of rows.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


def largest_share(num_rows: int) -> int:
    """Rows that one request may have: three quarters, and at least one.

    The others are free for whoever comes next, who need not wait for an end.
    """
    return max(3 * num_rows // 4, 1)


class Turns(Generic[T]):
    """What waits, by owners who take turns.

    Args:
        most: How many of one owner's may be taken and not dropped.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: dict[Hashable, deque[T]] = {}  # the next owner first
        self._taken: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def append(self, owner: Hashable, item: T) -> None:
        """Let something wait behind what its owner has waiting."""
        self._waiting.setdefault(owner, deque()).append(item)

    def take(self) -> T | None:
        """The next one; None where nobody may have more."""
        may = (o for o in self._waiting if self._taken[o] < self._most)
        owner = next(may, None)
        if owner is None:
            return None
        items = self._waiting.pop(owner)
        item = items.popleft()
        if items:
            self._waiting[owner] = items  # behind the others
        self._taken[owner] += 1
        return item

    def drop(self, owner: Hashable, item: T) -> None:
        """Forget something that waits, or was taken and has ended."""
        items = self._waiting.get(owner, deque())
        if item in items:
            items.remove(item)
            if not items:
                del self._waiting[owner]
            return
        self._taken[owner] -= 1
        if not self._taken[owner]:
            del self._taken[owner]
