"""The tuner on simulated machines: what it chooses, and what it never chooses.

Run: python -m pytest tests/matmuls/test_tuner.py
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import pytest

from mlx_gemma_mtp.kernels.matmul import DENSE, MAX_ROWS, Form, default_columns
from mlx_gemma_mtp.kernels.ways import ADD_NORM, LONG_WAYS, NORM_ROPE, PACKED, SPLIT
from mlx_gemma_mtp.matmuls.choices import Choices, Shape
from mlx_gemma_mtp.matmuls.judgement import (
    ROW_SHARES,
    Duel,
    Timing,
    candidate_columns,
    choose_first_row,
    drafter_first_row,
)
from mlx_gemma_mtp.matmuls.tuned import Tuned
from mlx_gemma_mtp.matmuls.tuner import PASS_ROWS, expected_s, tune
from mlx_gemma_mtp.matmuls.windows import NUM_WINDOWS, WINDOW_S

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
        cliffs: The (M, R) with which registers do not suffice, and what the kernel
            then takes, over what it would.
        cliffs_in_context: The same in passes alone, by M.
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
    cliffs: Mapping[tuple[int, int], float] = field(default_factory=dict)
    cliffs_in_context: Mapping[int, float] = field(default_factory=dict)
    wrong: frozenset[tuple[int, int]] = frozenset()
    raises: frozenset[tuple[int, int]] = frozenset()
    raises_timed: bool = False
    raises_in_context: bool = False

    def stock(self, num_rows: int) -> float:
        return self.stock_s * (1 + self.stock_growth * (num_rows - 1))

    def kernel(self, num_rows: int, columns: int) -> float:
        own = self.stock_s / self.speed * (1 + self.growth * (num_rows - 1))
        own *= 1 if columns == default_columns(num_rows) else self.other
        return own * self.cliffs.get((num_rows, columns), 1)

    def in_pass(self, num_rows: int, columns: int) -> float:
        own = self.kernel(num_rows, columns) * self.in_context
        return own * self.cliffs_in_context.get(num_rows, 1)


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
        way_shares: What a pass takes with each way to run layers, over one without.
        wrong_way: One whose kernels are wrong.
        raising_way: One whose kernels raise.
        no_memory_ways: Those for whose passes there is no memory.
        timed_ways: Those that were in a pass.
        no_memory: The shapes and places (prepare, is_right, MLX, kernel, pass) where
            memory ends.
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
    no_memory: set[tuple[Shape, str]] = field(default_factory=set)
    way_shares: dict[str, float] = field(default_factory=dict)
    wrong_way: str = ""
    raising_way: str = ""
    no_memory_ways: set[str] = field(default_factory=set)
    timed_ways: set[str] = field(default_factory=set)
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

    def prepare(self, shape: Shape) -> None:
        self.now += 0.2
        self._allocate(shape, "prepare")

    def _allocate(self, shape: Shape, place: str) -> None:
        if (shape, place) in self.no_memory:
            raise RuntimeError("[malloc] Unable to allocate 2818572288 bytes.")

    def is_right(self, shape: Shape, num_rows: int, columns: int) -> bool:
        self.now += 0.05
        self._allocate(shape, "is_right")
        self._run(shape, num_rows, columns)
        return (num_rows, columns) not in self.truths[shape].wrong

    def product_s(
        self, shape: Shape, num_rows: int, columns: int | None, window_s: float
    ) -> float:
        truth = self.truths[shape]
        self._allocate(shape, "MLX" if columns is None else "kernel")
        if columns is None:
            return self._window(truth.stock(num_rows), window_s)
        self._run(shape, num_rows, columns)
        if truth.raises_timed and self.random.random() < 0.1:
            raise RuntimeError("timed out")
        return self._window(truth.kernel(num_rows, columns), window_s)

    def is_right_way(self, way: str, forms: Iterable[Form]) -> bool:
        if way == self.raising_way:
            raise RuntimeError("no such\nlibrary")
        return way != self.wrong_way

    def pass_s(
        self,
        choices: Choices,
        num_rows: int,
        window_s: float,
        *,
        is_long: bool = False,
    ) -> float:
        kind = choices.digest, num_rows
        if kind not in self.traced:
            self.traced.add(kind)
            self.now += 0.5
        for shape, choice in choices.by_shape.items():
            assert shape in self.counts  # the pass holds it
            self._allocate(shape, "pass")
            if choice.takes(num_rows) and self.truths[shape].raises_in_context:
                self.now += 0.01
                raise RuntimeError("no such\nlibrary")
        total = self.pass_truth(choices, num_rows)
        for way in choices.ways:
            self.timed_ways.add(way)
            if way in self.no_memory_ways:
                raise RuntimeError("[malloc] Unable to allocate 2818572288 bytes.")
            share = self.way_shares[way]
            total *= share if way not in LONG_WAYS or is_long else 1
        return self._window(total, window_s)

    def pass_truth(self, choices: Choices, num_rows: int) -> float:
        """What a pass takes in truth."""
        total = self.fixed_s
        for shape, count in self.counts.items():
            truth, choice = self.truths[shape], choices.by_shape.get(shape)
            if choice is None or not choice.takes(num_rows):
                total += count * truth.stock(num_rows)
            else:
                own_s = truth.in_pass(num_rows, choice.columns[num_rows - 1])
                total += count * own_s
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


def tuned(
    machine: Simulated,
    budget_s: float = 600.0,
    progress: Callable[[str], None] = lambda line: None,
    ways: Sequence[str] = (),
) -> Tuned:
    shapes = {shape: SHAPES.get(shape, 9) for shape in machine.truths}
    return tune(
        shapes,
        machine,
        in_passes=machine.counts,
        budget_s=budget_s,
        progress=progress,
        ways=ways,
    )


def all_of(**truth) -> dict[Shape, Truth]:
    """The same truth for all shapes, but for how large they are."""
    return {s: Truth(s.num_bytes / 200e9, **truth) for s in SHAPES}


def any_machine(seed: int) -> Simulated:
    """Some machine: kernels are fast, slow, wrong or raise, and its clock is any."""
    draw = random.Random(seed)
    pipelines = [(m, r) for m in ALL_ROWS for r in candidate_columns(m)]

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
            cliffs=dict.fromkeys(some(0.1), draw.choice((1.1, 1.5, 10))),
            cliffs_in_context=dict.fromkeys(
                (m for m, _ in some(0.2)), draw.choice((1.1, 1.5, 10))
            ),
            wrong=some(0.05),
            raises=some(0.1),
            raises_timed=draw.random() < 0.05,
            raises_in_context=draw.random() < 0.05,
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
        counts={s: n for s, n in SHAPES.items() if s == LARGE or draw.random() < 0.8},
        no_memory={
            (shape, place)
            for shape in SHAPES
            for place in ("prepare", "is_right", "MLX", "kernel", "pass")
            if draw.random() < 0.005
        },
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
        budget_s = random.Random(seed).choice((10, 150, 300, 900))
        found = tuned(machine, budget_s)
        # One window, or one check, may be under way when time is over.
        assert machine.now <= budget_s + 2, seed
        num_kept += bool(found.choices)
        for num_rows in ALL_ROWS:
            stock_s = machine.pass_truth(Choices(), num_rows)
            own_s = machine.pass_truth(found.choices, num_rows)
            assert own_s <= 1.03 * stock_s, (seed, num_rows)
        assert mix(machine, found.choices) <= mix(machine, Choices()), seed
        for shape, choice in found.choices.by_shape.items():
            truth = machine.truths[shape]
            for num_rows in filter(choice.takes, ALL_ROWS):
                pipeline = num_rows, choice.columns[num_rows - 1]
                assert pipeline not in truth.wrong | truth.raises, seed
                own_s, stock_s = truth.kernel(*pipeline), truth.stock(num_rows)
                assert own_s <= 1.03 * stock_s, (seed, shape, num_rows)
        for shape in found.bad:
            assert found.decided.get(shape) is None
            truth = machine.truths[shape]
            raises = truth.raises_timed or truth.raises_in_context
            assert truth.wrong or truth.raises or raises, seed
    assert num_kept > 120


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
    expected = expected_s(len(SHAPES), len(SHAPES))
    assert 0.6 * expected < machine.now < 1.2 * expected


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


# --------------------------------------------------------- what only the drafter has


DRAFTER = Shape(1024, 256, FOUR_BIT)


def with_drafter(**truth) -> dict[Shape, Truth]:
    """Fast kernels, and one for a matrix that only the drafter has."""
    own = {"stock_growth": 0.5, "growth": 0.05, **truth}
    return {**fast(), DRAFTER: Truth(DRAFTER.num_bytes / 200e9, **own)}


def test_passes_are_never_timed_without_what_they_do_not_have():
    machine = Simulated(with_drafter(in_context=9.0, raises_in_context=True))
    lines: list[str] = []
    found = tuned(machine, progress=lines.append)  # the machine refuses it in passes
    assert set(found.choices.by_shape) == {*SHAPES, DRAFTER}
    assert f"whole passes without {LARGE}" in lines
    assert f"whole passes without {DRAFTER}" not in lines


@pytest.mark.parametrize(
    ("speed", "first_row"), [(1.1, 1), (1.02, 2), (1.0, 2), (0.98, 2), (0.9, 2)]
)
def test_steps_of_a_drafter_get_the_kernel_where_they_win(speed, first_row):
    """There a plain round saves nothing that would make up for a loss."""
    machine = Simulated(with_drafter(speed=speed), noise=0.001)
    found = tuned(machine)
    assert found.choices.by_shape[DRAFTER].first_row == first_row


def test_a_loss_in_passes_of_one_row_is_not_the_drafters():
    truths = with_drafter(speed=1.1)
    for shape in SHAPES:
        truths[shape] = replace(truths[shape], cliffs_in_context={1: 1.2})
    found = tuned(Simulated(truths, noise=0.001))
    rows = {shape: c.first_row for shape, c in found.choices.by_shape.items()}
    assert rows == {**dict.fromkeys(SHAPES, 2), DRAFTER: 1}


def test_what_only_the_drafter_has_needs_no_time_for_passes():
    found = tuned(Simulated(with_drafter(), fixed_s=30.0), 400)
    assert set(found.choices.by_shape) == {DRAFTER}
    assert found.reasons[LARGE] == "no time left for whole passes"


def test_one_row_of_a_drafter_must_gain_more_than_its_spread():
    def first(one_own: float, spread: float) -> int:
        timings = Timing(1.0, 0.0), Timing(one_own, spread)
        return drafter_first_row({1: Duel(*timings)})

    assert first(0.95, 0.0) == first(0.95, 0.049) == 1
    assert first(0.975, 0.0) == first(0.95, 0.051) == 2


# -------------------------------------------------------------------------- cliffs


@pytest.mark.parametrize("num_rows", ALL_ROWS)
def test_another_r_is_taken_where_registers_do_not_suffice(num_rows):
    default, other = candidate_columns(num_rows)
    truths = fast(other=1.05)
    truths[LARGE] = replace(truths[LARGE], cliffs={(num_rows, default): 10})
    choice = tuned(Simulated(truths)).choices.by_shape[LARGE]
    expected = list(map(default_columns, ALL_ROWS))
    expected[num_rows - 1] = other
    assert choice.columns == tuple(expected)


@pytest.mark.parametrize("num_rows", ALL_ROWS)
def test_a_cliff_with_every_r_drops_a_shape(num_rows):
    truths = fast()
    cliffs = {(num_rows, columns): 10.0 for columns in candidate_columns(num_rows)}
    truths[LARGE] = replace(truths[LARGE], cliffs=cliffs)
    found = tuned(Simulated(truths))
    if num_rows == 1:
        assert found.choices.by_shape[LARGE].first_row == 2
    else:
        assert found.decided[LARGE] is None
        assert f"for {num_rows} rows" in found.reasons[LARGE]
    assert set(found.choices.by_shape) >= set(SHAPES) - {LARGE}


@pytest.mark.parametrize("num_rows", ALL_ROWS)
@pytest.mark.parametrize("shape", [LARGE, WIDE], ids=str)
def test_a_cliff_in_passes_drops_the_shape(shape, num_rows):
    truths = fast()
    truths[shape] = replace(truths[shape], cliffs_in_context={num_rows: 20.0})
    found = tuned(Simulated(truths))
    if num_rows == 1:
        rows = {choice.first_row for choice in found.choices.by_shape.values()}
        assert rows == {2}
    else:
        assert set(found.choices.by_shape) == set(SHAPES) - {shape}


# ----------------------------------------------------------- what is not right, or slow


@pytest.mark.parametrize("num_rows", ALL_ROWS)
@pytest.mark.parametrize("place", [0, 1])
def test_a_wrong_kernel_is_bad_and_never_timed(num_rows, place):
    truths = fast()
    pipeline = num_rows, candidate_columns(num_rows)[place]
    truths[LARGE] = replace(truths[LARGE], wrong=frozenset({pipeline}))
    machine = Simulated(truths)
    found = tuned(machine)
    assert found.decided[LARGE] is None
    assert found.bad == {LARGE: f"wrong numbers for {num_rows} rows"}
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
    assert choice.columns == (*[2] * 8, 3)


def test_the_median_of_all_windows_counts():
    timing = Timing.of([2.0, 1.0, 9.0, 2.5, 1.5])
    assert timing == Timing(2.0, 4.0)
    assert Timing.of([1.0, float("inf"), 1.0]) == Timing(float("inf"), 0.0)


# -------------------------------------------------------------------------- memory


@pytest.mark.parametrize("place", ["prepare", "is_right", "MLX", "kernel"])
def test_short_memory_leaves_a_shape_undecided(place):
    machine = Simulated(fast(), no_memory={(LARGE, place)})
    found = tuned(machine)
    assert found.bad == {}
    assert set(found.decided) == set(SHAPES) - {LARGE}
    assert found.reasons[LARGE].startswith("not timed: RuntimeError: [malloc] Unable")


def test_short_memory_in_passes_ends_it():
    found = tuned(Simulated(fast(), no_memory={(SMALL, "pass")}))
    assert found.reason.startswith("RuntimeError: [malloc] Unable")
    assert not found.decided
    assert not found.bad


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
    tuned(Simulated(fast()), progress=lines.append)
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
    found = tuned(machine, 900)
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
    assert found.bad == {SMALL: "RuntimeError: no such library"}
    assert set(found.choices.by_shape) >= {LARGE}
    alone = {LARGE: replace(truths[LARGE], raises_in_context=True)}
    found = tuned(Simulated(alone, counts={LARGE: 60}))
    assert found.bad == {LARGE: "RuntimeError: no such library"}
    assert found.decided == {LARGE: None}


def test_a_pass_that_fails_with_mlx_alone_is_no_kernels_fault():
    machine = Simulated(fast())

    def pass_s(choices, num_rows, window_s, *, is_long):
        raise RuntimeError("no such model")

    machine.pass_s = pass_s  # type: ignore[assignment,method-assign]
    with pytest.raises(RuntimeError, match="no such model"):
        tuned(machine)


# --------------------------------------------------------------------------------- time


def test_what_does_not_fit_the_budget_stays_undecided():
    machine = Simulated(fast())
    lines: list[str] = []
    found = tuned(machine, 200, progress=lines.append)
    assert LARGE in found.decided  # the largest part of a pass comes first
    assert found.reasons[PLAIN] == "no time left"
    assert PLAIN not in found.decided
    assert lines[0] == f"{LARGE}, 1 of 4"
    assert "whole passes" in lines
    found = tuned(Simulated(fast(), fixed_s=30.0), 240)
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
    machine = Simulated({LARGE: fast()[LARGE]}, counts={LARGE: 60})
    asked: list[int | None] = []
    begun: list[float] = []
    times = machine.product_s

    def product_s(shape, num_rows, columns, window_s):
        asked.append(columns)
        begun.append(machine.now)
        assert window_s == WINDOW_S / (2 if num_rows in (4, 6, 7, 8) else 1)
        return times(shape, num_rows, columns, window_s)

    machine.product_s = product_s  # type: ignore[method-assign]
    tuned(machine)
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
    assert NUM_WINDOWS == 5


# ----------------------------------------------------------------- ways to run layers

SHARES = {ADD_NORM: 0.9, NORM_ROPE: 1.002, SPLIT: 1.1, PACKED: 0.85}


def test_ways_that_make_passes_faster_are_kept():
    machine = Simulated(all_of(speed=1.5), way_shares=SHARES)
    found = tuned(machine, ways=tuple(SHARES))
    assert found.ways == {ADD_NORM: True, NORM_ROPE: False, SPLIT: False, PACKED: True}
    assert found.choices.ways == {ADD_NORM, PACKED}
    assert set(found.choices.by_shape) == set(SHAPES)
    # What a pass takes is told of short texts, with all that was kept.
    for num_rows in PASS_ROWS:
        truth = 0.9 * machine.pass_truth(found.choices, num_rows)
        assert found.passes[num_rows] == pytest.approx(truth, rel=0.02)
        stock = machine.pass_truth(Choices(), num_rows)
        assert found.stock_passes[num_rows] == pytest.approx(stock, rel=0.02)


def test_ways_are_tried_where_mlx_multiplies_all():
    machine = Simulated(all_of(speed=0.5), way_shares=SHARES)
    found = tuned(machine, ways=(ADD_NORM,))
    assert found.choices == Choices({}, frozenset({ADD_NORM}))


@pytest.mark.parametrize("kind", ["wrong_way", "raising_way"])
def test_a_way_whose_kernels_are_wrong_is_bad(kind):
    machine = Simulated(all_of(), way_shares={ADD_NORM: 0.5})
    setattr(machine, kind, ADD_NORM)
    found = tuned(machine, ways=(ADD_NORM,))
    assert found.ways == {}
    assert set(found.bad_ways) == {ADD_NORM}
    assert machine.timed_ways == set()


def test_a_way_without_memory_is_left_out_and_others_are_not():
    machine = Simulated(all_of(speed=1.5), way_shares=SHARES, no_memory_ways={PACKED})
    found = tuned(machine, ways=(ADD_NORM, PACKED, NORM_ROPE))
    assert found.ways == {ADD_NORM: True, NORM_ROPE: False}
    assert found.bad_ways == {}
    assert set(found.choices.by_shape) == set(SHAPES)


def test_what_disturbs_ways_takes_nothing_away():
    quiet = Simulated(all_of(speed=1.5), way_shares=SHARES)
    expected = tuned(quiet)
    machine = Simulated(
        all_of(speed=1.5), way_shares=SHARES, disturbed_from=quiet.now + 1
    )
    found = tuned(machine, ways=tuple(SHARES))
    assert found.reason == ""
    assert found.choices.by_shape == expected.choices.by_shape
    assert len(found.ways) < len(SHARES)


def test_ways_without_time_are_left_out():
    machine = Simulated(all_of(speed=0.5), way_shares=SHARES)
    short = expected_s(len(SHAPES), len(SHAPES)) * 0.3
    found = tuned(machine, budget_s=short, ways=tuple(SHARES))
    assert set(found.ways) < set(SHARES)
