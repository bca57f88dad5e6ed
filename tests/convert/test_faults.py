"""A conversion that cannot be: one line, status 1, and nothing has changed on the disk.

Run: python -m pytest tests/convert/test_faults.py
"""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

from convert import pipeline, stream
from mlx_gemma_mtp.checkpoints.checkpoint import INDEX_NAME, open_checkpoint
from tests.tiny import FAMILIES, model_folder

COMMAND = import_module("convert.__main__")
ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"
TABLE = "model.language_model.embed_tokens.weight"
NORM = "model.language_model.norm.weight"
SCALAR = "model.language_model.layers.3.layer_scalar"
LAST_PROJECTION = "model.language_model.layers.5.mlp.up_proj.weight"
EXPERTS = "model.language_model.layers.5.experts.gate_up_proj"
ORDERING = "masked_embedding.token_ordering"
WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "I32": 4, "F8_E4M3": 1}
NOT_FINITE = {  # as they are stored: infinity, its negative, two kinds of NaN
    "F32": (0x7F800000, 0xFF800000, 0x7FC00000, 0xFF800001),
    "BF16": (0x7F80, 0xFF80, 0x7FC0, 0xFF81),
    "F16": (0x7C00, 0xFC00, 0x7E00, 0xFC01),
}
PROGRESS_BAR = re.compile(r"(converting|verifying|comparing)[^\n]*\[[^\n]*\]\s*")


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """A pair of every family, to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("families")
    return {family: model_folder(folder / family, family) for family in FAMILIES}


@pytest.fixture
def source(tmp_path, families):
    """A pair of the 12B family that a test may damage."""
    return copied(families["12b"], tmp_path / "source")


@pytest.fixture(scope="module")
def converted(tmp_path_factory, families):
    """A pair that is converted, to be copied before something replaces it."""
    out = tmp_path_factory.mktemp("converted") / "out"
    args = ["--hf-path", families["12b"], "--mlx-path", out, "--no-check"]
    assert COMMAND.main([str(arg) for arg in args]) == 0
    return out


@pytest.fixture
def refused(source, tmp_path, capsys):
    """Runs the command and asserts that it says one line and changes nothing."""

    def command(*args, words=(), status=1, folder=source, out="out"):
        before = snapshot(tmp_path)
        argv = ["--hf-path", folder, "--mlx-path", tmp_path / out, "--no-check", *args]
        capsys.readouterr()
        found = COMMAND.main([str(arg) for arg in argv])
        printed, err = capsys.readouterr()
        lines = without_bars(err)
        assert (found, printed, len(lines)) == (status, "", 1), (printed, err)
        if status == 1:
            assert lines[0].startswith("error: ")
            assert re.search(" must |exclude|invalid|no drafter", lines[0])
        assert len(lines[0]) < 1500
        for word in [words] if isinstance(words, str) else words:
            assert word in lines[0]
        assert snapshot(tmp_path) == before
        return lines[0]

    return command


def copied(folder, place):
    shutil.copytree(folder, place)
    return place


def snapshot(folder):
    """Every path below a folder and what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = os.readlink(path)
        else:
            found[path] = path.read_bytes() if path.is_file() else None
    return found


def without_bars(err):
    lines = re.split(r"[\r\n]+", err)
    return [line for line in lines if line.strip() and not PROGRESS_BAR.match(line)]


def read_weights(path):
    """A file's tensors: name to type, shape and bytes."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, end = (start + offset for offset in entry["data_offsets"])
        tensors[name] = (entry["dtype"], entry["shape"], bytearray(raw[first:end]))
    return tensors


def write_weights(path, tensors):
    header, data = {}, bytearray()
    for name, (dtype, shape, raw) in tensors.items():
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += raw
    write_raw(path, json.dumps(header).encode(), data)


def write_raw(path, header, data=b""):
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@contextmanager
def changed(path):
    """The tensors of a file, to be changed and written back."""
    tensors = read_weights(path)
    yield tensors
    write_weights(path, tensors)


@contextmanager
def changed_json(path):
    contents = json.loads(path.read_text())
    yield contents
    path.write_text(json.dumps(contents))


def split(folder, count=3):
    """Divide a folder's weights into shards with an index; return the shards."""
    tensors = read_weights(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    file_of = {name: names[i % count] for i, name in enumerate(tensors)}
    for file in names:
        own = {name: t for name, t in tensors.items() if file_of[name] == file}
        write_weights(folder / file, own)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": file_of}))
    return [folder / name for name in names]


def retyped(tensor, dtype):
    """A tensor of ones in another type."""
    _, shape, _ = tensor
    one = {"F32": b"\0\0\x80\x3f", "BF16": b"\x80\x3f", "F16": b"\0\x3c"}
    raw = one.get(dtype, bytes(WIDTHS[dtype])) * math.prod(shape)
    return dtype, shape, bytearray(raw)


def set_word(tensor, place, word):
    dtype, _, raw = tensor
    width = WIDTHS[dtype]
    start = place if place >= 0 else len(raw) // width + place
    raw[start * width : (start + 1) * width] = word.to_bytes(width, "little")


def part_file(source, part):
    return (source if part == "target" else source / "drafter") / WEIGHTS


class TestDamagedFiles:
    @pytest.mark.parametrize("part", ["target", "drafter"])
    @pytest.mark.parametrize("kept", [0.999999, 0.5, 0.01])
    def test_cut_off(self, refused, source, part, kept):
        path = part_file(source, part)
        os.truncate(path, int(path.stat().st_size * kept))
        refused(words=[str(path), "cut off"])

    def test_cut_off_names_the_tensor(self, refused, source):
        path = source / WEIGHTS
        os.truncate(path, path.stat().st_size - 1)
        last = max(
            open_checkpoint(source, headers_only=True).tensors.items(),
            key=lambda item: item[1].offsets[1],
        )[0]
        refused(words=[str(path), last])

    @pytest.mark.parametrize("size", [0, 5, 8, 100])
    def test_cut_off_inside_the_header(self, refused, source, size):
        os.truncate(source / WEIGHTS, size)
        refused(words=[str(source / WEIGHTS), "cut off inside its header"])

    def test_one_of_many_shards_cut_off(self, refused, source):
        shard = split(source)[1]
        os.truncate(shard, shard.stat().st_size - 1)
        refused(words=[str(shard), "cut off"])

    @pytest.mark.parametrize(
        "header", [b"{", b"[]", b"\xff", b"null", b"[" * 100_000, b'{"a": 1}', b"{}"]
    )
    @pytest.mark.parametrize("part", ["target", "drafter"])
    def test_broken_header(self, refused, source, part, header):
        path = part_file(source, part)
        write_raw(path, header)
        refused(words=str(path.parent))

    @pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
    @pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff\xfe", b""])
    def test_broken_json(self, refused, source, name, text):
        (source / name).write_bytes(text)
        refused(words=[str(source / name), "JSON"])

    @pytest.mark.parametrize("ids", ["<eos>", [1, []], -1, 1.5])
    def test_an_end_of_text_that_is_no_token(self, refused, source, ids):
        """Else the pair would be converted, and nothing could load it."""
        with changed_json(source / "generation_config.json") as config:
            config["eos_token_id"] = ids
        refused(words=[str(source), "eos_token_id"])

    def test_broken_tokenizer_config(self, refused, source):
        (source / "tokenizer_config.json").write_bytes(b"{")
        refused(words=[str(source / "tokenizer_config.json"), "JSON"])

    def test_no_tokenizer(self, refused, source):
        (source / "tokenizer.json").unlink()
        refused(words=[str(source), "tokenizer.json"])

    def test_pickled_weights_only(self, refused, source):
        (source / WEIGHTS).rename(source / "pytorch_model.bin")
        refused(words=[str(source), "pickled", "safe_serialization=True"])

    def test_gguf_only(self, refused, source):
        (source / WEIGHTS).rename(source / "gemma-4-Q4_0.gguf")
        refused(words=[str(source), "GGUF"])

    def test_a_pointer_of_git_lfs(self, refused, source):
        (source / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")
        refused(words=[str(source / WEIGHTS), "git lfs pull"])

    def test_no_such_folder(self, refused, tmp_path):
        refused(folder=tmp_path / "nowhere", words=str(tmp_path / "nowhere"))

    def test_a_header_as_long_as_the_file_is_not_read(self, refused, source):
        """The format allows 100 MB; a length that is damaged can be all of a shard."""
        path = source / WEIGHTS
        path.write_bytes((200 << 20).to_bytes(8, "little"))
        os.truncate(path, 300 << 20)  # holes: takes no room
        read = []
        real = Path.open

        def spied(self, *args, **settings):
            file = real(self, *args, **settings)
            if self == path:
                read.append(file)
                file = _Spy(file)
            return file

        class _Spy:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *args):
                self.file.close()

            def read(self, size):
                assert size <= 100_000_000
                return self.file.read(size)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", spied)
            argv = ["--hf-path", str(source), "--dry-run"]
            assert COMMAND.main(argv) == 1
        assert read


class TestIndex:
    def test_names_a_missing_file(self, refused, source):
        shard = split(source)[1]
        shard.unlink()
        refused(words=[str(shard), "no such file"])

    def test_names_a_missing_tensor(self, refused, source):
        shards = split(source)
        with changed_json(source / INDEX_NAME) as index:
            index["weight_map"]["layers.7.weight"] = shards[0].name
        refused(words=[str(shards[0]), "layers.7.weight"])

    @pytest.mark.parametrize(
        "name",
        [
            "../model.safetensors",
            "/etc/passwd",
            "",
            ".",
            "..",
            3,
            None,
            ["a"],
            "x" * 300,
        ],
    )
    def test_leads_out_of_the_folder(self, refused, source, name):
        split(source)
        (source.parent / WEIGHTS).write_bytes(b"")
        with changed_json(source / INDEX_NAME) as index:
            index["weight_map"][TABLE] = name
        refused(words=[INDEX_NAME, TABLE])

    def test_a_shard_that_it_does_not_name(self, refused, source):
        shard = split(source)[0]
        stray = shard.with_name("model-00004-of-00004.safetensors")
        shutil.copyfile(shard, stray)
        refused(words=[str(stray), "left over"])

    def test_a_line_end_in_a_name(self, refused, source):
        shards = split(source)
        with changed_json(source / INDEX_NAME) as index:
            index["weight_map"]["two\nlines"] = shards[0].name
        refused(words=[str(shards[0]), "lines"])

    @pytest.mark.parametrize("weight_map", [{}, [], None, "x"])
    def test_without_a_map(self, refused, source, weight_map):
        split(source)
        (source / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
        refused(words=[str(source / INDEX_NAME), "weight_map"])


class TestTensors:
    @pytest.mark.parametrize("name", [TABLE, NORM, SCALAR, LAST_PROJECTION])
    def test_missing(self, refused, source, name):
        with changed(source / WEIGHTS) as tensors:
            del tensors[name]
        refused(words=[str(source), name, "no such tensor"])

    def test_missing_in_the_drafter(self, refused, source):
        with changed(source / "drafter" / WEIGHTS) as tensors:
            del tensors["pre_projection.weight"]
        refused(words=[str(source / "drafter"), "pre_projection.weight"])

    @pytest.mark.parametrize("part", ["target", "drafter"])
    @pytest.mark.parametrize(
        "name", ["model.layers.0.surprise.weight", "x", "lm_head_2.weight", ""]
    )
    def test_unknown(self, refused, source, part, name):
        path = part_file(source, part)
        with changed(path) as tensors:
            tensors[name] = ("F32", [2], bytes(8))
        refused(words=[str(path), name, "does not have"])

    @pytest.mark.parametrize("part", ["target", "drafter"])
    def test_a_line_end_in_a_name(self, refused, source, part):
        with changed(part_file(source, part)) as tensors:
            tensors["two\nlines\r\u2028"] = ("F32", [2], bytes(8))
        refused(words="does not have")

    @pytest.mark.parametrize("change", ["transposed", "longer", "flat", "scalar"])
    def test_of_another_shape(self, refused, source, change):
        with changed(source / WEIGHTS) as tensors:
            dtype, shape, raw = tensors[LAST_PROJECTION]
            shape, raw = {
                "transposed": (shape[::-1], raw),
                "longer": ([shape[0] + 1, shape[1]], raw + bytes(4 * shape[1])),
                "flat": ([math.prod(shape)], raw),
                "scalar": ([], raw[:4]),
            }[change]
            tensors[LAST_PROJECTION] = (dtype, shape, raw)
        expected = str(read_weights(source / WEIGHTS)[LAST_PROJECTION][1])
        refused(words=[str(source / WEIGHTS), LAST_PROJECTION, expected])

    @pytest.mark.parametrize("dtype", ["I64", "F8_E4M3", "F64", "I32"])
    @pytest.mark.parametrize("name", [TABLE, NORM, SCALAR])
    def test_of_another_type(self, refused, source, name, dtype):
        with changed(source / WEIGHTS) as tensors:
            tensors[name] = retyped(tensors[name], dtype)
        refused(words=[str(source), name, dtype, "float" if "F8" in dtype else dtype])

    def test_a_type_that_never_was(self, refused, source):
        with changed(source / WEIGHTS) as tensors:
            _, shape, raw = tensors[NORM]
            tensors[NORM] = ("F31", shape, raw)
        refused(words=[str(source / WEIGHTS), NORM, "F31"])

    @pytest.mark.parametrize("dtype", [{}, ["F32"], None, 3])
    def test_a_type_that_is_no_string(self, refused, source, dtype):
        with changed(source / WEIGHTS) as tensors:
            _, shape, raw = tensors[NORM]
            tensors[NORM] = (dtype, shape, raw)
        refused(words=[str(source / WEIGHTS), NORM])

    @pytest.mark.parametrize("damage", ["reversed", "short", "beyond", "huge"])
    def test_wrong_offsets(self, refused, source, damage):
        path = source / WEIGHTS
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        first, end = header[NORM]["data_offsets"]
        size = len(raw)
        header[NORM]["data_offsets"] = {
            "reversed": [end, first],
            "short": [first, end - 1],
            "beyond": [size, size + end - first],
            "huge": [10**30, 10**30 + end - first],
        }[damage]
        write_raw(path, json.dumps(header).encode(), raw[start:])
        refused(words=[str(path), NORM])

    def test_two_tensors_in_one_place(self, refused, source):
        """The format forbids it: one of the two is damaged."""
        path = source / WEIGHTS
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        other = NORM.replace("norm", "layers.0.input_layernorm")
        assert header[other]["shape"] == header[NORM]["shape"]
        header[other]["data_offsets"] = header[NORM]["data_offsets"]
        write_raw(path, json.dumps(header).encode(), raw[start:])
        refused(words=str(path))

    def test_a_shape_of_more_digits_than_can_be_printed(self, refused, source):
        path = source / WEIGHTS
        entry = '{"dtype": "F32", "shape": [%s, %s], "data_offsets": [0, 4]}'
        digits = "9" * 4000
        write_raw(path, b'{"a": %s}' % (entry % (digits, digits)).encode(), bytes(4))
        refused(words=str(path))


class TestValues:
    @pytest.mark.parametrize("place", [0, -1])
    @pytest.mark.parametrize("name", [TABLE, NORM, SCALAR, LAST_PROJECTION])
    def test_not_finite(self, refused, source, name, place):
        with changed(source / WEIGHTS) as tensors:
            set_word(tensors[name], place, NOT_FINITE["F32"][place])
        refused(words=[str(source / WEIGHTS), name, "finite"])

    @pytest.mark.parametrize(
        ("dtype", "word"), [(d, w) for d, words in NOT_FINITE.items() for w in words]
    )
    def test_every_kind_of_it(self, refused, source, dtype, word):
        with changed(source / WEIGHTS) as tensors:
            tensors[NORM] = retyped(tensors[NORM], dtype)
            set_word(tensors[NORM], 7, word)
        refused("--no-quantize", words=[NORM, "finite"])

    @pytest.mark.parametrize("place", [0, -1])
    @pytest.mark.parametrize("quantize", [(), ("--no-quantize",)])
    def test_in_experts(self, refused, families, tmp_path, place, quantize):
        folder = copied(families["26b-a4b"], tmp_path / "moe")
        with changed(folder / WEIGHTS) as tensors:
            set_word(tensors[EXPERTS], place, NOT_FINITE["F32"][2])
        refused(*quantize, folder=folder, words=[EXPERTS, "finite"])

    def test_in_the_drafter(self, refused, source):
        with changed(source / "drafter" / WEIGHTS) as tensors:
            set_word(tensors["post_projection.weight"], -1, NOT_FINITE["F32"][0])
        path = source / "drafter" / WEIGHTS
        refused(words=[str(path), "post_projection.weight", "finite"])

    def test_in_what_is_quantized_already(self, refused, converted, tmp_path):
        folder = copied(converted, tmp_path / "quantized")
        name = "language_model.model.layers.2.mlp.up_proj.scales"
        with changed(folder / WEIGHTS) as tensors:
            set_word(tensors[name], -1, NOT_FINITE["F32"][1])
        refused(folder=folder, words=[name, "finite"])

    @pytest.mark.parametrize("dtype", ["float16"])
    @pytest.mark.parametrize("quantize", [(), ("--no-quantize",)])
    def test_too_large_for_the_type(self, refused, source, dtype, quantize):
        with changed(source / WEIGHTS) as tensors:
            for name in (TABLE, NORM):
                set_word(tensors[name], 0, 0x49742400)  # a million
        words = [TABLE, "too large for F16", "Take another --dtype."]
        assert "again" not in refused("--dtype", dtype, *quantize, words=words)

    def test_a_range_too_large_for_a_scale(self, refused, source):
        with changed(source / WEIGHTS) as tensors:
            set_word(tensors[TABLE], 0, 0x7F7FFFFF)
            set_word(tensors[TABLE], 1, 0xFF7FFFFF)
        refused(words=[TABLE, "too large"])

    @pytest.mark.parametrize(
        ("dtype", "word"),
        [("I32", 1), ("I32", 512), ("I32", -(2**31)), ("I64", 2**31 - 1), ("I64", -1)],
    )
    def test_token_ordering(self, refused, families, tmp_path, dtype, word):
        folder = copied(families["e2b"], tmp_path / "e2b")
        path = folder / "drafter" / WEIGHTS
        width = WIDTHS[dtype]
        ids = [*range(511), word]
        raw = b"".join(i.to_bytes(width, "little", signed=True) for i in ids)
        with changed(path) as tensors:
            tensors[ORDERING] = (dtype, tensors[ORDERING][1], raw)
        refused(folder=folder, words=[str(path), ORDERING, "512 token ids"])

    def test_token_ordering_of_floats(self, refused, families, tmp_path):
        folder = copied(families["e2b"], tmp_path / "e2b")
        with changed(folder / "drafter" / WEIGHTS) as tensors:
            _, shape, raw = tensors[ORDERING]
            tensors[ORDERING] = ("F32", shape, (raw + raw)[: 4 * math.prod(shape)])
        refused(folder=folder, words=[ORDERING, "I32 or I64", "F32"])


class TestPairing:
    def test_a_drafter_as_the_target(self, refused, source):
        path = source / "drafter"
        refused(folder=path, words=[str(path), "model_type", "an MTP drafter"])

    def test_a_target_as_the_drafter(self, refused, source):
        words = [str(source / "config.json"), "model_type", "a Gemma 4 target"]
        refused("--draft-model", source, words=words)

    @pytest.mark.parametrize("family", ["e2b", "31b", "26b-a4b"])
    def test_a_drafter_of_another_family(self, refused, families, family):
        other = families[family] / "drafter"
        refused(
            "--draft-model", other, words=["the drafter's ", "must be the target's"]
        )

    def test_no_drafter_anywhere(self, refused, source):
        shutil.rmtree(source / "drafter")
        refused(words=[str(source), "no drafter found", "--draft-model none"])

    def test_a_drafter_that_was_found_and_cannot_be_read(self, refused, source):
        path = source / "drafter" / WEIGHTS
        os.truncate(path, path.stat().st_size - 1)
        refused(words=[str(path), "cut off", "--draft-model none"])
        line = refused("--draft-model", source / "drafter", words="cut off")
        assert "none" not in line

    def test_a_drafter_that_was_found_and_does_not_fit(self, refused, source, families):
        shutil.rmtree(source / "drafter")
        shutil.copytree(families["26b-a4b"] / "drafter", source / "drafter")
        refused(words=["must be the target's", "--draft-model none"])

    def test_no_such_drafter(self, refused, tmp_path):
        where = tmp_path / "nowhere"
        refused("--draft-model", where, words=str(where))

    def test_another_model(self, refused, source):
        with changed_json(source / "config.json") as config:
            config["model_type"] = "llama"
        refused(words=[str(source / "config.json"), "model_type", "llama"])


class TestPlace:
    @pytest.mark.parametrize("kind", ["checkpoint", "file", "folder", "link", "broken"])
    def test_is_taken(self, refused, converted, tmp_path, kind):
        self.put(tmp_path / "out", kind, converted)
        refused(words=[str(tmp_path / "out"), "must not be there yet", "--force"])

    @pytest.mark.parametrize("kind", ["file", "folder", "link", "broken"])
    def test_may_not_be_replaced(self, refused, converted, tmp_path, kind):
        self.put(tmp_path / "out", kind, converted)
        is_link = (tmp_path / "out").is_symlink()
        word = "does not replace" if is_link else "without one"
        refused("--force", words=[str(tmp_path / "out"), word])

    def put(self, out, kind, converted):
        if kind == "checkpoint":
            copied(converted, out)
        elif kind == "file":
            out.write_text("precious")
        elif kind == "folder":
            out.mkdir()
            (out / "thesis.txt").write_text("precious")
        elif kind == "link":
            out.symlink_to(copied(converted, out.parent / "elsewhere"))
        else:
            out.symlink_to(out.parent / "nowhere")

    @pytest.mark.parametrize("force", [(), ("--force",)])
    def test_is_the_source(self, refused, source, force):
        refused(*force, out=source.name, words="another folder than --hf-path")

    @pytest.mark.parametrize("force", [(), ("--force",)])
    def test_is_a_link_to_the_source(self, refused, source, tmp_path, force):
        (tmp_path / "out").symlink_to(source)
        refused(*force, words="another folder than --hf-path")

    def test_holds_the_source(self, refused, source, tmp_path):
        (tmp_path / "out").mkdir()
        shutil.copytree(source, tmp_path / "out", dirs_exist_ok=True)
        inside = tmp_path / "out" / "source"
        source.rename(inside)
        refused("--force", folder=inside, words=[str(inside), "must not hold"])

    def test_is_the_drafter(self, refused, source, tmp_path):
        drafter = source / "drafter"
        args = ("--force", "--draft-model", drafter)
        refused(*args, out="source/drafter", words=[str(drafter), "must not hold"])

    @pytest.mark.parametrize("place", [".", "", "..", "/"])
    @pytest.mark.parametrize("force", [(), ("--force",)])
    def test_has_no_name_of_its_own(
        self, capsys, source, tmp_path, monkeypatch, place, force
    ):
        deep = tmp_path / "deep" / "here"
        deep.mkdir(parents=True)
        (deep / "other").write_text("precious")
        monkeypatch.chdir(deep)
        before = snapshot(tmp_path)
        argv = ["--hf-path", str(source), "--mlx-path", place, *force, "--no-check"]
        assert COMMAND.main(argv) == 1
        (line,) = without_bars(capsys.readouterr().err)
        assert line.startswith("error: ")
        assert snapshot(tmp_path) == before

    def test_is_below_a_file(self, refused, tmp_path):
        (tmp_path / "file").write_text("precious")
        refused(
            out="file/out", words=[str(tmp_path / "file" / "out"), "can be written"]
        )

    def test_has_a_name_too_long_for_the_disk(self, refused):
        refused(out="x" * 250, words="can be written")

    def test_cannot_be_written(self, refused, monkeypatch):
        real = Path.mkdir

        def denied(self, *args, **settings):
            if self.name == ".out.partial":
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            real(self, *args, **settings)

        monkeypatch.setattr(Path, "mkdir", denied)
        refused(words=["out", "Permission denied"])


class TestFlags:
    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (("--q-mode", "mxfp4", "--q-bits", "8"), "bits of mode mxfp4 must be 4"),
            (("--q-bits", "7"), "bits of mode affine must be 2, 3, 4, 5, 6 or 8"),
            (("--no-quantize", "--q-bits", "4"), "--no-quantize and --q-"),
            (("--draft-q-group-size", "48"), "group size of mode affine must be 32"),
            (("--no-draft-quantize", "--draft-q-mode", "mxfp8"), "--no-draft-quantize"),
            (("--q-mode", "nvfp4", "--q-group-size", "32"), "must be 16: got 32"),
            (("--q-bits", "four"), "invalid int value: 'four'"),
            (("--q-bits", "0"), "got 0"),
            (("--q-bits", "-4"), "got -4"),
            (("--q-bits", str(10**30)), "got 1000"),
        ],
    )
    def test_of_formats(self, refused, monkeypatch, args, words):
        monkeypatch.setattr(pipeline, "plan_conversion", None)  # found before
        refused(*args, words=words)

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (("--q-bits", "8"), ["the target must be a float checkpoint", "--q"]),
            (("--no-quantize",), ["the target must be a float checkpoint"]),
            (("--draft-q-bits", "8"), ["the drafter must be a float checkpoint"]),
            (("--no-draft-quantize",), ["the drafter must be a float checkpoint"]),
        ],
    )
    def test_of_what_is_quantized_already(self, refused, converted, args, words):
        refused(*args, folder=converted, words=words)


class TestSystem:
    def test_a_file_that_may_not_be_read(self, refused, source, monkeypatch):
        real = os.open

        def denied(path, *args, **settings):
            if Path(path) == source / WEIGHTS:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *args, **settings)

        monkeypatch.setattr(os, "open", denied)
        refused(words=[str(source / WEIGHTS), "Permission denied"])

    @pytest.mark.parametrize("number", [0, 20, 100])
    def test_a_disk_that_fails(self, refused, monkeypatch, number):
        real, calls = os.pread, []

        def broken(*args):
            calls.append(args)
            if len(calls) > number:
                raise OSError(errno.EIO, "Input/output error")
            return real(*args)

        monkeypatch.setattr(os, "pread", broken)
        refused(words=[WEIGHTS, ".", "Input/output error"])

    @pytest.mark.parametrize("number", [0, 1, 50, 150])
    def test_a_disk_that_is_full(self, refused, tmp_path, monkeypatch, number):
        real, calls = os.pwrite, []

        def full(*args):
            calls.append(args)
            if len(calls) > number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        monkeypatch.setattr(os, "pwrite", full)
        refused(words=["No space left", "Make room"])

    def test_short_writes_are_continued(self, source, tmp_path, converted, monkeypatch):
        real = os.pwrite

        def short(descriptor, data, start):
            return real(descriptor, data[: max(1, len(data) // 2)], start)

        monkeypatch.setattr(os, "pwrite", short)
        argv = ["--hf-path", source, "--mlx-path", tmp_path / "out", "--no-check"]
        assert COMMAND.main([str(arg) for arg in argv]) == 0
        for path in converted.rglob("*.safetensors"):
            same = tmp_path / "out" / path.relative_to(converted)
            assert same.read_bytes() == path.read_bytes()

    @pytest.mark.parametrize("call", ["ftruncate", "fsync"])
    def test_other_calls_that_fail(self, refused, monkeypatch, call):
        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, call, full)
        refused(words="No space left")

    @pytest.mark.parametrize(
        ("name", "force"),
        [
            ("config.json", ()),
            (INDEX_NAME, ()),
            ("README.md", ("--force",)),
            (".mlx_gemma_mtp.json.partial", ("--force",)),
            ("drafter/config.json", ()),
        ],
    )
    def test_small_files_that_cannot_be_written(
        self, refused, tmp_path, converted, monkeypatch, name, force
    ):
        if force:
            copied(converted, tmp_path / "out")
        real = Path.write_text

        def full(self, *args, **settings):
            if str(self).endswith(f".out.partial/{name}"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(self, *args, **settings)

        monkeypatch.setattr(Path, "write_text", full)
        refused(*force, words="No space left")

    @pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
    @pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
    def test_small_files_that_cannot_be_copied(
        self, refused, monkeypatch, name, number
    ):
        real = shutil.copyfile

        def broken(first, second, **settings):
            if Path(first).name == name:
                raise OSError(number, os.strerror(number), str(first))
            return real(first, second, **settings)

        monkeypatch.setattr(shutil, "copyfile", broken)
        refused(words=[name, os.strerror(number)])

    @pytest.mark.parametrize("force", [(), ("--force",)])
    def test_too_little_room(self, refused, converted, tmp_path, monkeypatch, force):
        if force:
            copied(converted, tmp_path / "out")
        usage = type(shutil.disk_usage(tmp_path))(10**12, 10**12, 10**6)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        monkeypatch.setattr(pipeline, "staged", None)  # nothing is begun
        refused(*force, words=[str(tmp_path / "out"), "GB free", "Make room"])

    @pytest.mark.parametrize(
        ("part", "damage", "force"),
        [
            *(("", damage, ()) for damage in ("header", "first", "last", "longer")),
            ("", "cut", ("--force",)),
            ("drafter", "last", ("--force",)),
        ],
    )
    def test_other_bytes_on_the_disk(
        self, refused, tmp_path, converted, monkeypatch, part, damage, force
    ):
        if force:
            copied(converted, tmp_path / "out")
        real = stream.verify
        path = tmp_path / ".out.partial" / part / WEIGHTS

        def damaged(regions, files, folder, *, progress):
            if folder == path.parent:
                raw = bytearray(path.read_bytes())
                start = 8 + int.from_bytes(raw[:8], "little")
                place = {"header": 20, "first": start}.get(damage, len(raw) - 1)
                if damage in ("cut", "longer"):
                    raw = raw[:-1] if damage == "cut" else raw + b"\0"
                else:
                    raw[place] ^= 4
                path.write_bytes(raw)
            return real(regions, files, folder, progress=progress)

        monkeypatch.setattr(pipeline, "verify", damaged)
        words = [str(path), "must read back as it was written"]
        refused(*force, words=words)

    @pytest.mark.parametrize(
        ("part", "change"),
        [("target", "shorter"), ("target", "gone"), ("drafter", "empty")],
    )
    def test_a_file_that_changes_after_the_plan(
        self, source, converted, tmp_path, monkeypatch, capsys, part, change
    ):
        copied(converted, tmp_path / "out")
        before = snapshot(tmp_path / "out")
        path, real = part_file(source, part), stream.write_part

        def later(plan, files, folder, *, progress):
            if plan.part == part:
                if change == "gone":
                    path.unlink()
                else:
                    size = path.stat().st_size
                    os.truncate(path, 0 if change == "empty" else size - 1)
            return real(plan, files, folder, progress=progress)

        monkeypatch.setattr(pipeline, "write_part", later)
        argv = ["--hf-path", source, "--mlx-path", tmp_path / "out", "--force"]
        assert COMMAND.main([str(arg) for arg in argv]) == 1
        (line,) = without_bars(capsys.readouterr().err)
        assert line.startswith(f"error: {path} must ")
        assert snapshot(tmp_path / "out") == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


class TestInterrupt:
    @pytest.mark.parametrize(
        ("stage", "share", "force"),
        [
            ("converting the target", 0.0, ()),
            ("converting the target", 0.5, ("--force",)),
            ("verifying the target", 1.0, ()),
            ("converting the drafter", 0.5, ()),
            ("verifying the drafter", 0.0, ("--force",)),
            ("verifying the drafter", 1.0, ("--force",)),
        ],
    )
    def test_in_the_middle(
        self, refused, tmp_path, converted, monkeypatch, stage, share, force
    ):
        if force:
            copied(converted, tmp_path / "out")

        @contextmanager
        def interrupting(what, num_bytes):
            done = []

            def advance(more):
                done.append(more)
                if what == stage and sum(done) >= share * num_bytes:
                    raise KeyboardInterrupt

            yield advance

        monkeypatch.setattr(COMMAND, "_progress", interrupting)
        refused(*force, status=130, words="interrupted")

    @pytest.mark.parametrize("where", ["_describe", "_compare", "copy_tokenizer"])
    def test_between_the_stages(self, refused, monkeypatch, where):
        def interrupt(*args, **settings):
            raise KeyboardInterrupt

        monkeypatch.setattr(pipeline, where, interrupt)
        refused(status=130, words="interrupted")

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_for_real(self, source, tmp_path, number):
        """A process of its own that is asked to stop while it writes."""
        code = (
            "import signal, sys, time; "
            "signal.signal(signal.SIGINT, signal.default_int_handler); "
            "import convert.reader as reader; from convert.__main__ import main; "
            "real = reader._read_at; "
            "reader._read_at = lambda *a: (time.sleep(0.05), real(*a))[1]; "
            "sys.exit(main(sys.argv[1:]))"
        )
        out = tmp_path / "out"
        args = ["--hf-path", source, "--mlx-path", out, "--no-check"]
        with subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ) as process:
            written = tmp_path / ".out.partial" / WEIGHTS
            limit = time.monotonic() + 60
            while not written.exists() and time.monotonic() < limit:
                time.sleep(0.01)
            process.send_signal(number)
            printed, err = process.communicate(timeout=60)
        assert (process.returncode, printed) == (128 + number, ""), err
        assert without_bars(err) == ["interrupted"]
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_while_a_thread_begins(self, source, tmp_path):
        """The pool does not know it yet, and would leave it asleep for ever."""
        code = (
            "import sys, threading\n"
            "from convert.__main__ import main\n"
            "real = threading.Thread.start\n"
            "def start(thread):\n"
            "    real(thread)\n"
            "    if thread.name.startswith('ThreadPool'):\n"
            "        raise KeyboardInterrupt\n"
            "threading.Thread.start = start\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        args = ["--hf-path", source, "--mlx-path", tmp_path / "out", "--no-check"]
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 130, done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    @pytest.mark.parametrize("number", [1, 2, 6])
    @pytest.mark.parametrize("is_late", [False, True])
    def test_while_work_is_handed_over(self, monkeypatch, number, is_late):
        """What uses the files has ended then, and nothing begins any more."""
        stream._pool(stream.NUM_WORKERS)
        submit, calls = ThreadPoolExecutor.submit, []
        begun: list[int] = []
        ended: list[int] = []

        def interrupted(pool, *args):
            calls.append(args)
            if len(calls) == number and not is_late:
                raise KeyboardInterrupt
            future = submit(pool, *args)
            if len(calls) == number:
                raise KeyboardInterrupt
            return future

        def work(job):
            begun.append(job)
            time.sleep(0.05)
            ended.append(job)
            return job

        monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(stream._in_parallel(work, range(20)))
        assert sorted(begun) == sorted(ended)
        time.sleep(0.2)  # for those that would still begin
        assert sorted(begun) == sorted(ended) == list(range(len(begun)))
        assert len(begun) <= number

    def test_while_a_result_is_waited_for(self, monkeypatch):
        result, calls = Future.result, []
        begun: list[int] = []
        ended: list[int] = []

        def interrupted(future, *args):
            calls.append(future)
            if len(calls) < 6:
                return result(future, *args)
            while 5 not in begun:
                time.sleep(0.001)
            raise KeyboardInterrupt

        def work(job):
            begun.append(job)
            time.sleep(0.5 if job == 5 else 0.01)
            ended.append(job)

        monkeypatch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(stream._in_parallel(work, range(20)))
        assert sorted(begun) == sorted(ended)


class TestForeignCode:
    @pytest.fixture
    def evil(self, source, tmp_path):
        """A pair that brings code, in every way that libraries know."""
        evidence = tmp_path / "evidence"
        code = f"open({str(evidence)!r}, 'w').close()\nclass Evil: pass\n"
        code += "EvilConfig = Evil\n"
        for folder in (source, source / "drafter"):
            for name in ("evil.py", "modeling_gemma4.py", "__init__.py", "setup.py"):
                (folder / name).write_text(code)
            with changed_json(folder / "config.json") as config:
                config["model_file"] = "evil.py"
                config["auto_map"] = {
                    "AutoConfig": "evil.EvilConfig",
                    "AutoModelForCausalLM": "evil.Evil",
                    "AutoTokenizer": ["evil.Evil", None],
                }
        with changed_json(source / "tokenizer_config.json") as config:
            config["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
        return evidence

    @pytest.mark.parametrize("check", [(), ("--no-check",)])
    def test_is_neither_run_nor_copied(self, source, tmp_path, evil, check, capsys):
        out = tmp_path / "out"
        args = ["--hf-path", source, "--mlx-path", out, *check]
        status = COMMAND.main([str(arg) for arg in args])
        err = capsys.readouterr().err
        assert not evil.exists()
        if status:  # a tokenizer that does not work without it
            (line,) = without_bars(err)
            assert line.startswith("error: ")
            return
        assert not list(out.rglob("*.py"))
        for folder in (out, out / "drafter"):
            config = json.loads((folder / "config.json").read_text())
            assert not {"model_file", "auto_map"} & set(config)

    def test_a_tokenizer_of_foreign_code(self, source, tmp_path, evil, capsys):
        with changed_json(source / "tokenizer_config.json") as config:
            config["tokenizer_class"] = "EvilTokenizer"
        self.test_is_neither_run_nor_copied(source, tmp_path, evil, (), capsys)

    def test_mlx_lm_opens_what_comes_out(self, source, tmp_path, evil):
        out = tmp_path / "out"
        args = ["--hf-path", source, "--mlx-path", out, "--no-check"]
        assert COMMAND.main([str(arg) for arg in args]) == 0
        import_module("mlx_lm.utils").load_model(out, lazy=True)
        assert not evil.exists()


class TestInPlace:
    """Only the drafter is added to a folder that is in MLX's format already."""

    @pytest.fixture
    def alone(self, converted, tmp_path):
        shutil.copytree(converted, tmp_path / "alone")
        shutil.rmtree(tmp_path / "alone" / "drafter")
        return tmp_path / "alone"

    def test_a_drafter_that_is_damaged(self, refused, source, alone):
        drafter = source / "drafter"
        with changed(drafter / WEIGHTS) as tensors:
            set_word(tensors["post_projection.weight"], -1, NOT_FINITE["F32"][0])
        args = ("--draft-model", drafter)
        refused(*args, folder=alone, out="alone", words="post_projection.weight")

    def test_a_disk_that_is_full(self, refused, source, alone, monkeypatch):
        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        args = ("--draft-model", source / "drafter")
        refused(*args, folder=alone, out="alone", words="No space left")

    def test_interrupted(self, refused, source, alone, monkeypatch):
        def interrupt(*args, **settings):
            raise KeyboardInterrupt

        monkeypatch.setattr(pipeline, "verify", interrupt)
        args = ("--draft-model", source / "drafter")
        refused(*args, folder=alone, out="alone", status=130, words="interrupted")

    def test_a_manifest_that_cannot_be_written(
        self, refused, source, alone, monkeypatch
    ):
        real = Path.write_text

        def full(self, *args, **settings):
            if self.name == ".mlx_gemma_mtp.json.partial":
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(self, *args, **settings)

        monkeypatch.setattr(Path, "write_text", full)
        args = ("--draft-model", source / "drafter")
        refused(*args, folder=alone, out="alone", words="No space left")

    def test_a_drafter_that_is_there_already(self, refused, source, alone):
        shutil.copytree(source / "drafter", alone / "drafter")
        args = ("--draft-model", source / "drafter")
        words = [str(alone / "drafter"), "must not be there yet"]
        refused(*args, folder=alone, out="alone", words=words)
