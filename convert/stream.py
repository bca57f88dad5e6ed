"""Rows in, packed rows out: the one place where weights pass through memory.

A parameter is worked on in blocks of a few MB of its rows: read at their place in the
checkpoint with a plain read (a mapped page would count as memory), checked, cast,
quantized and written at their place in the result. Blocks need nothing of each other,
so a few are under way at a time; memory is those few blocks, whatever the size of the
checkpoint or of its largest tensor.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np

from mlx_gemma_mtp.checkpoints.checkpoint import DTYPE_BITS
from mlx_gemma_mtp.errors import CheckpointError, OutputError
from mlx_gemma_mtp.models.tensor_names import TOKEN_ORDERING

from .plan import Array, Block, Parameter, PartPlan
from .reader import FLOATS, WORDS, open_reader
from .safetensors import OutputFile
from .unpack import read_beside, unpacked

BLOCK_BYTES = 4 << 20  # read at once: stays in the caches, and is much for a disk
NUM_WORKERS = 3  # one reads or writes while the others quantize
_CACHE_BYTES = 64 << 20  # of freed buffers that MLX keeps; its default is all memory
# A float is not finite if all bits of its exponent are set.
_EXPONENT = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}
_WORD_TYPES = {8: mx.uint8, 16: mx.uint16, 32: mx.uint32}


@dataclass(frozen=True, order=True)
class Region:
    """Bytes that were written, and their checksum.

    Attributes:
        file: Name of the file.
        start: The first byte.
        num_bytes: How many.
        crc32: Their checksum.
        array: What they belong to.
    """

    file: str
    start: int
    num_bytes: int
    crc32: int
    array: str


def write_part(
    plan: PartPlan,
    files: Sequence[OutputFile],
    folder: Path,
    *,
    progress: Callable[[int], None],
) -> list[Region]:
    """Convert every tensor of a plan.

    Args:
        plan: The part's plan.
        files: Its files, as from ``lay_out()``.
        folder: An existing folder; the files must not be there yet.
        progress: Called with the number of bytes that were read since the last call.

    Returns:
        Everything that was written, headers included.

    Raises:
        CheckpointError: A tensor cannot be read or holds a value that is not finite.
        OutputError: A file cannot be written.
    """
    jobs = (
        (parameter, block)
        for parameter in plan.parameters
        for block in parameter.rows.blocks(_rows_per_block(parameter))
    )
    with open_reader(plan) as reader, _writer(files, folder) as writer, _small_cache():
        regions = writer.write_headers()

        def convert(job: tuple[Parameter, Block]) -> tuple[int, list[Region]]:
            parameter, block = job
            data = reader.read_bytes(parameter, block)
            beside = read_beside(reader, parameter, block)
            num_bytes = len(data) + sum(array.nbytes for array in beside)
            return num_bytes, _convert(parameter, block, data, beside, writer)

        for num_bytes, written in _in_parallel(convert, jobs):
            regions += written
            progress(num_bytes)
        writer.flush()
    return regions


def verify(
    regions: Iterable[Region],
    files: Sequence[OutputFile],
    folder: Path,
    *,
    progress: Callable[[int], None],
) -> dict[str, str]:
    """Read everything that was written again and compare it.

    Args:
        regions: As from ``write_part()``.
        files: The files they lie in.
        folder: Where those are.
        progress: Called with the number of bytes that were read since the last call.

    Returns:
        File name to the SHA-256 of its contents.

    Raises:
        OutputError: A byte is not what was written.
    """
    by_file: dict[str, list[Region]] = {file.name: [] for file in files}
    for region in sorted(regions):
        by_file[region.file].append(region)
    return {
        file.name: _verify_file(
            folder / file.name, by_file[file.name], file.num_bytes, progress
        )
        for file in files
    }


def _verify_file(
    path: Path,
    regions: Iterable[Region],
    num_bytes: int,
    progress: Callable[[int], None],
) -> str:
    """Compare one file, every byte of it; return its SHA-256."""
    digest, end = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            _from_disk(file.fileno())
            for region in regions:
                data = file.read(region.num_bytes)
                if region.start != end or zlib.crc32(data) != region.crc32:
                    _fail_read_back(path, region.array)
                end += len(data)
                digest.update(data)
                progress(len(data))
            if end != num_bytes or file.read(1):
                _fail_read_back(path, "its end")
    except OSError as error:
        _fail_write(path, error)
    return digest.hexdigest()


def _rows_per_block(parameter: Parameter) -> int:
    width = max(DTYPE_BITS[array.dtype] for array in parameter.arrays)
    width = max(width, DTYPE_BITS[parameter.source.dtype])
    if parameter.name == TOKEN_ORDERING:
        return max(1, parameter.rows.run_length)  # checked as a whole; 2 MB
    num_columns = max(1, parameter.rows.num_columns)
    if parameter.packing is not None:  # written in full, it is wider
        num_columns = parameter.arrays[0].shape[-1]
        # MLX 0.32.4 unpacks no odd number of rows with an odd number of nvfp4 groups.
        return max(1, BLOCK_BYTES * 8 // (width * num_columns * 2)) * 2
    return max(1, BLOCK_BYTES * 8 // (width * num_columns))


def _convert(
    parameter: Parameter,
    block: Block,
    data: bytes,
    beside: Sequence[mx.array],
    writer: _Writer,
) -> list[Region]:
    """Turn the bytes of a block into what the plan says and write them."""
    source = parameter.source.dtype
    words = np.frombuffer(data, WORDS[DTYPE_BITS[source]])
    if not _is_finite(words, source) or not all(map(_has_finite, beside)):
        _fail_not_finite(parameter, "a value that is not finite", "Download it again.")
    if parameter.name == TOKEN_ORDERING:
        ids = _token_ordering(parameter, words)
        return [writer.write(parameter.arrays[0], block.row, ids)]
    if parameter.format is None and parameter.dtype == source:
        return [writer.write(parameter.arrays[0], block.row, words)]
    regions = []
    for array, made in zip(
        parameter.arrays, _compute(parameter, words, beside), strict=True
    ):
        if not _is_finite(made, array.dtype):  # a scale of what is just finite
            _fail_too_large(parameter, array.dtype)
        regions.append(writer.write(array, block.row, made))
    return regions


def _compute(parameter: Parameter, words: Any, beside: Sequence[mx.array]) -> list[Any]:
    """Unpack a block's values if they are packed, cast them, quantize them if asked."""
    values = mx.array(words).reshape(-1, parameter.rows.num_columns)
    if parameter.packing is None:
        values = values.view(FLOATS[parameter.source.dtype])
    else:
        values = unpacked(values, parameter.packing, beside)
    if values.dtype != FLOATS[parameter.dtype]:
        values = values.astype(FLOATS[parameter.dtype])
        if not _is_finite(_as_words(values), parameter.dtype):
            _fail_too_large(parameter, parameter.dtype)
    packed = parameter.format
    results: Sequence[mx.array] = (values,)
    if packed is not None:
        results = mx.quantize(
            values, group_size=packed.group_size, bits=packed.bits, mode=packed.mode
        )
    mx.eval(results)
    return [_as_words(result) for result in results]


def _as_words(array: mx.array) -> Any:
    """Return an array's memory as NumPy's words of the same width."""
    return np.asarray(array.flatten().view(_WORD_TYPES[array.dtype.size * 8]))


def _is_finite(words: Any, dtype: str) -> bool:
    """Tell whether all floats are finite; other types always are."""
    exponent = _EXPONENT.get(dtype)
    if exponent is None or not words.size:
        return True
    return bool((words & words.dtype.type(exponent)).max() != exponent)


def _has_finite(array: mx.array) -> bool:
    """Tell whether all of an array is finite, if it has floats."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return True
    return bool(mx.isfinite(array).all().item())


def _token_ordering(parameter: Parameter, ids: Any) -> Any:
    """Return the token ids as int32 if they are every id once.

    An id outside the vocabulary would read foreign memory in a gather.
    """
    if not np.array_equal(np.sort(ids), np.arange(ids.size)):
        raise CheckpointError(
            f"{parameter.tensor} in {parameter.source.file} must be an order of all "
            f"{ids.size} token ids: got ids that are missing or out of range. Download "
            "it again."
        )
    return ids.astype(np.int32)


def _fail_too_large(parameter: Parameter, dtype: str) -> NoReturn:
    found = f"a value too large for {dtype}"
    _fail_not_finite(parameter, found, "Take another --dtype.")


def _fail_not_finite(parameter: Parameter, found: str, next_step: str) -> NoReturn:
    raise CheckpointError(
        f"{parameter.tensor} in {parameter.source.file} must hold finite numbers: got "
        f"{found}. {next_step}"
    )


def _fail_read_back(path: Path, array: str) -> NoReturn:
    raise OutputError(
        f"{path} must read back as it was written: got other bytes at {array}. Check "
        "the disk, then run again."
    )


def _fail_write(path: Path, error: OSError) -> NoReturn:
    raise OutputError(
        f"{path} must be writable: got {error.strerror or error}. Make room or take "
        "another --mlx-path, then run again."
    ) from error


class _Writer:
    """The result's files, open and of their full size."""

    def __init__(
        self, files: Sequence[OutputFile], folder: Path, descriptors: dict[str, int]
    ) -> None:
        self.files = files
        self.folder = folder
        self.descriptors = descriptors
        self.file_of = {name: file for file in files for name in file.arrays}

    def write_headers(self) -> list[Region]:
        """Write the header of every file."""
        return [self._write(file, 0, file.header, "its header") for file in self.files]

    def write(self, array: Array, row: int, words: Any) -> Region:
        """Write rows of an array, the first of which is ``row``."""
        file = self.file_of[array.name]
        row_bytes = array.shape[-1] if array.shape else 1
        row_bytes *= DTYPE_BITS[array.dtype] // 8
        start = file.offsets[array.name] + row * row_bytes
        return self._write(file, start, memoryview(words).cast("B"), array.name)

    def flush(self) -> None:
        """Wait until all is on the disk."""
        for name, descriptor in self.descriptors.items():
            try:
                os.fsync(descriptor)
            except OSError as error:
                _fail_write(self.folder / name, error)

    def _write(self, file: OutputFile, start: int, data: Any, array: str) -> Region:
        view, done = memoryview(data), 0
        try:
            while done < len(view):
                descriptor = self.descriptors[file.name]
                done += os.pwrite(descriptor, view[done:], start + done)
        except OSError as error:
            _fail_write(self.folder / file.name, error)
        return Region(file.name, start, len(view), zlib.crc32(view), array)


@contextmanager
def _writer(files: Sequence[OutputFile], folder: Path) -> Iterator[_Writer]:
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
    with ExitStack() as stack:
        descriptors = {}
        for file in files:
            try:
                descriptors[file.name] = os.open(folder / file.name, flags, 0o666)
                stack.callback(os.close, descriptors[file.name])
                os.ftruncate(descriptors[file.name], file.num_bytes)
            except OSError as error:
                _fail_write(folder / file.name, error)
        yield _Writer(files, folder, descriptors)


@contextmanager
def _small_cache() -> Iterator[None]:
    """Let MLX give freed buffers back: blocks of many sizes would pile up."""
    before = mx.set_cache_limit(_CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
        mx.clear_cache()


def _in_parallel(work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
    """Yield results in the order of the jobs; a few are under way at a time.

    Control-C may come anywhere, also inside the pool's own functions: what has begun is
    known here before the pool hears of it, and until it has ended.
    """
    pool, pending = _pool(NUM_WORKERS), deque[Future[Any]]()

    def first() -> Any:
        result = pending[0].result()
        pending.popleft()
        return result

    try:
        for job in jobs:
            pending.append(Future())
            pool.submit(_run, pending[-1], work, job)
            if len(pending) > NUM_WORKERS:
                yield first()
        while pending:
            yield first()
    finally:
        wait([f for f in pending if not f.cancel()])  # what runs still uses the files


def _run(future: Future[Any], work: Callable[[Any], Any], job: Any) -> None:
    """Give a future its result, unless it was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work(job)
    except BaseException as error:
        future.set_exception(error)
        raise  # to the pool's own future, which nobody asks
    future.set_result(result)


@cache
def _pool(num_workers: int) -> ThreadPoolExecutor:
    """The process's workers: MLX keeps a stream for every thread it has ever seen.

    All of them begin here. A pool that is interrupted while it begins one does not know
    that one, and does not wake it when the process ends; this pool is then lost as a
    whole, which all of its workers notice.
    """
    pool, has_begun = ThreadPoolExecutor(num_workers), Event()
    try:
        for _ in range(num_workers):
            pool.submit(has_begun.wait)
    finally:
        has_begun.set()
    return pool


def _from_disk(descriptor: int) -> None:
    """Forget what the system holds of a file, so that the disk itself is read."""
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    elif sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
