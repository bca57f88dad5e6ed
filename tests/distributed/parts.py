"""A rank that decodes with its part of a target, and one of its own that has all.

Run by launching.py, one process a rank: python -m tests.distributed.parts JOB:FOLDER...
It prints what each job found as JSON, the last line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gemma_mtp.cache.prompt import insert_row
from mlx_gemma_mtp.distributed.ranks import launched
from mlx_gemma_mtp.distributed.work import begin_work, end_work
from mlx_gemma_mtp.engine.prefill import read_prompt
from mlx_gemma_mtp.generation.tokens import draft_block, generate_tokens
from mlx_gemma_mtp.models.target import Target
from mlx_gemma_mtp.pair.load import load_pair
from mlx_gemma_mtp.pair.pair import Pair
from mlx_gemma_mtp.pair.planning import verdict_of

PROMPTS = [
    [(i * 37 + 11 * row) % 500 + 3 for i in range(24 + 9 * row)] for row in (0, 1)
]
BLOCK = [5, 6, 7, 8, 9]


def logits_of(target: Target) -> list[mx.array]:
    """Behind a prompt read in two chunks, and behind a block after it."""
    filled = read_prompt(target, PROMPTS[0], step_size=16)
    mx.eval(filled.logits)
    slabs = target.layout.allocate(1, 256)
    insert_row(slabs, target.layout, 0, filled.caches)
    offset = mx.array([len(PROMPTS[0])], dtype=mx.int32)
    output = target.verify(
        mx.array([BLOCK]), slabs, offset=offset, first_position=mx.array([0])
    )
    mx.eval(output.logits, output.hidden, output.slabs)
    return [filled.logits, output.logits]


def differences(whole: Pair, part: Pair) -> float:
    """How far the part's logits are from the whole's."""
    assert part.ranks is not None
    begin_work(part.ranks)
    pairs = zip(
        logits_of(whole.rounds.target), logits_of(part.rounds.target), strict=True
    )
    largest = max(mx.abs(a - b).astype(mx.float32).max().item() for a, b in pairs)
    end_work(part.ranks)
    return float(str(largest))


def text(pair: Pair, prompt: Any = PROMPTS[0], **settings: Any) -> list[Any]:
    """A dozen tokens, or rows of them."""
    settings = {"exactness": "fast", **settings}
    return list(generate_tokens(pair, prompt, max_tokens=12, **settings))


def near(folder: Path) -> dict[str, Any]:
    """Logits, drafts and a text of a part, beside those of all of it."""
    whole, part = both(folder)
    return {
        "difference": differences(whole, part),
        "drafts": [draft_block(pair, PROMPTS[1], 4) for pair in (whole, part)],
        "text": [text(pair, num_draft_tokens=3) for pair in (whole, part)],
    }


def texts(folder: Path) -> dict[str, Any]:
    """Texts of all kinds of a part, beside those of all of it."""
    pairs = both(folder)
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"num_draft_tokens": 0},
        "auto": {"num_draft_tokens": "auto"},
        "seed": {"num_draft_tokens": 3, "temp": 1.0, "seed": 7, "top_k": 20},
        "rows": {"prompt": PROMPTS, "num_draft_tokens": 2},
        "lookup": {"num_draft_tokens": 3, "draft_source": "auto"},
    }
    return {
        name: [text(pair, **kind) for pair in pairs] for name, kind in kinds.items()
    }


def both(folder: Path) -> tuple[Pair, Pair]:
    """All of a pair, and this rank's part of it."""
    paths = folder / "target", folder / "drafter"
    return load_pair(*paths, shard=False), load_pair(*paths)


def proved(folder: Path) -> dict[str, Any]:
    """The numbers of drafts whose bytes are those of plain decoding."""
    part = load_pair(folder / "target", folder / "drafter")
    assert part.ranks is not None
    begin_work(part.ranks)
    verdict = verdict_of(part, 1, budget_s=None)
    end_work(part.ranks)
    assert verdict is not None
    return {"equal": list(verdict.equal[1]), "most": verdict.max_difference}


def left(folder: Path) -> dict[str, Any]:
    """A text that rank 0 leaves early, one that the other leaves, and a whole one."""
    part = load_pair(folder / "target", folder / "drafter")
    assert part.ranks is not None
    counts = []
    for leaver in (0, 1):
        tokens = generate_tokens(
            part, PROMPTS[0], max_tokens=60, num_draft_tokens=3, exactness="fast"
        )
        counts.append(0)
        for _ in tokens:
            counts[-1] += 1
            if part.ranks.rank == leaver and counts[-1] == 9:
                break
        tokens.close()
    return {"counts": counts, "after": text(part, num_draft_tokens=3)}


JOBS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "near": near,
    "texts": texts,
    "proved": proved,
    "left": left,
}

if __name__ == "__main__":
    launched()
    mx.disable_compile()  # it takes longer than all else
    asked = [word.split(":") for word in sys.argv[1:]]
    found = [JOBS[job](Path(folder)) for job, folder in asked]
    sys.stdout.write(json.dumps(found) + "\n")
