"""Checkpoints damaged at random: converted, or refused in one line; nothing else.

Headers, configs, indexes and settings are changed value by value and byte by byte. No
case may raise anything but an ``MTPError``, take long or take much memory, and what is
converted must open.

Run: python -m pytest tests/convert/test_fuzz.py
     python -m pytest -m slow tests/convert/test_fuzz.py   # thousands of cases
"""

import contextlib
import copy
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mlx_gemma_mtp
from convert.pipeline import Request, plan_conversion
from mlx_gemma_mtp.checkpoints.checkpoint import DTYPE_BITS, INDEX_NAME
from mlx_gemma_mtp.errors import MTPError
from mlx_gemma_mtp.pair.load import load_pair
from tests.tiny import REFERENCE, model_folder, uncompiled

COMMAND = import_module("convert.__main__")
ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"
NUM_CASES, NUM_MANY_CASES = 60, 4000
NUM_VALUES = 4
MAX_SECONDS = 20
MAX_MEMORY_BYTES = 1 << 30
FAMILIES = ("12b", "e2b", "26b-a4b")
PARTS = ("", "drafter")
PROGRESS_BAR = re.compile(r"(converting|verifying|comparing)[^\n]*\[[^\n]*\]\s*")
OUTCOMES: Counter[str] = Counter()
REASONS: list[str] = []  # why what was converted did not open

# What a damaged or a foreign file may hold in any place.
STRINGS = (
    "",
    "x",
    "two\nlines",
    "carriage\rreturn",
    "line\u2028separator",
    "nul\0",
    "\ud800",
    "a" * 5000,
    "../model.safetensors",
    "full_attention",
    "sliding_attention",
    "gemma4",
    "gemma4_text",
    "gemma4_assistant",
    "float16",
    "bfloat16",
    "default",
    "1",
    "%s {0}",
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 64, 511, 513, 999, 1000, 1001, 2**31 - 1, 2**31, 2**32),
    *(2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**30, 10**400, -(10**400)),
)
FLOATS = (0.5, 1.0, -0.0, 1e-300, 1e300, 5e-324, float("nan"), float("inf"))
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from((*FLOATS, -float("inf"))),
    st.sampled_from(STRINGS),
    st.integers(-10, 600),
    st.builds(list),
    st.builds(dict),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from((*STRINGS, "bits", "0", "5")), inner),
    ),
    max_leaves=6,
)
# Keys that change much where they are added.
ADDED_KEYS = (
    "quantization",
    "quantization_config",
    "per_layer_config",
    "rope_parameters",
    "layer_types",
    "vocab_size",
    "dtype",
    "torch_dtype",
    "enable_moe_block",
    "num_experts",
    "tie_word_embeddings",
    "text_config",
    "model_file",
    "eos_token_id",
    "num_assistant_tokens",
    "head_dim",
    "__metadata__",
)


@cache
def bases():
    """Whole pairs: float ones in both layouts of the config, and a converted one."""
    memory = Path("/dev/shm")  # where there is one, waiting for a disk takes no time
    place = memory if os.access(memory, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="mlx_gemma_mtp_fuzz_", dir=place))
    found = []
    for family in FAMILIES:
        found.append(model_folder(folder / family, family))
        resaved = model_folder(folder / f"{family}-resaved", family)
        for part, name in (("", "target"), ("drafter", "drafter")):
            source = REFERENCE / family / name / "config.resaved.json"
            shutil.copyfile(source, resaved / part / "config.json")
        found.append(resaved)
    out = folder / "converted"
    args = ["--hf-path", str(found[2]), "--mlx-path", str(out), "--no-check"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert COMMAND.main(args) == 0
    found.append(out)
    return folder, found


@pytest.fixture(scope="module", autouse=True)
def _bases():
    with uncompiled():
        yield
    if bases.cache_info().currsize:
        shutil.rmtree(bases()[0])
        bases.cache_clear()


def places(value, place=()):
    """The path of every value inside a value."""
    yield place
    keys = list(value) if isinstance(value, dict) else []
    keys = list(range(len(value))) if isinstance(value, list) else keys
    for key in keys:
        yield from places(value[key], (*place, key))


def inside(value, place):
    for key in place:
        value = value[key]
    return value


def changed_once(draw, value):
    """Change one thing somewhere inside a value parsed from JSON."""
    value = copy.deepcopy(value)
    everywhere = sorted(places(value), key=repr)
    place = draw(st.sampled_from(everywhere))
    if not place or draw(st.integers(0, 30)) == 0:
        if isinstance(value, dict) and draw(st.integers(0, 3)):
            value[draw(st.sampled_from((*ADDED_KEYS, *STRINGS)))] = draw(VALUES)
            return value
        return draw(VALUES)
    parent, key = inside(value, place[:-1]), place[-1]
    how = draw(st.sampled_from("replace nudge delete rename add".split()))
    old = parent[key]
    if how == "delete":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from(STRINGS))] = parent.pop(key)
    elif how == "add" and isinstance(old, dict):
        old[draw(st.sampled_from((*ADDED_KEYS, *STRINGS)))] = draw(VALUES)
    elif how == "add" and isinstance(old, list):
        old.append(draw(VALUES))
    elif how == "nudge" and type(old) is int:
        parent[key] = draw(st.sampled_from((old + 1, old - 1, old * 2, old // 2, -old)))
    elif how == "nudge" and type(old) is bool:
        parent[key] = not old
    else:
        parent[key] = draw(VALUES)
    return value


def changed_bytes(draw, raw):
    """Change a few bytes anywhere: flipped, set, deleted, put in, cut off."""
    raw = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(raw) - 1)))
        how = draw(st.sampled_from("flip set delete insert cut digit".split()))
        if how == "flip" and raw:
            raw[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "set" and raw:
            raw[place] = draw(st.sampled_from(b'{}[]",:0-9e\\\n\0\xff'))
        elif how == "delete":
            del raw[place : place + draw(st.integers(1, 40))]
        elif how == "insert":
            text = draw(st.sampled_from((b"\n", b"9" * 400, b"9" * 5000, b"[" * 3000)))
            raw[place:place] = text
        elif how == "cut":
            del raw[place:]
        else:
            digits = [match.start() for match in re.finditer(rb"[0-9]", raw)]
            if digits:
                at = draw(st.sampled_from(digits))
                raw[at] = draw(st.sampled_from(b"0123456789-.e"))
    return bytes(raw)


def changed_json(draw, raw):
    if draw(st.integers(0, 5)) == 0:
        return changed_bytes(draw, raw)
    value = json.loads(raw)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        value = changed_once(draw, value)
    return json.dumps(value).encode()


def changed_entry(draw, header, name):
    """Change one tensor's entry in a way that headers get damaged."""
    entry = header[name]
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        header[name] = draw(VALUES)
        return
    how = draw(st.sampled_from("dtype shape axis offsets swap share any".split()))
    if how == "dtype":
        entry["dtype"] = draw(st.one_of(st.sampled_from(sorted(DTYPE_BITS)), VALUES))
    elif how == "shape":
        entry["shape"] = draw(
            st.one_of(VALUES, st.lists(st.sampled_from(NUMBERS), max_size=5))
        )
    elif how == "axis" and entry["shape"]:
        at = draw(st.integers(0, len(entry["shape"]) - 1))
        entry["shape"][at] = draw(LEAVES)
    elif how == "offsets":
        entry["data_offsets"] = draw(
            st.one_of(VALUES, st.lists(st.sampled_from(NUMBERS), max_size=3))
        )
    elif how == "swap" and isinstance(entry.get("data_offsets"), list):
        entry["data_offsets"].reverse()
    elif how == "share":
        other = header[draw(st.sampled_from(sorted(header)))]
        if isinstance(other, dict):
            entry.update(copy.deepcopy(other))
    else:
        header[name] = draw(VALUES)


def changed_header(draw, raw):
    """Change a safetensors file, mostly in its header."""
    start = 8 + int.from_bytes(raw[:8], "little")
    how = draw(
        st.sampled_from(
            "entry entry entry name twice length bytes cut data json".split()
        )
    )
    if how == "cut":
        return raw[: draw(st.integers(0, len(raw)))]
    if how == "data":
        damaged = bytearray(raw)
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(start, len(raw) - 1))
            damaged[place] = draw(st.integers(0, 255))
        return bytes(damaged)
    if how == "length":
        length = draw(st.one_of(st.integers(0, start + 9), st.sampled_from(NUMBERS)))
        return (length % 2**64).to_bytes(8, "little") + raw[8:]
    header = json.loads(raw[8:start])
    if how == "bytes":
        text = changed_bytes(draw, raw[8:start])
    elif how == "twice":
        name = draw(st.sampled_from(sorted(header)))
        again = copy.deepcopy(header)
        changed_entry(draw, again, name)
        extra = f"{json.dumps(name)}: {json.dumps(again[name])}, "
        text = b"{" + extra.encode() + raw[9:start]
    elif how == "json":
        text = json.dumps(changed_once(draw, header)).encode()
    else:
        for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
            name = draw(st.sampled_from(sorted(header)))
            if how == "name":
                known = st.sampled_from(sorted(header))
                news = st.one_of(st.sampled_from(STRINGS), known, st.just(name + "x"))
                header[draw(news)] = header.pop(name)
            else:
                changed_entry(draw, header, name)
        text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[start:]


FILES = {
    WEIGHTS: changed_header,
    "config.json": changed_json,
    INDEX_NAME: changed_json,
    "generation_config.json": changed_json,
    "tokenizer_config.json": changed_json,
}


@dataclass(frozen=True)
class Case:
    """A pair, a file in it, and what that holds instead; too long to be printed."""

    number: int
    path: Path
    contents: bytes = field(repr=False)


@st.composite
def cases(draw):
    number = draw(st.integers(0, len(bases()[1]) - 1))
    name = draw(
        st.sampled_from((WEIGHTS, WEIGHTS, "config.json", "config.json", *FILES))
    )
    part = "" if name.startswith("tokenizer") else draw(st.sampled_from(PARTS))
    if name == INDEX_NAME:
        number = len(bases()[1]) - 1  # a converted pair has one
    path = Path(part) / name
    raw = (bases()[1][number] / path).read_bytes()
    return Case(number, path, FILES[name](draw, raw))


class _Hang(BaseException):
    """A case took too long; nothing in the code under test catches this."""


@contextlib.contextmanager
def watchdog():
    def hang(signum, frame):
        raise _Hang(f"a case took longer than {MAX_SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_line(text):
    assert len(text.splitlines()) == 1, repr(text)  # also no \r, no \u2028
    assert len(text) < 20_000  # some name what they found as it is


def check_case(case, *, is_full):
    """The property: it works, or it is refused in one line."""
    base, path = bases()[1][case.number], case.path
    mx.random.seed(0)  # every model that is built makes its key's lazy history longer
    with tempfile.TemporaryDirectory(dir=base.parent) as scratch, watchdog():
        source, out = Path(scratch) / "source", Path(scratch) / "out"
        shutil.copytree(base, source, copy_function=os.link)
        (source / path).unlink()
        (source / path).write_bytes(case.contents)
        is_planned = check_plan(source, out)
        if not is_full:
            OUTCOMES["planned" if is_planned else "refused"] += 1
            return
        status = check_command(source, out)
        OUTCOMES["converted" if status == 0 else "refused"] += 1
        left = sorted(found.name for found in Path(scratch).iterdir())
        assert left == (["out", "source"] if status == 0 else ["source"])
        if status == 0:
            assert is_planned
            check_result(out, has_tokenizer=path.name.startswith("tokenizer"))


def check_plan(source, out):
    try:
        plan_conversion(Request(source, out), headers_only=True)
    except MTPError as error:
        check_line(str(error))
        return False
    return True


def check_command(source, out):
    printed, err = io.StringIO(), io.StringIO()
    argv = ["--hf-path", str(source), "--mlx-path", str(out), "--no-check"]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(err):
        status = COMMAND.main(argv)
    lines = [
        line
        for line in re.split(r"[\r\n]+", err.getvalue())
        if line.strip() and not PROGRESS_BAR.match(line)
    ]
    if status:
        assert status == 1
        assert printed.getvalue() == ""
        (line,) = lines
        assert line.startswith("error: ")
        check_line(line)
    else:
        assert lines == []
    return status


def check_result(out, *, has_tokenizer):
    try:
        load_pair(out, out / "drafter")
        if has_tokenizer:
            mlx_gemma_mtp.load(out, speculative_decoding=False)
    except MTPError as error:
        OUTCOMES["converted, not opened"] += 1
        check_line(str(error))
        REASONS.append(str(error))


COMMON = settings(
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


A_QUARTER = st.sampled_from((False, True, False, False))


@settings(COMMON, max_examples=NUM_CASES)
@given(case=cases(), is_full=A_QUARTER)
def test_damaged_files(case, is_full):
    check_case(case, is_full=is_full)


@pytest.mark.parametrize("number", range(2 * len(FAMILIES) + 1))
def test_undamaged_files(number):
    path = Path("config.json")
    raw = (bases()[1][number] / path).read_bytes()
    before = OUTCOMES.copy()
    check_case(Case(number, path, raw), is_full=True)
    assert OUTCOMES - before == {"converted": 1}


NASTY: tuple[Any, ...] = (
    *(None, True, False, [], {}, [None], {"a": 1}, [[]]),
    *NUMBERS,
    *FLOATS,
    *STRINGS,
)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("number", range(2 * len(FAMILIES) + 1))
def test_values_of_a_config(number, part, tmp_path):
    """Each setting deleted or replaced by a few of many values, one at a time."""
    source = tmp_path / "source"
    shutil.copytree(bases()[1][number], source)
    path = source / part / "config.json"
    config = json.loads(path.read_bytes())
    chance, wrong = random.Random(number), []
    for place in places(config):
        changes: list[Any] = [(value,) for value in chance.sample(NASTY, NUM_VALUES)]
        for change in [*changes, ()]:
            damaged = copy.deepcopy(config)
            parent = inside(damaged, place[:-1])
            if not place:
                damaged = list(change)
            elif change:
                parent[place[-1]] = change[0]
            else:
                del parent[place[-1]]
            path.write_text(json.dumps(damaged))
            try:
                with watchdog():
                    check_plan(source, tmp_path / "out")
            except Exception as error:  # noqa: BLE001  # whatever it is, is one
                wrong.append(f"{place} = {str(change)[:80]}: {error!r:.200}")
    assert not wrong


def peak_bytes():
    """Peak memory of this process alone: Linux's ru_maxrss has its parent's, too."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
        return int(kilobytes) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_many(num_cases):
    """Run cases in a process of their own; print what came of them."""
    started = time.monotonic()
    find = settings(COMMON, max_examples=num_cases)(
        given(case=cases(), is_full=A_QUARTER)(
            lambda case, is_full: check_case(case, is_full=is_full)
        )
    )
    with uncompiled():
        find()
    shutil.rmtree(bases()[0])
    seconds = time.monotonic() - started
    found = {"outcomes": OUTCOMES, "seconds": seconds, "peak_bytes": peak_bytes()}
    sys.stdout.write(json.dumps(found) + "\n")


@pytest.mark.slow
def test_thousands_of_damaged_files():
    code = "from tests.convert import test_fuzz as fuzz; fuzz.run_many({})"
    result = subprocess.run(
        [sys.executable, "-c", code.format(NUM_MANY_CASES)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=3600,
    )
    assert result.returncode == 0, result.stderr[-8000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert sum(found["outcomes"].values()) >= NUM_MANY_CASES
    assert found["outcomes"]["converted"] > NUM_MANY_CASES // 100
    assert found["peak_bytes"] < MAX_MEMORY_BYTES
