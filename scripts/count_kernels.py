"""Count what the kernels read and issue: scripts/data/kernel_counts.json.

    python -m scripts.count_kernels    (or: make counts)

The kernels' Metal text runs on the CPU (tests/metal), so nothing here is time. The
tables of docs/kernels.md are made from the file (kernel_tables.py).
"""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx

from mlx_gemma_mtp.kernels.common import BLOCK, GREEDY
from mlx_gemma_mtp.kernels.matmul import DENSE, MAX_ROWS, Form, default_columns
from scripts.kernel_tables import RECORD
from tests.kernels.launches import (
    SIMDGROUPS,
    Product,
    distinct,
    run_decide,
    run_judge,
    run_propose,
    run_resample,
    run_select,
    run_threshold,
)
from tests.metal.count import Counts

FORMS = tuple(
    Form(bits, group_size, mx.bfloat16)
    for bits, group_size in ((4, 64), (8, 64), (DENSE, 0))
)
_NUM_INPUTS = 5376  # of a row: 31B's
_VOCABULARY = 262144
_DRAFTS = 4
_DIGITS = 5


def product_counts(form: Form, num_rows: int) -> dict[str, float]:
    """What the matmul of so many rows does, for each weight that it multiplies.

    Returns:
        ``columns``: R; ``bytes`` of weights over their size; ``scale_bytes`` of scales
        and biases over theirs; and for each weight ``load`` and ``store`` instructions,
        ``shuffle``, and the operations of ``tests.metal.count``.
    """
    columns = default_columns(num_rows)
    # Three threadgroups without a ragged end.
    num_outputs = 3 * SIMDGROUPS * columns
    product = Product(form, num_rows, columns, num_outputs, _NUM_INPUTS)
    counts = product.run(is_checked=False)
    num_weights = num_outputs * _NUM_INPUTS
    executed = {
        "load": sum(loads.count for loads in counts.loads.values()),
        "store": sum(stores.count for stores in counts.stores.values()),
        "shuffle": sum(counts.calls.values()),
        **{name: count for name, count in counts.operations.items() if count},
    }
    return {
        "columns": columns,
        "bytes": over_floor(counts, "w"),
        "scale_bytes": over_floor(counts, "scales") if form.group_size else 0,
        **{name: round(n / num_weights, _DIGITS) for name, n in executed.items()},
    }


def over_floor(counts: Counts, name: str) -> float:
    """Bytes that lanes ask for over those that are there to be read."""
    loads = counts.loads[name]
    return round(loads.num_bytes / loads.unique_bytes, _DIGITS)


def choosing_counts() -> dict[str, dict[str, Any]]:
    """What the kernels that choose tokens do: of one sequence, 4 drafts, bfloat16."""
    rows = (_DRAFTS + 1, _VOCABULARY)
    modes = [BLOCK]
    launches = {
        "select": ("logits", run_select(distinct(*rows, dtype=mx.bfloat16))[0]),
        "propose": ("values", run_propose([GREEDY])),
        "decide": ("values", run_decide(modes, _DRAFTS)),
        "threshold": ("logits", run_threshold(*rows)),
        "threshold, top-p": ("logits", run_threshold(*rows, top_p=0.95)),
        "judge": ("logits", run_judge(modes, _DRAFTS, _VOCABULARY)),
        "resample": ("logits", run_resample(modes, [2], _DRAFTS, _VOCABULARY)),
    }
    return {
        name: {
            "reads": buffer,
            "unique": counts.loads[buffer].unique_bytes,
            "bytes": over_floor(counts, buffer),
            "barriers": counts.calls.get("threadgroup_barrier", 0) / counts.num_threads,
        }
        for name, (buffer, counts) in launches.items()
    }


def all_counts() -> dict[str, Any]:
    """What the file holds."""
    return {
        "matmul": {
            str(form): [product_counts(form, m) for m in range(1, MAX_ROWS + 1)]
            for form in FORMS
        },
        "others": choosing_counts(),
    }


def main() -> None:
    """Write the file."""
    RECORD.write_text(json.dumps(all_counts(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {RECORD}")


if __name__ == "__main__":
    main()
