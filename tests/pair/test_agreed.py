"""What ranks agree on before the first round; the ranks only say what they hear."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_gemma_mtp.drafting.policy import DraftPolicy
from mlx_gemma_mtp.engine.request import Request
from mlx_gemma_mtp.engine.route import PLAIN, Route
from mlx_gemma_mtp.errors import RanksError, RequestError
from mlx_gemma_mtp.exactness.verdict import Verdict
from mlx_gemma_mtp.pair import planning
from mlx_gemma_mtp.pair.agreed import (
    agreed_requests,
    agreed_route,
    agreed_verdict,
    check_request,
)
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.tiny import new_pair


def hearing(shared: Any, gathered: Any = None) -> Any:
    """Rank 1, which hears these; what rank 0 says is JSON."""
    return SimpleNamespace(
        rank=1,
        share=lambda _: json.loads(json.dumps(shared)),
        gather=lambda own: json.loads(json.dumps([gathered, own])),
    )


def saying() -> tuple[Any, list[Any]]:
    """Rank 0, which hears what it says; and what that is."""
    said: list[Any] = []

    def share(own: Any) -> Any:
        said.append(json.loads(json.dumps(own)))
        return said[-1]

    return SimpleNamespace(rank=0, size=2, share=share), said


def verdict(
    one_row: tuple[int, ...], two_rows: tuple[int, ...], most: float
) -> Verdict:
    return Verdict({1: one_row, 2: two_rows}, most, 1.5, 10, 2.0)


def test_a_request_of_rank_0_comes_whole():
    """All that is data is rank 0's, a seed of its own too."""
    sampling = SamplingParams(temp=0.7, top_k=9, xtc_special_tokens=(1, 2))
    request = Request(
        [5, 6],
        7,
        sampling,
        frozenset((1, 106)),
        num_logprobs=3,
        max_draft_tokens=2,
        draft_source="lookup",
        history=(4,),
        cached=(3,),
    )
    ranks, said = saying()
    ((first,), _) = agreed_requests(ranks, [request], [4, "auto"])
    assert first.sampling.seed is not None
    ((other,), settings) = agreed_requests(
        hearing(said[0]), [Request([8], None)], [0, "drafter"]
    )
    assert other == first
    assert settings == [4, "auto"]


def test_a_plan_is_rank_0s(monkeypatch):
    """Also where this rank would decode plainly: whether there is a text shows it."""
    pair = new_pair()
    asked: dict[str, Any] = {"num_draft_tokens": None, "exactness": "fast"}
    pair.ranks, said = saying()
    first = planning.make_plan(pair, [Request([5, 6], 7)], **asked)
    assert first.has_text
    plain = planning.Plan(DraftPolicy(0), PLAIN, "rounds with drafts were slower")
    monkeypatch.setattr(planning._Planner, "plan", lambda self: plain)
    heard = iter(said)
    monkeypatch.setattr(pair.ranks, "share", lambda _: next(heard))
    found = planning.make_plan(pair, [Request([5, 6], 7)], **asked)
    assert (found.route, found.why_plain, found.has_text) == (first.route, "", True)


def test_other_numbers_of_texts():
    with pytest.raises(RanksError, match="same texts: got 2 on rank 1, 1 on rank 0"):
        agreed_requests(hearing([[{}], []]), [Request([1], 1)] * 2, [])


def test_functions_are_refused():
    with pytest.raises(RequestError, match="without logits processors, sampler and"):
        check_request(Request([1], 1, sampler=lambda logprobs: logprobs))
    check_request(Request([1], 1))


def test_a_route_is_that_of_rank_0():
    route = Route(2, (0, 1, 3), True, False, 0.5, "proved")
    shared = {**vars(route), "allowed": list(route.allowed)}
    assert agreed_route(hearing(shared), Route()) == route


def test_what_rank_0_knows_needs_no_probe():
    known = verdict((1, 2), (3,), 0.25)
    found = agreed_verdict(hearing(known.to_dict()), None, probed=pytest.fail)
    assert found == known


def test_only_what_every_rank_has_found_counts():
    first, own = verdict((1, 2, 4), (1, 2), 0.5), verdict((2, 4, 8), (), 0.75)
    ranks = hearing(None, first.to_dict())
    found = agreed_verdict(ranks, own, probed=lambda: own)
    assert found == verdict((2, 4), (), 0.75)


def test_a_rank_that_found_nothing():
    found = agreed_verdict(hearing(None, None), None, lambda: verdict((1,), (), 0.0))
    assert found is None
