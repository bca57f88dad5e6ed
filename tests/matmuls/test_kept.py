"""What is kept of matrices: for whom, until when, and what damage does.

Run: python -m pytest tests/matmuls/test_kept.py
"""

from __future__ import annotations

import json
import platform
import threading
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_gemma_mtp.kernels import add_norm, common, matmul, norm_rope
from mlx_gemma_mtp.kernels.matmul import DENSE, Form
from mlx_gemma_mtp.kernels.ways import ADD_NORM, PACKED, SPLIT
from mlx_gemma_mtp.matmuls import kept as module
from mlx_gemma_mtp.matmuls.choices import STOCK, Choice, Choices, Shape
from mlx_gemma_mtp.matmuls.kept import Kept
from mlx_gemma_mtp.store import Store

SMALL = Shape(512, 1536, Form(4, 64, mx.bfloat16))
LARGE = Shape(12288, 1536, Form(4, 64, mx.bfloat16))
PLAIN = Shape(256, 1536, Form(DENSE, 0, mx.float16))
SHAPES = {SMALL, LARGE, PLAIN}
PASSES = {1: 0.01, 2: 0.011, 3: 0.012, 5: 0.013, 9: 0.02}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Every test is a process that knows nothing."""
    monkeypatch.setattr(module, "_known", {})


def other_process(monkeypatch, folder):
    monkeypatch.setattr(module, "_known", {})
    return Kept(folder)


def test_what_was_kept_is_found_by_others(monkeypatch, tmp_path):
    first = Kept(tmp_path)
    assert not first.is_decided(SMALL)
    assert first.choices(SHAPES) == STOCK
    first.keep(SMALL, Choice(1))
    first.keep(LARGE, None)
    first.keep_passes({SMALL, LARGE}, PASSES)
    for kept in (first, Kept(tmp_path), other_process(monkeypatch, tmp_path)):
        assert kept.choices(SHAPES) == Choices({SMALL: Choice(1)})
        assert kept.choices([LARGE]) == STOCK
        assert [kept.is_decided(s) for s in (SMALL, LARGE, PLAIN)] == [1, 1, 0]
        assert kept.pass_seconds({SMALL, LARGE}) == PASSES


def test_ways_are_kept_for_pairs_of_a_structure(monkeypatch, tmp_path):
    first = Kept(tmp_path)
    first.keep_ways("a", {ADD_NORM: True, SPLIT: False})
    first.keep_ways("a", {PACKED: True})
    for kept in (first, other_process(monkeypatch, tmp_path)):
        assert kept.ways("a") == {ADD_NORM, PACKED}
        assert kept.ways("b") == frozenset()
    first.mark_bad_way(PACKED, "no such\nlibrary")
    kept = other_process(monkeypatch, tmp_path)
    assert kept.ways("a") == {ADD_NORM}
    assert [kept.is_bad_way(way) for way in (PACKED, ADD_NORM)] == [True, False]
    first.keep_ways("a", {ADD_NORM: False})
    assert first.ways("a") == frozenset()


def test_another_text_of_a_kernel_of_layers_is_another_key(monkeypatch):
    module.kernels_digest.cache_clear()
    before = module.kernels_digest()
    for kernels in (add_norm, norm_rope):
        changed = [replace(k, source=k.source + "\n") for k in kernels.kernels()]
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "kernels", lambda changed=changed: changed)
            module.kernels_digest.cache_clear()
            assert module.kernels_digest() != before
    module.kernels_digest.cache_clear()


def test_what_is_bad_is_mlx_until_the_key_changes(monkeypatch, tmp_path):
    kept = Kept(tmp_path)
    kept.keep(SMALL, Choice())
    kept.mark_bad([SMALL, PLAIN], "x" * 500)
    kept.keep(SMALL, Choice())  # whoever had timed it meanwhile
    kept = other_process(monkeypatch, tmp_path)
    assert kept.choices(SHAPES) == STOCK
    assert kept.is_bad(SMALL)
    assert kept.is_decided(PLAIN)
    assert not kept.is_bad(LARGE)
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "1000")
    assert not Kept(tmp_path).is_decided(SMALL)


def test_passes_hold_for_their_shapes_and_choices(tmp_path):
    kept = Kept(tmp_path)
    kept.keep(SMALL, Choice(1))
    kept.keep_passes({SMALL, LARGE}, PASSES)
    assert kept.pass_seconds({SMALL}) is None
    assert kept.pass_seconds(SHAPES) is None
    kept.keep(SMALL, Choice(2))
    assert kept.pass_seconds({SMALL, LARGE}) is None
    kept.keep(SMALL, Choice(1))
    assert kept.pass_seconds({SMALL, LARGE}) == PASSES
    kept.mark_bad([SMALL], "raised")
    assert kept.pass_seconds({SMALL, LARGE}) is None


def test_old_passes_go(tmp_path):
    kept = Kept(tmp_path)
    sets = [{Shape(64 * i, 64, PLAIN.form)} for i in range(1, 20)]
    for shapes in sets:
        kept.keep_passes(shapes, PASSES)
    known = [kept.pass_seconds(shapes) is not None for shapes in sets]
    assert known == [False] * 3 + [True] * 16


def test_nothing_on_disk_is_kept_in_the_process():
    Kept(None).mark_bad([SMALL], "raised")
    assert Kept(None).is_bad(SMALL)


def test_what_cannot_be_written_is_kept_in_the_process(tmp_path):
    (tmp_path / "file").write_text("")
    Kept(tmp_path / "file").mark_bad([SMALL], "raised")
    assert Kept(tmp_path / "file").is_bad(SMALL)


def test_several_may_write(monkeypatch, tmp_path):
    """Processes that have read before the others wrote."""
    every = [other_process(monkeypatch, tmp_path) for _ in range(8)]
    shapes = [Shape(64 * (i + 1), 64, PLAIN.form) for i in range(8)]
    threads = [
        threading.Thread(target=kept.keep, args=(shape, Choice()))
        for kept, shape in zip(every, shapes, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(Kept(tmp_path).choices(shapes).by_shape) == set(shapes)


def test_another_process_writes_first_or_last(tmp_path):
    """One that has read and not yet written is waited for: nothing bad is forgotten."""
    other = Store(module.kept_key(), tmp_path)
    kept = Kept(tmp_path)
    thread = threading.Thread(target=kept.mark_bad, args=([SMALL], "raised"))
    with other.locked():
        found = other.read()
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        other.write({**found, "bad": {str(LARGE): "raised"}})
    thread.join()
    assert all(map(Kept(tmp_path).is_bad, (SMALL, LARGE)))


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setenv("MLX_ENABLE_TF32", "0"),
        lambda patch: patch.setattr(mx, "device_info", lambda: {"memory_size": 8}),
        lambda patch: patch.setattr(platform, "release", lambda: "other"),
        lambda patch: patch.setattr(module, "_CANDIDATES", 2),
        lambda patch: patch.setattr(
            module.importlib.metadata, "version", lambda name: "99"
        ),
    ],
)
def test_another_key_is_another_decision(change, monkeypatch, tmp_path):
    Kept(tmp_path).keep(SMALL, Choice())
    change(monkeypatch)
    assert not Kept(tmp_path).is_decided(SMALL)


def test_another_text_of_one_kernel_is_another_decision(monkeypatch):
    before = module.kernels_digest()
    module.kernels_digest.cache_clear()
    assert module.kernels_digest() == before
    make = matmul.kernel

    def other(form, num_rows, columns):
        found = make(form, num_rows, columns)
        is_one = (form, num_rows, columns) == (SMALL.form, 9, 3)
        return replace(found, source=found.source + " ") if is_one else found

    monkeypatch.setattr(module, "kernel", other)
    module.kernels_digest.cache_clear()
    assert module.kernels_digest() != before
    module.kernels_digest.cache_clear()


def test_a_word_of_all_kernels_is_in_the_key(monkeypatch):
    before = module.kernels_digest()
    module.kernels_digest.cache_clear()
    assert "LOAD4" in common._METAL
    monkeypatch.setattr(common, "_METAL", f"{common._METAL}?")
    try:
        assert module.kernels_digest() != before
    finally:
        module.kernels_digest.cache_clear()


NONSENSE: list[object] = [
    None,
    3,
    "x",
    [],
    {},
    {"first_row": 3},
    {"first_row": 1, "columns": [9]},
]


@pytest.mark.parametrize("value", NONSENSE)
def test_damage_decides_nothing(value, tmp_path):
    kept = Kept(tmp_path)
    store = Store(module.kept_key(), tmp_path)
    store.write({"choices": {str(SMALL): value}, "bad": value, "passes": value})
    kept = Kept(tmp_path)
    assert kept.choices(SHAPES) == STOCK
    assert kept.is_decided(SMALL) == (value is None)
    assert not kept.is_bad(LARGE)
    assert kept.pass_seconds({SMALL}) is None
    kept.keep(SMALL, Choice())
    assert Kept(tmp_path).choices([SMALL])


@pytest.mark.parametrize(
    "passes", [{"1": "x"}, {"1": 0.0}, {"one": 1.0}, {"1": float("nan")}, {}, []]
)
def test_damaged_passes_are_none(passes, tmp_path):
    kept = Kept(tmp_path)
    kept.keep_passes({SMALL}, PASSES)
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    (name,) = found["values"]["passes"]
    found["values"]["passes"][name] = passes
    path.write_text(json.dumps(found))
    assert Kept(tmp_path).pass_seconds({SMALL}) is None
