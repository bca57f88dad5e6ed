"""The picture of measured speed shows what was recorded.

Run: python -m pytest tests/scripts/test_speed_picture.py
"""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from scripts.speed_picture import (
    DOCS,
    RECORD,
    SAMPLINGS,
    SHOWN,
    THEMES,
    TIMES,
    picture,
    summary,
)

TEXT = "{http://www.w3.org/2000/svg}text"


def texts(svg):
    return [node.text for node in ElementTree.fromstring(svg).iter(TEXT)]


@pytest.mark.parametrize("name", THEMES)
def test_the_picture_is_that_of_the_record(name):
    """Where it fails: python -m scripts.speed_picture."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    drawn = (DOCS / name).read_text(encoding="utf-8")
    assert drawn == picture(record, THEMES[name])
    assert len(drawn) < 8000
    shown = texts(drawn)
    for engines in record["speeds"].values():
        assert list(engines) == list(SHOWN)
        for engine, speed in engines.items():
            figures = f"{speed['tokens_per_second']:.0f}"
            if engine != "mlx-lm":
                figures += f"   {speed['x_mlx_lm']:.1f} {TIMES} mlx-lm"
            assert figures in shown
    words = " ".join(shown)
    for part in ("cores", "mlx ", "mlx-lm ", "mlx-vlm ", "mlx_gemma_mtp ", "Python "):
        assert re.search(rf"{part}\b|\d {part}", words), part
    assert re.search(r"MLX's .PU backend", words)
    assert "/" not in words  # no path of a machine


def cell(sampling, kind, rates, ratios):
    """A cell as the benchmark writes it: rates by engine, a list for its prompts."""
    return {
        "sampling": sampling,
        "kind": kind,
        "engines": {
            name: {
                "runs": [{"tokens": rate, "seconds": 1} for rate in rates[name]],
                "x_mlx_lm_runs": ratios[name],
            }
            for name in rates
        },
    }


def figures(cells):
    return {"machine": "m", "engines": {"model": "the pair", "cells": cells}}


def test_medians_are_of_all_prompts():
    rates = {"mlx-lm": [10, 20], "drafting, auto": [30, 40], "drafting, K = 4": [1, 1]}
    ratios = {"mlx-lm": [1, 1], "drafting, auto": [3, 2], "drafting, K = 4": [0, 0]}
    others = {name: [rate[0]] for name, rate in rates.items()}
    found = summary(
        figures(
            [
                cell("greedy", "code", rates, ratios),
                cell("greedy", "prose", others, {**ratios, "drafting, auto": [2.5]}),
                cell("sampled", "code", rates, ratios),
            ]
        )
    )
    assert (found["kinds"], found["prompts"]) == (["code", "prose"], 3)
    assert found["speeds"]["greedy"] == {
        "mlx-lm": {"tokens_per_second": 10, "x_mlx_lm": 1},
        "drafting, auto": {"tokens_per_second": 30, "x_mlx_lm": 2.5},
    }
    assert found["speeds"]["sampled"]["drafting, auto"]["tokens_per_second"] == 35


def test_an_engine_that_did_not_run_everywhere_is_left_out():
    both = {"mlx-lm": [10], "mlx-vlm, K = 4": [5]}
    ones = {"mlx-lm": [1], "mlx-vlm, K = 4": [0.5]}
    cells = [
        cell("greedy", "code", both, ones),
        cell("greedy", "json", {"mlx-lm": [10]}, {"mlx-lm": [1]}),
        cell("sampled", "code", both, ones),
    ]
    found = summary(figures(cells))
    assert [list(found["speeds"][name]) for name in SAMPLINGS] == [
        ["mlx-lm"],
        ["mlx-lm", "mlx-vlm, K = 4"],
    ]
    shown = texts(picture(found, THEMES["speed.svg"]))
    assert shown.count(SHOWN["mlx-vlm, K = 4"]) == 1


def test_bars_are_as_long_as_rates():
    rates = {"mlx-lm": [25], "drafting, auto": [100]}
    ratios = {"mlx-lm": [1], "drafting, auto": [4]}
    cells = [cell(name, "code", rates, ratios) for name in SAMPLINGS]
    drawn = picture(summary(figures(cells)), THEMES["speed-dark.svg"])
    assert [int(w) for w in re.findall(r'<rect.*? width="(\d+)"', drawn)] == [
        100,
        400,
    ] * 2
