"""Training a drafter: records, unrolled steps, the loss, the loop.

Run: python -m pytest tests/test_tune_training.py
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gemma_mtp.acceptance import Draft, expected_lengths
from mlx_gemma_mtp.cache import prefill_caches
from mlx_gemma_mtp.config import SamplingParams
from mlx_gemma_mtp.drafter import Drafter, DraftOutput
from mlx_gemma_mtp.pair import Pair
from mlx_gemma_mtp.sampling import (
    Distribution,
    distribution,
    sampling_rows,
    sampling_rule,
)
from mlx_gemma_mtp.target import Target
from mlx_gemma_mtp.tokens import draft_block, generate_tokens
from mlx_gemma_mtp.tune.divergence import (
    acceptance,
    cluster_divergence,
    divergence,
    foretold,
    reached,
)
from mlx_gemma_mtp.tune.objective import Objective, best_tokens
from mlx_gemma_mtp.tune.recording import Record, Recorder, Records
from mlx_gemma_mtp.tune.settings import DIVERGENCES
from mlx_gemma_mtp.tune.texts import Text
from mlx_gemma_mtp.tune.unrolling import Cutter, unroll
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
    folder = tiny.REFERENCE / family
    pair = tiny.load_pair(folder / "target", folder / "drafter")
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


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_record_is_what_one_pass_gives(family):
    """Hidden states and distributions of a plain pass of mlx-lm's model."""
    text, record = own_text(family), recorded(family, SAMPLED, step_size=7)
    pair = float32_pair(family)
    start, tokens = len(PROMPT), mx.array(text.tokens)[None]
    target = Target(pair.target)
    hidden = target.read(tokens[0], prefill_caches(target.layout))
    logits = pair.target(tokens)[0]
    assert record.num_places == len(text.tokens) - start - 1
    assert mx.allclose(record.hidden, hidden[0, start - 1 : -2], atol=1e-4)
    found = distribution(
        logits[None, start:-1],
        sampling_rows([SAMPLED]),
        rule=sampling_rule([SAMPLED]),
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


@pytest.mark.parametrize("family", tiny.FAMILIES)
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
    objective = Objective("ce", K, 0.0, 0.1)
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


def test_divergences_of_known_distributions():
    p, q = np.array([[0.5, 0.3, 0.2]]), np.array([[0.2, 0.2, 0.6]])
    ids = mx.array([[2, 0, 1]])
    probs = mx.array(np.take_along_axis(p, np.array(ids), axis=-1))
    said = foretold(output_of(q), ids, mx.array([1]), 1.0)
    found = {kind: number(divergence(kind, said, probs)) for kind in DIVERGENCES}
    tv = 0.5 * np.abs(p - q).sum()
    assert found["tv"] == pytest.approx(tv, abs=1e-6)
    assert found["acceptance"] == pytest.approx(-np.log(1 - tv), abs=1e-5)
    assert found["kl"] == pytest.approx((p * np.log(p / q)).sum(), abs=1e-5)
    assert found["ce"] == pytest.approx(-np.log(0.2), abs=1e-5)


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


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("family", ["e2b", "12b"])
def test_gradients_are_those_of_finite_differences(family, kind):
    """Along random directions of all weights, in float32, on a tiny pair.

    Weights of steps are held, as the loss holds them: ``least_reach`` 1 makes all 1.
    """
    pair, record = float32_pair(family), recorded(family, SAMPLED)
    drafter = drafter_of(pair)
    kept = drafter.trainable_parameters()
    clusters = None
    if drafter.masked_embedding is not None:
        drafter.masked_embedding.freeze(keys=["token_ordering"], recurse=False)
        clusters = drafter.masked_embedding.clusters_of_tokens()
    (chunk, *_) = cutter(family, num_places=6).chunks(record)
    objective = Objective(kind, K, SAMPLED.temp, 1.0, clusters)
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
