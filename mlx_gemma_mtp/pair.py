"""A target and its drafter, ready to decode.

The pair can travel inside the target's model object, which is how a model loaded with
``load`` brings its drafter to ``generate``.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import cast

import mlx.nn as nn
from mlx_lm.generate import wired_limit

from .cache import MAX_DRAFT_TOKENS
from .drafter import Drafter
from .rounds import Rounds
from .target import Target

# Where a checkpoint does not say how many tokens to draft. Published advice for the
# larger pairs is 4 (vLLM's recipes for Gemma 4).
DEFAULT_NUM_DRAFT_TOKENS = 4


class Pair:
    """A target with its drafter, or without one.

    Args:
        target: mlx-lm's model object of a Gemma 4 target.
        drafter: The drafter; None for plain decoding.
        eos_token_ids: Tokens that end a sequence.
        target_source: Where the target came from, a sentence.
        drafter_source: Where the drafter came from, or why there is none.

    Attributes:
        num_draft_tokens: Drafts per round where a request does not say: what the
            drafter's checkpoint names, else 4; 0 without a drafter.
        rounds: The engine; it keeps the compiled rounds.

    Raises:
        PairingError: ``target`` is not a Gemma 4 of mlx-lm.
    """

    def __init__(
        self,
        target: nn.Module,
        drafter: Drafter | None = None,
        *,
        eos_token_ids: Iterable[int] = (),
        target_source: str = "",
        drafter_source: str = "",
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.eos_token_ids = frozenset(eos_token_ids)
        self.target_source = target_source
        self.drafter_source = drafter_source
        self.num_draft_tokens = _num_draft_tokens(drafter)
        self.rounds = Rounds(Target(target), drafter)

    @property
    def vocab_size(self) -> int:
        """Number of token ids the target knows."""
        return self.rounds.target.vocab_size

    def wired(self) -> AbstractContextManager[None]:
        """Keep the weights of target and drafter together in wired memory.

        Without it macOS may page weights out between rounds. Nothing happens where
        the device has no such limit.
        """
        modules = [m for m in (self.target, self.drafter) if m is not None]
        # mlx-lm walks any tree of arrays, whatever its annotation says.
        return wired_limit(cast(nn.Module, modules))


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
    pairs = [attached.own, *attached.others]
    for pair in pairs:
        if drafter is None or pair.drafter is drafter:
            return pair
    pair = Pair(model, drafter, eos_token_ids=attached.own.eos_token_ids)
    attached.others.append(pair)
    return pair
