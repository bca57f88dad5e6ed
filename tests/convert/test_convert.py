"""Whole conversions of tiny random pairs, held against mlx-lm and transformers.

Run: python -m pytest tests/convert/test_convert.py
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.convert import convert as mlx_lm_convert
from mlx_lm.models import gemma4_text

import mlx_gemma_mtp
from convert import divergence, safetensors, stream
from convert.__main__ import main
from convert.divergence import Divergence, compare
from convert.pipeline import convert, plan_conversion
from convert.planner import plan_target
from convert.progress import silent
from convert.request import PartRequest, Request
from convert.streamed_target import open_target
from mlx_gemma_mtp.checkpoints.checkpoint import DTYPE_BITS, open_checkpoint
from mlx_gemma_mtp.checkpoints.quantization import Format
from mlx_gemma_mtp.checkpoints.weights import load_drafter, load_target
from mlx_gemma_mtp.errors import CheckpointError, OutputError
from mlx_gemma_mtp.pair.pair import Pair, pair_of
from tests.tiny import FAMILIES, REFERENCE, model_folder, uncompiled

LAYOUTS = ("config.json", "config.resaved.json")
MODES = {
    "float": PartRequest(is_quantized=False),
    "affine-4": PartRequest(format=Format(4, 32)),
    "affine-8": PartRequest(format=Format(8, 32)),
    "mxfp4": PartRequest(format=Format.of_mode("mxfp4")),
    "nvfp4": PartRequest(format=Format.of_mode("nvfp4")),
    "mxfp8": PartRequest(format=Format.of_mode("mxfp8")),
}
MORE_BITS = {f"affine-{b}": PartRequest(format=Format(b, 32)) for b in (2, 3, 5, 6)}
FLOAT = MODES["float"]
SCALES = ("scales", "biases")  # of a matrix in affine mode
# Tensors of random models of which one file holds all that is special.
EXPERTS, CENTROIDS = "26b-a4b", "e2b"
# Every mode on the family with the most kinds of tensors, every family in one mode.
SAME_AS_MLX_LM = [
    *((EXPERTS, mode) for mode in MODES),
    *((family, "affine-4") for family in FAMILIES if family != EXPERTS),
]
# MLX cannot pack or unpack an odd number of rows with an odd number of nvfp4 groups.
# The random E2B and E4B have such tables, which stay as they are here; in published
# models there are none.
CASES = [*SAME_AS_MLX_LM, (CENTROIDS, "nvfp4")]
PROMPT = [2, 17, 300, 45, 99, 8, 120, 33, 71]
TARGET_TOLERANCE = 5e-4  # tests/engine/test_reference.py says how it was measured
TARGET_ID, DRAFTER_ID = "google/gemma-4-E2B-it", "google/gemma-4-E2B-it-assistant"
COMMIT, DRAFTER_COMMIT = "0123456789abcdef" * 2 + "01234567", "f" * 40
WEIGHTS = "model.safetensors"
MANIFEST = "mlx_gemma_mtp.json"
ORDERING = "masked_embedding.token_ordering"


@dataclass
class Workshop:
    """Folders that tests share: sources, and what was made of them once."""

    root: Path
    made: dict[tuple[Any, ...], Path] = field(default_factory=dict)

    def source(self, family: str, layout: str = LAYOUTS[0]) -> Path:
        folder = self.root / f"{family}-{layout}"
        if not folder.exists():
            model_folder(folder, family)
            for place in (folder, folder / "drafter"):
                (place / layout).replace(place / "config.json")
        return folder

    def converted(
        self, family: str, mode: str, layout: str = LAYOUTS[0], **changes: Any
    ) -> Path:
        key = (family, mode, layout, *sorted(changes.items()))
        if key not in self.made:
            part = {**MODES, **MORE_BITS}[mode]
            place = self.root / f"made-{len(self.made)}"
            settings = {"target": part, "drafter": part, **changes}
            run(self.source(family, layout), place, **settings)
            self.made[key] = place
        return self.made[key]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("shop"))


def run(source, place, **settings) -> Divergence | str:
    request = Request(source, place, **{"has_check": False, **settings})
    return convert(plan_conversion(request), progress=silent)


def manifest(folder):
    return json.loads((folder / MANIFEST).read_text())


def digests(folder):
    return manifest(folder)["files"]


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit_config(folder, **changes):
    config = {**config_of(folder), **changes}
    (folder / "config.json").write_text(json.dumps(config))


def stored(folder) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder, read by hand: (dtype, shape, its bytes)."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, end = (start + offset for offset in entry["data_offsets"])
            found[name] = entry["dtype"], tuple(entry["shape"]), raw[first:end]
    return found


def edit_weights(folder, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    weights = mx.load(str(folder / WEIGHTS))
    assert isinstance(weights, dict)
    weights = change({name: mx.array(array) for name, array in weights.items()})
    mx.eval(weights)
    mx.save_safetensors(str(folder / WEIGHTS), weights)


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def as_bytes(array: mx.array) -> bytes:
    return np.array(array.flatten().view(mx.uint8)).tobytes()


def same_parameters(model, other) -> bool:
    ours, theirs = parameters(model), parameters(other)
    assert set(ours) == set(theirs)
    return all(
        ours[name].dtype == theirs[name].dtype
        and mx.array_equal(ours[name], theirs[name])
        for name in ours
    )


def text_of(pair: Pair, num_draft_tokens: int) -> list[int]:
    with uncompiled():
        return list(
            mlx_gemma_mtp.generate_tokens(
                pair,
                PROMPT,
                max_tokens=12,
                num_draft_tokens=num_draft_tokens,
                eos_token_ids=(),
            )
        )


def loaded_pair(folder) -> Pair:
    model, _ = mlx_gemma_mtp.load(folder)
    pair = pair_of(model)
    assert pair.drafter is not None
    return pair


def opened(folder) -> Any:
    """Model and tokenizer, by mlx-lm's own loader."""
    return mlx_lm.load(str(folder))


def snapshot(folder) -> dict[str, tuple[int, bytes]]:
    """Every file with its time and its bytes."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(call, *words, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert " must " in message
    for word in words:
        assert str(word) in message


def refused_command(capsys, argv, *words) -> None:
    """The command ends with one line on standard error."""
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert str(word) in line


# Both loaders open it, and drafting does not change the text


def check_opens(folder):
    model, tokenizer = opened(folder)
    ours, other = mlx_gemma_mtp.load(folder)
    assert same_parameters(model, ours)
    assert tokenizer.encode("an art") == other.encode("an art")
    pair = pair_of(ours)
    assert pair.drafter is not None
    assert str(folder / "drafter") in pair.drafter_source


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_both_loaders_open_it(shop, family, mode):
    check_opens(shop.converted(family, mode))


@pytest.mark.parametrize("mode", MORE_BITS)
def test_both_loaders_open_other_bits(shop, mode):
    check_opens(shop.converted(EXPERTS, mode))


# tests/engine/test_quantized.py does so with 8 bits, for every family.
@pytest.mark.parametrize(
    ("family", "mode"),
    [
        (CENTROIDS, "nvfp4"),
        (EXPERTS, "affine-4"),
        ("12b", "mxfp4"),
        ("12b", "mxfp8"),
    ],
)
def test_text_does_not_depend_on_drafting(shop, family, mode):
    pair = loaded_pair(shop.converted(family, mode))
    plain = text_of(pair, 0)
    assert text_of(pair, 4) == plain
    if mode == "affine-4":
        assert text_of(pair, 1) == plain


@pytest.mark.parametrize(
    ("family", "mode"),
    [*((family, "float") for family in FAMILIES), (EXPERTS, "affine-4")],
)
def test_the_layout_makes_no_difference(shop, family, mode):
    """Weights and every setting that mlx-lm reads are the same from both layouts."""
    published, resaved = (shop.converted(family, mode, layout) for layout in LAYOUTS)
    assert digests(published) == digests(resaved)
    for part in (".", "drafter"):
        assert config_of(published / part) == config_of(resaved / part)


def test_the_command_converts(shop, tmp_path, capsys):
    place = tmp_path / "made"
    argv = ["--hf-path", shop.source("12b"), "--mlx-path", place]
    flags = [
        *("--q-group-size", "32", "--q-bits", "8"),
        *("--draft-q-group-size", "32", "--draft-q-bits", "8"),
    ]
    assert main([str(argument) for argument in [*argv, *flags]]) == 0
    out, _ = capsys.readouterr()
    assert "target" in out
    assert "drafter" in out
    assert "drafts agree" in out
    assert f"written to {place}" in out
    assert digests(place) == digests(shop.converted("12b", "affine-8"))
    refused_command(capsys, argv, place, "--force")
    assert main([str(argument) for argument in [*argv, "--force"]]) == 0
    assert digests(place) != digests(shop.converted("12b", "affine-8"))
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("family", ["12b", CENTROIDS, EXPERTS])
def test_defaults(shop, tmp_path, family):
    """Whatever the defaults are, the pair opens and decodes."""
    place = tmp_path / "made"
    run(shop.source(family), place)
    check_opens(place)
    quantization = config_of(place)["quantization"]
    assert {quantization[k] for k in ("bits", "mode")} == {4, "affine"}
    assert config_of(place / "drafter")["quantization"]


def test_the_target_alone(shop, tmp_path):
    place = tmp_path / "made"
    run(shop.source("e4b"), place, draft_model="none", target=MODES["affine-4"])
    assert not (place / "drafter").exists()
    assert manifest(place)["drafter"] is None
    both = shop.converted("e4b", "affine-4")
    assert digests(place)[WEIGHTS] == digests(both)[WEIGHTS]
    opened(place)


# Without quantization: every bit, and the reference's logits


def expected_tensors(family) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What the source's tensors are in mlx-lm's names, worked out by hand."""
    folder = REFERENCE / family / "target"
    text = json.loads((folder / "config.json").read_text())["text_config"]
    num_own = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    made = {}
    for name, (dtype, shape, data) in stored(folder).items():
        head, _, rest = name.partition("model.language_model.")
        if head or not rest:
            continue
        parts = rest.split(".")
        is_kv = len(parts) > 3 and parts[3][:2] in ("k_", "v_")
        if parts[0] == "layers" and int(parts[1]) >= num_own and is_kv:
            continue
        stem = "language_model.model." + ".".join(parts[:-1])
        if parts[-1] == "gate_up_proj":
            width = DTYPE_BITS[dtype] // 8
            values = np.frombuffer(data, f"V{width}").reshape(shape)
            half = shape[1] // 2
            for key, piece in (("gate", values[:, :half]), ("up", values[:, half:])):
                made[f"{stem}.switch_glu.{key}_proj.weight"] = (
                    dtype,
                    piece.shape,
                    piece.tobytes(),
                )
        elif parts[-1] == "down_proj":
            made[f"{stem}.switch_glu.down_proj.weight"] = dtype, shape, data
        else:
            made[f"language_model.model.{rest}"] = dtype, shape, data
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_stays(shop, family):
    folder = shop.converted(family, "float")
    assert stored(folder) == expected_tensors(family)
    expected = stored(REFERENCE / family / "drafter")
    found = stored(folder / "drafter")
    if ORDERING in expected:
        dtype, shape, data = expected.pop(ORDERING)
        assert dtype == "I64"
        ids = np.frombuffer(data, np.int64).astype(np.int32)
        assert found.pop(ORDERING) == ("I32", shape, ids.tobytes())
    assert found == expected


@cache
def reference(family) -> dict[str, Any]:
    found = mx.load(str(REFERENCE / family / "reference.safetensors"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_references(shop, family):
    expected = reference(family)
    model, _ = opened(shop.converted(family, "float", LAYOUTS[1]))
    np.testing.assert_allclose(
        np.array(model(expected["prompt"])),
        np.array(expected["target.logits"]),
        atol=TARGET_TOLERANCE,
        rtol=0,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_are_the_references(shop, family):
    expected = reference(family)
    pair = loaded_pair(shop.converted(family, "float"))
    lengths = [int(k.split(".")[1]) for k in expected if k.endswith(".drafts")]
    assert lengths
    for length in lengths:
        prompt = expected["prompt"][0, :length].tolist()
        drafts = expected[f"draft.{length}.drafts"].tolist()
        with uncompiled():
            assert mlx_gemma_mtp.draft_block(pair, prompt, 4) == drafts


# Quantized: byte for byte what mlx-lm makes


@pytest.fixture(scope="module")
def oracle(tmp_path_factory, shop):
    """What ``mlx_lm.convert`` makes of a family."""
    root = tmp_path_factory.mktemp("oracle")

    def made(family: str, mode: str, **settings: Any) -> Path:
        # mlx-lm takes a vocabulary of 262144 where the config does not name one
        # beside the text model's settings, as no published config does.
        source = root / family
        if not source.exists():
            model_folder(source, family, has_drafter=False)
            edit_config(source, vocab_size=512)
        place = root / "-".join([family, mode, *map(str, settings.values())])
        if not place.exists():
            packed = {**MODES, **MORE_BITS}[mode].format
            if packed is not None:
                settings = {
                    "quantize": True,
                    "q_bits": packed.bits,
                    "q_group_size": packed.group_size,
                    "q_mode": packed.mode,
                    **settings,
                }
            mlx_lm_convert(str(source), str(place), **settings)
        return place

    return made


def formats_of(folder) -> dict[str, dict[str, Any]]:
    """The format of every packed matrix, as mlx-lm reads the map."""
    quantization = config_of(folder).get("quantization", {})
    assert quantization == config_of(folder).get("quantization_config", {})
    base = {k: v for k, v in quantization.items() if not isinstance(v, dict)}
    paths = [n.removesuffix(".scales") for n in stored(folder) if n.endswith(".scales")]
    assert {k for k, v in quantization.items() if isinstance(v, dict)} <= set(paths)
    return {path: {"mode": "affine", **quantization.get(path, base)} for path in paths}


def test_mlx_lm_needs_the_vocabulary_named_outside(shop, tmp_path):
    """Why the oracle's sources are changed: its own loader cannot read them."""
    with pytest.raises(ValueError, match="embed_tokens"):
        opened(shop.source("12b"))


def compared(folder, mode) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and formats in which mlx-lm and the converter agree: all but one kind.

    A router that gets 8 bits anyway is packed like the rest here; mlx-lm always takes
    groups of 64 for it.
    """

    def is_compared(name):
        return mode != "affine-8" or ".router.proj" not in name

    tensors, formats = stored(folder), formats_of(folder)
    return (
        {name: tensor for name, tensor in tensors.items() if is_compared(name)},
        {path: found for path, found in formats.items() if is_compared(path)},
    )


@pytest.mark.parametrize(("family", "mode"), SAME_AS_MLX_LM)
def test_the_target_is_mlx_lms(shop, oracle, family, mode):
    ours, theirs = shop.converted(family, mode), oracle(family, mode)
    assert compared(ours, mode) == compared(theirs, mode)


@pytest.mark.parametrize("mode", MORE_BITS)
def test_the_target_is_mlx_lms_with_other_bits(shop, oracle, mode):
    ours, theirs = shop.converted(EXPERTS, mode), oracle(EXPERTS, mode)
    assert compared(ours, mode) == compared(theirs, mode)


@pytest.mark.parametrize(
    ("family", "mode", "dtype"),
    [
        (CENTROIDS, "float", "float16"),
        (CENTROIDS, "affine-4", "bfloat16"),
        (EXPERTS, "float", "bfloat16"),
        (EXPERTS, "affine-4", "float16"),
        (EXPERTS, "mxfp4", "bfloat16"),
    ],
)
def test_the_target_is_mlx_lms_in_another_type(shop, oracle, family, mode, dtype):
    ours = shop.converted(family, mode, dtype=dtype)
    theirs = oracle(family, mode, dtype=dtype)
    assert compared(ours, mode) == compared(theirs, mode)


@pytest.mark.parametrize("mode", MODES)
def test_the_router_of_a_mixture(shop, mode):
    formats = formats_of(shop.converted(EXPERTS, mode))
    routers = {path: f for path, f in formats.items() if path.endswith("router.proj")}
    assert bool(routers) == (mode != "float")
    for found in routers.values():
        group_size = 32 if mode == "affine-8" else 64
        assert found == {"bits": 8, "group_size": group_size, "mode": "affine"}


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_the_drafter_is_what_mlx_makes(shop, family, mode):
    folder = shop.converted(family, mode) / "drafter"
    formats = formats_of(folder)
    drafter = load_drafter(REFERENCE / family / "drafter")
    if formats:
        nn.quantize(drafter, class_predicate=lambda path, _: formats.get(path, False))
    expected = parameters(drafter)
    found = stored(folder)
    assert set(found) == set(expected)
    for name, (_, shape, data) in found.items():
        array = expected[name]
        if name == ORDERING:
            array = array.astype(mx.int32)
        assert shape == array.shape
        assert data == as_bytes(array), name
    assert not any("centroids" in path for path in formats)
    assert bool(formats) == (mode != "float")


# Blocks, workers and shards make no difference


@pytest.mark.parametrize(
    ("block_bytes", "num_workers", "family", "mode"),
    [
        (1, 1, EXPERTS, "float"),  # a row at a time
        (1024, 3, EXPERTS, "affine-4"),
        (5000, 2, EXPERTS, "affine-3"),
        (256, 8, "e4b", "affine-4"),
        (3000, 1, "12b", "mxfp8"),
    ],
)
def test_blocks_and_workers_make_no_difference(
    shop, tmp_path, monkeypatch, block_bytes, num_workers, family, mode
):
    expected = digests(shop.converted(family, mode))
    monkeypatch.setattr(stream, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(stream, "NUM_WORKERS", num_workers)
    part = {**MODES, **MORE_BITS}[mode]
    run(shop.source(family), tmp_path / "made", target=part, drafter=part)
    assert digests(tmp_path / "made") == expected


@pytest.fixture
def small_files(monkeypatch):
    small = partial(safetensors.lay_out, max_file_bytes=100_000)
    monkeypatch.setattr(safetensors, "lay_out", small)


def check_file(path) -> None:
    """The format's own rules: no gap, no overlap, whole items at aligned places."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length) % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "mlx"}
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        width = DTYPE_BITS[entry["dtype"]] // 8
        first, last = entry["data_offsets"]
        assert first == end
        assert (8 + length + first) % width == 0
        assert last - first == width * math.prod(entry["shape"])
        end = last
    assert 8 + length + end == len(raw)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(
    ("family", "mode"),
    [(CENTROIDS, "nvfp4"), (EXPERTS, "float"), (EXPERTS, "affine-4")],
)
def test_shards(shop, tmp_path, family, mode):
    place, part = tmp_path / "made", MODES[mode]
    run(shop.source(family), place, target=part, drafter=part)
    for folder in (place, place / "drafter"):
        files = sorted(folder.glob("model*.safetensors"))
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == [f.name for f in files]
        whole = stored(shop.converted(family, mode) / folder.relative_to(place))
        assert stored(folder) == whole
        total = sum(len(data) for _, _, data in whole.values())
        assert index["metadata"]["total_size"] == total
        for path in files:
            check_file(path)
    assert len(list(place.glob("model-*.safetensors"))) > 1
    check_opens(place)


@pytest.mark.usefixtures("small_files")
def test_the_reference_implementation_reads_shards(shop, tmp_path):
    safe_open = pytest.importorskip("safetensors").safe_open
    place, part = tmp_path / "made", MODES["affine-4"]
    run(shop.source(EXPERTS), place, target=part, drafter=part)
    expected = stored(place)
    for path in place.glob("model*.safetensors"):
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "mlx"}
            for name in file.keys():  # no mapping
                _, shape, data = expected.pop(name)
                array = file.get_tensor(name)
                assert array.shape == shape
                assert array.tobytes() == data
    assert not expected


# Targets and drafters that are quantized already


def mixed_bits(path, module):
    if "down_proj" in path or "router" in path:
        return False
    if "embed_tokens" in path:
        return {"bits": 8, "group_size": 32, "mode": "affine"}
    return {"bits": 4, "group_size": 32, "mode": "mxfp4"} if "q_proj" in path else True


@pytest.fixture(params=["affine-4", "mixed", "nvfp4"])
def quantized(request, oracle):
    """A target that mlx-lm has quantized, and its drafter beside it."""
    if request.param == "mixed":
        return oracle(EXPERTS, "affine-4", quant_predicate=mixed_bits)
    return oracle(EXPERTS, request.param)


def test_a_quantized_target_stays(quantized, tmp_path):
    place = tmp_path / "made"
    before = snapshot(quantized)
    found = run(
        quantized,
        place,
        draft_model=REFERENCE / EXPERTS / "drafter",
        drafter=MODES["affine-8"],
        has_check=True,
    )
    assert snapshot(quantized) == before
    assert stored(place) == stored(quantized)
    assert formats_of(place) == formats_of(quantized)
    check_opens(place)
    assert isinstance(found, Divergence)
    assert found.kl <= 1e-6
    assert found.top_agreement == 1


@pytest.mark.parametrize(
    ("family", "mode"),
    [("12b", "affine-4"), ("12b", "mxfp8"), (EXPERTS, "affine-4"), (EXPERTS, "nvfp4")],
)
def test_a_target_in_full_is_mlx_lms(oracle, tmp_path, monkeypatch, family, mode):
    monkeypatch.setattr(stream, "BLOCK_BYTES", 20_000)  # many blocks
    packed = oracle(family, mode)
    place, full = tmp_path / "made", tmp_path / "mlx_lm"
    mlx_lm_convert(str(packed), str(full), dequantize=True)
    drafter = REFERENCE / family / "drafter"
    run(packed, place, draft_model=drafter, is_dequantized=True)
    made, expected = (mx.load(str(folder / WEIGHTS)) for folder in (place, full))
    assert isinstance(made, dict)
    assert isinstance(expected, dict)
    assert made.keys() == expected.keys()
    for name, array in made.items():
        # mlx-lm leaves what was packed without a type of its own in bfloat16.
        assert array.dtype == mx.float32
        assert mx.array_equal(array, expected[name].astype(mx.float32)), name
    assert formats_of(place) == {}
    assert manifest(place)["target"]["quantization"] is None
    check_opens(place)


@pytest.mark.parametrize(
    ("family", "flags"), [(CENTROIDS, []), ("12b", ["--dtype", "bfloat16"])]
)
def test_a_pair_in_full(shop, tmp_path, capsys, family, flags):
    """It is what MLX unpacks, rounded once where another type is asked for."""
    packed, place = shop.converted(family, "affine-4"), tmp_path / "made"
    argv = ["--model", str(packed), "--mlx-path", str(place), "-d", *flags]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert flags or "0.0000 nats from the source's" in said
    for part, load in ((".", load_target), ("drafter", load_drafter)):
        whole, model = parameters(load(place / part)), load(packed / part)
        expected = parameters(model)
        for path, module in model.named_modules():
            if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
                packed_weight = expected.pop(f"{path}.weight")
                scales, biases = (expected.pop(f"{path}.{n}") for n in SCALES)
                size, bits = module.group_size, module.bits
                weight = mx.dequantize(packed_weight, scales, biases, size, bits)
                expected[f"{path}.weight"] = weight
        assert whole.keys() == expected.keys()
        for name, array in expected.items():
            assert mx.array_equal(whole[name], array.astype(whole[name].dtype)), name
        floats = {
            a.dtype for a in whole.values() if mx.issubdtype(a.dtype, mx.floating)
        }
        assert not flags or floats == {mx.bfloat16}
        assert "quantization" not in config_of(place / part)
        assert "quantization_config" not in config_of(place / part)


def test_a_float_pair_in_full_is_itself(shop, tmp_path):
    run(shop.source("12b"), tmp_path / "made", is_dequantized=True)
    assert digests(tmp_path / "made") == digests(shop.converted("12b", "float"))


def test_a_scale_that_is_not_finite_is_told_before_it_spreads(shop, tmp_path):
    folder = copied(shop.converted("12b", "affine-4"), tmp_path / "packed")
    name = "language_model.model.layers.0.mlp.up_proj.scales"

    def change(tensors):
        tensors[name][3, 0] = math.nan
        return tensors

    edit_weights(folder, change)
    refused(
        lambda: run(folder, tmp_path / "made", is_dequantized=True),
        "layers.0.mlp.up_proj",
        "finite",
        "Download it again",
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["-q"],
        ["--q-bits", "4"],
        ["--draft-quantize"],
        ["--draft-q-mode", "mxfp4"],
    ],
)
def test_in_full_and_quantized_exclude_each_other(shop, tmp_path, capsys, flags):
    argv = ["--model", str(shop.source("12b")), "--mlx-path", str(tmp_path / "made")]
    refused_command(capsys, [*argv, "-d", *flags], "--dequantize", "Leave one")


def test_a_target_in_place_stays_packed(oracle, capsys):
    folder = str(oracle(EXPERTS, "affine-4"))
    argv = ["--model", folder, "--mlx-path", folder, "--dequantize"]
    refused_command(capsys, argv, "another folder", "--dequantize")


def copied(folder, place) -> Path:
    for path in folder.rglob("*"):
        if path.is_file():
            copy = place / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return place


def test_a_drafter_is_added_in_place(quantized, tmp_path):
    place = copied(quantized, tmp_path / "pair")
    before = snapshot(place)
    settings = {"draft_model": REFERENCE / EXPERTS / "drafter", "has_check": True}
    found = run(place, place, drafter=MODES["affine-8"], **settings)
    after = snapshot(place)
    assert {name: after.pop(name) for name in before} == before
    new = {name for name in after if not name.startswith("drafter/")}
    assert new == {MANIFEST}
    assert isinstance(found, Divergence)
    assert manifest(place)["drafter"]["path"] == "drafter"
    assert set(digests(place)) == {f"drafter/{WEIGHTS}"}
    check_opens(place)
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]
    refused(lambda: run(place, place, **settings), place / "drafter", error=OutputError)
    assert snapshot(place) == {**before, **after}


def test_adding_in_place_by_the_command(oracle, tmp_path, capsys):
    place = copied(oracle(EXPERTS, "affine-4"), tmp_path / "pair")
    before = snapshot(place)
    argv = ["--hf-path", place, "--mlx-path", place, "--draft-model"]
    argv.append(REFERENCE / EXPERTS / "drafter")
    assert main([str(argument) for argument in argv]) == 0
    after = snapshot(place)
    assert {name: after[name] for name in before} == before
    assert "written to" in capsys.readouterr().out


def test_a_float_target_is_not_converted_in_place(shop, tmp_path, capsys):
    place = copied(shop.source("12b"), tmp_path / "pair")
    before = snapshot(place)
    refused_command(capsys, ["--hf-path", place, "--mlx-path", place], "--mlx-path")
    assert snapshot(place) == before


def test_a_place_with_a_name_too_long(shop, tmp_path, capsys):
    place = tmp_path / ("x" * 300)
    refused_command(
        capsys, ["--hf-path", shop.source("12b"), "--mlx-path", place], "too long"
    )


@pytest.mark.parametrize(
    "flags",
    [["--q-bits", "4"], ["--q-mode", "mxfp4"], ["--no-quantize"]],
)
def test_a_quantized_target_is_not_quantized_again(quantized, tmp_path, capsys, flags):
    drafter = REFERENCE / EXPERTS / "drafter"
    argv = ["--hf-path", quantized, "--draft-model", drafter, *flags]
    refused_command(capsys, [*argv, "--mlx-path", tmp_path / "made"], "already")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "mode"), [(CENTROIDS, "affine-4"), (EXPERTS, "mxfp4")]
)
def test_a_quantized_drafter_stays(shop, tmp_path, family, mode):
    drafter = shop.converted(family, mode) / "drafter"
    place = tmp_path / "made"
    settings = {"draft_model": drafter, "target": MODES["affine-8"]}
    run(shop.source(family), place, **settings)
    assert stored(place / "drafter") == stored(drafter)
    assert formats_of(place / "drafter") == formats_of(drafter)
    refused(
        lambda: plan_conversion(
            Request(
                shop.source(family),
                tmp_path / "other",
                drafter=MODES["affine-4"],
                draft_model=drafter,
            )
        ),
        "--draft-q",
        "already",
        error=mlx_gemma_mtp.MTPError,
    )


@pytest.mark.parametrize("family", [CENTROIDS, EXPERTS])
def test_a_float_target_in_mlx_names(shop, oracle, tmp_path, family):
    """What mlx-lm converted without quantizing is a source like any other."""
    place = tmp_path / "made"
    settings = {"draft_model": REFERENCE / family / "drafter"}
    run(oracle(family, "float"), place, target=MODES["affine-4"], **settings)
    assert stored(place) == stored(shop.converted(family, "affine-4"))
    again = tmp_path / "again"
    run(shop.converted(family, "float"), again, target=MODES["affine-4"])
    assert stored(again) == stored(place)


# Types


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("float", "bfloat16"),
        ("float", "float16"),
        ("float", "float32"),
        ("affine-4", "float16"),
        pytest.param("affine-4", "bfloat16", marks=pytest.mark.slow),
        pytest.param("affine-4", "float32", marks=pytest.mark.slow),
    ],
)
def test_types(shop, mode, dtype):
    folder = shop.converted(CENTROIDS, mode, dtype=dtype)
    name = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    for part in (folder, folder / "drafter"):
        found = {array: kind for array, (kind, _, _) in stored(part).items()}
        ordering = found.pop(ORDERING, "I32")
        assert ordering == "I32"
        assert set(found.values()) == ({name} if mode == "float" else {name, "U32"})
        config = config_of(part)
        for place in (config, config["text_config"]):
            for key in ("dtype", "torch_dtype"):
                assert place.get(key, dtype) == dtype
        assert config["dtype"] == dtype
    assert manifest(folder)["target"]["float_types"] == [name]
    check_opens(folder)
    pair = loaded_pair(folder)
    assert pair.rounds.target.layout.dtype == getattr(mx, dtype)
    if mode == "affine-4" and dtype == "bfloat16":
        assert text_of(pair, 4) == text_of(pair, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_are_cast_as_mlx_does(shop, dtype):
    found = stored(shop.converted("e4b", "float", dtype=dtype))
    for name, (kind, shape, data) in expected_tensors("e4b").items():
        assert kind == "F32"
        values = mx.array(np.frombuffer(data, np.float32)).reshape(shape)
        cast = values.astype(getattr(mx, dtype))
        assert found[name][1:] == (shape, as_bytes(cast)), name


def with_value(folder, family, tensor, value, dtype=mx.float32) -> Path:
    model_folder(folder, family)

    def change(weights):
        weights = {name: array.astype(dtype) for name, array in weights.items()}
        flat = weights[tensor].flatten()
        flat[7] = value
        weights[tensor] = flat.reshape(weights[tensor].shape)
        return weights

    edit_weights(folder, change)
    return folder


UP_PROJ = "model.language_model.layers.0.mlp.up_proj.weight"
GATE_UP = "model.language_model.layers.0.experts.gate_up_proj"
NORM = "model.language_model.norm.weight"


@pytest.mark.parametrize(
    ("tensor", "mode", "dtype"),
    [
        (UP_PROJ, "float", mx.float32),
        (UP_PROJ, "affine-4", mx.bfloat16),
        (GATE_UP, "float", mx.bfloat16),
        (GATE_UP, "affine-4", mx.float32),
        (NORM, "affine-4", mx.bfloat16),
    ],
)
def test_a_value_too_large_for_float16(tmp_path, tensor, mode, dtype):
    source = with_value(tmp_path / "source", EXPERTS, tensor, 1e6, dtype)
    place = tmp_path / "made"
    settings = {"dtype": "float16", "target": MODES[mode]}
    refused(lambda: run(source, place, **settings), tensor, "too large", "--dtype")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    run(source, place, target=MODES[mode])


@pytest.mark.parametrize(
    ("mode", "value"),
    [(mode, "nan") for mode in MODES] + [("mxfp4", "inf"), ("float", "-inf")],
)
def test_a_value_that_is_not_finite(tmp_path, mode, value):
    source = with_value(tmp_path / "source", "12b", UP_PROJ, float(value))
    place = tmp_path / "made"
    refused(lambda: run(source, place, target=MODES[mode]), UP_PROJ, "finite", WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("bad", [512, -1, 0])
def test_a_token_ordering_that_is_none(shop, tmp_path, bad):
    source = copied(shop.source(CENTROIDS), tmp_path / "source")

    def change(weights):
        weights[ORDERING] = mx.where(
            mx.arange(512) == 9, bad, mx.arange(512).astype(mx.int64)
        )
        return weights

    edit_weights(source / "drafter", change)
    refused(lambda: run(source, tmp_path / "made"), ORDERING, "token ids")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Configs


@pytest.mark.parametrize(
    ("family", "model_type", "mode"),
    [
        ("31b", "gemma4_text", "float"),
        (EXPERTS, "gemma4_text", "affine-4"),
        ("12b", "gemma4_unified_text", "affine-8"),
    ],
)
def test_a_text_only_checkpoint(shop, tmp_path, family, model_type, mode):
    source = model_folder(tmp_path / "source", family)
    config = config_of(source)["text_config"]
    (source / "config.json").write_text(
        json.dumps({**config, "model_type": model_type})
    )
    prefix = "model.language_model."
    edit_weights(
        source,
        lambda weights: {
            name.replace(prefix, "model."): array
            for name, array in weights.items()
            if name.startswith(prefix)
        },
    )
    place = tmp_path / "made"
    run(source, place, target=MODES[mode], drafter=MODES[mode], has_check=True)
    check_opens(place)
    model, _ = opened(place)
    assert type(model) is gemma4_text.Model
    whole, _ = opened(shop.converted(family, mode))
    assert same_parameters(model, whole.language_model)


@pytest.mark.parametrize("family", FAMILIES)
def test_configs(shop, family):
    folder = shop.converted(family, "affine-4")
    source = config_of(REFERENCE / family / "target")
    config = config_of(folder)
    assert config["quantization"] == config["quantization_config"]
    assert config["model_type"] == source["model_type"]
    assert config["vocab_size"] == config["text_config"]["vocab_size"] == 512
    for key, value in source["text_config"].items():
        if value is not None:
            assert config["text_config"][key] == value
    for part in (folder, folder / "drafter"):
        assert "per_layer_config" not in (part / "config.json").read_text()
        assert "vision_config" not in config_of(part)
    assert list(config) == sorted(config)
    for name in ("", "drafter/"):
        path = f"{name}generation_config.json"
        origin = REFERENCE / family / f"{name or 'target'}"
        expected = (origin / "generation_config.json").read_bytes()
        assert (folder / path).read_bytes() == expected


def test_a_card_quotes_its_name(shop, tmp_path):
    place = tmp_path / 'it\'s "mine" $HOME'
    run(shop.source("12b"), place)
    text = (place / "README.md").read_text()
    command, code = re.findall(r"^```(?:bash|python)\n(.*?)\n```$", text, re.M | re.S)
    assert shlex.split(command)[2] == place.name
    call = ast.parse(code).body[-1]
    assert isinstance(call, ast.Assign)
    assert isinstance(call.value, ast.Call)
    assert ast.literal_eval(call.value.args[0]) == place.name


def test_the_card(shop):
    for family in FAMILIES:
        text = (shop.converted(family, "affine-4") / "README.md").read_text()
        assert text.startswith("---\n")
        assert "library_name: mlx" in text
        assert "4-bit affine" in text
        assert "mlx_gemma_mtp.generate --model" in text


# Manifest


@pytest.fixture
def hub_cache(tmp_path):
    """Both repositories of a pair, as the Hub's cache holds them."""
    snapshots = {}
    for repo, part, commit in (
        (TARGET_ID, "target", COMMIT),
        (DRAFTER_ID, "drafter", DRAFTER_COMMIT),
    ):
        origin = model_folder(tmp_path / "origin" / part, "e2b")
        if part == "drafter":
            origin = origin / "drafter"
        cache_folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        folder = cache_folder / "snapshots" / commit
        (cache_folder / "blobs").mkdir(parents=True)
        folder.mkdir(parents=True)
        for path in origin.iterdir():
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                (cache_folder / "blobs" / digest).write_bytes(path.read_bytes())
                (folder / path.name).symlink_to(f"../../blobs/{digest}")
        snapshots[repo] = folder
    return snapshots


def check_files(folder):
    files = digests(folder)
    present = {str(p.relative_to(folder)) for p in folder.rglob("*.safetensors")}
    assert set(files) == present
    for name, entry in files.items():
        raw = (folder / name).read_bytes()
        assert entry == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def check_no_paths(folder, *paths):
    for path in folder.rglob("*"):
        assert not path.is_symlink()
        if path.is_file():
            for place in paths:
                assert str(place).encode() not in path.read_bytes(), path


def check_parts(folder, mode):
    found = manifest(folder)
    for part, place in (("target", folder), ("drafter", folder / "drafter")):
        entry, tensors = found[part], stored(place)
        assert entry["path"] == str(place.relative_to(folder))
        assert entry["num_bytes"] == sum(len(data) for _, _, data in tensors.values())
        assert entry["quantization"] == config_of(place).get("quantization")
        assert entry["float_types"] == ["F32"]
        assert (entry["quantization"] is None) == (mode == "float")
        model = load_target(place) if part == "target" else load_drafter(place)
        if mode == "float":
            num_weights = sum(array.size for array in parameters(model).values())
            assert entry["num_parameters"] == num_weights


@pytest.mark.parametrize(
    ("family", "mode"),
    [(EXPERTS, "float"), *((family, "affine-4") for family in FAMILIES)],
)
def test_manifest(shop, family, mode):
    folder = shop.converted(family, mode)
    check_files(folder)
    check_no_paths(folder, shop.root)
    check_parts(folder, mode)
    found = manifest(folder)
    assert found["target"]["source"] == shop.source(family).name
    assert found["drafter"]["source"] == "drafter"
    assert found["target"]["revision"] is found["drafter"]["revision"] is None
    packed = manifest(shop.converted(family, "affine-4"))
    for part in ("target", "drafter"):
        assert packed[part]["num_parameters"] == found[part]["num_parameters"]


def test_manifest_of_a_hub_cache(hub_cache, tmp_path):
    place = tmp_path / "made"
    drafter = hub_cache[DRAFTER_ID]
    run(hub_cache[TARGET_ID], place, draft_model=drafter, has_check=True)
    check_files(place)
    check_no_paths(place, tmp_path)
    found = manifest(place)
    assert found["target"]["source"] == TARGET_ID
    assert found["target"]["revision"] == COMMIT
    assert found["drafter"]["source"] == DRAFTER_ID
    assert found["drafter"]["revision"] == DRAFTER_COMMIT
    text = (place / "README.md").read_text()
    assert f"- {TARGET_ID}\n" in text
    assert "license: apache-2.0" in text


# The Hub


class Hub:
    """The Hub's client, replaced; it knows a few snapshots.

    Attributes:
        is_cached: Whether they are on this machine, too.
        calls: What was asked for: the function's name, the repository.
    """

    def __init__(self, snapshots):
        self.snapshots = snapshots
        self.is_cached = False
        self.calls = []

    def snapshot_download(self, repo, *, local_files_only=False, **options):
        if local_files_only and not self.is_cached:
            raise FileNotFoundError("not in the cache")
        self.calls.append(("cached" if local_files_only else "download", repo))
        return str(self.folder(repo))

    def folder(self, repo):
        if repo not in self.snapshots:
            raise ConnectionError("no network in tests")
        return self.snapshots[repo]

    def hf_hub_download(self, repo, file, **options):
        assert not file.endswith(".safetensors")
        return str(self.folder(repo) / file)

    def model_info(self, repo, **options):
        return SimpleNamespace(sha=self.folder(repo).name)

    def list_repo_files(self, repo, **options):
        return sorted(path.name for path in self.folder(repo).iterdir())

    def parse_safetensors_file_metadata(self, repo, file, **options):
        self.calls.append(("header", repo))
        raw = (self.folder(repo) / file).read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        header.pop("__metadata__", None)
        tensors = {name: SimpleNamespace(**entry) for name, entry in header.items()}
        return SimpleNamespace(tensors=tensors)


def without_self(made, name):
    return lambda self, *args, **options: getattr(made, name)(*args, **options)


@pytest.fixture
def hub(monkeypatch, hub_cache):
    made = Hub(hub_cache)
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(made, name))
    for name in ("model_info", "list_repo_files", "parse_safetensors_file_metadata"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, without_self(made, name))
    return made


def test_a_hub_id(hub, shop, tmp_path, capsys):
    place = tmp_path / "made"
    argv = ["--hf-path", TARGET_ID, "--mlx-path", str(place), "--no-check"]
    flags = ["--q-group-size", "32", "--draft-q-group-size", "32"]
    assert main([*argv, *flags, "--draft-q-bits", "4"]) == 0
    found = manifest(place)
    assert found["target"]["source"] == TARGET_ID
    assert found["target"]["revision"] == COMMIT
    assert found["drafter"]["source"] == DRAFTER_ID
    assert found["drafter"]["revision"] == DRAFTER_COMMIT
    assert "published drafter" in found["pairing"]
    assert digests(place) == digests(shop.converted("e2b", "affine-4"))
    check_no_paths(place, tmp_path)
    check_opens(place)
    downloads = [repo for name, repo in hub.calls if name == "download"]
    assert set(downloads) == {TARGET_ID, DRAFTER_ID}
    capsys.readouterr()


@pytest.mark.parametrize("is_cached", [False, True])
def test_dry_run_of_a_hub_id(hub, tmp_path, monkeypatch, capsys, is_cached):
    """Headers only; what is on this machine anyway is read there."""
    monkeypatch.chdir(tmp_path)
    hub.is_cached = is_cached
    before = sorted(tmp_path.rglob("*"))
    assert main(["--hf-path", TARGET_ID, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"target: {TARGET_ID} at {COMMIT}" in out
    assert f"drafter: {DRAFTER_ID} at {DRAFTER_COMMIT}" in out
    call = "cached" if is_cached else "header"
    assert set(hub.calls) == {(call, TARGET_ID), (call, DRAFTER_ID)}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_hub_id_out_of_reach(hub, tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    hub.snapshots.pop(TARGET_ID)
    refused_command(capsys, ["--hf-path", TARGET_ID, *flags], TARGET_ID, " must be ")


def test_a_hub_id_of_adapters(hub, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "adapters" / COMMIT
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    hub.snapshots["someone/adapters"] = folder
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--dry-run"]):
        argv = ["--hf-path", "someone/adapters", "--mlx-path", "made", *flags]
        refused_command(capsys, argv, "adapters", "merge_and_unload")


@pytest.fixture
def uploads(monkeypatch):
    made: list[tuple[str, Any]] = []

    def create_repo(self, repo, **options):
        made.append(("create", repo))

    def upload_folder(self, **options):
        folder = Path(options["folder_path"])
        made.append((options["repo_id"], folder))
        assert (folder / "README.md").is_file()

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return made


def upload_command(shop, place):
    argv = ["--hf-path", shop.source("12b"), "--mlx-path", place, "--no-check"]
    return [str(a) for a in [*argv, "--upload-repo", "someone/pair"]]


def test_upload(shop, tmp_path, uploads, capsys):
    place = tmp_path / "made"
    assert main(upload_command(shop, place)) == 0
    assert uploads == [("create", "someone/pair"), ("someone/pair", place)]
    assert "https://huggingface.co/someone/pair" in capsys.readouterr().out
    assert "--model someone/pair" in (place / "README.md").read_text()


def test_upload_that_fails(shop, tmp_path, uploads, monkeypatch, capsys):
    def refuse(self, **options):
        raise ConnectionError("403 Forbidden\nfor a reason")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", refuse)
    place = tmp_path / "made"
    assert main(upload_command(shop, place)) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "403 Forbidden for a reason" in line
    assert f"complete in {place}" in line
    assert f"written to {place}" in out
    check_opens(place)


# How far the result is from its source


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float_conversion_diverges_by_nothing(shop, family):
    layout = LAYOUTS[1]
    source, made = shop.source(family, layout), shop.converted(family, "float", layout)
    found = compare(
        [source, source / "drafter"], [made, made / "drafter"], progress=silent
    )
    assert isinstance(found, Divergence)
    assert found.num_tokens >= 4
    assert found.kl <= 1e-6
    assert found.top_agreement == 1
    assert found.draft_agreement == 1


def test_fewer_bits_diverge_more(shop):
    family = EXPERTS
    source = shop.source(family)
    kl = []
    for mode in ("float", "affine-8", "affine-4"):
        made = shop.converted(family, mode)
        places = [made, made / "drafter"]
        found = compare([source, source / "drafter"], places, progress=silent)
        assert isinstance(found, Divergence)
        assert found.draft_agreement is not None
        assert 0 <= found.draft_agreement <= 1
        kl.append(found.kl)
    assert kl[0] < kl[1] < kl[2]


def test_divergence_is_what_its_definition_says(shop):
    source, made = shop.source("e4b"), shop.converted("e4b", "affine-4")
    found = compare([source], [made], progress=silent)
    assert isinstance(found, Divergence)
    assert found.draft_agreement is None
    _, tokenizer = opened(made)
    ids = mx.array([tokenizer.encode(divergence.TEXT)[: found.num_tokens]])
    logs = []
    for folder in (source, made):
        logits = np.array(load_target(folder)(ids)[0], dtype=np.float64)
        logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    assert found.kl == pytest.approx(kl, rel=1e-3)
    same = (logs[0].argmax(-1) == logs[1].argmax(-1)).mean()
    assert found.top_agreement == pytest.approx(same)


def read_streamed(folder, ids):
    plan = plan_target(open_checkpoint(folder), None, dtype=None)
    with open_target(plan, lambda num_bytes: None) as target:
        yield target, target.read(ids)


@pytest.fixture
def float32_rows(monkeypatch):
    """MLX unpacks rows of the modes with byte scales to bfloat16; here to float32."""
    unpacked = nn.QuantizedEmbedding.__call__
    monkeypatch.setattr(
        nn.QuantizedEmbedding,
        "__call__",
        lambda self, ids: unpacked(self, ids).astype(mx.float32),
    )


@pytest.mark.usefixtures("float32_rows")
@pytest.mark.parametrize(
    ("family", "mode"),
    [
        *((EXPERTS, mode) for mode in ("source", "affine-4", "mxfp4", "nvfp4")),
        (CENTROIDS, "nvfp4"),
        *((family, "affine-4") for family in FAMILIES if family != EXPERTS),
    ],
)
def test_the_streamed_target_is_the_target(shop, family, mode):
    folder = shop.source(family) if mode == "source" else shop.converted(family, mode)
    ids = reference(family)["prompt"][0].tolist()
    for _, reading in read_streamed(folder, ids):
        np.testing.assert_allclose(
            np.array(reading.logits),
            np.array(load_target(folder)(mx.array([ids]))[0]),
            atol=1e-4,
            rtol=0,
        )


@pytest.mark.parametrize("family", ["12b", CENTROIDS, EXPERTS])
def test_streamed_drafts_are_the_engines(shop, family):
    """On both sides of the drafter's window."""
    folder = shop.converted(family, "affine-4")
    pair = loaded_pair(folder)
    ids = reference(family)["prompt"][0].tolist()[:28]
    assert len(ids) > pair.rounds.target.layout.window + 4
    for target, reading in read_streamed(folder, ids):
        drafts = divergence._draft(folder / "drafter", target, reading, ids)
    num_blocks = len(ids) - 1
    assert len(drafts) == num_blocks * divergence.NUM_DRAFTS
    window = pair.rounds.target.layout.window
    for n in (1, 2, 9, window, window + 1, window + 2, window + 3, len(ids) - 1):
        with uncompiled():
            expected = mlx_gemma_mtp.draft_block(
                pair, ids[: n + 1], divergence.NUM_DRAFTS
            )
        assert drafts[n - 1 :: num_blocks] == expected, n


def test_a_comparison_that_fails_loses_no_conversion(shop, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("[METAL] Insufficient Memory\nof the device")

    monkeypatch.setattr(divergence.StreamedTarget, "read", fail)
    found = run(shop.source("e2b"), tmp_path / "made", has_check=True)
    assert isinstance(found, str)
    assert "not compared: RuntimeError: [METAL] Insufficient Memory of" in found
    check_opens(tmp_path / "made")


def test_too_little_memory_is_said(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(divergence, "memory_allowance", lambda: 1000)
    found = run(shop.source("12b"), tmp_path / "made", has_check=True)
    assert isinstance(found, str)
    assert "not compared" in found
    check_opens(tmp_path / "made")
