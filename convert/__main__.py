"""The ``mlx_gemma_mtp.convert`` command: parse, call, print, exit status.

The plan and the closing table go to standard output, progress to standard error. A
mistake of the user's is one line and exit status 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_gemma_mtp.checkpoints.checkpoint import FLOAT_DTYPES
from mlx_gemma_mtp.checkpoints.quantization import MODES, Format
from mlx_gemma_mtp.cli.command import exit_status, progress_bar
from mlx_gemma_mtp.cli.command_table import make_parser
from mlx_gemma_mtp.cli.refused import CONVERSION_FLAGS
from mlx_gemma_mtp.errors import RequestError

from .request import PartRequest, Request

DEFAULT_MLX_PATH = "mlx_model"


def configure_parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are mlx-lm's where it has them."""
    parser = make_parser("convert", reason_against=CONVERSION_FLAGS.get)
    _add_path_arguments(parser)
    _add_format_arguments(parser)
    _add_run_arguments(parser)
    return parser


def _add_path_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("from where to where")
    group.add_argument(
        "--hf-path", "--model", required=True, help="folder or Hub id of the target"
    )
    group.add_argument(
        "--mlx-path",
        default=DEFAULT_MLX_PATH,
        help="folder to write; the target's own folder, if it is in MLX's format "
        "already, only gets the drafter inside (default: %(default)s)",
    )
    group.add_argument(
        "--draft-model",
        default="auto",
        help="folder or Hub id of the drafter, auto to find it inside the target's "
        "folder, beside it or on the Hub, none for the target alone (default: auto)",
    )
    group.add_argument(
        "--revision", help="branch, tag or commit of the target on the Hub"
    )
    group.add_argument(
        "--draft-revision", help="branch, tag or commit of the drafter on the Hub"
    )
    group.add_argument(
        "--upload-repo", metavar="REPO", help="Hub repository to upload the result to"
    )


def _add_format_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("format")
    group.add_argument(
        "-q",
        "--quantize",
        action=argparse.BooleanOptionalAction,
        help="quantize the target (default: yes, if it is not quantized already)",
    )
    _add_quantization(group, "q", "target", "4; 8 with mxfp8")
    group.add_argument(
        "--draft-quantize",
        action=argparse.BooleanOptionalAction,
        help="quantize the drafter (default: yes, if it is not quantized already)",
    )
    _add_quantization(
        group,
        "draft-q",
        "drafter",
        "8 with a centroid head, else 4; with other --draft-q flags 4, 8 with mxfp8",
    )
    group.add_argument(
        "-d",
        "--dequantize",
        action="store_true",
        help="write matrices that are quantized in full, of target and drafter",
    )
    group.add_argument(
        "--dtype",
        choices=tuple(FLOAT_DTYPES),
        help="type of what is not quantized (default: what config.json names)",
    )


def _add_quantization(group: Any, prefix: str, part: str, bits: str) -> None:
    group.add_argument(
        f"--{prefix}-bits",
        type=int,
        metavar="BITS",
        help=f"bits of a weight of the {part} (default: {bits})",
    )
    group.add_argument(
        f"--{prefix}-group-size",
        type=int,
        metavar="SIZE",
        help="weights that share a scale (default: 64 for affine; the other modes have "
        "one size each)",
    )
    group.add_argument(
        f"--{prefix}-mode",
        choices=tuple(MODES),
        help=f"how the {part} is quantized (default: affine)",
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan and write nothing; reads the headers of the weights only",
    )
    group.add_argument(
        "--force", action="store_true", help="replace a checkpoint at --mlx-path"
    )
    group.add_argument(
        "--no-check",
        action="store_true",
        help="do not compare predictions of the result with the source's at the end",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None for the process's.

    Returns:
        Exit status: 0, 1 for a mistake of the user's, 128 and the signal's number if
        one ended it, 141 where the reader of the output went away.
    """
    return exit_status(
        lambda: _run(configure_parser().parse_args(argv)),
        *(sys.stdout, sys.stderr),
        stopped="interrupted",
    )


def _run(args: argparse.Namespace) -> int:
    """Plan, convert, print."""
    request = _request(args)
    # Heavy imports wait until the arguments are known to be good.
    from .card import make_repository, upload
    from .pipeline import convert, plan_conversion
    from .report import describe_plan, describe_result

    conversion = plan_conversion(request, headers_only=args.dry_run)
    if args.dry_run:
        print(describe_plan(conversion), flush=True)
        return 0
    if args.upload_repo:  # before hours of work: does the Hub know who this is?
        make_repository(args.upload_repo)
    divergence = convert(conversion, progress=_progress)
    print(describe_result(conversion, divergence))
    if args.upload_repo:
        print(f"uploaded to {upload(request.mlx_path, args.upload_repo)}")
    return 0


def _request(args: argparse.Namespace) -> Request:
    """Check the arguments and put them together."""
    target = _part_request(args, "q", "quantize")
    drafter = _part_request(args, "draft_q", "draft_quantize")
    return Request(
        hf_path=args.hf_path,
        mlx_path=Path(os.path.abspath(os.path.expanduser(args.mlx_path))),
        draft_model=args.draft_model,
        target=target,
        drafter=drafter,
        dtype=args.dtype,
        revision=args.revision,
        draft_revision=args.draft_revision,
        is_dequantized=args.dequantize,
        is_forced=args.force,
        has_check=not args.no_check,
        name=args.upload_repo,
    )


def _part_request(args: argparse.Namespace, prefix: str, switch: str) -> PartRequest:
    """Read the three flags of a format, and the one that switches it off."""
    given = {
        name: getattr(args, f"{prefix}_{name}")
        for name in ("bits", "group_size", "mode")
        if getattr(args, f"{prefix}_{name}") is not None
    }
    is_quantized = getattr(args, switch)
    if is_quantized is False and given:
        flags = prefix.replace("_", "-")
        off = switch.replace("_", "-")
        raise RequestError(
            f"--no-{off} and --{flags}-... exclude each other: got both. Leave one out."
        )
    try:
        chosen = Format.of_mode(given.pop("mode", "affine"), **given) if given else None
    except RequestError as error:
        flags = prefix.replace("_", "-")
        raise RequestError(f"--{flags}-...: {error}") from None
    return PartRequest(is_quantized=is_quantized, format=chosen)


@contextmanager
def _progress(what: str, num_bytes: int) -> Iterator[Callable[[int], Any]]:
    """Show bytes and time left on standard error."""
    with progress_bar(what, num_bytes, sys.stderr, unit="B", unit_scale=True) as bar:
        yield bar.update


if __name__ == "__main__":
    sys.exit(main())
