"""The matmul's part of section ``kernels``: a few rows times random matrices.

Of every form of numbers, 1 to 9 rows are multiplied, with the columns that the kernel
takes where nothing was tuned. What comes must be as near to float32 as MLX's own
product is, and rows must have the same bits for every number of rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..kernels.matmul import FORMS, MAX_ROWS, Form, default_columns
from ..matmuls.bench import Products
from ..matmuls.choices import Shape
from .tally import MATMUL, Tallies

# Outputs that end inside a simdgroup's, and numbers that end inside a step of lanes.
_NUM_OUTPUTS, _NUM_INPUTS = 131, 1408


def compare_forms(
    allowance_s: float, tallies: Tallies, forms: Sequence[Form] = FORMS
) -> list[str]:
    """Compare the matmul, form by form while there is time, the first in any case.

    Args:
        allowance_s: No form is begun that would end later, seconds.
        tallies: Where products are counted.
        forms: The forms to compare.

    Returns:
        The names of those that were compared.
    """
    start, longest_s = time.perf_counter(), 0.0
    done: list[str] = []
    for form in _usual_first(forms):
        begun = time.perf_counter()
        if done and begun - start + longest_s > allowance_s:
            break
        compare_form(form, tallies)
        done.append(str(form))
        longest_s = max(longest_s, time.perf_counter() - begun)
    return done


def compare_form(form: Form, tallies: Tallies) -> None:
    """Compare products of 9 rows to 1; those that cannot be run are noted."""
    shape, products = Shape(_NUM_OUTPUTS, _NUM_INPUTS, form), Products(copy_bytes=1)
    # The most rows first: the bits of all others are compared with theirs.
    for num_rows in range(MAX_ROWS, 0, -1):
        tallies.place = f"{shape}, {num_rows} rows"
        try:
            is_right = products.is_right(shape, num_rows, default_columns(num_rows))
        # What a compiler says of a kernel, too, is what is looked for.
        except Exception as error:  # noqa: BLE001
            tallies.fail(MATMUL, error)
        else:
            tallies.add(MATMUL, is_wrong=not is_right, num_rows=num_rows)


def _usual_first(forms: Sequence[Form]) -> list[Form]:
    """The forms in the order in which checkpoints have them, most of them first."""
    return sorted(forms, key=lambda f: (f.dtype != FORMS[0].dtype, f.group_size != 64))
