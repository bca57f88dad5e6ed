"""Train the embedded pair's drafter from random weights, with mlx_gemma_mtp.tune.

    python scripts/train_drafter.py --output FOLDER

The text is the target's own continuations of Python's standard library, see corpus.py.
Nothing is downloaded, and nothing but the package is needed. On Linux's CPU it starts
itself again with OpenBLAS where that is installed.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx

from mlx_gemma_mtp.errors import MTPError
from mlx_gemma_mtp.pair.load import embedded_pair_path
from mlx_gemma_mtp.tune.pipeline import tune
from mlx_gemma_mtp.tune.report.report import Report
from mlx_gemma_mtp.tune.request import TextSettings, TuneRequest
from mlx_gemma_mtp.tune.settings import TrainingSettings
from scripts import openblas
from scripts.corpus import make_corpus, write_data
from scripts.progress import log, logged

TEXTS = TextSettings(
    num_texts=2800,
    prompt_tokens=48,
    max_tokens=96,
    num_rows=64,
)
# The clock ends it, neither steps nor patience. With the texts it takes 21 minutes of
# two cores, as long as the shipped drafter and its texts took.
TRAINING = TrainingSettings(
    minutes=14.5,
    steps=100_000,
    patience=100_000,
    batch_size=3,
    judge_every=200,
    save_every=500,
    learning_rate=3e-3,
    seed=1,
)
_RUN = "drafter_run"  # of the work folder, what tune keeps


def train_drafter(
    model: str | Path,
    output: Path,
    work: Path,
    *,
    draft_model: str | None = None,
    texts: TextSettings = TEXTS,
    training: TrainingSettings = TRAINING,
    is_resumed: bool = False,
    is_forced: bool = False,
    keeps_run: bool = False,
    hardware: str | None = None,
) -> Report:
    """Train a drafter on the corpus.

    Args:
        model: The target's folder.
        output: The drafter's folder.
        work: A folder for the corpus, which stays there, and for the run.
        draft_model: The folder of the drafter to begin with; None for random weights.
        texts: Which text the target writes.
        training: How the drafter learns.
        is_resumed: Whether a run that was cut off goes on.
        is_forced: Whether a drafter at ``output`` may be replaced.
        keeps_run: Whether records and checkpoints stay at the end.
        hardware: What to say of it beside its names.

    Raises:
        MTPError: A mistake of the user's.
    """
    work.mkdir(parents=True, exist_ok=True)
    data, held_out = write_data(make_corpus(work), work)
    request = TuneRequest(
        model=str(quick_target(Path(model), work)),
        data=(str(data),),
        held_out=(str(held_out),),
        output=output,
        draft_model=draft_model,
        is_from_scratch=draft_model is None,
        work=work / _RUN,
        is_resumed=is_resumed,
        is_forced=is_forced,
        keeps_work=keeps_run,
        texts=texts,
        training=training,
        command=_command(training),
        hardware=(*openblas.described(), *filter(None, [hardware])),
    )
    return tune(request, tell=log, progress=logged)


def quick_target(model: Path, work: Path) -> Path:
    """The target as the CPU computes it fastest: in float32.

    Its hidden states differ from those of bfloat16 by rounding alone; a CPU without
    units for bfloat16 takes four times as long for them.
    """
    if mx.default_device() != mx.cpu or not model.is_dir():
        return model
    folder = work / "target_float32"
    folder.mkdir(exist_ok=True)
    for path in model.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    weights = cast(dict[str, mx.array], mx.load(str(model / "model.safetensors")))
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        {name: array.astype(mx.float32) for name, array in weights.items()},
        {"format": "mlx"},
    )
    return folder


def _command(training: TrainingSettings) -> str:
    """The command line without its paths, which are this machine's."""
    words = ["python", "scripts/train_drafter.py", f"--seed={training.seed}"]
    if training.minutes is not None:
        words.append(f"--minutes={training.minutes:g}")
    return shlex.join(words)


def configure_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--model",
        default=str(embedded_pair_path()),
        help="the target (default: the embedded pair's)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=TRAINING.minutes,
        help="of training, those before a resumption included; the texts and the "
        "measurements come on top (default: %(default)g)",
    )
    parser.add_argument("--seed", type=int, default=TRAINING.seed)
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/train_pair"),
        metavar="FOLDER",
        help="for the corpus and the run (default: %(default)s)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with a run that was cut off"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a drafter at --output"
    )
    parser.add_argument(
        "--keep-run",
        action="store_true",
        help="leave records and checkpoints in --work at the end",
    )
    parser.add_argument(
        "--hardware", metavar="NAME", help="what to say of it beside its names"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train; the report goes to standard output."""
    args = configure_parser().parse_args(argv)
    openblas.prefer(log)
    try:
        report = train_drafter(
            args.model,
            args.output,
            args.work,
            training=replace(TRAINING, minutes=args.minutes, seed=args.seed),
            is_resumed=args.resume,
            is_forced=args.force,
            keeps_run=args.keep_run,
            hardware=args.hardware,
        )
    except MTPError as error:
        raise SystemExit(str(error)) from None
    print("\n".join(report.lines()))


if __name__ == "__main__":
    main()
