"""Print the modelled speed of decoding on Apple chips, and how far the model is off.

    python scripts/roofline.py             the check against published figures, a table
    python scripts/roofline.py --markdown  what docs/speed-model.md has
    python scripts/roofline.py --fit       fit the constants again

Nothing here is measured: the figures to check against were published by others
(`scripts/data/published_speeds.json` names each source), everything else is computed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from mlx_gemma_mtp.drafting.chips import CHIPS, Chip
from mlx_gemma_mtp.drafting.growth import (
    BEFORE_M3,
    M3_M4,
    M5,
    MAX_KERNEL_ROWS,
    Constants,
    cautious_slots,
    constants_of,
    with_kernel,
)
from mlx_gemma_mtp.drafting.speed_model import Model, experts_read, model
from mlx_gemma_mtp.kernels.matmul import default_columns
from mlx_gemma_mtp.models.families import FAMILIES, Family

SPEEDS = Path(__file__).parent / "data" / "published_speeds.json"
SHOWN = (
    *("M1 Max", "M2 Ultra", "M3 Max", "M3 Ultra", "M4", "M4 Pro", "M4 Max"),
    *("M5", "M5 Max"),
)
GROWTH_SHOWN = ("M1 Max", "M2 Ultra", "M3 Max", "M4 Max", "M5 Max")
ACCEPTANCES = (0.60, 0.75, 0.85)
USES = {  # of published figures
    "fit": "the constants were fitted to",
    "same runs": "of the same runs, not fitted to",
    "check": "of other runs",
}
SPEED_SETTINGS = ("bits", "draft_bits", "batch_size", "context")

Published = dict[str, Any]
ConstantsOf = Callable[[Chip], Constants]


@dataclass(frozen=True)
class FirstEstimate(Constants):
    """Before anything was fitted: tables of c(M), one fixed cost a forward."""

    table: tuple[float, ...] = ()

    def growth(self, rows: int, chip: Chip, bits: int = 4) -> float:
        """Cost of several rows over one; past the table as steep as at its end."""
        past = max(rows - len(self.table), 0)
        slope = self.table[-1] - self.table[-2]
        return self.table[rows - past - 1] + past * slope

    def fixed_s(self, num_layers: int) -> float:
        """Time of a forward that does not depend on bytes."""
        return 0.4e-3 if num_layers == 4 else 0.6e-3


def first_estimate(chip: Chip) -> Constants:
    """Constants as first guessed: 80 % of bandwidth, growth read off a few figures."""
    tables = {
        15: (1, 1.62, 2.24, 2.86, 3.48, 4.1, 4.7, 5.3),
        17: (1, 1.10, 1.28, 1.45, 1.75, 2.05, 2.35, 2.6),
        99: (1, 1.06, 1.12, 1.27, 1.42, 1.68, 1.94, 2.2),
    }
    table = next(t for before, t in tables.items() if chip.generation < before)
    return FirstEstimate(0.8, 0.0, table=table)


def designed_slots(rows: int) -> float:
    """Instructions for each weight that the kernel is written to need.

    One multiply-add for each row, 2.9 to make a number of a weight, and the conversions
    of rows, each used for R outputs.
    """
    return 2.9 + rows * (1 + 1 / default_columns(rows))


# What multiplies few rows, and the constants then.
MLX, DESIGNED, CAUTIOUS = "MLX", "kernel as designed", "kernel, cautiously"
MULTIPLIERS: dict[str, ConstantsOf] = {
    MLX: constants_of,
    DESIGNED: lambda chip: with_kernel(constants_of(chip), designed_slots),
    CAUTIOUS: lambda chip: with_kernel(constants_of(chip), cautious_slots),
}


def configure_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description="Modelled speed of decoding on Apple chips; nothing is measured."
    )
    parser.add_argument("--bits", type=int, default=4, help="of a target's weight")
    parser.add_argument(
        "--draft-bits",
        type=int,
        help="of a drafter's weight (default: the converter's choice)",
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--context", type=int, default=0, help="tokens in the cache")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument(
        "--markdown", action="store_true", help="what docs/speed-model.md has"
    )
    parser.add_argument("--fit", action="store_true", help="fit the constants again")
    return parser


def modelled(row: Published, constants: ConstantsOf = constants_of) -> float:
    """What the model says instead of a published figure, in the same unit."""
    chip = CHIPS[row["chip"]]
    if row["kind"] == "growth":
        return constants(chip).growth(row["rows"], chip)
    if row["kind"] == "experts":
        return experts_read(row["rows"], row["active"], row["experts"])
    settings = {name: row[name] for name in SPEED_SETTINGS if name in row}
    speed = model(chip, FAMILIES[row["family"]], constants=constants(chip), **settings)
    k = row.get("k", 0)
    if row["kind"] == "cost":
        return speed.relative_cost(k)
    # Published shares of accepted drafts, so tokens per round need no assumption.
    length = 1 + k * row.get("acceptance", 0.0)
    if row["kind"] == "speedup":
        return length / speed.relative_cost(k)
    return speed.batch_size * length / speed.round_s(k)


def error(row: Published, constants: ConstantsOf = constants_of) -> float:
    """The modelled figure over the published one, less 1."""
    return float(modelled(row, constants) / row["value"] - 1)


def summary(rows: list[Published], constants: ConstantsOf = constants_of) -> str:
    """Median and worst absolute error of some rows, in words."""
    errors = [abs(error(row, constants)) for row in rows]
    return f"median {statistics.median(errors):.0%}, worst {max(errors):.0%}"


def used(rows: list[Published], use: str) -> list[Published]:
    """Published figures by what they were used for, one of ``USES``."""
    return [row for row in rows if row["use"] == use]


def check_lines(rows: list[Published]) -> Iterator[str]:
    """The model beside every published figure."""
    yield "Published figures and the model (modelled, not measured)"
    yield (
        f"{'kind':8}{'chip':10}{'model':14}{'bits':>5}{'B':>3}{'K, rows':>8}"
        f"{'accepted':>9}{'published':>10}{'modelled':>9}{'error':>7}  source"
    )
    for row in rows:
        note = f" ({row['note']})" if "note" in row else ""
        yield (
            f"{row['kind']:8}{row['chip']:10}{row.get('family', row.get('what')):14}"
            f"{row.get('bits', 4):5}{row.get('batch_size', 1):3}"
            f"{row.get('k', row.get('rows', 0)):8}{row.get('acceptance', ''):>9}"
            f"{row['value']:10}{modelled(row):9.2f}{error(row):+7.0%}"
            f"  {row['source']}{note} [{row['use']}]"
        )
    for use, words in USES.items():
        part = used(rows, use)
        before = summary(part, first_estimate)
        yield f"{len(part)} figures {words}: {summary(part)}; first estimate: {before}"
    for kind in dict.fromkeys(row["kind"] for row in rows):
        part = [row for row in rows if row["kind"] == kind and row["use"] != "fit"]
        if part:
            yield f"  not fitted to, {len(part)} of kind {kind}: {summary(part)}"


def speeds(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The modelled speed of each family on each chip, by what multiplies few rows."""
    for (name, constants), chip, family in product(
        MULTIPLIERS.items(), SHOWN, FAMILIES.values()
    ):
        speed = asked_model(args, chip, family, constants)
        drafting = {}
        for acceptance in ACCEPTANCES:
            k = speed.best_draft_tokens(acceptance)
            drafting[f"{acceptance:.2f}"] = {
                "num_draft_tokens": k,
                "tokens_per_second": speed.tokens_per_second(k, acceptance),
                "speedup": speed.speedup(acceptance),
            }
        yield {
            "multiplier": name,
            "chip": chip,
            "family": family.name,
            "plain_tokens_per_second": speed.tokens_per_second(0, 0.0),
            "relative_cost": [speed.relative_cost(k) for k in range(9)],
            "acceptance": drafting,
        }


def asked_model(
    args: argparse.Namespace, chip: str, family: Family, constants: ConstantsOf
) -> Model:
    """The model of a family on a chip with the settings that were asked for."""
    settings = {name: getattr(args, name) for name in SPEED_SETTINGS}
    return model(CHIPS[chip], family, constants=constants(CHIPS[chip]), **settings)


def speed_lines(args: argparse.Namespace) -> Iterator[str]:
    """The tables in plain text."""
    bits = args.draft_bits or "converter's"
    yield (
        f"Modelled, not measured: {args.bits}-bit target, {bits} bits of the drafter, "
        f"batch {args.batch_size}, context {args.context}"
    )
    heads = "".join(f"{f'acceptance {a:.2f}':>24}" for a in ACCEPTANCES)
    multiplier = ""
    for found in speeds(args):
        if found["multiplier"] != multiplier:
            multiplier = found["multiplier"]
            yield f"few rows by: {multiplier}"
            yield f"{'chip':10}{'family':9}{'plain tok/s':>12}{heads}"
        cells = "".join(
            f"{c['tokens_per_second']:11.1f} K={c['num_draft_tokens']}"
            f"{c['speedup']:8.2f}x "
            for c in found["acceptance"].values()
        )
        yield (
            f"{found['chip']:10}{found['family']:9}"
            f"{found['plain_tokens_per_second']:12.1f}{cells}"
        )


def constants_in_words(constants: Constants) -> str:
    """What was fitted, for a reader."""
    if constants.reread:
        rows = f"each further row costs {constants.reread:.2f} of the first"
    else:
        rows = f"arithmetic takes as long as reading at {constants.balance} rows"
    return (
        f"{constants.efficiency:.0%} of the bandwidth, "
        f"{constants.layer_s * 1e3:.3f} ms a layer, {rows}"
    )


def markdown_lines(rows: list[Published], args: argparse.Namespace) -> Iterator[str]:
    """What docs/speed-model.md has: constants, the check, the tables."""
    for name, constants in (("M1, M2", BEFORE_M3), ("M3, M4", M3_M4), ("M5", M5)):
        yield f"- {name}: {constants_in_words(constants)}"
    yield ""
    yield "| error against published figures | | before fitting | fitted |"
    yield "|---|---|---|---|"
    for use, words in USES.items():
        part = used(rows, use)
        before = summary(part, first_estimate)
        yield f"| {words} | {len(part)} | {before} | {summary(part)} |"
    yield ""
    yield from growth_table(args.bits)
    yield ""
    yield from speed_table(args)


def growth_table(bits: int) -> Iterator[str]:
    """What M rows cost over one, by MLX and by the kernel."""
    counts = range(2, MAX_KERNEL_ROWS + 1)
    yield from table(f"modelled, not measured: {bits} bits", map(str, counts))
    for chip in map(CHIPS.__getitem__, GROWTH_SHOWN):
        by = {
            name: [f"{of(chip).growth(rows, chip, bits):.2f}" for rows in counts]
            for name, of in MULTIPLIERS.items()
        }
        pairs = zip(by[DESIGNED], by[CAUTIOUS], strict=True)
        yield row_of(f"{chip.name}: MLX", by[MLX])
        yield row_of("kernel", (f"{first} ({last})" for first, last in pairs))


def speed_table(args: argparse.Namespace) -> Iterator[str]:
    """The speed of each family on each chip, with MLX alone and with the kernel."""
    found = {(f["multiplier"], f["chip"], f["family"]): f for f in speeds(args)}
    sizes = [family.size for family in FAMILIES.values()]
    yield from table("modelled, not measured", sizes)
    for chip in SHOWN:
        stock = [found[MLX, chip, family] for family in FAMILIES]
        plain = (f"{f['plain_tokens_per_second']:.0f}: {cell(f)}" for f in stock)
        yield row_of(f"{chip}: MLX", plain)
        for name in (DESIGNED, CAUTIOUS):
            ours = [found[name, chip, family] for family in FAMILIES]
            yield row_of(name, map(cell, ours, stock))


def cell(found: dict[str, Any], stock: dict[str, Any] | None = None) -> str:
    """Speed-ups and best K; "=" where MLX alone is as fast."""
    parts = []
    for acceptance, c in found["acceptance"].items():
        is_faster = (
            not stock or c["speedup"] > stock["acceptance"][acceptance]["speedup"]
        )
        parts.append(
            f"{c['speedup']:.1f}x ({c['num_draft_tokens']})" if is_faster else "="
        )
    return " · ".join(parts) if set(parts) != {"="} else "="


def table(corner: str, heads: Iterable[str]) -> Iterator[str]:
    """The first two lines of a table."""
    columns = list(heads)
    yield row_of(corner, columns)
    yield "|---" * (len(columns) + 1) + "|"


def row_of(first: str, cells: Iterable[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join((first, *cells))} |"


def fitted_constants(rows: list[Published]) -> list[Constants]:
    """Fit the seven numbers of the three `Constants`, by coordinates.

    The least sum of |log(modelled / published)|, so that no row counts for more than
    its size. Efficiency is at most 0.9: a plain copy reaches no more.
    """

    def constants(x: list[float]) -> list[Constants]:
        return [
            Constants(x[0], x[1], reread=x[2]),
            Constants(x[3], x[4], balance=x[5]),
            Constants(x[3], x[4], balance=x[6]),
        ]

    def loss(x: list[float]) -> float:
        if max(x[0], x[3]) > 0.9:
            return math.inf
        before_m3, m3_m4, m5 = constants(x)

        def of(chip: Chip) -> Constants:
            if chip.generation < 15:
                return before_m3
            return m3_m4 if chip.generation < 17 else m5

        return sum(abs(math.log(1 + error(row, of))) for row in rows)

    x = [0.6, 0.2e-3, 0.9, 0.85, 0.1e-3, 3.0, 4.0]
    best, step = loss(x), 0.2
    while step > 0.002:
        is_better = False
        for i in range(len(x)):
            for factor in (1 + step, 1 / (1 + step)):
                trial = [*x[:i], x[i] * factor, *x[i + 1 :]]
                if (found := loss(trial)) < best - 1e-9:
                    best, x, is_better = found, trial, True
        step = step if is_better else step / 2
    return constants(x)


def main() -> None:
    """Print what is asked for."""
    args = configure_parser().parse_args()
    rows: list[Published] = json.loads(SPEEDS.read_text(encoding="utf-8"))["rows"]
    if args.fit:
        now_used = (BEFORE_M3, M3_M4, M5)
        for now, found in zip(
            now_used, fitted_constants(used(rows, "fit")), strict=True
        ):
            print(f"used:   {asdict(now)}\nfitted: {asdict(found)}")
        return
    if args.json:
        check = [row | {"modelled": modelled(row), "error": error(row)} for row in rows]
        figures = {"check": check, "modelled": list(speeds(args))}
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        lines = list(markdown_lines(rows, args))
    else:
        lines = [*check_lines(rows), "", *speed_lines(args)]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
