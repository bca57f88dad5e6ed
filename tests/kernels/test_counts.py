"""What the kernels that choose tokens read, write and issue, as formulas of the sizes.

Counted in runs of their Metal text on the CPU, which must give the same bits as without
counting. A kernel that loses its shape, so that it reads a row twice or waits once more
than it must, fails here.

Run: python -m pytest tests/kernels/test_counts.py
"""

import sys

import mlx.core as mx
import numpy as np
import pytest

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.kernels import common
from mlx_gemma_mtp.kernels.select import BLOCK
from tests.kernels.launches import (
    LANES,
    distinct,
    lists,
    replacing,
    run_decide,
    run_judge,
    run_propose,
    run_resample,
    run_select,
    run_threshold,
)
from tests.metal.count import count_on_cpu
from tests.metal.toy import TOY, arguments, example_logits

LIST = common.LIST
THREADS = common.MAX_THREADS


def check_loads(counts, name, count, *, unique, width=4):
    """So many lanes load one element of the buffer; they reach so many of them."""
    loads = counts.loads[name]
    assert loads.by_width == ({width: count} if count else {}), name
    assert loads.unique_bytes == unique * width, name


def check_calls(counts, **times):
    """How often each thread reaches a barrier or calls a simd function."""
    want = {name: count * counts.num_threads for name, count in times.items()}
    assert counts.calls == {name: count for name, count in want.items() if count}


def check_outputs_written_once(counts, *names):
    for name, stores in counts.stores.items():
        written = counts.sizes[name] if name in names else 0
        assert (stores.num_bytes, stores.unique_bytes) == (written, written), name


def check_settings(counts, num_threads, floats, words):
    """Each thread reads what it needs of its row's settings, and nothing else does."""
    B = counts.sizes["row_words"] // (4 * common.ROW_WORDS)
    check_loads(counts, "row_floats", num_threads * floats, unique=B * floats)
    check_loads(counts, "row_words", num_threads * words, unique=B * words)


# ------------------------------------------------------------------------ counting


def test_toy_counts():
    """One that is easily counted: two passes over rows, and a barrier."""
    B, V, num_threads = 3, 5000, 256
    inputs, options = arguments(mx.array(example_logits(B, V)), num_threads=num_threads)
    counts = count_on_cpu(TOY, inputs, **options)
    assert counts.num_threads == B * num_threads
    loads = counts.loads["logits"]
    assert loads.by_width == {4: 2 * B * V}
    assert loads.unique_bytes == 4 * B * V
    # A simdgroup reads 32 floats that stand beside each other: a line, or parts of two
    # where rows do not end with a line.
    assert loads.instructions == 2 * B * -(-V // LANES)
    assert loads.most_lines == 2
    assert counts.stores["probs"].by_width == {4: B * V}
    assert counts.stores["argmax"].instructions == B
    assert counts.calls["threadgroup_barrier"] == B * num_threads
    assert counts.calls["simd_sum"] == 2 * B * num_threads
    assert counts.operations["divide"] == B * V
    assert counts.operations["from_integer"] == 0


# -------------------------------------------------------------------------- select


def reaching(logits):
    """How many logits of each block reach the 64th best of the threads' best."""
    total = 0
    for row in np.array(logits.astype(mx.float32)):
        for start in range(0, row.size, BLOCK):
            block = row[start : start + BLOCK]
            padded = np.full(-(-block.size // THREADS) * THREADS, -np.inf)
            padded[: block.size] = block
            bound = np.sort(padded.reshape(-1, THREADS).max(axis=0))[-LIST]
            total += int((block >= bound).sum())
    return total


def check_select(counts, R, M, *, dtype, num_blocks, num_reaching, has_ids):
    check_loads(counts, "logits", R * M, unique=R * M, width=dtype.size)
    assert counts.loads["logits"].most_lines <= 2
    # The ids of all, of those that reach the bound, and of the bound itself.
    num_ids = R * M + num_reaching + R * num_blocks if has_ids else 0
    check_loads(counts, "token_ids", num_ids, unique=R * M if has_ids else 0)
    check_outputs_written_once(counts, "best_values", "best_tokens", "stats")
    check_calls(counts, threadgroup_barrier=4, simd_prefix_exclusive_sum=1, simd_sum=2)
    assert counts.operations["from_integer"] == 0


@pytest.mark.parametrize("has_ids", [False, True])
@pytest.mark.parametrize("M", [3000, 20000])
def test_select(M, has_ids):
    R, num_blocks = 2, -(-M // BLOCK)
    logits = distinct(R, M)
    ids = mx.broadcast_to(mx.arange(M, dtype=mx.int32)[::-1], (R, M))
    first, *merge = run_select(logits, ids if has_ids else None)
    check_select(
        first, R, M, dtype=mx.float32, num_blocks=num_blocks,
        num_reaching=reaching(logits), has_ids=has_ids,
    )  # fmt: skip
    check_loads(first, "numbers", R * num_blocks * THREADS, unique=1)
    assert len(merge) == (num_blocks > 1)
    for counts in merge:
        values = first.outputs[0].reshape(R, num_blocks * LIST)
        check_select(
            counts, R, values.shape[1], dtype=mx.float32, num_blocks=1,
            num_reaching=reaching(values), has_ids=True,
        )  # fmt: skip
        stats = 2 * R * num_blocks
        check_loads(counts, "numbers", stats, unique=stats)


def test_select_of_short_floats_converts_each_once():
    R, M = 1, 9000
    first, _ = run_select(distinct(R, M, dtype=mx.bfloat16), softcap=30.0)
    check_loads(first, "logits", R * M, unique=R * M, width=2)
    assert first.operations["from_short"] == R * M


# ------------------------------------------------------------------ propose, decide


def test_propose():
    modes = [common.GREEDY, common.COUPLED, common.BLOCK]
    counts, B = run_propose(modes), len(modes)
    # Every entry once; besides, all lanes the best, and one the token.
    check_loads(counts, "values", B * (LIST + LANES), unique=B * LIST)
    check_loads(counts, "ids", B * (LIST + 1), unique=B * LIST)
    check_loads(counts, "stats", B * 2 * LANES, unique=B * 2)
    check_loads(counts, "step", B * LANES, unique=1)
    check_settings(counts, B * LANES, 3, 5)
    check_outputs_written_once(counts, "tokens", "scores")
    check_calls(counts, simd_prefix_exclusive_sum=2, simd_min=3, simd_max=2)


@pytest.mark.parametrize("K", [1, 4, 8])
def test_decide(K):
    modes = [common.BLOCK, common.COUPLED]
    counts, B, L = run_decide(modes, K), len(modes), K + 1
    num_threads = B * LANES * min(L, 8)
    assert counts.num_threads == num_threads
    check_loads(counts, "values", B * L * LIST, unique=B * L * LIST)
    check_loads(counts, "stats", B * L * LANES * 2, unique=B * L * 2)
    # The lists' ids twice where a block is judged, else once; the token of each row.
    check_loads(counts, "ids", B * L * (LIST + 1) + K * LIST, unique=B * L * LIST)
    for name in ("draft_scores", "draft_ids"):
        check_loads(counts, name, B * K * LIST, unique=B * K * LIST)
    # By block every lane compares with the draft, by equality one of a row; then what
    # was accepted is copied.
    num_accepted = int(counts.outputs[0][:, 0].sum())
    drafts = counts.loads["draft_tokens"]
    assert drafts.by_width == {4: K * LANES + K + num_accepted}
    assert drafts.unique_bytes == 4 * B * K
    check_settings(counts, num_threads, 3, 5)
    check_outputs_written_once(counts, "report")
    assert counts.calls["threadgroup_barrier"] == 3 * num_threads
    assert "simdgroup_barrier" not in counts.calls


# ------------------------------------------------------ threshold, judge, resample


TWO_ROWS = (2, 3001)
REDUCTIONS = 6  # of threshold, each with two barriers


def check_threshold(counts, R, V, *, num_passes, width):
    check_loads(counts, "logits", R * V * num_passes, unique=R * V, width=width)
    num_searches = num_passes - 3
    barriers = 2 * REDUCTIONS + 2 * num_searches
    assert counts.calls["threadgroup_barrier"] == barriers * R * THREADS
    check_outputs_written_once(counts, "stats", "tokens")
    check_loads(counts, "softcap", R * THREADS, unique=1)
    check_settings(counts, R * THREADS, 3, 4)


def test_threshold_reads_rows_three_times():
    check_threshold(run_threshold(*TWO_ROWS), *TWO_ROWS, num_passes=3, width=2)


@pytest.mark.parametrize(("dtype", "bits"), [(mx.bfloat16, 16), (mx.float32, 32)])
def test_top_p_takes_three_bits_a_pass(dtype, bits):
    V = 5001
    counts = run_threshold(1, V, dtype=dtype, top_p=0.9)
    num_passes = counts.loads["logits"].count // V
    check_threshold(counts, 1, V, num_passes=num_passes, width=dtype.size)
    assert 1 <= num_passes - 3 <= -(-bits // 3)


def test_judge():
    modes, K, V = [common.BLOCK, common.COUPLED, common.BLOCK], 4, 700
    counts, B = run_judge(modes, K, V), len(modes)
    is_block, ids = np.array(modes) == common.BLOCK, lists(B, K)[1]
    # Of the vocabulary only the drafter's candidates, of ids below V, are looked at.
    num_gathered = int((np.array(ids)[is_block] < V).sum())
    assert 0 < num_gathered < is_block.sum() * K * LIST
    check_loads(counts, "logits", num_gathered, unique=num_gathered)
    for name in ("draft_scores", "draft_ids"):
        check_loads(counts, name, B * K * LIST, unique=B * K * LIST)
    check_loads(counts, "stats", B * K * LANES * 3, unique=B * K * 3)
    check_loads(counts, "softcap", B * LANES, unique=1)
    check_settings(counts, B * LANES, 1, 4)
    check_outputs_written_once(counts, "report", "reach")
    check_calls(counts, simd_sum=4 * K)


def check_resample(counts, modes, accepted, K, V):
    B, num_drawn = len(modes), modes.count(common.BLOCK)
    num_owed = sum(n < K for n in accepted)
    check_loads(counts, "logits", num_drawn * V, unique=num_drawn * V, width=2)
    for name in ("draft_scores", "draft_ids"):
        check_loads(counts, name, num_owed * LIST, unique=num_owed * LIST)
    num_threads = B * THREADS
    check_loads(counts, "judged", num_threads + B * (K + 2), unique=B * (K + 2))
    check_loads(counts, "stats", 3 * num_threads, unique=3 * B)
    check_loads(counts, "reach", num_threads, unique=B)
    check_loads(counts, "softcap", num_threads, unique=1)
    check_settings(counts, num_threads, 1, 4)
    check_outputs_written_once(counts, "report")
    # Five reductions with two barriers each, and two around the table of bits.
    check_calls(counts, threadgroup_barrier=12, simd_sum=2, simd_max=4, simd_min=4)


RESAMPLED = ([common.BLOCK, common.COUPLED, common.BLOCK], [2, 1, 4], 4, 3001)


def test_resample():
    check_resample(run_resample(*RESAMPLED), *RESAMPLED)


# ------------------------------------------------------------------------ mistakes


ONE_PASS = "    float own_sum = 0.0f;\n"
AGAIN = (
    "    for (uint i = thread_id; i < V; i += 256u) "
    "own_sum += 0.0f * float(logits[start + i]);\n"
)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param((ONE_PASS, ONE_PASS + AGAIN), id="a pass more"),
        pytest.param((ONE_PASS, f"    BARRIER();\n{ONE_PASS}"), id="a barrier more"),
    ],
)
def test_mistakes_of_threshold_are_seen(change):
    counts = run_threshold(*TWO_ROWS, change=replacing(*change))
    with pytest.raises(AssertionError):
        check_threshold(counts, *TWO_ROWS, num_passes=3, width=2)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            ("uint end = is_block ? V : 0u;", "uint end = V;"),
            id="rows that nobody draws from are read",
        ),
        pytest.param(
            ("i = thread_id; i < K + 2u", "i = lane; i < K + 2u"),
            id="tokens are written by every simdgroup",
        ),
    ],
)
def test_mistakes_of_resample_are_seen(change):
    counts = run_resample(*RESAMPLED, change=replacing(*change))
    with pytest.raises(AssertionError):
        check_resample(counts, *RESAMPLED)


def test_judge_that_looks_at_logits_for_equality_is_seen():
    change = replacing("if (is_block && id_a < V)", "if (id_a < V)")
    right, wrong = (
        run_judge([common.COUPLED], 2, 700, change=how) for how in (None, change)
    )
    assert right.loads["logits"].count == 0 < wrong.loads["logits"].count
