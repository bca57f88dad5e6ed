"""The picture of measured speed shows what was recorded.

Run: python -m pytest tests/scripts/test_speed_picture.py
"""

import re
import xml.etree.ElementTree as ElementTree

from scripts.speed_picture import (
    SAMPLINGS,
    SHOWN,
    THEMES,
    picture,
    summary,
)

TEXT = "{http://www.w3.org/2000/svg}text"


def texts(svg):
    return [node.text for node in ElementTree.fromstring(svg).iter(TEXT)]


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
