"""The probe finds what was built in, and exact decoding keeps its promise (CPU).

On Linux's CPU backend rows do not change bytes, so rounding that does is built into a
layer here. Run: python -m pytest tests/exactness/test_probe.py
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_gemma_mtp.cache import slabs as cache_module
from mlx_gemma_mtp.engine import capacity as capacity_module
from mlx_gemma_mtp.engine import round as round_module
from mlx_gemma_mtp.engine.decoder import Request
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.exactness import probe as probe_module
from mlx_gemma_mtp.exactness.compared import Compared
from mlx_gemma_mtp.exactness.probe import TIMING_PASSES, places, probe
from mlx_gemma_mtp.exactness.verdict import PLAIN_ROWS
from mlx_gemma_mtp.generation.tokens import make_decoder
from mlx_gemma_mtp.models.target import Target
from mlx_gemma_mtp.pair import planning
from mlx_gemma_mtp.pair.pair import Pair
from mlx_gemma_mtp.pair.planning import make_plan
from mlx_gemma_mtp.sampling.params import SamplingParams
from tests.tiny import SHORT, new_pair, reference_pair

pytestmark = pytest.mark.usefixtures("plain_graphs")

PROMPT = [2, 17, 300, 45, 99, *range(60, 80)]
ALL = tuple(range(1, 9))
NUM_TOKENS = 24  # the window is 16 and the ring 34: both wrap
MANY_SLOTS = probe_module._MANY_SLOTS


@pytest.fixture(autouse=True)
def _fresh_cache(monkeypatch, tmp_path):
    """Pairs with something built in have the fingerprint of those without."""
    monkeypatch.setenv("MLX_GEMMA_MTP_CACHE", str(tmp_path))


@pytest.fixture(autouse=True)
def _few_slots(monkeypatch):
    """What is built in here shows over few slots too, for half of the time."""
    monkeypatch.setattr(probe_module, "_MANY_SLOTS", 0)
    # A machine that stood still for a moment is no reason to give a probe up.
    monkeypatch.setattr(planning, "_PROBE_BUDGET_S", 1e9)


@pytest.fixture
def many_slots(monkeypatch):
    """As many as users' probes have."""
    monkeypatch.setattr(probe_module, "_MANY_SLOTS", MANY_SLOTS)


class RoundedByRows(nn.Module):
    """A layer whose result is rounded in blocks of some numbers of rows.

    Args:
        inner: The layer.
        rows: The numbers of rows.
        step: By how much results grow with each row of the block; 0 rounds rows to
            bfloat16.
        first: The first row that is rounded.
    """

    def __init__(
        self, inner: nn.Module, rows: Collection[int], step: float, first: int = 0
    ) -> None:
        super().__init__()
        self.inner = inner
        self._rows = frozenset(rows)
        self._step = step
        self._first = first

    def __call__(self, x: mx.array) -> mx.array:
        result = self.inner(x)
        if x.shape[1] not in self._rows:
            return result
        if self._step:
            return result * (1 + self._step * mx.arange(x.shape[1])[:, None])
        is_rounded = (mx.arange(x.shape[1]) >= self._first)[:, None]
        rounded = result.astype(mx.bfloat16).astype(result.dtype)
        return mx.where(is_rounded, rounded, result)


def inexact_pair(rows: Collection[int], *, step: float = 0.0, first: int = 0) -> Pair:
    """A pair whose second layer rounds by the number of rows."""
    pair = new_pair()
    mlp = pair.target.layers[1].mlp
    mlp.down_proj = RoundedByRows(mlp.down_proj, rows, step, first)
    return pair


def decode(pair: Pair, num_draft_tokens: int | None, exactness: str, **options: Any):
    """The tokens, the float32 logits behind each, and the counts."""
    request = Request(PROMPT, options.pop("num_tokens", NUM_TOKENS), **options)
    decoder = make_decoder(
        pair,
        [request],
        num_draft_tokens=num_draft_tokens,
        exactness=exactness,
        prefill_step_size=64,
    )
    tokens, logits = [], []
    for emissions in decoder.run():
        for emission in emissions:
            tokens += emission.tokens
            logits.append(np.array(emission.logits[0, : len(emission.tokens)]))
    return tokens, np.concatenate(logits).tobytes(), decoder.stats


def largest_difference(pair: Pair) -> float:
    """What the probe has seen of a pair."""
    verdict = pair.calibration.verdict(1)
    assert verdict is not None
    return verdict.max_difference


@pytest.mark.usefixtures("many_slots")
def test_every_number_of_drafts_is_exact_here():
    verdict = probe(reference_pair("e2b").rounds)
    assert verdict is not None
    assert verdict.equal == {1: ALL, 2: ALL}
    assert verdict.max_difference == 0


class Timed(Target):
    """A target whose passes take what a clock of its own says.

    Args:
        model: mlx-lm's model.
        monkeypatch: Puts the clock in the place of the probe's.
        compile_s: What the first pass of a shape takes more.
    """

    def __init__(self, model: nn.Module, monkeypatch: Any, compile_s: float = 0.0):
        super().__init__(model)
        self.now = 0.0
        self.num_passes = 0
        self.num_passes_left: int | None = None
        self._compile_s = compile_s
        self._shapes: set[tuple[int, int]] = set()
        monkeypatch.setattr(probe_module.time, "perf_counter", lambda: self.now)

    def over(self, lm: Any, ways: Any = None) -> Target:
        return self  # nothing is compiled here: its own arrays will do

    def verify(self, tokens: mx.array, slabs: list[mx.array], **places: Any) -> Any:
        if self.num_passes == self.num_passes_left:
            raise KeyboardInterrupt
        self.num_passes += 1
        shape = (tokens.shape[1], self.layout.capacity(slabs))
        if shape not in self._shapes:
            self._shapes.add(shape)
            self.now += self._compile_s
        self.now += 2 if tokens.shape[1] == 1 else 3
        return super().verify(tokens, slabs, **places)


def test_a_probe_goes_on_where_it_stopped(monkeypatch):
    """In pieces it finds what it finds at once, and does nothing twice."""
    target = Timed(inexact_pair([4, 9], first=2).target, monkeypatch)
    whole = probe(Rounds(target))
    assert whole is not None
    assert whole.num_passes == 81
    assert whole.fill_cost == 1.5
    assert whole.seconds == target.now > 0
    assert whole.equal == dict.fromkeys((1, 2), (1, 2, 4, 5, 6, 7))
    compared, found, num_runs = Compared(), None, 0
    while found is None:
        began = target.now
        found = probe(Rounds(target), budget_s=60, compared=compared)
        num_runs += 1
        assert target.now - began <= 2 * 60
    assert num_runs > 3
    num_passes = whole.num_passes + num_runs * TIMING_PASSES
    assert found == replace(whole, seconds=found.seconds, num_passes=num_passes)


def test_compiling_takes_no_time_from_a_probe(monkeypatch):
    target = Timed(reference_pair().target, monkeypatch, compile_s=1000)
    assert probe(Rounds(target), budget_s=400) is not None
    assert target.now > 10_000


def test_what_was_compared_is_no_verdict_until_all_of_it_was(monkeypatch):
    """A number of drafts that was not compared yet might be the one that differs."""
    target = Timed(inexact_pair([9]).target, monkeypatch)
    compared = Compared()
    assert probe(Rounds(target), budget_s=60, compared=compared) is None
    assert compared.equal
    assert all(rows == (1, 2) for rows in compared.equal.values())
    verdict = probe(Rounds(target), compared=compared)
    assert verdict is not None
    assert verdict.equal == {1: ALL[:-1], 2: ALL[:-1]}


def test_plain_rounds_of_other_weights_are_not_compared_with(monkeypatch):
    pair = inexact_pair([])
    target = Timed(pair.target, monkeypatch)
    compared = Compared()
    assert probe(Rounds(target), budget_s=60, compared=compared) is None
    assert compared.plain
    norm = pair.target.language_model.model.norm
    norm.weight[:] = norm.weight * 2  # in place: the same array
    verdict = probe(Rounds(target), compared=compared)
    assert verdict is not None
    assert verdict.equal == {1: ALL, 2: ALL}
    assert verdict.max_difference == 0


@pytest.mark.parametrize(
    "damage",
    [
        {"form": 1},
        {"equal": None},
        {"equal": {"K = 1": 1}},
        {"equal": {"K = 1": [3]}},
        {"equal": {"K = 1": [True]}},
        {"equal": {str(i): [] for i in range(10_000)}},
        {"max_difference": float("nan")},
        {"plain_s": {}},
        {"plain_s": {"1": [1.0], "2": ["1"]}},
        {"plain_s": {"1": [1.0], "2": [-1.0]}},
        {"plain_s": {"1": [1.0], "2": []}},
        {"num_passes": None},
        {"seconds": [1.0]},
    ],
)
def test_damage_is_nothing_that_was_compared(damage):
    whole = Compared({"K = 1": (1, 2)}, 0.5, {1: [1.0], 2: [2.0]}, 9, 3.0)
    assert Compared.from_dict(whole.to_dict()) == whole
    with pytest.raises(ValueError, match="must be"):
        Compared.from_dict({**whole.to_dict(), **damage})


@pytest.mark.usefixtures("many_slots")
def test_places_cover_the_wrap_and_the_growth():
    layout = reference_pair().rounds.target.layout
    start, wrap, grown = places(layout)
    assert start.offset < layout.window
    assert wrap.offset < layout.ring < wrap.offset + 3
    assert wrap.offset >= layout.window
    assert grown.capacity > max(wrap.capacity, 4096)
    assert grown.capacity - 4 * 9 < grown.offset <= grown.capacity - 2 * 9


def test_several_rows_are_probed_too():
    verdict = probe(inexact_pair(range(3, 10)).rounds, num_rows=2)
    assert verdict is not None
    assert verdict.equal == {1: (1,), 2: (1,)}


@pytest.mark.parametrize(
    ("rows", "equal_to_one", "equal_to_two"),
    [
        (range(2, 10), (), ALL),  # one row has a kernel of its own, as on M3
        ([4], (1, 2, 4, 5, 6, 7, 8), (1, 2, 4, 5, 6, 7, 8)),
        (range(6, 10), (1, 2, 3, 4), (1, 2, 3, 4)),  # another kernel at 6 rows, as M1
    ],
)
def test_rounding_by_rows_is_found(rows, equal_to_one, equal_to_two):
    verdict = probe(inexact_pair(rows).rounds)
    assert verdict is not None
    assert verdict.equal == {1: equal_to_one, 2: equal_to_two}
    assert verdict.max_difference > 0


def test_a_change_of_what_rounds_verify_reaches_the_probe(monkeypatch):
    """It runs the function that decodes, and no copy."""
    verify = round_module._verify

    def changed(target: Any, block: mx.array, *args: Any, **options: Any) -> Any:
        output = verify(target, block, *args, **options)
        factor = 1 + 1e-5 * (block.shape[1] == 4)
        return replace(output, logits=output.logits * factor)

    monkeypatch.setattr(round_module, "_verify", changed)
    verdict = probe(inexact_pair([]).rounds)
    assert verdict is not None
    assert verdict.equal == dict.fromkeys((1, 2), (1, 2, 4, 5, 6, 7, 8))


@pytest.mark.parametrize("num_rows", [5, 9])
def test_the_last_row_of_a_block_counts(num_rows):
    """What a tile leaves over may take another kernel than the tile."""
    pair = inexact_pair([num_rows], first=num_rows - 1)
    verdict = probe(pair.rounds)
    assert verdict is not None
    others = tuple(k for k in ALL if k != num_rows - 1)
    assert verdict.equal == {1: others, 2: others}


def test_a_probe_that_has_no_time_for_one_comparison_ends_at_once(monkeypatch):
    target = Timed(reference_pair().target, monkeypatch)
    assert probe(Rounds(target), budget_s=15) is None
    assert target.num_passes == TIMING_PASSES


def test_a_probe_that_is_wanted_whole_does_not_begin_with_a_part(monkeypatch):
    target = Timed(reference_pair().target, monkeypatch)
    assert probe(Rounds(target), budget_s=100, is_whole=True) is None
    assert target.num_passes == TIMING_PASSES
    assert probe(Rounds(target), budget_s=200, is_whole=True) is not None


@pytest.mark.parametrize(
    ("family", "exactness"),
    [
        ("e2b", "exact"),
        ("26b-a4b", "exact"),
        (SHORT, "auto"),
        # Of which test_exactness.py compares blocks with single steps.
        *(
            pytest.param(family, "exact", marks=pytest.mark.slow)
            for family in ("e4b", "12b", "31b")
        ),
    ],
)
def test_exact_text_is_byte_equal(family, exactness):
    pair = reference_pair(family)
    tokens, logits, stats = decode(pair, 0, exactness)
    assert not stats.engaged
    for num_draft_tokens in (1, 8, None) if family == SHORT else (4,):
        found = decode(pair, num_draft_tokens, exactness)
        assert found[:2] == (tokens, logits)
        assert found[2].exactness.startswith(
            "exact: logits proved byte-equal for K = 0 to 8"
        )
        assert found[2].max_difference == 0
        assert num_draft_tokens is None or found[2].engaged


@pytest.mark.parametrize("settings", [{}, {"temp": 0.9, "seed": 3, "top_k": 20}])
def test_exact_mode_fills_plain_rounds_up_where_one_row_differs(settings):
    pair = inexact_pair(range(2, 10))
    sampling = SamplingParams(**settings)
    tokens, logits, plain = decode(pair, 0, "exact", sampling=sampling)
    for num_draft_tokens in (1, 3, 8):
        found = decode(pair, num_draft_tokens, "exact", sampling=sampling)
        assert found[:2] == (tokens, logits)
        assert found[2].engaged
        assert "filled up to 2 rows" in found[2].exactness
    # What was built in would be seen: unfilled plain rounds have other bytes.
    assert decode(pair, 0, "auto", sampling=sampling)[1] != logits
    assert "filled up to 2 rows" in plain.exactness


def test_auto_takes_what_was_proved():
    pair = inexact_pair(range(2, 10))
    logits = decode(pair, 0, "exact")[1]
    found = decode(pair, 4, "auto")
    assert found[1] == logits
    assert found[2].exactness.startswith("exact")
    assert found[2].max_difference == largest_difference(pair) > 0


def test_a_number_of_drafts_that_differs_is_not_used():
    pair = inexact_pair([4])
    logits = decode(pair, 0, "exact")[1]
    found = decode(pair, 3, "exact")
    assert found[1] == logits
    assert set(found[2].num_draft_tokens) == {2}  # the next smaller one
    assert found[2].exactness.endswith("2 drafts in place of 3, not proved")
    assert decode(pair, None, "exact")[1] == logits


def test_exact_mode_fails_closed():
    pair = inexact_pair(range(1, 10), step=1e-4)
    tokens, logits, _ = decode(pair, 0, "exact")
    for num_draft_tokens in (4, None):
        found = decode(pair, num_draft_tokens, "exact")
        assert found[:2] == (tokens, logits)
        assert not found[2].engaged
        assert "no number of drafts gave the bytes" in found[2].why_not_engaged


def test_a_fixed_number_below_what_was_proved_says_so():
    pair = inexact_pair([2, 3, 4], step=1e-4)
    stats = decode(pair, 2, "exact")[2]
    assert not stats.engaged
    assert stats.why_not_engaged == "0 drafts in place of 2, not proved"


def test_exact_mode_fills_up_without_a_drafter_too():
    """The same text as with one, on the same machine."""
    pair = inexact_pair([1])
    logits = decode(pair, 4, "exact")[1]
    alone = Pair(pair.target)
    found = decode(alone, None, "exact")
    assert found[1] == logits
    assert "filled up to 2 rows" in found[2].exactness


def test_changed_weights_are_probed_anew():
    pair = inexact_pair([])
    assert decode(pair, 4, "exact", num_tokens=4)[2].exactness.endswith("K = 0 to 8")
    mlp = pair.target.layers[0].mlp
    mlp.down_proj.weight = -mlp.down_proj.weight
    mlp.down_proj = RoundedByRows(mlp.down_proj, [9], 0.0)
    assert decode(pair, 4, "exact", num_tokens=4)[2].exactness.endswith("K = 0 to 7")


def test_a_probe_that_was_given_up_is_not_tried_again(monkeypatch):
    pair = inexact_pair([])
    monkeypatch.setattr("mlx_gemma_mtp.pair.planning._PROBE_BUDGET_S", 1e-9)
    stats = decode(pair, 4, "auto", num_tokens=4)[2]
    assert "the probe takes long" in stats.exactness
    assert stats.max_difference is None
    monkeypatch.setattr("mlx_gemma_mtp.pair.planning.probe", None)  # must not be called
    assert decode(pair, 4, "auto", num_tokens=4)[2].exactness == stats.exactness


@pytest.fixture
def timed_pair(monkeypatch):
    """Loads one pair again and again, as processes would; 60 seconds are a budget."""
    monkeypatch.setattr("mlx_gemma_mtp.pair.planning._PROBE_BUDGET_S", 60)

    def load() -> tuple[Pair, Timed]:
        pair = inexact_pair([4])
        target = Timed(pair.target, monkeypatch)
        monkeypatch.setattr(pair.rounds, "target", target)
        return pair, target

    return load


def test_requests_bring_the_probe_to_its_end(timed_pair):
    states: list[str] = []
    while not states or not states[-1].startswith("exact"):
        pair, _ = timed_pair()
        states.append(decode(pair, 4, "auto", num_tokens=2)[2].exactness)
        assert (pair.calibration.verdict(1) is None) == states[-1].startswith("not")
    assert len(states) > 3
    assert all("goes on with the next request" in state for state in states[:-1])
    assert pair.calibration.verdict(1).equal == dict.fromkeys(
        (1, 2), (1, 2, 4, 5, 6, 7, 8)
    )
    again, _ = timed_pair()
    assert decode(again, 4, "exact", num_tokens=2)[2].engaged
    assert not again.calibration.compared(1).equal  # no longer needed


def test_exact_decoding_ends_a_probe_that_auto_began(timed_pair):
    pair, target = timed_pair()
    decode(pair, 4, "auto", num_tokens=2)
    before = target.num_passes
    assert decode(pair, 4, "exact", num_tokens=2)[2].exactness.startswith("exact")
    assert target.num_passes - before < 80


def test_what_an_interrupted_probe_has_compared_is_kept(timed_pair):
    pair, target = timed_pair()
    target.num_passes_left = target.num_passes + 40  # those of the text among them
    with pytest.raises(KeyboardInterrupt):
        decode(pair, 4, "exact", num_tokens=2)
    again, _ = timed_pair()
    assert len(again.calibration.compared(1).equal) >= 8
    assert again.calibration.verdict(1) is None


def test_a_probe_that_does_not_fit_is_given_up(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("[malloc] too much")

    monkeypatch.setattr("mlx_gemma_mtp.pair.planning.probe", fail)
    pair = inexact_pair([])
    assert decode(pair, 4, "auto", num_tokens=4)[2].engaged
    with pytest.raises(RuntimeError, match="too much"):
        decode(pair, 4, "exact", num_tokens=4)


def test_auto_says_when_it_is_not_exact_and_how_far_logits_differ():
    pair = inexact_pair(range(1, 10), step=1e-4)
    stats = decode(pair, 4, "auto")[2]
    assert stats.engaged
    assert stats.exactness.startswith("not exact")
    assert stats.max_difference == largest_difference(pair) > 0


def test_endless_sampling_without_a_seed_needs_no_probe(monkeypatch):
    pair = reference_pair()
    monkeypatch.setattr("mlx_gemma_mtp.pair.planning.probe", None)  # must not be called
    request = Request(PROMPT, None, sampling=SamplingParams(temp=1.0))
    plan = make_plan(pair, [request], num_draft_tokens=None, exactness="exact")
    assert plan.route.state.startswith("drafts judged by block")
    assert plan.route.has_drafts


def test_fixed_numbers_of_drafts_teach_the_controller():
    """What rounds chosen by hand have told serves the automatic choice."""
    pair = new_pair()
    learnt = pair.calibration.controller("greedy", num_rows=1, min_rows=1)
    for k in (0, 3):
        assert not learnt.costs.has_measured(k)
        decode(pair, k, "fast")
        assert learnt.costs.has_measured(k)
    assert learnt.acceptance.num_tried > 0


def test_the_verdict_is_remembered_across_pairs(monkeypatch):
    pair = new_pair()
    decode(pair, 4, "auto", num_tokens=4)
    monkeypatch.setattr("mlx_gemma_mtp.pair.planning.probe", None)  # must not be called
    again = new_pair()
    assert decode(again, 4, "exact", num_tokens=4)[2].engaged


class ByCapacity(Target):
    """A target whose logits hang on the capacity, as unfused attention's may."""

    def verify(self, tokens: mx.array, slabs: list[mx.array], **places: Any) -> Any:
        output = super().verify(tokens, slabs, **places)
        factor = 1 + 1e-6 * self.layout.capacity(slabs)
        return type(output)(output.logits * factor, output.hidden, output.slabs)


@pytest.fixture
def by_capacity(monkeypatch):
    """Such a pair, with slabs that grow often."""
    pair = new_pair()
    rounds = pair.rounds
    monkeypatch.setattr(rounds, "target", ByCapacity(pair.target))
    monkeypatch.setattr(capacity_module, "slots_ahead", lambda: 8)
    monkeypatch.setattr(cache_module, "CAPACITY_BLOCK", 32)
    return pair


def test_exact_mode_grows_where_plain_decoding_grows(by_capacity):
    num_tokens = 44
    tokens, logits, stats = decode(by_capacity, 0, "exact", num_tokens=num_tokens)
    assert stats.exactness.startswith("exact")
    for num_draft_tokens in (1, 8):
        found = decode(by_capacity, num_draft_tokens, "exact", num_tokens=num_tokens)
        assert found[2].engaged
        assert found[:2] == (tokens, logits)
    # So it does whatever is proved.
    assert decode(by_capacity, 8, "fast", num_tokens=num_tokens)[1] == logits


def test_rows_that_share_slabs_have_them_reserved(by_capacity):
    def rows(num_draft_tokens, max_tokens):
        requests = [Request(PROMPT, max_tokens), Request([5, 6, 7], max_tokens)]
        decoder = make_decoder(
            by_capacity,
            requests,
            num_draft_tokens=num_draft_tokens,
            exactness="exact",
            prefill_step_size=64,
        )
        found: dict[int, list[bytes]] = {0: [], 1: []}
        rounds = decoder.run()
        for emissions in rounds:
            for e in emissions:
                part = e.logits[e.place, : len(e.tokens)]
                found[e.sequence.index] += [np.array(row).tobytes() for row in part]
            if len(found[0]) > 50:
                break
        rounds.close()
        return found, decoder.stats

    assert rows(0, 40)[0] == rows(4, 40)[0]
    endless = rows(4, None)[1]
    assert not endless.engaged
    assert "share slabs" in endless.why_not_engaged


def test_a_probe_of_many_processes_is_read_back():
    """Each of them times plain rounds anew."""
    compared = Compared(equal={"5 of 256, K = 1": (1, 2)}, plain_s={})
    for _ in range(30):
        for rows in PLAIN_ROWS:
            compared.plain_s.setdefault(rows, []).extend([0.1] * 9)
        compared = Compared.from_dict(json.loads(json.dumps(compared.to_dict())))
    assert compared.equal == {"5 of 256, K = 1": (1, 2)}
