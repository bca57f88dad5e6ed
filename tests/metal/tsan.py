"""Finds races between the threads of a kernel with ThreadSanitizer.

Each fiber is a thread to it, and only barriers with memory flags order their accesses:
so it sees what a lucky schedule hides. Threadgroups are not ordered at all.
"""

from __future__ import annotations

import os
import pickle
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

from tests.metal.launch import Launch, MetalError
from tests.metal.run import make_launch, quote_lines
from tests.metal.text import Kernel

ROOT = Path(__file__).parents[2]
# One access of a report: what it does, and the place that its innermost frame names.
ACCESS = re.compile(
    r"^  (?:Previous )?(?P<kind>(?:atomic )?(?:write|read)) of size.*\n"
    r"    #0 .*?\bkernel:(?P<line>\d+)",
    re.MULTILINE | re.IGNORECASE,
)


def run_under_tsan(kernel: Kernel, inputs: list[mx.array], **options) -> list[str]:
    """Run a kernel once and watch every access of its threads.

    Args:
        kernel: As for ``run_on_cpu``.
        inputs: As for ``run_on_cpu``.
        **options: As for ``run_on_cpu``: template, grid, threadgroup, output_shapes and
            output_dtypes.

    Returns:
        The races, as pairs of accesses; empty if the kernel has none.

    Raises:
        MetalError: The kernel does not compile, or its run fails.
    """
    launch, text = make_launch(kernel, inputs, **options, tsan=True)
    try:
        return [quote_lines(race, text) for race in _races(_run_in_child(launch))]
    except MetalError as error:
        raise MetalError(quote_lines(str(error), text)) from None


def _run_in_child(launch: Launch) -> str:
    """Run in a process that has ThreadSanitizer from its start; what it reports."""
    # Without random addresses: its own map of the memory has fixed places.
    command = ["setarch", platform.machine(), "-R", sys.executable]
    with tempfile.TemporaryDirectory() as folder:
        pickled = Path(folder, "launch.pickle")
        pickled.write_bytes(pickle.dumps(launch))
        report = Path(folder, "report")
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "LD_PRELOAD": _libtsan(),
            "TSAN_OPTIONS": f"log_path={report}:exitcode=0:history_size=4",
            "OPENBLAS_NUM_THREADS": "1",  # numpy's threads are none of our business
        }
        done = subprocess.run(
            [*command, "-m", "tests.metal.launch", str(pickled)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise MetalError(f"run under ThreadSanitizer failed: {lines[-1]}")
        reports = sorted(Path(folder).glob("report.*"))
        return "".join(path.read_text(errors="replace") for path in reports)


def _libtsan() -> str:
    command = ["g++", "-print-file-name=libtsan.so"]
    return subprocess.check_output(command, text=True).strip()


def _races(output: str) -> list[str]:
    """Pairs of accesses in the kernel's own text, each once."""
    races = set()
    for report in output.split("WARNING: ThreadSanitizer: ")[1:]:
        accesses = [
            f"{match['kind'].lower()} at kernel:{match['line']}"
            for match in ACCESS.finditer(report)
        ]
        if accesses:
            races.add(" with ".join(sorted(accesses)))
    return sorted(races)
