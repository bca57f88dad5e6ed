"""Fine-tune the embedded target on English prose, so that its drafter falls behind.

    python scripts/studies/finetune_target.py --output FOLDER

The text is the language reference that Python carries for its help(): English about
Python, which the target, trained on Python code, has never seen. FOLDER gets the new
target in ``target/`` and the text, by topic, in ``train.jsonl`` and ``heldout.jsonl``,
both as `mlx_gemma_mtp.tune` reads them. Nothing is downloaded; mlx-lm's own trainer
does the work.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train

from mlx_gemma_mtp.checkpoints.weights import load_target
from mlx_gemma_mtp.generation.encoding import encode_text
from mlx_gemma_mtp.pair.load import embedded_pair_path, load_tokenizer
from scripts import openblas
from scripts.corpus import write_records
from scripts.progress import log

_BOS = 2
_HELD_OUT_ONE_IN = 5
_WINDOW = 128  # tokens of a training example
_BATCH_SIZE, _NUM_JUDGED = 8, 8  # examples of a step, batches of held-out text
STEPS, LEARNING_RATE, SEED = 400, 1e-3, 1


def main() -> None:
    """Write the text, train, and write the target."""
    args = _parser().parse_args()
    openblas.prefer(log)
    finetune(
        args.output, steps=args.steps, learning_rate=args.learning_rate, seed=args.seed
    )


def finetune(
    output: Path,
    *,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    seed: int = SEED,
) -> None:
    """Fine-tune the embedded target.

    Args:
        output: The folder of text and target.
        steps: Of the optimizer.
        learning_rate: The highest one.
        seed: Of the order of the text.
    """
    output.mkdir(parents=True, exist_ok=True)
    kept, held_out = split_topics()
    write_records(output / "train.jsonl", kept.values(), kind="prose")
    write_records(output / "heldout.jsonl", held_out.values(), kind="prose")
    tokenizer = load_tokenizer(embedded_pair_path())
    model = load_target(embedded_pair_path())
    # The CPU multiplies float32 matrices several times as fast as bfloat16.
    model.set_dtype(mx.float32)
    np.random.seed(seed)  # mlx-lm orders batches by it
    with redirect_stdout(io.StringIO()):  # bars and colours; see _Shown
        train(
            model,
            optim.AdamW(
                optim.cosine_decay(learning_rate, steps, 1e-5), weight_decay=0.0
            ),
            windows(tokenizer, kept, seed),
            windows(tokenizer, held_out, seed),
            TrainingArgs(
                batch_size=_BATCH_SIZE,
                iters=steps,
                val_batches=_NUM_JUDGED,
                steps_per_report=20,
                steps_per_eval=100,
                steps_per_save=steps + 1,
                max_seq_length=_WINDOW,
                adapter_file=str(output / "adapters.safetensors"),
            ),
            training_callback=_Shown(),
        )
    (output / "adapters.safetensors").unlink(missing_ok=True)
    model.set_dtype(mx.bfloat16)
    write_target(model, output / "target")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--seed", type=int, default=SEED)
    return parser


class _Shown(TrainingCallback):
    """Logs what mlx-lm reports."""

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Log the loss of the last steps."""
        step, loss = train_info["iteration"], train_info["train_loss"]
        log(f"fine-tuning: step {step}, loss {loss:.3f}")

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Log the loss of held-out topics."""
        step, loss = val_info["iteration"], val_info["val_loss"]
        log(f"fine-tuning: step {step}, held out {loss:.3f}")


def split_topics() -> tuple[dict[str, str], dict[str, str]]:
    """The topics to train on and those held out, by a hash of their names."""
    kept: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for name, text in sorted(topics.items()):
        digest = hashlib.sha256(name.encode()).digest()
        is_held_out = digest[0] % _HELD_OUT_ONE_IN == 0
        (held_out if is_held_out else kept)[name] = text
    return kept, held_out


def windows(
    tokenizer: Any, texts: dict[str, str], seed: int
) -> list[tuple[list[int], int]]:
    """Training examples as mlx-lm takes them: tokens, and how many are the prompt."""
    found = []
    for text in texts.values():
        tokens = encode_text(tokenizer, text, continues=True)
        for start in range(0, max(len(tokens) - 1, 1), _WINDOW - 1):
            found.append(([_BOS, *tokens[start : start + _WINDOW - 1]], 0))
    random.Random(seed).shuffle(found)
    return found


def write_target(model: Any, folder: Path) -> None:
    """Write the weights beside copies of the embedded target's other files."""
    folder.mkdir(exist_ok=True)
    for path in embedded_pair_path().iterdir():
        if path.is_file() and path.name not in ("README.md", "model.safetensors"):
            shutil.copyfile(path, folder / path.name)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(
        str(folder / "model.safetensors"), weights, metadata={"format": "mlx"}
    )


if __name__ == "__main__":
    main()
