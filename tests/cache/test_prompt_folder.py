"""Prompts in a folder: what comes back, what does not serve, what goes.

Run: python -m pytest tests/cache/test_prompt_folder.py
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.cache import prompt_folder
from mlx_gemma_mtp.cache.kept import KeptCaches
from mlx_gemma_mtp.cache.mlx_lm_cache import make_prompt_cache
from mlx_gemma_mtp.cache.prompt_folder import PromptFolder
from mlx_gemma_mtp.cache.slabs import LayerKV, SlabLayout
from mlx_gemma_mtp.constants import FULL, SLIDING
from mlx_gemma_mtp.errors import RequestError

ROOT = Path(__file__).parents[2]
LAYERS = (LayerKV(SLIDING, 2, 4), LayerKV(FULL, 1, 8), LayerKV(SLIDING, 2, 4))
LAYOUT = SlabLayout(LAYERS, window=8, dtype=mx.float32)
GAP = 4
WAIT_S = 60.0


def filled(tokens, layout=LAYOUT):
    """Caches whose numbers say which tokens they are of."""
    caches = make_prompt_cache(layout)
    for number, (cache, layer) in enumerate(zip(caches, layout.layers, strict=True)):
        shape = (1, layer.num_kv_heads, len(tokens), layer.head_dim)
        keys = mx.broadcast_to(mx.array(tokens)[None, None, :, None], shape)
        keys = (1000 * number + keys).astype(layout.dtype)
        cache.update_and_fetch(keys, -keys)
    return caches


def contents(caches, layout=LAYOUT):
    """Keys and values that a prompt could still ask for, oldest first."""
    found = []
    for cache, layer in zip(caches, layout.layers, strict=True):
        for array in (cache.keys, cache.values):
            array = array[:, :, : cache.offset].astype(mx.float32)
            if layer.layer_type == SLIDING:
                array = array[:, :, -layout.window :]
            found.append(np.array(array))
    return found


def assert_holds(caches, tokens, layout=LAYOUT):
    assert {cache.offset for cache in caches} == {len(tokens)}
    pairs = zip(
        contents(caches, layout), contents(filled(tokens, layout), layout), strict=True
    )
    for found, expected in pairs:
        np.testing.assert_array_equal(found, expected)


class Shelf:
    """A folder, and caches in memory that it is written from."""

    def __init__(self, path, *, layout=LAYOUT, identity=None, **fields):
        usual = {"max_bytes": 10**9, "max_pending": 10**9, "min_gap": GAP}
        self.path = path
        self.layout = layout
        self.folder = PromptFolder(
            path, layout, identity or {"pair": "a"}, **{**usual, **fields}
        )
        self.kept = KeptCaches(max_size=100, max_bytes=10**9, folder=self.folder)

    def keep(self, tokens, *, kind="user", salt=None):
        caches = filled(tokens, self.layout)
        self.kept.keep(tokens, caches, kind=kind, salt=salt)

    def close(self):
        self.kept.close(WAIT_S)

    def find(self, tokens, salt=None):
        """How many tokens of a prompt are held, of which the caches are right."""
        caches, num_tokens = self.kept.find([*tokens, 1], salt=salt)
        if caches is not None:
            assert_holds(caches, tokens[:num_tokens], self.layout)
        return num_tokens


def files(path):
    return sorted(path.glob("*.safetensors"))


def ends(path):
    return sorted(int(file.name.partition("-")[0]) for file in files(path))


def write(path, tokens, places, **fields):
    """Let a process that ends write the places of a prompt."""
    shelf = Shelf(path, **fields)
    for place in places[:-1]:
        shelf.keep(tokens[:place], kind="rung")
    shelf.keep(tokens[: places[-1]])
    shelf.close()


TOKENS = list(range(100, 160))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_another_process_goes_on(tmp_path, dtype):
    layout = SlabLayout(LAYERS, window=8, dtype=dtype)
    write(tmp_path, TOKENS, [10, 20, 40], layout=layout)
    for parting, held in ((60, 40), (39, 20), (20, 20), (19, 10), (9, 0)):
        shelf = Shelf(tmp_path, layout=layout)
        prompt = [*TOKENS[:parting], *[7] * 5]
        assert shelf.find(prompt) == held
        assert shelf.find(prompt) == held  # from memory
        assert len(shelf.kept) == (held > 0)


def test_each_place_adds_what_the_ones_before_have_not(tmp_path):
    write(tmp_path, TOKENS, [10, 20, 40])
    rings, token = 2 * 2 * 2 * 4 * 8 * 4, 2 * 8 * 4
    headers = 2000
    for file, num_tokens in zip(files(tmp_path), (10, 10, 20), strict=True):
        size = file.stat().st_size - rings - num_tokens * token
        assert 0 < size < headers


def test_any_reader_of_safetensors_reads_a_file(tmp_path):
    write(tmp_path, TOKENS, [10, 20])
    tensors: Any = mx.load(str(files(tmp_path)[1]))
    assert {name: array.shape for name, array in tensors.items()} == {
        "1.keys": (1, 1, 10, 8),
        "1.values": (1, 1, 10, 8),
        **{f"{i}.{part}": (1, 2, 8, 4) for i in (0, 2) for part in ("keys", "values")},
    }
    assert tensors["1.keys"][0, 0, :, 0].tolist() == [1000 + t for t in TOKENS[10:20]]
    assert tensors["2.values"][0, 0, :, 0].tolist() == [
        -2000 - t for t in TOKENS[12:20]
    ]


def test_places_close_to_others_are_not_written(tmp_path):
    write(tmp_path, TOKENS, [10, 12, 13, 14, 20, 21, 40, 43])
    assert ends(tmp_path) == [10, 14, 20, 40]


def test_what_is_there_is_not_written_again(tmp_path):
    write(tmp_path, TOKENS, [10, 20, 40])
    before = [file.stat().st_ino for file in files(tmp_path)]
    write(tmp_path, TOKENS, [20, 30, 40, 50])
    assert ends(tmp_path) == [10, 20, 30, 40, 50]
    assert set(before) < {file.stat().st_ino for file in files(tmp_path)}


def test_rungs_wait_for_an_end(tmp_path):
    shelf = Shelf(tmp_path)
    shelf.keep(TOKENS[:10], kind="rung")
    shelf.close()
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "other", [{"identity": {"pair": "b"}}, {"salt": "a"}, {"salt": ""}]
)
def test_nobody_else_finds_it(tmp_path, other):
    salt = other.pop("salt", None)
    write(tmp_path, TOKENS, [10, 20])
    shelf = Shelf(tmp_path, **other)
    assert shelf.find(TOKENS, salt) == 0
    shelf.keep(TOKENS[:30], salt=salt)
    shelf.close()
    assert Shelf(tmp_path, **other).find(TOKENS, salt) == 30
    assert Shelf(tmp_path).find(TOKENS) == 20
    assert len(files(tmp_path)) == 3


def test_no_salt_is_told(tmp_path):
    shelf = Shelf(tmp_path)
    shelf.keep(TOKENS, salt="hush-hush")
    shelf.close()
    (file,) = files(tmp_path)
    assert b"hush" not in file.name.encode() + file.read_bytes()


def test_only_the_owner_can_read(tmp_path):
    path = tmp_path / "new" / "folder"
    write(path, TOKENS, [10])
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert [stat.S_IMODE(file.stat().st_mode) for file in files(path)] == [0o600]


def test_a_folder_that_is_there_keeps_its_mode(tmp_path):
    tmp_path.chmod(0o755)
    write(tmp_path, TOKENS, [10])
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert [stat.S_IMODE(file.stat().st_mode) for file in files(tmp_path)] == [0o600]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A folder with two places of one prompt."""
    path = tmp_path_factory.mktemp("damage")
    write(path, TOKENS, [10, 20])
    return path


class TestDamage:
    """Whatever was done to a file, no number of it is used that was not written."""

    def damaged(self, path, number, change):
        """What is found while a file is changed; it is right."""
        file = files(path)[number]
        whole = file.read_bytes()
        file.write_bytes(change(bytearray(whole)))
        try:
            return Shelf(path).find(TOKENS)
        finally:
            file.write_bytes(whole)

    @given(st.integers(0, 1), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
    def test_a_changed_byte(self, path, number, where, flips):
        size = files(path)[number].stat().st_size

        def change(data):
            data[int(where * size)] ^= flips
            return data

        found = self.damaged(path, number, change)
        # Of an earlier place's windows nothing is read.
        assert found in ((0, 20) if number == 0 else (10, 20))

    @given(st.integers(0, 1), st.floats(0, 1, exclude_max=True), st.booleans())
    @settings(max_examples=30)
    def test_a_cut_or_a_longer_file(self, path, number, where, is_longer):
        size = files(path)[number].stat().st_size

        def change(data):
            return data + b"x" if is_longer else data[: int(where * size)]

        assert self.damaged(path, number, change) == (0, 10)[number]

    def test_one_file_in_the_place_of_another(self, path):
        first, second = (file.read_bytes() for file in files(path))
        assert self.damaged(path, 0, lambda data: second) == 0
        assert self.damaged(path, 1, lambda data: first) == 10

    @pytest.mark.parametrize(
        "change",
        [
            {"__metadata__": None},
            {"__metadata__": {"begin": "10"}},
            {"1.keys": {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}},
        ],
    )
    def test_another_header(self, path, change):
        def changed(data):
            length = int.from_bytes(data[:8], "little")
            header = {**json.loads(data[8 : 8 + length]), **change}
            raw = json.dumps(header).encode()
            return len(raw).to_bytes(8, "little") + raw + data[8 + length :]

        assert self.damaged(path, 1, changed) == 10

    def test_it_is_said_once_and_written_anew(self, tmp_path, caplog):
        write(tmp_path, TOKENS, [10, 20])
        for file in files(tmp_path):
            file.write_bytes(file.read_bytes()[:-1])
        shelf = Shelf(tmp_path)
        with caplog.at_level(logging.WARNING):
            assert shelf.find(TOKENS) == shelf.find(TOKENS) == 0
        assert len(caplog.records) == 1
        assert "is not used: it has another size" in caplog.text
        shelf.keep(TOKENS[:20])
        shelf.close()
        assert Shelf(tmp_path).find(TOKENS) == 20

    def test_a_place_whose_beginning_is_gone_is_written_anew(self, tmp_path, caplog):
        write(tmp_path, TOKENS, [10, 20, 30])
        files(tmp_path)[0].unlink()
        shelf = Shelf(tmp_path)
        assert shelf.find(TOKENS) == 0
        assert not caplog.records
        for place in (20, 30):
            shelf.keep(TOKENS[:place])
        shelf.close()
        assert Shelf(tmp_path).find(TOKENS) == 30

    def test_foreign_files_are_left_alone(self, tmp_path):
        names = ("a.txt", "model.safetensors", f"5-{'x' * 32}.safetensors", ".DS_Store")
        for name in names:
            (tmp_path / name).write_text("mine")
        (tmp_path / f"12-{'0' * 32}.safetensors").symlink_to(tmp_path / "a.txt")
        write(tmp_path, TOKENS, [10, 20], max_bytes=1)
        assert Shelf(tmp_path).find(TOKENS) == 0
        assert all((tmp_path / name).read_text() == "mine" for name in names)


def no_lock(*_):
    raise OSError(errno.ENOLCK, "No locks available")


class TestRoom:
    def sizes(self, path):
        return sum(file.stat().st_size for file in files(path))

    def test_what_was_used_least_recently_goes(self, tmp_path):
        write(tmp_path / "one", TOKENS, [30])
        most = 3 * self.sizes(tmp_path / "one")
        path = tmp_path / "all"
        texts = [[first, *TOKENS[:29]] for first in range(5)]
        for text in texts[:3]:
            write(path, text, [30], max_bytes=most)
        assert Shelf(path).find(texts[0]) == 30  # used
        for text in texts[3:]:
            write(path, text, [30], max_bytes=most)
            assert self.sizes(path) <= most
        assert [Shelf(path).find(text) for text in texts] == [30, 0, 0, 30, 30]

    def test_a_place_goes_before_those_it_needs(self, tmp_path):
        write(tmp_path, TOKENS, [10, 20, 30, 40])
        most = self.sizes(tmp_path)
        other = [1, *TOKENS]
        write(tmp_path, other, [10], max_bytes=most)
        assert Shelf(tmp_path).find(TOKENS) == 30
        write(tmp_path, other, [10, 20, 30], max_bytes=most)
        assert self.sizes(tmp_path) <= most
        assert Shelf(tmp_path).find(other) == 30
        assert Shelf(tmp_path).find(TOKENS) in (0, 10)

    def test_what_has_no_room_is_not_written(self, tmp_path):
        write(tmp_path / "one", TOKENS, [10])
        most = round(1.5 * self.sizes(tmp_path / "one"))
        write(tmp_path / "all", TOKENS, [10, 20, 30], max_bytes=most)
        assert ends(tmp_path / "all") == [10]
        assert list((tmp_path / "all").glob("*.part")) == []

    def test_a_file_that_never_fits_lets_none_go(self, tmp_path):
        write(tmp_path, TOKENS, [10, 20, 30])
        most = self.sizes(tmp_path)
        long = list(range(1000, 1000 + most // LAYOUT.dtype.size))
        write(tmp_path, long, [len(long)], max_bytes=most)
        assert Shelf(tmp_path).find(TOKENS) == 30
        # One that would fit by itself, but not with the places that it needs.
        write(tmp_path, TOKENS, [40], max_bytes=most)
        assert ends(tmp_path) == [10, 20, 30]

    def test_a_smaller_budget_holds_from_the_start(self, tmp_path):
        write(tmp_path, TOKENS, [10, 20, 30])
        most = self.sizes(tmp_path) - 1
        shelf = Shelf(tmp_path, max_bytes=most)
        assert ends(tmp_path) == [10, 20]
        assert shelf.find(TOKENS) == 20

    def test_a_file_that_is_written_again_counts_once(self, tmp_path):
        other = [1, *TOKENS]
        write(tmp_path, TOKENS, [30])
        (file,) = files(tmp_path)
        write(tmp_path, other, [30])
        shelf = Shelf(tmp_path, max_bytes=self.sizes(tmp_path))
        file.write_bytes(bytes(file.stat().st_size))
        assert shelf.find(TOKENS) == 0
        shelf.keep(TOKENS[:30])
        shelf.close()
        assert [Shelf(tmp_path).find(text) for text in (TOKENS, other)] == [30, 30]

    def test_what_killed_writers_left_goes_with_the_next_file(self, tmp_path):
        shelf = Shelf(tmp_path, max_bytes=10_000)
        for number in range(5):
            part = tmp_path / f"{100 + number}-{number:032x}.abcdefg{number}.part"
            part.write_bytes(bytes(50_000))
        shelf.keep(TOKENS[:30])
        shelf.close()
        assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]

    @pytest.mark.parametrize("is_told_apart", [True, False])
    def test_what_another_writes_counts(self, tmp_path, monkeypatch, is_told_apart):
        """Also on a disk without locks, where an old part may be nobody's."""
        write(tmp_path, TOKENS, [10, 20])
        most = self.sizes(tmp_path)
        part = tmp_path / f"12-{'0' * 32}.abcdefgh.part"
        with part.open("wb") as file:
            file.truncate(files(tmp_path)[1].stat().st_size)
            if is_told_apart:
                fcntl.flock(file, fcntl.LOCK_EX)
            else:
                monkeypatch.setattr(prompt_folder.fcntl, "flock", no_lock)
            Shelf(tmp_path, max_bytes=most)
            assert ends(tmp_path) == [10]
            assert part.exists()
        os.utime(part, (0, 0))
        Shelf(tmp_path, max_bytes=most)
        assert not part.exists()

    def test_who_waits_is_bounded(self, tmp_path):
        shelf = Shelf(tmp_path, max_pending=1)
        for text in ([first, *TOKENS] for first in range(50)):
            shelf.keep(text)
            assert len(shelf.folder._writer.pending) <= 1
        shelf.close()
        assert 1 <= len(files(tmp_path)) <= 50


class TestFaults:
    @pytest.mark.parametrize("place", ["file", "below a file", "for all"])
    def test_a_folder_that_cannot_be(self, tmp_path, place):
        path = tmp_path / "file"
        path.write_text("")
        if place == "below a file":
            path /= "folder"
        elif place == "for all":
            path = tmp_path / "open"
            path.mkdir()
            path.chmod(0o777)
        with pytest.raises(RequestError, match="the folder for prompts must be"):
            Shelf(path)

    @pytest.mark.parametrize("how", ["opening", "writing", "renaming"])
    def test_a_full_disk_leaves_nothing_and_is_said_once(
        self, tmp_path, monkeypatch, caplog, how
    ):
        def fails(*args, **kwargs):
            raise OSError(28, "No space left on device")

        module, name = {
            "opening": (prompt_folder.tempfile, "mkstemp"),
            "writing": (prompt_folder, "write_place"),
            "renaming": (prompt_folder.os, "replace"),
        }[how]
        shelf = Shelf(tmp_path)
        with caplog.at_level(logging.WARNING), monkeypatch.context() as patched:
            patched.setattr(module, name, fails)
            for first in range(3):
                shelf.keep([first, *TOKENS])
            shelf.close()
        assert list(tmp_path.iterdir()) == []
        assert [r.getMessage() for r in caplog.records] == [
            f"no prompts can be kept in {tmp_path}: No space left on device."
        ]

    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
    def test_no_file_with_the_name_of_one(self, tmp_path, caplog, make):
        write(tmp_path, TOKENS, [20])
        (path,) = files(tmp_path)
        path.unlink()
        make(path)
        shelf = Shelf(tmp_path)
        with caplog.at_level(logging.WARNING):
            num_open = len(os.listdir("/dev/fd"))
            assert shelf.find(TOKENS) == 0
            assert len(os.listdir("/dev/fd")) == num_open
            for _ in range(3):
                shelf.keep(TOKENS[:20])
                shelf.kept.clear()
            shelf.close()
        assert list(tmp_path.iterdir()) == [path]
        assert len(caplog.records) == 1
        assert ("is a folder" in caplog.text) == path.is_dir()
        assert Shelf(tmp_path).find(TOKENS) == (0 if path.is_dir() else 20)

    def test_a_write_that_breaks_off_anywhere(self, tmp_path):
        """As a kill would: the part has no name that is looked for."""
        write(tmp_path, TOKENS, [20])
        (file,) = files(tmp_path)
        data = file.read_bytes()
        file.unlink()
        for size in random.Random(0).sample(range(len(data)), 20):
            part = tmp_path / f"{file.stem}.abcd_123.part"
            part.write_bytes(data[:size])
            assert Shelf(tmp_path).find(TOKENS) == 0
            assert list(tmp_path.iterdir()) == []

    def test_processes_share_a_folder(self, tmp_path):
        shelves = [Shelf(tmp_path) for _ in range(3)]
        texts = [[first, *TOKENS] for first in range(6)]
        for shelf, text in zip(itertools.cycle(shelves), texts):
            shelf.keep(text)
        for shelf in shelves:
            shelf.close()
        for shelf in shelves:
            assert [shelf.find(text) for text in texts] == [len(TOKENS) + 1] * 6


# Writes the places of one prompt after another, for ever.
WRITER = """
import sys, itertools
from pathlib import Path
from typing import Any
from tests.cache.test_prompt_folder import Shelf, TOKENS
shelf = Shelf(Path(sys.argv[1]), max_bytes=200_000)
print("begun", flush=True)
for first in itertools.count():
    for place in (10, 20, 40):
        shelf.keep([first % 5, *TOKENS][:place], kind="user")
    shelf.kept.clear()
    for file in itertools.islice(shelf.path.glob("*.safetensors"), first % 3):
        file.unlink(missing_ok=True)
"""


def killed_writers(path, moments):
    """Kill a process at moments of writing; what it leaves is whole."""
    for moment in moments:
        command = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
        shelf = Shelf(path)
        held = [shelf.find([first, *TOKENS]) for first in range(5)]
        assert set(held) <= {0, 10, 20, 40}
        assert not shelf.folder._said
        yield held


def test_a_kill_at_a_moment_of_writing(tmp_path):
    (held,) = killed_writers(tmp_path, [0.3])
    assert any(held)


@pytest.mark.slow
def test_a_kill_at_fifty_moments_of_writing(tmp_path):
    moments = [random.Random(i).uniform(0, 0.4) for i in range(50)]
    held = list(killed_writers(tmp_path, moments))  # any() would end at the first one
    assert any(any(each) for each in held)


class TestWhateverHappens:
    """Kept, started again, removed, damaged: what is found is what was kept."""

    texts = ([*TOKENS], [*TOKENS[:25], *range(60)], [*range(40)])

    steps = st.one_of(
        st.tuples(
            st.just("keep"),
            st.integers(0, 2),
            st.integers(9, 40),
            st.sampled_from(["rung", "user", "assistant"]),
        ),
        st.tuples(st.just("find"), st.integers(0, 2), st.integers(1, 40)),
        st.tuples(st.just("restart")),
        st.tuples(st.just("remove"), st.integers(0, 9)),
        st.tuples(st.just("damage"), st.integers(0, 9), st.floats(0, 0.999)),
    )

    @given(st.lists(steps, max_size=25), st.sampled_from([2000, 6000, 10**9]))
    @settings(max_examples=40)
    def test_it(self, tmp_path_factory, steps, max_bytes):
        path = tmp_path_factory.mktemp("any")
        shelf = Shelf(path, max_bytes=max_bytes)
        kept: set[tuple[int, ...]] = set()
        for name, *values in steps:
            if name == "keep":
                number, place, kind = values
                shelf.keep(tokens := self.texts[number][:place], kind=kind)
                kept.add(tuple(tokens))
            elif name == "find":
                prompt = self.texts[values[0]][: values[1]]
                num_tokens = shelf.find(prompt)
                assert num_tokens == 0 or tuple(prompt[:num_tokens]) in kept
            elif name == "restart":
                shelf.close()
                assert sum(f.stat().st_size for f in files(path)) <= max_bytes
                shelf = Shelf(path, max_bytes=max_bytes)
            elif found := files(path):
                file = found[values[0] % len(found)]
                with contextlib.suppress(FileNotFoundError):  # the writer was faster
                    change(file, *values[1:])
        shelf.close()


def change(file, where=None):
    """Remove a file, or change a byte of it."""
    if where is None:
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[int(where * len(data))] ^= 64
        file.write_bytes(data)
