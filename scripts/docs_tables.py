"""Write the tables of docs/ that the code knows: flags, names, rules, the speed model.

    python -m scripts.docs_tables    (or: make docs)

A table stands between ``<!-- table: NAME -->`` and ``<!-- /table -->``. What two
commands or more have alike is in the table ``shared``, with a column for each command;
the tables of the commands have the rest.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib import import_module
from pathlib import Path

from convert.quantize import RULES
from mlx_gemma_mtp.chat.commands import COMMANDS as CHAT_COMMANDS
from mlx_gemma_mtp.cli.command_table import COMMANDS
from mlx_gemma_mtp.hook.table import REPLACED
from scripts import kernel_tables, roofline, several_macs

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_PLACE = re.compile(r"(?<=<!-- table: )([\w-]+) -->\n.*?(?=<!-- /table -->)", re.DOTALL)
_DEFAULT = re.compile(r" \(default: (.*)\)$")
# A flag's names and what it is for, without its default: alike in every command.
_Key = tuple[str, str]


@cache
def _flags(command: str) -> Mapping[_Key, str]:
    """The defaults of a command's flags; empty where the help names none."""
    parser = import_module(f"mlx_gemma_mtp.{COMMANDS[command].module}")
    found = {}
    for action in parser.configure_parser()._actions:
        if action.dest not in ("help", "version"):  # which all have
            text = _help(action)
            default = _DEFAULT.search(text)
            names = action.option_strings or [str(action.metavar or action.dest)]
            key = ", ".join(f"`{name}`" for name in names), _DEFAULT.sub("", text)
            found[key] = default[1] if default else ""
    return found


def _help(action: argparse.Action) -> str:
    text = (action.help or "") % vars(action)
    choices = [str(choice) for choice in action.choices or ()]
    if not all(choice in text for choice in choices):
        text = f"{', '.join(choices)}: {text}"
    return text.replace("|", r"\|")


def _defaults(key: _Key) -> Mapping[str, str]:
    """The commands that have a flag, each with its default."""
    found = {command: _flags(command) for command in COMMANDS}
    return {command: flags[key] for command, flags in found.items() if key in flags}


def _with_default(text: str, default: str) -> str:
    return f"{text} (default: {default})" if default else text


def _own(command: str) -> Iterator[str]:
    """The flags that one command alone has."""
    yield from ("| flag | |", "|---|---|")
    for (names, text), default in _flags(command).items():
        if len(_defaults((names, text))) == 1:
            yield f"| {names} | {_with_default(text, default)} |"


def _shared() -> Iterator[str]:
    """The flags that several commands have."""
    yield f"| flag | | {' | '.join(f'`{command}`' for command in COMMANDS)} |"
    yield f"|---|---|{':-:|' * len(COMMANDS)}"
    for key in {key: None for command in COMMANDS for key in _flags(command)}:
        names, text = key
        defaults = _defaults(key)
        if len(defaults) > 1:
            values = set(defaults.values())
            if len(values) == 1:
                text = _with_default(text, *values)
                defaults = dict.fromkeys(defaults, "✓")
            cells = " | ".join(defaults.get(command, "") for command in COMMANDS)
            yield f"| {names} | {text} | {cells} |"


def _chat_commands() -> Iterator[str]:
    yield from ("| in the chat | |", "|---|---|")
    for command in CHAT_COMMANDS:
        usage = command.usage.replace("|", r"\|")
        yield f"| `{usage}` | {command.help} |"


def _replaced() -> Iterator[str]:
    yield from ("| name | why | also in |", "|---|---|---|")
    for row in REPLACED:
        copies = ", ".join(f"`{copy}`" for copy in row.copies)
        yield f"| `{row.module}.{row.name}` | {row.why} | {copies} |"


def _rules() -> Iterator[str]:
    yield from ("| tensors | | why |", "|---|---|---|")
    for rule in RULES:
        yield f"| {rule.what} | {rule.treatment} | {rule.why} |"


def _speed_model() -> Iterator[str]:
    rows = json.loads(roofline.SPEEDS.read_text(encoding="utf-8"))["rows"]
    return roofline.markdown_lines(rows, roofline.configure_parser().parse_args([]))


TABLES: Mapping[str, Callable[[], Iterator[str]]] = {
    "shared": _shared,
    **{command: partial(_own, command) for command in COMMANDS},
    "chat-commands": _chat_commands,
    "replaced": _replaced,
    "rules": _rules,
    "speed-model": _speed_model,
    "several-bytes": several_macs.bytes_lines,
    "several-sums": several_macs.sums_lines,
    "several-speed": several_macs.speed_lines,
    "kernel-bytes": kernel_tables.bytes_lines,
    "kernel-slots": kernel_tables.slots_lines,
    "kernel-costs": kernel_tables.costs_lines,
}


def with_tables(page: str) -> str:
    """Return a page's text with its tables as the code has them."""
    return _PLACE.sub(
        lambda found: "\n".join((f"{found[1]} -->", "", *TABLES[found[1]](), "", "")),
        page,
    )


def main() -> None:
    """Write the pages that differ."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        if (written := with_tables(text)) != text:
            path.write_text(written, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
