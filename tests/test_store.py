"""What was learnt survives processes, kills and damage; nothing depends on it.

Run: python -m pytest tests/test_store.py
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp import store as store_module
from mlx_gemma_mtp.constants import DRAFTER, LOOKUP
from mlx_gemma_mtp.drafting.prior import DEFAULT_PRIOR
from mlx_gemma_mtp.exactness.verdict import Verdict, exact_routes
from mlx_gemma_mtp.pair.calibration import Calibration
from mlx_gemma_mtp.store import FOLDER_VARIABLE, Store, cache_folder, forget

NAME = "greedy, 1 rows, 1 at least"
KEY = {"machine": "m", "pair": "p"}
DAY_S = 24 * 3600
ROOT = Path(__file__).parents[1]
VERDICT = Verdict({1: (), 2: (1, 2)}, 0.5, 1.25, 48, 1.0)


def calibration_of(folder):
    return Calibration(Store(KEY, folder), lambda num_rows, context: DEFAULT_PRIOR)


def the_file(folder):
    (path,) = Path(folder).iterdir()
    return path


def test_values_come_back(tmp_path):
    Store(KEY, tmp_path / "new").write({"a": [1, 2]})
    assert Store(KEY, tmp_path / "new").read() == {"a": [1, 2]}
    assert Store({**KEY, "pair": "q"}, tmp_path / "new").read() == {}


def test_nowhere(tmp_path):
    store = Store(KEY, None)
    store.write({"a": 1})
    assert store.read() == {}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"key": {}, "values": {"a": 1}}', "\x00", "[" * 100_000],
)
def test_damage_is_as_nothing(tmp_path, text):
    store = Store(KEY, tmp_path)
    store.write({"a": 1})
    the_file(tmp_path).write_text(text, encoding="utf-8")
    assert store.read() == {}
    store.write({"a": 2})
    assert store.read() == {"a": 2}


def test_values_of_another_form(tmp_path):
    store = Store(KEY, tmp_path)
    store.write({})
    text = json.dumps({"key": KEY, "values": [1]})
    the_file(tmp_path).write_text(text, encoding="utf-8")
    assert store.read() == {}
    the_file(tmp_path).write_bytes(b" " * 2_000_000)
    assert store.read() == {}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    store = Store(KEY, tmp_path)
    store.write({"a": 1})

    def fail(*paths):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    store.write({"a": 2})
    assert store.read() == {"a": 1}
    assert the_file(tmp_path).suffix == ".json"  # nothing half-written beside it


def test_writers_side_by_side(tmp_path):
    def write(i):
        for _ in range(20):
            Store(KEY, tmp_path).write({"a": [i] * 100})
            found = Store(KEY, tmp_path).read()["a"]
            assert len(set(found)) == 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    the_file(tmp_path)


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_GEMMA_MTP_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("MLX_GEMMA_MTP_CACHE", "")
    assert cache_folder() is None
    monkeypatch.delenv("MLX_GEMMA_MTP_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / "xdg" / "mlx_gemma_mtp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "mlx_gemma_mtp"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "mlx_gemma_mtp"


@pytest.fixture
def said(monkeypatch, caplog):
    """What is said of folders, as a new process would."""
    monkeypatch.setattr(store_module, "_once", threading.Lock())
    caplog.set_level(logging.DEBUG, "mlx_gemma_mtp")
    return caplog


def use(folder):
    """What a process does that decodes twice."""
    for _ in range(2):
        calibration = calibration_of(folder)
        calibration.keep_verdict(1, VERDICT)
        assert calibration.verdict(1) == VERDICT


def the_line(said):
    (line,) = said.messages
    assert FOLDER_VARIABLE in line
    assert len(line.splitlines()) == 1
    return line


@pytest.mark.parametrize("place", ["file", "file/deeper", "n" * 300])
def test_a_folder_that_cannot_be_is_said_once(tmp_path, said, place):
    (tmp_path / "file").write_text("")
    use(tmp_path / place)
    assert f"got {tmp_path / place}: " in the_line(said)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_said_once(
    tmp_path, said, monkeypatch, code
):
    use(tmp_path)
    assert not said.messages

    def fail(*paths, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(
        *((os, "replace") if code == errno.ENOSPC else (tempfile, "mkstemp")), fail
    )
    use(tmp_path)
    assert os.strerror(code) in the_line(said)
    assert the_file(tmp_path).suffix == ".json"


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """A limit of the process's own stands for the disk's end."""
    code = (
        "import resource, sys; from pathlib import Path;"
        "from mlx_gemma_mtp.store import Store;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "[Store({}, Path(sys.argv[1])).write({'a': 'b' * 2000}) for _ in range(2)]"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(ended.stderr.splitlines()) == 1
    assert "File too large" in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("named", [None, "~nobody-of-that-name/x"])
def test_no_home_is_said_once(monkeypatch, said, named):
    def fail(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    if named is None:
        monkeypatch.delenv(FOLDER_VARIABLE)
    else:
        monkeypatch.setenv(FOLDER_VARIABLE, named)
    for _ in range(2):
        assert cache_folder() is None
    assert "home directory. Name another one" in the_line(said)


def test_keeping_nothing_is_no_fault(monkeypatch, said):
    monkeypatch.setenv(FOLDER_VARIABLE, "")
    use(cache_folder())
    assert not said.messages


def age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def keep(folder, number):
    Store({"pair": number}, folder).write({"a": number})
    return folder / f"{store_module._digest({'pair': number})}.json"


def test_files_do_not_pile_up(tmp_path):
    for number in range(80):
        age(keep(tmp_path, number), 80 - number)
    keep(tmp_path, 80)
    kept = [n for n in range(81) if Store({"pair": n}, tmp_path).read()]
    assert kept == list(range(17, 81))
    assert len(list(tmp_path.iterdir())) == len(kept) == 64


def test_files_that_nobody_used_for_long_go(tmp_path):
    paths = [keep(tmp_path, number) for number in range(3)]
    for path, days in zip(paths, (181, 181, 179), strict=True):
        age(path, days * DAY_S)
    assert Store({"pair": 1}, tmp_path).read() == {"a": 1}  # which is using it
    keep(tmp_path, 3)
    assert [path.exists() for path in paths] == [False, True, True]


def test_files_of_an_earlier_form_go(tmp_path):
    """They held whatever the environment's variables of MLX's and ours did."""
    key = {"settings": {"MLX_GEMMA_MTP_API_KEY": "sesame"}}
    old = tmp_path / f"{store_module._digest(key)}.json"
    old.write_text(json.dumps({"key": key, "values": {"a": 1}}, indent=1))
    assert Store(key, tmp_path).read() == {}
    keep(tmp_path, 1)
    assert not old.exists()


def foreign_files(folder):
    """Files that are not ours, whatever they are called; the second has our name."""
    texts = {
        "notes.json": "{}",
        "507f1f77bcf86cd799439011.json": '{"key": {"pair": 1}, "values": {}}',
        "507f1f77bcf86cd799439012.json": "[]",
        "film.part": "",
        f"{'0' * 24}.part": "",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        age(folder / name, 1000 * DAY_S)
    (folder / f"{'0' * 24}.json").mkdir()
    return {path.name for path in folder.iterdir()}


def test_only_files_of_ours_go(tmp_path):
    foreign = foreign_files(tmp_path)
    path = keep(tmp_path, 1)
    assert {p.name for p in tmp_path.iterdir()} == foreign | {path.name}
    part = tmp_path / f"{path.stem}.abcd_123.part"
    part.write_text("{")
    assert forget(tmp_path) == 2
    assert {p.name for p in tmp_path.iterdir()} == foreign
    assert forget(tmp_path) == forget(tmp_path / "nowhere") == 0


def test_parts_of_killed_writers_go(tmp_path):
    code = (
        "import os, sys, signal; from pathlib import Path;"
        "from mlx_gemma_mtp.store import Store;"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "Store({}, Path(sys.argv[1])).write({'a': 1})"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    part = the_file(tmp_path)
    assert part.suffix == ".part"
    keep(tmp_path, 1)
    assert part.exists()  # it may be another process's that writes now
    age(part, DAY_S)
    keep(tmp_path, 1)
    assert the_file(tmp_path).suffix == ".json"


def test_writers_and_cleaners_side_by_side(tmp_path, said):
    """Whoever writes last has what was there before, and all that is its own."""
    calibration_of(tmp_path).keep_verdict(9, VERDICT)
    counts = {0: range(1, 9), 1: range(10, 18)}

    def work(which):
        calibration = calibration_of(tmp_path)
        for num_rows in counts[which]:
            calibration.keep_verdict(num_rows, VERDICT)
            keep(tmp_path, num_rows)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, counts))
    again = calibration_of(tmp_path)
    found = {n for n in range(18) if again.verdict(n) is not None}
    assert 9 in found
    assert any(found >= set(counts[which]) for which in counts)
    assert not said.messages


def teach(controller, num_rounds=200):
    """Drafts always accepted, rounds that hardly grow."""
    for i in range(num_rounds):
        k = i % 9
        controller.observe(k, [k], 0.01 * (1 + 0.01 * k))


def test_learning_is_kept_across_processes(tmp_path):
    calibration = calibration_of(tmp_path)
    teach(calibration.controller("greedy", num_rows=1, min_rows=1))
    calibration.keep_verdict(1, VERDICT)
    again = calibration_of(tmp_path)
    learnt = again.controller("greedy", num_rows=1, min_rows=1)
    assert learnt.credit.seconds is not None
    learnt.start()
    assert learnt.choose() > 6
    assert learnt.best_rate() == pytest.approx(9 / 0.0108, rel=0.1)
    assert again.verdict(1) == VERDICT
    assert again.verdict(2) is None
    # What this process did not use is not lost when it writes.
    again.save()
    assert calibration_of(tmp_path).verdict(1) == VERDICT


def test_acceptance_is_shared_and_costs_are_not(tmp_path):
    calibration = calibration_of(tmp_path)
    one = calibration.controller("greedy", num_rows=1, min_rows=1)
    assert calibration.controller("greedy", num_rows=1, min_rows=1) is one
    four = calibration.controller("greedy", num_rows=4, min_rows=1)
    assert four.acceptance is one.acceptance
    assert four.costs is not one.costs
    coupled = calibration.controller("coupled (seed)", num_rows=1, min_rows=1)
    assert coupled.acceptance is not one.acceptance


def test_what_others_wrote_is_not_erased(tmp_path):
    one, other = calibration_of(tmp_path), calibration_of(tmp_path)
    one.keep_verdict(2, VERDICT)
    teach(one.controller("greedy", num_rows=2, min_rows=1))
    one.save()
    other.keep_verdict(1, VERDICT)
    again = calibration_of(tmp_path)
    assert again.verdict(1) == again.verdict(2) == VERDICT
    assert again.controller("greedy", num_rows=2, min_rows=1).credit.seconds is not None


def test_what_others_are_about_to_write_is_waited_for(tmp_path):
    calibration, other = calibration_of(tmp_path), Store(KEY, tmp_path)
    thread = threading.Thread(target=calibration.keep_verdict, args=(1, VERDICT))
    with other.locked():
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        other.write({"verdicts": {"2": VERDICT.to_dict()}})
    thread.join()
    again = calibration_of(tmp_path)
    assert again.verdict(1) == again.verdict(2) == VERDICT


COUNTING = """
import pathlib, sys
from mlx_gemma_mtp.store import Store
store = Store({"a": 1}, pathlib.Path(sys.argv[1]))
for _ in range(100):
    with store.locked():
        store.write({"count": store.read().get("count", 0) + 1})
"""


def test_processes_that_count_lose_nothing(tmp_path):
    command = [sys.executable, "-c", COUNTING, tmp_path / "new"]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert Store({"a": 1}, tmp_path / "new").read() == {"count": 200}


def test_a_folder_that_cannot_be_locked_is_used_without(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(store_module.fcntl, "flock", flock)
    store = Store(KEY, tmp_path)
    with store.locked():
        store.write({"a": 1})
    assert store.read() == {"a": 1}
    with Store(KEY, None).locked():
        pass


def test_threads_may_learn_and_save(tmp_path):
    calibration = calibration_of(tmp_path)

    def work(i):
        for num_rows in range(1, 30):
            calibration.controller(f"rule {i}", num_rows=num_rows, min_rows=1)
            calibration.save()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_a_process_decides_once_which_plain_rounds_it_runs(tmp_path):
    """Where plain rounds win, the second process tries again, then every eighth."""
    filled, unfilled = exact_routes(VERDICT)
    assert (filled.min_rows, unfilled.allowed) == (2, (0,))

    def processes(count, learn):
        """Which of so many processes take short plain rounds, each learning after."""
        found = []
        for _ in range(count):
            calibration = calibration_of(tmp_path)
            calibration.keep_verdict(1, VERDICT)
            controller = calibration.controller("greedy", num_rows=1, min_rows=2)

            def is_unfilled(calibration=calibration):
                return calibration.prefers_unfilled(
                    "greedy", num_rows=1, filled=filled, unfilled=unfilled
                )

            found.append(is_unfilled())
            learn(controller)
            assert [is_unfilled() for _ in range(9)] == [found[-1]] * 9
            calibration.save()
        return found

    def dislike(controller):
        for i in range(200):
            controller.observe(i % 3, [0], 0.01 * (1 + i % 3))

    first, *turns = processes(17, dislike)
    assert not first  # nothing is known yet
    assert [i for i, is_plain in enumerate(turns, 1) if not is_plain] == [2, 4, 8, 16]
    processes(1, lambda controller: teach(controller, 2000))
    assert processes(2, dislike) == [False, True]
    assert processes(2, dislike) == [False, True]  # soon tried again once more


@pytest.mark.parametrize(("seconds", "is_plain"), [(0.0113, True), (0.009, False)])
def test_turns_weigh_what_filling_costs(tmp_path, seconds, is_plain):
    """Drafts that only beat filled-up plain rounds, 1.25 x as long, do not pay."""
    calibration = calibration_of(tmp_path)
    calibration.keep_verdict(1, VERDICT)
    controller = calibration.controller("greedy", num_rows=1, min_rows=2)
    for i in range(300):
        k = i % 3
        accepted = min(k, 1) if i % 5 == 0 else 0
        controller.observe(k, [accepted], [0.01, seconds, 0.03][k])
    best, plain = controller.best_rate((0, 1, 2)), controller.best_rate((0,))
    assert best is not None
    assert plain is not None
    assert best > plain
    filled, unfilled = exact_routes(VERDICT)
    assert is_plain == calibration.prefers_unfilled(
        "greedy", num_rows=1, filled=filled, unfilled=unfilled
    )


def test_routes_weigh_drafts_from_the_text(tmp_path):
    """The drafter is of no use; a text that repeats itself pays for filled rounds."""
    calibration = calibration_of(tmp_path)
    calibration.keep_verdict(1, VERDICT)
    controller = calibration.controller("greedy", num_rows=1, min_rows=2)
    for i in range(300):
        k = i % 3
        controller.observe(k, [0], 0.01 * (1 + k / 4))
        controller.lookup.observe(16, 8)
    filled, unfilled = exact_routes(VERDICT)
    found = [
        calibration.prefers_unfilled(
            "greedy", num_rows=1, filled=filled, unfilled=unfilled, sources=sources
        )
        for sources in ((DRAFTER,), (DRAFTER, LOOKUP), (LOOKUP,))
    ]
    assert found == [True, False, False]


def test_fewer_drafts_may_win_with_shorter_plain_rounds(tmp_path):
    """All drafts of the second route are as good: its plain rounds decide."""
    verdict = Verdict({1: (1, 2), 2: (1, 2, 3)}, 0.5, 1.25, 48, 1.0)
    calibration = calibration_of(tmp_path)
    calibration.keep_verdict(1, verdict)
    filled, unfilled = exact_routes(verdict)
    assert unfilled.allowed == (0, 1, 2)
    controller = calibration.controller("greedy", num_rows=1, min_rows=2)
    for i in range(400):
        k = i % 4
        controller.observe(k, [min(k, 1)], [0.01, 0.011, 0.013, 0.03][k])
    assert calibration.prefers_unfilled(
        "greedy", num_rows=1, filled=filled, unfilled=unfilled
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "controllers": JSON | st.dictionaries(st.just(NAME), JSON),
            "verdicts": JSON | st.dictionaries(st.just("1"), JSON),
        },
    )
)
def test_nonsense_in_the_file_is_as_nothing(values):
    class Kept(Store):
        def read(self):
            return values

    calibration = Calibration(Kept(KEY, None), lambda num_rows, context: DEFAULT_PRIOR)
    controller = calibration.controller("greedy", num_rows=1, min_rows=1)
    assert controller.choose() in range(9)
    assert calibration.verdict(1) is None
    calibration.save()
