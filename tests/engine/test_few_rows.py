"""The whole engine on Metal's text of the kernel for few rows, run in the harness.

Texts of many rounds take MLX's own operations in the kernel's place, row by row.

Run: python -m pytest tests/engine/test_few_rows.py
"""

import sys
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_gemma_mtp.engine.given_rounds import GivenRounds
from mlx_gemma_mtp.errors import KernelError
from mlx_gemma_mtp.exactness.probe import probe
from mlx_gemma_mtp.generation.tokens import generate_tokens
from mlx_gemma_mtp.kernels import common
from mlx_gemma_mtp.matmuls import modules
from mlx_gemma_mtp.matmuls.choices import STOCK, Choice, Choices
from mlx_gemma_mtp.matmuls.modules import shapes_of
from mlx_gemma_mtp.models.families import FAMILIES
from mlx_gemma_mtp.pair import pair as pair_module
from mlx_gemma_mtp.pair.pair import Pair
from mlx_gemma_mtp.store import FOLDER_VARIABLE
from tests.matmuls.matrices import StandIn
from tests.metal.run import run_on_cpu
from tests.tiny import SHORT, families, new_pair

if sys.platform == "darwin":
    pytest.skip("MLX's own Metal runs here", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("plain_graphs")

PROMPT = [2, 17, 300, 45]
PROMPTS = [PROMPT, [2, 5, 6], [2, 9, 9, 9, 9]]
OFFSET = 5
ALL = tuple(range(1, 9))


@pytest.fixture
def launches(monkeypatch):
    """Kernels run in the harness; how often each was launched."""
    counts: Counter[str] = Counter()

    def launch(kernel, inputs, **settings):
        counts[kernel.name] += 1
        return run_on_cpu(kernel, inputs, **settings)

    monkeypatch.setattr(common, "launch", launch)
    return counts


@pytest.fixture
def multiply(monkeypatch, tmp_path):
    """MLX's operations, row by row, in the kernel's place; nothing is known of them."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    stand_in = StandIn()
    monkeypatch.setattr(modules, "multiply", stand_in)
    return stand_in


def half_pair(family):
    """A random pair in bfloat16, quantized as far as its small layers can be."""
    made = new_pair(family)
    assert made.drafter is not None
    for module in (made.target, made.drafter):
        module.set_dtype(mx.bfloat16)
        nn.quantize(
            module,
            group_size=32,
            bits=4,
            class_predicate=lambda path, layer: (
                hasattr(layer, "to_quantized")
                and layer.weight.shape[-1] % 32 == 0
                and "centroids" not in path
            ),
        )
        mx.eval(module.parameters())
    return Pair(made.target, made.drafter)


def every_matrix(pair, first_row=1):
    """The kernel for all matrices that it multiplies."""
    shapes = shapes_of([pair.target, pair.drafter])
    return Choices({shape: Choice(first_row) for shape in shapes})


def use(pair, choices):
    """Let a pair multiply by these, as if they had been decided."""
    pair.kept.choices = choices
    pair.rounds.use(choices)


def logits(pair, *sizes):
    """The target's logits of rounds over the same tokens, cut into blocks."""
    rounds = GivenRounds(pair.rounds, 1)
    layout = pair.rounds.target.layout
    slabs = [mx.zeros_like(slab) for slab in layout.allocate(1, 64)]
    tokens = mx.random.randint(0, 500, (1, sum(sizes)), key=mx.random.key(1))
    found, done = [], 0
    for size in sizes:
        offset = mx.array([OFFSET + done])
        block = tokens[:, done : done + size]
        output = rounds.run(block, slabs, offset=offset, min_rows=1)
        found.append(output.logits)
        slabs, done = output.slabs, done + size
    return mx.concatenate(found, axis=1)


def distance(a, b):
    return mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item()


@pytest.mark.parametrize("family", families("e2b", "26b-a4b"))
def test_blocks_give_the_bytes_of_plain_rounds_and_the_logits_of_mlx(family, launches):
    pair = half_pair(family)
    by_mlx = logits(pair, 2)
    assert not launches
    use(pair, every_matrix(pair))
    by_kernel = logits(pair, 2)
    assert {name.rpartition("_")[2] for name in launches} == {"2x4"}
    assert mx.array_equal(by_kernel, logits(pair, 1, 1))
    use(pair, STOCK)
    pair.target.set_dtype(mx.float32)
    pair.refresh()
    truth = logits(pair, 2)
    # MLX's products on the CPU are summed in bfloat16.
    assert distance(by_kernel, truth) <= distance(by_mlx, truth)
    assert distance(by_kernel, truth) < 0.15 * mx.abs(truth).max().item()


def test_text_is_the_same_for_every_number_of_drafts(launches):
    pair = half_pair("26b-a4b")
    use(pair, every_matrix(pair))

    def text(num_draft_tokens):
        return [
            token
            for (token,) in generate_tokens(
                pair,
                [PROMPT],
                max_tokens=4,
                num_draft_tokens=num_draft_tokens,
                eos_token_ids=(),
                exactness="fast",
            )
        ]

    assert text(0) == text(2)
    # Of the drafter one row at a time, of the target one and three.
    assert {name.rpartition("_")[2] for name in launches} == {"1x4", "3x4"}


def exact_texts(pair, prompts, num_draft_tokens, max_tokens):
    """The greedy text of every prompt, decoded together."""
    steps = generate_tokens(
        pair,
        prompts,
        max_tokens=max_tokens,
        num_draft_tokens=num_draft_tokens,
        eos_token_ids=(),
        exactness="exact",
    )
    return list(zip(*steps, strict=True))


def rows_of(stand_in):
    """The numbers of rows that it has multiplied since it was asked last."""
    found = {num_rows for _, num_rows, _ in stand_in.calls}
    stand_in.calls.clear()
    return found


@pytest.mark.parametrize("first_row", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "family",
    [SHORT, *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES)],
)
def test_exact_text_is_the_same_for_every_number_of_drafts(family, first_row, multiply):
    pair = half_pair(family)
    use(pair, every_matrix(pair, first_row))
    plain = exact_texts(pair, [PROMPT], 0, 8)
    # Plain rounds are filled up to two rows where one row alone is MLX's.
    expected = {1: ALL, 2: ALL} if first_row == 1 else {1: (), 2: ALL}
    assert pair.calibration.verdict(1).equal == expected
    assert rows_of(multiply) == set(range(first_row, 10))
    for num_drafts in (1, 2, 5, 8, "auto"):
        assert exact_texts(pair, [PROMPT], num_drafts, 8) == plain


@pytest.mark.parametrize("first_row", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_exact_texts_of_a_batch_are_the_same(first_row, multiply):
    """More drafts than two are more than nine rows, which stay MLX's."""
    pair = half_pair(SHORT)
    use(pair, every_matrix(pair, first_row))
    plain = exact_texts(pair, PROMPTS, 0, 6)
    assert pair.calibration.verdict(3).equal == {1: (1, 2), 2: (1, 2)}
    for num_drafts in (1, 2, 3, "auto"):
        assert exact_texts(pair, PROMPTS, num_drafts, 6) == plain
    assert {3, 6, 9} <= rows_of(multiply) <= {*range(first_row, 10)}


def test_rows_that_depend_on_their_number_are_not_drafted(multiply):
    def change(y, form, num_rows, columns):
        return y * 1.01 if num_rows == 4 else y

    multiply.change = change
    pair = half_pair(SHORT)
    use(pair, every_matrix(pair))
    plain = exact_texts(pair, [PROMPT], 0, 8)
    others = tuple(k for k in ALL if k != 3)
    assert pair.calibration.verdict(1).equal == {1: others, 2: others}
    assert exact_texts(pair, [PROMPT], 3, 8) == plain


def test_plain_rounds_stay_mlx_where_the_kernel_begins_with_two_rows(launches):
    pair = half_pair("26b-a4b")
    by_mlx = logits(pair, 1)
    use(pair, every_matrix(pair, first_row=2))
    assert mx.array_equal(logits(pair, 1), by_mlx)
    assert not launches


def test_choices_follow_layers_that_are_exchanged(launches):
    pair = half_pair("26b-a4b")
    use(pair, every_matrix(pair))
    layers = [type(layer) for _, layer in pair.target.named_modules()]
    logits(pair, 1)
    num_launches = launches.total()
    assert [type(layer) for _, layer in pair.target.named_modules()] == layers
    attention = pair.target.layers[0].self_attn
    num_outputs = attention.q_proj.weight.shape[0]
    attention.q_proj = nn.Linear(64, num_outputs, bias=False)  # of no chosen shape
    attention.q_proj.set_dtype(mx.bfloat16)
    pair.rounds.refresh()
    logits(pair, 1)
    assert launches.total() == 2 * num_launches - 1


# What MLX 0.32 raises: of a launch, a compiler, and what tells nothing of kernels.
OF_A_KERNEL = [
    ValueError("Thread group size (128) is greater than  the maximum allowed threads"),
    RuntimeError("[metal::Device] Unable to build metal library from source"),
]
OF_OTHERS = [
    RuntimeError("[malloc] Unable to allocate 123 bytes."),
    RuntimeError("[metal::malloc] Resource limit (499000) exceeded."),
    RuntimeError("[METAL] Command buffer execution failed: Impacting Interactivity"),
]


@pytest.mark.parametrize("error", [*OF_A_KERNEL, *OF_OTHERS], ids=str)
def test_kernel_that_fails_in_a_round_gives_way(error, launches, monkeypatch):
    pair = half_pair("26b-a4b")
    choices = every_matrix(pair)
    use(pair, choices)
    blamed = []
    monkeypatch.setattr(
        pair_module, "blame", lambda choices, sizes, *, folder: blamed.append(choices)
    )

    def fail(*_, **__):
        raise error

    def text():
        stream = generate_tokens(
            pair,
            [PROMPT],
            max_tokens=2,
            num_draft_tokens=1,
            eos_token_ids=(),
            exactness="fast",
        )
        return list(stream)

    with monkeypatch.context() as patched:
        patched.setattr(common, "launch", fail)
        if error in OF_OTHERS:
            with pytest.raises(RuntimeError) as caught:
                text()
            assert caught.value is error
            assert pair.kept.choices == choices
            assert not blamed
            return
        with pytest.raises(KernelError, match=r"Ask again"):
            text()
        assert blamed == [choices]
        assert pair.kept.choices == STOCK
        assert len(text()) == 2  # MLX multiplies now


def test_one_text_keeps_its_arithmetic_where_another_fails(launches, monkeypatch):
    pair = half_pair(SHORT)
    use(pair, every_matrix(pair))
    monkeypatch.setattr(pair_module, "blame", lambda *_, **__: None)

    def stream():
        return generate_tokens(
            pair,
            [PROMPT],
            max_tokens=4,
            num_draft_tokens=1,
            eos_token_ids=(),
            exactness="fast",
        )

    want = list(stream())
    use(pair, every_matrix(pair))
    first = stream()
    begun = [next(first), next(first)]
    with monkeypatch.context() as patched:
        patched.setattr(common, "launch", _fail)
        with pytest.raises(KernelError):
            list(stream())
    pair.refresh()
    assert pair.rounds.choices == STOCK
    count = launches.total()
    assert begun + list(first) == want
    assert launches.total() > count  # the kernel went on


def _fail(*_, **__):
    raise RuntimeError("no pipeline")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_probe_finds_all_bytes_equal(family, launches):
    pair = half_pair(family)
    use(pair, every_matrix(pair))
    verdict = probe(pair.rounds)
    assert verdict is not None
    assert verdict.equal == {1: tuple(range(1, 9)), 2: tuple(range(1, 9))}
    assert verdict.max_difference == 0
    assert len(launches) >= 9
