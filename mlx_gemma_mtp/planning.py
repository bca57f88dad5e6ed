"""What a request's rounds will be: how they are run, and how many drafts they have.

This is where ``num_draft_tokens`` and ``exactness`` of a request meet what is known of
the machine. It knows nothing of how rounds are run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from .draft_length import AdaptiveDraftLength, DraftLength, FixedDraftLength
from .pair import Pair
from .probe import probe
from .route import ANY_ROUTE, AUTO, PLAIN, Route, Verdict, exact_routes, inexact_route
from .row import Request
from .stats import joined_rules

logger = logging.getLogger("mlx_gemma_mtp")

# Longest probe that nobody asked for, seconds; on a GPU one takes 2 or 3.
_PROBE_BUDGET_S = 10.0
# Where nothing was measured: two steps of the logits' type where logits end (at 30).
_NEAR_TIES = {mx.bfloat16: 0.25, mx.float16: 0.03125}
_NEAR_TIE = 1e-4
_NO_TEXT = "sampled without a seed: the distribution is the target's for any K"


@dataclass(frozen=True)
class Plan:
    """What a decoder needs beside its requests.

    Attributes:
        draft_length: Who chooses the number of drafts.
        route: How rounds are run.
        why_plain: Why there are no drafts, in words; empty where there may be.
    """

    draft_length: DraftLength
    route: Route
    why_plain: str = ""


def make_plan(
    pair: Pair,
    requests: Sequence[Request],
    *,
    num_draft_tokens: int | None,
    exactness: str,
) -> Plan:
    """Plan the rounds of requests that are decoded together.

    Args:
        pair: Target and drafter.
        requests: At least one.
        num_draft_tokens: Checked K; None for the controller's choice.
        exactness: One of ``route.MODES``.

    Returns:
        The plan. The probe may have run for it.
    """
    why_plain = _why_plain(pair, num_draft_tokens)
    if why_plain:
        num_draft_tokens = 0
    route = _route(pair, requests, exactness, is_plain=bool(why_plain))
    if not route.has_drafts and not why_plain:
        why_plain = route.state
    if num_draft_tokens is not None:
        return Plan(FixedDraftLength(num_draft_tokens), route, why_plain)
    controller = pair.tuning.controller(
        _rule(requests),
        num_rows=len(requests),
        min_rows=route.min_rows,
        context=max(len(request.prompt) for request in requests),
    )
    draft_length = AdaptiveDraftLength(
        controller, setups=pair.tuning.setups, keep=pair.tuning.save
    )
    return Plan(draft_length, route, why_plain)


def _why_plain(pair: Pair, num_draft_tokens: int | None) -> str:
    """Why a request decodes plainly whatever the machine does, in words."""
    if pair.drafter is None:
        return pair.drafter_source or "the model has no drafter"
    return "num_draft_tokens is 0" if num_draft_tokens == 0 else ""


def _route(
    pair: Pair, requests: Sequence[Request], exactness: str, *, is_plain: bool
) -> Route:
    """How the rounds are run."""
    if all(request.rule == "block verification" for request in requests):
        return PLAIN if is_plain else replace(ANY_ROUTE, state=_NO_TEXT)
    if is_plain and (exactness != "exact" or pair.drafter is None):
        return PLAIN
    if exactness == "fast":
        return inexact_route(_near_tie(pair), "exactness is set to fast")
    verdict = verdict_of(
        pair, len(requests), budget_s=None if exactness == "exact" else _PROBE_BUDGET_S
    )
    if verdict is None:
        return inexact_route(
            _near_tie(pair),
            "the probe would take long on this machine; exactness set to exact runs it",
        )
    route = exact_routes(verdict)[0]
    if _shares_growth(requests, route):
        reason = "endless requests share slabs whose growth changes bytes"
        return _failed(exactness, route, verdict, reason)
    if not route.has_drafts:
        return _failed(exactness, route, verdict, route.state)
    if exactness == AUTO and route.min_rows > 1:
        return _fastest(pair, requests, route)
    return route


def _failed(exactness: str, route: Route, verdict: Verdict, reason: str) -> Route:
    """The route where equal bytes cannot be had: no drafts, or drafts and a count."""
    if exactness == "exact":
        logger.warning("decoding without drafts: %s", reason)
        return replace(route, allowed=(0,), state=reason)
    return inexact_route(2 * verdict.max_difference, reason)


def _fastest(pair: Pair, requests: Sequence[Request], route: Route) -> Route:
    """Plain decoding in place of a route whose plain rounds are filled up, or not."""
    is_plain = pair.tuning.is_plain_turn(
        _rule(requests), num_rows=len(requests), route=route
    )
    if not is_plain:
        return route
    return replace(PLAIN, state="plain decoding: rounds with drafts were slower")


def _shares_growth(requests: Sequence[Request], route: Route) -> bool:
    """Whether slabs would grow for one row at a place that depends on another's K."""
    is_endless = any(request.max_tokens is None for request in requests)
    return route.has_fixed_growth and len(requests) > 1 and is_endless


def verdict_of(pair: Pair, num_rows: int, *, budget_s: float | None) -> Verdict | None:
    """The probe's verdict for a number of rows; it runs at most once per machine.

    Args:
        pair: Target and drafter.
        num_rows: Rows of the batch.
        budget_s: Longest time for a probe, seconds; None for any.

    Returns:
        The verdict; None where the probe would take longer.
    """
    verdict = pair.tuning.verdict(num_rows)
    if verdict is None:
        logger.info(
            "checking, once on this machine, which rounds give plain decoding's bytes"
        )
        rounds = pair.rounds
        verdict = probe(
            rounds.target,
            num_rows=num_rows,
            use_compile=rounds.use_compile,
            budget_s=budget_s,
        )
        if verdict is not None:
            pair.tuning.keep_verdict(num_rows, verdict)
    return verdict


def _near_tie(pair: Pair) -> float:
    """What counts as a near tie: what was measured, else a guess by the type."""
    verdict = pair.tuning.verdict(1)
    if verdict is not None and verdict.max_difference:
        return 2 * verdict.max_difference
    return _NEAR_TIES.get(pair.rounds.target.layout.dtype, _NEAR_TIE)


def _rule(requests: Sequence[Request]) -> str:
    return joined_rules(request.rule for request in requests)
