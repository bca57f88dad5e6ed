"""Processes on the loopback that are ranks, started as ``mlx.launch`` starts them.

Each runs a script that finds its ranks as ``ranks``.
"""

import json
import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGINNING = """
import json, sys, time
import mlx.core as mx
from mlx_gemma_mtp.distributed.ranks import launched
from mlx_gemma_mtp.errors import RanksError
ranks = launched()
print("ready", flush=True)
"""
PATIENCE_S = 60  # for what never comes; a busy machine is slow


@dataclass
class Ended:
    """What a rank left."""

    status: int
    output: str
    errors: str


def start(size, script, folder, beginning=BEGINNING, ranks=None):
    """Start ranks of so many; some of them where ``ranks`` names them."""
    return start_with(size, ["-c", beginning + script], folder, ranks)


def start_with(size, arguments, folder, ranks=None):
    """Start ranks of so many with the interpreter's arguments."""
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _ports(size)]))
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={
                **os.environ,
                "MLX_RANK": str(rank),
                "MLX_HOSTFILE": str(hostfile),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            preexec_fn=partial(_own_core, rank),
        )
        for rank in ranks or range(size)
    ]


def _own_core(rank):
    """Keep a rank to one core, each to another one as far as there are some.

    Ranks that wait for each other spin, which on a core that both have takes long.
    """
    if sys.platform == "linux":
        os.sched_setaffinity(0, {rank % (os.cpu_count() or 1)})


def finish(processes, patience_s=PATIENCE_S):
    """What they left; none outlives this."""
    try:
        return [Ended(*_communicate(each, patience_s)) for each in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def read_ready(processes):
    """Wait until all have met."""
    for process in processes:
        assert process.stdout.readline() == "ready\n"


def _communicate(process, patience_s):
    output, errors = process.communicate(timeout=patience_s)
    return process.returncode, output, errors


def _ports(num):
    """Ports that nobody listens at, and that no connection gets by itself.

    Systems give connections ports from 32768 on. A rank that looks for another one
    could get that one's own.
    """
    found: list[int] = []
    while len(found) < num:
        with socket.socket() as place:
            with suppress(OSError):
                place.bind(
                    ("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000))
                )
                found.append(place.getsockname()[1])
    return found
