"""How a matrix is packed: bits, group size and mode, and what its shapes tell of them.

A row of C weights in groups of g becomes C * bits / 32 words of uint32 and C / g scales
(and in affine mode as many biases). The loader reads formats from shapes, the converter
chooses them. Knows nothing of models or of files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError

WORD_BITS = 32  # packed weights are uint32
# mode: (bits, group sizes) that mx.quantize has; the first of each is the default,
# which is mlx-lm's.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}


@dataclass(frozen=True)
class Format:
    """One way to pack a matrix; the names are mlx-lm's.

    Attributes:
        bits: Bits of one packed weight.
        group_size: Neighbours in a row that share a scale.
        mode: One of ``MODES``. Only affine has biases, and scales in the type of the
            weights; the others have scales of one byte.
        has_global_scale: Whether each expert has a scale of its own beside them, which
            mlx-lm knows in nvfp4.
    """

    bits: int
    group_size: int
    mode: str = "affine"
    has_global_scale: bool = False

    @classmethod
    def of_mode(
        cls, mode: str, *, bits: int | None = None, group_size: int | None = None
    ) -> Format:
        """Return a mode's format, with its defaults where nothing is named.

        Args:
            mode: One of ``MODES``.
            bits: Bits of one weight.
            group_size: Weights with one scale.

        Raises:
            RequestError: MLX has no such combination.
        """
        if mode not in MODES:
            raise RequestError(
                f"the quantization mode must be one of {', '.join(MODES)}: got "
                f"{mode!r}. Leave it out for affine."
            )
        all_bits, group_sizes = MODES[mode]
        given = cls(
            all_bits[0] if bits is None else bits,
            group_sizes[0] if group_size is None else group_size,
            mode,
        )
        for what, value, allowed in (
            ("bits", given.bits, all_bits),
            ("group size", given.group_size, group_sizes),
        ):
            if value not in allowed:
                raise RequestError(
                    f"the {what} of mode {mode} must be {_any_of(allowed)}: got "
                    f"{value}. Leave it out for {allowed[0]}."
                )
        return given

    @property
    def has_biases(self) -> bool:
        """Whether a group has a bias beside its scale."""
        return self.mode == "affine"

    @property
    def name(self) -> str:
        """A short name, such as ``4-bit affine g64``."""
        return f"{self.bits}-bit {self.mode} g{self.group_size}"

    def fits(self, num_columns: int) -> bool:
        """Tell whether rows of this many weights can be packed.

        Args:
            num_columns: C, the length of a row.
        """
        # MLX 0.32.4 packs no odd number of rows with an odd number of nvfp4 groups.
        multiple = 2 * self.group_size if self.mode == "nvfp4" else self.group_size
        return num_columns > 0 and num_columns % multiple == 0

    def packed_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the packed weights.

        Args:
            shape: The matrix's own shape, [..., C].
        """
        return (*shape[:-1], shape[-1] * self.bits // WORD_BITS)

    def scales_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the scales, and of the biases where there are any.

        Args:
            shape: The matrix's own shape, [..., C].
        """
        return (*shape[:-1], shape[-1] // self.group_size)

    def as_config(self) -> dict[str, Any]:
        """Return the entry of mlx-lm's quantization map."""
        entry = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        return {**entry, "global_scale": True} if self.has_global_scale else entry


def stored_format(
    num_columns: int, *, num_words: int, num_scales: int, has_byte_scales: bool
) -> Format | None:
    """Tell the format of a stored matrix from its shapes.

    The map in ``config.json`` says the same where it is right, and has been seen wrong
    or incomplete in published checkpoints; so the tensors decide.

    Args:
        num_columns: C, the length of a row before it was packed.
        num_words: Length of a packed row, in words of 32 bits.
        num_scales: Scales of a row.
        has_byte_scales: Whether scales are single bytes.

    Returns:
        The format, or None if no format of MLX has these shapes.
    """
    if num_columns < 1 or num_scales < 1 or num_columns % num_scales:
        return None
    bits, rest = divmod(num_words * WORD_BITS, num_columns)
    group_size = num_columns // num_scales
    for mode, (all_bits, group_sizes) in MODES.items():
        is_known = not rest and bits in all_bits and group_size in group_sizes
        if is_known and has_byte_scales != (mode == "affine"):
            return Format(bits, group_size, mode)
    return None


def _any_of(values: Sequence[int]) -> str:
    return " or ".join(map(str, sorted(values))).replace(" or ", ", ", len(values) - 2)
