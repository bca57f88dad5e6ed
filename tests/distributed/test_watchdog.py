"""The watchdog: who waits too long for others is ended, and nobody else.

Run: python -m pytest tests/distributed/test_watchdog.py
"""

import subprocess
import sys
import threading

import pytest

from mlx_gemma_mtp.distributed.watchdog import Watchdog


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Watched:
    """A watchdog that looks four times a second of a clock that we turn."""

    def __init__(self):
        self.clock = Clock()
        self.lines: list[str] = []
        self.watchdog = Watchdog(1, 2, clock=self.clock, end=self.lines.append)

    def pass_s(self, seconds):
        for _ in range(round(seconds * 4)):
            self.clock.now += 0.25
            self.watchdog.look()


@pytest.fixture
def watched():
    return Watched()


def test_silence_ends_the_process_with_one_line(watched):
    with watched.watchdog.waiting("round 12"):
        watched.pass_s(8)
        assert watched.lines == []
        watched.pass_s(0.25)
    assert watched.lines == [
        "Rank 1 of 2 must hear of the others within 8 s: got nothing in round 12."
        " See what the other ranks wrote, then start all again."
    ]


def test_a_limit_of_its_own(watched):
    with watched.watchdog.waiting("the first barrier", 60):
        watched.pass_s(60)
        assert watched.lines == []
        watched.pass_s(0.25)
    assert "within 60 s: got nothing in the first barrier" in watched.lines[0]


def test_who_does_not_wait_has_time(watched):
    watched.pass_s(100)
    with watched.watchdog.waiting("round 1"):
        watched.pass_s(7)
    watched.pass_s(100)
    assert watched.lines == []


def test_a_beat_begins_anew(watched):
    with watched.watchdog.waiting("rounds"):
        for _ in range(5):
            watched.pass_s(7)
            watched.watchdog.beat()
        watched.pass_s(8)
        assert watched.lines == []
        watched.pass_s(0.25)
    assert len(watched.lines) == 1


def test_a_wait_inside_another_has_its_own_limit(watched):
    with watched.watchdog.waiting("rounds"):
        watched.pass_s(7)
        with watched.watchdog.waiting("a barrier", 100):
            watched.pass_s(100)
        watched.pass_s(8)
        assert watched.lines == []
        watched.pass_s(0.25)
    assert len(watched.lines) == 1


def test_an_exception_leaves_the_wait(watched):
    with pytest.raises(KeyError), watched.watchdog.waiting("rounds"):
        raise KeyError
    watched.pass_s(100)
    assert watched.lines == []


def test_a_thread_waits_beside_one_that_may_wait_longer(watched):
    begun, end = threading.Event(), threading.Event()

    def wait():
        with watched.watchdog.waiting("a beat"):
            begun.set()
            end.wait()

    thread = threading.Thread(target=wait)
    with watched.watchdog.waiting("rounds", 100):
        thread.start()
        begun.wait()
        watched.pass_s(8.25)
        end.set()
        thread.join()
    assert "got nothing in a beat" in watched.lines[0]


def test_time_in_which_the_process_stood_still_does_not_count(watched):
    with watched.watchdog.waiting("rounds"):
        watched.pass_s(4)
        watched.clock.now += 3600  # a closed lid
        watched.watchdog.look()
        watched.pass_s(3)
        assert watched.lines == []
        watched.pass_s(0.25)
    assert len(watched.lines) == 1


ENDS = """
import sys, threading
from mlx_gemma_mtp.distributed.watchdog import Watchdog
watchdog = Watchdog(0, 2)
watchdog.start()
{before}
with watchdog.waiting("a sum", 0.3):
    threading.Event().wait()
"""
READ = "sys.stdout.write('the text so far')"
# Nobody reads, and the pipe is full.
UNREAD = "threading.Thread(target=sys.stderr.write, args=['x' * 2**20]).start()"


@pytest.mark.parametrize(
    ("before", "said"), [(READ, "the text so far"), (UNREAD, "")], ids=["read", "full"]
)
def test_the_process_ends_whoever_reads_it(before, said):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDS.format(before=before)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.wait(timeout=60) == 1
    output, errors = process.communicate()
    assert output == said
    assert before == UNREAD or errors == (
        "Rank 0 of 2 must hear of the others within 0.3 s: got nothing in a sum."
        " See what the other ranks wrote, then start all again.\n"
    )
