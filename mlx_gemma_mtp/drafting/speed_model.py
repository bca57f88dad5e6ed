"""How fast decoding should be on an Apple chip: a model of it, not a measurement.

A pass of the target over M rows (K + 1 for each of B sequences to verify) takes

    (dense bytes * c(M) + expert bytes * U(M) + B * (sliding + full * A(K + 1)))
    / reached bandwidth + layers * layer_s

and a draft step the same with the drafter's bytes, B rows and 4 layers. A round is a
pass and K steps. c(M) is what M rows cost over one (growth.py), U(M) the experts that M
rows choose over those of one. `sliding` and `full` are the K/V bytes of both kinds of
layers, A(K + 1) how often attention over full ones reads them (attention.py). So once
sliding windows are full each token of context adds the same to a round (`key_s`), the
more the more drafts. `Constants` holds what was fitted to published figures;
`scripts/roofline.py` prints how far the model is from them. Where whole passes were
measured, the shape of what they took stands for c(M) and U(M).

Of several machines each reads its part of a pass, and every layer waits for two sums
of all, one with experts for three. Logits are gathered, drafts and the decision are
told in a small sum each. The drafter is whole on all, so a draft step costs the same.

Not in the model: heat, and time that the host takes.

K = num_draft_tokens, 0 to 8, never counts the bonus token. Times are in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..constants import FULL, MAX_DRAFT_TOKENS, SLIDING
from ..models.families import DRAFTER_LAYERS, FAMILIES, VOCAB_SIZE, Family
from .attention import reads
from .bytes_read import (
    dense_weights,
    draft_weights,
    expert_weights,
    heads_of,
    key_bytes,
    num_kv_heads,
    sliding_bytes,
)
from .chips import Chip, chip_of
from .growth import Constants, bits_per_weight, constants_of, with_kernel
from .links import JACCL, Link
from .prior import DEFAULT_PRIOR, Prior

TYPICAL_FAMILY = "12b"
# Share of the new experts under independent routing that rows have in common: assumed.
EXPERT_DISCOUNT = 0.25
_ITEM_BYTES = 2  # of hidden states and logits


@dataclass(frozen=True)
class Model:
    """A family on a chip, with what decides its speed.

    Attributes:
        chip: The chip.
        family: The family.
        constants: Of the chip's generation, unless others are asked for.
        bits: Of a target's weight.
        draft_bits: Of a drafter's weight.
        batch_size: Sequences decoded together.
        context: Tokens in the cache of each.
        size: Number of machines that share the target, all alike.
        link: What joins them.
    """

    chip: Chip
    family: Family
    constants: Constants
    bits: int = 4
    draft_bits: int = 4
    batch_size: int = 1
    context: int = 0
    size: int = 1
    link: Link = JACCL

    def pass_s(self, rows_each: int) -> float:
        """Time of one forward of the target.

        Args:
            rows_each: Rows of every sequence: K + 1 to verify K drafts.
        """
        rows_s = self.rows_s(rows_each * self.batch_size)
        _, seen = heads_of(self.family, SLIDING, self.size)
        share = seen / num_kv_heads(self.family, SLIDING)
        sliding_s = self._sliding_s(self.family.layer_types) * share
        return rows_s + sliding_s + self.context * self.pass_key_s(rows_each)

    def pass_key_s(self, rows_each: int) -> float:
        """Time that each token of context adds to `pass_s`, windows being full."""
        heads, seen = heads_of(self.family, FULL, self.size)
        return self._key_s(self.family.layer_types, rows_each, heads, seen)

    def rows_s(self, rows: int) -> float:
        """Time of one forward of the target over so many rows, but for their K/V."""
        family, text = self.family, self.family.target_text
        weights = dense_weights(family, self.size) * self._growth(rows, self.bits)
        if text["num_experts"]:
            union = experts_read(rows, text["top_k_experts"], text["num_experts"])
            weights += expert_weights(family, self.size) * union
        read_s = self._read_s(weights * bits_per_weight(self.bits) / 8)
        fixed_s = self.constants.fixed_s(len(family.layer_types))
        return read_s + fixed_s + self.sums_s(rows)

    def sums_s(self, rows: int) -> float:
        """Time that the machines wait for each other in such a forward."""
        row_bytes = _ITEM_BYTES * self.family.target_text["hidden_size"]
        told_s = sum(
            self.link.sum_s(rows * count * row_bytes, self.size)
            for count in sums_of_a_layer(self.family)
        )
        logits = rows * VOCAB_SIZE // self.size
        gather_s = self.link.gather_s(_ITEM_BYTES * logits, self.size)
        return len(self.family.layer_types) * told_s + gather_s

    def step_s(self) -> float:
        """Time of one draft step."""
        growth = self._growth(self.batch_size, self.draft_bits)
        weights = draft_weights(self.family) * growth
        num_bytes = weights * bits_per_weight(self.draft_bits) / 8
        kept_s = self._sliding_s(DRAFTER_LAYERS) + self.context * self._step_key_s()
        fixed_s = self.constants.fixed_s(len(DRAFTER_LAYERS))
        return self._read_s(num_bytes) + kept_s + fixed_s

    def _step_key_s(self) -> float:
        """Time that each token of context adds to `step_s`, windows being full."""
        heads = self.family.drafter_text["num_attention_heads"]
        return self._key_s(DRAFTER_LAYERS, 1, heads, num_kv_heads(self.family, FULL))

    def _sliding_s(self, layer_types: Sequence[str]) -> float:
        """Time to read the keys and values of sliding layers."""
        each = sliding_bytes(self.family, layer_types, self.context)
        return self._read_s(self.batch_size * each)

    def _key_s(
        self, layer_types: Sequence[str], rows: int, heads: int, kv_heads: int
    ) -> float:
        """Time of full layers' attention to one token of every sequence."""
        times = reads(
            rows,
            sharing=heads // kv_heads,
            kv_heads=self.batch_size * kv_heads,
            generation=self.chip.generation,
        )
        each = key_bytes(self.family, layer_types)
        share = kv_heads / num_kv_heads(self.family, FULL)
        return self._read_s(self.batch_size * each * share * times)

    def round_s(self, num_draft_tokens: int) -> float:
        """Time of a round with K drafts; K = 0 is plain decoding's."""
        told_s = self.link.sum_s(0, self.size) * (2 if num_draft_tokens else 1)
        drafted_s = num_draft_tokens * self.step_s()
        return self.pass_s(num_draft_tokens + 1) + drafted_s + told_s

    def key_s(self, num_draft_tokens: int) -> float:
        """Time that each token of context adds to `round_s`, windows being full."""
        passed_s = self.pass_key_s(num_draft_tokens + 1)
        return passed_s + num_draft_tokens * self._step_key_s()

    def relative_cost(self, num_draft_tokens: int) -> float:
        """Time of a round with K drafts over that of one without."""
        return self.round_s(num_draft_tokens) / self.round_s(0)

    def tokens_per_second(self, num_draft_tokens: int, acceptance: float) -> float:
        """Tokens a second of all sequences together."""
        length = self.batch_size * acceptance_length(num_draft_tokens, acceptance)
        return length / self.round_s(num_draft_tokens)

    def best_draft_tokens(self, acceptance: float) -> int:
        """The K of 0 to 8 that gives most tokens a second."""
        return max(
            range(MAX_DRAFT_TOKENS + 1),
            key=lambda k: self.tokens_per_second(k, acceptance),
        )

    def speedup(self, acceptance: float) -> float:
        """Tokens a second with the best K over those without drafts."""
        best = self.best_draft_tokens(acceptance)
        return acceptance_length(best, acceptance) / self.relative_cost(best)

    def _growth(self, rows: int, bits: int) -> float:
        return self.constants.growth(rows, self.chip, bits)

    def _read_s(self, num_bytes: float) -> float:
        return num_bytes / (self.chip.bandwidth * self.constants.efficiency)


@dataclass(frozen=True)
class MeasuredModel(Model):
    """A model whose passes grow with rows as they were measured to.

    How long the first row takes stays modelled, so that draft steps, which nobody
    measured, keep their share.

    Attributes:
        pass_seconds: Seconds of a pass by rows, those of 1 among them.
    """

    pass_seconds: Mapping[int, float] = field(kw_only=True)

    def rows_s(self, rows: int) -> float:
        """Time of one forward of the target over so many rows, but for their K/V.

        More rows than were measured take what they are modelled to, but no less.
        """
        took_s, most = self.pass_seconds, max(self.pass_seconds)
        shape = _between(took_s, min(rows, most)) / took_s[1]
        measured_s = super().rows_s(1) * shape
        return measured_s if rows <= most else max(measured_s, super().rows_s(rows))


def _between(points: Mapping[int, float], place: int) -> float:
    """The value at a place, on the straight line between the points around it."""
    low = max(point for point in points if point <= place)
    high = min(point for point in points if point >= place)
    share = (place - low) / (high - low) if high > low else 0.0
    return points[low] + share * (points[high] - points[low])


def sums_of_a_layer(family: Family) -> tuple[int, int]:
    """The sums of a layer that several machines share: rows in each, for one of a pass.

    Experts and the dense part beside them stand in one sum.
    """
    return 1, 2 if family.target_text["num_experts"] else 1


def experts_read(rows: int, active: int, experts: int) -> float:
    """Experts that several rows choose, over those of one.

    Args:
        rows: Rows of a pass.
        active: Experts that each row chooses.
        experts: Experts to choose from.
    """
    share = active / experts
    independent = (1 - (1 - share) ** rows) / share
    return 1 + (1 - EXPERT_DISCOUNT) * (independent - 1)


def acceptance_length(num_draft_tokens: int, acceptance: float) -> float:
    """Tokens that a round of K drafts emits on average, 1 to K + 1.

    Args:
        num_draft_tokens: K.
        acceptance: Probability that a draft is accepted if those before it were.
    """
    return sum(acceptance**i for i in range(num_draft_tokens + 1))


def default_draft_bits(family: Family) -> int:
    """Bits that the converter gives a drafter unless asked."""
    return 8 if family.has_centroid_head else 4


def model(
    chip: Chip,
    family: Family,
    *,
    bits: int = 4,
    draft_bits: int | None = None,
    batch_size: int = 1,
    context: int = 0,
    constants: Constants | None = None,
    size: int = 1,
    link: Link = JACCL,
) -> Model:
    """Return the model of a family on a chip.

    Args:
        chip: The chip.
        family: The family.
        bits: Of a target's weight, 16 for bfloat16.
        draft_bits: Of a drafter's weight; None for the converter's choice.
        batch_size: Sequences decoded together.
        context: Tokens in the cache of each.
        constants: Others than those of the chip's generation.
        size: Number of machines that share the target, all of that chip.
        link: What joins them.
    """
    if draft_bits is None:
        draft_bits = default_draft_bits(family)
    constants = constants or constants_of(chip)
    return Model(
        chip, family, constants, bits, draft_bits, batch_size, context, size, link
    )


@dataclass(frozen=True)
class Matmuls:
    """What is known here of the matrix products of few rows.

    Attributes:
        has_kernel: Whether the package's kernel multiplies 2 to 9 rows, MLX all others.
        pass_seconds: Seconds of a pass of the target by rows, those of 1 among them, as
            measured with what multiplies now; empty where nothing was measured.

    Raises:
        ValueError: Not such seconds.
    """

    has_kernel: bool = False
    pass_seconds: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        took_s = self.pass_seconds
        are_seconds = all(0 < s < math.inf for s in took_s.values())
        if took_s and not (min(took_s) == 1 and are_seconds):
            raise ValueError(
                f"pass_seconds must be seconds of 1 row and more: got {took_s}. "
                "Measure again."
            )


MLX_ALONE = Matmuls()


def prior(
    architecture: str | None,
    family: str | None,
    *,
    batch_size: int = 1,
    context: int = 0,
    matmuls: Matmuls = MLX_ALONE,
    size: int = 1,
    link: Link = JACCL,
) -> Prior:
    """Return what to expect of a machine before it has run its rounds.

    It is modelled. Where passes were measured their growth with rows is measured, and
    draft steps stay modelled; where the kernel multiplies and was not measured, it is
    modelled cautiously.

    Args:
        architecture: MLX's name of the GPU, ``mx.device_info()["architecture"]``. One
            that is no known chip of Apple's gets ``DEFAULT_PRIOR``.
        family: One of ``FAMILIES``; None, or another, for a typical dense one.
        batch_size: Sequences decoded together.
        context: Tokens in the cache of each, as far as they fill sliding windows.
        matmuls: What multiplies few rows. Costs learnt with others are no start for
            these: see ``CostModel.resume``.
        size: Number of machines that share the target, all of that chip. Passes that
            were measured are such as these machines run together.
        link: What joins them.
    """
    chip = chip_of(architecture)
    if chip is None:
        return DEFAULT_PRIOR
    shapes = FAMILIES.get(family or "", FAMILIES[TYPICAL_FAMILY])
    constants = constants_of(chip)
    if matmuls.has_kernel:
        constants = with_kernel(constants)
    modelled = model(
        chip,
        shapes,
        batch_size=batch_size,
        context=context,
        constants=constants,
        size=size,
        link=link,
    )
    if matmuls.pass_seconds:
        modelled = MeasuredModel(**vars(modelled), pass_seconds=matmuls.pass_seconds)
    # On the line that rounds follow once windows are full, at no context.
    numbers = range(MAX_DRAFT_TOKENS + 1)
    keys_s = [modelled.key_s(k) for k in numbers]
    passes_keys_s = [modelled.pass_key_s(k + 1) for k in numbers]
    rounds_s = [modelled.round_s(k) - context * keys_s[k] for k in numbers]
    passes_s = [modelled.pass_s(k + 1) - context * passes_keys_s[k] for k in numbers]
    return Prior(
        _over(rounds_s, rounds_s[0]),
        shapes.acceptance,
        _over(passes_s, rounds_s[0]),
        key_cost=_over(keys_s, rounds_s[0]),
        verify_key_cost=_over(passes_keys_s, rounds_s[0]),
    )


def _over(seconds: Sequence[float], one: float) -> tuple[float, ...]:
    return tuple(each / one for each in seconds)
