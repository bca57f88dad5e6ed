"""The report of a training: its arithmetic, its tables, its card, its plot.

Run: python -m pytest tests/tune/test_report.py
"""

from __future__ import annotations

import builtins
import html
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.cli.arguments import configure_parser
from mlx_gemma_mtp.cli.tables import one_line
from mlx_gemma_mtp.drafting.acceptance_model import tokens_per_round
from mlx_gemma_mtp.drafting.chips import CHIPS
from mlx_gemma_mtp.drafting.prior import DEFAULT_PRIOR, Prior
from mlx_gemma_mtp.drafting.speed_model import model
from mlx_gemma_mtp.errors import OutputError
from mlx_gemma_mtp.machine import describe_machine
from mlx_gemma_mtp.models.families import FAMILIES
from mlx_gemma_mtp.tune.report.card import usage
from mlx_gemma_mtp.tune.report.measured import Acceptance, Measured, Point
from mlx_gemma_mtp.tune.report.plot import MISSING, write_plot
from mlx_gemma_mtp.tune.report.report import Report, write_report
from mlx_gemma_mtp.tune.report.speedup import best, predict
from mlx_gemma_mtp.tune.request import TuneRequest
from tests.cli.test_tables import NASTY

ROOT = Path(__file__).parents[2]
LOW = Acceptance((0.5, 0.25, 0.125, 0.0625), 400)
HIGH = Acceptance((0.75, 0.5625, 0.40625, 0.3125), 320)
HISTORY = (
    Point(0, 0.0, 3.25, 1.9375),
    Point(10, 0.5, 2.5),
    Point(20, 1.0, 1.75, 3.03125),
    Point(30, 1.5, 1.625, 3.0),
)


def report(**changes):
    made = Report(
        target="google/gemma-4-E2B-it",
        drafter="google/gemma-4-E2B-it-assistant",
        before=Measured(LOW, {"code": LOW, "prose": LOW}),
        after=Measured(HIGH, {"code": HIGH, "prose": LOW}),
        history=HISTORY,
        settings={"steps": 30, "lora": None, "loss": "tv", "weights": [1.0, 0.5]},
        minutes={"text": 1.25, "recording": 0.5, "training": 1.5, "measuring": 0.75},
        peak_memory_bytes=1_230_000_000,
        records_bytes=45_600_000,
        prediction=predict(LOW.reached, HIGH.reached, family="e2b"),
        machine=describe_machine(),
        command="mlx_gemma_mtp.tune --data 'some texts.jsonl'",
    )
    return replace(made, **changes)


def prose(text):
    """The lines of a Markdown text outside its blocks of code."""
    fence = None
    for line in text.splitlines():
        mark = re.match("`{3,}", line)
        if fence is not None:
            fence = None if line == fence else fence
        elif mark:
            fence = mark[0]
        else:
            yield line


def tables(text):
    """The tables of a Markdown text: their cells, as a browser shows them.

    Strict on purpose: every line with a bar is a row, and a table has a rule and as
    many cells in each row as in its head.
    """
    parsed = []
    for is_table, lines in itertools.groupby(prose(text), lambda line: "|" in line):
        if not is_table:
            continue
        rows = list(lines)
        assert all(row.startswith("|") and row.endswith("|") for row in rows), rows
        cells = [[cell.strip() for cell in row[1:-1].split("|")] for row in rows]
        assert {len(row) for row in cells} == {len(cells[0])}, rows
        assert set(cells[1]) == {"---"}, rows
        shown = [cells[0], *cells[2:]]
        parsed.append([[html.unescape(cell) for cell in row] for row in shown])
    return parsed


def front_matter(text):
    """What the Hub reads."""
    return ModelCard(text).data.to_dict()


# What was measured


@given(st.lists(st.integers(0, 5), min_size=1, max_size=200))
def test_acceptance_is_that_of_its_rounds(accepted):
    """Against every round's own number of tokens."""
    reached = tuple(sum(n >= i for n in accepted) / len(accepted) for i in range(1, 6))
    found = Acceptance(reached, len(accepted))
    assert found.length == pytest.approx(1 + np.mean(accepted))
    error = np.std(accepted) / math.sqrt(len(accepted))
    assert found.standard_error == pytest.approx(error, abs=1e-7)


@pytest.mark.parametrize(
    ("reached", "rounds"), [((1.5,), 1), ((-0.1,), 1), ((math.nan,), 1), ((0.5,), -1)]
)
def test_what_is_no_share_is_refused(reached, rounds):
    with pytest.raises(ValueError, match="reached must be shares"):
        Acceptance(reached, rounds)


def test_no_rounds_tell_nothing():
    nothing = Acceptance((), 0)
    assert (nothing.length, nothing.standard_error) == (1.0, 0.0)


# Predicted speed


def test_prediction_by_hand():
    """Costs 1, 1.25, 1.5, 2, 4 and tokens 1.5, 1.75, 1.875 | 1.75, 2.3125, 2.71875."""
    costs = (1.0, 1.25, 1.5, 2.0, 4.0)
    found = predict(LOW.reached, HIGH.reached, family=None, relative_cost=costs)
    here = found.speedups[-1]
    assert (here.where, here.origin) == ("this machine", "measured")
    assert (here.before.num_draft_tokens, here.before.speedup) == (1, 1.5 / 1.25)
    assert (here.after.num_draft_tokens, here.after.speedup) == (2, 2.3125 / 1.5)
    assert here.gain == pytest.approx(2.3125 / 1.5 / 1.2)


def test_where_no_drafting_pays_none_is_best():
    assert best((0.5, 0.25), (1.0, 1.5, 2.0)).num_draft_tokens == 0
    assert best((0.5, 0.25), (1.0, 1.5, 2.0)).speedup == 1.0
    assert best((), (1.0, 1.1)).num_draft_tokens == 0


@pytest.mark.parametrize("num_measured", [1, 3, 8])
def test_what_was_not_measured_is_not_considered(num_measured):
    """Drafts that cost nothing are best in as many as were measured."""
    free = (1.0,) * 9
    assert best((0.9,) * num_measured, free).num_draft_tokens == num_measured
    assert best((0.9,) * 8, free[: num_measured + 1]).num_draft_tokens == num_measured


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("context", [0, 8192])
def test_prediction_is_the_speed_model_where_acceptance_is_constant(family, context):
    """For shares a, a², ... the speed model has a formula of its own."""
    before, after = ([a**i for i in range(1, 9)] for a in (0.4, 0.8))
    found = predict(before, after, family=family, bits=8, draft_bits=8, context=context)
    assert [place.where for place in found.speedups][-1] == "M5 Max"
    for place in found.speedups:
        speed = model(
            CHIPS[place.where], FAMILIES[family], bits=8, draft_bits=8, context=context
        )
        assert place.origin == "modelled"
        for side, acceptance in ((place.before, 0.4), (place.after, 0.8)):
            assert side.speedup == pytest.approx(speed.speedup(acceptance))
            assert side.num_draft_tokens == speed.best_draft_tokens(acceptance)
    assert family.upper() in found.assumptions
    assert f"{context:,} tokens" in found.assumptions


@given(st.lists(st.floats(0, 1), max_size=8), st.sampled_from([None, *FAMILIES]))
def test_an_unchanged_drafter_gains_nothing(probabilities, family):
    reached = list(itertools.accumulate(probabilities, lambda a, b: a * b))
    for place in predict(reached, reached, family=family).speedups:
        assert place.gain == 1
        assert place.before.speedup >= 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_typical_costs_against_every_k(probabilities):
    reached = list(itertools.accumulate(probabilities, lambda a, b: a * b))
    (place,) = predict(reached, reached, family="another").speedups
    tokens, costs = tokens_per_round(probabilities), DEFAULT_PRIOR.relative_cost
    most = max(t / c for t, c in zip(tokens, costs, strict=False))
    assert place.origin == "assumed"
    assert place.after.speedup == pytest.approx(most)


def test_a_prior_of_this_chip_is_modelled():
    prior = Prior((1.0, *(1.01,) * 8), 0.7)
    (place,) = predict(LOW.reached, LOW.reached, family=None, prior=prior).speedups
    assert place.origin == "modelled"
    assert place.after.speedup == pytest.approx(LOW.length / 1.01)


@pytest.mark.parametrize("costs", [(), (0.9, 1.0), (1.0, 0.0), (1.0, math.nan)])
def test_costs_that_are_none_are_refused(costs):
    with pytest.raises(ValueError, match="relative_cost must be positive numbers"):
        predict((0.5,), (0.5,), family=None, relative_cost=costs)


def test_only_what_ran_here_is_called_measured():
    for family in (None, *FAMILIES):
        found = predict(LOW.reached, HIGH.reached, family=family)
        assert "measured" not in {place.origin for place in found.speedups}


# Text


def test_rows_by_hand():
    made = report()
    assert made.position_rows()[1:] == [
        ("before", "0.50", "0.25", "0.12", "0.06", "1.94 ± 0.06", "400"),
        ("after", "0.75", "0.56", "0.41", "0.31", "3.03 ± 0.09", "320"),
    ]
    assert made.kind_rows()[1:] == [
        ("code", "1.94 ± 0.06", "3.03 ± 0.09", "+56%", "400 / 320"),
        ("prose", "1.94 ± 0.06", "1.94 ± 0.06", "+0%", "400 / 400"),
        ("all", "1.94 ± 0.06", "3.03 ± 0.09", "+56%", "400 / 320"),
    ]
    assert made.cost_lines() == [
        "training: 30 steps, loss 3.250 to 1.625; best acceptance length held out 3.03 "
        "at step 20",
        "minutes: text 1.2, recording 0.5, training 1.5, measuring 0.8, 4.0 in all",
        "peak memory 1.23 GB, records on disk 45.60 MB",
    ]


def test_speed_rows_are_the_prediction():
    made = report()
    for row, place in zip(made.speed_rows()[1:], made.prediction.speedups, strict=True):
        speed = model(CHIPS[row[0]], FAMILIES["e2b"])
        k = place.after.num_draft_tokens
        tokens = 1 + sum(HIGH.reached[:k])
        assert row[3] == f"{tokens / speed.relative_cost(k):.2f}x (K = {k})"
        assert row[4] == f"{place.after.speedup / place.before.speedup:.2f}"


def test_kinds_and_positions_of_one_side_only():
    made = report(
        before=Measured(Acceptance((0.5,), 9), {"old": LOW}),
        after=Measured(HIGH, {"new": HIGH, "empty": Acceptance((), 0)}),
    )
    assert made.position_rows()[1][1:5] == ("0.50", "-", "-", "-")
    rows = {row[0]: row[1:] for row in made.kind_rows()}
    assert rows["old"] == ("1.94 ± 0.06", "-", "-", "400 / -")
    assert rows["new"] == ("-", "3.03 ± 0.09", "-", "- / 320")
    assert rows["empty"] == ("-", "-", "-", "- / 0")


def test_the_terminal_gets_everything_in_short_lines():
    lines = report().lines()
    text = "\n".join(lines)
    assert text.isprintable() is False  # only for its line ends
    assert all(line.isprintable() for line in lines)
    assert max(len(line) for line in lines if line.startswith("  ")) <= 100
    for needed in ("before", "after", "M4 Max", "code", "modelled", "peak memory"):
        assert needed in text
    assert "not measured" in text
    assert describe_machine() in lines


def test_a_training_that_was_never_judged():
    lines = report(history=(Point(5, 0.1, 2.0),)).cost_lines()
    assert lines[0] == "training: 5 steps, loss 2.000"
    assert len(report(history=()).cost_lines()) == 2


def test_to_dict_is_json_and_complete():
    history = (*HISTORY, Point(40, 2.0, math.inf, None), Point(50, 2.5, math.nan))
    found = json.loads(json.dumps(report(history=history).to_dict(), allow_nan=False))
    before = found["acceptance"]["before"]
    assert before["overall"]["reached"] == list(LOW.reached)
    assert before["kinds"]["code"]["acceptance_length"] == LOW.length
    assert [point["loss"] for point in found["history"]][-3:] == [1.625, None, None]
    assert found["predicted_speedup"]["speedups"][0]["before"]["speedup"] >= 1
    assert found["settings"]["weights"] == [1.0, 0.5]
    for name in ("peak_memory_bytes", "records_bytes", "machine", "command", "minutes"):
        assert found[name] == getattr(report(), name)


# The card


def test_the_card_has_every_table():
    made = report()
    text = made.markdown("me/my-drafter", has_plot=True)
    position, kind, speed, asked = tables(text)
    for found, rows in (
        (position, made.position_rows()),
        (kind, made.kind_rows()),
        (speed, made.speed_rows()),
    ):
        assert found == [list(row) for row in rows]
    assert asked[1:] == [
        ["steps", "30"],
        ["lora", "none"],
        ["loss", "tv"],
        ["weights", "1.0, 0.5"],
    ]
    assert "# my-drafter\n" in text
    assert "(plot.svg)" in text
    assert "plot.svg" not in made.markdown("me/my-drafter", has_plot=False)
    assert f"\n{made.command}\n" in text
    assert "--draft-model me/my-drafter" in text
    named = replace(made, usage="run 'it is'").markdown("me/my-drafter", has_plot=True)
    assert "```bash\nrun 'it is'\n```" in named


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"model": "google/gemma-4-E2B-it"}, "--model google/gemma-4-E2B-it"),
        ({"model": "my models/one"}, "--model './my models/one'"),
        ({"model": "-x"}, "--model ./-x"),
        ({"adapter_path": "$a"}, "--adapter-path './$a'"),
        ({"revision": "a b"}, "--revision 'a b'"),
        ({"trust_remote_code": True}, "--trust-remote-code"),
        ({"output": Path("/else/it's")}, """--draft-model '/else/it'"'"'s'"""),
    ],
)
def test_a_card_names_what_was_given(monkeypatch, tmp_path, changes, shown):
    monkeypatch.chdir(tmp_path)
    for folder in ("my models/one", "-x"):
        Path(folder).mkdir(parents=True)
    settings = {"model": "me/it", "output": Path("made"), **changes}
    found = usage(TuneRequest(data=("x.txt",), **settings))
    assert shown in found
    words = shlex.split(found)
    assert words[0] == "mlx_gemma_mtp.generate"
    configure_parser().parse_args(words[1:])


def test_front_matter_names_what_the_hub_knows():
    found = front_matter(report().markdown("x", has_plot=False))
    both = ["google/gemma-4-E2B-it-assistant", "google/gemma-4-E2B-it"]
    assert found["base_model"] == both
    assert found["license"] == "apache-2.0"
    own = report(target="my-target", drafter="my-drafter", license="mit")
    found = front_matter(own.markdown("x", has_plot=False))
    assert "base_model" not in found
    assert found["license"] == "mit"
    fresh = report(target="me/target", drafter=None)
    found = front_matter(fresh.markdown("x", has_plot=False))
    assert found["base_model"] == ["me/target"]
    assert "license" not in found
    assert "random weights" in fresh.markdown("x", has_plot=False)


@given(st.text(max_size=20))
@example("".join(NASTY))
@settings(max_examples=50)
def test_no_name_breaks_a_table(name):
    check_name(name)


@pytest.mark.parametrize("name", NASTY)
def test_no_nasty_name_breaks_a_table(name):
    check_name(name)


def check_name(name):
    kinds = {f"1{name}": LOW, f"2{name}": HIGH}
    made = report(
        target=f"t{name}",
        drafter=f"d{name}",
        before=Measured(LOW, kinds),
        after=Measured(HIGH, kinds),
        settings={name: name},
        minutes={name: 1.0},
        command=name or "x",
    )
    text = made.markdown(f"n{name}", has_plot=False)
    position, kind, speed, asked = tables(text)
    assert [row[0] for row in kind[1:]] == [*map(one_line, kinds), "all"]
    assert asked[1] == [one_line(name)] * 2
    assert (len(position), len(speed)) == (3, 5)
    headings = [line for line in prose(text) if line.startswith("#")]
    assert headings[1:] == ["## Acceptance", "## Speed", "## Training"]
    assert all(line.isprintable() for line in made.lines())
    assert set(front_matter(text)) >= {"library_name", "tags"}


def test_a_command_stays_in_its_block():
    text = report(command="run '```\n# no heading'").markdown("x", has_plot=False)
    assert "\n````bash\nrun '```\n# no heading'\n````\n" in text


# The plot


def test_the_plot_is_the_same_bytes_again(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        assert write_plot(folder, HISTORY, LOW, HIGH)
    one, other = ((folder / "plot.svg").read_bytes() for folder in folders)
    assert one == other
    root = ElementTree.fromstring(one)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = " ".join("".join(root.itertext()).split())
    for needed in ("steps", "loss", "drafts accepted", "before: 1.94", "after: 3.03"):
        assert needed in text
    assert b"dc:date" not in one
    write_plot(tmp_path, HISTORY, LOW, LOW)
    assert (tmp_path / "plot.svg").read_bytes() != one


def test_the_plot_draws_the_numbers(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    kept = []
    savefig = Figure.savefig

    def keeping(figure, *args, **kwargs):
        kept.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keeping)
    write_plot(tmp_path, HISTORY, LOW, HIGH)
    lengths, bars, losses = kept[0].axes
    (line,) = lengths.lines
    assert line.get_xydata().tolist() == [[0, 1.9375], [20, 3.03125], [30, 3.0]]
    (line,) = losses.lines
    assert line.get_xydata().tolist() == [[0, 3.25], [10, 2.5], [20, 1.75], [30, 1.625]]
    before, after = bars.containers
    assert [bar.get_height() for bar in before] == list(LOW.reached)
    assert [bar.get_height() for bar in after] == list(HIGH.reached)
    assert [bar.get_x() for bar in after] == pytest.approx([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("history", "before"),
    [((), Acceptance((), 0)), ((Point(1, 0.1, math.nan),), LOW)],
)
def test_a_plot_of_little_is_a_plot(tmp_path, history, before):
    assert write_plot(tmp_path, history, before, before)
    ElementTree.parse(tmp_path / "plot.svg")


def test_without_matplotlib_there_is_a_line(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert write_report(tmp_path, report(), name="x") == [MISSING]
    assert 'pip install "mlx_gemma_mtp[tune]"' in MISSING
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert "plot.svg" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_report_is_written(tmp_path):
    assert write_report(tmp_path, report(), name="x") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "plot.svg"]
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card == report().markdown("x", has_plot=True)


def test_bytes_of_an_argument_that_are_no_text_can_be_written(tmp_path):
    """Python hands them on as lone surrogates, which UTF-8 has not."""
    write_report(tmp_path, report(command="tune --data \udce9.txt"), name="\udce9")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "tune --data ?.txt" in card


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(
        OutputError, match=r"must be writable: got .+\. Check"
    ) as caught:
        write_report(tmp_path / "missing", report(), name="x")
    assert "\n" not in str(caught.value)


def test_import_is_free_of_matplotlib():
    code = (
        "import sys, mlx_gemma_mtp.tune, mlx_gemma_mtp.tune.report\n"
        "assert 'matplotlib' not in sys.modules, 'matplotlib'\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (result.returncode, result.stderr) == (0, "")
