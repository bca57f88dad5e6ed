"""Apple's chips, as far as the speed of decoding goes.

Bandwidths and GPU cores are those that Apple publishes for the full GPU of each chip
(M3 Max with 40 GPU cores, M4 Max and M5 Max with 40).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..machine import apple_gpu

_LANES = 128  # of a GPU core

# Of the GPU, by generation, Hz. M1 and M2 are from philipturner/metal-benchmarks; the
# others are assumed.
_CLOCKS = {13: 1.296e9, 14: 1.398e9, 15: 1.398e9, 16: 1.68e9, 17: 1.7e9}


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        name: As Apple writes it, such as "M3 Ultra".
        generation: Of the GPU: 13 is M1, 14 M2, 15 M3, 16 M4, 17 M5.
        bandwidth: Of the memory, bytes a second.
        gpu_cores: Of the full GPU.
    """

    name: str
    generation: int
    bandwidth: float
    gpu_cores: int

    @property
    def is_ultra(self) -> bool:
        """Whether two dies make one chip: MLX has limits of its own for them."""
        return self.name.endswith("Ultra")

    @property
    def slots_per_s(self) -> float:
        """Instructions that all lanes of the GPU issue in a second, at most."""
        return self.gpu_cores * _LANES * _CLOCKS[self.generation]


CHIPS = {
    name: Chip(name, generation, gigabytes * 1e9, gpu_cores)
    for name, generation, gigabytes, gpu_cores in (
        ("M1", 13, 68.3, 8),
        ("M1 Pro", 13, 200.0, 16),
        ("M1 Max", 13, 400.0, 32),
        ("M1 Ultra", 13, 800.0, 64),
        ("M2", 14, 100.0, 10),
        ("M2 Pro", 14, 200.0, 19),
        ("M2 Max", 14, 400.0, 38),
        ("M2 Ultra", 14, 800.0, 76),
        ("M3", 15, 100.0, 10),
        ("M3 Pro", 15, 150.0, 18),
        ("M3 Max", 15, 400.0, 40),
        ("M3 Ultra", 15, 819.0, 80),
        ("M4", 16, 120.0, 10),
        ("M4 Pro", 16, 273.0, 20),
        ("M4 Max", 16, 546.0, 40),
        ("M5", 17, 153.6, 10),
        ("M5 Pro", 17, 307.0, 20),
        ("M5 Max", 17, 614.0, 40),
    )
}

# The letter that ends MLX's name of a GPU; a generation without an Ultra gets its Max.
_SIZES = {"p": "", "g": "", "s": " Max", "d": " Ultra"}


def chip_of(architecture: str | None) -> Chip | None:
    """Return the chip that an architecture is of, None if it is of no known one.

    Several chips share a name (g: base and Pro); the one returned stands for them.

    Args:
        architecture: ``mx.device_info()["architecture"]``, such as "applegpu_g15s".
    """
    generation, size = apple_gpu(architecture) or (0, "")
    if size not in _SIZES:
        return None
    model = f"M{generation - 12}"
    chip = CHIPS.get(model + _SIZES[size])
    return chip or CHIPS.get(f"{model} Max")
