"""Ranks on the loopback: values, steps, rest, and what happens when one is gone.

Run: python -m pytest tests/distributed/test_ranks.py
"""

import json
import random
import signal
import subprocess
import sys
from contextlib import nullcontext

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.distributed.headers import Kind
from mlx_gemma_mtp.distributed.ranks import Ranks, launched
from mlx_gemma_mtp.distributed.watchdog import Watchdog
from mlx_gemma_mtp.errors import RanksError
from tests.distributed.launching import BEGINNING, finish, read_ready, start

leaves = st.none() | st.booleans() | st.integers() | st.text() | st.floats()
json_values = leaves | st.lists(leaves) | st.dictionaries(st.text(), leaves)


@pytest.fixture(scope="module")
def alone():
    return Ranks(mx.distributed.init(), Watchdog(0, 1))


@settings(max_examples=20)
@given(json_values)
def test_values_of_one_rank_are_json(alone, value):
    assert repr(alone.share(value)) == repr(value)
    assert repr(alone.gather(value)) == repr([value])


def test_bytes_that_changed_on_the_way_are_found(alone, monkeypatch):
    gather = mx.distributed.all_gather

    def change(x, *, group, stream):
        is_header = x.ndim == 2
        return gather(x if is_header else x ^ 1, group=group, stream=stream)

    monkeypatch.setattr(mx.distributed, "all_gather", change)
    monkeypatch.setattr(mx.distributed, "all_sum", change)
    for exchange in (alone.share, alone.gather):
        with pytest.raises(RanksError, match="other bytes than rank 0 sent in"):
            exchange("text")


def test_work_is_timed_for_each_that_does_it(monkeypatch):
    """Such as chunks of prompts of two targets, the second of which is large."""
    ranks, now, limits = Ranks(mx.distributed.init(), Watchdog(0, 1)), [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def exchange(what, limit_s):
        limits.append((what, limit_s))
        return nullcontext()

    monkeypatch.setattr(ranks, "exchange", exchange)
    small, large = Watchdog(0, 1), Watchdog(0, 1)  # anything
    for worker, took_s in ((small, 1.0), (large, 50.0), (small, 2.0), (large, 90.0)):
        with ranks.long_exchange("a prompt", 100, worker):
            now[0] += took_s
    assert limits == [("a prompt", s) for s in (600, 600, 8 + 10, 8 + 10 * 50)]


def test_work_that_fails_tells_nothing_of_speed(monkeypatch):
    ranks, limits = Ranks(mx.distributed.init(), Watchdog(0, 1)), []
    wait = ranks.watchdog.waiting

    def waiting(what, limit_s):
        limits.append(limit_s)
        return wait(what, limit_s)

    monkeypatch.setattr(ranks.watchdog, "waiting", waiting)
    lost = RuntimeError("[ring] connection to a peer was lost")
    for _ in range(2):
        with pytest.raises(RanksError):
            with ranks.long_exchange("a prompt", 9, ranks.watchdog):
                raise lost
    assert limits == [600, 600]


def test_each_exchange_has_a_number(monkeypatch):
    ranks, rows = Ranks(mx.distributed.init(), Watchdog(0, 1)), []

    def all_gather(x, *, group, stream):
        rows.append(x.tolist()[0])
        return x

    monkeypatch.setattr(mx.distributed, "all_gather", all_gather)
    for _ in range(3):
        ranks.barrier()
    ranks.share("text")
    assert [row[1] for row in rows] == [0, 1, 2, 3]
    assert [row[0] & 0xFF for row in rows] == [Kind.BARRIER] * 3 + [Kind.SHARE]


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyError])
def test_errors_of_others_stay_theirs(alone, kind):
    with pytest.raises(kind, match="no memory"), alone.exchange("a round"):
        raise kind("no memory")


def test_a_lost_rank_is_one_line(alone):
    lost = RuntimeError("[ring] connection to a peer was lost")
    with pytest.raises(RanksError) as caught, alone.exchange("round 12"):
        raise lost
    assert str(caught.value) == (
        "Rank 0 of 1 must hear of the others: got RuntimeError: [ring] connection to a"
        " peer was lost in round 12. See what the other ranks wrote, then start all"
        " again."
    )


def test_one_process_does_not_ask_mlx(monkeypatch):
    monkeypatch.setattr(mx.distributed, "init", None)
    assert launched() is None


VALUES = """
value = {"text": "a\\u00e4\\n", "numbers": [1, 2.5, None, True], "long": "y" * 70_000}
found = [
    ranks.share(value if ranks.is_first else None) == value,
    ranks.share(0 if ranks.is_first else 1),
    ranks.gather(["r" * 10**ranks.rank, ranks.rank]),
    [ranks.rank, ranks.size, ranks.is_first],
    [ranks.all_say(True), ranks.all_say(ranks.is_first)],
]
ranks.barrier()
if ranks.is_first:
    for number in range(3):
        ranks.rest()
        time.sleep(0.01)
        ranks.wake()
        ranks.share(number)
    ranks.rest()  # until the program ends
else:
    ranks.rest()
    while ranks.wake():
        found.append(ranks.share())
        ranks.rest()
print(json.dumps(found))
"""


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_values_and_rest(size, tmp_path):
    gathered = [["r" * 10**rank, rank] for rank in range(size)]
    for rank, ended in enumerate(finish(start(size, VALUES, tmp_path))):
        assert (ended.status, ended.errors) == (0, "")
        found = json.loads(ended.output.removeprefix("ready\n"))
        assert found[:4] == [True, 0, gathered, [rank, size, rank == 0]]
        assert found[4] == [True, False]
        assert found[5:] == ([0, 1, 2] if rank else [])


STEPS = """
def attempt(step):
    try:
        step()
    except RanksError as error:
        print(error, flush=True)

attempt((lambda: ranks.share(1)) if ranks.is_first else ranks.barrier)
attempt(ranks.barrier)
ranks.is_lost = False  # to see that nothing else keeps them apart
attempt(ranks.barrier)
def add():
    with ranks.exchange("a layer"):
        mx.eval(mx.distributed.all_sum(mx.ones([2048]), stream=mx.cpu))
attempt(add if ranks.is_first else ranks.barrier)
"""


def test_ranks_out_of_step_find_out(tmp_path):
    first, second = (
        ended.output.splitlines()[1:] for ended in finish(start(2, STEPS, tmp_path))
    )
    same = "Ranks must take the same steps: got {}."
    same += " Start the same command with the same files on all."
    assert first[0] == same.format("share 0 on rank 0, barrier 0 on rank 1")
    assert second[0] == same.format("barrier 0 on rank 1, share 0 on rank 0")
    for rank, said in enumerate((first, second)):
        assert said[1].startswith(f"Rank {rank} of 2 must go on with the others: got")
    # Bytes of a layer are no header.
    assert second[2:] == [same.format("something else from rank 0")]
    assert len(first) == 3
    assert "connection to a peer was lost in a layer" in first[2]


WAITS = """
if ranks.is_first:
    with ranks.exchange("a layer", {limit_s}):
        mx.eval(mx.distributed.all_sum(mx.ones([2048]), stream=mx.cpu))
time.sleep(60)
"""
# While main threads do something else.
RESTS = """
ranks.rest()
time.sleep(60)
"""


def left_with(script, what, folder):
    """What rank 0 leaves when rank 1 is stopped or killed."""
    processes = start(2, script, folder)
    try:
        read_ready(processes)
        processes[1].send_signal(what)
        return finish(processes[:1])[0]
    finally:
        processes[1].kill()
        processes[1].communicate()


def test_a_rank_that_is_stopped_ends_the_other(tmp_path):
    ended = left_with(WAITS.format(limit_s=1), signal.SIGSTOP, tmp_path)
    assert (ended.status, ended.errors) == (
        1,
        "Rank 0 of 2 must hear of the others within 1 s: got nothing in a layer."
        " See what the other ranks wrote, then start all again.\n",
    )


@pytest.mark.slow
def test_a_rank_that_is_stopped_at_rest_ends_the_other(tmp_path):
    ended = left_with(RESTS, signal.SIGSTOP, tmp_path)
    assert ended.status == 1
    assert ended.errors.startswith(
        "Rank 0 of 2 must hear of the others within 8 s: got nothing in beat "
    )


FAILS = """
ranks.rest()
if ranks.rank == {victim}:
    raise KeyError("no such place")
from mlx_gemma_mtp.distributed import work
work._AT_REST.add(ranks)
"""


def test_who_has_ended_waits_for_rank_0_to_end_and_hears_why(tmp_path):
    """Of an exception that no text has seen."""
    (failed, ended) = finish(start(2, FAILS.format(victim=0), tmp_path))
    assert failed.errors.endswith("KeyError: 'no such place'\n")
    assert (ended.status, ended.errors) == (
        1,
        "Rank 0 must go on as long as rank 1: got KeyError: 'no such place' there."
        " See what it wrote, then start all again.\n",
    )


BOTH_FAIL = """
import pathlib
from mlx_gemma_mtp.cli.command import exit_status
from mlx_gemma_mtp.distributed import work
from mlx_gemma_mtp.errors import OutputError
work._AT_REST.add(ranks)
ranks.rest()
if ranks.rank != {first}:
    raise KeyError("of the other")

def clean_up():
    while ranks._beats.is_resting:  # the other is there
        time.sleep(0.01)
    time.sleep(0.5)
    pathlib.Path({file!r}).write_text("figures")

{fails}
"""
RAISES = """
try:
    raise KeyError("of the first")
finally:
    clean_up()
"""
# As a command does that says its mistake by itself.
SAYS = """
def run():
    raise OutputError("of the first")

class Notes:
    isatty, flush = sys.stderr.isatty, sys.stderr.flush

    def write(self, line):
        clean_up()
        sys.stderr.write(line)

status = exit_status(run, sys.stdout, Notes())
time.sleep(0.5)
sys.exit(status)
"""


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("fails", [RAISES, SAYS], ids=["raises", "says"])
def test_ranks_that_fail_at_once_all_say_why(first, fails, tmp_path):
    """Between two texts; what one does behind its own error is not cut off."""
    file = tmp_path / "figures.json"
    script = BOTH_FAIL.format(first=first, file=str(file), fails=fails)
    ended = finish(start(2, script, tmp_path))
    assert [rank.status for rank in ended] == [1, 1], ended
    assert "of the first" in ended[first].errors
    assert ended[1 - first].errors.endswith("KeyError: 'of the other'\n")
    assert file.read_text() == "figures"


# The backend says it, long before the watchdog would.
@pytest.mark.parametrize(
    "script", [WAITS.format(limit_s=60), RESTS], ids=["waits", "rests"]
)
def test_a_rank_that_is_killed_ends_the_other(script, tmp_path):
    ended = left_with(script, signal.SIGKILL, tmp_path)
    assert ended.status == 1
    assert "Rank 0 of 2 must hear of the others: got RuntimeError: " in ended.errors


MISSING = """
import signal
from mlx_gemma_mtp.distributed import ranks
ranks._CONNECT_S = 0.3
try:
    ranks.launched()
except ranks.RanksError as error:
    print(error)
assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
"""


def test_a_rank_that_never_comes_is_one_line(tmp_path):
    (ended,) = finish(start(2, MISSING, tmp_path, beginning="", ranks=[0]))
    assert (ended.status, ended.errors) == (0, "")
    assert ended.output == (
        "All 2 ranks must be reached: got none for 0.3 s. Start all at once with"
        " mlx.launch, and see that no other program uses their ports.\n"
    )


def test_mlx_launch_of_two(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"{BEGINNING}\nprint(ranks.gather(ranks.rank), flush=True)\n")
    command = [sys.executable, "-c", "from mlx._distributed_utils.launch import main"]
    command[-1] += "; main()"
    arguments = ["-n", "2", "--starting-port", str(random.randrange(20_000, 30_000))]
    arguments += ["--env", "PYTHONPATH=.", "--", sys.executable, str(script)]
    process = subprocess.Popen(
        command + arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    (ended,) = finish([process])
    assert ended.output.count("[0, 1]") == 2


MANY = """
number = 0
while True:
    number += 1
    with ranks.exchange(f"layer {number}"):
        mx.eval(mx.distributed.all_sum(mx.ones([5000]), stream=mx.cpu))
    if number % 50 == 0:
        ranks.gather(["x" * number, ranks.share(number)])
        ranks.rest()
        time.sleep(0.2)
        ranks.wake()
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("seed", range(6))
def test_at_any_moment_all_others_end(size, what, seed, tmp_path):
    chance = random.Random(seed)
    victim = chance.randrange(size)
    processes = start(size, MANY, tmp_path)
    try:
        read_ready(processes)
        with pytest.raises(subprocess.TimeoutExpired):
            processes[victim].wait(timeout=3 * chance.random())
        processes[victim].send_signal(what)
        others = finish([p for i, p in enumerate(processes) if i != victim])
        assert [ended.status for ended in others] == [1] * (size - 1)
        assert all("must hear of the others" in ended.errors for ended in others)
    finally:
        processes[victim].kill()
        processes[victim].communicate()
