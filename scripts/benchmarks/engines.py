"""Engines: ways to decode, each a name, a kind and settings.

What an engine must do stands in ``step``; how fast it is, is measured elsewhere.
Nothing here ends at an end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.sample_utils import make_sampler

from mlx_gemma_mtp.constants import DRAFTER
from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.engine.route import check_mode
from mlx_gemma_mtp.engine.stats import RoundStats
from mlx_gemma_mtp.errors import MTPError
from mlx_gemma_mtp.generation.requests import drafts_of
from mlx_gemma_mtp.generation.settings import check_num_draft_tokens
from mlx_gemma_mtp.pair.load import load_pair
from mlx_gemma_mtp.pair.pair import Pair
from mlx_gemma_mtp.pair.planning import make_plan
from mlx_gemma_mtp.sampling.params import SamplingParams

from .models import ModelSpec
from .scripted import scripted_rounds
from .step import Engine, Step, UnavailableError
from .vlm import MlxVlm

AUTO = "auto"  # of drafts: this package chooses their number while it decodes
MLX_LM, OURS, TWO_MODEL, MLX_VLM = "mlx-lm", "ours", "two-model", "mlx-vlm"
# Settings of sampling, names as in mlx-lm; "sampled" is what Gemma's cards recommend.
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temp": 1.0, "top_p": 0.95, "top_k": 64},
}
_TWO_MODEL_BITS = 4
_GROUP_SIZES = (64, 32)


@dataclass(frozen=True)
class EngineSpec:
    """An engine to make.

    Attributes:
        kind: One of the constants above.
        num_draft_tokens: Drafts per round, 0 for plain decoding, or ``AUTO``.
        acceptance: How often a draft is to be accepted whatever models say; None for
            what they say.
        use_compile: Whether this package's rounds are compiled.
        exactness: What this package's text must be, one of ``constants.MODES``.
        draft_path: The small model of a two-model engine; None for the target itself,
            quantized.
    """

    kind: str
    num_draft_tokens: int | str = 0
    acceptance: float | None = None
    use_compile: bool = True
    exactness: str = AUTO
    draft_path: str | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        count = self.num_draft_tokens
        drafts = "auto" if count == AUTO else f"K = {count}"
        if self.kind == OURS:
            name = "plain, K = 0" if count == 0 else f"drafting, {drafts}"
            name += "" if self.acceptance is None else f", p = {self.acceptance:g}"
            name += "" if self.exactness == AUTO else f", {self.exactness}"
            return name if self.use_compile else f"{name}, not compiled"
        names = {MLX_LM: "mlx-lm", TWO_MODEL: "mlx-lm two-model", MLX_VLM: "mlx-vlm"}
        return names[self.kind] + (f", {drafts}" if count else "")


def make_engine(spec: EngineSpec, pair: Pair, model: ModelSpec) -> Engine:
    """Make an engine of a loaded pair.

    Raises:
        UnavailableError: It cannot be made, and why.
    """
    if spec.kind == OURS:
        return OwnEngine(pair, spec)
    if spec.kind == MLX_LM:
        return MlxLm(pair.target)
    if spec.acceptance is not None:
        raise UnavailableError("only this package's drafts can be accepted by coin")
    if spec.kind == TWO_MODEL:
        return TwoModel(pair, spec)
    return MlxVlm(model, int(spec.num_draft_tokens))


class OwnEngine:
    """This package, plain or with its drafter."""

    def __init__(self, pair: Pair, spec: EngineSpec) -> None:
        # A pair of its own: what it learns must not be known to another engine.
        self._pair = Pair(pair.target, pair.drafter)
        self.is_adaptive = spec.num_draft_tokens == AUTO
        self._exactness = spec.exactness
        try:
            check_num_draft_tokens(spec.num_draft_tokens)
            check_mode(spec.exactness)
            self._count = drafts_of(pair, spec.num_draft_tokens)
        except MTPError as error:
            raise UnavailableError(str(error)) from None
        self._rounds, self._source = self._pair.rounds, AUTO
        if spec.acceptance is not None:
            self._source = DRAFTER  # whose drafts the coins are for
            self._rounds = scripted_rounds(
                self._rounds, spec.acceptance, use_compile=spec.use_compile
            )
        elif not spec.use_compile:
            self._rounds = Rounds(self._rounds.target, pair.drafter, use_compile=False)

    def steps(
        self, prompts: list[list[int]], max_tokens: int, sampling: dict[str, Any]
    ) -> Iterator[Step]:
        """Decode prompts together."""
        params = SamplingParams(**sampling)
        requests = [Request(prompt, max_tokens, params) for prompt in prompts]
        plan = make_plan(
            self._pair,
            requests,
            num_draft_tokens=self._count,
            exactness=self._exactness,
            draft_source=self._source,
        )
        decoder = Decoder(
            self._rounds,
            requests,
            num_draft_tokens=plan.draft_policy,
            route=plan.route,
            has_text=plan.has_text,
        )
        before = RoundStats()
        with self._pair.wired(), closing(decoder.run()) as rounds:
            for emissions in rounds:
                stats = decoder.stats
                yield Step(
                    sum(len(emission.tokens) for emission in emissions),
                    stats.rounds - before.rounds,
                    stats.drafted - before.drafted,
                    stats.accepted - before.accepted,
                )
                before = RoundStats(stats.rounds, stats.drafted, stats.accepted)


class MlxLm:
    """mlx-lm's ``generate_step``, and its ``BatchGenerator`` for several prompts."""

    is_adaptive = False

    def __init__(self, target: nn.Module) -> None:
        self._target = target

    def steps(
        self, prompts: list[list[int]], max_tokens: int, sampling: dict[str, Any]
    ) -> Iterator[Step]:
        """Decode prompts together."""
        sampler = make_sampler(**sampling)
        if len(prompts) > 1:
            yield from self._batch(prompts, max_tokens, sampler)
            return
        tokens = generate_step(
            mx.array(prompts[0]), self._target, max_tokens=max_tokens, sampler=sampler
        )
        for number, _ in enumerate(tokens):
            yield Step(1, rounds=int(number > 0))

    def _batch(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        sampler: Callable[[mx.array], mx.array],
    ) -> Iterator[Step]:
        generator = BatchGenerator(self._target, sampler=sampler)
        generator.insert(prompts, [max_tokens] * len(prompts))
        is_first = True
        while responses := generator.next_generated():
            yield Step(len(responses), rounds=0 if is_first else len(responses))
            is_first = False
        generator.close()


class TwoModel:
    """mlx-lm's ``speculative_generate_step`` with a small model of the same kind."""

    is_adaptive = False

    def __init__(self, pair: Pair, spec: EngineSpec) -> None:
        self._target = pair.target
        self._count = int(spec.num_draft_tokens)
        if spec.draft_path is not None:
            try:
                self._draft = load_pair(spec.draft_path, False).target
            except MTPError as error:
                raise UnavailableError(str(error)) from None
        else:
            self._draft = quantized_copy(pair.target)

    def steps(
        self, prompts: list[list[int]], max_tokens: int, sampling: dict[str, Any]
    ) -> Iterator[Step]:
        """Decode one prompt."""
        if len(prompts) > 1:
            raise UnavailableError("speculative_generate_step takes one prompt")
        tokens = speculative_generate_step(
            mx.array(prompts[0]),
            self._target,
            self._draft,
            num_draft_tokens=self._count,
            max_tokens=max_tokens,
            sampler=make_sampler(**sampling),
        )
        emitted = in_round = 0
        for _, _, from_draft in tokens:
            in_round += 1
            is_last = emitted + in_round == max_tokens
            if from_draft and not is_last:
                continue
            drafted = min(self._count, max_tokens - emitted)
            yield Step(in_round, 1, drafted, in_round - (not from_draft))
            emitted, in_round = emitted + in_round, 0


def quantized_copy(target: nn.Module) -> nn.Module:
    """The same model in 4 bits, which shares what is not quantized.

    Raises:
        UnavailableError: It is quantized already.
    """
    flat: Any = tree_flatten(target.parameters())
    if any(name.endswith(".scales") for name, _ in flat):
        raise UnavailableError(
            "no small model: the target is quantized already. Name one with "
            "--two-model-draft."
        )
    make: Any = type(target)
    copy: nn.Module = make(target.args)
    copy.update(tree_map(lambda array: array, target.parameters()))
    copy.eval()

    def chosen(path: str, module: nn.Module) -> bool | dict[str, int]:
        weight = module.get("weight") if hasattr(module, "to_quantized") else None
        for size in _GROUP_SIZES:
            if weight is not None and weight.shape[-1] % size == 0:
                return {"bits": _TWO_MODEL_BITS, "group_size": size}
        return False

    nn.quantize(copy, class_predicate=chosen)
    mx.eval(copy.parameters())
    return copy
