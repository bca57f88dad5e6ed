"""Turns Metal text into C++, compiles it against the shim and keeps the result."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.metal.launch import MetalError
from tests.metal.text import mlx_headers

SHIM = Path(__file__).parent / "shim"
CACHE = Path(__file__).parents[2] / "build" / "metal"  # git ignores build/

FLAGS = (
    "-std=c++20",
    "-O1",  # -O2 does not make kernels faster
    "-w",
    "-fPIC",
    "-fvisibility=hidden",
    # Or the statics of one loaded kernel would serve all others.
    "-fno-gnu-unique",
    # As in Metal: 1.0 is a float, and casts between pointers may alias.
    "-fsingle-precision-constant",
    "-fno-strict-aliasing",
    # With fused multiply-add, which contract=True uses.
    *(["-march=x86-64-v3"] if platform.machine() == "x86_64" else []),
)
# An access that is not aligned to its type calls the runtime: it has that function of
# the sanitizer's library, which stays out.
CHECKED = "-fsanitize=alignment"
# Whoever loads it has libstdc++ (launch.py): half of a link is reading what that has.
LINKED = ("-shared", "-nodefaultlibs")
LIBRARIES = ("-lgcc", "-lc", "-lm")
CONTRACTED = ("-ffp-contract=fast", "-fexpensive-optimizations")  # -O1 alone has none
# The runtime's accesses are not the kernel's: it is not instrumented, only told.
TSAN_RUNTIME_FLAGS = ("-DSHIM_TSAN",)
TSAN_KERNEL_FLAGS = ("-fsanitize=thread", "-g")
TSAN_LINKED = ("-shared", "-Wl,--as-needed")
COUNTS_FLAGS = ("-DSHIM_COUNTS",)
WORDS_FLAGS = (*COUNTS_FLAGS, "-DSHIM_COUNTS_WORDS")

# One declaration of threadgroup storage: type, name, [sizes]. Pointers and references
# to such storage do not match.
STORAGE = re.compile(
    r"\bthreadgroup\s+([A-Za-z_][\w:]*(?:<[^;<>]*>)?)\s+([A-Za-z_]\w*)"
    r"\s*((?:\[[^\]]*\]\s*)*);"
)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
SIGNATURE = re.compile(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", re.DOTALL)
INSTANCE = re.compile(
    r"\ntemplate \[\[host_name\(.*?\)\]\] \[\[kernel\]\] decltype\((.*?)\) .*?;\s*$",
    re.DOTALL,
)
BUFFER = re.compile(
    r"(const )?(device|constant) (.+?)([*&]) (\w+) \[\[buffer\((\d+)\)\]\]"
)
# Every pointer to a buffer: of the signature, of a cast, or of the body's own.
DEVICE_POINTER = re.compile(r"\b(const\s+)?device\s+([A-Za-z_][\w:]*)\s*\*")
ATTRIBUTE = re.compile(r"uint3? \w+ \[\[(\w+)\]\]")


@dataclass(frozen=True)
class Library:
    """A compiled kernel and the names of its buffers, in the order of the text."""

    path: Path
    buffer_names: tuple[str, ...]


@cache
def compile_kernel(
    text: str,
    *,
    contract: bool = False,
    tsan: bool = False,
    counts: tuple[str, ...] = (),
) -> Library:
    """Compile Metal text, or take what an earlier call compiled.

    Args:
        text: What MLX printed.
        contract: Fuse multiplications and additions, as Metal's compiler may.
        tsan: Build for ThreadSanitizer.
        counts: ``COUNTS_FLAGS`` to count what the kernel does, ``WORDS_FLAGS`` to count
            its words' logic too; empty to count nothing.

    Raises:
        MetalError: The text does not compile.
    """
    signature = SIGNATURE.search(text)
    if signature is None:
        raise MetalError("the text must hold a kernel as MLX prints it: got none")
    parameters = [line.strip() for line in signature[2].split(",\n")]
    buffers = [match for match in map(BUFFER.match, parameters) if match]
    is_counted = bool(counts)
    flags = (
        *(*FLAGS, *(CONTRACTED if contract else ("-ffp-contract=off",))),
        *(*(TSAN_KERNEL_FLAGS if tsan else ()), *counts, CHECKED),
    )
    path = _cached(
        _cpp(text, signature[1], parameters, is_counted=is_counted),
        (*flags, *(TSAN_LINKED if tsan else LINKED)),
        ".so",
        inputs=(
            *_runtime(tsan=tsan, is_counted=is_counted),
            *(() if tsan else LIBRARIES),
        ),
        header=_header(flags, is_counted=is_counted),
    )
    return Library(path, tuple(match[5] for match in buffers))


def _cpp(
    text: str, kernel_name: str, parameters: list[str], *, is_counted: bool
) -> str:
    """The C++ of a kernel behind the header: the text, and a call of the kernel."""
    instance = INSTANCE.search(text)
    called = instance[1] if instance else kernel_name
    body = text[: instance.start()] if instance else text
    arguments = [_argument(each, is_counted=is_counted) for each in parameters]
    if is_counted:
        body = DEVICE_POINTER.sub(r"shim::Pointer<\1\2>", body)
    return "\n".join(
        [
            '#line 1 "kernel"',
            _with_storage(_without_metal_includes(body)),
            '#line 1 "call"',
            "void shim::run_thread(const shim::Thread& thread_) {",
            f"  {called}({', '.join(arguments)});",
            "}",
        ]
    )


def _without_metal_includes(text: str) -> str:
    """Without ``#include <metal_...>``: the shim has all of it in one header."""
    return re.sub(r"(?m)^[ \t]*#[ \t]*include\s*<metal_\w+>", "", text)


def _with_storage(text: str) -> str:
    """Declarations of threadgroup storage become calls; lines stay where they are."""
    text = STORAGE.sub(r"SHIM_THREADGROUP(\2, \3, \1);", text)
    code = COMMENT.sub("", text)
    left = re.search(r"\bthreadgroup\s+[\w:<>]+\s+\w+\s*[;\[=,][^;)]*;", code)
    if left:
        raise MetalError(
            "threadgroup storage must be declared one array at a time, with a plain "
            f"type: got {left[0]!r}"
        )
    return text


def _argument(parameter: str, *, is_counted: bool) -> str:
    """What the call passes for one parameter of the kernel."""
    buffer = BUFFER.match(parameter)
    if buffer:
        pointer = f"({buffer[3]}*)thread_.buffers[{buffer[6]}]"
        if is_counted and buffer[2] == "device":
            counted = f"shim::Pointer<{buffer[1] or ''}{buffer[3]}>"
            return f"{counted}({pointer}, {buffer[6]}, thread_)"
        return f"*{pointer}" if buffer[4] == "&" else pointer
    attribute = ATTRIBUTE.match(parameter)
    if attribute is None:
        raise MetalError(f"parameter of a kernel not understood: {parameter!r}")
    return f"thread_.{attribute[1]}"


@cache
def _header(flags: tuple[str, ...], *, is_counted: bool) -> Path:
    """What stands before every kernel, precompiled for its flags: the shim, MLX's."""
    text = "\n".join(
        [
            '#include "shim.hpp"',
            _without_metal_includes(mlx_headers()),
            '#include "counting.hpp"' if is_counted else "",
        ]
    )
    return _cached(text, (*flags, "-x", "c++-header"), ".gch").with_suffix("")


@cache
def _runtime(*, tsan: bool, is_counted: bool) -> tuple[Path, ...]:
    """The compiled runtime, one for all kernels."""
    extra = TSAN_RUNTIME_FLAGS if tsan else COUNTS_FLAGS if is_counted else ()
    # Its fibers jump between stacks, which a fortified longjmp takes for a mistake.
    flags = (*FLAGS, "-U_FORTIFY_SOURCE", *extra, "-c")
    names = ("runtime.cpp", "counts.cpp") if is_counted else ("runtime.cpp",)
    return tuple(
        _cached((SHIM / name).read_text(encoding="utf-8"), flags, ".o")
        for name in names
    )


def _cached(
    source: str,
    flags: tuple[str, ...],
    suffix: str,
    inputs: tuple[Path | str, ...] = (),
    header: Path | None = None,
) -> Path:
    """What g++ makes of a source. The file's name is a hash of all that went in.

    Args:
        source: C++.
        flags: g++'s.
        suffix: Of the file.
        inputs: Files and libraries to link with.
        header: What to read first; g++ finds what is precompiled beside it.
    """
    names = [Path(each).name for each in (*inputs, *([header] if header else []))]
    parts = [_environment(), source, *flags, *names]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    path = CACHE / (key + suffix)
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        cpp, made = Path(folder, "kernel.cpp"), Path(folder, "made")
        cpp.write_text(source, encoding="utf-8")
        command = ["g++", *flags, f"-I{SHIM}", "-o", *map(str, (made, cpp, *inputs))]
        command += ["-include", str(header)] if header else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise MetalError(_first_errors(done.stderr))
        os.replace(made, path)  # others may compile the same at the same time
    return path


@cache
def _environment() -> str:
    """The compiler's version and the shim's headers."""
    version = subprocess.run(
        ["g++", "-dumpfullversion", "-dumpmachine"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    headers = (path.read_text(encoding="utf-8") for path in sorted(SHIM.glob("*.hpp")))
    return "\0".join([version, *headers])


def _first_errors(output: str, count: int = 5) -> str:
    errors = [line for line in output.splitlines() if " error: " in line]
    return "\n".join(errors[:count] or output.splitlines()[-count:])
