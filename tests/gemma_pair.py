"""A pair of Gemma's ids on disk, and answers by it that a test has written.

Each token of an answer is forced where a caller's logits processors stand, so that
everything else is what it always is: prompts, caches, rounds, drafts, seats. It knows
nothing of who asks: the Python functions, the commands and the server alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4_text

from mlx_gemma_mtp.engine.request import Request
from mlx_gemma_mtp.generation import requests
from mlx_gemma_mtp.models.drafter import Drafter
from mlx_gemma_mtp.models.drafter_config import DrafterConfig
from mlx_gemma_mtp.models.text_config import text_config
from tests.gemma import GENERATION_CONFIG
from tests.tiny import SHORT, family_folder

_HIDDEN_SIZE = 32
_SOURCE = "the tests' own pair"
_NEVER = -1e4  # the logit of a token that is not the answer's next


def write_pair(folder: Path, tokenizer: Path, vocab_size: int) -> Path:
    """Write a random target of a tokenizer's ids and, in drafter/, its drafter.

    They have the published names and nearly no size: 70 MB with all of Gemma's ids.
    Numbers are of float32, which a CPU multiplies faster than bfloat16. There is no
    chat template.

    Args:
        folder: Where to; made.
        tokenizer: A folder with its tokenizer, to which links are made.
        vocab_size: Number of its ids.

    Returns:
        The folder.
    """
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(tokenizer / name)
    like = family_folder(SHORT)
    target = json.loads((like / "target" / "config.json").read_text())
    drafter = json.loads((like / "drafter" / "config.json").read_text())
    sizes = {"hidden_size": _HIDDEN_SIZE, "vocab_size": vocab_size}
    for config in (target, drafter):
        config["dtype"] = "float32"
        config["text_config"] |= {**sizes, "intermediate_size": 2 * _HIDDEN_SIZE}
    target["vocab_size"] = vocab_size  # mlx-lm takes Gemma's where none stands here
    drafter["backbone_hidden_size"] = _HIDDEN_SIZE
    args = gemma4_text.ModelArgs.from_dict(text_config(target, source=_SOURCE))
    weights = {
        f"model.language_model.{name.removeprefix('model.')}": array
        for name, array in _random_weights(gemma4_text.Model(args)).items()
    }
    _write_checkpoint(folder, target, weights)
    made = Drafter(DrafterConfig.from_dict(drafter, source=_SOURCE))
    _write_checkpoint(folder / "drafter", drafter, _random_weights(made))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    return folder


def _write_checkpoint(
    folder: Path, config: dict[str, Any], weights: dict[str, mx.array]
) -> None:
    folder.mkdir(exist_ok=True)
    file = str(folder / "model.safetensors")
    mx.save_safetensors(file, weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def _random_weights(module: nn.Module) -> dict[str, mx.array]:
    """Weights for a module, each row of a matrix of unit size; norms are 1."""
    mx.random.seed(0)
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
    return {
        name: mx.ones(like.shape)
        if like.ndim < 2
        else mx.random.normal(like.shape, scale=like.shape[-1] ** -0.5)
        for name, like in parameters
    }


class Speech:
    """A logits processor that lets one row say an answer.

    Args:
        answer: Its token ids; the last one again and again behind the end.
    """

    def __init__(self, answer: list[int]) -> None:
        self._answer = answer
        self._place = 0

    def __call__(self, history: mx.array, logits: mx.array) -> mx.array:
        token = self._answer[min(self._place, len(self._answer) - 1)]
        self._place += 1
        is_next = mx.arange(logits.shape[-1]) == token
        return mx.where(is_next, 0.0, _NEVER).astype(logits.dtype)[None]


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def let_say(monkeypatch: Any, tokenizer: Any, *answers: str) -> list[list[int]]:
    """Let every request of this process be answered by texts.

    Args:
        monkeypatch: pytest's.
        tokenizer: Turns an answer, control tokens and its end included, into ids.
        answers: One for each request in order; the last one for all that follow.

    Returns:
        A list that grows by what each request's prompt was, the cached part included
        where a request knows it.
    """
    spoken = [_encoded(tokenizer, text) for text in answers]
    prompts: list[list[int]] = []

    def speaking(**fields: Any) -> Request:
        speech = Speech(spoken[min(len(prompts), len(spoken) - 1)])
        request = Request(**{**fields, "logits_processors": (speech,)})
        prompts.append([*request.history, *request.prompt])
        return request

    monkeypatch.setattr(requests, "Request", speaking)
    return prompts
