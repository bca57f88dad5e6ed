"""The ``mlx_gemma_mtp.selftest`` command: parse, run, print, exit status.

The page goes to standard output, progress to standard error. A mistake of the user's is
one line and exit status 1; where something failed that must hold it is 2. With
``forget`` nothing is tested: what was learnt on this machine is deleted. With ``tune``
the kernels for few rows are timed, and what multiplies is chosen and kept.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ..checkpoints.template_files import missing_template_note
from ..cli.command import check_output_file, exit_status, write_file
from ..cli.command_table import make_parser
from ..distributed.environment import num_launched
from ..errors import OutputError, RequestError
from ..models.families import FAMILIES
from ..store import cache_folder, forget
from .names import MODEL, SECTIONS

EXIT_FAILED = 2
_NO_TEMPLATE = "the section on it gives it plain text"
DEFAULT_SECONDS = 120.0
TUNE_SECONDS = 1500.0
_FORGET, _TUNE = "forget", "tune"


def configure_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser("selftest", epilog="Nothing is downloaded without --model.")
    parser.add_argument(
        "instead",
        nargs="?",
        choices=(_FORGET, _TUNE),
        metavar="forget/tune",
        help="test nothing: forget what was learnt on this machine, or tune, which "
        "chooses by time what multiplies few rows, for --model or random weights",
    )
    parser.add_argument("--model", help="folder or Hub id of a target to test as well")
    parser.add_argument(
        "--draft-model",
        help="folder or Hub id of its drafter (default: found by itself)",
    )
    parser.add_argument(
        "--family",
        choices=FAMILIES,
        help="whose shapes random weights have (default: one that suits the memory)",
    )
    parser.add_argument(
        "--section",
        nargs="+",
        choices=SECTIONS,
        metavar="NAME",
        help=f"run only these: {', '.join(SECTIONS)} (default: all)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="time for all of it, roughly; what does not fit is left out (default: "
        f"{DEFAULT_SECONDS:g}; tune: {TUNE_SECONDS:g})",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write everything that was measured here"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None for the process's.

    Returns:
        Exit status: 0 where all holds that must, 1 for a mistake of the user's, 2 where
        something failed, 130 for Control-C, 141 where the reader of the page went away.
    """
    return exit_status(
        lambda: _run(configure_parser().parse_args(argv)), sys.stdout, sys.stderr
    )


def _run(args: argparse.Namespace) -> int:
    """Check, load, run, print."""
    _check(args)
    if num_launched(os.environ) > 1:
        return _several(args)
    if args.instead == _FORGET:
        print(_forget(), flush=True)
        return 0
    if args.instead == _TUNE:
        return _tune(args)
    # Heavy imports wait until the arguments are known to be good.
    from .model import open_model
    from .page import TITLE, section, to_json, verdict
    from .result import FAIL
    from .sections import Options, run

    # Mistakes are one line, and what a section finds is on the page.
    logging.getLogger("mlx_gemma_mtp").setLevel(logging.ERROR)
    names = args.section or [n for n in SECTIONS if n != MODEL or args.model]
    loaded = None
    if MODEL in names:
        loaded = open_model(args.model, args.draft_model)
        if not loaded.tokenizer.has_chat_template:
            _note(missing_template_note(loaded.tokenizer, _NO_TEMPLATE))
    print(TITLE, flush=True)
    results = []
    seconds = args.seconds or DEFAULT_SECONDS
    for result in run(Options(names, seconds, args.family, loaded), _running):
        print(section(result), flush=True)
        results.append(result)
    if args.json is not None:
        write_file("--json", args.json, to_json(results))
    print(verdict(results), flush=True)
    return EXIT_FAILED if any(r.status == FAIL for r in results) else 0


def _several(args: argparse.Namespace) -> int:
    """Look at several machines that were launched as one; the exit status.

    The first one prints.

    Raises:
        RequestError: Something else is asked for.
    """
    from ..distributed.ranks import launched
    from ..pair.load import embedded_pair_path
    from . import several
    from .model import open_model
    from .page import TITLE, section, to_json, verdict
    from .result import FAIL

    own = ("model", "draft_model", "json")
    given = {name for name, value in vars(args).items() if value is not None}
    if given - set(own):
        raise RequestError(
            "the self-test of several ranks must be without other options than "
            "--model, --draft-model and --json: got some. Launch one for these."
        )
    ranks = launched()
    assert ranks is not None
    logging.getLogger("mlx_gemma_mtp").setLevel(logging.ERROR)
    start = time.perf_counter()
    loaded = open_model(args.model or str(embedded_pair_path()), args.draft_model)
    result = several.look(loaded, ranks)
    result = replace(result, seconds=time.perf_counter() - start)
    if ranks.is_first:
        print(TITLE, section(result), verdict([result]), sep="\n", flush=True)
        if args.json is not None:
            write_file("--json", args.json, to_json([result]))
    return EXIT_FAILED if result.status == FAIL else 0


def _tune(args: argparse.Namespace) -> int:
    """Choose what multiplies few rows; the exit status."""
    from . import machine, matmuls, tuning
    from .model import open_model
    from .page import section, to_json
    from .random_pair import random_pair
    from .result import FAIL

    if reason := tuning.why_not():
        print(f"nothing to tune: {reason}", flush=True)
        return 0
    logging.getLogger("mlx_gemma_mtp").setLevel(logging.ERROR)
    if args.model is None:
        pair = random_pair(args.family or matmuls.default_family(), bits=4)
    else:
        pair = open_model(args.model, args.draft_model).pair
    seconds = args.seconds or TUNE_SECONDS
    print(f"{pair.target_source}: {tuning.plan(pair, seconds)}", flush=True)
    result = tuning.look(pair, seconds, cache_folder(), _note)
    print(section(result), flush=True)
    if args.json is not None:
        write_file("--json", args.json, to_json([machine.look(0.0), result]))
    return EXIT_FAILED if result.status == FAIL else 0


def _forget() -> str:
    """Forget what was learnt; say in one line what that was.

    Raises:
        OutputError: It cannot be forgotten.
    """
    folder = cache_folder()
    if folder is None:
        return "nothing to forget: nothing is kept on disk here"
    try:
        count = forget(folder)
    except OSError as error:
        raise OutputError(
            f"the cache folder must be one that can be written: got {folder}: "
            f"{error.strerror}. Delete it by hand."
        ) from error
    if not count:
        return f"nothing to forget in {folder}"
    return f"forgot what was learnt: deleted {count} of its files in {folder}"


def _check(args: argparse.Namespace) -> None:
    """Find mistakes before anything takes long.

    Raises:
        MTPError: There is one.
    """
    alone = configure_parser().parse_args([_FORGET])
    if args.instead == _FORGET and args != alone:
        raise RequestError(
            "forget must stand alone: got options with it. Leave them out."
        )
    if args.instead == _TUNE and args.section:
        raise RequestError("tune must have no --section: got one. Leave it out.")
    if args.seconds is not None and not 0 < args.seconds < math.inf:
        raise RequestError(
            f"--seconds must be above 0: got {args.seconds}. {DEFAULT_SECONDS:g} is "
            "enough for everything."
        )
    if args.model is None and args.section and MODEL in args.section:
        raise RequestError("--section model must have a model. Name one with --model.")
    if args.model is None and args.draft_model is not None:
        raise RequestError(
            "--draft-model must belong to a model. Name one with --model."
        )
    if args.json is not None:
        check_output_file("--json", args.json)


@contextmanager
def _running(line: str) -> Iterator[None]:
    """Say what runs; on a terminal the line goes again when it is over."""
    is_terminal = sys.stderr.isatty()
    print(line, end="" if is_terminal else "\n", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if is_terminal:
            print(f"\r{' ' * len(line)}\r", end="", file=sys.stderr, flush=True)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
