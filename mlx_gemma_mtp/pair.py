"""A target and its drafter, ready to decode.

The pair can travel inside the target's model object, which is how a model loaded with
``load`` brings its drafter to ``generate``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .calibration import Calibration
from .config import MAX_DRAFT_TOKENS
from .control import Prior
from .drafter import Drafter
from .families import family_of
from .fingerprint import learnt_key
from .generation_defaults import SamplingDefaults
from .roofline import prior
from .rounds import Rounds
from .store import Store, cache_folder
from .target import Target, text_model
from .wired import wired

# Where a checkpoint does not say how many tokens to draft. Published advice for the
# larger pairs is 4 (vLLM's recipes for Gemma 4).
DEFAULT_NUM_DRAFT_TOKENS = 4

# Of the memory beside the weights; the rest is for prompts being read and for logits.
_KV_SHARE = 0.8


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

    Attributes:
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
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.eos_token_ids = frozenset(eos_token_ids)
        self.sampling_defaults = sampling_defaults or SamplingDefaults()
        self.target_source = target_source
        self.drafter_source = drafter_source
        self.num_draft_tokens = _num_draft_tokens(drafter)
        self._calibration: Calibration | None = None
        self._make_rounds()

    @property
    def rounds(self) -> Rounds:
        """The engine; it keeps the compiled rounds.

        A compiled round holds the weights it was traced with. When they have changed
        since (adapters, quantization, training), rounds are made anew.
        """
        weights = self._weights()
        is_same = len(weights) == len(self._traced) and all(
            a is b for a, b in zip(weights, self._traced, strict=True)
        )
        if not is_same:
            self._make_rounds()
        return self._rounds

    @property
    def vocab_size(self) -> int:
        """Number of token ids the target knows."""
        return self._rounds.target.vocab_size

    @property
    def calibration(self) -> Calibration:
        """What the pair has learnt on this machine."""
        if self._calibration is None:
            key = learnt_key(named_arrays(self._modules()))
            self._calibration = Calibration(Store(key, cache_folder()), self.prior)
        return self._calibration

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

    def prior(self, num_rows: int, context: int) -> Prior:
        """What the speed model expects of so many rows of so many tokens here."""
        args = text_model(self.target).args
        is_gpu = mx.default_device() == mx.gpu
        return prior(
            str(mx.device_info().get("architecture")) if is_gpu else None,
            family_of(vars(args)),
            batch_size=num_rows,
            context=context,
        )

    def wired(self) -> AbstractContextManager[None]:
        """Keep the weights of target and drafter together in wired memory."""
        return wired(sum(array.nbytes for array in self._weights()))

    def _make_rounds(self) -> None:
        """Make the engine for the weights as they are.

        What a round would capture unevaluated is evaluated first; the target's
        parameters, which may have been loaded lazily, are by the prefill.
        """
        if self.drafter is not None:
            mx.eval(self.drafter.parameters())
        _evaluate_constants(self._modules())
        self._traced = self._weights()
        self._calibration = None  # what was learnt was learnt of the weights before
        self._rounds = Rounds(Target(self.target), self.drafter)

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


def _evaluate_constants(modules: list[nn.Module]) -> None:
    """Evaluate the arrays that modules compute for themselves, such as rope's.

    They are no parameters, so loading leaves them lazy. A compiled round would take
    their computation along, run it every time, and tie it to the loading thread.
    """
    constants = [
        array
        for name, array in named_arrays(modules)
        if name.rsplit(".", 1)[-1].startswith("_")
    ]
    mx.eval(constants)


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
    """What a model object carries: a plain object, so not one of its parameters."""

    def __init__(self, own: Pair) -> None:
        self.own = own
        self.others: list[Pair] = []


def attach(model: nn.Module, pair: Pair) -> None:
    """Let the model carry its pair."""
    model._mtp_attached = _Attached(pair)


def carries_drafter(model: object) -> bool:
    """Whether a model brings a drafter with it; any object may be asked."""
    attached = (
        vars(model).get("_mtp_attached") if isinstance(model, nn.Module) else None
    )
    return isinstance(attached, _Attached) and attached.own.drafter is not None


def pair_of(model: nn.Module, drafter: Drafter | None = None) -> Pair:
    """The pair to decode a model with.

    Args:
        model: mlx-lm's model object.
        drafter: A drafter to use in place of the one the model carries.

    Returns:
        The pair that the model carries, or the one of the model and ``drafter``. The
        model keeps both, so that compiled rounds serve the next call too; only its
        own pair is used where no drafter is named.

    Raises:
        PairingError: The model is not a Gemma 4 of mlx-lm.
    """
    attached = vars(model).get("_mtp_attached")
    if not isinstance(attached, _Attached):
        attach(model, Pair(model))
        return pair_of(model, drafter)
    if drafter is None:
        return attached.own
    for pair in (attached.own, *attached.others):
        if pair.drafter is drafter:
            return pair
    pair = Pair(
        model,
        drafter,
        eos_token_ids=attached.own.eos_token_ids,
        sampling_defaults=attached.own.sampling_defaults,
    )
    attached.others.append(pair)
    return pair
