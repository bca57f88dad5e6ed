"""Training a drafter: records, unrolled steps, the loss, the loop.

Run: python -m pytest tests/tune/test_training.py
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gemma_mtp.cache.prompt import prefill_caches
from mlx_gemma_mtp.checkpoints.weights import load_drafter
from mlx_gemma_mtp.errors import OutputError, RequestError
from mlx_gemma_mtp.generation.tokens import draft_block, generate_tokens
from mlx_gemma_mtp.models.drafter import Drafter, DraftOutput
from mlx_gemma_mtp.models.target import Target
from mlx_gemma_mtp.pair.pair import Pair
from mlx_gemma_mtp.sampling.acceptance import Draft, expected_lengths
from mlx_gemma_mtp.sampling.distribution import Distribution, distribution
from mlx_gemma_mtp.sampling.graph import sampling_arrays, sampling_graph
from mlx_gemma_mtp.sampling.params import SamplingParams
from mlx_gemma_mtp.tune.recording.records import Record, Recorder, Records
from mlx_gemma_mtp.tune.recording.texts import Text
from mlx_gemma_mtp.tune.report.measured import Point
from mlx_gemma_mtp.tune.settings import TrainingSettings
from mlx_gemma_mtp.tune.training import objective as objective_module
from mlx_gemma_mtp.tune.training.adapters import add_adapters, trainable
from mlx_gemma_mtp.tune.training.divergence import (
    acceptance,
    cluster_divergence,
    divergence,
    foretold,
    reached,
)
from mlx_gemma_mtp.tune.training.objective import Objective, best_tokens
from mlx_gemma_mtp.tune.training.optimizer import schedule
from mlx_gemma_mtp.tune.training.trainer import Material, Trainer, batch
from mlx_gemma_mtp.tune.training.unrolling import Cutter, unroll
from tests import tiny

K = 3
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temp=0.7, top_p=0.95, top_k=20, seed=1)
PROMPT = [2, 40, 50, 60, 70, 80, 90]


@pytest.fixture(autouse=True)
def _plain_graphs():
    with tiny.uncompiled():
        yield


def drafter_of(pair: Pair) -> Drafter:
    assert pair.drafter is not None
    return pair.drafter


def named(tree: object) -> dict[str, mx.array]:
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(tree)))


def number(array: mx.array) -> float:
    return cast(float, array.item())


@cache
def float32_pair(family: str) -> Pair:
    """A random pair that computes in float32."""
    pair = tiny.new_pair(family)
    pair.target.set_dtype(mx.float32)
    drafter_of(pair).set_dtype(mx.float32)
    return Pair(pair.target, pair.drafter)


@cache
def own_text(family: str, length: int = 40) -> Text:
    """A text that the target wrote greedily, longer than its window of 16."""
    pair = float32_pair(family)
    tokens = [
        *PROMPT,
        *generate_tokens(pair, PROMPT, max_tokens=length, num_draft_tokens=0),
    ]
    return Text(tokens, len(PROMPT), "x")


def recorded(
    family: str, params: SamplingParams = GREEDY, step_size: int = 512
) -> Record:
    target = Target(float32_pair(family).target)
    return Recorder(target, params, step_size=step_size).record(own_text(family))


def cutter(family: str, num_places: int = 64, num_draft_tokens: int = K) -> Cutter:
    target = Target(float32_pair(family).target)
    return Cutter(target.layout, target.embed, num_draft_tokens, num_places, mx.float32)


# Records


@pytest.mark.parametrize("family", tiny.families("e2b", "26b-a4b"))
def test_record_is_what_one_pass_gives(family):
    """Hidden states and distributions of a plain pass of mlx-lm's model."""
    text, record = own_text(family), recorded(family, SAMPLED, step_size=7)
    pair = float32_pair(family)
    start, tokens = len(PROMPT), mx.array(text.tokens)[None]
    target = Target(pair.target)
    hidden = target.read(tokens, prefill_caches(target.layout))
    logits = pair.target(tokens)[0]
    assert record.num_places == len(text.tokens) - start - 1
    assert mx.allclose(record.hidden, hidden[0, start - 1 : -2], atol=1e-4)
    found = distribution(
        logits[None, start:-1],
        sampling_arrays([SAMPLED]),
        group=sampling_graph([SAMPLED]).groups[0],
        positions=mx.zeros((1, record.num_places), dtype=mx.int32),
    )
    dense = mx.put_along_axis(
        mx.zeros(logits[start:-1].shape), record.token_ids, record.probs, axis=-1
    )
    wanted = mx.put_along_axis(
        mx.zeros(logits[start:-1].shape), found.token_ids[0], found.probs[0], axis=-1
    )
    assert mx.allclose(dense, wanted, atol=1e-4)
    next_probs = mx.take_along_axis(wanted, tokens[0, start + 1 :, None], axis=-1)
    assert mx.allclose(record.next_probs, next_probs[:, 0], atol=1e-4)


def test_record_of_an_unfiltered_distribution_keeps_the_most_likely_tokens():
    record = recorded("12b", SamplingParams(temp=1.0))
    assert record.token_ids.shape[1] == 64
    sums = record.probs.sum(axis=-1)
    assert mx.all(sums < 1)
    assert mx.all(record.probs[:, :-1] >= record.probs[:, 1:])


def test_greedy_record_foretells_its_own_text():
    record = recorded("12b")
    assert record.token_ids.shape == (record.num_places, 1)
    assert mx.array_equal(record.token_ids[:, 0], record.tokens[len(PROMPT) + 1 :])
    assert mx.array_equal(record.next_probs, mx.ones(record.num_places))


def test_record_comes_back_from_its_file(tmp_path):
    records, record = Records(tmp_path), recorded("e2b", SAMPLED)
    assert "one" not in records
    num_bytes = records.write("one", record)
    assert "one" in records
    assert num_bytes == records.num_bytes(["one"])
    found = records.read("one")
    assert found.start == record.start
    assert {k: v.first for k, v in found.kv.items()} == {
        k: v.first for k, v in record.kv.items()
    }
    for name, array in record.arrays.items():
        assert mx.array_equal(found.arrays[name], array), name
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


# Unrolled steps


@pytest.mark.parametrize("family", tiny.families("e2b", "26b-a4b"))
def test_unrolled_steps_are_the_rounds_own(family):
    """As long as drafts are the text's tokens, a step says what the engine's says."""
    text, record = own_text(family), recorded(family)
    pair = float32_pair(family)
    first = 0
    for chunk in cutter(family, num_places=13).chunks(record):
        outputs = unroll(drafter_of(pair), chunk, K)
        best = [np.array(best_tokens(output)) for output in outputs]
        for place in range(0, chunk.num_places, 5):
            end = len(PROMPT) + first + place + 1
            drafts = draft_block(pair, text.tokens[:end], K)
            for step in range(K):
                assert best[step][place] == drafts[step]
                if text.tokens[end + step : end + step + 1] != [drafts[step]]:
                    break
        first += chunk.num_places
    assert first == record.num_places


def test_chunks_see_what_whole_texts_see():
    """However a record is cut, every place has the same steps."""
    pair, record = float32_pair("12b"), recorded("12b")
    objective = Objective(K, 0.0)
    whole, parts = (
        mx.concatenate(
            [
                objective.accepted(drafter_of(pair), chunk)
                for chunk in cutter("12b", num_places=size).chunks(record)
            ]
        )
        for size in (64, 5)
    )
    assert mx.allclose(whole, parts, atol=1e-5)
    losses = [
        sum(
            number(objective.loss(drafter_of(pair), chunk))
            for chunk in cutter("12b", num_places=size).chunks(record)
        )
        for size in (64, 5)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# The loss


def output_of(probs: np.ndarray, token_ids: mx.array | None = None) -> DraftOutput:
    return DraftOutput(mx.log(mx.array(probs))[None], token_ids, mx.zeros((1,)))


def test_divergence_of_known_distributions():
    p, q = np.array([[0.5, 0.3, 0.2]]), np.array([[0.2, 0.2, 0.6]])
    ids = mx.array([[2, 0, 1]])
    probs = mx.array(np.take_along_axis(p, np.array(ids), axis=-1))
    said = foretold(output_of(q), ids, mx.array([1]), 1.0)
    tv = 0.5 * np.abs(p - q).sum()
    assert number(acceptance(said, probs)) == pytest.approx(1 - tv, abs=1e-6)
    kl = (p * np.log(p / q)).sum()
    assert number(divergence(said, probs)) == pytest.approx(kl, abs=1e-5)


def test_tokens_that_the_drafter_does_not_list_have_no_probability():
    q = np.array([[0.25, 0.75]])
    output = output_of(q, mx.array([[[4, 7]]]))
    said = foretold(output, mx.array([[7, 5]]), mx.array([6]), 0.0)
    assert mx.exp(said.log_probs).flatten().tolist() == pytest.approx(
        [0.75, 0.0], abs=1e-6
    )
    assert acceptance(said, mx.array([[0.5, 0.5]])).item() == pytest.approx(0.5)
    assert mx.exp(said.next_log_probs).item() == pytest.approx(0.0, abs=1e-6)


def test_temperature_of_drafts():
    q = np.array([[0.2, 0.8]])
    said = foretold(output_of(q), mx.array([[0, 1]]), mx.array([0]), 0.5)
    assert mx.exp(said.log_probs).flatten().tolist() == pytest.approx(
        [1 / 17, 16 / 17], 1e-5
    )


def test_reach_gives_the_expected_number_of_accepted_drafts():
    """Enumerated over all texts, it is that of the textbook's rejection sampling."""
    rng, size, steps = np.random.default_rng(3), 4, 3

    def chain() -> np.ndarray:
        return rng.dirichlet(np.full(size, 0.7), size=(steps, size))

    p, q = chain(), chain()  # of a token, by the step and the token before
    texts = list(itertools.product(range(size), repeat=steps))
    expected = 0.0  # of the rejection rule, over the drafter's own blocks
    weighted = 0.0  # of the objective's sum, over the target's own texts
    ids = mx.broadcast_to(mx.arange(size), (1, size))
    for x in texts:
        before = (0, *x[:-1])
        q_x = np.prod([q[i, before[i], x[i]] for i in range(steps)])
        rows = np.stack([q[i, before[i]] for i in range(steps)])
        judges = np.stack([p[i, before[i]] for i in range(steps)] + [p[0, 0]])
        every = mx.broadcast_to(mx.arange(size), (1, steps + 1, size))
        draft = Draft(
            mx.array([x]),
            Distribution(mx.log(mx.array(rows))[None], every[:, :-1], False),
        )
        judge = Distribution(mx.log(mx.array(judges))[None], every, False)
        expected += q_x * expected_lengths(draft, judge)[1].item()
        p_x = np.prod([p[i, before[i], x[i]] for i in range(steps)])
        reach = mx.ones(1)
        for i in range(steps):
            said = foretold(output_of(rows[i : i + 1]), ids, mx.array([x[i]]), 1.0)
            weighted += (
                p_x * (reach * acceptance(said, mx.array(judges[i : i + 1]))).item()
            )
            reach = reach * reached(said, mx.array([judges[i, x[i]]]))
    assert weighted == pytest.approx(expected, rel=1e-5)


def test_clusters_are_judged_by_the_mass_of_their_tokens():
    scores = mx.array([[1.0, 0.0, -1.0]])
    clusters, probs = mx.array([[0, 2, 0]]), mx.array([[0.5, 0.3, 0.2]])
    log_probs = np.array([1, 0, -1]) - np.log(np.exp([1, 0, -1]).sum())
    wanted = -(0.7 * log_probs[0] + 0.3 * log_probs[2])
    found = cluster_divergence(scores, clusters, probs)
    assert found.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("family", ["e2b", "12b"])
def test_gradients_are_those_of_finite_differences(family, monkeypatch):
    """Along random directions of all weights, in float32, on a tiny pair.

    Weights of steps are held, as the loss holds them: a least reach of 1 makes all 1.
    """
    monkeypatch.setattr(objective_module, "_LEAST_REACH", 1.0)
    pair, record = float32_pair(family), recorded(family, SAMPLED)
    drafter = drafter_of(pair)
    kept = drafter.trainable_parameters()
    clusters = None
    if drafter.masked_embedding is not None:
        drafter.masked_embedding.freeze(keys=["token_ordering"], recurse=False)
        clusters = drafter.masked_embedding.clusters_of_tokens()
    (chunk, *_) = cutter(family, num_places=6).chunks(record)
    objective = Objective(K, SAMPLED.temp, clusters)
    weights = drafter.trainable_parameters()
    _, gradients = nn.value_and_grad(drafter, objective.loss)(drafter, chunk)
    slopes = named(gradients)
    rng = np.random.default_rng(0)
    try:
        for _ in range(3):
            direction = {
                name: mx.array(rng.normal(size=array.shape).astype(np.float32))
                for name, array in named(weights).items()
            }
            norm = sum(number((d * d).sum()) for d in direction.values()) ** 0.5
            slope = sum(number((slopes[n] * d).sum()) for n, d in direction.items())

            def loss_at(size: float, direction=direction, norm=norm) -> float:
                moved = [
                    (name, array + size / norm * direction[name])
                    for name, array in named(weights).items()
                ]
                drafter.update(tree_unflatten(moved))
                return number(objective.loss(drafter, chunk))

            size = 0.02
            # Fourth order, so that the step can be wide beside float32's rounding.
            near = loss_at(size) - loss_at(-size)
            far = loss_at(2 * size) - loss_at(-2 * size)
            found = (8 * near - far) / (12 * size)
            assert found == pytest.approx(slope / norm, rel=0.03, abs=2e-3)
    finally:
        drafter.update(kept)
        drafter.unfreeze()


# The loop


@cache
def beginning_at(family: str, start: int) -> Record:
    """The record of a text whose prompt is that long."""
    recorder = Recorder(Target(float32_pair(family).target), GREEDY, step_size=64)
    return recorder.record(replace(own_text(family), num_prompt_tokens=start))


def material(folder: Path, family: str = tiny.SHORT, count: int = 6) -> Material:
    """Records of the same text, each beginning elsewhere."""
    records = Records(folder)
    names = [f"text-{i}" for i in range(count)]
    for i, name in enumerate(names):
        records.write(name, beginning_at(family, len(PROMPT) + 4 * (i % 6)))
    return Material(records, names[:-1], names[-1:])


def new_drafter(family: str = tiny.SHORT) -> Drafter:
    drafter = load_drafter(tiny.family_folder(family) / "drafter")
    trainable(drafter)
    return drafter


def trainer(
    folder: Path,
    drafter: Drafter | None = None,
    family: str = tiny.SHORT,
    on_point: Callable[[Point], None] = lambda point: None,
    **settings: Any,
) -> Trainer:
    drafter = new_drafter(family) if drafter is None else drafter
    usual = TrainingSettings(
        num_draft_tokens=K,
        learning_rate=3e-3,
        steps=9,
        batch_size=2,
        judge_every=3,
        save_every=2,
    )
    chosen = replace(usual, **settings)
    head = drafter.masked_embedding
    clusters = None if head is None else head.clusters_of_tokens()
    return Trainer(
        drafter,
        material(folder / "records", family),
        objective=Objective(K, 0.0, clusters),
        cutter=cutter(family, num_places=chosen.num_places or 64),
        settings=chosen,
        checkpoint=folder / "checkpoint.safetensors",
        on_point=on_point,
    )


def orderings(drafter: Drafter) -> list[int]:
    """The ids of a centroid head; none of a dense one."""
    head = drafter.masked_embedding
    return [] if head is None else cast(list[int], head.token_ordering.tolist())


class _StopError(Exception):
    pass


@pytest.mark.parametrize("family", ["e2b", tiny.SHORT])
def test_training_learns_and_keeps_the_best_weights(tmp_path, family):
    points: list[Point] = []
    drafter = new_drafter(family)
    ordering = orderings(drafter)
    own = trainer(
        tmp_path, drafter, family, points.append, steps=12, learning_rate=0.02
    )
    own.train()
    assert [point.step for point in points] == [0, 3, 6, 9, 12]
    assert points[-1].loss < 0.7 * points[0].loss
    lengths = [point.acceptance_length or 0 for point in points]
    assert max(lengths) > lengths[0]
    assert own.judged(["text-5"]).length == pytest.approx(max(lengths))
    assert orderings(drafter) == ordering


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Trainer:
    """All of a training, unbroken."""
    own = trainer(tmp_path_factory.mktemp("whole"))
    with tiny.uncompiled():
        own.train()
    return own


@pytest.mark.parametrize("stop_at", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_resumed_training_equals_an_unbroken_one(tmp_path, whole, stop_at):
    """Bit for bit, also where steps behind the last checkpoint were lost."""

    def stop(point: Point) -> None:
        if point.step == stop_at:
            raise _StopError

    broken = trainer(tmp_path / "broken", on_point=stop)
    with pytest.raises(_StopError):
        broken.train()
    resumed = trainer(tmp_path / "broken")
    assert 0 < resumed.progress.step <= stop_at
    resumed.train()
    for part in ("weights", "best", "optimizer"):
        found = named(getattr(resumed.progress, part))
        wanted = named(getattr(whole.progress, part))
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            assert mx.array_equal(found[name], array), name
    assert [replace(point, minutes=0) for point in resumed.progress.history] == [
        replace(point, minutes=0) for point in whole.progress.history
    ]


def test_interrupted_inside_a_step_it_resumes_before_it(tmp_path, whole, monkeypatch):
    broken = trainer(tmp_path / "broken", save_every=100)
    use, calls = broken._use, itertools.count()

    def interrupt(weights: dict[str, Any]) -> None:
        if next(calls) == 4:
            raise KeyboardInterrupt
        use(weights)

    monkeypatch.setattr(broken, "_use", interrupt)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer(tmp_path / "broken", save_every=100)
    assert resumed.progress.step == 4
    resumed.train()
    for part in ("weights", "optimizer"):
        found = named(getattr(resumed.progress, part))
        for name, array in named(getattr(whole.progress, part)).items():
            assert mx.array_equal(found[name], array), name


def test_resumed_adapters_equal_unbroken_ones(tmp_path):
    def adapted() -> Drafter:
        drafter = new_drafter()
        add_adapters(drafter, rank=2, scale=20.0, seed=1)
        return drafter

    def stop(point: Point) -> None:
        if point.step == 6:
            raise _StopError

    drafters = [adapted() for _ in range(3)]
    trainer(tmp_path / "whole", drafters[0], lora_rank=2).train()
    with pytest.raises(_StopError):
        trainer(tmp_path / "broken", drafters[1], on_point=stop, lora_rank=2).train()
    trainer(tmp_path / "broken", drafters[2], lora_rank=2).train()
    before = named(adapted().parameters())
    whole, resumed = (named(drafters[i].parameters()) for i in (0, 2))
    changed = set()
    for name, array in whole.items():
        assert mx.array_equal(resumed[name], array), name
        if not mx.array_equal(before[name].astype(mx.float32), array):
            changed.add(name.rpartition(".")[2])
    assert changed == {"lora_a", "lora_b"}


def test_training_ends_where_nothing_gets_better(tmp_path):
    own = trainer(tmp_path, steps=1000, learning_rate=1e-12, patience=2)
    own.train()
    assert own.progress.step == 6


def test_training_ends_with_its_minutes(tmp_path, monkeypatch):
    """A clock that gives a step six seconds, and a measurement as many."""
    ticks = itertools.count(0, 6)
    clock = "mlx_gemma_mtp.tune.training.trainer.time.monotonic"
    monkeypatch.setattr(clock, lambda: next(ticks))
    own = trainer(tmp_path, steps=1000, minutes=0.5)
    own.train()
    assert own.progress.step == 4
    assert own.progress.seconds == 5 * 6 + 6  # the last steps are measured, too


def test_memory_does_not_grow_with_the_data(tmp_path):
    """Records are read as they are needed, and given back."""
    peaks = []
    for count in (6, 24):
        folder = tmp_path / str(count)
        own = trainer(folder, steps=6, judge_every=100)
        own._material = material(folder / "records", count=count)
        mx.clear_cache()
        mx.reset_peak_memory()
        own.train()
        peaks.append(mx.get_peak_memory())
    assert peaks[1] < 1.1 * peaks[0]


def test_gradients_are_accumulated_over_chunks(tmp_path):
    """Small chunks give the gradients of whole texts."""
    found = []
    for size in (64, 5):
        own = trainer(tmp_path / str(size), num_places=size)
        loss, gradients = own._gradients(["text-0", "text-3"])
        found.append((loss, named(gradients)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for name, gradient in found[0][1].items():
        assert mx.allclose(gradient, found[1][1][name], rtol=1e-3, atol=1e-5), name


@given(count=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 9))
def test_every_epoch_has_every_text_once(count, size, seed):
    names = [str(i) for i in range(count)]
    steps = -(-3 * count // size)
    taken = [name for step in range(steps) for name in batch(names, size, seed, step)]
    assert all(len(batch(names, size, seed, step)) == size for step in range(steps))
    for epoch in range(3):
        assert sorted(taken[epoch * count : (epoch + 1) * count]) == sorted(names)


def test_damaged_checkpoint_is_told_in_one_line(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"nothing")
    with pytest.raises(OutputError, match="must be a file that a run wrote"):
        trainer(tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"num_draft_tokens": 0},
        {"num_draft_tokens": 9},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"minutes": 0.0},
        {"lora_rank": 0},
        {"steps": 0},
        {"num_places": 0},
    ],
)
def test_settings_are_checked(setting):
    name = next(iter(setting)).replace("_", "-")
    with pytest.raises(RequestError, match=f"--{name} must be"):
        TrainingSettings(**setting)


def test_learning_rate_goes_up_and_comes_down():
    rates = [schedule(i / 100) for i in range(101)]
    top = rates.index(max(rates))
    assert 0 < rates[0] < rates[top] == 1
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(0.02)
