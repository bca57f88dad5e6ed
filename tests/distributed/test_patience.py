"""Patience: whoever works is not taken for dead, and who is dead is missed.

Run: python -m pytest tests/distributed/test_patience.py
"""

import pytest

from mlx_gemma_mtp.distributed.patience import Patience

# Chunks of prompts: tokens, and seconds that a rank is silent in each.
HEALTHY: dict[str, list[tuple[int, float]]] = {
    "a slow machine's first": [(24, 100), (24, 100)],
    "short, then long": [(10, 0.3), (2048, 20)],
    "long, then short, which reads all weights too": [(2048, 4), (1, 4)],
    "dearer from chunk to chunk": [(2048, 30 * 3**i) for i in range(4)],
    "dearer, then a rest as dear": [(2048, 100), (2048, 200), (512, 80)],
    "a longer text": [(2048, 30), (512, 7), (2048, 30), (2048, 60), (512, 30)],
    "a machine that throttles": [(2048, 5), (2048, 45)],
    "a machine that others use": [(24, 20), (24, 150)],
    "a much longer one, which is compiled": [(24, 0.1), (24, 0.1), (33, 45)],
    "several prompts at once": [(24, 0.5), (32 * 24, 16)],
}


@pytest.mark.parametrize("name", HEALTHY)
def test_who_works_has_time(name):
    patience = Patience()
    for size, took_s in HEALTHY[name]:
        assert took_s < patience.limit_s(size)
        patience.note(size, took_s)


def test_the_faster_the_machines_the_sooner_is_one_missed():
    patience = Patience()
    assert patience.limit_s(2048) == 600
    patience.note(2048, 2.0)
    assert patience.limit_s(2048) == 8 + 10 * 2
    assert patience.limit_s(1024) == 60 + 10 * 1
    patience.note(24, 0.1)
    assert patience.limit_s(24) == 8 + 10 * 0.1
    assert patience.limit_s(30) == pytest.approx(8 + 10 * 0.1 / 24 * 30)
