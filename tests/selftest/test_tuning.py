"""``selftest tune``: what it says, what it keeps, and what the page shows of it.

Run: python -m pytest tests/selftest/test_tuning.py
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_gemma_mtp.engine.given_rounds import GivenRounds
from mlx_gemma_mtp.kernels import common, matmul
from mlx_gemma_mtp.kernels.ways import ADD_NORM, NORM_ROPE, PACKED, QKV, SPLIT
from mlx_gemma_mtp.matmuls import bench, modules, tuner, windows
from mlx_gemma_mtp.matmuls import kept as kept_module
from mlx_gemma_mtp.matmuls.choices import STOCK, Choice, Choices, Shape
from mlx_gemma_mtp.matmuls.kept import Kept
from mlx_gemma_mtp.matmuls.modules import sizes_of
from mlx_gemma_mtp.matmuls.tuned import Tuned
from mlx_gemma_mtp.selftest import __main__ as command
from mlx_gemma_mtp.selftest import busy, random_pair, sections, tuning
from mlx_gemma_mtp.selftest.result import FAIL, INFO, SKIP
from mlx_gemma_mtp.store import FOLDER_VARIABLE, cache_folder
from tests.engine.test_few_rows import every_matrix, half_pair
from tests.matmuls.matrices import LARGE, PLAIN, SMALL, StandIn
from tests.matmuls.test_tuner import Simulated, Truth
from tests.tiny import reference_pair

pytestmark = pytest.mark.usefixtures("plain_graphs")

SHAPES = {SMALL: 4, LARGE: 2, PLAIN: 1}
PASSES = dict.fromkeys(range(1, 10), 0.5)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    """Every test is a process of a user who has learnt nothing."""
    monkeypatch.setattr(kept_module, "_known", {})
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "kept"))


@pytest.fixture
def metal(monkeypatch):
    """Plain operations in the kernel's place; windows take no time."""
    stand_in = StandIn()
    monkeypatch.setattr(matmul, "multiply", stand_in)
    monkeypatch.setattr(common, "backend", lambda: "metal")
    monkeypatch.setattr(tuning, "disturbed", lambda: "")
    monkeypatch.setattr(tuning, "shapes_of", lambda models: SHAPES)
    monkeypatch.setattr(random_pair, "random_pair", lambda *_, **__: reference_pair())
    monkeypatch.setattr(windows, "WINDOW_S", 0.0)
    monkeypatch.setattr(windows, "WARM_UP_S", 0.0)
    monkeypatch.setattr(bench, "_EMPTY_S", 0.0)
    monkeypatch.setattr(bench, "_CHAIN_S", 0.0)
    monkeypatch.setattr(bench.Bench.__init__, "__defaults__", (1,))
    return stand_in


@pytest.fixture
def found(monkeypatch):
    """What the tuner finds is what a test says."""
    told: list[Tuned] = []
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: told[-1])
    return told


# -------------------------------------------------------------------------- the command


def test_elsewhere_there_is_nothing_to_tune(capsys):
    assert command.main(["tune"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("nothing to tune: kernels for few rows run on Metal alone")
    assert len(out.splitlines()) == 1
    assert err == ""


def test_where_kernels_are_off_there_is_nothing_to_tune(monkeypatch, capsys):
    monkeypatch.setattr(common, "gpu", lambda: "metal")
    monkeypatch.setenv("MLX_GEMMA_MTP_KERNELS", "off")
    assert command.main(["tune"]) == 0
    assert capsys.readouterr().out == (
        "nothing to tune: MLX_GEMMA_MTP_KERNELS is off, MLX multiplies\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "--section", "rows"], "tune must have no --section"),
        (["tune", "--seconds", "0"], "--seconds must be above 0"),
        (["tune", "--draft-model", "x"], "must belong to a model"),
        (["tune", "forget"], "unrecognized argument"),
        (["forget", "--seconds", "0"], "forget must stand alone"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert command.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


def test_all_of_it(metal, monkeypatch, tmp_path, capsys):
    """Kernels of layers look right alone, and fail in passes here."""
    monkeypatch.setattr(bench.layer_trial, "is_right", lambda *_: True)
    file = tmp_path / "found.json"
    assert command.main(["tune", "--family", "12b", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    first, last = out.splitlines()[0], out.splitlines()[-1]
    assert "times 3 shapes of matrices" in first
    assert "at most. Leave the machine alone" in first
    assert "[info] tune" in out
    assert last.startswith("    ")
    assert err.splitlines()[0] == f"{LARGE}, 1 of 3"
    assert "whole passes" in err.splitlines()
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["machine"]["mlx_device"]
    figures = document["sections"][1]["figures"]
    assert set(figures["few_rows"]) == set(map(str, SHAPES))
    assert set(figures["passes_s"]) == set("123456789")
    assert figures["ways"].keys() == {ADD_NORM, NORM_ROPE, PACKED}
    assert not figures["ways"]["add_norm"]
    kept = Kept(cache_folder())
    assert all(kept.is_decided(shape) for shape in SHAPES)
    assert kept.pass_seconds(set(SHAPES))


def test_a_wrong_kernel_fails_and_is_never_tried_again(metal, monkeypatch, capsys):
    monkeypatch.setattr(tuner, "PASS_ROWS", (1, 5))
    metal.change = lambda y, *_: y * 1.5
    assert command.main(["tune"]) == command.EXIT_FAILED
    out, _ = capsys.readouterr()
    assert "[fail] tune" in out
    assert f"{SMALL}: MLX, wrong numbers for 9 rows" in out
    assert Kept(cache_folder()).is_bad(SMALL)
    metal.calls.clear()
    assert command.main(["tune"]) == 0
    assert metal.calls == []


def test_forget_forgets_it(metal, monkeypatch, capsys):
    Kept(cache_folder()).keep(SMALL, Choice())
    assert command.main(["forget"]) == 0
    assert "deleted 1 of its files" in capsys.readouterr().out
    monkeypatch.setattr(kept_module, "_known", {})  # another process
    assert not Kept(cache_folder()).is_decided(SMALL)


# ---------------------------------------------------------------------- what is decided


def decided(choices, **rest):
    return Tuned(
        decided=choices, passes=PASSES, stock_passes=dict.fromkeys(PASSES, 1.0), **rest
    )


def test_what_was_chosen_is_kept_and_shown(found):
    gains = {SMALL: {5: 1.5}, LARGE: {5: 2.25}}
    choices = {SMALL: Choice(1), LARGE: Choice(2), PLAIN: None}
    found.append(decided(choices, gains=gains, reasons={PLAIN: "not faster"}))
    result = look()
    assert result.status == INFO
    assert result.sentence == (
        "the kernel for 2 of 3 shapes; passes of 5 rows are 2.00 times as fast"
    )
    assert result.lines == (
        "few rows, 4bit_g64_bfloat16: kernel for 2 of 2 shapes, for one row too for 1; "
        "5 rows 1.50 to 2.25 times as fast",
        "few rows, bfloat16: MLX for 1 shapes",
        f"{PLAIN}: MLX, not faster",
    )
    named = result.figures["few_rows"]
    assert named[str(SMALL)]["choice"]["first_row"] == 1
    assert named[str(SMALL)]["gains"] == {"5": 1.5}
    assert named[str(PLAIN)] == {"choice": None, "is_decided": True, "gains": {}}
    kept = Kept(cache_folder())
    assert kept.choices(SHAPES) == Choices({SMALL: Choice(1), LARGE: Choice(2)})
    assert kept.pass_seconds(set(SHAPES)) == PASSES


def look():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "shapes_of", lambda models: SHAPES)
        return tuning.look(reference_pair(), 9.0, cache_folder(), lambda line: None)


def test_while_disturbed_what_was_chosen_before_stays(found):
    Kept(cache_folder()).keep(SMALL, Choice(1))
    found.append(Tuned("low power mode is on"))
    result = look()
    assert result.status == SKIP
    assert result.sentence.endswith("chosen before stays: low power mode is on")
    assert Kept(cache_folder()).choices(SHAPES) == Choices({SMALL: Choice(1)})


def test_passes_with_other_choices_are_not_kept(found):
    Kept(cache_folder()).keep(PLAIN, Choice(2))
    found.append(decided({SMALL: Choice()}, reasons={PLAIN: "no time left"}))
    result = look()
    assert "; 1 undecided, no time left" in result.sentence
    kept = Kept(cache_folder())
    assert kept.choices(SHAPES) == Choices({SMALL: Choice(), PLAIN: Choice(2)})
    assert kept.pass_seconds(set(SHAPES)) is None


def test_why_something_is_undecided_is_said(found):
    reasons = {LARGE: "not timed: RuntimeError: [malloc] no", PLAIN: "no time left"}
    found.append(decided({SMALL: None}, reasons=reasons))
    result = look()
    assert result.sentence.endswith("; 2 undecided, not timed, no time left")
    assert f"{LARGE}: MLX, not timed: RuntimeError: [malloc] no" in result.lines
    assert not Kept(cache_folder()).is_decided(LARGE)


def test_what_was_found_without_passes_is_kept(found):
    """Of the drafter, say."""
    found.append(Tuned(decided={SMALL: Choice()}))
    assert look().sentence == "the kernel for 1 of 1 shapes"
    assert Kept(cache_folder()).choices(SHAPES) == Choices({SMALL: Choice()})


def test_passes_are_the_targets(monkeypatch):
    """What only the drafter has is tuned, and in no pass."""
    pair = half_pair("e2b")
    told: list[tuple[set[Shape], set[Shape]]] = []

    def tune(shapes, machine, *, in_passes, **rest):
        told.append((set(shapes), set(in_passes)))
        return Tuned("enough")

    monkeypatch.setattr(tuning, "tune", tune)
    tuning.look(pair, 9.0, None, lambda line: None)
    ((shapes, in_passes),) = told
    assert in_passes == set(modules.shapes_of([pair.target]))
    assert shapes - in_passes
    assert shapes - in_passes < set(modules.shapes_of([pair.drafter]))


def test_the_usual_time_suffices():
    """For the family that has most shapes, on a quiet machine."""

    def counted(model) -> Counter[Shape]:
        layers = [layer for _, layer in model.named_modules()]
        sizes = [layer["weight"].shape for layer in layers if type(layer) is nn.Linear]
        return Counter(Shape(n, k, SMALL.form) for n, k in sizes)

    target, drafter = map(counted, random_pair.skeletons("e2b"))
    assert drafter.keys() - target.keys()
    shapes = target + drafter
    truths = {shape: Truth(shape.num_bytes / 300e9, growth=0.06) for shape in shapes}
    found = tuner.tune(
        shapes,
        Simulated(truths, counts=target),
        in_passes=target,
        budget_s=command.TUNE_SECONDS,
        progress=lambda line: None,
    )
    assert set(found.choices.by_shape) == set(shapes)
    assert tuner.expected_s(len(shapes), len(target)) < command.TUNE_SECONDS


def test_nothing_faster_is_said(found):
    found.append(decided(dict.fromkeys(SHAPES)))
    assert look().sentence == "MLX is as fast for 3 shapes"


def test_a_pair_without_such_matrices_has_ways(monkeypatch):
    """Of float32: MLX multiplies, and layers may be run in other ways all the same."""
    pair = reference_pair()
    asked = []

    def tune(shapes, machine, *, ways, **_):
        asked.append((shapes, ways))
        assert machine.is_right_way(SPLIT, ())
        return Tuned(ways={ADD_NORM: True, NORM_ROPE: False}, bad_ways={QKV: "wrong"})

    monkeypatch.setattr(tuning, "tune", tune)
    result = tuning.look(pair, 9.0, cache_folder(), lambda line: None)
    assert result.status == FAIL
    assert result.sentence.endswith("MLX takes its place: qkv")
    assert "layers, add_norm: faster" in result.lines
    assert "layers, norm_rope: not faster" in result.lines
    assert "layers, qkv: not used, wrong" in result.lines
    structure = sizes_of([pair.target, pair.drafter]).structure
    assert Kept(cache_folder()).ways(structure) == {ADD_NORM}
    tuning.look(pair, 9.0, cache_folder(), lambda line: None)
    assert [QKV in ways for _, ways in asked] == [True, False]
    assert asked[0][0] == {}


def test_what_failed_is_bad(found):
    found.append(decided({SMALL: None}, bad={SMALL: "RuntimeError: no"}))
    result = look()
    assert result.status == FAIL
    assert str(SMALL) in result.sentence
    assert Kept(cache_folder()).is_bad(SMALL)


# ------------------------------------------------------------------------- whole passes


class Recorded:
    """Stands for an engine; knows its choices and what it was given."""

    def __init__(self, rounds, num_rows):
        self.choices = rounds.choices
        self.calls = calls
        self._engine = GivenRounds(rounds, num_rows)

    def run(self, tokens, slabs, **settings):
        self.calls.append((self.choices.digest, tokens.shape, settings["min_rows"]))
        if fails:
            fails.clear()
            raise RuntimeError("lost")
        return self._engine.run(tokens, slabs, **settings)


calls: list[tuple[str, tuple[int, ...], int]] = []
fails: list[bool] = []


def test_passes_have_engines_of_their_own(monkeypatch):
    calls.clear()
    monkeypatch.setattr(tuning, "GivenRounds", Recorded)
    pair = reference_pair()
    passes = tuning.Passes(pair)
    choices = Choices({SMALL: Choice()})
    before = pair.rounds.choices
    for chosen, num_rows in ((STOCK, 1), (choices, 3), (STOCK, 3), (choices, 9)):
        passes.run(chosen, num_rows)
    assert calls == [
        ("", (1, 1), 1),
        (choices.digest, (1, 3), 1),
        ("", (1, 3), 1),
        (choices.digest, (1, 9), 1),
    ]
    assert len(passes._engines) == 2
    assert pair.rounds.choices == before
    fails.append(True)
    with pytest.raises(RuntimeError, match="lost"):
        passes.run(STOCK, 1)
    passes.run(STOCK, 1)  # over slabs of its own


def test_passes_multiply_as_they_are_told(monkeypatch):
    kernel = StandIn()
    monkeypatch.setattr(modules, "multiply", kernel)
    pair = half_pair("12b")
    passes = tuning.Passes(pair)
    passes.run(STOCK, 3)
    assert kernel.calls == []
    for choices in (every_matrix(pair, first_row=2), every_matrix(pair, first_row=1)):
        for num_rows in (1, 3, 9):
            kernel.calls.clear()
            passes.run(choices, num_rows)
            rows = {m for _, m, _ in kernel.calls}
            is_taken = next(iter(choices.by_shape.values())).takes(num_rows)
            assert rows == ({num_rows} if is_taken else set())
    kernel.calls.clear()
    passes.run(STOCK, 9)
    assert kernel.calls == []


def test_passes_write_their_slabs_in_place():
    """Else every pass would copy them, and the caches would count as its time."""
    passes = tuning.Passes(reference_pair())
    passes.run(STOCK, 3)
    size = max(slab.nbytes for slab in passes._slabs)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    passes.run(STOCK, 3)
    assert mx.get_active_memory() <= before + size // 4
    assert mx.get_peak_memory() - before < sum(s.nbytes for s in passes._slabs)


# ----------------------------------------------------------------------------- the page


def test_the_page_says_what_runs(monkeypatch):
    monkeypatch.setattr(common, "backend", lambda: "metal")
    (shape, *_) = sections.matmuls.known_shapes("e2b")
    Kept(cache_folder()).keep(shape, Choice(2), {5: 1.75})
    options = sections.Options(["rows"], 0.0, "e2b")
    running = sections._Run(options, lambda line: None)  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(sections.matmuls, "_plain_bandwidth", lambda: (1.0, 1.0))
    result = running._rows(0.0)
    assert any("4bit_g64_bfloat16: kernel for 1 of" in line for line in result.lines)
    assert any("1.75 to 1.75 times" in line for line in result.lines)
    assert result.figures["few_rows"][str(shape)]["gains"] == {"5": 1.75}
    monkeypatch.setattr(common, "backend", lambda: "ops")
    assert not any("kernel for" in line for line in running._rows(0.0).lines)


# ---------------------------------------------------------------------------- quietness


ANSWERS = {
    "low power mode is on": ("pmset -g", " lowpowermode         1\n sleep 1"),
    "heat slows it": ("pmset -g therm", "CPU_Speed_Limit \t= 70\n"),
    "it is hot": ("notifyutil -g", "com.apple.system.thermalpressurelevel 2\n"),
}
QUIET = {
    "pmset -g": " lowpowermode         0\n highstandbythreshold 50\n sleep 1\n",
    "pmset -g therm": "CPU_Speed_Limit \t= 100\nNote: No thermal warning level\n",
    "notifyutil -g": "com.apple.system.thermalpressurelevel 0\n",
}


@pytest.mark.parametrize("meaning", [*ANSWERS, ""])
def test_low_power_and_heat_disturb(meaning, monkeypatch):
    def run(line, **_):
        text = " ".join(line)
        key = text if text in QUIET else "notifyutil -g"
        answer = QUIET[key]
        if meaning and ANSWERS[meaning][0] == key:
            answer = ANSWERS[meaning][1]
        return subprocess.CompletedProcess(line, 0, answer, "")

    monkeypatch.setattr(busy.subprocess, "run", run)
    monkeypatch.setattr(busy, "taken_share", lambda: 0.0)
    assert busy.disturbed() == meaning
    monkeypatch.setattr(busy, "taken_share", lambda: 0.5)
    assert busy.disturbed().endswith("other programs had 50% of a processor's time")


@pytest.mark.parametrize(
    "error", [FileNotFoundError(), subprocess.TimeoutExpired("pmset", 5.0)]
)
def test_a_system_that_cannot_be_asked_is_quiet(error, monkeypatch):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(busy.subprocess, "run", run)
    monkeypatch.setattr(busy, "taken_share", lambda: 0.0)
    assert busy.disturbed() == ""
