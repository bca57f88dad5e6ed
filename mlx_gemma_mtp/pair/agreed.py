"""What several machines agree on before a request's first round: rank 0's choice.

Knows nothing of how rounds are run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import reduce
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from .._version import __version__
from ..distributed.ranks import Ranks
from ..engine.request import Request, settled
from ..engine.route import Route
from ..errors import RanksError, RequestError
from ..exactness.verdict import Verdict
from ..models.sharding import shard_of
from ..models.target import text_model
from ..sampling.params import SamplingParams
from .fingerprint import fingerprint
from .pair import Pair, named_arrays

_SHARED = (
    "prompt",
    "max_tokens",
    "num_logprobs",
    "max_draft_tokens",
    "draft_source",
    "history",
    "cached",
)


def check_same(ranks: Ranks, pair: Pair) -> None:
    """Check that all ranks have loaded the same, with the same programs.

    Raises:
        RanksError: They have not.
    """
    lm = text_model(pair.target)
    shard = shard_of(lm)
    assert shard is not None
    own = {
        "version of mlx_gemma_mtp": __version__,
        "version of mlx": version("mlx"),
        "target": f"{shard.seen.hexdigest()} {fingerprint(_whole(lm))}",
        "drafter": "none"
        if pair.drafter is None
        else fingerprint(named_arrays(pair.drafter)),
    }
    for rank, other in enumerate(ranks.gather(own)):
        for what, value in own.items():
            if other[what] != value:
                ranks.is_lost = True
                raise RanksError(
                    f"all ranks must have the same {what}: got another one on rank "
                    f"{rank} than on rank {ranks.rank}. Copy it to all machines."
                )


def _whole(lm: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a target that every rank has whole."""
    layers = [layer.input_layernorm.weight for layer in lm.layers]
    table = lm.model.embed_tokens.weight
    return [(str(i), array) for i, array in enumerate([table, *layers])]


def agreed_requests(
    ranks: Ranks, requests: Sequence[Request], settings: list[Any]
) -> tuple[list[Request], list[Any]]:
    """Rank 0's requests and settings of them, JSON values, on every rank.

    Raises:
        RanksError: The ranks ask for other numbers of texts.
    """
    own = [_plain(settled(request)) for request in requests]
    shared, settings = ranks.share([own, settings])
    if len(shared) != len(requests):
        raise RanksError(
            f"all ranks must ask for the same texts: got {len(requests)} on rank "
            f"{ranks.rank}, {len(shared)} on rank 0. Run one script on all ranks."
        )
    return [
        replace(request, **_fields(fields))
        for request, fields in zip(requests, shared, strict=True)
    ], settings


def check_request(request: Request) -> None:
    """Check that machines together can decode a request.

    Raises:
        RequestError: They cannot.
    """
    if request.is_host or request.constraint is not None:
        raise RequestError(
            "a text on several machines must be without logits processors, sampler and "
            "form: got one of them. Leave it out, or use one machine."
        )


def agreed_route(ranks: Ranks, route: Route) -> Route:
    """Rank 0's route."""
    shared = ranks.share(asdict(route))
    return Route(**{**shared, "allowed": tuple(shared["allowed"])})


def agreed_verdict(
    ranks: Ranks, known: Verdict | None, probed: Callable[[], Verdict | None]
) -> Verdict | None:
    """What all ranks can rely on.

    Args:
        ranks: All machines.
        known: What was found before; rank 0's counts.
        probed: Finds it out; all ranks do so together, or none.

    Returns:
        The numbers of drafts that gave equal bytes on every rank.
    """
    shared = ranks.share(None if known is None else known.to_dict())
    if shared is not None:
        return Verdict.from_dict(shared)
    own = probed()
    found = ranks.gather(None if own is None else own.to_dict())
    if None in found:
        return None
    return reduce(_joined, map(Verdict.from_dict, found))


def _joined(first: Verdict, other: Verdict) -> Verdict:
    """What two ranks found."""
    equal = {
        rows: tuple(k for k in drafts if k in other.equal[rows])
        for rows, drafts in first.equal.items()
    }
    largest = max(first.max_difference, other.max_difference)
    return replace(first, equal=equal, max_difference=largest)


def _plain(request: Request) -> dict[str, Any]:
    """What is said of a request to other ranks."""
    fields = {name: getattr(request, name) for name in _SHARED}
    ends = sorted(request.eos_token_ids)
    return {**fields, "sampling": asdict(request.sampling), "eos_token_ids": ends}


def _fields(shared: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request of what was said of it."""
    return {
        **shared,
        "sampling": SamplingParams(**shared["sampling"]),
        "eos_token_ids": frozenset(shared["eos_token_ids"]),
        "history": tuple(shared["history"]),
        "cached": tuple(shared["cached"]),
    }
