"""DraftLengthController over processes that begin and end, from good and bad states.

Run: python -m pytest tests/drafting/test_controller_processes.py
     python -m pytest -m control tests/drafting/test_controller_processes.py
"""

import json
import math
import random
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import pytest

from mlx_gemma_mtp.drafting.acceptance_model import AcceptanceModel
from mlx_gemma_mtp.drafting.controller import DraftLengthController
from mlx_gemma_mtp.drafting.speed_model import Matmuls, prior
from tests.drafting.simulator import (
    CURVES,
    DEPTH,
    PLAIN_S,
    TRACINGS,
    Machine,
    next_process,
)

SIX = math.log(6)
# What is wrong with a state: logarithms by which each K's cost is off.
COSTS = {
    "right": lambda rng: [0.0] * (DEPTH + 1),
    "drafts six times too dear": lambda rng: [0.0] + [SIX] * DEPTH,
    "drafts too dear": lambda rng: [0.0] + [rng.uniform(0, SIX) for _ in range(DEPTH)],
    "drafts six times too cheap": lambda rng: [0.0] + [-SIX] * DEPTH,
    "all wrong": lambda rng: [rng.uniform(-SIX, SIX) for _ in range(DEPTH + 1)],
}
# And how many of 8 drafts 10,000 rounds accepted; None for what was true.
ACCEPTED = {"as it was": None, "none": 0}


def poisoned(costs, accepted, curve, process, tracing, seed):
    """What 1,500 tokens have taught, with something wrong, at the next start."""
    machine = Machine(curve, process, tracing=tracing, seed=f"before {seed}")
    controller = DraftLengthController()
    for _ in range(3):
        machine.run(controller, 500)
        controller = next_process(controller)
    state = json.loads(json.dumps(controller.to_dict()))
    rng = random.Random(seed)
    wrong = COSTS[costs](rng)
    state["costs"]["mean"] = [
        mean + off for mean, off in zip(state["costs"]["mean"], wrong, strict=True)
    ]
    count = ACCEPTED[accepted]
    if count is not None:
        acceptance = AcceptanceModel.from_dict(state["acceptance"])
        for _ in range(10_000):
            acceptance.observe(DEPTH, count)
        state["acceptance"] = acceptance.to_dict()
    state["credit_s"] = -PLAIN_S
    return next_process(DraftLengthController.from_dict(state))


def is_worth_it(curve, process):
    """Whether the best fixed K is 1.3 times as fast as plain decoding."""
    machine = Machine(curve, process, tracing=0)
    return machine.fixed([4000], 0) >= 1.3 * machine.best_fixed([4000])


def drafts_from(machine):
    """Tokens of the last process before it drafts nearly all the time."""
    chosen = machine.chosen
    for i in range(len(chosen) - 12):
        if sum(k > 0 for _, k in chosen[i : i + 12]) >= 10:
            return chosen[i][0]
    return math.inf


def recovery(cell):
    """Most tokens of a new process until it drafts, over seeds."""
    costs, accepted, curve, process, tracing, seeds = cell
    most = 0.0
    for seed in seeds:
        machine = Machine(curve, process, tracing=tracing, seed=f"after {seed}")
        machine.run(poisoned(costs, accepted, curve, process, tracing, seed), 1000)
        most = max(most, drafts_from(machine))
    return most


def lengths(seed):
    rng = random.Random(f"lengths {seed}")
    return [rng.randint(50, 1000) for _ in range(20)]


def excess(cell):
    """20 processes' time beyond the best fixed K's, over what is allowed: at most 1.

    Allowed are 5 % and two tracings.
    """
    curve, process, tracing, is_busy, seeds = cell
    own, fixed = 0.0, [0.0] * (DEPTH + 1)
    for seed in seeds:
        machine = Machine(curve, process, tracing=tracing, is_busy=is_busy, seed=seed)
        controller = DraftLengthController()
        for length in lengths(seed):
            own += machine.run(controller, length)
            controller = next_process(controller)
        for k in range(DEPTH + 1):
            fixed[k] += machine.fixed(lengths(seed), k)
    best = min(fixed)
    return (own - best) / (0.05 * best + 2 * tracing * len(seeds))


def slowdown(cell):
    """Time of 2,000 tokens with a useless drafter over plain decoding's, less 1."""
    costs, curve, tracing, length, seeds = cell
    worst = -math.inf
    for seed in seeds:
        controller = DraftLengthController()
        if costs is not None:
            controller = poisoned(costs, "as it was", curve, "0", tracing, seed)
        machine = Machine(curve, "0", tracing=tracing, seed=f"useless {seed}")
        parts = [length] * (2000 // length)
        own = 0.0
        for part in parts:
            own += machine.run(controller, part)
            controller = next_process(controller)
        worst = max(worst, own / machine.fixed(parts, 0) - 1)
    return worst


def over(function, cells):
    """What a function gives for all cells, on two processors."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return dict(zip(cells, pool.map(function, cells, chunksize=2), strict=True))


# --- drafting comes back ----------------------------------------------------------


@pytest.mark.parametrize("tracing", TRACINGS)
@pytest.mark.parametrize("costs", ["right", "drafts six times too dear", "all wrong"])
@pytest.mark.parametrize("accepted", ACCEPTED)
def test_drafting_comes_back_from_any_state(costs, accepted, tracing):
    cell = (costs, accepted, "m3", "0.85", tracing, range(1))
    assert recovery(cell) <= 400


@pytest.mark.control
def test_drafting_comes_back_everywhere():
    cells = [
        (costs, accepted, curve, process, tracing, range(3))
        for costs, accepted, tracing in product(COSTS, ACCEPTED, TRACINGS)
        for curve, process in product(CURVES, ("0.6", "0.75", "0.85", "0.95"))
        if is_worth_it(curve, process)
    ]
    found = over(recovery, cells)
    late = {cell: tokens for cell, tokens in found.items() if tokens > 400}
    # Where drafts were all rejected before, and pay little more than 1.3 times.
    assert len(late) <= len(cells) / 50, late


@pytest.mark.parametrize("tracing", [0, 1])
@pytest.mark.parametrize("accepted", ACCEPTED)
def test_drafting_comes_back_where_tracing_costs_little(accepted, tracing):
    machine = Machine("m3", "0.85", tracing=tracing, seed="cheap")
    machine.setup_s = tracing * PLAIN_S
    dear = "drafts six times too dear"
    machine.run(poisoned(dear, accepted, "m3", "0.85", 3, 0), 1000)
    assert drafts_from(machine) <= 400


@pytest.mark.parametrize("tracing", TRACINGS)
def test_drafting_comes_back_without_drafts_beside(tracing):
    machine = Machine("m3", "0.85", tracing=tracing, can_shadow=False, seed="host")
    dear = "drafts six times too dear"
    machine.run(poisoned(dear, "as it was", "m3", "0.85", tracing, 0), 1000)
    assert drafts_from(machine) <= 400


@pytest.mark.parametrize("factor", [2, 3, 6])
@pytest.mark.parametrize("num_rounds", [10, 200])
def test_drafting_comes_back_after_load_in_the_same_process(factor, num_rounds):
    machine = Machine("m3", "0.85", tracing=0, seed="load")
    controller, rng = DraftLengthController(), random.Random(0)
    controller.start()
    for _ in range(20):
        controller.observe(0, [0], PLAIN_S)
    for _ in range(num_rounds):
        k = rng.randint(1, DEPTH)
        controller.observe(k, [k // 2], PLAIN_S * machine.costs[k] * factor)
    for _ in range(20):
        controller.observe(0, [0], PLAIN_S)
    machine.run(controller, 1500)
    assert drafts_from(machine) <= 700


# --- short processes ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "process", "tracing"),
    [("31b-m3-ultra", "0.85", 10), ("m3", "0.6", 30), ("steep", "0.3", 30)],
)
def test_short_processes(curve, process, tracing):
    assert excess((curve, process, tracing, False, range(1))) <= 1


@pytest.mark.control
def test_short_processes_everywhere():
    cells = [
        (curve, process, tracing, is_busy, range(4))
        for curve, tracing, is_busy in product(CURVES, TRACINGS, (False, True))
        for process in ("0", "0.3", "0.6", "0.85", "bimodal")
    ]
    found = over(excess, cells)
    # Where tracing takes 30 rounds, a second one shows; with load that comes and goes
    # costs are learnt wrong now and then, and are traced again to put that right.
    most = {3: 1.0, 10: 1.1, 30: 1.3}
    bounds = {
        cell: 2.5 if cell[3] and cell[2] == 30 else most[cell[2]] for cell in cells
    }
    assert {c: share for c, share in found.items() if share > bounds[c]} == {}


# --- a useless drafter -------------------------------------------------------------


@pytest.mark.parametrize("length", [100, 500, 2000])
@pytest.mark.parametrize("costs", [None, "right", "drafts too dear"])
def test_a_useless_drafter_costs_little(costs, length):
    assert slowdown((costs, "m3", 30, length, range(1))) <= 0.02


@pytest.mark.control
def test_a_useless_drafter_costs_little_everywhere():
    costs = (None, "right", "drafts six times too dear", "drafts too dear")
    cells = [
        (cost, curve, tracing, length, range(3))
        for cost, curve in product(costs, CURVES)
        for tracing, length in product(TRACINGS, (100, 500, 2000))
    ]
    found = over(slowdown, cells)
    assert {cell: share for cell, share in found.items() if share > 0.02} == {}


def after_new_matmuls(start, seed):
    """Time of 500 tokens on an M1 Max, once the kernel multiplies in place of MLX.

    Args:
        start: Given what was learnt with MLX and what is expected of the kernel, the
            controller of the next process.
        seed: Of text and noise.
    """
    priors = [
        prior("applegpu_g13s", "31b", matmuls=Matmuls(has_kernel))
        for has_kernel in (False, True)
    ]
    machine = Machine("m1", "0.6", tracing=10, seed=seed)
    controller = DraftLengthController(priors[0])
    for _ in range(2):
        machine.costs = priors[0].relative_cost
        machine.run(controller, 500)
        controller = next_process(controller, priors[0])
    machine.costs = priors[1].relative_cost
    return machine.run(start(controller, priors[1]), 500)


def test_costs_of_other_matmuls_are_no_start():
    """Why what is learnt is kept apart for each choice of matmuls."""
    starts = {
        "apart": lambda _, new: DraftLengthController(new),
        "resumed": next_process,
        "untold": lambda learnt, _: learnt,
    }
    took = {
        name: sum(after_new_matmuls(start, seed) for seed in range(3))
        for name, start in starts.items()
    }
    assert 1.05 * took["apart"] < took["resumed"]
    assert 1.2 * took["apart"] < took["untold"], took
