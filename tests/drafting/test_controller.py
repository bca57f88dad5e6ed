"""DraftLengthController on simulated machines and texts, and its models alone.

Run: python -m pytest tests/drafting/test_controller.py
     python -m pytest -m control tests/drafting/test_controller.py  # every curve
"""

import json
import math
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.drafting.acceptance_model import AcceptanceModel
from mlx_gemma_mtp.drafting.controller import DraftLengthController
from mlx_gemma_mtp.drafting.cost_model import CostModel
from mlx_gemma_mtp.drafting.prior import DEFAULT_PRIOR, Prior
from tests.drafting.simulator import (
    CURVES,
    PLAIN_S,
    PROCESSES,
    gains,
    next_process,
    saved_and_loaded,
    time_of,
)

FLAT_PRIOR = Prior(tuple(CURVES["flat"]), 0.9)
STEEP_PRIOR = Prior(tuple(CURVES["steep"]), 0.1)


def trained(curve, process, *, tokens=600, seed=7, allowed=range(9), prior=None):
    """A controller that has seen a machine and a text."""
    controller = DraftLengthController(prior or DEFAULT_PRIOR)
    controller.start()
    rng, seen = random.Random(seed), 0
    while seen < tokens:
        k = controller.choose(allowed=allowed)
        run = 0
        while run < k and rng.random() < PROCESSES[process](rng, 1)[0][run]:
            run += 1
        seconds = PLAIN_S * CURVES[curve][k] * math.exp(rng.gauss(0, 0.03))
        controller.observe(k, [run], seconds)
        seen += 1 + run
    return controller


# --- throughput -------------------------------------------------------------------

# Corners and some cells that are hard to meet, each with as many texts as a second
# or two allow. All others, both cold and warm: -m control.
CORNERS = [
    ("cold", "flat", "0", 8),
    ("warm", "flat", "1", 15),
    ("warm", "steep", "0", 8),
    ("warm", "cpu", "0.75", 15),
    ("cold", "m1", "bimodal", 10),
    ("cold", "31b-m3-ultra", "0.85", 20),
]


@pytest.mark.parametrize(("state", "curve", "process", "num_seeds"), CORNERS)
def test_throughput(state, curve, process, num_seeds):
    over_fixed, over_plain = gains(curve, process, num_seeds, warm=state == "warm")
    assert over_fixed >= -0.03
    assert over_plain >= -0.02


@pytest.mark.parametrize(
    ("prior", "curve", "process"),
    [(FLAT_PRIOR, "steep", "0.5"), (STEEP_PRIOR, "flat", "0.95")],
)
def test_throughput_in_spite_of_a_wrong_prior(prior, curve, process):
    over_fixed, over_plain = gains(curve, process, 10, warm=False, prior=prior)
    assert over_fixed >= -0.03
    assert over_plain >= -0.02


def gains_of(cell):
    curve, process, warm, prior, num_seeds = cell
    return gains(curve, process, num_seeds, warm=warm, prior=prior)


def grid():
    for curve in CURVES:
        for process in PROCESSES:
            yield "cold", (curve, process, False, DEFAULT_PRIOR, 100)
            yield "warm", (curve, process, True, DEFAULT_PRIOR, 100)
            yield "flat prior", (curve, process, False, FLAT_PRIOR, 20)
            yield "steep prior", (curve, process, False, STEEP_PRIOR, 20)


def table(rows, column, count=12):
    """The worst rows by a column, as text."""
    lines = [
        f"  {row[0]:12} {row[1]:13} {row[2]:9} {row[3]:+8.2%} {row[4]:+8.2%}"
        for row in sorted(rows, key=lambda row: row[column])[:count]
    ]
    return "\n".join(lines)


@pytest.mark.control
def test_throughput_everywhere(capsys):
    names, cells = zip(*grid(), strict=True)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(gains_of, cells, chunksize=4))
    rows = [
        (name, *cell[:2], *gain)
        for name, cell, gain in zip(names, cells, found, strict=True)
    ]
    with capsys.disabled():
        for column, title in (3, "the best fixed K"), (4, "plain decoding"):
            for name in dict.fromkeys(names):
                worst = table([row for row in rows if row[0] == name], column)
                sys.stdout.write(f"\nWorst throughput over {title}:\n{worst}\n")
    # A prior that is wrong by far may cost one percent more.
    least = {"cold": -0.03, "warm": -0.03, "flat prior": -0.04, "steep prior": -0.04}
    missed = [row for row in rows if row[3] < least[row[0]] or row[4] < -0.02]
    assert not missed, "\n" + table(missed, 3, len(missed))


@pytest.mark.parametrize("lag", [0, 2])
def test_observations_may_come_later_or_at_once(lag):
    times = [
        time_of(DraftLengthController(), "m3", "0.85", 2000, seed, lag=lag)
        for seed in range(5)
    ]
    assert 2000 / (sum(times) / 5) >= 1.9  # the best K: 2.03, plain decoding: 1


def test_the_same_rounds_lead_to_the_same_choices():
    histories: tuple[list[int], list[int]] = [], []
    for chosen in histories:
        time_of(DraftLengthController(), "m3", "bimodal", 500, 1, chosen=chosen)
    assert histories[0] == histories[1]


# --- what may be chosen -----------------------------------------------------------


@pytest.mark.parametrize("allowed", [[], [9], [-1, 0], range(10)])
def test_allowed_must_be_some_of_the_range(allowed):
    with pytest.raises(ValueError, match=r"allowed must be some of 0\.\.8"):
        DraftLengthController().choose(allowed=allowed)
    with pytest.raises(ValueError, match=r"allowed must be some of 0\.\.8"):
        DraftLengthController().best_rate(allowed)


def test_plain_only():
    controller = trained("flat", "0.95", allowed={0})
    assert controller.choose(allowed={0}) == 0
    assert controller.best_rate({0}) == pytest.approx(1 / PLAIN_S, rel=0.05)


def test_without_plain_the_best_of_the_others():
    controller = trained("steep", "0.1", allowed={1, 2, 4})
    choices = [controller.choose(allowed={1, 2, 4}) for _ in range(20)]
    assert choices.count(1) >= 18
    controller = trained("flat", "0.95", allowed={1, 2, 4})
    assert controller.choose(allowed={1, 2, 4}) == 4


@pytest.mark.parametrize(("left", "most"), [(1, 0), (2, 1), (3, 2), (6, 5)])
def test_no_more_drafts_than_tokens_left(left, most):
    assert trained("m3", "0.95").choose(tokens_left=left) <= most


def test_nothing_new_is_traced_for_the_last_tokens():
    ready = {0, 1, 2}
    setup_s = dict.fromkeys(range(3, 9), 0.3)  # ten plain rounds
    controller = trained("flat", "0.95", allowed=ready)
    assert controller.choose(setup_s=setup_s, tokens_left=10) in ready
    for left in 400, None:
        choices = {controller.choose(setup_s=setup_s, tokens_left=left) for _ in "ab"}
        assert max(choices) > 2  # the other may be a probe


def test_nothing_is_traced_that_will_not_pay():
    ready = {0, 1}
    controller = trained("steep", "0.5", allowed=ready)
    setup_s = dict.fromkeys(range(2, 9), 0.3)
    assert all(controller.choose(setup_s=setup_s) in ready for _ in range(50))


@pytest.mark.parametrize("curve", ["m1", "m3", "12b-m5-max", "steep"])
def test_few_lengths_are_traced(curve):
    controller, traced = DraftLengthController(), set()
    rng = random.Random(3)
    for _ in range(600):
        setup_s = {k: 0.3 for k in range(9) if k not in traced}
        k = controller.choose(setup_s=setup_s)
        run = 0
        while run < k and rng.random() < 0.8:
            run += 1
        seconds = PLAIN_S * CURVES[curve][k] * math.exp(rng.gauss(0, 0.03))
        controller.observe(k, [run], seconds if k in traced else None)
        traced.add(k)
    assert 0 in traced
    assert len(traced) <= 4


def test_plain_is_not_waited_for_when_it_cannot_be_measured():
    controller = DraftLengthController()
    chosen = []
    for _ in range(10):
        chosen.append(controller.choose())
        controller.observe(chosen[-1], [chosen[-1]], None)
    assert chosen[0] == 0
    assert chosen[-1] > 0
    assert controller.best_rate() is None


operations = st.lists(
    st.tuples(
        st.sets(st.integers(0, 8), min_size=1),  # allowed
        st.dictionaries(st.integers(0, 8), st.floats(0, 2)),  # setup_s
        st.none() | st.integers(1, 3000),  # tokens_left
        st.lists(st.floats(0, 1), max_size=3),  # accepted share of each row
        st.none() | st.floats(1e-6, 1e3),  # seconds
        st.booleans(),  # a new request
        st.integers(0, 200_000),  # tokens of context
    ),
    max_size=40,
)


@given(operations)
def test_any_history_leads_to_allowed_choices_and_survives_json(history):
    controller = DraftLengthController()
    for allowed, setup_s, tokens_left, shares, seconds, is_new, context in history:
        if is_new:
            controller.start()
        k = controller.choose(
            allowed=allowed, setup_s=setup_s, tokens_left=tokens_left, context=context
        )
        assert k in allowed
        accepted = [int(share * k) for share in shares]
        controller.observe(k, accepted, seconds, context=context)
    assert saved_and_loaded(controller).to_dict() == controller.to_dict()


# --- what is learnt ---------------------------------------------------------------


def test_best_rate():
    assert DraftLengthController().best_rate() is None
    controller = trained("m3", "0.85", tokens=2000)
    assert controller.best_rate() == pytest.approx(2.03 / PLAIN_S, rel=0.1)
    assert controller.best_rate({0}) == pytest.approx(1 / PLAIN_S, rel=0.05)


@pytest.mark.parametrize("seconds", [math.nan, math.inf])
def test_a_time_that_is_none_leaves_the_credit(seconds):
    controller = DraftLengthController()
    controller.observe(0, [0], PLAIN_S)
    credit_s = controller.credit.seconds
    controller.observe(0, [0], seconds)
    assert controller.credit.seconds == credit_s


def test_rows_of_a_batch_all_count():
    one, four = AcceptanceModel(0.5), DraftLengthController(Prior(TWICE, 0.5))
    for num_accepted in (3, 0, 1, 2):
        one.observe(3, num_accepted)
    four.observe(3, [3, 0, 1, 2], None)
    assert four.acceptance.expected_tokens() == one.expected_tokens()


TWICE = (1.0, *[2.0] * 8)


def test_drafting_comes_back_although_its_first_rounds_were_all_stalled():
    controller, num_stalls, chosen = DraftLengthController(), 3, []
    for _ in range(3000):
        k = controller.choose()
        seconds = PLAIN_S * CURVES["flat"][k]
        if k and num_stalls:
            seconds *= 15
            num_stalls -= 1
        controller.observe(k, [k], seconds)
        chosen.append(k)
    assert chosen[-1] == 8


# --- saved state ------------------------------------------------------------------


def leaves(data, path=()):
    """Paths of all values in nested dicts and lists, inner ones included."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from leaves(value, (*path, key))


def test_a_new_process_is_hardly_slower_than_the_one_that_has_learnt():
    controller = trained("m3", "0.85", tokens=3000)
    times: tuple[list[float], list[float]] = [], []
    for seed in range(6):
        same, new = saved_and_loaded(controller), next_process(controller)
        for each, found in zip((same, new), times, strict=True):
            each.start()
            found.append(time_of(each, "m3", "0.85", 500, seed))
    assert sum(times[1]) < 1.03 * sum(times[0])


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
    )
)
def test_nonsense_is_refused(data):
    for kind in DraftLengthController, AcceptanceModel, CostModel:
        with pytest.raises(ValueError, match="must be"):
            kind.from_dict(data)


@given(st.data())
def test_damaged_state_is_refused(data):
    state = trained("m3", "0.85", tokens=50).to_dict()
    *path, last = data.draw(st.sampled_from(list(leaves(state))))
    inner = state
    for key in path:
        inner = inner[key]
    nonsense = ["x", [], {}, True, math.nan, math.inf, -1e300, 10**400]
    inner[last] = data.draw(st.sampled_from(nonsense))
    with pytest.raises(ValueError, match="must be"):
        DraftLengthController.from_dict(state)


def test_another_version_is_refused():
    state = json.loads(json.dumps(DraftLengthController().to_dict()))
    with pytest.raises(ValueError, match="version must be within"):
        DraftLengthController.from_dict({**state, "version": 2})
