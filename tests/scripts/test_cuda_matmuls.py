"""The script for an NVIDIA GPU, with a bench and a clock that are simulated.

Run: python -m pytest tests/scripts/test_cuda_matmuls.py
"""

import json

import mlx.core as mx
import pytest

from mlx_gemma_mtp.kernels import common
from mlx_gemma_mtp.kernels.matmul import DENSE, Form, default_columns
from mlx_gemma_mtp.matmuls.choices import Shape
from scripts import cuda_matmuls
from scripts.cuda_matmuls import FORM, ROWS, measure, measure_all, shapes_of

SHAPES = [Shape(n, 256, FORM) for n in (512, 256, 128)]


class Simulated:
    """Takes 10 us and one more for each row; MLX's own twice that, every third late.

    A timing takes a second of its clock.
    """

    def __init__(self, wrong=()):
        self.seconds = 0.0
        self.wrong = wrong
        self.asked = []

    def clock(self):
        return self.seconds

    def is_right(self, shape, num_rows, columns):
        assert columns == default_columns(num_rows)
        return num_rows not in self.wrong

    def product_s(self, shape, num_rows, columns, window_s):
        self.seconds += 1.0
        self.asked.append((num_rows, columns))
        late = 1e-3 if len(self.asked) % 54 < 18 else 0.0
        return (9 + num_rows) * 1e-6 * (1 if columns else 2) + late


def test_a_matrix():
    bench = Simulated()
    found = measure(SHAPES[0], bench)
    assert found.own_s == pytest.approx([(9 + m) * 1e-6 for m in ROWS])
    assert found.stock_s == pytest.approx([2 * s for s in found.own_s])
    assert found.wrong_rows == ()
    assert bench.asked[:4] == [(1, 4), (1, None), (2, 4), (2, None)]
    own, stock = found.lines()
    assert (
        own.split()
        == (
            "512x256 4bit_g64_bfloat16 kernel 10.0 us 7 GB/s "
            "1.10 1.20 1.30 1.40 1.50 1.60 1.70 1.80 right"
        ).split()
    )
    assert stock.split()[2:6] == ["MLX", "20.0", "us", "4"]


def test_wrong_rows_are_named():
    found = measure(SHAPES[0], Simulated(wrong=(3, 5)))
    assert found.wrong_rows == (3, 5)
    assert found.lines()[0].endswith("wrong for M = (3, 5)")


@pytest.mark.parametrize(("budget_s", "count"), [(40, 1), (107, 1), (109, 2), (500, 3)])
def test_the_time_is_kept(budget_s, count):
    """A matrix takes 54 of these seconds."""
    bench = Simulated()
    said: list[str] = []
    found, left_out = measure_all(
        SHAPES, bench, budget_s=budget_s, clock=bench.clock, say=said.append
    )
    assert len(found) == count
    assert left_out == [str(shape) for shape in SHAPES[count:]]
    assert len(said) == 2 * count
    assert bench.seconds <= max(budget_s, 54)


def test_the_shapes_are_those_of_the_families():
    shapes = shapes_of(("31b", "e4b"))
    assert str(shapes[0]) == "262144x5376 4bit_g64_bfloat16"
    forms = [shape.form for shape in shapes]
    assert forms.count(FORM) == len(shapes) - 2
    assert forms[2:4] == [Form(8, 64, mx.bfloat16), Form(DENSE, 0, mx.bfloat16)]
    assert Shape(10240, 2560, FORM) in shapes
    assert len(set(shapes)) == len(shapes)


def test_it_asks_for_a_gpu(capsys):
    with pytest.raises(SystemExit):
        cuda_matmuls.main([])
    assert (
        "an NVIDIA GPU is needed: MLX runs on Device(cpu, 0)" in capsys.readouterr().err
    )


@pytest.mark.parametrize("wrong", [(), (9,)])
def test_what_is_found_is_written(tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.setattr(common, "backend", lambda: "cuda")
    monkeypatch.setattr(cuda_matmuls, "Products", lambda: Simulated(wrong))
    monkeypatch.setattr(cuda_matmuls, "shapes_of", lambda families: SHAPES)
    path = tmp_path / "made" / "found.json"
    assert cuda_matmuls.main(["--json", str(path)]) == bool(wrong)
    written = json.loads(path.read_text(encoding="utf-8"))
    assert [each["shape"] for each in written["found"]] == [str(s) for s in SHAPES]
    assert written["found"][0]["wrong_rows"] == list(wrong)
    assert written["left_out"] == []
    assert capsys.readouterr().out.count("GB/s") == 6
