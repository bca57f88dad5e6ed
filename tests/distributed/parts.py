"""A rank that decodes with its part of a target, and one of its own that has all.

Run by launching.py, one process a rank: python -m tests.distributed.parts JOB:FOLDER...
It prints what each job found as JSON, the last line.
"""

from __future__ import annotations

import gc
import json
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_gemma_mtp import cpu_kernels
from mlx_gemma_mtp.cache.prompt import insert_row
from mlx_gemma_mtp.checkpoints.shard_plan import shard_plans
from mlx_gemma_mtp.distributed.patience import FIRST_S
from mlx_gemma_mtp.distributed.ranks import Ranks, launched
from mlx_gemma_mtp.distributed.watchdog import LIMIT_S
from mlx_gemma_mtp.distributed.work import begin_work, end_work
from mlx_gemma_mtp.engine import control, decoder, prompt_reader
from mlx_gemma_mtp.engine import round as round_of
from mlx_gemma_mtp.engine.prefill import read_prompt
from mlx_gemma_mtp.engine.runner import QueuedRound, RoundRunner
from mlx_gemma_mtp.engine.timing import RoundTimer
from mlx_gemma_mtp.errors import MTPError
from mlx_gemma_mtp.generation.tokens import draft_block, generate_tokens
from mlx_gemma_mtp.models import sharding
from mlx_gemma_mtp.pair import load as load_module
from mlx_gemma_mtp.pair import planning
from mlx_gemma_mtp.pair.load import load_pair
from mlx_gemma_mtp.pair.pair import Pair
from mlx_gemma_mtp.pair.planning import verdict_of
from mlx_gemma_mtp.sampling.acceptance import Accepted, Draft
from mlx_gemma_mtp.sampling.decision import decide
from mlx_gemma_mtp.sampling.distribution import choose_tokens

PROMPTS = [
    [(i * 37 + 11 * row) % 500 + 3 for i in range(24 + 9 * row)] for row in (0, 1)
]
BLOCK = [5, 6, 7, 8, 9]


def logits_of(pair: Pair) -> list[mx.array]:
    """Behind a prompt read in two chunks, and behind a block after it."""
    target = pair.rounds.target
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


def differences(expected: list[mx.array], part: Pair) -> float:
    """How far the part's logits are from the whole's."""
    assert part.ranks is not None
    begin_work(part.ranks)
    pairs = zip(expected, logits_of(part), strict=True)
    largest = mx.stack([mx.abs(a - b).astype(mx.float32).max() for a, b in pairs]).max()
    end_work(part.ranks)
    return float(str(largest.item()))


def text(pair: Pair, prompt: Any = PROMPTS[0], **settings: Any) -> list[Any]:
    """A dozen tokens, or rows of them."""
    settings = {"exactness": "fast", **settings}
    return list(generate_tokens(pair, prompt, max_tokens=12, **settings))


def near(folder: str) -> dict[str, Any]:
    """Logits and drafts of a part, beside those of all of it."""
    whole, part = both(folder)
    return {
        "difference": differences(logits_of(whole), part),
        "drafts": [draft_block(pair, PROMPTS[1], 4) for pair in (whole, part)],
    }


def texts(folder: str) -> dict[str, Any]:
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


def both(folder: str) -> tuple[Pair, Pair]:
    """All of a pair, and this rank's part of it."""
    whole = load_pair(f"{folder}/target", f"{folder}/drafter", shard=False)
    return whole, part_of(folder)


def part_of(folder: str) -> Pair:
    """This rank's part of a pair."""
    ranks = launched()
    assert ranks is not None
    return load_pair(f"{folder}/target", f"{folder}/drafter", group=ranks.group)


def proved(folder: str) -> dict[str, Any]:
    """The numbers of drafts whose bytes are those of plain decoding."""
    return proof_of(part_of(folder))


def exact(folder: str) -> dict[str, Any]:
    """The same of a pair that stands in one folder."""
    return proof_of(measured(folder)[0])


def proof_of(part: Pair) -> dict[str, Any]:
    """See ``proved``."""
    assert part.ranks is not None
    begin_work(part.ranks)
    verdict = verdict_of(part, 1, budget_s=None)
    end_work(part.ranks)
    assert verdict is not None
    return {"equal": list(verdict.equal[1]), "most": verdict.max_difference}


def left(folder: str) -> dict[str, Any]:
    """A text that rank 0 leaves early, one that the other leaves, and a whole one."""
    part = part_of(folder)
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


def disturbed(name: str) -> dict[str, Any]:
    """Texts while each rank sleeps and reads its clock as it likes: TIMES@FOLDER."""
    times, _, folder = name.partition("@")
    part = part_of(folder)
    assert part.ranks is not None
    random.seed(part.ranks.rank)
    start = RoundRunner.start

    def sleepy(runner: RoundRunner, queued: QueuedRound) -> None:
        time.sleep(random.choice((0, 0, 0.001, 0.01)))
        start(runner, queued)

    def wrong() -> float:
        return cpu_kernels.clock() + random.choice((0.0, 0.01, 1.0))

    with mock.patch.object(RoundRunner, "start", sleepy):
        with mock.patch.object(decoder, "RoundTimer", partial(RoundTimer, wrong)):
            found = [text(part, num_draft_tokens="auto") for _ in range(int(times))]
            seeds = [text(part, temp=1.0, seed=i) for i in range(int(times))]
    return {"same": all(t == found[0] for t in found), "seeds": seeds}


def led(folder: str) -> dict[str, Any]:
    """Texts of rank 0, while the other asks for others and would decide otherwise."""
    part = part_of(folder)
    assert part.ranks is not None
    assert part.drafter is not None
    asked: list[dict[str, Any]] = [
        {"num_draft_tokens": 3, "prompt": PROMPTS[0]},
        {"num_draft_tokens": 2, "prompt": PROMPTS[1], "temp": 1.0, "seed": 3},
        {"num_draft_tokens": "auto", "exactness": "auto", "prompt": PROMPTS[0]},
    ]
    with ExitStack() as stack:
        if not part.ranks.is_first:
            asked = [{"num_draft_tokens": 0, "prompt": PROMPTS[1][:9]}] * 3
            asked[1] |= {"temp": 0.5, "seed": 4}
            stack.enter_context(mock.patch.object(round_of, "decide", _wrong_decision))
            first = mock.patch.object(prompt_reader, "choose_tokens", _wrong_tokens)
            stack.enter_context(first)
            name = "can_look_ahead"
            ahead = mock.patch.object(planning, name, return_value=False)
            stack.enter_context(ahead)
            weight = part.drafter.post_projection.weight
            part.drafter.post_projection.weight = weight * -1
        return {"texts": [text(part, **kind) for kind in asked]}


def _wrong_decision(draft: Draft, *args: Any, **settings: Any) -> Accepted:
    """Another one."""
    found = decide(draft, *args, **settings)
    return replace(found, next_token=(found.next_token + 1) % 512)


def _wrong_tokens(logits: mx.array, *args: Any, **settings: Any) -> mx.array:
    """Other ones."""
    return (choose_tokens(logits, *args, **settings) + 1) % 512


def unlike(folder: str) -> dict[str, Any]:
    """What is said where ranks have other weights, or one of them no drafter."""
    rank = launched().rank  # type: ignore[union-attr]
    said = []
    cut = sharding.shard

    def other(lm: Any, ranks: Ranks) -> Any:
        layer = lm.layers[0].mlp.up_proj
        layer.weight = layer.weight * (1 + ranks.rank)
        return cut(lm, ranks)

    with mock.patch.object(load_module, "cut_for", other):
        said.append(refused(lambda: part_of(folder)))
    ranks = launched()
    assert ranks is not None
    ranks.is_lost = False  # for the next case
    drafter = f"{folder}/drafter" if rank else False
    said.append(refused(lambda: load_pair(f"{folder}/target", drafter)))  # type: ignore[arg-type]
    return {"said": said}


def crossed(folder: str) -> dict[str, Any]:
    """What is said of two texts at once, and that texts go on behind that."""
    part = part_of(folder)
    ask = partial(generate_tokens, part, PROMPTS[0], max_tokens=12, exactness="fast")
    never, first, second = ask(), ask(), ask()
    del never
    next(first)
    said = refused(lambda: next(second))
    rest = len(list(first))
    again = text(part, num_draft_tokens=2)
    processor = refused(lambda: ask(logits_processors=[lambda _, logits: logits]))
    return {"said": [said, processor], "rest": rest, "again": again}


def refused(call: Callable[[], Any]) -> str:
    """What an error says."""
    try:
        call()
    except MTPError as error:
        return str(error)
    return "nothing"


def endless(folder: str) -> dict[str, Any]:
    """Texts until somebody ends this, or makes it fail; the first one's end is told.

    Behind that nothing is traced: there ranks wait for each other longer.
    """
    signal.signal(signal.SIGUSR1, _fail)
    part = part_of(folder)
    while True:
        text(part, num_draft_tokens=3, draft_source="drafter")
        sys.stdout.write("text\n")
        sys.stdout.flush()


def _fail(number: int, frame: Any) -> None:
    """An error that comes at any moment."""
    raise KeyError("no such place")


def packed(folder: str, num_draft_tokens: int = 3) -> dict[str, Any]:
    """A part that is loaded from one folder: what it holds, and texts beside all's."""
    # All of it first: a rank at rest must not be busy for as long as that may take.
    whole = load_pair(folder, shard=False)
    expected = logits_of(whole)
    texts = [text(whole, num_draft_tokens=num_draft_tokens)]
    del whole
    gc.collect()
    mx.clear_cache()
    part, figures = measured(folder)
    texts += [text(part, num_draft_tokens=k) for k in (num_draft_tokens, 0)]
    return {**figures, "texts": texts, "difference": differences(expected, part)}


def wide(folder: str) -> dict[str, Any]:
    """As ``packed``; a round takes a busy machine longer than ranks wait for a Mac."""
    with mock.patch.object(control, "LIMIT_S", FIRST_S):
        return packed(folder, num_draft_tokens=1)


def held(folder: str) -> dict[str, Any]:
    """What a part that is loaded from one folder holds."""
    return measured(folder)[1]


def measured(folder: str) -> tuple[Pair, dict[str, Any]]:
    """A part, and its bytes: as planned, of its weights, and as MLX counts them."""
    ranks = launched()
    assert ranks is not None
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    part = load_pair(folder, group=ranks.group)
    after, peak = mx.get_active_memory(), mx.get_peak_memory()
    assert part.drafter is not None
    configs = [
        json.loads((place / "config.json").read_text())
        for place in (Path(folder), Path(folder) / "drafter")
    ]
    plan = shard_plans(configs[0], ranks.size, drafter_config=configs[1])[ranks.rank]
    weights: Any = tree_flatten([part.target.parameters(), part.drafter.parameters()])
    return part, {
        "held": after - before,
        "peak": peak - before,
        "weights": sum(array.nbytes for _, array in weights),
        "planned": plan.weight_bytes,
    }


def failing(name: str) -> dict[str, Any]:
    """Texts in the first of which a rank's program ends with an error: RANK@FOLDER."""
    victim, _, folder = name.partition("@")
    part = part_of(folder)
    assert part.ranks is not None
    tokens = generate_tokens(part, PROMPTS[0], max_tokens=60, exactness="fast")
    for number, _ in enumerate(tokens):
        if number == 9 and part.ranks.rank == int(victim):
            raise KeyError("no such place")
    return {"again": text(part)}


def cold(folder: str) -> dict[str, Any]:
    """The longest that ranks let each other wait for rounds, and the last time.

    In a text whose rounds all trace, in one that none does, and in one whose rounds
    rank 1 has let go, as it does behind enough of other models.
    """
    part = part_of(folder)
    assert part.ranks is not None
    limits: list[float] = []
    exchange = part.ranks.exchange

    def noting(what: str, limit_s: float = LIMIT_S) -> Any:
        if what.startswith("round"):
            limits.append(limit_s)
        return exchange(what, limit_s)

    found = []
    with mock.patch.object(part.ranks, "exchange", noting):
        for number in range(3):
            if number == 2 and not part.ranks.is_first:
                part.rounds._traces.fit("another model")
            limits.clear()
            text(part, num_draft_tokens=3, draft_source="drafter")
            found.append([max(limits), limits[-1]])
    return {"limits": found}


JOBS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "near": near,
    "texts": texts,
    "proved": proved,
    "left": left,
    "packed": packed,
    "wide": wide,
    "held": held,
    "exact": exact,
    "failing": failing,
    "disturbed": disturbed,
    "endless": endless,
    "led": led,
    "unlike": unlike,
    "crossed": crossed,
    "cold": cold,
}

if __name__ == "__main__":
    launched()
    mx.disable_compile()  # it takes longer than all else
    asked = [word.split(":") for word in sys.argv[1:]]
    found = [JOBS[job](name) for job, name in asked]
    sys.stdout.write(json.dumps(found) + "\n")
