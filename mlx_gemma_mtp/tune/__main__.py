"""The ``mlx_gemma_mtp.tune`` command: parse, call, print, exit status.

The report goes to standard output, progress to standard error. A mistake of the user's
is one line and exit status 1; a run that was cut off goes on with --resume.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..cli.arguments import add_checkpoint_arguments, add_filters
from ..cli.checks import json_object
from ..cli.command import exit_status, progress_bar
from ..cli.command_table import make_parser
from ..distributed.alone import check_alone
from ..errors import RequestError
from .request import TextSettings, TuneRequest
from .settings import TrainingSettings

_TEXT, _TRAINING = TextSettings(), TrainingSettings()


def configure_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser("tune")
    _add_model_arguments(parser)
    _add_data_arguments(parser)
    _add_training_arguments(parser)
    _add_run_arguments(parser)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument(
        "--model", required=True, help="folder or Hub id of the target, as it will run"
    )
    group.add_argument(
        "--draft-model",
        help="folder or Hub id of the drafter to begin with (default: found by itself "
        "inside the target's folder, beside it, or on the Hub)",
    )
    group.add_argument(
        "--from-scratch",
        action="store_true",
        help="begin with random weights, in a shape that goes with the target",
    )
    add_checkpoint_arguments(group)


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    group.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help='plain text, or .jsonl with {"text"}, {"prompt"} or {"messages"} a line',
    )
    group.add_argument(
        "--held-out",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files to judge by (default: a sixteenth of the data's records)",
    )
    group.add_argument(
        "--no-generate",
        action="store_true",
        help="learn from the data as it is; else the target continues its prompts",
    )
    _add_count(
        group,
        "--prompt-tokens",
        _TEXT.prompt_tokens,
        "tokens of plain text that make a prompt",
    )
    _add_count(group, "--max-tokens", _TEXT.max_tokens, "most tokens behind a prompt")
    _add_count(
        group,
        "--num-texts",
        _TEXT.num_texts,
        "most texts to learn from; of more, a random sample is taken",
    )
    _add_count(
        group,
        "--num-held-out",
        _TEXT.num_held_out,
        "most texts to judge by, and as many others for the report",
    )
    _add_count(group, "--num-rows", _TEXT.num_rows, "texts written together")
    _add_count(
        group,
        "--step-size",
        _TEXT.step_size,
        "most tokens that the target reads in one forward",
    )
    group.add_argument(
        "--chat-template-config",
        metavar="JSON",
        help="more arguments for the chat template",
    )
    add_filters(group)


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    _add_count(
        group,
        "--num-draft-tokens",
        _TRAINING.num_draft_tokens,
        "drafts of a block that are trained, 1 to 8",
    )
    group.add_argument(
        "--learning-rate",
        type=float,
        default=_TRAINING.learning_rate,
        help="the highest one (default: %(default)s)",
    )
    _add_count(group, "--steps", _TRAINING.steps, "most steps")
    group.add_argument(
        "--minutes",
        type=float,
        help="most minutes of training; the result then depends on the clock "
        "(default: no limit)",
    )
    _add_count(group, "--batch-size", _TRAINING.batch_size, "texts of a step")
    group.add_argument(
        "--num-places",
        type=int,
        metavar="N",
        help="most places of a text in memory together (default: as many as take about "
        "a gigabyte)",
    )
    group.add_argument(
        "--lora-rank",
        type=int,
        metavar="RANK",
        help="train adapters of this rank (default: all weights)",
    )
    _add_count(
        group,
        "--judge-every",
        _TRAINING.judge_every,
        "steps between measurements of held-out text",
    )
    _add_count(
        group,
        "--patience",
        _TRAINING.patience,
        "measurements without a better one that end the training",
    )
    _add_count(
        group,
        "--seed",
        _TRAINING.seed,
        "seed of the choice and order of texts, of the text and of new weights",
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output", required=True, metavar="FOLDER", help="folder of the new drafter"
    )
    group.add_argument(
        "--force", action="store_true", help="replace a checkpoint at --output"
    )
    group.add_argument(
        "--work",
        metavar="FOLDER",
        help="folder for records and checkpoints (default: --output with .work behind)",
    )
    _add_count(group, "--save-every", _TRAINING.save_every, "steps between checkpoints")
    group.add_argument(
        "--resume", action="store_true", help="go on with a run that was cut off"
    )
    group.add_argument(
        "--keep-work", action="store_true", help="leave the work folder at the end"
    )


def _add_count(
    group: argparse._ArgumentGroup, flag: str, default: int, what: str
) -> None:
    group.add_argument(
        flag,
        type=int,
        default=default,
        metavar="N",
        help=f"{what} (default: %(default)s)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None for the process's.

    Returns:
        Exit status: 0, 1 for a mistake of the user's, 128 and the signal's number if
        one ended it, 141 where the reader of the output went away.
    """
    return exit_status(
        lambda: _run(argv),
        *(sys.stdout, sys.stderr),
        stopped="interrupted; --resume goes on",
    )


def _run(argv: Sequence[str] | None) -> int:
    """Tune, print."""
    request = parse(sys.argv[1:] if argv is None else argv)
    check_alone("the tuner")
    # Heavy imports wait until the arguments are known to be good.
    from .pipeline import tune

    report = tune(request, tell=_tell, progress=_progress)
    for line in report.lines():
        print(line)
    named = shlex.join(["--draft-model", str(request.output)])
    print(f"the drafter is in {request.output}: {named}")
    return 0


def parse(arguments: Sequence[str]) -> TuneRequest:
    """Check arguments and put them together.

    Args:
        arguments: Those behind the command's name.

    Raises:
        RequestError: One is wrong.
    """
    args = configure_parser().parse_args(arguments)
    template = args.chat_template_config
    config = {} if template is None else json_object(template)
    if config is None:
        raise RequestError(
            "--chat-template-config must be a JSON object: got "
            f"{template!r}. For example '{{\"enable_thinking\": true}}'."
        )
    given = vars(args)
    return TuneRequest(
        model=args.model,
        data=tuple(args.data),
        output=Path(args.output),
        draft_model=args.draft_model,
        held_out=tuple(args.held_out),
        is_from_scratch=args.from_scratch,
        adapter_path=args.adapter_path,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        work=None if args.work is None else Path(args.work),
        is_resumed=args.resume,
        is_forced=args.force,
        keeps_work=args.keep_work,
        texts=TextSettings(
            generate=not args.no_generate,
            chat_template_config=config,
            **{name: given[name] for name in _SHARED_NAMES["text"]},
        ),
        training=TrainingSettings(
            **{name: given[name] for name in _SHARED_NAMES["training"]}
        ),
        command=shlex.join(["mlx_gemma_mtp.tune", *arguments]),
    )


# Flags that have the names of settings.
_SHARED_NAMES = {
    "text": [
        name for name in vars(_TEXT) if name not in ("generate", "chat_template_config")
    ],
    "training": list(vars(_TRAINING)),
}


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], Any]]:
    """Show how far work is and the time left on standard error."""
    with progress_bar(what, total, sys.stderr) as bar:
        yield lambda done: bar.update(done - bar.n)


if __name__ == "__main__":
    sys.exit(main())
