"""Who is next: requests take rows in turn, whatever the number of their choices.

Knows nothing of what waits, nor of rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


def largest_share(num_rows: int) -> int:
    """Rows that one request may have: three quarters, and at least one.

    The others are free for whoever comes next, who need not wait for an end.
    """
    return max(3 * num_rows // 4, 1)


class Turns(Generic[T]):
    """What waits, by owners who take turns.

    Args:
        most: How many of one owner's may be taken and not dropped.
        most_new: How many of these may have been taken and not begun.
        leaves_room: Whether others have room beside one owner's. Where they would not,
            it has one at a time.
    """

    def __init__(
        self,
        most: int,
        most_new: int,
        leaves_room: Callable[[Sequence[T]], bool] = lambda items: True,
    ) -> None:
        self._most = most
        self._most_new = most_new
        self._leaves_room = leaves_room
        self._waiting: dict[Hashable, deque[T]] = {}  # the next owner first
        self._taken: dict[Hashable, list[T]] = {}
        self._new: dict[Hashable, set[T]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def append(self, owner: Hashable, item: T) -> None:
        """Let something wait behind what its owner has waiting."""
        self._waiting.setdefault(owner, deque()).append(item)

    def take(self) -> T | None:
        """The next one; None where nobody may have more."""
        owner = next(filter(self._may_have_more, self._waiting), None)
        if owner is None:
            return None
        items = self._waiting.pop(owner)
        item = items.popleft()
        if items:
            self._waiting[owner] = items  # behind the others
        self._taken.setdefault(owner, []).append(item)
        self._new.setdefault(owner, set()).add(item)
        return item

    def begin(self, owner: Hashable, item: T) -> None:
        """Note that something that was taken has begun."""
        new = self._new.get(owner, set())
        new.discard(item)
        if not new:
            self._new.pop(owner, None)

    def drop(self, owner: Hashable, item: T) -> None:
        """Forget something that waits, or was taken and has ended."""
        items = self._waiting.get(owner, deque())
        if item in items:
            items.remove(item)
            if not items:
                del self._waiting[owner]
            return
        self.begin(owner, item)
        self._taken[owner].remove(item)
        if not self._taken[owner]:
            del self._taken[owner]

    def _may_have_more(self, owner: Hashable) -> bool:
        if len(self._new.get(owner, ())) >= self._most_new:
            return False
        taken = self._taken.get(owner, [])
        if not taken:
            return True
        more = [*taken, self._waiting[owner][0]]
        return len(more) <= self._most and self._leaves_room(more)
