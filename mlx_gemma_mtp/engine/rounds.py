"""A round: draft K tokens, verify K + 1 rows, accept a prefix, commit.

The round is one lazily evaluated graph whose state stays on the device: the next round
can be queued before the host has read this one's report. Shapes are fixed by (B, K,
capacity), so the whole round is one compiled function per K. Plain decoding is the same
round with K = 0. Where the host decides rows, the compiled function ends before the
commit, which then follows by itself.

It knows nothing of text, tokenizers, files or of when to stop: see decoder.py.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx

from ..cache.masks import draft_masks
from ..errors import KernelError, MTPError, described, is_of_others
from ..matmuls.choices import STOCK, Choices
from ..models.drafter import SharedKV
from ..models.target import Target, TargetOutput
from ..sampling.acceptance import Accepted, Draft, accept_block, cut
from ..sampling.decision import Verification, decide, joined, propose
from ..sampling.graph import SamplingGraph
from .model_arrays import ArraysChangedError, CompiledFunction, ModelArrays
from .model_types import DrafterLike, TargetLike
from .state import Report, RoundState, RowSettings, Verified
from .traces import Traces

_Models = tuple[TargetLike, DrafterLike | None]
CompiledRound = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class _Shape:
    """What shapes the graph of a round, beside the shapes of its arrays."""

    num_draft_tokens: int
    min_rows: int
    graph: SamplingGraph


class Rounds:
    """Runs rounds of one target with one drafter.

    Args:
        target: The target.
        drafter: Its drafter; None allows only K = 0.
        verification: How drafts that were drawn from a distribution are judged.
        use_compile: Whether rounds go through ``mx.compile``.
        arrays: The arrays of both, which compiled rounds then read anew every time;
            None for models whose arrays never change.
        traces: Where compiled rounds are kept: for engines that differ in nothing.
        on_failure: Called where a round with a kernel of few rows has failed.
    """

    def __init__(
        self,
        target: TargetLike,
        drafter: DrafterLike | None = None,
        *,
        verification: Verification = accept_block,
        use_compile: bool = True,
        arrays: ModelArrays | None = None,
        traces: Traces[CompiledRound] | None = None,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.use_compile = use_compile
        self._verification = verification
        self._arrays = arrays
        self._model_arrays: list[mx.array] | None = None  # while something decodes
        self._traces: Traces[CompiledRound] = Traces() if traces is None else traces
        self._on_failure = on_failure

    def with_drafter(self, drafter: DrafterLike) -> Rounds:
        """The same target with another drafter, whose rounds are traced anew."""
        return Rounds(
            self.target,
            drafter,
            verification=self._verification,
            use_compile=self.use_compile,
            arrays=None if self._arrays is None else self._arrays.of_target(),
        )

    def refresh(self) -> list[mx.array]:
        """Let rounds follow weights that were exchanged, quantized or given adapters.

        Those that were changed in place need no word.

        Returns:
            The models' arrays that rounds read from now on.
        """
        if self._arrays is None:
            return []
        arrays, structure = self._arrays.read()
        self._traces.fit(structure)
        self._model_arrays = arrays
        return arrays

    @property
    def choices(self) -> Choices:
        """Which matrices the kernel of few rows multiplies."""
        return STOCK if self._arrays is None else self._arrays.choices

    def use(self, choices: Choices) -> None:
        """Multiply from now on as these say.

        Engines whose arrays never change multiply by MLX alone.
        """
        if self._arrays is not None and choices != self.choices:
            self._arrays = self._arrays.using(choices)
            self._model_arrays = None

    def own(self) -> Rounds:
        """These rounds for one decoder: ``use`` by others does not change its bytes."""
        own = copy(self)
        self.let_go()
        return own

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around what evaluates rounds.

        One that fails has lost its slabs. A kernel of few rows in it may be the reason:
        MLX takes its place from now on.

        Raises:
            KernelError: So it was.
        """
        try:
            yield
        except (RuntimeError, ValueError) as error:  # MLX's, of kernels and launches
            if not self.choices or isinstance(error, MTPError) or is_of_others(error):
                raise
            self.use(STOCK)
            if self._on_failure is not None:
                self._on_failure()
            raise KernelError(
                "a round must run: a kernel of this package may have failed on this "
                f"machine: {described(error)}. Ask again: MLX's own take its place."
            ) from error

    def let_go(self) -> None:
        """Keep no weights alive that the models drop; the next round reads them anew.

        Rounds of others may go on meanwhile.
        """
        self._model_arrays = None

    def is_ready(
        self,
        graph: SamplingGraph,
        *,
        num_draft_tokens: int,
        min_rows: int,
        num_rows: int,
        capacity: int,
    ) -> bool:
        """Whether such a round has run before: the first one is traced and compiled."""
        shape = _Shape(num_draft_tokens, min_rows, graph)
        return self._key(shape, num_rows, capacity) in self._traces

    def run(
        self,
        state: RoundState,
        settings: RowSettings,
        *,
        num_draft_tokens: int,
        min_rows: int = 1,
    ) -> tuple[RoundState, Report]:
        """Queue one round; nothing is evaluated here.

        The caller must drop its own reference to ``state`` before anything is
        evaluated: only then are the slabs written in place.

        Args:
            state: The state after the round before.
            settings: Each row's settings.
            num_draft_tokens: K, the same for all rows.
            min_rows: The target verifies no fewer rows; repetitions of the last token
                fill them, and what they give is dropped.

        Returns:
            The new state and the round's report.
        """
        assert not settings.graph.has_host  # see verify
        shape = _Shape(num_draft_tokens, min_rows, settings.graph)
        found = self._call(shape, state, settings)
        return RoundState(**found["state"]), Report.of_named(found["report"])

    def verify(
        self,
        state: RoundState,
        settings: RowSettings,
        *,
        num_draft_tokens: int,
        min_rows: int = 1,
    ) -> tuple[Verified, Report]:
        """Queue a round up to its commit, for the host to decide rows in between.

        Arguments and what the caller must do are as for ``run``.
        """
        assert settings.graph.has_host
        shape = _Shape(num_draft_tokens, min_rows, settings.graph)
        found = self._call(shape, state, settings)
        verified = Verified(**found["verified"], before=replace(state, slabs=[]))
        return verified, Report.of_named(found["report"])

    def commit(
        self, verified: Verified, settings: RowSettings, *, accepted: Accepted
    ) -> RoundState:
        """End a round that ``verify`` has begun; nothing is evaluated here.

        Args:
            verified: The round.
            settings: Each row's settings.
            accepted: What every row's rule has decided, the host's or the graph's.
        """
        return _committed(
            replace(verified.before, slabs=verified.slabs),
            verified.hidden,
            accepted,
            settings.is_active,
        )

    def draft(
        self, state: RoundState, settings: RowSettings, *, num_draft_tokens: int
    ) -> mx.array:
        """Only the drafts of the round that would follow, int32 [B, K]."""
        models: _Models = self.target, self.drafter
        if self.choices:  # as the round would
            arrays = self._model_arrays or self.refresh()
            models = self._bound(arrays, arrays)
        draft = _draft(*models, self._verification, state, settings, num_draft_tokens)
        return draft.tokens

    def _call(
        self, shape: _Shape, state: RoundState, settings: RowSettings
    ) -> dict[str, Any]:
        """Queue the round of a shape; it is traced where this thread has not run it.

        It ends before the commit where there are rows that the host decides.
        """
        num_rows, capacity = (
            state.last_token.shape[0],
            self.target.layout.capacity(state.slabs),
        )
        key = self._key(shape, num_rows, capacity)
        model_arrays = self._model_arrays
        if model_arrays is None or key not in self._traces:
            model_arrays = self.refresh()  # before: traces of other layers go with it
        compiled = self._traces.get(key)
        if compiled is None:
            compiled = self._traces.add(key, self._made(shape))
        while True:
            try:
                return compiled(
                    partial(self._bound, model_arrays),
                    model_arrays,
                    vars(state),
                    settings.named,
                )
            except ArraysChangedError:  # by another thread, since they were read
                model_arrays = self.refresh()

    def _key(self, shape: _Shape, num_rows: int, capacity: int) -> Hashable:
        """What a trace depends on; MLX traces anew for every stream."""
        stream = str(mx.default_stream(mx.default_device()))
        return shape, num_rows, capacity, self.choices.digest, stream

    def _made(self, shape: _Shape) -> CompiledRound:
        """The round of a shape, for this thread to call."""
        function = partial(_round, self._verification, shape)
        if self.use_compile:
            return CompiledFunction(function)
        return lambda bind, models, *arrays: function(bind(models), *arrays)

    def _bound(self, arrays: list[mx.array], inputs: list[mx.array]) -> _Models:
        """The models, with a compiled round's inputs in place of their arrays."""
        if self._arrays is None:
            return self.target, self.drafter
        assert isinstance(self.target, Target)
        lm, drafter = self._arrays.bound(arrays, inputs)
        return self.target.over(lm), self.drafter if drafter is None else drafter


def _round(
    verification: Verification,
    shape: _Shape,
    models: _Models,
    state_arrays: dict[str, Any],
    settings_arrays: dict[str, Any],
) -> dict[str, Any]:
    """One round on arrays by name, as ``mx.compile`` takes and gives them.

    Returns:
        The report, and the next state; where the host has rows to decide, what was
        verified in its place.
    """
    (target, drafter), graph = models, shape.graph
    num_draft_tokens = shape.num_draft_tokens
    state = RoundState(**state_arrays)
    settings = RowSettings.of_named(graph, settings_arrays)

    # 1) draft
    draft = _draft(target, drafter, verification, state, settings, num_draft_tokens)

    # 2) verify: row i judges draft i, row K yields the bonus token
    block = state.last_token
    if num_draft_tokens:
        block = mx.concatenate([block, draft.tokens], axis=1)  # [B, K + 1]
    output = _verify(target, block, state, settings, min_rows=shape.min_rows)

    # 3) accept
    accepted = decide(
        draft,
        output.logits,
        settings.sampling,
        graph=graph,
        offset=state.offset,
        verification=verification,
    )
    if graph.has_max_drafts:
        accepted = cut(draft.tokens, accepted, settings.max_drafts)
    report = Report.of(draft.tokens, accepted, output.logits, graph).named
    if graph.has_host:
        verified = {"slabs": output.slabs, "hidden": output.hidden}
        return {"verified": verified, "report": report}

    # 4) commit
    written = replace(state, slabs=output.slabs)
    committed = _committed(written, output.hidden, accepted, settings.is_active)
    return {"state": vars(committed), "report": report}


def _verify(
    target: TargetLike,
    block: mx.array,
    state: RoundState,
    settings: RowSettings,
    *,
    min_rows: int,
) -> TargetOutput:
    """The target's forward over a block [B, K + 1], of ``min_rows`` rows or more.

    What fills it up is the last token of the block (a mixture then reads no other
    experts). Its keys lie past the next offset, whatever is accepted.
    """
    num_rows = block.shape[1]
    if num_rows < min_rows:
        filling = mx.repeat(block[:, -1:], min_rows - num_rows, axis=1)
        block = mx.concatenate([block, filling], axis=1)
    output = target.verify(
        block, state.slabs, offset=state.offset, first_position=settings.first_position
    )
    if num_rows >= min_rows:
        return output
    return TargetOutput(
        output.logits[:, :num_rows], output.hidden[:, :num_rows], output.slabs
    )


def _committed(
    before: RoundState,
    hidden_rows: mx.array,  # [B, K + 1, H]
    accepted: Accepted,
    is_active: mx.array,
) -> RoundState:
    """The state after a round, over the slabs that it has written.

    Everything past the new offset is as if it were never written.
    """
    new_hidden = mx.take_along_axis(
        hidden_rows, accepted.num_accepted[:, None, None], axis=1
    )
    offset = before.offset + accepted.num_accepted + 1
    return RoundState(
        before.slabs,
        mx.where(is_active[:, None], accepted.next_token, before.last_token),
        mx.where(is_active[:, None, None], new_hidden, before.hidden),
        mx.where(is_active, offset, before.offset),
    )


def _draft(
    target: TargetLike,
    drafter: DrafterLike | None,
    verification: Verification,
    state: RoundState,
    settings: RowSettings,
    num_draft_tokens: int,
) -> Draft:
    """The drafter's proposals for the positions after the last token.

    The recurrence runs through the hidden state alone: keys, masks and position are
    the same for all steps.
    """
    if num_draft_tokens == 0 or drafter is None:
        return Draft(mx.zeros((state.last_token.shape[0], 0), dtype=mx.int32), None)
    shared_kv = _shared_kv(target, drafter, state, settings)
    token, hidden = state.last_token, state.hidden
    drafts = []
    for step in range(1, num_draft_tokens + 1):
        output = drafter(target.embed(token), hidden, shared_kv, position=state.offset)
        draft = propose(
            output.logits,
            settings.sampling,
            graph=settings.graph,
            offset=state.offset,
            step=step,
            token_ids=output.token_ids,
            verification=verification,
        )
        token, hidden = draft.tokens, output.hidden
        drafts.append(draft)
    return joined(drafts)


def _shared_kv(
    target: TargetLike,
    drafter: DrafterLike,
    state: RoundState,
    settings: RowSettings,
) -> dict[str, SharedKV]:
    """The slabs that the drafter reads in place, with their masks."""
    layout = target.layout
    sources = {kind: layout.source(kind) for kind in set(drafter.layer_types)}
    masks = draft_masks(
        layout,
        offset=state.offset,
        first_position=settings.first_position,
        capacity=layout.capacity(state.slabs),
    )
    return {
        kind: SharedKV(state.slabs[2 * i], state.slabs[2 * i + 1], masks[kind])
        for kind, i in sources.items()
    }
