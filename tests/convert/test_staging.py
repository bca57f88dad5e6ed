"""A folder that appears as a whole or not at all, whatever kills the run.

Run: python -m pytest tests/convert/test_staging.py
"""

import errno
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest

from mlx_gemma_mtp.checkpoints.checkpoint import open_checkpoint
from mlx_gemma_mtp.checkpoints.staging import (
    MARKER,
    check_free_space,
    check_place,
    forget_replaced,
    staged,
)
from mlx_gemma_mtp.errors import OutputError
from tests.tiny import model_folder

COMMAND = import_module("convert.__main__")
ROOT = Path(__file__).parents[2]
NUM_KILLS = 6
SEED = 20260


@pytest.fixture
def place(tmp_path):
    return tmp_path / "out"


def put(folder, text):
    """Make a folder that counts as a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "gemma4"}')
    (folder / "model.safetensors").write_text("")
    (folder / "text").write_text(text)
    return folder


def leave(folder, text):
    """Make a folder as a killed run leaves it."""
    put(folder, text)
    (folder / MARKER).touch()
    return folder


def write(place, text="new", *, force=False):
    with staged(place, force=force) as folder:
        put(folder, text)
    forget_replaced(place)


def fail_with_eio():
    raise OSError(errno.EIO, "Input/output error")


def text_in(place):
    return (place / "text").read_text()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(place, *words, force=False):
    with pytest.raises(OutputError) as caught:
        write(place, force=force)
    message = str(caught.value)
    assert "\n" not in message
    assert str(place) in message
    for word in words:
        assert word in message


class TestStaged:
    def test_appears_at_the_end(self, place):
        with staged(place, force=False) as folder:
            put(folder, "new")
            assert not place.exists()
            assert folder.parent == place.parent  # one file system: a rename will do
            assert folder.name.startswith(".")
        assert text_in(place) == "new"
        assert names(place.parent) == ["out"]

    def test_makes_the_folders_above(self, tmp_path):
        write(tmp_path / "a" / "b" / "out")
        assert text_in(tmp_path / "a" / "b" / "out") == "new"

    @pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("force", [False, True])
    def test_does_not_appear_after_an_error(self, place, kind, force):
        before = ["out"] if force else []
        if force:
            put(place, "old")

        def fail():
            with staged(place, force=force) as folder:
                put(folder, "new")
                raise kind

        with pytest.raises(kind):
            fail()
        assert names(place.parent) == before
        assert not force or text_in(place) == "old"

    def test_an_empty_folder_is_no_loss(self, place):
        place.mkdir()
        write(place)
        assert text_in(place) == "new"
        assert names(place.parent) == ["out"]

    def test_replaces_with_force_only(self, place):
        put(place, "old")
        refused(place, "must not be there yet", "--force")
        assert text_in(place) == "old"
        write(place, force=True)
        assert text_in(place) == "new"
        assert names(place.parent) == ["out"]

    def test_a_file_above_it_is_told_at_once(self, tmp_path):
        (tmp_path / "file").touch()
        for place in (tmp_path / "file" / "out", tmp_path / "file" / "x" / "out"):
            with pytest.raises(OutputError, match=r"got Not a directory at .*/file"):
                check_place(place, force=False)

    @pytest.mark.parametrize("length", [250, 300])
    def test_a_name_too_long_is_told_at_once(self, tmp_path, length):
        """Also where only what stands beside it while it is written is too long."""
        for place in (tmp_path / ("x" * length), tmp_path / ("x" * 300) / "out"):
            with pytest.raises(OutputError, match="got File name too long"):
                check_place(place, force=False)

    def test_no_permission_above_it_is_told_at_once(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
        check_place(tmp_path.parent / "out", force=False)
        for place in (tmp_path / "out", tmp_path / "x" / "y"):
            with pytest.raises(OutputError, match="got Permission denied at"):
                check_place(place, force=False)
        assert names(tmp_path) == []

    @pytest.mark.parametrize("force", [False, True])
    def test_what_came_meanwhile_stays(self, place, force):
        def write_beside():
            with staged(place, force=force) as folder:
                put(folder, "new")
                place.mkdir()
                (place / "thesis").write_text("precious")

        with pytest.raises(OutputError):
            write_beside()
        assert names(place.parent) == ["out"]
        assert (place / "thesis").read_text() == "precious"


class TestLock:
    @pytest.mark.parametrize("force", [False, True])
    def test_a_second_run_is_refused(self, place, force):
        with staged(place, force=False) as folder:
            put(folder, "first")
            refused(place, "one run at a time", force=force)
            assert text_in(folder) == "first"
        assert text_in(place) == "first"
        write(place, force=True)

    def test_of_many_threads_one_writes(self, place):
        barrier, results = threading.Barrier(8), []

        def work(number):
            barrier.wait()
            try:
                with staged(place, force=True) as folder:
                    put(folder, str(number))
                    time.sleep(0.05)
                    assert text_in(folder) == str(number)
                results.append(number)
            except OutputError as error:
                assert "one run at a time" in str(error)  # noqa: PT017

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results
        assert text_in(place) == str(results[-1])
        assert names(place.parent) == ["out"]

    def test_another_process(self, place):
        code = (
            "import pathlib, sys, time\n"
            "from mlx_gemma_mtp.checkpoints.staging import staged\n"
            "with staged(pathlib.Path(sys.argv[1]), force=False) as folder:\n"
            "    (folder / 'left').write_text('x')\n"
            "    (folder / 'deep/er').mkdir(parents=True)\n"
            "    (folder / 'link').symlink_to('/'); print('ready', flush=True)\n"
            "    time.sleep(60)\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, str(place)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ) as process:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            refused(place, "one run at a time")
            process.kill()
        assert names(place.parent) == [".out.partial"]
        with staged(place, force=False) as folder:
            assert names(folder) == [MARKER]  # what was left is gone
            put(folder, "new")
        assert names(place) == ["config.json", "model.safetensors", "text"]
        assert names(place.parent) == ["out"]

    @pytest.mark.parametrize("what", ["partial", "replaced"])
    def test_a_link_in_its_place_is_not_followed(self, place, tmp_path, what):
        precious = put(tmp_path / "precious", "precious")
        (tmp_path / f".out.{what}").symlink_to(precious)
        try:
            write(place)
        except OutputError as error:
            assert str(place) in str(error)  # noqa: PT017
        assert text_in(precious) == "precious"
        assert not precious.is_symlink()

    def test_a_file_in_its_place(self, place, tmp_path):
        (tmp_path / ".out.partial").write_text("x")
        refused(place, "no stopped run left")


class TestPublish:
    def test_cut_off_between_the_renames(self, place):
        leave(place.with_name(".out.replaced"), "old")
        check_place(place, force=True)
        assert text_in(place) == "old"
        assert names(place.parent) == ["out"]

    def test_cut_off_between_the_renames_with_a_leftover(self, place):
        leave(place.with_name(".out.replaced"), "old")
        leave(place.with_name(".out.partial"), "new")
        refused(place, "must not be there yet")  # what was there is there again
        assert text_in(place) == "old"
        write(place, "newer", force=True)
        assert text_in(place) == "newer"
        assert names(place.parent) == ["out"]

    def test_cut_off_after_the_renames(self, place):
        leave(place.with_name(".out.replaced"), "old")
        put(place, "new")
        write(place, "newer", force=True)
        assert text_in(place) == "newer"
        assert names(place.parent) == ["out"]

    @pytest.mark.parametrize("is_there", [False, True])
    def test_a_foreign_folder_in_the_way_stays(self, place, is_there):
        precious = put(place.with_name(".out.replaced"), "precious")
        if is_there:
            put(place, "old")
        for force in (False, True):
            with pytest.raises(OutputError, match="in the way"):
                check_place(place, force=force)
            refused(place, "in the way", force=force)
        assert text_in(precious) == "precious"
        assert names(place.parent) == [".out.replaced", *(["out"] if is_there else [])]

    def test_a_cleaning_that_is_cut_off_is_done_by_the_next(self, place, monkeypatch):
        leave(place.with_name(".out.partial"), "left")
        monkeypatch.setattr(Path, "unlink", lambda *args, **kwargs: fail_with_eio())
        with pytest.raises(OutputError):
            write(place)
        monkeypatch.undo()
        write(place)
        assert names(place.parent) == ["out"]

    @pytest.mark.parametrize("number", [1, 2])
    @pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
    @pytest.mark.parametrize("is_done", [False, True])
    def test_a_rename_that_fails(self, place, monkeypatch, number, kind, is_done):
        """Also by Control-C, before or after it was done."""
        put(place, "old")
        real, calls = os.rename, []

        def failing(first, second):
            calls.append(first)
            if len(calls) == number:
                if is_done and kind is KeyboardInterrupt:
                    real(first, second)
                raise kind(errno.EIO, "Input/output error")
            real(first, second)

        monkeypatch.setattr(os, "rename", failing)
        expected = OutputError if kind is OSError else KeyboardInterrupt
        with pytest.raises(expected):
            write(place, force=True)
        monkeypatch.undo()
        is_new = is_done and number == 2 and kind is KeyboardInterrupt
        assert place.exists(), names(place.parent)
        assert text_in(place) == ("new" if is_new else "old")
        if not is_new:
            assert names(place.parent) == ["out"]

    def test_a_disk_that_fails_at_the_very_end(self, place, monkeypatch):
        """Either an error and the old folder, or none and the new one."""
        put(place, "old")
        real = os.fsync

        def failing(descriptor):
            if os.path.samestat(os.fstat(descriptor), place.parent.stat()):
                raise OSError(errno.EIO, "Input/output error")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", failing)
        try:
            write(place, force=True)
        except OutputError:
            assert text_in(place) == "old"
        else:
            assert text_in(place) == "new"
        assert names(place.parent) == ["out"]

    def test_a_run_that_plans_meanwhile_changes_nothing(self, place, monkeypatch):
        """It must not take the moment between the renames for a crash."""
        put(place, "old")
        real = os.rename

        def interleaved(first, second):
            real(first, second)
            if Path(first) == place:
                monkeypatch.setattr(os, "rename", real)
                try:
                    check_place(place, force=True)  # another run's
                except OutputError:
                    pass

        monkeypatch.setattr(os, "rename", interleaved)
        write(place, force=True)
        assert text_in(place) == "new"
        assert names(place.parent) == ["out"]

    def test_room(self, place, monkeypatch):
        deep = place / "not" / "there" / "yet"
        check_free_space(deep, 1)
        with pytest.raises(OutputError, match="GB free"):
            check_free_space(deep, 10**18)


# Runs the whole command for each line of standard input and kills it: after some
# seconds, or itself at a call of the system. On Linux everything is imported once and
# each run is a fork, in which MLX is used for the first time; elsewhere a fork of what
# has loaded the system's frameworks cannot be trusted, and each run is a process.
IS_FORKING = sys.platform == "linux"
DRIVER = """
import json, os, shutil, signal, sys, time
import convert.card, convert.pipeline, convert.report, convert.stream
import tqdm
from convert.__main__ import main

def killing(module, name, number, is_after):
    real, calls = getattr(module, name), []
    def call(*args, **settings):
        calls.append(name)
        if len(calls) == number and not is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **settings)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(module, name, call)

def run(argv, crash):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    convert.stream.BLOCK_BYTES = 1000  # a few rows at a time
    if crash:
        killing({'os': os, 'shutil': shutil}[crash[0]], *crash[1:])
        convert.stream.BLOCK_BYTES = 1 << 24
    os._exit(main(argv))

is_forking = json.loads(sys.argv[1])
print('ready', flush=True)
for line in sys.stdin:
    argv, seconds, crash = json.loads(line)
    started = time.monotonic()
    process = os.fork() if is_forking else 0
    if not process:
        run(argv, crash)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    print(json.dumps([status, time.monotonic() - started]), flush=True)
"""


class Driver:
    """Runs the command in a process that can be killed."""

    def __init__(self):
        self.process = None

    def __call__(self, argv, *, seconds=None, crash=None):
        """Return how the run ended, as ``os.waitpid`` says it, and its seconds."""
        process = self.process or self.start()
        self.process = process if IS_FORKING else None
        started = time.monotonic()
        process.stdin.write(json.dumps([argv, seconds, crash]) + "\n")
        process.stdin.flush()
        if IS_FORKING:
            return json.loads(process.stdout.readline())
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        status = process.wait()
        self.close(process)
        return abs(status), time.monotonic() - started

    def start(self):
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(IS_FORKING)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # Its threads would be the only ones at the time of a fork.
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        )
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        return process

    def close(self, process):
        if process is not None:
            process.stdin.close()
            process.stdout.close()
            process.wait()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("kill") / "source")


@pytest.fixture(scope="module")
def old(tmp_path_factory, source):
    """A converted pair that differs from what the runs below make."""
    out = tmp_path_factory.mktemp("old") / "out"
    assert convert(source, out, "--q-bits", "8") == 0
    return out


@pytest.fixture(scope="module")
def driver():
    driver = Driver()
    yield driver
    driver.close(driver.process)


def arguments(source, out, *args):
    argv = ["--hf-path", source, "--mlx-path", out, "--no-check", *args]
    return [str(arg) for arg in argv]


def convert(source, out, *args):
    return COMMAND.main(arguments(source, out, *args))


def bits_of_complete(out):
    """Assert that a pair is whole; return its bits."""
    manifest = json.loads((out / "mlx_gemma_mtp.json").read_text())
    assert {"model.safetensors", "drafter/model.safetensors"} == set(manifest["files"])
    for name, entry in manifest["files"].items():
        raw = (out / name).read_bytes()
        assert len(raw) == entry["bytes"]
        assert hashlib.sha256(raw).hexdigest() == entry["sha256"]
    target, drafter = open_checkpoint(out), open_checkpoint(out / "drafter")
    assert drafter.config["model_type"].endswith("assistant")
    for name in ("tokenizer.json", "tokenizer_config.json", "README.md"):
        assert (out / name).is_file()
    return target.config["quantization"]["bits"]


def check_fresh(source, out):
    """After a kill: nothing or all is there, and the next run works."""
    if out.exists():
        assert bits_of_complete(out) == 4
        shutil.rmtree(out)
    assert convert(source, out) == 0
    assert bits_of_complete(out) == 4
    assert names(out.parent) == ["out"]
    shutil.rmtree(out)


def check_forced(source, out, old):
    """After a kill: the old one or the new one is there, and the next run works."""
    if out.exists():
        bits_of_complete(out)
    check_place(out, force=True)  # what the next run does first
    bits = bits_of_complete(out)
    assert bits in (4, 8)
    assert convert(source, out, "--force") == 0
    assert bits_of_complete(out) == 4
    assert names(out.parent) == ["out"]
    shutil.rmtree(out)
    shutil.copytree(old, out)
    return bits


def kill_at_moments(driver, argv, check):
    """Kill runs at moments from the start to a bit after the end; check after each.

    ``check`` is called with how much of a run's time was over, at most: a run may take
    less time than any before it.
    """
    chosen = random.Random(SEED)
    seconds = math.inf
    for _ in range(2):  # the first one is slower
        status, taken = driver(argv)
        assert status == 0
        check(1)
        seconds = min(seconds, taken)
    killed = 0
    for i in range(NUM_KILLS):
        moment = 1.15 * seconds * (i + chosen.random()) / NUM_KILLS
        status, taken = driver(argv, seconds=moment)
        if status == signal.SIGKILL:
            killed += 1
        else:
            seconds = min(seconds, taken)
        check(moment / seconds)
    assert killed >= NUM_KILLS // 2  # or it tests nothing


class TestKill:
    def test_at_any_moment(self, source, tmp_path, driver):
        out = tmp_path / "out"
        argv = arguments(source, out)
        kill_at_moments(driver, argv, lambda share: check_fresh(source, out))

    def test_at_any_moment_over_an_old_one(self, source, old, tmp_path, driver):
        out = tmp_path / "out"
        shutil.copytree(old, out)
        argv = arguments(source, out, "--force")

        def check(share):
            bits = check_forced(source, out, old)
            assert bits == 8 or share > 0.5  # the old one stays until all is done

        kill_at_moments(driver, argv, check)

    @pytest.mark.parametrize(
        ("module", "name", "number", "is_after"),
        [
            ("os", "rename", 1, False),
            ("os", "rename", 1, True),
            ("os", "rename", 2, False),
            ("os", "rename", 2, True),
            ("os", "replace", 1, False),
            ("os", "replace", 1, True),
            ("os", "fsync", 1, True),
            ("os", "fsync", 3, False),
            ("os", "ftruncate", 1, True),
            ("os", "pwrite", 100, False),
            ("shutil", "copyfile", 1, False),
            ("shutil", "rmtree", 1, False),
            ("shutil", "rmtree", 1, True),
        ],
    )
    def test_at_a_call_over_an_old_one(
        self, source, old, tmp_path, driver, module, name, number, is_after
    ):
        """Also at moments that chance would not find."""
        out = tmp_path / "out"
        shutil.copytree(old, out)
        argv = arguments(source, out, "--force")
        status, _ = driver(argv, crash=[module, name, number, is_after])
        assert status == signal.SIGKILL
        check_forced(source, out, old)

    @pytest.mark.parametrize(
        ("name", "number", "is_after"),
        [
            ("rename", 1, False),
            ("replace", 1, True),
            ("fsync", 3, False),
            pytest.param("rename", 1, True, marks=pytest.mark.slow),
            pytest.param("pwrite", 1, True, marks=pytest.mark.slow),
        ],
    )
    def test_at_a_call(self, source, tmp_path, driver, name, number, is_after):
        out = tmp_path / "out"
        crash = ["os", name, number, is_after]
        status, _ = driver(arguments(source, out), crash=crash)
        assert status == signal.SIGKILL
        check_fresh(source, out)
