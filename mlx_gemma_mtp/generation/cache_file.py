"""A prompt cache in a file, as ``mlx_lm.cache_prompt`` writes it.

mlx-lm reads the file; here whatever is wrong with it becomes one line. Knows nothing of
models but their names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import load_prompt_cache

from ..cache.mlx_lm_cache import check_prompt_cache
from ..cache.slabs import SlabLayout
from ..checkpoints.checkpoint import read_header
from ..checkpoints.hub import local_path
from ..errors import RequestError, cut

_SUFFIX = ".safetensors"  # which MLX gives to a file that has none
_AGAIN = "Write it again with mlx_lm.cache_prompt."


@dataclass(frozen=True)
class SavedPrompt:
    """What a file holds.

    Attributes:
        path: The file.
        caches: mlx-lm's cache objects, one for each layer that owns K/V.
        model: Folder or Hub id of the model that read the prompt.
        tokenizer_config: How its tokenizer was loaded.
    """

    path: Path
    caches: Sequence[Any]
    model: str
    tokenizer_config: dict[str, Any]

    def check_model(self, named: str) -> None:
        """Check that a model is the file's, by its name.

        Raises:
            RequestError: It is another one.
        """
        one, other = (local_path(name) for name in (named, self.model))
        is_same = one and other and one.resolve() == other.resolve()
        if named != self.model and not is_same:
            raise RequestError(
                f"--model must be {cut(self.model)}, which has read the prompt in "
                f"{cut(self.path)}: got {cut(named)}. Leave it out."
            )

    def check_layout(self, layout: SlabLayout) -> None:
        """Check that the caches are those of a model.

        Raises:
            RequestError: They are not.
        """
        try:
            check_prompt_cache(layout, self.caches)
        except Exception as error:  # in a file, state can be anything
            raise RequestError(
                f"{cut(self.path)} must hold a prompt cache of {cut(self.model)}: got "
                f"one of something else. {_AGAIN}"
            ) from error


def read_cache_file(path: str) -> SavedPrompt:
    """Read a file of ``mlx_lm.cache_prompt``.

    Args:
        path: The file, with or without the suffix that MLX gives it.

    Raises:
        CheckpointError: It cannot be read, or is cut off.
        RequestError: It holds something else.
    """
    file = Path(path)
    if file.suffix != _SUFFIX:
        file = file.with_name(f"{file.name}{_SUFFIX}")
    read_header(file)  # MLX does not notice a file that is cut off until it is used
    try:
        caches, metadata = load_prompt_cache(str(file), return_metadata=True)
        settings = json.loads(metadata["tokenizer_config"])
        model = metadata["model"]
        settings.pop("trust_remote_code", None)  # a flag's to say, not a file's
    except Exception as error:  # mlx-lm expects nothing else in such a file
        raise RequestError(
            f"{cut(file)} must be a file of mlx_lm.cache_prompt: got something else, "
            f"which raises {type(error).__name__}. {_AGAIN}"
        ) from error
    return SavedPrompt(file, caches, model, settings)
