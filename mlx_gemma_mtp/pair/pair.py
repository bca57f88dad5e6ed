"""A target and its drafter, ready to decode.

The pair can travel inside the target's model object, which is how a model loaded with
``load`` brings its drafter to ``generate``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from operator import is_
from typing import cast
from weakref import ReferenceType, ref

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..constants import DRAFTER, LOOKUP, MAX_DRAFT_TOKENS
from ..distributed.environment import has_rdma
from ..drafting.links import link_of
from ..drafting.prior import Prior
from ..drafting.speed_model import MLX_ALONE, Matmuls, prior
from ..engine.model_arrays import ModelArrays
from ..engine.rounds import CompiledRound, Rounds
from ..engine.traces import Traces
from ..kernels.common import backend
from ..kernels.layer_trial import NO_LAYERS
from ..matmuls.choices import STOCK, Choices, Shape
from ..matmuls.decide import blame, decide
from ..matmuls.kept import Kept as Decisions
from ..matmuls.kept import kernels_digest
from ..matmuls.modules import shapes_of, sizes_of
from ..models.drafter import Drafter
from ..models.families import family_of
from ..models.target import Target, text_model
from ..sampling.defaults import SamplingDefaults
from ..store import Store, cache_folder
from .calibration import Calibration
from .fingerprint import learnt_key
from .wired_memory import wired

# Where a checkpoint does not say how many tokens to draft. Published advice for the
# larger pairs is 4 (vLLM's recipes for Gemma 4).
DEFAULT_NUM_DRAFT_TOKENS = 4

# Of the memory beside the weights; the rest is for prompts being read and for logits.
_KV_SHARE = 0.8


class Kept:
    """What is kept of a target and its drafter from one use to the next.

    It holds neither of them, so that a model may carry it.

    Attributes:
        traces: The compiled rounds of every thread.
        calibration: What was learnt of the weights; None before anything was asked.
        choices: Which matrices the kernel of few rows multiplies; None before that was
            decided.
        matmuls: What is known of their speed.
    """

    def __init__(self) -> None:
        self.traces: Traces[CompiledRound] = Traces()
        self.calibration: Calibration | None = None
        self.choices: Choices | None = None
        self.matmuls = MLX_ALONE
        self._decided_on = ""
        self._sizes = NO_LAYERS
        self._learnt_of: list[ReferenceType[mx.array]] = []

    def follow(self, weights: Sequence[mx.array]) -> None:
        """Forget what was learnt where the weights are others than last time."""
        known = [reference() for reference in self._learnt_of]
        is_same = len(known) == len(weights) and all(map(is_, known, weights))
        if not is_same:
            self.calibration = self.choices = None
            self._learnt_of = [ref(array) for array in weights]

    def choose(self, models: Sequence[nn.Module]) -> Choices:
        """What multiplies on the present device; a check may run to decide it."""
        if self.choices is not None and self._decided_on == backend():
            return self.choices
        self._decided_on = backend()
        folder, shapes = cache_folder(), shapes_of(models)
        self._sizes = sizes_of(models)
        choices = decide(shapes, self._sizes, folder=folder)
        took_s = Decisions(folder).pass_seconds(set(shapes)) if choices else None
        self.matmuls = Matmuls(_has_most(choices, shapes), took_s or {})
        if self.choices not in (None, choices):
            self.calibration = None
        self.choices = choices
        return choices

    def give_up_kernel(self) -> None:
        """Let MLX multiply, as a round with the kernel failed.

        In later processes too, where the kernel fails again by itself.
        """
        if self.choices:
            blame(self.choices, self._sizes, folder=cache_folder())
        self.choices, self.matmuls, self.calibration = STOCK, MLX_ALONE, None


def _has_most(choices: Choices, shapes: Mapping[Shape, int]) -> bool:
    """Whether the kernel multiplies most bytes of a pair."""
    num_bytes = {shape: count * shape.num_bytes for shape, count in shapes.items()}
    chosen = sum(num_bytes[shape] for shape in choices.by_shape if shape in num_bytes)
    return 2 * chosen > sum(num_bytes.values())


class Pair:
    """A target with its drafter, or without one.

    Args:
        target: mlx-lm's model object of a Gemma 4 target.
        drafter: The drafter; None for plain decoding.
        eos_token_ids: Tokens that end a sequence.
        sampling_defaults: Sampling settings of the target's checkpoint. Nothing uses
            them by itself: who wants them passes
            ``**pair.sampling_defaults.settings()`` on.
        target_source: Where the target came from, a sentence.
        drafter_source: Where the drafter came from, or why there is none.
        weight_files: Name, bytes and time of change (ns) of each file that the target's
            weights came from, adapters included; empty where it was made in memory.
        kept: What an earlier pair of the same two has left.

    Attributes:
        rounds: The engine; see ``refresh`` for weights that change.
        ranks: The machines that have a part of the target each; None for one.
        num_draft_tokens: Drafts per round that the drafter's checkpoint names, else 4;
            0 without a drafter. Requests that do not say let the controller choose.

    Raises:
        PairingError: ``target`` is not a Gemma 4 of mlx-lm.
    """

    def __init__(
        self,
        target: nn.Module,
        drafter: Drafter | None = None,
        *,
        eos_token_ids: Iterable[int] = (),
        sampling_defaults: SamplingDefaults | None = None,
        target_source: str = "",
        drafter_source: str = "",
        weight_files: Sequence[tuple[str, int, int]] = (),
        kept: Kept | None = None,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.eos_token_ids = frozenset(eos_token_ids)
        self.sampling_defaults = sampling_defaults or SamplingDefaults()
        self.target_source = target_source
        self.drafter_source = drafter_source
        self.weight_files = tuple(weight_files)
        self.num_draft_tokens = _num_draft_tokens(drafter)
        self.kept = Kept() if kept is None else kept
        part = Target(target)
        self.ranks = None if part.shard is None else part.shard.ranks
        self.rounds = Rounds(
            part,
            drafter,
            arrays=ModelArrays(target, drafter, self.kept.choices or STOCK),
            traces=self.kept.traces,
            on_failure=self.kept.give_up_kernel,
            group=None if self.ranks is None else self.ranks.group,
        )
        if kept is None:
            self._evaluate()
            self.refresh()
            self.rounds.let_go()

    def refresh(self) -> None:
        """Take the weights as they are: adapters, quantization, training.

        Once at the start of a generation, as it goes over all of them. What was learnt
        of other weights is forgotten; of weights that were changed in place it is not.
        What multiplies them is decided where it was not, before anything is traced.
        """
        self.kept.follow(self.rounds.refresh())
        self.rounds.use(self.kept.choose(self._modules()))

    @property
    def prior(self) -> Callable[[int, int], Prior]:
        """What the speed model expects of so many rows of so many tokens here."""
        # Who keeps it, such as what was learnt, must not keep the target with it.
        family = family_of(vars(text_model(self.target).args))
        size = 1 if self.ranks is None else self.ranks.size
        return partial(_prior, family, self.kept.matmuls, size)

    def draft_sources(self, asked: str) -> tuple[str, ...]:
        """Where drafts may come from; empty where there are none.

        Args:
            asked: One of ``constants.DRAFT_SOURCES``. ``auto`` adds the text to a
                drafter: without one it is plain decoding.
        """
        if asked == LOOKUP:
            return (LOOKUP,)
        if self.drafter is None:
            return ()
        return (DRAFTER,) if asked == DRAFTER else (DRAFTER, LOOKUP)

    @property
    def vocab_size(self) -> int:
        """Number of token ids the target knows."""
        return self.rounds.target.vocab_size

    @property
    def calibration(self) -> Calibration:
        """What the pair has learnt on this machine."""
        found = self.kept.calibration
        if found is None:
            choices = self.rounds.choices
            matmuls = f"{choices.digest} {kernels_digest()}" if choices else ""
            key = learnt_key(named_arrays(self._modules()), matmuls=matmuls)
            if self.ranks is not None:
                key["ranks"] = f"rank {self.ranks.rank} of {self.ranks.size}"
            found = Calibration(Store(key, cache_folder()), self.prior)
            # Another thread may forget it at once, with the weights.
            self.kept.calibration = found
        return found

    @property
    def drafter_bytes(self) -> int:
        """Memory of the drafter's weights, bytes."""
        modules = [] if self.drafter is None else [self.drafter]
        return sum(array.nbytes for _, array in named_arrays(list(modules)))

    @property
    def default_kv_bytes(self) -> int:
        """Memory for keys and values beside the weights, bytes; 1 where there is none.

        A part of what the device recommends to use, else of the machine's memory, is
        left to everything else.
        """
        limit = mx.device_info().get("max_recommended_working_set_size")
        most = int(limit) if limit is not None else _memory_bytes() // 2
        weights = sum(array.nbytes for array in self._weights())
        return max(int(_KV_SHARE * (most - weights)), 1)

    def wired(self) -> AbstractContextManager[None]:
        """Keep the weights of target and drafter together in wired memory."""
        return wired(sum(array.nbytes for array in self._weights()))

    def _evaluate(self) -> None:
        """Evaluate what is lazy and would tie other threads to the loading one.

        That is the drafter, and the arrays that modules compute for themselves, such as
        rope's: they are no parameters, so loading leaves them. The target's parameters,
        which may have been loaded lazily, are evaluated by the prefill.
        """
        if self.drafter is not None:
            mx.eval(self.drafter.parameters())
        mx.eval(
            [
                array
                for name, array in named_arrays(self._modules())
                if name.rsplit(".", 1)[-1].startswith("_")
            ]
        )

    def _modules(self) -> list[nn.Module]:
        return [m for m in (self.target, self.drafter) if m is not None]

    def _weights(self) -> list[mx.array]:
        """All arrays of both modules, those that are no parameters included."""
        return [array for _, array in named_arrays(self._modules())]


def named_arrays(modules: nn.Module | list[nn.Module]) -> list[tuple[str, mx.array]]:
    """Every array of the modules with its path, also those that are no parameters."""
    leaves = cast(list[tuple[str, object]], tree_flatten(modules))
    return [(name, leaf) for name, leaf in leaves if isinstance(leaf, mx.array)]


def _memory_bytes() -> int:
    """The machine's memory, bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _prior(
    family: str | None, matmuls: Matmuls, size: int, num_rows: int, context: int
) -> Prior:
    """What the speed model expects of a family on so many machines like this one."""
    is_gpu = mx.default_device() == mx.gpu
    return prior(
        str(mx.device_info().get("architecture")) if is_gpu else None,
        family,
        batch_size=num_rows,
        context=context,
        matmuls=matmuls,
        size=size,
        link=link_of(
            has_rdma=has_rdma(os.environ),
            has_fast_synch=os.environ.get("MLX_METAL_FAST_SYNCH", "0") != "0",
        ),
    )


def _num_draft_tokens(drafter: Drafter | None) -> int:
    """Drafts per round by default."""
    if drafter is None:
        return 0
    named = drafter.config.num_assistant_tokens
    # transformers writes its own default, 20, where nobody chose a number.
    if named is None or not 1 <= named <= MAX_DRAFT_TOKENS:
        return DEFAULT_NUM_DRAFT_TOKENS
    return named


class _Attached:
    """What a model object carries: a plain object, so not one of its parameters.

    It does not hold the model, which so ends as soon as nobody else holds it.
    """

    def __init__(self, pair: Pair) -> None:
        self.drafter = pair.drafter
        self.kept = pair.kept
        self.eos_token_ids = pair.eos_token_ids
        self.sampling_defaults = pair.sampling_defaults
        self.target_source = pair.target_source
        self.drafter_source = pair.drafter_source
        self.weight_files = pair.weight_files


class _Given:
    """What a drafter that was given by hand carries, for the last target it went with.

    So what is kept of it ends with it.
    """

    def __init__(self, target: nn.Module, kept: Kept) -> None:
        self._target = ref(target)
        self._kept = kept

    def kept_for(self, target: nn.Module) -> Kept | None:
        """What is kept of both; None where the drafter went with another target."""
        return self._kept if self._target() is target else None


def attach(model: nn.Module, pair: Pair) -> None:
    """Let the model carry its pair."""
    model._mtp_attached = _Attached(pair)


def carries_drafter(model: object) -> bool:
    """Whether a model brings a drafter with it; any object may be asked."""
    attached = _attached(model)
    return attached is not None and attached.drafter is not None


def why_no_drafter(model: object) -> str:
    """Why a model brings no drafter, in words; empty where it brings one."""
    attached = _attached(model)
    if attached is None:
        return "none was looked for"
    return "" if attached.drafter is not None else attached.drafter_source


def pair_of(model: nn.Module, drafter: Drafter | None = None) -> Pair:
    """The pair to decode a model with.

    Args:
        model: mlx-lm's model object.
        drafter: A drafter to use in place of the one the model carries.

    Returns:
        The pair that the model carries, or the one of the model and ``drafter``. What
        is kept of it, such as compiled rounds, serves the next call too: the model
        carries it, or the drafter; only its own pair is used where none is named.

    Raises:
        PairingError: The model is not a Gemma 4 of mlx-lm.
    """
    attached = _attached(model)
    if attached is None:
        attach(model, Pair(model))
        return pair_of(model, drafter)
    if drafter is None or drafter is attached.drafter:
        return Pair(
            model,
            attached.drafter,
            eos_token_ids=attached.eos_token_ids,
            sampling_defaults=attached.sampling_defaults,
            target_source=attached.target_source,
            drafter_source=attached.drafter_source,
            weight_files=attached.weight_files,
            kept=attached.kept,
        )
    given = vars(drafter).get("_mtp_given")
    kept = given.kept_for(model) if isinstance(given, _Given) else None
    pair = Pair(
        model,
        drafter,
        eos_token_ids=attached.eos_token_ids,
        sampling_defaults=attached.sampling_defaults,
        weight_files=attached.weight_files,
        kept=kept,
    )
    drafter._mtp_given = _Given(model, pair.kept)
    return pair


def _attached(model: object) -> _Attached | None:
    """What a model carries; any object may be asked."""
    found = vars(model).get("_mtp_attached") if isinstance(model, nn.Module) else None
    return found if isinstance(found, _Attached) else None
