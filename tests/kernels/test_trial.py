"""Whether a trial runs the very kernel that it is for.

Run: python -m pytest tests/kernels/test_trial.py
     python -m pytest -m slow tests/kernels/test_trial.py    the other kernels
"""

import sys

import pytest

if sys.platform == "darwin":
    pytest.skip("MLX runs kernels on Metal itself here", allow_module_level=True)

from mlx_gemma_mtp.kernels import add_norm, common, norm_rope, trial
from tests.metal.run import run_on_cpu

KERNELS = [*add_norm.kernels(), *norm_rope.kernels()]
FEW = {
    "add_norm_scaled_normed_branches",
    "add_norm_normed3",
    "norm_rope_queries",
    "norm_rope_shared_freqs",
}


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched; nothing of them is known yet."""
    names = []

    def launch(kernel, inputs, **options):
        names.append(kernel.name)
        return run_on_cpu(kernel, inputs, **options)

    monkeypatch.setattr(common, "backend", lambda: "metal")
    monkeypatch.setattr(common, "launch", launch)
    monkeypatch.setattr(trial, "_is_working", {})
    return names


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(k, id=k.name, marks=[pytest.mark.slow] * (k.name not in FEW))
        for k in KERNELS
    ],
)
def test_a_trial_launches_its_kernel_once(kernel, launched):
    assert trial.works(kernel)
    assert trial.works(kernel)
    assert launched == [kernel.name]


def test_a_kernel_that_does_not_run_says_so(monkeypatch, launched, caplog):
    def launch(*_, **__):
        raise RuntimeError("too many threads")

    monkeypatch.setattr(common, "launch", launch)
    assert not trial.works(*KERNELS)
    assert "kernel 'add_norm' does not run here" in caplog.text
    assert "too many threads" in caplog.text
