"""DraftLengthController over contexts that grow, end, and begin short again.

Run: python -m pytest tests/drafting/test_controller_contexts.py
     python -m pytest -m control tests/drafting/test_controller_contexts.py
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from statistics import mean

import pytest

from mlx_gemma_mtp.drafting.controller import DraftLengthController
from tests.drafting.contexts import (
    ARCHITECTURES,
    ATTENTIONS,
    LongMachine,
    costs_of,
    expected_tokens,
    prior_of,
    scaled_prior,
)

# Requests of one process: tokens of the prompt and of the text.
TALKS = [(1000, 500), (32_000, 500), (1000, 500), (16_000, 500), (2000, 500)]
TALKS += [(30_000, 500), (1000, 300)]
GROWING = [(1000, 31_000), (1000, 1000)]


def losses(cell):
    """Throughput over that of the best K in every round, less 1.

    Returns:
        Of a controller that is told the length of context, and of one that is not.
    """
    chip, family, attention, process, requests, num_seeds = cell
    costs = costs_of(chip, family, attention)
    told, untold = [], []
    for seed in range(num_seeds):
        controller = DraftLengthController(prior_of(chip, family))
        machine = LongMachine(costs, process, seed=seed)
        told.append(machine.serve(controller, requests))
        controller = DraftLengthController(scaled_prior(chip, family, requests[0][0]))
        machine = LongMachine(costs, process, is_told=False, seed=seed)
        untold.append(machine.serve(controller, requests))
    return mean(told), mean(untold)


def test_the_best_number_of_drafts_falls_with_the_length_of_context():
    """Else there would be nothing to choose here."""
    costs = costs_of("M1 Max", "e4b", "steeper")
    tokens = expected_tokens("0.85")
    best = [
        min(range(9), key=lambda k: costs.at(n)[k] / tokens[k]) for n in (1000, 32_000)
    ]
    assert best[0] >= 7
    assert best[1] <= 4


@pytest.mark.parametrize(
    ("chip", "family", "attention", "process"),
    [
        ("M1 Max", "e4b", "steeper", "0.85"),
        ("M3 Max", "31b", "as estimated", "0.6"),
        ("M5 Max", "26b-a4b", "packed", "0.85"),
    ],
)
def test_throughput_over_contexts(chip, family, attention, process):
    told, untold = losses((chip, family, attention, process, TALKS, 2))
    assert told >= -0.03
    assert told >= untold - 0.01


def test_who_is_told_the_length_of_context_is_faster():
    told, untold = losses(("M1 Max", "e4b", "steeper", "0.85", TALKS, 2))
    assert told >= untold + 0.03


def report(cells, found):
    """Losses told and untold, by scenario, in means and at worst."""
    lines = []
    for place in range(4):
        for name in dict.fromkeys(cell[place] for cell in cells):
            own = [f for c, f in zip(cells, found, strict=True) if c[place] == name]
            told, untold = zip(*own, strict=True)
            lines.append(
                f"  {name:14} told {mean(told):+.2%} (worst {min(told):+.2%})"
                f"   untold {mean(untold):+.2%} (worst {min(untold):+.2%})"
            )
    return "\n".join(lines)


FAMILY_NAMES = ("e4b", "31b", "26b-a4b")
# Scenarios, which attentions they meet, and how many texts of each there are.
EVERYWHERE = {
    "talks": (TALKS, tuple(ATTENTIONS), 2),
    "growing": (GROWING, ("as estimated", "once a row"), 1),
}


@pytest.mark.control
@pytest.mark.parametrize("name", EVERYWHERE)
def test_throughput_over_contexts_everywhere(name, capsys):
    requests, attentions, num_seeds = EVERYWHERE[name]
    places = product(ARCHITECTURES, FAMILY_NAMES, attentions, ("0.6", "0.85"))
    cells = [(*place, requests, num_seeds) for place in places]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(losses, cells, chunksize=2))
    with capsys.disabled():
        sys.stdout.write(f"\nLoss over contexts:\n{report(cells, found)}\n")
    told, untold = zip(*found, strict=True)
    assert min(told) >= -0.04
    # While one text grows, who is told nothing follows as well.
    assert mean(told) >= mean(untold) - 0.002
