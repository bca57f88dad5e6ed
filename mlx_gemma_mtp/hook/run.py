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
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..cli.arguments import add_draft_arguments
from ..cli.command import Parser, exit_status
from ..cli.command_table import make_parser
from ..constants import DRAFTER_MODEL_TYPES, TARGET_MODEL_TYPES
from ..cpu_kernels import compile_header
from ..errors import HookError, MTPError, RequestError, cut
from ..models.text_config import check_model_type
from .table import DECODING_PROGRAMS

_PREFIX = "mlx_lm."
_WITH_A_DEFAULT = ("generate", "chat")  # programs that load some model unasked
_LOADING = ("load", "sharded_load")  # of mlx_lm.utils


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
    given = _read(program.name, arguments)
    _check_model(name, given)
    if is_drafting:
        _check_drafter(args.draft_model)
        _check_cache(given)
        compile_header()  # meanwhile
    _set_up_log()
    from .install import install, tally

    install(
        speculative_decoding=is_drafting,
        draft_model=args.draft_model,
        num_draft_tokens=args.num_draft_tokens,
        draft_source=args.draft_source,
    )
    try:
        run = program.load()
    except ImportError as error:
        raise HookError(
            f"{program.name} must be complete: got {error}. Install what it needs, for "
            f"example pip install 'mlx-lm[{name}]'."
        ) from error
    sys.argv = [program.name, *arguments]
    try:
        with _one_line(given.model):
            run()
    finally:
        if is_drafting and (line := tally().describe()):
            print(line, file=sys.stderr)
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
    from ..checkpoints.checkpoint import read_config
    from ..checkpoints.hub import fetch

    if path_or_id is not None:
        config = read_config(fetch(path_or_id))
        check_model_type(config, DRAFTER_MODEL_TYPES, source=path_or_id)


def _read(program: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Those of a program's arguments that count here too."""
    parser = Parser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    for flag in ("--model", "--prompt-cache-file", "--kv-bits"):
        parser.add_argument(flag)
    return parser.parse_known_args(arguments)[0]


def _check_model(name: str, given: argparse.Namespace) -> None:
    """Refuse what a program loads where nobody says, which is no Gemma 4.

    Raises:
        RequestError: The program would load that.
    """
    is_named = given.model or given.prompt_cache_file or given.help
    if name in _WITH_A_DEFAULT and not is_named:
        raise RequestError(
            f"{_PREFIX}{name} must be given a --model here: got none, and its own "
            "default is no Gemma 4. For example --model google/gemma-4-E2B-it."
        )


def _check_cache(given: argparse.Namespace) -> None:
    """Refuse a quantized K/V cache for Gemma 4 before anything is loaded.

    Raises:
        RequestError: The program's arguments ask for one.
        CheckpointError: Its model cannot be found.
    """
    if given.kv_bits is None or given.model is None:
        return
    from ..checkpoints.checkpoint import read_config
    from ..checkpoints.hub import fetch
    from .replacements import refuse_quantized_cache

    if read_config(fetch(given.model)).get("model_type") in TARGET_MODEL_TYPES:
        refuse_quantized_cache(given.kv_bits)


@contextmanager
def _one_line(model: str | None) -> Iterator[None]:
    """Turn what mlx-lm raises while it loads a model into one line.

    Raises:
        CheckpointError: The model cannot be loaded.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MTPError) or not _is_loading(error):
            raise
        from ..checkpoints.checkpoint import open_checkpoint
        from ..checkpoints.hub import fetch
        from ..checkpoints.weights import one_line

        if model is not None:
            open_checkpoint(fetch(model))  # which may know better what is wrong
        what = "the model" if model is None else f"the model {cut(model)}"
        with one_line(what, "Name another one by --model."):
            raise


def _is_loading(error: Exception) -> bool:
    """Whether an error comes from where mlx-lm loads models."""
    return any(
        frame.f_globals.get("__name__") == "mlx_lm.utils"
        and frame.f_code.co_name in _LOADING
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


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
