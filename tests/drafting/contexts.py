"""Machines whose rounds take longer with every token of context, by the speed model.

What their attention costs is the estimate that priors are made of, or something else:
the controller must learn it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from mlx_gemma_mtp.drafting.chips import CHIPS
from mlx_gemma_mtp.drafting.prior import Prior
from mlx_gemma_mtp.drafting.speed_model import model, prior
from mlx_gemma_mtp.models.families import FAMILIES
from tests.drafting.simulator import DEPTH, PROCESSES, Machine

ARCHITECTURES = {
    "M1 Max": "applegpu_g13s",
    "M3 Max": "applegpu_g15s",
    "M5 Max": "applegpu_g17s",
}
WINDOW = 1024  # no family's sliding window is wider
ALL = range(DEPTH + 1)
# How often attention reads, over the estimate, by K.
ATTENTIONS = {
    "as estimated": lambda k: 1.0,
    "packed": lambda k: 0.8 / (1 + 0.15 * k),
    "hardly any": lambda k: 0.2,
    "half again": lambda k: 1.5,
    "steeper": lambda k: 1 + 0.1 * k,
    "once a row": lambda k: (1 + k) / (1 + 0.2 * k),
}


@dataclass(frozen=True)
class Costs:
    """What rounds take without a context, and for each of its tokens: plain rounds."""

    base: tuple[float, ...]
    keys: tuple[float, ...]

    def at(self, context):
        return [b + context * a for b, a in zip(self.base, self.keys, strict=True)]


def costs_of(chip, family, attention="as estimated"):
    speed = model(CHIPS[chip], FAMILIES[family], context=WINDOW)
    keys = [speed.key_s(k) for k in ALL]
    base = [speed.round_s(k) - WINDOW * keys[k] for k in ALL]
    return Costs(
        tuple(s / base[0] for s in base),
        tuple(s * ATTENTIONS[attention](k) / base[0] for k, s in enumerate(keys)),
    )


def prior_of(chip, family):
    return prior(ARCHITECTURES[chip], family, context=WINDOW)


def scaled_prior(chip, family, context):
    """What there was before: the shape at the first context stays whatever follows."""
    known = prior_of(chip, family)
    shapes = []
    for base, keys in (known.costs, known.verify):
        costs = [b + context * a for b, a in zip(base, keys, strict=True)]
        shapes.append(tuple(cost / costs[0] for cost in costs))
    return Prior(shapes[0], known.acceptance, shapes[1])


class LongMachine(Machine):
    """A machine and texts behind long prompts.

    Args:
        costs: What its rounds take.
        process: The text.
        is_told: Whether the controller is told the length of context.
        tracing: See ``Machine``.
        seed: See ``Machine``.
    """

    def __init__(self, costs, process, *, is_told=True, tracing=0, seed=0):
        super().__init__("flat", process, tracing=tracing, seed=seed)
        self.costs_at, self.is_told, self.prompt = costs, is_told, 0

    def cost(self, k, position):
        context = self.prompt + position
        return self.costs_at.base[k] + context * self.costs_at.keys[k]

    def told_context(self, position):
        return self.prompt + position if self.is_told else 0

    def serve(self, controller, requests):
        """Answer requests in one process, each a prompt's tokens and its text's.

        Returns:
            Tokens per second over those of the best K in every round, less 1. Tokens
            are expected ones: no luck counts.
        """
        tokens = expected_tokens(self.process)
        took, least = 0.0, 0.0
        for self.prompt, length in requests:
            took += self.run(controller, length)
            for position, k in self.chosen:
                now = self.costs_at.at(self.prompt + position)
                best = min(cost / t for cost, t in zip(now, tokens, strict=True))
                least += tokens[k] * best
        return least / took - 1


def expected_tokens(process):
    """Of rounds of K = 0..8, where a text is alike everywhere."""
    (rates, *_) = PROCESSES[process](None, 1)
    return [1.0, *(1 + sum(prod(rates[: i + 1]) for i in range(k)) for k in ALL[1:])]
