"""Section ``kernels``: every kernel against the plain operations, on random rows.

Whole numbers must be the same: tokens, ids and accepted lengths. Where a row differs,
the plain operations decide it again over logits that are moved by as little as rounding
may move them (equal ones alike, so that ties stay ties): if they then come to the
kernel's answer the row was a close call; of those there may be few. Sums may be off by
rounding. What the matmul must give, products.py says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import numpy as np

from ..kernels import common, select, threshold
from ..kernels.matmul import FORMS, Form
from ..sampling import fused
from ..sampling.acceptance import Accepted
from ..sampling.candidates import sorted_best
from ..sampling.decision import decide, propose
from ..sampling.distribution import Distribution, choose_tokens
from .kernel_case import SHAPES, Case, Shape, make_case, plainly
from .products import compare_forms
from .result import FAIL, PASS, SKIP, Result
from .tally import DECIDING, MATMUL, Tallies, Tally

SUM = 2e-5  # of a sum of exponentials, relative
MASS = 5e-6  # of a share of the whole
FLOOR = 1e-5  # of a logit that a filter compares
SCORE = 1e-4  # of a score, over the temperature
NOISE = 2e-5  # what logits are moved by to find close calls
_NUM_MOVES = 16
_FREQUENCY = 97.0  # of the wave that moves logits
_MANY_TOKENS = 20000  # of a vocabulary that two cases of each rule are enough for
_MATMUL_SHARE = 0.4  # of the time: it has most texts to compile


def look(
    allowance_s: float,
    shapes: Sequence[Shape] = SHAPES,
    forms: Sequence[Form] = FORMS,
) -> Result:
    """Compare all kernels, form by form and shape by shape while there is time.

    Args:
        allowance_s: No form and no shape is begun that would end later, seconds.
        shapes: The shapes of decisions to compare.
        forms: The forms of matrices to compare.
    """
    if common.backend() == "ops":
        return Result(
            "kernels",
            SKIP,
            "kernels need a GPU; without one plain operations decide rounds",
        )
    start = time.perf_counter()
    tallies = Tallies({name: Tally() for name in DECIDING})
    figures: dict[str, Any] = {"backend": common.backend()}
    places = []
    if common.backend() == "metal":  # elsewhere MLX multiplies
        tallies.of = {MATMUL: Tally(), **tallies.of}
        done = compare_forms(_MATMUL_SHARE * allowance_s, tallies, forms)
        figures["forms"] = done
        places.append(f"{len(done)} of {len(forms)} forms")
    left_s = allowance_s - (time.perf_counter() - start)
    done = _compare_shapes(left_s, tallies, shapes)
    figures["shapes"] = done
    places.append(f"{len(done)} of {len(shapes)} shapes")
    return _result(tallies, " and ".join(places), figures)


def _compare_shapes(
    allowance_s: float, tallies: Tallies, shapes: Sequence[Shape]
) -> list[str]:
    """Compare decisions while there is time, the first in any case; their names."""
    start, pace = time.perf_counter(), 0.0
    done: list[str] = []
    for shape in shapes:
        begun = time.perf_counter()
        if done and begun - start + pace * shape.size > allowance_s:
            continue
        compare(shape, tallies)
        done.append(str(shape))
        # By the first one, the largest: what is small takes longer for its size.
        pace = pace or (time.perf_counter() - begun) / shape.size
    return done


def compare(shape: Shape, tallies: Tallies) -> None:
    """Compare all kernels on a shape; those that cannot be run are noted."""
    for turn in range(2 if shape.vocab_size > _MANY_TOKENS else 4):
        for is_listed in (True, False):
            tallies.place = f"{shape}, {'top-k' if is_listed else 'whole rows'} {turn}"
            case = make_case(shape, turn, is_listed=is_listed)
            for name, check in _LISTED if is_listed else _WHOLE:
                try:
                    check(case, tallies)
                # What a compiler says of a kernel, too, is what is looked for.
                except Exception as error:  # noqa: BLE001
                    tallies.fail(name, error)


def _result(tallies: Tallies, places: str, figures: dict[str, Any]) -> Result:
    """What the tallies come to.

    Args:
        tallies: Of all kernels that were compared.
        places: On what, in words.
        figures: What is told of it besides.
    """
    wrong = [name for name, tally in tallies.of.items() if not tally.is_right]
    lines = []
    for name, tally in tallies.of.items():
        lines.append(f"{name:<10} {'wrong' if name in wrong else 'equal':<6} {tally}")
    figures = figures | {
        "kernels": {name: asdict(tally) for name, tally in tallies.of.items()},
        "tolerances": {"sum": SUM, "mass": MASS, "score": SCORE, "moved_by": NOISE},
    }
    where = f"on {places} ({figures['backend']})"
    if wrong:
        sentence = f"{', '.join(wrong)} differ from plain operations {where}"
        return Result("kernels", FAIL, sentence, tuple(lines), figures)
    sentence = f"all {len(tallies.of)} kernels give what plain operations give {where}"
    return Result("kernels", PASS, sentence, tuple(lines), figures)


# ---------------------------------------------------------------------- one kernel each


def _compare_select(case: Case, tallies: Tallies) -> None:
    """The best 64 tokens of the target's rows and of the drafter's candidates."""
    batches: list[tuple[mx.array, mx.array | None]] = [(case.logits, None)]
    if case.num_drafts:
        batches.append((case.drafted, case.token_ids))
    for logits, ids in batches:
        width = logits.shape[-1]
        flat = logits.reshape(-1, width)
        flat_ids = None if ids is None else ids.reshape(-1, width)
        best = sorted_best(
            flat[None],
            min(common.LIST, width),
            token_ids=None if flat_ids is None else flat_ids[None],
        )
        want_values, want_ids = np.array(best.logits[0]), np.array(best.token_ids[0])
        values, tokens, stats = map(
            np.array, select.most_likely(flat, token_ids=flat_ids)
        )
        for row, exact in enumerate(_float64(flat)):
            count = int(np.isfinite(want_values[row]).sum())
            is_same = (values[row, :count] == want_values[row, :count]).all() and (
                tokens[row, :count] == want_ids[row, :count]
            ).all()
            is_same &= not np.isfinite(values[row, count:]).any()
            error = _sum_error(tallies.of["select"], stats[row, 1], exact)
            is_wrong = not is_same or stats[row, 0] != exact.max() or not error <= SUM
            tallies.add("select", is_wrong=bool(is_wrong))


def _compare_propose(case: Case, tallies: Tallies) -> None:
    """The drafts of every step, and what they were drawn from."""
    for i in range(case.num_drafts):
        logits, ids = case.step(i)

        def answer(
            logits: mx.array, i: int = i, ids: mx.array | None = ids
        ) -> tuple[np.ndarray, np.ndarray]:
            draft = propose(
                logits,
                case.sampling,
                graph=case.graph,
                offset=case.offset,
                step=i + 1,
                token_ids=ids,
                verification=plainly,
            )
            return _proposed(draft.tokens, draft.source)

        draft = fused.propose_one(
            logits,
            case.sampling,
            group=case.graph.of_drafts,
            offset=case.offset,
            step=i + 1,
            token_ids=ids,
        )
        got, scores = _proposed(draft.tokens, draft.source)
        want, want_scores = answer(logits)
        verdicts = _judged(got, want, lambda moved: answer(moved)[0], logits)
        for row, (is_wrong, is_close) in enumerate(verdicts):
            if not (is_wrong or is_close):
                temp = case.params[row].temp or 1.0
                error = np.abs(scores[row] - want_scores[row]).max(initial=0)
                is_wrong = not error <= SCORE / min(temp, 1.0)
            tallies.add("propose", is_wrong=is_wrong, is_close=is_close)


def _proposed(
    tokens: mx.array, source: Distribution | None
) -> tuple[np.ndarray, np.ndarray]:
    """Token and kept ids of each row [B, 65], and their scores, 0 where none."""
    assert source is not None  # a case has rows that are judged by block
    num_rows, _, count = source.scores.shape
    scores, ids = np.array(source.scores[:, 0]), np.array(source.token_ids[:, 0])
    is_kept = np.isfinite(scores)
    all_ids = np.full((num_rows, common.LIST), -1)
    all_ids[:, :count] = np.where(is_kept, ids, -1)
    all_scores = np.zeros((num_rows, common.LIST))
    all_scores[:, :count] = np.where(is_kept, scores, 0)
    return np.concatenate([np.array(tokens), all_ids], axis=1), all_scores


def _compare_threshold(case: Case, tallies: Tallies) -> None:
    """What filters keep of whole rows, and the tokens that equality decides by."""
    floats, words = fused.row_numbers(case.sampling, case.offset)
    graph = case.graph
    (group,) = graph.groups
    stats, tokens = threshold.threshold(
        case.logits,
        row_floats=floats,
        row_words=words,
        has_top_p=group.has_top_p,
        has_min_p=group.has_min_p,
        has_coupled=True,
    )
    num_tokens = case.logits.shape[1]
    positions = case.offset[:, None] + mx.arange(1, num_tokens + 1)
    # A row that is judged by block has no token of its own, but the argmax.
    is_block = np.array(case.sampling.is_block) & (num_tokens > 1)

    def answer(logits: mx.array) -> np.ndarray:
        chosen = choose_tokens(logits, case.sampling, graph=graph, positions=positions)
        best = np.array(mx.argmax(logits, axis=-1))
        return np.where(is_block[:, None], best, np.array(chosen))

    exact, got_stats = _float64(case.logits), np.array(stats)
    verdicts = _judged(np.array(tokens), answer(case.logits), answer, case.logits)
    for row, (is_wrong, is_close) in enumerate(verdicts):
        is_right = all(
            _is_kept_right(tallies.of["threshold"], case, row, got, logits)
            for got, logits in zip(got_stats[row], exact[row], strict=True)
        )
        tallies.add("threshold", is_wrong=is_wrong or not is_right, is_close=is_close)


def _is_kept_right(
    tally: Tally, case: Case, row: int, stats: np.ndarray, logits: np.ndarray
) -> bool:
    """Whether one row's numbers are right: largest, lowest kept, both sums."""
    params = case.params[row]
    largest = logits.max()
    weights = np.exp(logits - largest)
    probs = weights / weights.sum()
    is_kept = logits >= stats[1]
    must, may = np.isfinite(logits), np.isfinite(logits)
    if params.temp > 0 and 0 < params.top_p < 1:
        _, place = np.unique(logits, return_inverse=True)
        mass = np.bincount(place.reshape(-1), probs)
        above = (np.cumsum(mass[::-1])[::-1] - mass)[place.reshape(-1)]
        must &= above < params.top_p - MASS
        may &= above < params.top_p + MASS
    if params.temp > 0 and params.min_p > 0:
        floor = largest + np.log(params.min_p)
        must &= logits >= floor + FLOOR
        may &= logits >= floor - FLOOR
    is_kept &= np.isfinite(logits)
    temp = params.temp or 1.0
    kept = np.where(is_kept, (logits - largest) / temp, -np.inf)
    errors = [
        _sum_error(tally, stats[2], kept, scale=1 / min(temp, 1.0)),
        _sum_error(tally, stats[3], logits - largest),
    ]
    is_inside = not (must & ~is_kept).any() and not (is_kept & ~may).any()
    return bool(
        is_inside and stats[0] == largest and all(error <= SUM for error in errors)
    )


def _compare_decision(case: Case, tallies: Tallies) -> None:
    """Accepted lengths and last tokens."""
    draft = case.draft()
    (group,) = case.graph.groups

    def answer(logits: mx.array) -> np.ndarray:
        return _decided(
            decide(
                draft,
                logits,
                case.sampling,
                graph=case.graph,
                offset=case.offset,
                verification=plainly,
            )
        )

    got = _decided(
        fused.decide_all(
            draft, case.logits, case.sampling, group=group, offset=case.offset
        )
    )
    want = answer(case.logits)
    of_length = of_token = "decide"
    if not group.list_size:
        of_length, of_token = "judge", "resample"
        if not case.num_drafts:
            of_length = of_token = "threshold"
    for row, (is_wrong, is_close) in enumerate(_judged(got, want, answer, case.logits)):
        is_length_wrong = is_wrong and bool(got[row, 0] != want[row, 0])
        if of_token == of_length:
            tallies.add(of_length, is_wrong=is_wrong, is_close=is_close)
            continue
        tallies.add(of_length, is_wrong=is_length_wrong, is_close=is_close)
        if case.params[row].temp > 0 and not case.params[row].reproducible:
            is_token_wrong = is_wrong and not is_length_wrong
            tallies.add(of_token, is_wrong=is_token_wrong)
        elif is_wrong and not is_length_wrong:
            tallies.add("threshold", is_wrong=True)


def _decided(accepted: Accepted) -> np.ndarray:
    """Accepted length and last token of each row, [B, 2]."""
    parts = [accepted.num_accepted[:, None], accepted.next_token]
    return np.array(mx.concatenate(parts, axis=1))


_Check = Callable[[Case, Tallies], None]
# What is compared with a top-k and without, and which kernel an error is blamed on.
_LISTED: tuple[tuple[str, _Check], ...] = (
    ("select", _compare_select),
    ("propose", _compare_propose),
    ("decide", _compare_decision),
)
_WHOLE: tuple[tuple[str, _Check], ...] = (
    ("threshold", _compare_threshold),
    ("judge", _compare_decision),
)


# -------------------------------------------------------------------------- close calls


def _judged(
    got: np.ndarray,
    want: np.ndarray,
    answer: Callable[[mx.array], np.ndarray],
    logits: mx.array,
) -> list[tuple[bool, bool]]:
    """For each row whether it is wrong, and whether it is a close call."""
    differs = (got != want).any(axis=1)
    is_close = np.zeros_like(differs)
    for move in range(_NUM_MOVES):
        if not (differs & ~is_close).any():
            break
        is_close |= differs & (answer(_moved(logits, move)) == got).all(axis=1)
    return [
        (bool(d and not c), bool(c)) for d, c in zip(differs, is_close, strict=True)
    ]


def _moved(logits: mx.array, move: int) -> mx.array:
    """Logits as another rounding might give them; equal ones stay equal."""
    plain = logits.astype(mx.float32)
    finite = mx.where(mx.isfinite(plain), plain, 0)
    return plain + NOISE * mx.sin(_FREQUENCY * finite + 2.4 * move)


def _sum_error(
    tally: Tally, got: float, exponents: np.ndarray, *, scale: float = 1.0
) -> float:
    """Relative error of a sum of exponentials, over ``scale``; kept if the largest."""
    exponents = exponents.astype(np.float64)
    want = np.exp(exponents - exponents.max()).sum()
    error = float(abs(got - want) / want) / scale
    tally.max_error = max(tally.max_error, error)
    return error


def _float64(logits: mx.array) -> np.ndarray:
    return np.array(logits.astype(mx.float32)).astype(np.float64)
