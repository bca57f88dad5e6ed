"""The package's commands by name, and the parser that each of them begins with.

Each is called as ``mlx_gemma_mtp NAME`` or ``mlx_gemma_mtp.NAME``; messages and help
texts have the second form, however it was called. Knows nothing of MLX.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..machine import describe_versions
from .command import Parser


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        module: The module of the package whose ``main`` it is.
        summary: What it does, one line.
    """

    module: str
    summary: str


COMMANDS: Mapping[str, Command] = {
    "generate": Command(
        "cli.generate", "Generate text with a Gemma 4 model and its MTP drafter."
    ),
    "chat": Command(
        "chat.__main__",
        "Chat with a Gemma 4 model and its MTP drafter in the terminal.",
    ),
    "server": Command(
        "server.__main__",
        "Serve a Gemma 4 model and its MTP drafter with OpenAI's API.",
    ),
    "run": Command("hook.run", "Run a program of mlx-lm, with drafters for Gemma 4."),
    "convert": Command(
        "convert.__main__",
        "Convert a Gemma 4 model and its MTP drafter to MLX, quantized.",
    ),
    "tune": Command(
        "tune.__main__",
        "Train an MTP drafter for the Gemma 4 target it will run with.",
    ),
    "selftest": Command(
        "selftest.__main__",
        "Test kernels, exactness, caches and speed on this machine.",
    ),
}


class _Version(argparse.Action):
    """Prints the versions that count, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        # Late: to look them up takes as long as everything else here.
        sys.stdout.write(f"{describe_versions()}\n")
        parser.exit()


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add --version."""
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        default=argparse.SUPPRESS,
        help="show the versions of the package, of MLX and of mlx-lm, and end",
    )


def make_parser(name: str, **settings: Any) -> Parser:
    """The parser of a command: its name, what it does, --help and --version.

    Args:
        name: Its name in the table.
        settings: More settings of the parser's.
    """
    parser = Parser(
        prog=f"mlx_gemma_mtp.{name}", description=COMMANDS[name].summary, **settings
    )
    add_version(parser)
    return parser
