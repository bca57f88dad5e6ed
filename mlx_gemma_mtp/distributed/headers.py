"""What each rank says of itself in an exchange, so that no rank takes garbage for news.

MLX's backends frame nothing: ranks that meet in different collectives get each other's
bytes, without an error. So each exchange begins with one row of four numbers from every
rank. Knows nothing of how rows travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from zlib import crc32

from ..errors import RanksError

_MARK = 0x6D747000  # above a kind, in the first number
_LAST = 2**32

Row = Sequence[int]  # 4 numbers below 2**32


class Kind(IntEnum):
    """What an exchange is for."""

    SHARE = 1
    GATHER = 2
    BARRIER = 3
    BEAT = 4
    VOTE = 5


class Word(IntEnum):
    """What a rank says in a beat: it has no work, or has some; rank 0, that it ends."""

    IDLE = 0
    WORK = 1
    END = 2


@dataclass(frozen=True)
class Header:
    """One rank's row.

    Attributes:
        kind: What the exchange is for.
        number: Exchanges that the rank had before.
        value: Bytes that follow; in a beat, its word; in a vote, 1 for yes.
        checksum: Of these bytes.
    """

    kind: Kind
    number: int
    value: int
    checksum: int = 0

    @classmethod
    def of(cls, kind: Kind, number: int, payload: bytes) -> Header:
        """The header of some bytes."""
        return cls(kind, number, len(payload), crc32(payload))

    @property
    def row(self) -> Row:
        """Four numbers below 2**32."""
        return [_MARK | self.kind, self.number % _LAST, self.value, self.checksum]

    @property
    def name(self) -> str:
        """The exchange for a message."""
        return f"{self.kind.name.lower()} {self.number}"

    def check(self, payload: bytes, rank: int) -> None:
        """Make sure that bytes came as they were sent.

        Args:
            payload: What came.
            rank: Whose it is.

        Raises:
            RanksError: These are other bytes.
        """
        if crc32(payload) != self.checksum:
            raise _out_of_step(f"other bytes than rank {rank} sent in {self.name}")


def headers_of(rows: Sequence[Row], mine: Header, rank: int) -> list[Header]:
    """What all ranks say, where they mean the same exchange.

    Args:
        rows: One of each rank.
        mine: What this rank has said.
        rank: This rank.

    Raises:
        RanksError: A rank is elsewhere.
    """
    headers = [_read(row, number) for number, row in enumerate(rows)]
    if headers[rank] != mine:
        raise _out_of_step(f"other numbers than rank {rank} itself sent")
    for other, header in enumerate(headers):
        if header.name != mine.name:
            where = f"{mine.name} on rank {rank}, {header.name} on rank {other}"
            raise _out_of_step(where)
    return headers


def _read(row: Row, rank: int) -> Header:
    kind = row[0] ^ _MARK
    if kind not in Kind.__members__.values():
        raise _out_of_step(f"something else from rank {rank}")
    return Header(Kind(kind), *row[1:])


def _out_of_step(found: str) -> RanksError:
    return RanksError(
        f"Ranks must take the same steps: got {found}."
        " Start the same command with the same files on all."
    )
