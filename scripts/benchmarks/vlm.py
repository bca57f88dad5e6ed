"""mlx-vlm's MTP decoding of the same weights, where it is installed and takes them."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gemma_mtp.checkpoints.find_drafter import find_drafter
from mlx_gemma_mtp.checkpoints.hub import fetch

from .models import ModelSpec
from .step import Step, UnavailableError

_UNIFIED = "gemma4_unified"


class MlxVlm:
    """mlx-vlm's ``generate_step`` with a drafter.

    Args:
        model: Which weights; random ones are not in files and cannot be read.
        num_draft_tokens: Drafts per round.

    Raises:
        UnavailableError: mlx-vlm is not installed, or does not load the pair.
    """

    is_adaptive = False

    def __init__(self, model: ModelSpec, num_draft_tokens: int) -> None:
        if model.shapes is not None or model.dtype is not None:
            raise UnavailableError(
                "mlx-vlm reads files only: the weights are not as stored"
            )
        try:
            from mlx_vlm.generate.ar import generate_step
            from mlx_vlm.speculative.drafters import load_drafter
            from mlx_vlm.utils import load_model
        except ImportError as error:
            raise UnavailableError(
                f"mlx-vlm cannot be imported ({error}): pip install '.[bench]'"
            ) from None
        self._generate_step = generate_step
        self._count = num_draft_tokens
        with _one_line("mlx-vlm does not load the target"):
            with _readable(model.folder) as folder:
                self._target = load_model(folder)
        with _one_line("mlx-vlm does not load the drafter"):
            loaded = load_drafter(str(_drafter_folder(model)), kind="mtp")
            self._drafter = loaded[0] if isinstance(loaded, tuple) else loaded
            # Without it rounds start at 3 drafts, whatever is asked for.
            self._drafter.config.block_size = num_draft_tokens + 1

    def steps(
        self, prompts: list[list[int]], max_tokens: int, sampling: dict[str, Any]
    ) -> Iterator[Step]:
        """Decode one prompt."""
        if len(prompts) > 1:
            raise UnavailableError("its generate_step takes one prompt")
        tokens = self._generate_step(
            mx.array(prompts),
            self._target,
            None,
            None,
            max_tokens=max_tokens,
            temperature=sampling.get("temp", 0.0),
            top_p=sampling.get("top_p", 1.0),
            top_k=sampling.get("top_k", 0),
            draft_model=self._drafter,
            draft_kind="mtp",
            draft_block_size=self._count + 1,
        )
        next(tokens)
        yield Step(1)
        emitted = 1
        for _ in tokens:
            # The first token of a round: the others are there already.
            accepted = int(self._drafter.accept_lens[-1])
            num_tokens = min(accepted + 1, max_tokens - emitted)
            for _ in range(num_tokens - 1):
                next(tokens)
            emitted += num_tokens
            yield Step(num_tokens, 1, int(self._drafter.draft_lens[-1]), accepted)


def _drafter_folder(model: ModelSpec) -> Path:
    """Where the pair's drafter lies.

    Raises:
        UnavailableError: There is none.
    """
    if model.draft_model is not None:
        return fetch(model.draft_model)
    choice = find_drafter(model.model or model.folder, model.folder)
    if choice.path_or_id is None:
        raise UnavailableError(f"no drafter: {choice.reason}")
    return fetch(choice.path_or_id)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[Path]:
    """The target's folder as mlx-vlm reads it.

    Its plain kind asks for a vision tower, which text-only checkpoints lack. Its
    unified kind does not, and the text models are the same.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("vision_config") or config.get("model_type") != "gemma4":
        yield folder
        return
    config = {key: value for key, value in config.items() if value is not None}
    config["model_type"] = _UNIFIED
    config["text_config"] = {
        **config["text_config"],
        "model_type": f"{_UNIFIED}_text",
    }
    with tempfile.TemporaryDirectory() as name:
        for file in folder.iterdir():
            if file.is_file() and file.name != "config.json":
                (Path(name) / file.name).symlink_to(file.resolve())
        text = json.dumps(config)
        (Path(name) / "config.json").write_text(text, encoding="utf-8")
        yield Path(name)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn whatever mlx-vlm raises into a reason; what it prints goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except UnavailableError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise UnavailableError(
            f"{what}: {type(error).__name__}: {text[:200]}"
        ) from error
