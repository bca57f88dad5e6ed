"""Mistakes in the text of the kernel of a few rows: the tests find each of them.

Run: python -m pytest tests/kernels/test_matmul_mistakes.py
     python -m pytest -m slow tests/kernels/test_matmul_mistakes.py    the others
"""

import re
import sys
from functools import partial

import pytest

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.kernels import common
from tests.kernels import matmul_mistakes as mistakes
from tests.kernels.matmul_mistakes import COLUMNS, ROWS
from tests.kernels.products import random_product, same_bits
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


def by_name(cases, most=99):
    """A test for each case; those after ``most`` are slow."""
    return pytest.mark.parametrize(
        "mistake",
        [
            pytest.param(
                case, id=case.name, marks=[pytest.mark.slow] * (number >= most)
            )
            for number, case in enumerate(cases)
        ],
    )


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


def test_names_are_unique():
    names = [mistake.name for mistake in ALL]
    assert len(names) == len(set(names)) >= 12


@by_name(mistakes.WRONG, most=8)
def test_bits_are_wrong(mistake):
    y, want = run_with(mistake, run_on_cpu)
    assert not same_bits(y, want)


@by_name(mistakes.STOPPING, most=6)
def test_the_launch_stops(mistake):
    with pytest.raises(MetalError, match=mistake.error):
        run_with(mistake, run_schedules)


@by_name(mistakes.LEFT_TO_THE_COMPILER, most=1)
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
