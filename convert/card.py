"""The README.md of a converted pair, and its upload to the Hub.

Written from what is known here; nothing is fetched for it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import ModelCardData, metadata_load

from mlx_gemma_mtp.errors import OutputError

from .plan import PartPlan
from .sources import Source

CARD_NAME = "README.md"
_LICENSE = "apache-2.0"  # of everything Google publishes as Gemma 4
_SIGN = "<!-- written by mlx_gemma_mtp.convert -->"
_TEXT = """
# {title}

{target} for MLX{drafter}.

With `mlx_gemma_mtp`:

```bash
{command}
```

The target opens in mlx-lm as well:

```python
from mlx_lm import load, generate

model, tokenizer = load({model})
```
"""


def write_card(
    folder: Path,
    target: tuple[Source, PartPlan],
    drafter: tuple[Source, PartPlan] | None,
    *,
    name: str,
) -> None:
    """Write a pair's README.md.

    Args:
        folder: The pair's folder.
        target: The target's source and plan.
        drafter: The drafter's, None without one.
        name: What the pair will be called: a Hub id or a folder's name.
    """
    parts = [target] if drafter is None else [target, drafter]
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "gemma4", *(["speculative-decoding"] if drafter else [])],
        base_model=[source.name for source, _ in parts if source.is_hub_id] or None,
        license=_license(target[0]),
    )
    text = _TEXT.format(
        title=name.rpartition("/")[2],
        target=_describe(*target),
        drafter=""
        if drafter is None
        else f", with its MTP drafter {_describe(*drafter)}",
        command=shlex.join(
            ["mlx_gemma_mtp.generate", "--model", name, "--prompt", "hello"]
        ),
        model=json.dumps(name, ensure_ascii=False),
    )
    (folder / CARD_NAME).write_text(
        f"---\n{data.to_yaml()}\n---\n{text}\n{_SIGN}\n", encoding="utf-8"
    )


def is_card(folder: Path) -> bool:
    """Tell whether a folder's README.md was written here.

    Args:
        folder: A pair's folder.
    """
    try:
        text = (folder / CARD_NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return False
    return _SIGN in text


def make_repository(repo: str) -> None:
    """Make a repository on the Hub, if it is not there.

    Args:
        repo: Its id.

    Raises:
        OutputError: The Hub refuses.
    """
    with _writing_to(repo, "Run hf auth login, or leave --upload-repo out."):
        huggingface_hub.HfApi().create_repo(repo, exist_ok=True)


def upload(folder: Path, repo: str) -> str:
    """Upload a pair to the Hub.

    Args:
        folder: The pair's folder.
        repo: The repository's id.

    Returns:
        Where it can be seen.

    Raises:
        OutputError: The Hub does not take it.
    """
    by_hand = f"run hf auth login, then hf upload {repo} {folder}."
    with _writing_to(repo, f"The pair is complete in {folder}; {by_hand}"):
        huggingface_hub.HfApi().upload_folder(
            repo_id=repo, folder_path=folder, ignore_patterns=[".*", "**/.*"]
        )
    return f"https://huggingface.co/{repo}"


@contextmanager
def _writing_to(repo: str, next_step: str) -> Iterator[None]:
    """Turn whatever the Hub refuses into one line."""
    try:
        yield
    except Exception as error:  # of the Hub's client or whatever HTTP library it has
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise OutputError(
            f"{repo} must be a repository you may write to: got {reason}. {next_step}"
        ) from error


def _describe(source: Source, plan: PartPlan) -> str:
    name = f"`{source.name}`"
    if source.is_hub_id:
        name = f"[{source.name}](https://huggingface.co/{source.name})"
    quantization: dict[str, Any] = plan.config.get("quantization") or {}
    if not quantization:
        return f"{name} (not quantized)"
    return f"{name} ({quantization['bits']}-bit {quantization['mode']})"


def _license(source: Source) -> str | None:
    if (source.folder / CARD_NAME).is_file():
        try:
            found = metadata_load(source.folder / CARD_NAME) or {}
        except Exception:  # noqa: BLE001  # somebody else's file; only a courtesy
            found = {}
        if isinstance(found.get("license"), str):
            return str(found["license"])
    return _LICENSE if source.name.startswith("google/") else None
