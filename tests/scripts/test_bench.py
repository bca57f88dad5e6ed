"""The benchmark runs; what it measures is not judged here.

Run: python -m pytest tests/scripts/test_bench.py
"""

from __future__ import annotations

import argparse
import builtins
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_gemma_mtp.pair.load import embedded_pair_path, load_tokenizer
from scripts.benchmarks import plot, report
from scripts.benchmarks.arguments import (
    SECTIONS,
    configure_parser,
    engine_specs,
    graph_specs,
)
from scripts.benchmarks.compare import Cell, run_cell
from scripts.benchmarks.engines import (
    AUTO,
    MLX_LM,
    MLX_VLM,
    OURS,
    TWO_MODEL,
    EngineSpec,
    MlxLm,
    OwnEngine,
    TwoModel,
    make_engine,
)
from scripts.benchmarks.first_token import first_token
from scripts.benchmarks.graph import counting
from scripts.benchmarks.measure import measure
from scripts.benchmarks.models import ModelSpec
from scripts.benchmarks.prompts import (
    KINDS,
    kind_prompts,
    random_prompts,
    read_kinds,
)
from scripts.benchmarks.step import UnavailableError
from tests.tiny import CHAT_TEMPLATE, reference_pair, tiny_tokenizer, uncompiled

ROOT = Path(__file__).parents[2]
SAMPLED = {"temp": 1.0, "top_p": 0.95, "top_k": 64}


def run_bench(*arguments, cwd, **environment):
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.usefixtures("plain_graphs")
def test_first_tokens_of_prompts_at_once(capsys):
    pair = reference_pair()
    documents = random_prompts(pair.vocab_size, "", count=2, length=80)
    args = argparse.Namespace(prompts_at_once=[3], repeats=1)
    found = first_token(pair, documents, random.Random(0), args)["3"]
    assert list(found) == ["one by one", "together"]
    for figures in found.values():
        assert figures["last_ms"] == figures["mean_ms"] > 0  # all in the first step
    assert found["one by one"]["x_last"] == 1
    assert "together" in capsys.readouterr().out


@pytest.mark.slow
def test_all_sections_run(tmp_path):
    figures, tables = tmp_path / "figures.json", tmp_path / "tables.md"
    run = run_bench(
        *(name for name in SECTIONS if name != "graph"),
        *("--prompts", "2", "--places", "2", "--repeats", "1", "--max-tokens", "8"),
        *("--batch-rows", "1", "--prompts-at-once", "2"),
        *("--contexts", "32", "--kinds", "code", "chat", "--samplings", "greedy"),
        *("--prompts-per-kind", "2", "--num-draft-tokens", "4", "auto"),
        *("--engines", "mlx-lm", "plain", "draft", "mlx-vlm"),
        *("--exactness", "fast"),  # no probe
        *("--json", str(figures), "--markdown", str(tables)),
        cwd=tmp_path,
        MLX_DISABLE_COMPILE="1",  # kernels of all these rounds take minutes
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(figures.read_text(encoding="utf-8"))
    sections = {
        "speed",
        "acceptance",
        "rules",
        "context",
        "useless",
        "batch",
        "first",
        "structure",
        "engines",
    }
    assert set(found) == {"machine", *sections}
    assert "mlx " in found["machine"]
    for figure in found["speed"].values():
        assert figure["tokens_per_second"] > 0
    for figure in found["batch"]["1"].values():
        assert figure["tokens_per_second"] > 0
    for figure in found["first"]["2"].values():
        assert figure["last_ms"] >= figure["mean_ms"] > 0
    for figure in found["acceptance"].values():
        assert 1 <= figure["acceptance_length"] <= 5
    for lengths in found["rules"].values():
        assert all(1 <= length <= int(k) + 1 for k, length in lengths.items())
    assert set(found["context"]) == {"32"}
    assert all(f["x_plain_time"] > 0 for f in found["useless"].values())
    for name in ("mlx-lm generate_step", "drafting", "random places"):
        assert name in run.stdout
    assert [cell["kind"] for cell in found["engines"]["cells"]] == ["code", "chat"]
    for cell in found["engines"]["cells"]:
        check_engines(cell, found["engines"]["skipped"])
    assert "| drafting, K = 4, fast |" in tables.read_text(encoding="utf-8")


@pytest.mark.slow
def test_compiled_graphs_are_counted(tmp_path):
    figures, tables = tmp_path / "figures.json", tmp_path / "tables.md"
    run = run_bench(
        *("graph", "--max-tokens", "8", "--num-draft-tokens", "4"),
        *("--engines", "mlx-lm", "plain", "draft", "--exactness", "fast"),
        *("--json", str(figures), "--markdown", str(tables)),
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    check_graph(json.loads(figures.read_text(encoding="utf-8"))["graph"])
    assert "| drafting, K = 4, fast |" in tables.read_text(encoding="utf-8")


def check_engines(cell: dict[str, Any], skips: dict[str, str]) -> None:
    names = ["mlx-lm", "plain, K = 0", "drafting, K = 4, fast", "drafting, auto, fast"]
    assert (cell["sampling"], cell["batch_size"]) == ("greedy", 1)
    have = list(cell["engines"])
    assert have[:4] == names
    skipped = skips.get("mlx-vlm, K = 4")
    assert skipped is None or "mlx-vlm" in skipped
    # Every prompt goes to all engines before the next one, which begins with another.
    turns = [(0, name) for name in have] + [(1, name) for name in have[1:] + have[:1]]
    assert [tuple(entry) for entry in cell["order"]] == turns
    for name, figures in cell["engines"].items():
        assert [run["tokens"] > 0 for run in figures["runs"]] == [True, True], name
        assert figures["slowest"] <= figures["tokens_per_second"] <= figures["fastest"]
        assert 1 <= figures["acceptance_length"] <= 5
        assert 0 < figures["peak_memory_gb"] < 1
        assert figures["max_rss_gb"] > 0
    assert cell["engines"]["mlx-lm"]["x_mlx_lm"] == 1
    assert cell["engines"]["plain, K = 0"]["x_plain"] == 1


def check_graph(found: dict[str, Any]) -> None:
    engines = found["engines"]
    drafting, plain = engines["drafting, K = 4, fast"], engines["plain, K = 0"]
    for figures in (drafting, plain, engines["mlx-lm"]):
        assert 0 < figures["launches_per_round"] < figures["nodes_per_round"]
        assert figures["host_ms_per_round"] > 0
        tokens = figures["tokens_per_round"]
        assert figures["nodes_per_token"] * tokens == pytest.approx(
            figures["nodes_per_round"]
        )
    assert drafting["evaluations_per_round"] == plain["evaluations_per_round"] == 1
    assert plain["nodes_per_round"] < drafting["nodes_per_round"]
    as_built = engines["plain, K = 0, not compiled"]["launches_per_round"]
    assert plain["launches_per_round"] < as_built


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--openblas", "/no/library"), "--openblas needs libopenblas: got none"),
        (("speed", "--model", "/no/folder"), "/no/folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    run = run_bench(*arguments, cwd=tmp_path)
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert message in line


def test_a_plot_without_matplotlib_is_one_line(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit, match=r"--plot needs matplotlib: .*\[bench\]"):
        plot.check_matplotlib()


class FakeWorkers:
    """Engines that answer without decoding; one of them fails on its second run."""

    def __init__(self):
        self.names = ["a", "b", "c", "lame"]
        self.asked = []

    def ask(self, engine, do, **request):
        self.asked.append((do, engine, request["prompts"][0][0]))
        if engine == "lame" and do == "warm_up":
            return {"error": "no legs"}
        if engine == "c" and do == "run" and request["prompts"][0] == [1]:
            return {"error": "fell"}
        return {"tokens": 10, "seconds": 1.0}


def test_a_plot_has_three_panels(tmp_path):
    run = {"accepted": 3, "rounds": 2}
    figures = {
        "tokens_per_second": 9.0,
        "ms_per_round": 2.0,
        "drafted": 8,
        "runs": [run, run],
        "x_plain_runs": [1.5, 2.0],
    }
    cells = [{"prompt_tokens": length, "engines": {"a": figures}} for length in (8, 64)]
    plot.plot(cells, "title", str(tmp_path / "figures.png"))
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_engines_take_turns():
    workers: Any = FakeWorkers()
    found = run_cell(workers, Cell("code", 1, "greedy", 2), [[0], [1], [2]], 4)
    runs = [entry for entry in workers.asked if entry[0] == "run"]
    assert runs[:3] == [("run", "a", 0), ("run", "b", 0), ("run", "c", 0)]
    assert runs[3:] == [
        *(("run", "b", 1), ("run", "c", 1), ("run", "a", 1)),
        *(("run", "a", 2), ("run", "b", 2)),
    ]
    assert found.reasons == {"lame": "no legs", "c": "fell"}
    assert list(found.runs) == ["a", "b"]


def test_ratios_are_medians_of_each_prompts_own():
    base = {
        "steps": 5,
        "rounds": 5,
        "drafted": 20,
        "accepted": 10,
        "host_s": 0.5,
        "prefill_s": 1,
        "peak_memory_gb": 1,
        "max_rss_gb": 1,
    }

    def runs(*rates):
        return [{**base, "tokens": rate, "seconds": 1} for rate in rates]

    # The second prompt came when the machine was slow: all rates halve.
    found = report.engine_figures(
        {"fast": runs(20, 10, 30), "slow": runs(10, 5, 10)}, {"x": "slow", "y": "gone"}
    )
    assert found["fast"]["x"] == 2
    assert found["fast"]["x_runs"] == [2, 2, 3]
    assert "y" not in found["fast"]
    assert found["fast"]["tokens_per_second"] == 20
    assert found["fast"]["acceptance_length"] == 3
    assert found["fast"]["acceptance_rate"] == 0.5
    assert found["fast"]["host_ms_per_round"] == 100


def test_nodes_and_launches():
    a = mx.ones((4, 4))
    mx.eval(a)
    with counting() as count:
        b = (a + 1).reshape(2, 8).T
        mx.eval({"nested": [b]})
        assert (count.nodes, count.launches, count.evaluations) == (4, 1, 1)
        mx.eval(b)  # nothing is left of it
        assert (b.sum() * 2).item() == 64
        assert count.evaluations == 2
    views = {"Broadcast": 1, "Reshape": 1, "Transpose": 1, "Squeeze": 1}
    assert dict(count.primitives) == {"Add": 1, "Sum": 1, "Multiply": 1, **views}
    nodes = count.nodes
    mx.eval(a * 3)
    assert count.nodes == nodes


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_scripted_acceptance_is_what_was_asked_for(sampling, num_rows):
    prompts = random_prompts(512, "any", count=num_rows, length=5)
    with uncompiled():
        for acceptance in (0, 1):
            engine = OwnEngine(reference_pair(), EngineSpec(OURS, 2, acceptance))
            found = measure(engine, prompts, 16, sampling)
            assert found["accepted"] / found["drafted"] == acceptance


def test_scripted_acceptance_is_by_position():
    engine = OwnEngine(reference_pair(), EngineSpec(OURS, 4, 0.75))
    with uncompiled():
        found = measure(engine, random_prompts(512, "any", count=3, length=5), 100, {})
    length = 1 + found["accepted"] / found["rounds"]
    # Some 100 rounds of 1.6 tokens' deviation: the same every time.
    assert length == pytest.approx(1 + sum(0.75**i for i in range(1, 5)), abs=0.5)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_engines_emit_what_they_are_asked_for(num_rows):
    pair = reference_pair()
    prompts = random_prompts(512, "any", count=num_rows, length=5)
    engines: list[Any] = [MlxLm(pair.target), OwnEngine(pair, EngineSpec(OURS, 3))]
    if num_rows == 1:
        engines.append(TwoModel(pair, EngineSpec(TWO_MODEL, 3)))
    with uncompiled():
        for engine in engines:
            for sampling in ({}, SAMPLED):
                steps = list(engine.steps(prompts, 12, sampling))
                assert sum(step.num_tokens for step in steps) == 12 * num_rows
                assert all(step.accepted <= step.drafted for step in steps)


def test_reasons():
    pair, model = reference_pair(), ModelSpec()
    two = make_engine(EngineSpec(TWO_MODEL, 3), pair, model)
    with pytest.raises(UnavailableError, match="takes one prompt"):
        list(two.steps([[1], [2]], 4, {}))
    without = reference_pair(has_drafter=False)
    with pytest.raises(UnavailableError, match="must be 0 without a drafter"):
        make_engine(EngineSpec(OURS, 4), without, model)
    with pytest.raises(UnavailableError, match="accepted by coin"):
        make_engine(EngineSpec(MLX_VLM, 4, acceptance=0.5), pair, model)
    with pytest.raises(UnavailableError, match="reads files only"):
        make_engine(EngineSpec(MLX_VLM, 4), pair, ModelSpec(shapes="12b"))
    with pytest.raises(UnavailableError, match="path/that"):
        make_engine(EngineSpec(TWO_MODEL, 4, draft_path="path/that"), pair, model)


def test_names_of_engines():
    parse = configure_parser("").parse_args
    names = [spec.name for spec in engine_specs(parse([]))]
    assert names == [
        *("mlx-lm", "plain, K = 0", "drafting, K = 4", "drafting, auto"),
        *("mlx-lm two-model, K = 4", "mlx-vlm, K = 4"),
    ]
    scripted = ["--shapes", "12B", "--scripted-acceptance", "0.6", "0.85"]
    args = parse([*scripted, "--num-draft-tokens", "2", AUTO])
    assert [spec.name for spec in engine_specs(args)] == [
        *("mlx-lm", "plain, K = 0", "drafting, K = 2, p = 0.6"),
        *("drafting, auto, p = 0.6", "drafting, K = 2, p = 0.85"),
        *("drafting, auto, p = 0.85", "mlx-lm two-model, K = 2", "mlx-vlm, K = 2"),
    ]
    graphs = [spec.name for spec in graph_specs(parse(["--engines", "plain", "draft"]))]
    exact = engine_specs(parse(["--engines", "draft", "--exactness", "exact"]))
    assert [spec.name for spec in exact] == [
        *("drafting, K = 4, exact", "drafting, auto, exact"),
    ]
    assert graphs == [
        *("plain, K = 0", "drafting, K = 4"),
        *("plain, K = 0, not compiled", "drafting, K = 4, not compiled"),
    ]
    assert EngineSpec(MLX_LM).name == names[0]


def test_prompts_have_the_length_that_is_asked_for():
    tokenizer = load_tokenizer(embedded_pair_path())
    assert set(read_kinds()) == set(KINDS)
    for kind in KINDS[:-1]:
        for length in (48, 300):
            prompts = kind_prompts(tokenizer, kind, count=4, length=length)
            assert [len(prompt) for prompt in prompts] == [length] * 4
            assert len({tuple(prompt) for prompt in prompts}) == 4
    tokenizer = load_tokenizer(embedded_pair_path(), {"chat_template": None})
    assert kind_prompts(tokenizer, "chat", count=1, length=64) == (
        "the tokenizer has no chat template"
    )


def test_chat_prompts_go_through_the_template():
    tokenizer: Any = tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    for length in (100, 400):
        prompts = kind_prompts(tokenizer, "chat", count=1, length=length)
        assert not isinstance(prompts, str)
        (prompt,) = prompts
        assert abs(len(prompt) - length) < 30
        assert "<|turn>model" in tokenizer.decode(prompt)
