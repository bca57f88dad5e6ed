"""``selftest tune``: what multiplies few rows is chosen by time, and kept.

The matrices are timed alone, then in whole passes of the pair; see matmuls.tuner. What
was chosen is kept for this machine, and used by the next process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..cli.tables import duration
from ..engine.given_rounds import GivenRounds
from ..exactness.probe import places, random_slabs
from ..kernels import common
from ..kernels.matmul import MAX_ROWS
from ..matmuls.bench import Bench
from ..matmuls.choices import STOCK, Choices, Shape
from ..matmuls.kept import Kept
from ..matmuls.modules import shapes_of, sizes_of
from ..matmuls.tuned import Tuned
from ..matmuls.tuner import expected_s, tune
from ..models.target import Target
from ..pair.pair import Pair
from ..store import cache_folder
from .busy import disturbed
from .result import FAIL, INFO, SKIP, Result

_SHOWN_ROWS = 5  # whose gains are on the page


def why_not() -> str:
    """Why there is nothing to tune on this device, in words; empty where there is."""
    if common.backend() == "metal":
        return ""
    if common.gpu() == "metal":
        return f"{common.VARIABLE} is off, MLX multiplies"
    return f"kernels for few rows run on Metal alone: got {mx.default_device()}"


def plan(pair: Pair, budget_s: float) -> str:
    """What tuning will do, and how long it may take."""
    num_shapes = len(_shapes(pair))
    expected = expected_s(num_shapes, len(_in_passes(pair)), len(_ways(pair)))
    likely = min(expected, budget_s)
    return (
        f"times {num_shapes} shapes of matrices, 1 to {MAX_ROWS} rows each, by MLX and "
        f"by this package's kernel, then whole passes, also with layers run in other "
        f"ways: about {duration(likely)}, "
        f"{duration(budget_s)} at most. Leave the machine alone meanwhile."
    )


def look(
    pair: Pair, budget_s: float, folder: Path | None, progress: Callable[[str], None]
) -> Result:
    """Tune a pair's matrices and keep what was found.

    Nothing is decided while other programs, heat or low power disturb it.

    Args:
        pair: The pair.
        budget_s: Longest time, seconds.
        folder: Where it is kept; None for nowhere.
        progress: Told what is done, a line each.
    """
    start = time.perf_counter()
    shapes, kept = _shapes(pair), Kept(folder)
    sizes = sizes_of([pair.target, pair.drafter])
    ways = tuple(way for way in _ways(pair) if not kept.is_bad_way(way))
    tried = {s: count for s, count in shapes.items() if not kept.is_bad(s)}
    with pair.wired():
        passes = Passes(pair)
        machine = Bench(passes.run, disturbed, sizes=sizes)
        found = tune(
            tried,
            machine,
            in_passes=_in_passes(pair),
            budget_s=budget_s,
            progress=progress,
            ways=ways,
        )
    keep(found, set(shapes), sizes.structure, kept)
    lines, figures = what_runs(shapes, kept)
    figures |= {
        "passes_s": _named(found.passes),
        "stock_passes_s": _named(found.stock_passes),
        "reasons": {str(shape): reason for shape, reason in found.reasons.items()},
        "ways": dict(found.ways),
        "failed": {str(shape): reason for shape, reason in found.bad.items()},
    }
    for way, is_faster in found.ways.items():
        lines.append(f"layers, {way}: {'faster' if is_faster else 'not faster'}")
    for way, reason in found.bad_ways.items():
        lines.append(f"layers, {way}: not used, {reason}")
    for shape, reason in {**found.reasons, **found.bad}.items():
        lines.append(f"{shape}: MLX, {reason}")
    took = time.perf_counter() - start
    return Result("tune", *_judged(found), tuple(lines), figures, took)


def keep(found: Tuned, shapes: set[Shape], structure: str, kept: Kept) -> None:
    """Keep what was found for a pair that has these shapes, and this structure."""
    for shape, reason in found.bad.items():
        kept.mark_bad([shape], reason)
    for shape, choice in found.decided.items():
        kept.keep(shape, choice, found.gains.get(shape))
    for way, reason in found.bad_ways.items():
        kept.mark_bad_way(way, reason)
    if found.ways:
        kept.keep_ways(structure, found.ways)
    # What is undecided may have an older choice, which was not in these passes.
    if found.passes and kept.choices(shapes).by_shape == found.choices.by_shape:
        kept.keep_passes(shapes, found.passes)


def what_runs(
    shapes: Iterable[Shape], kept: Kept | None
) -> tuple[list[str], dict[str, Any]]:
    """What multiplies few rows, form by form: lines for the page, and all for JSON.

    Args:
        shapes: Those of a pair.
        kept: What was decided; None where MLX multiplies whatever was decided.
    """
    every = list(shapes)
    choices = STOCK if kept is None else kept.choices(every)
    lines = []
    for form in dict.fromkeys(shape.form for shape in every):
        of_form = [shape for shape in every if shape.form == form]
        chosen = [choices.by_shape[s] for s in of_form if s in choices.by_shape]
        text = f"few rows, {form}: "
        if not chosen:
            lines.append(f"{text}MLX for {len(of_form)} shapes")
            continue
        text += f"kernel for {len(chosen)} of {len(of_form)} shapes"
        num_plain = sum(choice.first_row == 1 for choice in chosen)
        text += f", for one row too for {num_plain}" if num_plain else ""
        lines.append(text + _gained(kept, choices.only(set(of_form))))
    named = {}
    for shape in every:
        choice = choices.by_shape.get(shape)
        named[str(shape)] = {
            "choice": None if choice is None else choice.to_dict(),
            "is_decided": kept is not None and kept.is_decided(shape),
            "gains": {} if kept is None else _named(kept.gains(shape)),
        }
    return lines, {"few_rows": named}


def what_runs_of(shapes: Iterable[Shape]) -> tuple[list[str], dict[str, Any]]:
    """The same for what was kept on this machine."""
    return what_runs(shapes, None if why_not() else Kept(cache_folder()))


class Passes:
    """Runs passes of a pair's target over slabs as if a text had filled them.

    Args:
        pair: The pair.
    """

    def __init__(self, pair: Pair) -> None:
        self._rounds = pair.rounds
        self._layout = pair.rounds.target.layout
        _, short, long = places(self._layout)
        self._places = {False: short, True: long}
        self._slabs: list[mx.array] = []
        self._is_long = False  # where the slabs are
        self._engines: dict[str, GivenRounds] = {}
        size = (1, MAX_ROWS)
        self._tokens = mx.random.randint(0, pair.vocab_size, size, key=mx.random.key(0))

    def run(self, choices: Choices, num_rows: int, is_long: bool = False) -> None:
        """Run one pass to its end, over a long text or not."""
        engine, place = self._engine(choices), self._places[is_long]
        if is_long != self._is_long:
            self._is_long, self._slabs = is_long, []
        # A pass that fails has lost them; who else holds them has them copied.
        slabs, self._slabs = self._slabs, []
        slabs = slabs or random_slabs(self._layout, 1, place)
        tokens = self._tokens[:, :num_rows]
        offset = mx.array([place.offset])
        found = engine.run(tokens, slabs, offset=offset, min_rows=1)
        del slabs
        mx.eval(found.logits, found.hidden, found.slabs)
        self._slabs = found.slabs

    def _engine(self, choices: Choices) -> GivenRounds:
        """The engine that multiplies so: each has traces of its own."""
        name = choices.digest
        if name not in self._engines:
            before = self._rounds.choices
            self._rounds.use(choices)
            self._engines[name] = GivenRounds(self._rounds, 1)
            self._rounds.use(before)
        return self._engines[name]


def _shapes(pair: Pair) -> Mapping[Shape, int]:
    """The matrices of target and drafter that the kernel may multiply."""
    return shapes_of([pair.target, pair.drafter])


def _in_passes(pair: Pair) -> Mapping[Shape, int]:
    """Those of the target, which passes are of."""
    return shapes_of([pair.target])


def _ways(pair: Pair) -> tuple[str, ...]:
    """The ways to run layers that make a difference to the target."""
    return Target(pair.target).ways


def _judged(found: Tuned) -> tuple[str, str]:
    """Status and sentence."""
    if found.reason:
        return SKIP, f"not tuned, what was chosen before stays: {found.reason}"
    if found.bad or found.bad_ways:
        where = ", ".join(map(str, (*found.bad, *found.bad_ways)))
        return FAIL, f"a kernel failed here, MLX takes its place: {where}"
    undecided = [r for shape, r in found.reasons.items() if shape not in found.decided]
    why = ", ".join(dict.fromkeys(reason.partition(":")[0] for reason in undecided))
    rest = f"; {len(undecided)} undecided, {why}" if undecided else ""
    if found.choices.ways:
        rest += (
            f"; layers are run in other ways: {', '.join(sorted(found.choices.ways))}"
        )
    if not found.choices.by_shape:
        return INFO, f"MLX is as fast for {len(found.decided)} shapes{rest}"
    num_chosen = len(found.choices.by_shape)
    sentence = f"the kernel for {num_chosen} of {len(found.decided)} shapes"
    if found.passes:
        gained = found.stock_passes[_SHOWN_ROWS] / found.passes[_SHOWN_ROWS]
        sentence += f"; passes of {_SHOWN_ROWS} rows are {gained:.2f} times as fast"
    return INFO, sentence + rest


def _gained(kept: Kept | None, choices: Choices) -> str:
    """What was gained by choices, in words; empty where nobody measured it."""
    found = [kept.gains(shape) for shape in choices.by_shape] if kept else []
    gains = sorted(each[_SHOWN_ROWS] for each in found if _SHOWN_ROWS in each)
    if not gains:
        return ""
    return f"; {_SHOWN_ROWS} rows {gains[0]:.2f} to {gains[-1]:.2f} times as fast"


def _named(by_rows: Mapping[int, float]) -> dict[str, float]:
    """Numbers by rows, as JSON has them."""
    return {str(num_rows): number for num_rows, number in by_rows.items()}
