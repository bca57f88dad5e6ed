"""Time how ranks end when one of them dies, stops or fails at a random moment.

    python -m scripts.studies.rank_ends --moments 50

Ranks are processes of this machine, each on a core of its own as far as there are some.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

from tests.distributed.ends import KINDS, SIZES, NotStartedError, others


def main() -> None:
    """Print how long the last of the others took, by kind and number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moments", type=int, default=50)
    count = parser.parse_args().moments
    took_s = defaultdict(list)
    cases = [(kind, size) for kind in KINDS for size in SIZES]
    for number in range(count):
        kind, size = cases[number % len(cases)]
        with tempfile.TemporaryDirectory() as folder:
            try:
                left = others(kind, size, number, Path(folder))
            except NotStartedError:  # too busy a machine: they did not all come in 31 s
                print(f"{number} {kind} of {size}: not started", flush=True)
                continue
        seconds = max(each.seconds for each in left)
        took_s[kind, size].append(seconds)
        for each in left:
            print(
                f"{number} {kind} of {size}: {each.seconds:.2f} s, {each}", flush=True
            )
    print(
        "| | ranks | moments | median, s | most, s |", "|---|---|---|---|---|", sep="\n"
    )
    for (kind, size), found in took_s.items():
        figures = f"{len(found)} | {median(found):.2f} | {max(found):.2f}"
        print(f"| {kind} | {size} | {figures} |")


if __name__ == "__main__":
    main()
