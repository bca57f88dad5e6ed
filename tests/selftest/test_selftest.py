"""The self-test: what it finds, what it says, and how it ends.

Run: python -m pytest tests/selftest/test_selftest.py
"""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.cli.tables import duration
from mlx_gemma_mtp.constants import ALL_DRAFTS
from mlx_gemma_mtp.drafting.prior import DEFAULT_PRIOR
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.exactness.verdict import PLAIN_ROWS, Verdict
from mlx_gemma_mtp.kernels import (
    common,
    decide,
    judge,
    matmul,
    propose,
    resample,
    select,
    threshold,
)
from mlx_gemma_mtp.kernels.matmul import FORMS, MAX_ROWS, Form, default_columns
from mlx_gemma_mtp.models.target import TargetOutput
from mlx_gemma_mtp.selftest import __main__ as command
from mlx_gemma_mtp.selftest import (
    busy,
    costs,
    exactness,
    kernels,
    matmuls,
    model,
    products,
    sections,
    slabs,
)
from mlx_gemma_mtp.selftest.kernel_case import SHAPES, Shape
from mlx_gemma_mtp.selftest.names import SECTIONS
from mlx_gemma_mtp.selftest.page import section, to_json, verdict
from mlx_gemma_mtp.selftest.result import FAIL, INFO, PASS, SKIP, Result
from mlx_gemma_mtp.selftest.tally import DECIDING, NAMES
from mlx_gemma_mtp.store import FOLDER_VARIABLE, Store, cache_folder
from tests.matmuls.matrices import FOUR_BIT, StandIn
from tests.metal.run import run_on_cpu
from tests.tiny import model_folder, reference_pair

pytestmark = pytest.mark.usefixtures("plain_graphs")

ROOT = Path(__file__).parents[2]
not_on_macs = pytest.mark.skipif(
    sys.platform == "darwin", reason="the harness is not for Macs"
)
SMALL = (Shape(3, 100, mx.float32),)
NOTHING = r"(?<![.\d])0(\.0*)? m?s\b"  # a time that is none


# -------------------------------------------------------------------------- the command


def test_whole_command(tmp_path, capsys, monkeypatch):
    """On a smaller pair than the embedded one."""
    monkeypatch.setattr(sections, "load_pair", reference_pair)
    monkeypatch.setattr(slabs, "CAPACITIES", (256, 512))
    monkeypatch.setattr(exactness, "_NUM_TOKENS", 10)
    file = tmp_path / "found.json"
    assert command.main(["--seconds", "1", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) <= 60
    assert lines[-1].startswith("PASS: ")
    names = [name for name in SECTIONS if name != "model"]
    assert [re.split("[, ]", line)[0] for line in err.splitlines()] == names
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["form"] == 1
    assert found["status"] == "pass"
    assert found["versions"]["mlx"]
    assert found["machine"]["mlx_device"]
    assert [section["name"] for section in found["sections"]] == names
    assert not re.search(NOTHING, out + err)
    keys = {"name", "status", "sentence", "lines", "figures", "seconds"}
    keys |= {"spread", "caution"}
    for each in found["sections"]:
        assert set(each) == keys
        assert each["status"] in (PASS, FAIL, SKIP, INFO)
    by_name = {section["name"]: section for section in found["sections"]}
    assert by_name["kernels"]["status"] == SKIP
    equal = by_name["exactness"]["figures"]["embedded pair"]["equal"]
    assert set(equal) == {"1", "2"}
    ratios = by_name["costs"]["figures"]["relative_cost"]["measured"]
    assert ratios["0"] == 1
    assert by_name["rows"]["figures"]["family"] == "e2b"


def test_one_section(capsys):
    assert command.main(["--section", "kernels"]) == 0
    out = capsys.readouterr().out
    assert "[skip] kernels" in out
    assert "not looked at: kernels" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--seconds", "nan"], "--seconds must be above 0"),
        (["--section", "model"], "must have a model"),
        (["--draft-model", "x"], "must belong to a model"),
        (["--section", "fun"], "invalid choice"),
        (["--family", "7b"], "invalid choice"),
        (["--json", "/nowhere/at/all.json"], "--json must be a file"),
        (["--model", "/nowhere"], "/nowhere"),
        (["forge"], "invalid choice"),
        (["forget", "--seconds", "3"], "forget must stand alone"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert command.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert message in err


def test_forget(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "kept"))
    assert command.main(["forget"]) == 0
    assert capsys.readouterr().out == f"nothing to forget in {tmp_path / 'kept'}\n"
    for number in range(3):
        Store({"pair": number}, cache_folder()).write({})
    (tmp_path / "kept" / "notes.json").write_text("{}")
    assert command.main(["forget"]) == 0
    out, err = capsys.readouterr()
    assert out == (
        f"forgot what was learnt: deleted 3 of its files in {tmp_path / 'kept'}\n"
    )
    assert err == ""
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["notes.json"]
    monkeypatch.setenv(FOLDER_VARIABLE, "")
    assert command.main(["forget"]) == 0
    assert "nothing is kept on disk" in capsys.readouterr().out


def test_what_cannot_be_forgotten_is_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file"))
    assert command.main(["forget"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert f"got {tmp_path / 'file'}: Not a directory" in err


def test_a_crash_is_contained(monkeypatch, capsys):
    def crash(*_):
        raise ValueError("first\nsecond")

    monkeypatch.setattr(slabs, "look", crash)
    assert command.main(["--section", "slabs", "kernels"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert any("the section ended: ValueError: first second" in line for line in lines)
    assert any("[skip] kernels" in line for line in lines)
    assert lines[-1].startswith("FAIL: slabs")


def test_help_needs_no_library():
    code = (
        "import sys; from mlx_gemma_mtp.selftest.__main__ import configure_parser;"
        "configure_parser().format_help(); assert 'mlx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---------------------------------------------------------------------------- the page


def test_page_and_json_of_odd_figures():
    odd: dict[Any, Any] = {
        "nan": float("nan"),
        "list": [float("inf"), 1],
        3: mx.float32,
        "none": None,
    }
    results = [
        Result("a", PASS, "holds", ("x" * 500,), odd, 1.0),
        Result("b", FAIL, "does not", seconds=2.0),
    ]
    lines = section(results[0]).splitlines()
    assert max(map(len, lines)) <= 120
    assert verdict(results) == "FAIL: b (3.0 s)"
    found = json.loads(to_json(results))
    assert found["status"] == FAIL
    figures = found["sections"][0]["figures"]
    assert figures["nan"] == "nan"
    assert figures["list"] == ["inf", 1]


@given(st.floats(0, 1e7))
def test_a_time_is_never_none(seconds):
    found = duration(seconds)
    assert not re.search(NOTHING, found)
    number, unit = found.removeprefix("under ").split()
    factor = {"s": 1, "ms": 1e-3}[unit]
    assert float(number) * factor == pytest.approx(seconds, rel=0.06, abs=1e-6)


def test_sections_are_shown_as_they_are_done(monkeypatch, capsys):
    """Each before the next begins, and what runs is said before it does."""
    clock = SimpleNamespace(perf_counter=lambda: 0.0)  # however busy the machine is
    monkeypatch.setattr(sections, "time", clock)
    shown = []

    def look(pair_or_s, *_):
        shown.append("".join(capsys.readouterr()))
        return Result("x", PASS, "done")

    monkeypatch.setattr(sections.kernels, "look", look)
    monkeypatch.setattr(sections.slabs, "look", look)
    assert command.main(["--section", "kernels", "slabs"]) == 0
    assert "[info] machine" in shown[0]
    assert shown[0].splitlines()[-1].startswith("kernels, up to about 72 s ...")
    assert shown[1].startswith("[pass] x")
    assert shown[1].splitlines()[-1].startswith("slabs, up to about 120 s ...")


def test_on_a_terminal_what_runs_leaves_no_line(monkeypatch):
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with command._running("rows ..."):
            assert os.read(reader, 99) == b"rows ..."
        assert os.read(reader, 99) == b"\r        \r"
    os.close(reader)


# ----------------------------------------------------------------------- busy machines


def test_others_on_the_processor_are_noticed(monkeypatch):
    wall, own = itertools.count(0, 0.001), itertools.count(0, 0.01)
    monkeypatch.setattr(busy.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(busy.time, "thread_time", lambda: next(own))
    assert busy._taken() == pytest.approx(0.75, abs=0.03)  # it ran for 10 of 40 ms
    looks = iter([0.8, 0.02, 0.9])  # one quiet look is enough
    monkeypatch.setattr(busy, "_taken", lambda: next(looks))
    assert busy.taken_share() == 0.02
    assert busy.caution(0.6, None) == "other programs had 60% of a processor's time"
    assert busy.caution(0.02, 0.1) == ""


def test_timings_that_lie_apart_are_noticed():
    steady = [[1.0, 1.01, 1.02, 1.0], [5.0, 5.1, 5.0, 5.2, 5.1]]
    assert busy.caution(0, busy.spread(steady)) == ""
    apart = [[1.0, 1.8, 1.1, 2.5], [5.0, 9.0, 5.0, 8.0, 12.0]]
    assert "lie" in busy.caution(0, busy.spread(apart))
    assert busy.spread([[1.0, 9.0]]) is None


def test_timings_on_a_busy_machine_are_marked(monkeypatch):
    taken = itertools.chain([0.0, 0.5], itertools.repeat(0.0))
    monkeypatch.setattr(busy, "taken_share", lambda: next(taken))
    found = Result("", PASS, "", spread=0.01)
    for part in (sections.kernels, sections.slabs):
        monkeypatch.setattr(part, "look", lambda *_: found)
    options = sections.Options(["kernels", "slabs"], 9.0)
    running = contextmanager(lambda line: iter([None]))
    kernels_found, slabs_found = list(sections.run(options, running))[1:]
    assert kernels_found.caution == ""  # it tells no times
    assert "do not rely on these timings: other programs" in section(slabs_found)


# -------------------------------------------------------------------------- the kernels


@pytest.fixture
def launches(monkeypatch):
    """Kernels run in the harness."""
    monkeypatch.setattr(common, "backend", lambda: "metal")
    monkeypatch.setattr(common, "launch", run_on_cpu)


@not_on_macs
def test_kernels_are_equal(launches):
    shapes = (*SMALL, Shape(1, 5, mx.float16), Shape(0, 2100, mx.bfloat16))
    result = kernels.look(1000, shapes, (FOUR_BIT,))
    assert result.status == PASS, result.lines
    assert result.figures["forms"] == ["4bit_g64_bfloat16"]
    assert "all 7 kernels" in result.sentence
    assert result.figures["shapes"] == [
        "4x100 float32",
        "2x5 float16",
        "1x2100 bfloat16",
    ]
    for name in NAMES:
        tally = result.figures["kernels"][name]
        assert tally["rows"] >= 16
        assert tally["wrong"] == 0


MISTAKES = [
    (select, "order == my_order && id < my_id", "order == my_order && id > my_id"),
    (propose, "above0 < top_p", "above1 < top_p"),
    (decide, "place = offset + 1 + row", "place = offset + row"),
    (threshold, "if (logit > best)", "if (logit >= best)"),
    (judge, "coin < running", "coin < 0.5f * running"),
    (resample, "log(difference) + noise", "log(difference)"),
]


@not_on_macs
@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        *MISTAKES[::2],
        *(pytest.param(*each, marks=pytest.mark.slow) for each in MISTAKES[1::2]),
    ],
)
def test_a_wrong_kernel_is_found(module, old, new, launches, monkeypatch):
    name = module.KERNEL.name
    source = module.KERNEL.source
    assert old in source
    wrong = replace(module.KERNEL, source=source.replace(old, new))
    monkeypatch.setattr(module, "KERNEL", wrong)
    only(monkeypatch, "judge" if name == "resample" else name)
    result = kernels.look(1000, (Shape(1, 30, mx.float32),), ())
    assert result.status == FAIL
    assert name in result.sentence
    assert result.figures["kernels"][name]["wrong"]


def only(monkeypatch, *names):
    """Leave out comparisons: whole rows take long in the harness."""
    for table in ("_LISTED", "_WHOLE"):
        kept = [entry for entry in getattr(kernels, table) if entry[0] in names]
        monkeypatch.setattr(kernels, table, kept)


@not_on_macs
def test_a_kernel_that_does_not_compile_is_named(launches, monkeypatch):
    wrong = replace(propose.KERNEL, source="nonsense")
    monkeypatch.setattr(propose, "KERNEL", wrong)
    only(monkeypatch, "select", "propose", "decide")
    result = kernels.look(1000, SMALL, ())
    assert result.status == FAIL
    tallies = result.figures["kernels"]
    assert tallies["propose"]["error"]
    assert not any(tallies[name]["error"] for name in NAMES if name != "propose")


def test_kernel_time_is_kept(launches, monkeypatch):
    seen: list[Shape | Form] = []
    monkeypatch.setattr(kernels, "compare", lambda shape, tallies: seen.append(shape))
    monkeypatch.setattr(
        products, "compare_form", lambda form, tallies: seen.append(form)
    )
    result = kernels.look(-1.0)
    assert seen == [FOUR_BIT, SHAPES[0]]
    assert "1 of 14 forms and 1 of 10 shapes" in result.sentence


@pytest.fixture
def multiply(monkeypatch):
    """MLX's operations in the matmul's place, and no other kernel."""
    stand_in = StandIn()
    monkeypatch.setattr(common, "backend", lambda: "metal")
    monkeypatch.setattr(matmul, "multiply", stand_in)
    monkeypatch.setattr(kernels, "compare", lambda *_: None)
    return stand_in


def test_the_matmul_is_compared_for_every_form_and_number_of_rows(multiply):
    result = kernels.look(1000)
    assert result.status == PASS, result.lines
    assert sorted(multiply.calls, key=str) == sorted(
        ((form, m, default_columns(m)) for form in FORMS for m in range(1, 10)), key=str
    )
    assert result.figures["kernels"]["matmul"]["rows"] == len(FORMS) * 45


def next_number(y):
    """The first row with other last bits."""
    moved = (y[:1].view(mx.uint16) + 1).view(y.dtype)
    return mx.concatenate([moved, y[1:]])


@pytest.mark.parametrize("num_rows", range(1, MAX_ROWS + 1))
def test_a_matmul_whose_rows_depend_on_their_number_is_found(num_rows, multiply):
    multiply.change = lambda y, _, m, __: next_number(y) if m == num_rows else y
    result = kernels.look(1000, forms=(FOUR_BIT,))
    assert result.status == FAIL
    assert result.sentence.startswith("matmul differ")
    # All others differ from the most rows, if those are the wrong ones.
    first = num_rows if num_rows < MAX_ROWS else MAX_ROWS - 1
    assert f"in 131x1408 4bit_g64_bfloat16, {first} rows" in result.lines[0]


def test_a_matmul_that_is_wrong_for_every_number_of_rows_is_found(multiply):
    form = FORMS[-1]
    multiply.change = lambda y, its, *_: y * 1.05 if its == form else y
    result = kernels.look(1000, forms=(FOUR_BIT, form))
    assert result.status == FAIL
    tally = result.figures["kernels"]["matmul"]
    assert (tally["rows"], tally["wrong"]) == (90, 45)


def test_a_matmul_that_does_not_run_is_found(multiply):
    def fail(form, num_rows, _):
        if num_rows == 7:
            raise RuntimeError("too many registers")

    multiply.fails = fail
    result = kernels.look(1000, forms=(FOUR_BIT,))
    assert result.status == FAIL
    assert "RuntimeError: too many registers in 131x1408" in result.lines[0]
    assert "7 rows" in result.lines[0]


def test_the_matmul_is_not_compared_where_mlx_multiplies(multiply, monkeypatch):
    monkeypatch.setattr(common, "backend", lambda: "cuda")
    result = kernels.look(1000)
    assert not multiply.calls
    assert tuple(result.figures["kernels"]) == DECIDING
    assert "all 6 kernels" in result.sentence


# ------------------------------------------------------------------------ the exactness


class Uneven:
    """A target whose logits depend on how many rows are verified."""

    def __init__(self, target: Any, change: Any) -> None:
        self._target, self._change = target, change
        self.layout, self.vocab_size = target.layout, target.vocab_size

    def __getattr__(self, name):
        return getattr(self._target, name)

    def verify(self, tokens, slabs, **places):
        output = self._target.verify(tokens, slabs, **places)
        logits = self._change(output.logits, tokens.shape[1])
        return TargetOutput(logits, output.hidden, output.slabs)


def uneven_pair(change):
    pair = reference_pair()
    rounds = Rounds(Uneven(pair.rounds.target, change), pair.drafter)
    return SimpleNamespace(rounds=rounds, drafter=pair.drafter)


def test_one_row_that_rounds_differently_is_told():
    pair = uneven_pair(lambda logits, rows: logits * (1.001 if rows == 1 else 1))
    result = exactness.look(pair, "e2b", 0.0)
    assert result.status == PASS  # exact decoding fills plain rounds up
    line = result.lines[0]
    assert "no K for plain rounds of 1" in line
    assert "K = 1-8 for plain rounds of 2" in line
    assert result.sentence.endswith("plain ones of several rows")
    assert "logits differ by up to" in line
    found = result.figures["embedded pair"]
    assert found["max_difference"] > 0


def test_what_is_left_of_drafting_is_told():
    pair = uneven_pair(lambda logits, rows: logits * (1 + rows / 1000))
    result = exactness.look(pair, "e2b", 0.0)
    assert result.status == PASS
    assert result.figures["embedded pair"]["route"] == {
        "min_rows": 2,
        "allowed": [0, 1],
    }
    assert "some K only" in result.sentence


def test_rows_that_all_round_differently_are_told():
    calls = itertools.count()
    pair = uneven_pair(lambda logits, rows: logits * (1 + next(calls) / 1000))
    result = exactness.look(pair, "e2b", 0.0)
    assert result.status == INFO
    assert "other bytes" in result.sentence


def test_a_text_that_differs_in_spite_of_equal_bytes_fails(monkeypatch):
    everything = dict.fromkeys(PLAIN_ROWS, ALL_DRAFTS[1:])
    told = Verdict(everything, 0.0, 1.0, 1, 0.0)
    monkeypatch.setattr(exactness, "probe", lambda *_, **__: told)
    pair = uneven_pair(lambda logits, rows: mx.roll(logits, rows, -1))
    result = exactness.look(pair, "e2b", 0.0)
    assert result.status == FAIL
    assert "greedy texts of K = 1, 4, 8 differ" in result.lines[0]


def test_random_weights_are_probed(monkeypatch):
    monkeypatch.setattr(exactness, "_FEW_TOKENS", 2048)
    probed = []

    def probe(rounds, **settings):
        probed.append((rounds.target.layout.dtype, settings["budget_s"]))

    monkeypatch.setattr(exactness, "probe", probe)
    result = exactness.look(reference_pair(), "e2b", 1000.0)
    assert [dtype for dtype, _ in probed[1:]] == [mx.float32, mx.bfloat16]
    assert result.status == SKIP
    assert "too long" in result.lines[-1]


# ----------------------------------------------------------------------------- the rest


def test_a_copied_cache_is_found(monkeypatch):
    def measured(pair, capacity, num_drafts, look_ahead):
        return {
            "capacity": capacity,
            "num_draft_tokens": num_drafts,
            "look_ahead": look_ahead,
            "round_s": 0.01,
            "rounds_s": [0.01],
            "extra_bytes": 1200 if look_ahead else 10,
            "slab_bytes": 1000,
        }

    monkeypatch.setattr(slabs, "_measure", measured)
    assert slabs.look(reference_pair(), 1.0).status == FAIL
    assert slabs.look(reference_pair(), 1.0, (1024,)).status == INFO


def test_matrices_of_a_family():
    shapes, names = matmuls.matrix_shapes("12b")
    assert shapes[262144, 3840] == 1
    assert names[262144, 3840] == "embed_tokens"
    assert shapes[15360, 3840] == 2 * 48  # gate and up
    assert shapes[3840, 15360] == 48


def test_matrices_are_timed_while_there_is_time(monkeypatch):
    sizes = {(64, 128): 3, (256, 128): 1, (10**9, 10**6): 1}
    names = dict.fromkeys(sizes, "some")
    monkeypatch.setattr(matmuls, "matrix_shapes", lambda family: (sizes, names))
    monkeypatch.setattr(matmuls, "_plain_bandwidth", lambda: (1.0, 1.0))
    result, timed = matmuls.look("e2b", 10.0)
    assert result.status == INFO
    assert [(t.shape, t.form) for t in timed] == [
        (shape, form) for form in matmuls.FORMS for shape in [(64, 128), (256, 128)]
    ] or len(timed) == 4
    assert all(t.ratios[0] == 1 and len(t.seconds) == 9 for t in timed)
    assert "takes" in result.figures["skipped"]["some 4-bit"]
    result, timed = matmuls.look("e2b", 0.0)
    assert (result.status, timed) == (SKIP, [])


def test_costs_stand_beside_the_prior():
    seconds = tuple(0.01 * rows for rows in matmuls.ROWS)
    timed = [matmuls.Timing("some", (8, 8), 2, "4-bit", 64, seconds)]
    result = costs.look(reference_pair(), DEFAULT_PRIOR, timed, 0.0)
    assert result.status == INFO
    columns = result.figures["relative_cost"]
    assert columns["matrices 4-bit"]["3"] == pytest.approx(4)
    assert columns["measured"]["0"] == 1
    assert set(columns) == {"measured", "prior", "matrices 4-bit"}


# ---------------------------------------------------------------------------- the model


def test_a_model_of_the_users(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model, "MAX_TOKENS", 12)
    folder = model_folder(tmp_path / "pair")
    file = tmp_path / "found.json"
    arguments = ["--model", str(folder), "--section", "model", "--seconds", "1"]
    assert command.main([*arguments, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "[pass] model" in out
    assert "accepted by position" in out
    assert "tokens/s: plain" in out
    (section,) = json.loads(file.read_text(encoding="utf-8"))["sections"][1:]
    assert section["figures"]["exact_texts_differing"] == []
    assert set(section["figures"]["tokens_per_second"]) == {"0", "auto", "3"}


def test_a_model_whose_exact_texts_differ(tmp_path, monkeypatch):
    loaded = model.open_model(str(model_folder(tmp_path / "pair")), None)
    generate = model.generate

    def tampered(loaded, num_draft_tokens, exactness):
        text = generate(loaded, num_draft_tokens, exactness)
        return replace(text, tokens=[]) if num_draft_tokens == "auto" else text

    monkeypatch.setattr(model, "generate", tampered)
    monkeypatch.setattr(model, "MAX_TOKENS", 8)
    result = model.look(loaded, 0.0)
    assert result.status == FAIL
    assert "K = auto differs" in result.sentence


def test_a_model_without_a_drafter_is_a_mistake(tmp_path, capsys):
    folder = model_folder(tmp_path / "pair", has_drafter=False)
    assert command.main(["--model", str(folder)]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "--draft-model" in err


def test_time_that_is_left_is_for_later_sections(monkeypatch):
    allowed = {}

    def look(name):
        def found(self_or_s, *rest):
            allowed[name] = rest[-1] if rest else self_or_s
            return Result(name, PASS, "")

        return found

    monkeypatch.setattr(sections.kernels, "look", look("kernels"))
    monkeypatch.setattr(sections.slabs, "look", look("slabs"))
    options = sections.Options(["kernels", "slabs"], 100.0)
    results = list(sections.run(options, lambda line: nullcontext()))
    assert [result.name for result in results] == ["machine", "kernels", "slabs"]
    assert allowed["kernels"] == pytest.approx(60, abs=5)
    assert allowed["slabs"] == pytest.approx(100, abs=10)
