"""ThreadSanitizer on kernels: silent on a right one, and it sees hidden races.

Run: make test-tsan
     python -m pytest -m tsan tests/kernels/test_metal_tsan.py
"""

import re
import sys

import mlx.core as mx
import pytest

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from tests.metal.mistakes import RACING, STOPPING
from tests.metal.run import MetalError
from tests.metal.toy import TOY, arguments, example_logits
from tests.metal.tsan import run_under_tsan

pytestmark = pytest.mark.tsan


def races(kernel):
    inputs, options = arguments(mx.array(example_logits(V=2000)))
    return run_under_tsan(kernel, inputs, **options)


def test_toy_has_no_races():
    assert races(TOY) == []


@pytest.mark.parametrize("mistake", RACING, ids=[m.name for m in RACING])
def test_race_is_reported(mistake):
    found = races(mistake.kernel)
    assert any(re.search(mistake.error, race) for race in found), found


def test_failing_launch_is_an_error():
    with pytest.raises(MetalError, match=STOPPING[1].error):
        races(STOPPING[1].kernel)
