"""The ``mlx_gemma_mtp`` command: any of the package's commands, by its name.

``python -m mlx_gemma_mtp`` is the same. Flags without a command are those of
``generate``. Imports nothing heavy by itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from .cli.command import EXIT_INTERRUPTED, Parser, exit_status
from .cli.command_table import COMMANDS, add_version
from .errors import RequestError, shorten

_OWN_FLAGS = ("-h", "--help", "--version")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None for the process's.

    Returns:
        Exit status: that of the command that was named, 1 where there is none such.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and arguments[0] in COMMANDS:
        return _call(arguments[0], arguments[1:])
    if arguments and arguments[0].startswith("-") and arguments[0] not in _OWN_FLAGS:
        return _call("generate", arguments)
    return exit_status(lambda: _run(arguments), sys.stdout, sys.stderr)


def configure_parser() -> argparse.ArgumentParser:
    """The flags that no command is needed for, and the list of commands."""
    parser = Parser(
        prog="mlx_gemma_mtp",
        usage="mlx_gemma_mtp COMMAND ...",
        description="Gemma 4 with its MTP drafters on MLX: the same text, faster.",
        epilog="mlx_gemma_mtp COMMAND --help shows a command's own flags; "
        "mlx_gemma_mtp.COMMAND is the same command.",
    )
    add_version(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary, add_help=False)
    return parser


def _call(name: str, arguments: Sequence[str]) -> int:
    try:
        command = import_module(f".{COMMANDS[name].module}", __package__)
    except KeyboardInterrupt:  # so early; its main says how it ends later
        return EXIT_INTERRUPTED
    status: int = command.main(arguments)
    return status


def _run(arguments: Sequence[str]) -> int:
    """List the commands, or say which one may be meant.

    Raises:
        RequestError: A command was named that there is not.
    """
    if not arguments:
        configure_parser().print_help()
    elif arguments[0] in _OWN_FLAGS:
        configure_parser().parse_args(arguments[:1])  # which ends the process
    else:
        near = get_close_matches(arguments[0], COMMANDS, n=1)
        advice = f"Is it {near[0]}?" if near else "See mlx_gemma_mtp --help."
        raise RequestError(
            f"the command must be one of {', '.join(COMMANDS)}: got "
            f"{shorten(arguments[0])}. {advice}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
