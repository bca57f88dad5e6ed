"""Runs rounds: draft K tokens, verify K + 1 rows, accept a prefix, commit.

The round is one lazily evaluated graph whose state stays on the device: the next round
can be queued before the host has read this one's report. Shapes are fixed by (B, K,
capacity), so the whole round is one compiled function per K. Plain decoding is the same
round with K = 0. Where rows have masks it is two functions, with the masks in between.
Where the host decides rows, it ends before the commit, which then follows by itself.

It knows nothing of text, tokenizers, files or of when to stop: see decoder.py.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

from ..constants import DRAFTER
from ..errors import KernelError, MTPError, described, is_of_others
from ..matmuls.choices import STOCK, Choices
from ..models.target import Target
from ..sampling.acceptance import accept_block
from ..sampling.decision import Verification
from ..sampling.graph import SamplingGraph
from .model_arrays import ArraysChangedError, CompiledFunction, ModelArrays
from .model_types import DrafterLike, TargetLike
from .round import Models, RoundShape, begin, draft, finish, whole
from .state import Begun, Proposals, Report, RoundState, RowSettings, Verified
from .traces import Traces

CompiledRound = Callable[..., dict[str, Any]]


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
        group: The machines that have a part of the target each; None for one.
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
        group: mx.distributed.Group | None = None,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.use_compile = use_compile
        self._verification = verification
        self._arrays = arrays
        self._model_arrays: list[mx.array] | None = None  # while something decodes
        self._traces: Traces[CompiledRound] = Traces() if traces is None else traces
        self._on_failure = on_failure
        self._group = group

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
        source: str = DRAFTER,
        text_size: int = 0,
    ) -> bool:
        """Whether such a round has run before: the first one is traced and compiled."""
        source = source if num_draft_tokens else DRAFTER
        shape = RoundShape(
            num_draft_tokens, min_rows, graph, source, text_size, self._group
        )
        parts = (begin, finish) if graph.has_masks else (whole,)
        keys = [self._key(part, shape, num_rows, capacity) for part in parts]
        return all(key in self._traces for key in keys)

    def run(
        self,
        state: RoundState,
        settings: RowSettings,
        *,
        num_draft_tokens: int,
        min_rows: int = 1,
        source: str = DRAFTER,
        word: mx.array | None = None,
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
            source: See ``RoundShape``.
            word: See control.py; None where there is one machine.

        Returns:
            The new state and the round's report.
        """
        assert not settings.graph.has_host  # see verify
        assert not settings.graph.has_masks  # see begin
        shape = _shape(state, settings, num_draft_tokens, min_rows, source)
        words = () if word is None else (word,)
        if words:
            shape = replace(shape, group=self._group)
        found = self._call_models(whole, shape, state, settings, *words)
        return RoundState(**found["state"]), Report.of_named(found["report"])

    def verify(
        self,
        state: RoundState,
        settings: RowSettings,
        *,
        num_draft_tokens: int,
        min_rows: int = 1,
        source: str = DRAFTER,
    ) -> tuple[Verified, Report]:
        """Queue a round up to its commit, for the host to decide rows in between.

        Arguments and what the caller must do are as for ``run``.
        """
        assert settings.graph.has_host
        assert not settings.graph.has_masks  # see begin
        shape = _shape(state, settings, num_draft_tokens, min_rows, source)
        found = self._call_models(whole, shape, state, settings)
        before = replace(state, slabs=[], text=found.get("text"))
        return Verified(**found["verified"], before=before), Report.of_named(
            found["report"]
        )

    def begin(
        self,
        state: RoundState,
        settings: RowSettings,
        *,
        num_draft_tokens: int,
        min_rows: int = 1,
        source: str = DRAFTER,
        proposals: Proposals | None = None,
    ) -> Begun:
        """Queue a round up to its decision, for the host to make masks in between.

        What the caller must do is as for ``run``.

        Args:
            state: The state after the round before.
            settings: Each row's settings.
            num_draft_tokens: K, the same for all rows.
            min_rows: See ``run``.
            source: See ``RoundShape``.
            proposals: Tokens in place of drafts; None where K is 0.
        """
        shape = _shape(state, settings, num_draft_tokens, min_rows, source)
        given = {} if proposals is None else vars(proposals)
        found = self._call_models(begin, shape, state, settings, given)
        before = replace(state, slabs=[], text=found.get("text"))
        return Begun.of_named(found, before=before)

    def finish(
        self, begun: Begun, settings: RowSettings, masks: mx.array
    ) -> tuple[RoundState | Verified, Report]:
        """Queue the rest of a round; nothing is evaluated here.

        Args:
            begun: The round.
            settings: Each row's settings.
            masks: What the rows may choose, uint32 [B, K + 1, words].

        Returns:
            The new state, or the round before its commit where the host decides rows,
            and the report.
        """
        num_rows, num_tokens = begun.logits.shape[:2]
        text_size = begun.before.text_size
        shape = RoundShape(num_tokens - 1, 1, settings.graph, text_size=text_size)
        compiled = self._traced(finish, shape, num_rows)
        arrays, before = begun.small, begun.before.small
        found = compiled(_no_models, [], arrays, before, settings.named, masks)
        report = Report.of_named(found["report"])
        if settings.graph.has_host:
            return begun.verified, report
        return RoundState(begun.slabs, **found["state"]), report

    def draft(
        self,
        state: RoundState,
        settings: RowSettings,
        *,
        num_draft_tokens: int,
        proposals: Proposals | None = None,
    ) -> mx.array:
        """Only the drafts of the round that would follow, int32 [B, K].

        Arguments are as for ``begin``.
        """
        models: Models = self.target, self.drafter
        if self.choices:  # as the round would
            arrays = self._model_arrays or self.refresh()
            models = self._bound(arrays, arrays)
        given = None if proposals is None else proposals.behind(state.last_token)
        found = draft(
            *models,
            self._verification,
            state,
            settings,
            num_draft_tokens,
            given_tokens=given,
        )
        return found.tokens

    def _call_models(
        self,
        part: Callable[..., Any],
        shape: RoundShape,
        state: RoundState,
        settings: RowSettings,
        *arrays: Any,
    ) -> dict[str, Any]:
        """Queue a part of a round that takes the models and the slabs."""
        num_rows = state.last_token.shape[0]
        capacity = self.target.layout.capacity(state.slabs)
        key = self._key(part, shape, num_rows, capacity)
        model_arrays = self._model_arrays
        if model_arrays is None or key not in self._traces:
            model_arrays = self.refresh()  # before: traces of other layers go with it
        compiled = self._traced(part, shape, num_rows, capacity)
        while True:
            try:
                return compiled(
                    partial(self._bound, model_arrays),
                    model_arrays,
                    state.named,
                    settings.named,
                    *arrays,
                )
            except ArraysChangedError:  # by another thread, since they were read
                model_arrays = self.refresh()

    def _traced(
        self,
        part: Callable[..., Any],
        shape: RoundShape,
        num_rows: int,
        capacity: int = 0,
    ) -> CompiledRound:
        """A part of a round, for this thread to call; new where it has not run it."""
        key = self._key(part, shape, num_rows, capacity)
        compiled = self._traces.get(key)
        if compiled is None:
            compiled = self._traces.add(key, self._made(part, shape))
        return compiled

    def _key(
        self,
        part: Callable[..., Any],
        shape: RoundShape,
        num_rows: int,
        capacity: int,
    ) -> Hashable:
        """What a trace depends on; MLX traces anew for every stream."""
        stream = str(mx.default_stream(mx.default_device()))
        if part is finish:  # it sees no models and no slabs
            numbers = shape.num_draft_tokens, shape.text_size, num_rows
            return finish, *numbers, shape.graph, stream
        return part, shape, num_rows, capacity, self.choices.digest, stream

    def _made(self, part: Callable[..., Any], shape: RoundShape) -> CompiledRound:
        """A part of a round of a shape, for this thread to call."""
        function = partial(part, self._verification, shape)
        if self.use_compile:
            return CompiledFunction(function)
        return lambda bind, models, *arrays: function(bind(models), *arrays)

    def _bound(self, arrays: list[mx.array], inputs: list[mx.array]) -> Models:
        """The models, with a compiled round's inputs in place of their arrays."""
        if self._arrays is None:
            return self.target, self.drafter
        assert isinstance(self.target, Target)
        lm, drafter = self._arrays.bound(arrays, inputs)
        target = self.target.over(lm, self.choices.ways)
        return target, self.drafter if drafter is None else drafter


def _shape(
    state: RoundState,
    settings: RowSettings,
    num_draft_tokens: int,
    min_rows: int,
    source: str,
) -> RoundShape:
    """The shape of a round from a state; without drafts no source is another one."""
    source = source if num_draft_tokens else DRAFTER
    size = state.text_size
    return RoundShape(num_draft_tokens, min_rows, settings.graph, source, size)


def _no_models(arrays: list[mx.array]) -> None:
    """What stands for the models where none are needed."""
