"""The benchmark's command line."""

from __future__ import annotations

import argparse
from dataclasses import replace

from mlx_gemma_mtp.constants import MODES
from mlx_gemma_mtp.models.families import FAMILIES

from .engines import AUTO, MLX_LM, MLX_VLM, OURS, SAMPLINGS, TWO_MODEL, EngineSpec
from .models import ModelSpec
from .prompts import KINDS

SECTIONS = (
    "speed",
    "acceptance",
    "rules",
    "context",
    "useless",
    "batch",
    "first",
    "structure",
    "sources",
    "engines",
    "graph",
)
ENGINES = ("mlx-lm", "plain", "draft", "two-model", "mlx-vlm")
_DRAFTS = 4


def configure_parser(description: str) -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], default=[])
    _add_model(parser.add_argument_group("the pair"))
    _add_sizes(parser.add_argument_group("how much"))
    _add_engines(parser.add_argument_group("engines and graph"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="also write the figures here")
    output.add_argument(
        "--markdown", metavar="FILE", help="write the tables of engines and graph"
    )
    output.add_argument(
        "--plot", metavar="FILE.png", help="draw the engines (needs matplotlib)"
    )
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help="folder or Hub id (default: the embedded pair)")
    group.add_argument("--draft-model", help="folder or Hub id")
    group.add_argument(
        "--shapes",
        type=str.lower,
        choices=list(FAMILIES),
        help="random weights in a published family's shapes instead",
    )
    group.add_argument("--layers", type=int, help="layers of --shapes to keep")
    group.add_argument("--bits", type=int, help="quantize --shapes")
    group.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="type of float weights (default: as stored; of --shapes bfloat16)",
    )
    group.add_argument(
        "--openblas",
        nargs="?",
        const="",
        metavar="LIBRARY",
        help="Linux: put OpenBLAS in front of the BLAS that MLX brings",
    )


def _add_sizes(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--num-draft-tokens",
        type=_count,
        nargs="+",
        metavar="K",
        help="drafts per round to time, numbers or auto (default: the pair's own "
        f"number; in engines and graph {_DRAFTS}, and in engines auto too)",
    )
    group.add_argument("--max-tokens", type=int, default=128)
    group.add_argument(
        "--prompt-tokens",
        type=int,
        nargs="+",
        default=[64],
        metavar="TOKENS",
        help="lengths of prompts; all sections but engines use the first",
    )
    group.add_argument("--prompts", type=int, default=100, help="held-out prompts")
    group.add_argument("--places", type=int, default=500, help="random places")
    group.add_argument(
        "--repeats", type=int, default=7, help="of speed, context, batch, first"
    )
    group.add_argument(
        "--batch-rows",
        type=int,
        nargs="+",
        default=[4],
        help="rows of batch, which has twice as many requests",
    )
    group.add_argument(
        "--prompts-at-once", type=int, nargs="+", default=[16], help="of first"
    )
    group.add_argument("--temp", type=float, default=0.0, help="for the speed")
    group.add_argument("--top-k", type=int, default=0, help="for the speed")
    group.add_argument("--top-p", type=float, default=1.0, help="for the speed")
    group.add_argument(
        "--contexts", type=int, nargs="+", default=[64, 256, 512, 896], metavar="TOKENS"
    )
    group.add_argument("--seed", type=int, default=0)


def _add_engines(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="NAME"
    )
    group.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND"
    )
    group.add_argument(
        "--prompts-per-kind", type=int, default=4, help="measured runs of a cell"
    )
    group.add_argument(
        "--samplings", nargs="+", choices=list(SAMPLINGS), default=list(SAMPLINGS)
    )
    group.add_argument("--batch-sizes", type=int, nargs="+", default=[1], metavar="B")
    group.add_argument(
        "--scripted-acceptance",
        type=float,
        nargs="+",
        default=[],
        metavar="P",
        help="accept drafts with this probability, whatever models say; context takes "
        "the first",
    )
    group.add_argument(
        "--exactness", choices=MODES, default=AUTO, help="of this package's drafting"
    )
    group.add_argument(
        "--two-model-draft",
        metavar="PATH",
        help="small model for mlx-lm's two-model decoding (default: the target itself "
        "in 4 bits)",
    )
    group.add_argument(
        "--one-process",
        action="store_true",
        help="let the engines share one process and one copy of the weights",
    )


def _count(text: str) -> int | str:
    return text if text == AUTO else int(text)


def model_spec(args: argparse.Namespace) -> ModelSpec:
    """The pair that the command line names."""
    return ModelSpec(
        args.model, args.draft_model, args.shapes, args.layers, args.bits, args.dtype
    )


def engine_specs(args: argparse.Namespace) -> list[EngineSpec]:
    """The engines to compare."""
    counts = args.num_draft_tokens or [_DRAFTS, AUTO]
    fixed = next((count for count in counts if count != AUTO), _DRAFTS)
    coins = args.scripted_acceptance or [None]
    made = {
        "mlx-lm": [EngineSpec(MLX_LM)],
        "plain": [EngineSpec(OURS)],
        "draft": [
            EngineSpec(OURS, count, coin, exactness=args.exactness)
            for coin in coins
            for count in counts
            if count
        ],
        "two-model": [
            EngineSpec(TWO_MODEL, fixed, coins[0], draft_path=args.two_model_draft)
        ],
        "mlx-vlm": [EngineSpec(MLX_VLM, fixed, coins[0])],
    }
    return [spec for name in ENGINES if name in args.engines for spec in made[name]]


def graph_specs(args: argparse.Namespace) -> list[EngineSpec]:
    """The engines whose graphs to count: those, and this package's not compiled."""
    specs = [spec for spec in engine_specs(args) if spec.num_draft_tokens != AUTO]
    plain = [replace(spec, use_compile=False) for spec in specs if spec.kind == OURS]
    return specs + plain
