"""What is asked for of a tuning. Knows nothing of how it is done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..sampling.defaults import GIVEN
from .settings import TrainingSettings

_LEAST = {
    "prompt_tokens": 8,  # a shorter stretch of text says nothing
    "max_tokens": 2,  # the first one behind a prompt is no draft's
    "num_texts": 1,
    "num_held_out": 1,
    "num_rows": 1,
    "step_size": 1,
}


@dataclass(frozen=True)
class TextSettings:
    """Which text a drafter learns from.

    Attributes:
        generate: Whether the target continues the data's prompts; else the data is
            taken as it is.
        prompt_tokens: Tokens of plain text that make a prompt.
        max_tokens: Most tokens behind a prompt.
        num_texts: Most texts to learn from; of more, a random sample is taken.
        num_held_out: Most texts to judge by while training, and as many others to
            measure the result on.
        num_rows: Texts that the target writes together.
        step_size: Most tokens that the target reads in one forward.
        temp: The temperature text is drawn at; with the filters, what the drafter will
            be used with. None for the target's own settings, as of the others.
        top_p: As in sampling.
        top_k: As in sampling.
        min_p: As in sampling.
        chat_template_config: More arguments for the chat template.
    """

    generate: bool = True
    prompt_tokens: int = 64
    max_tokens: int = 128
    num_texts: int = 2048
    num_held_out: int = 64
    num_rows: int = 32
    step_size: int = 512
    temp: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    chat_template_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            RequestError: One is too small.
        """
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise RequestError(
                    f"--{name.replace('_', '-')} must be {least} or more: got {value}. "
                    "Raise it."
                )

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling settings as given, for ``SamplingDefaults.settings``."""
        return {name: getattr(self, name) for name in GIVEN}


@dataclass(frozen=True)
class TuneRequest:
    """What is asked for.

    Attributes:
        model: The target, a folder or a Hub id.
        data: Files to learn from.
        output: Where the drafter goes.
        draft_model: The drafter to begin with; None to find it.
        held_out: Files to judge by; none for a part of the data.
        is_from_scratch: Whether training begins with random weights.
        adapter_path: LoRA adapters of the target.
        revision: A branch, tag or commit of the target on the Hub.
        trust_remote_code: Whether the tokenizer may run code from the checkpoint.
        work: Where records and checkpoints are kept meanwhile; None for a folder
            beside the output.
        is_resumed: Whether a run that was cut off goes on.
        is_forced: Whether a drafter at ``output`` may be replaced.
        keeps_work: Whether the work folder stays at the end.
        texts: The text.
        training: The training.
        command: The command line, for the record.
        hardware: What to say of the hardware beside its names, for the record.

    Raises:
        RequestError: Settings that exclude each other.
    """

    model: str
    data: tuple[str, ...]
    output: Path
    draft_model: str | None = None
    held_out: tuple[str, ...] = ()
    is_from_scratch: bool = False
    adapter_path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    work: Path | None = None
    is_resumed: bool = False
    is_forced: bool = False
    keeps_work: bool = False
    texts: TextSettings = field(default_factory=TextSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    command: str = ""
    hardware: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what excludes each other."""
        if self.is_from_scratch and self.draft_model is not None:
            raise RequestError(
                "--from-scratch must be left out with --draft-model: got both. Leave "
                "one of them out."
            )
        if self.is_from_scratch and self.training.lora_rank is not None:
            raise RequestError(
                "--lora-rank must be left out with --from-scratch: got both, and "
                "random weights need full training. Leave one of them out."
            )
        if not self.place.name:
            raise RequestError(
                f"--output must name a folder to be made: got {self.output}. Take "
                "another."
            )
        places = os.path.realpath(self.place), os.path.realpath(self.work_folder)
        if os.path.commonpath(places) in places:
            raise RequestError(
                f"--work must be outside --output, and the other way round: got "
                f"{self.work_folder} and {self.place}. Take another --work."
            )
        if not self.data:
            raise RequestError("--data must name at least one file: got none.")

    @property
    def place(self) -> Path:
        """Where the drafter goes, absolute."""
        return _absolute(self.output)

    @property
    def work_folder(self) -> Path:
        """Where records and checkpoints are kept meanwhile, absolute."""
        if self.work is not None:
            return _absolute(self.work)
        return self.place.with_name(f"{self.place.name}.work")


def _absolute(path: Path) -> Path:
    """A path as a shell takes it: ~ of nobody is a name like others."""
    return Path(os.path.expanduser(path)).absolute()
