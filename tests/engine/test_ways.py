"""The whole engine with layers run in every way, on Metal's text in the harness.

Compared                        with                           tolerance
rows of a block                 plain rounds                   0: every byte
logits                          MLX's own operations           1e-4 of float32
texts of every rule and K       plain decoding's, and MLX's    0: every token
kernels of a way                MLX's operations               layer_trial's

Run: python -m pytest tests/engine/test_ways.py
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_gemma_mtp.cache import masks
from mlx_gemma_mtp.generation.tokens import generate_tokens
from mlx_gemma_mtp.kernels import add_norm, common, layer_trial
from mlx_gemma_mtp.kernels.layer_trial import LayerSizes, Mixture
from mlx_gemma_mtp.kernels.matmul import Form
from mlx_gemma_mtp.kernels.ways import (
    ADD_NORM,
    MATRIX_WAYS,
    NORM_ROPE,
    WAYS,
)
from mlx_gemma_mtp.matmuls import decide as decide_module
from mlx_gemma_mtp.matmuls.choices import STOCK, Choice, Choices, Shape
from mlx_gemma_mtp.matmuls.decide import blame, decide
from mlx_gemma_mtp.matmuls.kept import Kept
from mlx_gemma_mtp.matmuls.modules import shapes_of, sizes_of
from mlx_gemma_mtp.models import attention
from mlx_gemma_mtp.models.target import text_model
from tests.engine.test_few_rows import distance, half_pair, logits, use
from tests.metal.run import run_on_cpu
from tests.tiny import families, new_pair

if sys.platform == "darwin":
    pytest.skip("MLX's own Metal runs here", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("plain_graphs")

PROMPT = [2, 17, 300, 45]
ALL_WAYS = Choices({}, frozenset(WAYS))
LAYERS = ("add_norm", "norm_rope")
ALONE = set(WAYS) - MATRIX_WAYS  # what is taken where MLX multiplies
SIZES = LayerSizes(
    widths=((64, mx.bfloat16), (1088, mx.float32)),
    head_dims=((32, mx.bfloat16),),
    mixtures=(Mixture(16, 4, Form(4, 32, mx.bfloat16)),),
)
# Of a mixture, beside those of all layers.
MIXTURE = ("add_norm_normed_thrice", "add_norm_scaled_normed_branches_experts", "route")

slow = pytest.mark.slow


@pytest.fixture
def launches(monkeypatch):
    """Layers as on Metal; their kernels run in the harness, and are counted."""
    counts: Counter[str] = Counter()

    def launch(kernel, inputs, **settings):
        counts[kernel.name] += 1
        return run_on_cpu(kernel, inputs, **settings)

    monkeypatch.setattr(common, "launch", launch)
    monkeypatch.setattr(common, "backend", lambda: "metal")
    for module in (masks, attention):
        monkeypatch.setattr(module, "gpu", lambda: "metal")
        # Of the small pairs: sliding layers' heads, of which some are fused.
        monkeypatch.setattr(module, "FUSED_HEAD_DIMS", (16,))
    monkeypatch.setattr(masks, "MAX_FUSED_ROWS", 8)
    return counts


def has_kernels_of_layers(launches, family=""):
    of_mixture = MIXTURE if family == "26b-a4b" else ()
    return set(of_mixture) <= set(launches) and all(
        any(name.startswith(layer) for name in launches) for layer in LAYERS
    )


@pytest.mark.parametrize("family", families("e2b", "26b-a4b"))
def test_blocks_give_the_bytes_of_plain_rounds(family, launches):
    pair = new_pair(family)
    by_mlx = logits(pair, 9)
    assert not launches
    use(pair, ALL_WAYS)
    by_ways = logits(pair, 9)
    assert has_kernels_of_layers(launches, family)
    assert mx.array_equal(by_ways, logits(pair, *[1] * 9))
    assert mx.array_equal(by_ways, logits(pair, 4, 5))
    assert distance(by_ways, by_mlx) < 1e-4


RULES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "coupled": {"temp": 1.0, "seed": 3},
    "block": {"temp": 1.0, "top_k": 1},  # one candidate: the law is a text
}


def text(pair, num_draft_tokens, rule="greedy"):
    steps = generate_tokens(
        pair,
        [PROMPT],
        max_tokens=5,
        num_draft_tokens=num_draft_tokens,
        eos_token_ids=(),
        exactness="fast",
        **RULES[rule],
    )
    return [token for (token,) in steps]


@pytest.mark.parametrize("family", ["26b-a4b", pytest.param("e2b", marks=slow)])
@pytest.mark.parametrize(
    "rule",
    ["greedy", pytest.param("coupled", marks=slow), pytest.param("block", marks=slow)],
)
def test_texts_are_mlxs_for_every_number_of_drafts(family, rule, launches):
    pair = new_pair(family)
    by_mlx = text(pair, 0, rule)
    use(pair, ALL_WAYS)
    for num_draft_tokens in (0, 3, 8):
        assert text(pair, num_draft_tokens, rule) == by_mlx
    assert has_kernels_of_layers(launches, family)


def all_kernels(pair):
    """Every way, and the kernel of few rows for every matrix."""
    shapes = shapes_of([pair.target, pair.drafter])
    return Choices({shape: Choice(1) for shape in shapes}, frozenset(WAYS))


@pytest.mark.parametrize(
    ("family", "own"), [("e2b", "gate_by"), ("26b-a4b", "gather_gate_up")]
)
def test_ways_go_together_with_the_kernel_of_few_rows(family, own, launches):
    pair = half_pair(family)
    use(pair, all_kernels(pair))
    found = logits(pair, 3)
    assert has_kernels_of_layers(launches, family)
    for beginning in ("matmul", "gate_up", "qkv3", own):
        assert any(name.startswith(beginning) for name in launches), launches
    assert mx.array_equal(found, logits(pair, 1, 2))
    use(pair, Choices(all_kernels(pair).by_shape))
    assert distance(found, logits(pair, 3)) < 0.1


def test_weights_that_are_exchanged_are_followed(launches):
    pair = new_pair("e2b")
    use(pair, ALL_WAYS)
    before = logits(pair, 1)
    for layer in text_model(pair.target).layers:
        layer.layer_scalar = layer.layer_scalar * 0.5
        layer.input_layernorm.weight = layer.input_layernorm.weight * 2
    pair.rounds.refresh()
    after = logits(pair, 1)
    use(pair, STOCK)
    assert distance(after, logits(pair, 1)) < 1e-4 < distance(after, before)


# ----------------------------------------------------------------- run alone, first


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A machine that has found every way faster."""
    pair = half_pair("e2b")
    models = [pair.target, pair.drafter]
    shapes, sizes = shapes_of(models), sizes_of(models)
    found = Kept(tmp_path)
    found.keep_ways(sizes.structure, dict.fromkeys(WAYS, True))
    monkeypatch.setattr(decide_module, "_ran", set())
    monkeypatch.setattr(decide_module, "_rereads", lambda: False)
    return Deciding(shapes, sizes, tmp_path)


@dataclass
class Deciding:
    shapes: dict[Shape, int]
    sizes: LayerSizes
    folder: Path

    def __call__(self):
        return decide(self.shapes, self.sizes, folder=self.folder).ways


def test_ways_whose_kernels_are_right_are_taken(kept, launches):
    assert kept() == ALONE
    assert has_kernels_of_layers(launches)
    count = launches.total()
    assert kept() == ALONE
    assert launches.total() == count  # once in a process


def test_ways_that_multiply_run_for_the_forms_of_the_kernel(launches, kept):
    kept()
    assert not any(name.startswith(("gate_up", "qkv")) for name in launches)


def test_a_way_whose_kernel_is_wrong_is_mlxs(kept, launches, monkeypatch, caplog):
    launch = common.launch

    def wrong(kernel, *arrays, **settings):
        found = launch(kernel, *arrays, **settings)
        return [a * 1.1 for a in found] if "rope" in kernel.name else found

    monkeypatch.setattr(common, "launch", wrong)
    assert kept() == ALONE - {NORM_ROPE}
    assert "layers cannot be run 'norm_rope' here" in caplog.text
    monkeypatch.setattr(common, "launch", launch)
    assert kept() == ALONE - {NORM_ROPE}  # in later processes too


def test_a_way_that_cannot_be_tried_now_is_kept_for_later(kept, launches, monkeypatch):
    launch = common.launch

    def fail(*_, **__):
        raise RuntimeError("[malloc] Unable to allocate 123 bytes.")

    monkeypatch.setattr(common, "launch", fail)
    assert kept() == ALONE - {ADD_NORM, NORM_ROPE}
    monkeypatch.setattr(common, "launch", launch)
    assert kept() == ALONE


@pytest.mark.parametrize(
    "way",
    [pytest.param(w, marks=[slow] if w in MATRIX_WAYS else []) for w in WAYS],
)
def test_kernels_are_right_in_the_harness(way, launches):
    assert layer_trial.is_right(way, SIZES, [Form(4, 64, mx.bfloat16)])


@pytest.mark.parametrize("name", ["add_norm", "add_norm_scaled_normed"])
def test_every_kernel_of_add_norm_is_tried(name, launches, monkeypatch):
    """That of the end of a layer among them."""
    launch = common.launch

    def wrong(kernel, *arrays, **settings):
        found = launch(kernel, *arrays, **settings)
        return [a * 0 for a in found] if kernel.name == name else found

    monkeypatch.setattr(common, "launch", wrong)
    assert not layer_trial.is_right(ADD_NORM, SIZES)


def test_a_round_that_fails_with_ways_that_are_right_alone(kept, launches, monkeypatch):
    assert kept() == ALONE
    blame(Choices({}, frozenset(ALONE)), kept.sizes, folder=kept.folder)
    assert kept() == set()


def test_numbers_a_little_off_are_wrong(launches, monkeypatch):
    plain = add_norm.plain
    monkeypatch.setattr(
        add_norm,
        "plain",
        lambda *a, eps, **options: plain(*a, eps=3e-2, **options),
    )
    assert not layer_trial.is_right(ADD_NORM, SIZES)
