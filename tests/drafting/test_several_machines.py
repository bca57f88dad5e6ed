"""The model of speed where several machines share a target.

Run: python -m pytest tests/drafting/test_several_machines.py
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma_mtp.checkpoints.shard_plan import shard_plans
from mlx_gemma_mtp.drafting.attention import reads
from mlx_gemma_mtp.drafting.bytes_read import (
    dense_weights,
    expert_weights,
    heads_of,
)
from mlx_gemma_mtp.drafting.chips import CHIPS
from mlx_gemma_mtp.drafting.links import JACCL, JACCL_FAST, LINKS, RING
from mlx_gemma_mtp.drafting.prior import DEFAULT_PRIOR
from mlx_gemma_mtp.drafting.speed_model import (
    Matmuls,
    acceptance_length,
    model,
    prior,
    sums_of_a_layer,
)
from mlx_gemma_mtp.models.families import FAMILIES, VOCAB_SIZE
from mlx_gemma_mtp.models.published import text_config

M4_MAX = CHIPS["M4 Max"]
B31 = FAMILIES["31b"]
names = st.sampled_from(list(FAMILIES))
links = st.sampled_from(LINKS)
chips = st.sampled_from(list(CHIPS.values()))
counts = st.integers(0, 8)


def test_weights_of_31b_on_two_machines_by_hand():
    gated = 60 * 3 * 21504 // 2
    sliding = 49 * (2 * 16 * 256 + 2 * 8 * 256)  # queries and output, keys and values
    full = 9 * (2 * 16 * 512 + 2 * 512)  # keys that are the values
    drafted = 2 * 16 * 256 + 2 * 16 * 256 + 2 * 16 * 512 + 4 * 512
    width = VOCAB_SIZE // 2 + gated + sliding + full + drafted
    assert dense_weights(B31, 2) == 5376 * width


def test_experts_of_26b_are_split_between_groups():
    family = FAMILIES["26b-a4b"]
    each = 30 * 8 * 3 * 2816
    assert expert_weights(family, 2) == each * 6 * 64
    assert expert_weights(family, 4) == each * 3 * 64
    assert expert_weights(B31, 4) == 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [2, 4])
def test_weights_are_those_of_the_plan(name, size):
    """But for the table, of which a part is read, and tables of which rows are."""
    family, text = FAMILIES[name], text_config(name)
    plan = shard_plans(text, size)[0]
    planned = (plan.split_bytes + plan.whole_bytes) / 2
    planned -= VOCAB_SIZE * text["hidden_size"] * (1 - 1 / size)
    per_layer = text["num_hidden_layers"] * text["hidden_size_per_layer_input"]
    planned -= text["vocab_size_per_layer_input"] * per_layer
    if experts := family.target_text["num_experts"]:
        chosen = family.target_text["top_k_experts"]
        planned -= expert_weights(family, size) * (experts - chosen) / chosen
    read = dense_weights(family, size) + expert_weights(family, size)
    assert read == pytest.approx(planned, rel=2e-3)


def test_sums_of_a_pass_by_hand():
    """Five rows of 5376 numbers of two bytes, 120 times, and half of their logits."""
    speed = model(M4_MAX, B31, size=2, link=JACCL_FAST)
    each = 4e-6 + 26e-6 + 5 * 5376 * 2 / 6.2e9
    logits = 4e-6 + 26e-6 + 5 * 131072 * 2 / 6.2e9
    assert speed.sums_s(5) == pytest.approx(120 * each + logits)
    joined = [sums_of_a_layer(f) == (1, 2) for f in FAMILIES.values()]
    assert joined == [False, False, False, True, False]


def test_a_round_by_hand():
    """A pass of half the bytes, four draft steps as ever, two small sums."""
    one = model(M4_MAX, B31)
    two = replace(one, size=2, link=JACCL)
    growth = one.constants.growth(5, M4_MAX)
    read_s = dense_weights(B31, 2) * growth * 4.5 / 8 / (0.9 * 546e9)
    told_s = 2 * 206e-6
    expected = read_s + 60 * 0.136e-3 + two.sums_s(5) + 4 * one.step_s() + told_s
    assert two.round_s(4) == pytest.approx(expected)
    assert two.step_s() == one.step_s()
    # Without drafts only the decision is told.
    assert two.round_s(0) == pytest.approx(two.pass_s(1) + 206e-6)


def test_keys_of_a_rank_are_those_that_its_queries_read():
    one = model(M4_MAX, B31, context=50_000)
    two = replace(one, size=2, link=JACCL)
    assert heads_of(B31, "full_attention", 2) == (16, 2)
    many = reads(5, sharing=8, kv_heads=2, generation=16)
    each = 2 * 2 * 10 * 2 * 512 * many
    assert two.pass_key_s(5) == pytest.approx(each / (0.9 * 546e9))
    assert two.pass_key_s(5) < one.pass_key_s(5)
    sliding = (one.pass_s(1) - one.rows_s(1) - 50_000 * one.pass_key_s(1)) / 2
    assert two.pass_s(1) - two.rows_s(1) - 50_000 * two.pass_key_s(1) == (
        pytest.approx(sliding)
    )
    # One head of keys is read whole by both.
    whole = model(M4_MAX, FAMILIES["12b"])
    assert replace(whole, size=2).pass_key_s(1) == whole.pass_key_s(1)


@given(names, chips, links, counts)
def test_one_machine_is_what_it_was(name, chip, link, k):
    one = model(chip, FAMILIES[name], context=3000)
    assert replace(one, link=link).round_s(k) == one.round_s(k)
    assert one.sums_s(k + 1) == 0


@given(names, chips, counts)
def test_a_slower_link_is_slower(name, chip, k):
    took_s = [
        model(chip, FAMILIES[name], size=2, link=link).round_s(k)
        for link in (JACCL_FAST, JACCL, RING)
    ]
    assert took_s == sorted(took_s)
    assert len(set(took_s)) == 3


@given(names, chips, links, st.sampled_from((2, 4)), st.sampled_from((4, 8, 16)))
def test_sums_are_paid_once_for_several_tokens(name, chip, link, size, bits):
    """So drafts pay at least as far as on one machine."""
    alone = model(chip, FAMILIES[name], bits=bits)
    together = replace(alone, size=size, link=link)
    assert together.best_draft_tokens(0.7) >= alone.best_draft_tokens(0.7)


def best_drafts(known):
    lengths = [acceptance_length(k, known.acceptance) for k in range(9)]
    return max(range(9), key=lambda k: lengths[k] / known.relative_cost[k])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("matmuls", [Matmuls(), Matmuls(has_kernel=True)])
def test_the_prior_knows_how_many_machines_there_are(family, matmuls):
    alone, two, four = (
        prior("applegpu_g16s", family, matmuls=matmuls, size=size) for size in (1, 2, 4)
    )
    assert prior("applegpu_g16s", family, matmuls=matmuls) == alone
    assert best_drafts(alone) < best_drafts(two) <= best_drafts(four)
    for k in range(1, 9):
        assert two.relative_cost[k] < alone.relative_cost[k]
    chip = CHIPS["M4 Max"]
    if not matmuls.has_kernel:
        speed = model(chip, FAMILIES[family], size=2)
        costs = [speed.relative_cost(k) for k in range(9)]
        assert two.relative_cost == pytest.approx(costs)
    ring = prior("applegpu_g16s", family, matmuls=matmuls, size=2, link=RING)
    assert ring.relative_cost[8] < two.relative_cost[8]


def test_passes_that_several_machines_measured_stand_for_modelled_ones():
    took_s = {1: 0.030, 9: 0.060}
    matmuls = Matmuls(pass_seconds=took_s)
    found = prior("applegpu_g16s", "31b", matmuls=matmuls, size=2).relative_cost
    speed = model(M4_MAX, B31, size=2)
    base = speed.rows_s(1) + 206e-6
    last = 2 * speed.rows_s(1) + 8 * speed.step_s() + 2 * 206e-6
    assert found[8] == pytest.approx(last / base)


def test_unknown_machines_get_the_default():
    assert prior(None, "31b", size=2) == DEFAULT_PRIOR
