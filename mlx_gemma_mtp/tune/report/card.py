"""The README.md of a trained drafter: front matter for the Hub, then the report.

Written from what is known here; nothing is fetched for it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from huggingface_hub import ModelCardData

from ...checkpoints.hub import is_hub_id, local_path
from ...cli.tables import markdown_table, markdown_text
from ..request import TuneRequest

CARD_NAME = "README.md"
_LICENSE = "apache-2.0"  # of everything Google publishes as Gemma 4
_SIGN = "<!-- written by mlx_gemma_mtp.tune -->"

Rows = Sequence[Sequence[str]]


def card(
    name: str,
    *,
    target: str,
    drafter: str | None,
    license_id: str | None,
    acceptance: tuple[str, Sequence[Rows]],
    speed: tuple[str, Rows],
    costs: Sequence[str],
    settings: Rows,
    command: str,
    usage: str,
    plot: str | None,
) -> str:
    """Return a drafter's README.md.

    Args:
        name: What it will be called: a Hub id or a folder's name.
        target: Its target: a Hub id or a folder's name, which has no slash.
        drafter: The drafter that training began with, likewise; None for random
            weights.
        license_id: Of the weights, an id that the Hub knows; None for Google's, if the
            weights came from there.
        acceptance: What was measured: a sentence, tables.
        speed: What is predicted: a sentence, a table.
        costs: What training took, lines.
        settings: What was asked for, a table; empty without any.
        command: The command line; empty without one.
        usage: The command line that decodes with the drafter, as from ``usage()``;
            empty for one that goes by the names.
        plot: The file of the plot, None without one.
    """
    source = "random weights" if drafter is None else _link(drafter)
    by_names = ("--model", target, "--draft-model", name)
    parts = [
        f"---\n{_front_matter(target, drafter, license_id)}\n---",
        f"# {markdown_text(name.rpartition('/')[2])}",
        f"An MTP drafter for {_link(target)}, trained from {source} by "
        "`mlx_gemma_mtp`. It proposes tokens and the target decides: what the target "
        "says stays as it is, only the speed changes.",
        _fenced(usage or _generate(*by_names), "bash"),
        f"## Acceptance\n\n{markdown_text(acceptance[0])}",
        *map(_table, acceptance[1]),
        *([f"![Acceptance and loss]({plot})"] if plot else []),
        f"## Speed\n\n{markdown_text(speed[0])}",
        _table(speed[1]),
        "## Training",
        "\n".join(f"- {markdown_text(line)}" for line in costs),
        *([_table(settings)] if settings else []),
        *([_fenced(command, "bash")] if command else []),
        _SIGN,
    ]
    return "\n\n".join(parts) + "\n"


def usage(request: TuneRequest) -> str:
    """Return the command line that decodes with a new drafter.

    It runs where the training was begun: names are as they were given.

    Args:
        request: What was asked for.
    """
    is_folder = local_path(request.model) is not None
    model = _path(request.model) if is_folder else request.model
    words = ["--model", model, "--draft-model", _path(str(request.output))]
    if request.adapter_path is not None:
        words += ["--adapter-path", _path(request.adapter_path)]
    if request.revision is not None:
        words += ["--revision", request.revision]
    if request.trust_remote_code:
        words.append("--trust-remote-code")
    return _generate(*words)


def _generate(*words: str) -> str:
    return shlex.join(("mlx_gemma_mtp.generate", *words, "--prompt", "hello"))


def _path(given: str) -> str:
    """A folder as nobody takes it for a Hub id or a flag."""
    return given if given.startswith(("/", "./", "../", "~")) else f"./{given}"


def _front_matter(target: str, drafter: str | None, license_id: str | None) -> str:
    # The origin of the weights comes first; those made anew took the target's table.
    sources = [name for name in (drafter, target) if name is not None]
    if license_id is None and sources[0].startswith("google/"):
        license_id = _LICENSE
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "gemma4", "mtp", "speculative-decoding"],
        base_model=[name for name in sources if is_hub_id(name)] or None,
        license=license_id,
    )
    return data.to_yaml()


def _link(name: str) -> str:
    shown = markdown_text(name)
    return f"[{shown}](https://huggingface.co/{name})" if is_hub_id(name) else shown


def _table(rows: Rows) -> str:
    return "\n".join(markdown_table(rows))


def _fenced(text: str, language: str) -> str:
    """A block of code, whatever is in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
