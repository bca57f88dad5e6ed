"""Headers of exchanges: ranks that mean different things find out.

Run: python -m pytest tests/distributed/test_headers.py
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.distributed.headers import Header, Kind, headers_of
from mlx_gemma_mtp.errors import RanksError

numbers = st.integers(0, 2**32 - 1)


@settings(max_examples=30)
@given(st.lists(st.binary(), min_size=1, max_size=4), st.sampled_from(Kind), numbers)
def test_ranks_in_step_read_each_other(payloads, kind, number):
    sent = [Header.of(kind, number, payload) for payload in payloads]
    rows = [header.row for header in sent]
    assert headers_of(rows, sent[0], 0) == sent
    for rank, (header, payload) in enumerate(zip(sent, payloads, strict=True)):
        header.check(payload, rank)


@settings(max_examples=30)
@given(st.lists(numbers, min_size=4, max_size=4))
def test_floats_of_a_layer_are_no_header(row):
    mine = Header(Kind.BARRIER, 7, 0)
    if row == mine.row:
        return
    with pytest.raises(RanksError, match="same steps"):
        headers_of([mine.row, [row[0], row[1] ^ 1, *row[2:]]], mine, 0)


def test_another_exchange_is_named():
    mine, other = Header(Kind.SHARE, 12, 5), Header(Kind.BARRIER, 13, 0)
    with pytest.raises(RanksError) as caught:
        headers_of([other.row, mine.row], mine, 1)
    assert str(caught.value) == (
        "Ranks must take the same steps: got share 12 on rank 1, barrier 13 on rank 0."
        " Start the same command with the same files on all."
    )


def test_what_is_no_header_is_named():
    mine = Header(Kind.GATHER, 3, 5)
    with pytest.raises(RanksError, match="got something else from rank 1"):
        headers_of([mine.row, [0x3F800000] * 4], mine, 0)


def test_a_rank_that_does_not_get_its_own_numbers_finds_out():
    mine, other = Header(Kind.GATHER, 3, 5), Header(Kind.GATHER, 3, 6)
    with pytest.raises(RanksError, match="other numbers than rank 1 itself sent"):
        headers_of([mine.row, other.row], mine, 1)


@settings(max_examples=30)
@given(st.binary(min_size=1), st.data())
def test_one_changed_bit_is_found(payload, data):
    header = Header.of(Kind.SHARE, 1, payload)
    place = data.draw(st.integers(0, len(payload) - 1))
    changed = bytearray(payload)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(RanksError, match="other bytes than rank 0 sent in share 1"):
        header.check(bytes(changed), 0)
