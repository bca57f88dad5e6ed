"""What all commands share: how they end.

Run: python -m pytest tests/test_command.py
"""

from __future__ import annotations

import io
import os
import signal

import pytest

from mlx_gemma_mtp.command import exit_status

SIGNALS = [signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(params=[signal.SIG_DFL, signal.SIG_IGN])
def handler(request):
    """As a shell starts a command, and as nohup does."""
    before = {number: signal.signal(number, request.param) for number in SIGNALS}
    yield request.param
    for number in SIGNALS:
        assert signal.signal(number, before[number]) == request.param


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_stops_what_does_not_ignore_it(handler, number):
    def run() -> int:
        os.kill(os.getpid(), number)
        return 0

    notes = io.StringIO()
    status = exit_status(run, io.StringIO(), notes, stopped="stopped")
    is_ignored = handler == signal.SIG_IGN
    assert status == (0 if is_ignored else 128 + number)
    assert notes.getvalue() == ("" if is_ignored else "stopped\n")


@pytest.mark.parametrize("stopped", [None, "stopped"])
def test_control_c(stopped):
    def run() -> int:
        raise KeyboardInterrupt

    notes = io.StringIO()
    assert exit_status(run, io.StringIO(), notes, stopped=stopped) == 130
    assert notes.getvalue() == ("stopped\n" if stopped else "")
