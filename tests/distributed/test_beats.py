"""Rank 0's beats: they begin, end, and say when they fail.

Run: python -m pytest tests/distributed/test_beats.py
"""

import threading
from itertools import islice

from mlx_gemma_mtp.distributed.beats import LONGEST_S, Beats, pauses
from mlx_gemma_mtp.errors import RanksError


def test_pauses_grow_to_the_longest():
    first = list(islice(pauses(), 10))
    assert first[:5] == [0.002, 0.004, 0.008, 0.016, 0.032]
    assert set(first[5:]) == {LONGEST_S}
    assert LONGEST_S < 0.05


class Beaten:
    """Counts beats, and waits for some."""

    def __init__(self, error=None):
        self.num, self.threads = 0, set()
        self.failures: list[str] = []
        self.error = error
        self.changed = threading.Condition()
        self.beats = Beats(self.beat, self.failures.append)

    def beat(self):
        with self.changed:
            self.num += 1
            self.threads.add(threading.get_ident())
            self.changed.notify_all()
        if self.error:
            raise self.error

    def wait_for(self, num):
        with self.changed:
            assert self.changed.wait_for(lambda: self.num >= num, timeout=60)


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

    beats = Beats(beat, ended.append)
    beats.start()
    begun.wait()
    threading.Timer(0.05, goes_on.set).start()
    beats.stop()
    assert ended == ["beat"]


def test_a_failure_is_told():
    beaten = Beaten(RanksError("Rank 1 is lost."))
    beaten.beats.start()
    beaten.wait_for(1)
    beaten.beats.stop()
    assert set(beaten.failures) == {"Rank 1 is lost."}
