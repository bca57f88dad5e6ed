"""What a request's rounds will be: how they are run, and how many drafts they have.

This is where ``num_draft_tokens`` and ``exactness`` of a request meet what is known of
the machine. It knows nothing of how rounds are run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..constants import AUTO, LOOKUP
from ..distributed.patience import FIRST_S
from ..distributed.ranks import Ranks
from ..drafting.controller import DraftLengthController
from ..drafting.policy import DraftPolicy, Learning
from ..engine.command_buffers import LEAST_BUFFERS, Limits, num_buffers
from ..engine.early_start import EarlyStart
from ..engine.request import Request
from ..engine.rounds import Rounds
from ..engine.route import ANY_ROUTE, PLAIN, Route, inexact_route
from ..engine.stats import joined_rules
from ..exactness.compared import Compared
from ..exactness.probe import TIMING_PASSES, probe
from ..exactness.verdict import Verdict, exact_routes
from ..kernels.common import gpu
from ..machine import command_buffer_limits
from ..models.target import text_model
from .agreed import agreed_route, agreed_verdict
from .calibration import Calibration
from .pair import Pair

logger = logging.getLogger("mlx_gemma_mtp")

# Of a probe that nobody asked for, in one request, seconds; the next one goes on.
_PROBE_BUDGET_S = 20.0
_NO_TEXT = "drafts judged by block: the distribution is the target's for any K"
_TOO_LONG = "the probe takes long on this machine; exactness set to exact runs it"
_UNFINISHED = (
    "the probe has not compared everything and goes on with the next request; "
    "exactness set to exact ends it at once"
)
_NO_DRAFTS = "no number of drafts gave the bytes of plain decoding on this machine"
_NO_DRAFTER = "the model has no drafter"
_ROWS_CHANGE = (
    "not exact: not compared, rows join and leave and kernels may change with them"
)
_SHARED_GROWTH = "endless requests share slabs, which grow where drafts move them"


@dataclass(frozen=True)
class Plan:
    """What a decoder needs beside its requests.

    Attributes:
        draft_policy: Who chooses the number of drafts.
        route: How rounds are run.
        why_plain: Why there are no drafts, in words; empty where there may be.
        probe_s: What the probe took, if it ran for this plan, seconds.
        early_start: Decides when rounds are started.
        look_ahead: Whether a round is built before the last one's report is read.
        has_text: Whether drafts may come from the text itself.
    """

    draft_policy: DraftPolicy
    route: Route
    why_plain: str = ""
    probe_s: float = 0.0
    early_start: EarlyStart = field(default_factory=EarlyStart)
    look_ahead: bool = True
    has_text: bool = False


def make_plan(
    pair: Pair,
    requests: Sequence[Request],
    *,
    num_draft_tokens: int | None,
    exactness: str,
    draft_source: str = AUTO,
) -> Plan:
    """Plan the rounds of requests that are decoded together.

    Args:
        pair: Target and drafter.
        requests: At least one.
        num_draft_tokens: Checked K; None for the controller's choice.
        exactness: One of ``constants.MODES``.
        draft_source: One of ``constants.DRAFT_SOURCES``.

    Returns:
        The plan. The probe may have run for it.
    """
    planner = _Planner(pair, requests, num_draft_tokens, exactness, draft_source)
    plan = replace(planner.plan(), look_ahead=can_look_ahead(pair))
    if pair.ranks is not None:
        plan = _agreed_plan(pair.ranks, plan)
    has_text = LOOKUP in pair.draft_sources(draft_source) and not plan.why_plain
    return replace(plan, has_text=has_text)


def _agreed_plan(ranks: Ranks, plan: Plan) -> Plan:
    """Rank 0's, where ranks would not plan alike: each has clocks of its own."""
    look_ahead, why_plain = ranks.share([plan.look_ahead, plan.why_plain])
    route = agreed_route(ranks, plan.route)
    return replace(plan, route=route, why_plain=why_plain, look_ahead=look_ahead)


def make_batch_plan(
    pair: Pair,
    *,
    num_draft_tokens: int | None,
    draft_source: str = AUTO,
) -> Plan:
    """Plan the rounds of requests that join and leave.

    Nothing is compared with plain decoding: kernels may change with the number of
    rows, which is another one at every moment.

    Args:
        pair: Target and drafter.
        num_draft_tokens: Checked K; None for the controllers' choice.
        draft_source: One of ``constants.DRAFT_SOURCES``.
    """
    look_ahead = can_look_ahead(pair)
    if why_plain := _why_plain(pair, num_draft_tokens, draft_source):
        route = replace(PLAIN, pads_prompts=True)
        return Plan(DraftPolicy(0), route, why_plain, look_ahead=look_ahead)
    route = replace(ANY_ROUTE, state=_ROWS_CHANGE)
    policy = _draft_policy(pair, route, num_draft_tokens)
    has_text = LOOKUP in pair.draft_sources(draft_source)
    return Plan(policy, route, look_ahead=look_ahead, has_text=has_text)


def can_look_ahead(pair: Pair) -> bool:
    """Whether a round may be queued behind another one, and none copies its caches.

    Only limits of the user's own can stand against it; they win.
    """
    limits = command_buffer_limits(str(mx.device_info().get("architecture")))
    if limits is None or gpu() != "metal":
        return True
    model = text_model(pair.target)
    flat: Any = tree_flatten(model.parameters())
    sizes = [array.nbytes for _, array in flat]
    found = num_buffers(sizes, len(model.layers), Limits(*limits))
    if found >= LEAST_BUFFERS:
        return True
    _tell_of_buffers(found, *limits)
    return False


@cache
def _tell_of_buffers(num_buffers: int, operations: int, megabytes: int) -> None:
    """Say once why rounds are not queued ahead."""
    logger.warning(
        "rounds are not queued ahead: MLX_MAX_OPS_PER_BUFFER and "
        "MLX_MAX_MB_PER_BUFFER (%d, %d) must let a round fill %d command buffers, or "
        "it may copy its caches: it fills %d. Lower one of them.",
        operations,
        megabytes,
        LEAST_BUFFERS,
        num_buffers,
    )


def _why_plain(pair: Pair, num_draft_tokens: int | None, draft_source: str) -> str:
    """Why requests decode plainly whatever the machine does, in words."""
    if not pair.draft_sources(draft_source):
        return pair.drafter_source or _NO_DRAFTER
    return "num_draft_tokens is 0" if num_draft_tokens == 0 else ""


def _draft_policy(
    pair: Pair, route: Route, num_draft_tokens: int | None
) -> DraftPolicy:
    """The choice of the pair's controllers, or a fixed number for them to learn."""
    calibration = pair.calibration

    def controller(num_seats: int, rule: str, context: int) -> DraftLengthController:
        return calibration.controller(
            rule, num_rows=num_seats, min_rows=route.min_rows, context=context
        )

    learning = Learning(
        controller, calibration.setups, calibration.lock, keep=calibration.save
    )
    return DraftPolicy(num_draft_tokens, learning=learning)


class _Planner:
    """Makes one plan."""

    def __init__(
        self,
        pair: Pair,
        requests: Sequence[Request],
        num_draft_tokens: int | None,
        exactness: str,
        draft_source: str,
    ) -> None:
        self._pair = pair
        self._requests = requests
        self._rule = joined_rules(sorted({r.accept_rule for r in requests}))
        self._num_draft_tokens = num_draft_tokens
        self._exactness = exactness
        self._draft_source = draft_source
        self._probe_s = 0.0

    def plan(self) -> Plan:
        """Choose the route, then who chooses the drafts."""
        why_plain = _why_plain(self._pair, self._num_draft_tokens, self._draft_source)
        route = self._route(is_plain=bool(why_plain))
        if not self._sources:
            return Plan(DraftPolicy(0), route, why_plain, self._probe_s)
        if not why_plain and not route.has_drafts:
            why_plain = route.state
        policy = _draft_policy(self._pair, route, self._num_draft_tokens)
        if self._num_draft_tokens is None:
            return Plan(policy, route, why_plain, self._probe_s, self._early_start)
        if self._num_draft_tokens not in route.allowed and route.has_drafts:
            used = max(k for k in route.allowed if k <= self._num_draft_tokens)
            note = f"{used} drafts in place of {self._num_draft_tokens}, not proved"
            route = replace(route, state=f"{route.state}; {note}")
            why_plain = "" if used else note
        return Plan(policy, route, why_plain, self._probe_s, self._early_start)

    @property
    def _early_start(self) -> EarlyStart:
        return self._pair.calibration.early_start(len(self._requests))

    def _route(self, *, is_plain: bool) -> Route:
        """How the rounds are run."""
        if not any(request.has_one_text for request in self._requests):
            return PLAIN if is_plain else replace(ANY_ROUTE, state=_NO_TEXT)
        if is_plain and self._exactness != "exact":
            return PLAIN
        if self._exactness == "fast":
            return inexact_route("exactness is set to fast")
        verdict = self._verdict()
        if verdict is None:
            return inexact_route(self._why_no_verdict())
        first, second = exact_routes(verdict)
        if self._shares_growth():
            return self._failed(first, _SHARED_GROWTH)
        if not first.has_drafts:
            return self._failed(first, _NO_DRAFTS)
        is_free = self._exactness == AUTO and self._num_draft_tokens is None
        if is_free and first.min_rows > second.min_rows:
            return self._faster(first, second)
        return first

    def _failed(self, route: Route, reason: str) -> Route:
        """Where equal bytes cannot be had: no drafts, or drafts that say so."""
        if self._exactness == "exact":
            logger.warning("decoding without drafts: %s", reason)
            return replace(route, allowed=(0,), state=reason)
        return inexact_route(reason, max_difference=route.max_difference)

    def _faster(self, filled: Route, unfilled: Route) -> Route:
        """The faster of two routes that were proved."""
        is_unfilled = self._pair.calibration.prefers_unfilled(
            self._rule,
            num_rows=len(self._requests),
            filled=filled,
            unfilled=unfilled,
            sources=self._sources,
        )
        if not is_unfilled:
            return filled
        if unfilled.has_drafts:
            return unfilled
        return replace(unfilled, state="plain decoding: rounds with drafts were slower")

    @property
    def _sources(self) -> tuple[str, ...]:
        """Where drafts may come from."""
        return self._pair.draft_sources(self._draft_source)

    def _shares_growth(self) -> bool:
        """Whether slabs would grow for a row at a place that hangs on another's K."""
        is_endless = any(request.max_tokens is None for request in self._requests)
        return len(self._requests) > 1 and is_endless

    def _verdict(self) -> Verdict | None:
        """The probe's verdict; it runs where there is none yet."""
        start = time.perf_counter()
        is_known = self._pair.calibration.verdict(len(self._requests)) is not None
        budget_s = None if self._exactness == "exact" else _PROBE_BUDGET_S
        verdict = verdict_of(self._pair, len(self._requests), budget_s=budget_s)
        if not is_known:
            self._probe_s = time.perf_counter() - start
        return verdict

    def _why_no_verdict(self) -> str:
        is_given_up = self._pair.calibration.has_given_up_probe(len(self._requests))
        return _TOO_LONG if is_given_up else _UNFINISHED


def verdict_of(pair: Pair, num_rows: int, *, budget_s: float | None) -> Verdict | None:
    """The probe's verdict for a number of rows; it is reached once per machine.

    Args:
        pair: Target and drafter.
        num_rows: Rows of the batch.
        budget_s: Longest time for a probe, seconds; None for any. What it compares
            until then is kept, here and on disk, and the next one goes on from there.

    Returns:
        The verdict; None where the probe has not come to its end, or does not fit in
        memory.

    Raises:
        RuntimeError: It does not fit in memory, where there is no budget.
        KernelError: A kernel may have failed; MLX has taken its place.
    """
    if pair.ranks is not None:
        return _verdict_of_all(pair, pair.ranks, num_rows)
    calibration = pair.calibration
    verdict = calibration.verdict(num_rows)
    if verdict is not None or (budget_s and calibration.has_given_up_probe(num_rows)):
        return verdict
    # Weights that were loaded lazily would be read anew in every pass.
    mx.eval(pair.target.parameters())
    with calibration.probing, pair.wired():
        return calibration.verdict(num_rows) or _probed(
            pair.rounds,
            calibration,
            num_rows,
            budget_s,
            calibration.compared(num_rows),
        )


def _verdict_of_all(pair: Pair, ranks: Ranks, num_rows: int) -> Verdict | None:
    """The verdict for a target on several machines: a probe goes on to its end.

    Where it stops, or goes on from, would hang on each machine's clock and store.
    """

    def probed() -> Verdict | None:
        waiting = partial(ranks.exchange, "the probe", FIRST_S)
        with calibration.probing, pair.wired():
            return _probed(
                pair.rounds, calibration, num_rows, None, Compared(), waiting=waiting
            )

    calibration = pair.calibration
    verdict = agreed_verdict(ranks, calibration.verdict(num_rows), probed)
    if verdict is not None:
        calibration.keep_verdict(num_rows, verdict)
    return verdict


def _probed(
    rounds: Rounds,
    calibration: Calibration,
    num_rows: int,
    budget_s: float | None,
    compared: Compared,
    waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Verdict | None:
    """Go on with the probe; see ``verdict_of``."""
    logger.info(
        "checking, once on this machine, which rounds give plain decoding's bytes"
    )
    num_passes, verdict = compared.num_passes, None
    try:
        with rounds.watched():
            verdict = probe(
                rounds,
                num_rows=num_rows,
                budget_s=budget_s,
                compared=compared,
                waiting=waiting,
            )
    except RuntimeError as error:  # what MLX raises where memory is short
        if budget_s is None:
            raise
        logger.warning("the check was given up: %s", error)
        calibration.give_up_probe(num_rows)
    finally:  # also where it was interrupted
        if verdict is not None:
            calibration.keep_verdict(num_rows, verdict)
        elif compared.equal:
            calibration.save()
    if verdict is None and compared.num_passes - num_passes <= TIMING_PASSES:
        calibration.give_up_probe(num_rows)
    return verdict
