"""Mistakes in the text of the kernel of a few rows: the tests find each of them.

Run: python -m pytest tests/kernels/test_matmul_mistakes.py
"""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.kernels import common
from tests.kernels import matmul_mistakes as mistakes
from tests.kernels.matmul_mistakes import COLUMNS, ROWS
from tests.kernels.products import random_product, same_bits
from tests.metal.build import compile_kernel
from tests.metal.lint import lint
from tests.metal.run import MetalError, run_on_cpu, run_schedules
from tests.metal.text import metal_text
from tests.metal.tsan import run_under_tsan

ALL = (
    *mistakes.WRONG,
    *mistakes.STOPPING,
    *mistakes.RACING,
    *mistakes.LEFT_TO_THE_COMPILER,
    *mistakes.REFUSED,
)


def by_name(cases):
    return pytest.mark.parametrize("mistake", cases, ids=[m.name for m in cases])


class AnsweredError(Exception):
    """Ends a product whose launch has been looked at."""


def product_of(mistake):
    return random_product(mistake.form, ROWS, mistake.outputs, mistake.inputs)


def run_with(mistake, launch):
    """The product of a mistake's text: its rows, and those it must have."""
    product = product_of(mistake)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common,
            "launch",
            lambda kernel, *a, **k: launch(mistake.of(kernel), *a, **k),
        )
        return product.run(num_columns=COLUMNS), product.bits


def look_at(mistake, look):
    """What a function says of a mistake's launch, which is not run."""
    answers = []

    def launch(kernel, inputs, **options):
        answers.append(look(kernel, inputs, **options))
        raise AnsweredError

    with pytest.raises(AnsweredError):
        run_with(mistake, launch)
    return answers[0]


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    """Compile the texts on all cores before the first test needs them."""
    cases = [*mistakes.WRONG, *mistakes.STOPPING, *mistakes.LEFT_TO_THE_COMPILER]
    texts = [look_at(case, metal_text) for case in cases]
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_kernel, texts))


def test_names_are_unique():
    names = [mistake.name for mistake in ALL]
    assert len(names) == len(set(names)) >= 12


@by_name(mistakes.WRONG)
def test_bits_are_wrong(mistake):
    y, want = run_with(mistake, run_on_cpu)
    assert not same_bits(y, want)


@by_name(mistakes.STOPPING)
def test_the_launch_stops(mistake):
    with pytest.raises(MetalError, match=mistake.error):
        run_with(mistake, run_schedules)


@by_name(mistakes.LEFT_TO_THE_COMPILER)
def test_contraction_changes_bits(mistake):
    split, want = run_with(mistake, run_on_cpu)
    assert not same_bits(split, want)
    fused, _ = run_with(mistake, partial(run_on_cpu, contract=True))
    assert not same_bits(split, fused)


@by_name(mistakes.REFUSED)
def test_lint_finds(mistake):
    findings = lint(look_at(mistake, metal_text))
    assert any(re.search(mistake.error, finding) for finding in findings), findings


@pytest.mark.tsan
@by_name(mistakes.RACING)
def test_race_is_reported(mistake):
    y, want = run_with(mistake, run_on_cpu)
    assert same_bits(y, want)
    races = look_at(mistake, run_under_tsan)
    assert any(re.search(mistake.error, race) for race in races), races
