"""Measure the converter's memory and speed on a large checkpoint.

    python scripts/studies/convert_bench.py                  9.5 GB, random weights
    python scripts/studies/convert_bench.py --gigabytes 0.1  the same, quick

The checkpoint has gemma-4-E4B-it's tensor names and shapes, with fewer layers, and its
drafter; the table of per-layer embeddings alone is 3.2 GB. The converter runs as users
run it, in a process of its own. It is held against a process that does the bare work:
one thread that reads every piece, calls ``mx.quantize`` once for it and writes what
comes out, and neither checks nor verifies nor waits for the disk.

The runs alternate, so that a machine that slows down slows both; medians are compared.
The exit status is 1 where the converter takes more than 1.5 GB or reaches less than
half of the bare work's speed.

Linux keeps files that were read in free memory; where the checkpoint fits there, no run
reads it from the disk. ``--cold`` makes Linux forget it before every run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mlx_gemma_mtp.machine import describe_machine

if TYPE_CHECKING:
    import numpy as np

# numpy, mlx and convert are imported where they are used: a process starts with its
# parent's memory, so what this one held would count as the children's.

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "tests" / "data" / "published"
EMBEDDED = ROOT / "mlx_gemma_mtp" / "embedded"
TARGET, DRAFTER = "gemma-4-E4B-it", "gemma-4-E4B-it-assistant"
RESULT = "convert_bench_result"
PREFIX = "model.language_model."  # of the text model; the towers are left out

MAX_PEAK_GB = 1.5
MIN_RATIO = 0.5
NUM_LAYERS, NUM_SHARED_LAYERS = 24, 6  # of 42 and 18; both kinds of layers in both
VOCAB_STEP = 4096  # a multiple of the drafter's 2048 clusters
COLUMN_STEP = 128
MAX_SHARD_BYTES = 5_000_000_000
NOISE_BYTES = 64 << 20
BARE, CONVERTER, CHECKED = "bare", "converter", "converter, with check"

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # (dtype, shape) by name


def configure_parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    parser = argparse.ArgumentParser(description="Measure the converter.")
    parser.add_argument(
        "--gigabytes",
        type=float,
        help="make a smaller checkpoint, of about this size (default: 9.3)",
    )
    parser.add_argument("--repeats", type=int, default=2, help="runs of each kind")
    parser.add_argument("--folder", type=Path, help="for the checkpoint and results")
    parser.add_argument(
        "--keep", action="store_true", help="keep the checkpoint for the next time"
    )
    parser.add_argument(
        "--cold", action="store_true", help="read the checkpoint from the disk"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    parser.add_argument("--stage", choices=("make", BARE), help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Run one stage in a child, everything in the parent; return the exit status."""
    parser = configure_parser()
    args = parser.parse_args()
    if args.cold and sys.platform != "linux":
        parser.error("--cold works on Linux only")
    if args.stage == "make":
        make_pair(args.folder, args.gigabytes)
        return 0
    if args.stage == BARE:
        show(json.dumps(do_bare_work(args.folder)))
        return 0
    folder = Path(args.folder or tempfile.mkdtemp(prefix="convert_bench.")).resolve()
    ours = [RESULT]
    if not (folder / TARGET).exists() and not (folder / DRAFTER).exists():
        ours += [] if args.keep else [TARGET, DRAFTER]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        figures = measure(folder, args)
    finally:
        for name in ours:
            shutil.rmtree(folder / name, ignore_errors=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    for line in table(figures):
        show(line)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2), encoding="utf-8")
    for line in (faults := complaints(figures)):
        show(line)
    return 1 if faults else 0


def show(line: str = "") -> None:
    """Print a line at once."""
    print(line, flush=True)


# --- the measurement --------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one process took.

    Attributes:
        kind: ``BARE``, ``CONVERTER`` or ``CHECKED``.
        wall_s: From its start to its end, imports included.
        cpu_s: Time of all its threads.
        peak_gb: The most memory it had at a time.
        output: What it printed.
    """

    kind: str
    wall_s: float
    cpu_s: float
    peak_gb: float
    output: str


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Make the checkpoint if it is not there, run everything, return the figures."""
    if not (folder / TARGET).exists() and not (folder / DRAFTER).exists():
        scale = ["--gigabytes", str(args.gigabytes)] if args.gigabytes else []
        made = timed("make", stage("make", folder) + scale)
        show(f"made the checkpoint in {made.wall_s:.0f} s, in {folder}")
    commands = {
        BARE: stage(BARE, folder),
        CONVERTER: conversion(folder, "--no-check"),
        CHECKED: conversion(folder),
    }
    runs: list[Run] = []
    for kind in [BARE, CONVERTER] * args.repeats + [CHECKED]:
        if args.cold:
            forget(folder)
        runs.append(timed(kind, commands[kind]))
        shutil.rmtree(folder / RESULT, ignore_errors=True)
        show(f"{kind}: {runs[-1].wall_s:.1f} s, {runs[-1].peak_gb:.2f} GB")
    return {
        "machine": describe_machine(),
        "is_cold": args.cold,
        "checkpoint": sizes(folder),
        "bare_work": json.loads(runs[0].output.splitlines()[-1]),
        "result": runs[-1].output,
        "runs": [asdict(run) for run in runs],
        **summary(runs),
    }


def summary(runs: list[Run]) -> dict[str, Any]:
    """Medians of the times, the highest peaks, and the ratios of the speeds."""
    seconds, cpu, peaks = {}, {}, {}
    for kind in (BARE, CONVERTER, CHECKED):
        found = [run for run in runs if run.kind == kind]
        seconds[kind] = statistics.median(run.wall_s for run in found)
        cpu[kind] = statistics.median(run.cpu_s for run in found)
        peaks[kind] = max(run.peak_gb for run in found)
    return {
        "wall_s": seconds,
        "cpu_s": cpu,
        "peak_gb": peaks,
        "ratio": {kind: seconds[BARE] / seconds[kind] for kind in seconds},
    }


def timed(kind: str, command: list[str]) -> Run:
    """Run a process to its end and measure it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=errors, cwd=ROOT, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{errors.read().decode()[-2000:]}")
        output.seek(0)
        text = output.read().decode()
    unit = 1 if platform.system() == "Darwin" else 1024
    cpu_s = usage.ru_utime + usage.ru_stime
    return Run(kind, wall_s, cpu_s, usage.ru_maxrss * unit / 1e9, text)


def stage(name: str, folder: Path) -> list[str]:
    """The command of one of this script's own processes."""
    command = [sys.executable, "-m", "scripts.studies.convert_bench"]
    return [*command, "--stage", name, "--folder", str(folder)]


def conversion(folder: Path, *flags: str) -> list[str]:
    """The converter's command."""
    paths = ["--hf-path", str(folder / TARGET), "--mlx-path", str(folder / RESULT)]
    drafter = ["--draft-model", str(folder / DRAFTER)]
    return [sys.executable, "-m", "convert", *paths, *drafter, *flags]


def forget(folder: Path) -> None:
    """Drop what the system holds of the checkpoint."""
    for path in folder.glob("*/*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        if sys.platform == "linux":
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# --- the bare work ----------------------------------------------------------------


def do_bare_work(folder: Path) -> dict[str, float]:
    """Read, quantize and write every piece, and nothing else.

    Args:
        folder: Where the checkpoint is; ``RESULT`` is written there.

    Returns:
        Bytes that were read and written, and the time without imports and planning.
    """
    from convert.pipeline import Request, plan_conversion

    result = folder / RESULT
    request = Request(folder / TARGET, result, draft_model=folder / DRAFTER)
    parts = plan_conversion(request).parts
    result.mkdir()
    num_read = num_written = 0
    start = time.perf_counter()
    descriptor = os.open(result / "bare", os.O_CREAT | os.O_WRONLY, 0o666)
    for part in parts:
        for parameter in part.plan.parameters:
            source = os.open(parameter.source.file, os.O_RDONLY)
            for data in pieces(source, parameter):
                num_read += len(data)
                num_written += sum(
                    os.write(descriptor, array) for array in packed(data, parameter)
                )
            os.close(source)
    os.close(descriptor)
    seconds = time.perf_counter() - start
    return {"read": num_read, "written": num_written, "seconds": seconds}


def pieces(source: int, parameter: Any) -> Iterator[bytes]:
    """Read a parameter in pieces of as many bytes as the converter's."""
    from convert.stream import BLOCK_BYTES
    from mlx_gemma_mtp.checkpoints.checkpoint import DTYPE_BITS

    row_bytes = parameter.rows.num_columns * DTYPE_BITS[parameter.source.dtype] // 8
    for block in parameter.rows.blocks(max(1, BLOCK_BYTES // row_bytes)):
        start = parameter.source.offsets[0] + block.source_row * row_bytes
        yield os.pread(source, block.num_rows * row_bytes, start)


def packed(data: bytes, parameter: Any) -> Sequence[Any]:
    """Quantize a piece if its format says so; return what is written of it."""
    import mlx.core as mx
    import numpy as np

    if parameter.format is None:
        return [data]
    values = mx.array(np.frombuffer(data, np.uint16)).view(mx.bfloat16)
    values = values.reshape(-1, parameter.rows.num_columns)
    settings: Any = parameter.format.as_config()
    results = mx.quantize(values, **settings)
    mx.eval(results)
    return [np.asarray(result.view(mx.uint8)) for result in results]


# --- the checkpoint ---------------------------------------------------------------


def make_pair(folder: Path, gigabytes: float | None) -> None:
    """Write target and drafter with random weights.

    Args:
        folder: Where to; ``TARGET`` and ``DRAFTER`` inside it.
        gigabytes: About how large the target is; None for E4B's widths.
    """
    scale = 1.0
    if gigabytes is not None:
        low = 0.0
        for _ in range(20):  # the size grows with the scale: bisect
            middle = (low + scale) / 2
            size = num_bytes(target_of(middle)[1])
            low, scale = (low, middle) if size > gigabytes * 1e9 else (middle, scale)
    for name, (config, tensors) in (
        (TARGET, target_of(scale)),
        (DRAFTER, drafter_of(scale)),
    ):
        (folder / name).mkdir(parents=True)
        write_json(folder / name / "config.json", config)
        generation_config = read_published(name)["generation_config"]
        write_json(folder / name / "generation_config.json", generation_config)
        write_weights(folder / name, tensors)
    vocab_size = target_of(scale)[0]["text_config"]["vocab_size"]
    shutil.copy(EMBEDDED / "tokenizer_config.json", folder / TARGET)
    write_json(folder / TARGET / "tokenizer.json", tokenizer_of(vocab_size))


def target_of(scale: float) -> tuple[dict[str, Any], Tensors]:
    """E4B's text model with fewer layers: its config and its tensors.

    Args:
        scale: What vocabulary and widths are multiplied with, for a small one.
    """
    published = read_published(TARGET)
    text = published["config"]["text_config"]
    table = text["hidden_size_per_layer_input"]
    sizes = scaled_sizes(scale)
    sizes[text["num_hidden_layers"] * table] = NUM_LAYERS * table
    tensors = {
        name: (dtype, tuple(sizes.get(size, size) for size in shape))
        for name, dtype, shape in published["tensors"]
        if name.startswith(PREFIX) and layer_of(name) < NUM_LAYERS
    }
    text["num_hidden_layers"] = NUM_LAYERS
    text["num_kv_shared_layers"] = NUM_SHARED_LAYERS
    text["layer_types"] = text["layer_types"][:NUM_LAYERS]
    for key in (
        "vocab_size",
        "vocab_size_per_layer_input",
        "hidden_size",
        "intermediate_size",
    ):
        text[key] = sizes[text[key]]
    return published["config"], tensors


def drafter_of(scale: float) -> tuple[dict[str, Any], Tensors]:
    """E4B's drafter: its config and its tensors."""
    published = read_published(DRAFTER)
    config = published["config"]
    sizes = scaled_sizes(scale)
    hidden = config["backbone_hidden_size"]
    sizes[2 * hidden] = 2 * sizes[hidden]
    config["backbone_hidden_size"] = sizes[hidden]
    vocab_size = config["text_config"]["vocab_size"]
    config["text_config"]["vocab_size"] = sizes[vocab_size]
    tensors = {
        name: (dtype, tuple(sizes.get(size, size) for size in shape))
        for name, dtype, shape in published["tensors"]
    }
    return config, tensors


def scaled_sizes(scale: float) -> dict[int, int]:
    """The sizes in E4B's shapes that are scaled, and what they become."""
    text = read_published(TARGET)["config"]["text_config"]
    steps = {
        text["vocab_size"]: VOCAB_STEP,
        text["hidden_size"]: COLUMN_STEP,
        text["intermediate_size"]: COLUMN_STEP,
    }
    return {
        size: max(step, round(size * scale / step) * step)
        for size, step in steps.items()
    }


def read_published(name: str) -> dict[str, Any]:
    """What was published with a checkpoint besides the weights; a fresh copy."""
    with gzip.open(PUBLISHED / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        contents: dict[str, Any] = json.load(file)
    return contents


def layer_of(name: str) -> int:
    """The number of the layer a tensor is in, -1 for none."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def num_bytes(tensors: Tensors) -> int:
    """Bytes of all tensors."""
    return sum(tensor_bytes(*tensor) for tensor in tensors.values())


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of one tensor."""
    return {"BF16": 2, "I64": 8}[dtype] * math.prod(shape)


def write_weights(folder: Path, tensors: Tensors) -> None:
    """Write random values, in shards with an index."""
    import numpy as np

    rng = np.random.default_rng(0)
    values = rng.standard_normal(NOISE_BYTES // 2, dtype=np.float32) * 0.02
    noise = (values.view(np.uint32) >> 16).astype(np.uint16)  # cut off to bfloat16
    shards: list[Tensors] = [{}]
    for name, tensor in tensors.items():
        if num_bytes(shards[-1]) + tensor_bytes(*tensor) > MAX_SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    file_of: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, shard, noise, rng)
        file_of.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": num_bytes(tensors)}, "weight_map": file_of}
    write_json(folder / "model.safetensors.index.json", index)


def write_shard(
    path: Path, tensors: Tensors, noise: np.ndarray[Any, Any], rng: np.random.Generator
) -> None:
    """Write one file, the widest types first, as safetensors does."""
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1][0] != "I64"))
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in ordered.items():
        start, end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dtype, shape in ordered.values():
            write_tensor(file, dtype, shape, noise, rng)
        file.flush()
        os.fsync(file.fileno())


def write_tensor(
    file: BinaryIO,
    dtype: str,
    shape: tuple[int, ...],
    noise: np.ndarray[Any, Any],  # [NOISE_BYTES / 2], bfloat16 as uint16
    rng: np.random.Generator,
) -> None:
    """Write an order of ids, ones for a vector, or noise from random places."""
    import numpy as np

    left = math.prod(shape)
    if dtype == "I64":
        file.write(rng.permutation(left).tobytes())
        return
    if len(shape) == 1:
        file.write(np.full(left, 0x3F80, np.uint16).tobytes())  # 1.0
        return
    while left:
        place = int(rng.integers(noise.size))
        part = noise[place : place + left]
        file.write(part.data)
        left -= part.size


def tokenizer_of(vocab_size: int) -> dict[str, Any]:
    """The embedded pair's tokenizer with made-up pieces, as many as Gemma 4 has.

    The check reads a text; what a tokenizer of that size takes belongs to it.
    """
    path = EMBEDDED / "tokenizer.json"
    tokenizer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    pieces = [piece for piece in vocab if piece.isascii() and piece.isalpha()]
    while len(vocab) < vocab_size:
        num_before = len(pieces)
        for first in pieces[:num_before]:
            for second in pieces[: 1 + num_before // 100]:
                if first + second not in vocab and len(vocab) < vocab_size:
                    vocab[first + second] = len(vocab)
                    pieces.append(first + second)
                    merges.append([first, second])
    return tokenizer


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """Write a small file."""
    path.write_text(json.dumps(contents), encoding="utf-8")


# --- the report -------------------------------------------------------------------


def sizes(folder: Path) -> dict[str, Any]:
    """How large the checkpoint is, its largest tensor, and the machine's memory."""
    largest = 0
    total = 0
    for path in folder.glob("*/*.safetensors"):
        total += path.stat().st_size
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        spans = (info["data_offsets"] for info in header.values())
        largest = max(largest, *(end - start for start, end in spans))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"bytes": total, "largest_tensor_bytes": largest, "memory_bytes": memory}


def table(figures: Mapping[str, Any]) -> Iterator[str]:
    """The figures as Markdown."""
    checkpoint, work = figures["checkpoint"], figures["bare_work"]
    cache = "read from the disk" if figures["is_cold"] else "may be in the page cache"
    yield ""
    yield figures["machine"]
    yield (
        f"Checkpoint {checkpoint['bytes'] / 1e9:.2f} GB ({cache}), largest tensor "
        f"{checkpoint['largest_tensor_bytes'] / 1e9:.2f} GB, result "
        f"{work['written'] / 1e9:.2f} GB, machine's memory "
        f"{checkpoint['memory_bytes'] / 1e9:.1f} GB."
    )
    yield ""
    yield "| process | runs | seconds | GB/s read | CPU seconds | speed | peak memory |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for kind, seconds in figures["wall_s"].items():
        runs = sum(run["kind"] == kind for run in figures["runs"])
        yield (
            f"| {kind} | {runs} | {seconds:.1f} | {work['read'] / 1e9 / seconds:.2f} | "
            f"{figures['cpu_s'][kind]:.1f} | {figures['ratio'][kind]:.2f} | "
            f"{figures['peak_gb'][kind]:.2f} GB |"
        )
    yield ""


def complaints(figures: Mapping[str, Any]) -> list[str]:
    """What is not as it should be, one line each."""
    lines = [
        f"{kind} must take at most {MAX_PEAK_GB} GB: got {peak:.2f} GB"
        for kind, peak in figures["peak_gb"].items()
        if kind != BARE and peak > MAX_PEAK_GB
    ]
    ratio = figures["ratio"][CONVERTER]
    if ratio < MIN_RATIO:
        lines.append(
            f"{CONVERTER} must reach {MIN_RATIO} of the bare work's speed: got "
            f"{ratio:.2f}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
