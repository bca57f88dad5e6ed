"""Targets cut into parts: what several processes decode together is what one decodes.

The ring backend joins processes of this machine. Run: pytest tests/distributed
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from mlx_gemma_mtp.checkpoints.shard_plan import TOLERANCE as TOLERATED
from mlx_gemma_mtp.distributed.patience import FIRST_S
from mlx_gemma_mtp.distributed.watchdog import LIMIT_S
from mlx_gemma_mtp.generation.tokens import generate_tokens
from tests.distributed import parts
from tests.distributed.ends import KINDS, SIZES, others
from tests.distributed.folders import converted, published
from tests.distributed.launching import finish, start_with
from tests.tiny import (
    FAMILIES,
    REFERENCE,
    SHORT,
    family_folder,
    reference_pair,
    uncompiled,
)

TOLERANCE = 5e-4  # of a logit; measured 2e-5


def run(size, jobs, folder, patience_s=120):
    """What each rank found, job by job: all must have found the same."""
    words = [f"{job}:{path}" for job, path in jobs]
    arguments = ["-m", "tests.distributed.parts", *words]
    ended = finish(start_with(size, arguments, folder), patience_s)
    assert [rank.status for rank in ended] == [0] * size, ended
    return [json.loads(rank.output.splitlines()[-1]) for rank in ended]


def test_parts_give_what_the_whole_gives(tmp_path):
    """Logits and drafts of every family, texts of every kind: one start for all.

    And a pair as the converter has quantized it, its experts in five groups of 64.
    """
    jobs = [("near", REFERENCE / family) for family in FAMILIES]
    packed = converted(tmp_path, "26b-a4b", bits=4, group_size=64)
    jobs += [("texts", family_folder(SHORT)), ("packed", packed)]
    ranks = run(2, jobs, tmp_path)
    for place in range(len(FAMILIES)):
        check_near(ranks, place)
    for rank in ranks:
        for kind, (whole, part) in rank[-2].items():
            assert part == whole, kind
    check_packed(ranks)


def test_whoever_leaves(tmp_path):
    """A text ends where rank 0 leaves it, and only there; what follows is whole."""
    jobs = [("left", family_folder(SHORT)), ("proved", family_folder(SHORT))]
    (first, proved), (other, others_proved) = run(2, jobs, tmp_path)
    assert first["counts"] == [9, 60]
    assert first["counts"][0] <= other["counts"][0] < 9 + 4 * 4
    assert other["counts"][1] == 9
    assert first["after"] == other["after"]
    assert len(first["after"]) == 12
    # With two ranks every sum is a + b, whatever stands beside it.
    assert proved == others_proved == {"equal": list(range(1, 9)), "most": 0.0}


def test_rank_0_decides(tmp_path):
    """What others are asked for, and would draft and decide, changes nothing."""
    folder = family_folder(SHORT)
    jobs = [(job, folder) for job in ("led", "crossed", "cold")]
    alone, other = run(2, jobs, tmp_path)
    texts = alone[0]["texts"]
    assert other[0]["texts"] == texts
    pair = reference_pair()
    prompts = parts.PROMPTS[0], parts.PROMPTS[1], parts.PROMPTS[0]
    kinds: list[dict[str, Any]] = [{}, {"temp": 1.0, "seed": 3}, {}]
    with uncompiled():
        for found, prompt, kind in zip(texts, prompts, kinds, strict=True):
            assert found == list(generate_tokens(pair, prompt, max_tokens=12, **kind))
    for rank in (alone, other):
        twice, processors = rank[1]["said"]
        assert twice.startswith("several machines must decode one text at a time")
        assert processors.startswith("a text on several machines must be without")
        assert rank[1]["rest"] == 11
        assert rank[1]["again"] == texts[0]
        # Where one traces, the others wait for it, and only then.
        assert rank[2]["limits"] == [
            [FIRST_S, LIMIT_S],
            [LIMIT_S, LIMIT_S],
            [FIRST_S, LIMIT_S],
        ]


def test_ranks_that_loaded_other_things(tmp_path):
    for rank in run(2, [("unlike", family_folder(SHORT))], tmp_path):
        weights, drafter = rank[0]["said"]
        assert weights.startswith("all ranks must have the same target")
        assert drafter.startswith("all ranks must have the same drafter")


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_program_that_fails_ends_the_others(tmp_path, victim):
    """With a line, and rank 0 tells why. Another one's is heard of behind the text."""
    words = [
        "-m",
        "tests.distributed.parts",
        f"failing:{victim}@{family_folder(SHORT)}",
    ]
    ended = finish(start_with(2, words, tmp_path))
    assert [rank.status for rank in ended] == [1, 1]
    assert ended[victim].errors.endswith("KeyError: 'no such place'\n")
    line = ended[1 - victim].errors.splitlines()[-1]
    if victim:
        assert "RanksError: Rank 0 of 2 must hear of the others: got RuntimeE" in line
    else:
        assert line.endswith(
            "RanksError: Rank 0 must go on as long as rank 1: got KeyError: 'no such "
            "place' there. See what it wrote, then start all again."
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["12b", "26b-a4b"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("size", [2, 4])
def test_quantized_pairs(tmp_path, family, bits, group_size, size):
    folder = converted(tmp_path, family, bits, group_size)
    ranks = run(size, [("exact", folder), ("packed", folder)], tmp_path)
    check_packed(ranks)
    if size == 2:
        for found, _ in ranks:
            assert found == {"equal": list(range(1, 9)), "most": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["26b-a4b", "31b"])
def test_four_layers_of_published_widths(tmp_path, family):
    """What MLX holds is the plan to within 3 %; it takes 6 GB of memory, 3 of disk.

    Texts are those of two layers, one of each kind: four of 31B take a busy machine
    longer than anybody waits for a test.
    """
    two, four = (
        published(tmp_path / str(n), family, num_layers=n, vocab_size=2048, bits=4)
        for n in (2, 4)
    )
    ranks = run(2, [("wide", two)], tmp_path, patience_s=1800)
    check_packed(ranks)
    for (found,) in ranks + run(2, [("held", four)], tmp_path, patience_s=900):
        assert found["weights"] == found["planned"]
        assert abs(found["held"] - found["planned"]) <= TOLERATED * found["planned"]
        assert found["peak"] <= 1.1 * found["planned"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_four_ranks(tmp_path, family):
    jobs = [(job, REFERENCE / family) for job in ("near", "texts", "left")]
    ranks = run(4, jobs, tmp_path)
    check_near(ranks, 0)
    for rank in ranks:
        assert all(whole == part for whole, part in rank[1].values())
        assert rank[2]["after"] == ranks[0][2]["after"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_numbers_of_drafts_are_proved_for_two(tmp_path, family):
    jobs = [("proved", REFERENCE / family), ("texts", REFERENCE / family)]
    for proved, texts in run(2, jobs, tmp_path):
        assert proved == {"equal": list(range(1, 9)), "most": 0.0}
        assert all(whole == part for whole, part in texts.values())


@pytest.mark.slow
def test_the_self_test_of_ranks(tmp_path):
    arguments = ["-m", "mlx_gemma_mtp.selftest", "--json", str(tmp_path / "found.json")]
    first, other = finish(start_with(2, arguments, tmp_path), patience_s=300)
    assert (first.status, other.status) == (0, 0), (first, other)
    assert "[pass] ranks" in first.output
    assert other.output == ""
    (section,) = json.loads((tmp_path / "found.json").read_text())["sections"]
    assert section["figures"]["ranks"] == 2
    assert min(section["figures"]["sum_s"].values()) > 0


@pytest.mark.slow
def test_sleeps_and_clocks_change_nothing(tmp_path):
    """Two hundred texts; each rank sleeps where it likes, and its clock runs wild."""
    jobs = [("disturbed", f"100@{family_folder(SHORT)}")]
    first, other = run(2, jobs, tmp_path, patience_s=900)
    assert first == other
    assert first[0]["same"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_all_end_with_one(tmp_path, kind, size):
    """Whenever one dies, stops or fails, the others end by themselves, with a line."""
    for moment in range(9):
        for left in others(kind, size, moment, tmp_path):
            assert left.status == 1, (moment, left)
            assert f"Rank {left.rank} of {size} must hear" in left.line or (
                f"Rank 0 must go on as long as rank {left.rank}: got KeyError: "
                "'no such place' there" in left.line
            ), (moment, left)


def check_packed(ranks):
    """What is held was planned; texts are those of all of it, with drafts or none."""
    for found in (rank[-1] for rank in ranks):
        assert found["weights"] == found["planned"]
        whole, drafted, plain = found["texts"]
        assert drafted == plain == whole == ranks[0][-1]["texts"][0]
        assert 0 < found["difference"] < TOLERANCE


def check_near(ranks, place):
    """Logits within the tolerance, drafts equal, on all ranks the same."""
    for rank in ranks:
        found = rank[place]
        assert 0 < found["difference"] < TOLERANCE  # 0 is no part
        whole, part = found["drafts"]
        assert part == whole
    assert all(a[place] == b[place] for a, b in pairwise(ranks))
