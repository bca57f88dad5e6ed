"""The ``mlx_gemma_mtp.run`` command: a program of mlx-lm's, with drafters.

It installs the hook and calls the program in this process, as if it had been started
by itself. A mistake of the user's is one line and exit status 1, as everywhere here;
what the program itself says and how it ends is mlx-lm's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import sys
from collections.abc import Sequence

from .arguments import add_draft_arguments
from .command import Parser, exit_status
from .command_table import make_parser
from .config import DRAFTER_MODEL_TYPES, TARGET_MODEL_TYPES, check_model_type
from .errors import HookError, RequestError
from .hook_table import DECODING_PROGRAMS

_PREFIX = "mlx_lm."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None for the process's.

    Returns:
        Exit status: 0, 1 for a mistake of the user's, 130 for Control-C, 141 where
        the reader of the text went away. A program that exits by itself does so.
    """
    return exit_status(
        lambda: _run(configure_parser().parse_args(argv)), sys.stdout, sys.stderr
    )


def configure_parser() -> argparse.ArgumentParser:
    """The command's own arguments; they stand before the program's name."""
    parser = make_parser("run")
    add_draft_arguments(parser)
    parser.add_argument(
        "program",
        nargs=argparse.PARSER,
        help="a program of mlx-lm, such as mlx_lm.chat, and its own arguments; mlx_lm. "
        "may be left out",
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    """Install the hook, then run the program."""
    name, *arguments = args.program
    program = _find(name)
    name = program.name.removeprefix(_PREFIX)
    is_drafting = name in DECODING_PROGRAMS and not args.no_draft
    if is_drafting:
        _check_drafter(args.draft_model)
        _check_cache(program.name, arguments)
    _set_up_log()
    from .hook import install

    install(
        speculative_decoding=is_drafting,
        draft_model=args.draft_model,
        num_draft_tokens=args.num_draft_tokens,
    )
    try:
        run = program.load()
    except ImportError as error:
        raise HookError(
            f"{program.name} must be complete: got {error}. Install what it needs, for "
            f"example pip install 'mlx-lm[{name}]'."
        ) from error
    sys.argv = [program.name, *arguments]
    run()
    return 0


def _find(name: str) -> importlib.metadata.EntryPoint:
    """The program of mlx-lm with a name.

    Raises:
        RequestError: There is none.
    """
    scripts = importlib.metadata.distribution("mlx-lm").entry_points
    programs = {
        script.name: script for script in scripts if script.name.startswith(_PREFIX)
    }
    found = programs.get(_PREFIX + name.removeprefix(_PREFIX))
    if found is None:
        raise RequestError(
            f"the program must be one of {', '.join(sorted(programs))}: got {name}. "
            "Flags of the program stand behind its name."
        )
    return found


def _check_drafter(path_or_id: str | None) -> None:
    """Check a named drafter here, not in the thread in which a server loads.

    Raises:
        CheckpointError: It cannot be found, or is none.
    """
    from .checkpoint import read_config
    from .pairing import fetch

    if path_or_id is not None:
        config = read_config(fetch(path_or_id))
        check_model_type(config, DRAFTER_MODEL_TYPES, source=path_or_id)


def _check_cache(program: str, arguments: Sequence[str]) -> None:
    """Refuse a quantized K/V cache for Gemma 4 before anything is loaded.

    Raises:
        RequestError: The program's arguments ask for one.
        CheckpointError: Its model cannot be found.
    """
    parser = Parser(prog=program, add_help=False)
    parser.add_argument("--kv-bits")
    parser.add_argument("--model")
    args, _ = parser.parse_known_args(arguments)
    if args.kv_bits is None or args.model is None:
        return
    from .checkpoint import read_config
    from .hooked import refuse_quantized_cache
    from .pairing import fetch

    if read_config(fetch(args.model)).get("model_type") in TARGET_MODEL_TYPES:
        refuse_quantized_cache(args.kv_bits)


def _set_up_log() -> None:
    """Let the package say on standard error which drafter it takes.

    On its own logger: the program sets up the one that all share.
    """
    package = logging.getLogger("mlx_gemma_mtp")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(logging.INFO)


if __name__ == "__main__":
    raise SystemExit(main())
