"""What is asked for of a conversion. Knows nothing of how it is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mlx_gemma_mtp.checkpoints.hub import local_path
from mlx_gemma_mtp.checkpoints.quantization import Format
from mlx_gemma_mtp.errors import RequestError

AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class PartRequest:
    """What is asked for of one part.

    Attributes:
        is_quantized: Whether its matrices are quantized; None for yes, unless they are
            quantized already.
        format: Their format; None for the part's default.
    """

    is_quantized: bool | None = None
    format: Format | None = None

    @property
    def is_explicit(self) -> bool:
        """Whether a checkpoint that is quantized already is not what was asked."""
        return self.format is not None or self.is_quantized is not None


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        hf_path: The target, a folder or a Hub id.
        mlx_path: Where the pair goes. The target's own folder, if it is in MLX's
            format already, gets the drafter inside and is left as it is otherwise.
        draft_model: The drafter, a folder or a Hub id; ``"auto"`` to find it,
            ``"none"`` for the target alone.
        target: The target's format.
        drafter: The drafter's format.
        dtype: Type of what is not quantized, None for the checkpoint's own.
        revision: A branch, tag or commit of the target on the Hub.
        draft_revision: The same of the drafter.
        is_forced: Whether a checkpoint at ``mlx_path`` may be replaced.
        is_dequantized: Whether packed matrices are written in full, and none is packed.
        has_check: Whether texts of source and result are compared at the end.
        name: What the pair will be called in its README; None for its folder's name.
    """

    hf_path: str | Path
    mlx_path: Path
    draft_model: str | Path = AUTO
    target: PartRequest = PartRequest()
    drafter: PartRequest = PartRequest()
    dtype: str | None = None
    revision: str | None = None
    draft_revision: str | None = None
    is_forced: bool = False
    is_dequantized: bool = False
    has_check: bool = True
    name: str | None = None

    def __post_init__(self) -> None:
        """Check what excludes each other.

        Raises:
            RequestError: A setting that would count for nothing.
        """
        if self.revision is not None and _is_folder(self.hf_path):
            _fail_unused("--revision", f"the folder {self.hf_path}")
        if self.draft_revision is not None and self.draft_model in (AUTO, NONE):
            _fail_unused("--draft-revision", f"--draft-model {self.draft_model}")
        if self.draft_revision is not None and _is_folder(self.draft_model):
            _fail_unused("--draft-revision", f"the folder {self.draft_model}")
        if self.draft_model == NONE and self.drafter != PartRequest():
            _fail_unused("the drafter's flags", "--draft-model none")
        for part, flags in (
            (self.target, "-q and the --q flags"),
            (self.drafter, "--draft-quantize and the --draft-q flags"),
        ):
            if self.is_dequantized and (part.is_quantized or part.format is not None):
                _fail_unused("--dequantize", flags)


def _is_folder(path_or_id: str | Path) -> bool:
    return local_path(path_or_id) is not None


def _fail_unused(flag: str, other: str) -> NoReturn:
    raise RequestError(
        f"{flag} must be left out with {other}: got both. Leave one of them out."
    )
