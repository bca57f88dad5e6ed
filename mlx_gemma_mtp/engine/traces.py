"""What a thread has traced: functions that one thread alone makes, calls and counts.

MLX finds what it traced by a function's address, in a cache that every thread has of
its own, and where the function ends it erases only what its last caller's cache holds.
Another thread that has called it keeps its part, and takes it for the next function at
that address. So no function here is ever called by two threads. They end with their
owner, with their thread, or when the thread has called too many others since.

It knows nothing of what the functions do.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import count
from typing import Any, Generic, TypeVar
from weakref import ReferenceType, ref

Function = TypeVar("Function", bound=Callable[..., object])

# Functions that a thread keeps, of all owners. A round of 30 layers takes 5 to 8 MB.
MAX_TRACES = 64

_numbers = count()


class _Functions(dict[Hashable, Function]):
    """The functions of one owner and thread; unlike a dict's, it can be referred to."""


class _Own(threading.local, Generic[Function]):
    """The functions of one owner, for every thread its own."""

    def __init__(self) -> None:
        self.functions: _Functions[Function] = _Functions()


class _Recent(threading.local):
    """Where a thread's functions are, of all owners: the last one called comes last."""

    def __init__(self) -> None:
        self.places: OrderedDict[
            tuple[int, Hashable], ReferenceType[_Functions[Any]]
        ] = OrderedDict()

    def make_room(self) -> None:
        """Let go of what was called the longest ago, so that one more may be kept."""
        for place in [p for p, owned in self.places.items() if owned() is None]:
            del self.places[place]
        while len(self.places) >= MAX_TRACES:
            (_, key), owned = self.places.popitem(last=False)
            functions = owned()
            if functions is not None:
                functions.pop(key, None)


_recent = _Recent()


class Traces(Generic[Function]):
    """The functions of one owner.

    Attributes:
        structure: What all of them depend on.
    """

    def __init__(self) -> None:
        self.structure: object = None
        self._number = next(_numbers)
        self._own: _Own[Function] = _Own()

    def __len__(self) -> int:
        """How many this thread has."""
        return len(self._own.functions)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._own.functions

    def get(self, key: Hashable) -> Function | None:
        """This thread's function for a key, which is then the last one called."""
        found = self._own.functions.get(key)
        if found is not None:
            _recent.places.move_to_end((self._number, key))
        return found

    def add(self, key: Hashable, function: Function) -> Function:
        """Keep a function that this thread has made."""
        _recent.make_room()
        functions = self._own.functions
        functions[key] = function
        _recent.places[self._number, key] = ref(functions)
        return function

    def fit(self, structure: object) -> None:
        """Let go of all functions, of every thread, where the structure has changed."""
        if structure != self.structure:
            self.structure = structure
            self._own = _Own()
