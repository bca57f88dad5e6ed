"""Intervals between reads against hand-made clocks.

Run: python -m pytest tests/engine/test_timing.py
"""

from __future__ import annotations

import pytest

from mlx_gemma_mtp.engine.timing import RoundTimer


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Device:
    """A timer and what happens around it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.timer = RoundTimer(self.clock)

    def spend(self, seconds):
        self.clock.now += seconds

    def queue(self, seconds):
        with self.timer.queue():
            self.spend(seconds)

    def wait(self, seconds):
        with self.timer.wait():
            self.spend(seconds)

    def caller(self, seconds, *, is_idle=False):
        with self.timer.caller(is_idle=is_idle):
            self.spend(seconds)


@pytest.fixture
def device():
    device = Device()
    with device.timer.prefill():
        device.spend(3.0)
    device.timer.disturb()
    device.queue(0.01)
    device.wait(1.0)
    assert device.timer.interval() is None  # the first fills the queue
    return device


def assert_interval(device, seconds, *, is_queued):
    interval = device.timer.interval()
    assert interval is not None
    assert interval.seconds == pytest.approx(seconds)
    assert interval.is_queued == is_queued


def test_the_device_is_the_slower(device):
    device.caller(0.2)
    device.spend(0.1)
    device.queue(0.05)
    device.wait(0.65)
    assert_interval(device, 1.0, is_queued=False)


def test_queueing_waits_for_the_round(device):
    """On the CPU backend: the interval is the queued round's, less the caller's."""
    device.caller(0.25)
    device.queue(0.75)
    device.wait(0.001)
    assert_interval(device, 0.751, is_queued=True)


def test_a_caller_that_stalls_says_nothing(device):
    device.caller(20.0)
    device.queue(0.05)
    device.wait(0.0)
    assert device.timer.interval() is None


def test_a_slow_caller_does_not_hide_a_slower_device(device):
    device.caller(0.8)
    device.queue(0.01)
    device.wait(0.5)
    assert_interval(device, 1.31, is_queued=False)


def test_a_host_that_is_the_slower_is_told_as_it_is(device):
    """Building graphs and the caller outlast the device: all of it is the time."""
    device.caller(0.5)
    device.spend(0.6)
    device.queue(0.05)
    device.wait(0.0)
    assert_interval(device, 1.15, is_queued=True)


@pytest.mark.parametrize("seconds", [0.5, 20.0])
def test_the_callers_time_is_no_rounds_while_nothing_runs(device, seconds):
    """Without look-ahead, however long it takes."""
    device.caller(seconds, is_idle=True)
    device.queue(0.05)
    device.wait(1.0)
    assert_interval(device, 1.05, is_queued=False)


def test_disturbances_are_forgotten_after_their_interval(device):
    device.timer.disturb()
    device.queue(0.1)
    device.wait(1.0)
    assert device.timer.interval() is None
    device.queue(0.1)
    device.wait(1.0)
    assert_interval(device, 1.1, is_queued=False)


def test_nothing_was_queued(device):
    """At the end of a text: a report that was there already tells no time."""
    device.spend(0.5)
    device.wait(0.0)
    assert device.timer.interval() is None


def test_phases_add_up(device):
    device.caller(0.5)
    device.queue(0.25)
    device.spend(0.125)
    device.wait(2.0)
    device.timer.stop()
    phases = device.timer.phases
    assert phases.prefill_s == pytest.approx(3.0)
    assert phases.rounds_s == pytest.approx(0.01 + 1.0 + 0.25 + 2.0)
    assert phases.host_s == pytest.approx(0.5 + 0.125)
    total = phases.prefill_s + phases.rounds_s + phases.host_s
    assert total == pytest.approx(device.clock.now - 100.0)
