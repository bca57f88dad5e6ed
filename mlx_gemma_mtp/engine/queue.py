"""Requests that wait: for a seat, for memory, and for their prompts to be read.

Sequences are let in in the order they came, and only where all of them fit into memory
at their longest, so none that runs is ever sent away. Prompts that were begun are read
in turn, and short ones pass long ones, several in one forward where that is faster.
Knows nothing of rounds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ..cache.slabs import SlabLayout
from ..errors import RequestError
from .capacity import BatchPolicy, longest_text, most_slots
from .prefill import Prefill
from .sequence import TokenSequence
from .together import companions

# Prompts that are read side by side; each holds the caches of what was read of it.
# Short ones hold next to nothing and are not counted.
_MAX_READING = 8
# Tokens still to be read that take hardly longer than one: the weights are read for
# either. So few short prompts are read between two rounds.
SHORT = 256
# Short prompts that may pass before one is read in turn: half of a chunk.
MAX_PASSING = 4


@dataclass(frozen=True, eq=False)
class Waiting:
    """A sequence whose prompt was not read to its end."""

    sequence: TokenSequence
    prefill: Prefill

    @property
    def is_short(self) -> bool:
        """Whether reading the rest takes hardly longer than one token."""
        return self.prefill.num_tokens - self.prefill.num_read <= SHORT


class RequestQueue:
    """The requests that wait.

    Args:
        layout: Of the slabs.
        policy: How many sequences may decode together, and their memory.
        pads: Whether short prompts may be padded and read in one forward.
    """

    def __init__(
        self, layout: SlabLayout, policy: BatchPolicy, *, pads: bool = False
    ) -> None:
        self._layout = layout
        self._policy = policy
        self._pads = pads
        self._reading: deque[Waiting] = deque()
        self._outside: deque[Waiting] = deque()
        self._num_passed = 0  # since one was read in turn

    def __len__(self) -> int:
        return len(self._reading) + len(self._outside)

    def __iter__(self) -> Iterator[Waiting]:
        yield from self._reading
        yield from self._outside

    @property
    def num_bytes(self) -> int:
        """Memory of the prompts' caches, those that came with requests included."""
        caches = (cache for entry in self for cache in entry.prefill.caches)
        return sum(array.nbytes for cache in caches for array in cache.state)

    @property
    def longest_text(self) -> int | None:
        """Most tokens that one sequence may have, its prompt included; None for any."""
        if self._policy.max_kv_bytes is None:
            return None
        return longest_text(self._layout, self._policy.max_kv_bytes)

    def append(self, entries: Collection[Waiting]) -> None:
        """Let some wait behind the others: all of them, or none.

        Raises:
            RequestError: One could never fit into memory, even alone.
        """
        for entry in entries:
            self._check_fit(entry.sequence)
        self._outside.extend(entries)

    def find(self, sequence: TokenSequence) -> Waiting | None:
        """A sequence's entry; None where it does not wait."""
        return next((entry for entry in self if entry.sequence is sequence), None)

    def remove(self, sequence: TokenSequence) -> None:
        """Let a sequence wait no longer."""
        self._reading = deque(e for e in self._reading if e.sequence is not sequence)
        self._outside = deque(e for e in self._outside if e.sequence is not sequence)

    def clear(self) -> None:
        """Let nobody wait any longer."""
        self._reading.clear()
        self._outside.clear()

    def next(
        self,
        seated: Sequence[TokenSequence],
        paused: Collection[TokenSequence],
        *,
        most: int,
    ) -> list[Waiting]:
        """Whose prompts are to be read next, in one forward.

        Args:
            seated: The sequences that decode.
            paused: Those whose prompts are not to be read on for now.
            most: Tokens to read; a short prompt counts as ``SHORT`` of them.

        Returns:
            One entry, or several short ones; none where there is none, or no seat or
            memory for it yet.
        """
        self._let_in(seated)
        entries = [entry for entry in self._reading if entry.sequence not in paused]
        short = [entry for entry in entries if entry.is_short]
        long = next((entry for entry in entries if not entry.is_short), None)
        if long is None or (short and self._num_passed < MAX_PASSING):
            num_prompts = most // SHORT
            if long is not None:
                num_prompts = min(num_prompts, MAX_PASSING - self._num_passed)
            chosen = self._together(short, num_prompts)
            self._num_passed += len(chosen)
            return chosen
        self._num_passed = 0
        self._reading.remove(long)
        self._reading.append(long)
        return [long]

    def _together(self, short: Sequence[Waiting], most: int) -> list[Waiting]:
        """The first of some short prompts, and those that it is read with."""
        if not self._pads or len(short) < 2 or most < 2:
            return list(short[:1])
        first, *others = short
        places = first.prefill.places
        alike = [entry for entry in others if entry.prefill.places == places]
        size, *sizes = (e.prefill.next_size(SHORT) for e in (first, *alike))
        return [first, *(alike[i] for i in companions(size, sizes, most=most - 1))]

    def _let_in(self, seated: Sequence[TokenSequence]) -> None:
        """Let those in for whom there is a seat and memory."""
        most = self._policy.max_sequences
        while (entry := self._next_outside()) is not None:
            inside = [*seated, *(entry.sequence for entry in self._reading)]
            if most is not None and len(inside) >= most:
                return
            if not self._fits([*inside, entry.sequence]):
                return
            self._outside.remove(entry)
            self._reading.append(entry)

    def _next_outside(self) -> Waiting | None:
        """The next one to let in: the first one, or the first short one."""
        num_long = sum(not entry.is_short for entry in self._reading)
        may = (e for e in self._outside if e.is_short or num_long < _MAX_READING)
        return next(may, None)

    def _fits(self, sequences: Sequence[TokenSequence]) -> bool:
        """Whether sequences fit into memory together, however long they become."""
        most = self._policy.max_kv_bytes
        return most is None or self._most_bytes(sequences) <= most

    def _most_bytes(self, sequences: Sequence[TokenSequence]) -> float:
        """The most memory that sequences can come to need together."""
        slots = most_slots(sequences)
        if slots is None:
            return float("inf")
        return self._layout.num_bytes(self._policy.seats(len(sequences)), slots)

    def _check_fit(self, sequence: TokenSequence) -> None:
        """Raise if a sequence does not fit into memory, even alone."""
        if self._fits([sequence]):
            return
        assert self._policy.max_kv_bytes is not None
        length, needed = sequence.last_position, self._most_bytes([sequence])
        size = f"{needed / 1e6:.1f} MB for {length} tokens, the prompt included"
        raise RequestError(
            "a request's keys and values must fit into "
            f"{self._policy.max_kv_bytes / 1e6:.1f} MB: got "
            f"{'no limit of tokens' if length is None else size}. Ask for fewer "
            "tokens, or allow more memory."
        )
