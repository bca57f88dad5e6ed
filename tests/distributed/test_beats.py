"""Beats of ranks at rest: they begin, end, and say when they fail.

Run: python -m pytest tests/distributed/test_beats.py
"""

import threading
import time
from itertools import islice

import pytest

from mlx_gemma_mtp.distributed import beats
from mlx_gemma_mtp.distributed.beats import LONGEST_S, Beats, pauses
from mlx_gemma_mtp.errors import RanksError


def test_pauses_grow_to_the_longest():
    first = list(islice(pauses(), 10))
    assert first[:5] == [0.002, 0.004, 0.008, 0.016, 0.032]
    assert set(first[5:]) == {LONGEST_S}
    assert LONGEST_S < 0.05


class Beaten:
    """Counts beats, and waits for some; the last one ends the rest."""

    def __init__(self, error=None, last=None):
        self.num, self.threads = 0, set()
        self.failures: list[str] = []
        self.has_failed, self.ends = threading.Event(), threading.Event()
        self.error = error
        self.last = last
        self.changed = threading.Condition()
        self.beats = Beats(self.beat, self.fail)

    def beat(self):
        with self.changed:
            self.num += 1
            self.threads.add(threading.get_ident())
            self.changed.notify_all()
        if self.error:
            raise self.error
        return self.num == self.last

    def fail(self, line):
        self.failures.append(line)
        self.has_failed.set()
        self.ends.wait()

    def wait_for(self, num):
        with self.changed:
            assert self.changed.wait_for(lambda: self.num >= num, timeout=60)


class WordlessError(Exception):
    """One that cannot say what it is."""

    def __str__(self):
        raise KeyError("words")


def test_no_beat_before_the_start_and_after_the_end():
    beaten = Beaten()
    assert (beaten.num, beaten.beats.is_resting) == (0, False)
    beaten.beats.start()
    assert beaten.beats.is_resting
    beaten.wait_for(3)
    beaten.beats.stop()
    assert not beaten.beats.is_resting
    num = beaten.num
    assert not threading.Event().wait(0.1)
    assert beaten.num == num


def test_a_beat_ends_the_rest():
    beaten = Beaten(last=4)
    beaten.beats.start()
    beaten.beats.wait()
    assert (beaten.num, beaten.beats.is_resting) == (4, False)
    beaten.beats.wait()  # it is over
    assert beaten.num == 4


def test_who_waits_cuts_one_pause(monkeypatch):
    monkeypatch.setattr(beats, "pauses", lambda: iter([0.0, 3600.0, 3600.0]))
    beaten = Beaten()
    beaten.beats.start()
    beaten.wait_for(1)
    waiting = threading.Thread(target=beaten.beats.wait)
    waiting.start()
    beaten.wait_for(2)
    assert not threading.Event().wait(0.1)
    assert beaten.num == 2
    beaten.beats.stop()
    waiting.join()


def test_one_thread_for_all_rests():
    beaten = Beaten()
    for _ in range(5):
        beaten.beats.start()
        beaten.wait_for(beaten.num + 2)
        beaten.beats.stop()
    assert len(beaten.threads) == 1
    assert threading.get_ident() not in beaten.threads


def test_stop_waits_for_the_beat_that_has_begun():
    begun, goes_on = threading.Event(), threading.Event()
    ended: list[str] = []

    def beat():
        begun.set()
        goes_on.wait()
        ended.append("beat")
        return False

    beats = Beats(beat, ended.append)
    beats.start()
    begun.wait()
    threading.Timer(0.05, goes_on.set).start()
    beats.stop()
    assert ended == ["beat"]


def test_a_failure_is_told_where_nobody_waits():
    beaten = Beaten(RanksError("Rank 1 is lost."))
    beaten.beats.start()
    assert beaten.has_failed.wait(60)
    assert beaten.failures == ["Rank 1 is lost."]
    # That takes its time: the rest is over, and who comes meanwhile hears of it too.
    beaten.beats.stop()
    with pytest.raises(RanksError, match=r"Rank 1 is lost\."):
        beaten.beats.wait()
    beaten.ends.set()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RanksError("Rank 1 is lost."), r"Rank 1 is lost\."),
        (MemoryError("bad_alloc"), "MemoryError: bad_alloc"),
        (WordlessError(), r"WordlessError: \(no words\)"),
    ],
)
def test_who_waits_gets_the_failure(error, line):
    """Whatever it is: nobody may wait for ever."""
    begun = threading.Event()
    told: list[str] = []

    def beat():
        begun.set()
        while not waiting._is_awaited:
            time.sleep(1e-3)
        raise error

    waiting = Beats(beat, told.append)
    waiting.start()
    begun.wait()
    with pytest.raises(RanksError, match=line):
        waiting.wait()
    assert told == []
