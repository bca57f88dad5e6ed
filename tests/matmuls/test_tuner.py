"""The tuner on simulated machines: what it chooses, and what it never chooses.

Run: python -m pytest tests/matmuls/test_tuner.py
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import mlx.core as mx
import pytest

from mlx_gemma_mtp.kernels.matmul import DENSE, MAX_ROWS, Form, default_columns
from mlx_gemma_mtp.matmuls import tuner
from mlx_gemma_mtp.matmuls.choices import Choice, Choices, Shape
from mlx_gemma_mtp.matmuls.judgement import (
    ROW_SHARES,
    Duel,
    Timing,
    candidate_columns,
    choose_first_row,
    filled_in,
)
from mlx_gemma_mtp.matmuls.tuner import PASS_ROWS, WINDOW_S, Tuned, expected_s, tune

FOUR_BIT = Form(4, 64, mx.bfloat16)
EIGHT_BIT = Form(8, 64, mx.bfloat16)
DENSE_FORM = Form(DENSE, 0, mx.bfloat16)
SMALL = Shape(512, 1536, FOUR_BIT)
LARGE = Shape(12288, 1536, FOUR_BIT)
WIDE = Shape(1536, 6144, EIGHT_BIT)
PLAIN = Shape(256, 1536, DENSE_FORM)
SHAPES = {SMALL: 40, LARGE: 60, WIDE: 30, PLAIN: 10}
ALL_ROWS = range(1, MAX_ROWS + 1)


@dataclass
class Truth:
    """What one shape takes, in truth, and what goes wrong with it.

    Attributes:
        stock_s: MLX's product of one row, seconds.
        stock_growth: What each further row adds to MLX's, over one row.
        speed: MLX's time over the kernel's, at one row.
        growth: What each further row adds to the kernel's, over its one row.
        other: The time of another R than the default, over the default's.
        in_context: The kernel's time in a pass, over what it takes alone.
        wrong: The (M, R) with wrong numbers.
        raises: The (M, R) that raise when they run.
        raises_timed: Whether it raises only after some windows.
        raises_in_context: Whether a pass with it raises.
    """

    stock_s: float
    stock_growth: float = 0.5
    speed: float = 1.0
    growth: float = 0.1
    other: float = 1.1
    in_context: float = 1.0
    wrong: frozenset[tuple[int, int]] = frozenset()
    raises: frozenset[tuple[int, int]] = frozenset()
    raises_timed: bool = False
    raises_in_context: bool = False

    def stock(self, num_rows: int) -> float:
        return self.stock_s * (1 + self.stock_growth * (num_rows - 1))

    def kernel(self, num_rows: int, columns: int) -> float:
        own = self.stock_s / self.speed * (1 + self.growth * (num_rows - 1))
        return own * (1 if columns == default_columns(num_rows) else self.other)


@dataclass
class Simulated:
    """A machine whose time is computed.

    Attributes:
        truths: Of every shape.
        noise: Deviation of a window, as a share.
        spikes: The chance that a window takes half as long again.
        slower_by: How much longer everything takes in the end, as a share: the clock
            falls while it runs.
        steps: Whether it falls at once, somewhere.
        disturbed_from: From when on others disturb it, seconds.
        fixed_s: What a pass takes beside its matrices, seconds.
        counts: How many matrices of each shape a pass has.
    """

    truths: dict[Shape, Truth]
    seed: int = 0
    noise: float = 0.003
    spikes: float = 0.0
    slower_by: float = 0.0
    steps: bool = False
    disturbed_from: float = float("inf")
    fixed_s: float = 2e-3
    counts: dict[Shape, int] = field(default_factory=lambda: SHAPES)
    now: float = 0.0
    traced: set[object] = field(default_factory=set)
    ran: list[tuple[Shape, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.falls_at = self.random.uniform(0, 200)

    def clock(self) -> float:
        return self.now

    def disturbed(self) -> str:
        self.now += 0.2
        return "others work" if self.now >= self.disturbed_from else ""

    def is_right(self, shape: Shape, num_rows: int, columns: int) -> bool:
        self.now += 0.05
        self._run(shape, num_rows, columns)
        return (num_rows, columns) not in self.truths[shape].wrong

    def product_s(
        self, shape: Shape, num_rows: int, columns: int | None, window_s: float
    ) -> float:
        truth = self.truths[shape]
        if columns is None:
            return self._window(truth.stock(num_rows), window_s)
        self._run(shape, num_rows, columns)
        if truth.raises_timed and self.random.random() < 0.1:
            raise RuntimeError("timed out")
        return self._window(truth.kernel(num_rows, columns), window_s)

    def pass_s(self, choices: Choices, num_rows: int, window_s: float) -> float:
        kind = choices.digest, num_rows
        if kind not in self.traced:
            self.traced.add(kind)
            self.now += 0.5
        for shape, choice in choices.by_shape.items():
            if choice.takes(num_rows) and self.truths[shape].raises_in_context:
                self.now += 0.01
                raise RuntimeError("no more\nmemory")
        return self._window(self.pass_truth(choices, num_rows), window_s)

    def pass_truth(self, choices: Choices, num_rows: int) -> float:
        """What a pass takes in truth."""
        total = self.fixed_s
        for shape, truth in self.truths.items():
            choice = choices.by_shape.get(shape)
            if choice is None or not choice.takes(num_rows):
                total += self.counts[shape] * truth.stock(num_rows)
            else:
                own_s = truth.kernel(num_rows, choice.columns[num_rows - 1])
                total += self.counts[shape] * own_s * truth.in_context
        return total

    def _run(self, shape: Shape, num_rows: int, columns: int) -> None:
        self.ran.append((shape, num_rows, columns))
        if (num_rows, columns) in self.truths[shape].raises:
            raise RuntimeError("threadgroup\nis too large")

    def _window(self, seconds: float, window_s: float) -> float:
        if self.steps:
            slower = self.slower_by * (self.now > self.falls_at)
        else:
            slower = self.slower_by * min(self.now / 200, 1)
        seconds *= (1 + slower) * max(0.5, self.random.gauss(1, self.noise))
        if self.random.random() < self.spikes:
            seconds *= 1.5
        count = max(1, -int(-window_s // seconds))
        self.now += count * seconds
        return seconds


def tuned(machine: Simulated, budget_s: float = 600.0) -> Tuned:
    return tune(SHAPES, machine, budget_s=budget_s, progress=lambda line: None)


def all_of(**truth) -> dict[Shape, Truth]:
    """The same truth for all shapes, but for how large they are."""
    return {s: Truth(s.num_bytes / 200e9, **truth) for s in SHAPES}


def any_machine(seed: int) -> Simulated:
    """Some machine: kernels are fast, slow, wrong or raise, and its clock is any."""
    draw = random.Random(seed)
    pipelines = [(m, r) for m in ROW_SHARES for r in candidate_columns(m)]

    def some(chance: float) -> frozenset[tuple[int, int]]:
        if draw.random() > chance:
            return frozenset()
        return frozenset(draw.sample(pipelines, draw.choice((1, 2, len(pipelines)))))

    truths = {
        shape: Truth(
            shape.num_bytes / 200e9,
            stock_growth=draw.choice((0.02, 0.1, 0.2, 0.5, 0.9)),
            speed=draw.choice((0.7, 0.9, 0.96, 1.0, 1.05, 1.3)),
            growth=draw.choice((0.03, 0.1, 0.2, 0.4)),
            other=draw.uniform(0.8, 1.3),
            in_context=draw.choice((1.0, 1.0, 1.05, 1.2, 2.0)),
            wrong=some(0.1),
            raises=some(0.15),
            raises_timed=draw.random() < 0.05,
            raises_in_context=draw.random() < 0.1,
        )
        for shape in SHAPES
    }
    return Simulated(
        truths,
        seed,
        noise=draw.choice((0.001, 0.003, 0.01, 0.03)),
        spikes=draw.choice((0, 0, 0.01, 0.1)),
        slower_by=draw.choice((0, 0, 0.1, 0.5, 2.0)),
        steps=draw.random() < 0.5,
        disturbed_from=draw.choice((*[float("inf")] * 9, draw.uniform(0, 200))),
        fixed_s=draw.choice((1e-4, 2e-3, 2e-2)),
    )


def mix(machine: Simulated, choices: Choices) -> float:
    """What the rounds to expect take in truth."""
    return sum(ROW_SHARES[m] * machine.pass_truth(choices, m) for m in ROW_SHARES)


def fast(**truth) -> dict[Shape, Truth]:
    """Kernels that are much faster from two rows on."""
    return all_of(**{"stock_growth": 0.5, "growth": 0.05, **truth})


# ------------------------------------------------------------------ on all machines


def test_it_never_keeps_a_wrong_or_slower_kernel_and_keeps_its_time():
    num_kept = 0
    for seed in range(1000):
        machine = any_machine(seed)
        budget_s = random.Random(seed).choice((10, 60, 300, 900))
        found = tuned(machine, budget_s)
        # One window, or one check, may be under way when time is over.
        assert machine.now <= budget_s + 2, seed
        num_kept += bool(found.choices)
        for num_rows in ROW_SHARES:
            stock_s = machine.pass_truth(Choices(), num_rows)
            own_s = machine.pass_truth(found.choices, num_rows)
            assert own_s <= 1.03 * stock_s, (seed, num_rows)
        assert mix(machine, found.choices) <= mix(machine, Choices()), seed
        for shape, choice in found.choices.by_shape.items():
            truth = machine.truths[shape]
            for num_rows in filter(choice.takes, ROW_SHARES):
                pipeline = num_rows, choice.columns[num_rows - 1]
                assert pipeline not in truth.wrong | truth.raises, seed
                own_s, stock_s = truth.kernel(*pipeline), truth.stock(num_rows)
                assert own_s <= 1.03 * stock_s, (seed, shape, num_rows)
        for shape in found.bad:
            assert found.decided.get(shape) is None
    assert num_kept > 100


def test_no_pipeline_is_in_a_pass_that_has_not_run_alone():
    for seed in range(100):
        machine = any_machine(seed)
        for shape, choice in tuned(machine).choices.by_shape.items():
            for num_rows in filter(choice.takes, PASS_ROWS):
                assert (shape, num_rows, choice.columns[num_rows - 1]) in machine.ran


@pytest.mark.parametrize("seed", range(20))
def test_it_takes_what_is_truly_faster_on_quiet_machines(seed):
    draw = random.Random(seed)
    machine = Simulated(fast(), seed, slower_by=draw.choice((0, 0.05)))
    for shape in SHAPES:
        machine.truths[shape] = replace(
            machine.truths[shape],
            speed=draw.uniform(0.95, 1.05),
            stock_growth=draw.uniform(0.2, 0.9),
            in_context=draw.uniform(0.98, 1.02),
        )
    found = tuned(machine)
    assert set(found.choices.by_shape) == set(SHAPES)
    assert not found.reasons
    for num_rows in PASS_ROWS:
        own_s = machine.pass_truth(found.choices, num_rows)
        assert found.passes[num_rows] == pytest.approx(own_s, rel=0.07)
        assert found.stock_passes[num_rows] >= 0.97 * found.passes[num_rows]
    stock_s = LARGE.num_bytes / 200e9 * (1 + 4 * machine.truths[LARGE].stock_growth)
    own_s = machine.truths[LARGE].kernel(5, 4)
    assert found.gains[LARGE][5] == pytest.approx(stock_s / own_s, rel=0.03)


def test_it_takes_about_as_long_as_it_says():
    machine = Simulated(fast())
    tuned(machine)
    assert 0.5 * expected_s(len(SHAPES)) < machine.now < 1.2 * expected_s(len(SHAPES))


# ------------------------------------------------------------------- the first row


@pytest.mark.parametrize(
    ("speed", "in_context", "first_row"),
    [(1.1, 1.0, 1), (1.0, 1.0, 1), (0.9, 1.0, 2), (1.05, 1.1, 2)],
)
def test_plain_rounds_get_the_kernel_where_they_lose_nothing(
    speed, in_context, first_row
):
    machine = Simulated(fast(speed=speed, in_context=in_context), noise=0.001)
    found = tuned(machine)
    assert [c.first_row for c in found.choices.by_shape.values()] == [first_row] * 4
    if first_row == 2:
        assert found.passes[1] == found.stock_passes[1]


def first_row(one_own: float, two_own: float, spread: float = 0.0) -> int:
    """What is chosen where MLX's one row takes 1."""
    stock = Timing(1.0, spread)
    return choose_first_row(
        {
            1: Duel(stock, Timing(one_own, spread)),
            2: Duel(stock, Timing(two_own, spread)),
        }
    )


def test_a_loss_of_one_row_is_weighed_against_what_filling_costs():
    assert first_row(0.99, 0.5) == 2  # two rows cost still less: no case in practice
    assert first_row(1.02, 1.05) == 1  # loses 2 %, filled rounds save 3 %
    assert first_row(1.02, 1.03) == 2
    assert first_row(1.04, 1.5) == 2  # above the margin, whatever it saves
    assert first_row(1.02, 1.5, spread=0.02) == 2  # it may be above the margin


def test_columns_between_measured_rows():
    defaults = tuple(map(default_columns, ALL_ROWS))
    assert filled_in({m: default_columns(m) for m in ROW_SHARES}) == defaults
    assert filled_in({1: 4, 2: 4, 3: 2, 5: 2, 9: 2}) == (4, 4, *[2] * 7)
    assert filled_in({1: 4, 2: 2, 3: 4, 5: 2, 9: 3}) == (4, 2, 4, 4, 2, 3, 3, 3, 3)
    for columns in ({1: 2, 2: 4, 3: 2, 5: 4, 9: 3}, {1: 4, 2: 4, 3: 4, 5: 4, 9: 3}):
        Choice(columns=filled_in(columns))  # all of them are kernels


# ----------------------------------------------------------- what is not right, or slow


def test_a_wrong_kernel_is_bad_and_never_timed():
    truths = fast()
    truths[LARGE] = replace(truths[LARGE], wrong=frozenset({(3, 2)}))
    machine = Simulated(truths)
    found = tuned(machine)
    assert found.decided[LARGE] is None
    assert found.bad == {LARGE: "wrong numbers for 3 rows"}
    assert LARGE not in found.gains
    assert set(found.choices.by_shape) == set(SHAPES) - {LARGE}


def test_a_candidate_that_raises_leaves_the_other():
    truths = fast()
    truths[LARGE] = replace(truths[LARGE], raises=frozenset({(5, 4), (9, 2)}))
    found = tuned(Simulated(truths))
    choice = found.choices.by_shape[LARGE]
    assert (choice.columns[4], choice.columns[8]) == (2, 3)
    assert found.bad == {}


def test_a_kernel_that_always_raises_is_bad():
    truths = fast()
    truths[LARGE] = replace(truths[LARGE], raises=frozenset({(5, 4), (5, 2)}))
    found = tuned(Simulated(truths))
    assert found.bad == {LARGE: "RuntimeError: threadgroup is too large"}
    truths[LARGE] = replace(truths[LARGE], raises=frozenset(), raises_timed=True)
    found = tuned(Simulated(truths))
    assert found.bad == {LARGE: "RuntimeError: timed out"}


def test_a_kernel_that_loses_with_some_rows_is_left_at_once():
    truths = fast()
    truths[LARGE] = replace(truths[LARGE], stock_growth=0.01)
    found = tuned(Simulated(truths))
    assert found.decided[LARGE] is None
    assert found.reasons[LARGE].startswith("not faster for 5 rows (0.8")
    assert list(found.gains[LARGE]) == [5]


def test_a_gain_within_the_margin_is_none():
    found = tuned(Simulated(all_of(speed=1.02, growth=0.5), noise=0.001))
    assert not found.choices
    assert all("by more than 3%" in reason for reason in found.reasons.values())
    assert found.passes == found.stock_passes  # those are known all the same
    assert set(found.passes) == set(PASS_ROWS)


def test_timings_that_lie_apart_are_no_gain():
    found = tuned(Simulated(fast(), noise=0.1))
    assert not found.choices
    assert all("lie apart" in reason for reason in found.reasons.values())


def test_a_candidate_whose_timings_lie_apart_leaves_the_other():
    machine = Simulated(fast(other=1.02))
    times = machine.product_s
    restless = iter((1.0, 1.04) * 10000)

    def product_s(shape, num_rows, columns, window_s):
        found = times(shape, num_rows, columns, window_s)
        is_restless = columns == default_columns(num_rows) and shape == LARGE
        return found * (next(restless) if is_restless else 1)

    machine.product_s = product_s  # type: ignore[method-assign]
    choice = tuned(machine).choices.by_shape[LARGE]
    assert choice.columns == (2, 2, 2, 2, 2, 3, 3, 3, 3)


def test_the_median_of_all_windows_counts():
    timing = Timing.of([2.0, 1.0, 9.0, 2.5, 1.5])
    assert timing == Timing(2.0, 4.0)
    assert Timing.of([1.0, float("inf"), 1.0]) == Timing(float("inf"), 0.0)


# ------------------------------------------------------------------------- whole passes


def test_a_shape_that_loses_in_passes_is_dropped():
    truths = fast()
    truths[LARGE] = replace(truths[LARGE], in_context=5.0)
    found = tuned(Simulated(truths))
    assert set(found.choices.by_shape) == {SMALL, WIDE, PLAIN}
    assert found.reasons == {LARGE: "not faster in whole passes"}
    assert found.decided[LARGE] is None
    assert found.bad == {}


def test_passes_are_not_timed_without_what_has_no_share():
    lines: list[str] = []
    tune(SHAPES, Simulated(fast()), budget_s=600, progress=lines.append)
    assert f"whole passes without {LARGE}" in lines
    assert PLAIN.num_bytes * SHAPES[PLAIN] < 0.01 * sum(
        shape.num_bytes * count for shape, count in SHAPES.items()
    )
    assert f"whole passes without {PLAIN}" not in lines
    truths = fast()
    truths[PLAIN] = replace(truths[PLAIN], raises_in_context=True)
    found = tuned(Simulated(truths))
    assert set(found.bad) == {PLAIN}  # it is looked for where something raises


@pytest.mark.parametrize("seed", range(3))
def test_a_form_that_loses_in_passes_is_dropped(seed):
    """Each of its shapes loses too little to be seen by itself."""
    few = {Shape(1024 + i, 1536, FOUR_BIT): 9 for i in range(8)}
    truths = {
        s: Truth(s.num_bytes / 200e9, growth=0.5, speed=1.1, in_context=1.2)
        for s in few
    }
    truths[WIDE] = Truth(WIDE.num_bytes / 200e9, growth=0.5, speed=2.0)
    few[WIDE] = 1
    machine = Simulated(truths, seed, noise=0.005, counts=few, fixed_s=2e-5)
    found = tune(few, machine, budget_s=900, progress=lambda line: None)
    assert set(found.choices.by_shape) == {WIDE}


def test_all_that_lose_in_passes_are_dropped():
    machine = Simulated(fast(in_context=4.0))
    found = tuned(machine)
    assert found.decided == dict.fromkeys(SHAPES)
    assert found.passes == found.stock_passes


def test_a_kernel_that_raises_in_passes_is_found():
    truths = fast()
    truths[SMALL] = replace(truths[SMALL], raises_in_context=True)
    found = tuned(Simulated(truths))
    assert found.bad == {SMALL: "RuntimeError: no more memory"}
    assert set(found.choices.by_shape) >= {LARGE}
    alone = {LARGE: replace(truths[LARGE], raises_in_context=True)}
    machine = Simulated(alone)
    found = tune({LARGE: 60}, machine, budget_s=600, progress=lambda line: None)
    assert found.bad == {LARGE: "RuntimeError: no more memory"}
    assert found.decided == {LARGE: None}


def test_a_pass_that_fails_with_mlx_alone_is_no_kernels_fault():
    machine = Simulated(fast())

    def pass_s(choices, num_rows, window_s):
        raise RuntimeError("no such model")

    machine.pass_s = pass_s  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no such model"):
        tuned(machine)


# --------------------------------------------------------------------------------- time


def test_what_does_not_fit_the_budget_stays_undecided():
    machine = Simulated(fast())
    lines: list[str] = []
    found = tune(SHAPES, machine, budget_s=140, progress=lines.append)
    assert LARGE in found.decided  # the largest part of a pass comes first
    assert found.reasons[PLAIN] == "no time left"
    assert PLAIN not in found.decided
    assert lines[0] == f"{LARGE}, 1 of 4"
    assert "whole passes" in lines
    found = tuned(Simulated(fast(), fixed_s=30.0), 140)
    assert found.decided == {}
    assert found.reasons[LARGE] == "no time left for whole passes"
    assert found.passes == {}


@pytest.mark.parametrize("disturbed_from", [0.0, 70.0, 120.0])
def test_nothing_is_decided_while_others_disturb(disturbed_from):
    machine = Simulated(fast(), disturbed_from=disturbed_from)
    found = tuned(machine)
    assert found.reason == "others work"
    assert found.decided == {}
    assert found.passes == {}


def test_candidates_take_turns_behind_a_second_of_work():
    machine = Simulated(fast())
    asked: list[int | None] = []
    begun: list[float] = []
    times = machine.product_s

    def product_s(shape, num_rows, columns, window_s):
        asked.append(columns)
        begun.append(machine.now)
        assert window_s == WINDOW_S
        return times(shape, num_rows, columns, window_s)

    machine.product_s = product_s  # type: ignore[method-assign]
    tune({LARGE: 1}, machine, budget_s=600, progress=lambda line: None)
    first = asked.index(4)  # behind the first window of MLX
    assert begun[first - 1] - begun[0] >= 1.0
    assert set(asked[:first]) == {None}
    turn = [None, 4, 2]
    assert asked[first - 1 : first + 14] == [
        *turn,
        *turn[::-1],
        *turn,
        *turn[::-1],
        *turn,
    ]
    assert Counter(asked[first - 1 :])[None] == 5 * len(ROW_SHARES)


def test_windows_that_lie_apart_are_timed_once_more():
    machine = Simulated(fast())
    count = 0
    times = machine._window

    def window(seconds: float, window_s: float) -> float:
        nonlocal count
        count += 1
        return times(seconds * (1.1 if count == 9 else 1), window_s)

    machine._window = window  # type: ignore[method-assign]
    quiet = Simulated(fast())
    assert set(tuned(machine).choices.by_shape) == set(tuned(quiet).choices.by_shape)
    assert machine.now > quiet.now + 14 * WINDOW_S
    assert tuner.NUM_WINDOWS == 5
