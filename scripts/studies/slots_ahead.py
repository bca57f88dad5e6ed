"""How many slots to give a sequence ahead: each is read by every round, or traced for.

    python scripts/studies/slots_ahead.py --prompt 50 500 --answer 50 200
    python scripts/studies/slots_ahead.py --modelled

Measured here: requests of the embedded pair that differ in nothing else are decoded
side by side, a few tokens in turn, each with rounds of its own that nobody has traced.
What a token takes of the CPU, with 1,024 slots ahead over what it takes with fewer,
is shown.

Modelled: the same for the published pairs on some chips. Tracing is timed here, on
graphs without weights, and taken to be half as long there; the rest is the speed model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from unittest.mock import patch

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parents[2]))

from mlx_gemma_mtp.cache.slabs import next_capacity
from mlx_gemma_mtp.constants import MAX_DRAFT_TOKENS
from mlx_gemma_mtp.drafting.chips import CHIPS
from mlx_gemma_mtp.drafting.speed_model import Model, acceptance_length, model
from mlx_gemma_mtp.engine import capacity
from mlx_gemma_mtp.engine.rounds import Rounds
from mlx_gemma_mtp.engine.state import empty_state, row_settings
from mlx_gemma_mtp.machine import describe_machine
from mlx_gemma_mtp.models.families import FAMILIES
from mlx_gemma_mtp.models.target import Target
from mlx_gemma_mtp.pair.pair import Pair
from mlx_gemma_mtp.sampling.params import SamplingParams
from mlx_gemma_mtp.selftest.random_pair import skeletons
from scripts.benchmarks.engines import AUTO, OURS, EngineSpec, OwnEngine
from scripts.benchmarks.models import ModelSpec
from scripts.benchmarks.prompts import kind_prompts

_AHEAD = (1024, 512, 256)  # others are compared with the first
_LIMIT = 8192  # tokens that a request allows: far more than it makes
_TURN = 12  # tokens
_MARGIN = 2 * (MAX_DRAFT_TOKENS + 1)  # slots beyond those ahead, see Capacity.initial
_CHIPS = ("M1 Max", "M2 Ultra", "M3 Max", "M4 Max", "M5 Max")
_FASTER = 2  # times as fast as here is a Mac thought to trace
_ACCEPTANCE = 0.75


def main() -> None:
    """Measure or model, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompt", nargs="+", type=int, default=(50, 500, 2000))
    parser.add_argument("--answer", nargs="+", type=int, default=(50, 200, 1000))
    parser.add_argument("--drafts", nargs="+", default=("0", "4", AUTO))
    parser.add_argument("--modelled", action="store_true")
    args = parser.parse_args()
    print(describe_machine(str(mx.default_device())))
    if args.modelled:
        _show_modelled(args.prompt[0], args.answer)
        return
    spec = ModelSpec()
    pair, tokenizer = spec.load(), spec.tokenizer()
    for length in args.prompt:
        prompts = kind_prompts(tokenizer, "prose", count=1, length=length)
        assert not isinstance(prompts, str)
        for drafts in args.drafts:
            _compare(pair, prompts[0], drafts, sorted(args.answer))


# -------------------------------------------------------------------------- measured


def _compare(pair: Pair, prompt: list[int], drafts: str, answers: list[int]) -> None:
    """Decode requests side by side; a line for each length of an answer."""
    spec = EngineSpec(OURS, AUTO if drafts == AUTO else int(drafts))
    runs = []
    for ahead in _AHEAD:
        run = OwnEngine(pair, spec).steps([prompt], _LIMIT, {})
        with patch.object(capacity, "slots_ahead", lambda ahead=ahead: ahead):
            next(run)  # reads the prompt, and makes the slabs
        runs.append(run)
    seconds, tokens = [0.0] * len(runs), [0] * len(runs)
    for answer in answers:
        while min(tokens) < answer:
            goal = min(tokens) + _TURN
            for i, run in enumerate(runs):
                start = time.process_time()
                while tokens[i] < goal:
                    tokens[i] += next(run).num_tokens
                mx.synchronize()  # what is in flight belongs to this one
                seconds[i] += time.process_time() - start
        each = [s / n for s, n in zip(seconds, tokens, strict=True)]
        print(
            f"prompt {len(prompt):5}  K {drafts:4}  answer {answer:5}  "
            f"{1e3 * each[0]:6.2f} ms  "
            + "  ".join(
                f"{ahead}: {each[0] / own:.2f}"
                for ahead, own in zip(_AHEAD[1:], each[1:], strict=True)
            ),
            flush=True,
        )


# -------------------------------------------------------------------------- modelled


def _show_modelled(prompt: int, answers: Sequence[int]) -> None:
    """A line for each pair and chip."""
    for name, family in FAMILIES.items():
        traced_s = {k: _traced_s(name, k) / _FASTER for k in range(5)}
        for chip in _CHIPS:
            found = model(CHIPS[chip], family)
            drafts = found.best_draft_tokens(_ACCEPTANCE)
            setup_s = traced_s[0] + traced_s[drafts]
            parts = []
            for answer in answers:
                first, *others = (
                    _answer_s(found, drafts, setup_s, prompt, answer, ahead)
                    for ahead in _AHEAD
                )
                ratios = " ".join(f"{first / other:.3f}" for other in others)
                parts.append(f"answer {answer}: {ratios}")
            print(f"{name:8} {chip:9} K {drafts}  {'  '.join(parts)}", flush=True)


def _traced_s(family: str, num_draft_tokens: int) -> float:
    """Time to trace a round of a published pair on this machine."""
    lm, drafter = skeletons(family)
    target = Target(lm)
    found = []
    for _ in range(3):
        slabs = target.layout.allocate(1, 2048)
        hidden = mx.zeros((1, 1, lm.args.hidden_size), dtype=target.layout.dtype)
        rounds = Rounds(target, drafter)
        start = time.thread_time()
        rounds.run(
            empty_state(slabs, hidden),
            row_settings([SamplingParams()]),
            num_draft_tokens=num_draft_tokens,
        )
        found.append(time.thread_time() - start)
    return median(found)


def _answer_s(
    found: Model, drafts: int, setup_s: float, prompt: int, answer: int, ahead: int
) -> float:
    """Time of an answer, with what it takes to trace its rounds."""
    num_slots = next_capacity(prompt + ahead + _MARGIN)
    seconds, position = setup_s, float(prompt)
    while position < prompt + answer:
        if position + _MARGIN / 2 >= num_slots:
            num_slots = next_capacity(num_slots + 1, num_slots)
            seconds += setup_s
        seconds += found.round_s(drafts) + num_slots * found.key_s(drafts)
        position += acceptance_length(drafts, _ACCEPTANCE)
    return seconds


if __name__ == "__main__":
    main()
