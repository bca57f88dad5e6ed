"""Draw what the benchmark measured of the engines: docs/speed.svg, light and dark.

    python -m scripts.speed_picture FIGURES.json   of ``bench.py engines --json``
    python -m scripts.speed_picture                anew, of docs/speed.json

The first keeps in docs/speed.json what the picture shows; `make picture` measures too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path

from scripts.benchmarks.report import Figures

DOCS = Path(__file__).parents[1] / "docs"
RECORD = DOCS / "speed.json"
# The engines that are shown, as the benchmark calls them, and what the picture does.
SHOWN = {
    "mlx-lm": "mlx-lm",
    "mlx-vlm, K = 4": "mlx-vlm, with the drafter",
    "plain, K = 0": "this package, no drafter",
    "drafting, auto": "this package",
}
SAMPLINGS = {
    "greedy": "Greedy text",
    "sampled": "Sampled text: temperature 1, top-p 0.95, top-k 64",
}
DEVICES = {"Device(cpu, 0)": "MLX's CPU backend", "Device(gpu, 0)": "MLX's GPU backend"}
# Colours on GitHub's light page and on its dark one; they are readable on others too.
THEMES = {
    "speed.svg": {
        "text": "#1f2328",
        "note": "#59636e",
        "other": "#afb8c1",
        "plain": "#8dbcf0",
        "drafting": "#0969da",
    },
    "speed-dark.svg": {
        "text": "#f0f6fc",
        "note": "#9198a1",
        "other": "#656c76",
        "plain": "#2f5f9e",
        "drafting": "#4493f8",
    },
}
_BARS = {"plain, K = 0": "plain", "drafting, auto": "drafting"}  # the rest: other
_KINDS = {"json": "JSON", "echo": "text to repeat"}
TIMES = "\N{MULTIPLICATION SIGN}"
_WIDTH, _LEFT, _LONGEST = 760, 200, 400
_BAR, _STEP, _LINE = 20, 28, 16
_NOTE_CHARACTERS = 112


def main() -> None:
    """Record figures where some are given, then draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="?", type=Path)
    parser.add_argument("--note", help="a sentence on how it was measured")
    args = parser.parse_args()
    if args.figures is not None:
        found = summary(json.loads(args.figures.read_text(encoding="utf-8")))
        found |= {"note": args.note} if args.note else {}
        RECORD.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for name, colours in THEMES.items():
        (DOCS / name).write_text(picture(record, colours), encoding="utf-8")


def summary(figures: Figures) -> Figures:
    """What the picture shows of the benchmark's figures.

    Args:
        figures: What ``bench.py engines --json`` wrote.

    Returns:
        ``machine``, ``pair``, ``kinds`` of prompts, ``prompts`` in all, and by sampling
        and engine ``tokens_per_second`` (median over all prompts) and ``x_mlx_lm``
        (median of the ratios to mlx-lm's, prompt by prompt).
    """
    cells = figures["engines"]["cells"]
    speeds: dict[str, dict[str, Figures]] = {}
    for sampling in SAMPLINGS:
        of_it = [cell for cell in cells if cell["sampling"] == sampling]
        names = [name for name in SHOWN if all(name in c["engines"] for c in of_it)]
        speeds[sampling] = {
            name: _speed([cell["engines"][name] for cell in of_it]) for name in names
        }
    greedy = [cell for cell in cells if cell["sampling"] == "greedy"]
    return {
        "command": "make picture",
        "machine": figures["machine"],
        "pair": figures["engines"]["model"],
        "kinds": [cell["kind"] for cell in greedy],
        "prompts": sum(len(cell["engines"]["mlx-lm"]["runs"]) for cell in greedy),
        "speeds": speeds,
    }


def _speed(cells: list[Figures]) -> Figures:
    runs = [run for cell in cells for run in cell["runs"]]
    ratios = [ratio for cell in cells for ratio in cell["x_mlx_lm_runs"]]
    rate = statistics.median(run["tokens"] / run["seconds"] for run in runs)
    return {
        "tokens_per_second": round(rate, 1),
        "x_mlx_lm": round(statistics.median(ratios), 2),
    }


def picture(record: Figures, colours: dict[str, str]) -> str:
    """The picture, as SVG."""
    body, y = [_text(0, 18, "Tokens per second", "title")], 18
    longest = max(
        speed["tokens_per_second"]
        for engines in record["speeds"].values()
        for speed in engines.values()
    )
    for sampling, engines in record["speeds"].items():
        y += 30
        body.append(_text(0, y, SAMPLINGS[sampling], "head"))
        y += 8
        for name, speed in engines.items():
            body += _bar(y, name, speed, speed["tokens_per_second"] / longest)
            y += _STEP
    y += 16
    for line in _notes(record):
        body.append(_text(0, y, line, "note"))
        y += _LINE
    return _document(body, y - _LINE + 6, _description(record), colours)


def _bar(y: int, name: str, speed: Figures, share: float) -> Iterator[str]:
    """An engine's name, its bar and its figures.

    Args:
        y: The bar's upper edge.
        name: The engine's.
        speed: Its figures.
        share: Of the longest bar's length.
    """
    bar, width = _BARS.get(name, "other"), round(_LONGEST * share)
    kind, line = "strong" if bar == "drafting" else "label", y + _BAR - 5
    figures = f"{speed['tokens_per_second']:.0f}"
    if name != "mlx-lm":
        figures += f"   {speed['x_mlx_lm']:.1f} {TIMES} mlx-lm"
    yield _text(0, line, SHOWN[name], kind)
    place = f'x="{_LEFT}" y="{y}" width="{width}" height="{_BAR}"'
    yield f'<rect class="{bar}" {place} rx="3"/>'
    yield _text(_LEFT + width + 8, line, figures, kind)


def _notes(record: Figures) -> list[str]:
    """What was measured, and on what, in lines."""
    machine = record["machine"]
    for device, words in DEVICES.items():
        machine = machine.replace(device, words)
    kinds = ", ".join(_KINDS.get(kind, kind) for kind in record["kinds"])
    what = (
        f"Measured with {record['pair']} (30 layers of width 96). Medians of "
        f"{record['prompts']} prompts: {kinds}. Every engine gets a prompt before the "
        f"next one comes. {TIMES} is the median of the prompts' ratios."
    )
    if "Darwin" not in machine:
        what += " No Mac was measured."
    if "note" in record:
        what += f" {record['note']}"
    lines = textwrap.wrap(what, _NOTE_CHARACTERS)
    return lines + textwrap.wrap(machine, _NOTE_CHARACTERS)


def _description(record: Figures) -> str:
    """The picture in words, for those who cannot see it."""
    return ". ".join(
        f"{SAMPLINGS[sampling]}: "
        + ", ".join(
            f"{SHOWN[name]} {speed['tokens_per_second']:.0f}"
            for name, speed in engines.items()
        )
        for sampling, engines in record["speeds"].items()
    )


def _text(x: int, y: int, text: str, kind: str) -> str:
    place = f'x="{x}" y="{y}" xml:space="preserve"'
    return f'<text class="{kind}" {place}>{escape(text, quote=False)}</text>'


def _document(body: list[str], height: int, words: str, colours: dict[str, str]) -> str:
    style = " ".join(
        [
            "text { font: 14px -apple-system, 'Segoe UI', Arial, sans-serif;",
            f"fill: {colours['text']}; }}",
            ".title { font-size: 18px; font-weight: 600; }",
            ".head, .strong { font-weight: 600; }",
            f".note {{ font-size: 12px; fill: {colours['note']}; }}",
            *(
                f".{k} {{ fill: {colours[k]}; }}"
                for k in ("other", "plain", "drafting")
            ),
        ]
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" role="img">',
            f"<title>Tokens per second. {escape(words, quote=False)}</title>",
            f"<style>{style}</style>",
            *body,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    main()
