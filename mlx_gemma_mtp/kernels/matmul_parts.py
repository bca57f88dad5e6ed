"""Parts of the matmul's text that do not know how weights are stored.

Which matrix a threadgroup has, the sums over lanes, and the gate. A sum is known by its
place among those of its simdgroup: row by row, of a row the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_STEPS = (16, 8, 4, 2, 1)  # of lanes that exchange sums


def choice(names: Sequence[str], num_matrices: int, wide: int) -> list[str]:
    """The matrix of a threadgroup, and where its outputs go.

    All threads of a group have the same one: what it is called costs no registers.

    Args:
        names: Of the arrays of a matrix; ``own_`` and the name is what is chosen.
        num_matrices: How many matrices stand one behind the other.
        wide: Outputs of a threadgroup.
    """
    lines = [
        "uint group = threadgroup_position_in_grid.x;",
        "uint outputs = uint(w_shape[0]);",
        *(f"auto own_{name} = {name};" for name in (*names, "y")),
    ]
    for i in range(1, num_matrices):
        beyond = f"is_{i - 1} && " if i > 1 else ""
        lines += [
            f"uint groups{i} = (outputs + {wide - 1}u) / {wide}u;",
            f"bool is_{i} = {beyond}group >= groups{i};",
            f"if (is_{i}) {{",
            f"  group -= groups{i};",
            f"  outputs = uint(w{i}_shape[0]);",
            *(f"  own_{name} = {name}{i};" for name in (*names, "y")),
            "}",
        ]
    return lines


def gathered(wide: int) -> list[str]:
    """The row and the expert of a threadgroup, and which of its outputs.

    A pair is a row and one of its experts; CHOSEN of them are a row's.

    Args:
        wide: Outputs of a threadgroup.
    """
    group = "threadgroup_position_in_grid.x"
    return [
        "uint outputs = uint(w_shape[1]);",
        f"uint groups_of_pair = (outputs + {wide - 1}u) / {wide}u;",
        f"uint group = {group} % groups_of_pair;",
        f"uint pair = {group} / groups_of_pair;",
        "uint row = pair / uint(CHOSEN);",
        "uint expert = uint(experts[pair]);",
    ]


def sums_over_lanes(sums: list[str]) -> tuple[list[str], str]:
    """The sums over lanes: every exchange halves what a lane has to add up.

    Of two sums a lane keeps one and gives the other to its partner. Both add the same
    two numbers, so the tree is the same for every sum and however many there are.

    Returns:
        The lines, and the name of the sum that a lane has in the end. ``place`` is its
        place, and ``is_first`` tells the first of the lanes that have it.
    """
    lines, counts = [], []
    for level, step in enumerate(_STEPS):
        counts.append((step, len(sums)))
        lines += [f"bool is_high_{step} = (lane & {step}u) != 0u;"]
        kept = []
        for pair in range(0, len(sums), 2):
            name, (low, *high) = f"r{level}_{pair // 2}", sums[pair : pair + 2]
            given = low
            own = low
            if high:
                own = f"(is_high_{step} ? {high[0]} : {low})"
                given = f"(is_high_{step} ? {low} : {high[0]})"
            lines += [f"float {name} = {own} + simd_shuffle_xor({given}, {step}u);"]
            kept.append(name)
        sums = kept
    lines += ["uint place = 0u;  // of the sum that this lane has", "uint wide;"]
    lines += ["bool is_first = true;  // of the lanes that have it"]
    for step, count in reversed(counts):
        lines += [
            f"wide = 2u * place + (is_high_{step} ? 1u : 0u);",
            f"is_first = is_first && wide < {count}u;",
            f"place = min(wide, {count - 1}u);",
        ]
    return lines, sums[0]


def partner(total: str) -> list[str]:
    """The sum beside the gate's as ``beside``, in the lane of the gate's.

    Two sums that stand beside each other end in lanes that are 16 apart.
    """
    return [
        f"float beside = simd_shuffle_xor({total}, {_STEPS[0]}u);",
        "is_first = is_first && place % 2u == 0u;",
        "place = place / 2u;",
    ]


def gated(total: str, value: str) -> list[str]:
    """The gate's gelu times a value, as ``gated``.

    Every result is rounded as MLX's operations round it, those of ``nn.gelu_approx``.
    """

    def step(name: str, value: str) -> str:
        return f"float {name} = float(T({value}));"

    return [
        step("gate", total),
        step("cube", "gate * gate * gate"),
        step("share", "float(T(0.044715f)) * cube"),
        step("inner", "gate + share"),
        step("angle", f"float(T({math.sqrt(2 / math.pi):.9f}f)) * inner"),
        step("bend", "tanh(angle)"),
        step("raised", "1.0f + bend"),
        step("half_gate", "0.5f * gate"),
        step("gelu", "half_gate * raised"),
        f"float gated = gelu * float(T({value}));",
    ]
