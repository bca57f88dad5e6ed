"""The queue of rounds: one read each, no copies of the cache, nothing left behind.

Run: python -m pytest tests/engine/test_decoder.py
"""

from __future__ import annotations

import ast
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_gemma_mtp
from mlx_gemma_mtp.cache import slabs as cache_module
from mlx_gemma_mtp.engine import capacity as capacity_module
from mlx_gemma_mtp.engine import pipeline as pipeline_module
from mlx_gemma_mtp.engine.capacity import Capacity
from mlx_gemma_mtp.engine.decoder import Decoder, Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.engine.state import Report
from mlx_gemma_mtp.generation.tokens import generate_tokens
from mlx_gemma_mtp.pair.pair import named_arrays
from mlx_gemma_mtp.pair.wired_memory import wired
from tests.tiny import new_pair, reference_pair

PROMPT = [2, 17, 300, 45, 99, 8, 120]
PACKAGE = Path(mlx_gemma_mtp.__file__).parent


def tokens_of(decoder):
    return [t for r in decoder.run() for e in r for t in e.tokens]


def start(pair, num_tokens, num_draft_tokens=3, **options):
    return Decoder(
        pair.rounds,
        [Request(PROMPT, num_tokens)],
        num_draft_tokens=num_draft_tokens,
        **options,
    )


@pytest.mark.parametrize("look_ahead", [True, False])
def test_one_host_read_per_round(monkeypatch, look_ahead):
    pair = reference_pair()
    tokens_of(start(pair, 10, look_ahead=look_ahead))  # trace before counting
    reads, evals = [], []
    read, evaluate = Report.read, mx.eval

    def counted_read(report):
        reads.append(report)
        return read(report)

    def counted_eval(*arrays):
        evals.append(arrays)
        evaluate(*arrays)

    monkeypatch.setattr(Report, "read", counted_read)
    monkeypatch.setattr(mx, "eval", counted_eval)
    decoder = start(pair, 40, look_ahead=look_ahead)
    rounds = decoder.run()
    next(rounds)
    num_evals = len(evals)  # the prefill's
    num_rounds = sum(1 for _ in rounds)
    assert len(reads) == 1 + num_rounds  # one for the prefill
    assert all(r.tokens.shape == (1, 5) for r in reads[1:])
    assert all(r.tokens.dtype == mx.int32 for r in reads)
    assert len(evals) - num_evals <= 1  # waiting for a round in flight at the end


def test_the_round_has_no_other_way_to_the_host():
    """Nothing between prefill and report converts an array or waits for it.

    What outlasts a step is begun, so that another thread may go on with it.
    """
    forbidden = {"item", "tolist", "eval", "async_eval", "synchronize"}
    allowed = {
        "pipeline.py": {"_queue_shadow", "rest"},
        "runner.py": {"start", "decide", "commit"},
        "state.py": {"read", "read_drafts"},
        "prefill.py": {"read_together", "read_on"},
        "slabs.py": {"resize"},
        "prompt.py": {"insert_row", "take_row"},
        "batch.py": {"_start"},
        "target.py": {"__call__"},  # of what reads a chunk in groups of layers
    }
    for name in (
        "cache/masks",
        "cache/prompt",
        "cache/slabs",
        "engine/batch",
        "engine/decoder",
        "engine/given_rounds",
        "engine/masked",
        "engine/pipeline",
        "engine/prefill",
        "engine/prompt_reader",
        "engine/round",
        "engine/rounds",
        "engine/runner",
        "engine/state",
        "models/centroid_head",
        "models/drafter",
        "models/target",
        "sampling/acceptance",
        "sampling/decision",
        "sampling/distribution",
        "sampling/graph",
        "sampling/masks",
    ):
        path = PACKAGE / f"{name}.py"
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                used = {
                    node.attr
                    for node in ast.walk(function)
                    if isinstance(node, ast.Attribute)
                }
                if function.name not in allowed.get(path.name, set()):
                    assert not used & forbidden, f"{path.name}: {function.name}"


@pytest.mark.parametrize(
    ("num_draft_tokens", "num_rows", "look_ahead", "use_compile"),
    [
        (0, 1, True, True),
        (2, 1, True, True),
        (2, 1, False, True),
        (2, 2, True, False),
    ],
)
def test_rounds_write_the_slabs_in_place(
    monkeypatch, num_draft_tokens, num_rows, look_ahead, use_compile
):
    """Memory beyond the slabs stays below the size of one slab.

    Also where drafts, and layers that share them, read the slabs shortly before.
    """
    pair = reference_pair("e2b")
    monkeypatch.setattr(Capacity, "initial", lambda self: 32768)
    rounds = Rounds(pair.rounds.target, pair.drafter, use_compile=use_compile)
    decoder = Decoder(
        pair.rounds if use_compile else rounds,
        [Request(PROMPT, 40)] * num_rows,
        num_draft_tokens=num_draft_tokens,
        look_ahead=look_ahead,
    )
    run = decoder.run()
    for _ in range(3):
        next(run)
    state = decoder._batch.state
    assert state is not None
    largest = max(slab.nbytes for slab in state.slabs)
    del state
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(4):
        next(run)
    run.close()
    # Scores over 32,768 keys are a part of it, a quarter of a slab for each query.
    assert mx.get_peak_memory() - before < largest


def test_growing_does_not_hold_two_copies_of_everything():
    """Only one slab is held twice while the slabs grow."""
    from mlx_gemma_mtp.cache.slabs import LayerKV, SlabLayout, resize

    layout = SlabLayout(
        tuple(LayerKV("full_attention", 4, 64) for _ in range(8)),
        window=8,
        dtype=mx.float32,
    )
    slabs = layout.allocate(1, 4096)
    mx.eval(slabs)
    one = slabs[0].nbytes
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    resize(slabs, layout, 8192)
    # 16 slabs double: the growth is 16, the copy in the making at most 2 more, and
    # MLX's concatenation needs the zeros it appends.
    assert mx.get_peak_memory() - before <= 19.5 * one
    assert {slab.shape[2] for slab in slabs} == {8192}


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_text_does_not_change_where_the_slabs_grow(monkeypatch, num_draft_tokens):
    pair = reference_pair("e2b")
    expected = tokens_of(start(pair, 70, num_draft_tokens))
    monkeypatch.setattr(capacity_module, "slots_ahead", lambda: 8)
    monkeypatch.setattr(cache_module, "CAPACITY_BLOCK", 32)
    decoder = start(pair, 70, num_draft_tokens)
    layout, capacities, tokens = pair.rounds.target.layout, set(), []
    for emissions in decoder.run():
        tokens += emissions[0].tokens
        if decoder._batch.state is not None:
            capacities.add(layout.capacity(decoder._batch.state.slabs))
    assert capacities >= {64, 96}
    assert tokens == expected


def test_logits_are_handed_out_whole(monkeypatch):
    """A slice made here would wait, on the rounds' stream, for the round in flight."""
    pair, reports = reference_pair(), []
    run = pair.rounds.run

    def recorded_run(*args, **kwargs):
        state, report = run(*args, **kwargs)
        reports.append(report)
        return state, report

    monkeypatch.setattr(pair.rounds, "run", recorded_run)
    emissions = [e for r in start(pair, 20).run() for e in r][1:]
    assert len(emissions) > 3
    for emission, report in zip(emissions, reports, strict=False):
        assert emission.logits is report.logits


def test_closing_early_leaves_nothing_in_flight():
    pair = reference_pair()
    decoder = start(pair, None)
    rounds = decoder.run()
    for _ in range(4):
        next(rounds)
    assert len(decoder._pipeline._in_flight) == 1
    rounds.close()
    assert not decoder._pipeline._in_flight
    assert decoder._batch.state is None


def test_compiled_and_uncompiled_rounds_agree():
    pair = reference_pair("e2b")
    eager = Rounds(pair.rounds.target, pair.drafter, use_compile=False)
    outputs = [
        tokens_of(Decoder(rounds, [Request(PROMPT, 40)], num_draft_tokens=3))
        for rounds in (eager, pair.rounds)
    ]
    assert outputs[0] == outputs[1]


def test_rounds_are_compiled_once_per_number_of_drafts():
    pair = reference_pair()
    counts = []
    for _ in range(2):
        for num_draft_tokens in (0, 3):
            decoder = start(pair, 6, num_draft_tokens)
            tokens_of(decoder)
            counts.append(decoder.stats.traced)
    assert counts[2:] == [0, 0]


def test_freed_buffers_are_given_back_now_and_then(monkeypatch):
    """MLX's buffer cache is emptied after the prefill, now and then, and at last."""
    cleared: list[int] = []
    monkeypatch.setattr(pipeline_module, "_ROUNDS_PER_CACHE_CLEAR", 8)
    decoder = start(reference_pair(), 30, 0)
    monkeypatch.setattr(
        mx, "clear_cache", lambda: cleared.append(decoder._pipeline._num_queued)
    )
    tokens_of(decoder)
    assert [n for n in cleared if n] == [8, 16, 24, decoder._pipeline._num_queued]
    assert cleared[0] == 0


def test_target_and_drafter_are_wired_together(monkeypatch):
    """The wired limit is raised for both while tokens are made, and then put back."""
    limits = [1000]

    def set_wired_limit(limit):
        limits.append(limit)
        return limits[-2]

    info = {"max_recommended_working_set_size": 10**9}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    pair = reference_pair("e2b")
    first, second = (
        generate_tokens(
            pair, PROMPT, max_tokens=20, num_draft_tokens=3, exactness="fast"
        )
        for _ in range(2)
    )
    next(first)
    next(second)
    assert limits == [1000, 10**9]
    first.close()  # the second still needs it
    assert limits == [1000, 10**9]
    second.close()
    assert limits == [1000, 10**9, 1000]


def test_the_wired_limit_is_put_back_where_work_has_failed(monkeypatch):
    limits = [1000]

    def set_wired_limit(limit):
        limits.append(limit)
        return limits[-2]

    def fail():
        raise RuntimeError("Insufficient Memory")

    info = {"max_recommended_working_set_size": 10**9}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    monkeypatch.setattr(mx, "synchronize", fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Insufficient"), wired(10):
            pass
    assert limits == [1000, 10**9, 1000, 10**9, 1000]


def test_a_warning_says_when_both_hardly_fit(monkeypatch, caplog):
    pair = reference_pair("e2b")
    assert pair.drafter is not None
    size = sum(a.nbytes for _, a in named_arrays([pair.target, pair.drafter]))
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: 0)
    for limit, warns in ((size, True), (2 * size, False)):
        info = {"max_recommended_working_set_size": limit}
        monkeypatch.setattr(mx, "device_info", lambda info=info: info)
        caplog.clear()
        with pair.wired():
            pass
        assert ("can be slow" in caplog.text) == warns


def test_other_threads_can_decode():
    """What a round captures is not tied to the thread that loaded it."""
    pair = new_pair("e2b")

    def decode():
        return [
            list(generate_tokens(pair, PROMPT, max_tokens=12, num_draft_tokens=k))
            for k in (0, 2)
        ]

    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(decode).result()
    assert elsewhere == decode()


@pytest.mark.parametrize("num_draft_tokens", [0, 2])
def test_changed_weights_are_used(num_draft_tokens):
    """Rounds are traced again when weights are exchanged after a generation."""
    changed, fresh = new_pair(), new_pair()

    def decode(pair):
        return list(
            generate_tokens(
                pair, PROMPT, max_tokens=12, num_draft_tokens=num_draft_tokens
            )
        )

    before = decode(changed)
    for pair in (changed, fresh):
        layer = pair.target.layers[0].mlp
        layer.down_proj.weight = -layer.down_proj.weight
    after = decode(changed)
    assert after == decode(fresh)
    assert after != before
